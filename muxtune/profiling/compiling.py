"""Kernels compiled by several processes at once, before anything is timed.

A kernel that a device has not run takes seconds to compile, and a profile or a suite needs
hundreds. Workers run the same operations and steps once, on two blocks of the model, which fills
the compiler's cache on disk; who measures then finds everything there.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from muxtune.cost.schema import CAPTURED
from muxtune.cost.shapes import ModelShape
from muxtune.profiling.step_cases import plan_of
from muxtune.types import HTask, Plan, TaskSpec

MAX_WORKERS = 10  # each has a context and up to some GB of the device's memory
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
    measures compiles it then.
    """

    def __init__(self, device: torch.device, deterministic: bool, workers: int = 0) -> None:
        self._settings = (device.type, deterministic)
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        self._workers = workers or max(1, min(MAX_WORKERS, usable - 2))
        self._pool: ProcessPoolExecutor | None = None
        self._known: set[object] = set()

    def __enter__(self) -> Compilers:
        if self._settings[0] == "cuda":
            context = get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, mp_context=context)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def compile(
        self, jobs: Iterable[OpJob | StepJob], report: Report = lambda _share, _text: None
    ) -> list[str]:
        """Waits until all is compiled; what failed, and why."""
        wanted = []
        for job in jobs:
            key = _key(job)
            if key not in self._known:
                self._known.add(key)
                wanted.append(job)
        if self._pool is None or not wanted:
            return []
        failed: list[str] = []
        try:
            running = [self._pool.submit(compile_one, job, *self._settings) for job in wanted]
            for number, future in enumerate(as_completed(running), 1):
                failed += [text] if (text := future.result()) else []
                report(number / len(running), f"compiled {number} of {len(running)}")
        except BrokenProcessPool as error:
            failed.append(f"compiling ahead ended early ({error})")
            self._pool = None
        self._release()
        return failed

    def _release(self) -> None:
        """Who measures wants the device's memory: each worker, while the others are busy too."""
        if self._pool is not None:
            done = [self._pool.submit(_let_go) for _ in range(self._workers)]
            for future in done:
                future.result()


def _key(job: OpJob | StepJob) -> object:
    """Jobs with the same kernels, as far as that is easily told."""
    if isinstance(job, OpJob):
        return job
    return job.shape._replace(name="", num_layers=0), job.htask.shapes


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
    from muxtune.profiling.steps import StepBench

    device = torch.device(device_name)
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
