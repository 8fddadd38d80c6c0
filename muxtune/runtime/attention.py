"""Causal attention of packed sequences, block-diagonal: no token sees another sequence.

Registered with transformers under ``ATTENTION_NAME``. The rows' layout travels as the keyword
argument ``packed`` through the model's forward, with ``attention_mask=None, use_cache=False``:
only so does transformers neither build a mask of its own nor mix sequences.

Shape suffixes: T rows of the pass, H query heads, K key-value heads, E head features, N sequences,
L tokens of one sequence, P shared keys of one sequence, M gathered shared keys, W = K * E.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from muxtune.runtime.adapters.prefix import KEY, VALUE
from muxtune.runtime.prepended import (
    KeySource,
    SharedKeys,
    VirtualPlan,
    gather_rows,
    share_keys,
    stretches_of,
)
from muxtune.runtime.shared_attention import attend_with_shared

ATTENTION_NAME = "muxtune_packed"


class SequenceGroup(NamedTuple):
    """Sequences of one length. ``start``: first row where all of them lie side by side, else
    None and ``row_index`` (int64 [N * L]) tells their rows. ``shared_keys``: how many keys that
    are not their own come before each."""

    num_sequences: int
    length_tokens: int
    start: int | None
    row_index: Tensor | None
    shared_keys: int = 0


class PackedRows(NamedTuple):
    """Where the sequences of a micro-batch lie.

    ``cu_seqlens``: int32, for varlen kernels: bounds of maximal stretches; a gap of filler is a
    stretch of its own, whose output ``filler_T`` (bool [T]; None: no filler) clears.
    ``groups``: the same for the CPU; ``restore``: int64 [T], the row of the groups' outputs,
    one below the other, that belongs to each row, and the number of them for filler. None when
    the groups already lie in row order without filler. ``shared``: the keys of prefixes and
    prompts, which sequences see before their own; None where no sequence does.
    """

    num_rows: int
    cu_seqlens: Tensor
    max_seqlen: int
    filler_T: Tensor | None
    groups: tuple[SequenceGroup, ...]
    restore: Tensor | None
    shared: SharedKeys | None = None


def pack_rows(
    sequences: Sequence[tuple[int, int]],
    num_rows: int,
    device: torch.device | str = "cpu",
    plan: VirtualPlan | None = None,
    sources: Sequence[KeySource | None] = (),
) -> PackedRows:
    """The layout of sequences given as (first row, tokens), ascending and disjoint. ``sources``:
    of each sequence, where ``plan`` puts keys before any."""
    sources = sources or [None] * len(sequences)
    groups, order, ordered_sources = _groups(sequences, sources)
    restore = torch.full((num_rows,), len(order), dtype=torch.int64)
    restore[order] = torch.arange(len(order))
    in_order = len(order) == num_rows and bool((restore == torch.arange(num_rows)).all())
    bounds = sorted({0, num_rows, *(row for s, n in sequences for row in (s, s + n))})
    filler_T = restore == len(order)
    return PackedRows(
        num_rows,
        torch.tensor(bounds, dtype=torch.int32, device=device),
        max((stop - start for start, stop in itertools.pairwise(bounds)), default=0),
        filler_T.to(device) if bool(filler_T.any()) else None,
        groups,
        None if in_order else restore,
        None
        if plan is None or not plan.sources
        else share_keys(
            plan, ordered_sources, stretches_of(sequences, sources, num_rows, device), device
        ),
    )


def _groups(
    sequences: Sequence[tuple[int, int]], sources: Sequence[KeySource | None]
) -> tuple[tuple[SequenceGroup, ...], Tensor, list[KeySource | None]]:
    """Groups by length and shared keys in order of first appearance, and, in their order, the rows
    that they cover and the sources of their shared keys."""
    members: dict[tuple[int, int], list[tuple[int, KeySource | None]]] = {}
    for (start, tokens), source in zip(sequences, sources, strict=True):
        key = (tokens, 0 if source is None else source.count)
        members.setdefault(key, []).append((start, source))
    groups, orders = [], [torch.empty(0, dtype=torch.int64)]
    for (tokens, shared_keys), items in members.items():
        starts = [start for start, _ in items]
        index = (torch.tensor(starts)[:, None] + torch.arange(tokens)).flatten()
        together = all(b - a == tokens for a, b in itertools.pairwise(starts))
        orders.append(index)
        groups.append(
            SequenceGroup(
                len(starts),
                tokens,
                starts[0] if together else None,
                None if together else index,
                shared_keys,
            )
        )
    ordered = [source for items in members.values() for _, source in items]
    return tuple(groups), torch.cat(orders), ordered


def packed_attention(
    module: torch.nn.Module,
    query_1HTE: Tensor,
    key_1KTE: Tensor,
    value_1KTE: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed: PackedRows | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers; [1, T, H, E], filler rows zero.

    Raises ValueError without ``packed`` or with a mask: both would leak across sequences.
    """
    if packed is None or attention_mask is not None:
        raise ValueError("packed attention needs the rows' layout in 'packed' and no mask")
    if kwargs.get("sliding_window") and packed.max_seqlen > kwargs["sliding_window"]:
        raise ValueError("sliding-window attention is not supported; lower max_length")
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"this model's attention needs '{name}', which is not supported")
    query_THE, key_TKE, value_TKE = (
        tensor.squeeze(0).transpose(0, 1) for tensor in (query_1HTE, key_1KTE, value_1KTE)
    )
    if query_THE.is_cuda:
        out_THE = _attend_varlen(module, query_THE, key_TKE, value_TKE, scaling, packed)
    else:
        shared = None
        if packed.shared is not None:
            shared = _shared_rows(module, key_TKE, value_TKE, packed.shared, packed.shared.index)
        out_THE = _attend_groups(query_THE, key_TKE, value_TKE, scaling, packed, shared)
    return out_THE.unsqueeze(0), None


def _shared_rows(
    module: Any, key_TKE: Tensor, value_TKE: Tensor, shared: SharedKeys, index_M: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values of prefixes and prompts at this attention, each [M, K, E]."""
    site_name, state = module.shared_keys_site
    current, heads = state.current, key_TKE.shape[1:]
    out = []
    for name, rows_TKE in ((KEY, key_TKE), (VALUE, value_TKE)):
        pool = current.pool.sites[site_name].parameters[name] if shared.from_pools else None
        rows_TW = rows_TKE.flatten(1) if shared.from_rows else None
        rows_MW = gather_rows(rows_TW, pool, index_M, current, rows_TKE.dtype)
        out.append(rows_MW.unflatten(1, heads))
    return out[0], out[1]


@functools.cache
def _has_argument(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


def _attend_varlen(
    module: torch.nn.Module,
    query_THE: Tensor,
    key_TKE: Tensor,
    value_TKE: Tensor,
    scaling: float | None,
    packed: PackedRows,
) -> Tensor:
    if packed.shared is None:
        out_THE = _varlen(query_THE, key_TKE, value_TKE, scaling, packed)
    else:
        index_M = packed.shared.stretches.index
        shared = _shared_rows(module, key_TKE, value_TKE, packed.shared, index_M)
        out_THE = attend_with_shared(
            query_THE, key_TKE, value_TKE, *shared, packed.cu_seqlens, packed.max_seqlen,
            packed.shared.stretches, scaling,
        )  # fmt: skip
    if packed.filler_T is None:
        return out_THE
    return out_THE.masked_fill(packed.filler_T[:, None, None], 0)


def _varlen(
    query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, scaling: float | None, packed: PackedRows
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    shares_keys = query_THE.shape[1] != key_TKE.shape[1]
    # Before torch 2.12 there is no such argument: the kernel takes fewer key heads as they are.
    options: dict[str, Any] = (
        {"enable_gqa": shares_keys} if _has_argument(varlen_attn, "enable_gqa") else {}
    )
    out_THE = varlen_attn(
        query_THE.contiguous(),
        key_TKE.contiguous(),
        value_TKE.contiguous(),
        packed.cu_seqlens,
        packed.cu_seqlens,
        packed.max_seqlen,
        packed.max_seqlen,
        scale=scaling,
        window_size=(-1, 0),
        **options,
    )
    assert isinstance(out_THE, Tensor)
    return out_THE


def _attend_groups(
    query_THE: Tensor,
    key_TKE: Tensor,
    value_TKE: Tensor,
    scaling: float | None,
    packed: PackedRows,
    shared: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """One batched SDPA call for each length and number of shared keys. A sequence's result does
    not depend on the others. ``shared``: keys and values [M, K, E] in the groups' order."""
    parts, first = [], 0
    shares_keys = query_THE.shape[1] != key_TKE.shape[1]
    for group in packed.groups:
        keys_NKLE, values_NKLE = _take(key_TKE, group), _take(value_TKE, group)
        if group.shared_keys:
            assert shared is not None
            rows = slice(first, first + group.num_sequences * group.shared_keys)
            keys_NKLE, values_NKLE = (
                _put_before(before_MKE[rows], own_NKLE, group)
                for before_MKE, own_NKLE in zip(shared, (keys_NKLE, values_NKLE), strict=True)
            )
            first = rows.stop
        out_NHLE = functional.scaled_dot_product_attention(
            _take(query_THE, group),
            keys_NKLE,
            values_NKLE,
            attn_mask=_mask(group, query_THE.device) if group.shared_keys else None,
            is_causal=not group.shared_keys,
            scale=scaling,
            enable_gqa=shares_keys,
        )
        parts.append(out_NHLE.transpose(1, 2).reshape(-1, *query_THE.shape[1:]))
    if packed.restore is None:
        return torch.cat(parts) if len(parts) > 1 else parts[0]
    parts.append(query_THE.new_zeros(1, *query_THE.shape[1:]))
    return torch.cat(parts).index_select(0, packed.restore)


def _put_before(before_MKE: Tensor, own_NKLE: Tensor, group: SequenceGroup) -> Tensor:
    before_NKPE = before_MKE.unflatten(0, (group.num_sequences, group.shared_keys)).transpose(1, 2)
    return torch.cat([before_NKPE, own_NKLE], dim=2)


def _mask(group: SequenceGroup, device: torch.device) -> Tensor:
    """bool [L, P + L]: all shared keys, and the own ones causally."""
    length, shared_keys = group.length_tokens, group.shared_keys
    ones = torch.ones(length, shared_keys + length, dtype=torch.bool, device=device)
    return ones.tril(shared_keys)


def _take(rows_THE: Tensor, group: SequenceGroup) -> Tensor:
    """[N, H, L, E] of the group's sequences; a view where they lie side by side."""
    if group.row_index is None:
        assert group.start is not None
        count = group.num_sequences * group.length_tokens
        picked = rows_THE[group.start : group.start + count]
    else:
        picked = rows_THE.index_select(0, group.row_index)
    return picked.unflatten(0, (group.num_sequences, group.length_tokens)).transpose(1, 2)


AttentionInterface.register(ATTENTION_NAME, packed_attention)
