"""How single operations add up to a step: fitted from a few whole steps of the profile.

A pass takes ``work * (its operations but the adapters') + adapters * (the adapters') + pass_s``
(of a captured pass, ``adapters`` is of what runs on the second stream only):
in a step operations find other clocks and caches than alone, adapters partly run beside the
products, and every pass has something of the host in it. The three numbers hold for a device and
a program, for every configuration; none is fitted to one. Steps that were used here are kept in
the profile and take no part in any validation.

The 90% interval comes from predicting each of these steps by a fit to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from muxtune import codec
from muxtune.cost import ops
from muxtune.types import PassLoad

PRIOR = (1.0, 1.0, 0.0)
LEAST = (0.3, 0.2, 0.0)  # a fit to noise may not make operations vanish
MOST_ADAPTERS = 1.5  # nor may the few adapters stand for what others take
# One calibration step that is off by this share weighs as much as a factor that is off by one.
STIFFNESS = 0.03
MIN_RELATIVE_ERROR = 0.01
EXTRAPOLATED_WIDENING = 1.5
# Of fewer steps a 90% interval is at least so wide, over the value: nothing tells how far off they
# are.
MIN_STEPS, FEW_STEPS_ERROR = 3, 0.2
# 95% points of Student's t by degrees of freedom.
_STUDENT = (
    (1, 6.31),
    (2, 2.92),
    (3, 2.35),
    (4, 2.13),
    (6, 1.94),
    (9, 1.83),
    (14, 1.76),
    (24, 1.71),
)


class WholeStep(NamedTuple):
    """One measured step of a profile. ``repeats_s``: of all its passes. ``peak_bytes``: above
    what the process held besides the weights; 0 or less where what had been freed before hid it.
    ``num_slots``: adapters of all its hTasks; 0: not known. ``num_layers``: of the model it ran
    on, where these are fewer than the profile's; 0: as many."""

    name: str
    loads: tuple[PassLoad, ...]
    repeats_s: tuple[float, ...]
    peak_bytes: int
    num_slots: int = 0
    num_layers: int = 0

    @property
    def median_s(self) -> float:
        return float(np.median(self.repeats_s))

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "loads": codec.encode(self.loads)}

    @classmethod
    def of_json(cls, raw: Mapping[str, Any]) -> WholeStep:
        fields = {**raw, "loads": codec.decode(raw["loads"]), "repeats_s": tuple(raw["repeats_s"])}
        return cls(**fields)


class Composition(NamedTuple):
    """See the module's text. ``relative_error``: half-width of the 90% interval over the value."""

    work: float = 1.0
    adapters: float = 1.0
    pass_s: float = 0.0
    relative_error: float = 0.0
    num_steps: int = 0

    def seconds(self, features: Sequence[float]) -> float:
        return float(np.dot(features, (self.work, self.adapters, self.pass_s)))


Breakdown = Callable[[PassLoad], Mapping[str, float]]
Features = Callable[[WholeStep], tuple[float, float, float]]


def step_features(loads: Sequence[PassLoad], breakdown_s: Breakdown) -> tuple[float, float, float]:
    """(seconds of the operations but the adapters', of the adapters', number of passes)."""
    parts = [breakdown_s(load) for load in loads]
    adapters = sum(part.get(ops.ADAPTERS, 0.0) for part in parts)
    return sum(sum(part.values()) for part in parts) - adapters, adapters, float(len(loads))


def fit_composition(steps: Sequence[WholeStep], features_of: Features) -> Composition:
    """``features_of``: what the three numbers are multiplied by. Without steps: the sums."""
    if not steps:
        return Composition()
    features = np.array([features_of(step) for step in steps])
    times = np.array([step.median_s for step in steps])
    best = _fit(features, times)
    error = _interval(features, times)
    spread = float(np.median([spread_of(step.repeats_s) for step in steps]))
    return Composition(*best, max(MIN_RELATIVE_ERROR, float(np.hypot(error, spread))), len(steps))


def _fit(features: np.ndarray, times: np.ndarray) -> tuple[float, float, float]:
    """Relative least squares between ``LEAST`` and ``MOST_ADAPTERS``, drawn towards ``PRIOR``."""
    work, adapters, pass_s = _fit_from_least(features, times)
    if adapters <= MOST_ADAPTERS:
        return work, adapters, pass_s
    known = features * (0.0, 1.0, 0.0)
    rest = np.maximum(times - MOST_ADAPTERS * known[:, 1], 0.1 * times)
    work, _, pass_s = _fit_from_least(features - known, rest)
    return work, MOST_ADAPTERS, pass_s


def _fit_from_least(features: np.ndarray, times: np.ndarray) -> tuple[float, float, float]:
    """A pass's constant is measured in twentieths of the mean pass."""
    unit = np.array([1.0, 1.0, 0.05 * times.sum() / features[:, 2].sum()])
    rows = features * unit / times[:, None]
    prior, floor = np.array(PRIOR) / unit, np.array(LEAST) / unit
    stacked = np.concatenate([rows, STIFFNESS * np.eye(3)])
    wanted = np.concatenate([np.ones(len(times)), STIFFNESS * prior]) - stacked @ floor
    best, least = np.array(PRIOR), np.inf
    for count in (1, 2, 3):
        for active in combinations(range(3), count):
            solved = np.zeros(3)
            solved[list(active)] = np.linalg.lstsq(stacked[:, active], wanted, rcond=None)[0]
            error = float(np.sum((stacked @ solved - wanted) ** 2))
            if (solved >= 0).all() and error < least:
                best, least = (floor + solved) * unit, error
    return float(best[0]), float(best[1]), float(best[2])


def _interval(features: np.ndarray, times: np.ndarray) -> float:
    """Half-width that covers 90% of new steps, by leaving each one out."""
    count = len(times)
    if count < MIN_STEPS:
        return FEW_STEPS_ERROR
    errors = []
    for index in range(count):
        rest = np.arange(count) != index
        predicted = float(features[index] @ _fit(features[rest], times[rest]))
        errors.append(predicted / times[index] - 1.0)
    student = next((t for freedom, t in reversed(_STUDENT) if freedom <= count - 2), 6.31)
    return student * float(np.sqrt(np.mean(np.square(errors))))


def spread_of(repeats_s: Sequence[float]) -> float:
    """Half of the middle 90% of the repeats over their median."""
    low, middle, high = np.quantile(repeats_s, (0.05, 0.5, 0.95))
    return float((high - low) / 2 / middle)


class MemoryFit(NamedTuple):
    """What a pass takes over the counted bytes, and the half-width of the 90% interval."""

    pass_factor: float = 1.0
    fixed_bytes: int = 0
    relative_error: float = 0.15


def fit_memory(
    steps: Sequence[WholeStep],
    resident: Callable[[WholeStep], int],
    most: Callable[[WholeStep], int],
) -> MemoryFit:
    """``resident(step)``: counted bytes held all the time; ``most(step)``: of its largest pass."""
    steps = [step for step in steps if step.peak_bytes > 0]
    if len(steps) < MIN_STEPS:
        return MemoryFit()
    held = np.array([resident(step) for step in steps], float)
    passes = np.array([most(step) for step in steps], float)
    peaks = np.array([step.peak_bytes for step in steps], float)
    factor, fixed = _line(passes, peaks - held, peaks)
    errors = (held + factor * passes + fixed) / peaks - 1.0
    return MemoryFit(factor, int(fixed), max(0.02, 1.65 * float(np.sqrt(np.mean(errors**2)))))


def _line(x: np.ndarray, y: np.ndarray, scale: np.ndarray) -> tuple[float, float]:
    """Slope and a height that is not negative, with errors relative to ``scale``."""
    both = np.stack([x, np.ones_like(x)], axis=1) / scale[:, None]
    slope, height = np.linalg.lstsq(both, y / scale, rcond=None)[0]
    if height < 0 or slope <= 0:
        slope, height = float(np.sum(x * y / scale**2) / np.sum((x / scale) ** 2)), 0.0
    return max(float(slope), 0.1), float(height)
