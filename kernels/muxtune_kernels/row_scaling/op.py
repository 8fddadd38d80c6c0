"""Dispatch and the plain form.

Only rows of slots that have a vector are read or written, so the cost does not grow with the other
slots' rows. A slot's rows lie together, as the bounds say.

Shape suffixes: T rows, W features, U vectors, S slots.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class SlotVectors(NamedTuple):
    """``vector_UW``, ``grad_UW``: float32. ``slot_of_vector_U``: int64, whose it is.
    ``row_of_slot_S``: int64 [S + 1], a slot's vector, or U where its task has none.
    ``slot_bounds_S3``: int32, first row, one past the last, number of rows of each slot.
    ``keep_S``: int32; a slot that is not 0 adds to its gradient, the others overwrite it."""

    vector_UW: Tensor
    grad_UW: Tensor
    slot_of_vector_U: Tensor
    row_of_slot_S: Tensor
    slot_bounds_S3: Tensor
    keep_S: Tensor


def scale_slot_rows_(
    out_TW: Tensor, x_TW: Tensor, vectors: SlotVectors, kept_TW: Tensor | None = None
) -> None:
    """out = x * vector on the rows of slots that own one; other rows of ``out`` stay.

    out_TW, x_TW: one dtype, features contiguous; columns of something wider may be given, and the
    same for both. kept_TW: where x goes on these rows, unscaled.
    """
    if out_TW.is_cuda:
        from .kernels import forward_  # triton is needed on CUDA only

        forward_(out_TW, x_TW, vectors, kept_TW)
        return
    for vector, rows in _owned(vectors):
        if kept_TW is not None:
            kept_TW[rows] = x_TW[rows]
        out_TW[rows] = (x_TW[rows].float() * vectors.vector_UW[vector]).to(out_TW.dtype)


def scale_slot_rows_backward_(
    dx_TW: Tensor, dout_TW: Tensor, x_TW: Tensor, vectors: SlotVectors
) -> None:
    """dx = dout * vector on the owners' rows (dx may be dout), and the vectors' gradients: sums of
    dout * x over the owner's rows, in an order that counts from its first; 0 for those that nobody
    owns."""
    if dx_TW.is_cuda:
        from .kernels import backward_

        backward_(dx_TW, dout_TW, x_TW, vectors)
        return
    sums_UW = torch.zeros_like(vectors.grad_UW)
    for vector, rows in _owned(vectors):
        dout = dout_TW[rows].float()
        sums_UW[vector] = (dout * x_TW[rows].float()).sum(0)
        dx_TW[rows] = (dout * vectors.vector_UW[vector]).to(dx_TW.dtype)
    keeps_U1 = vectors.keep_S[vectors.slot_of_vector_U].bool()[:, None]
    vectors.grad_UW.copy_(sums_UW + torch.where(keeps_U1, vectors.grad_UW, 0))


def _owned(vectors: SlotVectors) -> Iterator[tuple[int, slice]]:
    """(vector, its slot's rows) of every slot that owns one and has rows."""
    for vector, slot in enumerate(vectors.slot_of_vector_U.tolist()):
        start, stop, _ = vectors.slot_bounds_S3[slot].tolist()
        if int(vectors.row_of_slot_S[slot]) == vector and stop > start:
            yield vector, slice(start, stop)
