"""Stand-ins and drivers for the tests of muxtune.runtime: tiny model, drawn text, plans by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from muxtune.cost.shapes import ModelShape
from muxtune.planning.step_builder import StepBuilder
from muxtune.runtime.backbone import BackboneStore, random_weights
from muxtune.runtime.bank import TaskState, adapter_slot
from muxtune.runtime.executor import TorchExecutor
from muxtune.runtime.instance import RunningInstance
from muxtune.runtime.options import TorchOptions
from muxtune.runtime.records import Recorder
from muxtune.runtime.tasks import RuntimeTask
from muxtune.types import (
    AdapterSlot,
    AdapterSpec,
    DataSpec,
    DispatchRule,
    Estimate,
    Event,
    EventKind,
    HTask,
    HTaskTurn,
    InstanceSpec,
    LengthSummary,
    OptimizerSpec,
    PackRule,
    Plan,
    Prediction,
    ReplicaShape,
    Sample,
    ShapeKey,
    TaskReadyData,
    TaskSpec,
)
from muxtune.workload.encoding import EncodedSequence

TINY = ModelShape("tiny", 2, 64, 4, 2, 16, 128, 128)
INSTANCE = "i0"
ENDS = {EventKind.TASK_DONE, EventKind.TASK_FAILED, EventKind.TASK_CANCELLED}
NS = 1_000_000_000


def make_store(seed: int = 0) -> BackboneStore:
    return BackboneStore({"tiny": random_weights(TINY, seed)})


def make_task(task_id: str, **changes: Any) -> TaskSpec:
    """A small task of the tiny model; fields of its parts may be given flat."""
    adapter = AdapterSpec(rank=4, alpha=8.0, targets=("q_proj", "v_proj"))
    optimizer = OptimizerSpec(lr=1e-2)
    data = DataSpec(max_length_tokens=24)
    parts: dict[str, Any] = {"adapter": adapter, "optimizer": optimizer, "data": data}
    for name in list(changes):
        for part, value in parts.items():
            if name in value._fields:
                parts[part] = value._replace(**{name: changes.pop(name)})
                break
    defaults: dict[str, Any] = {"batch_size": 3, "num_steps": 4, "seed": hash_of(task_id)}
    return TaskSpec(task_id, "tiny", **{**defaults, **parts, **changes})


def hash_of(name: str) -> int:
    return sum(ord(letter) * 31**place for place, letter in enumerate(name)) % 100_003


class DrawnText:
    """A TextLibrary of tokens drawn from each task's seed; sequences of 2 to max_length tokens."""

    def __init__(self, vocab: int = 128, num_sequences: int = 23) -> None:
        self.vocab, self.num_sequences = vocab, num_sequences
        self.specs: dict[str, TaskSpec] = {}
        self._sequences: dict[str, list[EncodedSequence]] = {}
        self.on_sequence: Callable[[str, int], None] = lambda task_id, index: None
        self.on_batch: Callable[[str, int], None] = lambda task_id, step: None
        self.discarded: list[str] = []

    def add(self, task: TaskSpec) -> TaskReadyData:
        random = np.random.default_rng(task.seed)
        longest = task.data.max_length_tokens
        self.specs[task.task_id] = task
        self._sequences[task.task_id] = [
            self._draw(random, longest) for _ in range(self.num_sequences)
        ]
        assert task.num_steps is not None
        summary = LengthSummary(self.num_sequences, 9, 8, 90, longest, (2, longest), str(task.seed))
        return TaskReadyData(task.num_steps, summary)

    def _draw(self, random: np.random.Generator, longest: int) -> EncodedSequence:
        count = int(random.integers(2, longest + 1))
        # A skewed distribution, so that there is something to learn.
        tokens = (random.beta(0.5, 3.0, count) * (self.vocab - 1)).astype(np.int32) + 1
        mask = random.random(count) < 0.8
        mask[0], mask[-1] = True, False
        return EncodedSequence(tokens, mask)

    def discard(self, task_id: str) -> None:
        self.discarded.append(task_id)

    def batch(self, task_id: str, step: int) -> tuple[Sample, ...]:
        self.on_batch(task_id, step)
        size = self.specs[task_id].sequences_per_step
        indexes = [(step * size + at) % self.num_sequences for at in range(size)]
        sequences = self._sequences[task_id]
        return tuple(
            Sample(index, len(sequences[index].tokens), sequences[index].target_tokens)
            for index in indexes
        )

    def num_steps(self, task_id: str) -> int:
        num_steps = self.specs[task_id].num_steps
        assert num_steps is not None
        return num_steps

    def period_steps(self, task_id: str) -> int | None:
        return None

    def lengths_key(self, task_id: str) -> str:
        return task_id

    def sequence(self, task_id: str, index: int) -> EncodedSequence:
        self.on_sequence(task_id, index)
        return self._sequences[task_id][index]

    def validation(self, task_id: str) -> tuple[EncodedSequence, ...]:
        return tuple(self._sequences[task_id][:4])

    def step_sequences(self, task_id: str, step: int) -> list[EncodedSequence]:
        return [self._sequences[task_id][item.index] for item in self.batch(task_id, step)]


def make_htask(
    tasks: Sequence[TaskSpec],
    chunk_tokens: int = 16,
    quota: int | Mapping[str, int] = 2,
    packing: PackRule = PackRule.CHUNK,
    slots: Sequence[AdapterSlot] | None = None,
) -> HTask:
    """Slots in the tasks' order; one shape that holds all quotas."""
    quotas = {
        task.task_id: quota if isinstance(quota, int) else quota[task.task_id] for task in tasks
    }
    kinds = tuple(slots or (adapter_slot(task) for task in tasks))
    shape = ShapeKey(chunk_tokens, sum(quotas.values()), kinds)
    slot_of = {task.task_id: slot for slot, task in enumerate(tasks)}
    return HTask((shape,), slot_of, quotas, packing)


def make_plan(
    htasks: Sequence[HTask],
    epoch: int = 0,
    counts: Sequence[int | None] = (),
    drains: Iterable[str] = (),
    instance_id: str = INSTANCE,
) -> Plan:
    zero = Estimate(0.0, 0.0, 0.0)
    turns = counts or [None] * len(htasks)
    return Plan(
        instance_id=instance_id,
        epoch=epoch,
        drains=frozenset(drains),
        replicas=(ReplicaShape(),),
        htasks=tuple(htasks),
        round=tuple(HTaskTurn(index, count) for index, count in enumerate(turns)),
        dispatch=DispatchRule.SINGLE,
        predicted=Prediction(zero, 0.0, 0.0, zero, {}, {}, {}, 0.0),
    )


class CallClock:
    """Each look at the clock is a nanosecond: ``wait`` can be stopped after a unit of work, on any
    machine."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        return self.calls


class Keeping(TorchExecutor):
    """Keeps what tasks had trained when they were done; the executor itself lets it go."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.final: dict[str, dict[tuple[str, str], torch.Tensor]] = {}

    def finish(self, task: RuntimeTask, instance: RunningInstance) -> None:
        super().finish(task, instance)
        if task.state is not None and task.state.tensors:
            self.final[task.spec.task_id] = weights_of(task.state)


def weights_of(state: TaskState) -> dict[tuple[str, str], torch.Tensor]:
    return {key: values.param.clone() for key, values in state.tensors.items()}


class Bench:
    """An executor with one instance (or more) and a recorder, driven by hand."""

    def __init__(
        self,
        folder: Path,
        store: BackboneStore,
        library: Any = None,
        instances: Sequence[str] = (INSTANCE,),
        model: str = "tiny",
        replicas: tuple[ReplicaShape, ...] = (ReplicaShape(),),
        make_instance: Any = None,
        **options: Any,
    ) -> None:
        self.library = library or DrawnText()
        self.recorder = Recorder()
        settings = {"evaluate_tokens": 0, **options}
        self.executor = Keeping(
            StepBuilder(),
            store,
            self.library,
            TorchOptions(folder, **settings),
            [self.recorder],
            CallClock(),
            make_instance,
        )
        self.events: list[Event] = []
        for instance_id in instances:
            self.executor.start(InstanceSpec(instance_id, model, "cpu", 10**12, replicas))
        self.until(EventKind.INSTANCE_READY, len(instances))

    def prepare(self, *tasks: TaskSpec) -> None:
        for task in tasks:
            self.executor.prepare(task)
        already = len(self.of(EventKind.TASK_READY)) + len(self.of(EventKind.TASK_FAILED))
        while len(self.of(EventKind.TASK_READY)) + len(
            self.of(EventKind.TASK_FAILED)
        ) < already + len(tasks):
            self.step()

    def step(self) -> list[Event]:
        events = self.executor.wait(2**62)
        assert events, f"the executor has nothing left to do after {self.events[-3:]}"
        self.events.extend(events)
        return events

    def until(self, kind: EventKind, count: int = 1) -> list[Event]:
        """Runs on to the ``count``-th event of a kind since the start."""
        while len(self.of(kind)) < count:
            self.step()
        return self.of(kind)

    def of(self, kind: EventKind) -> list[Event]:
        return [event for event in self.events if event.kind is kind]

    def done(self) -> set[str]:
        return {event.task_id for event in self.of(EventKind.TASK_DONE)}

    def until_ended(self, *tasks: TaskSpec) -> None:
        ids = {task.task_id for task in tasks}
        while not ids <= {event.task_id for event in self.events if event.kind in ENDS}:
            self.step()

    def until_step(self, task: TaskSpec, step: int) -> None:
        """Runs micro-batches until a task has done ``step`` optimizer steps."""
        while len(self.recorder.losses(task.task_id)) < step:
            self.tick()

    def tick(self) -> None:
        """One unit of work at most."""
        self.events.extend(self.executor.wait(self.executor.now_ns + 2))

    def state(self, task: TaskSpec) -> TaskState:
        state = self.executor.tasks[task.task_id].state
        assert state is not None
        return state

    def weights(self, task: TaskSpec) -> dict[tuple[str, str], torch.Tensor]:
        """Now, or when it was done; whole, for the executor copies on a stream of its own."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        final = self.executor.final.get(task.task_id)
        return weights_of(self.state(task)) if final is None else final

    def run(self, plan: Plan, *tasks: TaskSpec) -> None:
        self.prepare(*tasks)
        assert all(task.task_id in self.executor.tasks for task in tasks), self.events
        self.executor.apply(plan)
        self.until_ended(*tasks)


def worst_gap(
    left: Mapping[tuple[str, str], torch.Tensor], right: Mapping[tuple[str, str], torch.Tensor]
) -> float:
    """The largest norm-relative difference of a tensor."""
    assert left.keys() == right.keys()
    assert left
    return max(
        float((left[key] - right[key]).norm() / right[key].norm().clamp(min=1e-30)) for key in left
    )
