"""The fleet model from the configuration: pools, failures, tenants, elasticity."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from muxtune.cli import main
from muxtune.report.recording import TASK_COLUMNS

TASKS = ["workload=poisson", "workload.limit=60", "workload.load=0.5", "planner=batched"]


def simulate(folder: Path, *words: str) -> dict[str, Any]:
    assert main(["simulate", *TASKS, *words, f"output_dir={folder}"]) == 0
    return json.loads((folder / "summary.json").read_text())


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "tasks.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def check_parquet(folder: Path) -> None:
    """Holds what the CSV file holds, as numbers, flags and texts."""
    table = parquet.read_table(folder / "tasks.parquet")
    assert table.column_names == list(TASK_COLUMNS)
    assert str(table.schema.field("met_deadline").type) == "bool"
    blank = {None: "", "": ""}
    for row, cells in zip(table.to_pylist(), rows(folder), strict=True):
        assert {name: str(blank.get(value, value)) for name, value in row.items()} == cells


def test_several_devices_and_failures_from_a_shipped_cluster(tmp_path: Path):
    words = ["cluster=mixed_spot", "cluster.failures.gpu_mtbf_h=1", "plan_samples=0"]
    summary = simulate(tmp_path / "run", *words, "cluster.failures.spot_lifetime_h=1")
    assert summary["num_gpus"] == 32 and summary["num_done"] == 60
    assert summary["failed_gpu_hours"] > 0 and summary["num_placements"] > 60
    hours = [summary[f"{kind}_gpu_hours"] for kind in ("busy", "idle", "failed")]
    assert sum(hours) == pytest.approx(summary["gpu_hours"])
    again = simulate(tmp_path / "again", *words, "cluster.failures.spot_lifetime_h=1")
    check_parquet(tmp_path / "run")
    assert (tmp_path / "run" / "tasks.csv").read_bytes() == (
        tmp_path / "again" / "tasks.csv"
    ).read_bytes()
    assert again["energy_kwh"] == summary["energy_kwh"]


def test_several_base_models_share_a_fleet(tmp_path: Path):
    pools = "cluster.pools=[{num_gpus:1},{num_gpus:1,model:mistral-7b}]"
    mix = "workload.mix=[{histogram:sst2,max_length_tokens:64,model:{llama-2-7b:1,mistral-7b:1}}]"
    summary = simulate(tmp_path / "run", "cluster=h100_x8", pools, mix, "plan_samples=0")
    assert summary["num_done"] == 60
    hosts = {(row["model"], row["instance_id"]) for row in rows(tmp_path / "run")}
    assert hosts == {("llama-2-7b", "instance-0"), ("mistral-7b", "instance-1")}


def test_tenants_priorities_and_deadlines_reach_the_tasks(tmp_path: Path):
    tenants = "+cluster.tenants.default={max_tasks:2,priority:3,deadline_s:1000000}"
    simulate(tmp_path / "run", "cluster=h100_x8", tenants, "plan_samples=0")
    found = rows(tmp_path / "run")
    assert {(row["priority"], row["met_deadline"]) for row in found} == {("3", "True")}
    spans = sorted((float(row["placed_s"]), float(row["ended_s"])) for row in found)
    for placed_s, _ in spans:
        running = sum(start <= placed_s < end for start, end in spans)
        assert running <= 2


def test_an_elastic_fleet_is_not_started_all_the_time(tmp_path: Path):
    words = ["cluster=h100_x8", "cluster.elastic.enabled=true", "plan_samples=0"]
    summary = simulate(tmp_path / "run", *words)
    assert summary["num_done"] == 60
    assert summary["started_gpu_hours"] < 0.9 * summary["gpu_hours"]


@pytest.mark.parametrize(
    ("word", "field"),
    [
        ("cluster.failures.gpu_mtbf_h=-1", "cluster.failures.gpu_mtbf_h"),
        ("cluster.elastic.idle_s=-1", "cluster.elastic.idle_s"),
        ("+cluster.tenants.x={max_tasks:0}", "cluster.tenants.x.max_tasks"),
        ("+cluster.tenants.x={max_jobs:1}", "cluster.tenants.x.max_jobs"),
        ("cluster.pools=[{num_gpus:3,tp:2}]", "cluster.num_gpus"),
        ("cluster.idle_power_share=2", "cluster.idle_power_share"),
    ],
)
def test_bad_input_is_refused_before_the_run(
    word: str, field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["simulate", *TASKS, "cluster=h100_x8", "cluster.elastic.enabled=true", word]
    assert main([*words, f"output_dir={tmp_path / 'run'}"]) != 0
    assert field in capsys.readouterr().err
    assert not (tmp_path / "run" / "tasks.csv").exists()
