"""One instance in the simulation: which plan runs, how far it is, and when it is heard of next.

An actor sleeps until the end of a round that matters: the first finish or release under its plan,
or, when somebody wants something of it, the end of the running round. Nothing happens per round or
per training step: the step builder tells how long many rounds take and where they lead.

Progress is measured in work: nanoseconds of this instance alone on its GPU. Of n busy instances on
one GPU each does 1/n nanosecond of work in a nanosecond, so a change of n only re-times the wake.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from muxtune.planning.step_builder import PlanCourse, StepBuilder
from muxtune.protocols import CostModel, TaskLibrary
from muxtune.types import (
    ROUNDS_TO_JUDGE_BY,
    AdapterSlot,
    Cursor,
    Event,
    EventKind,
    FailureData,
    Forecast,
    InstanceSpec,
    Plan,
    ProgressData,
    new_tuple,
)
from muxtune_sim.options import LAYOUTS, InstanceTotals, SimOptions, to_ns
from muxtune_sim.pacing import Pacer

FIRST_CURSOR = Cursor()
NO_FORECAST = Forecast(0, 0, (), True)
NOTHING_DONE = (0, 0)


class Told(NamedTuple):
    """Of a segment, in PROGRESS events so far."""

    rounds: int = 0
    duration_ns: int = 0
    effective_tokens: int = 0
    padded_tokens: int = 0


NOTHING_TOLD = Told()


class World(Protocol):
    """What an actor needs of the simulation around it."""

    builder: StepBuilder
    library: TaskLibrary
    options: SimOptions
    pacer: Pacer

    def emit(self, event: Event) -> None: ...

    def wake(self, actor: InstanceActor, delay_ns: int) -> None:
        """Unless the actor is of a later generation by then."""
        ...

    def settle_later(self, actor: InstanceActor) -> None: ...

    def settled(self, actor: InstanceActor) -> None:
        """Nothing is left to settle of it."""
        ...

    def busy_changed(self, actor: InstanceActor) -> None:
        """``is_running`` is another than ``is_busy``, which is set."""
        ...

    def tokens_at(self, task_id: str, cursor: Cursor) -> int:
        """Effective tokens of a task up to a cursor."""
        ...

    def take_cursor(self, task_id: str, host: InstanceActor) -> Cursor | None:
        """Where a task stands that no instance holds; None when it has ended."""
        ...

    def park(self, task_id: str, cursor: Cursor) -> None: ...

    def finish(self, task_id: str, steps: int, tokens: int, host: InstanceActor) -> None:
        """A task has done all of its steps, with so many effective tokens."""
        ...

    def end(self, event: Event) -> None:
        """A task is done, failed or was cancelled; passes the event on."""
        ...

    def forget(self, task_id: str) -> None:
        """A plan that held the task is over."""
        ...


class InstanceActor:
    """``settle`` is called before time passes; ``reach`` when the awaited boundary is there."""

    __slots__ = (
        "_charges_checkpoints",
        "_charges_ends",
        "_charges_transitions",
        "_closing_ns",
        "_course",
        "_forecast",
        "_held_up_ns",
        "_is_paced",
        "_joined",
        "_last_ns",
        "_one_thread",
        "_options",
        "_pass_cost",
        "_pending",
        "_plans_take_time",
        "_segment_start_ns",
        "_sums",
        "_target_rounds",
        "_target_work_ns",
        "_tells_applied",
        "_tells_last",
        "_to_tell_applied",
        "_to_write",
        "_told",
        "_transition_ns",
        "_work_ns",
        "cost",
        "cursors",
        "generation",
        "gone",
        "is_busy",
        "is_running",
        "leaving",
        "left",
        "name",
        "neighbours",
        "plan",
        "share",
        "spec",
        "started_ns",
        "world",
    )

    def __init__(
        self, spec: InstanceSpec, cost: CostModel, world: World, started_ns: int = 0
    ) -> None:
        self.spec, self.cost, self.world, self.started_ns = spec, cost, world, started_ns
        self.name, self._options = spec.instance_id, world.options
        self.neighbours: list[list[InstanceActor]] = []  # on each of its GPUs, itself among them
        options = world.options
        self._tells_applied = options.emit_plan_applied
        self._tells_last = options.emit_progress and options.emit_last_progress
        self._plans_take_time = bool(options.planning_base_s or options.planning_per_task_s)
        self._one_thread = options.one_thread
        self._charges_transitions = options.charge_transitions
        self._charges_checkpoints = options.charge_checkpoints
        # Most know nothing of it, and segments are many.
        self._charges_ends = options.charge_transitions and cost.charges_ends
        # On one GPU passes follow each other; only their layouts may set another pace.
        num_gpus = sum(replica.num_gpus for replica in spec.replicas)
        self._is_paced = num_gpus > 1 or options.times == LAYOUTS
        self._pass_cost = cost  # of the running plan's passes, as its rounds take them
        self.plan: Plan | None = None
        self.cursors: dict[str, Cursor] = {}  # at the start of the segment
        self.gone: set[str] = set()  # tasks of the plan that contribute no more
        self.leaving: dict[str, str | None] = {}  # to the failure's message, None for a withdrawal
        self.left: set[str] = set()  # of one thread: told already, while the round goes on
        self.share = 1  # busy instances on the most crowded of its GPUs
        self.is_running = False
        self.is_busy = False  # in the eyes of its neighbours, who are told between segments only
        self.generation = 0
        self._pending: list[tuple[int, Plan]] = []  # (from when on it is known, plan), by epoch
        self._course: PlanCourse | None = None  # of the segment
        self._forecast = NO_FORECAST
        self._transition_ns = 0
        self._closing_ns = 0  # behind the last round: tasks that are done are written
        self._target_rounds = self._target_work_ns = 0
        self._work_ns = self._segment_start_ns = self._last_ns = 0
        self._told = NOTHING_TOLD  # of the segment
        self._to_tell_applied = False  # when the transition is over
        self._held_up_ns = 0  # by plans that were made while nothing else could go on
        self._joined: dict[str, tuple[int, int]] = {}  # (steps, tokens) of each task, then
        self._to_write: list[AdapterSlot] = []  # of tasks that have left unfinished
        self._sums = dict.fromkeys(InstanceTotals._fields[1:], 0)

    # -- commands

    def apply(self, plan: Plan, now_ns: int) -> bool:
        """Takes a later plan for the next round boundary; False for one it has already."""
        newest = self._pending[-1][1] if self._pending else self.plan
        if newest is not None and plan.epoch <= newest.epoch:
            return False
        known_ns = now_ns
        if self._plans_take_time or self._one_thread:
            known_ns = self._known_ns(plan, now_ns)
        self._pending.append((known_ns, plan))
        if self.is_running or not self._empties(now_ns):
            self.world.settle_later(self)
        return True

    def _known_ns(self, plan: Plan, now_ns: int) -> int:
        """When a plan is made. On one thread passes that were started before go on meanwhile, and
        it waits for all of them; where there are none, everything waits for it."""
        options, num_tasks = self._options, len(plan.predicted.step_time_s)
        takes_ns = to_ns(options.planning_base_s + options.planning_per_task_s * num_tasks)
        if self._one_thread:
            if not (self.is_running and self._worked_ns() > 0):
                self._held_up_ns += takes_ns if plan.htasks else 0
                return now_ns
            takes_ns = max(takes_ns, options.passes_ahead * self._pass_ns())
        # One that is sooner made does not overtake the one before it.
        return max(now_ns + takes_ns, self._pending[-1][0] if self._pending else 0)

    def _pass_ns(self) -> int:
        """Of the running plan, in the mean over its hTasks."""
        assert self.plan is not None
        replica, shapes = self.plan.replicas[0], [h.shapes[-1] for h in self.plan.htasks]
        times = [self._pass_cost.pass_coefficients(shape, replica).base_s for shape in shapes]
        return to_ns(sum(times) / len(times))

    def tell_applied(self, now_ns: int) -> None:
        if self.plan is not None and self._tells_applied:
            name, epoch = self.name, self.plan.epoch
            self.world.emit(Event(now_ns, EventKind.PLAN_APPLIED, "", name, epoch))

    def _tell_taken_over(self, now_ns: int) -> None:
        if self._to_tell_applied:
            self._to_tell_applied = False
            self.tell_applied(now_ns)

    def withdraw(self, task_id: str, message: str | None, now_ns: int) -> None:
        """A running task leaves at the end of the round; on one thread it is told at once, and its
        rows of the round are filler."""
        self.world.settle_later(self)
        if not self._one_thread:
            self.leaving.setdefault(task_id, message)
        elif task_id not in self.left:
            assert self.plan is not None
            self._account(now_ns)
            self.left.add(task_id)
            steps = self._cursors_after(self._whole_rounds())[task_id].step
            epoch = self.plan.epoch
            self.world.end(departure(now_ns, task_id, self.name, epoch, steps, message))

    def holds(self, task_id: str) -> bool:
        return task_id in self.cursors and task_id not in self.gone

    def expects(self, task_id: str) -> bool:
        """Whether a plan that is on its way holds the task."""
        return any(task_id in plan.task_ids for _, plan in self._pending)

    def fail(self, now_ns: int, message: str) -> FailureData:
        """The instance is lost: its tasks fall back to their last checkpoint."""
        interval = max(1, self._options.checkpoint_steps)
        kept, lost = {}, {}
        joined = {task_id: steps for task_id, (steps, _) in self._joined.items()}
        for task_id, cursor in self._halt(now_ns).items():
            kept[task_id] = max(joined[task_id], cursor.step - cursor.step % interval)
            lost[task_id] = cursor.step - kept[task_id]
            self._fall_back(task_id, cursor, kept[task_id])
        return FailureData(message, None, kept, lost)

    def stop(self, now_ns: int) -> None:
        """The instance is shut down: its tasks keep their last finished step."""
        for task_id, cursor in self._halt(now_ns).items():
            self._fall_back(task_id, cursor, cursor.step)

    def _halt(self, now_ns: int) -> dict[str, Cursor]:
        """Where the tasks stand that were at work."""
        self._silence_left()
        if self.is_running:
            cursors = self._cursors_after(self._rounds_done(now_ns))
            self._rest()
            self.world.busy_changed(self)
        else:
            cursors = self.cursors
        at_work = {name: at for name, at in cursors.items() if name not in self.gone}
        for task_id, cursor in at_work.items():
            self._count_left(task_id, cursor)
        self.generation += 1
        self.cursors, self.plan, self._pending = {}, None, []
        return at_work

    # -- time

    def settle(self, now_ns: int) -> None:
        """Called once all decisions of an instant are known, before time passes."""
        if not self.is_running:
            self._start(now_ns)
            self._schedule(now_ns)
            return
        self._account(now_ns)
        if self.leaving or self.left or any(from_ns <= now_ns for from_ns, _ in self._pending):
            self._aim_at_boundary(now_ns)
        self._schedule(now_ns)

    def on_wake(self, now_ns: int) -> None:
        self._account(now_ns)
        if self.is_running and self._work_ns >= self._target_work_ns:
            self.reach(now_ns)
            return
        if self._work_ns >= self._transition_ns:
            self._tell_taken_over(now_ns)
        self.world.settle_later(self)

    def deaf_ns(self, now_ns: int) -> int:
        """How long from a later moment on it takes a plan over or writes results, in which one
        thread hears nothing."""
        if not self.is_running:
            return 0
        work_ns = self._work_ns + (now_ns - self._last_ns) // self.share
        if work_ns < self._transition_ns:
            return (self._transition_ns - work_ns) * self.share
        if self._target_work_ns - self._closing_ns <= work_ns < self._target_work_ns:
            return (self._target_work_ns - work_ns) * self.share
        return 0

    def tell_progress_so_far(self, now_ns: int) -> None:
        """Beside other news, unless too few rounds were done to tell of."""
        if not self.is_running:
            return
        self._account(now_ns)
        rounds = self._whole_rounds()
        if rounds - self._told.rounds < ROUNDS_TO_JUDGE_BY:
            return
        plan, world = self.plan, self.world
        assert plan is not None
        args = (plan, self.cursors, world.library, self._pass_cost, rounds)
        wall_ns = world.builder.duration_ns(*args) * self.share
        self._emit_progress(rounds, wall_ns, self._cursors_after(rounds), now_ns)

    def reach(self, now_ns: int) -> None:
        """The end of a round: tasks end, leave, and make room for the pending plan."""
        assert self.plan is not None
        rounds, epoch = self._target_rounds, self.plan.epoch
        ended = self._ended_after(rounds)
        if len(ended) == len(self.cursors) and not self.plan.drains:
            num_steps = self.world.library.num_steps
            cursors = self.cursors = {}
            for task_id in ended:
                cursors[task_id] = new_tuple(Cursor, (num_steps(task_id), None))
        else:
            cursors = self.cursors = self._cursors_after(rounds)
        stays = len(cursors) - len(self.gone) > len(ended)
        if rounds:
            self._tell_progress(rounds, now_ns, stays)
        self._rest()
        self._silence_left()
        for task_id in ended:
            if task_id not in self.gone:
                self._end(task_id, epoch, now_ns)
        if self.leaving:
            for task_id, message in self.leaving.items():
                if self.holds(task_id):
                    steps = self.cursors[task_id].step
                    self.silence(task_id)
                    self.world.end(departure(now_ns, task_id, self.name, epoch, steps, message))
            self.leaving.clear()
        self.world.settle_later(self)

    def _silence_left(self) -> None:
        if self.left:
            for task_id in filter(self.holds, self.left):
                self.silence(task_id)
            self.left.clear()

    def silence(self, task_id: str) -> None:
        """A task that still stands in the plan contributes nothing from here on."""
        self._count_left(task_id, self.cursors[task_id])
        self.gone.add(task_id)
        self.cursors[task_id] = Cursor(self.world.library.num_steps(task_id))

    def set_share(self, share: int, now_ns: int) -> None:
        """Other instances on its GPUs became busy or idle."""
        if share != self.share:
            self._account(now_ns)
            self.share = share
            self.world.settle_later(self)

    def totals(self, now_ns: int) -> InstanceTotals:
        """The tokens are those of the segments and tasks that have ended."""
        if self.is_running:
            self._account(now_ns)
        self._sums["up_ns"] = now_ns - self.started_ns
        return InstanceTotals(self.name, **self._sums)

    # -- inside

    def _start(self, now_ns: int) -> None:
        """A segment: some plan from its boundary on, until something ends or changes."""
        self._transition_ns = 0
        self._course = None
        self._told = NOTHING_TOLD
        if self._pending:
            newest = self._newest_known(now_ns)
            if newest is not None:
                self._take_over(newest, now_ns)
                if newest.drains:
                    self._release_at_boundary(newest, now_ns)
        plan, cursors = self.plan, self.cursors
        if plan is None or len(self.gone) == len(cursors):
            self._rest_idle(now_ns)
            return
        world = self.world
        course = world.builder.course(plan, cursors, world.library, self._pass_cost)
        forecast = self._forecast = course.forecast()
        rounds, duration_ns, task_ids, _ = forecast
        if not task_ids:
            self._rest_idle(now_ns)
            return
        self._course = course
        self.is_running = True
        self._work_ns, self._segment_start_ns, self._last_ns = 0, now_ns, now_ns
        self._target_rounds = rounds
        self._closing_ns = self._writing_ns(task_ids) if self._charges_ends else 0
        self._target_work_ns = self._transition_ns + duration_ns + self._closing_ns
        if not self._transition_ns:
            self._tell_taken_over(now_ns)
        if not self.is_busy:
            world.busy_changed(self)

    def _empties(self, now_ns: int) -> bool:
        """The common end of a lone task: a plan without tasks, nothing goes on under the old one,
        and nobody hears of it. What settling would do, without looking for what is not there."""
        pending, cursors = self._pending, self.cursors
        if not cursors or len(cursors) != len(self.gone) or len(pending) != 1 or self._to_write:
            return False
        ((from_ns, plan),) = pending
        if plan.htasks or from_ns > now_ns or self._tells_applied:
            return False
        for sharing in self.neighbours:
            if len(sharing) > 1:
                return False
        pending.clear()
        self.plan, self._course, self._transition_ns = plan, None, 0
        self.cursors, self.gone = {}, set()
        forget = self.world.forget
        for task_id in cursors:
            forget(task_id)
        self._sums["plans"] += 1
        self.is_busy = False
        self.generation += 1
        self.world.settled(self)
        return True

    def _newest_known(self, now_ns: int) -> Plan | None:
        """Takes it, and what it overtakes, out of the plans on their way."""
        if len(self._pending) == 1:
            ((from_ns, plan),) = self._pending
            if from_ns > now_ns:
                return None
            self._pending.clear()
            return plan
        known = [plan for from_ns, plan in self._pending if from_ns <= now_ns]
        if not known:
            return None
        newest = known[-1]
        self._pending = [item for item in self._pending if item[1].epoch > newest.epoch]
        return newest

    def _take_over(self, plan: Plan, now_ns: int) -> None:
        previous, self.plan, htasks = self.plan, plan, plan.htasks
        kept, gone, cursors = self.cursors, self.gone, {}
        self.cursors, self.gone = cursors, set()
        for htask in htasks:
            for task_id in htask.quota:
                cursor = kept.pop(task_id, None)
                if cursor is None or task_id in gone:
                    cursor = self._join(task_id)
                cursors[task_id] = cursor
        for task_id, cursor in kept.items():
            if task_id in gone:
                self.world.forget(task_id)
            else:
                self._drop(task_id, cursor, plan.epoch, now_ns)
        if htasks:
            self._begin_rounds(previous, plan)
        if self._to_write:
            seconds = sum(self.cost.checkpoint_s(slot).value for slot in self._to_write)
            self._transition_ns += to_ns(seconds)
            self._to_write.clear()
        self._sums["plans"] += 1
        self._to_tell_applied = self._one_thread and bool(htasks)
        if self._tells_applied and not self._to_tell_applied:
            self.tell_applied(now_ns)

    def _begin_rounds(self, previous: Plan | None, plan: Plan) -> None:
        """What the rounds of a plan that holds tasks take, and what getting to them takes."""
        once_s = 0.0
        if self._is_paced:
            self._pass_cost, once_s = self.world.pacer.timed(plan, self.cursors, self.cost)
        if self._charges_transitions:
            transition_s = self.cost.transition_s(previous, plan).value
            self._transition_ns = to_ns(transition_s + once_s)
        self._transition_ns += self._held_up_ns
        self._held_up_ns = 0
        sums, peak_bytes = self._sums, plan.predicted.peak_memory_bytes.value
        if peak_bytes > sums["peak_predicted_memory_bytes"]:
            sums["peak_predicted_memory_bytes"] = round(peak_bytes)

    def _release_at_boundary(self, plan: Plan, now_ns: int) -> None:
        """A task that is to leave and stands at a step boundary has nothing to wait for."""
        for task_id in sorted(plan.drains):
            if self.holds(task_id) and self.cursors[task_id].left is None:
                self._end(task_id, plan.epoch, now_ns)

    def _join(self, task_id: str) -> Cursor:
        cursor = self.world.take_cursor(task_id, self)
        if cursor is None:
            self.gone.add(task_id)  # it ended while this plan was on its way
            return Cursor(self.world.library.num_steps(task_id))
        if cursor is FIRST_CURSOR:
            self._joined[task_id] = NOTHING_DONE
        else:
            self._joined[task_id] = cursor.step, self.world.tokens_at(task_id, cursor)
        return cursor

    def _drop(self, task_id: str, cursor: Cursor, epoch: int, now_ns: int) -> None:
        """The new plan does not hold the task: its open step is lost."""
        self._count_left(task_id, cursor)
        self._fall_back(task_id, cursor, cursor.step)
        name = self.name
        self.world.emit(Event(now_ns, EventKind.TASK_RELEASED, task_id, name, epoch, cursor.step))

    def _end(self, task_id: str, epoch: int, now_ns: int) -> None:
        """A task is done, or has come to the step boundary that it drains towards."""
        cursor = self.cursors[task_id]
        tokens = self._count_left(task_id, cursor)
        self.gone.add(task_id)
        steps, _ = cursor
        if steps >= self.world.library.num_steps(task_id):
            self.world.finish(task_id, steps, tokens, self)
            return
        self.world.park(task_id, cursor)
        name = self.name
        self.world.emit(Event(now_ns, EventKind.TASK_RELEASED, task_id, name, epoch, steps))

    def _aim_at_boundary(self, now_ns: int) -> None:
        """Wakes at the end of the running round instead of at the forecast's end."""
        assert self.plan is not None
        if self._work_ns == 0:  # not one nanosecond was worked: the plan never began
            self._target_rounds = self._target_work_ns = 0
            self.reach(now_ns)
            self._start(now_ns)
            return
        assert self._course is not None
        # A plan that is being taken over has a round before it gives way, so that arrivals faster
        # than takeovers starve nobody.
        rounds, work_ns = self._course.rounds_until(max(1, self._worked_ns()))
        if rounds < self._target_rounds:
            self._closing_ns = 0
            self._target_rounds, self._target_work_ns = rounds, self._transition_ns + work_ns

    def _schedule(self, now_ns: int) -> None:
        """One wake: the awaited boundary, or an earlier moment at which a plan becomes known."""
        self.generation += 1
        delay_ns = None
        if self._to_tell_applied:
            self.world.wake(self, (self._transition_ns - self._work_ns) * self.share)
            return
        if not self._pending:
            if self.is_running:
                self.world.wake(self, (self._target_work_ns - self._work_ns) * self.share)
            return
        if self.is_running:
            delay_ns = (self._target_work_ns - self._work_ns) * self.share
        for from_ns, _ in self._pending:
            if from_ns > now_ns and (delay_ns is None or from_ns - now_ns < delay_ns):
                delay_ns = from_ns - now_ns
        if delay_ns is not None:
            self.world.wake(self, delay_ns)

    def _account(self, now_ns: int) -> None:
        if not self.is_running:
            return
        passed_ns, sums = now_ns - self._last_ns, self._sums
        self._last_ns = now_ns
        self._work_ns += passed_ns // self.share
        sums["busy_ns"] += passed_ns
        sums["task_ns"] += passed_ns * (len(self.cursors) - len(self.gone))

    def _rest(self) -> None:
        """Between two segments, its time accounted for; still busy in the eyes of its neighbours
        until it goes idle."""
        self.is_running = False
        self._sums["rounds"] += self._target_rounds
        self._sums["transition_ns"] += min(self._work_ns, self._transition_ns)

    def _rest_idle(self, now_ns: int) -> None:
        self.is_running = False
        self._tell_taken_over(now_ns)
        if self.is_busy:
            self.world.busy_changed(self)

    def _rounds_done(self, now_ns: int) -> int:
        """Whole rounds behind it in mid-segment."""
        self._account(now_ns)
        self._target_rounds = self._whole_rounds()
        return self._target_rounds

    def _whole_rounds(self) -> int:
        """Behind it by its last account."""
        assert self._course is not None
        worked_ns = self._worked_ns()
        rounds, end_ns = self._course.rounds_until(max(0, worked_ns))
        return rounds if end_ns == worked_ns else max(0, rounds - 1)

    def _worked_ns(self) -> int:
        """On rounds."""
        rounds_ns = self._target_work_ns - self._closing_ns
        return min(self._work_ns, rounds_ns) - self._transition_ns

    def _writing_ns(self, task_ids: tuple[str, ...]) -> int:
        """Those of them that will be done, not released."""
        plan, seconds = self.plan, 0.0
        assert plan is not None
        for htask in plan.htasks:
            for task_id, slot in htask.slot_of.items():
                if task_id in task_ids and task_id not in plan.drains:
                    seconds += self.cost.finish_s(htask.shapes[-1].slots[slot]).value
        return to_ns(seconds) if seconds else 0

    def _cursors_after(self, rounds: int) -> dict[str, Cursor]:
        if rounds == 0 or self._course is None:
            return dict(self.cursors)
        return self._course.advance(rounds)

    def _ended_after(self, rounds: int) -> tuple[str, ...]:
        forecast_rounds, _, task_ids, exact = self._forecast
        if exact:
            return task_ids if rounds == forecast_rounds else ()
        assert self.plan is not None
        ended = self.world.builder.ended(self.plan, self._cursors_after(rounds), self.world.library)
        return tuple(sorted(ended - self.gone))

    def _count_left(self, task_id: str, cursor: Cursor) -> int:
        """A task leaves: counts what it was given here, and tells what it ever was."""
        tokens = self.world.tokens_at(task_id, cursor)
        if self._charges_checkpoints and self.plan is not None:
            self._write_later(self.plan, task_id)
        self._sums["effective_tokens"] += tokens - self._joined.pop(task_id)[1]
        return tokens

    def _write_later(self, plan: Plan, task_id: str) -> None:
        if self.cursors[task_id].step < self.world.library.num_steps(task_id):
            htask = next(item for item in plan.htasks if task_id in item.quota)
            self._to_write.append(htask.shapes[-1].slots[htask.slot_of[task_id]])

    def _fall_back(self, task_id: str, cursor: Cursor, step: int) -> None:
        """The task goes on from the boundary before ``step``; what it did since is lost."""
        kept, tokens_at = Cursor(step), self.world.tokens_at
        if cursor != kept:
            self._sums["lost_tokens"] += tokens_at(task_id, cursor) - tokens_at(task_id, kept)
        self.world.park(task_id, kept)

    def _tell_progress(self, rounds: int, now_ns: int, stays: bool) -> None:
        """``stays``: whether any task goes on after this."""
        plan, course = self.plan, self._course
        assert plan is not None and course is not None
        if not (self._tells_last or (stays and self._options.emit_progress)):
            each = None if self.gone else padded_round_tokens(plan)
            padded_tokens = course.padded_tokens(rounds) if each is None else rounds * each
            self._sums["padded_tokens"] += padded_tokens - self._told.padded_tokens
            return
        # Under contention the transition took its share of the wall time, too.
        wall_ns, work_ns = now_ns - self._segment_start_ns, max(1, self._target_work_ns)
        others_ns = self._transition_ns + self._closing_ns
        rounds_ns = wall_ns * (work_ns - others_ns) // work_ns
        if rounds > self._told.rounds:
            self._emit_progress(rounds, rounds_ns, self.cursors, now_ns)

    def _emit_progress(
        self, rounds: int, rounds_ns: int, cursors: Mapping[str, Cursor], now_ns: int
    ) -> None:
        """Of the segment's first ``rounds`` what was not told before."""
        plan, course, told = self.plan, self._course, self._told
        assert plan is not None and course is not None
        now_told = self._told = Told(rounds, rounds_ns, *course.round_tokens(rounds))
        self._sums["padded_tokens"] += now_told.padded_tokens - told.padded_tokens
        data = ProgressData(
            rounds - told.rounds,
            rounds_ns - told.duration_ns,
            now_told.effective_tokens - told.effective_tokens,
            now_told.padded_tokens - told.padded_tokens,
            {name: at.step for name, at in cursors.items() if name not in self.gone},
        )
        name, epoch = self.name, plan.epoch
        self.world.emit(Event(now_ns, EventKind.PROGRESS, "", name, epoch, data))


def padded_round_tokens(plan: Plan) -> int | None:
    """Token rows that each round computes while all tasks contribute; None where rounds differ."""
    tokens = 0
    for turn in plan.round:
        shapes = plan.htasks[turn.htask].shapes
        if turn.count is None or len(shapes) != 1:
            return None
        tokens += turn.count * shapes[0].padded_tokens
    return tokens


def departure(
    now_ns: int, task_id: str, instance_id: str, epoch: int, steps: int, message: str | None
) -> Event:
    """A withdrawal, or with a message a failure."""
    if message is None:
        return Event(now_ns, EventKind.TASK_CANCELLED, task_id, instance_id, epoch, steps)
    data = FailureData(message, steps)
    return Event(now_ns, EventKind.TASK_FAILED, task_id, instance_id, epoch, data)
