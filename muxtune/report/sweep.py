"""A sweep's runs as one table and one plot.

Each run leaves a ``summary.json`` (one flat row). The plot has one panel a metric; its x axis is
a number that the sweep varied, its lines are the other things that it varied. Runs that differ
only in their seed are averaged, with a 95% confidence interval (Student's t).
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from muxtune.errors import ConfigError
from muxtune.report.capacity_page import csv_text
from muxtune.report.html import HtmlTable, Image, Section, write_report
from muxtune.report.plots import Series, line_panels
from muxtune.report.run_folder import OK, SUMMARY, RunFolder
from muxtune.report.sweep_figures import aggregate, draw_sweep

CONFIDENCE = 0.95
SEED_KEYS = frozenset({"seed", "workload.seed", "model.seed"})
PREFERRED_X = ("workload.load", "workload.tasks_per_hour", "cluster.num_gpus")
MAX_PANELS = 3
MAX_LINES = 8


class Metric(NamedTuple):
    """A column that plots know: its label with its unit, and the factor to that unit."""

    column: str
    label: str
    factor: float = 1.0


METRICS = (
    Metric("mean_completion_time_s", "mean completion time (h)", 1 / 3_600),
    Metric("effective_tokens_per_s", "throughput (effective tokens/s)"),
    Metric("gpu_hours", "GPU hours held"),
    Metric("makespan_s", "makespan (h)", 1 / 3_600),
    Metric("measured_step_time_s", "measured step time (s)"),
    Metric("tasks_step_time_s", "predicted step time of all tasks (s)"),
)


class SweepReport(NamedTuple):
    rows: list[dict[str, Any]]
    varied: tuple[str, ...]
    csv_path: Path
    plot_path: Path | None
    html_path: Path

    @property
    def failures(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["status"] != OK]


def report_sweep(folder: Path | str) -> SweepReport:
    """Reads all runs below ``folder``; writes summary.csv, sweep.png and report.html into it.

    Raises ConfigError when there is no run, OutputError when it cannot write.
    """
    folder = Path(folder)
    rows = read_rows(folder)
    if not rows:
        remedy = f"Give a folder whose subfolders hold {SUMMARY}, as `muxtune simulate -m` leaves"
        raise ConfigError("folder", f"'{folder}' has no finished run", remedy)
    varied = varied_columns(rows)
    out = RunFolder(folder)
    csv_path = out.write_text("summary.csv", to_csv(rows, varied))
    plot_path = plot_sweep(folder / "sweep.png", rows, varied)
    table = aggregate(rows, varied)
    if table:
        out.write_text("aggregate.csv", csv_text(table))
    images = draw_sweep(folder, rows, varied)
    html_path = _write_html(folder, rows, varied, plot_path, table, images)
    return SweepReport(rows, varied, csv_path, plot_path, html_path)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """One flat row a run, in order of the run's number."""
    paths = sorted(folder.glob(f"*/{SUMMARY}"), key=lambda path: _run_order(path.parent.name))
    return [_row(path) for path in paths]


def _run_order(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdigit() else (1 << 30, name)


def _row(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    flat = {key: value for key, value in content.items() if not isinstance(value, (dict, list))}
    choices = content.get("overrides", {})
    return {"run": path.parent.name, "status": OK} | flat | {"overrides": choices}


def varied_columns(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The overrides that have more than one value over the sweep, in the order they were given."""
    names = dict.fromkeys(name for row in rows for name in row["overrides"])
    return tuple(
        name for name in names if len({str(row["overrides"].get(name)) for row in rows}) > 1
    )


def to_csv(rows: Sequence[Mapping[str, Any]], varied: Sequence[str]) -> str:
    """What was varied first, then every column that any run has."""
    columns = dict.fromkeys(key for row in rows for key in row if key not in {"run", "overrides"})
    names = ["run", *varied, *(name for name in columns if name not in varied)]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = dict(row) | dict(row["overrides"])
        writer.writerow({name: cells.get(name, "") for name in names})
    return text.getvalue()


def shown_metrics(rows: Sequence[Mapping[str, Any]]) -> list[Metric]:
    """The metrics, most telling first, that every successful run has as a finite number."""
    good = [row for row in rows if row["status"] == OK]
    return [
        metric for metric in METRICS if good and all(_number(row, metric.column) for row in good)
    ][:MAX_PANELS]


def _number(row: Mapping[str, Any], column: str) -> bool:
    value = row.get(column)
    return isinstance(value, (int, float)) and math.isfinite(value)


def plot_sweep(path: Path, rows: Sequence[Mapping[str, Any]], varied: Sequence[str]) -> Path | None:
    """One panel a metric; None when nothing can be drawn."""
    good = [row for row in rows if row["status"] == OK]
    metrics = shown_metrics(good)
    if not metrics:
        return None
    x_name = _x_column(good, varied)
    names = [name for name in varied if name not in SEED_KEYS and name != x_name]
    panels = [(metric.label, _lines(good, x_name, names, metric)) for metric in metrics]
    return line_panels(path, panels, _x_label(x_name), "Sweep over " + ", ".join(varied or ["-"]))


def _x_label(x_name: str | None) -> str:
    if x_name == "workload.load":
        return "offered load (1 = all GPUs busy with solo HF PEFT)"
    return x_name or "run"


def _x_column(rows: Sequence[Mapping[str, Any]], varied: Sequence[str]) -> str | None:
    numeric = [
        name
        for name in varied
        if name not in SEED_KEYS and all(_as_number(row["overrides"].get(name)) for row in rows)
    ]
    preferred = [name for name in PREFERRED_X if name in numeric]
    return (preferred or numeric or [None])[0]


def _as_number(value: object) -> bool:
    try:
        return math.isfinite(float(str(value)))
    except ValueError:
        return False


def _lines(
    rows: Sequence[Mapping[str, Any]], x_name: str | None, names: Sequence[str], metric: Metric
) -> list[Series]:
    """One line a combination of ``names``; points of one x are averaged over the seeds."""
    groups: dict[str, dict[float, list[float]]] = {}
    for index, row in enumerate(rows):
        label = ", ".join(str(row["overrides"].get(name)) for name in names) or "all runs"
        x = float(row["overrides"][x_name]) if x_name else float(index if not names else 0)
        points = groups.setdefault(label, {}).setdefault(x, [])
        points.append(row[metric.column] * metric.factor)
    return [_series(label, points) for label, points in list(groups.items())[:MAX_LINES]]


def _series(label: str, points: Mapping[float, Sequence[float]]) -> Series:
    xs = sorted(points)
    means = [sum(points[x]) / len(points[x]) for x in xs]
    widths = [confidence_half_width(points[x]) for x in xs]
    return Series(label, xs, means, widths if any(widths) else None)


def confidence_half_width(values: Sequence[float]) -> float:
    """Half-width of the mean's 95% interval (Student's t); 0 for a single value."""
    if len(values) < 2:
        return 0.0
    from scipy.stats import t

    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    quantile = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return quantile * math.sqrt(variance / len(values))


def sweep_table(
    rows: Sequence[Mapping[str, Any]], varied: Sequence[str]
) -> tuple[list[str], list[list[object]]]:
    """Columns and rows to show: what was varied, the status if any failed, the metrics."""
    metrics = shown_metrics(rows)
    failed = any(row["status"] != OK for row in rows)
    columns = ["run", *varied, *(["status"] if failed else []), *(item.label for item in metrics)]
    return columns, [_shown_row(row, varied, failed, metrics) for row in rows]


def _shown_row(
    row: Mapping[str, Any], varied: Sequence[str], failed: bool, metrics: Sequence[Metric]
) -> list[object]:
    cells: list[object] = [row["run"], *(row["overrides"].get(name) for name in varied)]
    cells += [row["status"]] if failed else []
    return cells + [
        row[item.column] * item.factor if _number(row, item.column) else None for item in metrics
    ]


def _write_html(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    varied: Sequence[str],
    plot_path: Path | None,
    aggregated: Sequence[Mapping[str, Any]],
    pictures: Sequence[Image],
) -> Path:
    columns, cells = sweep_table(rows, varied)
    caption = "Mean of the runs; bars are 95% intervals over seeds."
    images = [Image(plot_path, caption)] if plot_path else []
    sections = [Section("Pictures", images=[*images, *pictures])]
    if aggregated:
        names = list(aggregated[0])
        told = "aggregate.csv: means over seeds with 95% bootstrap intervals, seeds in pairs"
        body = [[row[name] for name in names] for row in aggregated]
        sections.append(Section("Means", tables=[HtmlTable(names, body, told)]))
    sections.append(Section("Runs", tables=[HtmlTable(columns, cells)]))
    return write_report(folder, "MuxTune sweep", sections, lead="Varied: " + ", ".join(varied))
