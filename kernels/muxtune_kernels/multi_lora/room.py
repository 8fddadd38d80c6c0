"""The multi-task low-rank linear where its caller gives room: weight, x and dy are the first
columns (and rows) of wider buffers, and the low-rank product is a few more columns of the frozen
one. 16-bit tensors on CUDA, fast mode; no dropout, no bias.

    linear = linear_with_room(weight_OD, slot_ranks)         # once
    linear.refresh(a_RD, b_RO)                               # after each change of the factors
    rows = rows_with_room(slot_rows, scale_S, linear)        # once a micro-batch
    x_TW = linear.buffer_of(num_rows, is_dy=False)           # x goes to x_TW[:, :width]
    y_TO, h_TJ = linear.forward(x_TW, rows)
    dx_TD, da_RD, db_RO = linear.backward(dy_TW, x_TW, h_TJ, a_RD, b_RO, rows)

What lies behind x and dy is overwritten. A factor that is not finite is zeroed behind the weight,
and its own slot's h poisoned, so nothing crosses slots. Up to 64 ranks in all the two products are
the library's (`wide`), above that their ranks are windows (`window`): measured fastest so.

Shape suffixes: T rows, D input features, O output features, W columns of a buffer, J columns of
the compact h, R pool rows, S slots.
"""

from typing import NamedTuple

from torch import Tensor

from ..rows import SlotRows
from . import wide, window
from .launch import Adapters, RowTensors, layout_of
from .tuning import Tuning, tuning_of

_MOST_LIBRARY_RANKS = 64


class RowsWithRoom(NamedTuple):
    """The rows of a micro-batch, for all linears whose slots have the same ranks."""

    rows: RowTensors
    window: window.Window


class LinearWithRoom(NamedTuple):
    """A frozen weight with room, and the ranks of the slots that adapt it."""

    weight: wide.WideWeight | window.WideWeight
    adapters: Adapters

    def buffer_of(self, num_rows: int, is_dy: bool) -> Tensor:
        """Zeros for x (or dy), [num_rows, width and room]."""
        weight = self.weight
        if isinstance(weight, wide.WideWeight):
            behind = weight.columns
        else:
            behind = window.window_room(self.adapters) * len(self.adapters.out_features)
        width = weight.num_out if is_dy else weight.width
        return wide.wide_buffer(num_rows, width, behind, weight.weight_PW)

    def refresh(self, a_RD: Tensor, b_RO: Tensor) -> None:
        """The factors, as they are now. a_RD: [M * R, D]."""
        if isinstance(self.weight, wide.WideWeight):
            wide.widen_weight(self.weight, a_RD, b_RO, self.adapters)
        else:
            window.widen_weight(self.weight, a_RD, b_RO, self.adapters)

    def forward(self, x_TW: Tensor, rows: RowsWithRoom) -> tuple[Tensor, Tensor]:
        """(y_TO, h_TJ)."""
        weight, tuning = self.weight, self._tuning(x_TW)
        if isinstance(weight, wide.WideWeight):
            return wide.wide_forward(x_TW, weight, rows.rows, self.adapters, tuning)
        return window.window_forward(x_TW, weight, rows.rows, rows.window, self.adapters, tuning)

    def backward(
        self, dy_TW: Tensor, x_TW: Tensor, h_TJ: Tensor, a_RD: Tensor, b_RO: Tensor,
        rows: RowsWithRoom,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(dx_TD, dA [M * R, D], dB [R, O])."""
        weight, tuning = self.weight, self._tuning(x_TW)
        if isinstance(weight, wide.WideWeight):
            return wide.wide_backward(
                dy_TW, x_TW, h_TJ, weight, a_RD, b_RO, rows.rows, self.adapters, tuning
            )
        return window.window_backward(
            dy_TW, x_TW, h_TJ, weight, a_RD, b_RO, rows.rows, rows.window, self.adapters, tuning
        )

    def _tuning(self, x_TW: Tensor) -> Tuning:
        rank_pad = layout_of(self.adapters, x_TW.device).rank_pad
        key = (
            x_TW.shape[0], self.weight.width, self.adapters.out_features,
            len(self.adapters.slot_ranks), rank_pad, x_TW.element_size(),
        )  # fmt: skip
        if isinstance(self.weight, wide.WideWeight):
            return tuning_of(*key, False)
        return window.window_tuning(*key)


def linear_with_room(
    weight_OD: Tensor, slot_ranks: tuple[int, ...], out_features: tuple[int, ...] | None = None
) -> LinearWithRoom:
    """out_features: of the members that share x, as in `multi_lora_linear_group`. A copy of the
    weight is made; before the first use, `refresh`. Raises ValueError where the copy engine could
    not read it."""
    num_out, width = weight_OD.shape
    members = out_features or (num_out,)
    adapters = Adapters(slot_ranks, members)
    if len(members) * sum(slot_ranks) <= _MOST_LIBRARY_RANKS:
        return LinearWithRoom(wide.wide_weight(weight_OD, adapters), adapters)
    if width % 64 or num_out % 64 or (len(members) > 1 and any(n % 256 for n in members)):
        raise ValueError(
            f"{width} features to {members}: with room they must be multiples of 64, those of "
            "several members of 256; use multi_lora_linear_group"
        )
    return LinearWithRoom(window.wide_weight(weight_OD, adapters), adapters)


def rows_with_room(rows: SlotRows, scale_S: Tensor, linear: LinearWithRoom) -> RowsWithRoom:
    """Raises ValueError where the rows have no bounds (`slot_bounds`)."""
    if rows.slot_bounds_S3 is None:
        raise ValueError("slot_bounds_S3 is None: make it with slot_bounds(slot_of_row_T, slots)")
    tensors = RowTensors(rows.slot_of_row_T, rows.slot_bounds_S3, scale_S.float(), None)
    return RowsWithRoom(tensors, window.window_of(tensors, linear.adapters))
