"""Bad input through the command line: what is wrong, what to do, exit code 2, nothing left."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from muxtune.cli import main
from muxtune.errors import ConfigError, DataError, MuxTuneError, OutputError, TaskError
from muxtune.report import recording

SMALL = ["workload=poisson", "workload.limit=8", "cluster.num_gpus=2"]
TASKS = """
defaults: {model: llama-2-7b, steps: 5, histogram: sst2, max_length: 64}
tasks:
  - {id: good}
"""


@pytest.fixture
def fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail; returns what it says; nothing may be left behind."""

    def run(command: str, *words: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        arguments = [command, *words]
        if not any(word.startswith("output_dir=") for word in words):
            arguments.append(f"output_dir={tmp_path / 'out'}")
        assert main(arguments) == 2
        assert sorted(tmp_path.rglob("*")) == before
        told = capsys.readouterr()
        assert "Traceback" not in told.err + told.out
        assert told.err.startswith("error: ")
        return told.err

    return run


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("field", "problem", "remedy"),
        DataError("trace.csv", "problem", "remedy", 7),
        TaskError("t", "problem", "remedy"),
        OutputError("full"),
    ],
)
def test_an_error_of_a_worker_process_reaches_its_parent_as_it_is(error: MuxTuneError):
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is type(error) and str(found) == str(error)
    assert vars(found) == vars(error)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["planner=nothing"], ["planner/nothing", "batched", "exclusive", "muxtune"]),
        (["planner.name=muxtun"], ["planner", "did you mean 'muxtune'", "batched, exclusive"]),
        (["cluster_policy.name=x"], ["cluster_policy", "fifo_exclusive, fifo_shared"]),
        (["planner.chunk=64"], ["planner.chunk", "chunk_tokens"]),
        (["planner.chunk_tokens=big"], ["planner.chunk_tokens", "'big'", "int"]),
        (["backend.nothing=1"], ["backend.nothing", "prepare_s"]),
        (["backend=torch"], ["backend", "runs on 'sim'"]),
        (["workload.lod=1"], ["workload.lod"]),
        (["workload.load=abc"], ["workload.load", "abc"]),
        (["workload.load=-1"], ["load", "-1", "above 0"]),
        (["workload=nothing"], ["workload/nothing", "philly", "poisson"]),
        (["seed=x"], ["seed"]),
        (["cluster.num_gpus=0"], ["cluster.num_gpus", "at least 1"]),
        (["cluster.num_gpus=3", "cluster.tp=2"], ["cluster.num_gpus", "tp * pp"]),
        (["cluster.memory_limit_gb=lots"], ["cluster.memory_limit_gb", "lots"]),
        (["cluster.memory_share=1.5"], ["cluster.memory_share"]),
        (["cluster.instances_per_gpu=0"], ["cluster.instances_per_gpu"]),
        (["cluster.device=H101"], ["H101", "H100-SXM"]),
        (["model.name=llama-9"], ["llama-9", "llama-2-7b"]),
        (["model.name=mine", "model.path=nowhere"], ["model.path", "'nowhere' is not there"]),
        (["+model.shape.hidden=3"], ["model.shape", "num_layers"]),
        (["+model.quantization=nf4"], ["model.quantization", "does not exist"]),
        (["+quantise=true"], ["quantise", "does not exist"]),
        (["model.shape.hidden=3"], ["model.shape.hidden", "use +model.shape.hidden=3"]),
        (["cost.style=fast"], ["cost.style", "graph, eager"]),
        (["cost=profile"], ["cost.path", "muxtune profile"]),
        (["cost=profile", "cost.path=none.json"], ["none.json", "muxtune profile"]),
        (["workload=trace"], ["workload.trace"]),
        (["workload=trace", "workload.trace=none.csv"], ["none.csv"]),
        (["workload=tasks"], ["workload.tasks_file", "workload=example"]),
        (["workload=tasks", "workload.tasks_file=none.yaml"], ["none.yaml"]),
        (["planner=["], ["configuration"]),
    ],
)
def test_simulate_refuses(words: list[str], expected: list[str], fails: Callable[..., str]):
    told = fails("simulate", *(SMALL if "workload" not in words[0] else []), *words)
    for text in expected:
        assert text in told


def test_an_unknown_command_names_those_that_exist(capsys: pytest.CaptureFixture[str]):
    assert main(["simulat"]) == 2
    told = capsys.readouterr().err
    assert "did you mean 'simulate'" in told and "plan, simulate, capacity, train" in told


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["simulate", "--nothing"]) == 2
    assert "--nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("{id: bad, method: nothing}", ["bad", "method", "nothing", "lora"]),
        ("{id: bad, rank: 0}", ["bad", "rank", "0"]),
        ("{id: bad, targets: [nothing]}", ["bad", "nothing", "q_proj"]),
        ("{id: bad, histogram: nothing}", ["bad", "nothing", "sst2"]),
        ("{id: good}", ["good", "twice"]),
        ("{id: a.b}", ["a.b"]),
        ("{id: bad, model: other}", ["bad", "other", "llama-2-7b"]),
        ("{id: bad, lern: 3}", ["bad", "lern"]),
    ],
)
def test_bad_tasks_are_refused(
    task: str, expected: list[str], fails: Callable[..., str], tmp_path: Path
):
    file = tmp_path / "tasks.yaml"
    file.write_text(f"{TASKS}  - {task}\n")
    told = fails("simulate", "workload=tasks", f"workload.tasks_file={file}", "cluster=h100_x1")
    for text in expected:
        assert text in told


def test_a_task_that_never_fits_is_refused_with_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "tasks.yaml"
    file.write_text(TASKS)
    words = ["workload=tasks", f"workload.tasks_file={file}", "cluster=h100_x1"]
    words += ["cluster.memory_limit_gb=10", f"output_dir={tmp_path / 'out'}"]
    assert main(["plan", *words]) == 2
    told = capsys.readouterr()
    assert "refused: good" in told.out and "needs" in told.out and "9.313 GiB available" in told.out
    assert not (tmp_path / "out").exists()
    assert main(["simulate", *words]) == 2
    assert "good" in capsys.readouterr().err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["num_refused"] == 1 and summary["status"] == "failed"


def test_a_saved_state_that_is_none_is_refused(fails: Callable[..., str], tmp_path: Path):
    file = tmp_path / "samples.jsonl"
    file.write_text('{"view": 3}\n')
    assert "index" in fails("plan", f"state={file}", "index=1")
    assert "no saved state" in fails("plan", f"state={file}")
    assert "none.jsonl" in fails("plan", "state=none.jsonl")
    assert "format" in fails("plan", "format=xml")


def test_report_needs_a_folder_with_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err
    assert main(["report"]) == 2


# ----------------------------------------------------------------------------------------- output


def test_an_unwritable_output_folder(fails: Callable[..., str], tmp_path: Path):
    (tmp_path / "file").write_text("")
    told = fails("simulate", *SMALL, f"output_dir={tmp_path / 'file' / 'out'}")
    assert "output_dir" in told and "output_dir=PATH" in told


def test_a_disk_that_fills_while_it_runs(
    fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "tasks.csv")

    monkeypatch.setattr(recording.TaskRows, "on_task_end", full)
    told = fails("simulate", *SMALL)
    assert "No space left on device" in told and "tasks.csv" in told


def limited(num_bytes: int) -> Callable[[], None]:
    """For a child: no file may grow beyond the limit, as on a full disk."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))

    return limit


@pytest.mark.slow
@pytest.mark.parametrize("num_bytes", [0, 70_000])
def test_a_disk_without_space_from_outside(num_bytes: int, tmp_path: Path):
    """The first limit stops the run before work starts, the second in the middle of its table."""
    words = ["workload=poisson", "workload.limit=2000", "cluster.num_gpus=64", "planner=exclusive"]
    done = child(["simulate", *words, "output_dir=out"], tmp_path, limited(num_bytes))
    assert done.returncode == 2
    assert "error: output_dir: cannot write" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.rglob("*.csv*")) == [] and not list(tmp_path.rglob("*.json"))


@pytest.mark.slow
def test_a_closed_pipe_and_a_termination_leave_no_traceback(tmp_path: Path):
    done = subprocess.run(
        f"{sys.executable} -m muxtune.cli plan output_dir=out | head -n 1",
        shell=True,
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    command = [sys.executable, "-m", "muxtune.cli", "simulate", "output_dir=long"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for(tmp_path / "long" / "tasks.csv.partial")
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in told
    assert not (tmp_path / "long").exists()


def wait_for(path: Path, timeout_s: float = 120.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < end_s, f"{path} did not appear"
        time.sleep(0.05)


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def child(
    words: list[str], folder: Path, before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-B", "-m", "muxtune.cli", *words],
        cwd=folder,
        env=environment(),
        preexec_fn=before,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_defect_still_shows_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def defect(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(recording.TaskRows, "on_task_end", defect)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["simulate", *SMALL, f"output_dir={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_a_traceback_on_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("MUXTUNE_TRACEBACK", "1")
    with pytest.raises(Exception, match="muxtun"):
        main(["simulate", *SMALL, "planner.name=muxtun", f"output_dir={tmp_path / 'out'}"])
