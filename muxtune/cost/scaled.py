"""A cost model whose times are all off by one factor: a faster device, or a model that errs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from muxtune.errors import ConfigError
from muxtune.protocols import CostBook, CostModel
from muxtune.types import (
    AdapterSlot,
    Estimate,
    Estimates,
    PassCoefficients,
    PassLoad,
    Plan,
    ReplicaShape,
    ShapeKey,
    SubgraphTimes,
)


class ScaledCostModel:
    """``model`` with every time multiplied by ``factor``, or those of takeovers and of tasks' ends
    by ``takeover_factor``; memory stays as it is."""

    def __init__(
        self, model: CostModel, factor: float, takeover_factor: float | None = None
    ) -> None:
        self._model, self._factor = model, factor
        self._takeover_factor = factor if takeover_factor is None else takeover_factor
        self._coefficients: dict[tuple[ShapeKey, ReplicaShape], PassCoefficients] = {}

    def __getattr__(self, name: str) -> Any:
        """Memory, and whatever else has no time in it."""
        return getattr(self._model, name)

    def pass_coefficients(self, shape: ShapeKey, replica: ReplicaShape) -> PassCoefficients:
        known = self._coefficients.get((shape, replica))
        if known is None:
            plain = self._model.pass_coefficients(shape, replica)
            known = self._coefficients[shape, replica] = plain._replace(
                base_s=plain.base_s * self._factor,
                per_pair_s=plain.per_pair_s * self._factor,
                per_loss_row_s=plain.per_loss_row_s * self._factor,
                optimizer_s=tuple(item * self._factor for item in plain.optimizer_s),
            )
        return known

    def pass_times_s(self, loads: Sequence[PassLoad], replica: ReplicaShape) -> Estimates:
        plain = self._model.pass_times_s(loads, replica)
        return plain._replace(
            value=plain.value * self._factor,
            low=plain.low * self._factor,
            high=plain.high * self._factor,
        )

    def breakdown_s(self, load: PassLoad, replica: ReplicaShape) -> Mapping[str, float]:
        parts = self._model.breakdown_s(load, replica)
        return {cause: seconds * self._factor for cause, seconds in parts.items()}

    def subgraph_times_s(self, plan: Plan) -> SubgraphTimes:
        plain = self._model.subgraph_times_s(plan)
        scaled = tuple(tuple(item * self._factor for item in row) for row in plain.times_s)
        return plain._replace(times_s=scaled)

    def transition_s(self, previous: Plan | None, new: Plan) -> Estimate:
        return self._scaled(self._model.transition_s(previous, new))

    def capture_s(self, shape: ShapeKey, replica: ReplicaShape) -> Estimate:
        return self._scaled(self._model.capture_s(shape, replica))

    @property
    def charges_ends(self) -> bool:
        return self._model.charges_ends

    def finish_s(self, slot: AdapterSlot) -> Estimate:
        return self._scaled(self._model.finish_s(slot))

    def _scaled(self, plain: Estimate) -> Estimate:
        factor = self._takeover_factor
        return plain._replace(
            value=plain.value * factor, low=plain.low * factor, high=plain.high * factor
        )


class ScaledCostBook:
    """A book of scaled models; each is made once. Raises ConfigError for a factor not above 0."""

    def __init__(self, book: CostBook, factor: float, takeover_factor: float | None = None) -> None:
        for number in (factor, factor if takeover_factor is None else takeover_factor):
            if not (math.isfinite(number) and number > 0):
                raise ConfigError("cost.factor", f"is {number}", "Give a number above 0")
        self._book, self._factors = book, (factor, takeover_factor)
        self._known: dict[tuple[str, str], ScaledCostModel] = {}

    def __call__(self, model: str, device: str) -> Any:
        key = (model, device)
        if key not in self._known:
            self._known[key] = ScaledCostModel(self._book(model, device), *self._factors)
        return self._known[key]
