"""Schedules to compare with, on the same problem and the same player.

- ``one_f_one_b``: 1F1B with a flush after each optimizer step (PipeDream-Flush, Narayanan et al.
  2021), one hTask after the other, as one instance trains one task at a time. Idle for S - 1 of
  M + S - 1 micro-batch times. With a single hTask that holds all tasks it is the all-spatial
  1F1B.
- ``lorapp``: mLoRA's interleaving of different adapters' micro-batches (Ye et al., VLDB 2025):
  decided as it goes, backward before forward on every worker, tasks in FIFO order, one
  micro-batch of a task in flight. Its program always asks the first task that is free, so late
  tasks wait for early ones to finish; here tasks take turns, which is kinder to it. It has no
  memory limit but the number of tasks in flight. With K tasks of equal micro-batches on S stages
  a steady round is idle for 1 - K/S where K < S and not at all otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

from muxtune.planning.orchestration.dispatch import BACKWARD_FIRST, DispatchOptions, dispatch
from muxtune.planning.orchestration.player import StreamSequence, Timeline, play_sequences
from muxtune.planning.orchestration.problem import RoundGraph, RoundProblem
from muxtune.planning.orchestration.template import order_of
from muxtune.types import RankStream, SubgraphKind, SubgraphRef


def one_f_one_b(
    problem: RoundProblem, replica: int = 0
) -> dict[RankStream, tuple[SubgraphRef, ...]]:
    """Each hTask's micro-batches of the round as one optimizer step in 1F1B, hTask by hTask.

    Give ``micro_batches_per_step`` equal to each hTask's count, else the order deadlocks, because
    1F1B starts a micro-batch before its predecessor's optimizer.
    """
    graph = RoundGraph(problem)
    return order_of(graph, one_f_one_b_sequences(graph), replica)


def one_f_one_b_sequences(graph: RoundGraph) -> list[StreamSequence]:
    compute = [_one_f_one_b_stage(graph, stage) for stage in range(graph.num_stages)]
    sequences: list[StreamSequence] = []
    for row in compute:
        sequences += [[(op, 0) for op in row], []]
    return with_comm_order(graph, sequences)


def with_comm_order(graph: RoundGraph, sequences: Sequence[StreamSequence]) -> list[StreamSequence]:
    """Compute sequences without round offsets, completed: transfers run as they become ready."""
    start_ns = play_sequences(graph, sequences, 1).start_ns[0]
    filled = list(sequences)
    for stream in range(1, graph.num_streams, 2):
        ops = [op for op, at in enumerate(graph.stream_of) if at == stream]
        ranks = {op: _rank(graph, op) for op in ops}
        filled[stream] = [(op, 0) for op in sorted(ops, key=lambda o: (start_ns[o], ranks[o], o))]
    return filled


def _rank(graph: RoundGraph, op: int) -> int:
    htask = graph.visits[graph.visit_of[op]].htask
    return graph.structures[htask].ranks[graph.subgraphs[op].index]


def _one_f_one_b_stage(graph: RoundGraph, stage: int) -> list[int]:
    row: list[int] = []
    for visits in graph.visits_of:
        forward = [_block(graph, visit, stage, False) for visit in visits]
        backward = [_block(graph, visit, stage, True) for visit in visits]
        ahead = min(len(visits), graph.num_stages - stage)
        blocks = forward[:ahead]
        for done, block in enumerate(backward):
            blocks.append(block)
            blocks.extend(forward[ahead + done : ahead + done + 1])
        steps = [op for visit in visits for op in _optimizers(graph, visit, stage)]
        row += [op for block in blocks for op in block] + steps
    return row


def _block(graph: RoundGraph, visit: int, stage: int, backward: bool) -> list[int]:
    """Compute of one direction of a visit on a stage, in running order."""
    kinds = (SubgraphKind.COMPUTE, SubgraphKind.ADAPTER)
    return _ops(graph, visit, stage, backward, kinds)


def _optimizers(graph: RoundGraph, visit: int, stage: int) -> list[int]:
    return _ops(graph, visit, stage, True, (SubgraphKind.OPTIMIZER,))


def _ops(
    graph: RoundGraph, visit: int, stage: int, backward: bool, kinds: tuple[SubgraphKind, ...]
) -> list[int]:
    items = graph.problem.graphs[graph.visits[visit].htask]
    chosen = [
        graph.first_op[visit] + item.index
        for item in items
        if item.stage == stage and item.backward is backward and item.kind in kinds
    ]
    return sorted(chosen, key=lambda op: _rank(graph, op))


def lorapp(problem: RoundProblem, rounds: int, concurrency: int = 0) -> Timeline:
    """``concurrency``: tasks in flight at most; 0: all of them."""
    if concurrency:
        problem = problem.with_in_flight_limit([concurrency] * problem.num_stages)
    else:
        problem = problem._replace(activation_units=(), capacity_units=())
    graph = RoundGraph(problem)
    by_turns = sorted(
        range(len(graph.visits)), key=lambda index: (graph.visits[index].ordinal, index)
    )
    return dispatch(graph, DispatchOptions(tuple(by_turns), BACKWARD_FIRST), rounds)
