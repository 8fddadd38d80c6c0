"""What an instance takes besides its rounds, timed on the executor that trains.

Plans by hand, in which tasks of one adapter each join, move to other slots and leave. Of each plan
is noted what it does and what steps and captures do not explain of the time until it trains; what
one task's joining costs is told by all of them together (``muxtune.cost.profiled``). Captures and
ends of tasks (its adapter is written) are timed by themselves.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from muxtune.cost.shapes import ModelShape
from muxtune.cost.takeovers import CAPTURE, TAKEOVER
from muxtune.planning.step_builder import StepBuilder
from muxtune.profiling.bench import summarise
from muxtune.profiling.compiling import StepJob, step_jobs
from muxtune.profiling.step_cases import INSTANCE, StepTask, plan_of
from muxtune.runtime.backbone import Backbone, BackboneStore
from muxtune.runtime.bank import adapter_slot
from muxtune.runtime.captured_runner import CapturedRunner
from muxtune.runtime.executor import TorchExecutor
from muxtune.runtime.instance import RunningInstance
from muxtune.runtime.memory import quick_collections
from muxtune.runtime.options import TorchOptions
from muxtune.runtime.records import Recorder
from muxtune.runtime.tasks import RuntimeTask
from muxtune.types import (
    AdapterSlot,
    Event,
    EventKind,
    HTask,
    InstanceSpec,
    PackRule,
    ShapeKey,
    TaskSpec,
)
from muxtune.workload.random_texts import RandomTexts

ROWS = (256, 512, 1024, 2560)  # sizes of each hTask, all of which are captured
STEPS = 6  # under each plan
_LED_BY = 2  # steps that are started before the first is read
_MORE = 4  # so that nobody ends while a takeover is timed
_RANKS = {"a": 16, "b": 64, "c": 32, "d": 16, "e": 64, "f": 32}
# The tasks of each hTask of each plan, in their slots; whom the next one does not name has ended
# before it, and a slot may be left empty.
_EMPTY = "_"
_PLANS = (
    ("a",), ("a", "b"), ("ab",), ("b", "c"), ("bc", "d"), ("c", "d"), ("c",), ("ce",), ("_e",),
    ("fe",),
)  # fmt: skip
# No two hTasks have the same rows, as in training: libraries take their time for new sizes. They
# become smaller, so that no older graph is captured anew.
_STEP_ROWS, _REPEATS = 32, 2
_CHUNK_TOKENS, _BATCH_SIZE = 32, 4
_FOREVER_NS, _GLANCE_NS = 1 << 62, 1_000_000
_LONGEST_S = 20.0  # of one wait


class Takeover(NamedTuple):
    """``joined``, ``moved``: trained numbers of each task that is new to the instance, and of each
    that goes to other slots. ``rebuilds``: whether pools are let go or made. ``seconds``: without
    captures."""

    joined: tuple[float, ...]
    moved: tuple[float, ...]
    rebuilds: bool
    seconds: float

    def point(self) -> dict[str, float]:
        return {
            "joins": float(len(self.joined)),
            "join_parameters": sum(self.joined),
            "moves": float(len(self.moved)),
            "move_parameters": sum(self.moved),
            "rebuilds": float(self.rebuilds),
            **summarise([self.seconds]),
        }


class Capture(NamedTuple):
    """Of one size. ``is_first``: of its hTask, which is tried out by all blocks."""

    rows: int
    is_first: bool
    seconds: float


def measure_takeovers(
    shape: ModelShape, store: BackboneStore, *, step: str, deterministic: bool, max_rows: int,
    repeats: int = _REPEATS, end_s: float = math.inf,
) -> dict[str, Any]:  # fmt: skip
    """Operations of a profile: ``takeover`` (see ``Takeover``), ``capture`` (rows, whether it is
    its hTask's first) and ``finish`` (trained numbers). Wall time, whatever clock the rest was
    timed by: disks count. At least once; ``repeats`` times as far as they would be over by
    ``end_s`` (``time.perf_counter``)."""
    takeovers: list[Takeover] = []
    captures: list[Capture] = []
    finishes_s: dict[float, list[float]] = {}
    longest_s = 0.0
    for repeat in range(repeats if store.device.type == "cuda" else 1):
        start_s = time.perf_counter()
        if repeat and start_s + longest_s > end_s:
            break
        all_sizes = _all_sizes(max_rows, repeat)
        with quick_collections(), _driver(shape, all_sizes, store, step, deterministic) as driver:
            takeovers += _come_and_go(driver)
            captures += driver.captures
            for task_id, seconds in driver.executor.finishes_s.items():
                finishes_s.setdefault(driver.numbers[task_id], []).append(seconds)
        longest_s = max(longest_s, time.perf_counter() - start_s)
    written = [{"parameters": n, **summarise(each)} for n, each in sorted(finishes_s.items())]
    ops = {
        "takeover": _op(TAKEOVER, [takeover.point() for takeover in takeovers]),
        "finish": _op(("parameters",), written),
    }
    if captures:
        points = [
            {"rows": float(rows), "first": float(is_first), **summarise([seconds])}
            for rows, is_first, seconds in captures
        ]
        ops["capture"] = _op(CAPTURE, points)
    return ops


def takeover_jobs(shape: ModelShape, max_rows: int) -> list[StepJob]:
    """What is captured, so that it can be compiled before."""
    jobs = []
    for repeat in range(_REPEATS):
        all_sizes = _all_sizes(max_rows, repeat)
        specs = {name: _spec(shape, name, rank, 0, all_sizes[-1]) for name, rank in _RANKS.items()}
        for group, sizes in zip(_new_htasks(), all_sizes, strict=True):
            htask = _htask([specs[name] for name in group], sizes)
            jobs += step_jobs(shape, plan_of([htask]), specs)
    return jobs


def _new_htasks() -> list[str]:
    """In the order in which they are captured: those that the plan before does not have."""
    plans = zip(((), *_PLANS), _PLANS, strict=False)
    return [group for before, plan in plans for group in plan if _like(group, before) is None]


def _like(group: str, running: Iterable[str]) -> str | None:
    """The running hTask whose slots these tasks take."""
    for other in running:
        places = list(zip(group, other, strict=False))
        stay = any(a == b != _EMPTY for a, b in places)
        fit = all(_EMPTY in (a, b) or _RANKS[a] == _RANKS[b] for a, b in places)
        if len(group) == len(other) and stay and fit:
            return other
    return None


def _all_sizes(max_rows: int, repeat: int) -> list[tuple[int, ...]]:
    """Of each hTask of a repeat, as they come."""
    count = len(_new_htasks())
    most = max(_STEP_ROWS, max_rows // 7 // _STEP_ROWS * _STEP_ROWS)
    steps = [min(most, _STEP_ROWS * ((repeat + 1) * count - number)) for number in range(count)]
    return [tuple(sorted({min(rows, max_rows - most) + more for rows in ROWS})) for more in steps]


def _op(axes: Sequence[str], points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"unit": "s", "axes": list(axes), "points": list(points)}


def _come_and_go(driver: _Driver) -> list[Takeover]:
    found, before = [], ""
    for plan in _PLANS:
        names = "".join(plan).replace(_EMPTY, "")
        driver.until_done(*(name for name in before if name not in names))
        for name in names:
            if name not in before:
                driver.task(name)
        found.append(driver.take_over(*plan))
        before = names
    driver.until_done(*before)
    driver.apply()
    return found


class _TimedExecutor(TorchExecutor):
    """Remembers what ends of tasks take."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.finishes_s: dict[str, float] = {}

    def finish(self, task: RuntimeTask, instance: RunningInstance) -> None:
        start_ns = self.now_ns
        super().finish(task, instance)
        self.finishes_s[task.spec.task_id] = (self.now_ns - start_ns) / 1e9


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
        self.shape, self._sizes_left, self._smallest = shape, list(all_sizes), all_sizes[-1]
        self.executor, self.instances, self.recorder = executor, instances, recorder
        self.numbers: dict[str, float] = {}  # that a task trains
        self.captures: list[Capture] = []
        self._epoch = 0
        self._specs: dict[str, TaskSpec] = {}
        self._htasks: dict[str, HTask] = {}  # of the running plan, by their tasks
        executor.start(InstanceSpec(INSTANCE, shape.name, "gpu", 1 << 60))
        self._until(EventKind.INSTANCE_READY)

    def task(self, name: str) -> None:
        """One more, ready."""
        plans = sum(name in "".join(plan) for plan in _PLANS)
        spec = _spec(self.shape, name, _RANKS[name], len(self._specs) + 1, self._smallest)
        self._specs[name] = spec._replace(num_steps=plans * STEPS + _MORE)
        self.executor.prepare(self._specs[name])
        self._until(EventKind.TASK_READY)

    def take_over(self, *groups: str) -> Takeover:
        """An hTask of each group begins. What the steps after that do not explain: the first
        group's first task takes a step in each round."""
        self.instances[0].settle_all()
        slots_before, pools_before = self._slots(), self._pools()
        begun_ns = self.executor.now_ns
        captured_s = self.apply(*groups)
        times = self._step_times_s(groups[0].strip(_EMPTY)[0], begun_ns)
        step_s = (times[-1] - times[_LED_BY - 1]) / (len(times) - _LED_BY)
        slots = self._slots()
        self._count_numbers(slots)
        joined = tuple(self.numbers[name] for name in slots if name not in slots_before)
        moved = tuple(
            self.numbers[name] for name, own in slots.items() if slots_before.get(name, own) != own
        )
        taken_s = times[_LED_BY - 1] - _LED_BY * step_s - captured_s
        return Takeover(joined, moved, self._pools() != pools_before, max(1e-6, taken_s))

    def apply(self, *groups: str) -> float:
        """Seconds of captures."""
        self._htasks = {group: self._htask_of(group) for group in groups}
        known = {id(runner): set(runner.steps.capture_s) for runner in self.instances[0].captured}
        plan = plan_of(list(self._htasks.values()), self._epoch)
        self._epoch += 1
        spans = len(self.recorder.spans)
        self.executor.apply(plan)
        self._until(EventKind.PLAN_APPLIED)
        for runner in self.instances[0].captured:
            done = known.get(id(runner), set())
            for rows, seconds in runner.steps.capture_s.items():
                if rows not in done:
                    self.captures.append(Capture(rows, not done, seconds))
                    done = {*done, rows}
        captures = [x for x in self.recorder.spans[spans:] if x.name == "capture"]
        return sum(item.duration_ns for item in captures) / 1e9

    def _slots(self) -> dict[str, tuple[AdapterSlot, ...]]:
        """Of the hTask of each task of the running plan."""
        return {
            name: htask.shapes[-1].slots
            for htask in self._htasks.values()
            for name in htask.slot_of
        }

    def _pools(self) -> Counter[tuple[AdapterSlot, ...]]:
        return Counter(htask.shapes[-1].slots for htask in self._htasks.values())

    def _htask_of(self, group: str) -> HTask:
        """One of the running plan's; of a new one with the next sizes."""
        known = _like(group, self._htasks)
        if known is None:
            return _htask([self._specs[name] for name in group], self._sizes_left.pop(0))
        slot_of = {name: slot for slot, name in enumerate(group) if name != _EMPTY}
        share = max(self._htasks[known].quota.values())
        return self._htasks[known]._replace(slot_of=slot_of, quota=dict.fromkeys(slot_of, share))

    def _count_numbers(self, names: Iterable[str]) -> None:
        for name in names:
            state = self.executor.tasks[name].state
            assert state is not None
            count = sum(tensors.param.numel() for tensors in state.tensors.values())
            self.numbers[name] = float(count)

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


__all__ = ["Takeover", "measure_takeovers", "takeover_jobs"]
