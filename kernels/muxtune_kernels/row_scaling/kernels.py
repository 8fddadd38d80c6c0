"""One program a vector and a block of features; it walks over its slot's rows.

Shape suffixes: T rows of a tile, N features of a block.
"""

# Triton's jit hides launch options and constexpr parameters from the type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from torch import Tensor

from .op import SlotVectors

_ROWS, _FEATURES = 32, 128


@triton.jit
def _rows_of(vector, slot_of_vector_ptr, row_of_slot_ptr, bounds_ptr):
    """(slot, first row, one past the last): none where nobody owns the vector."""
    slot = tl.load(slot_of_vector_ptr + vector)
    owned = tl.load(row_of_slot_ptr + slot) == vector
    start = tl.load(bounds_ptr + 3 * slot)
    stop = tl.where(owned, tl.load(bounds_ptr + 3 * slot + 1), start)
    return slot, start, stop


@triton.jit
def _forward_kernel(
    out_ptr, kept_ptr, x_ptr, vector_ptr, slot_of_vector_ptr, row_of_slot_ptr, bounds_ptr, width,
    out_stride, kept_stride, x_stride, KEEPS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    vector = tl.program_id(0)
    n_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_N = n_N < width
    _, start, stop = _rows_of(vector, slot_of_vector_ptr, row_of_slot_ptr, bounds_ptr)
    factor_N = tl.load(vector_ptr + vector * width + n_N, mask=in_N, other=0.0)
    for first in range(start + tl.program_id(2) * BLOCK_T, stop, BLOCK_T * SPLITS):
        row_T = first + tl.arange(0, BLOCK_T)
        in_TN = (row_T < stop)[:, None] & in_N[None, :]
        at_T = row_T.to(tl.int64)[:, None]
        x_TN = tl.load(x_ptr + at_T * x_stride + n_N[None, :], mask=in_TN, other=0.0)
        if KEEPS:
            tl.store(kept_ptr + at_T * kept_stride + n_N[None, :], x_TN, mask=in_TN)
        out_TN = x_TN.to(tl.float32) * factor_N[None, :]
        tl.store(out_ptr + at_T * out_stride + n_N[None, :],
                 out_TN.to(out_ptr.dtype.element_ty), mask=in_TN)  # fmt: skip


@triton.jit
def _backward_kernel(
    dx_ptr, dout_ptr, x_ptr, vector_ptr, grad_ptr, slot_of_vector_ptr, row_of_slot_ptr,
    bounds_ptr, keep_ptr, width, dx_stride, dout_stride, x_stride,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    vector = tl.program_id(0)
    n_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_N = n_N < width
    slot, start, stop = _rows_of(vector, slot_of_vector_ptr, row_of_slot_ptr, bounds_ptr)
    at_N = vector * width + n_N
    factor_N = tl.load(vector_ptr + at_N, mask=in_N, other=0.0)
    sum_TN = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for first in range(start, stop, BLOCK_T):
        row_T = first + tl.arange(0, BLOCK_T)
        in_TN = (row_T < stop)[:, None] & in_N[None, :]
        at_T = row_T.to(tl.int64)[:, None]
        x_TN = tl.load(x_ptr + at_T * x_stride + n_N[None, :], mask=in_TN, other=0.0)
        dout_TN = tl.load(dout_ptr + at_T * dout_stride + n_N[None, :], mask=in_TN, other=0.0)
        dout_TN = dout_TN.to(tl.float32)
        sum_TN += dout_TN * x_TN.to(tl.float32)
        tl.store(dx_ptr + at_T * dx_stride + n_N[None, :],
                 (dout_TN * factor_N[None, :]).to(dx_ptr.dtype.element_ty), mask=in_TN)  # fmt: skip
    sum_N = tl.sum(sum_TN, 0)
    old_N = tl.load(grad_ptr + at_N, mask=in_N & (tl.load(keep_ptr + slot) != 0), other=0.0)
    tl.store(grad_ptr + at_N, sum_N + old_N, mask=in_N)


def forward_(
    out_TW: Tensor, x_TW: Tensor, vectors: SlotVectors, kept_TW: Tensor | None = None
) -> None:
    num_vectors, width = vectors.vector_UW.shape
    splits = 4
    _forward_kernel[(num_vectors, triton.cdiv(width, _FEATURES), splits)](
        out_TW, out_TW if kept_TW is None else kept_TW, x_TW, vectors.vector_UW,
        vectors.slot_of_vector_U, vectors.row_of_slot_S, vectors.slot_bounds_S3, width,
        out_TW.stride(0), 0 if kept_TW is None else kept_TW.stride(0), x_TW.stride(0),
        kept_TW is not None, _ROWS, _FEATURES, splits, num_warps=4,
    )  # fmt: skip


def backward_(dx_TW: Tensor, dout_TW: Tensor, x_TW: Tensor, vectors: SlotVectors) -> None:
    num_vectors, width = vectors.vector_UW.shape
    _backward_kernel[(num_vectors, triton.cdiv(width, _FEATURES))](
        dx_TW, dout_TW, x_TW, vectors.vector_UW, vectors.grad_UW, vectors.slot_of_vector_U,
        vectors.row_of_slot_S, vectors.slot_bounds_S3, vectors.keep_S, width, dx_TW.stride(0),
        dout_TW.stride(0), x_TW.stride(0), _ROWS, _FEATURES, num_warps=4,
    )  # fmt: skip
