"""Dispatch of the multi-task bottleneck by device.

Shape suffixes: T rows, O features, R pool rank rows (the sum of the slots' ranks), U rows of the up
biases (one for each slot with a rank), S slots.
"""

from typing import Any

import torch
from torch import Tensor

from ..dropout import RowDropout
from ..rows import SlotRows
from .explicit import BottleneckPool, launched_backward, launched_forward
from .reference import multi_task_bottleneck_reference


def multi_task_bottleneck(
    y_TO: Tensor,
    down_RO: Tensor,
    down_bias_R: Tensor,
    up_RO: Tensor,
    up_bias_UO: Tensor,
    owned_S: Tensor,
    slot_ranks: tuple[int, ...],
    rows: SlotRows,
    dropout: RowDropout | None = None,
    module_key: int = 0,
    deterministic: bool = False,
) -> Tensor:
    """z = y + relu(dropout(y) D_s^T + d_s) U_s + u_s on the rows of slot s; [T, O].

    y_TO: float32 or bfloat16; the parameters float32, with float32 gradients. Slot s owns rows
    offset_s : offset_s + rank_s of D, d and U, and, where its rank is not 0, one row of u.
    owned_S: bool; a slot that is not owned keeps y and gets zero gradients, whatever it holds.
    Rows of slots of rank 0 and filler keep y bit by bit; nothing crosses slots, a NaN neither.
    The number of launches does not depend on the number of slots. No atomics.
    """
    if sum(slot_ranks) == 0:
        return y_TO
    if not y_TO.is_cuda:
        return multi_task_bottleneck_reference(
            y_TO, down_RO, down_bias_R, up_RO, up_bias_UO, owned_S, slot_ranks, rows, dropout,
            module_key,
        )  # fmt: skip
    return bottleneck_autograd(
        y_TO, down_RO, down_bias_R, up_RO, up_bias_UO, owned_S, slot_ranks, rows, dropout,
        module_key, deterministic,
    )  # fmt: skip


def bottleneck_autograd(
    y_TO: Tensor, down_RO: Tensor, down_bias_R: Tensor, up_RO: Tensor, up_bias_UO: Tensor,
    owned_S: Tensor, slot_ranks: tuple[int, ...], rows: SlotRows, dropout: RowDropout | None,
    module_key: int, deterministic: bool,
) -> Tensor:  # fmt: skip
    """The Triton form under autograd."""
    static = (slot_ranks, module_key, deterministic)
    return _MultiTaskBottleneck.apply(
        y_TO, down_RO, down_bias_R, up_RO, up_bias_UO, owned_S, static, rows, dropout
    )


class _MultiTaskBottleneck(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_TO, down_RO, down_bias_R, up_RO, up_bias_UO, owned_S, static, rows, dropout
    ) -> Tensor:
        pool = BottleneckPool(down_RO, down_bias_R, up_RO, up_bias_UO, owned_S, *static)
        z_TO, inner_TJ = launched_forward(y_TO, pool, rows, dropout)
        ctx.save_for_backward(y_TO, inner_TJ, down_RO, down_bias_R, up_RO, up_bias_UO, owned_S)
        ctx.operands = static, rows, dropout
        return z_TO

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        y_TO, inner_TJ, *parameters = ctx.saved_tensors
        static, rows, dropout = ctx.operands
        pool = BottleneckPool(*parameters, *static)
        dy_TO, grads = launched_backward(grad_outputs[0], y_TO, inner_TJ, pool, rows, dropout)
        return dy_TO, *grads, None, None, None, None
