"""What the FIFO policies share: one line for each base model, refusals remembered, rejection.

The line is first come, first served unless ``discipline`` says otherwise.

When something changed, the head of a line goes to the first candidate instance that has room. A
refused head tries a few others, then waits until an instance that refused it has changed. An event
on which nothing can be placed costs a look at each head and at the least-loaded instance.
"""

from __future__ import annotations

from bisect import insort
from itertools import islice

from muxtune.errors import ConfigError
from muxtune.protocols import FleetView
from muxtune.types import (
    Action,
    Discipline,
    Event,
    EventKind,
    InstanceView,
    Place,
    Refusal,
    Reject,
    TaskView,
)

# Instances that may refuse one head before it waits, so that a full fleet is not asked all round.
MAX_ATTEMPTS = 4

# By a name of its own, because an enumeration looks its members up in Python.
PLACEMENT_REFUSED = EventKind.PLACEMENT_REFUSED

Candidate = tuple[int, str]  # (load, instance id); the first of a sorted list is tried first
InstanceShape = tuple[str, int, object]


class Refused:
    """What is known of a waiting task that was refused."""

    __slots__ = ("beside", "hopeless", "refusal", "task")

    def __init__(self, task: TaskView) -> None:
        self.task = task
        self.beside: dict[str, frozenset[str]] = {}  # by instance: the tasks it had no room beside
        self.hopeless: set[InstanceShape] = set()  # refused it even alone
        self.refusal: Refusal | None = None


class FifoPolicy:
    """Strictly in the order of ``discipline`` (see ``muxtune.planning.disciplines``).

    ``max_tasks_per_instance``: an instance with that many tasks is full.
    """

    def __init__(self, max_tasks_per_instance: int, discipline: str = "fifo") -> None:
        if max_tasks_per_instance < 1:
            raise ConfigError(
                "cluster_policy.max_tasks_per_instance",
                f"{max_tasks_per_instance} is out of range",
                "Give at least 1",
            )
        self.max_tasks_per_instance = max_tasks_per_instance
        if discipline not in list(Discipline):
            raise ConfigError(
                "cluster_policy.discipline",
                f"'{discipline}' does not exist",
                f"Choose one of: {', '.join(Discipline)}",
            )
        self.discipline = Discipline(discipline)
        self._refused: dict[str, Refused] = {}
        self._batch_is_over = False

    # -- the protocol

    def on_event(self, event: Event, fleet: FleetView) -> list[Action]:
        if self._refused:
            self._note_changes(event, fleet)
        if event.kind is PLACEMENT_REFUSED and event.task_id:
            self._remember(event, fleet)
        models = fleet.waiting_models
        if not models:
            return []
        actions: list[Action] = []
        for model in models:
            self._fill(model, fleet, actions)
        return actions

    # -- for policies on this base

    def candidates(self, model: str, fleet: FleetView) -> list[Candidate]:
        """Instances with room, in the order in which to try them."""
        found = []
        # No more can be placed or tried within one event.
        most = len(fleet.queue) + (MAX_ATTEMPTS if self._refused else 0)
        for instance_id in islice(fleet.least_loaded(model), most):
            load = fleet.load(instance_id)
            if load >= self.max_tasks_per_instance:
                break
            found.append((load, instance_id))
        return found

    def taken(self, chosen: Candidate, candidates: list[Candidate]) -> None:
        """Updates the candidates after a placement within the same event."""
        candidates.remove(chosen)
        if chosen[0] + 1 < self.max_tasks_per_instance:
            insort(candidates, (chosen[0] + 1, chosen[1]))

    # -- inside

    def _fill(self, model: str, fleet: FleetView, actions: list[Action]) -> None:
        """Places heads until one finds no room."""
        candidates = self.candidates(model, fleet)
        if not candidates and not self._is_unserved(model, fleet):
            return
        for task in fleet.waiting(model, self.discipline):
            if self._refused or not candidates:
                refusal = self._rejection(task, candidates, fleet)
                if refusal is not None:
                    actions.append(Reject(task.task_id, refusal))
                    continue
                chosen = self._choose(task, candidates, fleet)
                if chosen is None:
                    return
            else:
                chosen = candidates[0]
            self.taken(chosen, candidates)
            actions.append(Place(task.task_id, chosen[1]))

    def _choose(
        self, task: TaskView, candidates: list[Candidate], fleet: FleetView
    ) -> Candidate | None:
        refused = self._refused.get(task.task_id)
        if refused is None:
            return candidates[0] if candidates else None
        if len(refused.beside) >= MAX_ATTEMPTS:
            return None
        for candidate in candidates:
            name = candidate[1]
            if name in refused.beside:
                continue
            if not refused.hopeless or shape_of(fleet.instances[name]) not in refused.hopeless:
                return candidate
        return None

    def _remember(self, event: Event, fleet: FleetView) -> None:
        instance, refusal = fleet.instances.get(event.instance_id), event.data
        assert isinstance(refusal, Refusal)
        if instance is None:
            return
        refused = self._refused.get(event.task_id)
        if refused is None:
            line = fleet.waiting(instance.model, self.discipline)
            task = next((task for task in line if task.task_id == event.task_id), None)
            if task is None:
                return
            refused = self._refused[event.task_id] = Refused(task)
        refused.refusal = refusal
        if refusal.task_ids == (event.task_id,):
            refused.hopeless.add(shape_of(instance))
        else:
            refused.beside[event.instance_id] = frozenset(refusal.task_ids) - {event.task_id}

    def _note_changes(self, event: Event, fleet: FleetView) -> None:
        """A refusal holds until one of the tasks that it was refused beside leaves; more tasks
        beside it make no room.

        Within a batch refusals come last, when tasks may be placed on trial; only once the batch
        is over is a task that waits no longer really gone.
        """
        if event.kind is EventKind.PLACEMENT_REFUSED:
            self._batch_is_over = True
        elif self._batch_is_over:
            self._batch_is_over = False
            gone = [name for name, item in self._refused.items() if item.task not in fleet.queue]
            for name in gone:
                del self._refused[name]
        if fleet.changed:
            for refused in self._refused.values():
                for instance_id in fleet.changed.intersection(refused.beside):
                    if not refused.beside[instance_id] <= hosted(instance_id, fleet):
                        del refused.beside[instance_id]

    def _rejection(
        self, task: TaskView, candidates: list[Candidate], fleet: FleetView
    ) -> Refusal | None:
        if not candidates and self._is_unserved(task.model, fleet):
            return Refusal(
                f"no instance serves the base model '{task.model}'",
                (task.task_id,),
                remedy="add an instance of that model to the cluster, or correct the task's model",
            )
        refused = self._refused.get(task.task_id)
        if refused is None or not refused.hopeless:
            return None
        shapes = {shape_of(view) for view in fleet.instances.values() if view.model == task.model}
        hopeless = shapes <= refused.hopeless and not self._is_starting(task.model, fleet)
        return refused.refusal if hopeless else None

    def _is_unserved(self, model: str, fleet: FleetView) -> bool:
        served = next(fleet.least_loaded(model), None) is not None
        return not served and not self._is_starting(model, fleet)

    def _is_starting(self, model: str, fleet: FleetView) -> bool:
        return any(spec.model == model for spec in fleet.starting.values())


def hosted(instance_id: str, fleet: FleetView) -> frozenset[str]:
    instance = fleet.instances.get(instance_id)
    return frozenset(task.task_id for task in instance.tasks) if instance else frozenset()


def shape_of(instance: InstanceView) -> InstanceShape:
    """What decides whether a task fits an otherwise empty instance."""
    return (instance.device, instance.memory_limit_bytes, instance.replicas)
