"""Streaming of result rows."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from muxtune.errors import OutputError
from muxtune.registry import CLUSTER_POLICIES
from muxtune_sim import ResultSink, results
from tests.sim.fakes import Run, instance, task


def run_with(sink: ResultSink, count: int = 5) -> Run:
    tasks = [task(f"t{index}", 2, float(index)) for index in range(count)]
    run = Run(CLUSTER_POLICIES.get("fifo_shared")(), tasks, [instance()])
    run.engine.observers = (sink, run.told)
    return run


@pytest.mark.parametrize("name", ["tasks.csv", "tasks.parquet"])
def test_one_row_a_task_in_the_order_of_their_ends(tmp_path: Path, name: str, monkeypatch: Any):
    monkeypatch.setattr(results, "ROWS_PER_WRITE", 2)
    path = tmp_path / "out" / name
    with ResultSink(path) as sink:
        run = run_with(sink)
        run.run()
        assert not path.exists(), "the name appears at the end"
    read = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    assert list(read["task_id"]) == [outcome.task_id for outcome in run.told.outcomes]
    assert list(read["ended_ns"]) == [outcome.ended_ns for outcome in run.told.outcomes]
    assert set(read["state"]) == {"done"}
    assert list(path.parent.iterdir()) == [path]


def test_the_same_run_gives_the_same_bytes(tmp_path: Path):
    for name in ("a.csv", "b.csv"):
        with ResultSink(tmp_path / name) as sink:
            run_with(sink).run()
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_rows_reach_the_disk_while_it_runs(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(results, "ROWS_PER_WRITE", 1)
    with ResultSink(tmp_path / "tasks.csv") as sink:
        run = run_with(sink)
        run.run()
        assert (tmp_path / "tasks.csv.part").stat().st_size > 0
        assert sink._rows == []


def test_a_failed_run_leaves_nothing(tmp_path: Path):
    with pytest.raises(RuntimeError, match="stop"), ResultSink(tmp_path / "tasks.csv") as sink:
        run_with(sink).run()
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"tasks\.csv: cannot write results"):
        ResultSink(tmp_path / "file" / "tasks.csv").__enter__()


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: Any):
    class FullDisk:
        def __init__(self, path: str, schema: Any) -> None:
            Path(path).write_text("half")

        def write(self, batch: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            pass

    monkeypatch.setattr(results.pa_csv, "CSVWriter", FullDisk)
    with (
        pytest.raises(OutputError, match=r"No space left.*Free disk space"),
        ResultSink(tmp_path / "tasks.csv") as sink,
    ):
        run_with(sink).run()
    assert list(tmp_path.iterdir()) == []


def test_another_ending_is_refused(tmp_path: Path):
    with pytest.raises(OutputError, match=r"\.csv or \.parquet"):
        ResultSink(tmp_path / "tasks.xlsx")
