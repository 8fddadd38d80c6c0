"""The one loop: events of an instant, decisions, journal, executor, wait.

The engine owns the loop, outside of SimPy and outside of torch. Decisions are journalled before
they are carried out, so that the same journal folds to the same state after a crash and replays to
the same decisions in a test. All times are integer nanoseconds since the start of the run.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from muxtune.deciding import Command, Decider, Decision, EngineOptions, TaskOutcome
from muxtune.errors import ConfigError, MuxTuneError
from muxtune.fleet import Fleet, duplicate_ids
from muxtune.planning.journal import JournalBatch
from muxtune.protocols import ClusterPolicy, Executor, InstancePlanner
from muxtune.types import (
    NO_EPOCH,
    NS_PER_S,
    Action,
    Event,
    EventKind,
    InstanceSpec,
    Plan,
    Refusal,
    TaskSpec,
    TaskState,
    new_tuple,
)

__all__ = [
    "Command",
    "Difference",
    "Engine",
    "EngineOptions",
    "Observer",
    "QuietObserver",
    "RunTotals",
    "TaskOutcome",
    "replay",
]

FOREVER_NS = 1 << 62
TASK_ARRIVED = EventKind.TASK_ARRIVED  # an enumeration looks its members up in Python
OF_HARDWARE = frozenset({EventKind.GPUS_DOWN, EventKind.GPUS_UP, EventKind.GPUS_NOTICE})
MAX_IDLE_BATCHES = 10_000  # hardware goes on failing for ever, tasks should not wait as long
DEFAULT_OPTIONS = EngineOptions()


class RunTotals(NamedTuple):
    num_tasks: int
    num_done: int
    num_failed: int
    num_refused: int
    num_cancelled: int
    end_ns: int
    effective_tokens: int
    num_batches: int
    num_plans: int
    num_placements_refused: int
    num_drifts: int

    @property
    def end_s(self) -> float:
        return self.end_ns / NS_PER_S


class BatchLog(Protocol):
    """Where batches are kept, see ``muxtune.planning.journal.Journal``. ``write`` returns once the
    batch would survive a crash."""

    def write(
        self,
        time_ns: int,
        events: Sequence[Event],
        actions: Sequence[Action] = (),
        plans: Sequence[Plan] = (),
        refusals: Sequence[Refusal] = (),
    ) -> object: ...


class Observer(Protocol):
    """Progress displays and result files, called after a batch was carried out, in this order.
    ``on_batch``: the journalled events, and drifts that the engine found in them."""

    def on_plan(self, plan: Plan) -> None: ...

    def on_task_end(self, outcome: TaskOutcome) -> None: ...

    def on_batch(self, time_ns: int, events: Sequence[Event]) -> None: ...


class QuietObserver:
    """Listens to nothing. A subclass says what it listens to; the engine does not call the rest,
    which at a million tasks is worth it."""

    def on_plan(self, plan: Plan) -> None: ...

    def on_task_end(self, outcome: TaskOutcome) -> None: ...

    def on_batch(self, time_ns: int, events: Sequence[Event]) -> None: ...


class Difference(NamedTuple):
    """Where a replay decided otherwise: the batch, which part of it, and both versions."""

    batch: int
    part: str
    recorded: object
    replayed: object


class Timetable:
    """What is due by itself: arrivals (pulled lazily), withdrawals, and wakes asked for."""

    def __init__(self, tasks: Iterable[TaskSpec], seen: set[str]) -> None:
        self._specs = iter(tasks)
        self._seen = seen
        self._wakes: list[tuple[int, str]] = []  # "" is a policy's wake, else a withdrawal
        self.arrival_ns = 0  # of the next task
        self._take_next()

    def _take_next(self) -> None:
        spec = self.next_spec = next(self._specs, None)
        self.arrival_ns = FOREVER_NS if spec is None else spec.arrival_ns

    def next_ns(self) -> int:
        return min(self.arrival_ns, self._wakes[0][0]) if self._wakes else self.arrival_ns

    def wake_at(self, time_ns: int, task_id: str) -> None:
        if (time_ns, task_id) not in self._wakes:
            heapq.heappush(self._wakes, (time_ns, task_id))

    def due(self, now_ns: int) -> list[Event]:
        """Events that are due by ``now_ns``, which becomes their time."""
        events = self._due_wakes(now_ns) if self._wakes else []
        while self.arrival_ns <= now_ns:
            spec = self.next_spec
            assert spec is not None
            task_id = spec.task_id
            parts = (now_ns, TASK_ARRIVED, task_id, "", NO_EPOCH, spec)
            events.append(new_tuple(Event, parts))
            self._seen.add(task_id)
            self._pull(spec)
        return events

    def skip_to(self, now_ns: int) -> None:
        """Passes over what a folded journal already holds."""
        self._due_wakes(now_ns)
        while self.next_spec is not None and self.next_spec.task_id in self._seen:
            self._take_next()

    def _due_wakes(self, now_ns: int) -> list[Event]:
        events = []
        while self._wakes and self._wakes[0][0] <= now_ns:
            events.append(Event(now_ns, EventKind.WAKE, heapq.heappop(self._wakes)[1]))
        return events

    def _pull(self, last: TaskSpec) -> None:
        before_ns = self.arrival_ns
        self._take_next()
        spec = self.next_spec
        if spec is None:
            return
        if spec.task_id in self._seen:
            raise duplicate_error([spec.task_id])
        if self.arrival_ns < before_ns:
            raise ConfigError(
                "workload.arrival",
                f"task '{spec.task_id}' arrives before '{last.task_id}', which precedes it",
                "Sort the tasks by arrival time",
            )


class Engine:
    """Runs tasks under a cluster policy and a planner on an executor.

    ``tasks`` are sorted by arrival; a list is checked for duplicate ids before anything starts, a
    lazy iterable as it is pulled. Raises ConfigError for those, for an action or a plan that breaks
    the contract, and MuxTuneError when queued tasks can never run.
    """

    def __init__(
        self,
        policy: ClusterPolicy,
        planner: InstancePlanner,
        executor: Executor,
        tasks: Iterable[TaskSpec],
        instances: Sequence[InstanceSpec],
        journal: BatchLog | None = None,
        observers: Sequence[Observer] = (),
        options: EngineOptions = DEFAULT_OPTIONS,
    ) -> None:
        if isinstance(tasks, Sequence) and (twice := duplicate_ids(tasks)):
            raise duplicate_error(twice)
        self.executor, self.journal, self.observers = executor, journal, tuple(observers)
        self._first_instances = tuple(instances)
        self._decider = Decider(policy, planner, options)
        self._timetable = Timetable(tasks, self.fleet.seen)
        self._num_idle_batches = 0
        self._answers: list[Event] = []  # to what a resumed engine told the executor again
        self._ended = dict.fromkeys(TaskState, 0)
        self._num_plans = self._num_refused = self._num_drifts = 0
        self._num_tokens = 0

    @property
    def fleet(self) -> Fleet:
        return self._decider.fleet

    @property
    def observers(self) -> tuple[Observer, ...]:
        return self._observers

    @observers.setter
    def observers(self, observers: tuple[Observer, ...]) -> None:
        self._observers = observers
        self._on_plan = listeners(observers, "on_plan")
        self._on_task_end = listeners(observers, "on_task_end")
        self._on_batch = listeners(observers, "on_batch")

    def run(self) -> RunTotals:
        """Runs until every task has ended; goes on where a resumed engine stands."""
        decider, timetable, tasks = self._decider, self._timetable, self.fleet.tasks
        wait = self.executor.wait
        if decider.num_batches == 0:
            self._carry_out(decider.begin(self._first_instances))
        while timetable.next_spec is not None or tasks:
            until_ns = timetable.next_ns()
            if until_ns == FOREVER_NS:
                events = self._last_events()
            else:
                self._num_idle_batches = 0
                events = self._take_answers() if self._answers else wait(until_ns)
                if not events or events[0].time_ns >= until_ns:
                    events = self._with_due(events, until_ns)
            if events:
                self._carry_out(decider.decide(events[0].time_ns, events))
        return self.totals()

    def _last_events(self) -> list[Event]:
        """Of a run in which nothing is due by itself any more."""
        all_wait = len(self.fleet.tasks) == self.fleet.num_waiting
        if all_wait:
            self._check_starting()
        events = self._take_answers() if self._answers else self.executor.wait(FOREVER_NS)
        if not events:
            raise self._stuck("the executor has nothing left to do")
        if all_wait and all(event.kind in OF_HARDWARE for event in events):
            self._num_idle_batches += 1
            if self._num_idle_batches > MAX_IDLE_BATCHES:
                raise self._stuck("GPUs come and go, and the cluster policy uses none of them")
        else:
            self._num_idle_batches = 0
        return events

    def resume(self, records: Iterable[JournalBatch]) -> None:
        """Folds a journal, then tells the executor again what it may have lost; ``run`` goes on.

        Every command is idempotent for an executor, and each is answered at least once: a running
        instance answers ``start`` with INSTANCE_READY, a prepared task answers ``prepare`` with
        TASK_READY, and TASK_DONE follows a plan that holds a finished task. An executor that has a
        method ``restore(history)`` is first given the (record, commands) of every batch; the tasks
        that it prepared and the plans that it applied are the record's.
        """
        history = [(record, self._refold(record)) for record in records]
        self._timetable.skip_to(self.fleet.now_ns)
        restore = getattr(self.executor, "restore", None)
        if restore is not None:
            restore(history)
        if self._decider.num_batches:
            self._command(self._decider.standing_commands())

    def _take_answers(self) -> list[Event]:
        events, self._answers = sorted(self._answers, key=Event.sort_key.fget), []  # type: ignore[arg-type]
        return events

    def totals(self) -> RunTotals:
        ended = self._ended
        return RunTotals(
            sum(ended.values()),
            ended[TaskState.DONE],
            ended[TaskState.FAILED],
            ended[TaskState.REFUSED],
            ended[TaskState.CANCELLED],
            self.fleet.now_ns,
            self._num_tokens,
            self._decider.num_batches,
            self._num_plans,
            self._num_refused,
            self._num_drifts,
        )

    def _with_due(self, events: list[Event], until_ns: int) -> list[Event]:
        """Merges what is due by now, and how arrivals that need no time are prepared. A real
        executor may come back late."""
        now_ns = events[0].time_ns if events else max(until_ns, self.fleet.now_ns)
        due = self._timetable.due(now_ns)
        in_order = not events and len(due) == 1
        events = events + due
        for event in due:
            if event.kind is TASK_ARRIVED:
                ready = self.executor.prepare(event.data)  # type: ignore[arg-type]
                if ready is not None:
                    events.append(ready)
        if not in_order:
            events.sort(key=Event.sort_key.fget)  # type: ignore[arg-type]
        return events

    def _carry_out(self, decision: Decision) -> None:
        (_, time_ns, events, actions, plans, refusals), _, commands, _, _ = decision
        if self.journal is not None:
            self.journal.write(time_ns, events, actions, plans, refusals)
        if commands:
            self._command(commands)
        for plan in plans:
            self.executor.apply(plan)
        self._note(decision)

    def _command(self, commands: Iterable[Command]) -> None:
        for verb, argument in commands:
            answer = getattr(self.executor, verb)(argument)
            if answer is not None:
                self._answers.append(answer)

    def _note(self, decision: Decision) -> None:
        """Counts, wakes and observers; the same for a live batch and for a folded one."""
        (_, now_ns, events, _, plans, _), raised, _, outcomes, wakes = decision
        for time_ns, task_id in wakes:
            self._timetable.wake_at(time_ns, task_id)
        for event in raised:
            if event.kind is EventKind.DRIFT:
                self._num_drifts += 1
            else:
                self._num_refused += 1
        if plans:
            self._num_plans += len(plans)
            for on_plan in self._on_plan:
                for plan in plans:
                    on_plan(plan)
        for outcome in outcomes:
            self._ended[outcome.state] += 1
            self._num_tokens += outcome.effective_tokens
            for on_task_end in self._on_task_end:
                on_task_end(outcome)
        if raised:
            events += tuple(item for item in raised if item.kind is EventKind.DRIFT)
        for on_batch in self._on_batch:
            on_batch(now_ns, events)

    def _refold(self, record: JournalBatch) -> Sequence[Command]:
        decision = redecide(self._decider, record)
        differences = compare(record, decision.batch)
        if differences:
            raise MuxTuneError(
                f"the journal cannot be resumed: batch {record.index} now decides other "
                f"{differences[0].part}. Resume with the code, the policy, the planner and the "
                "profile that wrote it, or start anew"
            )
        self._note(decision)
        self._timetable.skip_to(record.time_ns)
        return decision.commands

    def _check_starting(self) -> None:
        records = self.fleet.records.values()
        changes = any(not record.ready or record.stopping for record in records)
        if not changes and not self.fleet.down_gpus and not self.fleet.noticed_gpus:
            raise self._stuck("the cluster policy placed none of them on an idle fleet")

    def _stuck(self, why: str) -> MuxTuneError:
        open_tasks = sorted(self.fleet.tasks)
        return MuxTuneError(
            f"cluster_policy: {len(open_tasks)} tasks wait for ever ({', '.join(open_tasks[:3])}"
            f"{', ...' if len(open_tasks) > 3 else ''}): {why}. "
            "Choose a policy or instances that can take them"
        )


def replay(
    records: Iterable[JournalBatch],
    policy: ClusterPolicy,
    planner: InstancePlanner,
    options: EngineOptions = DEFAULT_OPTIONS,
) -> list[Difference]:
    """Decides again on the recorded batches, and tells every part that comes out otherwise.

    ``policy`` and ``planner`` are fresh ones. A batch that can no longer be decided on at all
    (because an earlier one went another way) ends the replay with a difference of part "error".
    """
    decider = Decider(policy, planner, options)
    differences: list[Difference] = []
    for record in records:
        try:
            decision = redecide(decider, record)
        except (MuxTuneError, KeyError, AssertionError) as error:
            return [*differences, Difference(record.index, "error", None, str(error))]
        differences.extend(compare(record, decision.batch))
    return differences


def redecide(decider: Decider, record: JournalBatch) -> Decision:
    """Feeds one recorded batch to a decider; batch 0 starts the first instances again."""
    if decider.num_batches == 0:
        return decider.begin(action.spec for action in record.actions)  # type: ignore[union-attr]
    return decider.decide(record.time_ns, record.events)


def compare(recorded: JournalBatch, replayed: JournalBatch) -> list[Difference]:
    if recorded == replayed:
        return []
    pairs = zip(JournalBatch._fields, recorded, replayed, strict=True)
    return [Difference(recorded.index, *part) for part in pairs if part[1] != part[2]]


def listeners(observers: Iterable[Observer], method: str) -> list[Callable[..., None]]:
    """The bound methods of those that do something with what ``method`` tells."""
    return [
        getattr(observer, method)
        for observer in observers
        if getattr(type(observer), method, None) is not getattr(QuietObserver, method)
    ]


def duplicate_error(task_ids: Sequence[str]) -> ConfigError:
    names = ", ".join(f"'{task_id}'" for task_id in task_ids[:5])
    return ConfigError("tasks.id", f"{names} occurs more than once", "Give each task its own id")
