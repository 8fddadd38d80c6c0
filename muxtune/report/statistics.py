"""Intervals over seeds, and times of tasks that a window cuts off.

Runs of one seed share their random numbers, so policies are compared pair by pair: a bootstrap
draws seeds, and takes every policy's run of a seed it drew. With few seeds the plain percentile
interval is too narrow; it is widened as in Hesterberg, "What Teachers Should Know About the
Bootstrap" (The American Statistician, 2015, section 5.3, "expanded percentile").

Tasks that had not ended when one stopped looking are not left out, which would keep the short
ones only: their times are known to be longer than what was seen. Kaplan and Meier, "Nonparametric
Estimation from Incomplete Observations" (JASA, 1958), estimates the distribution from both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
NUM_RESAMPLES = 4_000
Numbers = Sequence[float] | np.ndarray


class Interval(NamedTuple):
    """``value`` of all observations, and the ends of its confidence interval."""

    value: float
    low: float
    high: float
    num_observations: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


Statistic = Callable[..., np.ndarray]  # arrays [..., num_observations] to [...]


def mean_of(values: np.ndarray) -> np.ndarray:
    return values.mean(axis=-1)


def bootstrap_interval(
    values: Numbers,
    statistic: Statistic = mean_of,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Of a statistic of one run a seed; the same arguments give the same interval."""
    return paired_interval([values], statistic, confidence, num_resamples, seed)


def paired_interval(
    columns: Sequence[Numbers],
    statistic: Statistic,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Of ``statistic(*columns)``; ``columns[policy][seed]`` are resampled seed by seed.

    A single seed has no interval: both ends are NaN. Raises ValueError for columns that are empty
    or not of one length, and for a confidence outside of (0, 1).
    """
    data_PN = np.asarray(columns, dtype=np.float64)  # P policies, N seeds
    if data_PN.ndim != 2 or data_PN.shape[1] == 0:
        raise ValueError("give at least one observation in every column")
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence of {confidence} is outside of (0, 1)")
    num = data_PN.shape[1]
    value = float(statistic(*data_PN))
    if num == 1:
        return Interval(value, math.nan, math.nan, 1)
    drawn_RN = np.random.default_rng(seed).integers(num, size=(num_resamples, num))
    found_R = statistic(*data_PN[:, drawn_RN])
    tail = _expanded_tail((1 - confidence) / 2, num)
    low, high = np.nanquantile(found_R, (tail, 1 - tail))
    return Interval(value, float(low), float(high), num)


def _expanded_tail(tail: float, num: int) -> float:
    """The tail of the normal that is as far out as Student's t of a sample of ``num``."""
    wide = math.sqrt(num / (num - 1)) * stats.t.ppf(tail, num - 1)
    return float(stats.norm.cdf(wide))


def relative_saving(baseline: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """``1 - mean(ours) / mean(baseline)``: positive where ours is the smaller."""
    return 1.0 - ours.mean(axis=-1) / baseline.mean(axis=-1)


def paired_saving(
    baseline: Numbers, ours: Numbers, confidence: float = CONFIDENCE, seed: int = 0
) -> Interval:
    """The relative saving with its interval; entry i of both is of one seed."""
    return paired_interval([baseline, ours], relative_saving, confidence, seed=seed)


# ------------------------------------------------------------------------------ times cut off


class Survival(NamedTuple):
    """``share_longer[i]``: estimated share of tasks that take longer than ``times_s[i]``.

    ``horizon_s``: the longest time that was observed, ended or not; nothing is known beyond.
    """

    times_s: np.ndarray
    share_longer: np.ndarray
    num_ended: int
    num_censored: int
    horizon_s: float

    def quantile(self, share: float) -> float:
        """The time within which ``share`` of the tasks end; infinite when it was not seen."""
        reached = np.flatnonzero(self.share_longer <= 1.0 - share + 1e-12)
        return float(self.times_s[reached[0]]) if len(reached) else math.inf

    def restricted_mean_s(self) -> float:
        """Mean of the times, each cut at ``horizon_s``: the plain mean when all have ended."""
        edges = np.concatenate([[0.0], self.times_s, [self.horizon_s]])
        heights = np.concatenate([[1.0], self.share_longer])
        return float((np.diff(edges) * heights).sum())


def kaplan_meier(times_s: Numbers, ended: Sequence[bool] | np.ndarray) -> Survival:
    """``times_s[i]`` is the time task i took, or, where not ``ended[i]``, has taken so far.

    A task that is cut off at the very time another ends counts as still there. Raises ValueError
    for no tasks, lengths that differ or times that are negative or not finite.
    """
    times = np.asarray(times_s, dtype=np.float64)
    done = np.asarray(ended, dtype=bool)
    if not len(times) or len(times) != len(done):
        raise ValueError("give as many times as marks, and at least one")
    if not (np.isfinite(times).all() and (times >= 0).all()):
        raise ValueError("times are finite and not negative")
    distinct = np.unique(times[done])
    at_risk = len(times) - np.searchsorted(np.sort(times), distinct, side="left")
    ends = np.bincount(np.searchsorted(distinct, times[done]), minlength=len(distinct))
    share_longer = np.cumprod(1.0 - ends / at_risk) if len(distinct) else np.empty(0)
    num_ended = int(done.sum())
    return Survival(distinct, share_longer, num_ended, len(times) - num_ended, float(times.max()))
