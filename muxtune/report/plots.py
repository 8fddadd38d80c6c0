"""Figures as PNG files. Colours are Okabe and Ito's, which people with any colour vision can
tell apart; lines differ by marker too; every axis has a label with its unit.

The object interface of matplotlib is used, never pyplot: no global state, no display.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from muxtune.report.run_folder import RunFolder

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DOTS_PER_INCH = 144
MAX_TICK_LABELS = 12  # characters of a category's name before all names are tilted
MARKERS_PER_LINE = 10
MAX_SLOWDOWN_BARS = 24


class PredictedMeasured(NamedTuple):
    """One pair of bars, in seconds. ``low_s`` and ``high_s``: 90% interval of the prediction."""

    label: str
    predicted_s: float
    measured_s: float
    low_s: float | None = None
    high_s: float | None = None

    @property
    def relative_error(self) -> float:
        """Of the prediction, against what was measured; positive: predicted too slow."""
        return self.predicted_s / self.measured_s - 1.0


class Series(NamedTuple):
    """One line: its points and, where known, the half-widths of their error bars."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    y_error: Sequence[float] | None = None


def predicted_vs_measured(
    path: Path, rows: Sequence[PredictedMeasured], title: str = "Step time of a set of tasks"
) -> Path:
    """Two bars a row, the relative error of the prediction written above them."""
    figure, axes = _axes(max(5.0, 1.8 * len(rows) + 1.5), 4.0)
    scale, unit = _time_unit(max(max(row.predicted_s, row.measured_s) for row in rows))
    for index, row in enumerate(rows):
        _predicted_bar(axes, index, row, scale)
        axes.bar(index + 0.2, row.measured_s / scale, 0.38, color=PALETTE[0])
        top = max(row.predicted_s, row.measured_s, row.high_s or 0.0) / scale
        axes.annotate(
            f"{row.relative_error:+.1%}", (index, top), (0, 4), textcoords="offset points",
            ha="center", fontsize=9,
        )  # fmt: skip
    axes.bar(0, 0, color=PALETTE[1], label="predicted (bar: 90% interval)")
    axes.bar(0, 0, color=PALETTE[0], label="measured")
    _category_axis(axes, [row.label for row in rows])
    axes.set_ylabel(f"step time ({unit})")
    axes.margins(y=0.15)
    _finish(axes, f"{title}: predicted beside measured")
    return _save(figure, path)


def _predicted_bar(axes: Axes, index: int, row: PredictedMeasured, scale: float) -> None:
    low = row.predicted_s if row.low_s is None else row.low_s
    high = row.predicted_s if row.high_s is None else row.high_s
    spread = [[(row.predicted_s - low) / scale], [(high - row.predicted_s) / scale]]
    axes.bar(
        index - 0.2,
        row.predicted_s / scale,
        0.38,
        yerr=spread if high > low else None,
        capsize=4,
        color=PALETTE[1],
    )


def perplexity_before_after(path: Path, rows: Sequence[tuple[str, float, float]]) -> Path:
    """Rows of (task, before, after); a logarithmic axis, the relative fall written above."""
    figure, axes = _axes(max(5.0, 1.3 * len(rows) + 1.5), 4.0)
    for index, (_, before, after) in enumerate(rows):
        axes.bar(index - 0.2, before, 0.38, color=PALETTE[1])
        axes.bar(index + 0.2, after, 0.38, color=PALETTE[0])
        axes.annotate(
            f"{after / before - 1.0:+.0%}", (index, max(before, after)), (0, 4),
            textcoords="offset points", ha="center", fontsize=9,
        )  # fmt: skip
    axes.bar(0, math.nan, color=PALETTE[1], label="before")
    axes.bar(0, math.nan, color=PALETTE[0], label="after")
    axes.set_yscale("log")
    axes.margins(y=0.15)
    axes.set_ylabel("held-out perplexity (log scale)")
    _plain_log_ticks(axes, [value for row in rows for value in row[1:]])
    _category_axis(axes, [row[0] for row in rows])
    _finish(axes, "Held-out perplexity of each task before and after fine-tuning")
    return _save(figure, path)


def throughput_by_planner(path: Path, rows: Sequence[tuple[str, float, float]]) -> Path:
    """Rows of (planner, effective tokens/s, padded tokens/s); padding is stacked on top."""
    figure, axes = _axes(max(5.0, 1.6 * len(rows) + 1.5), 4.0)
    for index, (_, effective, padded) in enumerate(rows):
        axes.bar(index, effective, 0.6, color=PALETTE[0])
        axes.bar(
            index, max(0.0, padded - effective), 0.6, bottom=effective, color="white",
            edgecolor=PALETTE[5], hatch="///", linewidth=1,
        )  # fmt: skip
        axes.annotate(
            f"{effective:,.0f}", (index, effective), (0, -12), textcoords="offset points",
            ha="center", fontsize=9, color="white",
        )  # fmt: skip
    axes.bar(0, 0, color=PALETTE[0], label="effective tokens")
    axes.bar(0, 0, color="white", edgecolor=PALETTE[5], hatch="///", label="padding and filler")
    axes.set_ylabel("throughput (tokens/s)")
    axes.margins(y=0.2)
    _category_axis(axes, [row[0] for row in rows])
    _finish(axes, "Throughput by planner")
    return _save(figure, path)


def slowdowns(
    path: Path, rows: Sequence[tuple[str, float, float | None]], figures: str = "measured"
) -> Path:
    """Rows of (task, slowdown, promised bound or None): a bar each, a tick at what was promised;
    of many tasks the sorted slowdowns of those with and without a promise. ``figures``: what
    predicts the time alone, measured or analytic."""
    if len(rows) > MAX_SLOWDOWN_BARS:
        return _sorted_slowdowns(path, rows, figures)
    figure, axes = _axes(max(5.0, 0.9 * len(rows) + 1.5), 4.0)
    for index, (_, slowdown, bound) in enumerate(rows):
        axes.bar(index, slowdown, 0.6, color=PALETTE[2 if bound else 0])
        axes.annotate(
            f"{slowdown:.2f}", (index, slowdown), (0, 3), textcoords="offset points",
            ha="center", fontsize=9,
        )  # fmt: skip
        if bound:
            axes.hlines(bound, index - 0.4, index + 0.4, color=PALETTE[5], linewidth=2)
    if any(bound for _, _, bound in rows):
        for color, label in ((PALETTE[2], "with max_slowdown"), (PALETTE[0], "without")):
            axes.bar(0, math.nan, color=color, label=label)
        axes.plot([], [], color=PALETTE[5], linewidth=2, label="promised")
    axes.axhline(1.0, color="#777777", linewidth=0.8, linestyle=":")
    axes.set_ylabel(f"time since placement\nover time alone ({figures} figures)")
    axes.margins(y=0.15)
    _category_axis(axes, [row[0] for row in rows])
    _finish(axes, "Slowdown of each task")
    return _save(figure, path)


def _sorted_slowdowns(
    path: Path, rows: Sequence[tuple[str, float, float | None]], figures: str
) -> Path:
    figure, axes = _axes(7.0, 4.2)
    parts = (("with max_slowdown", True, PALETTE[2]), ("without", False, PALETTE[0]))
    for label, promised, color in parts:
        values = sorted(value for _, value, bound in rows if bool(bound) is promised)
        shares = [100 * (at + 1) / len(values) for at in range(len(values))]
        if values:
            axes.step(shares, values, where="post", label=f"{label} ({len(values)})", color=color)
    for bound in sorted({bound for _, _, bound in rows if bound}):
        axes.axhline(bound, color=PALETTE[5], linewidth=1, linestyle="--")
    axes.set_yscale("log")
    axes.set_xlabel("tasks, slowest last (%)")
    axes.set_ylabel(f"time since placement / time alone ({figures} figures, log)")
    _finish(axes, "Slowdown of the tasks; dashed: promised")
    return _save(figure, path)


def loss_curves(path: Path, curves: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> Path:
    """Task to (steps, losses in nats per target token)."""
    figure, axes = _axes(8.0, 4.5)
    for style, (task_id, (steps, losses)) in zip(_styles(len(curves)), curves.items(), strict=True):
        every = max(1, len(steps) // MARKERS_PER_LINE)
        axes.plot(steps, losses, label=task_id, markersize=5, markevery=every, **style)
    axes.set_xlabel("optimizer step of the task")
    axes.set_ylabel("training loss (nats per target token)")
    _finish(axes, "Training loss of each task", legend="outside right center")
    return _save(figure, path)


def line_panels(
    path: Path,
    panels: Sequence[tuple[str, Sequence[Series]]],
    x_label: str,
    title: str,
    log_y: bool = False,
) -> Path:
    """Panels side by side, each (y label with unit, lines); one legend for all of them."""
    figure = _figure(4.6 * len(panels) + 0.6, 4.2)
    for index, (y_label, lines) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        _draw_lines(axes, lines)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if log_y:
            axes.set_yscale("log")
        _clean(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if labels:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False
        )
    figure.suptitle(title, fontsize=12)
    return _save(figure, path)


def _draw_lines(axes: Axes, lines: Sequence[Series]) -> None:
    for style, line in zip(_styles(len(lines)), lines, strict=True):
        axes.errorbar(
            line.x, line.y, yerr=line.y_error, label=line.label, capsize=3, markersize=6, **style
        )


def _styles(count: int) -> list[dict[str, Any]]:
    pairs = zip(cycle(PALETTE), cycle(MARKERS), strict=False)
    return [{"color": color, "marker": marker} for color, marker in islice(pairs, count)]


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = _figure(width, height)
    return figure, figure.add_subplot()


def _category_axis(axes: Axes, labels: Sequence[str]) -> None:
    tilt = 25 if max(map(len, labels)) > MAX_TICK_LABELS else 0
    axes.set_xticks(
        range(len(labels)), labels, rotation=tilt, ha="right" if tilt else "center"
    )  # fmt: skip


def _plain_log_ticks(axes: Axes, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    candidates = [m * 10**e for e in range(-3, 7) for m in (1, 2, 5)]
    ticks = [tick for tick in candidates if low / 2 <= tick <= high * 2]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(low / 1.6, high * 1.5)


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#cccccc", linewidth=0.6)
    axes.set_axisbelow(True)


def _finish(axes: Axes, title: str, legend: Any = "outside lower center") -> None:
    _clean(axes)
    axes.set_title(title, loc="left", fontsize=12)
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 if "right" in legend else 2
    axes.get_figure(root=True).legend(  # type: ignore[union-attr]
        handles, labels, loc=legend, ncols=columns, frameon=False
    )


def _time_unit(largest_s: float) -> tuple[float, str]:
    return (1e-3, "ms") if largest_s < 1.0 else (1.0, "s")


def _save(figure: Figure, path: Path) -> Path:
    with RunFolder(path.parent).stream(path.name, "wb") as file:
        figure.savefig(file, format="png")
    return path
