"""Played schedules as spans for people: what ran where, when, for which hTask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from muxtune.planning.orchestration.player import Timeline
from muxtune.planning.orchestration.problem import STREAM_NAMES
from muxtune.types import SubgraphKind


class ScheduleSpan(NamedTuple):
    """One subgraph's run; a real executor may make the same of its traces."""

    stage: int
    stream: str  # compute | comm
    htask: int
    htask_name: str
    label: str
    kind: SubgraphKind
    backward: bool
    round: int
    micro_batch: int  # of its hTask in the round
    start_ns: int
    duration_ns: int


def schedule_spans(timeline: Timeline, names: Sequence[str] = ()) -> Iterator[ScheduleSpan]:
    """In order of start; what takes no time is left out. ``names``: of the hTasks."""
    graph = timeline.graph
    starts = timeline.start_ns.ravel()
    ends = timeline.end_ns.ravel()
    for node in starts.argsort(kind="stable").tolist():
        at_round, op = divmod(node, graph.num_ops)
        if ends[node] == starts[node]:
            continue
        visit, item = graph.visits[graph.visit_of[op]], graph.subgraphs[op]
        yield ScheduleSpan(
            stage=item.stage,
            stream=STREAM_NAMES[graph.stream_of[op] % 2],
            htask=visit.htask,
            htask_name=str(names[visit.htask]) if names else f"hTask {visit.htask}",
            label=item.label,
            kind=item.kind,
            backward=item.backward,
            round=at_round,
            micro_batch=visit.ordinal,
            start_ns=int(starts[node]),
            duration_ns=int(ends[node] - starts[node]),
        )
