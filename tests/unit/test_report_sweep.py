"""A sweep's folder to one table and one plot; averages over seeds."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from muxtune.errors import ConfigError
from muxtune.report.sweep import (
    confidence_half_width,
    read_rows,
    report_sweep,
    shown_metrics,
    sweep_table,
    varied_columns,
)


def write_run(folder: Path, number: int, choices: dict[str, str], **values: object) -> None:
    run = folder / str(number)
    run.mkdir(parents=True)
    content = {"status": "ok", **values, "overrides": choices}
    (run / "summary.json").write_text(json.dumps(content))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    number = 0
    for planner, factor in (("muxtune", 1.0), ("batched", 2.0)):
        for load in ("0.5", "1", "2"):
            for seed in (0, 1, 2):
                choices = {"planner": planner, "workload.load": load, "seed": str(seed), "x": "1"}
                time_s = 3600 * factor * float(load) + 60 * seed
                write_run(
                    tmp_path,
                    number,
                    choices,
                    mean_completion_time_s=time_s,
                    effective_tokens_per_s=1000 / factor,
                    note="text",
                )
                number += 1
    return tmp_path


def test_one_table_and_one_plot(sweep: Path):
    report = report_sweep(sweep)
    rows = list(csv.DictReader(report.csv_path.open()))
    assert len(rows) == 18
    assert list(rows[0])[:4] == ["run", "planner", "workload.load", "seed"]
    assert rows[17]["planner"] == "batched" and rows[17]["workload.load"] == "2"
    assert report.plot_path is not None and report.plot_path.read_bytes().startswith(b"\x89PNG")
    assert "data:image/png" in report.html_path.read_text()


def test_runs_come_in_the_order_of_their_numbers(sweep: Path):
    assert [row["run"] for row in read_rows(sweep)] == [str(number) for number in range(18)]


def test_only_what_was_varied_names_a_row(sweep: Path):
    assert varied_columns(read_rows(sweep)) == ("planner", "workload.load", "seed")


def test_metrics_need_a_number_in_every_good_run(sweep: Path):
    columns = [metric.column for metric in shown_metrics(read_rows(sweep))]
    assert columns == ["mean_completion_time_s", "effective_tokens_per_s"]


def test_seeds_are_averaged_with_an_interval(sweep: Path, monkeypatch: pytest.MonkeyPatch):
    from muxtune.report import sweep as module

    drawn = {}
    monkeypatch.setattr(
        module, "line_panels", lambda path, panels, x_label, title: drawn.update(panels=panels)
    )
    module.plot_sweep(sweep / "p.png", read_rows(sweep), ("planner", "workload.load", "seed"))
    label, lines = drawn["panels"][0]
    assert label == "mean completion time (h)"
    assert [line.label for line in lines] == ["muxtune", "batched"]
    assert lines[0].x == [0.5, 1.0, 2.0]
    assert lines[0].y == pytest.approx([0.5 + 1 / 60, 1 + 1 / 60, 2 + 1 / 60])
    # Student's t of two degrees of freedom: 4.303; standard deviation one minute, three seeds.
    assert lines[0].y_error == pytest.approx([4.3027 / math.sqrt(3) / 60] * 3, rel=1e-4)


def test_failed_runs_stand_in_the_table_and_not_in_the_plot(sweep: Path):
    choices = {"planner": "other", "workload.load": "1", "seed": "0", "x": "1"}
    write_run(sweep, 18, choices, status="failed", error="no such thing")
    report = report_sweep(sweep)
    assert [row["run"] for row in report.failures] == ["18"]
    columns, cells = sweep_table(report.rows, report.varied)
    assert cells[18][columns.index("status")] == "failed"
    assert cells[18][-1] is None


def test_a_folder_without_runs_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no finished run"):
        report_sweep(tmp_path)


def test_interval_of_one_value_is_nothing():
    assert confidence_half_width([3.0]) == 0.0
    # n = 2: t = 12.706, standard deviation of 1 and 3 is sqrt(2)
    assert confidence_half_width([1.0, 3.0]) == pytest.approx(12.7062, rel=1e-4)
