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
    communication_shares,
    play_contended,
    round_bounds,
    round_problem,
    schedule_spans,
    utilisation,
)
from muxtune.types import NS_PER_S, Plan, SubgraphTimes


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
