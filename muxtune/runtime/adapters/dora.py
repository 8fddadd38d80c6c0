"""DoRA (Liu et al. 2024, arXiv 2402.09353): y = m / |W + s B A| * (x W^T + s x A^T B^T) + b.

m is the trained magnitude, one number an output; the norm over the inputs is a constant in the
backward (section 4.3 there, and PEFT). It is found without making W + scale B A: for output o

    |W_o|^2 + 2 s (A W_o^T) . B_o + s^2 B_o . (A A^T) B_o

Option ``use_rslora`` as in LoRA. No dropout: with it PEFT needs a second frozen product.

Shape suffixes: N slots that have a magnitude here, r rank, R pool rows, T rows, D in, O out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from muxtune.runtime.adapters import low_rank
from muxtune.runtime.adapters.checks import check_no_dropout, check_options, check_rank
from muxtune.runtime.adapters.contract import AdapterMethod, Parameters
from muxtune.runtime.adapters.scaling import scale_rows
from muxtune.runtime.linear import BaseLinear, LinearSite
from muxtune.types import AdapterSlot, AdapterSpec

if TYPE_CHECKING:
    from muxtune.runtime.bank import ParameterPool, SitePool
    from muxtune.runtime.passes import AdapterPass

MAGNITUDE = "lora_magnitude_vector"
SMALLEST_SQUARE = 1e-30  # a float32 that has a square root and a reciprocal


class Dora(AdapterMethod):
    name = "dora"

    def check(self, spec: AdapterSpec) -> None:
        check_rank(spec)
        check_no_dropout(spec)
        check_options(spec)
        low_rank.low_rank_scale(spec)

    def shapes(self, slot: AdapterSlot, site: LinearSite) -> dict[str, tuple[int, int]]:
        return {**low_rank.factor_shapes(slot.rank, site), MAGNITUDE: (1, site.out_features)}

    def scale(self, spec: AdapterSpec) -> float:
        return low_rank.low_rank_scale(spec)

    def initialise(
        self,
        spec: AdapterSpec,
        site: LinearSite,
        generator: Generator,
        weight_OD: Tensor | None = None,
    ) -> dict[str, Tensor]:
        if weight_OD is None:
            raise ValueError("the magnitude starts from the frozen weight")
        norm_1O = torch.linalg.vector_norm(weight_OD.float(), dim=1)[None].cpu()
        return {**low_rank.start_factors(spec.rank, site, generator), MAGNITUDE: norm_1O}

    def aggregate(
        self, y_TO: Tensor, base: BaseLinear, pool: SitePool, current: AdapterPass
    ) -> Tensor:
        magnitudes = pool.parameters[MAGNITUDE]
        if not any(magnitudes.owned):
            return y_TO
        norm_RO = _norms_RO(base, pool, current)
        return scale_rows(y_TO, magnitudes, current, norm_RO, base.bias_O)

    def to_peft(self, site_name: str, parameters: Parameters) -> dict[str, Tensor]:
        return {
            **low_rank.factors_to_peft(site_name, parameters),
            f"base_model.model.{site_name}.lora_magnitude_vector": parameters[MAGNITUDE][0],
        }

    def from_peft(
        self, slot: AdapterSlot, site: LinearSite, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        magnitude = tensors[f"base_model.model.{site.name}.lora_magnitude_vector"].float()
        return {**low_rank.factors_from_peft(site, tensors), MAGNITUDE: magnitude[None]}

    def peft_config(self, spec: AdapterSpec, sites: Sequence[LinearSite]) -> dict[str, Any]:
        return low_rank.lora_config(spec, use_dora=True)


@torch.no_grad()
def _norms_RO(base: BaseLinear, pool: SitePool, current: AdapterPass) -> Tensor:
    """Norms for the magnitudes' pool rows, 1 where there is no task.

    Deterministic mode: each slot by itself, so that it cannot tell its neighbours; otherwise all
    at once, padded to the largest rank: products of separate slots, so a NaN stays where it is.
    """
    magnitudes = pool.parameters[MAGNITUDE]
    slots = [slot for slot, owned in enumerate(magnitudes.owned) if owned]
    groups = [[slot] for slot in slots] if current.deterministic else [slots]
    norm_RO = torch.ones_like(magnitudes.param_RW)
    for group in groups:
        rows = [magnitudes.rows_of(slot).start for slot in group]
        norm_RO[rows] = _norms_NO(base, pool, current, group)
    return norm_RO


def _norms_NO(
    base: BaseLinear, pool: SitePool, current: AdapterPass, slots: Sequence[int]
) -> Tensor:
    a_NrD = _stacked(pool.parameters[low_rank.A], slots)
    b_NrO = _stacked(pool.parameters[low_rank.B], slots)
    scale_N11 = current.pool.scale_S[list(slots)].view(-1, 1, 1)
    weight_OD = base.weight_OD
    shared_NrO = torch.matmul(a_NrD.flatten(0, 1).to(weight_OD.dtype), weight_OD.T)
    shared_NrO = shared_NrO.view(b_NrO.shape).float()
    own_NrO = torch.bmm(torch.bmm(a_NrD, a_NrD.mT), b_NrO)
    square_O = torch.linalg.vector_norm(weight_OD, dim=1, dtype=torch.float32).square()
    extra_NrO = b_NrO * (2 * scale_N11 * shared_NrO + scale_N11.square() * own_NrO)
    return (square_O + extra_NrO.sum(1)).clamp(min=SMALLEST_SQUARE).sqrt()


def _stacked(factors: ParameterPool, slots: Sequence[int]) -> Tensor:
    """[N, r, width], r the largest rank; zero rows below smaller ones."""
    rank = max(factors.slot_rows[slot] for slot in slots)
    parts = [factors.param_RW[factors.rows_of(slot)] for slot in slots]
    if len(parts) == 1:
        return parts[0][None]
    num_rows = factors.param_RW.shape[0]
    padded_RW = torch.cat([factors.param_RW, factors.param_RW.new_zeros(1, parts[0].shape[1])])
    index = [
        [
            factors.rows_of(slot).start + row if row < factors.slot_rows[slot] else num_rows
            for row in range(rank)
        ]
        for slot in slots
    ]
    return padded_RW[torch.tensor(index, device=padded_RW.device)]
