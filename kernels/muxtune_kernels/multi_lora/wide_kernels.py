"""Kernels of the wide form: the slots' factors lie behind the frozen weight, h behind the rows.

Shape suffixes: T rows of a tile, J rank columns of one slot, N features of a block, C blocks.
"""

# Triton's constexpr annotations are values, not types.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from .tiles import shrink_tile, sum_parts_tile, sum_splits_tile


@triton.jit
def _store_finite(to_ptr, value_JN, mask_JN):
    """Stores what is finite, zeros for the rest; whether there is such."""
    is_bad_JN = (value_JN != value_JN) | (tl.abs(value_JN) == float("inf"))
    tl.store(to_ptr, tl.where(is_bad_JN, 0.0, value_JN).to(to_ptr.dtype.element_ty), mask=mask_JN)
    return tl.max(tl.max((is_bad_JN & mask_JN).to(tl.int32), 1), 0)


@triton.jit
def widen_weight_kernel(
    a_ptr, b_ptr, weight_ptr, bad_ptr, offset_ptr, rank_ptr, edges_ptr, width, num_out, total_rank,
    member_columns, blocks_a, num_blocks, a_stride, b_stride, weight_stride,
    NUM_MEMBERS: tl.constexpr, RANK_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A below the weight, B^T beside it, in its dtype. A factor that is not finite would reach
    all rows through 0 * NaN, so it is zeroed there, and told: `bad` [S, blocks]."""
    block, slot = tl.program_id(0), tl.program_id(1)
    offset, rank = tl.load(offset_ptr + slot), tl.load(rank_ptr + slot)
    j_J = tl.arange(0, RANK_PAD)
    is_bad = 0
    if block < blocks_a:
        n_N = block * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_JN = (j_J < rank)[:, None] & (n_N < width)[None, :]
        for member in range(NUM_MEMBERS):
            row_J = (member * total_rank + offset + j_J).to(tl.int64)
            a_JN = tl.load(a_ptr + row_J[:, None] * a_stride + n_N[None, :], mask=mask_JN,
                           other=0.0)  # fmt: skip
            to_JN = weight_ptr + (num_out + row_J)[:, None] * weight_stride + n_N[None, :]
            is_bad = tl.maximum(is_bad, _store_finite(to_JN, a_JN, mask_JN))
    else:
        n_N = (block - blocks_a) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_JN = (j_J < rank)[:, None] & (n_N < num_out)[None, :]
        member_N = tl.zeros((BLOCK_N,), tl.int32)
        for other in tl.static_range(1, NUM_MEMBERS):
            member_N += (n_N >= tl.load(edges_ptr + other)).to(tl.int32)
        b_JN = tl.load(b_ptr + (offset + j_J).to(tl.int64)[:, None] * b_stride + n_N[None, :],
                       mask=mask_JN, other=0.0)  # fmt: skip
        to_JN = (weight_ptr + n_N.to(tl.int64)[None, :] * weight_stride + width
                 + member_N[None, :] * member_columns + offset + j_J[:, None])  # fmt: skip
        is_bad = _store_finite(to_JN, b_JN, mask_JN)
    tl.store(bad_ptr + slot * num_blocks + block, is_bad)


@triton.jit
def _widen_tile(
    tile, h_ptr, wide_ptr, slot_of_row_ptr, offset_ptr, rank_ptr, bad_ptr, num_rows, num_columns,
    total_rank, num_blocks, h_stride, wide_stride,
    NUM_MEMBERS: tl.constexpr, RANK_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A row's own columns of the compact h at its slot's place among all columns, zeros elsewhere;
    NaN where the slot's factors are not finite."""
    tl.debug_barrier()  # the program's own rows of h are written
    row_T = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    in_T = row_T < num_rows
    slot_T = tl.load(slot_of_row_ptr + row_T, mask=in_T, other=-1)
    at_T = wide_ptr + row_T.to(tl.int64) * wide_stride
    w_W = tl.arange(0, BLOCK_W)
    zeros_TW = tl.zeros((BLOCK_T, BLOCK_W), wide_ptr.dtype.element_ty)
    tl.store(at_T[:, None] + w_W[None, :], zeros_TW,
             mask=in_T[:, None] & (w_W < num_columns)[None, :])  # fmt: skip
    own_T = in_T & (slot_T >= 0)
    c_C = tl.arange(0, BLOCK_C)
    bad_TC = tl.load(bad_ptr + slot_T[:, None] * num_blocks + c_C[None, :],
                     mask=own_T[:, None] & (c_C < num_blocks)[None, :], other=0)  # fmt: skip
    bad_T = tl.max(bad_TC, 1) > 0
    rank_T = tl.load(rank_ptr + slot_T, mask=own_T, other=0)
    offset_T = tl.load(offset_ptr + slot_T, mask=own_T, other=0)
    j_J = tl.arange(0, RANK_PAD)
    own_TJ = own_T[:, None] & (j_J[None, :] < rank_T[:, None])
    tl.debug_barrier()  # the zeros come first
    for member in range(NUM_MEMBERS):
        h_TJ = tl.load(h_ptr + row_T.to(tl.int64)[:, None] * h_stride + member * RANK_PAD
                       + j_J[None, :], mask=own_TJ, other=0.0)  # fmt: skip
        h_TJ = tl.where(bad_T[:, None], float("nan"), h_TJ.to(tl.float32))
        tl.store(at_T[:, None] + member * total_rank + offset_T[:, None] + j_J[None, :],
                 h_TJ.to(wide_ptr.dtype.element_ty), mask=own_TJ)  # fmt: skip


@triton.jit
def wide_shrink_kernel(
    x_ptr, factor_ptr, h_ptr, wide_ptr, bad_ptr, slot_of_row_ptr, bounds_ptr, offset_ptr, rank_ptr,
    scale_ptr, num_rows, width, total_rank, x_stride, factor_stride, h_stride, num_columns,
    num_blocks, wide_stride,
    INNER: tl.constexpr, RANK_PAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """h of a tile of rows, compact, and wide."""
    tile = tl.program_id(0)
    shrink_tile(
        tile, 0, x_ptr, factor_ptr, h_ptr, slot_of_row_ptr, bounds_ptr, offset_ptr, rank_ptr,
        scale_ptr, scale_ptr, scale_ptr, 0, num_rows, width, total_rank, x_stride, factor_stride,
        1, h_stride, 0, INNER, RANK_PAD, 1, False, BLOCK_T, BLOCK_K, BLOCK_J,
    )  # fmt: skip
    _widen_tile(
        tile, h_ptr, wide_ptr, slot_of_row_ptr, offset_ptr, rank_ptr, bad_ptr, num_rows,
        num_columns, total_rank, num_blocks, h_stride, wide_stride, INNER, RANK_PAD, BLOCK_T,
        BLOCK_W, BLOCK_C,
    )  # fmt: skip


@triton.jit
def wide_sum_kernel(
    part_ptr, dh_ptr, wide_ptr, bad_ptr, db_part_ptr, db_ptr, slot_of_row_ptr, offset_ptr,
    rank_ptr, scale_ptr, edges_ptr, num_tiles, num_rows, width, num_db, h_stride, part_stride,
    num_columns, total_rank, num_blocks, wide_stride,
    NUM_MEMBERS: tl.constexpr, RANK_PAD: tl.constexpr, SPLITS: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_DB: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dh from its parts, compact, and wide; where dB was cut over rows, dB from its own."""
    pid = tl.program_id(0)
    if pid < num_tiles:
        sum_parts_tile(
            pid, part_ptr, dh_ptr, slot_of_row_ptr, rank_ptr, scale_ptr, scale_ptr, edges_ptr,
            num_rows, width, h_stride, part_stride, NUM_MEMBERS, RANK_PAD, False, ALIGN, BLOCK_N,
            BLOCK_T, BLOCK_P,
        )  # fmt: skip
        _widen_tile(
            pid, dh_ptr, wide_ptr, slot_of_row_ptr, offset_ptr, rank_ptr, bad_ptr, num_rows,
            num_columns, total_rank, num_blocks, h_stride, wide_stride, NUM_MEMBERS, RANK_PAD,
            BLOCK_T, BLOCK_W, BLOCK_C,
        )  # fmt: skip
    elif SPLITS > 1:
        sum_splits_tile(pid - num_tiles, db_part_ptr, db_ptr, num_db, SPLITS, BLOCK_DB)
