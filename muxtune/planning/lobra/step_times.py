"""Fitting the communication parameters to measured steps of homogeneous replicas.

A step's time is affine in the two parameters as long as the critical path does not change, and it
does not when all micro-batches are equal; so the closed form gives the derivatives and the fit is
linear least squares of the relative error, with parameters of 0 or more.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from muxtune.errors import ConfigError
from muxtune.planning.lobra.layer_times import LayerTimes
from muxtune.planning.lobra.replica_times import Communication, ReplicaTimes, SequenceBatch
from muxtune.types import ReplicaShape

PARAMETERS = Communication._fields


class HomogeneousStep(NamedTuple):
    """``replicas`` equal replicas, each with ``num_micro_batches`` equal micro-batches a step."""

    shape: ReplicaShape
    replicas: int
    micro_batch: SequenceBatch
    num_micro_batches: int


def predicted_step_s(times: ReplicaTimes, step: HomogeneousStep) -> float:
    """By the pipeline player."""
    batches = [step.micro_batch] * step.num_micro_batches
    return times.played_s(step.shape, batches) + times.sync_s([step.shape] * step.replicas)


def fit_communication(
    layer_times: LayerTimes,
    num_layers: int,
    steps: Sequence[HomogeneousStep],
    measured_s: Sequence[float],
    parameters: Collection[str] = PARAMETERS,
) -> Communication:
    """Raises ConfigError for no steps, times that are not positive, or an unknown parameter."""
    if not steps or min(measured_s) <= 0.0 or len(steps) != len(measured_s):
        raise ConfigError("steps", "need one positive time each", "give at least one step")
    unknown = sorted(set(parameters) - set(PARAMETERS))
    if unknown:
        raise ConfigError("parameters", f"{unknown[0]} is unknown", f"choose of {PARAMETERS}")
    names = [name for name in PARAMETERS if name in parameters]
    base_s = _closed_form_s(layer_times, num_layers, steps, Communication())
    unit = [Communication(**{name: 1.0}) for name in names]
    slopes = [_closed_form_s(layer_times, num_layers, steps, one) - base_s for one in unit]
    return _solve(names, np.array(slopes).T, base_s, np.array(measured_s))


def _solve(
    names: Sequence[str], slopes: np.ndarray, base_s: np.ndarray, measured_s: np.ndarray
) -> Communication:
    if not names:
        return Communication()
    relative = slopes / measured_s[:, None]
    scale = np.maximum(np.abs(relative).max(axis=0), 1e-300)
    values, _ = nnls(relative / scale, 1.0 - base_s / measured_s)
    return Communication(**dict(zip(names, map(float, values / scale), strict=True)))


def _closed_form_s(
    layer_times: LayerTimes,
    num_layers: int,
    steps: Sequence[HomogeneousStep],
    communication: Communication,
) -> np.ndarray:
    times = ReplicaTimes(layer_times, num_layers, communication)
    return np.array(
        [
            times.step_s(step.shape, [step.micro_batch] * step.num_micro_batches)
            + times.sync_s([step.shape] * step.replicas)
            for step in steps
        ]
    )
