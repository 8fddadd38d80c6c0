"""The multi-task low-rank linear as two products of the library, a little longer than the weight.

All slots' factors lie behind the frozen weight, and a row's h behind the row, at its own slot's
columns and zero at the others':

    y  = [x | h] [W | B]^T          dx = [dy | dh] [W ; A]

so that the product costs no more than its few columns: it has no epilogue, and nothing is read or
written twice. It needs room: weight, x and dy are the first columns (and rows) of wider buffers.
The columns are the sum of all slots' ranks, so this is for few of them; `launch` is for many, for
dropout, and where a row's bits may not depend on what else the library's product holds.

Shape suffixes: T rows, D input features, O output features, C columns behind them (members x the
sum of the ranks, rounded up), W columns of a buffer, P rows of a buffer, J columns of the compact
h, R pool rows, S slots.
"""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from ..launching import Launcher, empty
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
from .tuning import Tuning, cdiv, next_power_of_2
from .wide_kernels import wide_shrink_kernel, wide_sum_kernel, widen_weight_kernel
from .window import DEFAULT, Ahead, How

_widen, _shrink, _sum = map(Launcher, (widen_weight_kernel, wide_shrink_kernel, wide_sum_kernel))
_BLOCK_N = 512


class WideWeight(NamedTuple):
    """A frozen weight with room for the slots' factors, and which of them are not finite."""

    weight_PW: Tensor
    bad_SB: Tensor
    num_out: int
    width: int
    columns: int


def wide_columns(adapters: Adapters) -> int:
    return cdiv(len(adapters.out_features) * sum(adapters.slot_ranks), 16) * 16


def wide_buffer(num_rows: int, width: int, columns: int, like: Tensor) -> Tensor:
    """[rows, width + columns or a few more]: rows start at multiples of 128 bytes."""
    return like.new_zeros((num_rows, cdiv(width + columns, 64) * 64))


def wide_weight(weight_OD: Tensor, adapters: Adapters) -> WideWeight:
    """A copy of the weight with room; before the first use, `widen_weight`."""
    (num_out, width), columns = weight_OD.shape, wide_columns(adapters)
    weight_PW = wide_buffer(num_out + columns, width, columns, weight_OD)
    weight_PW[:num_out, :width] = weight_OD
    blocks = cdiv(width, _BLOCK_N) + cdiv(num_out, _BLOCK_N)
    bad_SB = torch.zeros(
        (len(adapters.slot_ranks), blocks), dtype=torch.int32, device=weight_OD.device
    )
    return WideWeight(weight_PW, bad_SB, num_out, width, columns)


def widen_weight(wide: WideWeight, a_RD: Tensor, b_RO: Tensor, adapters: Adapters) -> None:
    """Copies the factors behind the weight: once after each of their changes."""
    layout = layout_of(adapters, a_RD.device)
    blocks = wide.bad_SB.shape[1]
    _widen(
        (blocks, len(adapters.slot_ranks), 1),
        (
            a_RD, b_RO, wide.weight_PW, wide.bad_SB, layout.offset_S, layout.rank_S, layout.edges,
        ),
        (
            wide.width, wide.num_out, layout.total_rank, layout.total_rank,
            cdiv(wide.width, _BLOCK_N), blocks, a_RD.stride(0), b_RO.stride(0),
            wide.weight_PW.stride(0),
        ),
        (layout.num_members, layout.rank_pad, _BLOCK_N),
        4,
    )  # fmt: skip


def wide_forward(
    x_TW: Tensor, wide: WideWeight, rows: RowTensors, adapters: Adapters, tuning: Tuning
) -> tuple[Tensor, Tensor]:
    """(y_TO, h_TJ). x_TW: x in its first columns; those behind are overwritten."""
    layout = layout_of(adapters, x_TW.device)
    h_TJ = wide_shrink(
        x_TW[:, : wide.width], wide.weight_PW[wide.num_out :], x_TW[:, wide.width :], wide, rows,
        layout, tuning,
    )  # fmt: skip
    used = wide.width + wide.columns
    return x_TW[:, :used] @ wide.weight_PW[: wide.num_out, :used].t(), h_TJ


def wide_shrink(
    x_TD: Tensor, factor_RD: Tensor, behind: Tensor, wide: WideWeight, rows: RowTensors,
    layout: Layout, tuning: Tuning,
) -> Tensor:  # fmt: skip
    num_rows = x_TD.shape[0]
    # The library cannot add up parts of h: few rows are cut into more tiles instead.
    shrink_t, shrink_k = (16, 256) if num_rows < 6144 else (tuning.shrink_t, tuning.shrink_k)
    h_TJ = empty((num_rows, layout.j_width), x_TD.dtype, x_TD.device)
    _shrink(
        (cdiv(num_rows, shrink_t), 1, 1),
        (
            x_TD, factor_RD, h_TJ, behind, wide.bad_SB, rows.slot_of_row_T, rows.slot_bounds_S3,
            layout.offset_S, layout.rank_S, rows.scale_S,
        ),
        (
            num_rows, x_TD.shape[1], layout.total_rank, x_TD.stride(0), factor_RD.stride(0),
            layout.j_width, wide.columns, wide.bad_SB.shape[1], behind.stride(0),
        ),
        (
            layout.num_members, layout.rank_pad, shrink_t, shrink_k,
            next_power_of_2(layout.j_width), next_power_of_2(wide.columns),
            next_power_of_2(wide.bad_SB.shape[1]),
        ),
        tuning.warps, tuning.shrink_stages,
    )  # fmt: skip
    return h_TJ


def wide_backward(
    dy_TW: Tensor, x_TW: Tensor, h_TJ: Tensor, wide: WideWeight, a_RD: Tensor, b_RO: Tensor,
    rows: RowTensors, adapters: Adapters, tuning: Tuning, how: How = DEFAULT,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx_TD, dA [M * R, D], dB [R, O]). dy_TW: dy in its first columns; those behind are
    overwritten."""
    layout = layout_of(adapters, x_TW.device)

    def sum_parts(
        parts: Tensor, partials: Tensor, h_TJ: Tensor, b_OR: Tensor, *_: object
    ) -> tuple[Tensor, Tensor]:
        return _wide_sum(parts, partials, h_TJ, b_OR, dy_TW, wide, rows, layout, tuning)

    dy_TO, x_TD, db_RO = dy_TW[:, : wide.num_out], x_TW[:, : wide.width], None
    if how.two_reads:
        dh_TJ = wide_shrink(dy_TO, b_RO, dy_TW[:, wide.num_out :], wide, rows, layout, tuning)
    else:
        dh_TJ, db_RO = dh_db(
            dy_TO, h_TJ, b_RO.t(), rows, adapters, layout, tuning, sum_parts=sum_parts
        )
    used = wide.num_out + wide.columns
    ahead = Ahead() if how.outer == "stream" else None
    with ahead or contextlib.nullcontext():
        dx_TD = dy_TW[:, :used] @ wide.weight_PW[:used, : wide.width]
    da_RD = outer(dh_TJ, x_TD, a_RD, rows, adapters, layout, tuning)
    if db_RO is None:
        db_RO = outer(h_TJ, dy_TO, b_RO, rows, adapters, layout, tuning)
    if ahead:
        ahead.join()
    return dx_TD, da_RD, db_RO


def _wide_sum(
    parts: Tensor, partials: Tensor, h_TJ: Tensor, b_OR: Tensor, dy_TW: Tensor, wide: WideWeight,
    rows: RowTensors, layout: Layout, tuning: Tuning,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dh_TJ, db_RO, tiles, sums = new_sums(h_TJ, b_OR, partials, tuning)
    _sum(
        (tiles + sums, 1, 1),
        (
            parts, dh_TJ, dy_TW[:, wide.num_out :], wide.bad_SB, partials, db_RO,
            rows.slot_of_row_T, layout.offset_S, layout.rank_S, rows.scale_S, layout.edges,
        ),
        (
            tiles, h_TJ.shape[0], b_OR.shape[0], db_RO.numel(), layout.j_width, parts.stride(0),
            wide.columns, layout.total_rank, wide.bad_SB.shape[1], dy_TW.stride(0),
        ),
        (
            layout.num_members, layout.rank_pad, partials.shape[0], layout.align, tuning.db_n,
            tuning.sum_t, parts_at_once(parts, layout, tuning), 1024,
            next_power_of_2(wide.columns), next_power_of_2(wide.bad_SB.shape[1]),
        ),
        2,
    )  # fmt: skip
    return dh_TJ, db_RO
