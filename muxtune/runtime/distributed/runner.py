"""One rank's work of a plan: its streams' operations, in the plan's order.

Shape suffixes: T rows of a micro-batch, D model features, S slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from muxtune.runtime.bank import SlotPool, TaskState
from muxtune.runtime.batch import PassTensors
from muxtune.runtime.distributed.eager import EagerPass, EagerStage
from muxtune.runtime.distributed.links import (
    Arrival,
    DistributedError,
    Links,
    Patience,
    order_waits_for_itself,
    used_here,
)
from muxtune.runtime.distributed.schedule import (
    STEP_ONLY,
    TRANSFERS,
    Action,
    Operation,
    Schedule,
)
from muxtune.runtime.distributed.sharding import Share, StageBackbone, shares_of
from muxtune.runtime.distributed.stepping import SlotStep, StageOptimizer
from muxtune.runtime.distributed.tracing import SpanLog

Node = tuple[int, int]  # round, op of the round's graph


class VisitInput(NamedTuple):
    """One micro-batch for one replica. ``tensors`` is None where the replica has no rows of it but
    closes a step all the same. ``snapshots``: tasks whose state is wanted after that step."""

    htask: int
    tensors: PassTensors | None
    closing: Mapping[int, SlotStep]
    snapshots: tuple[str, ...] = ()


class RoundInput(NamedTuple):
    """A round for one replica. ``visits``: None where nobody contributes."""

    number: int
    visits: tuple[VisitInput | None, ...]


class Losses(NamedTuple):
    """Of one visit on one replica, by slot."""

    round: int
    visit: int
    by_slot: list[float]


class Norms(NamedTuple):
    """Of the slots that closed a step in a visit: gradient norms before clipping."""

    round: int
    visit: int
    by_slot: dict[int, float]


class Snapshots(NamedTuple):
    """A rank's shares of tasks that have just taken a step."""

    round: int
    visit: int
    rank: int
    shares: dict[str, Any]


@dataclass
class _Visit:
    """A micro-batch in flight on this stage."""

    input: VisitInput
    current: EagerPass | None
    squares_S: Tensor | None = None


@dataclass
class _Round:
    input: RoundInput
    schedule: Schedule
    visits: dict[int, _Visit] = field(default_factory=dict)
    issued: set[int] = field(default_factory=set)
    arrivals: dict[int, Future[Arrival]] = field(default_factory=dict)
    remaining: int = 0


class StageRunner:
    """Feeds on rounds and runs what belongs to its stage.

    ``report`` receives Losses, Norms and Snapshots as they come about; ``log`` what has run.
    Raises DistributedError when another rank does not answer.
    """

    def __init__(
        self,
        backbone: StageBackbone,
        links: Links,
        patience: Patience,
        report: Callable[[Any], None],
        deterministic: bool,
        log: SpanLog | None = None,
    ) -> None:
        self.backbone, self.links, self.patience = backbone, links, patience
        self.report, self.log = report, log
        self.stage = EagerStage(backbone, deterministic)
        self.optimizer = StageOptimizer(backbone, links)
        self.states: dict[str, TaskState] = {}
        self.begin_plan([])

    def begin_plan(self, pools: Sequence[SlotPool]) -> None:
        """Nothing may be in flight. Rounds are counted from 0 again; streams pass by pass."""
        self.pools = list(pools)
        if self.backbone.device.type == "cuda":
            self.patience.expect_compiling()
        self._rounds: dict[int, _Round] = {}
        self._compute: deque[tuple[int, Node]] = deque()  # with the pass that a node belongs to
        self._comm: deque[Node] = deque()
        self._first = self._num_fed = 0  # rounds since the last flush, and their end
        self._last: Schedule | None = None
        self._last_comm: Future[Arrival] | None = None

    # -- feeding

    def feed(self, round_input: RoundInput, schedule: Schedule) -> None:
        """The next round. Its transfers, and what waits for nothing, start at once."""
        number = round_input.number
        if number != self._num_fed:
            raise DistributedError(f"round {number} came when {self._num_fed} was expected")
        here = sum(stage == self.backbone.place.stage for stage in schedule.graph.stage_of)
        self._rounds[number] = _Round(round_input, schedule, remaining=here)
        self._num_fed, self._last = number + 1, schedule
        self._enqueue(number, schedule, number)

    def run(self) -> None:
        """All computing that may run before the next round is known."""
        if self._last is not None:
            ahead = self._last.ahead[self.backbone.place.stage] if self._last.ahead else 0
            self._work(self._num_fed - 1 - ahead)

    def flush(self) -> None:
        """Everything that is left. Raises DistributedError for an order that waits for itself."""
        if self._last is None:
            return
        for later in range(self._num_fed, self._num_fed + self._last.deepest):
            self._enqueue(later, self._last, self._num_fed - 1)
        self._work(self._num_fed + self._last.deepest)
        if self._rounds or self._compute or self._comm:
            raise order_waits_for_itself()
        if self._last_comm is not None:
            self.patience.wait(self._last_comm, "the last transfer")
        self._first, self._last, self._last_comm = self._num_fed, None, None

    def _enqueue(self, number: int, schedule: Schedule, last_round: int) -> None:
        """What the streams run in their pass ``number``."""
        stage = self.backbone.place.stage
        compute, comm = schedule.sequences[2 * stage], schedule.sequences[2 * stage + 1]
        rounds = range(self._first, last_round + 1)
        self._compute.extend((number, node) for node in nodes_of(compute, number, rounds))
        self._comm.extend(nodes_of(comm, number, rounds))
        for neighbour in (stage - 1, stage + 1):
            if 0 <= neighbour < schedule.graph.num_stages:
                sequence = schedule.sequences[2 * neighbour + 1]
                for node in nodes_of(sequence, number, rounds):
                    self._expect(node, schedule, neighbour)

    def _expect(self, node: Node, schedule: Schedule, sender: int) -> None:
        """Post the receive of a transfer to this stage."""
        number, op = node
        operation = schedule.operation(op)
        if operation.action not in TRANSFERS or operation.to_stage != self.backbone.place.stage:
            return
        round_ = self._rounds[number]
        visit = self._visit_input(round_, op)
        if not self._is_needed(operation, visit):
            return
        assert visit is not None
        work = self._receiver(operation, visit, sender)
        round_.arrivals[op] = self.links.lane_from(sender).put(work)

    def _receiver(
        self, operation: Operation, visit: VisitInput, sender: int
    ) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
        """(rows, sums of squares by slot) of the sender's message."""
        links, slots = self.links, len(self.pools[visit.htask].slots)

        def receive() -> tuple[Tensor | None, Tensor | None]:
            rows_TD = squares_S = None
            if operation.action is not Action.SEND_NORM and visit.tensors is not None:
                shape = (visit.tensors.input_ids_T.numel(), self.backbone.shape.hidden)
                rows_TD = links.receive(shape, self.backbone.dtype, sender)
            if operation.action is not Action.SEND_ACTIVATIONS and visit.closing:
                squares_S = links.receive((slots,), torch.float64, sender)
            return rows_TD, squares_S

        return receive

    # -- running

    def _work(self, last_pass: int) -> None:
        while True:
            moved = self._start_comm()
            if self._compute and self._compute[0][0] <= last_pass:
                node = self._compute[0][1]
                if self._is_ready(node):
                    self._compute.popleft()
                    self._run_compute(node)
                    moved = True
            if not moved:
                return

    def _start_comm(self) -> bool:
        moved = False
        while self._comm and self._is_ready(self._comm[0]):
            self._run_comm(self._comm.popleft())
            moved = True
        return moved

    def _is_ready(self, node: Node) -> bool:
        """Whether everything on this stage that it waits for has been started."""
        number, op = node
        round_ = self._rounds[number]
        return all(before in round_.issued for before in self._before(round_, op, local=True))

    def _before(self, round_: _Round, op: int, local: bool) -> list[int]:
        graph = round_.schedule.graph
        first = graph.first_op[graph.visit_of[op]]
        stage = self.backbone.place.stage
        return [
            first + before
            for before in graph.subgraphs[op].depends_on
            if (graph.stage_of[first + before] == stage) is local
        ]

    def _visit_input(self, round_: _Round, op: int) -> VisitInput | None:
        return round_.input.visits[round_.schedule.graph.visit_of[op]]

    def _is_needed(self, operation: Operation, visit: VisitInput | None) -> bool:
        if visit is None:
            return False
        if operation.action in STEP_ONLY:
            return bool(visit.closing)
        return visit.tensors is not None or (
            operation.action is Action.SEND_GRADIENTS and bool(visit.closing)
        )

    def _state(self, round_: _Round, op: int) -> _Visit:
        index = round_.schedule.graph.visit_of[op]
        if index not in round_.visits:
            visit = round_.input.visits[index]
            assert visit is not None
            current = None
            if visit.tensors is not None:
                tensors = on_device(visit.tensors, self.backbone.device)
                current = self.stage.begin(tensors, self.pools[visit.htask])
            round_.visits[index] = _Visit(visit, current)
        return round_.visits[index]

    def _finish(self, round_: _Round, op: int) -> None:
        round_.issued.add(op)
        round_.remaining -= 1
        if not round_.remaining:
            del self._rounds[round_.input.number]

    def _run_comm(self, node: Node) -> None:
        round_ = self._rounds[node[0]]
        operation = round_.schedule.operation(node[1])
        if self._is_needed(operation, self._visit_input(round_, node[1])):
            visit = self._state(round_, node[1])
            remote = [round_.arrivals[op] for op in self._before(round_, node[1], local=False)]
            work = self._communication(operation, visit, remote)
            after = [self._event()] if self.links.device.type == "cuda" else []
            work = self._timed(work, round_, node[1])
            self._last_comm = self.links.lanes["comm"].put(work, after)
            round_.arrivals[node[1]] = self._last_comm
        self._finish(round_, node[1])

    def _event(self) -> Any:
        event = torch.cuda.Event()
        event.record()
        return event

    def _communication(
        self, operation: Operation, visit: _Visit, remote: Sequence[Future[Arrival]]
    ) -> Callable[[], None]:
        links, stage = self.links, self.stage

        def exchange() -> None:
            assert visit.current is not None
            exchanged = visit.current.exchanged(operation.backward)
            used_here(exchanged)
            dist.all_reduce(exchanged, group=links.tp)

        def send_activations() -> None:
            assert visit.current is not None
            used_here(visit.current.x_TD, visit.current.added_TD)
            links.send(stage.leave(visit.current).contiguous(), operation.to_stage)

        def send_gradients() -> None:
            if visit.current is not None:
                used_here(visit.current.dx_TD)
                gradient_TD = stage.gradient(visit.current)
                used_here(gradient_TD)
                links.send(gradient_TD.contiguous(), operation.to_stage)
            if visit.input.closing:
                assert visit.squares_S is not None
                used_here(visit.squares_S)
                links.send(visit.squares_S, operation.to_stage)

        def send_norm() -> None:
            squares_S = visit.squares_S
            if remote:
                arrival = self.patience.wait(remote[0], "the norm of a gradient")
                arrival.come()
                squares_S = arrival.value[1]
            assert squares_S is not None
            used_here(squares_S)
            links.send(squares_S, operation.to_stage)

        return {
            Action.REDUCE: exchange,
            Action.SEND_ACTIVATIONS: send_activations,
            Action.SEND_GRADIENTS: send_gradients,
            Action.SEND_NORM: send_norm,
        }[operation.action]

    def _run_compute(self, node: Node) -> None:
        round_ = self._rounds[node[0]]
        operation = round_.schedule.operation(node[1])
        visit_input = self._visit_input(round_, node[1])
        if self._is_needed(operation, visit_input):
            visit = self._state(round_, node[1])
            arrived = self._await(round_, node[1])
            work = self._computation(operation, visit, arrived, node, round_)
            self._timed(work, round_, node[1])()
        elif operation.action is Action.BACKWARD and visit_input and visit_input.closing:
            self._pass_squares_on(round_, node[1], operation)
        self._finish(round_, node[1])

    def _pass_squares_on(self, round_: _Round, op: int, operation: Operation) -> None:
        """A step that is closed without rows of its own on this replica."""
        visit = self._state(round_, op)
        _, squares_S = self._await(round_, op)
        visit.squares_S = visit.squares_S if squares_S is None else squares_S
        if operation.is_last:
            self._sum_squares(visit)

    def _await(self, round_: _Round, op: int) -> tuple[Tensor | None, Tensor | None]:
        """Until what the operation waits for is there; what another stage sent, if anything."""
        message: tuple[Tensor | None, Tensor | None] = (None, None)
        for local in (True, False):
            for before in self._before(round_, op, local):
                future = round_.arrivals.get(before)
                if future is None:
                    continue
                label = round_.schedule.graph.subgraphs[before].label
                what = f"'{label}' of round {round_.input.number}"
                arrival = self.patience.wait(future, what)
                arrival.come()
                if not local:
                    message = arrival.value
                    used_here(*message)
        return message

    def _computation(
        self,
        operation: Operation,
        visit: _Visit,
        arrived: tuple[Tensor | None, Tensor | None],
        node: Node,
        round_: _Round,
    ) -> Callable[[], None]:
        current, index = visit.current, round_.schedule.graph.visit_of[node[1]]

        def forward() -> None:
            assert current is not None
            if current.x_TD is None:
                self.stage.enter(current, arrived[0])
            self.stage.forward(current, operation.parts)

        def loss() -> None:
            assert current is not None
            self.stage.loss(current)
            assert current.loss_S is not None
            if self.backbone.place.part == 0:
                self.report(Losses(node[0], index, current.loss_S.tolist()))

        def backward() -> None:
            assert current is not None
            if arrived[0] is not None:
                current.dx_TD = arrived[0]
            if arrived[1] is not None:
                visit.squares_S = arrived[1]
            self.stage.backward(current, operation.parts)
            if operation.is_last:
                current.adapters.commit()
                if visit.input.closing:
                    self._sum_squares(visit)

        def optimize() -> None:
            squares_S = visit.squares_S if arrived[1] is None else arrived[1]
            assert squares_S is not None
            self._optimize(visit, squares_S, node[0], index)

        return {
            Action.FORWARD: forward,
            Action.LOSS: loss,
            Action.BACKWARD: backward,
            Action.OPTIMIZE: optimize,
        }[operation.action]

    def _timed(self, work: Callable[[], None], round_: _Round, op: int) -> Callable[[], None]:
        if self.log is None:
            return work
        return self.log.timed(work, round_.schedule, round_.input.number, op)

    def _sum_squares(self, visit: _Visit) -> None:
        """Of this stage and those after it."""
        own_S = self.optimizer.squares(self.pools[visit.input.htask], visit.input.closing)
        visit.squares_S = own_S if visit.squares_S is None else own_S + visit.squares_S

    def _optimize(self, visit: _Visit, squares_S: Tensor, number: int, index: int) -> None:
        pool = self.pools[visit.input.htask]
        norms = self.optimizer.step(pool, visit.input.closing, squares_S)
        place = self.backbone.place
        if place.rank == 0:
            self.report(Norms(number, index, norms))
        if visit.input.snapshots:
            shares = {name: self.shares(name) for name in visit.input.snapshots}
            self.report(Snapshots(number, index, place.rank, shares))

    def shares(self, task_id: str, weights_only: bool = False) -> dict[Any, Share]:
        """What this rank contributes to a task's whole state; replicas hold the same."""
        state = self.states.get(task_id)
        if state is None or self.backbone.place.replica:
            return {}
        return shares_of(state, self.backbone, weights_only)


def nodes_of(sequence: Sequence[tuple[int, int]], number: int, rounds: range) -> list[Node]:
    """What a stream runs in its pass ``number``: see ``orchestration.player``."""
    return [(number - offset, op) for op, offset in sequence if number - offset in rounds]


def on_device(tensors: PassTensors, device: torch.device) -> PassTensors:
    if device.type == "cpu":
        return tensors
    return _moved(tensors, device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple):
        parts = [_moved(item, device) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
