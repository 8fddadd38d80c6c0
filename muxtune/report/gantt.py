"""Schedules drawn: who ran on which stage and stream, when. Real and simulated spans alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from muxtune.planning.orchestration.spans import ScheduleSpan
from muxtune.report.perfetto import Span, write_trace
from muxtune.report.plots import PALETTE, _figure, _save, _time_unit
from muxtune.types import NS_PER_S, SubgraphKind

BACKWARD_TINT = 0.55  # share of white in a backward's colour
HATCHES = ("", "///", "...", "xxx")  # a second mark once the colours repeat
MIN_LABEL_SHARE = 0.012  # of the axis, below which a block is too narrow for its number
MIN_EDGED_SHARE = 0.004  # half of what the eye tells from its edges
LEGEND_CHARACTERS = 170  # that fit beside each other below the figure
ROW_HEIGHT = {"compute": 0.86, "comm": 0.5}

Window = tuple[int, int]


def gantt(
    path: Path,
    spans: Iterable[ScheduleSpan],
    title: str,
    window_ns: Window | None = None,
    subtitle: str = "",
) -> Path:
    """One row a stage and stream; colour: hTask; full colour forward, pale backward, black edge
    optimizer. ``window_ns``: what part of the time to draw."""
    return gantt_panels(path, [(subtitle or title, list(spans), window_ns)], title)


def gantt_panels(
    path: Path, panels: Sequence[tuple[str, Sequence[ScheduleSpan], Window | None]], title: str
) -> Path:
    """Schedules above one another on one time scale, each (caption, spans, window)."""
    shown = [(caption, _blocks(spans, window), window) for caption, spans, window in panels]
    rows = [_rows(spans) for _, spans, _ in shown]
    height = sum(0.34 * len(panel) + 0.95 for panel in rows) + 1.2
    figure = _figure(12.0, height)
    axes = figure.subplots(
        len(shown), 1, squeeze=False, height_ratios=[len(panel) + 1.5 for panel in rows]
    )[:, 0]
    longest = max((_length(spans, window) for _, spans, window in shown), default=1)
    names = dict(sorted({s.htask: s.htask_name for _, spans, _ in shown for s in spans}.items()))
    for panel, (caption, spans, window), labels in zip(axes, shown, rows, strict=True):
        _draw(panel, spans, labels, window, longest)
        panel.set_title(caption, loc="left", fontsize=10)
    axes[-1].set_xlabel(f"time ({_time_unit(longest / NS_PER_S)[1]})")
    figure.legend(
        handles=_legend(names), loc="outside lower center", frameon=False, fontsize=9,
        ncols=max(1, min(6, LEGEND_CHARACTERS // (6 + max(map(len, _labels(names)))))),
    )  # fmt: skip
    figure.suptitle(title, fontsize=12)
    return _save(figure, path)


def _blocks(spans: Sequence[ScheduleSpan], window: Window | None) -> list[ScheduleSpan]:
    """Spans in the window; neighbours of one micro-batch and direction drawn as one block."""
    low, high = window or (0, max((s.start_ns + s.duration_ns for s in spans), default=0))
    inside = [s for s in spans if s.start_ns < high and s.start_ns + s.duration_ns > low]
    merged: dict[tuple[int, str], list[ScheduleSpan]] = {}
    for span in inside:
        row = merged.setdefault((span.stage, span.stream), [])
        if row and _continues(row[-1], span):
            end = span.start_ns + span.duration_ns
            row[-1] = row[-1]._replace(duration_ns=end - row[-1].start_ns)
        else:
            row.append(span)
    return [span for row in merged.values() for span in row]


def _continues(before: ScheduleSpan, span: ScheduleSpan) -> bool:
    def key(item: ScheduleSpan) -> tuple:
        optimizer = item.kind is SubgraphKind.OPTIMIZER
        return (item.htask, item.round, item.micro_batch, item.backward, optimizer)

    return key(before) == key(span) and before.start_ns + before.duration_ns == span.start_ns


def _rows(spans: Sequence[ScheduleSpan]) -> list[tuple[int, str]]:
    return sorted({(s.stage, s.stream) for s in spans}, key=lambda row: (row[0], row[1] == "comm"))


def _length(spans: Sequence[ScheduleSpan], window: Window | None) -> int:
    low = window[0] if window else 0
    high = window[1] if window else max((s.start_ns + s.duration_ns for s in spans), default=1)
    return max(high - low, 1)


def _draw(
    axes: Axes,
    spans: Sequence[ScheduleSpan],
    rows: Sequence[tuple[int, str]],
    window: Window | None,
    longest: int,
) -> None:
    scale, _ = _time_unit(longest / NS_PER_S)
    low = window[0] if window else 0
    unit = scale * NS_PER_S
    for span in spans:
        _draw_block(axes, span, rows.index((span.stage, span.stream)), low, unit, longest / unit)
    axes.set_xlim(0, longest / unit)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [f"stage {stage} {stream}" for stage, stream in rows])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_block(
    axes: Axes, span: ScheduleSpan, row: int, low: int, unit: float, axis_length: float
) -> None:
    left = max((span.start_ns - low) / unit, 0.0)
    width = min((span.start_ns + span.duration_ns - low) / unit, axis_length) - left
    optimizer = span.kind is SubgraphKind.OPTIMIZER
    colour = "black" if optimizer else _colour(span.htask, span.backward)
    # A white edge would swallow what is short, an edge of its own colour keeps it visible.
    is_long = span.stream == "compute" and not optimizer and width > MIN_EDGED_SHARE * axis_length
    edge = "white" if is_long else colour
    axes.barh(
        row, width, ROW_HEIGHT[span.stream], left=left, color=colour, edgecolor=edge,
        linewidth=0.4, hatch=HATCHES[span.htask // len(PALETTE) % len(HATCHES)],
    )  # fmt: skip
    if span.stream == "compute" and not optimizer and width > MIN_LABEL_SHARE * axis_length:
        light = _is_light(_colour(span.htask, span.backward))
        axes.text(
            left + width / 2, row, str(span.htask), ha="center", va="center", fontsize=7,
            color="black" if light else "white", clip_on=True,
        )  # fmt: skip


def _colour(htask: int, backward: bool) -> tuple[float, float, float]:
    # The palette's black is kept for the optimizer.
    colours = (*PALETTE[:-1], "#7f7f7f")
    base = to_rgb(colours[htask % len(colours)])
    if not backward:
        return base
    red, green, blue = (part + (1.0 - part) * BACKWARD_TINT for part in base)
    return (red, green, blue)


def _is_light(colour: tuple[float, float, float]) -> bool:
    red, green, blue = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue > 0.55


def _labels(names: dict[int, str]) -> list[str]:
    own = [f"{htask}: {name}" for htask, name in names.items()]
    return [*own, "full colour: forward, pale: backward", "optimizer"]


def _legend(names: dict[int, str]) -> list[Patch]:
    colours = [*(_colour(htask, False) for htask in names), "#bbbbbb", "black"]
    pairs = zip(colours, _labels(names), strict=True)
    return [Patch(color=colour, label=label) for colour, label in pairs]


def schedule_trace(path: Path, spans: Iterable[ScheduleSpan], process: str = "stage") -> Path:
    """The same as a Chrome/Perfetto trace: a process a stage, a thread a stream."""
    return write_trace(path, _trace_spans(spans, process))


def _trace_spans(spans: Iterable[ScheduleSpan], process: str) -> Iterator[Span]:
    for span in spans:
        direction = "backward" if span.backward else "forward"
        yield Span(
            process=f"{process} {span.stage}",
            thread=span.stream,
            name=f"{span.htask_name}: {span.label}",
            start_ns=span.start_ns,
            duration_ns=span.duration_ns,
            args={
                "round": span.round,
                "micro_batch": span.micro_batch,
                "direction": direction,
                "kind": str(span.kind),
            },
        )
