"""The multi-task bottleneck as explicit calls, made of the low-rank linear's kernels.

Forward: shrink, then bias, relu and expansion in one pass over y. Backward: the expansion's
gradients, relu's mask, the input's, the shrink's and the biases'. For steps outside of autograd,
gradients go where the optimizer reads them.

Shape suffixes: T rows, O features, R pool rank rows, U rows of the up biases, S slots, J columns
of the compact inner rows (the largest rank, padded).
"""

# Triton's jit hides launch options from the type checker.
# pyright: reportCallIssue=false

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dropout import RowDropout
from ..lasting import lasting
from ..rows import SlotRows, slot_bounds
from .reference import multi_task_bottleneck_reference

_BLOCK_T, _BLOCK_N, _BIAS_N = 32, 256, 128


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
    """``bias_row_S``: a slot's row of the up biases, U where there is none. ``slot_R``, ``slot_U``:
    whose the pool's rows and those of the up biases are. ``one_S``: scales of 1."""

    bias_row_S: Tensor
    slot_R: Tensor
    slot_U: Tensor
    one_S: Tensor


@functools.cache  # captured graphs point to these tensors
@lasting
def _index(slot_ranks: tuple[int, ...], device: torch.device) -> _Index:
    used = [slot for slot, rank in enumerate(slot_ranks) if rank]
    bias_rows = [used.index(slot) if rank else len(used) for slot, rank in enumerate(slot_ranks)]
    slots = [slot for slot, rank in enumerate(slot_ranks) for _ in range(rank)]
    lists = (torch.tensor(values, device=device) for values in (bias_rows, slots, used))
    return _Index(*lists, one_S=torch.ones(len(slot_ranks), device=device))


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
    h_TJ = launch.shrink(y_TO, pool.down_RO, tensors, layout, tuning._replace(shrink_splits=1))
    return _expand(y_TO, h_TJ, pool.up_RO, pool, tensors, layout, True)


def _expand(
    base_TO: Tensor, h_TJ: Tensor, factor_RO: Tensor, pool: BottleneckPool, rows: Any, layout: Any,
    forward: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(base + h F, h); forward: with bias and relu on h, and the up bias."""
    from .kernels import expand_kernel

    index, out_TO = _index(pool.slot_ranks, base_TO.device), torch.empty_like(base_TO)
    num_rows, width = base_TO.shape
    # Not in place: a block of features that comes later must find h as it was.
    inner_TJ = torch.empty_like(h_TJ) if forward else h_TJ
    dropped = rows.dropout is not None and not forward
    key_T, rate_S = rows.dropout or (rows.slot_of_row_T, rows.scale_S)
    expand_kernel[(-(-width // _BLOCK_N), -(-num_rows // _BLOCK_T))](
        h_TJ, inner_TJ, base_TO, out_TO, factor_RO, pool.down_bias_R, pool.up_bias_UO,
        index.bias_row_S, pool.owned_S, rows.slot_of_row_T, layout.offset_S, layout.rank_S, key_T,
        rate_S, layout.word_of(rows), num_rows, width, h_TJ.stride(0), base_TO.stride(0),
        out_TO.stride(0), forward, dropped, layout.rank_pad, _BLOCK_T, _BLOCK_N, num_warps=4,
    )  # fmt: skip
    return out_TO, inner_TJ


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
    into = None
    if targets is not None:
        assert keep_S is not None
        into = launch.GradTargets(targets.down_RO, targets.up_RO, keep_S)
    dh_TJ, dup_RO = launch.dh_db(
        dz_TO, inner_TJ, pool.up_RO.t(), tensors, adapters, layout, tuning, into
    )
    dh_TJ = torch.where(inner_TJ > 0, dh_TJ, 0)
    dy_TO, _ = _expand(dz_TO, dh_TJ, pool.down_RO, pool, tensors, layout, False)
    ddown_RO = launch.outer(dh_TJ, y_TO, pool.down_RO, tensors, adapters, layout, tuning, into)
    biases = _bias_grads(dz_TO, dh_TJ, pool, tensors, layout, targets, keep_S)
    return dy_TO, BottleneckGrads(ddown_RO, biases[0], dup_RO, biases[1])


def _bias_grads(
    dz_TO: Tensor, dh_TJ: Tensor, pool: BottleneckPool, rows: Any, layout: Any,
    targets: BottleneckGrads | None, keep_S: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(of the down bias, of the up bias)."""
    from .kernels import biases_kernel

    index, width = _index(pool.slot_ranks, dz_TO.device), dz_TO.shape[1]
    if targets is None:
        down_R = torch.empty_like(pool.down_bias_R, dtype=torch.float32)
        up_UO = torch.empty_like(pool.up_bias_UO, dtype=torch.float32)
    else:
        down_R, up_UO = targets.down_bias_R, targets.up_bias_UO
    rate_S = rows.scale_S if rows.dropout is None else rows.dropout.rate_S
    block_n = max(_BIAS_N, layout.rank_pad)  # the down bias is one block
    biases_kernel[(-(-width // block_n) + 1, len(pool.slot_ranks))](
        dz_TO, dh_TJ, up_UO, down_R, index.bias_row_S, pool.owned_S,
        layout.rank_S if keep_S is None else keep_S, rows.slot_of_row_T, rows.slot_bounds_S3,
        layout.offset_S, layout.rank_S, rate_S, width, dz_TO.stride(0), dh_TJ.stride(0),
        keep_S is not None, rows.dropout is not None, layout.rank_pad, _BLOCK_T,
        block_n, num_warps=4,
    )  # fmt: skip
    return down_R, up_UO


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
    one_S = _index(pool.slot_ranks, y_TO.device).one_S
    tensors = launch.RowTensors(rows.slot_of_row_T, bounds_S3, one_S, dropout)
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
        index = _index(pool.slot_ranks, y_TO.device)
        keeps_R, keeps_U = keep_S[index.slot_R].bool(), keep_S[index.slot_U].bool()
        for target, value, keeps in zip(
            targets, grads, (keeps_R, keeps_R, keeps_R, keeps_U), strict=True
        ):
            kept = torch.where(keeps.view(-1, *(1,) * (target.dim() - 1)), target, 0)
            target.copy_(value + kept)
    return dy_TO, grads
