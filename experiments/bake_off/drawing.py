"""Figures of the bake-off: everything against load, and distributions at one load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from experiments.bake_off.systems import PUBLISHED, SAME_KERNELS
from muxtune.report.plots import DOTS_PER_INCH, MARKERS, PALETTE

if TYPE_CHECKING:
    from experiments.bake_off.results import Point

PANELS = (
    (PUBLISHED, "each system executes as its own program does"),
    (SAME_KERNELS, "all but HF PEFT with the same fast kernels: scheduling alone"),
)
DISTRIBUTIONS_AT = {PUBLISHED: 1.0, SAME_KERNELS: 8.0}
_STYLE_OF = ("hf_peft", "muxtune", "exclusive_fast", "sl_peft", "mlora", "lorafusion", "tlora",
             "colocated", "lobra")  # fmt: skip
_SAME = {"batched_fast": "sl_peft", "lorafusion_fast": "lorafusion", "tlora_fast": "tlora",
         "muxtune_default": "muxtune"}  # fmt: skip
_COLOURS = (*PALETTE, "#888888")
_MARKERS = (*MARKERS, "<")


def style_of(name: str) -> dict:
    at = _STYLE_OF.index(_SAME.get(name, name))
    style = {"color": _COLOURS[at], "marker": _MARKERS[at]}
    if name == "exclusive_fast":  # it often lies on top of MuxTune
        return style | {"linestyle": "--", "markerfacecolor": "none", "zorder": 4}
    return style | {"linestyle": ":"} if name == "muxtune_default" else style


def draw_completion(path: Path, points: Sequence[Point]) -> None:
    """Mean completion time, mean slowdown and busy GPUs against offered load."""
    figure = Figure(figsize=(11.5, 11.0), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(3, 2, sharex="col")
    for column, (panel, title) in enumerate(PANELS):
        of_panel = [point for point in points if panel in point.system.panels]
        if panel == PUBLISHED:
            of_panel = [point for point in of_panel if point.load <= 1.5]
        top, middle, low = grid[:, column]
        _lines(top, of_panel, "mean_completion_s", 1 / 3600)
        _lines(middle, of_panel, "mean_slowdown", 1.0)
        _lines(low, of_panel, "busy_gpu_share", 100.0)
        top.set_title(title, fontsize=10)
        top.set_ylabel("mean completion time (h)")
        middle.set_ylabel("mean completion time over\nthe time alone under HF PEFT")
        low.set_ylabel("GPUs that hold a task (%)")
        for axes in (top, middle):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.yaxis.set_minor_formatter("")
        if panel == SAME_KERNELS:
            loads = sorted({point.load for point in of_panel})
            low.set_xscale("log")
            low.set_xticks(loads, [f"{load:g}" for load in loads])
            low.minorticks_off()
        low.set_ylim(0, 150)
        low.set_xlabel("offered load (1: GPUs just busy with HF PEFT, one task each)")
        low.legend(fontsize=8, loc="upper left", ncols=2)
    num_seeds = max((len(point.records) for point in points), default=0)
    figure.suptitle(
        "Philly windows on 128 H100 (simulated, Llama-2-7B); mean and 95% bootstrap interval "
        f"over {num_seeds} seeds"
    )
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _lines(axes: Axes, points: Sequence[Point], metric: str, factor: float) -> None:
    for name in dict.fromkeys(point.system.name for point in points):
        own = [point for point in points if point.system.name == name]
        found = [point.interval(metric) for point in own]
        y = factor * np.array([each.value for each in found])
        ends = factor * np.array([[each.low, each.high] for each in found]).T
        errors = np.nan_to_num(np.abs(ends - y))
        axes.errorbar(
            [point.load for point in own],
            y,
            yerr=errors,
            label=own[0].system.label,
            capsize=2,
            markersize=5,
            linewidth=2.0 if name == "muxtune" else 1.2,
            **style_of(name),
        )
    axes.grid(alpha=0.3)


def draw_distributions(path: Path, points: Sequence[Point]) -> None:
    """Completion times and slowdowns as distributions: quantiles, averaged over seeds."""
    figure = Figure(figsize=(11.5, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 2)
    for column, (panel, _) in enumerate(PANELS):
        load = DISTRIBUTIONS_AT[panel]
        chosen = [p for p in points if panel in p.system.panels and p.load == load]
        for axes, name, label in (
            (grid[0, column], "completion_s", "completion time (h)"),
            (grid[1, column], "slowdown", "completion time over the time alone under HF PEFT"),
        ):
            factor = 1 / 3600 if name == "completion_s" else 1.0
            for point in chosen:
                rows = [record[f"quantiles_{name}"] for record in point.records.values()]
                values = factor * np.exp(np.log(np.maximum(rows, 1e-9)).mean(axis=0))
                style = style_of(point.system.name)
                shares = np.linspace(0, 100, len(values))
                axes.plot(
                    values, shares, label=point.system.label, markevery=25, markersize=4, **style
                )
            axes.set_xscale("log")
            axes.set_xlabel(label)
            axes.set_ylabel("tasks (%)")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.grid(alpha=0.3)
        grid[0, column].set_xlim(left=0.01)
        grid[1, column].set_xlim(left=0.05)
        grid[0, column].set_title(f"{panel}, load {load:g}", fontsize=10)
        grid[0, column].legend(fontsize=8)
    figure.suptitle("Distributions over tasks (quantiles, geometric mean over seeds)")
    figure.savefig(path, dpi=DOTS_PER_INCH)
