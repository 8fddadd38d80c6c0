"""A round's subgraphs as work of one rank: what runs on which stream, and what waits for what.

The semantics are the player's (``muxtune.planning.orchestration.player``): in its pass number k a
stream runs of each reference the micro-batch of round k - round_offset; transfers are run by the
sender, and a receiver posts receives in the sender's order.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from muxtune.cost.shapes import ModelShape
from muxtune.cost.subgraphs import StageSeconds, SubgraphOptions, pass_subgraphs
from muxtune.errors import ConfigError
from muxtune.planning.orchestration.dispatch import DispatchOptions, dispatch
from muxtune.planning.orchestration.player import (
    StreamSequence,
    checked_sequences,
    node_dependencies,
    play_sequences,
)
from muxtune.planning.orchestration.problem import RoundGraph, RoundProblem
from muxtune.runtime.distributed.layout import layers_of
from muxtune.types import (
    HTaskTurn,
    MicroBatch,
    Plan,
    ReplicaShape,
    ShapeKey,
    Subgraph,
    SubgraphKind,
)

ATTENTION, MLP = "attention", "mlp"


class Action(enum.Enum):
    FORWARD = enum.auto()
    BACKWARD = enum.auto()
    LOSS = enum.auto()
    REDUCE = enum.auto()  # over the ranks of a stage
    SEND_ACTIVATIONS = enum.auto()
    SEND_GRADIENTS = enum.auto()
    SEND_NORM = enum.auto()
    OPTIMIZE = enum.auto()


TRANSFERS = (Action.SEND_ACTIVATIONS, Action.SEND_GRADIENTS, Action.SEND_NORM)
STEP_ONLY = (Action.SEND_NORM, Action.OPTIMIZE)
Part = tuple[int, str]  # layer, and which half of it


class Operation(NamedTuple):
    """One subgraph as work. ``parts``: what a computation runs, in order. ``to_stage``: of a
    transfer. ``is_first``, ``is_last``: of the stage's forward and backward computations."""

    action: Action
    stage: int
    backward: bool
    parts: tuple[Part, ...] = ()
    to_stage: int = -1
    is_last: bool = False


class _OneSecond:
    """Every subgraph takes time, so that none is left out of the graph."""

    def stage_seconds(
        self, shape: ShapeKey, replica: ReplicaShape, stage: int, backward: bool
    ) -> StageSeconds:
        is_last = stage == replica.pp - 1
        return StageSeconds(1.0, 0.0, float(replica.tp > 1), float(is_last), float(replica.pp > 1))

    def optimizer_s(self, shape: ShapeKey, replica: ReplicaShape, stage: int) -> float:
        return 1.0

    def message_s(self, num_bytes: int) -> float:
        return 1.0


@lru_cache(maxsize=64)
def subgraphs_of(model: ModelShape, replica: ReplicaShape) -> tuple[Subgraph, ...]:
    """The graph of a pass, which planner and runtime number alike; the same for every shape."""
    graph, _ = pass_subgraphs(model, ShapeKey(1, 1, ()), replica, _OneSecond(), SubgraphOptions())
    return graph


@lru_cache(maxsize=64)
def operations_of(model: ModelShape, replica: ReplicaShape) -> tuple[Operation, ...]:
    """What each subgraph does, by its place in the graph."""
    graph = subgraphs_of(model, replica)
    successors: list[list[int]] = [[] for _ in graph]
    for item in graph:
        for before in item.depends_on:
            successors[before].append(item.index)
    parts = _parts(model, graph, replica)
    last = {
        (item.stage, item.backward): item.index
        for item in graph
        if item.kind is SubgraphKind.COMPUTE and item.index in parts
    }
    return tuple(_operation(item, graph, successors[item.index], parts, last) for item in graph)


def _operation(
    item: Subgraph,
    graph: Sequence[Subgraph],
    successors: Sequence[int],
    parts: dict[int, tuple[Part, ...]],
    last: dict[tuple[int, bool], int],
) -> Operation:
    if item.kind is SubgraphKind.COLLECTIVE:
        return Operation(Action.REDUCE, item.stage, item.backward)
    if item.kind is SubgraphKind.OPTIMIZER:
        return Operation(Action.OPTIMIZE, item.stage, item.backward)
    if item.kind is SubgraphKind.P2P:
        target = next(graph[i].stage for i in successors if graph[i].stage != item.stage)
        return Operation(_transfer(item, target), item.stage, item.backward, to_stage=target)
    if item.index not in parts:
        return Operation(Action.LOSS, item.stage, item.backward)
    action = Action.BACKWARD if item.backward else Action.FORWARD
    is_last = last[item.stage, item.backward] == item.index
    return Operation(action, item.stage, item.backward, parts[item.index], is_last=is_last)


def _transfer(item: Subgraph, target: int) -> Action:
    if not item.backward:
        return Action.SEND_ACTIVATIONS
    return Action.SEND_GRADIENTS if target < item.stage else Action.SEND_NORM


def _parts(
    model: ModelShape, graph: Sequence[Subgraph], replica: ReplicaShape
) -> dict[int, tuple[Part, ...]]:
    """Half layers of each computation but the loss, in the order in which they run."""
    found: dict[int, tuple[Part, ...]] = {}
    for stage in range(replica.pp):
        halves = [(layer, half) for layer in layers_of(model, replica.pp, stage)
                  for half in (ATTENTION, MLP)]  # fmt: skip
        for backward in (False, True):
            items = [i for i in graph if i.stage == stage and i.backward is backward
                     and i.kind is SubgraphKind.COMPUTE and i.label != "loss"]  # fmt: skip
            found.update(_spread(items, halves[::-1] if backward else halves, replica.tp))
    return found


def _spread(
    items: Sequence[Subgraph], halves: Sequence[Part], tp: int
) -> dict[int, tuple[Part, ...]]:
    if tp > 1:
        assert len(items) == len(halves)
        return {item.index: (half,) for item, half in zip(items, halves, strict=True)}
    num_layers, count = len(halves) // 2, len(items)
    # Groups of layers are counted from the first one, also where they run from the last.
    backward = bool(items) and items[0].backward
    found = {}
    for group, item in enumerate(reversed(items) if backward else items):
        start, stop = num_layers * group // count, num_layers * (group + 1) // count
        chosen = (halves[::-1] if backward else halves)[2 * start : 2 * stop]
        found[item.index] = tuple(chosen[::-1] if backward else chosen)
    return found


# ------------------------------------------------------------------------------------ rounds


class Schedule(NamedTuple):
    """An order of one replica that is known to be valid. ``sequences``: by stream number.
    ``deepest``: largest round_offset. ``ahead``: by stage, how many further passes the streams
    must know so that computing can finish a pass."""

    graph: RoundGraph
    operations: tuple[Operation, ...]
    sequences: tuple[StreamSequence, ...]
    deepest: int = 0
    ahead: tuple[int, ...] = ()

    def operation(self, op: int) -> Operation:
        return self.operations[self.graph.subgraphs[op].index]


def plan_schedule(plan: Plan, model: ModelShape, replica: int) -> Schedule | None:
    """The plan's order; None where it has none, so that micro-batches follow one another.

    Raises ConfigError for an order that is not valid: it would wait for itself.
    """
    if not any(key.replica == replica for key in plan.order):
        return None
    shape = plan.replicas[replica]
    problem = _problem(plan.round, len(plan.htasks), model, shape)
    graph = RoundGraph(problem)
    sequences = [_from_zero(s) for s in checked_sequences(graph, plan.order, replica)]
    deepest = max((offset for sequence in sequences for _, offset in sequence), default=0)
    play_sequences(graph, sequences, deepest + 2)  # finds deadlocks
    ahead = _lookahead(graph, sequences, deepest)
    return Schedule(graph, operations_of(model, shape), tuple(sequences), deepest, ahead)


@lru_cache(maxsize=256)
def sequential_schedule(
    htasks: tuple[int, ...], num_htasks: int, model: ModelShape, shape: ReplicaShape
) -> Schedule:
    """One micro-batch after another."""
    turns = tuple(HTaskTurn(htask, 1) for htask in htasks)
    graph = RoundGraph(_problem(turns, num_htasks, model, shape))
    sequences: list[list[tuple[int, int]]] = [[] for _ in range(graph.num_streams)]
    for op, stream in enumerate(graph.stream_of):
        sequences[stream].append((op, 0))
    return Schedule(graph, operations_of(model, shape), tuple(sequences))


class Unordered(NamedTuple):
    """A round of a plan without an order. ``htasks``: of its micro-batches in turn; ``per_step``:
    by hTask, how many of them make a step, the last of which closes it. ``interleaves``: see
    ``Plan``."""

    htasks: tuple[int, ...]
    per_step: tuple[int, ...]
    interleaves: bool


@lru_cache(maxsize=256)
def overlapped_schedule(round_: Unordered, model: ModelShape, shape: ReplicaShape) -> Schedule:
    """Micro-batches enter as soon as they may (see ``orchestration.pace``), as many of them as the
    memory of a plan is counted for: stage s of S has up to S - s in flight. A round begins on a
    stage when the one before has left it.
    """
    if shape.pp == 1:
        return sequential_schedule(round_.htasks, len(round_.per_step), model, shape)
    graph = _unordered_graph(round_, model, shape)
    sequences: list[list[tuple[int, int]]] = [[] for _ in range(graph.num_streams)]
    first = 0
    for part in [round_.htasks] if round_.interleaves else _turns(round_.htasks):
        own = _unordered_graph(round_._replace(htasks=part), model, shape)
        start_ns = dispatch(own, DispatchOptions(tuple(range(len(part)))), 1).start_ns[0]
        for op in sorted(range(own.num_ops), key=lambda op: (start_ns[op], op)):
            sequences[own.stream_of[op]].append((first + op, 0))
        first += own.num_ops
    return Schedule(graph, operations_of(model, shape), tuple(sequences))


def _unordered_graph(round_: Unordered, model: ModelShape, shape: ReplicaShape) -> RoundGraph:
    """Forward, backward and the rest take 2 : 4 : 1, for want of better."""
    turns = tuple(HTaskTurn(htask, 1) for htask in round_.htasks)
    problem = _problem(turns, len(round_.per_step), model, shape)
    durations = tuple(_rough_duration(item) for item in subgraphs_of(model, shape))
    problem = problem._replace(
        durations_ns=(durations,) * len(round_.per_step), micro_batches_per_step=round_.per_step
    )
    return RoundGraph(problem.with_in_flight_limit([shape.pp - s for s in range(shape.pp)]))


def _turns(htasks: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(turn) for _, turn in itertools.groupby(htasks)]


def _rough_duration(item: Subgraph) -> int:
    if item.kind is not SubgraphKind.COMPUTE or item.label == "loss":
        return 1
    return 4 if item.backward else 2


def _problem(
    turns: tuple[HTaskTurn, ...], num_htasks: int, model: ModelShape, shape: ReplicaShape
) -> RoundProblem:
    graph = subgraphs_of(model, shape)
    ones = (1,) * len(graph)
    return RoundProblem((graph,) * num_htasks, (ones,) * num_htasks, turns, shape.pp, shape.tp)


def _lookahead(
    graph: RoundGraph, sequences: Sequence[StreamSequence], deepest: int
) -> tuple[int, ...]:
    """By stage: let every stream know its passes up to some number, let computing go no further
    than so many passes before it, and see which passes do not get through; hold those back until
    all that is let go gets through."""
    ahead = [0] * graph.num_stages
    last = 3 * (deepest + 1) * len(sequences)
    held = [0] if deepest else []
    while held:
        limits = [last - (0 if stream % 2 else ahead[stream // 2])
                  for stream in range(graph.num_streams)]  # fmt: skip
        held = _held(graph, sequences, last + 1, limits)
        for stage, at in enumerate(held):
            ahead[stage] = max(ahead[stage], last + 1 - at)
        if all(at > limits[2 * stage] for stage, at in enumerate(held)):
            break
    return tuple(ahead)


def _held(
    graph: RoundGraph, sequences: Sequence[StreamSequence], rounds: int, limits: Sequence[int]
) -> list[int]:
    """By stage: the first pass whose computing is not through, when streams run up to a pass."""
    following, waiting = node_dependencies(graph, sequences, rounds)
    pass_of = {
        at * graph.num_ops + op: at + offset
        for sequence in sequences
        for op, offset in sequence
        for at in range(rounds)
    }

    def may(node: int) -> bool:
        return pass_of[node] <= limits[graph.stream_of[node % graph.num_ops]]

    ready = [node for node in pass_of if not waiting[node] and may(node)]
    done = set(ready)
    for node in ready:  # grows while it is read
        op = node % graph.num_ops
        for after in (*(node - op + a for a in graph.successors[op]), *following.extra[node]):
            waiting[after] -= 1
            if not waiting[after] and may(after):
                done.add(after)
                ready.append(after)
    first = [limit + 1 for limit in limits[::2]]
    for node, at in pass_of.items():
        stream = graph.stream_of[node % graph.num_ops]
        if stream % 2 == 0 and node not in done:
            first[stream // 2] = min(first[stream // 2], at)
    return first


def _from_zero(sequence: StreamSequence) -> list[tuple[int, int]]:
    """Passes of one stream counted so that its least offset is 0: it runs the same."""
    least = min((offset for _, offset in sequence), default=0)
    return [(op, offset - least) for op, offset in sequence]


def visits_of(plan: Plan, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch | None]:
    """The round's micro-batches by visit; None where no task contributes to one any more.

    Raises ConfigError for turns without a count, which no order can name.
    """
    waiting = list(micro_batches)
    visits: list[MicroBatch | None] = []
    for turn in plan.round:
        if turn.count is None:
            raise ConfigError("plan.round", "a turn has no count", "an order needs counted turns")
        for _ in range(turn.count):
            fits = bool(waiting) and waiting[0].htask == turn.htask
            visits.append(waiting.pop(0) if fits else None)
    return visits
