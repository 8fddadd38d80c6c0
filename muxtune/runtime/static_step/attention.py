"""Causal attention of packed rows, forward and backward as explicit calls.

Shape suffixes as in the package; C features of a QKV row.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from muxtune.runtime.shared_attention import Call, flash_backward, flash_forward, merge
from muxtune.runtime.static_step.virtual import SharedKeys
from muxtune_kernels.block import Heads, rotate_, rotate_backward
from muxtune_kernels.packed_attention import (
    fits_packed_attention,
    packed_attention_backward,
    packed_attention_forward,
)


class Rotary(NamedTuple):
    """Tables (float32) and each row's place in them (int32)."""

    cos_LP: Tensor
    sin_LP: Tensor
    position_T: Tensor


class Packing(NamedTuple):
    """Where the sequences lie: their bounds, and the tiles of ``attention_tiles``."""

    cu_seqlens_N: Tensor
    tiles_W3: Tensor
    max_seqlen: int


def split_heads(qkv_TC: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Views [T, H, E], [T, K, E], [T, K, E]."""
    parts = (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)
    rows_TXE = qkv_TC.unflatten(1, (sum(parts), heads.head_dim))
    query_THE, key_TKE, value_TKE = rows_TXE.split(parts, dim=1)
    return query_THE, key_TKE, value_TKE


def attention_forward(
    qkv_TC: Tensor, rotary: Rotary, heads: Heads, packing: Packing
) -> tuple[Tensor, Any]:
    """(out [T, H * E], what the backward wants). Every row lies in a sequence; bounds beyond the
    last repeat the number of rows. Where flash attention is used, qkv is rotated in place."""
    cu_seqlens_N, tiles_W3, max_seqlen = packing
    if fits_packed_attention(qkv_TC, heads, max_seqlen):
        return packed_attention_forward(qkv_TC, *rotary, tiles_W3, heads)
    rotate_(qkv_TC, *rotary, heads)
    query_THE, key_TKE, value_TKE = split_heads(qkv_TC, heads)
    if qkv_TC.is_cuda:
        out_THE, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(
            query_THE, key_TKE, value_TKE, cu_seqlens_N, cu_seqlens_N, max_seqlen, max_seqlen,
            0.0, True, False,
        )  # fmt: skip
        return out_THE.flatten(1), (out_THE, lse, rng, unused)
    return _reference(query_THE, key_TKE, value_TKE, cu_seqlens_N).flatten(1), None


def attention_backward(
    dout_TC: Tensor, qkv_TC: Tensor, out_TC: Tensor, saved: Any, rotary: Rotary, heads: Heads,
    packing: Packing,
) -> Tensor:  # fmt: skip
    """Gradient of the QKV rows before their rotation, [T, C]."""
    cu_seqlens_N, tiles_W3, max_seqlen = packing
    if fits_packed_attention(qkv_TC, heads, max_seqlen):
        return packed_attention_backward(dout_TC, qkv_TC, out_TC, saved, *rotary, tiles_W3, heads)
    parts = split_heads(qkv_TC, heads)
    dout_THE = dout_TC.unflatten(1, (heads.num_heads, heads.head_dim))
    if qkv_TC.is_cuda:
        out_THE, lse, rng, unused = saved
        dquery_THE, dkey_TKE, dvalue_TKE = torch.ops.aten._flash_attention_backward(
            dout_THE, *parts, out_THE, lse, cu_seqlens_N, cu_seqlens_N, max_seqlen, max_seqlen,
            0.0, True, rng, unused,
        )  # fmt: skip
    else:
        leaves = [part.detach().requires_grad_() for part in parts]
        with torch.enable_grad():
            out_THE = _reference(leaves[0], leaves[1], leaves[2], cu_seqlens_N)
        dquery_THE, dkey_TKE, dvalue_TKE = torch.autograd.grad(out_THE, leaves, dout_THE)
    return rotate_backward(dquery_THE, dkey_TKE, dvalue_TKE, *rotary, heads)


def attention_with_shared(
    qkv_TC: Tensor, rotary: Rotary, heads: Heads, packing: Packing, shared: SharedKeys
) -> tuple[Tensor, Any]:
    """As ``attention_forward``, where rows also see the shared keys; qkv is rotated in place."""
    rotate_(qkv_TC, *rotary, heads)
    parts = split_heads(qkv_TC, heads)
    own, other = _calls(packing, shared)
    out_THE, lse_HT, state = flash_forward(*parts, own, None)
    key_RKE, value_RKE = shared.gathered(*parts[1:])
    more_THE, more_HT, more = flash_forward(parts[0], key_RKE, value_RKE, other, None)
    out_THE, lse_HT = merge((out_THE, lse_HT), (more_THE, more_HT), shared.stretches.has_T)
    return out_THE.flatten(1), (out_THE, lse_HT, state, more)


def attention_with_shared_backward(
    dout_TC: Tensor, qkv_TC: Tensor, saved: Any, rotary: Rotary, heads: Heads, packing: Packing,
    shared: SharedKeys,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(gradient of the QKV rows before their rotation, of the table of shared keys, of their
    values); what the table has of the pass's own rows is in the first."""
    out_THE, lse_HT, state, more = saved
    parts = split_heads(qkv_TC, heads)
    own, other = _calls(packing, shared)
    dout_THE = dout_TC.unflatten(1, (heads.num_heads, heads.head_dim))
    dquery_THE, dkey_TKE, dvalue_TKE = flash_backward(
        dout_THE, *parts, out_THE, lse_HT, state, own, None
    )
    more_THE, dkey_RKE, dvalue_RKE = flash_backward(
        dout_THE, parts[0], *shared.gathered(*parts[1:]), out_THE, lse_HT, more, other, None
    )
    dquery_THE = dquery_THE + torch.where(shared.stretches.has_T[:, None, None], more_THE, 0)
    dkey_UKE, dvalue_UKE = shared.scattered(dkey_RKE), shared.scattered(dvalue_RKE)
    count = shared.table.num_prompt_rows
    for total_TKE, part_UKE in ((dkey_TKE, dkey_UKE), (dvalue_TKE, dvalue_UKE)):
        total_TKE[total_TKE.shape[0] - count :] += part_UKE[:count]
    dqkv_TC = rotate_backward(dquery_THE, dkey_TKE, dvalue_TKE, *rotary, heads)
    return dqkv_TC, dkey_UKE, dvalue_UKE


def _calls(packing: Packing, shared: SharedKeys) -> tuple[Call, Call]:
    cu_seqlens_N, _, max_seqlen = packing
    stretches = shared.stretches
    return (
        Call(cu_seqlens_N, cu_seqlens_N, max_seqlen, max_seqlen, True),
        Call(stretches.cu_rows, stretches.cu_keys, stretches.max_rows, stretches.max_keys, False),
    )


def _reference(
    query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, cu_seqlens_N: Tensor
) -> Tensor:
    bounds = cu_seqlens_N.tolist()
    parts = []
    for start, stop in itertools.pairwise(bounds):
        if start < stop:
            query, key, value = (
                part[start:stop].transpose(0, 1) for part in (query_THE, key_TKE, value_TKE)
            )
            shares = query_THE.shape[1] != key_TKE.shape[1]
            out_HLE = functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=shares
            )
            parts.append(out_HLE.transpose(0, 1))
    return torch.cat(parts)
