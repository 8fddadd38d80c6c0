"""Triton building blocks of the multi-task low-rank linear.

  shrink   h[t, m, j]   = factor_s * sum_k x[t, k] A[row(s, m, j), k]
  expand   out[t, n]    = bias[n] + sum_j h[t, m, j] F[row(s, m, j), n]     (y and dx, first part)
  dh_db    dB[n, row]   = sum_t dy[t, n] h[t, m, j] over the rows t of s, and from the same read of
           dh[t, m, j]  = factor_s * sum_n dy[t, n] B[n, row(s, m, j)] in parts, one a block of n
  outer    dA[row, n]   = sum_t dh[t, m, j] x[t, n] over the rows t of s
where s is the slot of row t, j < rank of s, and factor_s = scale_s / (1 - rate_s). h is compact:
a row holds its own slot's ranks only, RANK_PAD columns a member, so the cost does not grow with
the number of slots. A row tile may mix slots: it is computed once a slot present and selected by
row, never masked by multiplication, so that no slot's NaN reaches another.

Shape suffixes: T rows of a tile, K reduced features, N features written, J = members * RANK_PAD.
Members (linears that share x) either all lie inside a tile (INNER > 1) or are a grid dimension
with their feature range in `edges`.
"""

# Triton's constexpr annotations are values, not types.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from ..dropout.bits import keep_bits, row_words

_NO_SLOT = tl.constexpr(1 << 30)  # above every slot


@triton.jit
def slot_range(slot_T):
    """(first, one past the last) of the slots of a tile's rows; (0, 0) where all are filler.

    A loop's loads are issued ahead of it as asynchronous copies, of no bytes where the loop has no
    step, but even then from an address that must be a global one: so a loop over no slots begins
    at one that exists, not far behind the table."""
    stop = tl.max(slot_T) + 1
    first = tl.min(tl.where(slot_T < 0, _NO_SLOT, slot_T))
    return tl.minimum(first, stop), stop


@triton.jit
def _member_range(edges_ptr, member, width, NUM_MEMBERS: tl.constexpr, ALIGN: tl.constexpr):
    if NUM_MEMBERS == 1:
        start, stop = 0, width
    else:
        start = tl.multiple_of(tl.load(edges_ptr + member), ALIGN)
        stop = tl.multiple_of(tl.load(edges_ptr + member + 1), ALIGN)
    return start, stop


@triton.jit
def _slot_factor(scale_ptr, rate_ptr, slot_T, DROPOUT: tl.constexpr):
    factor_T = tl.load(scale_ptr + slot_T, mask=slot_T >= 0, other=0.0)
    if DROPOUT:
        factor_T = factor_T / (1.0 - tl.load(rate_ptr + slot_T, mask=slot_T >= 0, other=0.0))
    return factor_T


@triton.jit
def _thresholds(rate_ptr, slot_T):
    rate_T = tl.load(rate_ptr + slot_T, mask=slot_T >= 0, other=0.0)
    return tl.floor(rate_T * 65536 + 0.5).to(tl.int32)


@triton.jit
def _factor_rows(offset, rank, total_rank, INNER: tl.constexpr, RANK_PAD: tl.constexpr,
                 BLOCK_J: tl.constexpr):  # fmt: skip
    """Pool rows of one slot's J columns, and which of them exist."""
    j_J = tl.arange(0, BLOCK_J)
    row_J = (j_J // RANK_PAD) * total_rank + offset + j_J % RANK_PAD
    return row_J, (j_J % RANK_PAD < rank) & (j_J < INNER * RANK_PAD)


@triton.jit
def uniform_slot(slot_of_row_ptr, bounds_ptr, first_row, stop_row):
    """(slot of the first row, whether it owns all of first_row : stop_row) by scalar loads."""
    slot = tl.load(slot_of_row_ptr + first_row)
    at = bounds_ptr + 3 * tl.maximum(slot, 0)
    start, stop, count = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    return slot, (slot >= 0) & (stop >= stop_row) & (count == stop - start)


@triton.jit
def _shrink_slot(
    slot, x_row_T, in_T, word_T, threshold_T, factor_ptr, offset_ptr, rank_ptr, k_start, k_stop,
    total_rank, factor_stride_row, factor_stride_k,
    INNER: tl.constexpr, RANK_PAD: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """x F^T with the factors of one slot, on all rows of the tile; x is not read without any."""
    row_J, in_J = _factor_rows(
        tl.load(offset_ptr + slot), tl.load(rank_ptr + slot), total_rank, INNER, RANK_PAD, BLOCK_J
    )
    f_row_J = factor_ptr + row_J.to(tl.int64) * factor_stride_row
    k_stop = tl.where(tl.load(rank_ptr + slot) > 0, k_stop, k_start)
    acc_TJ = tl.zeros((BLOCK_T, BLOCK_J), tl.float32)
    for k in range(k_start, k_stop, BLOCK_K):
        k_K = k + tl.arange(0, BLOCK_K)
        in_K = k_K < k_stop
        x_TK = tl.load(x_row_T[:, None] + k_K[None, :], mask=in_T[:, None] & in_K[None, :],
                       other=0.0)  # fmt: skip
        f_KJ = tl.load(f_row_J[None, :] + k_K[:, None] * factor_stride_k,
                       mask=in_J[None, :] & in_K[:, None], other=0.0)  # fmt: skip
        if DROPOUT:
            x_TK = tl.where(keep_bits(word_T, k, threshold_T, BLOCK_K), x_TK, 0.0)
        acc_TJ = tl.dot(x_TK, f_KJ.to(x_TK.dtype), acc_TJ, input_precision="ieee")
    return acc_TJ


@triton.jit
def shrink_tile(
    tile, split, x_ptr, factor_ptr, h_ptr, slot_of_row_ptr, bounds_ptr, offset_ptr, rank_ptr,
    scale_ptr, row_key_ptr, rate_ptr, module_word, num_rows, width, total_rank,
    x_stride, factor_stride_row, factor_stride_k, h_stride, h_stride_split,
    INNER: tl.constexpr, RANK_PAD: tl.constexpr, SPLITS: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """DROPOUT masks x. SPLITS > 1 cuts the reduced features; the reader of h adds the parts."""
    k_start, k_stop = 0, width
    if SPLITS > 1:
        per_split = tl.cdiv(tl.cdiv(width, BLOCK_K), SPLITS) * BLOCK_K
        k_start = split * per_split
        k_stop = tl.minimum(k_start + per_split, width)
    first_row = tile * BLOCK_T
    row_T = first_row + tl.arange(0, BLOCK_T)
    in_T = row_T < num_rows
    slot_0, uniform = uniform_slot(
        slot_of_row_ptr, bounds_ptr, first_row, tl.minimum(first_row + BLOCK_T, num_rows)
    )
    slot_T = tl.load(slot_of_row_ptr + row_T, mask=in_T, other=-1)
    x_row_T = x_ptr + row_T.to(tl.int64) * x_stride
    word_T, threshold_T = row_T, row_T
    if DROPOUT:
        word_T = row_words(tl.load(row_key_ptr + row_T, mask=in_T, other=0), module_word)
        threshold_T = _thresholds(rate_ptr, slot_T)
    if uniform:
        h_TJ = _shrink_slot(
            slot_0, x_row_T, in_T, word_T, threshold_T, factor_ptr, offset_ptr, rank_ptr, k_start,
            k_stop, total_rank, factor_stride_row, factor_stride_k,
            INNER, RANK_PAD, DROPOUT, BLOCK_T, BLOCK_K, BLOCK_J,
        )  # fmt: skip
    else:
        h_TJ = tl.zeros((BLOCK_T, BLOCK_J), tl.float32)
        first, after = slot_range(slot_T)
        for slot in range(first, after):
            if tl.max((slot_T == slot).to(tl.int32)) > 0:
                part_TJ = _shrink_slot(
                    slot, x_row_T, in_T, word_T, threshold_T, factor_ptr, offset_ptr, rank_ptr,
                    k_start, k_stop, total_rank, factor_stride_row, factor_stride_k,
                    INNER, RANK_PAD, DROPOUT, BLOCK_T, BLOCK_K, BLOCK_J,
                )  # fmt: skip
                h_TJ = tl.where((slot_T == slot)[:, None], part_TJ, h_TJ)
    h_TJ *= _slot_factor(scale_ptr, rate_ptr, slot_T, DROPOUT)[:, None]
    # Filler rows hold zeros whatever lies in x.
    h_TJ = tl.where((slot_T >= 0)[:, None], h_TJ, 0.0)
    j_J = tl.arange(0, BLOCK_J)
    out = h_ptr + row_T.to(tl.int64)[:, None] * h_stride + j_J[None, :]
    if SPLITS > 1:
        out += split * h_stride_split
    tl.store(out, h_TJ.to(h_ptr.dtype.element_ty),
             mask=in_T[:, None] & (j_J < INNER * RANK_PAD)[None, :])  # fmt: skip


@triton.jit
def expand_tile(
    tile, block, member, h_ptr, factor_ptr, bias_ptr, out_ptr, slot_of_row_ptr, offset_ptr,
    rank_ptr, row_key_ptr, rate_ptr, edges_ptr, module_word, num_rows, width, total_rank,
    h_stride, factor_stride_row, factor_stride_n, out_stride,
    NUM_MEMBERS: tl.constexpr, INNER: tl.constexpr, RANK_PAD: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, ALIGN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    """DROPOUT masks the output (dx)."""
    n_start, n_stop = _member_range(edges_ptr, member, width, NUM_MEMBERS, ALIGN)
    row_T = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    n_N = n_start + block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_T, in_N = row_T < num_rows, n_N < n_stop
    slot_T = tl.load(slot_of_row_ptr + row_T, mask=in_T, other=-1)
    first, after = slot_range(slot_T)
    j_J = tl.arange(0, BLOCK_J)
    h_TJ = tl.load(
        h_ptr + row_T.to(tl.int64)[:, None] * h_stride + member * RANK_PAD + j_J[None, :],
        mask=in_T[:, None] & (j_J < INNER * RANK_PAD)[None, :], other=0.0,
    )  # fmt: skip
    acc_TN = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for slot in range(first, after):
        rank = tl.load(rank_ptr + slot)
        if (tl.max((slot_T == slot).to(tl.int32)) > 0) & (rank > 0):
            row_J, in_J = _factor_rows(
                tl.load(offset_ptr + slot), rank, total_rank, INNER, RANK_PAD, BLOCK_J
            )
            f_JN = tl.load(
                factor_ptr + row_J.to(tl.int64)[:, None] * factor_stride_row
                + n_N[None, :] * factor_stride_n,
                mask=in_J[:, None] & in_N[None, :], other=0.0,
            )  # fmt: skip
            part_TN = tl.dot(h_TJ, f_JN.to(h_TJ.dtype), input_precision="ieee")
            acc_TN = tl.where((slot_T == slot)[:, None], part_TN, acc_TN)
    if DROPOUT:
        word_T = row_words(tl.load(row_key_ptr + row_T, mask=in_T, other=0), module_word)
        keep_TN = keep_bits(word_T, block * BLOCK_N, _thresholds(rate_ptr, slot_T), BLOCK_N)
        acc_TN = tl.where(keep_TN, acc_TN, 0.0)
    if BIAS:
        acc_TN += tl.load(bias_ptr + n_N, mask=in_N, other=0.0).to(tl.float32)[None, :]
    out_TN = out_ptr + row_T.to(tl.int64)[:, None] * out_stride + n_N[None, :]
    in_TN = in_T[:, None] & in_N[None, :]
    tl.store(out_TN, acc_TN.to(out_ptr.dtype.element_ty), mask=in_TN)


@triton.jit
def nth_largest_slot(bounds_ptr, nth, num_slots, SLOTS_PAD: tl.constexpr):
    """The slot that comes `nth` when they are ordered by their rows, most first. Programs start in
    the order of their numbers: the long ones first, so that none of them runs alone at the end.
    Whose program works on a slot changes no bit of it."""
    slot = nth
    if SLOTS_PAD > 0:  # no early return: what follows one is compiled
        s_S = tl.arange(0, SLOTS_PAD)
        count_S = tl.load(bounds_ptr + 3 * s_S + 2, mask=s_S < num_slots, other=-1)
        more_SS = count_S[None, :] > count_S[:, None]
        tie_SS = (count_S[None, :] == count_S[:, None]) & (s_S[None, :] < s_S[:, None])
        place_S = tl.sum((more_SS | tie_SS).to(tl.int32), 1)
        slot = tl.sum(tl.where(place_S == nth, s_S, 0), 0)
    return slot


@triton.jit
def _slot_rows(bounds_ptr, slot, split, SPLITS: tl.constexpr, BLOCK_T: tl.constexpr):
    """(first row, stop row, whether the slot owns all rows between) of one split of a slot.
    Row blocks count from the slot's first row, so sums do not depend on where it lies."""
    start, stop = tl.load(bounds_ptr + 3 * slot), tl.load(bounds_ptr + 3 * slot + 1)
    dense = tl.load(bounds_ptr + 3 * slot + 2) == stop - start
    if SPLITS > 1:
        per_split = tl.cdiv(tl.cdiv(stop - start, BLOCK_T), SPLITS) * BLOCK_T
        start += split * per_split
        stop = tl.minimum(start + per_split, stop)
    return start, stop, dense


@triton.jit
def _outer_step(
    row_T, own_T, slot, h_ptr, v_ptr, row_key_ptr, rate_ptr, module_word, block, n_N, in_N,
    h_stride, v_stride, acc_NJ,
    INNER: tl.constexpr, RANK_PAD: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    j_J = tl.arange(0, BLOCK_J)
    in_J = j_J < INNER * RANK_PAD
    h_TJ = tl.load(h_ptr + row_T.to(tl.int64)[:, None] * h_stride + j_J[None, :],
                   mask=own_T[:, None] & in_J[None, :], other=0.0)  # fmt: skip
    v_TN = tl.load(v_ptr + row_T.to(tl.int64)[:, None] * v_stride + n_N[None, :],
                   mask=own_T[:, None] & in_N[None, :], other=0.0)  # fmt: skip
    if DROPOUT:
        word_T = row_words(tl.load(row_key_ptr + row_T, mask=own_T, other=0), module_word)
        threshold_T = _thresholds(rate_ptr, tl.zeros_like(row_T) + slot)
        v_TN = tl.where(keep_bits(word_T, block * BLOCK_N, threshold_T, BLOCK_N), v_TN, 0.0)
    return tl.dot(tl.trans(v_TN), h_TJ, acc_NJ, input_precision="ieee")


@triton.jit
def outer_tile(
    block, slot, split, h_ptr, v_ptr, out_ptr, slot_of_row_ptr, bounds_ptr, offset_ptr, rank_ptr,
    row_key_ptr, rate_ptr, keep_ptr, module_word, width, total_rank, h_stride, v_stride,
    out_stride_split, out_stride_row,
    INNER: tl.constexpr, RANK_PAD: tl.constexpr, SPLITS: tl.constexpr, DROPOUT: tl.constexpr,
    ACCUMULATE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """DROPOUT masks v. An empty slot writes zeros; rows of other slots are never loaded.
    ACCUMULATE: slots whose `keep` is not zero add to what is there."""
    rank = tl.load(rank_ptr + slot)
    if rank > 0:
        start, stop, dense = _slot_rows(bounds_ptr, slot, split, SPLITS, BLOCK_T)
        n_N = block * BLOCK_N + tl.arange(0, BLOCK_N)
        in_N = n_N < width
        acc_NJ = tl.zeros((BLOCK_N, BLOCK_J), tl.float32)
        if dense:  # a loop of its own: the mask's load would halve the depth of the pipeline
            for t in range(start, stop, BLOCK_T):
                row_T = t + tl.arange(0, BLOCK_T)
                acc_NJ = _outer_step(
                    row_T, row_T < stop, slot, h_ptr, v_ptr, row_key_ptr, rate_ptr, module_word,
                    block, n_N, in_N, h_stride, v_stride, acc_NJ,
                    INNER, RANK_PAD, DROPOUT, BLOCK_N, BLOCK_J,
                )  # fmt: skip
        else:
            for t in range(start, stop, BLOCK_T):
                row_T = t + tl.arange(0, BLOCK_T)
                own_T = tl.load(slot_of_row_ptr + row_T, mask=row_T < stop, other=-1) == slot
                acc_NJ = _outer_step(
                    row_T, own_T, slot, h_ptr, v_ptr, row_key_ptr, rate_ptr, module_word,
                    block, n_N, in_N, h_stride, v_stride, acc_NJ,
                    INNER, RANK_PAD, DROPOUT, BLOCK_N, BLOCK_J,
                )  # fmt: skip
        row_J, real_J = _factor_rows(
            tl.load(offset_ptr + slot), rank, total_rank, INNER, RANK_PAD, BLOCK_J
        )
        out_NJ = (out_ptr + split.to(tl.int64) * out_stride_split
                  + row_J.to(tl.int64)[None, :] * out_stride_row + n_N[:, None])  # fmt: skip
        real_NJ = in_N[:, None] & real_J[None, :]
        if ACCUMULATE:
            keeps = tl.load(keep_ptr + slot) != 0
            if keeps & (start < stop):
                acc_NJ += tl.load(out_NJ, mask=real_NJ, other=0.0).to(tl.float32)
            # Nothing is added to what an idle slot keeps, so it is not even touched.
            real_NJ = real_NJ & ((start < stop) | (keeps == 0))
        tl.store(out_NJ, acc_NJ.to(out_ptr.dtype.element_ty), mask=real_NJ)


@triton.jit
def _dh_db_step(
    row_T, own_T, h_ptr, dy_ptr, part_ptr, b_NJ, j_J, n_N, in_N, h_stride, dy_stride, acc_NJ
):
    at_T = row_T.to(tl.int64)[:, None]
    h_TJ = tl.load(h_ptr + at_T * h_stride + j_J[None, :], mask=own_T[:, None], other=0.0)
    dy_TN = tl.load(dy_ptr + at_T * dy_stride + n_N[None, :],
                    mask=own_T[:, None] & in_N[None, :], other=0.0)  # fmt: skip
    acc_NJ = tl.dot(tl.trans(dy_TN), h_TJ, acc_NJ, input_precision="ieee")
    dh_TJ = tl.dot(dy_TN, b_NJ, input_precision="ieee")
    tl.store(part_ptr + at_T * h_stride + j_J[None, :], dh_TJ.to(part_ptr.dtype.element_ty),
             mask=own_T[:, None])  # fmt: skip
    return acc_NJ


@triton.jit
def dh_db_tile(
    block, member, slot, split, dy_ptr, b_ptr, h_ptr, part_ptr, db_ptr, slot_of_row_ptr,
    bounds_ptr, offset_ptr, rank_ptr, edges_ptr, keep_ptr, width, total_rank, dy_stride,
    b_stride_rank, b_stride_out, h_stride, part_stride, db_stride_split, db_stride_row,
    NUM_MEMBERS: tl.constexpr, RANK_PAD: tl.constexpr, SPLITS: tl.constexpr, ALIGN: tl.constexpr,
    ACCUMULATE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One slot's rows and one block of outputs: dB of the block, and the block's part of dh."""
    n_start, n_stop = _member_range(edges_ptr, member, width, NUM_MEMBERS, ALIGN)
    if (n_start + block * BLOCK_N < n_stop) & (tl.load(rank_ptr + slot) > 0):
        start, stop, dense = _slot_rows(bounds_ptr, slot, split, SPLITS, BLOCK_T)
        n_N = n_start + block * BLOCK_N + tl.arange(0, BLOCK_N)
        in_N = n_N < n_stop
        row_J, real_J = _factor_rows(
            tl.load(offset_ptr + slot), tl.load(rank_ptr + slot), total_rank, 1, RANK_PAD, RANK_PAD
        )
        b_NJ = tl.load(
            b_ptr + row_J.to(tl.int64)[None, :] * b_stride_rank + n_N[:, None] * b_stride_out,
            mask=in_N[:, None] & real_J[None, :], other=0.0,
        ).to(dy_ptr.dtype.element_ty)  # fmt: skip
        j_J = member * RANK_PAD + tl.arange(0, RANK_PAD)
        acc_NJ = tl.zeros((BLOCK_N, RANK_PAD), tl.float32)
        part_ptr += block.to(tl.int64) * part_stride
        if dense:
            for t in range(start, stop, BLOCK_T):
                row_T = t + tl.arange(0, BLOCK_T)
                acc_NJ = _dh_db_step(row_T, row_T < stop, h_ptr, dy_ptr, part_ptr, b_NJ, j_J, n_N,
                                     in_N, h_stride, dy_stride, acc_NJ)  # fmt: skip
        else:
            for t in range(start, stop, BLOCK_T):
                row_T = t + tl.arange(0, BLOCK_T)
                own_T = tl.load(slot_of_row_ptr + row_T, mask=row_T < stop, other=-1) == slot
                acc_NJ = _dh_db_step(row_T, own_T, h_ptr, dy_ptr, part_ptr, b_NJ, j_J, n_N,
                                     in_N, h_stride, dy_stride, acc_NJ)  # fmt: skip
        out_NJ = (db_ptr + split.to(tl.int64) * db_stride_split
                  + row_J.to(tl.int64)[None, :] * db_stride_row + n_N[:, None])  # fmt: skip
        real_NJ = in_N[:, None] & real_J[None, :]
        if ACCUMULATE:
            keeps = tl.load(keep_ptr + slot) != 0
            if keeps & (start < stop):
                acc_NJ += tl.load(out_NJ, mask=real_NJ, other=0.0).to(tl.float32)
            # Nothing is added to what an idle slot keeps, so it is not even touched.
            real_NJ = real_NJ & ((start < stop) | (keeps == 0))
        tl.store(out_NJ, acc_NJ.to(db_ptr.dtype.element_ty), mask=real_NJ)


@triton.jit
def sum_parts_tile(
    tile, part_ptr, dh_ptr, slot_of_row_ptr, rank_ptr, scale_ptr, rate_ptr, edges_ptr, num_rows,
    width, h_stride, part_stride,
    NUM_MEMBERS: tl.constexpr, RANK_PAD: tl.constexpr, RATED: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dh = scale / (1 - rate) times the sum of its parts; zeros on rows of no adapter."""
    row_T = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    in_T = row_T < num_rows
    slot_T = tl.load(slot_of_row_ptr + row_T, mask=in_T, other=-1)
    factor_T = _slot_factor(scale_ptr, rate_ptr, slot_T, RATED)
    own_T = tl.load(rank_ptr + slot_T, mask=slot_T >= 0, other=0) > 0
    for member in tl.static_range(NUM_MEMBERS):
        start, stop = _member_range(edges_ptr, member, width, NUM_MEMBERS, ALIGN)
        num_parts = tl.cdiv(stop - start, BLOCK_N)
        j_J = member * RANK_PAD + tl.arange(0, RANK_PAD)
        at_TJ = row_T.to(tl.int64)[:, None] * h_stride + j_J[None, :]
        total_PTJ = tl.zeros((BLOCK_P, BLOCK_T, RANK_PAD), tl.float32)
        for part in range(0, num_parts, BLOCK_P):
            p_P = part + tl.arange(0, BLOCK_P)
            total_PTJ += tl.load(
                part_ptr + p_P.to(tl.int64)[:, None, None] * part_stride + at_TJ[None, :, :],
                mask=(p_P < num_parts)[:, None, None] & own_T[None, :, None], other=0.0,
            ).to(tl.float32)  # fmt: skip
        dh_TJ = tl.sum(total_PTJ, 0) * factor_T[:, None]
        dh_TJ = tl.where(own_T[:, None], dh_TJ, 0.0)
        tl.store(dh_ptr + at_TJ, dh_TJ.to(dh_ptr.dtype.element_ty), mask=in_T[:, None])


@triton.jit
def sum_splits_tile(
    block, part_ptr, out_ptr, num_values, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out = the sum of the SPLITS float32 parts that lie `num_values` apart."""
    at_N = block * BLOCK + tl.arange(0, BLOCK)
    total_N = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        part_N = part_ptr + split * num_values.to(tl.int64) + at_N
        total_N += tl.load(part_N, mask=at_N < num_values, other=0.0)
    tl.store(out_ptr + at_N, total_N.to(out_ptr.dtype.element_ty), mask=at_N < num_values)
