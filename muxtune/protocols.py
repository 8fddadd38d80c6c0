"""The contracts between the scheduler core and what plugs into it.

Two levels of decision (ClusterPolicy, InstancePlanner), one builder of steps
(``muxtune.planning.step_builder.StepBuilder``), one executor protocol, one cost model protocol.
Policies and planners are pure: they read the event's time, never a clock, and hold no speed
constant of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from muxtune.types import (
    Action,
    AdapterSlot,
    Discipline,
    Estimate,
    Estimates,
    Event,
    InstanceSpec,
    InstanceView,
    PassCoefficients,
    PassLoad,
    Plan,
    Refusal,
    ReplicaShape,
    Sample,
    ShapeKey,
    StageLedgers,
    SubgraphTimes,
    TaskReadyData,
    TaskSpec,
    TaskView,
)


class FleetView(Protocol):
    """Read-only facade over the engine's indexes, valid during the call."""

    @property
    def now_ns(self) -> int: ...

    @property
    def changed(self) -> frozenset[str]:
        """Instances that changed since the policy was last asked."""
        ...

    @property
    def queue(self) -> Collection[TaskView]:
        """Ready, unplaced tasks in order of (arrival, id)."""
        ...

    @property
    def instances(self) -> Mapping[str, InstanceView]: ...

    @property
    def starting(self) -> Mapping[str, InstanceSpec]:
        """Instances asked for that are not ready yet."""
        ...

    @property
    def known_instances(self) -> Collection[str]:
        """All instances, those that start, are emptied or stop included."""
        ...

    @property
    def down_gpus(self) -> Collection[str]:
        """GPUs that have failed or were taken away; no instance can start there."""
        ...

    def least_loaded(self, model: str) -> Iterator[str]:
        """Ready instances of a model, fewest tasks first, ties by id."""
        ...

    def load(self, instance_id: str) -> int:
        """Tasks on an instance, without building its view."""
        ...

    @property
    def waiting_models(self) -> Collection[str]:
        """Base models that queued tasks ask for, sorted."""
        ...

    def waiting(self, model: str, discipline: Discipline = Discipline.FIFO) -> Iterator[TaskView]:
        """Queued tasks of one base model, lazily, in the order of the discipline."""
        ...


class ClusterPolicy(Protocol):
    """Pure decisions about the fleet: queue, place, grow, drain, migrate."""

    def on_event(self, event: Event, fleet: FleetView) -> list[Action]: ...


class InstancePlanner(Protocol):
    """Pure decision inside one instance: hTasks, chunks, order."""

    def plan(self, instance: InstanceView, previous: Plan | None) -> Plan | Refusal:
        """A plan of a later epoch; ``previous`` itself when nothing changes; or a Refusal."""
        ...


@runtime_checkable
class LengthSource(Protocol):
    """Lengths of every task's batches; the only thing packing needs to know of data."""

    def batch(self, task_id: str, step: int) -> tuple[Sample, ...]:
        """Sequences of one optimizer step, in the task's own order."""
        ...

    def num_steps(self, task_id: str) -> int: ...

    def period_steps(self, task_id: str) -> int | None:
        """``batch(t, s)`` has the same lengths as ``batch(t, s % period)``; None: aperiodic."""
        ...

    def lengths_key(self, task_id: str) -> str:
        """Tasks with equal keys have equal batches, so that tables are shared among them."""
        ...


class TaskLibrary(LengthSource, Protocol):
    """A LengthSource that tasks are added to: real data sets, or drawn lengths."""

    def add(self, task: TaskSpec) -> TaskReadyData:
        """Read or draw the task's sequences. Raises DataError, ConfigError or TaskError."""
        ...

    def discard(self, task_id: str) -> None: ...


class CostModel(Protocol):
    """Stateless and batched; values with intervals, extrapolated or not.

    The time of a pass is affine: base(shape) + attention_pairs * a + loss_rows * l + the sum of
    the closing slots' optimizer times, all of which ``pass_coefficients`` tells. That is what
    lets a forecast be exact without walking. ``pass_times_s`` agrees with it for loads without a
    layout; of one certain micro-batch, whose load has one, it and ``breakdown_s`` may know more.
    """

    def pass_coefficients(self, shape: ShapeKey, replica: ReplicaShape) -> PassCoefficients: ...

    def pass_times_s(self, loads: Sequence[PassLoad], replica: ReplicaShape) -> Estimates: ...

    def breakdown_s(self, load: PassLoad, replica: ReplicaShape) -> Mapping[str, float]:
        """The same pass by cause: backbone, attention, adapters, loss, optimizer, overhead...; sums
        to what ``pass_times_s`` says of the load."""
        ...

    def subgraph_times_s(self, plan: Plan) -> SubgraphTimes: ...

    def transition_s(self, previous: Plan | None, new: Plan) -> Estimate: ...

    def capture_s(self, shape: ShapeKey, replica: ReplicaShape) -> Estimate:
        """Seconds to prepare one shape that has not run before; 0 where nothing is captured."""
        ...

    def startup_s(self, replica: ReplicaShape) -> Estimate:
        """Seconds from nothing to an instance that holds its backbone."""
        ...

    def checkpoint_s(self, slot: AdapterSlot) -> Estimate:
        """Seconds for which an instance writes out a task that leaves it."""
        ...

    @property
    def charges_ends(self) -> bool:
        """Whether ``finish_s`` is anything at all."""
        ...

    def finish_s(self, slot: AdapterSlot) -> Estimate:
        """Seconds for which an instance writes out a task that is done, before it is told."""
        ...

    def memory_ledger_bytes(self, plan: Plan) -> StageLedgers:
        """Its peak is ``resident_bytes`` of all slots plus the largest ``pass_bytes``."""
        ...

    def resident_bytes(self, slots: Sequence[AdapterSlot], replica: ReplicaShape) -> int:
        """Bytes held all the time on the fullest GPU: backbone, adapters, optimizer state."""
        ...

    def pass_bytes(self, shape: ShapeKey, replica: ReplicaShape) -> int:
        """Bytes that a pass of this shape needs on top of what is resident, at its peak."""
        ...


class CostBook(Protocol):
    """Which cost model holds for a base model on a device."""

    def __call__(self, model: str, device: str) -> CostModel: ...


class Executor(Protocol):
    """Carries plans out, simulated or real."""

    @property
    def now_ns(self) -> int: ...

    def start(self, instance: InstanceSpec) -> None:
        """Later: INSTANCE_READY or INSTANCE_FAILED."""
        ...

    def stop(self, instance_id: str) -> None: ...

    def prepare(self, task: TaskSpec) -> Event | None:
        """The TASK_READY of a task that needs no time to be prepared; it joins the batch of the
        arrival. Else None, and later TASK_READY or TASK_FAILED.

        The engine asks before the batch of the arrival is decided and journalled: preparing
        decides nothing.
        """
        ...

    def apply(self, plan: Plan) -> None:
        """Non-blocking; takes over at the next round boundary. Tasks of the running plan that
        are neither in the new plan nor in its drains are dropped at that boundary."""
        ...

    def cancel(self, task_id: str) -> None:
        """Stop a task at the next micro-batch boundary; later: TASK_CANCELLED."""
        ...

    def wait(self, until_ns: int) -> list[Event]:
        """Run to the next instant with events, but start nothing at ``until_ns``; one whole
        instant, sorted. Empty: ``until_ns`` was reached."""
        ...
