"""The multi-task low-rank linear as two products that are a few steps longer than the weight.

Packed rows come slot by slot, so the ranks of the slots that meet in a tile of rows are neighbours
among all ranks: a window. Behind x lies h of each row's own ranks at their places in its tile's
window, behind the weight lie all slots' factors,

    y  = [x | h] [W | B]^T          dx = [dy | dh] [W ; A]

and a tile's product runs on over its window (64 ranks a step), wherever that lies among the
factors. So it has no epilogue of its own, and its cost does not grow with the number of tasks.
Where that is faster, dA is made by the second product's kernel: by multiprocessors that its waves
of tiles leave idle, and by all when it is through.

It needs room: weight, x and dy are the first columns (and rows) of wider buffers. Features are
multiples of 64, members' (linears that share x) of 256.

Shape suffixes: T rows, D input features, O output features, W columns of a buffer, P rows of a
buffer, J columns of the compact h, R pool rows, S slots, I tiles of rows, B blocks.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ..launching import Launcher, Tiles, empty
from .launch import (
    Adapters,
    Layout,
    RowTensors,
    dh_db,
    layout_of,
    new_sums,
    outer,
    parts_at_once,
)
from .tuning import Tuning, cdiv, next_power_of_2, num_sms, tuning_of
from .wide_kernels import widen_weight_kernel
from .window_kernels import (
    window_linear_kernel,
    window_shrink_kernel,
    window_sum_kernel,
    window_table_kernel,
)

_widen, _table, _shrink = map(
    Launcher, (widen_weight_kernel, window_table_kernel, window_shrink_kernel)
)
_sum, _linear = map(Launcher, (window_sum_kernel, window_linear_kernel))
_BLOCK_N = 512
WINDOW = 64  # ranks a step, as many as reduced features
TILE_T = 128
_TILE_N = 256


class Blocks(NamedTuple):
    """Of a product: its programs, further ones that make dA, and the features of an item of dA."""

    programs: int
    side: int
    side_n: int


class WideWeight(NamedTuple):
    """A frozen weight with room for the slots' factors, and which of these are not finite."""

    weight_PW: Tensor
    bad_S: Tensor
    num_out: int
    width: int


class Window(NamedTuple):
    """The first rank and the steps of each tile of rows; the same for all linears whose slots have
    these ranks. count: a zero, for one product at a time. room: columns behind x (for each member)
    that hold any tile's."""

    table_I2: Tensor
    count: Tensor
    room: int


def window_tuning(
    num_rows: int, width: int, out_features: tuple[int, ...], num_slots: int, rank_pad: int,
    itemsize: int,
) -> Tuning:  # fmt: skip
    tuning = tuning_of(num_rows, width, out_features, num_slots, rank_pad, itemsize, False)
    if num_rows < 6144:  # nobody could add up parts of h: it is cut into more tiles instead
        tuning = tuning._replace(shrink_t=16, shrink_k=256, shrink_stages=6)
    if cdiv(max(out_features), tuning.db_n) * num_slots >= 128:  # and no parts of dB to add up
        tuning = tuning._replace(db_splits=1)
    return tuning


def window_room(adapters: Adapters) -> int:
    return cdiv(sum(adapters.slot_ranks), WINDOW) * WINDOW


def window_of(rows: RowTensors, adapters: Adapters) -> Window:
    """Once a micro-batch."""
    layout = layout_of(adapters, rows.slot_of_row_T.device)
    num_rows = rows.slot_of_row_T.numel()
    tiles = cdiv(num_rows, TILE_T)
    table_I2 = rows.slot_of_row_T.new_empty((tiles, 2))
    count = rows.slot_of_row_T.new_empty((1,))
    _table(
        (tiles, 1, 1), (rows.slot_of_row_T, layout.offset_S, layout.rank_S, table_I2, count),
        (num_rows,), (TILE_T, WINDOW), 4,
    )  # fmt: skip
    return Window(table_I2, count, window_room(adapters))


def wide_buffer(num_rows: int, width: int, room: int, like: Tensor) -> Tensor:
    """[rows, width + room or a few more]: rows start at multiples of 128 bytes."""
    return like.new_zeros((num_rows, cdiv(width + room, 64) * 64))


def wide_weight(weight_OD: Tensor, adapters: Adapters) -> WideWeight:
    """A copy of the weight with room; before the first use, `widen_weight`."""
    num_out, width = weight_OD.shape
    members, ranks = len(adapters.out_features), sum(adapters.slot_ranks)
    weight_PW = wide_buffer(num_out + members * ranks, width, ranks, weight_OD)
    weight_PW[:num_out, :width] = weight_OD
    bad_S = torch.zeros((len(adapters.slot_ranks),), dtype=torch.int32, device=weight_OD.device)
    return WideWeight(weight_PW, bad_S, num_out, width)


def widen_weight(wide: WideWeight, a_RD: Tensor, b_RO: Tensor, adapters: Adapters) -> None:
    """Copies the factors behind the weight: once after each of their changes."""
    layout = layout_of(adapters, a_RD.device)
    blocks = cdiv(wide.width, _BLOCK_N) + cdiv(wide.num_out, _BLOCK_N)
    bad_SB = wide.bad_S.new_empty((len(adapters.slot_ranks), blocks))
    _widen(
        (blocks, len(adapters.slot_ranks), 1),
        (
            a_RD, b_RO, wide.weight_PW, bad_SB, layout.offset_S, layout.rank_S, layout.edges,
        ),
        (
            wide.width, wide.num_out, layout.total_rank, 0, cdiv(wide.width, _BLOCK_N), blocks,
            a_RD.stride(0), b_RO.stride(0), wide.weight_PW.stride(0),
        ),
        (layout.num_members, layout.rank_pad, _BLOCK_N),
        4,
    )  # fmt: skip
    torch.amax(bad_SB, 1, out=wide.bad_S)


def window_shrink(
    x_TW: Tensor, wide: WideWeight, rows: RowTensors, window: Window, layout: Layout,
    tuning: Tuning,
) -> Tensor:  # fmt: skip
    """h_TJ, compact; and behind x."""
    num_rows = x_TW.shape[0]
    h_TJ = empty((num_rows, layout.j_width), x_TW.dtype, x_TW.device)
    factor_RD, behind = wide.weight_PW[wide.num_out :], x_TW[:, wide.width :]
    _shrink(
        (cdiv(num_rows, tuning.shrink_t), layout.num_members, 1),
        (
            x_TW, factor_RD, h_TJ, behind, wide.bad_S, rows.slot_of_row_T, rows.slot_bounds_S3,
            layout.offset_S, layout.rank_S, rows.scale_S, window.table_I2,
        ),
        (
            num_rows, wide.width, layout.total_rank, x_TW.stride(0), factor_RD.stride(0),
            layout.j_width, x_TW.stride(0), window.room,
        ),
        (
            1, layout.rank_pad, tuning.shrink_t, tuning.shrink_k, TILE_T, WINDOW,
        ),
        tuning.warps, tuning.shrink_stages,
    )  # fmt: skip
    return h_TJ


class Outer(NamedTuple):
    """What dA = h^T x is made of, and where it goes."""

    h_TJ: Tensor
    x_TW: Tensor
    da_RD: Tensor


def window_linear(
    x_TW: Tensor, wide: WideWeight, window: Window, rows: RowTensors, layout: Layout,
    weight_nk: bool, outer: Outer | None = None,
) -> Tensor:  # fmt: skip
    """outer: made beside the product."""
    num_rows, num_slots = x_TW.shape[0], rows.scale_S.numel()
    num_in, num_out = (wide.width, wide.num_out) if weight_nk else (wide.num_out, wide.width)
    blocks = blocks_of(num_rows, num_out, num_slots)
    out_TN = empty((num_rows, num_out), x_TW.dtype, x_TW.device)
    tiles = cdiv(num_rows, TILE_T) * cdiv(num_out, _TILE_N)
    members, side = layout.num_members, blocks.side if outer else 0
    h_TJ, v_TW, da_RD = outer or Outer(x_TW, x_TW, out_TN)
    _linear(
        (blocks.programs + side, 1, 1),
        (
            window.table_I2, window.count, layout.edges, h_TJ, v_TW, da_RD, rows.slot_of_row_T,
            rows.slot_bounds_S3, layout.offset_S, layout.rank_S,
        ),
        (
            num_rows, num_out, num_in, layout.total_rank, window.room, num_slots, h_TJ.stride(0),
            v_TW.stride(0), da_RD.stride(0),
        ),
        (
            weight_nk, members if weight_nk else 1, 1 if weight_nk else members, layout.rank_pad,
            TILE_T, _TILE_N, WINDOW, _GROUP_T, blocks.programs,
            next_power_of_2(cdiv(tiles, blocks.programs)), _STAGES, outer is not None, side,
            max(16, 8192 // blocks.side_n), blocks.side_n, _SIDE_STAGES,
            next_power_of_2(layout.j_width),
        ),
        8, _STAGES,
        (
            Tiles(x_TW, TILE_T, WINDOW),
            Tiles(wide.weight_PW, *((_TILE_N, WINDOW) if weight_nk else (WINDOW, _TILE_N))),
            Tiles(out_TN, TILE_T, _TILE_N // 2),
        ),
    )  # fmt: skip
    return out_TN


_STAGES, _SIDE_STAGES, _GROUP_T = 4, 5, 8


@functools.lru_cache(maxsize=1024)
def blocks_of(num_rows: int, num_out: int, num_slots: int) -> Blocks:
    """The fewest programs that take no more waves of tiles; the others work beside them."""
    tiles = cdiv(num_rows, TILE_T) * cdiv(num_out, _TILE_N)
    programs = cdiv(tiles, cdiv(tiles, num_sms()))
    items = ((n, cdiv(num_out, n) * num_slots) for n in (512, 256, 128, 64))
    return Blocks(
        programs, num_sms() - programs, next((n for n, count in items if count >= 192), 32)
    )


def makes_outer_beside(num_rows: int, width: int, num_out: int, num_slots: int) -> bool:
    """Where it was measured faster: products long beside dA, or items of a fair size for it."""
    return num_out >= 2 * width or (num_rows >= 8192 and 1 < num_slots < 32)


def window_forward(
    x_TW: Tensor, wide: WideWeight, rows: RowTensors, window: Window, adapters: Adapters,
    tuning: Tuning,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y_TO, h_TJ). x_TW: x in its first columns; those behind are overwritten."""
    layout = layout_of(adapters, x_TW.device)
    h_TJ = window_shrink(x_TW, wide, rows, window, layout, tuning)
    return window_linear(x_TW, wide, window, rows, layout, True), h_TJ


def window_backward(
    dy_TW: Tensor, x_TW: Tensor, h_TJ: Tensor, wide: WideWeight, a_RD: Tensor, b_RO: Tensor,
    rows: RowTensors, window: Window, adapters: Adapters, tuning: Tuning,
    beside: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx_TD, dA [M * R, D], dB [R, O]). dy_TW: dy in its first columns; those behind are
    overwritten. beside: whether dA is made beside dx; None: where that is faster."""
    layout = layout_of(adapters, x_TW.device)
    if beside is None:
        beside = makes_outer_beside(
            x_TW.shape[0], wide.width, wide.num_out, len(adapters.slot_ranks)
        )

    def sum_parts(
        parts: Tensor, partials: Tensor, h_TJ: Tensor, b_OR: Tensor, *_: object
    ) -> tuple[Tensor, Tensor]:
        return _window_sum(parts, partials, h_TJ, b_OR, dy_TW, wide, rows, window, layout, tuning)

    dh_TJ, db_RO = dh_db(
        dy_TW[:, : wide.num_out], h_TJ, b_RO.t(), rows, adapters, layout, tuning,
        sum_parts=sum_parts,
    )  # fmt: skip
    if not beside:
        dx_TD = window_linear(dy_TW, wide, window, rows, layout, False)
        da_RD = outer(dh_TJ, x_TW[:, : wide.width], a_RD, rows, adapters, layout, tuning)
        return dx_TD, da_RD, db_RO
    da_RD = empty(a_RD.shape, a_RD.dtype, a_RD.device)
    da = Outer(dh_TJ, x_TW, da_RD)
    return window_linear(dy_TW, wide, window, rows, layout, False, da), da_RD, db_RO


def _window_sum(
    parts: Tensor, partials: Tensor, h_TJ: Tensor, b_OR: Tensor, dy_TW: Tensor, wide: WideWeight,
    rows: RowTensors, window: Window, layout: Layout, tuning: Tuning,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dh_TJ, db_RO, tiles, sums = new_sums(h_TJ, b_OR, partials, tuning)
    _sum(
        (tiles + sums, 1, 1),
        (
            parts, dh_TJ, dy_TW[:, wide.num_out :], wide.bad_S, partials, db_RO,
            rows.slot_of_row_T, layout.offset_S, layout.rank_S, rows.scale_S, layout.edges,
            window.table_I2,
        ),
        (
            tiles, h_TJ.shape[0], b_OR.shape[0], db_RO.numel(), layout.j_width, parts.stride(0),
            dy_TW.stride(0), window.room,
        ),
        (
            layout.num_members, layout.rank_pad, partials.shape[0], layout.align, tuning.db_n,
            tuning.sum_t, parts_at_once(parts, layout, tuning), 1024, TILE_T, WINDOW,
        ),
        2,
    )  # fmt: skip
    return dh_TJ, db_RO
