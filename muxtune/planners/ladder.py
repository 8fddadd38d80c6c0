"""The ladder of shapes that an hTask's micro-batches take.

How many chunks a micro-batch fills varies with the lengths in it, while a prepared shape is
static. Of a few shapes each micro-batch takes the smallest that holds it; this file chooses them
so that the expected size of a pass is least. The chunks of different tasks are taken as
independent: each task walks through its own steps at its own place.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

_MAX_EXACT = 4096  # chunks; larger sums are taken as normal
_MAX_CANDIDATES = 64  # sizes that a ladder chooses from


class Fill:
    """The distribution of the chunks that a micro-batch of several tasks fills."""

    def __init__(self, shares: np.ndarray, most: int) -> None:
        self.cumulative = np.cumsum(shares)
        self.most = most

    @classmethod
    def of(cls, parts: Sequence[tuple[float, ...]], most: int) -> Fill:
        """``parts``: ``ExpectedLoad.chunk_shares`` of each task; ``most``: the sum of quotas."""
        if most > _MAX_EXACT:
            return cls(_normal(parts, most), most)
        total, known = np.ones(1), {id(shares): np.array(shares) for shares in parts}
        for shares in parts:
            total = np.convolve(total, known[id(shares)])
        return cls(total, most)

    def share_up_to(self, sizes: Sequence[int]) -> np.ndarray:
        at = np.minimum(sizes, len(self.cumulative) - 1)
        return self.cumulative[at] / self.cumulative[-1]

    def shares_of(self, sizes: Sequence[int]) -> list[float]:
        """Share of micro-batches that take each size of a ladder."""
        up_to = self.share_up_to(sizes)
        up_to[-1] = 1.0
        return np.diff(up_to, prepend=0.0).tolist()

    def mean_size(self, num_shapes: int) -> float:
        """Expected size of a pass on the best ladder."""
        sizes = self.ladder(num_shapes)
        return sum(n * share for n, share in zip(sizes, self.shares_of(sizes), strict=True))

    def ladder(self, num_shapes: int) -> tuple[int, ...]:
        """At most ``num_shapes`` sizes of least expected size; the last one holds every quota."""
        if num_shapes <= 1:
            return (self.most,)
        candidates = self._candidates()
        return _least_mean(candidates, self.share_up_to(candidates), num_shapes)

    def _candidates(self) -> list[int]:
        """Sizes spread evenly over the probable range, and the largest one."""
        low = int(np.searchsorted(self.cumulative, 1e-3 * self.cumulative[-1]))
        high = int(np.searchsorted(self.cumulative, (1 - 1e-3) * self.cumulative[-1]))
        high = min(high, self.most)
        low = max(1, min(low, high))
        step = max(1, -(-(high - low) // (_MAX_CANDIDATES - 2)))
        return sorted({*range(high, low - 1, -step), self.most})


def _normal(parts: Sequence[tuple[float, ...]], most: int) -> np.ndarray:
    means = [sum(n * share for n, share in enumerate(shares)) for shares in parts]
    squares = [sum(n * n * share for n, share in enumerate(shares)) for shares in parts]
    variance = sum(s - m * m for s, m in zip(squares, means, strict=True))
    distance = np.arange(most + 1) - sum(means)
    shares = np.exp(-(distance**2) / (2 * max(variance, 1.0)))
    return shares / shares.sum()


def _least_mean(sizes: Sequence[int], up_to: np.ndarray, num_shapes: int) -> tuple[int, ...]:
    """``up_to[i]``: share of micro-batches that size i holds. Dynamic program over the largest
    size of a ladder of k shapes; the last size is always taken."""
    values = np.array(sizes, dtype=float)
    below = np.concatenate([[0.0], up_to])
    # cost[i, j]: what micro-batches above size i - 1 and up to size j contribute if they take j.
    cost = (below[None, 1:] - below[:-1, None]) * values[None, :]
    cost[_below_diagonal(len(values))] = np.inf
    best, choices = cost[0], []
    for _ in range(min(num_shapes, len(sizes)) - 1):
        totals = np.concatenate([cost[:1], best[:-1, None] + cost[1:]])
        choices.append(totals.argmin(axis=0))
        best = totals.min(axis=0)
    at, chosen = len(sizes) - 1, []
    for choice in reversed(choices):
        chosen.append(at)
        at = int(choice[at]) - 1
        if at < 0:
            break
    else:
        chosen.append(at)
    return tuple(sizes[i] for i in reversed(chosen))


@lru_cache(maxsize=_MAX_CANDIDATES)
def _below_diagonal(size: int) -> np.ndarray:
    return np.tri(size, k=-1, dtype=bool)


@lru_cache(maxsize=64)
def normal_gap(num_shapes: int) -> float:
    """By how many standard deviations the mean size of a ladder lies above a normal load."""
    spread = 32
    distance = np.arange(-4 * spread, 4 * spread + 1) / spread
    fill = Fill(np.exp(-(distance**2) / 2), 8 * spread)
    return fill.mean_size(num_shapes) / spread - 4
