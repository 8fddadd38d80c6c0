"""Lower bounds of a round, and where the time of a played schedule went.

Bounds on the time of a steady round:
- the busiest stream;
- the critical path: an hTask's micro-batches follow one another, if every one closes a step;
- memory (not part of the trivial bound): a stage holds each micro-batch at least from its forward
  to its backward, so by Little's law sum of units x residence <= capacity x round time.

Idle time of the compute streams, averaged over stages, splits without remainder into fill and
drain (what the whole run takes beyond its steady rounds), imbalance (stages that have less to do
than the busiest) and stalls (the steady round takes longer than the busiest stage's work).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from muxtune.planning.orchestration.contention import Contention
from muxtune.planning.orchestration.player import Timeline
from muxtune.planning.orchestration.problem import STREAM_NAMES, RoundGraph
from muxtune.types import SubgraphKind


class RoundBounds(NamedTuple):
    """No round can be shorter, in ns."""

    busiest_stream_ns: int
    critical_path_ns: int
    memory_ns: float

    @property
    def trivial_ns(self) -> int:
        """The larger of busiest stream and critical path."""
        return max(self.busiest_stream_ns, self.critical_path_ns)


def round_bounds(graph: RoundGraph) -> RoundBounds:
    """Bounds of a steady round."""
    return RoundBounds(
        max(stream_work_ns(graph)), _critical_path_ns(graph), _memory_bound_ns(graph)
    )


def stream_work_ns(graph: RoundGraph) -> list[int]:
    """Work of a round by stream; a step's own work is charged once a step."""
    work = [0.0] * graph.num_streams
    for op, duration in enumerate(graph.duration_ns):
        htask = graph.visits[graph.visit_of[op]].htask
        once = graph.subgraphs[op].index in graph.structures[htask].step_only
        work[graph.stream_of[op]] += duration / (graph.steps[htask] if once else 1)
    return [round(value) for value in work]


def _critical_path_ns(graph: RoundGraph) -> int:
    """The longest chain of dependencies that one round adds to the next, over the hTasks."""
    paths = [
        len(visits) * _cycle_ns(graph, htask) // graph.steps[htask]
        for htask, visits in enumerate(graph.visits_of)
        if visits
    ]
    return max(paths, default=0)


def _cycle_ns(graph: RoundGraph, htask: int) -> int:
    """Longest chain from an entry into a stage to the end of the step there."""
    parts = graph.structures[htask]
    longest = 0
    for stage in range(graph.num_stages):
        reach = _reach_ns(graph, htask, parts.entries[stage])
        longest = max([longest, *(reach[end] for end in parts.step_ends[stage])])
    return longest


def _reach_ns(graph: RoundGraph, htask: int, sources: Sequence[int]) -> list[int]:
    """Longest chain from any of ``sources`` to the end of each subgraph; -1: not reached."""
    parts, durations = graph.structures[htask], graph.problem.durations_ns[htask]
    reach = [-1] * len(durations)
    for source in sources:
        reach[source] = durations[source]
    for index in sorted(range(len(durations)), key=parts.ranks.__getitem__):
        if reach[index] >= 0:
            for after in parts.successors[index]:
                reach[after] = max(reach[after], reach[index] + durations[after])
    return reach


def _memory_bound_ns(graph: RoundGraph) -> float:
    bound = 0.0
    for stage, capacity in enumerate(graph.problem.capacity_units):
        held = 0
        for visit, item in enumerate(graph.visits):
            hold = graph.structures[item.htask].holds[stage]
            if hold is not None:
                residence = _reach_ns(graph, item.htask, hold[:1])[hold[1]]
                held += graph.units(visit, stage) * residence
        bound = max(bound, held / capacity)
    return bound


def contended_bound_ns(graph: RoundGraph, contention: Contention) -> float:
    """The busiest stage under contention.

    With o the time in which both streams run, compute C and communication M take
    C + M + o (1 - 1/a - 1/b) if nothing idles, and o is at most min(a C, b M).
    """
    slow_compute, slow_comm = contention
    gain = 1.0 - 1.0 / slow_compute - 1.0 / slow_comm
    work = stream_work_ns(graph)
    return max(
        compute + comm + min(0.0, gain * min(slow_compute * compute, slow_comm * comm))
        for compute, comm in zip(work[::2], work[1::2], strict=True)
    )


class BubbleAccount(NamedTuple):
    """Shares of the compute streams' time, averaged over stages: ``busy`` and the three kinds of
    idle time add up to 1. ``steady_bubble``: idle share of the busiest stage in a steady round."""

    period_ns: float
    makespan_ns: int
    busy: float
    fill_drain: float
    imbalance: float
    stalls: float
    steady_bubble: float

    @property
    def idle(self) -> float:
        return self.fill_drain + self.imbalance + self.stalls


def bubble_account(timeline: Timeline) -> BubbleAccount:
    """Of a played schedule; see the module's docstring."""
    graph, makespan, period = timeline.graph, timeline.makespan_ns, timeline.period_ns
    work = compute_work_ns(timeline)
    rounds, total = timeline.rounds, max(makespan, 1)
    busiest, mean = max(work) / rounds, sum(work) / len(work) / rounds
    return BubbleAccount(
        period_ns=period,
        makespan_ns=makespan,
        busy=rounds * mean / total,
        fill_drain=(makespan - rounds * period) / total,
        imbalance=rounds * (busiest - mean) / total,
        stalls=rounds * (period - busiest) / total,
        steady_bubble=1.0 - busiest / period if period and graph.num_ops else 0.0,
    )


def compute_work_ns(timeline: Timeline) -> list[int]:
    """Time that each stage's compute stream is occupied in the whole timeline."""
    occupied = _occupied_ns(timeline)
    return occupied[::2]


def _occupied_ns(timeline: Timeline) -> list[int]:
    spent = (timeline.end_ns - timeline.start_ns).sum(axis=0)
    occupied = [0] * timeline.graph.num_streams
    for op, stream in enumerate(timeline.graph.stream_of):
        occupied[stream] += int(spent[op])
    return occupied


def utilisation(timeline: Timeline) -> dict[str, float]:
    """Occupied share of each stream over the whole timeline, by "stage 0 compute"."""
    total = max(timeline.makespan_ns, 1)
    return {
        f"stage {stream // 2} {STREAM_NAMES[stream % 2]}": spent / total
        for stream, spent in enumerate(_occupied_ns(timeline))
    }


def bound_ratio(timeline: Timeline) -> float:
    """Length of the whole timeline over the trivial bound of as many rounds, fill included."""
    bound = timeline.rounds * round_bounds(timeline.graph).trivial_ns
    return timeline.makespan_ns / max(bound, 1)


def communication_shares(timeline: Timeline) -> tuple[float, float]:
    """(exposed, overlapped) shares of the makespan, averaged over stages. A transfer counts on
    its sender and on its receiver."""
    stages = range(timeline.graph.num_stages)
    total = max(timeline.makespan_ns, 1) * len(stages)
    exposed = overlapped = 0
    for stage in stages:
        computing = _union(_intervals(timeline, _compute_ops(timeline.graph, stage)))
        communicating = _union(_intervals(timeline, _comm_ops(timeline.graph, stage)))
        both = _overlap_ns(computing, communicating)
        overlapped += both
        exposed += int((communicating[:, 1] - communicating[:, 0]).sum()) - both
    return exposed / total, overlapped / total


def _compute_ops(graph: RoundGraph, stage: int) -> list[int]:
    return [op for op, stream in enumerate(graph.stream_of) if stream == 2 * stage]


def _comm_ops(graph: RoundGraph, stage: int) -> list[int]:
    sent = [op for op, stream in enumerate(graph.stream_of) if stream == 2 * stage + 1]
    received = [
        op
        for op, item in enumerate(graph.subgraphs)
        if item.kind is SubgraphKind.P2P
        and item.stage != stage
        and any(graph.stage_of[after] == stage for after in graph.successors[op])
    ]
    return sent + received


def _intervals(timeline: Timeline, ops: Sequence[int]) -> np.ndarray:
    """[intervals, 2] by start."""
    starts, ends = timeline.start_ns[:, ops].ravel(), timeline.end_ns[:, ops].ravel()
    order = starts.argsort(kind="stable")
    return np.stack([starts[order], ends[order]], axis=1)


def _union(intervals: np.ndarray) -> np.ndarray:
    """Disjoint intervals that cover the same time."""
    if not len(intervals):
        return intervals
    reach = np.maximum.accumulate(intervals[:, 1])
    first = np.concatenate([[True], intervals[1:, 0] > reach[:-1]])
    last = np.concatenate([first[1:], [True]])
    return np.stack([intervals[first, 0], reach[last]], axis=1)


def _overlap_ns(left: np.ndarray, right: np.ndarray) -> int:
    """Time covered by both of two disjoint covers: at each start in one, count the other."""

    def covered_before(cover: np.ndarray, times: np.ndarray) -> np.ndarray:
        lengths = cover[:, 1] - cover[:, 0]
        cumulative = np.concatenate([[0], np.cumsum(lengths)])
        index = np.searchsorted(cover[:, 0], times, side="right")
        inside = np.where(index > 0, cover[np.maximum(index - 1, 0), 1] - times, 0)
        return cumulative[index] - np.maximum(inside, 0)

    if not len(left) or not len(right):
        return 0
    return int((covered_before(left, right[:, 1]) - covered_before(left, right[:, 0])).sum())
