"""What every rank does at the controller's command, rank 0 itself included."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from muxtune.runtime.bank import AdapterBank, SlotPool, TaskState, grad_dtype_for, take_out
from muxtune.runtime.distributed.links import Links, Patience, lost
from muxtune.runtime.distributed.runner import RoundInput, Span, StageRunner, on_device
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
from muxtune.runtime.passes import AdapterPass
from muxtune.types import Plan


class Worker:
    """One rank's part of an instance."""

    def __init__(
        self,
        backbone: StageBackbone,
        team: Team,
        patience: Patience,
        deterministic: bool = True,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        trace: Callable[[Span], None] | None = None,
    ) -> None:
        self.backbone, self.team, self.deterministic = backbone, team, deterministic
        self.links = Links(backbone.layout, backbone.place, backbone.device)
        self.bank = AdapterBank(backbone, grad_dtype_for(backbone.device, deterministic))
        self.runner = StageRunner(
            backbone, self.links, patience, team.report, deterministic, clock_ns, trace
        )
        self.plan: Plan | None = None
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
        self._schedule = plan_schedule(plan, self.backbone.shape, self.backbone.place.replica)
        states = {task_id: self.states[task_id] for task_id in command.task_ids}
        pools = self.bank.arrange(plan.htasks, states)
        self.runner.begin_plan([pool for pool in pools if isinstance(pool, SlotPool)])

    def round(self, command: Round) -> None:
        assert self.plan is not None
        schedule, place = self._schedule, self.backbone.place
        inputs = command.inputs[place.replica]
        if command.htasks is not None:
            schedule = self._unordered(self.plan, command.htasks, inputs)
        assert schedule is not None
        self.runner.feed(inputs, schedule)
        self.runner.run()

    def _unordered(self, plan: Plan, htasks: tuple[int, ...], inputs: RoundInput) -> Schedule:
        shape, replica, num = self.backbone.shape, self.backbone.replica, len(plan.htasks)
        if len(plan.replicas) > 1:  # they meet for a task's step: one after another on all
            return sequential_schedule(htasks, num, shape, replica)
        per_step = tuple(_per_step(inputs, htasks, htask) for htask in range(num))
        return overlapped_schedule(Unordered(htasks, per_step, plan.interleaves), shape, replica)

    def flush(self, command: Flush) -> None:
        self.runner.flush()

    def gather(self, command: Gather) -> None:
        shares = {task_id: self.runner.shares(task_id) for task_id in command.task_ids}
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
        current = stage.begin(tensors, self.runner.pools[command.htask])
        current.adapters = AdapterPass(
            self.runner.pools[command.htask], tensors.rows, None, self.deterministic, None
        )
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


def _per_step(inputs: RoundInput, htasks: Sequence[int], htask: int) -> int:
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
