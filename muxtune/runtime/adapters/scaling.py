"""Multiplying each row by a trained vector of its own slot.

y = x f + c (1 - f) with f = v / d: v is the slot's vector (one row of its pool), d an optional
constant divisor and c an optional vector that is kept out of the product (a bias). Rows of slots
without such a vector have f = 1 and come out bit by bit the same.

Shape suffixes: T rows, C rows of one span, R pool rows, W width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from muxtune.runtime.bank import ParameterPool
    from muxtune.runtime.passes import AdapterPass


def scale_rows(
    x_TW: Tensor,
    vectors: ParameterPool,
    current: AdapterPass,
    divisor_RW: Tensor | None = None,
    kept_W: Tensor | None = None,
) -> Tensor:
    """[T, W], dtype of x.

    Deterministic mode: a loop over spans whose row sums are taken in the gradient's dtype.
    Otherwise a fixed number of ops for any number of slots; on CUDA its gradient sums use
    atomics.
    """
    if current.deterministic:
        return _ScaleSpans.apply(x_TW, current.anchor, vectors, current, divisor_RW, kept_W)
    leaf_RW = current.leaf(vectors)
    factor_RW = leaf_RW if divisor_RW is None else leaf_RW / divisor_RW
    table_RW = torch.cat([factor_RW, factor_RW.new_ones(1, x_TW.shape[1])])
    # Filler's slot is -1, which is the last entry: the row of ones.
    slots = vectors.row_of_slot_S.numel()
    row_T = vectors.row_of_slot_S.index_select(0, current.rows.slot_of_row_T.long() % slots)
    factor_TW = table_RW.index_select(0, row_T)
    y_TW = x_TW * factor_TW
    if kept_W is not None:
        y_TW = y_TW + kept_W * (1 - factor_TW)
    return y_TW.to(x_TW.dtype)


class _ScaleSpans(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TW: Tensor,
        anchor: Tensor | None,
        vectors: ParameterPool,
        current: AdapterPass,
        divisor_RW: Tensor | None,
        kept_W: Tensor | None,
    ) -> Tensor:
        y_TW = x_TW.clone()
        spans = []
        for slot, start, stop in current.rows.spans:
            if not vectors.owned[slot]:
                continue
            pool_row, rows = vectors.rows_of(slot), slice(start, stop)
            factor_1W = vectors.param_RW[pool_row].clone()
            if divisor_RW is not None:
                factor_1W /= divisor_RW[pool_row]
            y_CW = x_TW[rows] * factor_1W
            y_TW[rows] = y_CW if kept_W is None else y_CW + kept_W * (1 - factor_1W)
            spans.append((rows, pool_row, factor_1W))
        ctx.save_for_backward(x_TW)
        ctx.spans, ctx.operands = spans, (vectors, current, divisor_RW, kept_W)
        return y_TW

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        (x_TW,) = ctx.saved_tensors
        vectors, current, divisor_RW, kept_W = ctx.operands
        grad_TW = grad_outputs[0]
        grad_x_TW = grad_TW.clone()
        for rows, pool_row, factor_1W in ctx.spans:
            scaled_CW = x_TW[rows] if kept_W is None else x_TW[rows] - kept_W
            sum_dtype = vectors.grad_RW.dtype
            grad_1W = (grad_TW[rows].to(sum_dtype) * scaled_CW.to(sum_dtype)).sum(0, keepdim=True)
            if divisor_RW is not None:
                grad_1W /= divisor_RW[pool_row]
            current.stage(vectors, pool_row, grad_1W)
            grad_x_TW[rows] = (grad_TW[rows] * factor_1W).to(grad_TW.dtype)
        return grad_x_TW, None, None, None, None, None
