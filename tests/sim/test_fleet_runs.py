"""`muxtune simulate` of a fleet: mean times, plans that can be made again, the same bytes."""

from __future__ import annotations

import csv
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from muxtune import codec
from muxtune.cli import main
from muxtune.commands import simulate as simulate_command
from muxtune.cost.book import CostBook
from muxtune.registry import PLANNERS
from muxtune.report.recording import PlanSample
from muxtune.types import EventKind

PLAN_APPLIED, PROGRESS = EventKind.PLAN_APPLIED, EventKind.PROGRESS
FLEET = ["workload=philly", "cluster=h100_x64", "cluster.num_gpus=8", "workload.limit=700"]
LOADS = {"exclusive": 0.8, "batched": 4, "muxtune": 8}


@pytest.fixture(scope="module", autouse=True)
def small_fleets_count():
    """What a fleet of more than 2,000 tasks does, from 100 on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate_command, "MAX_EXACT_TASKS", 100)
        yield


def simulate(folder: Path, planner: str, *words: str) -> dict[str, Any]:
    given = [*FLEET, f"planner={planner}", f"workload.load={LOADS[planner]}", *words]
    assert main(["simulate", *given, f"output_dir={folder}"]) == 0
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory):
    """One run of each planner with 100 sampled plans, which several tests look at."""

    @cache
    def run(planner: str) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp(planner) / "run"
        return folder, simulate(folder, planner, "plan_samples=100")

    return run


@pytest.mark.parametrize("planner", ["batched", "muxtune"])
def test_100_sampled_plans_are_what_a_fresh_planner_answers(planner: str, sampled: Any):
    folder, summary = sampled(planner)
    assert summary["times"] == "mean" and summary["num_done"] == 700
    lines = (folder / "plan_samples.jsonl").read_text().splitlines()
    samples = [PlanSample.loads(line) for line in lines]
    assert len(samples) == 100 and max(len(sample.view.tasks) for sample in samples) >= 8
    for sample in samples:
        again = PLANNERS.get(planner)(costs=CostBook()).plan(sample.view, sample.previous)
        assert codec.dumps(again) == codec.dumps(sample.plan)


def test_muxtune_plan_answers_a_sampled_state_with_the_same_plan(sampled: Any, tmp_path: Path):
    state = f"state={sampled('muxtune')[0] / 'plan_samples.jsonl'}"
    for index in (0, 57, 99):
        folder = tmp_path / f"plan-{index}"
        assert main(["plan", state, f"index={index}", f"output_dir={folder}"]) == 0
        assert json.loads((folder / "summary.json").read_text())["same"] is True


@pytest.mark.parametrize("planner", list(LOADS))
def test_the_same_seed_gives_the_same_bytes(planner: str, sampled: Any, tmp_path: Path):
    simulate(tmp_path / "again", planner, "plan_samples=100")
    for file in ("tasks.csv", "plan_samples.jsonl"):
        first = sampled(planner)[0] / file
        assert first.read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_mean_times_end_tasks_when_exact_ones_do(sampled: Any, tmp_path: Path):
    """Completion times of single tasks agree closely, and the run's means more so."""
    _, mean = sampled("muxtune")
    exact = simulate(tmp_path / "exact", "muxtune", "backend.times=exact")
    assert (mean["times"], exact["times"]) == ("mean", "exact")
    assert mean["effective_tokens"] == exact["effective_tokens"]
    for key in ("makespan_s", "mean_completion_time_s", "p95_completion_time_s"):
        assert mean[key] == pytest.approx(exact[key], rel=0.02)
    assert mean["padded_tokens_per_s"] == pytest.approx(exact["padded_tokens_per_s"], rel=0.02)


def test_leaving_out_takeovers_changes_nothing_but_the_first_start(sampled: Any, tmp_path: Path):
    simulate(tmp_path / "told", "muxtune", "backend.emit_plan_applied=true")
    folders = {"quiet": sampled("muxtune")[0], "told": tmp_path / "told"}
    rows = {
        name: list(csv.DictReader((folder / "tasks.csv").open()))
        for name, folder in folders.items()
    }
    assert all(row.pop("first_start_s") == "" for row in rows["quiet"])
    assert all(row.pop("first_start_s") for row in rows["told"])
    assert rows["quiet"] == rows["told"]


def test_a_journal_keeps_all_events(tmp_path: Path):
    summary = simulate(tmp_path / "run", "muxtune", "workload.limit=120", "journal=true")
    journal = (tmp_path / "run" / "journal.jsonl").read_text()
    kinds = [f'"kind":{{"_":"EventKind","v":{kind.value}}}' for kind in (PLAN_APPLIED, PROGRESS)]
    assert summary["times"] == "mean" and all(kind in journal for kind in kinds)


def test_a_sweep_of_planners_and_loads_ends_in_tables_and_plots(tmp_path: Path):
    words = ["workload=philly", "workload.limit=40", "cluster.num_gpus=4", "plan_samples=0"]
    varied = ["planner=exclusive,batched,muxtune", "workload.load=0.5,1,2"]
    assert main(["simulate", "-m", *words, *varied, f"output_dir={tmp_path / 'sweep'}"]) == 0
    names = [path.name for path in (tmp_path / "sweep").iterdir() if path.is_file()]
    tables = {name for name in names if name.endswith(".csv")}
    plots = {name for name in names if name.endswith(".png")}
    assert tables == {"summary.csv", "aggregate.csv"} and "sweep.png" in plots
    rows = list(csv.DictReader((tmp_path / "sweep" / "summary.csv").open()))
    assert len(rows) == 9 and {row["status"] for row in rows} == {"ok"}
    assert {row["planner"] for row in rows} == {"exclusive", "batched", "muxtune"}


def test_unknown_times_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["simulate", *FLEET, "backend.times=median", f"output_dir={tmp_path / 'run'}"]
    assert main(words) != 0
    assert "backend.times" in capsys.readouterr().err
