"""The frozen product with the low-rank factors of every slot that has them, as one op.

y = x W^T + b + scale * (dropout(x) A^T) B^T. All methods with low-rank factors keep them in the
same two pools: A is [rank, D] and B, transposed, [rank, O], so that a task's share of a pool is a
block of rows.

Shape suffixes: T rows, D input features, O output features, r rank of one slot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor
from torch.nn import functional

from muxtune.runtime.adapters.checks import switch
from muxtune.runtime.adapters.contract import Parameters
from muxtune.runtime.adapters.stable_lora import stable_lora_linear
from muxtune.runtime.linear import BaseLinear, LinearSite
from muxtune.types import AdapterSpec
from muxtune_kernels import multi_lora_linear

if TYPE_CHECKING:
    from muxtune.runtime.bank import SitePool
    from muxtune.runtime.passes import AdapterPass

A, B = "lora_A", "lora_B"
RANK_STABILISED = "use_rslora"


def base_linear(x_TD: Tensor, base: BaseLinear, pool: SitePool, current: AdapterPass) -> Tensor:
    """[T, O]."""
    if A not in pool.parameters:
        return functional.linear(x_TD, base.weight_OD, base.bias_O)
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


def factor_shapes(rank: int, site: LinearSite) -> dict[str, tuple[int, int]]:
    return {A: (rank, site.in_features), B: (rank, site.out_features)}


def start_factors(rank: int, site: LinearSite, generator: Generator) -> dict[str, Tensor]:
    """As PEFT's ``init_lora_weights=True``: A uniform, B zero."""
    a_rD = torch.empty(rank, site.in_features)
    torch.nn.init.kaiming_uniform_(a_rD, a=math.sqrt(5), generator=generator)
    return {A: a_rD, B: torch.zeros(rank, site.out_features)}


def low_rank_scale(spec: AdapterSpec) -> float:
    """alpha / rank, or alpha / sqrt(rank) (rsLoRA: Kalajdzievski 2023, arXiv 2312.03732)."""
    if switch(spec, RANK_STABILISED):
        return spec.alpha / math.sqrt(spec.rank)
    return spec.alpha / spec.rank


def factors_to_peft(site_name: str, parameters: Parameters) -> dict[str, Tensor]:
    prefix = f"base_model.model.{site_name}"
    return {
        f"{prefix}.lora_A.weight": parameters[A],
        f"{prefix}.lora_B.weight": parameters[B].T,
    }


def factors_from_peft(site: LinearSite, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"base_model.model.{site.name}"
    return {
        A: tensors[f"{prefix}.lora_A.weight"].float(),
        B: tensors[f"{prefix}.lora_B.weight"].float().T.contiguous(),
    }


def lora_config(spec: AdapterSpec, use_dora: bool) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "target_modules": list(spec.targets),
        "bias": "none",
        "use_rslora": switch(spec, RANK_STABILISED),
        "use_dora": use_dora,
        "init_lora_weights": True,
    }
