"""List scheduling: play a problem forward in time and let every free stream take the ready
subgraph of highest priority (Graham 1966; the priorities are below).

Used twice: to find orders (``template``), and to play baselines that decide as they go.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from muxtune.errors import ConfigError
from muxtune.planning.orchestration.player import Timeline
from muxtune.planning.orchestration.problem import RoundGraph

BACKWARD_FIRST, OLDEST_FIRST = "backward_first", "oldest_first"
LONGEST_FIRST, TIGHTEST_FIRST = "longest_first", "tightest_first"
RULES = (BACKWARD_FIRST, OLDEST_FIRST, LONGEST_FIRST, TIGHTEST_FIRST)


class DispatchOptions(NamedTuple):
    """``injection``: visits in the order in which they should enter. ``strict``: a visit waits
    for those before it; else a later one overtakes while an earlier one cannot enter.
    ``rule``: what a free stream prefers, backward work, the oldest micro-batch, the longest chain
    of work still before it, or the hTask whose own micro-batches in a row take longest.
    ``flush``: a round starts when the one before has ended. ``capacity_share``: of each stage's
    memory to use; less keeps a stage from running ahead."""

    injection: tuple[int, ...]
    rule: str = BACKWARD_FIRST
    strict: bool = False
    flush: bool = False
    capacity_share: float = 1.0


def dispatch(graph: RoundGraph, options: DispatchOptions, rounds: int) -> Timeline:
    """Never exceeds ``capacity_units``. Deterministic: ties break by age, then by op."""
    return _Dispatcher(graph, options, rounds).run()


class _Dispatcher:
    """Event-driven; heaps of ready nodes per stream, entries into a stage apart, because only
    they need memory."""

    def __init__(self, graph: RoundGraph, options: DispatchOptions, rounds: int) -> None:
        if sorted(options.injection) != list(range(len(graph.visits))):
            raise ConfigError("injection", "is no permutation of the visits", "name each once")
        in_turn = [sorted(visits, key=options.injection.index) for visits in graph.visits_of]
        if in_turn != graph.visits_of:
            raise ConfigError(
                "injection", "overtakes within an hTask", "keep its micro-batches' order"
            )
        self.graph, self.options, self.rounds = graph, options, rounds
        self.duration_ns = graph.node_durations_ns(rounds)
        num = len(self.duration_ns)
        self.waiting = graph.num_before * rounds
        self.extra: dict[int, list[int]] = {}
        self.keys = _keys(graph, options)
        self.last_kind = max(kind for kind, _ in self.keys)
        self.key_stride = len(graph.visits)
        self.start_ns, self.end_ns = [0] * num, [0] * num
        self.work: list[list[tuple]] = [[] for _ in range(graph.num_streams)]
        self.entries: list[list[tuple]] = [[] for _ in range(graph.num_streams)]
        self.busy = [False] * graph.num_streams
        self.last_visit = [-1] * graph.num_streams
        self.held = [0] * graph.num_stages
        self.limit = [options.capacity_share * n for n in graph.problem.capacity_units]
        self.events: list[tuple[int, int]] = []
        self.takes, self.frees = _holds(graph)
        self.position = [0] * len(graph.visits)
        for at, visit in enumerate(options.injection):
            self.position[visit] = at
        self.injected = 0
        self._link()

    def _link(self) -> None:
        for before, after in self.graph.step_edges(self.rounds):
            self._edge(before, after)
        if self.options.flush:
            self._link_flush()

    def _edge(self, before: int, after: int) -> None:
        self.extra.setdefault(before, []).append(after)
        self.waiting[after] += 1

    def _link_flush(self) -> None:
        graph = self.graph
        sinks = [op for op in range(graph.num_ops) if not graph.successors[op]]
        sources = [op for op in range(graph.num_ops) if not graph.num_before[op]]
        for at in range(1, self.rounds):
            for sink in sinks:
                for source in sources:
                    self._edge((at - 1) * graph.num_ops + sink, at * graph.num_ops + source)

    def run(self) -> Timeline:
        for node, count in enumerate(self.waiting):
            if not count:
                self._ready(node)
        self._fill(0, range(self.graph.num_streams))
        while self.events:
            now, _ = self.events[0]
            self._fill(now, self._complete(now))
        if any(self.waiting):
            raise ConfigError("plan.round", "cannot be dispatched", "check the dependencies")
        shape = (self.rounds, self.graph.num_ops)
        return Timeline(
            self.graph, np.array(self.start_ns).reshape(shape), np.array(self.end_ns).reshape(shape)
        )

    def _complete(self, now: int) -> list[int]:
        """Ends what ends now; the streams that may have something to start."""
        graph, events, waiting = self.graph, self.events, self.waiting
        touched: set[int] = set()
        while events and events[0][0] == now:
            node = heappop(events)[1]
            op = node % graph.num_ops
            base = node - op
            stream = graph.stream_of[op]
            self.busy[stream] = False
            touched.add(stream)
            if op in self.frees:
                stage = graph.stage_of[op]
                self.held[stage] -= self.frees[op]
            for after in graph.successors[op]:
                waiting[base + after] -= 1
                if not waiting[base + after]:
                    touched.add(self._ready(base + after))
            for after in self.extra.get(node, ()):
                waiting[after] -= 1
                if not waiting[after]:
                    touched.add(self._ready(after))
        return sorted(touched)

    def _ready(self, node: int) -> int:
        at, op = divmod(node, self.graph.num_ops)
        stream = self.graph.stream_of[op]
        age = at * self.key_stride + self.position[self.graph.visit_of[op]]
        kind, weight = self.keys[op]
        entering = op in self.takes
        if entering and self.options.strict:
            kind, weight = self.last_kind, 0.0  # age alone says whose turn it is
        heap = self.entries if entering else self.work
        heappush(heap[stream], (kind, age + weight, op, node))
        return stream

    def _fill(self, now: int, streams: Sequence[int]) -> None:
        for stream in streams:
            while not self.busy[stream]:
                node = self._choose(stream)
                if node is None:
                    break
                self._start(node, stream, now)

    def _choose(self, stream: int) -> int | None:
        work, entries = self.work[stream], self.entries[stream]
        entry = entries[0] if entries and self._may_enter(entries[0][3]) else None
        if work:
            continued = self._continued(stream)
            if continued is not None:
                return continued
            if entry is None or work[0][:3] <= entry[:3]:
                return heappop(work)[3]
        if entry is None:
            return self._overtaking(stream)
        return heappop(entries)[3]

    def _continued(self, stream: int) -> int | None:
        # Cutting a micro-batch's run on a stage in two delays it and gains nothing.
        last = self.last_visit[stream]
        for index, item in enumerate(self.work[stream]):
            at, op = divmod(item[3], self.graph.num_ops)
            if at * self.key_stride + self.graph.visit_of[op] == last:
                heap = self.work[stream]
                heap[index] = heap[-1]
                heap.pop()
                heap.sort()
                return item[3]
        return None

    def _overtaking(self, stream: int) -> int | None:
        """An entry further back that fits, where that is allowed."""
        heap = self.entries[stream]
        if self.options.strict or len(heap) < 2:
            return None
        for item in sorted(heap)[1:]:
            if self._may_enter(item[3]):
                heap.remove(item)
                heap.sort()
                return item[3]
        return None

    def _may_enter(self, node: int) -> bool:
        at, op = divmod(node, self.graph.num_ops)
        stage = self.graph.stage_of[op]
        age = at * self.key_stride + self.position[self.graph.visit_of[op]]
        if self.options.strict and stage == 0 and age != self.injected:
            return False
        # A micro-batch may always enter an empty stage, whatever share of it is to be used.
        fits = not self.held[stage] or self.held[stage] + self.takes[op] <= self.limit[stage]
        return not self.graph.problem.capacity_units or fits

    def _start(self, node: int, stream: int, now: int) -> None:
        graph = self.graph
        at, op = divmod(node, graph.num_ops)
        if op in self.takes:
            stage = graph.stage_of[op]
            self.held[stage] += self.takes[op]
            self.injected += stage == 0
        self.last_visit[stream] = at * self.key_stride + graph.visit_of[op]
        self.start_ns[node] = now
        self.end_ns[node] = now + self.duration_ns[node]
        self.busy[stream] = True
        heappush(self.events, (self.end_ns[node], node))


def _holds(graph: RoundGraph) -> tuple[dict[int, int], dict[int, int]]:
    """Units that ops take and free, by op."""
    takes: dict[int, int] = {}
    frees: dict[int, int] = {}
    for visit, item in enumerate(graph.visits):
        for stage, hold in enumerate(graph.structures[item.htask].holds):
            if hold is not None:
                first, last = graph.ops(visit, hold)
                takes[first] = frees[last] = graph.units(visit, stage)
    return takes, frees


def _keys(graph: RoundGraph, options: DispatchOptions) -> list[tuple[int, float]]:
    """(class, weight added to the age) of each op; smaller goes first."""
    if options.rule == OLDEST_FIRST:
        return [(0, 0.0)] * graph.num_ops
    if options.rule == BACKWARD_FIRST:
        return [(0 if item.backward else 1, 0.0) for item in graph.subgraphs]
    if options.rule == LONGEST_FIRST:
        return [(0, weight) for weight in _chain_weights(graph)]
    if options.rule == TIGHTEST_FIRST:
        places = _tightness(graph)
        return [(places[graph.visits[visit].htask], 0.0) for visit in graph.visit_of]
    raise ConfigError("rule", f"unknown '{options.rule}'", f"choose of {', '.join(RULES)}")


def _chain_weights(graph: RoundGraph) -> list[float]:
    """Less for a longer chain to the visit's end, in units of visits of mean length."""
    tails = tails_ns(graph)
    mean = sum(graph.duration_ns) / max(1, len(graph.visits) * graph.num_stages)
    return [-tail / max(mean, 1.0) for tail in tails]


def _tightness(graph: RoundGraph) -> list[int]:
    """Place of each hTask by the length of its round's chain, the longest first."""
    tails = tails_ns(graph)
    chains = [
        len(visits) * max((tails[op] for op in graph.ops(visits[0], range(1))), default=0)
        if visits
        else 0
        for visits in graph.visits_of
    ]
    by_length = sorted(range(len(chains)), key=lambda htask: -chains[htask])
    return [by_length.index(htask) for htask in range(len(chains))]


def tails_ns(graph: RoundGraph) -> list[int]:
    """Longest chain from the start of each op to the end of its visit."""
    tails = [0] * graph.num_ops
    for visit, item in enumerate(graph.visits):
        ranks = graph.structures[item.htask].ranks
        first = graph.first_op[visit]
        for index in sorted(range(len(ranks)), key=ranks.__getitem__, reverse=True):
            after = (tails[op] for op in graph.successors[first + index])
            tails[first + index] = graph.duration_ns[first + index] + max(after, default=0)
    return tails
