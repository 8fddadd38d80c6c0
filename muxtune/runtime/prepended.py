"""Keys and values that every sequence of a slot sees before its own: prefixes and prompts.

A prefix is trained keys and values of each attention, without rows. A prompt is trained
embeddings, whose keys and values are computed in the pass: each prompt gets rows of its own below
the micro-batch's, ONCE a pass and not once a sequence, because no virtual token sees a sequence;
all sequences of the slot then attend to the keys and values of these rows. Chunks hold neither, so
packing does not know of them. Both shift the positions of the slot's tokens, as in PEFT.

What is shared is gathered from a table of rows: the pass's own keys (or values), if a prompt is
present, then the prefixes' pool of that attention, if one is.

Shape suffixes: T rows of the pass, R pool rows, M gathered rows, W width of a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from muxtune.runtime.bank import ParameterPool
    from muxtune.runtime.passes import AdapterPass


class VirtualTokens(NamedTuple):
    """A slot's virtual tokens: their number, their first row in the pools, and whether they are
    computed in rows (a prompt) or are keys and values already (a prefix)."""

    count: int
    pool_row: int
    in_rows: bool


class KeySource(NamedTuple):
    """Which rows of the table of shared keys come before a sequence."""

    first: int
    count: int


class Stretches(NamedTuple):
    """For one variable-length call over all rows: stretches of rows that see the same shared keys.

    ``cu_rows`` and ``cu_keys`` (int32) bound the stretches and their keys, ``index`` (int64)
    gathers the keys, ``has_T`` (bool [T]) tells which rows have any.
    """

    cu_rows: Tensor
    cu_keys: Tensor
    index: Tensor
    max_rows: int
    max_keys: int
    has_T: Tensor


class SharedKeys(NamedTuple):
    """``from_rows``, ``from_pools``: what the table is made of. ``index``: int64 [M], the shared
    rows of all sequences in the order of the CPU's groups. ``prompt_rows``: int64, the pool rows
    of the prompts in the order of the rows below the micro-batch; None without prompts."""

    from_rows: bool
    from_pools: bool
    index: Tensor
    stretches: Stretches
    prompt_rows: Tensor | None


class VirtualPlan(NamedTuple):
    """Where virtual tokens go in a pass. ``prompts``: (first row, tokens) of each prompt."""

    sources: dict[int, KeySource]
    prompts: tuple[tuple[int, int], ...]
    prompt_rows: tuple[int, ...]
    num_rows: int
    from_pools: bool


def plan_virtual(
    virtual: Mapping[int, VirtualTokens], present: Iterable[int], num_rows: int
) -> VirtualPlan:
    """For the slots that are present in a micro-batch of ``num_rows`` rows."""
    chosen = {slot: virtual[slot] for slot in sorted(set(present)) if slot in virtual}
    sources, prompts, prompt_rows = {}, [], []
    for slot, item in chosen.items():
        if item.in_rows:
            sources[slot] = KeySource(num_rows, item.count)
            prompts.append((num_rows, item.count))
            prompt_rows.extend(range(item.pool_row, item.pool_row + item.count))
            num_rows += item.count
    first = num_rows if prompts else 0
    prefixes = {slot: item for slot, item in chosen.items() if not item.in_rows}
    for slot, item in prefixes.items():
        sources[slot] = KeySource(first + item.pool_row, item.count)
    return VirtualPlan(sources, tuple(prompts), tuple(prompt_rows), num_rows, bool(prefixes))


def share_keys(
    plan: VirtualPlan,
    ordered: Sequence[KeySource | None],
    stretches: Stretches,
    device: torch.device | str,
) -> SharedKeys:
    """``ordered``: of the sequences, in the order of the CPU's groups."""
    index = _rows_of(source for source in ordered if source is not None)
    prompt_rows = torch.tensor(plan.prompt_rows, device=device) if plan.prompts else None
    return SharedKeys(bool(plan.prompts), plan.from_pools, index.to(device), stretches, prompt_rows)


def stretches_of(
    sequences: Sequence[tuple[int, int]],
    sources: Sequence[KeySource | None],
    num_rows: int,
    device: torch.device | str,
) -> Stretches:
    """Neighbouring sequences with the same source are one stretch; gaps have no keys."""
    found: list[list[Any]] = []  # [start, stop, source]
    for (start, count), source in zip(sequences, sources, strict=True):
        if found and source is not None and found[-1][2] == source:
            found[-1][1] = start + count
        else:
            found.append([start, start + count, source])
    bounds, keys = [0], [0]
    for start, stop, source in [*found, (num_rows, num_rows, None)]:
        if start > bounds[-1]:
            bounds.append(start)
            keys.append(keys[-1])
        if stop > start:
            bounds.append(stop)
            keys.append(keys[-1] + (source.count if source else 0))
    has_T = torch.zeros(num_rows, dtype=torch.bool)
    for start, stop, source in found:
        has_T[start:stop] = source is not None
    return Stretches(
        torch.tensor(bounds, dtype=torch.int32, device=device),
        torch.tensor(keys, dtype=torch.int32, device=device),
        _rows_of(source for *_, source in found if source is not None).to(device),
        max(b - a for a, b in itertools.pairwise(bounds)),
        max(b - a for a, b in itertools.pairwise(keys)),
        has_T.to(device),
    )


def _rows_of(sources: Iterable[KeySource]) -> Tensor:
    rows = [torch.arange(first, first + count) for first, count in sources]
    return torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)


def gather_rows(
    rows_TW: Tensor | None,
    parameters: ParameterPool | None,
    index_M: Tensor,
    current: AdapterPass,
    dtype: torch.dtype,
) -> Tensor:
    """[M, W]: rows of the table that has ``rows_TW`` above the pool's parameters.

    Deterministic mode: the gradient of a row is summed over its uses in the dtype of the pools'
    gradients (float64 on the CPU), so it does not depend on how sequences were packed.
    """
    if current.deterministic:
        return _Gather.apply(rows_TW, current.anchor, parameters, index_M, current, dtype)
    table = [] if rows_TW is None else [rows_TW]
    if parameters is not None:
        table.append(current.leaf(parameters).to(dtype))
    return (table[0] if len(table) == 1 else torch.cat(table)).index_select(0, index_M)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_TW: Tensor | None,
        anchor: Tensor | None,
        parameters: ParameterPool | None,
        index_M: Tensor,
        current: AdapterPass,
        dtype: torch.dtype,
    ) -> Tensor:
        table = [] if rows_TW is None else [rows_TW]
        if parameters is not None:
            table.append(parameters.param_RW.to(dtype))
        ctx.save_for_backward(index_M)
        ctx.num_rows = 0 if rows_TW is None else rows_TW.shape[0]
        ctx.operands = parameters, current
        return (table[0] if len(table) == 1 else torch.cat(table)).index_select(0, index_M)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        (index_M,) = ctx.saved_tensors
        (parameters, current), (grad_MW,) = ctx.operands, grad_outputs
        sum_dtype = torch.float32 if grad_MW.is_cuda else torch.float64
        pool_rows = 0 if parameters is None else parameters.param_RW.shape[0]
        total_W = torch.zeros(
            ctx.num_rows + pool_rows, grad_MW.shape[1], dtype=sum_dtype, device=grad_MW.device
        )
        total_W.index_add_(0, index_M, grad_MW.to(sum_dtype))
        if parameters is not None:
            current.stage(parameters, slice(0, pool_rows), total_W[ctx.num_rows :])
        rows = total_W[: ctx.num_rows].to(grad_MW.dtype) if ctx.num_rows else None
        return rows, None, None, None, None, None
