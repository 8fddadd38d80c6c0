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


def contention_of(
    compute_s: float, comm_s: float, together_s: float, comm_slowdown: float
) -> Contention:
    """From the measured times of a compute kernel, a communication kernel, and both at once.

    Three times give one equation for two factors, so ``comm_slowdown`` (b) must be given. Where
    communication ends first, it lasts b * comm while compute does b * comm / a of its work:
    together = compute + b * comm * (1 - 1/a). Otherwise compute lasts a * compute and
    together = comm + a * compute * (1 - 1/b). Raises ConfigError when no factor >= 1 fits.
    """
    _check_measured(compute_s, comm_s, together_s, comm_slowdown)
    ends_first = 1.0 - (together_s - compute_s) / (comm_slowdown * comm_s)
    if 0.0 < ends_first <= 1.0 and comm_slowdown * comm_s <= together_s:
        return Contention(1.0 / ends_first, comm_slowdown)
    if comm_slowdown > 1.0:
        slowdown = (together_s - comm_s) / (compute_s * (1.0 - 1.0 / comm_slowdown))
        if slowdown >= 1.0 and slowdown * compute_s <= together_s * (1.0 + 1e-9):
            return Contention(slowdown, comm_slowdown)
    raise ConfigError(
        "contention",
        f"compute {compute_s}, communication {comm_s} and both {together_s} s fit no slowdown of "
        f"compute beside comm_slowdown={comm_slowdown}",
        "measure again, or give another comm_slowdown",
    )


def _check_measured(compute_s: float, comm_s: float, together_s: float, slowdown: float) -> None:
    if min(compute_s, comm_s) <= 0.0 or together_s < max(compute_s, comm_s):
        raise ConfigError(
            "contention", "both at once took less than one alone", "measure again with more repeats"
        )
    if slowdown < 1.0:
        raise ConfigError("comm_slowdown", f"is {slowdown}", "give at least 1")


# Two H200 over 18 NVLinks: a 4096 x 5120 x 6912 linear, an all-reduce of 4096 x 5120 bf16 and both
# at once, 0.377, 0.180 and 0.520 ms; the same over a slow link (peer access off), 0.377, 1.542
# and 1.568 ms. How the slowdown splits between the two sides was not measured: 1.25 and 1.05 are
# assumed for communication.
NVLINK_H200 = contention_of(0.377e-3, 0.180e-3, 0.520e-3, 1.25)
SLOW_LINK_H200 = contention_of(0.377e-3, 1.542e-3, 1.568e-3, 1.05)


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
