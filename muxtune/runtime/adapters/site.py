"""All methods at one site, as one: Dispatch, BaseOp with low-rank factors, Aggregate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from muxtune.runtime.adapters.contract import AdapterMethod
from muxtune.runtime.adapters.low_rank import base_linear
from muxtune.runtime.linear import BaseLinear

if TYPE_CHECKING:
    from muxtune.runtime.bank import SitePool
    from muxtune.runtime.passes import AdapterPass


class SiteMethods:
    """Each method changes the rows of its own slots only, so their order has no meaning."""

    def __init__(self, methods: Iterable[AdapterMethod]) -> None:
        self.methods = tuple(methods)

    def linear(
        self, x_TD: Tensor, base: BaseLinear, pool: SitePool, current: AdapterPass
    ) -> Tensor:
        """Base product plus every slot's adapter on its own rows; [T, O]."""
        for method in self.methods:
            x_TD = method.dispatch(x_TD, base, pool, current)
        y_TO = base_linear(x_TD, base, pool, current)
        for method in self.methods:
            y_TO = method.aggregate(x_TD, y_TO, base, pool, current)
        return y_TO
