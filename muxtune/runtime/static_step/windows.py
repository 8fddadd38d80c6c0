"""The step's LoRA linears by products that run on over windows of ranks.

See ``muxtune_kernels.multi_lora.window``. What such a product reads of the adapters are copies in
the weights' dtype, made anew when a step begins: joins, leaves and the optimizer need not know of
them. A's lie in rows as wide as the weight's, those of B^T in columns of buffers of the weight's
shape, which linears of one shape share: together 4 bytes for each of the adapters' numbers, and up
to one weight of each shape more.

Shape suffixes as in the package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from muxtune.runtime.static_step.adapters import AdapterPools
from muxtune_kernels.multi_lora import LoraLinear, StepRows

if TYPE_CHECKING:  # it needs Triton
    from muxtune_kernels.multi_lora.window import LinearWithWindows, RowsWithWindows

_ALIGN = 8  # columns, 16 bytes: what the copy engine can start at


class WindowedLinear(NamedTuple):
    """An adapted linear, and this micro-batch's rows."""

    lora: LoraLinear
    linear: LinearWithWindows
    rows: RowsWithWindows
    keep_S: Tensor

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(y_TO, h_TJ)."""
        return self.linear.forward(x_TD, self.rows)

    def shrink_dy(self, dy_TO: Tensor) -> tuple[Tensor, Tensor]:
        """(dh_TJ, what ``input_grad`` wants besides dy)."""
        return self.linear.shrink_dy(dy_TO, self.lora.b_RO, self.rows)

    def input_grad(self, dy_TO: Tensor, beside_TO: Tensor) -> Tensor:
        return self.linear.input_grad(dy_TO, beside_TO, self.rows)

    def factor_grads(self, dh_TJ: Tensor, h_TJ: Tensor, dy_TO: Tensor, x_TD: Tensor) -> None:
        """Writes or adds them, by kernels that fit beside ``input_grad``."""
        from muxtune_kernels.multi_lora.launch import GradTargets

        lora = self.lora
        targets = GradTargets(lora.da_RD, lora.db_RO, self.keep_S)
        self.linear.factor_grads(dh_TJ, h_TJ, dy_TO, x_TD, lora.a_RD, lora.b_RO, self.rows, targets)


class StepWindows:
    """Of all linears of a pool that windows fit; the others are as without."""

    def __init__(self, pools: AdapterPools) -> None:
        columns = _Columns()
        self._linears = [
            [_linear_of(pool.lora, columns) for pool in layer] for layer in pools.layers
        ]
        self._loras = [[pool.lora for pool in layer] for layer in pools.layers]
        self._rows: dict[tuple[int, ...], RowsWithWindows] = {}
        self._keep_S: Tensor | None = None

    def begin(self, step: StepRows) -> None:
        """Of every run of the program: the factors as they are now, the rows as they are given."""
        from muxtune_kernels.multi_lora.window import rows_with_windows

        self._rows, self._keep_S = {}, step.keep_S
        for loras, linears in zip(self._loras, self._linears, strict=True):
            for lora, linear in zip(loras, linears, strict=True):
                if linear is None:
                    continue
                linear.refresh(lora.a_RD, lora.b_RO)
                if lora.slot_ranks not in self._rows:
                    rows = rows_with_windows(step.rows, step.scale_S, linear)
                    self._rows[lora.slot_ranks] = rows

    def end(self) -> None:
        """Of every run: nothing that was made in it outlives it in the memory of graphs."""
        self._rows, self._keep_S = {}, None

    def of_layer(self, index: int) -> list[WindowedLinear | None]:
        assert self._keep_S is not None
        return [
            linear and WindowedLinear(lora, linear, self._rows[lora.slot_ranks], self._keep_S)
            for lora, linear in zip(self._loras[index], self._linears[index], strict=True)
        ]


class _Columns:
    """Of buffers of the weights' shapes. What lies behind a linear's own columns is read too, times
    zero: another's factors, which are always finite there, or zeros."""

    def __init__(self) -> None:
        self._open: dict[torch.Size, tuple[Tensor, int]] = {}

    def take(self, weight_OD: Tensor, count: int, spare: int) -> Tensor:
        buffer_OD, at = self._open.get(weight_OD.shape, (None, 0))
        if buffer_OD is None or at + count + spare > weight_OD.shape[1]:
            buffer_OD, at = torch.zeros_like(weight_OD), 0
        self._open[weight_OD.shape] = buffer_OD, at + -(-count // _ALIGN) * _ALIGN
        return buffer_OD[:, at : at + count + spare]


def _linear_of(lora: LoraLinear, columns: _Columns) -> LinearWithWindows | None:
    from muxtune_kernels.multi_lora import window

    ranks = lora.slot_ranks
    if sum(ranks) == 0 or lora.bias_O is not None:
        return None
    if not window.fits(lora.weight_OD, ranks, lora.out_features):
        return None
    bt_OD = columns.take(lora.weight_OD, sum(ranks), window.WINDOW)
    return window.linear_with_windows(lora.weight_OD, ranks, lora.out_features, bt_OD)
