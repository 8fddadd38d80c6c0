"""What every rank does at the controller's command, rank 0 itself included."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from muxtune.runtime.bank import AdapterBank, SlotPool, TaskState, grad_dtype_for, take_out
from muxtune.runtime.distributed.links import Links, Patience, lost
from muxtune.runtime.distributed.runner import RoundInput, StageRunner, on_device
from muxtune.runtime.distributed.schedule import (
    ATTENTION,
    MLP,
    Schedule,
    Unordered,
    overlapped_schedule,
    plan_schedule,
    sequential_schedule,
)
from muxtune.runtime.distributed.sharding import StageBackbone, draw_whole, own_part
from muxtune.runtime.distributed.static_part import refusal
from muxtune.runtime.distributed.static_runner import StaticPrograms, StaticRound, StaticRunner
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
from muxtune.runtime.distributed.tracing import span_log
from muxtune.runtime.passes import AdapterPass
from muxtune.types import Plan

AnyRound = RoundInput | StaticRound


class Worker:
    """One rank's part of an instance.

    ``captures``: rounds run as static visits (see ``static_runner``) where a plan lets them, else
    operation by operation. ``traces``: whether the controller is told when operations ran, of all
    ranks or of none. ``shares``: see ``StaticPrograms``; None: on GPUs. ``why_eager``: why the
    plan's rounds do not run as wanted, empty where they do. ``static``: what runs them now.
    """

    def __init__(
        self,
        backbone: StageBackbone,
        team: Team,
        patience: Patience,
        deterministic: bool = True,
        traces: bool = False,
        captures: bool = False,
        shares: bool | None = None,
    ) -> None:
        self.backbone, self.team, self.deterministic = backbone, team, deterministic
        self.links = Links(backbone.layout, backbone.place, backbone.device)
        self.programs: StaticPrograms | None = None
        if captures:
            shares = backbone.device.type == "cuda" if shares is None else shares
            self.programs = StaticPrograms(backbone, self.links, deterministic, shares)
        self.bank = AdapterBank(
            backbone, grad_dtype_for(backbone.device, deterministic), self.programs
        )
        self.log = span_log(backbone.place, backbone.layout.world_size) if traces else None
        self.runner = StageRunner(
            backbone, self.links, patience, team.report, deterministic, self.log
        )
        self.plan: Plan | None = None
        self.why_eager = ""
        self.static: StaticRunner | None = None
        self._schedule: Schedule | None = None

    def serve(self) -> None:
        """Until the controller says stop. Raises DistributedError when it is gone."""
        while True:
            command = self.team.heed()
            if isinstance(command, Stop):
                return
            self.obey(command)

    def obey(self, command: Any) -> None:
        """Carry one command out, up to where another rank's next one is needed."""
        try:
            _HANDLERS[type(command)](self, command)
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                raise lost("another rank", error) from None
            raise

    def adopt(self, command: Adopt) -> None:
        whole = command.whole
        if whole is None:
            whole = draw_whole(command.task, command.num_steps, self.backbone)
        self.states[command.task.task_id] = own_part(whole, self.bank)

    def arrange(self, command: Arrange) -> None:
        plan = self.plan = command.plan
        if self.log is not None:
            self.log.begin_plan(plan)
        self._schedule = plan_schedule(plan, self.backbone.shape, self.backbone.place.replica)
        states = {task_id: self.states[task_id] for task_id in command.task_ids}
        for task_id, state in states.items():
            state.is_open = task_id in command.open_ids
        self.why_eager = ""
        if self.programs is None or not plan.htasks:
            self._arrange_eager(plan, states)
            return
        self.why_eager = refusal(plan) or self._arrange_static(self.programs, command, states)
        if self.why_eager:
            self._arrange_eager(plan, states)

    def _arrange_static(
        self, programs: StaticPrograms, command: Arrange, states: Mapping[str, TaskState]
    ) -> str:
        """Why not, on all ranks alike; empty where it is done."""
        if self.static is None:
            self.runner.begin_plan([])
            self.bank.arrange((), {})
        static = self.static = self.static or StaticRunner(
            programs, self.runner.patience, self.team.report, self.states, self.log
        )
        static.end_plan()
        problem = programs.begin()
        if problem:
            return problem
        self.runner.patience.expect_compiling()
        pools = self.bank.arrange(command.plan.htasks, states)
        in_flight = 1 if command.plan.order else self.backbone.replica.pp
        units, problem = programs.prepare(pools, command.sizes, in_flight)
        if problem:
            return problem
        static.begin_plan(self._schedule, units, command.task_ids if command.copies else ())
        return ""

    def _arrange_eager(self, plan: Plan, states: Mapping[str, TaskState]) -> None:
        if self.static is not None:
            self.static.end_plan()
            self.static.close()
            self.static = None
        if self.programs is not None and self.programs.is_on:
            self.bank.arrange((), {})
            self.programs.end()
        pools = self.bank.arrange(plan.htasks, states)
        self.runner.begin_plan([pool for pool in pools if isinstance(pool, SlotPool)])

    def round(self, command: Round) -> None:
        assert self.plan is not None
        inputs, schedule = command.inputs[self.backbone.place.replica], self._schedule
        if command.htasks is not None:
            schedule = self._unordered(self.plan, command.htasks, inputs)
        assert schedule is not None
        if isinstance(inputs, RoundInput):
            self.runner.feed(inputs, schedule)
            self.runner.run()
        else:
            assert self.static is not None
            self.static.feed(inputs, schedule)
            self.static.run()
        self._tell_spans()

    def _unordered(self, plan: Plan, htasks: tuple[int, ...], inputs: AnyRound) -> Schedule:
        shape, replica, num = self.backbone.shape, self.backbone.replica, len(plan.htasks)
        if len(plan.replicas) > 1:  # they meet for a task's step: one after another on all
            return sequential_schedule(htasks, num, shape, replica)
        per_step = tuple(_per_step(inputs, htasks, htask) for htask in range(num))
        return overlapped_schedule(Unordered(htasks, per_step, plan.interleaves), shape, replica)

    def flush(self, command: Flush) -> None:
        if self.static is None:
            self.runner.flush()
        else:
            self.static.flush()
        self._tell_spans(is_last=True)

    def _tell_spans(self, is_last: bool = False) -> None:
        """Of all that is over; what other threads still run comes with the next ones."""
        if self.log is None:
            return
        found = self.log.taken(is_last)
        if found.spans or is_last:
            self.team.report(found)

    def gather(self, command: Gather) -> None:
        shares = {
            task_id: self.runner.shares(task_id, command.weights_only)
            for task_id in command.task_ids
        }
        self.team.report(Gathered(self.backbone.place.rank, shares))

    def drop(self, command: Drop) -> None:
        for task_id in command.task_ids:
            state = self.states.pop(task_id, None)
            if state is not None:
                take_out(state)

    @property
    def states(self) -> dict[str, TaskState]:
        return self.runner.states

    @torch.no_grad()
    def score(self, command: Score) -> None:
        """A forward pass through the stages of the first replica, one after another."""
        place, stage = self.backbone.place, self.runner.stage
        if place.replica:
            return
        tensors = on_device(command.tensors, self.backbone.device)
        pool = self._scored(command)
        current = stage.begin(tensors, pool)
        current.adapters = AdapterPass(pool, tensors.rows, None, self.deterministic, None)
        received = None
        if place.stage:
            shape = (tensors.input_ids_T.numel(), self.backbone.shape.hidden)
            received = self.links.receive(shape, self.backbone.dtype, place.stage - 1)
        stage.enter(current, received)
        for layer in self.backbone.layers:
            for half in (ATTENTION, MLP):
                stage.forward(current, [(layer, half)])
                if self.links.tp is not None:
                    dist.all_reduce(current.exchanged(False), group=self.links.tp)
        if not self.backbone.is_last:
            self.links.send(stage.leave(current), place.stage + 1)
        elif place.part == 0:
            nll_S, targets_S = stage.scores(current)
            self.team.report(Scores(nll_S.tolist(), targets_S.tolist()))

    def _scored(self, command: Score) -> SlotPool:
        if not command.task_id:
            return self.runner.pools[command.htask]
        state = self.states[command.task_id]
        pool = self.bank.slot_pool((state.slot,), trains=False)
        pool.fill_weights(state, 0)
        return pool


def _per_step(inputs: AnyRound, htasks: Sequence[int], htask: int) -> int:
    """Micro-batches of an hTask that may be under way at once: all of the round where only the
    last of them closes steps, else one."""
    own = [visit for visit, at in zip(inputs.visits, htasks, strict=True) if at == htask]
    closes = any(visit is not None and visit.closing for visit in own[:-1])
    return 1 if closes or not own else len(own)


_HANDLERS: dict[type, Callable[[Worker, Any], None]] = {
    Adopt: Worker.adopt,
    Arrange: Worker.arrange,
    Round: Worker.round,
    Flush: Worker.flush,
    Gather: Worker.gather,
    Drop: Worker.drop,
    Score: Worker.score,
}
