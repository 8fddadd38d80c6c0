"""The CPU's deterministic form of the multi-task low-rank linear.

A row of a product does not depend on the other rows, but a sum over rows (the gradients of A and
B) depends, in its last bits, on where the rows lie; AdamW then turns a last bit of a tiny gradient
into a visible step, because it divides by the gradient's own size. So these sums are taken in
float64: a task's gradient, rounded to float32, is the same for any packing, chunk length and
neighbourhood. Everything else is as ``muxtune_kernels.multi_lora_linear``.

Shape suffixes: T rows, C rows of one span, D input features, O output features, R pool rows,
r rank of one slot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from muxtune.runtime.linear import BaseLinear
from muxtune_kernels import dropout_keep_mask

if TYPE_CHECKING:
    from muxtune.runtime.bank import ParameterPool
    from muxtune.runtime.passes import AdapterPass


class _Span(NamedTuple):
    """A slot's rows in the micro-batch, its rows in the pools, and what the backward needs."""

    rows: slice
    pool_rows: slice
    scale: float
    keep_scale: float
    keep_CD: Tensor | None
    low_Cr: Tensor


def stable_lora_linear(
    x_TD: Tensor, base: BaseLinear, a: ParameterPool, b: ParameterPool, current: AdapterPass
) -> Tensor:
    """y_TO. Stages the gradients of A and B in ``current``, in float64."""
    return _StableLora.apply(x_TD, current.anchor, base, a, b, current)


class _StableLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        anchor: Tensor | None,
        base: BaseLinear,
        a: ParameterPool,
        b: ParameterPool,
        current: AdapterPass,
    ) -> Tensor:
        y_TO = functional.linear(x_TD, base.weight_OD, base.bias_O)
        spans = [
            _add_adapter(x_TD, y_TO, span, base, a, b, current)
            for span in current.rows.spans
            if a.slot_rows[span[0]]
        ]
        ctx.save_for_backward(x_TD)
        ctx.spans, ctx.operands = spans, (base, a, b, current)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        (x_TD,) = ctx.saved_tensors
        base, a, b, current = ctx.operands
        grad_TO = grad_outputs[0]
        grad_x_TD = grad_TO @ base.weight_OD if ctx.needs_input_grad[0] else None
        for span in ctx.spans:
            _backward_span(span, x_TD, grad_TO, grad_x_TD, a, b, current)
        return grad_x_TD, None, None, None, None, None


def _add_adapter(
    x_TD: Tensor,
    y_TO: Tensor,
    span: tuple[int, int, int],
    base: BaseLinear,
    a: ParameterPool,
    b: ParameterPool,
    current: AdapterPass,
) -> _Span:
    slot, start, stop = span
    rows, pool_rows = slice(start, stop), a.rows_of(slot)
    scale = current.pool.scales[slot]
    first = base.site.first_feature
    keep_CD, keep_scale = keep_rows(current, slot, rows, base.site.key, first + x_TD.shape[1])
    keep_CD = None if keep_CD is None else keep_CD[:, first:]
    a_rD, b_rO = _factors(a, b, pool_rows, x_TD.dtype)
    low_Cr = dropped(x_TD[rows], keep_CD, keep_scale) @ a_rD.T
    y_TO[rows].addmm_(low_Cr, b_rO, alpha=scale)
    return _Span(rows, pool_rows, scale, keep_scale, keep_CD, low_Cr)


def _backward_span(
    span: _Span,
    x_TD: Tensor,
    grad_TO: Tensor,
    grad_x_TD: Tensor | None,
    a: ParameterPool,
    b: ParameterPool,
    current: AdapterPass,
) -> None:
    rows, pool_rows = span.rows, span.pool_rows
    grad_CO = grad_TO[rows]
    a_rD, b_rO = _factors(a, b, pool_rows, x_TD.dtype)
    grad_low_Cr = (grad_CO @ b_rO.T).mul_(span.scale)
    kept_CD = dropped(x_TD[rows], span.keep_CD, span.keep_scale)
    current.stage(a, pool_rows, grad_low_Cr.double().T @ kept_CD.double())
    current.stage(b, pool_rows, (span.low_Cr.double() * span.scale).T @ grad_CO.double())
    if grad_x_TD is not None:
        grad_kept_CD = grad_low_Cr @ a_rD
        grad_x_TD[rows] += dropped(grad_kept_CD, span.keep_CD, span.keep_scale)


def _factors(
    a: ParameterPool, b: ParameterPool, pool_rows: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Of one slot, as the base model's type computes."""
    return a.param_RW[pool_rows].to(dtype), b.param_RW[pool_rows].to(dtype)


def keep_rows(
    current: AdapterPass, slot: int, rows: slice, key: int, width: int
) -> tuple[Tensor | None, float]:
    """One span's dropout: which numbers of [C, width] are kept (None: all), and their factor."""
    rate = current.pool.rates[slot]
    if not rate or current.dropout is None:
        return None, 1.0
    row_key_C = current.dropout.row_key_T[rows]
    return dropout_keep_mask(row_key_C, key, width, rate), 1 / (1 - rate)


def dropped(x_CD: Tensor, keep_CD: Tensor | None, keep_scale: float) -> Tensor:
    return x_CD if keep_CD is None else (x_CD * keep_CD).mul_(keep_scale)
