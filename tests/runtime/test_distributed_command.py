"""``muxtune train`` on ranks: started by itself, killed, hung, resumed on other GPUs, refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from muxtune.cli import main
from muxtune.commands import ranks
from muxtune.errors import ConfigError
from muxtune.report.run_folder import provenance
from muxtune.runtime.backbone import random_weights
from muxtune.runtime.distributed.launch import RankInfo, agree
from tests.runtime.distributed_helpers import free_port, run_world

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "away"]
# The second task ends before the first, which goes on under another plan.
TASKS = """
defaults: {{model: tiny, steps: {steps}, lr: 3e-3, max_length: 32, batch_size: 2, data: {data}}}
tasks:
  - {{id: first, rank: 4, targets: all-linear}}
  - {{id: second, rank: 2, batch_size: 3, seed: 1, accumulation: 2, steps: {fewer}}}
"""
NOTICE_S, STEPS = 30.0, 40
BOTH_STREAMS = ("compute", "comm")
PIPELINE = ("cluster.pp=2", "cluster.num_gpus=2")
TENSOR = ("cluster.tp=2", "cluster.pp=1", "cluster.num_gpus=2")
PROVENANCE = "muxtune.commands.ranks.provenance"
RANDOM_WEIGHTS = "muxtune.runtime.backbone.random_weights"
UNEQUAL = ("cluster.replicas=[{pp:2},{tp:1}]", "cluster.num_gpus=3", "planner=lobra")
_FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("command") / "data.jsonl"
    texts = [" ".join(WORDS[: 2 + number % 10]) for number in range(60)]
    path.write_text("\n".join(json.dumps({"text": f"{n} {t}"}) for n, t in enumerate(texts)))
    return path


@pytest.fixture(scope="module")
def whole(data: Path) -> Path:
    """The same run on one process, undisturbed. What it imports, the forked commands have."""
    output = data.with_name("whole")
    train(data, output, STEPS)
    return output


def fewer(steps: int) -> int:
    return steps // 2


def words(data: Path, output: Path, steps: int, *more: str) -> list[str]:
    tasks = data.with_name(f"tasks-{steps}.yaml")
    tasks.write_text(TASKS.format(data=data, steps=steps, fewer=fewer(steps)))
    return [
        *("train", "model=tiny", f"workload.tasks_file={tasks}", f"output_dir={output}"),
        *("backend.checkpoint_steps=2", "backend.evaluate_tokens=0"),
        *(() if "planner=lobra" in more else ("planner.chunk_tokens=16",)),
        *more,
    ]


def train(*arguments: Any) -> None:
    assert main(words(*arguments)) == 0


def adapters(output: Path) -> dict[str, torch.Tensor]:
    return {
        f"{folder.name}/{name}": tensor
        for folder in sorted((output / "adapters").iterdir())
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }


def worst(left: Path, right: Path) -> float:
    one, other = adapters(left), adapters(right)
    assert one.keys() == other.keys() and one
    return max(float((one[k] - other[k]).norm() / one[k].norm().clamp(min=1e-9)) for k in one)


def traced_streams(output: Path) -> set[tuple[str, str]]:
    """Ranks, and their streams, that the trace shows operations of."""
    events = json.loads((output / "trace.json").read_text())["traceEvents"]
    rows = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    streams = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    shown = [e for e in events if e["ph"] == "X" and "micro_batch" in e["args"]]
    return {
        (rows[e["pid"]].partition("rank ")[2].partition(",")[0], streams[e["tid"]]) for e in shown
    }


def started(log: Path, arguments: Sequence[str]) -> Any:
    """The command in a process group of its own; ``log`` gets all that it says."""

    def run() -> None:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        # Not pytest's own.
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        os._exit(main(list(arguments)))

    process = _FORK.Process(target=run)
    process.start()
    return process


def ranks_of(process: Any) -> list[int]:
    """Its children in the order in which they were started."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come about"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("stop", "rank"), [(signal.SIGKILL, 1), (signal.SIGKILL, 0), (signal.SIGSTOP, 1)]
)
def test_a_lost_rank_ends_the_run_which_goes_on_with_other_gpus(
    data: Path, whole: Path, tmp_path: Path, stop: int, rank: int
) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    # One of them in the form that GPUs capture, also where it goes on.
    step = "captured" if (stop, rank) == (signal.SIGKILL, 1) else "auto"
    more = ("backend.rank_timeout_s=4", f"backend.step={step}")
    arguments = words(data, output, STEPS, *PIPELINE, *more)
    process = started(log, arguments)
    wait_for(lambda: len(list((output / "checkpoints").glob("*/state.json"))) == 2)
    os.kill(ranks_of(process)[rank], stop)
    lost_s = time.monotonic()
    process.join(NOTICE_S)
    assert not process.is_alive() and time.monotonic() - lost_s < NOTICE_S
    assert process.exitcode not in (0, None)
    said = log.read_text()
    assert "error:" in said and "resume" in said
    assert {"config.yaml", "run.json"} <= {path.name for path in output.iterdir()}
    layout = {0: (), 1: TENSOR}[rank] if stop == signal.SIGKILL else PIPELINE
    layout = layout or ("cluster.pp=1", "cluster.num_gpus=1")
    assert main(["train", f"resume={output}", *layout]) == 0
    assert worst(output, whole) <= 1e-3
    if "cluster.num_gpus=2" in layout:
        assert traced_streams(output) == {(rank, name) for rank in "01" for name in BOTH_STREAMS}
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for task, count in (("first", STEPS), ("second", fewer(STEPS))):
        found = [line["step"] for line in steps if line["task_id"] == task]
        assert found == list(range(1, count + 1))


def test_unequal_replicas_train_what_one_process_trains(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    train(data, tmp_path / "run", STEPS, *UNEQUAL)
    assert worst(tmp_path / "run", whole) <= 1e-3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("cluster.tp=3", "cluster.num_gpus=3"), "does not divide"),
        ((*UNEQUAL, "planner=muxtune"), "planner=lobra"),
        ((*UNEQUAL, "cluster.num_gpus=4"), "cluster.num_gpus"),
        ((*UNEQUAL, "cluster.tp=3"), "beside tp"),
        (("planner=lobra", "cluster.replicas=[{tp:0}]"), "cluster.replicas[0]"),
        (("cluster.pp=2", "cluster.num_gpus=4"), "cluster.num_gpus"),
        (("cluster.pp=3", "cluster.num_gpus=3"), "stages"),
        ((*PIPELINE, "backend.rank_timeout_s=0"), "rank_timeout_s"),
    ],
)
def test_layouts_that_cannot_be_are_refused_before_any_rank_starts(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], changes: Any, said: str
) -> None:
    assert main(words(data, tmp_path, 2, *changes)) == 2
    assert said in capfd.readouterr().err


def test_a_method_that_cannot_be_spread_fails_its_own_task_and_is_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = words(data, tmp_path / "run", 2, *PIPELINE)
    tasks = data.with_name("tasks-prefix.yaml")
    prefix = "  - {id: third, method: prefix, rank: 2}\n"
    tasks.write_text(TASKS.format(data=data, steps=2, fewer=1) + prefix)
    assert main([*arguments, f"workload.tasks_file={tasks}"]) == 2
    assert "'prefix', which cannot be spread over" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "run" / "adapters").iterdir()} == {"first", "second"}


@pytest.mark.parametrize(
    ("change", "said"),
    [("backend.step=caught", "backend.step"), ("backend.device=cuda", "torch sees 1")],
)
def test_what_ranks_on_gpus_cannot_do_is_refused_before_any_rank_starts(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], change: str, said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(words(data, tmp_path / "run", 2, *PIPELINE, change)) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("step", "device", "expected"),
    [
        ("auto", "cuda", True),
        ("auto", "cpu", False),
        ("captured", "cpu", True),
        ("eager", "cuda", False),
    ],
)  # fmt: skip
def test_ranks_capture_by_themselves_on_gpus(step: str, device: str, expected: bool) -> None:
    assert ranks.captures({"step": step}, torch.device(device)) is expected


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_refuses_a_wrong_world_size(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], rank: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "3")
    process = started(tmp_path / "log", words(data, tmp_path / "run", 2, *PIPELINE))
    process.join(NOTICE_S)
    assert process.exitcode == 2
    assert "needs 2 processes, but 3 run" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_gives_up_on_a_rendezvous_that_nobody_comes_to(
    data: Path, tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    more = (*PIPELINE, "backend.rank_timeout_s=1")
    process = started(tmp_path / "log", words(data, tmp_path / "run", 2, *more))
    process.join(NOTICE_S)
    assert process.exitcode == 2
    assert "did not meet the others" in (tmp_path / "log").read_text()


def _disagree(rank: int, folder: Path) -> None:
    info = RankInfo(rank, 2, rank)
    for field, value in (("version of torch", f"2.{rank}"), ("cost.path", f"hash-{rank}")):
        with pytest.raises(ConfigError, match=field) as caught:
            agree(info, {"model": "same", field: value})
        (folder / f"{field}-{rank}").write_text(str(caught.value))
    agree(info, {"model": "same"})


def _another_peft(seed: int) -> dict[str, Any]:
    here = provenance(seed)
    return {**here, "packages": {**here["packages"], "peft": "9.9"}}


def _another_muxtune(seed: int) -> dict[str, Any]:
    return {**provenance(seed), "git_commit": "1234"}


def _another_model(shape: Any, seed: int, *more: Any) -> Any:
    return random_weights(shape, seed + 1, *more)


@pytest.mark.parametrize(
    ("change", "patched", "there", "said"),
    [
        ("model.seed=5", "", None, "model.seed: rank 1 has '5', but rank 0 has '0'"),
        ("seed=0", PROVENANCE, _another_peft, "version of peft: rank 1 has '9.9'"),
        ("seed=0", PROVENANCE, _another_muxtune, "version of muxtune: rank 1 has '"),
        ("seed=0", RANDOM_WEIGHTS, _another_model, "weights of tiny: rank 1 has '"),
    ],
)
def test_commands_that_differ_name_what_differs_on_every_rank(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, patched: str,
    there: Any, said: str,
) -> None:  # fmt: skip
    place = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    processes = []
    for rank, more in enumerate(((), (change,))):
        monkeypatch.setenv("RANK", str(rank))
        if rank and patched:
            monkeypatch.setattr(patched, there)
        arguments = words(data, tmp_path / "run", 2, *PIPELINE, *more)
        processes.append(started(tmp_path / f"log-{rank}", arguments))
    for rank, process in enumerate(processes):
        process.join(NOTICE_S)
        assert process.exitcode == 2
        assert said in (tmp_path / f"log-{rank}").read_text()


def test_ranks_with_other_versions_or_profiles_are_refused_on_every_rank(tmp_path: Path) -> None:
    run_world(2, _disagree, tmp_path)
    for field in ("version of torch", "cost.path"):
        one, other = ((tmp_path / f"{field}-{rank}").read_text() for rank in (0, 1))
        assert one == other and "rank 1 has" in one
