"""The parts of the multi-task bottleneck that the low-rank linear has no kernel for.

  expand  out[t, n]  = base[t, n] + sum_j inner[t, j] F[row(s, j), n] + bias[s, n]
          forward: inner = relu(h + d_s), which is written too; backward: inner = dh, no bias
  biases  du[s, n]   = sum_t dz[t, n], dd[row(s, j)] = sum_t dh[t, j] over the rows t of slot s
where s is the slot of row t. Rows of slots without a bottleneck, and filler, keep their base.

Shape suffixes: T rows of a tile, N features of a tile, J columns of the compact inner rows.
"""

# Triton's constexpr annotations are values, not types; its jit hides launch options.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

import triton
import triton.language as tl

from ..dropout.bits import keep_bits, row_words
from ..multi_lora.tiles import slot_range


@triton.jit
def expand_kernel(
    h_ptr, inner_ptr, base_ptr, out_ptr, factor_ptr, inner_bias_ptr, bias_ptr, bias_row_ptr,
    owned_ptr, slot_of_row_ptr, offset_ptr, rank_ptr, row_key_ptr, rate_ptr, module_word, num_rows,
    width, h_stride, base_stride, out_stride,
    FORWARD: tl.constexpr, DROPOUT: tl.constexpr, RANK_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """DROPOUT masks what is added (backward)."""
    block = tl.program_id(0)
    row_T = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    n_N, j_J = block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, RANK_PAD)
    in_T, in_N = row_T < num_rows, n_N < width
    in_TN, at_T1 = in_T[:, None] & in_N[None, :], row_T.to(tl.int64)[:, None]
    slot_T = tl.load(slot_of_row_ptr + row_T, mask=in_T, other=-1)
    base_TN = tl.load(base_ptr + at_T1 * base_stride + n_N[None, :], mask=in_TN, other=0.0)
    h_TJ = tl.load(h_ptr + at_T1 * h_stride + j_J[None, :], mask=in_T[:, None], other=0.0)
    inner_TJ = tl.zeros((BLOCK_T, RANK_PAD), tl.float32)
    out_TN = base_TN.to(tl.float32)
    first, after = slot_range(slot_T)
    for slot in range(first, after):
        rank, here_T = tl.load(rank_ptr + slot), slot_T == slot
        if (tl.max(here_T.to(tl.int32)) > 0) & (rank > 0) & (tl.load(owned_ptr + slot) != 0):
            row_J, in_J = tl.load(offset_ptr + slot) + j_J, j_J < rank
            f_JN = tl.load(factor_ptr + row_J.to(tl.int64)[:, None] * width + n_N[None, :],
                           mask=in_J[:, None] & in_N[None, :], other=0.0)  # fmt: skip
            used_TJ = h_TJ
            if FORWARD:
                bias_J = tl.load(inner_bias_ptr + row_J, mask=in_J, other=0.0).to(tl.float32)
                sum_TJ = h_TJ.to(tl.float32) + bias_J[None, :]
                relu_TJ = tl.where(sum_TJ <= 0, 0.0, sum_TJ)  # a NaN stays one
                inner_TJ = tl.where(here_T[:, None], relu_TJ, inner_TJ)
                used_TJ = relu_TJ.to(h_TJ.dtype)
            change_TN = tl.dot(used_TJ, f_JN.to(h_TJ.dtype), input_precision="ieee")
            if FORWARD:
                bias_row = tl.load(bias_row_ptr + slot).to(tl.int64)
                bias_N = tl.load(bias_ptr + bias_row * width + n_N, mask=in_N, other=0.0)
                change_TN += bias_N.to(tl.float32)[None, :]
            if DROPOUT:
                word_T = row_words(tl.load(row_key_ptr + row_T, mask=in_T, other=0), module_word)
                rate = tl.load(rate_ptr + slot)
                threshold_T = tl.floor(tl.zeros_like(row_T) + rate * 65536 + 0.5).to(tl.int32)
                keep_TN = keep_bits(word_T, block * BLOCK_N, threshold_T, BLOCK_N)
                change_TN = tl.where(keep_TN, change_TN, 0.0)
            out_TN = tl.where(here_T[:, None], out_TN + change_TN, out_TN)
    tl.store(out_ptr + at_T1 * out_stride + n_N[None, :], out_TN.to(out_ptr.dtype.element_ty),
             mask=in_TN)  # fmt: skip
    if FORWARD:  # noqa: SIM102 (a constexpr branch of its own)
        if block == 0:
            tl.store(inner_ptr + at_T1 * h_stride + j_J[None, :],
                     inner_TJ.to(inner_ptr.dtype.element_ty), mask=in_T[:, None])  # fmt: skip


@triton.jit
def _column_sums(
    ptr, slot_of_row_ptr, slot, start, stop, stride, n_N, in_N, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Over a slot's rows, in an order that counts from its first."""
    sum_TN = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for t in range(start, stop, BLOCK_T):
        row_T = t + tl.arange(0, BLOCK_T)
        own_T = tl.load(slot_of_row_ptr + row_T, mask=row_T < stop, other=-1) == slot
        at_TN = ptr + row_T.to(tl.int64)[:, None] * stride + n_N[None, :]
        sum_TN += tl.load(at_TN, mask=own_T[:, None] & in_N[None, :], other=0.0).to(tl.float32)
    return tl.sum(sum_TN, 0)


@triton.jit
def biases_kernel(
    dz_ptr, dh_ptr, up_ptr, down_ptr, bias_row_ptr, owned_ptr, keep_ptr, slot_of_row_ptr,
    bounds_ptr, offset_ptr, rank_ptr, rate_ptr, width, dz_stride, h_stride,
    KEEPS: tl.constexpr, RATED: tl.constexpr, RANK_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of the up bias's features and one slot; the last block: the down bias. KEEPS: slots
    whose `keep` is not zero add to what is there. Slots that are not owned get zeros."""
    block, slot = tl.program_id(0), tl.program_id(1)
    rank = tl.load(rank_ptr + slot)
    if rank > 0:
        start, stop = tl.load(bounds_ptr + 3 * slot), tl.load(bounds_ptr + 3 * slot + 1)
        owned = tl.load(owned_ptr + slot) != 0
        n_N = block * BLOCK_N + tl.arange(0, BLOCK_N)
        at_N = up_ptr + tl.load(bias_row_ptr + slot).to(tl.int64) * width + n_N
        real_N = n_N < width
        if block == tl.num_programs(0) - 1:
            j_N = tl.arange(0, BLOCK_N)
            at_N, real_N = down_ptr + tl.load(offset_ptr + slot) + j_N, j_N < rank
            sum_N = _column_sums(dh_ptr, slot_of_row_ptr, slot, start, stop, h_stride, j_N, real_N,
                                 BLOCK_T, BLOCK_N)  # fmt: skip
            if RATED:  # dh carries 1 / (1 - rate), for the input that dropout scaled
                sum_N *= 1.0 - tl.load(rate_ptr + slot)
        else:
            sum_N = _column_sums(dz_ptr, slot_of_row_ptr, slot, start, stop, dz_stride, n_N,
                                 real_N, BLOCK_T, BLOCK_N)  # fmt: skip
        sum_N = tl.where(owned, sum_N, 0.0)
        if KEEPS:
            keeps = tl.load(keep_ptr + slot) != 0
            sum_N += tl.load(at_N, mask=real_N & keeps, other=0.0)
        tl.store(at_N, sum_N, mask=real_N)
