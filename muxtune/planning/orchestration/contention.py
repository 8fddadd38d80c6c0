"""Playing an order while computing and communicating slow each other down.

Communication kernels take streaming multiprocessors and memory bandwidth from compute kernels
(NCCL) and are delayed by them. So on a GPU where both streams are busy each side proceeds at a
fraction of its speed, and at full speed again as soon as the other stops: processor sharing with
fixed rates. A transfer between stages counts on both GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from muxtune.errors import ConfigError
from muxtune.planning.orchestration.player import (
    StreamSequence,
    Timeline,
    deadlock,
    node_dependencies,
)
from muxtune.planning.orchestration.problem import RoundGraph
from muxtune.types import SubgraphKind


class Contention(NamedTuple):
    """Factors by which a kernel takes longer while the other stream of its GPU is busy; 1: none."""

    compute_slowdown: float = 1.0
    comm_slowdown: float = 1.0


NO_CONTENTION = Contention()


def play_contended(
    graph: RoundGraph, sequences: Sequence[StreamSequence], rounds: int, contention: Contention
) -> Timeline:
    """``player.play_sequences`` under contention; the same to the nanosecond without it.

    Raises ConfigError for an order that deadlocks or factors below 1.
    """
    if min(contention) < 1.0:
        raise ConfigError("contention", f"{tuple(contention)} is below 1", "give factors >= 1")
    return _ContendedPlay(graph, sequences, rounds, contention).run()


class _ContendedPlay:
    """Events are ends of kernels; a kernel whose rate changes gets a new end."""

    def __init__(
        self,
        graph: RoundGraph,
        sequences: Sequence[StreamSequence],
        rounds: int,
        contention: Contention,
    ) -> None:
        self.graph, self.rounds = graph, rounds
        self.slowdown = (contention.compute_slowdown, contention.comm_slowdown)
        following, self.waiting = node_dependencies(graph, sequences, rounds)
        self.extra = following.extra
        num = len(self.waiting)
        self.remaining_ns: list[float] = [float(d) for d in graph.node_durations_ns(rounds)]
        self.start_ns, self.end_ns = [0] * num, [0] * num
        self.since_ns, self.factor, self.version = [0] * num, [1.0] * num, [0] * num
        self.events: list[tuple[int, int, int]] = []
        self.running = [-1] * graph.num_streams
        self.stages = [_stages_touched(graph, op) for op in range(graph.num_ops)]
        self.comm_on = [0] * graph.num_stages

    def run(self) -> Timeline:
        for node, count in enumerate(self.waiting):
            if not count:
                self._start(node, 0)
        done = 0
        while self.events:
            now, node, version = heappop(self.events)
            if version == self.version[node]:
                self._end(node, now)
                done += 1
        if done < len(self.waiting):
            raise deadlock(self.graph, self.waiting)
        shape = (self.rounds, self.graph.num_ops)
        starts, ends = np.array(self.start_ns), np.array(self.end_ns)
        return Timeline(self.graph, starts.reshape(shape), ends.reshape(shape))

    def _start(self, node: int, now: int) -> None:
        op = node % self.graph.num_ops
        self.start_ns[node] = self.since_ns[node] = now
        if self.remaining_ns[node] > 0.0:
            self.running[self.graph.stream_of[op]] = node
            self._shift(op, 1, now)
        self._schedule(node, now)

    def _end(self, node: int, now: int) -> None:
        graph = self.graph
        op = node % graph.num_ops
        self.end_ns[node] = now
        self.version[node] += 1
        if self.running[graph.stream_of[op]] == node:
            self.running[graph.stream_of[op]] = -1
            self._shift(op, -1, now)
        base = node - op
        for after in graph.successors[op]:
            self._release(base + after, now)
        for after in self.extra[node]:
            self._release(after, now)

    def _release(self, node: int, now: int) -> None:
        self.waiting[node] -= 1
        if not self.waiting[node]:
            self._start(node, now)

    def _shift(self, op: int, change: int, now: int) -> None:
        """A kernel starts or stops: those that share a GPU with it change their rates."""
        communicates = self.graph.stream_of[op] % 2
        for stage in self.stages[op]:
            self.comm_on[stage] += change * communicates
        for node in self._neighbours(op, communicates):
            self._schedule(node, now)

    def _neighbours(self, op: int, communicates: int) -> list[int]:
        if communicates:
            beside = [self.running[2 * stage] for stage in self.stages[op]]
        else:
            stage = self.graph.stage_of[op]
            beside = [
                node
                for node in self.running[1::2]
                if node >= 0 and stage in self.stages[node % self.graph.num_ops]
            ]
        return [node for node in beside if node >= 0]

    def _schedule(self, node: int, now: int) -> None:
        """Books the work done so far and sets the kernel's end at its present rate."""
        elapsed = now - self.since_ns[node]
        self.remaining_ns[node] -= elapsed / self.factor[node]
        self.since_ns[node] = now
        self.factor[node] = factor = self._factor_of(node % self.graph.num_ops)
        self.version[node] += 1
        left = max(self.remaining_ns[node], 0.0) * factor
        heappush(self.events, (now + _ceil(left), node, self.version[node]))

    def _factor_of(self, op: int) -> float:
        communicates = self.graph.stream_of[op] % 2
        if communicates:
            contended = any(self.running[2 * stage] >= 0 for stage in self.stages[op])
        else:
            contended = self.comm_on[self.graph.stage_of[op]] > 0
        return self.slowdown[communicates] if contended else 1.0


def _ceil(value: float) -> int:
    # Less than a thousandth of a nanosecond is rounding of the sums above.
    return -int(-(value - 1e-3) // 1) if value > 1e-3 else 0


def _stages_touched(graph: RoundGraph, op: int) -> tuple[int, ...]:
    """Stages whose GPUs a kernel keeps busy: a transfer also its receiver's."""
    stages = {graph.stage_of[op]}
    if graph.subgraphs[op].kind is SubgraphKind.P2P:
        stages.update(graph.stage_of[after] for after in graph.successors[op])
    return tuple(sorted(stages))
