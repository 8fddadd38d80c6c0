"""Serial bottleneck adapter (Houlsby et al. 2019, arXiv 1902.00751) after a linear:

    z = y + relu(y D^T + d) U + u,   y = x W^T + b

with the targets o_proj and down_proj that is Houlsby's place: after attention and after the MLP,
before the residual sums. D is [rank, O]; U, kept transposed, is [rank, O]. U and both biases
start at zero, so a fresh adapter changes nothing. Alpha has no meaning. Dropout falls on what D
reads: relu(dropout(y) D^T + d).

PEFT has no such method, so no PEFT model loads the folder. Its format is PEFT's otherwise:
``peft_type`` is MUXTUNE_BOTTLENECK, and a site has the tensors ``bottleneck_down.weight``
[rank, O], ``bottleneck_down.bias`` [rank], ``bottleneck_up.weight`` [O, rank] and
``bottleneck_up.bias`` [O], as two ``nn.Linear`` of these names would.

Shape suffixes: T rows, C rows of one span, r rank, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Generator, Tensor

from muxtune.runtime.adapters.checks import check_dropout, check_options, check_rank
from muxtune.runtime.adapters.contract import AdapterMethod, Parameters
from muxtune.runtime.adapters.stable_lora import dropped, keep_rows
from muxtune.runtime.linear import BaseLinear, LinearSite
from muxtune.types import AdapterSlot, AdapterSpec
from muxtune_kernels.bottleneck import multi_task_bottleneck

if TYPE_CHECKING:
    from muxtune.runtime.bank import ParameterPool, SitePool
    from muxtune.runtime.passes import AdapterPass

DOWN, DOWN_BIAS = "bottleneck_down", "bottleneck_down_bias"
UP, UP_BIAS = "bottleneck_up", "bottleneck_up_bias"
NAMES = (DOWN, DOWN_BIAS, UP, UP_BIAS)


class Bottleneck(AdapterMethod):
    name = "bottleneck"

    def check(self, spec: AdapterSpec) -> None:
        check_rank(spec)
        check_dropout(spec)
        check_options(spec)

    def shapes(self, slot: AdapterSlot, site: LinearSite) -> dict[str, tuple[int, int]]:
        return {
            DOWN: (slot.rank, site.out_features),
            DOWN_BIAS: (slot.rank, 1),
            UP: (slot.rank, site.out_features),
            UP_BIAS: (1, site.out_features),
        }

    def initialise(
        self,
        spec: AdapterSpec,
        site: LinearSite,
        generator: Generator,
        weight_OD: Tensor | None = None,
    ) -> dict[str, Tensor]:
        down_rO = torch.empty(spec.rank, site.out_features)
        torch.nn.init.kaiming_uniform_(down_rO, a=math.sqrt(5), generator=generator)
        return {
            DOWN: down_rO,
            DOWN_BIAS: torch.zeros(spec.rank, 1),
            UP: torch.zeros(spec.rank, site.out_features),
            UP_BIAS: torch.zeros(1, site.out_features),
        }

    def aggregate(
        self, x_TD: Tensor, y_TO: Tensor, base: BaseLinear, pool: SitePool, current: AdapterPass
    ) -> Tensor:
        pools = [pool.parameters[name] for name in NAMES]
        spans = [span for span in current.rows.spans if pools[0].owned[span[0]]]
        if not spans:
            return y_TO
        if current.deterministic and not y_TO.is_cuda:
            return _Spans.apply(y_TO, base.site.key, current.anchor, spans, pools, current)
        down, down_bias, up, up_bias = (current.leaf(parameters) for parameters in pools)
        rows_S = pools[0].row_of_slot_S
        return multi_task_bottleneck(
            y_TO,
            down,
            down_bias.squeeze(1),
            up,
            up_bias,
            rows_S[:-1] < rows_S[-1],
            pools[0].slot_rows,
            current.rows,
            current.dropout,
            base.site.key,
            current.deterministic,
        )

    def to_peft(self, site_name: str, parameters: Parameters) -> dict[str, Tensor]:
        prefix = f"base_model.model.{site_name}"
        return {
            f"{prefix}.bottleneck_down.weight": parameters[DOWN],
            f"{prefix}.bottleneck_down.bias": parameters[DOWN_BIAS][:, 0],
            f"{prefix}.bottleneck_up.weight": parameters[UP].T,
            f"{prefix}.bottleneck_up.bias": parameters[UP_BIAS][0],
        }

    def from_peft(
        self, slot: AdapterSlot, site: LinearSite, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        prefix = f"base_model.model.{site.name}"
        return {
            DOWN: tensors[f"{prefix}.bottleneck_down.weight"].float(),
            DOWN_BIAS: tensors[f"{prefix}.bottleneck_down.bias"].float()[:, None],
            UP: tensors[f"{prefix}.bottleneck_up.weight"].float().T.contiguous(),
            UP_BIAS: tensors[f"{prefix}.bottleneck_up.bias"].float()[None],
        }

    def peft_config(self, spec: AdapterSpec, sites: Sequence[LinearSite]) -> dict[str, Any]:
        return {
            "peft_type": "MUXTUNE_BOTTLENECK",
            "r": spec.rank,
            "activation": "relu",
            "target_modules": list(spec.targets),
        }


class _Span(NamedTuple):
    """One span's rows, its rows in the pools, its inner activations."""

    rows: slice
    pool_rows: list[slice]
    inner_Cr: Tensor
    keep_CO: Tensor | None
    keep_scale: float


class _Spans(torch.autograd.Function):
    """Span by span, with row sums in the gradient's dtype: free of packing and neighbours."""

    @staticmethod
    def forward(
        ctx: Any,
        y_TO: Tensor,
        key: int,
        anchor: Tensor | None,
        spans: Sequence[tuple[int, int, int]],
        pools: Sequence[ParameterPool],
        current: AdapterPass,
    ) -> Tensor:
        z_TO = y_TO.clone()
        ctx.spans = []
        for slot, start, stop in spans:
            pool_rows = [pool.rows_of(slot) for pool in pools]
            down_rO, down_bias_r1, up_rO, up_bias_1O = _weights(pools, pool_rows, y_TO)
            rows = slice(start, stop)
            keep_CO, keep_scale = keep_rows(current, slot, rows, key, y_TO.shape[1])
            kept_CO = dropped(y_TO[rows], keep_CO, keep_scale)
            inner_Cr = (kept_CO @ down_rO.T + down_bias_r1.T).relu_()
            z_TO[rows] += inner_Cr @ up_rO + up_bias_1O
            ctx.spans.append(_Span(rows, pool_rows, inner_Cr, keep_CO, keep_scale))
        ctx.save_for_backward(y_TO)
        ctx.operands = pools, current
        return z_TO

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        (y_TO,) = ctx.saved_tensors
        pools, current = ctx.operands
        grad_TO = grad_outputs[0]
        grad_y_TO = grad_TO.clone()
        dtype = pools[0].grad_RW.dtype
        for rows, pool_rows, inner_Cr, keep_CO, keep_scale in ctx.spans:
            down_rO, _, up_rO, _ = _weights(pools, pool_rows, y_TO)
            grad_CO = grad_TO[rows]
            grad_inner_Cr = (grad_CO @ up_rO.T).masked_fill_(inner_Cr <= 0, 0)
            grad_y_TO[rows] += dropped(grad_inner_Cr @ down_rO, keep_CO, keep_scale)
            kept_CO = dropped(y_TO[rows], keep_CO, keep_scale)
            exact_Cr, exact_CO = grad_inner_Cr.to(dtype), grad_CO.to(dtype)
            sums = (
                exact_Cr.T @ kept_CO.to(dtype),
                exact_Cr.sum(0)[:, None],
                inner_Cr.to(dtype).T @ exact_CO,
                exact_CO.sum(0, keepdim=True),
            )
            for pool, pool_row, total in zip(pools, pool_rows, sums, strict=True):
                current.stage(pool, pool_row, total)
        return grad_y_TO, None, None, None, None, None


def _weights(
    pools: Sequence[ParameterPool], pool_rows: Sequence[slice], y_TO: Tensor
) -> list[Tensor]:
    return [pool.param_RW[rows].to(y_TO.dtype) for pool, rows in zip(pools, pool_rows, strict=True)]
