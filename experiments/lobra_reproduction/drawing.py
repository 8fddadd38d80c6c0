"""The figure of the experiment: schemes, number of buckets, planning time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from muxtune.report.plots import DOTS_PER_INCH, MARKERS, PALETTE


def draw(path: Path, results: dict) -> None:
    figure = Figure(figsize=(11.0, 7.0), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2)
    _schemes(figure.add_subplot(grid[0, :]), results["schemes"])
    _buckets(figure.add_subplot(grid[1, 0]), results["buckets"])
    _planning(figure.add_subplot(grid[1, 1]), results["planning"])
    deployment = results["deployment"]["deployment"]
    figure.suptitle(
        "Llama-2-7B, 6 tasks, 16 A100-40GB (simulated from published layer times); "
        f"our deployment <TP,PP>: {deployment}"
    )
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _schemes(axes: Axes, rows: list[dict]) -> None:
    rows = [row for row in rows if "longest" not in row["scheme"]]  # would hide the others
    names = [row["scheme"] for row in rows]
    means = np.array([row["gpu_seconds"] for row in rows])
    spread = np.array([row["gpu_seconds_90"] for row in rows]).T
    errors = np.abs(spread - means)
    base = names.index("task-fused")
    colours = [PALETTE[1] if at == base else PALETTE[0] for at in range(len(rows))]
    axes.barh(names, means, xerr=errors, color=colours, capsize=3)
    for at, row in enumerate(rows):
        text = "baseline" if at == base else f"{-row['reduction']:+.0%}"
        axes.text(spread[1, at] * 1.01, at, text, va="center", fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("GPU-seconds a step of all tasks (mean and its 90% interval)")
    axes.margins(x=0.1)
    axes.grid(axis="x", alpha=0.3)


def _buckets(axes: Axes, rows: list[dict]) -> None:
    counts = [row["buckets"] for row in rows]
    axes.plot(counts, [row["gpu_seconds"] for row in rows], color=PALETTE[0], marker=MARKERS[0])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel("buckets (balanced, dynamic)")
    axes.set_ylabel("GPU-seconds a step", color=PALETTE[0])
    right = axes.twinx()
    padding = [100 * row["padding_share"] for row in rows]
    right.plot(counts, padding, color=PALETTE[5], marker=MARKERS[1])
    right.set_ylabel("padding (% of tokens computed)", color=PALETTE[5])
    ticks = [100, 200, 400, 800, 1600, 3200]
    shown = [t for t in ticks if axes.get_ylim()[0] <= t <= axes.get_ylim()[1]]
    axes.set_yticks(shown, [str(tick) for tick in shown])
    axes.grid(alpha=0.3)


def _planning(axes: Axes, rows: list[dict]) -> None:
    for number, (label, grows) in enumerate((("same batch", False), ("batch grows too", True))):
        chosen = [row for row in rows if (row["batch_growth"] > 1) is grows or row["gpus"] == 16]
        axes.plot(
            [row["gpus"] for row in chosen],
            [row["seconds"] for row in chosen],
            label=label,
            color=PALETTE[number],
            marker=MARKERS[number],
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([16, 32, 64, 128, 256], ["16", "32", "64", "128", "256"])
    axes.set_xlabel("GPUs")
    axes.set_ylabel("planning time (processor s, one core)")
    axes.legend()
    axes.grid(alpha=0.3)
