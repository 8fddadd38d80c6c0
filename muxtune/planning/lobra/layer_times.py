"""Time of one transformer layer as LobRA models it, fitted to measurements.

For one tensor-parallel degree and micro-batches of b sequences of s tokens:

    t(b, s) = (c1 b + c2) s^2 + (c3 b + c4) s + (c5 b + c6)

All coefficients are kept at 0 or more: then t grows with b and with s, and t(b, s) / b falls with
b, which the planner's lower bounds rest on. Forward and backward together, in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from muxtune.errors import ConfigError


class LayerSample(NamedTuple):
    """One measurement: a layer's forward and backward of ``batch`` sequences."""

    tp: int
    batch: int
    length_tokens: int
    seconds: float


class LayerTimes(NamedTuple):
    """``coefficients[tp]``: c1 to c6, in seconds."""

    coefficients: Mapping[int, tuple[float, ...]]

    def affine_s(self, tp: int, length_tokens: float) -> tuple[float, float]:
        """(fixed, per sequence) seconds of a micro-batch of this length, at least one sequence.

        Raises ConfigError for a tensor-parallel degree that was not measured.
        """
        if tp not in self.coefficients:
            raise ConfigError(
                "layer_times", f"has no tensor-parallel degree {tp}", "measure or leave out that TP"
            )
        c1, c2, c3, c4, c5, c6 = self.coefficients[tp]
        s = length_tokens
        return (c2 * s + c4) * s + c6, (c1 * s + c3) * s + c5

    def seconds(self, tp: int, batch: int, length_tokens: float) -> float:
        """0 for an empty micro-batch."""
        fixed_s, per_sequence_s = self.affine_s(tp, length_tokens)
        return fixed_s + batch * per_sequence_s if batch else 0.0


class LayerFit(NamedTuple):
    """How well one degree's coefficients reproduce the samples that they were fitted to, and
    samples left out of the fit in ``FOLDS`` folds; relative errors without sign."""

    tp: int
    num_samples: int
    mean_error: float
    worst_error: float
    held_out_mean_error: float
    held_out_worst_error: float


FOLDS = 5


def fit_layer_times(samples: Sequence[LayerSample]) -> LayerTimes:
    """Least squares of the relative error with coefficients of 0 or more (Lawson and Hanson).

    Raises ConfigError for no samples, and values that are not positive.
    """
    _check(samples)
    return LayerTimes({tp: _fit(group) for tp, group in sorted(_by_tp(samples).items())})


def layer_fits(samples: Sequence[LayerSample]) -> list[LayerFit]:
    """Errors per tensor-parallel degree."""
    _check(samples)
    return [_layer_fit(tp, group) for tp, group in sorted(_by_tp(samples).items())]


def _layer_fit(tp: int, group: Sequence[LayerSample]) -> LayerFit:
    seen = _errors(_fit(group), group)
    unseen = [
        _errors(_fit(kept), group[fold::FOLDS])
        for fold in range(FOLDS)
        if (kept := [s for i, s in enumerate(group) if i % FOLDS != fold]) and group[fold::FOLDS]
    ]
    held_out = np.concatenate(unseen) if unseen else seen
    return LayerFit(
        tp,
        len(group),
        float(seen.mean()),
        float(seen.max()),
        float(held_out.mean()),
        float(held_out.max()),
    )


def _errors(coefficients: Sequence[float], samples: Sequence[LayerSample]) -> np.ndarray:
    measured = np.array([sample.seconds for sample in samples])
    return np.abs(_terms(samples) @ np.array(coefficients) / measured - 1.0)


def _fit(samples: Sequence[LayerSample]) -> tuple[float, ...]:
    measured = np.array([sample.seconds for sample in samples])
    relative = _terms(samples) / measured[:, None]
    scale = relative.max(axis=0)  # columns differ by eight orders of magnitude
    solution, _ = nnls(relative / scale, np.ones(len(samples)))
    return tuple(float(value) for value in solution / scale)


def _terms(samples: Sequence[LayerSample]) -> np.ndarray:
    """[samples, 6], in the order of c1 to c6."""
    b = np.array([float(sample.batch) for sample in samples])
    s = np.array([float(sample.length_tokens) for sample in samples])
    return np.stack([b * s * s, s * s, b * s, s, b, np.ones_like(s)], axis=1)


def _by_tp(samples: Sequence[LayerSample]) -> dict[int, list[LayerSample]]:
    groups: dict[int, list[LayerSample]] = {}
    for sample in samples:
        groups.setdefault(sample.tp, []).append(sample)
    return groups


def _check(samples: Sequence[LayerSample]) -> None:
    if not samples:
        raise ConfigError("layer_times", "no samples", "give at least one measurement")
    for sample in samples:
        positive = min(sample.tp, sample.batch, sample.length_tokens) > 0
        if not positive or not 0.0 < sample.seconds < math.inf:
            raise ConfigError(
                "layer_times", f"{tuple(sample)} is not positive", "remove or correct it"
            )
