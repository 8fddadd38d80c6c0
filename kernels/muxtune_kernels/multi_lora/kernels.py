"""Kernels made of the tile programs."""

import triton
import triton.language as tl

from .tiles import (
    dh_db_tile,
    expand_tile,
    nth_largest_slot,
    outer_tile,
    shrink_tile,
    sum_parts_tile,
    sum_splits_tile,
)


@triton.jit
def shrink_kernel(
    x_ptr, factor_ptr, h_ptr, slot_of_row_ptr, bounds_ptr, offset_ptr, rank_ptr, scale_ptr,
    row_key_ptr, rate_ptr, module_word, num_rows, width, total_rank, x_stride, factor_stride_row,
    factor_stride_k, h_stride, h_stride_split,
    INNER: tl.constexpr, RANK_PAD: tl.constexpr, SPLITS: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    shrink_tile(
        tl.program_id(0), tl.program_id(1), x_ptr, factor_ptr, h_ptr, slot_of_row_ptr, bounds_ptr,
        offset_ptr, rank_ptr, scale_ptr, row_key_ptr, rate_ptr, module_word, num_rows,
        width, total_rank, x_stride, factor_stride_row, factor_stride_k, h_stride, h_stride_split,
        INNER, RANK_PAD, SPLITS, DROPOUT, BLOCK_T, BLOCK_K, BLOCK_J,
    )  # fmt: skip


@triton.jit
def expand_kernel(
    h_ptr, factor_ptr, bias_ptr, out_ptr, slot_of_row_ptr, offset_ptr, rank_ptr, row_key_ptr,
    rate_ptr, edges_ptr, module_word, num_rows, width, total_rank, h_stride, factor_stride_row,
    factor_stride_n, out_stride,
    NUM_MEMBERS: tl.constexpr, INNER: tl.constexpr, RANK_PAD: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, ALIGN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    expand_tile(
        tl.program_id(1), tl.program_id(0), tl.program_id(2), h_ptr, factor_ptr, bias_ptr, out_ptr,
        slot_of_row_ptr, offset_ptr, rank_ptr, row_key_ptr, rate_ptr, edges_ptr, module_word,
        num_rows, width, total_rank, h_stride, factor_stride_row, factor_stride_n, out_stride,
        NUM_MEMBERS, INNER, RANK_PAD, BIAS, DROPOUT, ALIGN, BLOCK_T, BLOCK_N, BLOCK_J,
    )  # fmt: skip


@triton.jit
def outer_kernel(
    h_ptr, v_ptr, out_ptr, slot_of_row_ptr, bounds_ptr, offset_ptr, rank_ptr, row_key_ptr,
    rate_ptr, keep_ptr, module_word, width, total_rank, h_stride, v_stride, out_stride_split,
    out_stride_row,
    INNER: tl.constexpr, RANK_PAD: tl.constexpr, SPLITS: tl.constexpr, DROPOUT: tl.constexpr,
    ACCUMULATE: tl.constexpr, SLOTS_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    slot = nth_largest_slot(bounds_ptr, tl.program_id(1), tl.num_programs(1), SLOTS_PAD)
    outer_tile(
        tl.program_id(0), slot, tl.program_id(2), h_ptr, v_ptr, out_ptr,
        slot_of_row_ptr, bounds_ptr, offset_ptr, rank_ptr, row_key_ptr, rate_ptr, keep_ptr,
        module_word, width, total_rank, h_stride, v_stride, out_stride_split, out_stride_row,
        INNER, RANK_PAD, SPLITS, DROPOUT, ACCUMULATE, BLOCK_T, BLOCK_N, BLOCK_J,
    )  # fmt: skip


@triton.jit
def dh_db_kernel(
    dy_ptr, b_ptr, h_ptr, part_ptr, db_ptr, slot_of_row_ptr, bounds_ptr, offset_ptr, rank_ptr,
    edges_ptr, keep_ptr, width, total_rank, dy_stride, b_stride_rank, b_stride_out, h_stride,
    part_stride, db_stride_split, db_stride_row,
    NUM_MEMBERS: tl.constexpr, RANK_PAD: tl.constexpr, SPLITS: tl.constexpr, ALIGN: tl.constexpr,
    ACCUMULATE: tl.constexpr, SLOTS_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    slot = nth_largest_slot(
        bounds_ptr, tl.program_id(1) // NUM_MEMBERS, tl.num_programs(1) // NUM_MEMBERS, SLOTS_PAD
    )
    dh_db_tile(
        tl.program_id(0), tl.program_id(1) % NUM_MEMBERS, slot, tl.program_id(2), dy_ptr, b_ptr,
        h_ptr, part_ptr, db_ptr, slot_of_row_ptr, bounds_ptr, offset_ptr, rank_ptr, edges_ptr,
        keep_ptr, width, total_rank, dy_stride, b_stride_rank, b_stride_out, h_stride, part_stride,
        db_stride_split, db_stride_row,
        NUM_MEMBERS, RANK_PAD, SPLITS, ALIGN, ACCUMULATE, BLOCK_T, BLOCK_N,
    )  # fmt: skip


@triton.jit
def sum_parts_kernel(
    part_ptr, dh_ptr, db_part_ptr, db_ptr, slot_of_row_ptr, rank_ptr, scale_ptr, rate_ptr,
    edges_ptr, num_tiles, num_rows, width, num_db, h_stride, part_stride,
    NUM_MEMBERS: tl.constexpr, RANK_PAD: tl.constexpr, SPLITS: tl.constexpr, RATED: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_DB: tl.constexpr,
):  # fmt: skip
    """dh from its parts; where dB was cut over rows (SPLITS > 1), dB from its own."""
    pid = tl.program_id(0)
    if pid < num_tiles:
        sum_parts_tile(
            pid, part_ptr, dh_ptr, slot_of_row_ptr, rank_ptr, scale_ptr, rate_ptr, edges_ptr,
            num_rows, width, h_stride, part_stride,
            NUM_MEMBERS, RANK_PAD, RATED, ALIGN, BLOCK_N, BLOCK_T, BLOCK_P,
        )  # fmt: skip
    elif SPLITS > 1:
        sum_splits_tile(pid - num_tiles, db_part_ptr, db_ptr, num_db, SPLITS, BLOCK_DB)


@triton.jit
def total_kernel(
    part_ptr, out_ptr, keep_ptr, slot_of_rank_ptr, num_values, width, total_rank,
    SPLITS: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = the sum of the parts of a factor's gradient; ACCUMULATE: and what is there in the rows
    of slots whose `keep` is not zero."""
    at_N = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_N = at_N < num_values
    total_N = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total_N += tl.load(part_ptr + split * num_values.to(tl.int64) + at_N, mask=in_N, other=0.0)
    if ACCUMULATE:
        rank_N = (at_N // width) % total_rank
        keeps_N = tl.load(keep_ptr + tl.load(slot_of_rank_ptr + rank_N, mask=in_N, other=0),
                          mask=in_N, other=0) != 0  # fmt: skip
        total_N += tl.load(out_ptr + at_N, mask=in_N & keeps_N, other=0.0).to(tl.float32)
    tl.store(out_ptr + at_N, total_N.to(out_ptr.dtype.element_ty), mask=in_N)
