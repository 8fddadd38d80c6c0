"""The player of an order: when every subgraph starts and ends, round after round.

What an order says: each stream runs its references in turn, again and again. In its pass number
k it runs of each reference the micro-batch of round ``k - round_offset`` and skips what lies
before the first or after the last round. So offsets overlap rounds without a flush, and the
sequence that a stream runs does not depend on how many rounds there will be.

A subgraph starts when its stream is free, what it depends on has ended and, for the entry into a
stage, the hTask's last closed step has ended there: longest paths in an acyclic graph, found by
relaxing nodes in topological order (Kahn 1962). Transfers between stages are run by the sender's
communication stream; the receiver's side needs no entry in an order (it posts the receives of a
sender in the sender's order).

Planner and simulator play orders by this code, so they agree (docs/architecture.md, rule 7).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from muxtune.errors import ConfigError
from muxtune.planning.orchestration.problem import RoundGraph, RoundProblem, rank_streams
from muxtune.types import RankStream, SubgraphRef

Order = Mapping[RankStream, tuple[SubgraphRef, ...]]
StreamSequence = Sequence[tuple[int, int]]  # (op, round_offset), one pass of a stream


class Timeline(NamedTuple):
    """Start and end of every op of every round, in ns since the first: arrays [rounds, ops]."""

    graph: RoundGraph
    start_ns: np.ndarray
    end_ns: np.ndarray

    @property
    def rounds(self) -> int:
        return self.start_ns.shape[0]

    @property
    def makespan_ns(self) -> int:
        return int(self.end_ns.max(initial=0))

    @property
    def period_ns(self) -> float:
        """Steady time of a round: how fast the second half's starts recur, the slowest of all."""
        if self.rounds < 2:
            return float(self.makespan_ns)
        middle, last = (self.rounds - 1) // 2, self.rounds - 1
        return float((self.start_ns[last] - self.start_ns[middle]).max()) / (last - middle)


def play(order: Order, problem: RoundProblem, rounds: int, replica: int = 0) -> Timeline:
    """Plays ``rounds`` rounds of one replica's order.

    Raises ConfigError for an order that is incomplete, names what does not exist, differs between
    tensor-parallel ranks, holds more in flight than a stage has, or deadlocks.
    """
    graph = RoundGraph(problem)
    return play_sequences(graph, checked_sequences(graph, order, replica), rounds)


def checked_sequences(graph: RoundGraph, order: Order, replica: int = 0) -> list[StreamSequence]:
    """The order by stream number, found valid but for deadlock, which playing finds."""
    streams = range(graph.num_streams)
    sequences: list[StreamSequence] = [
        *(_stream_sequence(graph, order, s, replica) for s in streams)
    ]
    known = {rank for s in streams for rank in rank_streams(graph.problem, s, replica)}
    unknown = [key for key in order if key.replica == replica and key not in known]
    if unknown:
        raise ConfigError(
            "plan.order", f"{tuple(unknown[0])} is no stream of the replica", "remove its order"
        )
    _check_complete(graph, sequences)
    check_memory(graph, sequences)
    return sequences


def _stream_sequence(
    graph: RoundGraph, order: Order, stream: int, replica: int
) -> list[tuple[int, int]]:
    ranks = rank_streams(graph.problem, stream, replica)
    rows = [order.get(rank, ()) for rank in ranks]
    for rank, row in zip(ranks, rows, strict=True):
        if row is not rows[0] and row != rows[0]:
            raise ConfigError(
                f"plan.order[{tuple(rank)}]",
                "differs from the order of tensor-parallel rank 0",
                "ranks of one stage meet in collectives, so give them one order",
            )
    return [_resolve(graph, ref, stream, ranks[0]) for ref in rows[0]]


def _resolve(graph: RoundGraph, ref: SubgraphRef, stream: int, rank: RankStream) -> tuple[int, int]:
    visit = _visit_index(graph, ref)
    op = -1 if visit is None else graph.first_op[visit] + ref.subgraph
    if visit is not None and 0 <= ref.subgraph < len(
        graph.problem.graphs[graph.visits[visit].htask]
    ):
        if graph.stream_of[op] == stream and ref.round_offset >= 0:
            return op, ref.round_offset
        problem = "belongs to another stream or has a negative round_offset"
    else:
        problem = "names no subgraph of the round"
    raise ConfigError(f"plan.order[{tuple(rank)}]", f"{tuple(ref)} {problem}", "correct the order")


def _visit_index(graph: RoundGraph, ref: SubgraphRef) -> int | None:
    turns = graph.problem.turns
    if not 0 <= ref.turn < len(turns) or not 0 <= ref.occurrence < (turns[ref.turn].count or 0):
        return None
    return sum(turn.count or 0 for turn in turns[: ref.turn]) + ref.occurrence


def _check_complete(graph: RoundGraph, sequences: Sequence[StreamSequence]) -> None:
    times = np.zeros(graph.num_ops, dtype=np.int64)
    for sequence in sequences:
        for op, _ in sequence:
            times[op] += 1
    wrong = np.flatnonzero(times != 1)
    if len(wrong):
        op = int(wrong[0])
        raise ConfigError(
            "plan.order",
            f"{tuple(graph.ref(op, 0))[:3]} (turn, occurrence, subgraph) is run {times[op]} times "
            "a round",
            "run every subgraph of a round exactly once",
        )


def check_memory(graph: RoundGraph, sequences: Sequence[StreamSequence]) -> None:
    """Raises ConfigError where a stage holds more in flight than its capacity."""
    for stage, capacity in enumerate(graph.problem.capacity_units):
        peak = peak_units(graph, sequences[2 * stage], stage)
        if peak > capacity:
            raise ConfigError(
                f"plan.order of stage {stage}",
                f"holds {peak} units of activations in flight, the stage has {capacity}",
                "run backward passes earlier, or give the stage more memory",
            )


def peak_units(graph: RoundGraph, sequence: StreamSequence, stage: int) -> int:
    """Most activation units in flight on a stage. The compute stream's order alone decides:
    activations live from a micro-batch's first forward to its last backward compute there."""
    change = _unit_changes(graph, stage)
    rounds = max((offset for _, offset in sequence), default=0) + 2
    held = peak = 0
    for node in pass_nodes(graph.num_ops, sequence, rounds):
        held += change.get(node % graph.num_ops, 0)
        peak = max(peak, held)
    return peak


def _unit_changes(graph: RoundGraph, stage: int) -> dict[int, int]:
    change: dict[int, int] = {}
    for visit, item in enumerate(graph.visits):
        units, parts = graph.units(visit, stage), graph.structures[item.htask]
        hold = parts.holds[stage]
        if hold is not None:
            first, last = graph.ops(visit, hold)
            change[first], change[last] = units, -units
    return change


def pass_nodes(num_ops: int, sequence: StreamSequence, rounds: int) -> list[int]:
    """Nodes in the order in which a stream runs them, over all rounds."""
    deepest = max((offset for _, offset in sequence), default=0)
    return [
        (number - offset) * num_ops + op
        for number in range(rounds + deepest)
        for op, offset in sequence
        if 0 <= number - offset < rounds
    ]


def play_sequences(graph: RoundGraph, sequences: Sequence[StreamSequence], rounds: int) -> Timeline:
    """``play`` for sequences that are known to be complete."""
    if rounds < 1:
        raise ConfigError("rounds", f"is {rounds}", "play at least 1")
    following, waiting = node_dependencies(graph, sequences, rounds)
    durations = graph.node_durations_ns(rounds)
    num = len(durations)
    start, end = [0] * num, [0] * num
    ready = [node for node in range(num) if not waiting[node]]
    extra, num_ops, successors = following.extra, graph.num_ops, graph.successors
    done = 0
    while ready:
        node = ready.pop()
        done += 1
        ends = end[node] = start[node] + durations[node]
        op = node % num_ops
        base = node - op
        for after in successors[op]:
            after += base
            if start[after] < ends:
                start[after] = ends
            waiting[after] -= 1
            if not waiting[after]:
                ready.append(after)
        for after in extra[node]:
            if start[after] < ends:
                start[after] = ends
            waiting[after] -= 1
            if not waiting[after]:
                ready.append(after)
    if done < num:
        raise deadlock(graph, waiting)
    shape = (rounds, graph.num_ops)
    return Timeline(graph, np.array(start).reshape(shape), np.array(end).reshape(shape))


class NodeEdges(NamedTuple):
    """Edges that are not of one micro-batch: stream order and steps, by node."""

    extra: list[list[int]]


def node_dependencies(
    graph: RoundGraph, sequences: Sequence[StreamSequence], rounds: int
) -> tuple[NodeEdges, list[int]]:
    """Edges beyond the subgraphs' own, and how many nodes each node waits for."""
    waiting = graph.num_before * rounds
    extra: list[list[int]] = [[] for _ in waiting]
    for sequence in sequences:
        nodes = pass_nodes(graph.num_ops, sequence, rounds)
        for before, after in pairwise(nodes):
            extra[before].append(after)
            waiting[after] += 1
    for before, after in graph.step_edges(rounds):
        extra[before].append(after)
        waiting[after] += 1
    return NodeEdges(extra), waiting


def deadlock(graph: RoundGraph, waiting: Sequence[int]) -> ConfigError:
    """The error that names a node which never starts; ``waiting``: what each still waits for."""
    node = next(node for node, count in enumerate(waiting) if count)
    at_round, op = divmod(node, graph.num_ops)
    item = graph.subgraphs[op]
    return ConfigError(
        "plan.order",
        f"deadlocks: subgraph {tuple(graph.ref(op, 0))[:3]} ('{item.label}', stage {item.stage}) "
        f"of round {at_round} never starts",
        "streams wait for each other in a circle: order each after what it depends on",
    )
