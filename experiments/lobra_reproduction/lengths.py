"""Sequence lengths drawn from published moments.

Mean, skewness and excess kurtosis are known, the standard deviation is not. Lengths are positive
and skewed, so a two-parameter family without a shift is fitted: its shape to skewness and kurtosis
together (least squares of their logarithms), its scale so that the mean is exact. Main family:
lognormal. With w = exp(sigma^2): skewness (w + 2) sqrt(w - 1), excess kurtosis
w^4 + 2 w^3 + 3 w^2 - 6 (Johnson, Kotz, Balakrishnan 1994). For comparison: lognormal fitted to the
skewness alone or to the kurtosis alone, and gamma with the same standard deviation as the main fit.

Draws are rounded up and cut at the data set's cap, as a trainer truncates; the mean after the cut
is a little lower than the published one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

from experiments.lobra_reproduction.published import Dataset

FAMILIES = ("lognormal", "lognormal_skewness", "lognormal_kurtosis", "gamma")


class LengthFit(NamedTuple):
    """``sigma``: of the logarithm of a lognormal. ``shape``: of a gamma, 0 for a lognormal.
    ``skewness`` and ``excess_kurtosis``: what the fit has, to compare with the published ones."""

    dataset: Dataset
    family: str
    sigma: float
    shape: float
    skewness: float
    excess_kurtosis: float

    def draw(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """[count] integers from 1 to the cap."""
        mean = self.dataset.mean_tokens
        if self.shape:
            lengths = generator.gamma(self.shape, mean / self.shape, count)
        else:
            normal = generator.standard_normal(count)
            lengths = mean * np.exp(self.sigma * normal - self.sigma**2 / 2)
        return np.clip(np.ceil(lengths), 1, self.dataset.cap_tokens).astype(np.int64)


def fit_lengths(dataset: Dataset, family: str = FAMILIES[0]) -> LengthFit:
    weights = {"lognormal_skewness": (1.0, 0.0), "lognormal_kurtosis": (0.0, 1.0)}
    sigma = _lognormal_sigma(dataset, *weights.get(family, (1.0, 1.0)))
    if family == "gamma":
        shape = 1.0 / (math.exp(sigma**2) - 1.0)  # the same standard deviation
        return LengthFit(dataset, family, 0.0, shape, 2.0 / math.sqrt(shape), 6.0 / shape)
    return LengthFit(dataset, family, sigma, 0.0, *_lognormal_moments(sigma))


def _lognormal_moments(sigma: float) -> tuple[float, float]:
    w = math.exp(sigma**2)
    return (w + 2.0) * math.sqrt(w - 1.0), w**4 + 2.0 * w**3 + 3.0 * w**2 - 6.0


def _lognormal_sigma(dataset: Dataset, skewness_weight: float, kurtosis_weight: float) -> float:
    def misfit(sigma: float) -> float:
        skewness, kurtosis = _lognormal_moments(sigma)
        skewness_error = math.log(skewness / dataset.skewness)
        kurtosis_error = math.log(kurtosis / dataset.excess_kurtosis)
        return skewness_weight * skewness_error**2 + kurtosis_weight * kurtosis_error**2

    found = minimize_scalar(misfit, bounds=(0.01, 3.0), method="bounded", options={"xatol": 1e-9})
    return float(found.x)  # type: ignore[attr-defined]


def draw_step(fits: tuple[LengthFit, ...], seed: int, step: int) -> list[np.ndarray]:
    """Lengths of each task's batch; a step's draws depend on the seed and its number only."""
    generator = np.random.default_rng([seed, step])
    return [fit.draw(generator, fit.dataset.batch_size) for fit in fits]
