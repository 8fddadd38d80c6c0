"""``profile``, ``train`` and ``compare`` through the command line, on a tiny random model."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

from muxtune import build
from muxtune.cli import main
from muxtune.commands.compare import RoundsAndSteps, measured_step_times_s, step_time
from muxtune.engine import replay
from muxtune.planning.journal import read_journal
from muxtune.runtime.records import RoundRecord, StepRecord
from muxtune.types import NS_PER_S, Estimate, Plan, Prediction

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "away"]
TASKS = """
defaults: {{model: tiny, steps: 4, max_length: 64, batch_size: 2, data: {data}}}
tasks:
  - {{id: first, rank: 4, targets: all-linear}}
  - {{id: second, rank: 2, batch_size: 3, seed: 1}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a task file and a profile of the tiny model."""
    path = tmp_path_factory.mktemp("training")
    texts = [" ".join(WORDS[: 2 + number % 10]) for number in range(60)]
    lines = [json.dumps({"text": f"{number} {text}"}) for number, text in enumerate(texts)]
    (path / "data.jsonl").write_text("\n".join(lines))
    (path / "tasks.yaml").write_text(TASKS.format(data="data.jsonl"))
    words = ["profile", "model=tiny", "budget_s=1", "max_rows=64", f"output_dir={path / 'profile'}"]
    assert main(words) == 0
    return path


def words(folder: Path, command: str, output: Path, *more: str) -> list[str]:
    profile = folder / "profile" / "profile.json"
    return [
        *(command, "model=tiny", "cost=profile", f"cost.path={profile}"),
        *(f"workload.tasks_file={folder / 'tasks.yaml'}", f"output_dir={output}", *more),
    ]


def test_profile_writes_what_a_cost_model_reads(folder: Path):
    summary = json.loads((folder / "profile" / "summary.json").read_text())
    profile = build.load_profile(folder / "profile" / "profile.json")
    assert profile.content_hash == summary["content_hash"]
    assert summary["num_ops"] == len(profile.ops) > 10


def test_train_leaves_adapters_metrics_trace_and_a_journal_that_replays(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(words(folder, "train", tmp_path / "out")) == 0
    out = tmp_path / "out"
    rows = {row["task_id"]: row for row in csv.DictReader((out / "tasks.csv").open())}
    assert {name: row["state"] for name, row in rows.items()} == {"first": "done", "second": "done"}
    for name in rows:
        files = {path.name for path in (out / "adapters" / name).iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= files
        assert rows[name]["output_path"].endswith(f"adapters/{name}")
        assert float(rows[name]["perplexity_after"]) > 0
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sorted(item["step"] for item in metrics if item["task_id"] == "first") == [1, 2, 3, 4]
    names = {event["name"] for event in json.loads((out / "trace.json").read_text())["traceEvents"]}
    assert {"process_name", "forward", "backward", "optimizer"} <= names
    told = capsys.readouterr()
    assert "first: step 4/4 loss" in told.err and "Perplexity".lower() in told.out.lower()

    profile = build.load_profile(folder / "profile" / "profile.json")
    costs = build.CostBook(models={"tiny": profile.model_shape}, profiles=[profile])
    planner = build.planner({"name": "muxtune"}, costs)
    policy = build.cluster_policy({"name": "fifo_shared"})
    assert replay(read_journal(out / "journal.jsonl").batches, policy, planner) == []


def test_training_again_into_the_same_folder_starts_anew(folder: Path, tmp_path: Path):
    for _ in range(2):
        assert main(words(folder, "train", tmp_path / "out")) == 0
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 8


def test_a_task_with_bad_data_fails_alone_and_the_exit_code_tells(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "tasks.yaml").write_text(
        TASKS.format(data=folder / "data.jsonl") + "  - {id: broken, data: bad.jsonl}\n"
    )
    more = [f"workload.tasks_file={tmp_path / 'tasks.yaml'}"]
    assert main([*words(folder, "train", tmp_path / "out"), *more]) == 2
    told = capsys.readouterr().err
    assert "broken" in told and "bad.jsonl:2" in told and "Traceback" not in told
    rows = list(csv.DictReader((tmp_path / "out" / "tasks.csv").open()))
    states = {row["task_id"]: row["state"] for row in rows}
    assert states == {"first": "done", "second": "done", "broken": "failed"}


def test_train_refuses_tasks_without_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    more = ["model=smollm2-135m", "workload=example", f"output_dir={tmp_path / 'o'}"]
    assert main(["train", *more]) == 2
    told = capsys.readouterr().err
    assert "sentiment-1" in told and "data" in told and not (tmp_path / "o").exists()


def test_train_refuses_what_a_method_does_not_take_before_any_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "tasks.yaml"
    file.write_text(
        TASKS.format(data=folder / "data.jsonl") + "  - {id: w, method: ia3, dropout: 0.1}\n"
    )
    more = [f"workload.tasks_file={file}"]
    assert main([*words(folder, "train", tmp_path / "out"), *more]) == 2
    told = capsys.readouterr().err
    assert "task 'w': adapter.dropout: is 0.1, but ia3 takes none. Give 0" in " ".join(told.split())
    assert not (tmp_path / "out").exists()


def test_train_refuses_a_model_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    more = ["model=folder", "model.name=llama-2-7b", f"model.path={tmp_path / 'none'}"]
    file = tmp_path / "tasks.yaml"
    file.write_text("tasks: [{id: a, model: llama-2-7b, data: x.jsonl, steps: 1}]")
    assert (
        main(["train", *more, f"workload.tasks_file={file}", f"output_dir={tmp_path / 'o'}"]) == 2
    )
    assert "none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (
            "backend.step=foo",
            "backend.step: 'foo' is no way to compute a step. Choose one of: auto",
        ),
        (
            "backend.lora_products=foo",
            "backend.lora_products: is 'foo'. Choose one of: fused, wind",
        ),
        ("backend.lora_products=windows", "backend.lora_products: with windows a task's bits may"),
        ("backend.checkpoint_steps=-1", "backend.checkpoint_steps: is -1. Give at least 0"),
        ("backend.progress_interval_s=0", "backend.progress_interval_s: is 0. Give a number above"),
        ("backend.memory_pressure_share=1.5", "backend.memory_pressure_share: is 1.5, more than"),
        ("backend.nothing=1", "backend.nothing: is no option"),
        ("planner.nothing=1", "planner.nothing: is no option"),
        ("cost=analytic", "cost.path: is given, but cost=analytic reads no profile"),
        ("cluster.preempt=true", "cluster.preempt: is for simulated fleets"),
        ("cluster.elastic.enabled=true", "cluster.elastic: is for simulated fleets"),
        ("cluster.failures.gpu_mtbf_h=1", "cluster.failures: is for simulated fleets"),
        ("+cluster.tenants.a.max_tasks=0", "cluster.tenants.a.max_tasks: is 0. Give at least 1"),
    ],
)
def test_what_no_run_could_mean_is_refused_and_the_run_before_stays(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str, expected: str
):
    before = {"journal.jsonl": "{}\n", "summary.json": '{"a": 1}', "config.yaml": "x: 1\n"}
    before |= {"tasks.csv": "a\n", "trace.json": "[]", "metrics.jsonl": "{}\n"}
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    assert main(words(folder, "train", tmp_path, word)) == 2
    told = capsys.readouterr().err
    assert expected in " ".join(told.split()) and "Traceback" not in told
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_tenants_keep_to_their_quotas_in_a_real_run(folder: Path, tmp_path: Path):
    rows = "  - {id: %s, rank: 2, tenant: %s, arrival_s: 0}\n"
    tasks = TASKS.format(data="data.jsonl").split("tasks:")[0] + "tasks:\n"
    tasks += "".join(rows % pair for pair in (("a1", "a"), ("a2", "a"), ("b1", "b")))
    (folder / "tenants.yaml").write_text(tasks)
    line = words(folder, "train", tmp_path, "backend.evaluate_tokens=0")
    line = [*line[:4], f"workload.tasks_file={folder / 'tenants.yaml'}", *line[5:]]
    assert main([*line, "+cluster.tenants.a.max_tasks=1"]) == 0
    with (tmp_path / "tasks.csv").open() as file:
        found = {row["task_id"]: row for row in csv.DictReader(file)}
    began = {name: float(row["first_start_s"]) for name, row in found.items()}
    assert began["a2"] >= float(found["a1"]["ended_s"]) > began["b1"]


def test_compare_shows_predicted_beside_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    more = ["planners=[muxtune,batched,exclusive]", "steps=3"]
    assert main(words(folder, "compare", tmp_path / "out", *more)) == 0
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [row["planner"] for row in rows] == ["muxtune", "batched", "exclusive"]
    for row in rows:
        assert row["step"]["tasks"] == 2 and row["figures"] == "measured"
        assert row["step"]["measured_s"] > 0 and row["effective_tokens_per_s"] > 0
        assert row["padded_tokens_per_s"] >= row["effective_tokens_per_s"]
        expected = row["step"]["predicted_s"] / row["step"]["measured_s"] - 1
        assert row["relative_error"] == pytest.approx(expected)
    assert (tmp_path / "out" / "step_time.png").exists()
    assert "predicted beside measured" in capsys.readouterr().out


# ------------------------------------------------------------------------- what a step time means


def a_plan(epoch: int, steps_s: dict[str, float]) -> Plan:
    from muxtune.types import DispatchRule, HTask

    second = Estimate(1.0, 0.9, 1.2)
    predicted = Prediction(second, 0, 0, second, steps_s, {}, {}, max(steps_s.values()))
    htask = HTask((), {}, dict.fromkeys(steps_s, 1))
    return Plan("i", epoch, frozenset(), (), (htask,), (), DispatchRule.SINGLE, predicted)


def records(rounds: list[tuple[int, float]], steps: list[tuple[int, str, float]]) -> RoundsAndSteps:
    out = RoundsAndSteps()
    now_s = 0.0
    for epoch, duration_s in rounds:
        span = (round(now_s * NS_PER_S), round(duration_s * NS_PER_S))
        out.on_round(RoundRecord(*span, "i", epoch, 1, 10, 20))
        now_s += duration_s
    for epoch, task_id, time_s in steps:
        time_ns = round(time_s * NS_PER_S)
        out.on_step(StepRecord(time_ns, "i", epoch, task_id, 1, 9, 0.0, 0.0, 0.0, 1, 1, 1))
    return out


def test_the_first_round_of_a_plan_warms_up_and_the_slowest_task_counts():
    plans = {("i", 0): a_plan(0, {"a": 2.0, "b": 4.0})}
    # Rounds of 5 (warm-up), 1, 1, 1, 1 seconds; a steps in every second one, b every fourth.
    rounds = [(0, 5.0), (0, 1.0), (0, 1.0), (0, 1.0), (0, 1.0)]
    told = records(rounds, [(0, "a", 4.9), (0, "a", 6.9), (0, "a", 8.9), (0, "b", 8.9)])
    assert measured_step_times_s(told) == {(("i", 0), "a"): 2.0, (("i", 0), "b"): 4.0}
    assert step_time(plans, told) == (4.0, pytest.approx(3.6), pytest.approx(4.8), 4.0, 2)


def test_tasks_that_never_share_a_plan_add_up():
    plans = {("i", 0): a_plan(0, {"a": 2.0}), ("i", 2): a_plan(2, {"b": 3.0})}
    rounds = [(0, 9.0), (0, 2.5), (2, 9.0), (2, 3.5)]
    told = records(rounds, [(0, "a", 11.0), (2, "b", 23.0)])
    assert step_time(plans, told) == (5.0, pytest.approx(4.5), pytest.approx(6.0), 6.0, 2)


def test_a_task_counts_in_the_plan_with_the_most_tasks():
    plans = {("i", 0): a_plan(0, {"a": 1.0}), ("i", 1): a_plan(1, {"a": 2.0, "b": 2.0})}
    rounds = [(0, 1.0), (0, 1.0), (1, 2.0), (1, 2.0)]
    steps = [(0, "a", 1.5), (1, "a", 5.5), (1, "b", 5.5)]
    assert step_time(plans, records(rounds, steps)) == (2.0, 1.8, 2.4, 2.0, 2)
