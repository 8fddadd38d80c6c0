"""How far do the dynamic runs that a profile draws hang on its times?

    python -m experiments.gpu_validation.robustness validation/h200_DATE/profile.json
        [--hashes 30] [--draws N] [--seconds S] [--output robustness.json]

Draws the runs of as many profiles that differ in nothing but their hash, simulates each, and again
with all times a few percent shorter and longer, and with takeovers alone 15%, by which a host
differs from itself some minutes before. Prints the share of runs that keep their decisions, and how
far completion times are off. ``--draws 1``: of each run the first draw, tie or not; ``--seconds``:
of each run. Nothing is measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from muxtune.cost.schema import Profile, content_hash, load_profile, parse_profile
from muxtune.report.run_folder import provenance
from muxtune.validation.dynamic import (
    MOST_DRAWS,
    NOMINAL,
    DynamicCase,
    Log,
    Rehearsal,
    draw_dynamic,
)
from muxtune.validation.models import Models
from muxtune.validation.running import ValidationOptions, grid_rows

ALL, TAKEOVERS = "all times", "takeovers"
ERRORS = ((ALL, 0.03), (ALL, 0.06), (TAKEOVERS, 0.15))
DURATION_S = 45.0


def profiles(path: Path, count: int) -> Iterator[Profile]:
    """Made on other days, as it were."""
    load_profile(path)
    raw = json.loads(path.read_text(encoding="utf-8"))
    for number in range(count):
        raw["created"] = f"{raw['created'][:10]} copy {number}"
        yield parse_profile({**raw, "content_hash": content_hash(raw)})


def completion_errors(case: DynamicCase, usual: Log, other: Log) -> list[float]:
    """Of each task, relative to its completion time from its arrival."""
    return [
        abs(other.ended[task.task_id].ended_ns - usual.ended[task.task_id].ended_ns)
        / (usual.ended[task.task_id].ended_ns - task.arrival_ns)
        for task in case.tasks
    ]


def judge(profile: Profile, most_draws: int, duration_s: float) -> list[dict[str, Any]]:
    """One row a run and error of the times."""
    most_rows = grid_rows(profile, ValidationOptions(0.0))[-1]
    rehearsal, rows = Rehearsal(profile), []
    for case in draw_dynamic(Models(profile), duration_s, most_rows, most_draws):
        usual = rehearsal.run(case, NOMINAL)
        for what, error in ERRORS:
            for factor in (1.0 - error, 1.0 + error):
                steps = factor if what == ALL else 1.0
                other = rehearsal.run(case, NOMINAL._replace(steps=steps, takeovers=factor))
                rows.append(
                    {
                        "run": case.name,
                        "error": (what, error),
                        "kept": other.lines == usual.lines,
                        "completion": completion_errors(case, usual, other),
                    }
                )
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for error in ERRORS:
        of_error = [row for row in rows if row["error"] == error]
        errors = np.sort(np.concatenate([row["completion"] for row in of_error]))
        found.append(
            {
                "off": error[0],
                "times_off_by": error[1],
                "runs": len(of_error),
                "kept_decisions": sum(row["kept"] for row in of_error),
                "completion_error_mean": float(errors.mean()),
                "completion_error_worst_decile": float(np.quantile(errors, 0.9)),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("profile", type=Path)
    parser.add_argument("--hashes", type=int, default=30)
    parser.add_argument("--draws", type=int, default=MOST_DRAWS)
    parser.add_argument("--seconds", type=float, default=DURATION_S)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.seconds <= 0:
        parser.error(f"--seconds is {args.seconds:g}: give seconds of a run, more than 0")
    rows = [
        row
        for item in profiles(args.profile, args.hashes)
        for row in judge(item, args.draws, args.seconds)
    ]
    found: dict[str, Any] = {"draws": args.draws, "hashes": args.hashes, "seconds": args.seconds}
    found["found"] = summary(rows)
    text = json.dumps(found, indent=1)
    print(text)
    if args.output:
        found["provenance"] = provenance()
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
