"""Figures of a validation: predicted against measured, and where the errors are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

from muxtune.report.plots import DOTS_PER_INCH, MARKERS, PALETTE
from muxtune.validation.scoring import GOALS, finished, relative_error, usable

Rows = Sequence[Mapping[str, Any]]
FEWEST_BOXED = 6  # cases; fewer are drawn one by one
LINEAR_PERCENT = 5  # errors below are drawn to a linear scale, larger ones to a logarithmic one
TICKS_PERCENT = (0, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
# Of the 95th percentile, and of the mean: bands of the goals, and marks of what was reached.
GOAL_GREENS, MARK_FILLS, MARK = ("#DDF1EA", "#A6DBC8"), ("white", "#D55E00"), "#D55E00"
OPERATIONS = {
    # without _forward and _backward, which are told after a comma
    "frozen": "linear without adapters",
    "site": "linear with adapters",
    "site_factor": "gradient of adapters' A",
    "full_loss": "loss with its gradient",
    "add_norm": "residual sum and norm",
    "swiglu": "SwiGLU",
    "adamw_active": "AdamW, every adapter updated",
    "adamw_idle": "AdamW, none updated",
    "adapter_lora": "LoRA's products",
}


class Group(NamedTuple):
    """One line of ``errors.png``. ``errors``: shares. ``goal``: a key of ``GOALS``, or none."""

    name: str
    errors: Sequence[float]
    goal: str = ""
    colour: str = "white"


def draw_all(folder: Path, device: str, steps: Rows, single_ops: Rows, dynamic: Rows) -> list[Path]:
    """PNG files of what there is. ``device``: what was measured, for the titles."""
    good, drawn = usable(steps), []
    ops = [op for row in usable(single_ops) for op in row["ops"]]
    runs = {run["name"]: ends for run in usable(dynamic) if (ends := finished([run]))}
    if good:
        path = folder / "predicted_measured.png"
        drawn.append(predicted_measured(path, device, good, runs))
    if good or ops:
        panels = _panels(good, ops, [end for ends in runs.values() for end in ends])
        drawn.append(error_boxes(folder / "errors.png", device, panels))
    return drawn


def predicted_measured(path: Path, device: str, steps: Rows, runs: Mapping[str, Rows]) -> Path:
    """Steps, memory and the completion times of ``runs``; a point on the diagonal is exact."""
    figure = Figure((14.0, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    _scatter(panels[0], _by_shape(steps), "s", 1e3, "time of a step (ms)")
    _scatter(panels[1], _by_shape(steps), "bytes", 1e-9, "peak memory of a step (GB)")
    _scatter(panels[2], runs, "s", 1.0, "completion time of a task (s)")
    figure.suptitle(f"Predicted against measured on {device} (vertical lines: 90% intervals)")
    return _save(figure, path)


def _by_shape(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["case"]["shape"]["name"], []).append(row)
    return groups


def _scatter(axes: Axes, groups: Mapping[str, Rows], kind: str, scale: float, what: str) -> None:
    ends: list[float] = []
    for index, (name, all_rows) in enumerate(groups.items()):
        rows = [row for row in all_rows if row[f"measured_{kind}"] > 0]
        measured, predicted, low, high = (
            np.array([row[f"{key}_{kind}"] for row in rows]) * scale
            for key in ("measured", "predicted", "low", "high")
        )
        marker, colour = MARKERS[index % len(MARKERS)], PALETTE[index % len(PALETTE)]
        axes.plot(measured, predicted, marker, color=colour, markersize=4, alpha=0.8, label=name)
        axes.vlines(measured, low, high, color=colour, alpha=0.25, linewidth=1)
        ends += [*measured, *predicted]
    axes.set(xlabel=f"measured {what}", ylabel=f"predicted {what}")
    if not ends:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
        return
    limits = 0.8 * min(ends), 1.25 * max(ends)
    axes.plot(limits, limits, color="black", linewidth=0.8)
    if limits[1] > 10 * limits[0]:
        _log_axes(axes)
    axes.set(xlim=limits, ylim=limits)
    axes.legend(fontsize=8, loc="upper left")
    axes.grid(True, alpha=0.3)


def _log_axes(axes: Axes) -> None:
    """Ticks at 1, 2 and 5 of each decade, as plain numbers."""
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def _panels(steps: Rows, ops: Rows, ends: Rows) -> dict[str, list[Group]]:
    """The groups of each panel of ``errors.png`` by its title; what is empty is left out."""
    memory = [row for row in steps if row["measured_bytes"] > 0]
    kinds: dict[str, list[float]] = {}
    for row in ops:
        kinds.setdefault(_operation(row["op"]), []).append(relative_error(row))
    repeats = [s / row["measured_s"] - 1.0 for row in steps for s in row["repeats_s"]]
    panels = {
        "Errors of predictions beside their goals": [
            Group("steps", _errors(steps), "step"),
            Group("peak memory of steps", _errors(memory, "bytes"), "memory"),
            Group("completion times of tasks", _errors(ends), "completion"),
            Group("single operations", _errors(ops), "op"),
        ],
        "Noise of measuring: repeats of each step, relative to their median": [
            Group("repeats of steps", repeats, colour="lightgrey")
        ],
        "Errors of steps, by model": [
            Group(name, _errors(rows)) for name, rows in _by_shape(steps).items()
        ],
        "Errors of single operations, by kind": [Group(*item) for item in kinds.items()],
    }
    found = {title: [x for x in groups if x.errors] for title, groups in panels.items()}
    return {title: groups for title, groups in found.items() if groups}


def _errors(rows: Rows, kind: str = "s") -> list[float]:
    return [relative_error(row, kind) for row in rows]


def _operation(name: str) -> str:
    """As a reader says it: "attention, forward" of attention_forward.32x32x128."""
    kind = name.partition(".")[0]
    for way in ("forward", "backward"):
        if kind.endswith(f"_{way}"):
            return f"{_operation(kind.removesuffix(f'_{way}'))}, {way}"
    return OPERATIONS.get(kind, kind.replace("_", " "))


def error_boxes(path: Path, device: str, panels: Mapping[str, Sequence[Group]]) -> Path:
    """Relative errors by group; where a group has a goal, beside it."""
    sizes = [len(groups) for groups in panels.values()]
    figure = Figure((9.0, 1.6 + 0.35 * len(sizes) + 0.3 * sum(sizes)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(sizes), 1, sharex=True, squeeze=False, height_ratios=sizes)
    all_axes: list[Axes] = [*grid[:, 0]]
    for axes, (title, groups) in zip(all_axes, panels.items(), strict=True):
        _boxes(axes, groups)
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(True, axis="x", alpha=0.3)
    _percent_axis(all_axes)
    figure.suptitle(f"Errors of predictions on {device}")
    _goal_legend(figure)
    return _save(figure, path)


def _boxes(axes: Axes, groups: Sequence[Group]) -> None:
    for place, group in enumerate(groups):
        percent = [100 * error for error in group.errors]
        if group.goal:
            _goals(axes, place, group.goal, np.abs(percent))
        if len(percent) < FEWEST_BOXED:
            axes.plot(percent, [place] * len(percent), "o", color="black", markersize=3)
            continue
        axes.boxplot(
            [percent], positions=[place], widths=0.5, orientation="horizontal", whis=(5, 95),
            flierprops={"markersize": 3}, patch_artist=True, boxprops={"facecolor": group.colour},
            manage_ticks=False,
        )  # fmt: skip
    axes.set_yticks(range(len(groups)), [f"{x.name} ({len(x.errors)})" for x in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.axvline(0.0, color="black", linewidth=0.8)


def _goals(axes: Axes, place: int, name: str, sizes: np.ndarray) -> None:
    """Bands as wide as the goals and, on their right halves, marks of what was reached."""
    tail = float(np.quantile(sizes, 0.9 if name == "completion" else 0.95))
    reached = (tail, float(sizes.mean()))
    for goal, found, colour, fill in zip(
        GOALS[name][::-1], reached, GOAL_GREENS, MARK_FILLS, strict=True
    ):
        if np.isfinite(goal):
            axes.barh(place, 200 * goal, 0.9, left=-100 * goal, color=colour)
            axes.plot(found, place + 0.35, "D", color=MARK, markerfacecolor=fill, markersize=4)


def _goal_legend(figure: Figure) -> None:
    handles: list[Patch | Line2D] = []
    for what, colour, fill in zip(
        ("95th percentile of absolute errors (completion: 90th)", "mean absolute error"),
        GOAL_GREENS, MARK_FILLS, strict=True,
    ):  # fmt: skip
        mark = Line2D([], [], color=MARK, marker="D", ls="", mfc=fill, ms=4, label=what)
        handles = [Patch(color=colour, label=f"goal: {what}"), mark, *handles]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9, frameon=False)


def _percent_axis(panels: Sequence[Axes]) -> None:
    """From the last tick before to the first one behind all that is drawn."""
    drawn = [panel.dataLim for panel in panels]
    least, most = min(x.x0 for x in drawn), max(x.x1 for x in drawn)
    ticks = sorted({sign * tick for tick in TICKS_PERCENT for sign in (-1, 1)})
    low = max((tick for tick in ticks if tick <= least), default=least)
    high = min((tick for tick in ticks if tick >= most), default=most)
    axes = panels[-1]
    axes.set_xscale("symlog", linthresh=LINEAR_PERCENT, linscale=0.6)
    axes.set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(1.1 * low, 1.1 * high)
    axes.set_xlabel(
        f"relative error (%; linear up to {LINEAR_PERCENT}, then logarithmic)\n"
        f"box: quartiles and median; whiskers: 5% to 95%; fewer than {FEWEST_BOXED}: each as a dot"
    )


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=DOTS_PER_INCH)
    return path
