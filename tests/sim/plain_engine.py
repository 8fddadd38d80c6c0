"""A second engine and executor, as simple as can be, to compare the real ones with.

One heap of (time, order, call). Nothing is indexed, remembered or forecast: the queue is sorted and
every view is built anew whenever somebody looks, rounds are packed one after another, and their
times are added up pass by pass. It knows tasks that arrive, are withdrawn, run, are drained and
done, and instances that start and fail; no refusals, no contention, no drift.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from math import fsum
from typing import Any

from muxtune import codec
from muxtune.deciding import empty_plan
from muxtune.fleet import task_view
from muxtune.planning.step_builder import StepBuilder, pass_load
from muxtune.types import (
    Cursor,
    Drain,
    Event,
    EventKind,
    FailureData,
    InstanceSpec,
    InstanceView,
    Place,
    Plan,
    ProgressData,
    ResultData,
    StartInstance,
    TaskSpec,
    TaskView,
)

NS = 10**9
NO_FAILURES: Mapping[str, int] = {}


class Host:
    """One instance: the engine's side (tasks, plan) and the executor's (what runs)."""

    def __init__(self, spec: InstanceSpec) -> None:
        self.spec, self.ready = spec, False
        self.tasks: list[str] = []
        self.draining: set[str] = set()
        self.plan: Plan | None = None
        self.running: Plan | None = None
        self.pending: list[Plan] = []
        self.gone: set[str] = set()
        self.at_work = False
        self.start_ns = self.target_ns = self.transition_ns = 0
        self.course: list[dict[str, Cursor]] = []  # cursors after each round
        self.ends_ns: list[int] = []  # of each round, from the segment's start on
        self.tokens: list[tuple[int, int]] = []
        self.generation = 0
        self.leaving: list[str] = []


class PlainEngine:
    def __init__(
        self,
        policy: Any,
        planner: Any,
        costs: Any,
        library: Any,
        tasks: Sequence[TaskSpec],
        instances: Sequence[InstanceSpec],
        fail_at_ns: Mapping[str, int] = NO_FAILURES,
    ) -> None:
        self.policy, self.planner, self.costs, self.library = policy, planner, costs, library
        self.specs, self.first = list(tasks), instances
        self.fail_at_ns = fail_at_ns
        self.builder = StepBuilder()
        self.now_ns = 0
        self.heap: list[tuple[int, int, Callable[[], None]]] = []
        self.due: list[tuple[int, int, Callable[[], None]]] = []  # arrivals and withdrawals
        self.order = count()
        self.events: list[Event] = []
        self.views: dict[str, TaskView] = {}  # of ready tasks that have not ended
        self.open: dict[str, TaskSpec] = {}
        self.waiting_ids: list[str] = []
        self.withdrawn: set[str] = set()
        self.cursors: dict[str, Cursor] = {}
        self.hosts: dict[str, Host] = {}
        self.unsettled: dict[str, None] = {}
        self.lines: list[str] = []
        self.ended: list[tuple[str, str, int, int, int]] = []
        self.num_batches = 0
        self.actions: list[Any] = []
        self.plans: dict[str, Plan] = {}
        self.touched: set[str] = set()
        self.placed: set[str] = set()  # in this batch
        self.commands: list[tuple[str, Any]] = []
        self.changed: frozenset[str] = frozenset()

    # -- the fleet as policies see it, from scratch at every look

    starting: dict[str, InstanceSpec] = {}
    down_gpus: tuple[str, ...] = ()

    @property
    def queue(self) -> list[TaskView]:
        found = [self.views[name] for name in self.waiting_ids]
        return sorted(found, key=lambda task: (task.arrival_ns, task.task_id))

    @property
    def waiting_models(self) -> list[str]:
        return sorted({task.model for task in self.queue})

    def waiting(self, model: str, discipline: Any = None) -> Iterator[TaskView]:
        return iter([task for task in self.queue if task.model == model])

    @property
    def instances(self) -> dict[str, InstanceView]:
        return {name: self.view(host) for name, host in self.hosts.items() if host.ready}

    def least_loaded(self, model: str) -> Iterator[str]:
        ready = [host for host in self.hosts.values() if host.ready and host.spec.model == model]
        return iter([name for _, name in sorted((len(h.tasks), h.spec.instance_id) for h in ready)])

    def load(self, instance_id: str) -> int:
        return len(self.hosts[instance_id].tasks)

    def view(self, host: Host) -> InstanceView:
        tasks = [self.views[name] for name in host.tasks]
        tasks.sort(key=lambda task: (task.arrival_ns, task.task_id))
        spec = host.spec
        limit, draining = spec.memory_limit_bytes, frozenset(host.draining)
        return InstanceView(
            spec.instance_id, self.now_ns, tuple(tasks), host.plan, limit, model=spec.model,
            device=spec.device, replicas=spec.replicas, draining=draining, gpu_ids=spec.gpu_ids,
        )  # fmt: skip

    # -- the loop

    def run(self) -> None:
        for spec in self.first:
            self.start(spec)
        actions = [StartInstance(spec) for spec in self.first]
        self.journal((), actions, [])
        self.obey()
        for spec in self.specs:
            self.come(spec.arrival_ns, lambda spec=spec: self.arrive(spec))
        while self.specs or self.open:
            events = sorted(self.wait(), key=Event.sort_key.fget)  # type: ignore[arg-type]
            self.decide(events)

    def wait(self) -> list[Event]:
        """Everything of the next instant; what starts at it comes after what is due at it."""
        until_ns = self.due[0][0] if self.due else 1 << 62
        while not self.events and self.now_ns < until_ns:
            if self.unsettled:
                names, self.unsettled = list(self.unsettled), {}
                for name in names:
                    if name in self.hosts:
                        self.settle(self.hosts[name])
                continue
            self.now_ns = min(self.heap[0][0], until_ns) if self.heap else until_ns
            while self.heap and self.heap[0][0] == self.now_ns:
                heapq.heappop(self.heap)[2]()
        while self.due and self.due[0][0] <= self.now_ns:
            heapq.heappop(self.due)[2]()
        events, self.events = self.events, []
        return events

    def at(self, time_ns: int, call: Callable[[], None]) -> None:
        heapq.heappush(self.heap, (time_ns, next(self.order), call))

    def come(self, time_ns: int, call: Callable[[], None]) -> None:
        heapq.heappush(self.due, (time_ns, next(self.order), call))

    def tell(
        self, kind: EventKind, task: str = "", host: str = "", epoch: int = -1, data: Any = None
    ):
        self.events.append(Event(self.now_ns, kind, task, host, epoch, data))

    def journal(
        self, events: Sequence[Event], actions: Sequence[Any], plans: Sequence[Plan]
    ) -> None:
        parts = (tuple(events), tuple(actions), tuple(plans), ())
        self.lines.append(codec.dumps((self.num_batches, self.now_ns, *parts)))
        self.num_batches += 1

    def decide(self, events: Sequence[Event]) -> None:
        for event in [event for event in events if self.absorb(event)]:
            for action in self.policy.on_event(event, self):
                self.actions.append(action)
                self.act(action)
        plans = []
        for name in sorted(self.touched & self.hosts.keys()):
            host = self.hosts[name]
            plan = self.plan(host) if host.ready else None
            if plan is not None:
                host.plan = plan
                plans.append(plan)
        self.journal(events, self.actions, plans)
        self.actions, self.touched, self.placed = [], set(), set()
        self.obey()
        for plan in plans:
            self.hosts[plan.instance_id].pending.append(plan)
            self.unsettled[plan.instance_id] = None

    def plan(self, host: Host) -> Plan | None:
        if host.tasks:
            plan = self.planner.plan(self.view(host), host.plan)
            if plan is not host.plan:
                return plan
            came_back = self.placed & set(plan.task_ids)
            return plan._replace(epoch=plan.epoch + 1) if came_back else None
        if host.plan is not None and host.plan.htasks:
            return empty_plan(host.spec, host.plan.epoch + 1)
        return None

    # -- events and actions

    def absorb(self, event: Event) -> bool:
        task_id, host = event.task_id, self.hosts.get(event.instance_id)
        if event.kind is EventKind.TASK_ARRIVED:
            spec = self.open[task_id]
            if spec.cancel_ns is not None:
                when_ns = max(spec.cancel_ns, self.now_ns)
                self.come(when_ns, lambda: self.tell(EventKind.WAKE, task_id))
        elif event.kind is EventKind.TASK_READY:
            if task_id not in self.open:
                return False
            self.views[task_id] = task_view(self.open[task_id], event.data)  # type: ignore[arg-type]
            if task_id not in self.withdrawn:
                self.waiting_ids.append(task_id)
        elif event.kind is EventKind.WAKE:
            if task_id not in self.open or task_id in self.withdrawn:
                return False
            self.withdrawn.add(task_id)
            if task_id in self.waiting_ids:
                self.waiting_ids.remove(task_id)
            self.commands.append(("cancel", task_id))
        elif event.kind is EventKind.INSTANCE_READY:
            assert host is not None
            host.ready = True
        elif event.kind is EventKind.INSTANCE_FAILED:
            assert host is not None and isinstance(event.data, FailureData)
            del self.hosts[event.instance_id]
            for name in host.tasks:
                self.set_steps(name, event.data.kept_steps.get(name, self.views[name].steps_done))
                self.requeue(name)
        elif event.kind is EventKind.PROGRESS:
            assert isinstance(event.data, ProgressData)
            if host is None:
                return False
            for name, steps in event.data.steps_done.items():
                if name in host.tasks:
                    self.set_steps(name, steps)
        elif event.kind is EventKind.PLAN_APPLIED:
            return host is not None and host.plan is not None and event.epoch == host.plan.epoch
        elif event.kind is EventKind.TASK_RELEASED:
            if host is None or task_id not in host.tasks:
                return False
            self.leave(host, task_id)
            self.set_steps(task_id, event.data)  # type: ignore[arg-type]
            self.requeue(task_id)
        else:  # done or cancelled
            if task_id not in self.open:
                return False
            for other in self.hosts.values():
                if task_id in other.tasks:
                    self.leave(other, task_id)
            if task_id in self.waiting_ids:
                self.waiting_ids.remove(task_id)
            self.views.pop(task_id, None)
            spec = self.open.pop(task_id)
            steps = event.data.steps if isinstance(event.data, ResultData) else event.data
            self.ended.append(
                (task_id, event.kind.name, spec.arrival_ns, self.now_ns, steps)  # type: ignore[arg-type]
            )
        return True

    def requeue(self, task_id: str) -> None:
        if task_id in self.withdrawn:
            self.commands.append(("cancel", task_id))
        else:
            self.waiting_ids.append(task_id)

    def leave(self, host: Host, task_id: str) -> None:
        host.tasks.remove(task_id)
        host.draining.discard(task_id)
        self.touched.add(host.spec.instance_id)

    def set_steps(self, task_id: str, steps: int) -> None:
        self.views[task_id] = self.views[task_id]._replace(steps_done=steps)

    def act(self, action: Any) -> None:
        if isinstance(action, Place):
            self.waiting_ids.remove(action.task_id)
            self.placed.add(action.task_id)
            self.hosts[action.instance_id].tasks.append(action.task_id)
            self.touched.add(action.instance_id)
        elif isinstance(action, Drain):
            host = next(h for h in self.hosts.values() if action.task_id in h.tasks)
            host.draining.add(action.task_id)
            self.touched.add(host.spec.instance_id)
        else:
            raise NotImplementedError(action)

    # -- the executor

    def obey(self) -> None:
        commands, self.commands = self.commands, []
        for verb, argument in commands:
            getattr(self, verb)(argument)

    def arrive(self, spec: TaskSpec) -> None:
        self.specs.remove(spec)
        self.open[spec.task_id] = spec
        self.cursors[spec.task_id] = Cursor()
        self.tell(EventKind.TASK_ARRIVED, spec.task_id, data=spec)
        self.tell(EventKind.TASK_READY, spec.task_id, data=self.library.add(spec))

    def start(self, spec: InstanceSpec) -> None:
        self.hosts[spec.instance_id] = Host(spec)
        self.tell(EventKind.INSTANCE_READY, host=spec.instance_id)
        if spec.instance_id in self.fail_at_ns:
            self.at(self.fail_at_ns[spec.instance_id], lambda: self.fail(spec.instance_id))

    def cancel(self, task_id: str) -> None:
        for host in self.hosts.values():
            if host.at_work and task_id in self.present(host):
                host.leaving.append(task_id)
                self.unsettled[host.spec.instance_id] = None
                return
        holder = next((h for h in self.hosts.values() if task_id in self.present(h)), None)
        if holder is not None:
            holder.gone.add(task_id)
        name = "" if holder is None else holder.spec.instance_id
        steps = self.cursors.pop(task_id).step
        self.tell(EventKind.TASK_CANCELLED, task_id, name, -1, steps)

    def fail(self, instance_id: str) -> None:
        host = self.hosts[instance_id]
        kept = {}
        if host.at_work:
            worked_ns = self.now_ns - host.start_ns - host.transition_ns
            done = sum(end_ns <= worked_ns for end_ns in host.ends_ns) - 1
            self.cursors.update(host.course[max(0, done)])
        for name in self.present(host):
            kept[name] = self.cursors[name].step
            self.cursors[name] = Cursor(kept[name])
        host.generation += 1
        host.at_work, host.running = False, None
        data = FailureData("injected failure", None, kept, dict.fromkeys(kept, 0))
        self.tell(EventKind.INSTANCE_FAILED, host=instance_id, data=data)

    def present(self, host: Host) -> list[str]:
        """Tasks of the running plan that still contribute."""
        if host.running is None:
            return []
        return [name for name in host.running.task_ids if name not in host.gone]

    def settle(self, host: Host) -> None:
        if not host.at_work:
            self.begin_segment(host)
        elif host.leaving or host.pending:
            elapsed_ns = self.now_ns - host.start_ns
            worked_ns = max(1, elapsed_ns - host.transition_ns)
            at = next(n for n, end_ns in enumerate(host.ends_ns) if end_ns >= worked_ns)
            if elapsed_ns == 0:
                at, host.target_ns = 0, self.now_ns
                self.reach(host, 0)
                self.unsettled.pop(host.spec.instance_id, None)
                self.begin_segment(host)
            else:
                self.aim(host, at)

    def begin_segment(self, host: Host) -> None:
        host.transition_ns = 0
        if host.pending:
            plan = host.pending[-1]
            host.pending = []
            self.take_over(host, plan)
        plan = host.running
        if plan is None or not self.present(host):
            return
        self.walk(host, plan)
        host.at_work, host.start_ns = True, self.now_ns
        self.aim(host, len(host.ends_ns) - 1)

    def take_over(self, host: Host, plan: Plan) -> None:
        before, previous = self.present(host), host.running
        host.running = plan
        host.gone = {name for name in plan.task_ids if name not in self.cursors}
        for name in before:
            if name not in plan.task_ids:
                self.cursors[name] = Cursor(self.cursors[name].step)
                steps = self.cursors[name].step
                host_id = host.spec.instance_id
                self.tell(EventKind.TASK_RELEASED, name, host_id, plan.epoch, steps)
        if plan.htasks:
            cost = self.costs(host.spec.model, host.spec.device)
            host.transition_ns = round(cost.transition_s(previous, plan).value * NS)
        self.tell(EventKind.PLAN_APPLIED, host=host.spec.instance_id, epoch=plan.epoch)
        for name in sorted(plan.drains):
            if name in self.present(host) and self.cursors[name].left is None:
                self.release(host, plan, name)

    def release(self, host: Host, plan: Plan, name: str) -> None:
        host.gone.add(name)
        steps, host_id = self.cursors[name].step, host.spec.instance_id
        if steps < self.library.num_steps(name):
            self.tell(EventKind.TASK_RELEASED, name, host_id, plan.epoch, steps)
            return
        tokens = sum(sum(s.tokens for s in self.library.batch(name, at)) for at in range(steps))
        del self.cursors[name]
        self.tell(EventKind.TASK_DONE, name, host_id, plan.epoch, ResultData(steps, tokens))

    def walk(self, host: Host, plan: Plan) -> None:
        """Rounds from here to the first end of a task, their ends and tokens."""
        last = {name: self.library.num_steps(name) for name in plan.task_ids}
        now = {
            name: Cursor(last[name]) if name in host.gone else self.cursors[name]
            for name in plan.task_ids
        }
        cost, replica = self.costs(host.spec.model, host.spec.device), plan.replicas[0]
        units: dict[tuple[Any, ...], int] = {}
        seconds: dict[tuple[Any, ...], float] = {}
        host.course, host.ends_ns, host.tokens = [dict(now)], [0], [(0, 0)]
        effective = padded = 0
        while True:
            micro_batches, now = self.builder.next_round(plan, now, self.library)
            for item in micro_batches:
                load = pass_load(item, self.library)
                each = cost.pass_coefficients(item.shape, replica)
                size = (item.htask, item.shape.padded_tokens)
                counted = [(("base", *size), 1, each.base_s)]
                counted.append((("pairs", *size), int(load.attention_pairs), each.per_pair_s))
                counted.append((("rows", *size), int(load.loss_rows), each.per_loss_row_s))
                for slot in load.optimizer_slots:
                    counted.append((("optimizer", item.htask, slot), 1, each.optimizer_s[slot]))
                for key, number, unit_s in counted:
                    units[key] = units.get(key, 0) + number
                    seconds[key] = unit_s
                padded += item.shape.padded_tokens
                effective += sum(p.stop - p.start for c in item.chunks for p in c.pieces)
            host.course.append(dict(now))
            host.ends_ns.append(round(fsum(units[key] * seconds[key] for key in units) * NS))
            host.tokens.append((effective, padded))
            if self.over(plan, host, now):
                return

    def over(self, plan: Plan, host: Host, now: dict[str, Cursor]) -> list[str]:
        return [
            name
            for name in self.present(host)
            if now[name].step >= self.library.num_steps(name)
            or (name in plan.drains and now[name].left is None)
        ]

    def aim(self, host: Host, rounds: int) -> None:
        host.generation += 1
        generation = host.generation
        host.target_ns = host.start_ns + host.transition_ns + host.ends_ns[rounds]

        def wake() -> None:
            if host.generation == generation:
                self.reach(host, rounds)

        self.at(host.target_ns, wake)

    def reach(self, host: Host, rounds: int) -> None:
        plan, host_id = host.running, host.spec.instance_id
        assert plan is not None
        host.at_work = False
        host.generation += 1
        over = sorted(self.over(plan, host, host.course[rounds])) if rounds else []
        present = self.present(host)
        for name in present:
            self.cursors[name] = host.course[rounds][name]
        if rounds:
            steps = {name: self.cursors[name].step for name in present}
            data = ProgressData(rounds, host.ends_ns[rounds], *host.tokens[rounds], steps)
            self.tell(EventKind.PROGRESS, "", host_id, plan.epoch, data)
        for name in over:
            self.release(host, plan, name)
        for name in host.leaving:
            if name in self.present(host):
                host.gone.add(name)
                steps = self.cursors.pop(name).step
                self.tell(EventKind.TASK_CANCELLED, name, host_id, plan.epoch, steps)
        host.leaving = []
        self.unsettled[host_id] = None
