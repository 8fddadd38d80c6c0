"""The multi-task bottleneck as explicit calls, made of the low-rank linear's kernels.

Forward: shrink, bias and relu on the compact inner rows, expand. Backward: the expansion's
gradients, relu's mask, the input's and the shrink's. For steps outside of autograd, gradients go
where the optimizer reads them.

Shape suffixes: T rows, O features, R pool rank rows, U rows of the up biases, S slots, J columns
of the compact inner rows (the largest rank, padded).
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dropout import RowDropout
from ..lasting import lasting
from ..rows import SlotRows, slot_bounds, slot_offsets
from ..segments import segment_sum
from .reference import multi_task_bottleneck_reference


class BottleneckPool(NamedTuple):
    """All slots' parameters at one site; see ``multi_task_bottleneck``."""

    down_RO: Tensor
    down_bias_R: Tensor
    up_RO: Tensor
    up_bias_UO: Tensor
    owned_S: Tensor
    slot_ranks: tuple[int, ...]
    module_key: int
    deterministic: bool


class BottleneckGrads(NamedTuple):
    """Gradients in the parameters' shapes; as targets, contiguous float32."""

    down_RO: Tensor
    down_bias_R: Tensor
    up_RO: Tensor
    up_bias_UO: Tensor


class _Index(NamedTuple):
    """``pool_row_SJ``: a slot's pool rows, R where there is none; the last slot is filler's.
    ``bias_row_S``: its row of the up biases, U where there is none. ``inner_R``: the inverse of
    the first, as places in [S, J]. ``slot_U``: the slots that have a rank."""

    pool_row_SJ: Tensor
    bias_row_S: Tensor
    inner_R: Tensor
    slot_U: Tensor


@functools.cache  # captured graphs point to these tensors
@lasting
def _index(slot_ranks: tuple[int, ...], width: int, device: torch.device) -> _Index:
    offsets, total = slot_offsets(slot_ranks), sum(slot_ranks)
    used = [slot for slot, rank in enumerate(slot_ranks) if rank]
    pool_rows = [
        [offset + at if at < rank else total for at in range(width)]
        for offset, rank in zip(offsets, (*slot_ranks, 0), strict=True)
    ]
    bias_rows = [used.index(slot) if rank else len(used) for slot, rank in enumerate(slot_ranks)]
    inner = [slot * width + at for slot, rank in enumerate(slot_ranks) for at in range(rank)]
    lists = (pool_rows, [*bias_rows, len(used)], inner, used)
    return _Index(*(torch.tensor(values, device=device) for values in lists))


def bottleneck_forward(
    y_TO: Tensor, pool: BottleneckPool, rows: SlotRows, dropout: RowDropout | None
) -> tuple[Tensor, Any]:
    """(z_TO, what the backward wants besides y)."""
    if y_TO.is_cuda:
        return launched_forward(y_TO, pool, rows, dropout)
    return _reference(y_TO, pool, rows, dropout), None


def launched_forward(
    y_TO: Tensor, pool: BottleneckPool, rows: SlotRows, dropout: RowDropout | None
) -> tuple[Tensor, Tensor]:
    """The Triton form: (z_TO, inner_TJ)."""
    from ..multi_lora import launch

    tensors, layout, tuning, _ = _launch_of(y_TO, pool, rows, dropout)
    index = _index(pool.slot_ranks, layout.j_width, y_TO.device)
    slot_T = rows.slot_of_row_T.long() % len(index.bias_row_S)
    h_TJ = launch.shrink(y_TO, pool.down_RO, tensors, layout, tuning._replace(shrink_splits=1))
    bias_SJ = _with_zero(pool.down_bias_R)[index.pool_row_SJ].to(y_TO.dtype)
    inner_TJ = h_TJ.add_(bias_SJ.index_select(0, slot_T)).relu_()
    change_TO = launch.expand(
        inner_TJ, pool.up_RO.t(), None, tensors, (y_TO.shape[1],), layout, tuning, False
    )
    bias_SO = _with_zero(_owned_up_bias(pool, index))[index.bias_row_S].to(y_TO.dtype)
    # Rows without a bottleneck keep their bits: -0 + 0 is 0.
    has_T1 = (index.bias_row_S < pool.up_bias_UO.shape[0]).index_select(0, slot_T)[:, None]
    z_TO = change_TO.add_(bias_SO.index_select(0, slot_T)).add_(y_TO)
    return torch.where(has_T1, z_TO, y_TO), inner_TJ


def bottleneck_backward(
    dz_TO: Tensor, y_TO: Tensor, inner_TJ: Any, pool: BottleneckPool, rows: SlotRows,
    dropout: RowDropout | None, targets: BottleneckGrads | None = None,
    keep_S: Tensor | None = None,
) -> tuple[Tensor, BottleneckGrads]:  # fmt: skip
    """(dy_TO, the parameters' gradients). ``targets``: where these go, added for slots whose
    ``keep_S`` (int32) is not zero, else overwritten."""
    form = launched_backward if y_TO.is_cuda else _reference_backward
    return form(dz_TO, y_TO, inner_TJ, pool, rows, dropout, targets, keep_S)


def launched_backward(
    dz_TO: Tensor, y_TO: Tensor, inner_TJ: Tensor, pool: BottleneckPool, rows: SlotRows,
    dropout: RowDropout | None, targets: BottleneckGrads | None = None,
    keep_S: Tensor | None = None,
) -> tuple[Tensor, BottleneckGrads]:  # fmt: skip
    """The Triton form."""
    from ..multi_lora import launch

    dz_TO = dz_TO if dz_TO.stride(1) == 1 else dz_TO.contiguous()
    tensors, layout, tuning, adapters = _launch_of(y_TO, pool, rows, dropout)
    index = _index(pool.slot_ranks, layout.j_width, y_TO.device)
    into = None
    if targets is not None:
        assert keep_S is not None
        into = launch.GradTargets(targets.down_RO, targets.up_RO, keep_S)
    dh_TJ, dup_OR = launch.dh_db(
        dz_TO, inner_TJ, pool.up_RO.t(), tensors, adapters, layout, tuning, into
    )
    dh_TJ = torch.where(inner_TJ > 0, dh_TJ, 0)
    change_TO = launch.expand(
        dh_TJ, pool.down_RO.t(), None, tensors, (y_TO.shape[1],), layout, tuning, True
    )
    ddown_RO = launch.outer(dh_TJ, y_TO, pool.down_RO, tensors, adapters, layout, tuning, into)
    grads = BottleneckGrads(ddown_RO, _down_bias_grad(dh_TJ, pool, rows, dropout, index),
                            dup_OR.t(), _up_bias_grad(dz_TO, pool, rows, index))  # fmt: skip
    if targets is not None:
        assert keep_S is not None
        _store(targets, grads, pool, keep_S, index)
    return change_TO.add_(dz_TO), grads


def _owned_up_bias(pool: BottleneckPool, index: _Index) -> Tensor:
    return torch.where(pool.owned_S[index.slot_U][:, None], pool.up_bias_UO, 0)


def _up_bias_grad(dz_TO: Tensor, pool: BottleneckPool, rows: SlotRows, index: _Index) -> Tensor:
    used = tuple(int(rank > 0) for rank in pool.slot_ranks)
    sums_UO = segment_sum(dz_TO, rows, used, pool.deterministic)
    return torch.where(pool.owned_S[index.slot_U][:, None], sums_UO, 0)


def _down_bias_grad(
    dh_TJ: Tensor, pool: BottleneckPool, rows: SlotRows, dropout: RowDropout | None, index: _Index
) -> Tensor:
    all_slots = (1,) * len(pool.slot_ranks)
    sums_SJ = segment_sum(dh_TJ, rows, all_slots, pool.deterministic)
    if dropout is not None:  # dh carries 1 / (1 - rate), for the input that dropout scaled
        sums_SJ = sums_SJ * (1 - dropout.rate_S[:, None])
    return sums_SJ.flatten()[index.inner_R]


def _store(
    targets: BottleneckGrads, grads: BottleneckGrads, pool: BottleneckPool, keep_S: Tensor,
    index: _Index,
) -> None:  # fmt: skip
    """The biases' gradients; the matrices' are where they belong already."""
    keeps_R = keep_S[index.inner_R // index.pool_row_SJ.shape[1]].bool()
    keeps_U1 = keep_S[index.slot_U].bool()[:, None]
    pairs = (
        (targets.down_bias_R, grads.down_bias_R, keeps_R),
        (targets.up_bias_UO, grads.up_bias_UO, keeps_U1),
    )
    for target, value, keeps in pairs:
        target.copy_(value + torch.where(keeps, target, 0))


def _with_zero(table: Tensor) -> Tensor:
    return torch.cat([table, table.new_zeros((1, *table.shape[1:]))])


def _launch_of(
    y_TO: Tensor, pool: BottleneckPool, rows: SlotRows, dropout: RowDropout | None
) -> tuple[Any, Any, Any, Any]:
    from ..multi_lora import launch
    from ..multi_lora.tuning import tuning_of

    num_rows, width = y_TO.shape
    adapters = launch.Adapters(pool.slot_ranks, (width,), pool.module_key, pool.deterministic)
    layout = launch.layout_of(adapters, y_TO.device)
    bounds_S3 = rows.slot_bounds_S3
    if bounds_S3 is None:
        bounds_S3 = slot_bounds(rows.slot_of_row_T, len(pool.slot_ranks))
    scale_S = torch.ones(len(pool.slot_ranks), dtype=torch.float32, device=y_TO.device)
    tensors = launch.RowTensors(rows.slot_of_row_T, bounds_S3, scale_S, dropout)
    tuning = tuning_of(
        num_rows, width, (width,), len(pool.slot_ranks), layout.rank_pad, y_TO.element_size(),
        pool.deterministic,
    )  # fmt: skip
    return tensors, layout, tuning, adapters


def _reference(
    y_TO: Tensor, pool: BottleneckPool, rows: SlotRows, dropout: RowDropout | None
) -> Tensor:
    return multi_task_bottleneck_reference(
        y_TO, *pool[:5], pool.slot_ranks, rows, dropout, pool.module_key
    )


def _reference_backward(
    dz_TO: Tensor, y_TO: Tensor, inner_TJ: Any, pool: BottleneckPool, rows: SlotRows,
    dropout: RowDropout | None, targets: BottleneckGrads | None, keep_S: Tensor | None,
) -> tuple[Tensor, BottleneckGrads]:  # fmt: skip
    leaves = [tensor.detach().requires_grad_() for tensor in (y_TO, *pool[:4])]
    with torch.enable_grad():
        own = BottleneckPool(leaves[1], leaves[2], leaves[3], leaves[4], *pool[4:])
        z_TO = _reference(leaves[0], own, rows, dropout)
    dy_TO, *found = torch.autograd.grad(z_TO, leaves, dz_TO, allow_unused=True)
    whole = (torch.zeros_like(p) if g is None else g for g, p in zip(found, pool[:4], strict=True))
    grads = BottleneckGrads(*whole)
    if targets is not None:
        assert keep_S is not None
        index = _index(pool.slot_ranks, max(pool.slot_ranks), y_TO.device)
        keeps_R = keep_S[index.inner_R // max(pool.slot_ranks)].bool()[:, None]
        for target, value in ((targets.down_RO, grads.down_RO), (targets.up_RO, grads.up_RO)):
            target.copy_(value + torch.where(keeps_R, target, 0))
        _store(targets, grads, pool, keep_S, index)
    return dy_TO, grads
