"""What a rank's operations were and when they ran, for the trace of a run.

Times are those of the host: of an operation on a GPU, when it was launched. Nothing waits for a
device here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from muxtune.planning.orchestration.problem import STREAM_NAMES
from muxtune.runtime.distributed.layout import Place
from muxtune.runtime.distributed.schedule import Schedule
from muxtune.types import Plan

MOST_SPANS = 20_000  # of one rank under one plan: some 5 MB of the trace
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Span(NamedTuple):
    """An operation's run. ``round``: since the plan began; ``micro_batch``: of its hTask in the
    round. Times in ns of rank 0's monotonic clock."""

    rank: int
    stage: int
    stream: str  # compute | comm
    htask: int
    task_ids: tuple[str, ...]
    label: str
    kind: str
    backward: bool
    round: int
    micro_batch: int
    start_ns: int
    stop_ns: int


class Spans(NamedTuple):
    """A rank's report of operations that are over. ``is_last``: of a flush, one a rank.
    ``is_cut``: what comes later under this plan is left out."""

    spans: tuple[Span, ...]
    is_last: bool
    is_cut: bool


class HostClock(NamedTuple):
    """A reading of a rank's monotonic clock. Hosts with one ``host`` share the clock."""

    host: str
    now_ns: int


class SpanLog:
    """Collects a rank's spans, from any of its threads, until they are taken. ``ahead_ns``: of
    this rank's clock before rank 0's; see ``clock_ahead_ns``."""

    def __init__(self, place: Place, ahead_ns: int) -> None:
        self.place, self.ahead_ns = place, ahead_ns
        self._spans: deque[Span] = deque()
        self._task_ids: list[tuple[str, ...]] = []
        self._num_taken = 0

    def begin_plan(self, plan: Plan) -> None:
        self._task_ids = [tuple(sorted(htask.quota)) for htask in plan.htasks]
        self._num_taken = 0

    def timed(
        self, work: Callable[[], Any], schedule: Schedule, number: int, op: int
    ) -> Callable[[], Any]:
        """``work``, the operation ``op`` of round ``number``, which is noted when it has run."""

        def run() -> Any:
            start_ns = time.monotonic_ns()
            result = work()
            self._spans.append(self._span(schedule, number, op, start_ns, time.monotonic_ns()))
            return result

        return run

    def _span(self, schedule: Schedule, number: int, op: int, start_ns: int, stop_ns: int) -> Span:
        graph = schedule.graph
        visit, item = graph.visits[graph.visit_of[op]], graph.subgraphs[op]
        return Span(
            self.place.rank,
            self.place.stage,
            STREAM_NAMES[graph.stream_of[op] % 2],
            visit.htask,
            self._task_ids[visit.htask],
            item.label,
            str(item.kind),
            item.backward,
            number,
            visit.ordinal,
            start_ns - self.ahead_ns,
            stop_ns - self.ahead_ns,
        )

    def taken(self, is_last: bool) -> Spans:
        """All that is there, and not too much of a plan: traces of long runs must stay readable."""
        spans = [self._spans.popleft() for _ in range(len(self._spans))]
        kept = spans[: max(0, MOST_SPANS - self._num_taken)]
        self._num_taken += len(spans)
        return Spans(tuple(kept), is_last, self._num_taken > MOST_SPANS)


def span_log(place: Place, world_size: int) -> SpanLog:
    """Made by all ranks together."""
    readings: list[Any] = [None] * world_size
    dist.barrier()
    host = _BOOT_ID.read_text() if _BOOT_ID.exists() else "one"
    dist.all_gather_object(readings, HostClock(host, time.monotonic_ns()))
    return SpanLog(place, clock_ahead_ns(readings, place.rank))


def clock_ahead_ns(readings: Sequence[HostClock], rank: int) -> int:
    """How far a rank's clock is ahead of rank 0's, by ``readings`` that all ranks took as they left
    a barrier: to about the time of a message between hosts, and exactly 0 on one host."""
    own, first = readings[rank], readings[0]
    return 0 if own.host == first.host else own.now_ns - first.now_ns


__all__ = ["MOST_SPANS", "HostClock", "Span", "SpanLog", "Spans", "clock_ahead_ns", "span_log"]
