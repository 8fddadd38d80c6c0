"""The command line: help, results in folders, sweeps, states planned again from scratch."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from muxtune import codec
from muxtune.cli import COMMANDS, main
from muxtune.types import Plan
from muxtune.workload import tasks as task_file
from muxtune.workload.methods import METHOD_OPTIONS, METHODS

SMALL = ["workload=poisson", "workload.limit=12", "cluster.num_gpus=2", "workload.load=0.5"]


def run(*words: object) -> int:
    return main([str(word) for word in words])


def simulate(folder: Path, *words: str) -> dict[str, object]:
    assert run("simulate", *SMALL, f"output_dir={folder}", *words) == 0
    return json.loads((folder / "summary.json").read_text())


# ------------------------------------------------------------------------------------------- help


def test_usage_names_every_command(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0 and main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"  {command} " in told for command in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("muxtune ")


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in {"report", "export"}])
def test_help_of_a_command_shows_examples_groups_and_settings(
    command: str, capsys: pytest.CaptureFixture[str]
):
    assert run(command, "--help") == 0
    told = capsys.readouterr().out
    assert f"muxtune {command}" in told
    assert "== Groups" in told and "== Settings" in told
    assert "planner: batched, exclusive, exclusive_fast, " in told.replace("base_planner, ", "")
    assert "num_gpus" in told


def test_help_of_train_names_every_field_of_a_task(capsys: pytest.CaptureFixture[str]):
    assert run("train", "--help") == 0
    written = capsys.readouterr().out.partition("tasks.yaml:")[2].partition("== Groups")[0]
    told = re.findall(r"\w+", written)
    assert {*task_file._FIELDS, *METHODS, *chain(*METHOD_OPTIONS.values())} <= set(told)


def test_help_of_report(capsys: pytest.CaptureFixture[str]):
    assert run("report", "--help") == 0
    assert "muxtune report FOLDER" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- simulate


def test_simulate_leaves_tasks_summary_configuration_and_origin(tmp_path: Path):
    summary = simulate(tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "tasks.csv").open()))
    assert len(rows) == 12 and {row["state"] for row in rows} == {"done"}
    assert summary["num_done"] == 12 and summary["status"] == "ok"
    mean_s = sum(float(row["completion_time_s"]) for row in rows) / len(rows)
    assert summary["mean_completion_time_s"] == pytest.approx(mean_s)
    makespan_s = max(float(row["ended_s"]) for row in rows)
    assert summary["makespan_s"] == pytest.approx(makespan_s)
    tokens = sum(int(row["effective_tokens"]) for row in rows)
    assert summary["effective_tokens_per_s"] == pytest.approx(tokens / makespan_s)
    assert summary["gpu_hours"] == pytest.approx(2 * makespan_s / 3600)
    assert summary["offered_load"] == pytest.approx(0.5)
    assert 0 < summary["utilisation"] <= 1  # type: ignore[operator]
    origin = json.loads((tmp_path / "out" / "run.json").read_text())
    assert origin["seed"] == 0 and "workload=poisson" in origin["overrides"]
    assert "num_gpus: 2" in (tmp_path / "out" / "config.yaml").read_text()
    assert not list((tmp_path / "out").glob("*.partial"))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path):
    simulate(tmp_path / "a", "journal=true")
    simulate(tmp_path / "b", "journal=true")
    simulate(tmp_path / "c", "journal=true", "seed=1")
    for name in ("tasks.csv", "plan_samples.jsonl", "journal.jsonl"):
        first = (tmp_path / "a" / name).read_bytes()
        assert first == (tmp_path / "b" / name).read_bytes()
        assert first != (tmp_path / "c" / name).read_bytes()


def test_the_order_of_hashes_does_not_matter(tmp_path: Path):
    """Strings hash differently in every process unless told otherwise."""
    words = ["workload=poisson", "workload.limit=20", "cluster.num_gpus=2", "journal=true"]
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "muxtune.cli", "simulate", *words]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        output = f"output_dir={tmp_path / seed}"
        subprocess.run([*command, output], check=True, env=environment, capture_output=True)
    for name in ("tasks.csv", "plan_samples.jsonl", "journal.jsonl"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.parametrize("planner", ["muxtune", "batched", "exclusive"])
def test_every_planner_simulates_the_example(planner: str, tmp_path: Path):
    words = ["workload=example", "cluster=h100_x1", f"planner={planner}"]
    assert run("simulate", *words, f"output_dir={tmp_path / 'out'}") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["num_done"] == 8 and summary["planner"] == planner
    assert summary["num_refused"] == 0


def test_progress_is_told_on_stderr_in_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from muxtune.report.progress import FleetProgress
    from muxtune.types import NS_PER_S

    with FleetProgress(10, plain_interval_s=0.0) as display:
        display.on_batch(3 * NS_PER_S, ())
    assert capsys.readouterr().err == "simulate: 0/10 tasks, at 3 s\n"


def test_colocated_instances_share_a_gpu(tmp_path: Path):
    words = ["planner=exclusive", "cluster_policy=fifo_colocated", "cluster.instances_per_gpu=auto"]
    words.append("workload.mix=[{histogram: sst2, max_length_tokens: 64}]")
    summary = simulate(tmp_path / "out", *words)
    assert summary["num_instances"] > summary["num_gpus"] == 2  # type: ignore[operator]
    assert summary["num_done"] == 12


# ------------------------------------------------------------------------------------------- plan


def test_plan_prints_hashes_out_into_a_table_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run("plan", f"output_dir={tmp_path / 'a'}") == 0
    told = capsys.readouterr().out
    for text in ("hTask", "sentiment-1", "Where the time goes", "Memory of a GPU", "why:"):
        assert text in told
    assert run("plan", "format=json", f"output_dir={tmp_path / 'b'}") == 0
    content = json.loads(capsys.readouterr().out)
    plan = codec.decode(content["plan"])
    assert isinstance(plan, Plan) and len(plan.task_ids) == 8
    assert content == json.loads((tmp_path / "b" / "plan.json").read_text())
    parts = content["sampled_round"]["breakdown_s"]
    assert sum(parts.values()) == pytest.approx(content["sampled_round"]["time_s"])
    # The planner's expectation and what packing real batches gives agree.
    assert content["sampled_round"]["time_s"] == pytest.approx(
        plan.predicted.round_time_s.value, rel=0.1
    )


FEW_TASKS = ("model=tiny", "workload.limit=4")


@pytest.mark.parametrize(
    ("layout", "ordered"),
    [
        (("cluster.tp=2",), True),
        (("cluster.pp=2", "planner.chunk_tokens=64"), True),
        (("cluster.pp=2", "planner.chunk_tokens=64", "planner.orchestration=false"), False),
    ],
)
def test_plan_explains_several_gpus_and_draws_their_rounds(
    layout: tuple[str, ...], ordered: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["cluster=a40_x4", "planner.fusion=all_temporal", *layout, *FEW_TASKS]
    assert run("plan", *words, f"output_dir={tmp_path}") == 0
    told = capsys.readouterr().out
    for text in ("communication not hidden", "kept apart:", "Next best plans"):
        assert text in told
    assert ("stage 1: activations" in told) == ("cluster.pp=2" in layout)
    content = json.loads((tmp_path / "plan.json").read_text())
    pace = content["sampled_round"]["pace"]
    shares = ("computing", "exposed_communication", "fill_drain", "imbalance", "stalls")
    assert sum(pace[name] for name in shares) == pytest.approx(1)
    plan = codec.decode(content["plan"])
    assert isinstance(plan, Plan)
    spent = plan.predicted.breakdown_s
    assert sum(spent.values()) == pytest.approx(plan.predicted.round_time_s.value)
    assert bool(plan.order) is ordered
    busy = content["stream_utilisation"]
    assert 0.2 < busy["stage 0 compute"] <= 1 and 0 < busy["stage 0 comm"] < 1
    assert (tmp_path / "gantt.png").stat().st_size > 10_000
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any(event["ph"] == "X" for event in trace)


def test_the_switches_of_all_levels_are_one_multirun_and_one_table(tmp_path: Path):
    words = ["-m", "experiment=switches", "planner.plays=6", "model=tiny", "workload.limit=3"]
    words += ["planner.fusion=planned,all_spatial", "planner.alignment=chunk,pad"]
    assert run("plan", *words, f"output_dir={tmp_path}") == 0
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    levels = ("planner.fusion", "planner.alignment", "planner.orchestration")
    times = {tuple(r[level] for level in levels): float(r["tasks_step_time_s"]) for r in rows}
    assert len(times) == len(rows) == 8
    best = times["planned", "chunk", "True"]
    assert best == min(times.values())
    for worse in (("all_spatial", "chunk", "True"), ("planned", "pad", "True"),
                  ("planned", "chunk", "False")):  # fmt: skip
        assert times[worse] > best
    assert len(list(tmp_path.glob("*/gantt.png"))) == 8


@pytest.mark.parametrize(("deadline_s", "why"), [(1e-6, "no plan keeps it"), (1e6, "")])
def test_plan_tells_who_misses_a_deadline(
    deadline_s: float, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = [*FEW_TASKS, f"+workload.task_defaults.deadline_s={deadline_s}"]
    assert run("plan", *words, f"output_dir={tmp_path}") == 0
    told = capsys.readouterr().out
    assert told.count("late: ") == (4 if why else 0) and why in told
    late = json.loads((tmp_path / "plan.json").read_text())["late"]
    assert len(late) == told.count("late: ")
    assert all(item["end_s"] >= item["alone_s"] > item["deadline_s"] for item in late)


def test_plan_shows_what_is_refused_and_plans_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["planner=exclusive", f"output_dir={tmp_path / 'a'}"]
    assert run("plan", *words) == 0
    told = capsys.readouterr().out
    assert told.count("refused: ") == 7 and "another instance" in told
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["num_refused"] == 7


def test_sampled_plans_are_planned_again_from_scratch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    simulate(tmp_path / "run", "plan_samples=5")
    samples = tmp_path / "run" / "plan_samples.jsonl"
    assert len(samples.read_text().splitlines()) == 5
    for index in range(5):
        words = [f"state={samples}", f"index={index}", f"output_dir={tmp_path / 'plan'}"]
        assert run("plan", *words) == 0
        assert "equals the plan of the run" in capsys.readouterr().out
    other = [f"state={samples}", "index=4", "planner.chunk_tokens=16"]
    assert run("plan", *other, f"output_dir={tmp_path / 'plan'}") == 0
    assert "DIFFERS" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ sweep


def test_a_sweep_ends_in_one_table_and_one_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sweep = ["planner=exclusive,batched,muxtune", "workload.load=0.5,2"]
    assert run("simulate", "-m", *SMALL[:-1], *sweep, f"output_dir={tmp_path / 's'}") == 0
    rows = list(csv.DictReader((tmp_path / "s" / "summary.csv").open()))
    assert [(row["planner"], row["workload.load"]) for row in rows] == [
        (planner, load) for planner in ("exclusive", "batched", "muxtune") for load in ("0.5", "2")
    ]
    assert (tmp_path / "s" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr().out
    assert "Sweep" in told and "mean completion time (h)" in told
    before = (tmp_path / "s" / "summary.csv").read_bytes()
    assert run("report", tmp_path / "s") == 0
    assert (tmp_path / "s" / "summary.csv").read_bytes() == before


def test_a_sweep_with_a_failing_run_reports_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    sweep = ["planner=muxtune", "planner.chunk_tokens=0,7"]
    assert run("simulate", "-m", *SMALL, *sweep, f"output_dir={tmp_path / 's'}") == 2
    rows = list(csv.DictReader((tmp_path / "s" / "summary.csv").open()))
    assert [row["status"] for row in rows] == ["ok", "failed"]
    assert "planner.chunk_tokens" in capsys.readouterr().err
    assert not (tmp_path / "s" / "1" / "tasks.csv").exists()


@pytest.mark.slow
def test_a_sweep_runs_in_several_processes(tmp_path: Path):
    sweep = ["seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    assert run("simulate", "-m", *SMALL, *sweep, f"output_dir={tmp_path / 's'}") == 0
    rows = list(csv.DictReader((tmp_path / "s" / "summary.csv").open()))
    assert [row["seed"] for row in rows] == ["0", "1"]
