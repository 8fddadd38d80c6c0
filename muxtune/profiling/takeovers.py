"""What an instance takes besides its rounds, timed on the executor that trains.

Tasks of one adapter each join a running instance, with others and after others have left, are fused
and end. What steps and captures do not explain is what plans cost to take over; what a task's end
costs (its adapter is written) is timed by itself.
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
from muxtune.runtime.backbone import Backbone, BackboneStore
from muxtune.runtime.bank import adapter_slot
from muxtune.runtime.captured_runner import CapturedRunner
from muxtune.runtime.executor import TorchExecutor
from muxtune.runtime.instance import RunningInstance
from muxtune.runtime.options import TorchOptions
from muxtune.runtime.records import Recorder
from muxtune.runtime.tasks import RuntimeTask
from muxtune.types import Event, EventKind, HTask, InstanceSpec, PackRule, ShapeKey, TaskSpec
from muxtune.workload.random_texts import RandomTexts

ROWS = (256, 512, 1024, 2560)  # sizes of each hTask, all of which are captured
RANKS = (16, 32, 64)
STEPS = 8  # under each plan
_LED_BY = 2  # steps that are started before the first is read
_MORE = 4  # so that nobody ends while a takeover is timed
# No two hTasks have the same rows, as in training: libraries take their time for new sizes. They
# become smaller, so that no older graph is captured anew.
_STEP_ROWS, _NUM_HTASKS, _REPEATS = 32, 5, 2
_CHUNK_TOKENS, _BATCH_SIZE = 32, 4
_FOREVER_NS, _GLANCE_NS = 1 << 62, 1_000_000
_LONGEST_S = 20.0  # of one wait


class Timed(NamedTuple):
    """Seconds by what they were for: ``captures`` of one size each, by rows; ``joins``,
    ``finishes`` and ``moves`` of tasks by rank; ``leaves``: a plan in which only somebody is
    missing."""

    captures: dict[int, float]
    joins: dict[int, list[float]]
    finishes: dict[int, list[float]]
    moves: dict[int, list[float]]
    leaves: list[float]

    @classmethod
    def nothing(cls) -> Timed:
        joins, finishes, moves = ({rank: [] for rank in RANKS} for _ in range(3))
        return cls({}, joins, finishes, moves, [])


def measure_takeovers(
    shape: ModelShape, store: BackboneStore, *, step: str, deterministic: bool, max_rows: int,
    repeats: int = _REPEATS,
) -> dict[str, Any]:  # fmt: skip
    """Operations of a profile: ``capture`` (rows), ``join``, ``move`` and ``finish`` (trained
    numbers), ``leave`` (blocks). Wall time, whatever clock the rest was timed by: disks count."""
    found = Timed.nothing()
    numbers: dict[int, float] = {}
    for repeat in range(repeats if store.device.type == "cuda" else 1):
        all_sizes = _all_sizes(max_rows, repeat)
        with _driver(shape, all_sizes, store, step, deterministic) as driver:
            _come_and_go(driver, found)
            numbers |= driver.numbers
            for rank, seconds in driver.executor.finishes_s.items():
                found.finishes[rank] += seconds
    layers = {"layers": float(shape.num_layers)}
    ops = {"leave": _op("layers", [{**layers, **summarise(found.leaves)}])}
    if found.captures:
        points = [{"rows": float(rows), **summarise([s])} for rows, s in found.captures.items()]
        ops["capture"] = _op("rows", points)
    named = (("join", found.joins), ("move", found.moves), ("finish", found.finishes))
    for name, by_rank in named:
        points = [{"parameters": numbers[r], **summarise(s)} for r, s in by_rank.items() if s]
        ops[name] = _op("parameters", points)
    return ops


def takeover_jobs(shape: ModelShape, max_rows: int) -> list[StepJob]:
    """What is captured, so that it can be compiled before."""
    jobs = []
    for repeat in range(_REPEATS):
        all_sizes = _all_sizes(max_rows, repeat)
        specs = {f"t{rank}": _spec(shape, f"t{rank}", rank, 0, all_sizes[-1]) for rank in RANKS}
        small, middle, large = ([spec] for spec in specs.values())
        groups = (small, large, middle, small, middle + small)
        for members, sizes in zip(groups, all_sizes, strict=True):
            jobs += step_jobs(shape, plan_of([_htask(members, sizes)]), specs)
    return jobs


def _all_sizes(max_rows: int, repeat: int) -> list[tuple[int, ...]]:
    """Of each hTask of a repeat, as they come."""
    most = max(_STEP_ROWS, max_rows // 8)
    steps = [
        min(most, _STEP_ROWS * ((repeat + 1) * _NUM_HTASKS - number))
        for number in range(_NUM_HTASKS)
    ]
    return [tuple(sorted({min(rows, max_rows - most) + more for rows in ROWS})) for more in steps]


def _op(axis: str, points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"unit": "s", "axes": [axis], "points": list(points)}


def _come_and_go(driver: _Driver, found: Timed) -> None:
    """What joins beside others, and when another has left, is charged alike, less what a plan
    without somebody takes; so is what is fused."""
    small, middle, large = RANKS
    first = driver.task("first", small, 2 * STEPS + _MORE)
    alone_s = driver.take_over([first])
    second = driver.task("second", large, 3 * STEPS)
    beside_s = driver.take_over([first], [second])
    driver.until_done("first")
    third = driver.task("third", middle, 5 * STEPS + _MORE)
    instead_s = driver.take_over([third], [second])
    driver.until_done("second")
    leave_s = driver.take_over([third])
    fourth = driver.task("fourth", small, 3 * STEPS)
    again_s = driver.take_over([third], [fourth])
    fused_s = driver.take_over([third, fourth])
    driver.until_done("third", "fourth")
    driver.apply()
    charged = [
        (found.joins[small], alone_s),
        (found.joins[large], beside_s - leave_s),
        (found.joins[middle], instead_s - leave_s),
        (found.joins[small], again_s - leave_s),
        *((found.moves[rank], (fused_s - leave_s) / 2) for rank in (small, middle)),
        (found.leaves, leave_s),
    ]
    for seconds, taken_s in charged:
        seconds.append(max(1e-6, taken_s))
    found.captures.update(driver.captures_s)


class _TimedExecutor(TorchExecutor):
    """Remembers what ends of tasks take, by rank."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.finishes_s: dict[int, list[float]] = {}

    def finish(self, task: RuntimeTask, instance: RunningInstance) -> None:
        start_ns = self.now_ns
        super().finish(task, instance)
        taken_s = (self.now_ns - start_ns) / 1e9
        self.finishes_s.setdefault(task.spec.adapter.rank, []).append(taken_s)


class _SeenInstance(RunningInstance):
    @property
    def captured(self) -> list[CapturedRunner]:
        """Of the running plan."""
        return [runner for runner in self._runners if isinstance(runner, CapturedRunner)]


class _Driver:
    """An executor with one instance, ``instances[0]``, given plans by hand."""

    def __init__(
        self,
        shape: ModelShape,
        all_sizes: Sequence[tuple[int, ...]],
        executor: _TimedExecutor,
        instances: Sequence[_SeenInstance],
        recorder: Recorder,
    ) -> None:
        self.shape, self._sizes_left = shape, list(all_sizes)
        self.executor, self.instances, self.recorder = executor, instances, recorder
        self.numbers: dict[int, float] = {}
        self.captures_s: dict[int, float] = {}  # of one size, by rows
        self._epoch, self._seed = 0, 0
        self._htasks: dict[tuple[str, ...], HTask] = {}
        executor.start(InstanceSpec(INSTANCE, shape.name, "gpu", 1 << 60))
        self._until(EventKind.INSTANCE_READY)

    def task(self, name: str, rank: int, steps: int) -> TaskSpec:
        self._seed += 1
        smallest = self._sizes_left[-1]
        spec = _spec(self.shape, name, rank, self._seed, smallest)._replace(num_steps=steps)
        self.executor.prepare(spec)
        self._until(EventKind.TASK_READY)
        return spec

    def take_over(self, *groups: Sequence[TaskSpec]) -> float:
        """Seconds that an hTask of each group takes to begin, without captures: what the steps
        after it do not explain. The first group's first task takes a step in each round."""
        self.instances[0].settle_all()
        begun_ns = self.executor.now_ns
        captured_s = self.apply(*groups)
        times = self._step_times_s(groups[0][0].task_id, begun_ns)
        step_s = (times[-1] - times[_LED_BY - 1]) / (len(times) - _LED_BY)
        self._count_numbers(groups)
        return times[_LED_BY - 1] - _LED_BY * step_s - captured_s

    def apply(self, *groups: Sequence[TaskSpec]) -> float:
        """Seconds of captures."""
        plan = plan_of([self._htask_of(group) for group in groups], self._epoch)
        self._epoch += 1
        spans = len(self.recorder.spans)
        self.executor.apply(plan)
        self._until(EventKind.PLAN_APPLIED)
        for runner in self.instances[0].captured:
            self.captures_s |= runner.steps.capture_s
        captures = [x for x in self.recorder.spans[spans:] if x.name == "capture"]
        return sum(item.duration_ns for item in captures) / 1e9

    def _htask_of(self, group: Sequence[TaskSpec]) -> HTask:
        """The same for the same tasks; of new ones with the next sizes."""
        names = tuple(spec.task_id for spec in group)
        if names not in self._htasks:
            self._htasks[names] = _htask(group, self._sizes_left.pop(0))
        return self._htasks[names]

    def _count_numbers(self, groups: Sequence[Sequence[TaskSpec]]) -> None:
        for spec in (spec for group in groups for spec in group):
            state = self.executor.tasks[spec.task_id].state
            assert state is not None
            count = sum(tensors.param.numel() for tensors in state.tensors.values())
            self.numbers[spec.adapter.rank] = float(count)

    def until_done(self, *task_ids: str) -> None:
        end_ns = self.executor.now_ns + int(_LONGEST_S * 1e9)
        while any(self.executor.tasks[task_id].result is None for task_id in task_ids):
            if self.executor.now_ns > end_ns:
                raise TimeoutError(f"{task_ids} are not done in {_LONGEST_S:.0f} s")
            self._events(self.executor.now_ns + _GLANCE_NS)

    def _step_times_s(self, task_id: str, begun_ns: int) -> list[float]:
        """When the first steps after that time were read, since then."""
        end_ns = self.executor.now_ns + int(_LONGEST_S * 1e9)
        while self.executor.now_ns < end_ns:
            told = [x.time_ns for x in self.recorder.steps if x.task_id == task_id]
            times = [(time_ns - begun_ns) / 1e9 for time_ns in told if time_ns > begun_ns]
            if len(times) >= STEPS - _LED_BY:
                return times
            self._events(self.executor.now_ns + _GLANCE_NS)
        raise TimeoutError(f"{task_id} took no {STEPS - _LED_BY} steps in {_LONGEST_S:.0f} s")

    def _until(self, kind: EventKind) -> None:
        end_ns = self.executor.now_ns + int(_LONGEST_S * 1e9)
        while self.executor.now_ns < end_ns:
            if any(event.kind is kind for event in self._events(_FOREVER_NS)):
                return
        raise TimeoutError(f"no {kind.name} in {_LONGEST_S:.0f} s")

    def _events(self, until_ns: int) -> list[Event]:
        events = self.executor.wait(until_ns)
        for event in events:
            if event.kind in (EventKind.TASK_FAILED, EventKind.INSTANCE_FAILED):
                raise RuntimeError(f"{event.kind.name} {event.task_id}: {event.data}")
        return events


@contextlib.contextmanager
def _driver(
    shape: ModelShape,
    all_sizes: Sequence[tuple[int, ...]],
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
        instances: list[_SeenInstance] = []

        def make(spec: InstanceSpec, backbone: Backbone, host: TorchExecutor) -> RunningInstance:
            instances.append(_SeenInstance(spec, backbone, host))
            return instances[-1]

        executor = _TimedExecutor(
            StepBuilder(), store, texts, options, [recorder], make_instance=make
        )
        try:
            yield _Driver(shape, all_sizes, executor, instances, recorder)
        finally:
            executor.stop(INSTANCE)
            executor.close()


def _spec(shape: ModelShape, name: str, rank: int, seed: int, sizes: tuple[int, ...]) -> TaskSpec:
    """Whose steps fit into a micro-batch of the largest size."""
    longest = min(sizes[-1] // _BATCH_SIZE, sizes[0])
    kind = StepTask(rank=rank, max_length_tokens=longest, batch_size=_BATCH_SIZE)
    return kind.spec(name, shape.name, seed)


def _htask(specs: Sequence[TaskSpec], sizes: tuple[int, ...]) -> HTask:
    """Tasks that share its micro-batches evenly."""
    slots, chunk = tuple(adapter_slot(spec) for spec in specs), _CHUNK_TOKENS
    shapes = tuple(ShapeKey(chunk, rows // chunk, slots) for rows in sizes)
    share = shapes[-1].num_chunks // len(specs)
    slot_of = {spec.task_id: slot for slot, spec in enumerate(specs)}
    return HTask(shapes, slot_of, dict.fromkeys(slot_of, share), PackRule.CHUNK)


__all__ = ["Timed", "measure_takeovers", "takeover_jobs"]
