"""One instance: a backbone, the plan that runs on it, and the rounds of that plan.

``advance`` does one unit of work (at most one micro-batch), so that whoever drives several
instances on one device can take turns and stop between micro-batches.

Passes are started ahead of their results by as many as their runner allows (``PassRunner.depth``);
a task's losses, steps and failures are told when the result is there. What needs the tasks as they
stand (a new plan, a task's end) waits for all results first (``settle_all``).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from muxtune.errors import MuxTuneError
from muxtune.planning.step_builder import StepBuilder
from muxtune.runtime.backbone import Backbone
from muxtune.runtime.bank import (
    AdapterBank,
    AdapterPool,
    SlotPool,
    TaskState,
    drop,
    grad_dtype_for,
    take_out,
)
from muxtune.runtime.batch import PassTensors, Placed, TextLibrary, place_task
from muxtune.runtime.captured_runner import rows_ahead
from muxtune.runtime.checkpoint import HostCopy, copy_to_host
from muxtune.runtime.optimizer import StepOutcome
from muxtune.runtime.options import TorchOptions
from muxtune.runtime.pass_runner import PassRunner, PassWork, PendingPass
from muxtune.runtime.records import RoundRecord, SpanPlace, SpanRecord, StepListener, StepRecord
from muxtune.runtime.runners import Runners
from muxtune.runtime.tasks import GuardedLengths, Phase, RuntimeTask, TaskDataFailure
from muxtune.runtime.training import score_pass
from muxtune.types import (
    NO_EPOCH,
    ROUNDS_TO_JUDGE_BY,
    Chunk,
    Cursor,
    EventKind,
    InstanceSpec,
    MicroBatch,
    Plan,
    PressureData,
    ProgressData,
    TaskSpec,
)

FILLER_CHUNK = Chunk("", -1, ())
# What a plan that could not be prepared is taken to use at least, over the limit that it kept.
_LEAST_EXCESS = 1.05


class Host(Protocol):
    """What an instance needs of the executor."""

    builder: StepBuilder
    library: TextLibrary
    lengths: GuardedLengths
    options: TorchOptions
    tasks: dict[str, RuntimeTask]
    listeners: Sequence[StepListener]

    @property
    def now_ns(self) -> int: ...

    def emit(
        self, kind: EventKind, task_id: str, instance_id: str, epoch: int, data: object
    ) -> None: ...

    def join(self, task: RuntimeTask, instance: RunningInstance) -> None:
        """The task is about to get its first place: make its state."""
        ...

    def settle(self, task: RuntimeTask, instance: RunningInstance) -> None:
        """The task has its first place but has not run yet."""
        ...

    def finish(self, task: RuntimeTask, instance: RunningInstance) -> None: ...

    def fail(self, task: RuntimeTask, instance: RunningInstance, problem: str) -> None: ...

    def wants_checkpoint(self, task: RuntimeTask, step: int) -> bool:
        """Whether the task's state after optimizer step ``step`` is to be kept."""
        ...

    def checkpoint(self, task: RuntimeTask, instance: RunningInstance, step: int) -> None:
        """The task has taken optimizer step ``step``."""
        ...

    def notice(self, text: str) -> None:
        """Something that a user should know, once."""
        ...


class _Started(NamedTuple):
    """A pass whose result has not been read."""

    work: PassWork
    pending: PendingPass
    start_ns: int
    is_timed: bool
    round: _Round


@dataclass
class _Progress:
    """Since the last PROGRESS event of this epoch."""

    since_ns: int
    rounds: int = 0
    duration_ns: int = 0
    effective_tokens: int = 0
    padded_tokens: int = 0


@dataclass
class _Round:
    """``duration_ns``: of passes whose results are read later, the device's time until then; of
    others the host's. ``num_unread``: passes that were started and not read. ``is_ended``: all of
    its passes were started, and it counts as soon as they are read."""

    micro_batches: deque[MicroBatch] = field(default_factory=deque)
    cursors: Mapping[str, Cursor] = field(default_factory=dict)
    start_ns: int = 0
    duration_ns: int = 0
    num_unread: int = 0
    is_ended: bool = False
    num_micro_batches: int = 0
    effective_tokens: int = 0
    padded_tokens: int = 0


class RunningInstance:
    """``plan`` is None until the first one takes over; an idle instance waits for another."""

    def __init__(self, spec: InstanceSpec, backbone: Backbone, host: Host) -> None:
        self.spec, self.backbone, self.host = spec, backbone, host
        grad_dtype = grad_dtype_for(backbone.device, host.options.deterministic)
        self.runners = Runners(backbone, host.options, host.notice)
        self.bank = AdapterBank(backbone, grad_dtype, self.runners)
        self.plan: Plan | None = None
        self.next_plan: Plan | None = None
        self._runners: list[PassRunner] = []
        self._started: deque[_Started] = deque()
        self._settled_ns = 0  # when the last result was read
        # By task and step: as the pass that took the step left them, until its result is read.
        self._copies: dict[tuple[str, int], HostCopy] = {}
        self._round: _Round | None = None
        self._is_idle = True
        self._has_begun = False  # the plan has had a round, or the first one has begun
        self._is_pressed = False
        self._reported: set[str] = set()
        self._progress = _Progress(host.now_ns)

    @property
    def epoch(self) -> int:
        return NO_EPOCH if self.plan is None else self.plan.epoch

    @property
    def is_runnable(self) -> bool:
        return self._round is not None or self.next_plan is not None or not self._is_idle

    @property
    def is_mid_round(self) -> bool:
        return self._round is not None

    def holds(self, task_id: str) -> bool:
        return self.plan is not None and task_id in self.plan.task_ids

    def advance(self) -> None:
        """One unit of work: take a plan over, start a round, run a micro-batch, end a round."""
        if self._round is None:
            if self.next_plan is not None and self._gives_way:
                self._take_over(self.next_plan)
            elif not self._is_idle:
                self._begin_round()
            return
        if self._round.micro_batches:
            self._run(self._round.micro_batches.popleft(), self._round)
        if not self._round.micro_batches:
            self._end_round(self._round)

    @property
    def _gives_way(self) -> bool:
        """Whether the next plan may take over now. A plan has a round before it gives way, so that
        arrivals faster than takeovers starve nobody; unless it has nothing to run, or the memory
        is too short for that round."""
        return self._has_begun or self._is_idle or self._is_pressed

    def press(self) -> None:
        """The memory runs short: the next plan computes in memory of its own size. Graphs share
        theirs, which otherwise stays as large as the largest of them ever was."""
        self._is_pressed = True

    def release_all(self) -> None:
        """Give every task storage of its own; the instance stops in the middle of anything."""
        self.settle_all()
        self._round, self.next_plan, self._is_idle = None, None, True
        for task_id in () if self.plan is None else self.plan.task_ids:
            task = self.host.tasks.get(task_id)
            if task is not None and task.state is not None:
                take_out(task.state)
        self.plan, self._runners = None, []

    # -- tasks' states

    def create_state(self, task: TaskSpec, num_steps: int) -> TaskState:
        """A fresh one of the whole model; a checkpoint may be read into it."""
        return self.bank.create(task, num_steps)

    def adopt_state(self, state: TaskState) -> TaskState:
        """What the task's state is here from now on."""
        return state

    def whole_state(self, task: RuntimeTask) -> TaskState:
        """Of the whole model, at the task's last step."""
        assert task.state is not None
        return task.state

    def whole_parameters(self, task: RuntimeTask) -> dict[str, dict[str, torch.Tensor]]:
        """Of ``whole_state``."""
        return self.whole_state(task).parameters()

    def copy_of(self, task: RuntimeTask, step: int) -> HostCopy:
        """The whole state as optimizer step ``step`` left it; called when that is told."""
        kept = self._copies.pop((task.spec.task_id, step), None)
        return copy_to_host(self.whole_state(task)) if kept is None else kept

    def evaluate(self, pool: SlotPool, tensors: PassTensors) -> tuple[list[float], list[int]]:
        """See ``score_pass``."""
        return score_pass(self.backbone, pool, tensors, self.host.options.deterministic)

    # -- plans

    def _take_over(self, plan: Plan) -> None:
        self.settle_all()
        self._tell_progress()
        self._forget_ended(plan)
        self.plan, self.next_plan, self._has_begun = plan, None, False
        self._reported.clear()
        tasks = {task_id: self._joined(task_id) for task_id in plan.task_ids}
        live = {key: task for key, task in tasks.items() if task is not None}
        try:
            self._arrange(plan, live)
        except torch.OutOfMemoryError as error:
            problem = _describe(error)
        else:
            problem = ""
        self._is_idle = bool(problem) or not plan.task_ids
        self._progress = _Progress(self.host.now_ns)
        self.host.emit(EventKind.PLAN_APPLIED, "", self.spec.instance_id, plan.epoch, None)
        if problem:
            self._give_way(plan, live, problem)

    def _give_way(self, plan: Plan, tasks: Mapping[str, RuntimeTask], problem: str) -> None:
        """What the plan needs does not fit into the device's memory, whatever the ledger says:
        nothing runs, and nothing of it is held, until a smaller plan comes. A task that is alone
        in it ends instead, for there is none."""
        self._runners = []
        for task in tasks.values():
            if task.state is not None:
                take_out(task.state)
        self.bank.arrange((), {})
        self.runners.keep(())
        if len(tasks) < 2:
            for task_id in tasks:
                self._fail(task_id, f"it does not fit into the memory ({problem})")
            return
        self.host.notice(
            f"{self.spec.instance_id}: a plan of {len(tasks)} tasks did not fit into the memory; "
            f"a smaller one follows ({problem})"
        )
        limit_bytes = self.spec.memory_limit_bytes
        self._emit(
            EventKind.MEMORY_PRESSURE,
            "",
            PressureData(int(_LEAST_EXCESS * limit_bytes), limit_bytes),
        )

    def _forget_ended(self, new_plan: Plan) -> None:
        for task_id in set(self.plan.task_ids if self.plan else ()) - set(new_plan.task_ids):
            task = self.host.tasks[task_id]
            if task.phase is not Phase.LIVE:
                self.host.library.discard(task_id)
                if task.state is not None:
                    drop(task.state)

    def _joined(self, task_id: str) -> RuntimeTask | None:
        """The task with its adapter state, or None for one that has ended."""
        task = self.host.tasks[task_id]
        if task.phase is Phase.LIVE and task.state is None:
            try:
                self.host.join(task, self)
            except MuxTuneError as error:
                self.host.fail(task, self, str(error))
        return None if task.phase is Phase.GONE else task

    def _arrange(self, plan: Plan, tasks: dict[str, RuntimeTask]) -> None:
        states = {key: task.state for key, task in tasks.items() if task.state is not None}
        is_new = {key for key, state in states.items() if state.place is None and not state.step}
        # Each time, slots of one more kind get pools of the other kind: this ends.
        while not self._place_tasks(plan, states, is_new, tasks):
            self.bank.arrange((), {})

    def _place_tasks(
        self,
        plan: Plan,
        states: Mapping[str, TaskState],
        is_new: set[str],
        tasks: Mapping[str, RuntimeTask],
    ) -> bool:
        """False where a step could not be captured: then its slots want pools of another kind."""
        self._runners = []  # nothing may hold on to pools that are not needed any more
        if self._is_pressed:
            self.runners.keep(())
            self._is_pressed = False
        pools = self.bank.arrange(plan.htasks, states)
        for task_id in is_new:
            self.host.settle(tasks[task_id], self)
        start_ns = self.host.now_ns
        try:
            self._runners = self.runners.arrange(plan.htasks, pools, lambda: self._rows_ahead(plan))
        except Runners.Refused:
            return False
        if self.runners.prepared:
            self.span("capture", start_ns, self.host.now_ns, plan.task_ids)
        return True

    def _rows_ahead(self, plan: Plan) -> dict[int, set[int]]:
        cursors = {task_id: self.host.tasks[task_id].cursor for task_id in plan.task_ids}
        return rows_ahead(plan, cursors, self.host.builder, self.host.lengths)

    # -- rounds

    def _begin_round(self) -> None:
        assert self.plan is not None
        self._has_begun = True
        cursors = {task_id: self.host.tasks[task_id].cursor for task_id in self.plan.task_ids}
        start_ns = self.host.now_ns
        try:
            micro_batches, after = self.host.builder.next_round(
                self.plan, cursors, self.host.lengths
            )
        except TaskDataFailure as failure:
            self._fail_data(failure.task_id, failure.error)
            return
        self._round = _Round(deque(micro_batches), after, start_ns)
        self._is_idle = not micro_batches
        if not micro_batches:
            self._end_round(self._round)

    def _end_round(self, round_: _Round) -> None:
        assert self.plan is not None
        if any(self._may_end(task_id, cursor) for task_id, cursor in round_.cursors.items()):
            self.settle_all()
        self._round = None
        for task_id, cursor in round_.cursors.items():
            task = self.host.tasks[task_id]
            if task.phase is not Phase.GONE:
                task.cursor = cursor
        round_.is_ended = True
        if not round_.num_unread:
            self._count(round_)
        tasks = [self.host.tasks[task_id] for task_id in self.plan.task_ids]
        for task in tasks:
            self._report_end(task)
        reported = self._reported
        self._is_idle |= all(t.phase is Phase.GONE or t.spec.task_id in reported for t in tasks)
        interval_ns = self.host.options.progress_interval_s * 1e9
        if self._is_idle or self.host.now_ns - self._progress.since_ns >= interval_ns:
            self._tell_progress()

    def _may_end(self, task_id: str, cursor: Cursor) -> bool:
        """Whether the task is told as finished or released at the end of the round."""
        assert self.plan is not None
        if task_id in self._reported:
            return False
        drains = task_id in self.plan.drains and cursor.left is None
        return drains or cursor.step >= self.host.tasks[task_id].num_steps

    def _report_end(self, task: RuntimeTask) -> None:
        """A finished or released task is reported once per plan that holds it."""
        assert self.plan is not None
        task_id = task.spec.task_id
        if task.phase is Phase.GONE or task_id in self._reported:
            return
        if task.cursor.step >= task.num_steps:
            self._reported.add(task_id)
            self.host.finish(task, self)
        elif task_id in self.plan.drains and task.cursor.left is None:
            self._reported.add(task_id)
            assert task.state is not None
            take_out(task.state)
            self._emit(EventKind.TASK_RELEASED, task_id, task.steps_done)

    def _count(self, round_: _Round) -> None:
        """All of its results were read: what was started and still runs is no progress yet."""
        if not round_.num_micro_batches:
            return
        progress = self._progress
        progress.rounds += 1
        progress.duration_ns += round_.duration_ns
        progress.effective_tokens += round_.effective_tokens
        progress.padded_tokens += round_.padded_tokens
        record = RoundRecord(
            round_.start_ns,
            round_.duration_ns,
            self.spec.instance_id,
            self.epoch,
            round_.num_micro_batches,
            round_.effective_tokens,
            round_.padded_tokens,
        )
        for listener in self.host.listeners:
            listener.on_round(record)

    def tell_progress_so_far(self) -> None:
        """Beside other news: the plan that answers those is made with what its predecessor's
        rounds taught. A few rounds are too few to judge by, and go on being counted."""
        if self._progress.rounds >= ROUNDS_TO_JUDGE_BY:
            self._tell_progress()

    def _tell_progress(self) -> None:
        progress, self._progress = self._progress, _Progress(self.host.now_ns)
        if self.plan is None or progress.rounds == 0:
            return
        steps = {task_id: self.host.tasks[task_id].steps_done for task_id in self.plan.task_ids}
        data = ProgressData(
            progress.rounds,
            progress.duration_ns,
            progress.effective_tokens,
            progress.padded_tokens,
            steps,
        )
        self._emit(EventKind.PROGRESS, "", data)

    # -- micro-batches

    def _run(self, micro_batch: MicroBatch, round_: _Round) -> None:
        """A micro-batch without what has failed or was cancelled since the round was made."""
        start_ns = self.host.now_ns
        runner = self._runners[micro_batch.htask]
        placed = self._place(micro_batch, runner.pool)
        work = self._work(self._without_gone(micro_batch), placed, runner.pool)
        if placed:
            tokens = sum(len(item.sequence.tokens) for items in placed.values() for item in items)
            round_.effective_tokens += tokens
            round_.padded_tokens += micro_batch.shape.padded_tokens
            round_.num_micro_batches += 1
        if placed or work.closing:
            self._train(work, runner, round_)
        if runner.phases:
            round_.duration_ns += self.host.now_ns - start_ns

    def _place(self, micro_batch: MicroBatch, pool: AdapterPool) -> dict[str, list[Placed]]:
        """Each live task's sequences. A task whose data raises fails here, before any work."""
        placed = {}
        slot_of = self._slot_of(micro_batch, pool)
        for task_id in slot_of:
            try:
                items = place_task(micro_batch, task_id, self.host.library, slot_of)
            except Exception as error:
                self._fail_data(task_id, error)
                continue
            if items:
                placed[task_id] = items
        return placed

    def _work(
        self, micro_batch: MicroBatch, placed: dict[str, list[Placed]], pool: AdapterPool
    ) -> PassWork:
        slot_of = self._slot_of(micro_batch, pool)
        closing = tuple(task_id for task_id in slot_of if task_id in micro_batch.closes_step)
        return PassWork(micro_batch, placed, slot_of, closing)

    def _slot_of(self, micro_batch: MicroBatch, pool: AdapterPool) -> dict[str, int]:
        """Slots of the micro-batch's live tasks, in order of appearance."""
        present = dict.fromkeys([*(c.task_id for c in micro_batch.chunks), *micro_batch.steps])
        slots = {}
        for slot, state in enumerate(pool.occupants):
            if state is not None:
                slots[state.task.task_id] = slot
        return {
            task_id: slots[task_id]
            for task_id in present
            if task_id in slots and self.host.tasks[task_id].phase is Phase.LIVE
        }

    def _without_gone(self, micro_batch: MicroBatch) -> MicroBatch:
        """Their chunks become filler, so that everybody else's rows stay where they are."""
        live = {key for key in micro_batch.steps if self.host.tasks[key].phase is Phase.LIVE}
        if live == set(micro_batch.steps):
            return micro_batch
        return micro_batch._replace(
            chunks=tuple(c if c.task_id in live else FILLER_CHUNK for c in micro_batch.chunks),
            closes_step=micro_batch.closes_step & live,
        )

    def _train(self, work: PassWork, runner: PassRunner, round_: _Round) -> None:
        try:
            started = self._start(work, runner, round_)
        except Exception as error:
            self._train_apart(work, runner, round_, error)
        else:
            self._await(started)
        while len(self._started) > runner.depth:
            self._settle(self._started.popleft())

    def _train_apart(
        self, work: PassWork, runner: PassRunner, round_: _Round, error: Exception
    ) -> None:
        """A pass has failed without leaving a trace. Whose fault was it? Each task is computed
        again on its own, and only those that fail alone end."""
        if len(work.task_ids) == 1:
            self._fail(work.task_ids[0], _describe(error))
            return
        for task_id in work.task_ids:
            part = _only(work.micro_batch, task_id)
            slot_of = self._slot_of(part, runner.pool)
            try:
                items = place_task(part, task_id, self.host.library, slot_of)
                own = {task_id: items} if items else {}
                started = self._start(self._work(part, own, runner.pool), runner, round_)
            except Exception as own_error:
                self._fail(task_id, _describe(own_error))
            else:
                self._await(started)

    def _start(self, work: PassWork, runner: PassRunner, round_: _Round) -> _Started:
        start_ns = self.host.now_ns
        with self._phases(work.micro_batch.htask, work.task_ids) as mark:
            pending = runner.start(work, mark)
        return _Started(work, pending, start_ns, not runner.phases, round_)

    def _await(self, started: _Started) -> None:
        """Tasks to be checkpointed are copied now, before anything else runs."""
        for task_id in started.work.closing:
            task, step = self.host.tasks[task_id], started.work.micro_batch.steps[task_id] + 1
            if self.host.wants_checkpoint(task, step):
                assert task.state is not None
                self._copies[task_id, step] = copy_to_host(task.state)
        started.round.num_unread += 1
        self._started.append(started)

    def settle_all(self) -> None:
        """Read the result of every pass that was started."""
        while self._started:
            self._settle(self._started.popleft())

    def _settle(self, started: _Started) -> None:
        work, round_ = started.work, started.round
        result = started.pending.result()
        if started.is_timed:  # the device computes one pass after another
            begin_ns = max(started.start_ns, self._settled_ns)
            self._settled_ns = self.host.now_ns
            self.span("step", begin_ns, self._settled_ns, work.task_ids, work.micro_batch.htask)
            if not round_.duration_ns:
                round_.start_ns = begin_ns
            round_.duration_ns += self._settled_ns - begin_ns
        for task_id, items in work.placed.items():
            if self.host.tasks[task_id].phase is Phase.LIVE:
                tokens = sum(len(item.sequence.tokens) for item in items)
                self._take_loss(task_id, result.losses[task_id], tokens)
        for task_id in work.closing:
            if self.host.tasks[task_id].phase is Phase.LIVE:
                self._take_outcome(task_id, result.outcomes[task_id], work.micro_batch)
            self._copies.pop((task_id, work.micro_batch.steps[task_id] + 1), None)
        round_.num_unread -= 1
        if round_.is_ended and not round_.num_unread:
            self._count(round_)

    def _take_loss(self, task_id: str, loss: float, tokens: int) -> None:
        task = self.host.tasks[task_id]
        if not math.isfinite(loss):
            self._fail(task_id, f"its loss is {loss} in step {task.steps_done + 1}")
            return
        assert task.state is not None
        task.state.step_loss += loss
        task.open_tokens += tokens

    def _take_outcome(self, task_id: str, outcome: StepOutcome, micro_batch: MicroBatch) -> None:
        step = micro_batch.steps[task_id] + 1
        if outcome.finite:
            self._record_step(task_id, outcome, micro_batch.loss_tokens[task_id], step)
        else:
            norm = outcome.grad_norm
            self._fail(task_id, f"the norm of its gradient is {norm} in step {step}")

    def _record_step(
        self, task_id: str, outcome: StepOutcome, target_tokens: int, step: int
    ) -> None:
        task, now_ns = self.host.tasks[task_id], self.host.now_ns
        state = task.state
        assert state is not None
        record = StepRecord(
            now_ns,
            self.spec.instance_id,
            self.epoch,
            task_id,
            step,
            task.num_steps,
            state.step_loss,
            outcome.grad_norm,
            outcome.lr,
            task.open_tokens,
            target_tokens,
            now_ns - task.last_step_ns,
        )
        task.final_loss, state.step_loss = state.step_loss, 0.0
        task.effective_tokens += task.open_tokens
        task.open_tokens, task.last_step_ns = 0, now_ns
        for listener in self.host.listeners:
            listener.on_step(record)
        self.host.checkpoint(task, self, step)

    # -- telling

    def _fail_data(self, task_id: str, error: Exception) -> None:
        self._fail(task_id, f"its data cannot be used ({_describe(error)})")

    def _fail(self, task_id: str, problem: str) -> None:
        self.host.fail(self.host.tasks[task_id], self, problem)

    def _emit(self, kind: EventKind, task_id: str, data: object) -> None:
        self.host.emit(kind, task_id, self.spec.instance_id, self.epoch, data)

    @contextmanager
    def _phases(self, htask: int, task_ids: tuple[str, ...]) -> Iterator[Callable[[str], object]]:
        """Spans of consecutive phases: each ends where the next one or the block ends."""
        marks: list[tuple[str, int]] = []
        try:
            yield lambda name: marks.append((name, self.host.now_ns))
        finally:
            ends = [start_ns for _, start_ns in marks[1:]] + [self.host.now_ns]
            for (name, start_ns), end_ns in zip(marks, ends, strict=False):
                self.span(name, start_ns, end_ns, task_ids, htask)

    def span(
        self, name: str, start_ns: int, end_ns: int, task_ids: Iterable[str], htask: int = -1,
        place: SpanPlace | None = None,
    ) -> None:  # fmt: skip
        record = SpanRecord(
            name, self.spec.instance_id, htask, start_ns, end_ns - start_ns, tuple(task_ids), place
        )
        for listener in self.host.listeners:
            listener.on_span(record)


def _only(micro_batch: MicroBatch, task_id: str) -> MicroBatch:
    """One task's chunks, in a shape just as large as they need."""
    chunks = tuple(chunk for chunk in micro_batch.chunks if chunk.task_id == task_id)
    return micro_batch._replace(
        chunks=chunks,
        shape=micro_batch.shape._replace(num_chunks=len(chunks)),
        steps={task_id: micro_batch.steps[task_id]},
        closes_step=micro_batch.closes_step & {task_id},
    )


def _describe(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, MuxTuneError) else f"{type(error).__name__}: {text}"
