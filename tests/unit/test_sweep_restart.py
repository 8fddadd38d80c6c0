"""Sweeps: killed half-way and started again, in several processes, and put together."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from muxtune.cli import main
from muxtune.report.sweep import report_sweep
from muxtune.report.sweep_figures import aggregate, groups_of, knee

WORDS = ("workload=bursty", "workload.limit=15", "cluster.num_gpus=2", "plan_samples=0")


def sweep(folder: Path, *words: str) -> int:
    return main(["simulate", "-m", *WORDS, f"output_dir={folder}", *words])


def finished(folder: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/summary.json")}


def test_a_killed_sweep_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    varied = ("planner=exclusive,muxtune", "seed=0,1,2,3,4")
    command = [sys.executable, "-m", "muxtune.cli", "simulate", "-m", *WORDS, *varied]
    process = subprocess.Popen(
        [*command, f"output_dir={tmp_path}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ.copy(),
    )  # fmt: skip
    limit_s = time.monotonic() + 120
    while len(finished(tmp_path)) < 2 and time.monotonic() < limit_s and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = finished(tmp_path)
    assert 2 <= len(before) < 10
    # Hydra's own name for the folder is as good as ours: it leaves another time in output_dir.
    assert main(["simulate", "-m", *WORDS, *varied, f"hydra.sweep.dir={tmp_path}"]) == 0
    told = capsys.readouterr().out
    assert told.count("finished before") == len(before)
    after = finished(tmp_path)
    assert len(after) == 10
    assert {name: after[name] for name in before} == before  # not run twice
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert len({(row["planner"], row["seed"]) for row in rows}) == 10  # nothing lost
    assert not list(tmp_path.rglob("*.partial")) or all(
        path.parent.name not in before for path in tmp_path.rglob("*.partial")
    )


def test_another_sweep_does_not_write_over_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert sweep(tmp_path, "seed=0,1") == 0
    before = (tmp_path / "0" / "summary.json").read_bytes()
    assert sweep(tmp_path, "seed=5,6") == 2
    assert "finished run of another sweep" in capsys.readouterr().err
    assert (tmp_path / "0" / "summary.json").read_bytes() == before


def test_a_failed_run_is_tried_again(tmp_path: Path):
    assert sweep(tmp_path, "seed=0,1") == 0
    content = json.loads((tmp_path / "1" / "summary.json").read_text())
    (tmp_path / "1" / "summary.json").write_text(json.dumps(content | {"status": "failed"}))
    assert sweep(tmp_path, "seed=0,1") == 0
    assert json.loads((tmp_path / "1" / "summary.json").read_text())["status"] == "ok"


def test_a_sweep_runs_under_submitit(tmp_path: Path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = ("seed=0,1", "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5")
    assert sweep(tmp_path, *words) == 0
    assert len(finished(tmp_path)) == 2
    before = finished(tmp_path)
    assert sweep(tmp_path, *words) == 0
    assert finished(tmp_path) == before


# ------------------------------------------------------------------------------------- put together


def write_runs(folder: Path) -> None:
    """Seeds differ by far more than policies; load 2 is beyond the knee."""
    number = 0
    for planner, factor in (("exclusive", 1.0), ("muxtune", 0.5)):
        for load, hours in (("0.5", 1.0), ("1", 1.2), ("2", 9.0)):
            for seed, scale in (("0", 1.0), ("1", 10.0), ("2", 3.0)):
                run = folder / str(number)
                run.mkdir(parents=True)
                time_s = 3_600 * hours * factor * scale
                content = {
                    "status": "ok",
                    "device": "H100-SXM",
                    "num_instances": 2,
                    "mean_completion_time_s": time_s,
                    "p99_completion_time_s": 2 * time_s,
                    "gpu_hours": 10 * factor,
                    "overrides": {"planner": planner, "workload.load": load, "seed": seed},
                }
                (run / "summary.json").write_text(json.dumps(content))
                number += 1


def test_seeds_are_paired_against_the_baseline(tmp_path: Path):
    write_runs(tmp_path)
    report = report_sweep(tmp_path)
    table = aggregate(report.rows, report.varied)
    assert len(table) == 6 and all(row["num_runs"] == 3 for row in table)
    ours = [row for row in table if row["planner"] == "muxtune"]
    for row in ours:
        assert row["completion_time_over_baseline"] == pytest.approx(0.5)
        assert row["completion_time_over_baseline_low"] == pytest.approx(0.5)
        assert row["mean_completion_time_s_high"] > 1.5 * row["mean_completion_time_s"]
    assert all(
        row["completion_time_over_baseline"] is None
        for row in table
        if row["planner"] == "exclusive"
    )
    written = list(csv.DictReader((tmp_path / "aggregate.csv").open()))
    assert len(written) == 6 and written[3]["completion_time_over_baseline"] == "0.5"


def test_pictures_of_what_was_varied(tmp_path: Path):
    write_runs(tmp_path)
    report_sweep(tmp_path)
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"sweep.png", "load_knee.png", "pareto.png"}  # no tasks.csv, nothing of tasks
    assert "exclusive: 1; muxtune: 1" in (tmp_path / "report.html").read_text()


def test_service_against_fleet_size_and_times_of_real_runs(tmp_path: Path):
    words = ("cluster.num_gpus=1,2", "planner=exclusive,muxtune", "workload.load=2")
    assert main(["simulate", "-m", *WORDS[:2], *words, f"output_dir={tmp_path}"]) == 0
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names >= {"service_level.png", "completion_cdf.png", "over_time.png", "pareto.png"}


def test_the_knee_of_a_curve():
    assert knee([1, 2, 3, 4], [1.0, 1.1, 1.3, 9.0]) == 3
    assert knee([1, 2, 3], [1.0, 2.0, 3.0]) is None
    assert knee([1, 2], [1.0, 5.0]) is None


def test_runs_without_a_seed_are_groups_of_one():
    rows = [
        {"status": "ok", "run": str(n), "overrides": {"planner": p}} for n, p in enumerate("ab")
    ]
    assert [group.key for group in groups_of(rows, ("planner",))] == [("a",), ("b",)]
