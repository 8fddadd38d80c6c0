"""Kernels of the form whose low-rank ranks are a few more of the product's reduced features.

Shape suffixes: T rows of a tile, J rank columns of one slot, W columns of a window, N features of
a tile or block, K reduced features, I tiles of a program, S slots.
"""

# Triton's constexpr annotations are values, not types.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from .tiles import _member_range, _shrink_slot, slot_range, uniform_slot


@triton.jit
def _store_finite(to_ptr, value_JN, mask_JN):
    """Stores what is finite, zeros for the rest; whether there is such."""
    is_bad_JN = (value_JN != value_JN) | (tl.abs(value_JN) == float("inf"))
    tl.store(to_ptr, tl.where(is_bad_JN, 0.0, value_JN).to(to_ptr.dtype.element_ty), mask=mask_JN)
    return tl.max(tl.max((is_bad_JN & mask_JN).to(tl.int32), 1), 0)


@triton.jit
def place_factors_kernel(
    a_ptr, b_ptr, a_to_ptr, b_to_ptr, bad_ptr, offset_ptr, rank_ptr, width, num_out, total_rank,
    blocks_a, num_blocks, a_stride, b_stride, a_to_stride, b_to_stride,
    NUM_MEMBERS: tl.constexpr, RANK_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A and B^T where products read them, in their dtype. A factor that is not finite would reach
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
            to_JN = a_to_ptr + row_J[:, None] * a_to_stride + n_N[None, :]
            is_bad = tl.maximum(is_bad, _store_finite(to_JN, a_JN, mask_JN))
    else:
        n_N = (block - blocks_a) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_JN = (j_J < rank)[:, None] & (n_N < num_out)[None, :]
        b_JN = tl.load(b_ptr + (offset + j_J).to(tl.int64)[:, None] * b_stride + n_N[None, :],
                       mask=mask_JN, other=0.0)  # fmt: skip
        to_JN = b_to_ptr + n_N.to(tl.int64)[None, :] * b_to_stride + offset + j_J[:, None]
        is_bad = _store_finite(to_JN, b_JN, mask_JN)
    tl.store(bad_ptr + slot * num_blocks + block, is_bad)


@triton.jit
def window_table_kernel(
    slot_of_row_ptr, offset_ptr, rank_ptr, window_ptr, num_rows,
    TILE_T: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """(first rank, steps of WINDOW ranks) of each tile of rows."""
    row_T = tl.program_id(0) * TILE_T + tl.arange(0, TILE_T)
    slot_T = tl.load(slot_of_row_ptr + row_T, mask=row_T < num_rows, other=-1)
    rank_T = tl.load(rank_ptr + slot_T, mask=slot_T >= 0, other=0)
    offset_T = tl.load(offset_ptr + slot_T, mask=rank_T > 0, other=0)
    stop = tl.max(offset_T + rank_T)
    first = tl.min(tl.where(rank_T > 0, offset_T, stop)) // 8 * 8  # a copy begins at 16 bytes
    window_ptr += 2 * tl.program_id(0)
    tl.store(window_ptr, first)
    tl.store(window_ptr + 1, tl.cdiv(stop - first, WINDOW))


@triton.jit
def _store_window(
    h_TJ, row_T, in_T, rank_T, shift_T, steps, to_ptr, stride, RANK_PAD: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """h of the rows where the window has their slots' ranks, zeros in the rest of it."""
    at_T = to_ptr + row_T.to(tl.int64) * stride
    j_J, w_W = tl.arange(0, RANK_PAD), tl.arange(0, WINDOW)
    h_TJ = h_TJ.to(to_ptr.dtype.element_ty)
    tl.store(at_T[:, None] + shift_T[:, None] + j_J[None, :], h_TJ,
             mask=in_T[:, None] & (j_J[None, :] < rank_T[:, None]))  # fmt: skip
    for step in range(steps):
        column_W = step * WINDOW + w_W
        is_own_TW = ((column_W[None, :] >= shift_T[:, None])
                     & (column_W[None, :] < (shift_T + rank_T)[:, None]))  # fmt: skip
        zeros_TW = tl.zeros_like(is_own_TW.to(to_ptr.dtype.element_ty))
        tl.store(at_T[:, None] + column_W[None, :], zeros_TW, mask=in_T[:, None] & ~is_own_TW)


@triton.jit
def _rows_of_slots(slot_T, offset_ptr, rank_ptr, scale_ptr, bad_ptr, first):
    """(ranks, columns in the window, scale, NaN where the slot's factors are not finite)."""
    rank_T = tl.load(rank_ptr + slot_T, mask=slot_T >= 0, other=0)
    offset_T = tl.load(offset_ptr + slot_T, mask=slot_T >= 0, other=0)
    scale_T = tl.load(scale_ptr + slot_T, mask=slot_T >= 0, other=0.0)
    is_bad_T = tl.load(bad_ptr + slot_T, mask=slot_T >= 0, other=0) != 0
    return rank_T, tl.where(rank_T > 0, offset_T - first, 0), scale_T, is_bad_T


@triton.jit
def window_shrink_kernel(
    x_ptr, factor_ptr, h_ptr, to_ptr, bad_ptr, slot_of_row_ptr, bounds_ptr, offset_ptr, rank_ptr,
    scale_ptr, window_ptr, edges_ptr, num_rows, width, total_rank, x_stride, factor_stride,
    h_stride, to_stride, room,
    NUM_MEMBERS: tl.constexpr, OWN_COLUMNS: tl.constexpr, RANK_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, TILE_T: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """h of a tile of rows and one member, compact, and in its window. OWN_COLUMNS: of dy; the
    members have columns of their own, and their factors are the same rows of other columns."""
    first_row, member = tl.program_id(0) * BLOCK_T, tl.program_id(1)
    if OWN_COLUMNS and NUM_MEMBERS > 1:
        start, stop = _member_range(edges_ptr, member, width, NUM_MEMBERS, 64)
        x_ptr, factor_ptr, width = x_ptr + start, factor_ptr + start, stop - start
    row_T = first_row + tl.arange(0, BLOCK_T)
    in_T = row_T < num_rows
    slot_0, uniform = uniform_slot(
        slot_of_row_ptr, bounds_ptr, first_row, tl.minimum(first_row + BLOCK_T, num_rows)
    )
    slot_T = tl.load(slot_of_row_ptr + row_T, mask=in_T, other=-1)
    # What comes after the loop is asked for before it: all programs end at once, and would wait.
    window_ptr += 2 * (first_row // TILE_T)
    first, steps = tl.load(window_ptr), tl.load(window_ptr + 1)
    rank_T, shift_T, scale_T, is_bad_T = _rows_of_slots(
        slot_T, offset_ptr, rank_ptr, scale_ptr, bad_ptr, first
    )
    x_row_T = x_ptr + row_T.to(tl.int64) * x_stride
    if not OWN_COLUMNS:
        factor_ptr += member.to(tl.int64) * total_rank * factor_stride
    if uniform:
        h_TJ = _shrink_slot(
            slot_0, x_row_T, in_T, row_T, row_T, factor_ptr, offset_ptr, rank_ptr, 0, width,
            total_rank, factor_stride, 1, 1, RANK_PAD, False, BLOCK_T, BLOCK_K, RANK_PAD,
        )  # fmt: skip
    else:
        h_TJ = tl.zeros((BLOCK_T, RANK_PAD), tl.float32)
        start, after = slot_range(slot_T)
        for slot in range(start, after):
            if tl.max((slot_T == slot).to(tl.int32)) > 0:
                part_TJ = _shrink_slot(
                    slot, x_row_T, in_T, row_T, row_T, factor_ptr, offset_ptr, rank_ptr, 0, width,
                    total_rank, factor_stride, 1, 1, RANK_PAD, False, BLOCK_T, BLOCK_K, RANK_PAD,
                )  # fmt: skip
                h_TJ = tl.where((slot_T == slot)[:, None], part_TJ, h_TJ)
    j_J = tl.arange(0, RANK_PAD)
    # Filler rows hold zeros whatever lies in x.
    h_TJ = tl.where((slot_T >= 0)[:, None], h_TJ * scale_T[:, None], 0.0)
    h_TJ = tl.where(is_bad_T[:, None] & (j_J[None, :] < rank_T[:, None]), float("nan"), h_TJ)
    at_TJ = h_ptr + row_T.to(tl.int64)[:, None] * h_stride + member * RANK_PAD + j_J[None, :]
    tl.store(at_TJ, h_TJ.to(h_ptr.dtype.element_ty), mask=in_T[:, None])
    _store_window(h_TJ, row_T, in_T, rank_T, shift_T, steps, to_ptr + member * room, to_stride,
                  RANK_PAD, WINDOW)  # fmt: skip


@triton.jit
def _place(tile, tiles_t, tiles_n, GROUP_T: tl.constexpr):
    """(tile of rows, tile of features); those of the last tile for what comes after it."""
    tile = tl.minimum(tile, tiles_t * tiles_n - 1)
    group = tile // (GROUP_T * tiles_n)
    size = tl.minimum(tiles_t - group * GROUP_T, GROUP_T)
    within = tile % (GROUP_T * tiles_n)
    return group * GROUP_T + within % size, within // size


@triton.jit
def window_linear_kernel(
    x_desc, w_desc, y_desc, window_ptr, edges_ptr, num_rows, num_out, num_in, total_rank, room,
    x_first, w_first,
    WEIGHT_NK: tl.constexpr, NUM_MEMBERS: tl.constexpr, INNER: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_T: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr, TILES_PAD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One loop over the steps of all of a program's tiles, so that loads run on into the next tile
    while one is finished; the last steps of a tile are its window of ranks. x and what lies beside
    it are the two parts of a descriptor's first dimension, and so are the weight and the factors:
    `first` is 2 where x (the weight) is part 0, else 3."""
    dtype = y_desc.dtype
    program = tl.program_id(0)
    x_first, w_first = x_first - 2, w_first - 2
    tiles_t, tiles_n = tl.cdiv(num_rows, BLOCK_T), tl.cdiv(num_out, BLOCK_N)
    num_tiles = tiles_t * tiles_n
    steps_k = num_in // BLOCK_K
    i_I = program + tl.arange(0, TILES_PAD) * NUM_PROGRAMS
    t_I, _ = _place(i_I, tiles_t, tiles_n, GROUP_T)
    steps_I = steps_k + INNER * tl.load(window_ptr + 2 * t_I + 1)
    total = tl.sum(tl.where(i_I < num_tiles, steps_I, 0))
    next_t, _ = _place(program, tiles_t, tiles_n, GROUP_T)
    next_first = tl.load(window_ptr + 2 * next_t)
    next_count = tl.load(window_ptr + 2 * next_t + 1)
    tile = program - NUM_PROGRAMS
    step, stop, first, count, t_0, n_0, column_0 = -1, 0, 0, 0, 0, 0, 0
    acc_TN = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for _ in tl.range(0, total, num_stages=STAGES):
        step = tl.where(step == stop - 1, 0, step + 1)
        if step == 0:
            tile += NUM_PROGRAMS
            tile_t, tile_n = _place(tile, tiles_t, tiles_n, GROUP_T)
            t_0, n_0 = tile_t * BLOCK_T, tile_n * BLOCK_N
            first, count = next_first, next_count
            stop = steps_k + INNER * count
            next_t, _ = _place(tile + NUM_PROGRAMS, tiles_t, tiles_n, GROUP_T)
            next_first = tl.load(window_ptr + 2 * next_t)
            next_count = tl.load(window_ptr + 2 * next_t + 1)
            if NUM_MEMBERS > 1:
                column_0 = 0
                for other in tl.static_range(1, NUM_MEMBERS):
                    column_0 += tl.where(n_0 >= tl.load(edges_ptr + other), room, 0)
        k_x = step * BLOCK_K
        k_w = k_x
        if INNER > 1:
            behind = step - steps_k
            member = behind // tl.maximum(count, 1)
            within = (behind - member * count) * BLOCK_K
            k_x = tl.where(behind >= 0, member * room + within, k_x)
            k_w = tl.where(behind >= 0, member * total_rank + first + within, k_w)
        else:
            k_x += tl.where(step >= steps_k, column_0 - num_in, 0)
            k_w += tl.where(step >= steps_k, first - num_in, 0)
        i_x = tl.where(step >= steps_k, 1 - x_first, x_first)
        i_w = tl.where(step >= steps_k, 1 - w_first, w_first)
        x_TK = x_desc.load([i_x, t_0, k_x]).reshape([BLOCK_T, BLOCK_K])
        if WEIGHT_NK:
            w_KN = w_desc.load([i_w, n_0, k_w]).reshape([BLOCK_N, BLOCK_K]).T
        else:
            w_KN = w_desc.load([i_w, k_w, n_0]).reshape([BLOCK_K, BLOCK_N])
        acc_TN = tl.dot(x_TK, w_KN, acc_TN, input_precision="ieee")
        if step == stop - 1:
            pairs = tl.permute(tl.reshape(acc_TN, (BLOCK_T, 2, BLOCK_N // 2)), (0, 2, 1))
            left, right = tl.split(pairs)
            y_desc.store([t_0, n_0], left.to(dtype))
            y_desc.store([t_0, n_0 + BLOCK_N // 2], right.to(dtype))
            acc_TN = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
