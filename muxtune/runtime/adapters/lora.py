"""LoRA (Hu et al. 2021, arXiv 2106.09685): y = x W^T + scale * (dropout(x) A^T) B^T.

Option ``use_rslora``: scale = alpha / sqrt(rank) instead of alpha / rank.
Its product is part of the site's base op (``low_rank``), so it has no stages of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Generator, Tensor

from muxtune.runtime.adapters import low_rank
from muxtune.runtime.adapters.checks import check_dropout, check_options, check_rank
from muxtune.runtime.adapters.contract import AdapterMethod, Parameters
from muxtune.runtime.linear import LinearSite
from muxtune.types import AdapterSlot, AdapterSpec


class Lora(AdapterMethod):
    name = "lora"

    def check(self, spec: AdapterSpec) -> None:
        check_rank(spec)
        check_dropout(spec)
        check_options(spec)
        low_rank.low_rank_scale(spec)

    def shapes(self, slot: AdapterSlot, site: LinearSite) -> dict[str, tuple[int, int]]:
        return low_rank.factor_shapes(slot.rank, site)

    def scale(self, spec: AdapterSpec) -> float:
        return low_rank.low_rank_scale(spec)

    def initialise(
        self,
        spec: AdapterSpec,
        site: LinearSite,
        generator: Generator,
        weight_OD: Tensor | None = None,
    ) -> dict[str, Tensor]:
        return low_rank.start_factors(spec.rank, site, generator)

    def to_peft(self, site_name: str, parameters: Parameters) -> dict[str, Tensor]:
        return low_rank.factors_to_peft(site_name, parameters)

    def from_peft(
        self, slot: AdapterSlot, site: LinearSite, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return low_rank.factors_from_peft(site, tensors)

    def peft_config(self, spec: AdapterSpec, sites: Sequence[LinearSite]) -> dict[str, Any]:
        return low_rank.lora_config(spec, use_dora=False)
