"""Aggregates of a sweep and its pictures: seeds averaged with intervals, policies in pairs.

What is drawn depends on what was varied: completion times always; mean completion time against
the load with its knee; service level against the fleet's size; cost against the slowest tasks;
GPUs at work and the queue over time.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from muxtune.cost.devices import device_figures
from muxtune.errors import ConfigError
from muxtune.report.capacity_figures import pareto_front
from muxtune.report.html import Image
from muxtune.report.plots import (
    MARKERS,
    PALETTE,
    Series,
    _axes,
    _clean,
    _save,
    line_panels,
)
from muxtune.report.statistics import Interval, bootstrap_interval, paired_interval
from muxtune.report.timelines import busy_spans, mean_count, share_done

LOAD, FLEET = "workload.load", "cluster.num_gpus"
SEEDS = frozenset({"seed", "workload.seed", "model.seed"})
BASELINES = ("exclusive", "fifo_exclusive")
TASKS_FILE = "tasks.csv"
MAX_START_DELAY_S, MAX_SLOWDOWN = 600.0, 3.0
MAX_LINES = 8
AGGREGATED = (
    *("mean_completion_time_s", "p95_completion_time_s", "p99_completion_time_s"),
    *("mean_queueing_s", "effective_tokens_per_s", "gpu_hours", "utilisation", "makespan_s"),
)
Row = Mapping[str, Any]
Key = tuple[str, ...]


class Group(NamedTuple):
    """Runs that differ in their seed only; ``key``: values of what was varied."""

    key: Key
    by_seed: Mapping[Key, Row]

    @property
    def rows(self) -> list[Row]:
        return list(self.by_seed.values())


def groups_of(rows: Sequence[Row], varied: Sequence[str]) -> list[Group]:
    """In order of first appearance; failed runs are left out."""
    names, seeds = _names(varied), [name for name in varied if name in SEEDS]
    found: dict[Key, dict[Key, Row]] = {}
    for row in rows:
        if row["status"] == "ok":
            key = tuple(str(row["overrides"].get(name)) for name in names)
            seed = tuple(str(row["overrides"].get(name)) for name in seeds)
            found.setdefault(key, {})[seed or (str(row["run"]),)] = row
    return [Group(key, by_seed) for key, by_seed in found.items()]


def _names(varied: Sequence[str]) -> list[str]:
    return [name for name in varied if name not in SEEDS]


# ------------------------------------------------------------------------------------------ table


def aggregate(rows: Sequence[Row], varied: Sequence[str]) -> list[dict[str, Any]]:
    """One row a combination: means with bootstrap intervals over the seeds, and, where a baseline
    was swept beside other policies, the ratio to its run of the same seed."""
    names, groups = _names(varied), groups_of(rows, varied)
    by_key = {group.key: group for group in groups}
    table = []
    for group in groups:
        row: dict[str, Any] = dict(zip(names, group.key, strict=True))
        row["num_runs"] = len(group.by_seed)
        for column in AGGREGATED:
            interval = _interval(group, column)
            row |= _cells(column, interval)
        key = _baseline_key(group.key, set(by_key))
        base = None if key is None else by_key[key]
        row |= _cells("completion_time_over_baseline", _ratio(group, base))
        table.append(row)
    return table


def _cells(name: str, interval: Interval | None) -> dict[str, Any]:
    low = interval.low if interval and math.isfinite(interval.low) else None
    high = interval.high if interval and math.isfinite(interval.high) else None
    return {name: interval.value if interval else None, f"{name}_low": low, f"{name}_high": high}


def _interval(group: Group, column: str) -> Interval | None:
    values = [row.get(column) for row in group.rows]
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
        return None
    return bootstrap_interval([float(value) for value in values])  # type: ignore[arg-type]


def _baseline_key(key: Key, known: set[Key]) -> Key | None:
    """The same combination under a baseline; None where the sweep has none, or for itself."""
    for index in range(len(key)):
        for name in BASELINES:
            other = (*key[:index], name, *key[index + 1 :])
            if other in known and other != key:
                return other
    return None


def _ratio(group: Group, base: Group | None, column: str = "mean_completion_time_s"):
    if base is None:
        return None
    shared = [seed for seed in group.by_seed if seed in base.by_seed]
    pairs = [(group.by_seed[s].get(column), base.by_seed[s].get(column)) for s in shared]
    if not pairs or not all(isinstance(value, float) for pair in pairs for value in pair):
        return None
    ours, theirs = zip(*pairs, strict=True)
    return paired_interval([ours, theirs], lambda a, b: a.mean(axis=-1) / b.mean(axis=-1))


# --------------------------------------------------------------------------------------- pictures


def draw_sweep(folder: Path, rows: Sequence[Row], varied: Sequence[str]) -> list[Image]:
    """Those that the runs have data for."""
    groups = groups_of(rows, varied)
    if not groups:
        return []
    images = [
        _knee_figure(folder, groups, varied),
        _service_figure(folder, groups, varied),
        _pareto_figure(folder, groups, varied),
        _completion_figure(folder, groups, varied),
        _over_time_figure(folder, groups, varied),
    ]
    return [image for image in images if image is not None]


def knee(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Where a curve that bends upwards bends most: the point farthest below the chord, both axes
    scaled to [0, 1] (the idea of Satopää et al., "Finding a Kneedle in a Haystack", 2011). None
    for fewer than three points or a curve that lies on or above its chord."""
    if len(x) < 3 or max(x) == min(x) or max(y) == min(y):
        return None
    across = (np.asarray(x) - x[0]) / (x[-1] - x[0])
    up = (np.asarray(y) - min(y)) / (max(y) - min(y))
    chord = up[0] + (up[-1] - up[0]) * across
    below = chord - up
    return float(x[int(below.argmax())]) if below.max() > 1e-9 else None


def _lines_over(
    groups: Sequence[Group], varied: Sequence[str], x_name: str
) -> dict[str, dict[float, Group]]:
    """Label to x to group."""
    names = _names(varied)
    at = names.index(x_name)
    lines: dict[str, dict[float, Group]] = {}
    for group in groups:
        label = ", ".join((*group.key[:at], *group.key[at + 1 :])) or "all runs"
        lines.setdefault(label, {})[float(group.key[at])] = group
    return dict(list(lines.items())[:MAX_LINES])


def _is_swept(varied: Sequence[str], groups: Sequence[Group], name: str) -> bool:
    if name not in _names(varied):
        return False
    at = _names(varied).index(name)
    try:
        return all(math.isfinite(float(group.key[at])) for group in groups)
    except ValueError:
        return False


def _knee_figure(folder: Path, groups: Sequence[Group], varied: Sequence[str]) -> Image | None:
    if not _is_swept(varied, groups, LOAD):
        return None
    figure, axes = _axes(7.5, 4.4)
    knees = []
    lines = _lines_over(groups, varied, LOAD)
    for (label, points), colour, marker in zip(lines.items(), PALETTE, MARKERS, strict=False):
        xs = sorted(points)
        found = [_interval(points[x], "mean_completion_time_s") for x in xs]
        if any(item is None for item in found):
            continue
        hours = np.array([[i.value, i.low, i.high] for i in found if i is not None]) / 3_600
        ends = np.nan_to_num(np.abs(hours[:, 1:] - hours[:, :1])).T
        axes.errorbar(xs, hours[:, 0], yerr=ends, label=label, capsize=3, color=colour,
                      marker=marker)  # fmt: skip
        bend = knee(xs, hours[:, 0].tolist())
        if bend is not None:
            axes.axvline(bend, color=colour, linestyle=":", linewidth=1)
            knees.append(f"{label}: {bend:g}")
    axes.set_xlabel("offered load (1 = all GPUs busy with solo HF PEFT)")
    axes.set_ylabel("mean completion time (h)")
    axes.legend(frameon=False)
    _clean(axes)
    told = "Mean completion time against load, 95% intervals over seeds; dotted: the knee"
    path = _save(figure, folder / "load_knee.png")
    return Image(path, f"{told} ({'; '.join(knees)})" if knees else told)


def _service_figure(folder: Path, groups: Sequence[Group], varied: Sequence[str]) -> Image | None:
    if not _is_swept(varied, groups, FLEET):
        return None
    lines = []
    for label, points in _lines_over(groups, varied, FLEET).items():
        xs = sorted(points)
        found = [[_served(folder, row) for row in points[x].rows] for x in xs]
        if any(value is None for values in found for value in values):
            return None
        intervals = [bootstrap_interval([v for v in values if v is not None]) for values in found]
        widths = [0.0 if math.isnan(item.low) else item.half_width for item in intervals]
        lines.append(Series(label, xs, [item.value for item in intervals], widths))
    label = (
        f"share that starts in {MAX_START_DELAY_S / 60:g} min and ends in {MAX_SLOWDOWN:g} x alone"
    )
    path = line_panels(
        folder / "service_level.png", [(label, lines)], "GPUs", "Service level against fleet size"
    )
    return Image(path, "Service level against fleet size; bars: 95% intervals over seeds")


def _served(folder: Path, row: Row) -> float | None:
    tasks = read_tasks(folder / str(row["run"]))
    if not tasks:
        return None
    kept = [
        item["state"] == "done"
        and float(item["queueing_s"]) <= MAX_START_DELAY_S
        and (not item["slowdown"] or float(item["slowdown"]) <= MAX_SLOWDOWN)
        for item in tasks
    ]
    return sum(kept) / len(kept)


def _pareto_figure(folder: Path, groups: Sequence[Group], varied: Sequence[str]) -> Image | None:
    points = [(", ".join(group.key), *_cost_and_tail(group)) for group in groups]
    good = [(label, usd, tail) for label, usd, tail in points if usd is not None and tail]
    if len(good) < 2:
        return None
    figure, axes = _axes(7.5, 4.6)
    for index, (label, usd, tail) in enumerate(good):
        axes.scatter(tail / 3_600, usd, s=60, color=PALETTE[index % len(PALETTE)],
                     marker=MARKERS[index // len(PALETTE) % len(MARKERS)],
                     label=label if index < 3 * MAX_LINES else None)  # fmt: skip
    front = pareto_front([(tail, usd) for _, usd, tail in good])
    axes.plot([x / 3_600 for x, _ in front], [y for _, y in front], color="black", linewidth=0.8)
    axes.set_xlabel("99th percentile of completion time (h)")
    axes.set_ylabel("cost of the GPUs held (USD)")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    _clean(axes)
    path = _save(figure, folder / "pareto.png")
    return Image(path, "Cost against the slowest tasks, means over seeds, typical prices of the "
                 "device table; line: what nothing betters in both")  # fmt: skip


def _cost_and_tail(group: Group) -> tuple[float | None, float | None]:
    row = group.rows[0]
    try:
        usd = device_figures(str(row.get("device", ""))).usd_per_hour[1]
    except ConfigError:
        return None, None
    hours, tail = _interval(group, "gpu_hours"), _interval(group, "p99_completion_time_s")
    return (hours.value * usd if hours and usd else None), (tail.value if tail else None)


def _middle_groups(groups: Sequence[Group], varied: Sequence[str]) -> tuple[list[Group], str]:
    """One group a line: of what was swept in numbers, the middle value; and what that is."""
    names, chosen, told = _names(varied), list(groups), []
    for name in (LOAD, FLEET):
        if _is_swept(varied, groups, name):
            at = names.index(name)
            values = sorted({float(group.key[at]) for group in groups})
            middle = values[len(values) // 2]
            chosen = [group for group in chosen if float(group.key[at]) == middle]
            told.append(f"{name} = {middle:g}")
    return chosen[:MAX_LINES], ", ".join(told)


def _completion_figure(
    folder: Path, groups: Sequence[Group], varied: Sequence[str]
) -> Image | None:
    chosen, told = _middle_groups(groups, varied)
    figure, axes = _axes(7.5, 4.4)
    drawn = 0
    for group, colour in zip(chosen, PALETTE, strict=False):
        tasks = [t for row in group.rows for t in read_tasks(folder / str(row["run"]))]
        times = [float(t["completion_time_s"]) / 3_600 for t in tasks if t["state"] == "done"]
        if times:
            ordered, shares = share_done(times)
            label = ", ".join(group.key) or "all runs"
            axes.step(np.maximum(ordered, 1e-5), shares, where="post", label=label, color=colour)
            drawn += 1
    if not drawn:
        return None
    axes.set_xscale("log")
    axes.set_xlabel("completion time (h, log scale)")
    axes.set_ylabel("share of tasks done")
    axes.legend(frameon=False, fontsize=8)
    _clean(axes)
    path = _save(figure, folder / "completion_cdf.png")
    return Image(path, f"Completion times of all seeds. {told}".strip())


def _over_time_figure(folder: Path, groups: Sequence[Group], varied: Sequence[str]) -> Image | None:
    chosen, told = _middle_groups(groups, varied)
    panels: dict[str, list[Series]] = {"share of instances at work": [], "tasks waiting": []}
    for group in chosen:
        row = group.rows[0]
        tasks = [t for t in read_tasks(folder / str(row["run"])) if t["placed_s"] and t["ended_s"]]
        if not tasks:
            continue
        arrival, placed, ended = (
            np.array([float(t[name]) for t in tasks])
            for name in ("arrival_s", "placed_s", "ended_s")
        )
        until_s, size = float(ended.max()), max(1, int(row.get("num_instances") or 1))
        spans = busy_spans([t["instance_id"] for t in tasks], placed, ended)
        label = ", ".join(group.key) or "all runs"
        for name, (starts, ends), per in (
            ("share of instances at work", spans, size),
            ("tasks waiting", (arrival, placed), 1),
        ):
            at_s, count = mean_count(starts, ends, until_s, num_bins=60)
            panels[name].append(Series(label, (at_s / 3_600).tolist(), (count / per).tolist()))
    if not panels["tasks waiting"]:
        return None
    path = folder / "over_time.png"
    line_panels(path, list(panels.items()), "time (h)", "Use and queue over time, first seed")
    return Image(path, f"GPUs at work and tasks waiting over time, first seed. {told}".strip())


def read_tasks(folder: Path) -> list[dict[str, str]]:
    """Rows of a run's tasks; none where the run left no such file."""
    path = folder / TASKS_FILE
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
