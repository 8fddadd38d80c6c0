"""Cost model that interpolates measured times of single operations."""

from __future__ import annotations

from typing import Any

import numpy as np

from muxtune.cost import ops
from muxtune.cost.composition import ComposedCostModel, Rates
from muxtune.cost.curves import AffineFit, Leaf, Table, Time, fit_affine
from muxtune.cost.memory import MemoryModel, MemoryOptions, memory_options
from muxtune.cost.ops import Op
from muxtune.cost.schema import Profile, parse_profile
from muxtune.cost.shapes import ModelShape, checked_shape
from muxtune.errors import ProfileError
from muxtune.types import AdapterSlot, Estimate, ReplicaShape, ShapeKey

# Overheads that a device may do without (a captured graph has no layer overhead).
_OPTIONAL = {"layer_overhead_forward", "layer_overhead_backward", "pass_overhead"}
_FREE = Time(0.0, 0.0, False)


class ProfiledCostModel(ComposedCostModel):
    """``CostModel`` from a profile. Between measured sizes times are piecewise linear; outside
    they go on and are flagged. Attention and loss are fitted by affine functions of their load,
    as the protocol demands; what the fit misses is part of the interval.

    The interval is the measured 5%..95% spread of each operation, added up as if all operations
    were slow together, which they are on a shared machine.
    """

    def __init__(
        self, model: ModelShape, profile: Profile | dict[str, Any],
        memory: MemoryOptions | None = None,
    ) -> None:  # fmt: skip
        self.profile = profile if isinstance(profile, Profile) else parse_profile(profile)
        kind = self.profile.device.get("kind", "gpu")
        sizes = memory or memory_options(model, str(kind))
        super().__init__(checked_shape(model), MemoryModel(model, sizes), sizes.dtype_bytes)
        self._tables: dict[str, Table] = {}
        self._rates: dict[tuple[str, int], tuple[Rates, Rates]] = {}

    def _op(self, name: str) -> dict[str, Any]:
        if name not in self.profile.ops:
            raise ProfileError(
                f"the profile of {self.profile.device_name or 'this device'} has no op '{name}'"
                f" of {self.model.name}. Measure it with `muxtune profile model={self.model.name}`"
            )
        return self.profile.ops[name]  # type: ignore[return-value]

    def _table(self, name: str) -> Table:
        if name not in self._tables:
            op = self._op(name)
            points = [
                (tuple(float(point[axis]) for axis in op["axes"]), _leaf(point))
                for point in op["points"]
            ]
            self._tables[name] = Table.build(name, points)
        return self._tables[name]

    def op_time(self, op: Op) -> Time:
        if op.name in _OPTIONAL and op.name not in self.profile.ops:
            return _FREE
        return self._table(op.name).at(op.size)

    def attention_rates(self, tp: int) -> tuple[Rates, Rates]:
        key = ("attention", tp)
        if key not in self._rates:
            forward, backward = ops.attention_work(self.model, self.dtype_bytes, tp)
            self._rates[key] = (self._attention(forward.name), self._attention(backward.name))
        return self._rates[key]

    def _attention(self, name: str) -> Rates:
        fit = self._fit(name, "length", lambda n: (1.0, n, n * (n + 1) / 2))
        per_call, per_row, per_pair = fit.coefficients
        return Rates(per_call, per_row, per_pair, fit.relative_error, fit.max_size)

    def loss_rates(self, tp: int) -> tuple[Rates, Rates]:
        key = ("loss", tp)
        if key not in self._rates:
            forward, backward = ops.loss_ops(self.model, 1.0, self.dtype_bytes, tp)
            self._rates[key] = (self._loss(forward.name), self._loss(backward.name))
        return self._rates[key]

    def _loss(self, name: str) -> Rates:
        fit = self._fit(name, "rows", lambda n: (1.0, n))
        per_pass, per_row = fit.coefficients
        return Rates(per_pass, 0.0, per_row, fit.relative_error, fit.max_size)

    def _fit(self, name: str, axis: str, features: Any) -> AffineFit:
        points = self._op(name)["points"]
        sizes = [float(point[axis]) for point in points]
        rows = np.array([features(size) for size in sizes])
        return fit_affine(rows, [_leaf(point) for point in points], max(sizes))

    def adapter_load_s(self, slot: AdapterSlot) -> Estimate:
        """Measured: making one adapter's tensors and optimizer state, by trained numbers."""
        size = (float(ops.adapter_parameters(self.model, slot)),)
        value, width, outside = self._table("adapter_load").at(size)
        return Estimate(value, max(value - width, 0.0), value + width, outside)

    def capture_s(self, shape: ShapeKey, replica: ReplicaShape) -> Estimate:
        """Measured where the device captures graphs; nothing where the profile has no such op."""
        if "capture" not in self.profile.ops:
            return Estimate(0.0, 0.0, 0.0, False)
        value, width, outside = self._table("capture").at((float(shape.padded_tokens),))
        return Estimate(value, max(value - width, 0.0), value + width, outside)


def _leaf(point: dict[str, Any]) -> Leaf:
    return Leaf(float(point["median_s"]), (point["p95_s"] - point["p05_s"]) / 2)
