"""Autograd and dispatch of the multi-task linear cross-entropy.

Shape suffixes: T rows, D model features, V vocabulary, S slots.
"""

from typing import Any

import torch
from torch import Tensor

from .reference import IGNORED_LABEL, slot_losses

DEFAULT_CHUNK_ROWS = 1024


def multi_task_cross_entropy(
    hidden_TD: Tensor,
    lm_head_VD: Tensor,
    labels_T: Tensor,
    slot_of_row_T: Tensor,
    loss_scale_S: Tensor,
    num_slots: int,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
) -> Tensor:
    """float32 [S]: each slot's sum over its target rows of CE(hidden @ lm_head^T) * loss_scale.

    hidden_TD: [T, D], float32 or bfloat16. lm_head_VD: frozen, dtype of hidden.
    labels_T: int64 [T], -100 = no target. slot_of_row_T: int32 [T], -1 = filler.
    loss_scale_S: float32 [S], 1 / target tokens of the task's whole optimizer batch, so that the
        losses of a batch's micro-batches add up to its mean.
    chunk_rows: rows whose logits exist at one time.

    The gradient with respect to hidden is computed in the forward, chunk by chunk; the backward
    multiplies it by the gradient of loss_S of each row's slot. Rows without a target get zeros.
    """
    return _MultiTaskCrossEntropy.apply(
        hidden_TD, lm_head_VD, labels_T, slot_of_row_T, loss_scale_S, num_slots, chunk_rows
    )


@torch.no_grad()
def multi_task_cross_entropy_grad(
    hidden_TD: Tensor,
    lm_head_VD: Tensor,
    labels_T: Tensor,
    slot_of_row_T: Tensor,
    loss_scale_S: Tensor,
    num_slots: int,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
    whole_chunks: bool = False,
) -> tuple[Tensor, Tensor]:
    """(loss_S, gradient of its sum with respect to hidden): the same without autograd.

    ``whole_chunks``: the last chunk's products have ``chunk_rows`` rows too, because a library
    chooses its algorithm by their number: a row's bits then do not depend on how many there are.
    """
    # The CPU form leaves rows without a target alone, the CUDA form writes every row.
    empty = torch.empty_like if hidden_TD.is_cuda else torch.zeros_like
    grad_TD = empty(hidden_TD)
    loss_S = _losses(
        hidden_TD, lm_head_VD, labels_T, slot_of_row_T, loss_scale_S, num_slots, chunk_rows,
        grad_TD, whole_chunks,
    )  # fmt: skip
    return loss_S, grad_TD


@torch.no_grad()
def multi_task_nll(
    hidden_TD: Tensor,
    lm_head_VD: Tensor,
    labels_T: Tensor,
    slot_of_row_T: Tensor,
    num_slots: int,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
) -> tuple[Tensor, Tensor]:
    """(nll_S float32, num_targets_S int64): raw sums for validation, no gradient."""
    hidden_TD, lm_head_VD = hidden_TD.detach(), lm_head_VD.detach()
    one_S = torch.ones(num_slots, dtype=torch.float32, device=hidden_TD.device)
    nll_S = _losses(
        hidden_TD, lm_head_VD, labels_T, slot_of_row_T, one_S, num_slots, chunk_rows, None
    )
    slot_S = torch.arange(num_slots, device=slot_of_row_T.device)
    target_ST = (slot_of_row_T == slot_S[:, None]) & (labels_T != IGNORED_LABEL)
    return nll_S, target_ST.sum(1)


def _losses(
    hidden_TD: Tensor,
    lm_head_VD: Tensor,
    labels_T: Tensor,
    slot_of_row_T: Tensor,
    scale_S: Tensor,
    num_slots: int,
    chunk_rows: int,
    grad_TD: Tensor | None,
    whole_chunks: bool = False,
) -> Tensor:
    if hidden_TD.is_cuda:
        from .kernels import slot_losses_cuda  # triton is needed on CUDA only

        return slot_losses_cuda(
            hidden_TD, lm_head_VD, labels_T, slot_of_row_T, scale_S, num_slots, chunk_rows,
            grad_TD, whole_chunks,
        )  # fmt: skip
    return slot_losses(
        hidden_TD, lm_head_VD, labels_T, slot_of_row_T, scale_S, num_slots, chunk_rows, grad_TD
    )


class _MultiTaskCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD, lm_head_VD, labels_T, slot_of_row_T, scale_S, num_slots, chunk_rows
    ) -> Tensor:
        needs_grad = ctx.needs_input_grad[0]
        hidden_TD = hidden_TD.contiguous()
        grad_TD = torch.zeros_like(hidden_TD) if needs_grad else None
        loss_S = _losses(
            hidden_TD, lm_head_VD, labels_T, slot_of_row_T, scale_S, num_slots, chunk_rows, grad_TD
        )
        if needs_grad:
            ctx.save_for_backward(grad_TD, slot_of_row_T)
        return loss_S

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        grad_TD, slot_of_row_T = ctx.saved_tensors
        slot_T = slot_of_row_T.long()
        factor_T = torch.where(slot_T >= 0, grad_outputs[0][slot_T.clamp(min=0)], 0.0)
        return grad_TD * factor_T.to(grad_TD.dtype)[:, None], None, None, None, None, None, None
