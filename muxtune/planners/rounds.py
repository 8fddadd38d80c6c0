"""Rounds: how often each hTask gets a turn, and how long a round takes.

On one stage a round is the sum of its passes. In a pipeline of S stages that stays fed it is the
sum of what its micro-batches occupy the busiest stage (docs/architecture.md), but never shorter
than the latency of an hTask's own step: its n micro-batches follow each other through S stages,
and only after its optimizer may its next step enter: (n + S - 1) passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from muxtune.planning.orchestration import round_time_s

MAX_TURNS = 64
_PAYS = 0.999  # more turns make a round longer, so they must bring something
_ORDER_IS_WORTH = 1.03
_GOOD_ENOUGH = 1.005  # of the time that fractional turns would give


class Turns(NamedTuple):
    """``counts``: micro-batches of each hTask a round; None: as many as a step takes.
    ``passes``: the same as a number. ``step_time_s``: until every task has taken a step."""

    counts: tuple[int | None, ...]
    passes: tuple[float, ...]
    round_time_s: float
    step_time_s: float


@lru_cache(maxsize=32_768)
def round_of(
    passes_per_step: tuple[float, ...],
    pass_times_s: tuple[float, ...],
    num_stages: int,
    interleaves: bool = True,
    counted: bool | None = None,
) -> Turns:
    """The round of least time until every task has taken a step.

    ``passes_per_step``: of each hTask's slowest task. ``pass_times_s``: of the busiest stage.
    ``interleaves``: see ``Plan``.
    ``counted``: in a pipeline, whether each hTask gets one micro-batch a round; None: what is best.
    """
    if num_stages > 1 and not interleaves:
        whole_s = round_time_s(passes_per_step, pass_times_s, num_stages, interleaves)
        return Turns((None,) * len(passes_per_step), passes_per_step, whole_s, whole_s)
    if num_stages > 1:
        return _pipelined(passes_per_step, pass_times_s, num_stages, counted)
    counts = turn_counts(passes_per_step, pass_times_s)
    round_s = _sum(counts, pass_times_s)
    slowest = max(n / count for n, count in zip(passes_per_step, counts, strict=True))
    return Turns(counts, tuple(map(float, counts)), round_s, slowest * round_s)


def _pipelined(
    passes_per_step: Sequence[float],
    pass_times_s: Sequence[float],
    num_stages: int,
    wanted: bool | None,
) -> Turns:
    """One micro-batch of each hTask a round, if that is nearly a step of every task, because
    counted turns can be ordered; else one step of every task."""
    passes = tuple(passes_per_step)
    once_s = max(sum(pass_times_s), num_stages * max(pass_times_s))
    counted = Turns((1,) * len(passes), (1.0,) * len(passes), once_s, max(passes) * once_s)
    whole_s = round_time_s(passes, pass_times_s, num_stages)
    if wanted is None:
        wanted = counted.step_time_s <= _ORDER_IS_WORTH * whole_s
    if wanted:
        return counted
    return Turns((None,) * len(passes), passes, whole_s, whole_s)


def turn_counts(passes_per_step: Sequence[float], pass_times_s: Sequence[float]) -> tuple[int, ...]:
    """Small whole numbers, as near the proportions of ``passes_per_step`` as pays."""
    if max(passes_per_step) == min(passes_per_step):
        return (1,) * len(passes_per_step)
    least = 1 / min(passes_per_step)
    most_turns = max(MAX_TURNS, 2 * len(passes_per_step))
    best: tuple[int, ...] = ()
    best_s = float("inf")
    for scale in _scales(passes_per_step):
        counts = tuple(max(1, round(n * scale)) for n in passes_per_step)
        if sum(counts) > most_turns and scale > least:
            break
        rate = max(n / count for n, count in zip(passes_per_step, counts, strict=True))
        time_s = rate * _sum(counts, pass_times_s)
        if time_s < _PAYS * best_s:
            best, best_s = counts, time_s
        if best_s <= _GOOD_ENOUGH * _sum(passes_per_step, pass_times_s):
            break
    return best


def _scales(passes_per_step: Sequence[float]) -> list[float]:
    """Those at which some hTask's turns are a whole number."""
    least = 1 / min(passes_per_step)
    exact = {turns / n for n in set(passes_per_step) for turns in range(1, MAX_TURNS + 1)}
    return sorted(scale for scale in exact if scale >= least)


def _sum(counts: Sequence[float], pass_times_s: Sequence[float]) -> float:
    return sum(n * time_s for n, time_s in zip(counts, pass_times_s, strict=True))
