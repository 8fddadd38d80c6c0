"""Iteration-level simulation: every subgraph of a plan on every stage's streams.

The finer of the simulator's two magnifications. The order is played by the core's player
(``muxtune.planning.orchestration``), so that what the planner predicts and what is simulated
differ in nothing but the two cost models; here contention between overlapped compute and
communication is on, and the outcome is turned into what people ask: round time, where the idle
time comes from, how much communication is exposed, how busy each stream is, and spans for a
Gantt chart and a trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from muxtune.planning.orchestration import (
    NO_CONTENTION,
    BubbleAccount,
    Contention,
    RoundBounds,
    RoundGraph,
    ScheduleSpan,
    Timeline,
    bubble_account,
    checked_sequences,
    play_contended,
    round_bounds,
    round_problem,
    schedule_spans,
    utilisation,
)
from muxtune.types import NS_PER_S, Plan, SubgraphKind, SubgraphTimes


class IterationOptions(NamedTuple):
    """``activation_units`` and ``capacity_units``: see ``RoundProblem``; an order that holds more
    in flight than a stage has is refused. Empty: not checked."""

    rounds: int = 10
    contention: Contention = NO_CONTENTION
    activation_units: tuple[tuple[int, ...], ...] = ()
    capacity_units: tuple[int, ...] = ()


class IterationReport(NamedTuple):
    """One replica's rounds.

    ``round_time_s``: steady, without fill and drain. ``exposed_comm``: share of the time in which
    a stage communicates and does not compute, averaged over stages. ``overlapped_comm``: the
    share in which it does both. ``utilisation``: by "stage 0 compute".
    """

    timeline: Timeline
    bounds: RoundBounds
    bubbles: BubbleAccount
    exposed_comm: float
    overlapped_comm: float
    utilisation: Mapping[str, float]

    @property
    def round_time_s(self) -> float:
        return self.bubbles.period_ns / NS_PER_S

    @property
    def bound_ratio(self) -> float:
        """Whole timeline, fill and drain included, over as many trivial bounds of a round."""
        rounds = self.timeline.rounds
        return self.timeline.makespan_ns / max(rounds * self.bounds.trivial_ns, 1)

    def spans(self, names: Sequence[str] = ()) -> Iterator[ScheduleSpan]:
        """For ``muxtune.report.gantt``."""
        return schedule_spans(self.timeline, names)


_DEFAULTS = IterationOptions()


def simulate_iteration(
    plan: Plan,
    times: SubgraphTimes,
    options: IterationOptions = _DEFAULTS,
    replica: int = 0,
) -> IterationReport:
    """Plays ``plan.order`` of one replica with ``times`` of that replica's shape.

    Raises ConfigError for a plan without an order, an order that is not valid, and times that are
    negative or not finite.
    """
    problem = round_problem(plan, times, replica)._replace(
        activation_units=options.activation_units, capacity_units=options.capacity_units
    )
    graph = RoundGraph(problem)
    sequences = checked_sequences(graph, plan.order, replica)
    return report_of(play_contended(graph, sequences, options.rounds, options.contention))


def report_of(timeline: Timeline) -> IterationReport:
    """Of any timeline, also a baseline's."""
    exposed, overlapped = communication_shares(timeline)
    return IterationReport(
        timeline,
        round_bounds(timeline.graph),
        bubble_account(timeline),
        exposed,
        overlapped,
        utilisation(timeline),
    )


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
