"""From a batch of events to decisions: pure bookkeeping around the policy and the planner.

``Decider.decide`` changes the fleet's state by the events of one instant, asks the cluster policy
about each, makes one plan for each touched instance, and returns what is to be journalled and what
the executor is to be told. It starts nothing and reads no clock, which is why replaying a journal
through a fresh Decider gives the same decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from muxtune.errors import ConfigError
from muxtune.fleet import NOTHING, Fleet, InstanceRecord, TaskRecord, arrival_order
from muxtune.hardware import TenantRules
from muxtune.planning.journal import JournalBatch
from muxtune.protocols import ClusterPolicy, FleetView, InstancePlanner
from muxtune.types import (
    NS_PER_S,
    Action,
    DispatchRule,
    Drain,
    DrainInstance,
    DriftData,
    Estimate,
    Event,
    EventKind,
    FailureData,
    GpuData,
    InstanceSpec,
    Place,
    Plan,
    Prediction,
    PressureData,
    ProgressData,
    Refusal,
    Reject,
    ResultData,
    StartInstance,
    StopInstance,
    TaskReadyData,
    TaskSpec,
    TaskState,
    WakeAt,
    new_tuple,
)
from muxtune.waiting import must_wait

NO_ESTIMATE = Estimate(0.0, 0.0, 0.0)
EMPTY_PREDICTION = Prediction(NO_ESTIMATE, 0.0, 0.0, NO_ESTIMATE, {}, {}, {}, 0.0)
# What plans without a task have in common: their last fields, from ``htasks`` on.
NO_TASK = ((), (), DispatchRule.SINGLE, EMPTY_PREDICTION, {}, "no task", True)
# By names of their own, because an enumeration looks its members up in Python.
ARRIVED, DONE = TaskState.ARRIVED, TaskState.DONE
LEAST_CORRECTION_PERCENT, MOST_CORRECTION_PERCENT = 10, 1000


class EngineOptions(NamedTuple):
    """When measured facts make the engine ask for another plan.

    drift_tolerance: share by which a measured round time must lie beyond the predicted interval.
    drift_min_rounds: a Progress of fewer rounds is not judged.
    correction_quantum_percent: corrections are multiples of this, so that memo keys stay few.
    pressure_margin: share by which a new plan must stay below what caused the pressure.
    max_refusals: how often a policy may place one task on one instance in vain within a batch.
    tenants: quotas, by name.
    tell_waits: predict when a task that has to wait will start; looks at every instance each time.
    """

    drift_tolerance: float = 0.1
    drift_min_rounds: int = 2
    correction_quantum_percent: int = 5
    pressure_margin: float = 0.02
    max_refusals: int = 32
    tenants: Mapping[str, TenantRules] = {}
    tell_waits: bool = True


class TaskOutcome(NamedTuple):
    """One row a task, told when the task ends. ``first_start_ns`` is None unless the executor
    tells when plans take over; ``solo_time_s`` is the planner's prediction for all its steps.
    ``num_placements``: one more than how often it was moved, preempted or thrown back by a failure;
    ``lost_steps``: optimizer steps that failures undid."""

    task_id: str
    tenant: str
    model: str
    state: TaskState
    arrival_ns: int
    ready_ns: int | None
    placed_ns: int | None
    first_start_ns: int | None
    ended_ns: int
    instance_id: str
    steps: int
    effective_tokens: int
    solo_time_s: float | None
    message: str
    output_path: str = ""
    final_loss: float | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    priority: int = 0
    deadline_ns: int | None = None
    num_placements: int = 0
    lost_steps: int = 0
    predicted_start_ns: int | None = None  # told when the task had to wait
    max_slowdown: float | None = None


class Command(NamedTuple):
    """One call of the executor: ``verb`` is start, stop, prepare, cancel or apply. ``prepare`` is
    for resuming only: the engine calls it before it asks for a decision on the arrival."""

    verb: str
    argument: InstanceSpec | TaskSpec | Plan | str


class Decision(NamedTuple):
    """``batch`` is what is journalled; its plans are applied after the commands. ``raised``: events
    that the engine itself made (DRIFT, PLACEMENT_REFUSED). ``wakes``: (time, task id) to come back
    at; no id: a policy's own wake."""

    batch: JournalBatch
    raised: Sequence[Event]
    commands: Sequence[Command]
    outcomes: Sequence[TaskOutcome]
    wakes: Sequence[tuple[int, str]]


class Decider:
    """Holds the fleet and the two plug-ins; every call of ``decide`` is one batch."""

    def __init__(
        self, policy: ClusterPolicy, planner: InstancePlanner, options: EngineOptions
    ) -> None:
        self.policy, self.planner, self.options = policy, planner, options
        self.fleet = Fleet(options.tenants)
        self.num_batches = 0
        self._actions: list[Action] = []
        self._raised: list[Event] = []
        self._commands: list[Command] = []
        self._outcomes: list[TaskOutcome] = []
        self._wakes: list[tuple[int, str]] = []
        self._touched: set[str] = set()
        self._new_plans: dict[str, Plan] = {}
        self._placed: dict[str, list[TaskRecord]] = {}
        self._in_vain: dict[tuple[str, str], int] = {}
        self._new_in_queue: list[str] = []
        absorb: dict[EventKind, Callable[[Event], bool]] = {
            EventKind.INSTANCE_READY: self._on_instance_ready,
            EventKind.INSTANCE_FAILED: self._on_instance_gone,
            EventKind.INSTANCE_STOPPED: self._on_instance_gone,
            EventKind.GPUS_DOWN: self._on_gpus_down,
            EventKind.GPUS_UP: self._on_gpus_up,
            EventKind.GPUS_NOTICE: self._on_gpus_notice,
            EventKind.PLAN_APPLIED: self._on_plan_applied,
            EventKind.PROGRESS: self._on_progress,
            EventKind.TASK_DONE: self._on_task_done,
            EventKind.TASK_FAILED: self._on_task_failed,
            EventKind.TASK_RELEASED: self._on_task_released,
            EventKind.TASK_CANCELLED: self._on_task_cancelled,
            EventKind.MEMORY_PRESSURE: self._on_pressure,
            EventKind.TASK_READY: self._on_task_ready,
            EventKind.TASK_ARRIVED: self._on_task_arrived,
            EventKind.WAKE: self._on_wake,
        }
        # A list: an enumeration's hash is a Python function, and every event is looked up.
        self._absorb = [absorb.get(kind, ignore) for kind in range(max(EventKind) + 1)]  # type: ignore[call-overload]
        self._act: dict[type, Callable[..., None]] = {
            Place: self._place,
            StartInstance: self._start_instance,
            StopInstance: self._stop_instance,
            DrainInstance: self._drain_instance,
            Drain: self._drain,
            Reject: self._reject,
            WakeAt: self._wake_at,
        }

    # -- one batch

    def begin(self, instances: Iterable[InstanceSpec]) -> Decision:
        """Batch 0: starts the instances that the run begins with."""
        actions = [StartInstance(spec) for spec in instances]
        self._actions.extend(actions)
        for action in actions:
            self._start_instance(action)
        return self._decision(())

    def decide(self, time_ns: int, events: Sequence[Event]) -> Decision:
        """All decisions on the events of one instant, which come sorted."""
        fleet, absorb, touched = self.fleet, self._absorb, self._touched
        fleet.now_ns = time_ns
        relevant = []
        for event in events:
            if absorb[event.kind](event):
                relevant.append(event)
        if self._raised:
            relevant += self._raised
        for event in relevant:
            self._ask_policy(event)
        while touched:
            name = touched.pop() if len(touched) == 1 else min(touched)
            touched.discard(name)
            record = fleet.records.get(name)
            if record is None or not record.ready:
                continue
            if record.tasks:
                self._plan_instance(record)
            else:
                self._plan_nothing(record)
        return self._decision(tuple(events))

    def standing_commands(self) -> list[Command]:
        """What an executor that lost everything must be told to stand where the journal ends."""
        fleet = self.fleet
        commands = [Command("start", record.spec) for record in fleet.records.values()]
        commands += [Command("prepare", task.spec) for task in fleet.tasks.values()]
        withdrawn = [task.task_id for task in fleet.tasks.values() if task.cancelling]
        commands += [Command("cancel", task_id) for task_id in withdrawn]
        plans = [record.plan for record in fleet.records.values() if record.plan is not None]
        commands += [Command("apply", plan) for plan in plans]
        stopping = [name for name, record in fleet.records.items() if record.stop_told]
        return commands + [Command("stop", name) for name in stopping]

    def _decision(self, events: tuple[Event, ...]) -> Decision:
        """What the batch has gathered; most of it is empty most of the time."""
        plans = self._adopt_plans() if self._new_plans else ()
        actions = commands = outcomes = raised = wakes = ()
        refusals: tuple[Refusal, ...] = ()
        if self._actions:
            actions, self._actions = tuple(self._actions), []
            self._placed.clear()
        if self._outcomes:
            outcomes, self._outcomes = self._outcomes, []
        if self._commands:
            commands, self._commands = self._commands, []
        if self._raised:
            raised, self._raised = self._raised, []
            refusals = tuple([e.data for e in raised if isinstance(e.data, Refusal)])
            self._in_vain.clear()
        if self._new_in_queue:
            if self.options.tell_waits:
                refusals += tuple(must_wait(self.fleet, self._new_in_queue))
            self._new_in_queue.clear()
        if self._wakes:
            wakes, self._wakes = self._wakes, []
        # What JournalBatch(...) and Decision(...) do, without their keyword handling.
        parts = (self.num_batches, self.fleet.now_ns, events, actions, plans, refusals)
        self.num_batches += 1
        batch = new_tuple(JournalBatch, parts)
        return new_tuple(Decision, (batch, raised, commands, outcomes, wakes))

    def _ask_policy(self, event: Event) -> None:
        fleet = self.fleet
        view: FleetView = fleet
        actions = self.policy.on_event(event, view)
        fleet.forget_changes()
        for action in actions:
            self._actions.append(action)
            self._act[type(action)](action)

    # -- planning

    def _plan_instance(self, record: InstanceRecord) -> None:
        """One plan, or the tasks that it cannot hold go back and the policy is told."""
        name = record.name
        refused: list[Event] = []
        while len(record.tasks) > len(record.shed):
            answer = self.planner.plan(self.fleet.view_of(record), record.plan)
            if not isinstance(answer, Refusal):
                self._keep(record, answer)
                break
            gave_way, event = self._give_way(record, answer)
            refused.append(event)
            if not gave_way:
                break
            if stands_as_planned(record):
                self._new_plans.pop(name, None)
                break
        if len(record.tasks) == len(record.shed):
            self._plan_nothing(record)
        if self._placed:
            self._placed.pop(name, None)
        if not refused:
            return
        events = [self._beside_what_stays(record, event) for event in reversed(refused)]
        self._raised.extend(events)
        for event in events:
            self._ask_policy(event)

    def _beside_what_stays(self, record: InstanceRecord, event: Event) -> Event:
        """Tasks that were placed together are refused one after another: what each finds no room
        beside is what stays in the end, not those that were taken back after it."""
        if not event.task_id or not record.tasks or not isinstance(event.data, Refusal):
            return event
        stays = (*sorted(record.tasks), event.task_id)
        return event._replace(data=event.data._replace(task_ids=stays))

    def _keep(self, record: InstanceRecord, plan: Plan) -> None:
        name = record.name
        if plan is record.plan:
            placed = {task.task_id for task in self._placed.get(name, ())}
            if placed.isdisjoint(plan.task_ids):
                self._new_plans.pop(name, None)
                return
            # A task left and came back: to the executor, which let it go, this is another plan.
            plan = plan._replace(epoch=plan.epoch + 1)
        check_plan(record, plan)
        self._new_plans[name] = plan

    def _plan_nothing(self, record: InstanceRecord) -> None:
        """The engine's own plan for an instance whose last task has left."""
        name, limit_bytes = record.name, record.spec.memory_limit_bytes
        if self._new_plans:
            self._new_plans.pop(name, None)
        if record.memory_limit_bytes != limit_bytes:
            record.memory_limit_bytes = limit_bytes
            record.view = None
        if record.stopping and not record.tasks:
            if not record.stop_told:
                self._stop(record)
        elif (plan := record.plan) is not None and plan.htasks:
            self._new_plans[name] = empty_plan(record.spec, plan.epoch + 1)

    def _give_way(self, record: InstanceRecord, refusal: Refusal) -> tuple[bool, Event]:
        """Takes back the last placement of this batch; without one, sheds the youngest task.

        The event names the task that is queued again, or none when nothing was placed.
        """
        name, task_id = record.name, ""
        view = self.fleet.view_of(record)
        refusal = refusal._replace(task_ids=tuple(task.task_id for task in view.tasks))
        placed = self._placed.get(name)
        if placed:
            task = placed.pop()
            task_id = task.task_id
            self._count_in_vain(task_id, name)
            self.fleet.unplace(task)
            task.num_placements -= 1
            if not task.num_placements:
                task.placed_ns = None
            self.fleet.enqueue(task)
        gave_way = bool(task_id) or self._shed_youngest(record)
        kind = EventKind.PLACEMENT_REFUSED
        return gave_way, Event(self.fleet.now_ns, kind, task_id, name, record.epoch, refusal)

    def _shed_youngest(self, record: InstanceRecord) -> bool:
        """Under pressure: of the least urgent tasks the youngest leaves at the next round boundary,
        losing its open step."""
        candidates = [
            task.ready_view for name, task in record.tasks.items() if name not in record.shed
        ]
        if len(candidates) < 2:
            return False
        task_id = max(candidates, key=lambda task: (-task.priority, arrival_order(task))).task_id
        record.draining.add(task_id)
        record.shed.add(task_id)
        self.fleet.touch(record)
        return True

    def _count_in_vain(self, task_id: str, instance_id: str) -> None:
        key = (task_id, instance_id)
        times = self._in_vain[key] = self._in_vain.get(key, 0) + 1
        if times > self.options.max_refusals:
            raise ConfigError(
                "cluster_policy",
                f"it placed task '{task_id}' on instance '{instance_id}' {times} times in one "
                "batch although the planner refused each time",
                "remember a refusal until the instance changes",
            )

    def _adopt_plans(self) -> tuple[Plan, ...]:
        """The batch's plans in order of their instances, which from now on have them."""
        new, records = self._new_plans, self.fleet.records
        names = sorted(new) if len(new) > 1 else new
        for name in names:
            record = records[name]
            record.plan, record.plan_corrections = new[name], record.corrections
            record.plan_limit_bytes = record.memory_limit_bytes
            record.view = None
        plans = tuple(new.values()) if names is new else tuple(map(new.__getitem__, names))
        new.clear()
        return plans

    # -- events

    def _on_instance_ready(self, event: Event) -> bool:
        record = self.fleet.records.get(event.instance_id)
        if record is None or record.ready:
            return False
        self.fleet.make_instance_ready(record)
        return True

    def _on_instance_gone(self, event: Event) -> bool:
        record = self.fleet.records.get(event.instance_id)
        if record is None:
            return False
        data = event.data if isinstance(event.data, FailureData) else FailureData("")
        for task in list(record.tasks.values()):
            self.fleet.unplace(task)
            task_id = task.task_id
            self.fleet.set_steps(task, data.kept_steps.get(task_id, steps_of(task)))
            task.lost_steps += data.lost_steps.get(task_id, 0)
            self._back_to_queue(task)
        self.fleet.remove_instance(record)
        return True

    def _on_gpus_down(self, event: Event) -> bool:
        assert isinstance(event.data, GpuData)
        self.fleet.down_gpus.update(event.data.gpu_ids)
        self.fleet.noticed_gpus.difference_update(event.data.gpu_ids)
        return True

    def _on_gpus_notice(self, event: Event) -> bool:
        assert isinstance(event.data, GpuData)
        self.fleet.noticed_gpus.update(event.data.gpu_ids)
        return True

    def _on_gpus_up(self, event: Event) -> bool:
        assert isinstance(event.data, GpuData)
        self.fleet.down_gpus.difference_update(event.data.gpu_ids)
        return True

    def _on_plan_applied(self, event: Event) -> bool:
        record = self.fleet.records.get(event.instance_id)
        if record is None or event.epoch != record.epoch:
            return False
        for task_id in record.unstarted:
            task = record.tasks[task_id]
            if task.first_start_ns is None:
                task.first_start_ns = event.time_ns
        record.unstarted.clear()
        return True

    def _on_progress(self, event: Event) -> bool:
        record, data = self.fleet.records.get(event.instance_id), event.data
        assert isinstance(data, ProgressData)
        if record is None:
            return False
        tasks, set_steps = record.tasks, self.fleet.set_steps
        for task_id, steps in data.steps_done.items():
            if task_id in tasks:
                set_steps(tasks[task_id], steps)
        if event.epoch == record.epoch and record.plan is not None:
            self._check_drift(record, record.plan, data)
        return True

    def _check_drift(self, record: InstanceRecord, plan: Plan, data: ProgressData) -> None:
        percent = drifted_percent(plan, data, record.plan_corrections.time_percent, self.options)
        if percent is None or percent == record.corrections.time_percent:
            return
        record.corrections = record.corrections._replace(time_percent=percent)
        self._touch(record)
        name, now_ns = record.name, self.fleet.now_ns
        told = DriftData(data.rounds, round_time_s(data), plan.predicted.round_time_s, percent)
        self._raised.append(Event(now_ns, EventKind.DRIFT, "", name, record.epoch, told))

    def _on_pressure(self, event: Event) -> bool:
        record, data = self.fleet.records.get(event.instance_id), event.data
        assert isinstance(data, PressureData)
        if record is None or record.plan is None or event.epoch != record.epoch:
            return False
        limit_bytes = relieved_limit_bytes(record, record.plan, data, self.options.pressure_margin)
        if limit_bytes < record.memory_limit_bytes:
            record.memory_limit_bytes = limit_bytes
            self._touch(record)
        return True

    def _on_task_arrived(self, event: Event) -> bool:
        spec: TaskSpec = event.data  # type: ignore[assignment]
        self.fleet.add_task(spec)
        if spec.cancel_ns is not None:
            self._wakes.append((max(spec.cancel_ns, event.time_ns), spec.task_id))
        return True

    def _on_task_ready(self, event: Event) -> bool:
        task_id = event.task_id
        task = self.fleet.tasks.get(task_id)
        if task is None or task.state is not ARRIVED:
            return False
        data: TaskReadyData = event.data  # type: ignore[assignment]
        self.fleet.make_ready(task, data)
        self._new_in_queue.append(task_id)
        if task.cancelling:
            self.fleet.dequeue(task)
        return True

    def _on_wake(self, event: Event) -> bool:
        """A policy's wake; with a task id, the time at which its tenant withdraws the task."""
        if not event.task_id:
            return True
        task = self.fleet.tasks.get(event.task_id)
        if task is None or task.cancelling:
            return False
        task.cancelling = True
        self.fleet.dequeue(task)
        self._commands.append(Command("cancel", event.task_id))
        return True

    def _on_task_done(self, event: Event) -> bool:
        task = self.fleet.tasks.get(event.task_id)
        if task is None:
            return False
        data: ResultData = event.data  # type: ignore[assignment]
        self._end(task, DONE, data)
        return True

    def _on_task_failed(self, event: Event) -> bool:
        task, data = self.fleet.tasks.get(event.task_id), event.data
        assert isinstance(data, FailureData)
        if task is None:
            return False
        steps = steps_of(task) if data.steps is None else data.steps
        self._end(task, TaskState.FAILED, ResultData(steps, 0), data.message)
        return True

    def _on_task_cancelled(self, event: Event) -> bool:
        task, data = self.fleet.tasks.get(event.task_id), event.data
        if task is None:
            return False
        steps = data if isinstance(data, int) else steps_of(task)
        self._end(task, TaskState.CANCELLED, ResultData(steps, 0), "withdrawn by its tenant")
        return True

    def _on_task_released(self, event: Event) -> bool:
        task, data = self.fleet.tasks.get(event.task_id), event.data
        if task is None or not event.instance_id or task.instance_id != event.instance_id:
            return False
        self._touch(self.fleet.unplace(task))
        if isinstance(data, int):
            self.fleet.set_steps(task, data)
        self._back_to_queue(task)
        return True

    def _back_to_queue(self, task: TaskRecord) -> None:
        self.fleet.enqueue(task)
        if task.cancelling:  # the executor is told again: it may have forgotten with the instance
            self.fleet.dequeue(task)
            self._commands.append(Command("cancel", task.task_id))

    def _touch(self, record: InstanceRecord) -> None:
        self.fleet.touch(record)
        self._touched.add(record.name)

    def _end(
        self, task: TaskRecord, state: TaskState, result: ResultData, message: str = ""
    ) -> None:
        instance_id, solo_s = task.instance_id, None
        if instance_id:
            record = self.fleet.unplace(task)
            solo_s = solo_time_s(record, task)
            self._touched.add(instance_id)
        self.fleet.end_task(task)
        (
            task_id, model, tenant, _, _, _, _, _, _, _, _, arrival_ns,
            priority, deadline_ns, max_slowdown, _,
        ) = task.spec  # fmt: skip
        steps, tokens, output_path, final_loss, perplexity_before, perplexity_after = result
        parts = (
            task_id,
            tenant,
            model,
            state,
            arrival_ns,
            task.ready_ns,
            task.placed_ns,
            task.first_start_ns,
            self.fleet.now_ns,
            instance_id,
            steps,
            tokens,
            solo_s,
            message,
            output_path,
            final_loss,
            perplexity_before,
            perplexity_after,
            priority,
            deadline_ns,
            task.num_placements,
            task.lost_steps,
            task.predicted_start_ns,
            max_slowdown,
        )
        self._outcomes.append(new_tuple(TaskOutcome, parts))

    # -- actions

    def _place(self, action: Place) -> None:
        fleet, (task_id, name) = self.fleet, action
        task, record = fleet.tasks.get(task_id), fleet.records.get(name)
        if task is None or task_id not in fleet.queue.tasks:
            raise broken_action(action, f"task '{task_id}' is not queued")
        if record is None or not record.ready or record.stopping:
            raise broken_action(action, f"instance '{name}' is not ready")
        if record.spec.model != task.spec.model:
            raise broken_action(action, f"'{name}' serves {record.spec.model}")
        fleet.place(task, record)
        record.unstarted.add(task_id)
        self._placed.setdefault(name, []).append(task)
        self._touched.add(name)

    def _start_instance(self, action: StartInstance) -> None:
        name = action.spec.instance_id
        if name in self.fleet.records:
            raise broken_action(action, f"instance '{name}' exists already")
        if not self.fleet.down_gpus.isdisjoint(action.spec.gpu_ids):
            raise broken_action(action, f"a GPU of '{name}' is down")
        self.fleet.start_instance(action.spec)
        self._commands.append(Command("start", action.spec))

    def _stop_instance(self, action: StopInstance) -> None:
        record = self.fleet.records.get(action.instance_id)
        if record is None or record.tasks or record.stopping:
            raise broken_action(action, f"'{action.instance_id}' is unknown, stopping or has tasks")
        self.fleet.close_instance(record)
        self._stop(record)

    def _stop(self, record: InstanceRecord) -> None:
        record.stop_told = True
        self._commands.append(Command("stop", record.name))

    def _drain_instance(self, action: DrainInstance) -> None:
        record = self.fleet.records.get(action.instance_id)
        if record is None or record.stopping or not record.ready:
            raise broken_action(action, f"'{action.instance_id}' is unknown, starting or stopping")
        self.fleet.close_instance(record)
        record.draining.update(record.tasks)
        self._touch(record)

    def _drain(self, action: Drain) -> None:
        task = self.fleet.tasks.get(action.task_id)
        if task is None or task.state is not TaskState.PLACED:
            raise broken_action(action, f"task '{action.task_id}' is not placed")
        record = self.fleet.records[task.instance_id]
        record.draining.add(action.task_id)
        self._touch(record)

    def _reject(self, action: Reject) -> None:
        task = self.fleet.tasks.get(action.task_id)
        if task is None or action.task_id not in self.fleet.queue:
            raise broken_action(action, f"task '{action.task_id}' is not queued")
        result = ResultData(steps_of(task), 0)
        self._end(task, TaskState.REFUSED, result, refusal_text(action.refusal))

    def _wake_at(self, action: WakeAt) -> None:
        if action.time_ns <= self.fleet.now_ns:
            raise broken_action(action, "the time has passed")
        self._wakes.append((action.time_ns, ""))


# ---------------------------------------------------------------------------------- derivations


def ignore(event: Event) -> bool:
    """For kinds that change nothing here."""
    return False


def check_plan(record: InstanceRecord, plan: Plan) -> None:
    """Raises ConfigError for a plan that breaks the contract: a plug-in's fault."""
    if plan.instance_id != record.name or plan.epoch != record.epoch + 1:
        raise ConfigError(
            "planner",
            f"it answered with epoch {plan.epoch} of '{plan.instance_id}' where epoch "
            f"{record.epoch + 1} of '{record.name}' is due",
            "return previous itself, or a plan of the next epoch",
        )
    tasks = record.tasks.keys()
    if len(plan.htasks) == 1 and plan.htasks[0].quota.keys() == tasks:
        return
    planned: set[str] = set()
    for htask in plan.htasks:
        planned.update(htask.quota)
    if planned == tasks:
        return
    if planned - tasks or (tasks - planned) - record.draining:
        raise ConfigError(
            "planner",
            f"its plan for '{record.name}' misses {sorted(tasks - planned)} and has "
            f"the unknown {sorted(planned - tasks)}",
            "plan every task of the view, or answer with a Refusal",
        )


def stands_as_planned(record: InstanceRecord) -> bool:
    """Whether the last plan still answers all that a planner would be asked."""
    plan = record.plan
    return (
        plan is not None
        and record.corrections == record.plan_corrections
        and record.memory_limit_bytes == record.plan_limit_bytes
        and plan.drains == record.draining
        and set(plan.task_ids) == record.tasks.keys() - record.shed
    )


def empty_plan(spec: InstanceSpec, epoch: int) -> Plan:
    """Of an instance without tasks."""
    head = (spec.instance_id, epoch, NOTHING, spec.replicas)
    return new_tuple(Plan, head + NO_TASK)


def drifted_percent(
    plan: Plan, data: ProgressData, planned_percent: int, options: EngineOptions
) -> int | None:
    """The time correction that Progress teaches, or None while it is as predicted.

    ``planned_percent``: the correction that the plan's prediction already contains.
    """
    expected = plan.predicted.round_time_s
    if data.rounds < max(1, options.drift_min_rounds) or expected.value <= 0:
        return None
    measured_s = round_time_s(data)
    slack_s = expected.value * options.drift_tolerance
    if expected.low - slack_s <= measured_s <= expected.high + slack_s:
        return None
    quantum = options.correction_quantum_percent
    percent = quantum * round(planned_percent * measured_s / expected.value / quantum)
    return min(max(percent, LEAST_CORRECTION_PERCENT), MOST_CORRECTION_PERCENT)


def round_time_s(data: ProgressData) -> float:
    return data.duration_ns / NS_PER_S / data.rounds


def relieved_limit_bytes(
    record: InstanceRecord, plan: Plan, data: PressureData, margin: float
) -> int:
    """A limit that the running plan breaks, in whole percent of the instance's memory.

    A plan predicted at P used U of L bytes, so one predicted at P * L / U should fit.
    """
    predicted = plan.predicted.peak_memory_bytes.value or float(data.limit_bytes)
    share = min(1.0, data.limit_bytes / max(1, data.used_bytes)) * (1.0 - margin)
    percent = int(100 * predicted * share / record.spec.memory_limit_bytes)
    return record.spec.memory_limit_bytes * percent // 100


def solo_time_s(record: InstanceRecord, task: TaskRecord) -> float | None:
    if record.plan is None or task.view is None:
        return None
    step_s = record.plan.predicted.solo_step_time_s.get(task.task_id)
    return None if step_s is None else step_s * task.view.num_steps


def steps_of(task: TaskRecord) -> int:
    return 0 if task.view is None else task.view.steps_done


def refusal_text(refusal: Refusal) -> str:
    """For people: why, the bytes, and what to do."""
    parts = [refusal.reason]
    if refusal.needed_bytes:
        needed, available = refusal.needed_bytes, refusal.available_bytes
        parts.append(f"needs {needed:,} bytes, available are {available:,}")
    if refusal.needed_s:
        parts.append(
            f"would take {refusal.needed_s:.3g} s a step, allowed are {refusal.available_s:.3g} s"
        )
    if refusal.remedy:
        parts.append(refusal.remedy)
    return "; ".join(parts)


def broken_action(action: Action, problem: str) -> ConfigError:
    return ConfigError(
        "cluster_policy", f"its action {action!r} is not possible: {problem}", "correct the policy"
    )
