"""How long a host takes to capture an hTask's sizes: in its profile, and in its dynamic runs.

    python -m experiments.gpu_validation.host_times validation/h100_DATE [validation/h200_DATE ...]

The same work, minutes apart on one machine. What a host takes is a third of a takeover or more, so
how far the two lie apart says how far off completion times of short runs can be for that alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from muxtune.validation.records import read_lines


class Captured(NamedTuple):
    """Seconds of all sizes of an hTask: the mean, the shortest and the longest."""

    mean_s: float
    least_s: float
    most_s: float

    @classmethod
    def of(cls, seconds: list[float]) -> Captured:
        return cls(float(np.mean(seconds)), min(seconds), max(seconds))


def in_profile(profile: dict[str, Any]) -> Captured:
    """Every hTask begins with its largest size, which is marked as its first."""
    totals: list[float] = []
    for point in profile["ops"]["capture"]["points"]:
        if point["first"]:
            totals.append(0.0)
        totals[-1] += point["median_s"]
    return Captured.of(totals)


def in_runs(runs: list[dict[str, Any]]) -> Captured:
    """Of every plan that captured anything, over the hTasks that it has: those of a plan with
    several may have been there before, so plans with one alone are counted."""
    found = []
    for run in runs:
        log = run["measured"]
        plans = [line for line in log["lines"] if line.startswith("plan ")]
        starts = {epoch: start for epoch, start, _ in reversed(log["rounds"])}
        for name, start, seconds in log["spans"]:
            epoch = min((e for e, first in starts.items() if first >= start), default=None)
            if name == "capture" and epoch is not None and "|" not in plans[epoch]:
                found.append(seconds)
    return Captured.of(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+")
    for folder in parser.parse_args().folders:
        profile = in_profile(json.loads((folder / "profile.json").read_text(encoding="utf-8")))
        runs = [row for row in read_lines(folder / "dynamic.jsonl") if not row.get("error")]
        run = in_runs(runs)
        told = " ".join(
            f"{name} {each.mean_s:.2f} s ({each.least_s:.2f} to {each.most_s:.2f})"
            for name, each in (("profile", profile), ("runs", run))
        )
        print(f"{folder}: {told}, {run.mean_s / profile.mean_s - 1.0:+.0%}")


if __name__ == "__main__":
    main()
