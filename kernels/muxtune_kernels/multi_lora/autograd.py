"""Autograd of the CUDA form.

Shape suffixes: T rows, D input features, O output features, R pool rank rows, S slots.
"""

from typing import Any

import torch
from torch import Tensor

from ..dropout import RowDropout
from ..rows import SlotRows, slot_bounds
from .flags import ReadyFlags
from .launch import Adapters, RowTensors, layout_of, lora_backward, lora_forward
from .tuning import LEAST_BLOCK_T, Tuning, cdiv, tuning_of


def multi_lora_linear_cuda(
    x_TD: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    a_RD: Tensor,
    b_OR: Tensor,
    scale_S: Tensor,
    rows: SlotRows,
    dropout: RowDropout | None,
    adapters: Adapters,
) -> Tensor:
    """y_TO on CUDA (or under Triton's interpreter); arguments as `multi_lora_linear_group`."""
    bounds_S3 = rows.slot_bounds_S3
    if bounds_S3 is None:
        bounds_S3 = slot_bounds(rows.slot_of_row_T, len(adapters.slot_ranks))
    row_key_T, rate_S = (None, None) if dropout is None else dropout
    return _MultiLoraLinear.apply(
        x_TD, weight_OD, bias_O, a_RD, b_OR, scale_S, rows.slot_of_row_T, bounds_S3, row_key_T,
        rate_S, adapters,
    )  # fmt: skip


class _MultiLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD, weight_OD, bias_O, a_RD, b_OR, scale_S, slot_of_row_T, bounds_S3,
        row_key_T, rate_S, adapters: Adapters,
    ) -> Tensor:  # fmt: skip
        x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
        dropout = None if row_key_T is None else RowDropout(row_key_T, rate_S)
        rows = RowTensors(slot_of_row_T, bounds_S3, scale_S, dropout)
        tuning = _tuning(x_TD, adapters)
        y_TO, h_TJ = lora_forward(
            x_TD, weight_OD, bias_O, a_RD, b_OR, rows, adapters, tuning, _flags(x_TD, tuning)
        )
        ctx.save_for_backward(
            x_TD, weight_OD, a_RD, b_OR, h_TJ, scale_S, slot_of_row_T, bounds_S3, row_key_T, rate_S
        )
        ctx.adapters = adapters
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        x_TD, weight_OD, a_RD, b_OR, h_TJ, *row_tensors = ctx.saved_tensors
        scale_S, slot_of_row_T, bounds_S3, row_key_T, rate_S = row_tensors
        dropout = None if row_key_T is None else RowDropout(row_key_T, rate_S)
        rows = RowTensors(slot_of_row_T, bounds_S3, scale_S, dropout)
        dy_TO = grad_outputs[0]
        dy_TO = dy_TO if dy_TO.stride(1) == 1 else dy_TO.contiguous()
        needs_factors = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        dx_TD, da_RD, db_OR = lora_backward(
            dy_TO, x_TD, h_TJ, weight_OD, a_RD, b_OR, rows, ctx.adapters,
            _tuning(x_TD, ctx.adapters), ctx.needs_input_grad[0], needs_factors,
        )  # fmt: skip
        return dx_TD, None, None, da_RD, db_OR, None, None, None, None, None, None


def _flags(x_TD: Tensor, tuning: Tuning) -> ReadyFlags | None:
    if not tuning.own_shrink:
        return None
    return ReadyFlags(cdiv(x_TD.shape[0], LEAST_BLOCK_T), x_TD.device)


def _tuning(x_TD: Tensor, adapters: Adapters) -> Tuning:
    rank_pad = layout_of(adapters, x_TD.device).rank_pad
    return tuning_of(
        *x_TD.shape, adapters.out_features, len(adapters.slot_ranks), rank_pad,
        x_TD.element_size(), adapters.deterministic,
    )  # fmt: skip
