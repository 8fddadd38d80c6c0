"""kill -9 at any moment: the resumed run ends as if nothing had happened, bit for bit.

Children are forked from this process, which has torch and the model in memory already, so that a
kill costs a part of a run and no imports.
"""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from muxtune import build
from muxtune.cli import main
from muxtune.commands.train import check_folder, run
from muxtune.config import ClusterConfig, CostConfig, ModelConfig, TasksWorkload, TrainConfig
from muxtune.errors import ConfigError
from muxtune.planning.journal import read_journal
from muxtune.report.run_folder import RunFolder
from muxtune.runtime import checkpoint, folders
from muxtune.runtime.backbone import BackboneStore
from muxtune.types import EventKind

torch.set_num_threads(1)

NUM_KILLS, SEED = 20, 7
CHECKPOINT_STEPS = 4
SHAPE = {
    "num_layers": 2,
    "hidden": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "intermediate": 128,
    "vocab": 256,
    "tied_embeddings": True,
}
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "away"]
DEADLINE_S = 60.0
FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
KEPT = ("checkpoints", "adapters")


class Case(NamedTuple):
    """A run to be killed: how it is configured, and what it leaves when it is not."""

    config: TrainConfig
    store: BackboneStore
    folder: Path
    num_lines: int


def make_config(folder: Path, wait_s: float = 0.0) -> TrainConfig:
    """Four tasks that differ, two of which arrive while the others train; ``wait_s``: so much
    later, where a machine takes long to begin."""
    common = {"data": str(folder / "data.jsonl"), "max_length": 32, "batch_size": 2}
    tasks = [
        {"id": "first", "steps": 26, "rank": 4, "dropout": 0.1, **common},
        {"id": "cosine", "steps": 15, "rank": 2, "schedule": "cosine", "lr": 1e-2, **common},
        {
            "id": "late",
            "steps": 14,
            "rank": 8,
            "accumulation": 2,
            "arrival_s": 0.4 + wait_s,
            **common,
        },
        {
            "id": "last",
            "steps": 9,
            "rank": 4,
            "weight_decay": 0.1,
            "arrival_s": 0.9 + wait_s,
            **common,
        },
    ]
    return TrainConfig(
        command="train",
        output_dir=str(folder),
        planner={"name": "muxtune", "chunk_tokens": 16},
        cluster_policy={"name": "fifo_shared"},
        model=ModelConfig(name="tiny", random=True, shape=SHAPE),
        cluster=ClusterConfig(device="local", memory_limit_gb=4),
        workload=TasksWorkload(
            tasks=tasks, task_defaults={"model": "tiny", "targets": ["q_proj", "v_proj"]}
        ),
        cost=CostConfig(kind="analytic"),
        backend={
            "name": "torch",
            "checkpoint_steps": CHECKPOINT_STEPS,
            "evaluate_tokens": 40,
            "progress_interval_s": 0.2,
        },
    )


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("unkilled")
    lines = [json.dumps({"text": f"{n} {' '.join(WORDS[: 2 + n % 10])}"}) for n in range(60)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    config = make_config(folder)
    store = build.backbone_store(config)
    store.get("tiny")
    whole = folder / "run"
    assert finished(fork(config, store, whole)) == 0, (folder / "run.log").read_text()
    first_plan_s, joined_s = beginnings(whole)
    if not any(time_s > first_plan_s for time_s in joined_s):
        config, whole = make_config(folder, 2 * first_plan_s), folder / "later"
        assert finished(fork(config, store, whole)) == 0, (folder / "later.log").read_text()
    return Case(config, store, whole, len((whole / "metrics.jsonl").read_text().splitlines()))


def beginnings(folder: Path) -> tuple[float, list[float]]:
    """When the first plan was applied, and when tasks came that were not there from the start."""
    batches = read_journal(folder / "journal.jsonl").batches
    events = [event for batch in batches for event in batch.events]
    first_ns = next(e.time_ns for e in events if e.kind is EventKind.PLAN_APPLIED)
    joined = [e.time_ns for e in events if e.kind is EventKind.TASK_ARRIVED and e.time_ns]
    return first_ns / 1e9, [time_ns / 1e9 for time_ns in joined]


# ------------------------------------------------------------------------------------- processes


def fork(
    config: TrainConfig, store: BackboneStore, folder: Path, before: Callable[[], object] = list
) -> int:
    """A child that runs ``config`` in ``folder``; its process id."""

    def work() -> None:
        before()
        with RunFolder(folder) as run_folder:
            summary = run(config, run_folder, store)
            run_folder.write_json("summary.json", summary)
            assert not summary["error"], summary["error"]

    return fork_work(work, folder.with_name(folder.name + ".log"))


def fork_work(work: Callable[[], Any], log: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        work()
        code = 0
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def finished(child: int) -> int:
    """Its exit code, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_when(
    child: int, is_time: Callable[[], bool], delay_s: float, number: int = signal.SIGKILL
) -> bool:
    """False if it ended by itself."""
    give_up_s = time.monotonic() + DEADLINE_S
    while not is_time():
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        assert time.monotonic() < give_up_s, "the run hangs"
        time.sleep(0.001)
    time.sleep(delay_s)
    os.kill(child, number)
    return finished(child) == -signal.SIGKILL


def killed_after(case: Case, folder: Path, lines: int, delay_s: float) -> bool:
    """False, and no folder, if the run ended before it could be killed."""
    child = fork(case.config, case.store, folder)
    if kill_when(child, lambda: num_lines(folder) >= lines, delay_s):
        return True
    shutil.rmtree(folder)
    return False


def num_lines(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


# ---------------------------------------------------------------------------------------- checks


def resume(case: Case, folder: Path) -> None:
    if (folder / "journal.jsonl").exists():
        config = replace(case.config, resume=True)
    else:  # killed before anything had begun
        config = case.config
    code = finished(fork(config, case.store, folder))
    assert code == 0, folder.with_name(folder.name + ".log").read_text()


def check_no_part_is_seen(folder: Path) -> None:
    """What a reader would find: every checkpoint and every adapter is whole."""
    for name in ("first", "cosine", "late", "last"):
        found = folders.find_folder(folder / "checkpoints" / name)
        if found is not None:
            meta = json.loads((found / "state.json").read_text())
            tensors = load_file(found / "state.safetensors")
            assert meta["step"] > 0 and meta["step"] % CHECKPOINT_STEPS == 0
            assert len(tensors) == 2 * 2 * 2 * 3  # layers, targets, A and B, weights and moments
        adapter = folder / "adapters" / name
        if adapter.exists():
            assert len(load_file(adapter / "adapter_model.safetensors")) == 2 * 2 * 2


def steps_of(folder: Path) -> dict[tuple[str, int], tuple[float, ...]]:
    """(task, step) -> what the step computed; fails if one stands there twice."""
    out = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        item = json.loads(line)
        key = (item["task_id"], item["step"])
        assert key not in out, f"{key} stands twice in the metrics"
        out[key] = tuple(item[name] for name in ("loss", "grad_norm", "lr", "tokens"))
    return out


def rows_of(folder: Path) -> dict[str, tuple[str, ...]]:
    columns = ("state", "steps", "effective_tokens", "final_loss")
    columns += ("perplexity_before", "perplexity_after")
    with (folder / "tasks.csv").open() as file:
        return {
            row["task_id"]: tuple(row[name] for name in columns) for row in csv.DictReader(file)
        }


def check_as_if_not_killed(case: Case, folder: Path) -> None:
    for name in ("first", "cosine", "late", "last"):
        file = f"adapters/{name}/adapter_model.safetensors"
        assert (folder / file).read_bytes() == (case.folder / file).read_bytes(), name
    assert steps_of(folder) == steps_of(case.folder)
    assert rows_of(folder) == rows_of(case.folder)
    assert list((folder / "checkpoints").iterdir()) == [], "tasks that ended need none"
    times_ns = [batch.time_ns for batch in read_journal(folder / "journal.jsonl").batches]
    assert times_ns == sorted(times_ns)


def told_done(folder: Path) -> dict[str, int]:
    """Tasks whose end is in the journal, and the inode of their adapter's file."""
    if not (folder / "journal.jsonl").exists():
        return {}
    batches = read_journal(folder / "journal.jsonl").batches
    events = [event for batch in batches for event in batch.events]
    names = {event.task_id for event in events if event.kind is EventKind.TASK_DONE}
    path = folder / "adapters"
    return {name: (path / name / "adapter_model.safetensors").stat().st_ino for name in names}


# ----------------------------------------------------------------------------------------- tests


def test_the_unkilled_run_is_what_kills_must_survive(case: Case) -> None:
    first_plan_s, joined_s = beginnings(case.folder)
    assert any(time_s > first_plan_s for time_s in joined_s), "arrivals while it trained"
    assert case.num_lines == 26 + 15 + 14 + 9


@pytest.mark.parametrize("number", range(NUM_KILLS))
def test_kill_at_a_random_moment(case: Case, tmp_path: Path, number: int) -> None:
    moments = random.Random(SEED * 1000 + number)
    folder = tmp_path / "run"
    after = moments.randrange(case.num_lines)
    delay_s = moments.uniform(0.0, 0.03)
    while not killed_after(case, folder, after, delay_s):
        delay_s, after = delay_s / 2, after - 1
    check_no_part_is_seen(folder)
    done = told_done(folder)
    resume(case, folder)
    check_as_if_not_killed(case, folder)
    assert done.items() <= told_done(folder).items(), "a finished task was done again"


@pytest.mark.parametrize("number", range(6))
def test_kill_while_a_folder_is_written(case: Case, tmp_path: Path, number: int) -> None:
    """At one of the operations on the disk that make a checkpoint or an adapter, in the run and
    once more in the run that resumes it."""
    moments = random.Random(SEED * 2000 + number)
    folder = tmp_path / "run"
    config = case.config
    for _ in range(2):
        at = moments.randrange(1, 130)
        child = fork(config, case.store, folder, lambda at=at: die_at_disk_operation(at))
        assert finished(child) == -signal.SIGKILL
        check_no_part_is_seen(folder)
        config = replace(case.config, resume=True)
    resume(case, folder)
    check_as_if_not_killed(case, folder)


def die_at_disk_operation(at: int) -> None:
    """In a child: the ``at``-th write, sync or rename of a folder is its last act, half done; or
    it never comes to whatever else Python does to a file or a folder there."""
    count = 0

    def act(half: Callable[[], object] = lambda: None) -> None:
        nonlocal count
        count += 1
        if count == at:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(work: Callable[..., Any], half: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            act(lambda: half(*arguments))
            return work(*arguments, **options)

        return call

    def seen(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and any(f"/{name}/" in str(arguments[0]) for name in KEPT):
            act()

    sys.addaudithook(seen)

    def half_a_file(tensors: object, path: Path) -> None:
        path.write_bytes(b"\x10\0\0\0\0\0\0\0{")

    nothing = lambda *_: None  # noqa: E731
    checkpoint.save_file = counted(checkpoint.save_file, half_a_file)
    folders._sync = counted(folders._sync, nothing)  # type: ignore[attr-defined]
    Path.rename = counted(Path.rename, nothing)  # type: ignore[method-assign]


def test_a_run_that_has_ended_can_be_resumed_and_changes_nothing(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(case.folder, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with RunFolder(folder) as run_folder:
        summary = run(replace(case.config, resume=True), run_folder, case.store)
    assert "has ended already" in capsys.readouterr().out
    assert summary["figures"] == "analytic"
    assert {path: path.read_bytes() for path in before} == before
    assert summary.items() <= json.loads((folder / "summary.json").read_text()).items()


# ---------------------------------------------------------------------------- the command line

TASKS = """
defaults: {{model: tiny, max_length: 32, batch_size: 2, data: {data}, targets: [q_proj]}}
tasks:
  - {{id: one, rank: 4, steps: {steps}}}
  - {{id: two, rank: 2, steps: 12, seed: 1}}
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_run_that_is_asked_to_stop_can_be_gone_on_with(
    case: Case, tmp_path: Path, name: str
) -> None:
    """Its settings stay, and it says how; the run that goes on ends as if nothing had been."""
    folder, number = tmp_path / "run", signal.Signals[name]
    (tmp_path / "tasks.yaml").write_text(
        TASKS.format(data=case.folder.parent / "data.jsonl", steps=300)  # not over when it is asked
    )
    words = [f"workload.tasks_file={tmp_path / 'tasks.yaml'}", "planner.chunk_tokens=16"]
    program = ["muxtune", "train", "model=tiny", *words, f"output_dir={folder}"]

    def work() -> None:
        # Where the tests run in the background of a script, Ctrl-C was ignored from the first.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv, sys.stderr = program, sys.__stderr__  # pytest's own has another file
        assert main() == {"SIGTERM": 143, "SIGINT": 130}[name]

    child = fork_work(work, tmp_path / "log")
    assert not kill_when(child, lambda: num_lines(folder) >= 20, 0.0, number)
    told = (tmp_path / "log").read_text()
    assert "Traceback" not in told and f"muxtune train resume={folder}" in told
    assert json.loads((folder / "run.json").read_text())["overrides"][1:3] == words
    assert (folder / "config.yaml").exists()
    assert not list(folder.glob("*.partial")) and not (folder / "summary.json").exists()
    assert main(["train", f"resume={folder}"]) == 0
    assert json.loads((folder / "summary.json").read_text())["num_done"] == 2


@pytest.fixture(scope="module")
def killed(case: Case, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a run from the command line that was killed, and its words."""
    folder = tmp_path_factory.mktemp("killed")
    data = case.folder.parent / "data.jsonl"
    (folder / "tasks.yaml").write_text(TASKS.format(data=data, steps=30))
    words = ["train", "model=tiny", f"workload.tasks_file={folder / 'tasks.yaml'}"]
    words += ["planner.chunk_tokens=16", "backend.checkpoint_steps=3", "backend.evaluate_tokens=0"]
    path = folder / "run"
    child = fork_work(lambda: main([*words, f"output_dir={path}"]), folder / "log")
    assert kill_when(child, lambda: num_lines(path) >= 20, 0.0)
    return path, words


@pytest.fixture
def copy(killed: tuple[Path, list[str]], tmp_path: Path) -> tuple[Path, list[str]]:
    shutil.copytree(killed[0], tmp_path / "run")
    return tmp_path / "run", killed[1]


def error_of(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    capsys.readouterr()
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return told


def contents(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_new_run_does_not_destroy_a_killed_one(
    copy: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, words = copy
    before = contents(path)
    told = error_of(capsys, [*words, f"output_dir={path}"])
    assert "holds a run that has not ended" in told and f"resume={path}" in told
    assert contents(path) == before


@pytest.mark.parametrize("way", ["folder", "flag"])
def test_resume_on_the_command_line(copy: tuple[Path, list[str]], way: str) -> None:
    path, words = copy
    kept = num_lines(path)
    own = ["train"] if way == "folder" else [*words, f"output_dir={path}"]
    assert main([*own, f"resume={path}" if way == "folder" else "resume=true"]) == 0
    assert set(steps_of(path)) == {
        (name, step) for name, count in (("one", 30), ("two", 12)) for step in range(1, count + 1)
    }
    assert kept >= 20
    assert {name: row[0] for name, row in rows_of(path).items()} == {"one": "done", "two": "done"}
    assert json.loads((path / "summary.json").read_text())["num_done"] == 2
    assert main(["train", f"resume={path}"]) == 0, "a restart script may ask once too often"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("planner=batched", "planner"),
        ("seed=5", "seed: is 5, but the run in"),
        ("cluster.memory_limit_gb=1", "cluster.memory_limit_gb"),
        ("backend.deterministic=false", "backend.deterministic"),
        ("backend.resume=true", "resume=true"),
    ],
)
def test_resume_with_other_settings_is_refused(
    copy: tuple[Path, list[str]], change: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, words = copy
    words = [word for word in words if change == "seed=5" or not word.startswith("planner.")]
    if not change.startswith("planner"):
        words = copy[1]
    before = contents(path)
    sign = "+" if change.startswith("backend.") else ""
    told = error_of(capsys, [*words, f"output_dir={path}", "resume=true", sign + change])
    assert text in told
    assert contents(path) == before


def test_resume_with_another_tasks_file_is_refused(
    copy: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, words = copy
    other = tmp_path / "other.yaml"
    old = Path(words[2].partition("=")[2]).read_text()
    other.write_text(old.replace("steps: 30", "steps: 31"))
    words = [*words[:2], f"workload.tasks_file={other}", *words[3:]]
    told = error_of(capsys, [*words, f"output_dir={path}", "resume=true"])
    assert "task 'one' has other settings" in told


def test_resume_without_a_run_is_refused(
    copy: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, words = copy
    empty = tmp_path / "empty"
    told = error_of(capsys, [*words, f"output_dir={empty}", "resume=true"])
    assert "resume:" in told and "holds no journal.jsonl" in told
    assert not empty.exists()
    assert "holds no journal.jsonl" in error_of(capsys, ["train", f"resume={empty}"])


def test_a_journal_without_a_whole_first_line_is_no_run(case: Case, tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text('{"config":')
    check_folder(case.config, tmp_path)
    with pytest.raises(ConfigError, match="no run was started there"):
        check_folder(replace(case.config, resume=True), tmp_path)


def test_data_that_changed_meanwhile_ends_its_tasks(
    copy: tuple[Path, list[str]], case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = copy
    data = case.folder.parent / "data.jsonl"
    old = data.read_text()
    try:
        data.write_text(old.replace("fox", "cat"))
        told = error_of(capsys, ["train", f"resume={path}"])
    finally:
        data.write_text(old)
    assert "not what task 'one' was trained on before" in " ".join(told.split())
