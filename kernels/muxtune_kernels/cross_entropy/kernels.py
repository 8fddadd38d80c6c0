"""Softmax, loss and gradient of a chunk of logits, in place; and per-slot sums of rows.

Shape suffixes: V vocabulary, N values of a block, T rows.
"""

# Triton's jit hides launch options and constexpr parameters from the type checker.
# pyright: reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from .reference import IGNORED_LABEL


@triton.jit
def _row_loss_kernel(
    logits_ptr, label_ptr, slot_of_row_ptr, scale_ptr, loss_ptr, vocabulary, stride,
    IGNORED: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program. BACKWARD overwrites the logits by their gradient."""
    row = tl.program_id(0)
    label = tl.load(label_ptr + row)
    slot = tl.load(slot_of_row_ptr + row)
    logits_ptr += row.to(tl.int64) * stride
    if (label == IGNORED) | (slot < 0):
        tl.store(loss_ptr + row, 0.0)
        if BACKWARD:
            for start in range(0, vocabulary, BLOCK):
                v_N = start + tl.arange(0, BLOCK)
                zero_N = tl.zeros((BLOCK,), logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + v_N, zero_N, mask=v_N < vocabulary)
    else:
        highest_N = tl.full((BLOCK,), float("-inf"), tl.float32)
        total_N = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocabulary, BLOCK):
            v_N = start + tl.arange(0, BLOCK)
            logit_N = tl.load(logits_ptr + v_N, mask=v_N < vocabulary, other=float("-inf"))
            logit_N = logit_N.to(tl.float32)
            new_N = tl.maximum(highest_N, logit_N, propagate_nan=tl.PropagateNan.ALL)
            # A lane that saw nothing but -inf keeps its zero sum: exp(-inf - 0) = 0.
            safe_N = tl.where(new_N == float("-inf"), 0.0, new_N)
            total_N = total_N * tl.exp(highest_N - safe_N) + tl.exp(logit_N - safe_N)
            highest_N = new_N
        highest = tl.max(highest_N, 0)
        lanes_N = tl.where(highest_N == float("-inf"), 0.0, total_N * tl.exp(highest_N - highest))
        total = tl.sum(lanes_N, 0)
        scale = tl.load(scale_ptr + slot)
        target = tl.load(logits_ptr + label).to(tl.float32)
        tl.store(loss_ptr + row, (highest + tl.log(total) - target) * scale)
        if BACKWARD:
            tl.debug_barrier()  # the target's logit is read before it is overwritten
            for start in range(0, vocabulary, BLOCK):
                v_N = start + tl.arange(0, BLOCK)
                logit_N = tl.load(logits_ptr + v_N, mask=v_N < vocabulary, other=float("-inf"))
                grad_N = tl.exp(logit_N.to(tl.float32) - highest) / total
                grad_N = (grad_N - (v_N == label).to(tl.float32)) * scale
                grad_N = grad_N.to(logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + v_N, grad_N, mask=v_N < vocabulary)


@triton.jit
def _slot_sum_kernel(value_ptr, slot_of_row_ptr, out_ptr, num_rows, BLOCK: tl.constexpr):
    """One slot a program; blocks count from its first row, so that its place does not matter."""
    slot = tl.program_id(0)
    first = num_rows
    for start in range(0, num_rows, BLOCK):
        row_T = start + tl.arange(0, BLOCK)
        own_T = tl.load(slot_of_row_ptr + row_T, mask=row_T < num_rows, other=-1) == slot
        first = tl.minimum(first, tl.min(tl.where(own_T, row_T, num_rows)))
    total_T = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, num_rows, BLOCK):
        row_T = start + tl.arange(0, BLOCK)
        own_T = tl.load(slot_of_row_ptr + row_T, mask=row_T < num_rows, other=-1) == slot
        total_T += tl.load(value_ptr + row_T, mask=own_T, other=0.0)
    tl.store(out_ptr + slot, tl.sum(total_T, 0))


def slot_losses_cuda(
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
    """As `slot_losses`; static shapes and no host sync, so capturable. ``whole_chunks``: see
    `multi_task_cross_entropy_grad`."""
    num_rows, vocabulary = hidden_TD.shape[0], lm_head_VD.shape[0]
    loss_T = torch.empty(num_rows, dtype=torch.float32, device=hidden_TD.device)
    most_rows = chunk_rows if whole_chunks else min(chunk_rows, num_rows)
    logits = hidden_TD.new_empty((most_rows, vocabulary))
    block = min(4096, triton.next_power_of_2(vocabulary))
    for start in range(0, num_rows, chunk_rows):
        rows = slice(start, min(start + chunk_rows, num_rows))
        hidden_CD = hidden_TD[rows]
        is_short = whole_chunks and hidden_CD.shape[0] < chunk_rows
        if is_short:
            hidden_CD = functional.pad(hidden_CD, (0, 0, 0, chunk_rows - hidden_CD.shape[0]))
        logits_CV = logits[: hidden_CD.shape[0]]
        torch.mm(hidden_CD, lm_head_VD.t(), out=logits_CV)
        _row_loss_kernel[(rows.stop - rows.start,)](
            logits_CV, labels_T[rows], slot_of_row_T[rows], scale_S, loss_T[rows], vocabulary,
            vocabulary, IGNORED_LABEL, grad_TD is not None, block, num_warps=8,
        )  # fmt: skip
        if grad_TD is not None and is_short:
            grad_TD[rows] = torch.mm(logits_CV, lm_head_VD)[: rows.stop - rows.start]
        elif grad_TD is not None:
            torch.mm(logits_CV, lm_head_VD, out=grad_TD[rows])
    loss_S = torch.empty(num_slots, dtype=torch.float32, device=hidden_TD.device)
    if num_slots:
        _slot_sum_kernel[(num_slots,)](loss_T, slot_of_row_T, loss_S, num_rows, 1024, num_warps=4)
    return loss_S
