"""`tlora`: a waiting task is offered to the instance of most residual capacity first (see the
planner of the same name, which refuses a group that gains nothing or slows a job too much)."""

from __future__ import annotations

from bisect import bisect_left, insort

from muxtune.cluster_policies.base import MAX_ATTEMPTS, Candidate, FifoPolicy
from muxtune.protocols import FleetView
from muxtune.registry import CLUSTER_POLICIES
from muxtune.types import Action, Event, InstanceView


@CLUSTER_POLICIES.register("tlora")
class TLoraPolicy(FifoPolicy):
    """FIFO; instances in order of the largest slowdown that their plan predicts, in whole
    percent of the time alone, then of tasks and id: what slows its tasks least has most left.

    An instance whose plan is not known yet counts as slowed by as much as it has tasks.
    """

    def __init__(self, max_tasks_per_instance: int = 16, discipline: str = "fifo") -> None:
        super().__init__(max_tasks_per_instance, discipline)
        self._order: dict[str, list[Candidate]] = {}  # by model
        self._place: dict[str, tuple[str, Candidate]] = {}
        self._stale: set[str] = set()

    def on_event(self, event: Event, fleet: FleetView) -> list[Action]:
        self._stale |= fleet.changed
        return super().on_event(event, fleet)

    def candidates(self, model: str, fleet: FleetView) -> list[Candidate]:
        """Instances with room, least slowed first; plans of the last batch are known by now."""
        for instance_id in self._stale:
            self._update(instance_id, fleet)
        self._stale &= {name for name in self._stale if self._is_unplanned(name, fleet)}
        most = len(fleet.queue) + MAX_ATTEMPTS
        found: list[Candidate] = []
        for candidate in self._order.get(model, ()):
            if fleet.load(candidate[1]) < self.max_tasks_per_instance:
                found.append(candidate)
            if len(found) == most:
                break
        return found

    def taken(self, chosen: Candidate, candidates: list[Candidate]) -> None:
        """One task an instance and event: what a second would find there is not planned yet."""
        candidates.remove(chosen)

    def _update(self, instance_id: str, fleet: FleetView) -> None:
        known = self._place.pop(instance_id, None)
        if known is not None:
            entries = self._order[known[0]]
            del entries[bisect_left(entries, known[1])]
        view = fleet.instances.get(instance_id)
        if view is not None:
            candidate = (slowdown_percent(view), instance_id)
            self._place[instance_id] = (view.model, candidate)
            insort(self._order.setdefault(view.model, []), candidate)

    def _is_unplanned(self, instance_id: str, fleet: FleetView) -> bool:
        view = fleet.instances.get(instance_id)
        return view is not None and not plan_is_known(view)


def slowdown_percent(view: InstanceView) -> int:
    """0 for an idle instance."""
    if not view.tasks:
        return 0
    plan = view.running_plan
    if plan is None or not plan_is_known(view):
        return 100 * len(view.tasks)
    solo = plan.predicted.solo_step_time_s
    steps = plan.predicted.step_time_s
    return max(round(100 * step_s / solo[name]) for name, step_s in steps.items() if solo[name])


def plan_is_known(view: InstanceView) -> bool:
    """Whether the running plan is of the tasks that the instance holds now."""
    tasks = {task.task_id for task in view.tasks}
    planned = set() if view.running_plan is None else set(view.running_plan.predicted.step_time_s)
    return tasks == planned
