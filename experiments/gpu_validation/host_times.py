"""How long a host takes to capture an hTask's sizes: in its profile, and in its dynamic runs.

    python -m experiments.gpu_validation.host_times validation/h100_DATE [validation/h200_DATE ...]

The same work, minutes apart on one machine. What a host takes is a third of a takeover or more, so
how far the two lie apart says how far off completion times of short runs can be for that alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from muxtune.errors import ConfigError
from muxtune.validation.records import read_lines
from muxtune.validation.scoring import Row, usable


class Captured(NamedTuple):
    """Seconds of all sizes of an hTask: the mean, the shortest and the longest."""

    mean_s: float
    least_s: float
    most_s: float

    @classmethod
    def of(cls, seconds: list[float]) -> Captured:
        return cls(float(np.mean(seconds)), min(seconds), max(seconds))


def in_profile(profile: dict[str, Any]) -> Captured:
    """Every hTask begins with its largest size, which is marked as its first. Raises ConfigError
    for a profile without captures."""
    points = profile["ops"].get("capture", {}).get("points", [])
    if not points or "first" not in points[0]:
        raise _lacks("profile.json", "ops.capture with first sizes", "Profile a GPU anew")
    totals: list[float] = []
    for point in points:
        if point["first"]:
            totals.append(0.0)
        totals[-1] += point["median_s"]
    return Captured.of(totals)


def in_runs(runs: Sequence[Row]) -> Captured:
    """Of every plan of one hTask that captured anything: of several, some may have been there
    before. Raises ConfigError where there is none."""
    found = []
    for run in runs:
        log = run["measured"]
        plans = [line for line in log["lines"] if line.startswith("plan ")]
        starts = {epoch: start for epoch, start, _ in reversed(log["rounds"])}
        for name, start, seconds in log["spans"]:
            epoch = min((e for e, first in starts.items() if first >= start), default=None)
            if name == "capture" and epoch is not None and "|" not in plans[epoch]:
                found.append(seconds)
    if not found:
        raise _lacks(
            "dynamic.jsonl", "a plan that captured", "Validate on a GPU with dynamic_s > 0"
        )
    return Captured.of(found)


def _lacks(file: str, what: str, remedy: str) -> ConfigError:
    return ConfigError("folders", f"{file} lacks {what}", remedy)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+")
    for folder in parser.parse_args().folders:
        try:
            print(f"{folder}: {told(folder)}")
        except ConfigError as error:
            raise SystemExit(f"{folder}: {error}") from error
        except OSError as error:
            raise SystemExit(f"folders: {error}. Give folders of validations") from error


def told(folder: Path) -> str:
    """One line. Raises OSError, and what ``in_profile`` and ``in_runs`` do."""
    profile = in_profile(json.loads((folder / "profile.json").read_text(encoding="utf-8")))
    run = in_runs(usable(read_lines(folder / "dynamic.jsonl")))
    both = " ".join(
        f"{name} {each.mean_s:.2f} s ({each.least_s:.2f} to {each.most_s:.2f})"
        for name, each in (("profile", profile), ("runs", run))
    )
    return f"{both}, {run.mean_s / profile.mean_s - 1.0:+.0%}"


if __name__ == "__main__":
    main()
