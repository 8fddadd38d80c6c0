"""Small stand-ins: an affine cost, lengths that never vary, a planner of one hTask, a journal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from muxtune import codec
from muxtune.engine import DEFAULT_OPTIONS, Engine, EngineOptions, RunTotals, TaskOutcome
from muxtune.errors import TaskError
from muxtune.planning.journal import JournalBatch
from muxtune.planning.step_builder import StepBuilder
from muxtune.types import (
    AdapterSlot,
    DispatchRule,
    Estimate,
    Event,
    HTask,
    HTaskTurn,
    InstanceSpec,
    InstanceView,
    LengthSummary,
    PackRule,
    PassCoefficients,
    Plan,
    Prediction,
    Refusal,
    ReplicaShape,
    Sample,
    ShapeKey,
    TaskReadyData,
    TaskSpec,
)
from muxtune_sim import SimExecutor, SimOptions
from muxtune_sim.options import DEFAULT_SIM_OPTIONS

CHUNK_TOKENS = 64
PASS_S = 1.0  # of a micro-batch, whatever it holds
GB = 10**9


class FakeCost:
    """Each pass takes ``pass_s``; nothing else takes time but a transition and a task's end."""

    def __init__(
        self, pass_s: float = PASS_S, transition_s: float = 0.0, finish_s: float = 0.0
    ) -> None:
        self.pass_s, self._transition_s, self._finish_s = pass_s, transition_s, finish_s

    @property
    def charges_ends(self) -> bool:
        return self._finish_s > 0

    def finish_s(self, slot: AdapterSlot) -> Estimate:
        return exactly(self._finish_s)

    def pass_coefficients(self, shape: ShapeKey, replica: ReplicaShape) -> PassCoefficients:
        return PassCoefficients(self.pass_s, 0.0, 0.0, (0.0,) * len(shape.slots), 0.1)

    def transition_s(self, previous: Plan | None, new: Plan) -> Estimate:
        return exactly(self._transition_s)


def exactly(value: float) -> Estimate:
    return Estimate(value, value, value)


def fake_book(pass_s: float = PASS_S, transition_s: float = 0.0, finish_s: float = 0.0) -> Any:
    cost = FakeCost(pass_s, transition_s, finish_s)
    return lambda model, device: cost


class FakeLibrary:
    """Every sequence has ``CHUNK_TOKENS`` tokens; a task of ``n`` sequences a step takes ``n``
    micro-batches a step when its quota is 1. Tasks named bad* cannot be prepared."""

    def __init__(self) -> None:
        self.tasks: dict[str, TaskSpec] = {}

    def add(self, task: TaskSpec) -> TaskReadyData:
        if task.task_id.startswith("bad"):
            raise TaskError(task.task_id, "its data is bad", "Give it other data")
        self.tasks[task.task_id] = task
        assert task.num_steps is not None
        return TaskReadyData(task.num_steps, SUMMARY)

    def discard(self, task_id: str) -> None:
        self.tasks.pop(task_id, None)

    def batch(self, task_id: str, step: int) -> tuple[Sample, ...]:
        count = self.tasks[task_id].sequences_per_step
        return tuple(Sample(index, CHUNK_TOKENS, CHUNK_TOKENS - 1) for index in range(count))

    def num_steps(self, task_id: str) -> int:
        return self.tasks[task_id].num_steps or 0

    def period_steps(self, task_id: str) -> int:
        return 1

    def lengths_key(self, task_id: str) -> str:
        return str(self.tasks[task_id].sequences_per_step)


SUMMARY = LengthSummary(
    1, CHUNK_TOKENS, CHUNK_TOKENS - 1, CHUNK_TOKENS**2, CHUNK_TOKENS, (CHUNK_TOKENS,) * 2, "fake"
)


class FakePlanner:
    """One hTask with all tasks, quota 1. Each task needs ``gb_by_rank[rank]`` GB, default 1."""

    def __init__(
        self, gb_by_rank: Mapping[int, int] = {}, pass_s: float = PASS_S, error: float = 0.05
    ) -> None:
        self.gb_by_rank, self.pass_s, self.error = gb_by_rank, pass_s, error
        self.calls = 0

    def plan(self, instance: InstanceView, previous: Plan | None) -> Plan | Refusal:
        self.calls += 1
        needed = sum(self.gb_by_rank.get(task.slot.rank, 1) for task in instance.tasks) * GB
        needed = needed * instance.corrections.memory_percent // 100
        if needed > instance.memory_limit_bytes:
            return Refusal("too much", (), needed, instance.memory_limit_bytes, 0.0, "buy memory")
        time_s = self.pass_s * instance.corrections.time_percent / 100
        return one_htask_plan(instance, previous, time_s, time_s * self.error, needed)


def one_htask_plan(
    instance: InstanceView, previous: Plan | None, time_s: float, error_s: float, needed: int
) -> Plan:
    ids = [task.task_id for task in instance.tasks]
    slots = tuple(task.slot for task in instance.tasks)
    shape = ShapeKey(CHUNK_TOKENS, len(ids), slots)
    htask = HTask((shape,), {name: i for i, name in enumerate(ids)}, dict.fromkeys(ids, 1))
    times = {task.task_id: time_s * task.sequences_per_step for task in instance.tasks}
    predicted = Prediction(
        Estimate(time_s, time_s - error_s, time_s + error_s),
        float(CHUNK_TOKENS * len(ids)),
        float(CHUNK_TOKENS * len(ids)),
        exactly(float(needed)),
        times,
        times,
        {},
        max(times.values()),
    )
    assert htask.packing is PackRule.CHUNK
    return Plan(
        instance.instance_id,
        0 if previous is None else previous.epoch + 1,
        instance.draining,
        instance.replicas,
        (htask,),
        (HTaskTurn(0, 1),),
        DispatchRule.SINGLE,
        predicted,
    )


class MemoryJournal:
    """Keeps batches as their bytes would read back."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(
        self,
        time_ns: int,
        events: Sequence[Event],
        actions: Sequence[Any] = (),
        plans: Sequence[Plan] = (),
        refusals: Sequence[Refusal] = (),
    ) -> None:
        parts = (tuple(events), tuple(actions), tuple(plans), tuple(refusals))
        self.lines.append(codec.dumps((len(self.lines), time_ns, *parts)))

    @property
    def batches(self) -> list[JournalBatch]:
        return [JournalBatch(*codec.loads(line)) for line in self.lines]


class Collector:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.outcomes: list[TaskOutcome] = []
        self.plans: list[Plan] = []
        self.batches: list[tuple[int, tuple[Event, ...]]] = []

    def on_plan(self, plan: Plan) -> None:
        self.plans.append(plan)

    def on_task_end(self, outcome: TaskOutcome) -> None:
        self.outcomes.append(outcome)

    def on_batch(self, time_ns: int, events: Sequence[Event]) -> None:
        self.batches.append((time_ns, tuple(events)))

    def by_id(self) -> dict[str, TaskOutcome]:
        return {outcome.task_id: outcome for outcome in self.outcomes}

    def events(self, kind: int) -> list[Event]:
        return [event for _, events in self.batches for event in events if event.kind == kind]


def task(
    task_id: str, steps: int = 10, arrival_s: float = 0.0, batch_size: int = 1, **fields: Any
) -> TaskSpec:
    """With quota 1 a task takes ``steps * batch_size`` rounds of ``PASS_S``."""
    return TaskSpec(
        task_id,
        fields.pop("model", "m"),
        num_steps=steps,
        batch_size=batch_size,
        arrival_ns=seconds(arrival_s),
        **fields,
    )


def instance(name: str = "i0", memory_gb: int = 16, **fields: Any) -> InstanceSpec:
    return InstanceSpec(name, fields.pop("model", "m"), "fake", memory_gb * GB, **fields)


def seconds(value: float) -> int:
    return round(value * 10**9)


class Run:
    """One simulated run with everything at hand."""

    def __init__(
        self,
        policy: Any,
        tasks: Iterable[TaskSpec],
        instances: Sequence[InstanceSpec],
        planner: Any = None,
        options: SimOptions = DEFAULT_SIM_OPTIONS,
        pass_s: float = PASS_S,
        transition_s: float = 0.0,
        engine_options: EngineOptions = DEFAULT_OPTIONS,
        finish_s: float = 0.0,
    ) -> None:
        self.journal, self.told = MemoryJournal(), Collector()
        self.planner = planner or FakePlanner()
        self.library = FakeLibrary()
        book = fake_book(pass_s, transition_s, finish_s)
        self.executor = SimExecutor(StepBuilder(), book, self.library, options)
        self.engine = Engine(
            policy,
            self.planner,
            self.executor,
            tasks,
            instances,
            self.journal,
            (self.told,),
            engine_options,
        )

    def run(self) -> RunTotals:
        return self.engine.run()

    @property
    def ended_s(self) -> dict[str, float]:
        return {outcome.task_id: outcome.ended_ns / 1e9 for outcome in self.told.outcomes}
