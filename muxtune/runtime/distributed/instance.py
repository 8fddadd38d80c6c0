"""The controller's side of an instance that is spread over ranks.

A round is told to all ranks at once and then runs by itself, in the plan's order; rounds overlap
as the order says. So results come rounds later, and a task's books are kept when they do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from muxtune.errors import ConfigError
from muxtune.planning.replica_dispatch import deal
from muxtune.runtime.bank import AdapterPool, SlotPool, TaskState, TaskTensors
from muxtune.runtime.batch import PassTensors, Placed
from muxtune.runtime.captured_runner import capacity_of, rows_needed, rows_of, slot_input
from muxtune.runtime.distributed.layout import Layout
from muxtune.runtime.distributed.links import Patience
from muxtune.runtime.distributed.runner import Losses, Norms, RoundInput, Snapshots, VisitInput
from muxtune.runtime.distributed.schedule import visits_of
from muxtune.runtime.distributed.sharding import StageBackbone, draw_whole, put_together
from muxtune.runtime.distributed.static_part import refusal
from muxtune.runtime.distributed.static_runner import Sizes, StaticRound, StaticVisit
from muxtune.runtime.distributed.stepping import SlotStep
from muxtune.runtime.distributed.team import (
    Adopt,
    Arrange,
    Drop,
    Flush,
    Gather,
    Gathered,
    Round,
    Score,
    Scores,
    Stop,
    Team,
)
from muxtune.runtime.distributed.tracing import MOST_SPANS, Spans
from muxtune.runtime.distributed.worker import Worker
from muxtune.runtime.instance import Host, RunningInstance, _Round
from muxtune.runtime.optimizer import StepOutcome, learning_rate
from muxtune.runtime.pass_runner import tensors_of
from muxtune.runtime.records import SpanPlace
from muxtune.runtime.runners import longest_tokens
from muxtune.runtime.tasks import Phase, RuntimeTask, TaskDataFailure
from muxtune.types import Cursor, InstanceSpec, MicroBatch, Plan, TaskSpec


@dataclass
class _OpenVisit:
    """A micro-batch whose results are awaited. ``steps``: the steps that it closes, by task, with
    slot and learning rate; ``own_slots``: slot of each task that has rows in it."""

    micro_batch: MicroBatch
    slot_of: dict[str, int]
    tokens: dict[str, int]
    closing: dict[str, tuple[int, float]]
    num_losses: int
    num_snapshots: int
    losses: dict[int, float] = field(default_factory=dict)
    norms: dict[int, float] | None = None
    snapshots: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        has_norms = self.norms is not None or not self.closing
        return not self.num_losses and has_norms and len(self.snapshots) >= self.num_snapshots


@dataclass
class _OpenRound:
    """A round that is under way. ``cursors``: after it."""

    visits: dict[int, _OpenVisit]
    cursors: Mapping[str, Cursor]
    start_ns: int


class DistributedInstance(RunningInstance):
    """Drives ``team`` and this rank's own ``worker``. ``on_work(True)``: from here on the other
    ranks may expect something of this one; ``on_work(False)``: not any more."""

    def __init__(
        self, spec: InstanceSpec, backbone: StageBackbone, host: Host, team: Team, worker: Worker,
        patience: Patience, on_work: Callable[[bool], None] = lambda works: None,
    ) -> None:  # fmt: skip
        super().__init__(spec, backbone, host)
        if Layout(spec.replicas) != backbone.layout:
            raise ConfigError(
                "cluster.num_gpus",
                f"instance '{spec.instance_id}' is {spec.replicas}, but the ranks hold "
                f"{backbone.layout.replicas}",
                "Let one instance span all ranks",
            )
        self.stage_backbone, self.team, self.worker, self.patience = (
            backbone,
            team,
            worker,
            patience,
        )
        self.bank, self._on_work = worker.bank, on_work
        self._pools: list[AdapterPool] = []
        self._open_steps: set[str] = set()  # of tasks that were told a part of a step last
        self._open: dict[int, _OpenRound] = {}
        self._next_number = 0
        self._ahead: dict[str, Cursor] = {}  # cursors after the last round that was told
        self._in_flight = False
        self._owed_spans = 0  # last ones of a flush, one a rank
        self._zero_ns: int | None = None  # of this run's time, on the clock of spans
        self._last_end_ns = 0
        self._snapshots: dict[tuple[str, int], TaskState] = {}
        self._closed_steps: dict[str, int] = {}

    # -- the loop

    @property
    def is_mid_round(self) -> bool:
        return False

    @property
    def is_runnable(self) -> bool:
        return bool(self._open) or self.next_plan is not None or not self._is_idle

    def advance(self) -> None:
        """Take a plan over, tell a round, or wait for the last ones."""
        if self.next_plan is not None and self._gives_way:
            self._flush()
            if self.next_plan is not None:
                self._take_over(self.next_plan)
            return
        if not self._is_idle:
            self._tell_round()
        elif self._open:
            self._flush()
        self._collect(self.team.taken())

    def release_all(self) -> None:
        self._flush()
        super().release_all()

    def close(self) -> None:
        """Let the other ranks go home."""
        self.team.tell(Stop())

    def _command(self, command: Any) -> None:
        self._on_work(True)
        try:
            self.team.tell(command)
            self.worker.obey(command)
        finally:
            self._on_work(False)

    # -- tasks

    def create_state(self, task: TaskSpec, num_steps: int) -> TaskState:
        """Of the whole model, on the CPU."""
        self.stage_backbone.check_task(task)
        return draw_whole(task, num_steps, self.stage_backbone)

    def adopt_state(self, state: TaskState) -> TaskState:
        """Spread it over the ranks; what comes back is this rank's part."""
        task_id = state.task.task_id
        whole = state if state.step else None
        self._command(Adopt(state.task, state.num_steps, whole))
        return self.worker.states[task_id]

    def whole_state(self, task: RuntimeTask) -> TaskState:
        """Of the whole model, on the CPU, as it is after the task's last step that was told."""
        return self._whole(task)

    def whole_parameters(self, task: RuntimeTask) -> dict[str, dict[str, Tensor]]:
        return self._whole(task, weights_only=True).parameters()

    def _whole(self, task: RuntimeTask, weights_only: bool = False) -> TaskState:
        assert task.state is not None
        task_id = task.spec.task_id
        kept = self._snapshots.pop((task_id, self._closed_steps.get(task_id, -1)), None)
        if kept is not None:
            return kept
        self._flush()
        return self._gathered([task_id], weights_only)[task_id]

    def _gathered(
        self, task_ids: Sequence[str], weights_only: bool = False
    ) -> dict[str, TaskState]:
        self._command(Gather(tuple(task_ids), weights_only))
        found: list[Gathered] = []
        while len(found) < self.team.world_size:
            report = self.team.take(self.patience.limit_s)
            if isinstance(report, Gathered):
                found.append(report)
            else:
                self._note(report)
        return {
            task_id: self._put_together(task_id, [item.shares[task_id] for item in found])
            for task_id in task_ids
        }

    def _put_together(self, task_id: str, shares: list[Any]) -> TaskState:
        own = self.worker.states[task_id]
        tensors = {
            key: TaskTensors(value.param, value.param.new_zeros(()), *value[1:])
            for key, value in put_together(shares).items()
        }
        return TaskState(own.task, own.slot, own.num_steps, tensors, own.step)

    def evaluate(self, pool: SlotPool, tensors: PassTensors) -> tuple[list[float], list[int]]:
        self._flush()
        if pool.copied is None:
            htask = next(i for i, item in enumerate(self._pools) if item is pool)
            self._command(Score(htask, tensors))
        else:
            self._command(Score(-1, tensors, pool.copied.task.task_id))
        while True:
            report = self.team.take(self.patience.limit_s)
            if isinstance(report, Scores):
                return report.nll, report.targets
            self._note(report)

    # -- plans

    def _take_over(self, plan: Plan) -> None:
        _check_order(plan)
        gone = [
            name
            for name in self.worker.states
            if self._is_gone(name) or (self._has_ended(name) and name not in plan.task_ids)
        ]
        if gone:
            self._command(Drop(tuple(gone)))
        super()._take_over(plan)
        self._ahead, self._next_number = {}, 0  # ranks count a plan's rounds from 0
        self._tell_how(plan)

    def _tell_how(self, plan: Plan) -> None:
        """Of rounds that are not captured, and of stages that no order feeds."""
        if self.worker.why_eager:
            self.host.notice(f"{self.backbone.name}: runs eagerly, because {self.worker.why_eager}")
        if plan.order or all(shape.pp == 1 for shape in plan.replicas):
            return
        how = "a plan without an order: its micro-batches overlap within a round only"
        if len(plan.replicas) > 1:
            how = "replicas meet for every step: a pipeline's micro-batches follow one another"
        self.host.notice(f"{self.backbone.name}: {how}")

    def _has_ended(self, task_id: str) -> bool:
        return self.host.tasks[task_id].phase is not Phase.LIVE

    def _is_gone(self, task_id: str) -> bool:
        task = self.host.tasks.get(task_id)
        return task is None or task.phase is Phase.GONE

    def _arrange(self, plan: Plan, tasks: dict[str, RuntimeTask]) -> None:
        self._is_pressed = False
        states = {key: task.state for key, task in tasks.items() if task.state is not None}
        is_new = {key for key, state in states.items() if state.place is None and not state.step}
        start_ns, copies = self.host.now_ns, bool(self.host.options.checkpoint_steps)
        sizes, open_ids = self._sizes(plan, states), frozenset(self._open_steps)
        self._command(Arrange(plan, tuple(states), sizes, copies, open_ids))
        self._pools = self.worker.bank.pools
        if self.worker.static is not None and self.worker.static.programs.prepared:
            self.span("capture", start_ns, self.host.now_ns, plan.task_ids)
        for task_id in is_new:
            self.host.settle(tasks[task_id], self)

    def _sizes(self, plan: Plan, states: Mapping[str, TaskState]) -> tuple[Sizes, ...]:
        """Of the programs that the plan's rounds would need."""
        if self.worker.programs is None or refusal(plan):
            return ()
        longest = longest_tokens(self.stage_backbone.model.config)
        ahead = {} if self.worker.deterministic else self._rows_ahead(plan)
        found = []
        for index, htask in enumerate(plan.htasks):
            specs = [states[name].task for name in htask.slot_of if name in states]
            capacity = capacity_of(htask, specs, longest)
            tokens = ahead.get(index, ())
            found.append(Sizes.of(capacity, tokens, self.worker.deterministic))
        return tuple(found)

    # -- telling rounds

    def _tell_round(self) -> None:
        assert self.plan is not None
        self._has_begun = True
        cursors = {task_id: self._cursor(task_id) for task_id in self.plan.task_ids}
        try:
            micro_batches, after = self.host.builder.next_round(
                self.plan, cursors, self.host.lengths
            )
        except TaskDataFailure as failure:
            self._ahead.pop(failure.task_id, None)
            self._fail_data(failure.task_id, failure.error)
            return
        if not micro_batches:
            self._is_idle = True
            self._flush()
            self._report_ends()
            self._tell_progress()
            return
        number, self._next_number = self._next_number, self._next_number + 1
        self._ahead = dict(after)
        command, visits = self._inputs(number, micro_batches)
        self._open[number] = _OpenRound(visits, after, self.host.now_ns)
        self._in_flight = True
        self._command(command)

    def _cursor(self, task_id: str) -> Cursor:
        task = self.host.tasks[task_id]
        return task.cursor if task.phase is Phase.GONE else self._ahead.get(task_id, task.cursor)

    def _inputs(
        self, number: int, micro_batches: Sequence[MicroBatch]
    ) -> tuple[Round, dict[int, _OpenVisit]]:
        assert self.plan is not None
        ordered = bool(self.plan.order)
        slots = visits_of(self.plan, micro_batches) if ordered else list(micro_batches)
        inputs: list[list[Any]] = [[] for _ in self.plan.replicas]
        visits: dict[int, _OpenVisit] = {}
        for index, micro_batch in enumerate(slots):
            made = None if micro_batch is None else self._visit(micro_batch)
            if made is not None:
                visits[index] = made[1]
            for replica, row in enumerate(inputs):
                row.append(None if made is None else made[0][replica])
        htasks = None if ordered else tuple(item.htask for item in micro_batches)
        made_of = RoundInput if self.worker.static is None else StaticRound
        return Round(htasks, tuple(made_of(number, tuple(row)) for row in inputs)), visits

    def _visit(self, micro_batch: MicroBatch) -> tuple[list[Any], _OpenVisit] | None:
        """The micro-batch for each replica, without what has failed; None when nothing is left."""
        assert self.plan is not None
        pool = self._pools[micro_batch.htask]
        placed = self._place(micro_batch, pool)
        if not placed:
            return None
        micro_batch = self._without_gone(micro_batch)
        slot_of = self._slot_of(micro_batch, pool)
        closing = self._closing(micro_batch, slot_of)
        wanted = tuple(name for name in closing if self._wants_snapshot(micro_batch, name))
        if self.worker.static is None:
            inputs = self._eager_inputs(micro_batch, placed, dict(closing.values()), wanted)
            num_losses = sum(item is not None and item.tensors is not None for item in inputs)
        else:
            inputs, num_losses = [self._static_input(micro_batch, placed, slot_of, wanted)], 1
        self._open_steps.update(placed)
        self._open_steps.difference_update(closing)
        tokens = {
            name: sum(len(item.sequence.tokens) for item in items) for name, items in placed.items()
        }
        open_visit = _OpenVisit(
            micro_batch,
            {name: items[0].slot for name, items in placed.items()},
            tokens,
            {name: (slot, step.lr) for name, (slot, step) in closing.items()},
            num_losses,
            self.stage_backbone.layout.world_size if wanted else 0,
        )
        return inputs, open_visit

    def _eager_inputs(
        self, micro_batch: MicroBatch, placed: dict[str, list[Placed]],
        steps: Mapping[int, SlotStep], wanted: tuple[str, ...],
    ) -> list[VisitInput | None]:  # fmt: skip
        """One a replica."""
        assert self.plan is not None
        pool = self._pools[micro_batch.htask]
        assert isinstance(pool, SlotPool)
        parts = [micro_batch]
        if len(self.plan.replicas) > 1:
            parts = deal(micro_batch, self.plan.replicas)
        inputs: list[VisitInput | None] = []
        for part in parts:
            tensors = self._part_tensors(part, pool, placed)
            inputs.append(
                None if tensors is None and not steps
                else VisitInput(micro_batch.htask, tensors, steps, wanted)
            )  # fmt: skip
        return inputs

    def _static_input(
        self, micro_batch: MicroBatch, placed: dict[str, list[Placed]], slot_of: Mapping[str, int],
        wanted: tuple[str, ...],
    ) -> StaticVisit:  # fmt: skip
        rows = rows_of(placed)
        slots = {
            slot: slot_input(
                task.spec, task.num_steps, micro_batch, name in self._open_steps,
                name in micro_batch.closes_step,
            )
            for name, slot in slot_of.items()
            for task in (self.host.tasks[name],)
            if name in placed or name in micro_batch.closes_step
        }  # fmt: skip
        num_rows = rows_needed(micro_batch, rows, self.worker.deterministic)
        return StaticVisit(micro_batch.htask, tuple(rows), num_rows, slots, wanted)

    def _part_tensors(
        self, part: MicroBatch, pool: SlotPool, placed: dict[str, list[Placed]]
    ) -> PassTensors | None:
        if part.shape.num_chunks == 0:
            return None
        assert self.plan is not None
        if len(self.plan.replicas) > 1:
            placed = self._place(part, pool)
        work = self._work(part, placed, pool)
        return tensors_of(work, pool, self.backbone.pad_id, "cpu")

    def _closing(
        self, micro_batch: MicroBatch, slot_of: Mapping[str, int]
    ) -> dict[str, tuple[int, SlotStep]]:
        closing = {}
        for task_id in sorted(micro_batch.closes_step & slot_of.keys()):
            task = self.host.tasks[task_id]
            spec, step = task.spec.optimizer, micro_batch.steps[task_id]
            rate = learning_rate(spec, step, task.num_steps)
            closing[task_id] = (
                slot_of[task_id],
                SlotStep(
                    rate, spec.beta1, spec.beta2, spec.eps, spec.weight_decay, spec.max_grad_norm
                ),
            )
        return closing

    def _wants_snapshot(self, micro_batch: MicroBatch, task_id: str) -> bool:
        every = self.host.options.checkpoint_steps
        return bool(every) and (micro_batch.steps[task_id] + 1) % every == 0

    # -- results

    def _flush(self) -> None:
        if self._in_flight:
            self._in_flight = False
            self._command(Flush())
            if self.worker.log is not None:
                self._owed_spans += self.team.world_size
        self._collect(self.team.taken())
        while self._open or self._owed_spans:
            self._collect([self.team.take(self.patience.limit_s)])

    def _collect(self, reports: Sequence[Any]) -> None:
        for report in reports:
            self._note(report)
        while self._open:
            number = min(self._open)
            if not all(visit.is_complete for visit in self._open[number].visits.values()):
                return
            self._close_round(self._open.pop(number))

    def _note(self, report: Any) -> None:
        if isinstance(report, Spans):
            self._note_spans(report)
            return
        round_ = self._open[report.round]
        visit = round_.visits[report.visit]
        if isinstance(report, Losses):
            visit.num_losses -= 1
            for slot, loss in enumerate(report.by_slot):
                visit.losses[slot] = visit.losses.get(slot, 0.0) + loss
        elif isinstance(report, Norms):
            visit.norms = report.by_slot
        elif isinstance(report, Snapshots):
            visit.snapshots.append(report.shares)

    def _note_spans(self, report: Spans) -> None:
        self._owed_spans -= report.is_last
        if self._zero_ns is None:
            self._zero_ns = time.monotonic_ns() - self.host.now_ns
        for item in report.spans:
            direction = "backward" if item.backward else "forward"
            place = SpanPlace(
                item.rank, item.stage, item.stream, item.round, item.micro_batch, direction,
                item.kind,
            )  # fmt: skip
            start_ns, stop_ns = item.start_ns - self._zero_ns, item.stop_ns - self._zero_ns
            self.span(item.label, start_ns, stop_ns, item.task_ids, item.htask, place)
        if report.is_cut:
            self.host.notice(
                f"{self.backbone.name}: the trace holds the first {MOST_SPANS:,} operations of "
                "each rank under a plan"
            )

    def _close_round(self, open_round: _OpenRound) -> None:
        start_ns = max(open_round.start_ns, self._last_end_ns)
        round_ = _Round(cursors=open_round.cursors, start_ns=start_ns)
        for index in sorted(open_round.visits):
            self._close_visit(open_round.visits[index], round_)
        self._last_end_ns = self.host.now_ns
        round_.duration_ns = self._last_end_ns - start_ns
        is_idle = self._is_idle
        self._end_round(round_)
        # Whether more rounds follow is known where they are told.
        self._is_idle = is_idle

    def _close_visit(self, visit: _OpenVisit, round_: _Round) -> None:
        live = {
            name: slot for name, slot in visit.slot_of.items()
            if self.host.tasks[name].phase is Phase.LIVE
        }  # fmt: skip
        for task_id, slot in live.items():
            self._take_loss(task_id, visit.losses.get(slot, 0.0), visit.tokens[task_id])
        round_.effective_tokens += sum(visit.tokens.values())
        round_.padded_tokens += visit.micro_batch.shape.padded_tokens
        round_.num_micro_batches += 1
        for task_id, (slot, rate) in visit.closing.items():
            if self.host.tasks[task_id].phase is Phase.LIVE:
                self._close_step(visit, task_id, slot, rate)

    def _close_step(self, visit: _OpenVisit, task_id: str, slot: int, rate: float) -> None:
        assert visit.norms is not None
        norm, step = visit.norms[slot], visit.micro_batch.steps[task_id] + 1
        if not norm < float("inf"):
            self._fail(task_id, f"the norm of its gradient is {norm} in step {step}")
            return
        self._closed_steps[task_id] = step
        state = self.host.tasks[task_id].state
        if self.worker.static is not None and state is not None:
            state.step += 1  # ranks that run operation by operation have counted it themselves
        if visit.snapshots and self._wants_snapshot(visit.micro_batch, task_id):
            whole = self._put_together(task_id, [shares[task_id] for shares in visit.snapshots])
            whole.step = step
            self._snapshots[task_id, step] = whole
        outcome = StepOutcome(rate, norm, True)
        self._record_step(task_id, outcome, visit.micro_batch.loss_tokens[task_id], step)

    def _report_ends(self) -> None:
        assert self.plan is not None
        for task_id in self.plan.task_ids:
            self._report_end(self.host.tasks[task_id])


def _check_order(plan: Plan) -> None:
    if plan.order and len(plan.replicas) > 1:
        raise ConfigError(
            "plan.order",
            "is given for several replicas, whose steps meet",
            "Leave it out: their micro-batches follow one another",
        )


def distributed_factory(
    team: Team,
    worker: Worker,
    patience: Patience,
    on_work: Callable[[bool], None] = lambda works: None,
) -> Callable[[InstanceSpec, Any, Host], RunningInstance]:
    """For ``TorchExecutor``: instances that span the ranks."""

    def make(spec: InstanceSpec, backbone: Any, host: Host) -> RunningInstance:
        return DistributedInstance(spec, backbone, host, team, worker, patience, on_work)

    return make


__all__ = ["DistributedInstance", "distributed_factory"]
