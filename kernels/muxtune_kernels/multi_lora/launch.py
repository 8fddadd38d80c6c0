"""Launches of the multi-task low-rank linear on CUDA.

Forward: one product that makes h = s x A^T itself and has the expansion in it; where it is not to
(no flags to count in; dropout masks x), a shrink before it. Backward: dB = dy^T h and the parts of
dh = s dy B from one read of dy, their sum, then dx = dy W + dh A, then dA = dh^T x, which nobody
waits for. dx is one product with dh A in it, or the library's, which adds to an expansion that is
written first (beta = 1): from some number of rows on that is faster (`Tuning.fused_backward`), and
where the fused product cannot be used (float32, odd strides, dropout's mask on dx) all there is,
forward too.

Shape suffixes: T rows, D input features, O output features, R pool rank rows of one member,
J columns of the compact h (members * RANK_PAD), S slots.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..dropout import RowDropout
from ..dropout.reference import mix_word
from ..lasting import lasting
from ..launching import Launcher, Tiles, add_product, empty
from ..rows import slot_offsets
from .flags import ReadyFlags
from .gemm import linear_kernel
from .kernels import (
    dh_db_kernel,
    expand_kernel,
    outer_kernel,
    shrink_kernel,
    sum_parts_kernel,
    total_kernel,
)
from .tuning import (
    INTERPRETED,
    GemmBlocks,
    Tuning,
    cdiv,
    gemm_blocks,
    has_half_tail,
    next_power_of_2,
    num_sms,
    shrunk_members,
)

_shrink, _expand, _linear = map(Launcher, (shrink_kernel, expand_kernel, linear_kernel))
_dh_db, _sum, _outer = map(Launcher, (dh_db_kernel, sum_parts_kernel, outer_kernel))
_add_up = Launcher(total_kernel)


class Adapters(NamedTuple):
    """The static side of a call: ranks of every member, the members' output widths."""

    slot_ranks: tuple[int, ...]
    out_features: tuple[int, ...]
    module_key: int = 0
    deterministic: bool = False


class RowTensors(NamedTuple):
    """The per-micro-batch side of a call, on the device."""

    slot_of_row_T: Tensor
    slot_bounds_S3: Tensor
    scale_S: Tensor
    dropout: RowDropout | None


class GradTargets(NamedTuple):
    """Where the factors' gradients go: [M * R, D] and [R, O], contiguous. Slots whose `keep_S`
    (int32) is not zero add to what is there, the others overwrite it."""

    da_RD: Tensor
    db_RO: Tensor
    keep_S: Tensor


class Layout(NamedTuple):
    """What follows from `Adapters`; the tensors are made on the first call, before a capture."""

    offset_S: Tensor
    rank_S: Tensor
    edges: Tensor
    total_rank: int
    rank_pad: int
    num_members: int
    j_width: int
    align: int
    module_word: int
    slot_of_rank_R: Tensor

    def word_of(self, rows: RowTensors) -> int:
        """What tells one linear's dropout from another's. Without dropout the same for all, so
        that a launch is looked up once for all layers (`Launcher`)."""
        return 0 if rows.dropout is None else self.module_word


# Captured graphs point to these tensors, so they are never let go: a few small ones for each set
# of ranks and each kind of linear, whatever the number of layers.
@functools.cache
@lasting
def _layout_tensors(
    slot_ranks: tuple[int, ...], out_features: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(offset_S, rank_S, edges, slot_of_rank_R)."""
    offsets, edges = slot_offsets(slot_ranks), slot_offsets(out_features)
    offset_S, rank_S, edge_M = (
        torch.tensor(values, dtype=torch.int32, device=device)
        for values in (offsets[:-1], slot_ranks, edges)
    )
    slot_S = torch.arange(len(slot_ranks))
    slot_of_rank_R = torch.repeat_interleave(slot_S, torch.tensor(slot_ranks)).to(device)
    return offset_S, rank_S, edge_M, slot_of_rank_R


@functools.lru_cache(maxsize=1024)
def layout_of(adapters: Adapters, device: torch.device) -> Layout:
    offset_S, rank_S, edge_M, slot_of_rank_R = _layout_tensors(
        adapters.slot_ranks, adapters.out_features, device
    )
    edges = slot_offsets(adapters.out_features)
    rank_pad = max(16, next_power_of_2(max(adapters.slot_ranks)))
    members = len(adapters.out_features)
    align = next(p for p in (16, 8, 4, 2, 1) if all(edge % p == 0 for edge in edges))
    word = mix_word(adapters.module_key)
    word = word - (1 << 32) if word >= 1 << 31 else word
    return Layout(
        offset_S, rank_S, edge_M, sum(adapters.slot_ranks), rank_pad, members,
        members * rank_pad, align, word, slot_of_rank_R,
    )  # fmt: skip


class Shrink(NamedTuple):
    """What a product needs to make its own h: the first factor with one row a rank, and zeros."""

    factor_RK: Tensor
    ready: Tensor


def lora_forward(
    x_TD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, a_RD: Tensor, b_OR: Tensor,
    rows: RowTensors, adapters: Adapters, tuning: Tuning, flags: ReadyFlags | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y_TO, h_TJ); h carries scale / (1 - rate)."""
    layout = layout_of(adapters, x_TD.device)
    fused = tuning.fused and fits_fused(x_TD, weight_OD)
    blocks = gemm_blocks(x_TD.shape[0], adapters.out_features) if fused else None
    if blocks is None:
        h_TJ = shrink(x_TD, a_RD, rows, layout, tuning._replace(shrink_splits=1))
        y_TO = expand(h_TJ, b_OR, bias_O, rows, adapters.out_features, layout, tuning, False)
        return add_product(y_TO, x_TD, weight_OD, True), h_TJ
    if flags is not None and rows.dropout is None:
        own = Shrink(a_RD, flags.take(cdiv(x_TD.shape[0], blocks.t)))
        return linear(x_TD, weight_OD, bias_O, own, b_OR.t(), rows, layout, blocks, True)
    h_parts = shrink(x_TD, a_RD, rows, layout, tuning)
    return linear(x_TD, weight_OD, bias_O, h_parts, b_OR.t(), rows, layout, blocks, True)


def lora_backward(
    dy_TO: Tensor, x_TD: Tensor, h_TJ: Tensor, weight_OD: Tensor, a_RD: Tensor, b_OR: Tensor,
    rows: RowTensors, adapters: Adapters, tuning: Tuning, needs_dx: bool, needs_factors: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dx_TD, dA [M * R, D], dB [R, O])."""
    layout = layout_of(adapters, x_TD.device)
    fused = needs_dx and _is_fused_backward(dy_TO, weight_OD, rows, tuning)
    blocks = gemm_blocks(x_TD.shape[0], (x_TD.shape[1],)) if fused else None
    dh_TJ, db_RO = dh_db(dy_TO, h_TJ, b_OR, rows, adapters, layout, tuning)
    dx_TD = None
    if blocks is not None:
        dx_TD, _ = linear(dy_TO, weight_OD, None, dh_TJ, a_RD, rows, layout, blocks, False)
    elif needs_dx:
        dx_TD = expand(dh_TJ, a_RD.t(), None, rows, (x_TD.shape[1],), layout, tuning, True)
        add_product(dx_TD, dy_TO, weight_OD)
    da_RD = outer(dh_TJ, x_TD, a_RD, rows, adapters, layout, tuning) if needs_factors else None
    return dx_TD, da_RD, db_RO if needs_factors else None


def lora_input_grad(
    dy_TO: Tensor, x_shape: tuple[int, int], h_TJ: Tensor, weight_OD: Tensor, a_RD: Tensor,
    b_OR: Tensor, rows: RowTensors, adapters: Adapters, tuning: Tuning, targets: GradTargets,
    needs_dx: bool,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """(dx_TD, dh_TJ); dB goes to its target. dA is what `outer` makes of dh_TJ, later or beside."""
    layout = layout_of(adapters, dy_TO.device)
    dh_TJ, _ = dh_db(dy_TO, h_TJ, b_OR, rows, adapters, layout, tuning, targets)
    if not needs_dx:
        return None, dh_TJ
    fused = _is_fused_backward(dy_TO, weight_OD, rows, tuning)
    blocks = gemm_blocks(x_shape[0], (x_shape[1],)) if fused else None
    if blocks is not None:
        return linear(dy_TO, weight_OD, None, dh_TJ, a_RD, rows, layout, blocks, False)[0], dh_TJ
    dx_TD = expand(dh_TJ, a_RD.t(), None, rows, (x_shape[1],), layout, tuning, True)
    return add_product(dx_TD, dy_TO, weight_OD), dh_TJ


def _is_fused_backward(dy_TO: Tensor, weight_OD: Tensor, rows: RowTensors, tuning: Tuning) -> bool:
    told = tuning.fused and tuning.fused_backward
    return told and rows.dropout is None and fits_fused(dy_TO, weight_OD)


def fits_fused(x_TK: Tensor, weight_OD: Tensor) -> bool:
    """Whether the tensor copy engine can read both: 16-bit, 16-byte strides and addresses."""
    return (
        (x_TK.element_size() == 2 or INTERPRETED)
        and weight_OD.stride(1) == 1
        and all(t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0 for t in (x_TK, weight_OD))
    )


def linear(
    x_TK: Tensor, weight_OD: Tensor, bias_O: Tensor | None, h_parts: Tensor | Shrink,
    factor_RN: Tensor, rows: RowTensors, layout: Layout, blocks: GemmBlocks, weight_nk: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x W^T or x W, plus h F; the summed h_TJ, or the one that the product made)."""
    num_rows, num_in = x_TK.shape
    num_out = weight_OD.shape[0] if weight_nk else weight_OD.shape[1]
    out_TN = empty((num_rows, num_out), x_TK.dtype, x_TK.device)
    own = h_parts if isinstance(h_parts, Shrink) else None
    h_parts = _new_h(x_TK, layout, 1) if isinstance(h_parts, Shrink) else h_parts
    splits = h_parts.shape[0] if h_parts.dim() == 3 else 1
    h_TJ = _new_h(x_TK, layout, 1) if splits > 1 else h_parts
    # One for each SM also where there are fewer tiles: their number is compiled in, and what has no
    # tile makes h or ends. The interpreter runs one after the other: none may wait for a later one.
    programs = 1 if own is not None and INTERPRETED else num_sms()
    tail = has_half_tail(blocks, num_rows, num_out)
    members = layout.num_members
    in_factor_RK, ready = own or (factor_RN, rows.slot_of_row_T)

    def weight_tiles(width: int) -> Tiles:
        return Tiles(weight_OD, *((width, blocks.k) if weight_nk else (blocks.k, width)))

    _linear(
        (programs, 1, 1),
        (
            h_parts, factor_RN, out_TN if bias_O is None else bias_O, h_TJ, in_factor_RK,
            rows.scale_S, ready, rows.slot_of_row_T, rows.slot_bounds_S3, layout.offset_S,
            layout.rank_S, layout.edges,
        ),
        (
            num_rows, num_out, num_in, layout.total_rank, layout.j_width, h_parts.stride(0),
            *factor_RN.stride(), *in_factor_RK.stride(),
        ),
        (
            weight_nk, members if weight_nk else 1, 1 if weight_nk else members, layout.rank_pad,
            splits, own is not None, bias_O is not None, blocks.t, blocks.n, blocks.k, 8,
            blocks.halves, tail, programs,
        ),
        blocks.warps, blocks.stages,
        (
            Tiles(x_TK, blocks.t, blocks.k), weight_tiles(blocks.n),
            weight_tiles(blocks.n // 2 if tail else blocks.n),
            Tiles(out_TN, blocks.t, blocks.n // (2 if blocks.halves else 1)),
        ),
    )  # fmt: skip
    return out_TN, h_TJ


def _new_h(like_TK: Tensor, layout: Layout, splits: int) -> Tensor:
    shape = (like_TK.shape[0], layout.j_width)
    if splits == 1:
        return empty(shape, like_TK.dtype, like_TK.device)
    return empty((splits, *shape), torch.float32, like_TK.device)


def shrink(x_TD: Tensor, a_RD: Tensor, rows: RowTensors, layout: Layout, tuning: Tuning) -> Tensor:
    """h_TJ in the dtype of x, or float32 parts [shrink_splits, T, J] to be summed."""
    num_rows, width = x_TD.shape
    splits = tuning.shrink_splits
    h = _new_h(x_TD, layout, splits)
    key_T, rate_S = rows.dropout or (rows.slot_of_row_T, rows.scale_S)
    inner = shrunk_members(layout.num_members, layout.rank_pad)
    for member in range(0, layout.num_members, inner):
        factor_RD, part = a_RD[member * layout.total_rank :], h[..., member * layout.rank_pad :]
        _shrink(
            (cdiv(num_rows, tuning.shrink_t), splits, 1),
            (
                x_TD, factor_RD, part, rows.slot_of_row_T, rows.slot_bounds_S3, layout.offset_S,
                layout.rank_S, rows.scale_S, key_T, rate_S,
            ),
            (
                layout.word_of(rows), num_rows, width, layout.total_rank, x_TD.stride(0),
                *a_RD.stride(), layout.j_width, h.stride(0),
            ),
            (
                inner, layout.rank_pad, splits, rows.dropout is not None, tuning.shrink_t,
                tuning.shrink_k, next_power_of_2(inner * layout.rank_pad),
            ),
            tuning.warps, tuning.shrink_stages,
        )  # fmt: skip
    return h


def expand(
    h_TJ: Tensor, factor_NR: Tensor, bias_N: Tensor | None, rows: RowTensors,
    widths: tuple[int, ...], layout: Layout, tuning: Tuning, is_dx: bool,
) -> Tensor:  # fmt: skip
    """bias + h F; for dx over all members at once and under dropout's mask."""
    num_rows, num_out = h_TJ.shape[0], sum(widths)
    out_TN = empty((num_rows, num_out), h_TJ.dtype, h_TJ.device)
    members = 1 if is_dx else layout.num_members
    inner = layout.num_members if is_dx else 1
    dropout = is_dx and rows.dropout is not None
    key_T, rate_S = rows.dropout or (rows.slot_of_row_T, rows.scale_S)
    blocks_n = cdiv(max(widths), tuning.expand_n)
    _expand(
        (blocks_n, cdiv(num_rows, tuning.expand_t), members),
        (
            h_TJ, factor_NR, out_TN if bias_N is None else bias_N, out_TN, rows.slot_of_row_T,
            layout.offset_S, layout.rank_S, key_T, rate_S, layout.edges,
        ),
        (
            layout.word_of(rows), num_rows, num_out, layout.total_rank, layout.j_width,
            factor_NR.stride(1), factor_NR.stride(0), out_TN.stride(0),
        ),
        (
            members, inner, layout.rank_pad, bias_N is not None, dropout, layout.align,
            tuning.expand_t, tuning.expand_n, next_power_of_2(inner * layout.rank_pad),
        ),
        tuning.warps,
    )  # fmt: skip
    return out_TN


def dh_db(
    dy_TO: Tensor, h_TJ: Tensor, b_OR: Tensor, rows: RowTensors, adapters: Adapters,
    layout: Layout, tuning: Tuning, targets: GradTargets | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dh_TJ, dB [R, O]) from one read of dy."""
    parts, partials = dh_db_parts(dy_TO, h_TJ, b_OR, rows, adapters, layout, tuning, targets)
    dh_TJ, db_RO = _sum_parts(parts, partials, h_TJ, b_OR, rows, layout, tuning)
    if targets is not None and tuning.db_splits > 1:
        _total(db_RO[None], db_RO, layout, (targets.db_RO, targets.keep_S))
    return dh_TJ, db_RO


def dh_db_parts(
    dy_TO: Tensor, h_TJ: Tensor, b_OR: Tensor, rows: RowTensors, adapters: Adapters,
    layout: Layout, tuning: Tuning, targets: GradTargets | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dh [blocks of O, T, J], dB [splits of T, R, O]), to be summed over the first dimension.
    Without splits dB goes straight to the targets."""
    members, splits = layout.num_members, tuning.db_splits
    num_rows, num_out = dy_TO.shape
    blocks = cdiv(max(adapters.out_features), tuning.db_n)
    # In the dtype of dy: as exact as what it is rounded to in the end, and half the bytes.
    parts = empty((blocks, num_rows, layout.j_width), dy_TO.dtype, dy_TO.device)
    direct = targets if splits == 1 else None
    partials = _partials(b_OR.t(), splits) if direct is None else direct.db_RO[None]
    _dh_db(
        (blocks, members * len(adapters.slot_ranks), splits),
        (
            dy_TO, b_OR, h_TJ, parts, partials, rows.slot_of_row_T, rows.slot_bounds_S3,
            layout.offset_S, layout.rank_S, layout.edges,
            layout.rank_S if direct is None else direct.keep_S,
        ),
        (
            num_out, layout.total_rank, dy_TO.stride(0), b_OR.stride(1), b_OR.stride(0),
            layout.j_width, parts.stride(0), partials.stride(0), partials.stride(1),
        ),
        (
            members, layout.rank_pad, splits, layout.align, direct is not None,
            _slots_pad(adapters), tuning.db_t, tuning.db_n,
        ),
        tuning.db_warps, tuning.db_stages,
    )  # fmt: skip
    return parts, partials


def _sum_parts(
    parts: Tensor, partials: Tensor, h_TJ: Tensor, b_OR: Tensor, rows: RowTensors, layout: Layout,
    tuning: Tuning,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dh_TJ, dB [R, O]) from what `dh_db_parts` left."""
    dh_TJ, db_RO, tiles, sums = new_sums(h_TJ, b_OR, partials, tuning)
    rate_S = rows.scale_S if rows.dropout is None else rows.dropout.rate_S
    _sum(
        (tiles + sums, 1, 1),
        (
            parts, dh_TJ, partials, db_RO, rows.slot_of_row_T, layout.rank_S, rows.scale_S,
            rate_S, layout.edges,
        ),
        (tiles, h_TJ.shape[0], b_OR.shape[0], db_RO.numel(), layout.j_width, parts.stride(0)),
        (
            layout.num_members, layout.rank_pad, partials.shape[0], rows.dropout is not None,
            layout.align, tuning.db_n, tuning.sum_t,
            parts_at_once(parts, layout, tuning), 1024,
        ),
        2,
    )  # fmt: skip
    return dh_TJ, db_RO


def parts_at_once(parts: Tensor, layout: Layout, tuning: Tuning) -> int:
    """All of a row's, if they are few: the sum waits for the memory once, not for each few."""
    most = max(1, 2048 // (layout.rank_pad * tuning.sum_t))
    return min(next_power_of_2(parts.shape[0]), most)


def new_sums(
    h_TJ: Tensor, b_OR: Tensor, partials: Tensor, tuning: Tuning
) -> tuple[Tensor, Tensor, int, int]:
    """(dh_TJ, dB [R, O], programs that sum the one, those that sum the other)."""
    tiles, dh_TJ = cdiv(h_TJ.shape[0], tuning.sum_t), empty(h_TJ.shape, h_TJ.dtype, h_TJ.device)
    if partials.shape[0] == 1:
        return dh_TJ, partials[0], tiles, 0
    db_RO = _partials(b_OR.t(), 1)[0]
    return dh_TJ, db_RO, tiles, cdiv(db_RO.numel(), 1024)


def outer(
    dh_TJ: Tensor, x_TD: Tensor, a_RD: Tensor, rows: RowTensors, adapters: Adapters,
    layout: Layout, tuning: Tuning, targets: GradTargets | None = None,
) -> Tensor:  # fmt: skip
    """dA [M * R, D]."""
    width, splits = x_TD.shape[1], tuning.da_splits
    direct = targets if splits == 1 else None
    partials = _partials(a_RD, splits) if direct is None else direct.da_RD[None]
    key_T, rate_S = rows.dropout or (rows.slot_of_row_T, rows.scale_S)
    _outer(
        (cdiv(width, tuning.da_n), len(adapters.slot_ranks), splits),
        (
            dh_TJ, x_TD, partials, rows.slot_of_row_T, rows.slot_bounds_S3, layout.offset_S,
            layout.rank_S, key_T, rate_S, layout.rank_S if direct is None else direct.keep_S,
        ),
        (
            layout.word_of(rows), width, layout.total_rank, layout.j_width, x_TD.stride(0),
            partials.stride(0), partials.stride(1),
        ),
        (
            layout.num_members, layout.rank_pad, splits, rows.dropout is not None,
            direct is not None, _slots_pad(adapters), tuning.da_t, tuning.da_n,
            next_power_of_2(layout.j_width),
        ),
        tuning.da_warps, tuning.da_stages,
    )  # fmt: skip
    if splits == 1:
        return partials[0]
    return _total(partials, a_RD, layout, targets and (targets.da_RD, targets.keep_S))


def _slots_pad(adapters: Adapters) -> int:
    """0: in their own order. Ordering many is more work than it saves."""
    count = len(adapters.slot_ranks)
    return next_power_of_2(count) if 1 < count <= 64 else 0


def _total(
    partials: Tensor, like: Tensor, layout: Layout, target: tuple[Tensor, Tensor] | None
) -> Tensor:
    """The sum of the parts; or the target that it went into, with what the slots there keep."""
    splits, num_ranks, width = partials.shape
    out_RN = empty(like.shape, like.dtype, like.device) if target is None else target[0]
    keep_S = layout.rank_S if target is None else target[1]
    _add_up(
        (cdiv(num_ranks * width, _TOTAL_BLOCK), 1, 1),
        (partials, out_RN, keep_S, layout.slot_of_rank_R),
        (num_ranks * width, width, layout.total_rank), (splits, target is not None, _TOTAL_BLOCK),
        4,
    )  # fmt: skip
    return out_RN


_TOTAL_BLOCK = 1024


def _partials(factor_RN: Tensor, splits: int) -> Tensor:
    dtype = factor_RN.dtype if splits == 1 else torch.float32
    return empty((splits, *factor_RN.shape), dtype, factor_RN.device)
