"""Multiplying each row by a trained vector of its own slot.

y = x f + c (1 - f) with f = v / d: v is the slot's vector (one row of its pool), d an optional
constant divisor and c what is kept out of the product, if anything: a vector (a bias) or a value
for each number. Rows of slots without such a vector have f = 1 and come out bit by bit the same.

Shape suffixes: T rows, C rows of one span, R pool rows, W width.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from muxtune_kernels.lasting import lasting
from muxtune_kernels.segments import segment_sum

if TYPE_CHECKING:
    from muxtune.runtime.bank import ParameterPool
    from muxtune.runtime.passes import AdapterPass


def scale_rows(
    x_TW: Tensor,
    vectors: ParameterPool,
    current: AdapterPass,
    divisor_RW: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """[T, W], dtype of x. ``kept``: [W], or [T, W], differentiable.

    On the CPU in deterministic mode a loop over spans, whose row sums are taken in the gradient's
    dtype. Otherwise a fixed number of ops for any number of slots, without atomics.
    """
    if current.deterministic and not x_TW.is_cuda:
        return _ScaleSpans.apply(x_TW, kept, current.anchor, vectors, current, divisor_RW)
    leaf_RW = current.leaf(vectors)
    factor_RW = leaf_RW if divisor_RW is None else leaf_RW / divisor_RW
    return _ScaleRows.apply(x_TW, kept, factor_RW, vectors, current)


@functools.lru_cache(maxsize=256)
def rows_index(spans: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """int64: the rows of (start, stop) spans; kept, so that a device is told them once."""
    rows = [row for start, stop in spans for row in range(start, stop)]
    return torch.tensor(rows, dtype=torch.int64, device=device)


def row_factors(factor_RW: Tensor, row_of_slot_S: Tensor, slot_of_row_T: Tensor) -> Tensor:
    """[T, W]: each row's vector, ones where its slot has none. Filler's slot is -1, which is the
    last entry."""
    table_RW = torch.cat([factor_RW, factor_RW.new_ones(1, factor_RW.shape[1])])
    row_T = row_of_slot_S.index_select(0, slot_of_row_T.long() % row_of_slot_S.numel())
    return table_RW.index_select(0, row_T)


class _ScaleRows(torch.autograd.Function):
    """All rows at once; a vector's gradient is a sum over its slot's rows (``segment_sum``)."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TW: Tensor,
        kept: Tensor | None,
        factor_RW: Tensor,
        vectors: ParameterPool,
        current: AdapterPass,
    ) -> Tensor:
        factor_TW = row_factors(factor_RW, vectors.row_of_slot_S, current.rows.slot_of_row_T)
        y_TW = x_TW * factor_TW
        if kept is not None:
            y_TW += kept * (1 - factor_TW)
        ctx.save_for_backward(x_TW, kept, factor_RW)
        ctx.operands = vectors, current
        return y_TW.to(x_TW.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        x_TW, kept, factor_RW = ctx.saved_tensors
        vectors, current = ctx.operands
        grad_TW = grad_outputs[0]
        factor_TW = row_factors(factor_RW, vectors.row_of_slot_S, current.rows.slot_of_row_T)
        scaled_TW = x_TW if kept is None else x_TW - kept
        sums_RW = segment_sum(
            grad_TW * scaled_TW, current.rows, vectors.slot_rows, current.deterministic
        )
        grad_kept = None
        if kept is not None and kept.dim() == 2:
            grad_kept = (grad_TW * (1 - factor_TW)).to(kept.dtype)
        # A slot's row that its task does not have is not read, so it gets no gradient.
        owned_R1 = owned_rows(vectors.row_of_slot_S, vectors.slot_rows)[:, None]
        sums_RW = torch.where(owned_R1, sums_RW, 0)
        return (grad_TW * factor_TW).to(x_TW.dtype), grad_kept, sums_RW, None, None


def owned_rows(row_of_slot_S: Tensor, slot_rows: tuple[int, ...]) -> Tensor:
    """bool [R]: whether the task in the slot of each pool row has it; no host sync."""
    used = _slots_with_rows(slot_rows, row_of_slot_S.device)
    return row_of_slot_S.index_select(0, used) < len(used)


# Captured graphs point to these tensors, so they are never let go.
@functools.cache
@lasting
def _slots_with_rows(slot_rows: tuple[int, ...], device: torch.device) -> Tensor:
    used = [slot for slot, count in enumerate(slot_rows) if count]
    return torch.tensor(used, dtype=torch.int64, device=device)


class _ScaleSpans(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TW: Tensor,
        kept: Tensor | None,
        anchor: Tensor | None,
        vectors: ParameterPool,
        current: AdapterPass,
        divisor_RW: Tensor | None,
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
            y_TW[rows] = y_CW if kept is None else y_CW + _of(kept, rows) * (1 - factor_1W)
            spans.append((rows, pool_row, factor_1W))
        ctx.save_for_backward(x_TW, kept)
        ctx.spans, ctx.operands = spans, (vectors, current, divisor_RW)
        return y_TW

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        x_TW, kept = ctx.saved_tensors
        vectors, current, divisor_RW = ctx.operands
        grad_TW = grad_outputs[0]
        grad_x_TW = grad_TW.clone()
        grad_kept = None if kept is None or kept.dim() == 1 else torch.zeros_like(kept)
        for rows, pool_row, factor_1W in ctx.spans:
            scaled_CW = x_TW[rows] if kept is None else x_TW[rows] - _of(kept, rows)
            sum_dtype = vectors.grad_RW.dtype
            grad_1W = (grad_TW[rows].to(sum_dtype) * scaled_CW.to(sum_dtype)).sum(0, keepdim=True)
            if divisor_RW is not None:
                grad_1W /= divisor_RW[pool_row]
            current.stage(vectors, pool_row, grad_1W)
            grad_x_TW[rows] = (grad_TW[rows] * factor_1W).to(grad_TW.dtype)
            if grad_kept is not None:
                grad_kept[rows] = grad_TW[rows] * (1 - factor_1W)
        return grad_x_TW, grad_kept, None, None, None, None


def _of(kept: Tensor, rows: slice) -> Tensor:
    return kept if kept.dim() == 1 else kept[rows]
