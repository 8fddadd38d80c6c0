"""Turns for tasks that must not run slower than they were promised.

Tasks with a ``max_slowdown`` get hTasks of their own, which get as many turns a round as their
promise asks for; the others share what is left in proportion to their steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from muxtune.planners.rounds import MAX_TURNS, Turns, turn_counts

_MOST_ROUNDS = 4  # longer rounds divide turns more finely
_MOST_TURNS = 2 * MAX_TURNS


class Demand(NamedTuple):
    """One hTask: seconds of a pass, passes of its slowest task's step, and micro-batches a second
    that its promises ask for (0: none made)."""

    pass_time_s: float
    passes_per_step: float
    rate_per_s: float


def paced_turns(demands: Sequence[Demand]) -> Turns | None:
    """The shortest round that keeps every promise, or None where there is none."""
    if not demands:
        return None
    free = [demand for demand in demands if not demand.rate_per_s]
    for repeats in range(1, _MOST_ROUNDS + 1):
        counts = _counts(demands, _free_counts(free, repeats), repeats)
        if counts is not None:
            return _turns(demands, counts)
    return None


def _free_counts(free: Sequence[Demand], repeats: int) -> list[int]:
    if not free:
        return []
    counts = turn_counts([d.passes_per_step for d in free], [d.pass_time_s for d in free])
    return [repeats * count for count in counts]


def _counts(demands: Sequence[Demand], free: list[int], repeats: int) -> list[int] | None:
    """Raises the turns of promised hTasks until the round, which that lengthens, keeps them all."""
    rest = iter(free)
    counts = [repeats if demand.rate_per_s else next(rest) for demand in demands]
    while sum(counts) <= _MOST_TURNS + sum(free):
        round_s = sum(n * d.pass_time_s for n, d in zip(counts, demands, strict=True))
        asked = [math.ceil(round_s * demand.rate_per_s - 1e-9) for demand in demands]
        if all(n >= least for n, least in zip(counts, asked, strict=True)):
            return counts
        counts = [max(n, least) for n, least in zip(counts, asked, strict=True)]
    return None


def _turns(demands: Sequence[Demand], counts: Sequence[int]) -> Turns:
    pairs = list(zip(counts, demands, strict=True))
    round_s = sum(n * demand.pass_time_s for n, demand in pairs)
    slowest = max(demand.passes_per_step / n for n, demand in pairs)
    return Turns(tuple(counts), tuple(map(float, counts)), round_s, slowest * round_s)
