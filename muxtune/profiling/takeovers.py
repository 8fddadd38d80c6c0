"""What an instance takes besides its rounds, timed on the executor that trains.

Tasks of one adapter each join, run a few steps and end. What the steps do not explain is what plans
cost to take over (joining, capturing) and what a task's end costs (its adapter is written).
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from muxtune.cost.shapes import ModelShape
from muxtune.planning.step_builder import StepBuilder
from muxtune.profiling.bench import summarise
from muxtune.profiling.compiling import StepJob, step_jobs
from muxtune.profiling.step_cases import INSTANCE, StepTask, plan_of
from muxtune.runtime.backbone import BackboneStore
from muxtune.runtime.bank import adapter_slot
from muxtune.runtime.executor import TorchExecutor
from muxtune.runtime.instance import RunningInstance
from muxtune.runtime.options import TorchOptions
from muxtune.runtime.records import Recorder
from muxtune.runtime.tasks import RuntimeTask
from muxtune.types import EventKind, HTask, InstanceSpec, PackRule, Plan, ShapeKey, TaskSpec
from muxtune.workload.random_texts import RandomTexts

ROWS = (128, 256, 512)  # sizes of each hTask, all of which are captured
RANKS = (16, 64)
STEPS = 8
_CHUNK_TOKENS, _BATCH_SIZE = 64, 4
_FOREVER_NS = 1 << 62
_LONGEST_S = 20.0  # of one wait


class Timed(NamedTuple):
    """Seconds by what they were for: ``captures`` of one size each, ``joins`` and ``finishes`` of
    each of ``RANKS``, ``leaves``: a plan in which only somebody is missing."""

    captures: list[float]
    joins: dict[int, list[float]]
    finishes: dict[int, list[float]]
    leaves: list[float]


def measure_takeovers(
    shape: ModelShape, store: BackboneStore, *, step: str, deterministic: bool, max_rows: int,
    repeats: int = 3,
) -> dict[str, Any]:  # fmt: skip
    """Operations of a profile: ``capture`` (blocks), ``join`` and ``finish`` (trained numbers),
    ``leave`` (blocks). Wall time, whatever clock the rest was timed by: disks count."""
    sizes = _sizes(max_rows)
    found = Timed([], {rank: [] for rank in RANKS}, {rank: [] for rank in RANKS}, [])
    numbers: dict[int, float] = {}
    for _ in range(repeats if store.device.type == "cuda" else 1):
        with _driver(shape, sizes, store, step, deterministic) as driver:
            _one_after_another(driver, found)
            numbers |= driver.numbers
    layers = {"layers": float(shape.num_layers)}
    ops = {"leave": _op("layers", [{**layers, **summarise(found.leaves)}])}
    if found.captures:
        ops["capture"] = _op("layers", [{**layers, **summarise(found.captures)}])
    for name, seconds in (("join", found.joins), ("finish", found.finishes)):
        points = [{"parameters": numbers[r], **summarise(seconds[r])} for r in RANKS]
        ops[name] = _op("parameters", points)
    return ops


def takeover_jobs(shape: ModelShape, max_rows: int) -> list[StepJob]:
    """What is captured, so that it can be compiled before."""
    sizes = _sizes(max_rows)
    specs = {f"t{rank}": _spec(shape, f"t{rank}", rank, 0, sizes) for rank in RANKS}
    plan = plan_of([_htask(spec, sizes) for spec in specs.values()])
    return step_jobs(shape, plan, specs)


def _sizes(max_rows: int) -> tuple[int, ...]:
    return tuple(sorted({min(rows, max_rows) for rows in ROWS}))


def _op(axis: str, points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"unit": "s", "axes": [axis], "points": list(points)}


def _one_after_another(driver: _Driver, found: Timed) -> None:
    """The small one alone; then both, until the small one ends and the large one goes on."""
    small, large = RANKS
    alone = driver.task("alone", small, STEPS)
    driver.apply(alone)
    begun_s = driver.begun_s
    driver.until_done("alone")
    step_s = driver.step_s("alone", 0)
    spent_s = driver.now_s - begun_s - STEPS * step_s - driver.written_s - driver.captured_s
    found.joins[small].append(max(1e-6, spent_s))
    found.finishes[small].append(driver.written_s)
    found.captures.extend(driver.each_capture())
    driver.apply()
    long = driver.task("long", large, 2 * STEPS)
    short = driver.task("short", small, STEPS)
    driver.apply(long, short)
    begun_s = driver.begun_s
    driver.until_done("short")
    both_s = driver.step_s("long", 0)
    spent_s = driver.now_s - begun_s - STEPS * both_s - driver.written_s - driver.captured_s
    found.joins[large].append(max(1e-6, spent_s - found.joins[small][-1]))
    found.finishes[small].append(driver.written_s)
    found.captures.extend(driver.each_capture())
    driver.apply(long)
    begun_s = driver.begun_s
    driver.until_done("long")
    alone_s = driver.step_s("long", STEPS)
    spent_s = driver.now_s - begun_s - STEPS * alone_s - driver.written_s
    found.leaves.append(max(1e-6, spent_s))
    found.finishes[large].append(driver.written_s)
    driver.apply()


class _TimedExecutor(TorchExecutor):
    """Adds up what ends of tasks take."""

    finish_ns = 0

    def finish(self, task: RuntimeTask, instance: RunningInstance) -> None:
        start_ns = self.now_ns
        super().finish(task, instance)
        self.finish_ns += self.now_ns - start_ns


class _Driver:
    """An executor with one instance, given plans of one hTask a task."""

    def __init__(
        self,
        shape: ModelShape,
        sizes: tuple[int, ...],
        executor: _TimedExecutor,
        recorder: Recorder,
    ) -> None:
        self.shape, self.sizes = shape, sizes
        self.executor, self.recorder = executor, recorder
        self.numbers: dict[int, float] = {}
        self.begun_s = self.captured_s = self.written_s = 0.0
        self._epoch, self._num_sizes, self._seed = 0, 0, 0
        executor.start(InstanceSpec(INSTANCE, shape.name, "gpu", 1 << 60))
        self._until(EventKind.INSTANCE_READY)

    @property
    def now_s(self) -> float:
        return self.executor.now_ns / 1e9

    def task(self, name: str, rank: int, steps: int) -> TaskSpec:
        self._seed += 1
        spec = _spec(self.shape, name, rank, self._seed, self.sizes)._replace(num_steps=steps)
        self.executor.prepare(spec)
        self._until(EventKind.TASK_READY)
        return spec

    def apply(self, *specs: TaskSpec) -> None:
        plan = plan_of([_htask(spec, self.sizes) for spec in specs], self._epoch)
        self._epoch += 1
        self.executor.finish_ns, spans = 0, len(self.recorder.spans)
        self.begun_s = self.now_s
        self.executor.apply(plan)
        self._until(EventKind.PLAN_APPLIED)
        captures = [x for x in self.recorder.spans[spans:] if x.name == "capture"]
        self.captured_s = sum(item.duration_ns for item in captures) / 1e9
        self._num_sizes = _num_sizes(plan)
        for spec in specs:
            state = self.executor.tasks[spec.task_id].state
            assert state is not None
            count = sum(tensors.param.numel() for tensors in state.tensors.values())
            self.numbers[spec.adapter.rank] = float(count)

    def each_capture(self) -> list[float]:
        """Seconds of one size."""
        return [self.captured_s / self._num_sizes] * bool(self.captured_s)

    def until_done(self, task_id: str) -> None:
        self._until(EventKind.TASK_DONE, task_id)
        self.written_s = self.executor.finish_ns / 1e9

    def step_s(self, task_id: str, first: int) -> float:
        """In the steady state: results come late in the first steps and together in the last."""
        times = [x.time_ns for x in self.recorder.steps if x.task_id == task_id and x.step > first]
        steady = times[1 : STEPS - 2]
        return (steady[-1] - steady[0]) / (len(steady) - 1) / 1e9

    def _until(self, kind: EventKind, task_id: str = "") -> None:
        end_ns = self.executor.now_ns + int(_LONGEST_S * 1e9)
        while self.executor.now_ns < end_ns:
            for event in self.executor.wait(_FOREVER_NS):
                if event.kind in (EventKind.TASK_FAILED, EventKind.INSTANCE_FAILED):
                    raise RuntimeError(f"{event.kind.name} {event.task_id}: {event.data}")
                if event.kind is kind and task_id in ("", event.task_id):
                    return
        raise TimeoutError(f"no {kind.name} {task_id} in {_LONGEST_S:.0f} s")


@contextlib.contextmanager
def _driver(
    shape: ModelShape,
    sizes: tuple[int, ...],
    store: BackboneStore,
    step: str,
    deterministic: bool,
) -> Iterator[_Driver]:
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as folder:
        options = TorchOptions(
            Path(folder), deterministic=deterministic, evaluate_tokens=0,
            checkpoint_steps=0, progress_interval_s=1e6, step=step,
        )  # fmt: skip
        texts = RandomTexts(shape.vocab)
        executor = _TimedExecutor(StepBuilder(), store, texts, options, [recorder])
        try:
            yield _Driver(shape, sizes, executor, recorder)
        finally:
            executor.stop(INSTANCE)
            executor.close()


def _spec(shape: ModelShape, name: str, rank: int, seed: int, sizes: tuple[int, ...]) -> TaskSpec:
    """Whose steps fit into a micro-batch of the largest size."""
    longest = min(sizes[-1] // _BATCH_SIZE, sizes[0])
    kind = StepTask(rank=rank, max_length_tokens=longest, batch_size=_BATCH_SIZE)
    return kind.spec(name, shape.name, seed)


def _htask(spec: TaskSpec, sizes: tuple[int, ...]) -> HTask:
    slots, chunk = (adapter_slot(spec),), min(_CHUNK_TOKENS, sizes[0] // 2)
    shapes = tuple(ShapeKey(chunk, rows // chunk, slots) for rows in sizes)
    quota = {spec.task_id: shapes[-1].num_chunks}
    return HTask(shapes, {spec.task_id: 0}, quota, PackRule.CHUNK)


def _num_sizes(plan: Plan) -> int:
    return sum(len(htask.shapes) for htask in plan.htasks)


__all__ = ["Timed", "measure_takeovers", "takeover_jobs"]
