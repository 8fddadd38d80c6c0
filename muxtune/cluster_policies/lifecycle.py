"""Around any cluster policy: instances that come back, move away, follow the load, make room.

The inner policy keeps placing tasks as it always does. This one restarts what a failure stopped,
empties instances whose GPUs will be taken away, starts and stops instances with the load, and lets
urgent tasks take the place of others. It is pure and holds no speed: when an instance that starts
will be ready is the executor's to tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from typing import Any, NamedTuple

from muxtune.errors import ConfigError
from muxtune.protocols import ClusterPolicy, FleetView
from muxtune.types import (
    NS_PER_S,
    Action,
    Discipline,
    Drain,
    DrainInstance,
    Event,
    EventKind,
    GpuData,
    InstanceSpec,
    Place,
    StartInstance,
    StopInstance,
    TaskView,
    WakeAt,
)


class LifecycleOptions(NamedTuple):
    """``elastic``: follow the load between ``min_instances`` and all; another instance is started
    for every ``tasks_per_instance`` waiting tasks of its model, one idle for ``idle_s`` is stopped.
    ``preempt``: see ``muxtune.config.ClusterConfig``."""

    elastic: bool = False
    min_instances: int = 1
    tasks_per_instance: int = 1
    idle_s: float = 600.0
    preempt: bool = False


DEFAULT_LIFECYCLE = LifecycleOptions()


class Outlook:
    """The fleet as the inner policy sees it: instances that will come count as starting, so that
    no task is refused because nothing serves it at the moment."""

    def __init__(self, fleet: FleetView, starting: Mapping[str, InstanceSpec]) -> None:
        self._fleet, self.starting = fleet, starting

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fleet, name)


class Lifecycle:
    """``slots``: every instance that the fleet may hold; which of them run, is decided here."""

    def __init__(
        self,
        inner: ClusterPolicy,
        slots: Iterable[InstanceSpec],
        options: LifecycleOptions = DEFAULT_LIFECYCLE,
    ) -> None:
        for name, least in (("min_instances", 0), ("tasks_per_instance", 1), ("idle_s", 0)):
            if getattr(options, name) < least:
                problem = f"{getattr(options, name)} is out of range"
                raise ConfigError(f"cluster.elastic.{name}", problem, f"Give at least {least}")
        self.inner, self.options = inner, options
        self.slots = {spec.instance_id: spec for spec in slots}
        self._noticed_gpus: set[str] = set()
        self._idle_since_ns: dict[str, int] = {}
        self._victims: dict[str, str] = {}  # task that makes room, by the urgent one

    def first_instances(self) -> list[InstanceSpec]:
        """What the run begins with."""
        slots = list(self.slots.values())
        return slots[: self.options.min_instances] if self.options.elastic else slots

    def on_event(self, event: Event, fleet: FleetView) -> list[Action]:
        actions: list[Action] = []
        if event.kind is EventKind.GPUS_NOTICE:
            assert isinstance(event.data, GpuData)
            self._noticed_gpus.update(event.data.gpu_ids)
            actions += self._move_away(self.slots, fleet)
        elif event.kind is EventKind.INSTANCE_READY and self._noticed_gpus:
            actions += self._move_away([event.instance_id], fleet)  # the notice came meanwhile
        elif isinstance(event.data, GpuData):
            self._noticed_gpus.difference_update(event.data.gpu_ids)
        elif event.kind in (EventKind.INSTANCE_FAILED, EventKind.INSTANCE_STOPPED):
            self._idle_since_ns.pop(event.instance_id, None)
        gone = {action.instance_id for action in actions if isinstance(action, DrainInstance)}
        inner = self.inner.on_event(event, self._outlook(fleet))  # type: ignore[arg-type]
        actions += [
            action
            for action in inner
            if not (isinstance(action, Place) and action.instance_id in gone)
        ]
        placed = {action.task_id for action in actions if isinstance(action, Place)}
        busy = {action.instance_id for action in actions if isinstance(action, Place)}
        if self.options.elastic:
            actions += self._follow_load(event, fleet, placed, busy)
        elif self._may_restart(event):
            actions += [StartInstance(spec) for spec in self._startable(fleet)]
        if self.options.preempt:
            actions += self._make_room(event, fleet, placed)
        return actions

    # -- coming back and moving away

    def _may_restart(self, event: Event) -> bool:
        kinds = (EventKind.INSTANCE_FAILED, EventKind.INSTANCE_STOPPED, EventKind.GPUS_UP)
        return event.kind in kinds

    def _startable(self, fleet: FleetView) -> list[InstanceSpec]:
        """Slots that do not run and whose GPUs are up and will stay."""
        return [
            spec
            for name, spec in self.slots.items()
            if name not in fleet.known_instances
            and not any(gpu in fleet.down_gpus or gpu in self._noticed_gpus for gpu in spec.gpu_ids)
        ]

    def _outlook(self, fleet: FleetView) -> Outlook | FleetView:
        return Outlook(fleet, {**self.slots, **fleet.starting})

    def _move_away(self, instance_ids: Iterable[str], fleet: FleetView) -> list[Action]:
        return [
            DrainInstance(name)
            for name in instance_ids
            if name in fleet.instances
            and not self._noticed_gpus.isdisjoint(self.slots[name].gpu_ids)
        ]

    # -- following the load

    def _follow_load(
        self, event: Event, fleet: FleetView, placed: set[str], busy: set[str]
    ) -> list[Action]:
        return [*self._grow(fleet, placed), *self._shrink(event, fleet, busy)]

    def _grow(self, fleet: FleetView, placed: set[str]) -> list[Action]:
        actions: list[Action] = []
        wanted = {
            model: ceil(
                sum(task.task_id not in placed for task in fleet.waiting(model))
                / self.options.tasks_per_instance
            )
            for model in fleet.waiting_models
        }
        if not any(wanted.values()) and len(fleet.known_instances) >= self.options.min_instances:
            return actions
        for spec in fleet.starting.values():
            wanted[spec.model] = wanted.get(spec.model, 0) - 1
        missing = self.options.min_instances - len(fleet.known_instances)
        for spec in self._startable(fleet):
            if wanted.get(spec.model, 0) > 0 or missing > 0:
                wanted[spec.model] = wanted.get(spec.model, 0) - 1
                missing -= 1
                actions.append(StartInstance(spec))
        return actions

    def _shrink(self, event: Event, fleet: FleetView, busy: set[str]) -> list[Action]:
        idle_ns = round(self.options.idle_s * NS_PER_S)
        actions: list[Action] = []
        for name in sorted(fleet.changed):
            if name in fleet.instances and not fleet.load(name) and name not in busy:
                if self._idle_since_ns.setdefault(name, fleet.now_ns) == fleet.now_ns:
                    actions.append(WakeAt(fleet.now_ns + max(1, idle_ns)))
            else:
                self._idle_since_ns.pop(name, None)
        for name in busy:
            self._idle_since_ns.pop(name, None)
        if event.kind is EventKind.WAKE:
            actions += self._stop_idle(fleet, idle_ns)
        return actions

    def _stop_idle(self, fleet: FleetView, idle_ns: int) -> list[Action]:
        spare = len(fleet.instances) + len(fleet.starting) - self.options.min_instances
        idle = [
            name
            for name, since_ns in self._idle_since_ns.items()
            if fleet.now_ns - since_ns >= idle_ns and name in fleet.instances
        ]
        # The last of the list first, so that the fleet shrinks to its first slots.
        stopped = sorted(idle, reverse=True)[: max(0, spare)]
        for name in stopped:
            del self._idle_since_ns[name]
        return [StopInstance(name) for name in stopped]

    # -- making room

    def _make_room(self, event: Event, fleet: FleetView, placed: set[str]) -> list[Action]:
        """One task leaves for each waiting task of a higher priority that found no place."""
        ended = (EventKind.TASK_DONE, EventKind.TASK_FAILED, EventKind.TASK_CANCELLED)
        if event.kind in ended:
            self._victims.pop(event.task_id, None)
        for task_id in placed:
            self._victims.pop(task_id, None)
        actions: list[Action] = []
        for model in fleet.waiting_models:
            for task in fleet.waiting(model, Discipline.PRIORITY):
                if task.task_id in placed or task.task_id in self._victims:
                    continue
                victim = self._victim(task, fleet)
                if victim is None:
                    break  # those behind it are less urgent
                self._victims[task.task_id] = victim
                actions.append(Drain(victim))
        return actions

    def _victim(self, urgent: TaskView, fleet: FleetView) -> str | None:
        """The least urgent task on an instance of the model, the youngest of those."""
        chosen = set(self._victims.values())
        running: Sequence[TaskView] = [
            task
            for view in fleet.instances.values()
            if view.model == urgent.model
            for task in view.tasks
            if task.priority < urgent.priority
            and task.task_id not in chosen
            and task.task_id not in view.draining
        ]
        if not running:
            return None
        return min(running, key=lambda t: (t.priority, -t.arrival_ns, t.task_id)).task_id
