"""How the operations of captured passes add up to steps, fitted from many whole steps.

A pass takes ``sum over causes of factor * seconds + g * blocks + h * adapters + filler * (large
products' seconds, by the share of rows that are filler) + pass_s + block_s * number of blocks``.
g and h change slowly with the shape (rows, slots, ranks, how much is adapted): streams run beside
each other, kernels find other caches and clocks than alone (an adapter's factors come from memory),
and what of it shows depends on the shape. Rows of filler are all alike, and computed with at less
power. Factors, constants, g and h have priors (one, and nothing) from which only evidence draws
them away: a Gaussian process with linear terms (Rasmussen and Williams 2006, section 2.7; Matern's
covariance). All of it holds for a device and a program; no configuration has a number of its own,
and steps that were used here take no part in any validation.

The 90% interval is the process's own, as wide as covers 90% of the steps that it is fitted to, each
predicted from the others. Of fewer than ``MIN_STEPS`` it is at least ``FEW_STEPS_ERROR``
(``muxtune.cost.calibration``), see ``least_error``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np

from muxtune.cost import ops
from muxtune.cost.calibration import FEW_STEPS_ERROR, MIN_STEPS
from muxtune.cost.causes import ADAPTED, FACTOR, MANY_ROWS_LOSS, SITE

# Prior standard deviations of the factors: how far a cause is trusted to be as alone.
_SPREADS: Mapping[str, float] = {
    ops.BACKBONE: 0.05,
    ADAPTED: 0.05,
    ops.LOSS: 0.05,
    MANY_ROWS_LOSS: 0.05,
    SITE: 0.25,
    FACTOR: 0.5,
}
_OTHER_SPREAD = 0.2
_FILLER, _PASS_S, _BLOCK_S = 0.15, 3e-4, 1e-5
# Tried, and the likeliest taken: how far g and h go, over what distances, and what is noise.
_G_SPREADS, _H_SPREADS = (0.02, 0.04), (0.1, 0.2, 0.4)
_STRETCHES, _NOISES = (0.7, 1.0, 1.6, 2.5), (0.006, 0.012, 0.02)
# Over what distance of each coordinate of a place they change, times a stretch.
_DISTANCES = np.array([1.0, 1.5, 2.0, 0.5])
_ROOT_3 = float(np.sqrt(3.0))
_WIDEN = 0.7, 3.0
_LEAST = 0.3  # a fit to noise may not make operations vanish
_NORMAL_90 = 1.645
MIN_RELATIVE_ERROR = 0.01


class PassSums(NamedTuple):
    """One pass as its operations alone say. ``seconds``: by cause. ``blocks_s``, ``adapters_s``: of
    it in blocks, of which there are ``num_blocks``, and of their adapters. ``filler_s``: of large
    products, by the share of rows that are filler. ``place``: of its shape, as ``_DISTANCES`` has
    them."""

    seconds: Mapping[str, float]
    blocks_s: float
    num_blocks: int
    place: tuple[float, ...]
    adapters_s: float = 0.0
    filler_s: float = 0.0


class StepSums(NamedTuple):
    """``spread``: of the repeats, over the time: a busy device's steps say little."""

    passes: tuple[PassSums, ...]
    measured_s: float
    spread: float = 0.0


class _Near(NamedTuple):
    """Where the steps' passes lie: each row's step, place, and shares of blocks and adapters in
    the step's time."""

    owner: np.ndarray
    places: np.ndarray
    blocks: np.ndarray
    adapters: np.ndarray

    @classmethod
    def of(cls, steps: Sequence[StepSums]) -> _Near:
        rows: list[tuple[int, tuple[float, ...], float, float]] = []
        for index, step in enumerate(steps):
            found: dict[tuple[float, ...], tuple[float, float]] = {}
            for item in step.passes:
                blocks_s, adapters_s = found.get(item.place, (0.0, 0.0))
                found[item.place] = blocks_s + item.blocks_s, adapters_s + item.adapters_s
            total_s = step.measured_s
            rows += [(index, at, b / total_s, a / total_s) for at, (b, a) in found.items()]
        owner, places, blocks, adapters = zip(*rows, strict=True)
        return cls(np.array(owner), np.array(places, float), np.array(blocks), np.array(adapters))


class Added(NamedTuple):
    """What a pass takes beside its operations. ``g``, ``h``: of its shape, as the module's text has
    them; ``relative_error``: half-width of the 90% interval of such a pass, over its time."""

    g: float
    h: float
    relative_error: float


class Adding(NamedTuple):
    """See the module's text. ``factors``: of causes; others have 1. ``weights``: of g and h at the
    places in ``near``. ``linear``, ``inverse``: of the steps, for the interval; ``free``: 0 of
    linear terms that are held at nothing; ``errors``: of each step, predicted from the others."""

    factors: Mapping[str, float]
    filler: float
    pass_s: float
    block_s: float
    near: _Near
    weights: np.ndarray
    distances: np.ndarray
    spreads: tuple[float, float, float]  # of g, of h, noise
    causes: tuple[str, ...]
    linear: np.ndarray
    free: np.ndarray
    inverse: np.ndarray
    widening: float
    errors: np.ndarray

    @property
    def num_steps(self) -> int:
        return len(self.errors)

    @property
    def typical_error(self) -> float:
        return float(np.sqrt(np.mean(self.errors**2)))

    def at(self, item: PassSums) -> Added:
        nearness = _matern((self.near.places - np.array(item.place)) / self.distances)
        g, h = (self.weights @ nearness).tolist()
        least = _LEAST - 1.0
        return Added(max(g, least), max(h, least), self._relative_error(item, nearness))

    def seconds(self, item: PassSums, added: Added) -> float:
        """Of the pass. ``added``: ``at(item)``."""
        parts = [self.factors.get(cause, 1.0) * value for cause, value in item.seconds.items()]
        constants_s = self.pass_s + item.num_blocks * self.block_s + self.filler * item.filler_s
        return sum(parts) + added.g * item.blocks_s + added.h * item.adapters_s + constants_s

    def _relative_error(self, item: PassSums, nearness: np.ndarray) -> float:
        total_s, near = sum(item.seconds.values()), self.near
        own = self.free * _linear([item], self.causes, total_s)
        blocks, adapters = item.blocks_s / total_s, item.adapters_s / total_s
        g_spread, h_spread, noise = self.spreads
        shared = g_spread**2 * blocks * near.blocks + h_spread**2 * adapters * near.adapters
        known = self.linear @ own
        known += np.bincount(near.owner, nearness * shared, len(known))
        prior = own @ own + (blocks * g_spread) ** 2 + (adapters * h_spread) ** 2 + noise**2
        variance = max(float(prior - known @ self.inverse @ known), noise**2)
        return max(MIN_RELATIVE_ERROR, _NORMAL_90 * self.widening * math.sqrt(variance))


def least_error(adding: Adding | None) -> float:
    """Of a 90% interval, over the value. Of the suites of two devices 95% of steps were within 0.18
    to 0.24 where a profile has no step or one (None: it has none)."""
    is_told = adding is not None and adding.num_steps >= MIN_STEPS
    return 0.0 if is_told else FEW_STEPS_ERROR


def fit_adding(steps: Sequence[StepSums]) -> Adding:
    """Raises ValueError without steps."""
    if not steps:
        raise ValueError("no steps")
    causes = tuple(sorted({cause for step in steps for p in step.passes for cause in p.seconds}))
    wanted = np.array([_missing(step) for step in steps])
    linear = np.array([_linear(step.passes, causes, step.measured_s) for step in steps])
    spreads, near = np.array([step.spread for step in steps]), _Near.of(steps)
    free = np.ones(linear.shape[1])
    while True:
        likeliest = _likeliest(wanted, linear * free, spreads, near)
        moved = free * _spreads(causes) * (linear.T @ likeliest.alpha)
        negative = np.append(np.zeros(len(moved) - 2, bool), moved[-2:] < 0.0)
        if not negative.any():
            break
        free[negative] = 0.0  # nothing takes less than no time: the rest has to say it
    distances, tried, inverse, alpha, errors = likeliest
    off = np.abs(errors) / (_NORMAL_90 * np.sqrt(1.0 / np.diag(inverse)))
    weights = alpha[near.owner] * np.stack([near.blocks, near.adapters])
    weights *= np.square(tried[:2])[:, None]
    factors = (max(_LEAST, 1.0 + more) for more in moved.tolist())
    filler, pass_s, block_s = moved[-3:].tolist()
    return Adding(
        dict(zip(causes, factors, strict=False)), filler, pass_s, block_s,
        near, weights, distances, tried, causes, linear * free, free, inverse,
        float(np.clip(np.quantile(off, 0.9), *_WIDEN)), errors,
    )  # fmt: skip


class _Likeliest(NamedTuple):
    """``tried``: spreads of g and h, and noise; ``inverse``: of the steps' covariance; ``errors``:
    of each, leaving it out."""

    distances: np.ndarray
    tried: tuple[float, float, float]
    inverse: np.ndarray
    alpha: np.ndarray
    errors: np.ndarray


def _likeliest(
    wanted: np.ndarray, linear: np.ndarray, spreads: np.ndarray, near: _Near
) -> _Likeliest:
    """``spreads``: of the steps' repeats."""
    known = linear @ linear.T + np.diag((spreads / 2) ** 2)
    least, found = np.inf, None
    for stretch in _STRETCHES:
        distances = _DISTANCES[: near.places.shape[1]] * stretch
        blocks, adapters = _between_steps(near, distances, len(wanted))
        for tried in product(_G_SPREADS, _H_SPREADS, _NOISES):
            covariance = known + tried[0] ** 2 * blocks + tried[1] ** 2 * adapters
            covariance += tried[2] ** 2 * np.eye(len(wanted))
            inverse = np.linalg.inv(covariance)
            alpha = inverse @ wanted
            variances = 1.0 / np.diag(inverse)
            errors = alpha * variances
            unlikely = float(np.sum(np.log(variances) + errors**2 / variances))
            if unlikely < least:
                least, found = unlikely, _Likeliest(distances, tried, inverse, alpha, errors)
    assert found is not None
    return found


def _missing(step: StepSums) -> float:
    """Share of the measured time that its operations do not tell."""
    return 1.0 - sum(sum(item.seconds.values()) for item in step.passes) / step.measured_s


@lru_cache(maxsize=64)
def _spreads(causes: tuple[str, ...]) -> np.ndarray:
    """Of every linear term; the last three are of filler, a pass's constant and a block's."""
    of_causes = [_SPREADS.get(cause, _OTHER_SPREAD) for cause in causes]
    return np.array([*of_causes, _FILLER, _PASS_S, _BLOCK_S])


def _linear(passes: Sequence[PassSums], causes: tuple[str, ...], total_s: float) -> np.ndarray:
    """Each term's share of the time when it is off by its prior's deviation."""
    sums = [
        [*[item.seconds.get(cause, 0.0) for cause in causes], item.filler_s, 1.0, item.num_blocks]
        for item in passes
    ]
    return _spreads(causes) * np.array(sums).sum(axis=0) / total_s


def _matern(apart: np.ndarray) -> np.ndarray:
    far = _ROOT_3 * np.sqrt(np.add.reduce(apart * apart, axis=-1))
    return (1.0 + far) * np.exp(-far)


def _between_steps(near: _Near, distances: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Covariances of the steps by g, and by h, of a spread of one."""
    places = near.places / distances
    alike, found = _matern(places[:, None, :] - places[None, :, :]), []
    for shares in (near.blocks, near.adapters):
        both = np.zeros((count, count))
        where = near.owner[:, None], near.owner[None, :]
        np.add.at(both, where, alike * shares[:, None] * shares[None, :])
        found.append(both)
    return found[0], found[1]
