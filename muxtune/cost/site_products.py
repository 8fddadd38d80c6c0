"""Products of fused linears with adapters, by the tiles of a profile's device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from muxtune.cost.curves import Time
from muxtune.cost.factor_gradients import FACTOR_GRADIENT, FactorGradient
from muxtune.cost.fused_sites import MEMBERS, FusedSite, fused_sites
from muxtune.cost.low_rank import (
    BACKWARD,
    FORWARD,
    Backward,
    Counted,
    Counts,
    Forward,
    Point,
    Products,
    Sizes,
    Use,
)
from muxtune.cost.op_sizes import TP_DEGREES
from muxtune.cost.profiled import leaf_of
from muxtune.cost.schema import Profile
from muxtune.cost.shapes import ModelShape
from muxtune.cost.tiles import Tiling
from muxtune.errors import ProfileError

# Of the logarithm of what a point differs by from its count, the share that holds around it, too.
# Of A's gradients the other half is the point's own; judged by seven suites, of two devices.
_KEPT = {FORWARD: 1.0, BACKWARD: 1.0, FACTOR_GRADIENT: 0.5}


class SiteProduct(NamedTuple):
    """``products``: of one kind; ``like``: the measured linear whose ratios hold for the
    linear of ``sizes``."""

    products: Products
    like: str
    sizes: Sizes

    def at(self, sizes: tuple[float, ...]) -> Time:
        """``sizes``: see ``Products.at``."""
        return self.products.at(self.like, self.sizes, sizes)

    def of_layout(self, use: Use, rows: int) -> float:
        """Seconds in one certain micro-batch."""
        return self.products.of_layout(self.like, self.sizes, use, rows)


class SiteProducts:
    """Of a model's linears, whatever its depth. Each kind is fitted once, when it is asked."""

    def __init__(self, model: ModelShape, profile: Profile, tiling: Tiling) -> None:
        self._profile, self._own_part = profile, fused_sites(profile.model_shape)
        self._tiling, self._counts = tiling, Counts(tiling)
        self._fitted: dict[str, Products] = {}
        models = (profile.model_shape, model)
        sites = [s for each in models for tp in TP_DEGREES for s in fused_sites(each, tp)]
        # Of equal sizes, this model's whole one.
        self._site_of_size = {site.size: site for site in (*sites, *fused_sites(model))}

    def of(self, kind: str, size: str) -> SiteProduct:
        """``kind``: of ``_KEPT``; ``size``: of a ``FusedSite``. Raises ProfileError where the
        profile has nothing like it."""
        like = self._measured_like(size)
        if f"{kind}.{like}" not in self._profile.ops:
            raise ProfileError(
                f"the profile of {self._profile.device_name} has no op '{kind}.{like}' of"
                f" {self._profile.model_name}. Measure it with `muxtune profile"
                f" model={self._profile.model_name}`"
            )
        return SiteProduct(self._products(kind), like, self._sizes(size))

    def _products(self, kind: str) -> Products:
        if kind not in self._fitted:
            points = {
                size: self._points(f"{kind}.{size}", self._sizes(size))
                for of_kind, _, size in (name.partition(".") for name in self._profile.ops)
                if of_kind == kind
            }
            every = [point for own in points.values() for point in own]
            self._fitted[kind] = Products(kind, self._counted(kind, every), points, _KEPT[kind])
        return self._fitted[kind]

    def _counted(self, kind: str, points: Sequence[Point]) -> Counted:
        if kind == FACTOR_GRADIENT:
            return FactorGradient(self._tiling.num_multiprocessors, points)
        return (Forward if kind == FORWARD else Backward)(self._counts, points)

    def _points(self, name: str, sizes: Sizes) -> list[Point]:
        return [
            Point(sizes, int(raw["slots"]), raw["rank"], int(raw["rows"]), leaf_of(raw))
            for raw in self._profile.ops[name]["points"]
        ]

    def _sizes(self, size: str) -> Sizes:
        site: FusedSite = self._site_of_size[size]
        return Sizes(site.in_features, site.out_features)

    def _measured_like(self, size: str) -> str:
        """The measured linears of these sizes, or those with the same part in a block."""
        if f"{FORWARD}.{size}" in self._profile.ops:
            return size
        return self._own_part[MEMBERS.index(self._site_of_size[size].members)].size
