"""From records of cells to tables and figures.

Intervals are bootstrap intervals over seeds (95%). Comparisons with MuxTune are of the same
windows: seeds are drawn in pairs. Every mean is of a run's scored tasks first, then over seeds.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.bake_off.drawing import draw_completion, draw_distributions
from experiments.bake_off.systems import SYSTEMS, System
from muxtune.errors import ConfigError
from muxtune.report.run_folder import provenance
from muxtune.report.statistics import Interval, bootstrap_interval, paired_interval

OURS = "muxtune"
METRICS = (
    "mean_completion_s",
    "p50_completion_s",
    "p95_completion_s",
    "mean_queueing_s",
    "mean_slowdown",
    "p95_slowdown",
    "busy_gpu_share",
    "busy_gpu_hours",
    "effective_share",
    "tasks_per_busy_instance",
)
COMPARED = ("mean_completion_s", "p50_completion_s", "p95_completion_s", "mean_slowdown")


class Point(NamedTuple):
    """One system at one load: its records by seed."""

    system: System
    load: float
    records: dict[int, dict[str, Any]]

    def values(self, metric: str, seeds: Sequence[int] | None = None) -> np.ndarray:
        chosen = sorted(self.records) if seeds is None else seeds
        return np.array([value_of(self.records[seed], metric) for seed in chosen])

    def interval(self, metric: str) -> Interval:
        return bootstrap_interval(self.values(metric))


def value_of(record: dict[str, Any], metric: str) -> float:
    """A metric of a record; ``p50_`` and the like are read from its quantiles."""
    if metric in record:
        return record[metric]
    share, name = metric.split("_", 1)
    quantiles = record[f"quantiles_{name}"]
    return float(np.interp(int(share[1:]) / 100, np.linspace(0, 1, len(quantiles)), quantiles))


def read_points(runs: Path) -> list[Point]:
    """Raises ConfigError where there is no record."""
    records: dict[tuple[str, float], dict[int, dict[str, Any]]] = {}
    for path in sorted(runs.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        records.setdefault((record["system"], record["load"]), {})[record["seed"]] = record
    if not records:
        raise ConfigError("--work", f"{runs} holds no run", "run the experiment first")
    return [
        Point(system, load, records[system.name, load])
        for system in SYSTEMS
        for load in system.loads
        if (system.name, load) in records
    ]


def with_all_seeds(points: Sequence[Point]) -> list[Point]:
    """Windows differ so much that means over different seeds do not compare: a system's load that
    lacks seeds is not drawn. The tables have it, with the number of its seeds."""
    most = max(len(point.records) for point in points)
    return [point for point in points if len(point.records) == most]


def relative_change(ours: np.ndarray, other: np.ndarray) -> np.ndarray:
    """``mean(ours) / mean(other) - 1``: negative where ours is the smaller."""
    return ours.mean(axis=-1) / other.mean(axis=-1) - 1.0


def comparisons(points: Sequence[Point]) -> Iterator[dict[str, Any]]:
    """MuxTune against each system at each load, seed by seed."""
    ours = {point.load: point for point in points if point.system.name == OURS}
    for point in points:
        mine = ours.get(point.load)
        if mine is None or point.system.name == OURS:
            continue
        seeds = sorted(set(point.records) & set(mine.records))
        if not seeds:
            continue
        for metric in COMPARED:
            columns = [mine.values(metric, seeds), point.values(metric, seeds)]
            found = paired_interval(columns, relative_change)
            yield {
                "against": point.system.name,
                "load": point.load,
                "metric": metric,
                "num_seeds": len(seeds),
                "muxtune_relative_change": found.value,
                "low": found.low,
                "high": found.high,
                "verdict": verdict(found),
            }


def verdict(change: Interval) -> str:
    if change.low == change.high == 0:
        return "equal"
    if change.high < 0:
        return "muxtune is less"
    return "muxtune is more" if change.low > 0 else "no clear difference"


def rows_of(points: Sequence[Point]) -> Iterator[dict[str, Any]]:
    for point in points:
        row: dict[str, Any] = {
            "system": point.system.name,
            "label": point.system.label,
            "panels": " | ".join(point.system.panels),
            "load": point.load,
            "num_seeds": len(point.records),
            "num_scored": sum(record["num_scored"] for record in point.records.values()),
            "num_scored_unfinished": sum(
                record["num_scored_unfinished"] for record in point.records.values()
            ),
        }
        for metric in METRICS:
            found = point.interval(metric)
            row |= {metric: found.value, f"{metric}_low": found.low, f"{metric}_high": found.high}
        yield row


def write_results(work: Path, output: Path) -> None:
    """Tables (CSV, and all in results.json) and figures, from the records below ``work``."""
    points = read_points(work / "runs")
    output.mkdir(parents=True, exist_ok=True)
    rows, compared = list(rows_of(points)), list(comparisons(points))
    write_csv(output / "results.csv", rows)
    write_csv(output / "comparisons.csv", compared)
    content = {
        "settings": (work / "settings.txt").read_text(encoding="utf-8"),
        "systems": {system.name: " ".join(system.words) for system in SYSTEMS},
        "results": rows,
        "comparisons": compared,
        "provenance": provenance(),
    }
    text = json.dumps(content, indent=1)
    (output / "results.json").write_text(text + "\n", encoding="utf-8")
    drawn = with_all_seeds(points)
    draw_completion(output / "completion_against_load.png", drawn)
    draw_distributions(output / "distributions.png", drawn)


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys() if rows else ["empty"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
