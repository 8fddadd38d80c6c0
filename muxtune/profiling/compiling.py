"""Kernels compiled by several processes at once, before anything is timed.

A kernel that a device has not run takes seconds to compile, and a profile or a suite needs
hundreds. Workers run the same operations and steps once, on two blocks of the model, which fills
the compiler's cache on disk; who measures then finds everything there.
"""

from __future__ import annotations

import gc
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch

from muxtune.cost.fused_sites import fused_sites, padded_rank
from muxtune.cost.schema import CAPTURED
from muxtune.cost.shapes import ModelShape
from muxtune.profiling.step_cases import plan_of
from muxtune.types import AdapterSlot, HTask, Plan, TaskSpec

MAX_WORKERS = 12  # each has a context and up to some GB of the device's memory
MAX_STARTS = 4  # of workers, which a kernel's error ends
RELEASE_S = 10.0
NUM_BLOCKS = 2  # the first one's backward lacks a product that all others have
Report = Callable[[float, str], None]


class OpJob(NamedTuple):
    """A method of ``CapturedOps`` with its arguments."""

    shape: ModelShape
    method: str
    arguments: tuple[Any, ...]


class StepJob(NamedTuple):
    """One hTask's captured steps; has what ``StepBench.run`` asks of a case."""

    shape: ModelShape
    htask: HTask
    tasks: tuple[TaskSpec, ...]

    def plan(self) -> Plan:
        return plan_of([self.htask])

    def specs(self) -> dict[str, TaskSpec]:
        return {task.task_id: task for task in self.tasks}


def step_jobs(shape: ModelShape, plan: Plan, specs: Mapping[str, TaskSpec]) -> list[StepJob]:
    """One for each hTask of a plan."""
    return [
        StepJob(shape, htask, tuple(specs[task_id] for task_id in htask.slot_of))
        for htask in plan.htasks
    ]


class Compilers:
    """Worker processes that stay, for their start takes long; without a GPU there are none.

    Use as a context. What goes wrong in a worker is told by ``compile`` and costs time only: who
    measures compiles it then. ``done``: a file that remembers what was compiled, for the process
    that goes on after an error of the device.
    """

    def __init__(
        self,
        device: torch.device,
        deterministic: bool,
        workers: int = 0,
        done: Path | None = None,
    ) -> None:
        self._settings = (device.type, deterministic)
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        self._workers = workers or max(1, min(MAX_WORKERS, usable - 2))
        self._pool: ProcessPoolExecutor | None = None
        self._done = done
        lines = done.read_text().split() if done is not None and done.exists() else ()
        self._known: set[str] = set(lines)

    def __enter__(self) -> Compilers:
        if self._settings[0] == "cuda":
            self._pool = self._new_pool()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def compile(
        self,
        jobs: Iterable[OpJob | StepJob],
        report: Report = lambda _share, _text: None,
        limit_s: float = 120.0,
    ) -> list[str]:
        """Waits until all is compiled, or the time is up; what failed, and why."""
        end_s = time.monotonic() + limit_s
        wanted = []
        for job in jobs:
            key = _key(job)
            if key not in self._known:
                self._known.add(key)
                wanted.append(job)
        failed: list[str] = []
        for _ in range(MAX_STARTS):
            if self._pool is None or not wanted:
                return failed
            try:
                wanted = self._compile(wanted, failed, report, end_s)
                self._release(end_s + RELEASE_S)
            except BrokenProcessPool:  # a worker ended, and with it the others
                failed.append("a worker ended")
                self._start_anew()
            except TimeoutError:
                failed.append(f"{len(wanted)} were not compiled ahead: the time was up")
                self._start_anew()
                return failed
        return failed

    def _start_anew(self) -> None:
        """Who measures is not to be disturbed by what still runs."""
        self._end()
        self._pool = self._new_pool()

    def _end(self) -> None:
        """At once, whatever the workers do."""
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.kill()
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _compile(
        self, wanted: list[OpJob | StepJob], failed: list[str], report: Report, end_s: float
    ) -> list[OpJob | StepJob]:
        """What is left to do when it ends."""
        assert self._pool is not None
        left = dict(enumerate(wanted))
        running = {
            self._pool.submit(compile_one, job, *self._settings): number
            for number, job in left.items()
        }
        total = len(wanted)
        try:
            for future in as_completed(running, max(0.0, end_s - time.monotonic())):
                try:
                    text = future.result()
                except BrokenProcessPool:
                    continue
                job = left.pop(running[future])
                failed += [text] if text else []
                if not text and self._done is not None:
                    with self._done.open("a") as file:
                        file.write(f"{_key(job)}\n")
                report(1 - len(left) / total, f"compiled {total - len(left)} of {total}")
        finally:
            wanted[:] = left.values()
        if left:
            raise BrokenProcessPool
        return []

    def _release(self, end_s: float) -> None:
        """Who measures wants the device's memory: each worker, while the others are busy too."""
        assert self._pool is not None
        for future in [self._pool.submit(_let_go) for _ in range(self._workers)]:
            future.result(max(0.0, end_s - time.monotonic()))

    def _new_pool(self) -> ProcessPoolExecutor:
        context = get_context("spawn")
        return ProcessPoolExecutor(self._workers, mp_context=context, initializer=_end_with_parent)


def _key(job: OpJob | StepJob) -> str:
    """The same of jobs with the same kernels, as far as that is easily told."""
    return hashlib.sha256(repr(_kernels_of(job)).encode()).hexdigest()[:24]


def _kernels_of(job: OpJob | StepJob) -> object:
    """How many blocks there are is known to the optimizer's kernels only, a few of a step's; of
    slots, the power of two that holds them counts."""
    base = job.shape._replace(name="", num_layers=0)
    if isinstance(job, OpJob):
        if job.method in ("sites", "mixed_sites", "part_sites"):
            return base, job.arguments
        return (base, job.method) if job.method == "attention" else (base, job)
    slots = job.htask.shapes[0].slots
    of_site = []
    for site in fused_sites(job.shape):
        ranks = [slot.rank for slot in slots if _adapts(slot, site.members)]
        of_site.append((padded_rank(ranks), sum(ranks) % 16 == 0) if ranks else None)
    others = sorted({(s.method, s.targets, s.dropout) for s in slots if s.method != "lora"})
    sizes = tuple((shape.padded_tokens, shape.recompute) for shape in job.htask.shapes)
    count = len(slots)
    counts = (count - 1).bit_length(), count % 16 == 0, any(slot.dropout for slot in slots)
    return base, sizes, tuple(of_site), others, counts


def _adapts(slot: AdapterSlot, members: tuple[str, ...]) -> bool:
    if slot.method != "lora":
        return False
    leaves = {target.rsplit(".", 1)[-1] for target in slot.targets}
    return "all-linear" in leaves or not leaves.isdisjoint(members)


def _end_with_parent() -> None:
    """A worker whose parent was ended by an error of the device would wait for work for ever."""
    parent = parent_process()

    def watch() -> None:
        wait([parent.sentinel])  # type: ignore[union-attr]
        os._exit(1)

    if parent is not None:
        Thread(target=watch, daemon=True).start()


_benches: dict[object, Any] = {}


def _let_go() -> None:
    _benches.clear()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    time.sleep(0.3)


def compile_one(job: OpJob | StepJob, device_name: str, deterministic: bool) -> str:
    """Runs in a worker. What went wrong, or nothing."""
    from muxtune.profiling.captured_ops import CapturedOps  # a worker's own imports
    from muxtune.profiling.steps import StepBench, is_lost

    device = torch.device(device_name)
    if is_lost(device):
        os._exit(1)  # nothing can be compiled here any more
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    key = (type(job), job.shape._replace(name="", num_layers=0))
    try:
        if key not in _benches:
            _benches.clear()  # its memory is wanted
            if isinstance(job, OpJob):
                bench: Any = CapturedOps(
                    job.shape, device, dtype, deterministic=deterministic, num_blocks=1,
                    compiles_only=True,
                )  # fmt: skip
            else:
                short = job.shape._replace(num_layers=min(NUM_BLOCKS, job.shape.num_layers))
                bench = StepBench(
                    short, device, dtype, step=CAPTURED, deterministic=deterministic
                )  # fmt: skip
            _benches[key] = bench
        if isinstance(job, OpJob):
            getattr(_benches[key], job.method)(*job.arguments)
        else:
            _benches[key].run(job, 0.0, 0)
    except Exception as error:
        what = job.method if isinstance(job, OpJob) else f"step of {len(job.tasks)} tasks"
        return f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""
