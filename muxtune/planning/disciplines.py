"""Queueing disciplines: in which order waiting tasks are asked for.

Indexes are made when a discipline is first asked for and kept up to date from then on, so that a
run pays for none that it does not use and an event costs the same however many tasks wait.

- ``fifo``: by arrival. ``priority``: more urgent first, then by arrival.
- ``shortest_remaining``: fewest tokens left to train (steps left times the mean tokens of a step);
  tokens, not seconds: a discipline knows no speed.
- ``earliest_deadline``: tasks without one come last.
- ``fair_share``: the tenant with the fewest tasks placed goes next, its own tasks by arrival;
  tenants with equally many by their oldest task. Max-min fairness (Bertsekas and Gallager, "Data
  Networks", section 6.5.2) over places, one a task, with equal shares.

Every discipline has head-of-line waiting: what comes first in its order and finds no room is waited
for, so that no task starves behind smaller ones. Placed tasks are not interrupted.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable, Iterator

from muxtune.types import Discipline, TaskView

NEVER_NS = 1 << 62


Entry = tuple[float, int, str]  # what the discipline goes by, then arrival and id


def tokens_left(task: TaskView) -> float:
    """Effective tokens that the task has yet to train on."""
    steps = task.num_steps - task.steps_done
    return steps * task.sequences_per_step * task.lengths.mean_tokens


def entry_of(task: TaskView, discipline: Discipline) -> Entry:
    if discipline is Discipline.SHORTEST_REMAINING:
        first = tokens_left(task)
    else:
        first = NEVER_NS if task.deadline_ns is None else task.deadline_ns
    return (first, task.arrival_ns, task.task_id)


class WaitingLines:
    """Orders of the queued tasks of each base model, beside the queue itself, which has order of
    arrival. ``add`` and ``remove`` are told of every task that enters and leaves the queue,
    ``note_placed`` of every task that gets or gives up a place."""

    def __init__(self) -> None:
        self.tasks: dict[str, TaskView] = {}
        self._sorted: dict[Discipline, dict[str, list[Entry]]] = {}
        self._by_tenant: dict[str, dict[str, OrderedDict[str, TaskView]]] | None = None
        self._num_placed: dict[str, int] = {}

    def add(self, task: TaskView) -> None:
        self.tasks[task.task_id] = task
        for discipline, lines in self._sorted.items():
            insort(lines.setdefault(task.model, []), entry_of(task, discipline))
        if self._by_tenant is not None:
            self._add_by_tenant(self._by_tenant, task)

    def remove(self, task_id: str) -> TaskView:
        task = self.tasks.pop(task_id)
        for discipline, lines in self._sorted.items():
            line = lines[task.model]
            del line[bisect_left(line, entry_of(task, discipline))]
        if self._by_tenant is not None:
            lanes = self._by_tenant[task.model]
            del lanes[task.tenant][task_id]
            if not lanes[task.tenant]:
                del lanes[task.tenant]
        return task

    def note_placed(self, tenant: str, change: int) -> None:
        self._num_placed[tenant] = self._num_placed.get(tenant, 0) + change

    def in_order(self, model: str, discipline: Discipline) -> Iterator[TaskView]:
        """Waiting tasks of a model, lazily. The disciplines that go by arrival are the queue's."""
        if discipline is Discipline.FAIR_SHARE:
            return self._fairly(model)
        lines = self._sorted.get(discipline)
        if lines is None:
            lines = self._sorted[discipline] = self._all_sorted(discipline)
        return (self.tasks[task_id] for _, _, task_id in lines.get(model, ()))

    # -- inside

    def _all_sorted(self, discipline: Discipline) -> dict[str, list[Entry]]:
        lines: dict[str, list[Entry]] = {}
        for task in self.tasks.values():
            lines.setdefault(task.model, []).append(entry_of(task, discipline))
        for line in lines.values():
            line.sort()
        return lines

    def _fairly(self, model: str) -> Iterator[TaskView]:
        """Each task that is handed out counts as placed for those that follow."""
        if self._by_tenant is None:
            self._by_tenant = {}
            for task in sorted(self.tasks.values(), key=by_arrival):
                self._add_by_tenant(self._by_tenant, task)
        lines = {tenant: iter(line.values()) for tenant, line in self._lanes_of(model)}
        heads = [
            (self._num_placed.get(tenant, 0), by_arrival(task), tenant, task)
            for tenant, line in lines.items()
            if (task := next(line, None)) is not None
        ]
        heapq.heapify(heads)
        while heads:
            num_placed, _, tenant, task = heapq.heappop(heads)
            yield task
            following = next(lines[tenant], None)
            if following is not None:
                heapq.heappush(heads, (num_placed + 1, by_arrival(following), tenant, following))

    def _lanes_of(self, model: str) -> Iterable[tuple[str, OrderedDict[str, TaskView]]]:
        assert self._by_tenant is not None
        return self._by_tenant.get(model, {}).items()

    def _add_by_tenant(
        self, models: dict[str, dict[str, OrderedDict[str, TaskView]]], task: TaskView
    ) -> None:
        lane = models.setdefault(task.model, {}).setdefault(task.tenant, OrderedDict())
        last = lane[next(reversed(lane))] if lane else None
        lane[task.task_id] = task
        if last is not None and by_arrival(last) > by_arrival(task):  # it came back; rare
            for other in sorted(lane.values(), key=by_arrival):
                lane.move_to_end(other.task_id)


def by_arrival(task: TaskView) -> tuple[int, str]:
    return (task.arrival_ns, task.task_id)
