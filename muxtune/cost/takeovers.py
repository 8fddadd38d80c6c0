"""What plans take besides their rounds, out of what a profile measured of whole takeovers. Pure.

A takeover is a sum: of each task that joins, of each that moves to other slots, both by the numbers
that they train, of letting pools go and making others, and of the plan itself. No term is measured
alone; least squares with coefficients that are not negative tell them apart. Captures are timed one
by one, and told by their rows in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import nnls

from muxtune.errors import ProfileError
from muxtune.types import Estimate

# How many tasks are new to the instance, how many go to other slots, and what they train; 1 where
# pools are let go or made.
TAKEOVER = ("joins", "join_parameters", "moves", "move_parameters", "rebuilds")
CAPTURE = ("rows", "first")  # of a size; 1 of an hTask's first, which is tried out by all blocks


class TakeoverTimes:
    """Of an operation with the axes ``TAKEOVER``; each point is a plan. Raises ProfileError where
    an axis is missing."""

    def __init__(self, op: Mapping[str, Any]) -> None:
        if missing := set(TAKEOVER) - set(op["axes"]):
            raise ProfileError(
                f"profile op 'takeover' does not tell {', '.join(sorted(missing))}."
                " Run `muxtune profile` again"
            )
        points = op["points"]
        rows = [[*(point[axis] for axis in TAKEOVER), 1.0] for point in points]
        each_s, self._error = _fitted(rows, [point["median_s"] for point in points])
        self._join, self._move = each_s[:2], each_s[2:4]
        self._rebuild_s, self._plan_s = each_s[4:].tolist()
        self._most = max(
            point[f"{kind}_parameters"] / max(1.0, point[f"{kind}s"])
            for point in points
            for kind in ("join", "move")
        )

    def join(self, size: float) -> Estimate:
        """Of a task that trains ``size`` numbers."""
        return self._of_task(self._join, size)

    def move(self, size: float) -> Estimate:
        return self._of_task(self._move, size)

    def rebuild(self) -> Estimate:
        """Of a plan whose slots are others than those of the one before."""
        return estimate(self._rebuild_s, self._error)

    def plan(self) -> Estimate:
        """Of each plan, whatever it changes."""
        return estimate(self._plan_s, self._error)

    def _of_task(self, coefficients: np.ndarray, size: float) -> Estimate:
        value = float(coefficients @ (1.0, size))
        return estimate(value, self._error, size > self._most)


class CaptureTimes:
    """Of an operation with the axes ``CAPTURE``, or ``rows`` alone, where a first one is charged
    like others."""

    def __init__(self, op: Mapping[str, Any]) -> None:
        points = op["points"]
        tells_first = "first" in op["axes"]
        rows = [_features(p["rows"], tells_first and bool(p["first"])) for p in points]
        self._each_s, self._error = _fitted(rows, [p["median_s"] for p in points])
        self._tells_first = tells_first

    def each(self, rows: float) -> Estimate:
        return self._of(_features(rows, False))

    def first_more(self, rows: float) -> Estimate:
        """What the first of an hTask's sizes takes more."""
        if not self._tells_first:
            return estimate(0.0, 0.0)
        return self._of([0.0, 0.0, 1.0, rows])

    def _of(self, features: Sequence[float]) -> Estimate:
        return estimate(float(self._each_s @ features), self._error)


def _fitted(rows: Sequence[Sequence[float]], times_s: Sequence[float]) -> tuple[np.ndarray, float]:
    """(what one of each column takes, the error that 90% stay below over the mean). Of seconds:
    their sum matters, which ratios would make too small where times vary."""
    table, wanted = np.array(rows), np.array(times_s)
    scales = np.maximum(table.max(axis=0), 1e-9)
    each_s = nnls(table / scales, wanted)[0] / scales
    left = np.abs(table @ each_s - wanted)
    return each_s, float(np.quantile(left, 0.9) / wanted.mean())


def _features(rows: float, is_first: bool) -> list[float]:
    return [1.0, rows, float(is_first), is_first * rows]


def estimate(value: float, error: float, outside: bool = False) -> Estimate:
    """``error``: relative, of the 90% interval."""
    return Estimate(value, value * max(0.0, 1 - error), value * (1 + error), outside)


__all__ = ["CAPTURE", "TAKEOVER", "CaptureTimes", "TakeoverTimes", "estimate"]
