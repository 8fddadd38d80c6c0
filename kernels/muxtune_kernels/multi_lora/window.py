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

import contextlib
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

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
from .tuning import INTERPRETED, Tuning, cdiv, next_power_of_2, num_sms, tuning_of
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
    x_TD: Tensor, factor_RD: Tensor, bad_S: Tensor, to_TW: Tensor, rows: RowTensors,
    window: Window, layout: Layout, tuning: Tuning, is_dy: bool = False,
) -> Tensor:  # fmt: skip
    """h_TJ, compact; and in its windows. factor_RD: the factor's rows of the first member; is_dy:
    the members' are the same rows, of their own columns of x, too."""
    num_rows = x_TD.shape[0]
    h_TJ = empty((num_rows, layout.j_width), x_TD.dtype, x_TD.device)
    _shrink(
        (cdiv(num_rows, tuning.shrink_t), layout.num_members, 1),
        (
            x_TD, factor_RD, h_TJ, to_TW, bad_S, rows.slot_of_row_T, rows.slot_bounds_S3,
            layout.offset_S, layout.rank_S, rows.scale_S, window.table_I2, layout.edges,
        ),
        (
            num_rows, x_TD.shape[1], layout.total_rank, x_TD.stride(0), factor_RD.stride(0),
            layout.j_width, to_TW.stride(0), window.room,
        ),
        (
            layout.num_members, is_dy, layout.rank_pad, tuning.shrink_t, tuning.shrink_k, TILE_T,
            WINDOW,
        ),
        tuning.warps, tuning.shrink_stages,
    )  # fmt: skip
    return h_TJ


class Outer(NamedTuple):
    """What dA = h^T x is made of, and where it goes."""

    h_TJ: Tensor
    x_TW: Tensor
    da_RD: Tensor


class Operand(NamedTuple):
    """What a product reads, [rows, features]; its ranks lie behind it, or are the first columns
    (or rows) of another buffer, whose rows have the same stride."""

    near: Tensor
    distant: Tensor | None = None


def window_linear(
    x: Operand, weight: Operand, shape: tuple[int, int], window: Window, rows: RowTensors,
    layout: Layout, weight_nk: bool, outer: Outer | None = None, stages: int = 4, parts: int = 2,
) -> Tensor:  # fmt: skip
    """shape: (features that are summed, features of the result). outer: made beside."""
    num_rows, num_slots = x.near.shape[0], rows.scale_S.numel()
    num_in, num_out = shape
    blocks = blocks_of(num_rows, num_out, num_slots)
    out_TN = empty((num_rows, num_out), x.near.dtype, x.near.device)
    tiles = cdiv(num_rows, TILE_T) * cdiv(num_out, _TILE_N)
    members, side = layout.num_members, blocks.side if outer else 0
    h_TJ, v_TW, da_RD = outer or Outer(x.near, x.near, out_TN)
    x_first, x_tiles = _tiles(x, TILE_T, WINDOW)
    w_first, w_tiles = _tiles(weight, *((_TILE_N, WINDOW) if weight_nk else (WINDOW, _TILE_N)))
    launch = _linear if x.distant is None else _launch_plainly
    launch(
        (blocks.programs + side, 1, 1),
        (
            window.table_I2, window.count, layout.edges, h_TJ, v_TW, da_RD, rows.slot_of_row_T,
            rows.slot_bounds_S3, layout.offset_S, layout.rank_S,
        ),
        (
            num_rows, num_out, num_in, layout.total_rank, window.room, num_slots, h_TJ.stride(0),
            v_TW.stride(0), da_RD.stride(0), x_first, w_first,
        ),
        (
            x.distant is not None, parts, weight_nk, members if weight_nk else 1,
            1 if weight_nk else members, layout.rank_pad,
            TILE_T, _TILE_N, WINDOW, _GROUP_T, blocks.programs,
            next_power_of_2(cdiv(tiles, blocks.programs)), stages, outer is not None, side,
            max(16, 8192 // blocks.side_n), blocks.side_n, _SIDE_STAGES,
            next_power_of_2(layout.j_width),
        ),
        8, stages,
        (x_tiles, w_tiles, Tiles(out_TN, TILE_T, _TILE_N // parts)),
    )  # fmt: skip
    return out_TN


def _tiles(operand: Operand, rows: int, columns: int) -> tuple[int, Any]:
    """(2 where the near one comes first in memory, else 3; what the copy engine is told)."""
    near, distant = operand
    if distant is None:
        return 2, Tiles(near, rows, columns)
    assert near.stride() == distant.stride()
    step = distant.data_ptr() - near.data_ptr()
    base = near if step >= 0 else distant
    strides = [max(16, abs(step)) // near.element_size(), *near.stride()]
    return 2 + (step < 0), TensorDescriptor(base, [2, *near.shape], strides, [1, rows, columns])


def _launch_plainly(
    grid: tuple[int, int, int], tensors: tuple[Tensor, ...], numbers: tuple[int, ...],
    constants: tuple[Any, ...], num_warps: int, num_stages: int, tiles: tuple[Any, ...],
) -> None:  # fmt: skip
    """Of three dimensions, which `Launcher` does not know."""
    told = [
        TensorDescriptor.from_tensor(t.tensor, [t.rows, t.columns]) if isinstance(t, Tiles) else t
        for t in tiles
    ]
    kernel: Any = window_linear_kernel
    kernel[grid](*told, *tensors, *numbers, *constants, num_warps=num_warps, num_stages=num_stages)


_SIDE_STAGES, _GROUP_T = 5, 8


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


class How(NamedTuple):
    """two_reads: dh like h, dB from another read of dy. outer: dA (and dB) "after" dx, "inside" its
    kernel, or by a second "stream" beside it."""

    two_reads: bool = False
    outer: str = "after"
    stages: int = 4
    parts: int = 2


DEFAULT = How()


def window_forward(
    x_TW: Tensor, wide: WideWeight, rows: RowTensors, window: Window, adapters: Adapters,
    tuning: Tuning, how: How = DEFAULT,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y_TO, h_TJ). x_TW: x in its first columns; those behind are overwritten."""
    layout = layout_of(adapters, x_TW.device)
    h_TJ = window_shrink(
        x_TW[:, : wide.width], wide.weight_PW[wide.num_out :], wide.bad_S, x_TW[:, wide.width :],
        rows, window, layout, tuning,
    )  # fmt: skip
    y_TO = window_linear(
        Operand(x_TW), Operand(wide.weight_PW), (wide.width, wide.num_out), window, rows, layout,
        True, None, how.stages, how.parts,
    )  # fmt: skip
    return y_TO, h_TJ


def window_backward(
    dy_TW: Tensor, x_TW: Tensor, h_TJ: Tensor, wide: WideWeight, a_RD: Tensor, b_RO: Tensor,
    rows: RowTensors, window: Window, adapters: Adapters, tuning: Tuning, how: How | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx_TD, dA [M * R, D], dB [R, O]). dy_TW: dy in its first columns; those behind are
    overwritten. beside: whether dA is made beside dx; None: where that is faster."""
    if how is None:
        beside = makes_outer_beside(
            x_TW.shape[0], wide.width, wide.num_out, len(adapters.slot_ranks)
        )
        how = How(outer="inside" if beside else "after")
    return _backward(
        Operand(dy_TW), Operand(wide.weight_PW), dy_TW[:, : wide.num_out],
        x_TW[:, : wide.width], h_TJ, dy_TW[:, wide.num_out :], wide.bad_S, a_RD, b_RO, rows,
        window, adapters, tuning, how,
    )  # fmt: skip


def _backward(
    dy: Operand, weight: Operand, dy_TO: Tensor, x_TD: Tensor, h_TJ: Tensor, behind_TW: Tensor,
    bad_S: Tensor, a_RD: Tensor, b_RO: Tensor, rows: RowTensors, window: Window,
    adapters: Adapters, tuning: Tuning, how: How,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    layout = layout_of(adapters, x_TD.device)
    shape = dy_TO.shape[1], x_TD.shape[1]

    def sum_parts(
        parts: Tensor, partials: Tensor, h_TJ: Tensor, b_OR: Tensor, *_: object
    ) -> tuple[Tensor, Tensor]:
        return _window_sum(
            parts, partials, h_TJ, b_OR, behind_TW, bad_S, rows, window, layout, tuning
        )

    def product(da: Outer | None = None) -> Tensor:
        return window_linear(
            dy, weight, shape, window, rows, layout, False, da, how.stages, how.parts
        )

    db_RO = None
    if how.two_reads:
        dh_TJ = window_shrink(
            dy_TO, b_RO, bad_S, behind_TW, rows, window, layout, tuning, is_dy=True
        )
    else:
        dh_TJ, db_RO = dh_db(
            dy_TO, h_TJ, b_RO.t(), rows, adapters, layout, tuning, sum_parts=sum_parts
        )
    if how.outer == "inside":
        da_RD = empty(a_RD.shape, a_RD.dtype, a_RD.device)
        dx_TD = product(Outer(dh_TJ, x_TD, da_RD))
    elif how.outer == "stream":
        ahead = Ahead()
        with ahead:
            dx_TD = product()
        tuning = beside_tuning(tuning, rows, how)
        da_RD = outer(dh_TJ, x_TD, a_RD, rows, adapters, layout, tuning)
        if db_RO is None:
            db_RO = _db(h_TJ, dy_TO, b_RO, rows, adapters, layout, tuning)
        ahead.join()
    else:
        dx_TD = product()
        da_RD = outer(dh_TJ, x_TD, a_RD, rows, adapters, layout, tuning)
    if db_RO is None:
        db_RO = _db(h_TJ, dy_TO, b_RO, rows, adapters, layout, tuning)
    return dx_TD, da_RD, db_RO


class Ahead:
    """What is launched within goes ahead of what this stream gets until `join`, beside it: on a
    stream of a higher priority, for a product must get all multiprocessors before small kernels
    fill what it leaves of them."""

    def __init__(self) -> None:
        self._streams = contextlib.ExitStack()
        self._is_real = torch.cuda.is_available() and not INTERPRETED
        if self._is_real:
            self._main, self._ahead = torch.cuda.current_stream(), _urgent_stream()

    def __enter__(self) -> None:
        if self._is_real:
            self._ahead.wait_stream(self._main)
            self._streams.enter_context(torch.cuda.stream(self._ahead))

    def __exit__(self, *_: object) -> None:
        self._streams.close()

    def join(self) -> None:
        if self._is_real:
            self._main.wait_stream(self._ahead)


@functools.cache
def _urgent_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream(priority=-1)


def beside_tuning(tuning: Tuning, rows: RowTensors, how: How) -> Tuning:
    """Of dA and dB: few registers and what the product leaves of the shared memory (18 KB where it
    takes four stages and quarters of a tile, 50 KB with three stages); no parts."""
    num_slots, is_little = rows.scale_S.numel(), how.stages > 3
    da_n = 32 if num_slots < 4 else 64 if num_slots < 16 else 128
    return tuning._replace(
        da_n=da_n, da_t=(2048 if is_little else 4096) // da_n, da_splits=1,
        da_stages=3 if is_little else 4,
    )  # fmt: skip


def _db(
    h_TJ: Tensor, dy_TO: Tensor, b_RO: Tensor, rows: RowTensors, adapters: Adapters,
    layout: Layout, tuning: Tuning,
) -> Tensor:  # fmt: skip
    """dB by a read of dy of its own."""
    assert layout.num_members == 1
    return outer(h_TJ, dy_TO, b_RO, rows, adapters, layout, tuning)


def _window_sum(
    parts: Tensor, partials: Tensor, h_TJ: Tensor, b_OR: Tensor, to_TW: Tensor, bad_S: Tensor,
    rows: RowTensors, window: Window, layout: Layout, tuning: Tuning,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dh_TJ, db_RO, tiles, sums = new_sums(h_TJ, b_OR, partials, tuning)
    _sum(
        (tiles + sums, 1, 1),
        (
            parts, dh_TJ, to_TW, bad_S, partials, db_RO,
            rows.slot_of_row_T, layout.offset_S, layout.rank_S, rows.scale_S, layout.edges,
            window.table_I2,
        ),
        (
            tiles, h_TJ.shape[0], b_OR.shape[0], db_RO.numel(), layout.j_width, parts.stride(0),
            to_TW.stride(0), window.room,
        ),
        (
            layout.num_members, layout.rank_pad, partials.shape[0], layout.align, tuning.db_n,
            tuning.sum_t, parts_at_once(parts, layout, tuning), 1024, TILE_T, WINDOW,
        ),
        2,
    )  # fmt: skip
    return dh_TJ, db_RO


class DistantWeight(NamedTuple):
    """A frozen weight as it is, and buffers whose rows have its stride: A (with WINDOW rows of
    zeros behind) and B^T."""

    weight_OD: Tensor
    a_PD: Tensor
    b_OW: Tensor
    bad_S: Tensor


def distant_weight(weight_OD: Tensor, adapters: Adapters) -> DistantWeight:
    num_out, width = weight_OD.shape
    ranks = len(adapters.out_features) * sum(adapters.slot_ranks) + WINDOW
    bad_S = torch.zeros((len(adapters.slot_ranks),), dtype=torch.int32, device=weight_OD.device)
    return DistantWeight(
        weight_OD, weight_OD.new_zeros((ranks, width)), weight_OD.new_zeros((num_out, width)), bad_S
    )


def refresh_distant(distant: DistantWeight, a_RD: Tensor, b_RO: Tensor, adapters: Adapters) -> None:
    num_out, width = distant.weight_OD.shape
    layout = layout_of(adapters, a_RD.device)
    blocks_a, blocks = cdiv(width, _BLOCK_N), cdiv(width, _BLOCK_N) + cdiv(num_out, _BLOCK_N)
    bad_SB = distant.bad_S.new_zeros((len(adapters.slot_ranks), blocks))
    for to, part_SB, sizes, blocks_of_a in (
        (distant.a_PD, bad_SB, (width, 0), blocks_a),
        (distant.b_OW, bad_SB[:, blocks_a:], (0, num_out), 0),
    ):
        _widen(
            (blocks_of_a or blocks - blocks_a, len(adapters.slot_ranks), 1),
            (a_RD, b_RO, to, part_SB, layout.offset_S, layout.rank_S, layout.edges),
            (
                *sizes, layout.total_rank, 0, blocks_of_a, blocks, a_RD.stride(0), b_RO.stride(0),
                to.stride(0),
            ),
            (layout.num_members, layout.rank_pad, _BLOCK_N),
            4,
        )  # fmt: skip
    torch.amax(bad_SB, 1, out=distant.bad_S)


def distant_forward(
    x_TD: Tensor, behind_TD: Tensor, distant: DistantWeight, rows: RowTensors, window: Window,
    adapters: Adapters, tuning: Tuning, how: How = DEFAULT,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """behind_TD: a buffer of the shape of x, whose first columns are overwritten."""
    layout = layout_of(adapters, x_TD.device)
    h_TJ = window_shrink(x_TD, distant.a_PD, distant.bad_S, behind_TD, rows, window, layout, tuning)
    num_out, width = distant.weight_OD.shape
    y_TO = window_linear(
        Operand(x_TD, behind_TD), Operand(distant.weight_OD, distant.b_OW), (width, num_out),
        window, rows, layout, True, None, how.stages, how.parts,
    )  # fmt: skip
    return y_TO, h_TJ


def distant_backward(
    dy_TO: Tensor, x_TD: Tensor, h_TJ: Tensor, behind_TO: Tensor, distant: DistantWeight,
    a_RD: Tensor, b_RO: Tensor, rows: RowTensors, window: Window, adapters: Adapters,
    tuning: Tuning, how: How,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward(
        Operand(dy_TO, behind_TO), Operand(distant.weight_OD, distant.a_PD), dy_TO, x_TD, h_TJ,
        behind_TO, distant.bad_S, a_RD, b_RO, rows, window, adapters, tuning, how,
    )  # fmt: skip
