"""LoRA (Hu et al. 2021, arXiv 2106.09685): y = x W^T + scale * (dropout(x) A^T) B^T.

Shape suffixes: T rows, D input features, O output features, R pool rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from muxtune.errors import ConfigError
from muxtune.runtime.adapters.contract import Parameters
from muxtune.runtime.adapters.stable_lora import stable_lora_linear
from muxtune.runtime.linear import BaseLinear, LinearSite
from muxtune.types import AdapterSlot, AdapterSpec
from muxtune_kernels import multi_lora_linear

if TYPE_CHECKING:
    from muxtune.runtime.bank import SitePool
    from muxtune.runtime.passes import AdapterPass

A, B = "lora_A", "lora_B"


class Lora:
    """B is kept transposed, [rank, O], so that a task's share of a pool is a block of rows."""

    name = "lora"

    def check(self, spec: AdapterSpec) -> None:
        if spec.rank < 1:
            raise ConfigError("adapter.rank", f"is {spec.rank}", "Give a rank of at least 1")
        if not 0 <= spec.dropout < 1:
            raise ConfigError("adapter.dropout", f"is {spec.dropout}", "Give a number in [0, 1)")
        if spec.options:
            names = ", ".join(sorted(spec.options))
            raise ConfigError("adapter.options", f"lora takes none, not {names}", "Remove them")

    def shapes(self, slot: AdapterSlot, site: LinearSite) -> dict[str, tuple[int, int]]:
        return {A: (slot.rank, site.in_features), B: (slot.rank, site.out_features)}

    def scale(self, spec: AdapterSpec) -> float:
        return spec.alpha / spec.rank

    def initialise(
        self, spec: AdapterSpec, site: LinearSite, generator: Generator
    ) -> dict[str, Tensor]:
        a_RD = torch.empty(spec.rank, site.in_features)
        torch.nn.init.kaiming_uniform_(a_RD, a=math.sqrt(5), generator=generator)
        return {A: a_RD, B: torch.zeros(spec.rank, site.out_features)}

    def linear(
        self, x_TD: Tensor, base: BaseLinear, pool: SitePool, current: AdapterPass
    ) -> Tensor:
        a, b = pool.parameters[A], pool.parameters[B]
        if current.deterministic and not x_TD.is_cuda:
            return stable_lora_linear(x_TD, base, a, b, current)
        return multi_lora_linear(
            x_TD,
            base.weight_OD,
            base.bias_O,
            current.leaf(a),
            current.leaf(b).T,
            a.slot_rows,
            current.pool.scale_S,
            current.rows,
            current.dropout,
            base.site.key,
            current.deterministic,
        )

    def to_peft(self, site_name: str, parameters: Parameters) -> dict[str, Tensor]:
        prefix = f"base_model.model.{site_name}"
        return {
            f"{prefix}.lora_A.weight": parameters[A],
            f"{prefix}.lora_B.weight": parameters[B].T,
        }

    def from_peft(
        self, slot: AdapterSlot, site: LinearSite, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        prefix = f"base_model.model.{site.name}"
        return {
            A: tensors[f"{prefix}.lora_A.weight"].float(),
            B: tensors[f"{prefix}.lora_B.weight"].float().T.contiguous(),
        }

    def peft_config(self, spec: AdapterSpec) -> dict[str, Any]:
        return {
            "peft_type": "LORA",
            "r": spec.rank,
            "lora_alpha": spec.alpha,
            "lora_dropout": spec.dropout,
            "target_modules": list(spec.targets),
            "bias": "none",
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
        }
