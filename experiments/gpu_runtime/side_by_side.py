"""Everything that needs a GPU but no quiet one, in many processes beside each other: the tests
marked gpu, what must hold of training, and one layer of every measurement, which compiles its
kernels into the caches of this machine.

    PYTHONPATH=.:sim:kernels python3 experiments/gpu_runtime/side_by_side.py --out OUT --seconds 200

In OUT: ``summary.json`` (how each process ended, which tests passed, failed or were not run; anew
every few seconds), ``tests.log`` and ``rehearsal.log`` (whole, but for what lies in the middle of
very long ones), ``gpu_runtime.json`` and ``rehearsal.json`` (results of the parts). ``--list``
shows the processes. ``--tests FILE``: these tests in this order, as ``--collect`` prints them on
any machine: looking for them takes a machine that has just started its time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
STEP = HERE.parent / "step_throughput"
TEST_FILES = (
    "tests/kernels", "tests/gpu/test_gpu_runtime.py", "tests/gpu/test_static_step_cuda.py",
    "tests/gpu/test_many_slots.py", "tests/gpu/test_captured_memory_cuda.py",
    "tests/gpu/test_static_stage_cuda.py", "tests/gpu/test_window_step.py",
    "tests/runtime/test_static_step_methods.py", "tests/runtime/test_shared_attention.py",
)  # fmt: skip
# Processes by group of tests. A process starts longer than most tests run.
SHARDS = {"triton_linear": 2, "window": 1, "gpu_runtime": 5, "steps": 1, "others": 2}
GROUPS = {
    "test_triton_linear.py": "triton_linear", "test_triton_window.py": "window",
    "test_gpu_runtime.py": "gpu_runtime",
    "test_captured_memory_cuda.py": "steps", "test_static_step_cuda.py": "steps",
    "test_static_stage_cuda.py": "steps", "test_window_step.py": "window",
}  # fmt: skip
MANY_SLOTS = "test_many_slots.py"
PYTEST = ("-m", "pytest", "-m", "gpu", "-v", "--no-header", "--tb=long", "-p", "no:cacheprovider",
          "--durations=8")  # fmt: skip
STEP_PARTS = {
    "many": "lora_32",
    "mixed": "mixed_methods,all_methods",
    "main": "check,lora_8,bound,hf_peft,sl_peft,ledger",
    "ranks": "mixed_ranks",
    "llama": "llama_3_1_8b",
    "half": "lora_16",
    "few": "lora_4,lora_1",
}
FEW_LAYERS = ("--layers", "2")
RUNTIME_PARTS = {
    "isolation_mixed": (), "kill": (), "isolation_lora": (), "isolation_faults": (),
    "isolation_fast": (), "joins": FEW_LAYERS,
    "memory": ("--rehearse", "--memory-seconds", "60"),
}  # fmt: skip
# What each of the processes loads, once by one alone: beside each other they take longer to read it
# from a cold disk.
WARM = """
import peft, torch, transformers, triton
import muxtune.cli, muxtune.runtime.executor
from transformers import LlamaForCausalLM
x = torch.ones(256, 256, device="cuda", dtype=torch.bfloat16)
(x @ x).sum().item()
"""
WARM_S = 30  # not longer
KNOWN_EVERY_S = 5
ENDING_S = 12  # to print what is known, after the interrupt
LOG_BYTES, PROCESSES = 400_000, 21
OUTCOME = re.compile(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)", re.MULTILINE)


class Job(NamedTuple):
    """``kind``: tests, rehearse or part. ``wanted``: ids of tests."""

    name: str
    kind: str
    command: tuple[str, ...]
    wanted: tuple[str, ...] = ()


class Running:
    """A job in a process group of its own, its output in a file."""

    def __init__(self, job: Job, work: Path) -> None:
        self.job, self.log = job, work / f"{job.kind}_{job.name}.log"
        self.start_s, self.seconds, self.is_interrupted = time.monotonic(), 0.0, False
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                job.command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip

    def signal(self, number: signal.Signals) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def ended(self) -> dict[str, Any]:
        return {
            "name": f"{self.job.kind}_{self.job.name}",
            "exit": self.process.returncode, "seconds": round(self.seconds, 1),
            "cut_off": self.is_interrupted,
        }  # fmt: skip


def jobs(python: str, work: Path, test_ids: Sequence[str]) -> list[Job]:
    """What is measured afterwards, or only here, comes first; tests of single kernels last."""
    parts = {
        name: Job(name, "part", (python, str(HERE / "run.py"), "--parts", name, "--out",
                                 str(work / "parts"), *more))
        for name, more in RUNTIME_PARTS.items()
    }  # fmt: skip
    steps = {
        name: Job(name, "rehearse", (python, str(STEP / "run.py"), "--rehearse", "--only", only,
                                     "--out", str(work / "steps" / f"{name}.json")))
        for name, only in STEP_PARTS.items()
    }  # fmt: skip
    ratio = (python, str(HERE.parent / "kernel_ratio" / "run.py"), "--repeats", "1", "--steps", "1",
             "--out", str(work / "kernel_ratio.json"))  # fmt: skip
    ratio_job = Job("kernel_ratio", "rehearse", ratio)
    return [*steps.values(), *parts.values(), ratio_job, *test_jobs(python, test_ids)]


def test_jobs(python: str, ids: Iterable[str]) -> list[Job]:
    by_group: dict[str, list[str]] = {}
    for test_id in ids:
        file = Path(test_id.split("::")[0]).name
        group = MANY_SLOTS if file == MANY_SLOTS else GROUPS.get(file, "others")
        by_group.setdefault(group, []).append(test_id)
    many = by_group.pop(MANY_SLOTS, [])
    uncaptured = [test_id for test_id in many if "[" in test_id and "-False" in test_id]
    captured = [test_id for test_id in many if test_id not in uncaptured]
    out = [
        _tests(python, "many_captured", captured),
        _tests(python, "many_uncaptured", uncaptured),
    ]
    for group, members in by_group.items():
        shards = SHARDS[group]
        out += [_tests(python, f"{group}_{i}", members[i::shards]) for i in range(shards)]
    return [job for job in out if job.wanted]


def _tests(python: str, name: str, ids: Sequence[str]) -> Job:
    return Job(name, "tests", (python, *PYTEST, *ids), tuple(ids))


def tests_marked_gpu(python: str) -> list[str]:
    command = [python, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "--no-header"]
    command += ["-p", "no:cacheprovider", *TEST_FILES]
    found = subprocess.run(command, capture_output=True, text=True).stdout
    ids = [line for line in found.splitlines() if "::" in line]
    if not ids:
        raise SystemExit(f"no tests were found:\n{found[-2000:]}")
    return ids


def warm(python: str) -> None:
    start_s = time.monotonic()
    try:
        done = subprocess.run([python, "-c", WARM], capture_output=True, text=True, timeout=WARM_S)
        what = done.stderr.strip().splitlines()[-1] if done.returncode else "done"
    except subprocess.TimeoutExpired:
        what = "cut off"
    print(f"[warm] {time.monotonic() - start_s:.0f} s: {what}", flush=True)


def run(
    waiting: list[Job], work: Path, end_s: float, tell: Callable[[list[Running]], object]
) -> list[Running]:
    """All of them, PROCESSES at a time, as far as the time goes; the rest is interrupted so that
    it says what it knows, then killed. ``tell`` hears every few seconds what is known."""
    waiting, started, told_s = list(waiting), [], time.monotonic()
    while time.monotonic() < end_s:
        alive = [item for item in started if item.process.poll() is None]
        if not waiting and not alive:
            break
        while waiting and len(alive) < PROCESSES:
            alive.append(Running(waiting.pop(0), work))
            started.append(alive[-1])
        time.sleep(0.2)
        _report(started, set(alive))
        if time.monotonic() - told_s > KNOWN_EVERY_S:
            told_s = time.monotonic()
            tell(started)
    for item in started:
        item.is_interrupted = item.process.poll() is None
        item.signal(signal.SIGINT)
    _wait(started, time.monotonic() + ENDING_S)
    for item in started:
        item.signal(signal.SIGKILL)
    _wait(started, time.monotonic() + 5)
    _report(started, set())
    return started


_told: set[str] = set()


def _report(started: list[Running], alive: set[Running]) -> None:
    for item in started:
        name = f"{item.job.kind}_{item.job.name}"
        if item.process.poll() is not None and name not in _told:
            _told.add(name)
            last = item.log.read_text(errors="replace").strip().splitlines()[-1:] or [""]
            item.seconds = time.monotonic() - item.start_s
            print(f"[{name}] exit {item.process.returncode}, {item.seconds:.0f} s: {last[0][:200]}",
                  flush=True)  # fmt: skip


def _wait(started: list[Running], end_s: float) -> None:
    while any(item.process.poll() is None for item in started) and time.monotonic() < end_s:
        time.sleep(0.1)


def outcomes(started: list[Running]) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in started:
        if item.job.kind == "tests":
            found |= dict(OUTCOME.findall(item.log.read_text(errors="replace")))
    return found


def summary(started: list[Running], waiting: list[Job]) -> dict[str, Any]:
    begun = {item.job.name for item in started}
    found = outcomes(started)
    wanted = [test_id for job in waiting for test_id in job.wanted]
    by_outcome: dict[str, list[str]] = {}
    for test_id in wanted:
        by_outcome.setdefault(found.get(test_id, "NOT RUN").lower(), []).append(test_id)
    counts = {outcome: len(ids) for outcome, ids in by_outcome.items()}
    by_outcome.pop("passed", None)
    return {
        "processes": [item.ended() for item in started],
        "not_begun": [job.name for job in waiting if job.name not in begun],
        "tests": counts, "tests_not_passed": by_outcome,
    }  # fmt: skip


def gather(started: list[Running], work: Path, out: Path) -> None:
    """Failed processes first."""
    by_kind = {"tests.log": ("tests",), "rehearsal.log": ("rehearse", "part")}
    for name, kinds in by_kind.items():
        chosen = [item for item in started if item.job.kind in kinds]
        chosen.sort(key=lambda item: item.process.returncode == 0)
        (out / name).write_text("".join(map(_log_of, chosen)))
    for name, folder in (("gpu_runtime.json", "parts"), ("rehearsal.json", "steps")):
        paths = sorted((work / folder).glob("*.json"))
        found = {path.stem: json.loads(path.read_text()) for path in paths}
        (out / name).write_text(json.dumps(found, indent=1) + "\n")


def _log_of(item: Running) -> str:
    text = item.log.read_text(errors="replace")
    if len(text) > LOG_BYTES:
        half = LOG_BYTES // 2
        text = f"{text[:half]}\n[...]\n{text[-half:]}"
    return f"==== {item.log.stem}: exit {item.process.returncode}\n{text}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="kept, for what measures afterwards")
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--only", default="", help="kinds or names, with commas")
    parser.add_argument("--tests", type=Path, help="ids of tests, one a line")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--collect", action="store_true", help="prints the ids of all tests")
    args = parser.parse_args()
    from muxtune.report.kernel_cache import kernels_there

    end_s = time.monotonic() + args.seconds - ENDING_S
    ids = args.tests.read_text().split("\n") if args.tests else tests_marked_gpu(sys.executable)
    if args.collect:
        print("\n".join(ids))
        return
    work = args.work or Path(tempfile.mkdtemp())
    for folder in (args.out, work / "parts", work / "steps"):
        folder.mkdir(parents=True, exist_ok=True)
    waiting = jobs(sys.executable, work, list(filter(None, ids)))
    chosen = set(filter(None, args.only.split(",")))
    if chosen:
        waiting = [job for job in waiting if chosen & {job.name, job.kind}]
    if args.list:
        for job in waiting:
            print(job.kind, job.name, len(job.wanted) or "")
        return
    before = kernels_there()

    def tell(started: list[Running]) -> dict[str, Any]:
        found = summary(started, waiting) | {"kernels_compiled": kernels_there() - before}
        (args.out / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
        return found

    warm(sys.executable)
    started = run(waiting, work, end_s, tell)
    found = tell(started)
    gather(started, work, args.out)
    print(json.dumps(found["tests"]), json.dumps(found["tests_not_passed"])[:3000])
    failed = [item["name"] for item in found["processes"] if item["exit"]]
    print(found["kernels_compiled"], "kernels were compiled")
    print("not green:", ", ".join(failed) or "none", "| not begun:", found["not_begun"])


if __name__ == "__main__":
    main()
