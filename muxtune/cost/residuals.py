"""How the operations of captured passes add up to steps, fitted from many whole steps.

A pass takes ``sum over causes of factor * seconds + pass_s + block_s * blocks``, and its blocks
``1 + g`` times that, where g changes slowly with the shape (rows, slots, ranks, how much is
adapted): streams run beside each other, kernels find other caches and clocks than alone, and what
of it shows depends on the shape. Factors, constants and g have priors (one, nothing, nothing) from
which only evidence draws them away: a Gaussian process with linear terms (Rasmussen and Williams
2006, section 2.7). All of it holds for a device and a program; no configuration has a number of its
own, and steps that were used here take no part in any validation.

The 90% interval is the process's own, widened until it covers the steps that it is fitted to, each
predicted from the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

# Prior standard deviations of the factors: how far a cause is trusted to be as alone.
_SPREADS: Mapping[str, float] = {"backbone": 0.05, "loss": 0.05, "site": 0.25, "factor": 0.5}
_OTHER_SPREAD = 0.2
_PASS_S, _BLOCK_S = 3e-4, 1e-5
# Tried, and the likeliest taken: how far g goes, over what distances, and what is noise.
_G_SPREADS, _STRETCHES, _NOISES = (0.01, 0.03, 0.06), (0.7, 1.2, 2.5), (0.004, 0.008, 0.016)
# Over what distance of each coordinate of a place g changes, times a stretch.
_DISTANCES = np.array([1.5, 2.0, 1.5, 0.6])
_WIDEN = 1.0, 3.0
_LEAST = 0.3  # a fit to noise may not make operations vanish
_NORMAL_90 = 1.645
MIN_RELATIVE_ERROR = 0.01


class PassSums(NamedTuple):
    """One pass as its operations alone say. ``seconds``: by cause. ``blocks_s``: of it in blocks,
    of which there are ``num_blocks``. ``place``: of its shape, as ``_DISTANCES`` has them."""

    seconds: Mapping[str, float]
    blocks_s: float
    num_blocks: int
    place: tuple[float, ...]


class StepSums(NamedTuple):
    """``spread``: of the repeats, over the time: a busy device's steps say little."""

    passes: tuple[PassSums, ...]
    measured_s: float
    spread: float = 0.0


class Adding(NamedTuple):
    """See the module's text. ``factors``: of causes; others have 1. ``places``, ``weights``: of g,
    in ``distances``. ``rows``, ``inverse``: of the steps, for the interval."""

    factors: Mapping[str, float]
    pass_s: float
    block_s: float
    places: np.ndarray
    weights: np.ndarray
    distances: np.ndarray
    g_spread: float
    noise: float
    causes: tuple[str, ...]
    linear: np.ndarray
    owner: np.ndarray
    shares: np.ndarray
    inverse: np.ndarray
    widening: float
    errors: np.ndarray  # of each step, predicted from the others

    @property
    def num_steps(self) -> int:
        return len(self.errors)

    @property
    def typical_error(self) -> float:
        return float(np.sqrt(np.mean(self.errors**2)))

    def factor(self, cause: str) -> float:
        return self.factors.get(cause, 1.0)

    def blocks_factor(self, place: Sequence[float]) -> float:
        """1 + g."""
        return max(_LEAST, 1.0 + float(self._near(place) @ self.weights))

    def _near(self, place: Sequence[float]) -> np.ndarray:
        apart = (self.places - np.asarray(place)) / self.distances
        return self.g_spread**2 * np.exp(-0.5 * np.sum(apart**2, axis=1))

    def relative_error(self, item: PassSums) -> float:
        """Half-width of the 90% interval of such a pass, over its time."""
        total = sum(item.seconds.values())
        own = _linear([item], self.causes, total)
        share = item.blocks_s / total
        near = np.zeros(len(self.inverse))
        np.add.at(near, self.owner, self.shares * self._near(item.place))
        known = self.linear @ own + share * near
        prior = own @ own + (share * self.g_spread) ** 2 + self.noise**2
        variance = max(prior - known @ self.inverse @ known, self.noise**2)
        return max(MIN_RELATIVE_ERROR, _NORMAL_90 * self.widening * float(np.sqrt(variance)))


def fit_adding(steps: Sequence[StepSums]) -> Adding:
    """Raises ValueError without steps."""
    if not steps:
        raise ValueError("no steps")
    causes = tuple(sorted({cause for step in steps for p in step.passes for cause in p.seconds}))
    wanted = np.array([_missing(step) for step in steps])
    linear = np.array([_linear(step.passes, causes, step.measured_s) for step in steps])
    placed = [
        (index, place, blocks_s / step.measured_s)
        for index, step in enumerate(steps)
        for place, blocks_s in _by_place(step).items()
    ]
    owner = np.array([index for index, _, _ in placed])
    places = np.array([place for _, place, _ in placed], dtype=float)
    shares = np.array([share for _, _, share in placed])
    spreads = np.array([step.spread for step in steps])
    known = linear @ linear.T + np.diag(spreads**2)
    best, found = np.inf, None
    for stretch in _STRETCHES:
        distances = _DISTANCES[: places.shape[1]] * stretch
        near = _between_steps(places / distances, owner, shares, len(steps))
        for g_spread, noise in product(_G_SPREADS, _NOISES):
            covariance = known + g_spread**2 * near + noise**2 * np.eye(len(steps))
            inverse = np.linalg.inv(covariance)
            alpha = inverse @ wanted
            variances = 1.0 / np.diag(inverse)
            errors = alpha * variances  # leaving each one out
            unlikely = float(np.sum(np.log(variances) + errors**2 / variances))
            if unlikely < best:
                best, found = unlikely, (distances, g_spread, noise, inverse, alpha, errors)
    assert found is not None
    distances, g_spread, noise, inverse, alpha, errors = found
    off = np.abs(errors) / (_NORMAL_90 * np.sqrt(1.0 / np.diag(inverse)))
    moved = _spreads(causes) * (linear.T @ alpha)
    return Adding(
        {cause: max(_LEAST, 1.0 + float(moved[place])) for place, cause in enumerate(causes)},
        max(0.0, float(moved[-2])), max(0.0, float(moved[-1])),
        places, shares * alpha[owner], distances, g_spread, noise, causes, linear, owner,
        shares, inverse,
        float(np.clip(np.quantile(off, 0.9), *_WIDEN)), errors,
    )  # fmt: skip


def _missing(step: StepSums) -> float:
    """Share of the measured time that its operations do not tell."""
    return 1.0 - sum(sum(item.seconds.values()) for item in step.passes) / step.measured_s


def _spreads(causes: Sequence[str]) -> np.ndarray:
    """Of every linear term; the last two are a pass's constant and a block's."""
    return np.array([*(_SPREADS.get(cause, _OTHER_SPREAD) for cause in causes), _PASS_S, _BLOCK_S])


def _linear(passes: Sequence[PassSums], causes: Sequence[str], total_s: float) -> np.ndarray:
    """Each term's share of the time when it is off by its prior's deviation."""
    sums = [sum(item.seconds.get(cause, 0.0) for item in passes) for cause in causes]
    counts = [len(passes), sum(item.num_blocks for item in passes)]
    return _spreads(causes) * np.array([*sums, *counts]) / total_s


def _by_place(step: StepSums) -> dict[tuple[float, ...], float]:
    found: dict[tuple[float, ...], float] = {}
    for item in step.passes:
        found[item.place] = found.get(item.place, 0.0) + item.blocks_s
    return found


def _between_steps(
    places: np.ndarray, owner: np.ndarray, shares: np.ndarray, count: int
) -> np.ndarray:
    squared = np.sum((places[:, None, :] - places[None, :, :]) ** 2, axis=2)
    near = np.exp(-0.5 * squared) * shares[:, None] * shares[None, :]
    found = np.zeros((count, count))
    np.add.at(found, (owner[:, None], owner[None, :]), near)
    return found
