"""DoRA (Liu et al. 2024, arXiv 2402.09353): y = m / |W + s B A| * (x W^T + s x A^T B^T) + b.

m is the trained magnitude, one number an output; the norm over the inputs is a constant in the
backward (section 4.3 there, and PEFT). It is found without making W + scale B A: for output o

    |W_o|^2 + 2 s (A W_o^T) . B_o + s^2 B_o . (A A^T) B_o

Option ``use_rslora`` as in LoRA. With dropout only the first product keeps the whole x, as in PEFT:

    y = x W^T + b + (f - 1) x' W^T + f s x' A^T B^T,   f = m / |W + s B A|, x' = dropout(x)

which is f times the sum without the bias, plus (f - 1) (x' - x) W^T: a second frozen product, on
the rows of tasks with dropout only.

Shape suffixes: N slots that have a magnitude here, r rank, R pool rows, T rows, C rows of tasks
with dropout, D in, O out.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

from muxtune.runtime.adapters import low_rank
from muxtune.runtime.adapters.checks import check_dropout, check_options, check_rank
from muxtune.runtime.adapters.contract import AdapterMethod, Parameters
from muxtune.runtime.adapters.scaling import rows_index, scale_rows
from muxtune.runtime.linear import BaseLinear, LinearSite
from muxtune.types import AdapterSlot, AdapterSpec
from muxtune_kernels import dropout_keep_mask

if TYPE_CHECKING:
    from muxtune.runtime.bank import ParameterPool, SitePool
    from muxtune.runtime.passes import AdapterPass

MAGNITUDE = "lora_magnitude_vector"
SMALLEST_SQUARE = 1e-30  # a float32 that has a square root and a reciprocal


class Dora(AdapterMethod):
    name = "dora"

    def check(self, spec: AdapterSpec) -> None:
        check_rank(spec)
        check_dropout(spec)
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
        self, x_TD: Tensor, y_TO: Tensor, base: BaseLinear, pool: SitePool, current: AdapterPass
    ) -> Tensor:
        magnitudes = pool.parameters[MAGNITUDE]
        if not any(magnitudes.owned):
            return y_TO
        norm_RO = _norms_RO(base, pool, current)
        kept = _kept(x_TD, y_TO, base, magnitudes, current)
        return scale_rows(y_TO, magnitudes, current, norm_RO, kept)

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


def _kept(
    x_TD: Tensor,
    y_TO: Tensor,
    base: BaseLinear,
    magnitudes: ParameterPool,
    current: AdapterPass,
) -> Tensor | None:
    """What stays out of the scaling: the bias, and on rows with dropout minus (x' - x) W^T, [T, O]
    where there are such rows.

    A row of a product does not depend on the others, so the rows are taken together in any mode.
    """
    spans = [
        (slot, slice(start, stop))
        for slot, start, stop in current.rows.spans
        if magnitudes.owned[slot] and current.pool.rates[slot]
    ]
    if current.dropout is None or not spans:
        return base.bias_O
    index_C = rows_index(tuple((rows.start, rows.stop) for _, rows in spans), x_TD.device)
    x_CD = x_TD.index_select(0, index_C)
    rate_C = current.dropout.rate_S[current.rows.slot_of_row_T.index_select(0, index_C).long()]
    keys_C = current.dropout.row_key_T.index_select(0, index_C)
    keep_CD = dropout_keep_mask(keys_C, base.site.key, x_CD.shape[1], rate_C)
    dropped_CD = torch.where(keep_CD, x_CD / (1 - rate_C[:, None]).to(x_CD.dtype), 0)
    missing_CO = functional.linear(dropped_CD - x_CD, base.weight_OD)
    kept_TO = torch.zeros_like(y_TO) if base.bias_O is None else base.bias_O.expand_as(y_TO)
    return kept_TO.index_add(0, index_C, missing_CO, alpha=-1)


@torch.no_grad()
def _norms_RO(base: BaseLinear, pool: SitePool, current: AdapterPass) -> Tensor:
    """Norms for the magnitudes' pool rows, 1 where there is no task.

    Deterministic mode: each slot by itself, so that it cannot tell its neighbours; otherwise all
    at once, padded to the largest rank: products of separate slots, so a NaN stays where it is.
    """
    magnitudes = pool.parameters[MAGNITUDE]
    slots = [slot for slot, owned in enumerate(magnitudes.owned) if owned]
    groups = [(slot,) for slot in slots] if current.deterministic else [tuple(slots)]
    norm_RO = torch.ones_like(magnitudes.param_RW)
    for group in groups:
        first = [magnitudes.rows_of(slot).start for slot in group]
        places = tuple((start, start + 1) for start in first)
        index_N = rows_index(places, norm_RO.device)
        norm_RO.index_copy_(0, index_N, _norms_NO(base, pool, current, group))
    return norm_RO


def _norms_NO(
    base: BaseLinear, pool: SitePool, current: AdapterPass, slots: Sequence[int]
) -> Tensor:
    a_NrD = _stacked(pool.parameters[low_rank.A], slots)
    b_NrO = _stacked(pool.parameters[low_rank.B], slots)
    slot_index_N = rows_index(tuple((slot, slot + 1) for slot in slots), a_NrD.device)
    scale_N11 = current.pool.scale_S.index_select(0, slot_index_N).view(-1, 1, 1)
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
    padded_RW = torch.cat([factors.param_RW, factors.param_RW.new_zeros(1, parts[0].shape[1])])
    index_Nr = _padded_rows(factors.slot_rows, tuple(slots), padded_RW.device)
    return padded_RW.index_select(0, index_Nr.flatten()).view(len(slots), rank, -1)


@functools.lru_cache(maxsize=256)
def _padded_rows(
    slot_rows: tuple[int, ...], slots: tuple[int, ...], device: torch.device
) -> Tensor:
    """int64 [N, r]: the slots' pool rows, one past the last for those that are missing."""
    rank, total = max(slot_rows[slot] for slot in slots), sum(slot_rows)
    first = [sum(slot_rows[:slot]) for slot in slots]
    rows = [
        [start + at if at < slot_rows[slot] else total for at in range(rank)]
        for start, slot in zip(first, slots, strict=True)
    ]
    return torch.tensor(rows, device=device)
