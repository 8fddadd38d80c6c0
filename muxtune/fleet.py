"""The engine's incremental state: tasks, queue, instances and the indexes over them.

Everything that a policy asks for at each event is kept up to date when something changes, so that
an event costs the same on 64 instances as on one. Views are rebuilt only after a change.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from muxtune.hardware import TenantRules
from muxtune.planning.disciplines import WaitingLines
from muxtune.types import (
    NO_EPOCH,
    AdapterSlot,
    AdapterSpec,
    Corrections,
    Discipline,
    InstanceSpec,
    InstanceView,
    Plan,
    TaskReadyData,
    TaskSpec,
    TaskState,
    TaskView,
    new_tuple,
)

NOTHING: frozenset[str] = frozenset()
MAX_KNOWN_ADAPTERS = 4_096
arrival_order = attrgetter("arrival_ns", "task_id")
# By names of their own, because an enumeration looks its members up in Python.
ARRIVED, QUEUED, PLACED = TaskState.ARRIVED, TaskState.QUEUED, TaskState.PLACED
FIFO = Discipline.FIFO
NO_CORRECTIONS = Corrections()  # one object: memos compare it at once
_STEPS_DONE = TaskView._fields.index("steps_done")


class TaskRecord:
    """What the engine knows of one task that has not ended."""

    __slots__ = (
        "cancelling",
        "first_start_ns",
        "instance_id",
        "lost_steps",
        "num_placements",
        "placed_ns",
        "predicted_start_ns",
        "ready_ns",
        "spec",
        "state",
        "steps_ns",
        "task_id",
        "view",
    )

    def __init__(self, spec: TaskSpec) -> None:
        self.spec, self.task_id = spec, spec.task_id
        self.state = ARRIVED
        self.view: TaskView | None = None
        self.instance_id = ""
        self.ready_ns: int | None = None
        self.placed_ns: int | None = None
        self.first_start_ns: int | None = None
        self.predicted_start_ns: int | None = None  # of a task that had to wait
        self.steps_ns = 0  # as of when the view's steps_done is known
        self.cancelling = False
        self.num_placements = self.lost_steps = 0

    @property
    def ready_view(self) -> TaskView:
        """The view of a task that has been prepared."""
        assert self.view is not None, f"task {self.spec.task_id} is not ready"
        return self.view


class PlanEnds(NamedTuple):
    """When the tasks of a running plan are predicted to end, and their tokens a second."""

    plan: Plan
    ends_ns: np.ndarray
    tokens_per_s: float


class InstanceRecord:
    """One instance with the tasks on it, its last plan and what its executor taught."""

    __slots__ = (
        "corrections",
        "draining",
        "ends",
        "memory_limit_bytes",
        "name",
        "plan",
        "plan_corrections",
        "plan_limit_bytes",
        "ready",
        "shed",
        "spec",
        "stop_told",
        "stopping",
        "tasks",
        "unstarted",
        "view",
    )

    def __init__(self, spec: InstanceSpec) -> None:
        self.spec, self.name = spec, spec.instance_id
        self.ready = False
        self.stopping = self.stop_told = False
        self.tasks: dict[str, TaskRecord] = {}  # by arrival
        self.draining: set[str] = set()
        self.shed: set[str] = set()  # draining tasks that no plan can hold any longer
        self.unstarted: set[str] = set()
        self.plan: Plan | None = None
        self.ends: PlanEnds | None = None
        self.corrections = self.plan_corrections = NO_CORRECTIONS
        self.memory_limit_bytes = self.plan_limit_bytes = spec.memory_limit_bytes
        self.view: InstanceView | None = None

    @property
    def epoch(self) -> int:
        return NO_EPOCH if self.plan is None else self.plan.epoch

    def add(self, task: TaskRecord) -> None:
        """Keeps ``tasks`` in order of arrival; most often the new one is the youngest."""
        tasks = self.tasks
        if not tasks:
            tasks[task.task_id] = task
            return
        youngest = tasks[next(reversed(tasks))].view
        tasks[task.task_id] = task
        if arrival_order(task.view) < arrival_order(youngest):
            ordered = sorted(self.tasks.values(), key=lambda item: arrival_order(item.view))
            self.tasks = {item.task_id: item for item in ordered}

    def build_view(self, now_ns: int) -> InstanceView:
        if self.shed:
            tasks = [task for name, task in self.tasks.items() if name not in self.shed]
        else:
            tasks = self.tasks.values()
        _, model, device, _, replicas, gpu_ids = self.spec
        parts = (
            self.name,
            now_ns,
            tuple([task.view for task in tasks]),
            self.plan,
            self.memory_limit_bytes,
            self.corrections,
            model,
            device,
            replicas,
            frozenset(self.draining) if self.draining else NOTHING,
            gpu_ids,
        )
        # What InstanceView(...) does, without its keyword handling: one a plan.
        return new_tuple(InstanceView, parts)


class TaskQueue(Collection[TaskView]):
    """Ready, unplaced tasks; one lane for each base model and priority, each in arrival order."""

    def __init__(self) -> None:
        self._lanes: dict[str, dict[int, OrderedDict[str, TaskView]]] = {}
        self.lines = WaitingLines()
        self.tasks = self.lines.tasks  # by id
        self.models: list[str] = []  # of the tasks that wait, sorted

    def __len__(self) -> int:
        return len(self.tasks)

    def __contains__(self, task: object) -> bool:
        return (task if isinstance(task, str) else getattr(task, "task_id", task)) in self.tasks

    def __iter__(self) -> Iterator[TaskView]:
        lanes = chain.from_iterable(lanes.values() for lanes in self._lanes.values())
        return _merged([lane.values() for lane in lanes])

    def add(self, task: TaskView) -> None:
        model, priority = task.model, task.priority
        if model not in self.models:
            insort(self.models, model)
        lanes = self._lanes.setdefault(model, {})
        lane = lanes.get(priority)
        if lane is None:
            lane = lanes[priority] = OrderedDict()
        in_order = not lane or arrival_order(lane[next(reversed(lane))]) <= arrival_order(task)
        lane[task.task_id] = task
        self.lines.add(task)
        if not in_order:  # a task that came back; rare, so the lane is sorted anew
            ordered = sorted(lane.values(), key=arrival_order)
            lanes[priority] = OrderedDict((item.task_id, item) for item in ordered)

    def remove(self, task_id: str) -> None:
        """A model's last lane stays when it runs empty: the next task comes to it."""
        task = self.lines.remove(task_id)
        model, priority = task.model, task.priority
        lanes = self._lanes[model]
        lane = lanes[priority]
        del lane[task_id]
        if lane:
            return
        if len(lanes) > 1:
            del lanes[priority]
        if not any(lanes.values()):
            self.models.remove(model)

    def num_waiting(self, model: str) -> int:
        return sum(map(len, self._lanes.get(model, {}).values()))

    def of_model(self, model: str, discipline: Discipline) -> Iterator[TaskView]:
        lanes = self._lanes.get(model, {})
        if discipline is FIFO:
            if len(lanes) == 1:
                (lane,) = lanes.values()
                return iter(lane.values())
            return _merged([lane.values() for lane in lanes.values()])
        if discipline is not Discipline.PRIORITY:
            return self.lines.in_order(model, discipline)
        urgent_first = sorted(lanes, reverse=True)
        return chain.from_iterable(lanes[priority].values() for priority in urgent_first)


def _merged(lanes: list[Collection[TaskView]]) -> Iterator[TaskView]:
    if len(lanes) == 1:
        return iter(lanes[0])
    return heapq.merge(*lanes, key=arrival_order)


class Quotas:
    """How many tasks of each tenant with a quota are on instances, and its tasks that wait for
    others of its own to leave."""

    def __init__(self, rules: Mapping[str, TenantRules]) -> None:
        self.rules = {
            tenant: rule.max_tasks for tenant, rule in rules.items() if rule.max_tasks is not None
        }
        self.num_held = 0
        self._num_placed = dict.fromkeys(self.rules, 0)
        self._num_queued = dict.fromkeys(self.rules, 0)
        self._held: dict[str, dict[str, TaskView]] = {tenant: {} for tenant in self.rules}
        self._tenant_of: dict[str, str] = {}

    def room(self, tenant: str) -> int:
        """Tasks of a tenant with a quota that may still be placed."""
        return self.rules[tenant] - self._num_placed[tenant]

    def takes(self, view: TaskView) -> bool:
        """Whether a ready task may queue; if not it is held. Each place that is left is for one
        queued task, so that no policy can place one too many."""
        tenant = view.tenant
        if tenant not in self.rules:
            return True
        if self._num_queued[tenant] < self.room(tenant):
            self._num_queued[tenant] += 1
            return True
        self._held[tenant][view.task_id] = view
        self._tenant_of[view.task_id] = tenant
        self.num_held += 1
        return False

    def leave_queue(self, tenant: str, placed: bool) -> None:
        if tenant in self.rules:
            self._num_queued[tenant] -= 1
            self._num_placed[tenant] += placed

    def leave_instance(self, tenant: str) -> None:
        if tenant in self.rules:
            self._num_placed[tenant] -= 1

    def drop(self, task_id: str) -> bool:
        """Forgets a held task; False when it is not one."""
        tenant = self._tenant_of.pop(task_id, None)
        if tenant is None:
            return False
        del self._held[tenant][task_id]
        self.num_held -= 1
        return True

    def freed(self, tenant: str) -> list[TaskView]:
        """The most urgent held tasks that there is room for now."""
        held = self._held.get(tenant)
        if not held:
            return []
        room = self.room(tenant) - self._num_queued[tenant]
        urgent = sorted(held.values(), key=lambda view: (-view.priority, *arrival_order(view)))
        chosen = urgent[: max(0, room)]
        for view in chosen:
            self.drop(view.task_id)
        return chosen


class LoadIndex:
    """Ready instances of each base model in order of (tasks, id): one sorted list of ids for each
    number of tasks, because names compare faster than pairs."""

    def __init__(self) -> None:
        self._by_model: dict[str, list[list[str]]] = {}

    def add(self, model: str, load: int, instance_id: str) -> None:
        by_load = self._by_model.setdefault(model, [])
        while len(by_load) <= load:
            by_load.append([])
        insort(by_load[load], instance_id)

    def remove(self, model: str, load: int, instance_id: str) -> None:
        names = self._by_model[model][load]
        del names[bisect_left(names, instance_id)]

    def move(self, model: str, load: int, new_load: int, instance_id: str) -> None:
        by_load = self._by_model[model]
        names = by_load[load]
        del names[bisect_left(names, instance_id)]
        if new_load >= len(by_load):
            by_load.append([])
        insort(by_load[new_load], instance_id)

    def in_order(self, model: str) -> Iterator[str]:
        return chain.from_iterable(self._by_model.get(model, ()))


class InstanceViews(Mapping[str, InstanceView]):
    """Views of the instances that tasks can be placed on, built when somebody looks."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def __getitem__(self, instance_id: str) -> InstanceView:
        record = self._fleet.records[instance_id]
        if not record.ready or record.stopping:
            raise KeyError(instance_id)
        return self._fleet.view_of(record)

    def __contains__(self, instance_id: object) -> bool:
        record = self._fleet.records.get(instance_id)  # type: ignore[arg-type]
        return record is not None and record.ready and not record.stopping

    def __iter__(self) -> Iterator[str]:
        records = self._fleet.records.items()
        return (name for name, record in records if record.ready and not record.stopping)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Fleet:
    """State and indexes of a run. Policies see it through ``FleetView``'s read-only part.

    A task whose tenant is at its quota is held: it is in no queue, so that no policy sees it, until
    the tenant gives something back.
    """

    def __init__(self, rules: Mapping[str, TenantRules] | None = None) -> None:
        self.now_ns = 0
        self.tasks: dict[str, TaskRecord] = {}
        self.seen: set[str] = set()
        self.records: dict[str, InstanceRecord] = {}
        self.starting: dict[str, InstanceSpec] = {}
        self.down_gpus: set[str] = set()
        self.noticed_gpus: set[str] = set()  # that will be taken away
        self.queue = TaskQueue()
        self.waiting_models: Collection[str] = self.queue.models
        self.quotas = Quotas(rules or {})
        self.has_quotas = bool(self.quotas.rules)
        self.instances: Mapping[str, InstanceView] = InstanceViews(self)
        self._loads = LoadIndex()
        self._slots = AdapterSlots()
        self._changed: set[str] = set()

    # -- what policies read

    @property
    def changed(self) -> frozenset[str]:
        return frozenset(self._changed) if self._changed else NOTHING

    @property
    def known_instances(self) -> Collection[str]:
        return self.records.keys()

    def waiting(self, model: str, discipline: Discipline = Discipline.FIFO) -> Iterator[TaskView]:
        return self.queue.of_model(model, discipline)

    def least_loaded(self, model: str) -> Iterator[str]:
        return self._loads.in_order(model)

    def load(self, instance_id: str) -> int:
        return len(self.records[instance_id].tasks)

    # -- what the engine changes

    def view_of(self, record: InstanceRecord) -> InstanceView:
        if record.view is None:
            record.view = record.build_view(self.now_ns)
        return record.view

    def touch(self, record: InstanceRecord) -> None:
        record.view = None
        self._changed.add(record.name)

    def forget_changes(self) -> None:
        self._changed.clear()

    def add_task(self, spec: TaskSpec) -> TaskRecord:
        record = self.tasks[spec.task_id] = TaskRecord(spec)
        self.seen.add(spec.task_id)
        return record

    def make_ready(self, task: TaskRecord, data: TaskReadyData) -> None:
        spec = task.spec
        task.view = task_view(spec, data, self._slots.of(spec.adapter))
        task.ready_ns = self.now_ns
        self.enqueue(task)

    @property
    def num_waiting(self) -> int:
        """Ready tasks that are on no instance, held ones included."""
        return len(self.queue) + self.quotas.num_held

    def enqueue(self, task: TaskRecord) -> None:
        task.state, task.instance_id, view = QUEUED, "", task.view
        assert view is not None
        if not self.has_quotas or self.quotas.takes(view):
            self.queue.add(view)

    def dequeue(self, task: TaskRecord) -> None:
        """Takes a task out of whatever it waits in, if it waits."""
        task_id, tenant = task.task_id, task.spec.tenant
        if task_id in self.queue.tasks:
            self.queue.remove(task_id)
            self.quotas.leave_queue(tenant, placed=False)
        elif not self.quotas.drop(task_id):
            return
        self.admit_held(tenant)

    def admit_held(self, tenant: str) -> None:
        """Lets held tasks of a tenant into the queue for which there is room now."""
        for view in self.quotas.freed(tenant):
            if self.quotas.takes(view):
                self.queue.add(view)

    def place(self, task: TaskRecord, record: InstanceRecord) -> None:
        self.queue.remove(task.task_id)
        if self.has_quotas:
            self.quotas.leave_queue(task.spec.tenant, placed=True)
        now_ns = self.now_ns
        task.state, task.instance_id = PLACED, record.name
        if task.placed_ns is None:
            task.placed_ns = now_ns
        task.num_placements += 1
        task.steps_ns = now_ns
        if task.spec.max_slowdown is not None:
            task.view = task.ready_view._replace(placed_ns=task.placed_ns, steps_ns=now_ns)
        self._move(record, task, joins=True)

    def unplace(self, task: TaskRecord) -> InstanceRecord:
        """Takes a task off its instance; the caller decides what becomes of it."""
        record = self.records[task.instance_id]
        self._move(record, task, joins=False)
        task_id = task.task_id
        if self.has_quotas:
            self.quotas.leave_instance(task.spec.tenant)
            self.admit_held(task.spec.tenant)
        if record.draining:
            record.draining.discard(task_id)
            record.shed.discard(task_id)
        record.unstarted.discard(task_id)
        return record

    def end_task(self, task: TaskRecord) -> None:
        if task.state is not PLACED:
            self.dequeue(task)
        del self.tasks[task.task_id]

    def set_steps(self, task: TaskRecord, steps: int) -> None:
        task.steps_ns, view = self.now_ns, task.view
        if view is None:
            return
        if view.placed_ns is not None:
            task.view = view._replace(steps_done=steps, steps_ns=self.now_ns)
        elif view[_STEPS_DONE] != steps:
            # What _replace(steps_done=steps) does; asked for every task at every Progress.
            parts = list(view)
            parts[_STEPS_DONE] = steps
            task.view = new_tuple(TaskView, parts)
        else:
            return
        if task.instance_id:
            self.records[task.instance_id].view = None

    def start_instance(self, spec: InstanceSpec) -> None:
        self.records[spec.instance_id] = InstanceRecord(spec)
        self.starting[spec.instance_id] = spec

    def make_instance_ready(self, record: InstanceRecord) -> None:
        record.ready = True
        self.starting.pop(record.name, None)
        self._loads.add(record.spec.model, 0, record.name)
        self.touch(record)

    def close_instance(self, record: InstanceRecord) -> None:
        """No task can be placed there any longer."""
        name = record.name
        if record.ready and not record.stopping:
            self._loads.remove(record.spec.model, len(record.tasks), name)
        record.stopping = True
        self.touch(record)

    def remove_instance(self, record: InstanceRecord) -> None:
        self.close_instance(record)
        self.starting.pop(record.name, None)
        del self.records[record.name]

    def _move(self, record: InstanceRecord, task: TaskRecord, joins: bool) -> None:
        name, tasks = record.name, record.tasks
        load = len(tasks)
        if joins:
            change = 1
            record.add(task)
        else:
            change = -1
            del tasks[task.task_id]
        self.queue.lines.note_placed(task.spec.tenant, change)
        if not record.stopping:
            self._loads.move(record.spec.model, load, load + change, name)
        record.view = None
        self._changed.add(name)


class AdapterSlots:
    """One object for all slots that are equal: planners know tasks that are alike by it, without
    comparing what it holds. Adapters that several tasks share are recognised at once."""

    def __init__(self) -> None:
        self._of_adapter: dict[int, tuple[AdapterSpec, AdapterSlot]] = {}
        self._equal: dict[AdapterSlot, AdapterSlot] = {}

    def of(self, adapter: AdapterSpec) -> AdapterSlot:
        known = self._of_adapter.get(id(adapter))
        if known is None:
            if len(self._of_adapter) >= MAX_KNOWN_ADAPTERS:
                self._of_adapter.clear()
            slot = slot_of(adapter)
            known = self._of_adapter[id(adapter)] = adapter, self._equal.setdefault(slot, slot)
        return known[1]


def slot_of(adapter: AdapterSpec) -> AdapterSlot:
    return AdapterSlot(adapter.method, adapter.rank, adapter.targets, adapter.dropout > 0)


def task_view(spec: TaskSpec, data: TaskReadyData, slot: AdapterSlot | None = None) -> TaskView:
    """What policies and planners see of a prepared task."""
    # Taken apart at once: every task of a fleet is asked for each of the fields.
    (
        task_id, model, tenant, adapter, source, _, batch_size, accumulation, _, _, _, arrival_ns,
        priority, deadline_ns, max_slowdown, _,
    ) = spec  # fmt: skip
    num_steps, lengths = data
    parts = (
        task_id,
        tenant,
        model,
        slot or slot_of(adapter),
        batch_size * accumulation,
        source.max_length_tokens,
        lengths,
        num_steps,
        0,
        arrival_ns,
        priority,
        deadline_ns,
        max_slowdown,
        None,
        0,
    )
    return new_tuple(TaskView, parts)


def instance_view(spec: InstanceSpec, tasks: Iterable[TaskView]) -> InstanceView:
    """An instance as a planner sees it when these tasks have just been placed and nothing runs."""
    return InstanceView(
        instance_id=spec.instance_id,
        now_ns=0,
        tasks=tuple(tasks),
        running_plan=None,
        memory_limit_bytes=spec.memory_limit_bytes,
        model=spec.model,
        device=spec.device,
        replicas=spec.replicas,
        gpu_ids=spec.gpu_ids,
    )


def duplicate_ids(specs: Iterable[TaskSpec]) -> list[str]:
    """Task ids that occur twice, in order of their second occurrence."""
    seen: set[str] = set()
    twice = []
    for spec in specs:
        if spec.task_id in seen:
            twice.append(spec.task_id)
        seen.add(spec.task_id)
    return twice
