"""Figures of a validation: predicted against measured, and where the errors are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from muxtune.report.plots import DOTS_PER_INCH, MARKERS, PALETTE
from muxtune.validation.scoring import finished, relative_error, spread_of, usable

Rows = Sequence[Mapping[str, Any]]


def draw_all(folder: Path, steps: Rows, single_ops: Rows, dynamic: Rows) -> list[Path]:
    """PNG files of what there is."""
    ops = [op for row in usable(single_ops) for op in row["ops"]]
    ends = finished(dynamic)
    drawn = []
    if good := usable(steps):
        drawn.append(predicted_measured(folder / "predicted_measured.png", good, ends))
    if good or ops:
        drawn.append(error_boxes(folder / "errors.png", good, ops, ends))
    return drawn


def predicted_measured(path: Path, steps: Rows, ends: Rows) -> Path:
    """Steps, memory and completion times; a point on the diagonal is exact."""
    figure = Figure((14.0, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    _scatter(panels[0], _by_shape(steps), "s", 1e3, "step of all its passes (ms)", bars=True)
    _scatter(panels[1], _by_shape(steps), "bytes", 1e-9, "peak memory (GB)", bars=False)
    _scatter(panels[2], {"tasks": ends} if ends else {}, "s", 1.0, "completion time (s)", False)
    return _save(figure, path)


def _by_shape(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["case"]["shape"]["name"], []).append(row)
    return groups


def _scatter(
    axes: Axes, groups: Mapping[str, Rows], kind: str, scale: float, what: str, bars: bool
) -> None:
    ends: list[float] = []
    for index, (name, all_rows) in enumerate(groups.items()):
        rows = [row for row in all_rows if row[f"measured_{kind}"] > 0]
        measured = np.array([row[f"measured_{kind}"] for row in rows]) * scale
        predicted = np.array([row[f"predicted_{kind}"] for row in rows]) * scale
        marker, colour = MARKERS[index % len(MARKERS)], PALETTE[index % len(PALETTE)]
        axes.plot(measured, predicted, marker, color=colour, markersize=4, alpha=0.8, label=name)
        if bars:
            low, high = (np.array([row[f"{e}_{kind}"] for row in rows]) for e in ("low", "high"))
            axes.vlines(measured, low * scale, high * scale, color=colour, alpha=0.25, linewidth=1)
        ends += [*measured, *predicted]
    if ends:
        limits = 0.8 * min(ends), 1.25 * max(ends)
        axes.plot(limits, limits, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlim=limits, ylim=limits)
        if limits[1] > 10 * limits[0]:  # two decades' small ticks would write over each other
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_minor_formatter(NullFormatter())
        axes.legend(fontsize=8)
    else:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
    axes.set_xlabel(f"measured {what}")
    axes.set_ylabel(f"predicted {what}")
    axes.grid(True, alpha=0.3)


def error_boxes(path: Path, steps: Rows, ops: Rows, ends: Rows) -> Path:
    """Relative errors by group, and the repeats' spread of steps beside them."""
    groups: dict[str, list[float]] = {}
    if steps:
        groups["steps"] = [relative_error(row) for row in steps]
        groups["spread of repeats (steps)"] = [
            sign * spread_of(row["repeats_s"]) for row in steps for sign in (-1, 1)
        ]
        for name, rows in _by_shape(steps).items():
            groups[f"steps of {name}"] = [relative_error(row) for row in rows]
        memory = [row for row in steps if row["measured_bytes"] > 0]
        groups["peak memory"] = [relative_error(row, "bytes") for row in memory]
    if ends:
        groups["completion times"] = [relative_error(row) for row in ends]
    for row in ops:
        groups.setdefault(f"op {row['op'].partition('.')[0]}", []).append(relative_error(row))
    figure = Figure((9.0, 1.2 + 0.32 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    values = [[100 * error for error in group] for group in groups.values()]
    axes.boxplot(values, orientation="horizontal", whis=(5, 95), flierprops={"markersize": 3})
    axes.set_yticks(range(1, len(groups) + 1), [f"{k} ({len(v)})" for k, v in groups.items()])
    axes.invert_yaxis()
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=10)
    ticks = [-100, -50, -20, -10, -5, 0, 5, 10, 20, 50, 100, 200]
    axes.set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
    axes.minorticks_off()
    largest = max(map(abs, [10.0, *(error for group in values for error in group)]))
    axes.set_xlim(-min(110.0, 1.2 * largest), 1.2 * largest)
    axes.set_xlabel("relative error of the prediction (%; linear up to 10); box: quartiles, 5-95%")
    axes.grid(True, axis="x", alpha=0.3)
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=DOTS_PER_INCH)
    return path
