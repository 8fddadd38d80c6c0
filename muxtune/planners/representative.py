"""A representative round of a plan that carries no order, played subgraph by subgraph.

Turns without a count run until each task has taken a step, so that the number of micro-batches
varies from round to round, and no order can name them. For people to look at, a round with the
mean numbers is played: interleaved as soon as memory and dependencies allow, where the plan
interleaves, else one turn after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from muxtune.planners.played import Player
from muxtune.planning.orchestration import (
    Contention,
    ScheduleSpan,
    TemplateOptions,
    Timeline,
    schedule_spans,
    utilisation,
)
from muxtune.protocols import CostModel
from muxtune.types import Plan

SEARCH = TemplateOptions(evaluations=8, node_budget=15_000)
MOST_MICRO_BATCHES = 32  # of a round that people can read
ROUNDS = 4


class Representative(NamedTuple):
    """``counts``: micro-batches of each hTask in the round that is played. ``parts``: timelines one
    after the other, each with what it begins at."""

    counts: tuple[int, ...]
    parts: tuple[tuple[int, Timeline], ...]
    period_ns: float

    def utilisation(self) -> dict[str, float]:
        """Occupied share of each stream, by "stage 0 compute"; see ``utilisation``."""
        whole_ns = sum(timeline.makespan_ns for _, timeline in self.parts)
        shares: dict[str, float] = {}
        for _, timeline in self.parts:
            for stream, share in utilisation(timeline).items():
                shares[stream] = shares.get(stream, 0.0) + share * timeline.makespan_ns / whole_ns
        return shares

    def spans(self, names: Sequence[str] = ()) -> Iterator[ScheduleSpan]:
        for begin_ns, timeline in self.parts:
            for span in schedule_spans(timeline, names):
                yield span._replace(start_ns=span.start_ns + begin_ns)


def representative(
    plan: Plan, model: CostModel, passes: Sequence[float], pass_times_s: Sequence[float]
) -> Representative:
    """On the plan's first replica. ``passes`` and ``pass_times_s``: of each hTask, micro-batches a
    round and their mean time; where they are more than people can read, all are thinned alike."""
    scale = min(1.0, MOST_MICRO_BATCHES / max(1.0, sum(passes)))
    counts = tuple([max(1, round(scale * n)) for n in passes])
    replica = plan.replicas[0]
    contention = Contention(*model.subgraph_times_s(plan).contention)
    player = Player(model, replica, SEARCH, contention)
    pieces = [
        player.piece(htask, seconds or model.pass_coefficients(htask.shapes[-1], replica).base_s, n)
        for htask, seconds, n in zip(plan.htasks, pass_times_s, passes, strict=True)
    ]
    counted = {turn.htask for turn in plan.round if turn.count}
    closing = tuple([1 if at in counted else n for at, n in enumerate(counts)])
    if plan.interleaves and replica.pp > 1:
        timeline = player.timeline(pieces, counts, closing, ROUNDS)
        return Representative(counts, ((0, timeline),), timeline.period_ns)
    turns = [
        player.timeline(pieces, [n if i == at else 0 for i, n in enumerate(counts)], closing, 1)
        for at in range(len(counts))
    ]
    parts, begin_ns = [], 0
    for timeline in turns * ROUNDS:
        parts.append((begin_ns, timeline))
        begin_ns += timeline.makespan_ns
    return Representative(counts, tuple(parts), begin_ns / ROUNDS)
