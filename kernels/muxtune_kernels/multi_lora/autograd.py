"""Autograd of the CUDA form.

Shape suffixes: T rows, D input features, O output features, R pool rank rows, S slots.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dropout import RowDropout
from ..launching import Plan, Tape
from ..rows import SlotRows, slot_bounds
from .flags import ReadyFlags
from .launch import Adapters, RowTensors, layout_of, lora_backward, lora_forward
from .tuning import LEAST_BLOCK_T, Tuning, cdiv, tuning_of


class _Given(NamedTuple):
    """What a call is given besides x and the factors: no gradient goes to it."""

    weight_OD: Tensor
    bias_O: Tensor | None
    rows: RowTensors
    adapters: Adapters


def multi_lora_linear_cuda(
    x_TD: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    a_RD: Tensor,
    b_OR: Tensor,
    scale_S: Tensor,
    rows: SlotRows,
    dropout: RowDropout | None,
    adapters: Adapters,
) -> Tensor:
    """y_TO on CUDA (or under Triton's interpreter); arguments as `multi_lora_linear_group`."""
    bounds_S3 = rows.slot_bounds_S3
    if bounds_S3 is None:
        bounds_S3 = slot_bounds(rows.slot_of_row_T, len(adapters.slot_ranks))
    row_tensors = RowTensors(rows.slot_of_row_T, bounds_S3, scale_S, dropout)
    given = _Given(weight_OD, bias_O, row_tensors, adapters)
    return _MultiLoraLinear.apply(x_TD, a_RD, b_OR, given)


class _MultiLoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, a_RD: Tensor, b_OR: Tensor, given: _Given) -> Tensor:
        x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
        plans = _plans_of(x_TD, a_RD, b_OR, given)
        y_TO, h_TJ = _forward(plans, x_TD, a_RD, b_OR, given)
        ctx.save_for_backward(x_TD, a_RD, b_OR, h_TJ)
        ctx.given, ctx.plans = given, plans
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        dy_TO = grad_outputs[0]
        dy_TO = dy_TO if dy_TO.stride(1) == 1 else dy_TO.contiguous()
        needs_dx, needs_a, needs_b, _ = ctx.needs_input_grad
        x_TD, a_RD, b_OR, h_TJ = ctx.saved_tensors
        dx_TD, da_RD, db_RO = _backward(
            ctx.plans, dy_TO, x_TD, a_RD, b_OR, h_TJ, ctx.given, needs_dx, needs_a or needs_b
        )
        return dx_TD, da_RD, None if db_RO is None else db_RO.t(), None


class _Plans(NamedTuple):
    """What was launched for tensors of one kind, by pass; the number of vain recordings where
    that cannot be repeated (yet)."""

    tuning: Tuning
    by_pass: dict[Any, Plan | int]


# By everything that launches depend on besides addresses.
_plans: dict[Any, _Plans] = {}
_MOST_PLANS, _MOST_RECORDINGS = 1024, 3


def _plans_of(x_TD: Tensor, a_RD: Tensor, b_OR: Tensor, given: _Given) -> _Plans:
    weight_OD, bias_O, rows, adapters = given
    dropout = rows.dropout
    key = (
        x_TD.device, x_TD.dtype, x_TD.shape, x_TD.stride(), a_RD.dtype, a_RD.stride(), b_OR.dtype,
        b_OR.stride(), weight_OD.dtype, weight_OD.stride(), bias_O is None, dropout is None,
        rows.scale_S.dtype, rows.slot_of_row_T.dtype, rows.slot_bounds_S3.dtype, adapters,
    )  # fmt: skip
    plans = _plans.get(key)
    if plans is None:
        if len(_plans) >= _MOST_PLANS:  # an eager caller may never come to an end
            _plans.clear()
        rank_pad = layout_of(adapters, x_TD.device).rank_pad
        tuning = tuning_of(
            *x_TD.shape, adapters.out_features, len(adapters.slot_ranks), rank_pad,
            x_TD.element_size(), adapters.deterministic,
        )  # fmt: skip
        plans = _plans[key] = _Plans(tuning, {})
    return plans


def _forward(
    plans: _Plans, x_TD: Tensor, a_RD: Tensor, b_OR: Tensor, given: _Given
) -> tuple[Tensor, Tensor]:
    """(y_TO, h_TJ)."""

    def launch(flags: ReadyFlags | None = None) -> tuple[Tensor, Tensor]:
        return lora_forward(x_TD, given.weight_OD, given.bias_O, a_RD, b_OR, given.rows,
                            given.adapters, plans.tuning, flags)  # fmt: skip

    if plans.tuning.own_shrink:
        return launch(ReadyFlags(cdiv(x_TD.shape[0], LEAST_BLOCK_T), x_TD.device))
    return _repeated(plans, "forward", (x_TD, a_RD, b_OR), given, launch)


def _backward(
    plans: _Plans, dy_TO: Tensor, x_TD: Tensor, a_RD: Tensor, b_OR: Tensor, h_TJ: Tensor,
    given: _Given, needs_dx: bool, needs_factors: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dx_TD, dA [M * R, D], dB [R, O])."""

    def launch() -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return lora_backward(dy_TO, x_TD, h_TJ, given.weight_OD, a_RD, b_OR, given.rows,
                             given.adapters, plans.tuning, needs_dx, needs_factors)  # fmt: skip

    key = (dy_TO.dtype, dy_TO.stride(), needs_dx, needs_factors)
    return _repeated(plans, key, (dy_TO, x_TD, a_RD, b_OR, h_TJ), given, launch)


def _repeated(
    plans: _Plans, key: Any, tensors: tuple[Tensor, ...], given: _Given,
    launch: Callable[[], Any],
) -> Any:  # fmt: skip
    """What `launch` returns. What it launched is recorded, and repeated from then on."""
    weight_OD, bias_O, rows, adapters = given
    row_key_T, rate_S = rows.dropout or (None, None)
    inputs = (*tensors, weight_OD, bias_O, rows.slot_of_row_T, rows.slot_bounds_S3, rows.scale_S,
              row_key_T, rate_S)  # fmt: skip
    plan = plans.by_pass.get(key, 0)
    if isinstance(plan, Plan):
        found = plan.run(inputs)
        return launch() if found is None else found
    if plan == _MOST_RECORDINGS:
        return launch()
    layout = layout_of(adapters, tensors[0].device)
    with Tape(
        inputs, (layout.offset_S, layout.rank_S, layout.edges, layout.slot_of_rank_R)
    ) as tape:
        outputs = launch()
    plans.by_pass[key] = tape.plan(outputs) or plan + 1
    return outputs
