"""How long the rounds of a plan take on a replica of several GPUs, and where that time goes.

A cost model gives the time of a pass on its busiest stage, communication included. What rounds of
such passes take is a matter of how they overlap:

- a plan with an order takes what the player of orders says, contention included;
- without an order micro-batches enter in the order of the round as soon as they may: with n
  micro-batches of t seconds of each hTask a round takes max(sum n t, longest (n + S - 1) t) on S
  stages, because an hTask's next step waits for its optimizer (docs/architecture.md);
- a plan that does not interleave (``Plan.interleaves``) drains the pipeline after every turn, as
  1F1B with a flush does: sum of (n + S - 1) t.

The closed forms hide no communication. Planner and simulator both ask here, so that what is
predicted and what is simulated differ in nothing but their cost models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from muxtune.planning.orchestration.accounting import (
    bubble_account,
    communication_shares,
    compute_work_ns,
    stream_work_ns,
)
from muxtune.planning.orchestration.contention import Contention, play_contended
from muxtune.planning.orchestration.player import Timeline, checked_sequences
from muxtune.planning.orchestration.problem import RoundGraph, round_problem, stream_index
from muxtune.protocols import CostModel
from muxtune.types import NS_PER_S, PassCoefficients, Plan, ShapeKey, SubgraphTimes

_LEAST_ROUNDS = 4


class Pace(NamedTuple):
    """Of a steady round of one replica. ``factor``: its time over the sum of its passes' times on
    the busiest stage. The five shares of the round, averaged over stages, add up to 1:
    ``computing``; ``exposed_communication``: communicating and not computing, and what computing
    takes longer beside communication (contention); ``fill_drain``: a
    pipeline that fills and empties within the round; ``imbalance``: stages that have less to do
    than the busiest; ``stalls``: what is left. ``once``: rounds' worth of time that filling and
    draining take at the beginning and the end of the plan."""

    factor: float
    computing: float
    exposed_communication: float
    fill_drain: float
    imbalance: float
    stalls: float
    once: float

    @property
    def bubbles(self) -> float:
        return self.fill_drain + self.imbalance + self.stalls


ONE_GPU = Pace(1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def round_time_s(
    passes: Sequence[float],
    pass_times_s: Sequence[float],
    num_stages: int,
    interleaves: bool = True,
) -> float:
    """Of a plan without an order; see the module's docstring."""
    latencies_s = [
        (n + num_stages - 1) * t if n else 0.0 for n, t in zip(passes, pass_times_s, strict=True)
    ]
    if not interleaves:
        return sum(latencies_s)
    return max(sum(n * t for n, t in zip(passes, pass_times_s, strict=True)), *latencies_s)


def pace_of(
    plan: Plan, cost: CostModel, passes: Sequence[float], pass_times_s: Sequence[float]
) -> Pace:
    """The pace of the plan's first replica.

    ``passes`` and ``pass_times_s``: of each hTask, micro-batches a round and their mean time, as
    the cost model gives it. Raises ConfigError for an order that is not valid.
    """
    replica = plan.replicas[0]
    if replica.num_gpus == 1:
        return ONE_GPU
    times = cost.subgraph_times_s(plan)
    full_s = [
        _full_pass_s(cost.pass_coefficients(htask.shapes[-1], replica), htask.shapes[-1])
        for htask in plan.htasks
    ]
    if plan.order:
        return _ordered_pace(plan, times, full_s)
    return _unordered_pace(plan, times, full_s, passes, pass_times_s)


def _full_pass_s(coefficients: PassCoefficients, shape: ShapeKey) -> float:
    """The load that subgraph times stand for: every chunk one full sequence, every step closing."""
    length, rows = shape.chunk_tokens, shape.padded_tokens
    seconds = coefficients.base_s + rows * (length + 1) / 2 * coefficients.per_pair_s
    return seconds + rows * coefficients.per_loss_row_s + sum(coefficients.optimizer_s)


def _ordered_pace(plan: Plan, times: SubgraphTimes, full_s: Sequence[float]) -> Pace:
    timeline = played(plan, times)
    serial_s = sum((turn.count or 0) * full_s[turn.htask] for turn in plan.round)
    period_ns, rounds = timeline.period_ns, timeline.rounds
    work = stream_work_ns(timeline.graph)[::2]
    mean_ns, busiest_ns = sum(work) / len(work), max(work)
    slowed_ns = sum(compute_work_ns(timeline)) / rounds / len(work) - mean_ns
    exposed_ns = slowed_ns + communication_shares(timeline)[0] * timeline.makespan_ns / rounds
    idle_ns = max(period_ns - mean_ns, 0.0)
    exposed_ns = min(exposed_ns, idle_ns)
    imbalance_ns = min(busiest_ns - mean_ns, idle_ns - exposed_ns)
    account = bubble_account(timeline)
    return Pace(
        period_ns / NS_PER_S / serial_s,
        mean_ns / period_ns,
        exposed_ns / period_ns,
        0.0,
        imbalance_ns / period_ns,
        (idle_ns - exposed_ns - imbalance_ns) / period_ns,
        account.fill_drain * timeline.makespan_ns / period_ns,
    )


def played(plan: Plan, times: SubgraphTimes, rounds: int = 0) -> Timeline:
    """The plan's order on its first replica, ``rounds`` (0: enough to be steady) rounds long."""
    graph = RoundGraph(round_problem(plan, times))
    sequences = checked_sequences(graph, plan.order)
    deepest = max((offset for row in sequences for _, offset in row), default=0)
    rounds = rounds or max(_LEAST_ROUNDS, 2 * (deepest + 2))
    return play_contended(graph, sequences, rounds, Contention(*times.contention))


def _unordered_pace(
    plan: Plan,
    times: SubgraphTimes,
    full_s: Sequence[float],
    passes: Sequence[float],
    pass_times_s: Sequence[float],
) -> Pace:
    num_stages = plan.replicas[0].pp
    closed_s = round_time_s(passes, pass_times_s, num_stages, plan.interleaves)
    serial_s = sum(n * t for n, t in zip(passes, pass_times_s, strict=True))
    if not serial_s:
        return ONE_GPU
    whole_s = closed_s * (plan.predicted.played_ratio if plan.interleaves else 1.0)
    compute_s, communication_s = [0.0] * num_stages, 0.0
    for htask, (n, t) in enumerate(zip(passes, pass_times_s, strict=True)):
        work = _stream_seconds(times, htask, num_stages)
        scale = n * t / full_s[htask]
        compute_s = [total + scale * one for total, one in zip(compute_s, work[::2], strict=True)]
        communication_s += scale * sum(work[1::2]) / num_stages
    mean_s = min(sum(compute_s) / num_stages, serial_s, whole_s)
    communication_s = min(communication_s, serial_s - mean_s, whole_s - mean_s)
    idle_s = whole_s - mean_s - communication_s
    fill_s = min(closed_s - serial_s, idle_s)
    imbalance_s = min(serial_s - mean_s - communication_s, idle_s - fill_s)
    return Pace(
        whole_s / serial_s,
        mean_s / whole_s,
        communication_s / whole_s,
        fill_s / whole_s,
        imbalance_s / whole_s,
        (idle_s - fill_s - imbalance_s) / whole_s,
        0.0,
    )


def _stream_seconds(times: SubgraphTimes, htask: int, num_stages: int) -> list[float]:
    work = [0.0] * (2 * num_stages)
    for item, seconds in zip(times.subgraphs[htask], times.times_s[htask], strict=True):
        work[stream_index(item)] += seconds
    return work
