"""The multi-task low-rank linear as explicit calls: forward, input gradient, factor gradients.

For a step that runs outside of autograd: gradients of A and B go straight to where the optimizer
reads them, accumulated or overwritten per slot, and those of A can be left to a side stream.

Shape suffixes: T rows, D input features, O output features, R pool rank rows, J columns of the
compact h, S slots, M member linears that share an input.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..dropout import RowDropout
from ..rows import SlotRows, slot_offsets
from .flags import ReadyFlags
from .reference import multi_lora_linear_reference


class LoraLinear(NamedTuple):
    """A frozen linear and the adapters on it; everything that outlives a step.

    a_RD: [M * R, D]. b_RO: [R, O], the transpose of what `multi_lora_linear` takes. da_RD, db_RO:
    their gradients. slot_ranks, out_features, module_key as in `multi_lora_linear_group`.
    """

    weight_OD: Tensor
    bias_O: Tensor | None
    a_RD: Tensor
    b_RO: Tensor
    da_RD: Tensor
    db_RO: Tensor
    out_features: tuple[int, ...]
    slot_ranks: tuple[int, ...]
    module_key: int
    deterministic: bool


class StepRows(NamedTuple):
    """The rows of a micro-batch. keep_S: int32; a slot that is not 0 adds to its gradients, the
    others overwrite them. tuned_rows: the number of rows that sums are cut up for, 0: as many as
    there are; where it is the same, a row's bits do not depend on how many rows there are. flags:
    cleared before the step, for products of the forward that make their own low-rank h; None:
    kernels of their own do that (as they do wherever the product cannot)."""

    rows: SlotRows
    scale_S: Tensor
    dropout: RowDropout | None
    keep_S: Tensor
    tuned_rows: int = 0
    flags: ReadyFlags | None = None


def lora_linear_forward(x_TD: Tensor, lin: LoraLinear, step: StepRows) -> tuple[Tensor, Any]:
    """(y_TO, what the backward wants besides x)."""
    if sum(lin.slot_ranks) == 0:
        return functional.linear(x_TD, lin.weight_OD, lin.bias_O), None
    if not x_TD.is_cuda:
        return _reference(x_TD, lin.a_RD, lin.b_RO, lin, step), None
    from . import launch

    tensors, adapters, tuning = _cuda(x_TD.shape[0], lin, step)
    return launch.lora_forward(
        x_TD, lin.weight_OD, lin.bias_O, lin.a_RD, lin.b_RO.t(), tensors, adapters, tuning,
        step.flags,
    )  # fmt: skip


def lora_linear_input_grad(
    dy_TO: Tensor, x_TD: Tensor, h_TJ: Any, lin: LoraLinear, step: StepRows, needs_dx: bool = True
) -> tuple[Tensor | None, Any]:
    """(dx_TD, what `lora_linear_factor_grad` wants besides x). Writes or adds the gradient of B."""
    if sum(lin.slot_ranks) == 0:
        return (dy_TO @ lin.weight_OD if needs_dx else None), None
    if not x_TD.is_cuda:
        return _reference_backward(dy_TO, x_TD, lin, step), None
    from . import launch

    tensors, adapters, tuning = _cuda(x_TD.shape[0], lin, step)
    targets = launch.GradTargets(lin.da_RD, lin.db_RO, step.keep_S)
    return launch.lora_input_grad(
        dy_TO, (x_TD.shape[0], x_TD.shape[1]), h_TJ, lin.weight_OD, lin.a_RD, lin.b_RO.t(),
        tensors, adapters, tuning, targets, needs_dx,
    )  # fmt: skip


def lora_linear_factor_grad(dh_TJ: Any, x_TD: Tensor, lin: LoraLinear, step: StepRows) -> None:
    """Writes or adds the gradient of A. On the CPU the call before has done so already."""
    if sum(lin.slot_ranks) == 0 or not x_TD.is_cuda:
        return
    from . import launch

    tensors, adapters, tuning = _cuda(x_TD.shape[0], lin, step)
    targets = launch.GradTargets(lin.da_RD, lin.db_RO, step.keep_S)
    layout = launch.layout_of(adapters, x_TD.device)
    launch.outer(dh_TJ, x_TD, lin.a_RD, tensors, adapters, layout, tuning, targets)


def _cuda(num_rows: int, lin: LoraLinear, step: StepRows) -> tuple[Any, Any, Any]:
    from . import launch
    from .tuning import tuning_of

    bounds_S3 = step.rows.slot_bounds_S3
    assert bounds_S3 is not None
    tensors = launch.RowTensors(step.rows.slot_of_row_T, bounds_S3, step.scale_S, step.dropout)
    adapters = launch.Adapters(lin.slot_ranks, lin.out_features, lin.module_key, lin.deterministic)
    tuning = tuning_of(
        step.tuned_rows or num_rows, lin.weight_OD.shape[1], lin.out_features,
        len(lin.slot_ranks), launch.layout_of(adapters, lin.weight_OD.device).rank_pad,
        lin.weight_OD.element_size(), lin.deterministic,
    )  # fmt: skip
    return tensors, adapters, tuning


def _reference(x_TD: Tensor, a_RD: Tensor, b_RO: Tensor, lin: LoraLinear, step: StepRows) -> Tensor:
    return multi_lora_linear_reference(
        x_TD, lin.weight_OD, lin.bias_O, a_RD, b_RO.t(), lin.slot_ranks, step.scale_S, step.rows,
        step.dropout, lin.module_key, lin.deterministic, lin.out_features,
    )  # fmt: skip


def _reference_backward(dy_TO: Tensor, x_TD: Tensor, lin: LoraLinear, step: StepRows) -> Tensor:
    leaves = [t.detach().requires_grad_() for t in (x_TD, lin.a_RD, lin.b_RO)]
    with torch.enable_grad():
        y_TO = _reference(leaves[0], leaves[1], leaves[2], lin, step)
    dx_TD, *grads = torch.autograd.grad(y_TO, leaves, dy_TO, allow_unused=True)
    offsets = slot_offsets(lin.slot_ranks)
    for target, grad in zip((lin.da_RD, lin.db_RO), grads, strict=True):
        grad = torch.zeros_like(target) if grad is None else grad
        for member in range(target.shape[0] // offsets[-1]):
            for slot, keeps in enumerate(step.keep_S.tolist()):
                rows = slice(
                    member * offsets[-1] + offsets[slot], member * offsets[-1] + offsets[slot + 1]
                )
                target[rows] = grad[rows] + target[rows] if keeps else grad[rows]
    return dx_TD
