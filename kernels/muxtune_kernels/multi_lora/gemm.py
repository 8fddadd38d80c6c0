"""The frozen product with the adapter's last factor folded in, as one persistent TMA kernel.

  y  = x W^T + h B_s^T + bias        (WEIGHT_NK: W is [N, K])
  dx = dy W  + dh A_s                (W is [K, N])
h holds scale / (1 - rate) already. At the sizes that matter Triton's product is as fast as
cuBLAS's, and the low-rank product rides in its accumulator: no pass over y or dx is paid for it.

SHRINK (forward): the product computes its own h = scale x A_s^T first. A few of its programs each
take the rows of one tile for one member, write h and count the tile as ready; a tile of the
product needs h only after its own sum over K, which takes longer than any of that, so hardly
anybody waits. It costs no launch and no pass of its own over x; and a row's h is one sum over K in
one order, wherever the row lies. The counts are flags, not sums: no result depends on the order in
which they come.

Shape suffixes: T rows of a tile, N output features of a tile, K reduced features, J the 16 rank
columns of one low-rank step.
"""

# Triton's constexpr annotations are values, not types.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from .tiles import slot_range, uniform_slot

RANK_STEP = tl.constexpr(16)


@triton.jit
def _load_h(h_ptr, row_T, in_T, column, h_stride, h_stride_split, DTYPE: tl.constexpr,
            SPLITS: tl.constexpr):  # fmt: skip
    """h of 16 columns; the sum of the split shrink's float32 parts where there are several.
    Not by the L1 cache, which does not follow what other programs of the same kernel write."""
    j_J = column + tl.arange(0, RANK_STEP)
    at_TJ = h_ptr + row_T.to(tl.int64)[:, None] * h_stride + j_J[None, :]
    h_TJ = tl.load(at_TJ, mask=in_T[:, None], other=0.0, cache_modifier=".cg")
    if SPLITS > 1:
        for split in tl.static_range(1, SPLITS):
            h_TJ += tl.load(at_TJ + split * h_stride_split, mask=in_T[:, None], other=0.0)
    return h_TJ.to(DTYPE)


@triton.jit
def _shrink_rows(
    slot, after, t_0, x_desc, factor_ptr, offset_ptr, rank_ptr, row_0, width, stride_row,
    stride_k, SLOTS: tl.constexpr, RANK_PAD: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x F^T of one tile of rows with the factors of SLOTS slots, those before `after`."""
    j_J = tl.arange(0, SLOTS * RANK_PAD)
    of_J = slot + j_J // RANK_PAD
    known_J = of_J < after
    in_J = j_J % RANK_PAD < tl.load(rank_ptr + of_J, mask=known_J, other=0)
    at_J = row_0 + tl.load(offset_ptr + of_J, mask=known_J, other=0) + j_J % RANK_PAD
    row_J = factor_ptr + at_J.to(tl.int64) * stride_row
    acc_TJ = tl.zeros((BLOCK_T, SLOTS * RANK_PAD), tl.float32)
    for k in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        k_K = k + tl.arange(0, BLOCK_K)
        f_KJ = tl.load(row_J[None, :] + k_K[:, None] * stride_k,
                       mask=in_J[None, :] & (k_K < width)[:, None], other=0.0)  # fmt: skip
        x_TK = x_desc.load([t_0, k])
        acc_TJ = tl.dot(x_TK, f_KJ.to(x_TK.dtype), acc_TJ, input_precision="ieee")
    return acc_TJ


@triton.jit
def _shrink_tile(
    t_0, member, x_desc, factor_ptr, h_ptr, ready_ptr, slot_of_row_ptr, bounds_ptr, offset_ptr,
    rank_ptr, scale_ptr, num_rows, num_in, total_rank, h_stride, stride_row, stride_k,
    RANK_PAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h of a tile of rows and one member."""
    row_T = t_0 + tl.arange(0, BLOCK_T)
    in_T = row_T < num_rows
    slot_0, uniform = uniform_slot(
        slot_of_row_ptr, bounds_ptr, t_0, tl.minimum(t_0 + BLOCK_T, num_rows)
    )
    slot_T = tl.load(slot_of_row_ptr + row_T, mask=in_T, other=-1)
    row_0 = member * total_rank
    # Few bytes a step, so many steps in flight; the product's tiles need the room afterwards.
    STAGES: tl.constexpr = 6 if RANK_PAD <= 16 else (4 if RANK_PAD <= 64 else 3)
    # A slot that does not adapt this linear reads nothing.
    if uniform:
        width = tl.where(tl.load(rank_ptr + slot_0) > 0, num_in, 0)
        h_TJ = _shrink_rows(
            slot_0, slot_0 + 1, t_0, x_desc, factor_ptr, offset_ptr, rank_ptr, row_0, width,
            stride_row, stride_k, 1, RANK_PAD, STAGES, BLOCK_T, BLOCK_K,
        )  # fmt: skip
    else:
        h_TJ = tl.zeros((BLOCK_T, RANK_PAD), tl.float32)
        first, after = slot_range(slot_T)
        for slot in range(first, after, 2):
            rank = tl.load(rank_ptr + slot)
            next_rank = tl.load(rank_ptr + slot + 1, mask=slot + 1 < after, other=0)
            is_here_T = (slot_T == slot) & (rank > 0) | (slot_T == slot + 1) & (next_rank > 0)
            if tl.max(is_here_T.to(tl.int32)) > 0:
                both_TJ = _shrink_rows(
                    slot, after, t_0, x_desc, factor_ptr, offset_ptr, rank_ptr, row_0, num_in,
                    stride_row, stride_k, 2, RANK_PAD, STAGES, BLOCK_T, BLOCK_K,
                )  # fmt: skip
                pairs = tl.permute(tl.reshape(both_TJ, (BLOCK_T, 2, RANK_PAD)), (0, 2, 1))
                left_TJ, right_TJ = tl.split(pairs)
                h_TJ = tl.where((slot_T == slot)[:, None], left_TJ, h_TJ)
                h_TJ = tl.where((slot_T == slot + 1)[:, None], right_TJ, h_TJ)
    h_TJ *= tl.load(scale_ptr + slot_T, mask=slot_T >= 0, other=0.0)[:, None]
    h_TJ = tl.where((slot_T >= 0)[:, None], h_TJ, 0.0)
    j_J = member * RANK_PAD + tl.arange(0, RANK_PAD)
    tl.store(h_ptr + row_T.to(tl.int64)[:, None] * h_stride + j_J[None, :],
             h_TJ.to(h_ptr.dtype.element_ty), mask=in_T[:, None])  # fmt: skip
    tl.debug_barrier()  # all of the program's stores come before the count
    tl.atomic_add(ready_ptr + t_0 // BLOCK_T, 1, sem="release")


@triton.jit
def _await(ready_ptr, wanted):
    while tl.atomic_add(ready_ptr, 0, sem="acquire") < wanted:
        pass


@triton.jit
def _load_factor(factor_ptr, offset_ptr, rank_ptr, slot, column, n_N, in_N, total_rank,
                 stride_row, stride_n, RANK_PAD: tl.constexpr):  # fmt: skip
    offset, rank = tl.load(offset_ptr + slot), tl.load(rank_ptr + slot)
    j_J = column % RANK_PAD + tl.arange(0, RANK_STEP)
    row_J = (column // RANK_PAD) * total_rank + offset + j_J
    return tl.load(
        factor_ptr + row_J.to(tl.int64)[:, None] * stride_row + n_N[None, :] * stride_n,
        mask=(j_J < rank)[:, None] & in_N[None, :], other=0.0,
    )  # fmt: skip


@triton.jit
def _mixed_low_rank(h_TJ, slot_T, slot, after, factor_ptr, offset_ptr, rank_ptr, column, n_N, in_N,
                    total_rank, stride_row, stride_n, acc_TN, BLOCK_T: tl.constexpr,
                    RANK_PAD: tl.constexpr):  # fmt: skip
    """acc + h F for the rows of slots `slot` and `slot + 1`, in one product over twice the ranks.

    A non-finite F must not reach the tile's other rows through 0 * NaN, so it is zeroed, and h of
    its own slot's rows is poisoned in its place.
    """
    pair_J = tl.arange(0, 2 * RANK_STEP)
    of_J = slot + pair_J // RANK_STEP
    j_J = column % RANK_PAD + pair_J % RANK_STEP
    known_J = of_J < after
    rank_J = tl.load(rank_ptr + of_J, mask=known_J, other=0)
    row_J = (column // RANK_PAD) * total_rank + tl.load(offset_ptr + of_J, mask=known_J, other=0)
    f_JN = tl.load(
        factor_ptr + (row_J + j_J).to(tl.int64)[:, None] * stride_row + n_N[None, :] * stride_n,
        mask=(j_J < rank_J)[:, None] & in_N[None, :], other=0.0,
    )  # fmt: skip
    bad_JN = (f_JN != f_JN) | (tl.abs(f_JN) == float("inf"))
    bad_J = tl.max(bad_JN.to(tl.int32), 1) > 0
    f_JN = tl.where(bad_JN, 0.0, f_JN)
    twice_TJ = tl.reshape(tl.permute(tl.join(h_TJ, h_TJ), (0, 2, 1)), (BLOCK_T, 2 * RANK_STEP))
    twice_TJ = tl.where(bad_J[None, :], float("nan"), twice_TJ)
    twice_TJ = tl.where(slot_T[:, None] == of_J[None, :], twice_TJ, 0.0)
    return tl.dot(twice_TJ.to(h_TJ.dtype), f_JN.to(h_TJ.dtype), acc_TN, input_precision="ieee")


@triton.jit
def _linear_tile(
    t_0, n_0, is_first, x_desc, w_desc, y_desc, h_ptr, factor_ptr, bias_ptr, h_out_ptr, ready_ptr,
    slot_of_row_ptr, bounds_ptr, offset_ptr, rank_ptr, edges_ptr, num_rows, num_out, num_in,
    total_rank, h_stride, h_stride_split, factor_stride_row, factor_stride_n,
    WEIGHT_NK: tl.constexpr, NUM_MEMBERS: tl.constexpr, INNER: tl.constexpr,
    RANK_PAD: tl.constexpr, H_SPLITS: tl.constexpr, SHRINK: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """is_first: the program's first tile, whose h may still be in the making."""
    dtype = y_desc.dtype
    steps_k = tl.cdiv(num_in, BLOCK_K)
    # What the low-rank step of a tile of one slot needs is asked for before the product.
    slot_0, uniform = uniform_slot(
        slot_of_row_ptr, bounds_ptr, t_0, tl.minimum(t_0 + BLOCK_T, num_rows)
    )
    row_T = t_0 + tl.arange(0, BLOCK_T)
    in_T = row_T < num_rows
    n_N = n_0 + tl.arange(0, BLOCK_N)
    in_N = n_N < num_out
    member = 0
    if NUM_MEMBERS > 1:
        for other in tl.static_range(1, NUM_MEMBERS):
            member += (n_0 >= tl.load(edges_ptr + other)).to(tl.int32)
    column_0 = member * RANK_PAD
    here_T = in_T
    if SHRINK:
        here_T = in_T & (is_first == 0)
        if is_first == 0:
            _await(ready_ptr + t_0 // BLOCK_T, NUM_MEMBERS * INNER)
    h_TJ = _load_h(h_ptr, row_T, here_T, column_0, h_stride, h_stride_split, dtype, H_SPLITS)
    f_JN = _load_factor(factor_ptr, offset_ptr, rank_ptr, tl.maximum(slot_0, 0), 0, n_N, in_N,
                        total_rank, factor_stride_row, factor_stride_n, RANK_PAD)  # fmt: skip
    acc_TN = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for k in range(steps_k):
        x_TK = x_desc.load([t_0, k * BLOCK_K])
        if WEIGHT_NK:  # noqa: SIM108 (the form that was measured on CUDA)
            w_KN = w_desc.load([n_0, k * BLOCK_K]).T
        else:
            w_KN = w_desc.load([k * BLOCK_K, n_0])
        acc_TN = tl.dot(x_TK, w_KN, acc_TN, input_precision="ieee")
    if SHRINK:  # noqa: SIM102 (a constexpr branch of its own: what is inside must not compile)
        if is_first:
            _await(ready_ptr + t_0 // BLOCK_T, NUM_MEMBERS * INNER)
            h_TJ = _load_h(h_ptr, row_T, in_T, column_0, h_stride, h_stride_split, dtype, H_SPLITS)
    if uniform:
        acc_TN = tl.dot(h_TJ, f_JN.to(dtype), acc_TN, input_precision="ieee")
        # What a slot does not have it does not pay for; the loop's loads are issued ahead.
        rank = tl.load(rank_ptr + slot_0)
        steps = tl.maximum(tl.cdiv(rank, RANK_STEP), 1)
        for step in range(1, tl.where(rank > 0, INNER * steps, 1)):
            column = (step // steps) * RANK_PAD + (step % steps) * RANK_STEP
            h_TJ = _load_h(h_ptr, row_T, in_T, column_0 + column, h_stride, h_stride_split,
                           dtype, H_SPLITS)  # fmt: skip
            f_JN = _load_factor(factor_ptr, offset_ptr, rank_ptr, slot_0, column, n_N, in_N,
                                total_rank, factor_stride_row, factor_stride_n,
                                RANK_PAD)  # fmt: skip
            acc_TN = tl.dot(h_TJ, f_JN.to(dtype), acc_TN, input_precision="ieee")
    else:
        slot_T = tl.load(slot_of_row_ptr + row_T, mask=in_T, other=-1)
        first, after = slot_range(slot_T)
        most = tl.max(tl.load(rank_ptr + slot_T, mask=slot_T >= 0, other=0))
        steps = tl.maximum(tl.cdiv(most, RANK_STEP), 1)
        for step in range(tl.where(most > 0, INNER * steps, 0)):
            column = (step // steps) * RANK_PAD + (step % steps) * RANK_STEP
            if step > 0:
                h_TJ = _load_h(h_ptr, row_T, in_T, column_0 + column, h_stride,
                               h_stride_split, dtype, H_SPLITS)  # fmt: skip
            for slot in range(first, after, 2):
                acc_TN = _mixed_low_rank(
                    h_TJ, slot_T, slot, after, factor_ptr, offset_ptr, rank_ptr, column, n_N,
                    in_N, total_rank, factor_stride_row, factor_stride_n, acc_TN, BLOCK_T,
                    RANK_PAD,
                )  # fmt: skip
    if BIAS:
        acc_TN += tl.load(bias_ptr + n_N, mask=in_N, other=0.0).to(tl.float32)[None, :]
    if HALVES:
        pairs = tl.permute(tl.reshape(acc_TN, (BLOCK_T, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(pairs)
        y_desc.store([t_0, n_0], left.to(dtype))
        y_desc.store([t_0, n_0 + BLOCK_N // 2], right.to(dtype))
    else:
        y_desc.store([t_0, n_0], acc_TN.to(dtype))
    if H_SPLITS > 1:
        is_first_column = n_0 == 0
        if NUM_MEMBERS > 1:
            is_first_column |= n_0 == tl.load(edges_ptr + member)
        if is_first_column:
            for column in range(0, INNER * RANK_PAD, RANK_STEP):
                h_TJ = _load_h(h_ptr, row_T, in_T, column_0 + column, h_stride,
                               h_stride_split, dtype, H_SPLITS)  # fmt: skip
                j_J = column_0 + column + tl.arange(0, RANK_STEP)
                tl.store(h_out_ptr + row_T.to(tl.int64)[:, None] * h_stride + j_J[None, :],
                         h_TJ, mask=in_T[:, None])  # fmt: skip


@triton.jit
def linear_kernel(
    x_desc, w_desc, w_half_desc, y_desc, h_ptr, factor_ptr, bias_ptr, h_out_ptr, in_factor_ptr,
    scale_ptr, ready_ptr, slot_of_row_ptr, bounds_ptr, offset_ptr, rank_ptr, edges_ptr, num_rows,
    num_out, num_in, total_rank, h_stride, h_stride_split, factor_stride_row, factor_stride_n,
    in_stride_row, in_stride_k,
    WEIGHT_NK: tl.constexpr, NUM_MEMBERS: tl.constexpr, INNER: tl.constexpr,
    RANK_PAD: tl.constexpr, H_SPLITS: tl.constexpr, SHRINK: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_T: tl.constexpr,
    HALVES: tl.constexpr, TAIL: tl.constexpr, NUM_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """H_SPLITS > 1: h is float32 parts; their sum is written to h_out by the first column.
    SHRINK: h is written here, from in_factor; `ready` holds a zero for each tile of rows.
    TAIL: the last, incomplete wave of tiles is computed as halves, by twice as many programs."""
    tiles_t, tiles_n = tl.cdiv(num_rows, BLOCK_T), tl.cdiv(num_out, BLOCK_N)
    num_tiles = tiles_t * tiles_n
    program = tl.program_id(0)
    if SHRINK:
        # Programs start in the order of their numbers, and the first make h, waiting for nothing:
        # whoever waits, waits for a program that runs, whatever else the device does. The same
        # programs are the last in the order of tiles, because these have the fewest.
        program = NUM_PROGRAMS - 1 - program
        for part in range(tl.program_id(0), tiles_t * NUM_MEMBERS * INNER, NUM_PROGRAMS):
            _shrink_tile(
                (part // (NUM_MEMBERS * INNER)) * BLOCK_T, part % (NUM_MEMBERS * INNER), x_desc,
                in_factor_ptr, h_ptr, ready_ptr, slot_of_row_ptr, bounds_ptr, offset_ptr, rank_ptr,
                scale_ptr, num_rows, num_in, total_rank, h_stride, in_stride_row,
                in_stride_k, RANK_PAD, BLOCK_T, BLOCK_K,
            )  # fmt: skip
    whole = num_tiles
    if TAIL:
        whole = (num_tiles // NUM_PROGRAMS) * NUM_PROGRAMS
    for tile in tl.range(program, whole, NUM_PROGRAMS, flatten=False):
        group = tile // (GROUP_T * tiles_n)
        size = tl.minimum(tiles_t - group * GROUP_T, GROUP_T)
        t_0 = (group * GROUP_T + (tile % (GROUP_T * tiles_n)) % size) * BLOCK_T
        n_0 = ((tile % (GROUP_T * tiles_n)) // size) * BLOCK_N
        _linear_tile(
            t_0, n_0, tile < NUM_PROGRAMS, x_desc, w_desc, y_desc, h_ptr, factor_ptr, bias_ptr,
            h_out_ptr, ready_ptr, slot_of_row_ptr, bounds_ptr, offset_ptr, rank_ptr, edges_ptr,
            num_rows, num_out, num_in, total_rank, h_stride, h_stride_split, factor_stride_row,
            factor_stride_n, WEIGHT_NK, NUM_MEMBERS, INNER, RANK_PAD, H_SPLITS, SHRINK, BIAS,
            BLOCK_T, BLOCK_N, BLOCK_K, HALVES,
        )  # fmt: skip
    if TAIL:  # noqa: SIM102 (a constexpr branch of its own: what is inside must not compile)
        if program < 2 * (num_tiles - whole):
            tile = whole + program // 2
            group = tile // (GROUP_T * tiles_n)
            size = tl.minimum(tiles_t - group * GROUP_T, GROUP_T)
            t_0 = (group * GROUP_T + (tile % (GROUP_T * tiles_n)) % size) * BLOCK_T
            n_0 = ((tile % (GROUP_T * tiles_n)) // size) * BLOCK_N
            n_0 += (program % 2) * (BLOCK_N // 2)
            if n_0 < num_out:
                _linear_tile(
                    t_0, n_0, 0, x_desc, w_half_desc, y_desc, h_ptr, factor_ptr, bias_ptr,
                    h_out_ptr, ready_ptr, slot_of_row_ptr, bounds_ptr, offset_ptr, rank_ptr,
                    edges_ptr, num_rows, num_out, num_in, total_rank, h_stride, h_stride_split,
                    factor_stride_row, factor_stride_n, WEIGHT_NK, NUM_MEMBERS, INNER, RANK_PAD,
                    H_SPLITS, SHRINK, BIAS, BLOCK_T, BLOCK_N // 2, BLOCK_K, False,
                )  # fmt: skip
