"""What a rank's operations were and when they ran, for the trace of a run.

Of a captured operation on a GPU the device tells, by events around it, when it ran; of any other
the times are those of the host: of an eager one on a GPU, when it was launched. Nothing waits for a
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


class _OnDevice(NamedTuple):
    """An operation between two events of a GPU, the operation ``op`` of round ``number``."""

    schedule: Schedule
    number: int
    op: int
    start: Any
    stop: Any


class SpanLog:
    """Collects a rank's spans, from any of its threads, until they are taken. ``ahead_ns``: of
    this rank's clock before rank 0's; see ``clock_ahead_ns``."""

    def __init__(self, place: Place, ahead_ns: int) -> None:
        self.place, self.ahead_ns = place, ahead_ns
        self._spans: deque[Span] = deque()
        self._on_device: deque[_OnDevice] = deque()
        self._origin: tuple[Any, int] = (None, 0)
        self._task_ids: list[tuple[str, ...]] = []
        self._num_noted, self._is_cut = 0, False

    def begin_plan(self, plan: Plan) -> None:
        """Nothing of another plan is under way."""
        self._task_ids = [tuple(sorted(htask.quota)) for htask in plan.htasks]
        self._on_device.clear()
        self._num_noted, self._is_cut = 0, False

    def begin_device(self, origin: Any, at_ns: int) -> None:
        """``origin``: an event that the device has just reached, at ``at_ns`` of this clock."""
        self._origin = origin, at_ns

    def takes_another(self) -> bool:
        """Not too much of a plan: traces of long runs must stay readable."""
        self._is_cut |= self._num_noted >= MOST_SPANS
        self._num_noted += not self._is_cut
        return not self._is_cut

    def timed(
        self, work: Callable[[], Any], schedule: Schedule, number: int, op: int
    ) -> Callable[[], Any]:
        """``work``, the operation ``op`` of round ``number``, which is noted when it has run."""
        if not self.takes_another():
            return work

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

    def note_events(self, schedule: Schedule, number: int, op: int, start: Any, stop: Any) -> None:
        """Of an operation that has been put on a stream between these."""
        self._on_device.append(_OnDevice(schedule, number, op, start, stop))

    def taken(self, is_last: bool) -> Spans:
        """All that is there."""
        while self._on_device and _is_over(self._on_device[0]):
            self._spans.append(self._timed_by_device(self._on_device.popleft()))
        spans = tuple(self._spans.popleft() for _ in range(len(self._spans)))
        return Spans(spans, is_last, self._is_cut)

    def _timed_by_device(self, item: _OnDevice) -> Span:
        origin, origin_ns = self._origin
        start_ns, stop_ns = (
            origin_ns + round(1e6 * origin.elapsed_time(event)) for event in (item.start, item.stop)
        )
        return self._span(item.schedule, item.number, item.op, start_ns, stop_ns)


def _is_over(item: _OnDevice) -> bool:
    return item.start.query() and item.stop.query()


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
