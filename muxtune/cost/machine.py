"""A profile carried to another machine of its kind, by a short check there. Pure.

Two GPUs of one name differ by some percent where power limits them, and their hosts by more. A
check repeats a few products and whole steps that the profile holds; their ratios shift all times
that power limits, by the number of rows. What plans cost to take over is taken from the check.
Nothing of a check is ever scored, and nothing that is scored takes part in a check.

    {"profile": content hash, "products": [[rows, profiled_s, measured_s], ...],
     "steps": [[rows, profiled_s, measured_s], ...], "ops": {name: operation},
     "planning_s": of one plan, for which an instance waits}
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from muxtune.cost.calibration import WholeStep
from muxtune.cost.schema import Profile
from muxtune.errors import ProfileError

# Of up to so many rows the memory is what products wait for; from so many on it is power.
_FREE_LOG_ROWS, _LIMITED_LOG_ROWS = 7.0, 10.0
_SPREAD = 0.06  # of machines of one kind
_NOISE = 0.02  # of one product or step
_LIMITED = ("frozen_", "site_forward", "site_backward", "mixed_", "part_", "full_loss")


class Speed(NamedTuple):
    """Logarithms of what times have to be multiplied by, at few rows and at many."""

    few: float
    many: float

    @classmethod
    def of(cls, ratios: Sequence[tuple[float, float]]) -> Speed:
        """From (rows, measured over profiled); towards one as far as there is no evidence."""
        if not ratios:
            return cls(0.0, 0.0)
        shares = np.array([_limited(rows) for rows, _ in ratios])
        features = np.stack([1.0 - shares, shares], axis=1)
        logs = np.log([ratio for _, ratio in ratios])
        # One odd product may not decide: those far from the rest are pulled in.
        middle = float(np.median(logs))
        logs = np.clip(logs, middle - 3 * _NOISE, middle + 3 * _NOISE)
        prior = (_NOISE / _SPREAD) ** 2 * np.eye(2)
        few, many = np.linalg.solve(features.T @ features + prior, features.T @ logs)
        return cls(float(few), float(many))

    def at(self, rows: float) -> float:
        share = _limited(rows)
        return math.exp(self.few * (1.0 - share) + self.many * share)


def _limited(rows: float) -> float:
    share = (math.log2(max(1.0, rows)) - _FREE_LOG_ROWS) / (_LIMITED_LOG_ROWS - _FREE_LOG_ROWS)
    return min(1.0, max(0.0, share))


def carried(profile: Profile, check: Mapping[str, Any]) -> Profile:
    """The profile as it would be on the machine of the check; its hash stays, for it is the same
    profile that is meant. Raises ProfileError for a check of another profile."""
    if check.get("profile") != profile.content_hash:
        raise ProfileError(
            f"the machine was checked for profile {str(check.get('profile'))[:12]}, not for"
            f" {profile.content_hash[:12]}. Check it again"
        )
    products, steps = (
        Speed.of([(float(rows), measured / then) for rows, then, measured in check[name]])
        for name in ("products", "steps")
    )
    ops = {
        name: _shifted(op, products) if name.startswith(_LIMITED) else op
        for name, op in profile.ops.items()
    }
    moved = tuple(_moved(step, steps) for step in profile.steps)
    ops |= check.get("ops", {})
    for name in ("leave", "takeover"):  # older profiles have the one
        if name in ops:
            ops[name] = _longer(ops[name], float(check.get("planning_s", 0.0)))
    return profile._replace(ops=ops, steps=moved)


def _longer(op: Mapping[str, Any], more_s: float) -> dict[str, Any]:
    times = ("median_s", "p05_s", "p95_s")
    points = [{**point, **{key: point[key] + more_s for key in times}} for point in op["points"]]
    return {**op, "points": points}


def _shifted(op: Mapping[str, Any], speed: Speed) -> dict[str, Any]:
    points = []
    for point in op["points"]:
        ratio = speed.at(point["rows"])
        times = {key: ratio * point[key] for key in ("median_s", "p05_s", "p95_s")}
        points.append({**point, **times})
    return {**op, "points": points}


def _moved(step: WholeStep, speed: Speed) -> WholeStep:
    ratio = speed.at(step_rows(step))
    return step._replace(repeats_s=tuple(ratio * seconds for seconds in step.repeats_s))


def step_rows(step: WholeStep) -> float:
    """Of its passes, in the mean."""
    return float(np.mean([load.shape.padded_tokens for load in step.loads]))
