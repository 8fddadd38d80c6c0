"""The bake-off's windows, scores, resuming and verdicts, on a tiny fleet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.bake_off import run
from experiments.bake_off.cells import Score, window_rows
from experiments.bake_off.results import read_points, value_of, verdict
from muxtune.deciding import TaskOutcome
from muxtune.report.statistics import Interval
from muxtune.types import NS_PER_S, TaskState
from muxtune.workload.traces import read_trace

S = NS_PER_S


def test_windows_of_different_seeds_share_no_task():
    trace = read_trace("philly")
    windows = [window_rows(trace, seed, 10, 2500, 24.0) for seed in range(10)]
    assert len(set().union(*(rows.tolist() for rows in windows))) == 25_000
    assert (trace.duration_s[windows[3]] <= 24 * 3600).all()
    with pytest.raises(ValueError, match="overlap"):
        window_rows(trace, 0, 10, 50_000, 24.0)


def outcome(name: str, arrival_s: int, ended_s: int, placed_s: int) -> TaskOutcome:
    return TaskOutcome(
        name, "t", "m", TaskState.DONE, arrival_s * S, arrival_s * S, placed_s * S, None,
        ended_s * S, "i", 1, 1, None, "",
    )  # fmt: skip


def test_only_tasks_that_arrive_in_the_middle_are_scored():
    score = Score({"a": 100.0, "b": 600.0, "c": 5.0}, 200 * S, 800 * S, {})
    score.on_task_end(outcome("a", 100, 900, 100))
    score.on_task_end(outcome("b", 300, 1500, 400))
    score.on_task_end(outcome("c", 700, 730, 700))
    assert list(score.completion_s) == [1200.0, 30.0]
    assert list(score.queueing_s) == [100.0, 0.0]
    # A task of 5 seconds counts as one of a minute.
    assert list(score.slowdown) == [2.0, 0.5]


def test_busy_gpus_are_counted_while_scored_tasks_arrive(monkeypatch: pytest.MonkeyPatch):
    score = Score({}, 10 * S, 20 * S, {"i0": ("g0",), "i1": ("g0",), "i2": ("g1", "g2")})
    for time_s, changes in (
        (5, [("i0", True)]),
        (12, [("i1", True), ("i2", True)]),
        (14, [("i0", False), ("i2", False)]),
        (30, [("i1", False)]),
    ):
        score._plans.extend(changes)
        score.on_batch(time_s * S, ())
    # g0 throughout, two more GPUs from 12 to 14.
    assert score.busy_gpu_ns == (10 + 2 * 2) * S


def test_a_run_goes_on_where_it_stood_and_refuses_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "out"), "--tasks", "40"]
    words += ["--gpus", "4", "--seeds", "2", "--jobs", "1", "--loads", "1"]
    assert run.main([*words, "--systems", "muxtune"]) == 0
    runs = tmp_path / "work" / "runs"
    first = {path.name: path.stat().st_mtime_ns for path in runs.iterdir()}
    assert sorted(first) == ["muxtune-load1-seed0.json", "muxtune-load1-seed1.json"]
    assert run.main([*words, "--systems", "muxtune", "hf_peft"]) == 0
    assert "2 cells are there, 2 to run" in capsys.readouterr().err
    assert {name: (runs / name).stat().st_mtime_ns for name in first} == first
    points = {point.system.name: point for point in read_points(runs)}
    done = [record["num_done"] for record in points["hf_peft"].records.values()]
    assert done == [40, 40]
    compared = (tmp_path / "out" / "comparisons.csv").read_text().splitlines()
    assert any(line.startswith("hf_peft,1.0,mean_completion_s,2") for line in compared)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert (tmp_path / "out" / "completion_against_load.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="other settings"):
        run.main([*words, "--gpus", "8", "--systems", "muxtune"])


def test_quantiles_are_read_from_a_record():
    record = {"quantiles_slowdown": [0.0, 1.0, 2.0, 3.0, 4.0], "mean_slowdown": 2.0}
    assert value_of(record, "mean_slowdown") == 2.0
    assert value_of(record, "p50_slowdown") == 2.0
    assert value_of(record, "p95_slowdown") == pytest.approx(3.8)


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (-0.2, -0.1, "muxtune is less"),
        (0.1, 0.2, "muxtune is more"),
        (-0.1, 0.2, "no clear difference"),
        (0.0, 0.0, "equal"),
    ],
)
def test_verdicts(low: float, high: float, text: str):
    assert verdict(Interval(0.0, low, high, 10)) == text
