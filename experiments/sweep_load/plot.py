"""Draws what the sweep has written: waiting, completion and slowdown against the offered load.

    python experiments/sweep_load/plot.py outputs/sweep_load

Reads summary.json of every run and tasks.csv for the slowdown (time on an instance over the
predicted time alone); writes slowdown.png beside the table and the plot that the sweep itself
makes, which it makes again.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd

from muxtune.report.plots import Series, line_panels
from muxtune.report.sweep import confidence_half_width, read_rows, report_sweep

QUANTILE = 0.95


def slowdowns(folder: Path) -> dict[str, dict[float, list[float]]]:
    """planner -> load -> the 95th percentile of the tasks' slowdown, one value a seed."""
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read_rows(folder):
        if row["status"] == "ok":
            tasks = pd.read_csv(folder / row["run"] / "tasks.csv")
            value = float(np.nanquantile(tasks["slowdown"].to_numpy(), QUANTILE))
            found[row["planner"]][float(row["load"])].append(value)
    return found


def mean_queueing(folder: Path) -> dict[str, dict[float, list[float]]]:
    """planner -> load -> the mean time in the queue in hours, one value a seed."""
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read_rows(folder):
        if row["status"] == "ok":
            found[row["planner"]][float(row["load"])].append(row["mean_queueing_s"] / 3600)
    return found


def lines(values: dict[str, dict[float, list[float]]]) -> list[Series]:
    return [
        Series(
            planner,
            sorted(by_load),
            [sum(by_load[load]) / len(by_load[load]) for load in sorted(by_load)],
            [confidence_half_width(by_load[load]) for load in sorted(by_load)],
        )
        for planner, by_load in values.items()
    ]


def main(folder: Path) -> None:
    report = report_sweep(folder)
    path = line_panels(
        folder / "slowdown.png",
        [
            ("mean time in the queue (h)", lines(mean_queueing(folder))),
            ("slowdown on an instance (times, 95th percentile)", lines(slowdowns(folder))),
        ],
        "offered load (1 = all GPUs busy with solo HF PEFT)",
        "Sharing shortens the queue and slows single tasks",
    )
    print(f"wrote {report.csv_path}, {report.plot_path} and {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/sweep_load"))
