"""The linear with windows of ranks under autograd, with little host time.

    linear = linear_with_windows(weight_OD, slot_ranks)                # once
    linear.refresh(a_RD, b_RO)                                         # after each optimizer step
    rows = rows_with_windows(slot_rows, scale_S, linear)               # once a micro-batch
    y_TO = multi_lora_linear_with_windows(x_TD, a_RD, b_RO, linear, rows)

Shape suffixes: T rows, D input features, O output features, R pool rank rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..launching import Plan
from .launch import layout_of
from .window import LinearWithWindows, RowsWithWindows, linear_with_windows, rows_with_windows
from .window_tape import WindowTape


def multi_lora_linear_with_windows(
    x_TD: Tensor, a_RD: Tensor, b_RO: Tensor, linear: LinearWithWindows, rows: RowsWithWindows
) -> Tensor:
    """y_TO, as `multi_lora_linear_group` gives it without bias and dropout, in fast mode.

    x_TD: CUDA, of the weight's 16-bit dtype. a_RD: [M * R, D], b_RO: [R, O] (B^T), float32 or x's
    dtype; their values are those of the last `linear.refresh`, their gradients go to them. Members,
    NaN and filler rows as there. Raises ValueError on shapes or dtypes that do not fit.
    """
    return _WithWindows.apply(x_TD, a_RD, b_RO, linear, rows)


def _check(
    x_TD: Tensor, a_RD: Tensor, b_RO: Tensor, linear: LinearWithWindows, rows: RowsWithWindows
) -> None:
    weight_OD, ranks = linear.factors.weight_OD, sum(linear.adapters.slot_ranks)
    num_out, width = weight_OD.shape
    wanted = (
        ("x_TD", x_TD, (rows.rows.slot_of_row_T.numel(), width)),
        ("a_RD", a_RD, (len(linear.adapters.out_features) * ranks, width)),
        ("b_RO", b_RO, (ranks, num_out)),
    )
    for name, tensor, shape in wanted:
        if tensor.shape != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, not {shape}")
    if x_TD.dtype != weight_OD.dtype:
        raise ValueError(f"x_TD is {x_TD.dtype}, the weight {weight_OD.dtype}: cast one of them")


class _WithWindows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, a_RD: Tensor, b_RO: Tensor, linear: LinearWithWindows,
        rows: RowsWithWindows,
    ) -> Tensor:  # fmt: skip
        x_TD, b_RO = x_TD.contiguous(), b_RO.contiguous()
        kinds = x_TD.device, x_TD.dtype, x_TD.shape, a_RD.dtype, a_RD.shape, b_RO.dtype, b_RO.shape
        num_rows = rows.rows.slot_of_row_T.shape[0]
        key = linear.adapters, linear.factors.weight_OD.stride(), num_rows, *kinds

        def launch() -> tuple[Tensor, Tensor]:
            _check(x_TD, a_RD, b_RO, linear, rows)
            return linear.forward(x_TD, rows)

        y_TO, h_TJ = _repeated(("forward", key), (x_TD, linear.factors.bt_OD), linear, rows, launch)
        ctx.save_for_backward(x_TD, h_TJ, a_RD, b_RO)
        ctx.linear, ctx.rows, ctx.key = linear, rows, key
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        x_TD, h_TJ, a_RD, b_RO = ctx.saved_tensors
        linear, rows, dy_TO = ctx.linear, ctx.rows, grad_outputs[0].contiguous()
        # Gradients lie as the factors do; a_RD is given for its kind only.
        grads = _repeated(
            ("backward", ctx.key), (dy_TO, x_TD, h_TJ, b_RO), linear, rows,
            lambda: linear.launch_backward(dy_TO, x_TD, h_TJ, a_RD, b_RO, rows),
        )  # fmt: skip
        linear.end_backward(x_TD.device)
        return *grads, None, None


# By all that launches depend on besides addresses; a number: of vain recordings.
_plans: dict[Any, Plan | int] = {}
_MOST_PLANS, _MOST_RECORDINGS = 1024, 3


def _repeated(
    key: Any, tensors: tuple[Tensor, ...], linear: LinearWithWindows, rows: RowsWithWindows,
    launch: Callable[[], tuple[Tensor, ...]],
) -> Any:  # fmt: skip
    """What `launch` returns. What it launched is recorded, and repeated from then on."""
    factors, row_tensors = linear.factors, rows.rows
    inputs = (
        *tensors, factors.weight_OD, factors.a_PD, factors.bad_S, row_tensors.slot_of_row_T,
        row_tensors.slot_bounds_S3, row_tensors.scale_S, rows.window.table_I2,
    )  # fmt: skip
    plan = _plans.get(key, 0)
    if isinstance(plan, Plan):
        found = plan.run(inputs)
        return launch() if found is None else found
    if plan == _MOST_RECORDINGS:
        return launch()
    layout = layout_of(linear.adapters, tensors[0].device)
    fixed = layout.offset_S, layout.rank_S, layout.edges, layout.slot_of_rank_R
    with WindowTape(inputs, fixed) as tape:
        outputs = launch()
    if len(_plans) >= _MOST_PLANS:  # an eager caller may never come to an end
        _plans.clear()
    _plans[key] = tape.plan(outputs) or plan + 1
    return outputs


__all__ = ["linear_with_windows", "multi_lora_linear_with_windows", "rows_with_windows"]
