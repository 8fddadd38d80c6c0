"""Attention of packed rows that also see shared keys: two flash calls, merged.

On a CPU the calls are done by their definition, for the static step's tests; the eager pass has a
form of its own there (``runtime.attention``).

One call attends to the sequences' own keys, causally, the other, over stretches of rows with the
same shared keys, to those. Softmax over both is a weighted mean of the two outputs, weights from
their log-sum-exps. The backward of each call is flash attention's own, given the MERGED output and
log-sum-exp: with them it recomputes the softmax over both and takes its own keys' share, so no
gradient through a log-sum-exp is needed (as in Ring Attention, Liu et al. 2023,
arXiv 2310.01889). Two calls a layer for any number of slots.

Shape suffixes: T rows, H query heads, K key-value heads, E head features, M shared keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muxtune.runtime.prepended import Stretches


class Call(NamedTuple):
    """One flash call: bounds of its queries and keys (int32) and their longest lengths."""

    cu_rows: Tensor
    cu_keys: Tensor
    max_rows: int
    max_keys: int
    causal: bool


def flash_forward(
    query_THE: Tensor, key_MKE: Tensor, value_MKE: Tensor, call: Call, scale: float | None
) -> tuple[Tensor, Tensor, Any]:
    """(out [T, H, E], log-sum-exp float32 [H, T], what the backward wants)."""
    if not query_THE.is_cuda:
        return *_reference(query_THE, key_MKE, value_MKE, call, scale), None
    out_THE, lse_HT, rng, unused, _ = torch.ops.aten._flash_attention_forward(
        query_THE, key_MKE, value_MKE, call.cu_rows, call.cu_keys, call.max_rows, call.max_keys,
        0.0, call.causal, False, scale=scale,
    )  # fmt: skip
    return out_THE, lse_HT, (rng, unused)


def flash_backward(
    dout_THE: Tensor, query_THE: Tensor, key_MKE: Tensor, value_MKE: Tensor, out_THE: Tensor,
    lse_HT: Tensor, state: Any, call: Call, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the queries, keys and values, given ANY output and log-sum-exp of the rows."""
    if not query_THE.is_cuda:
        return _reference_backward(
            dout_THE, query_THE, key_MKE, value_MKE, out_THE, lse_HT, call, scale
        )
    return torch.ops.aten._flash_attention_backward(
        dout_THE, query_THE, key_MKE, value_MKE, out_THE, lse_HT, call.cu_rows, call.cu_keys,
        call.max_rows, call.max_keys, 0.0, call.causal, *state, scale=scale,
    )  # fmt: skip


def merge(
    own: tuple[Tensor, Tensor], shared: tuple[Tensor, Tensor], has_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Softmax over both parts from each part's (output, log-sum-exp). Rows without shared keys
    keep their own bit by bit: what the other call says of them takes no part."""
    (own_THE, own_HT), (shared_THE, shared_HT) = own, shared
    shared_HT = torch.where(has_T, shared_HT, float("-inf"))
    lse_HT = torch.logaddexp(own_HT, shared_HT)
    share_TH1 = (shared_HT - lse_HT).exp().T.unsqueeze(2)
    own_TH1 = (own_HT - lse_HT).exp().T.unsqueeze(2)
    mixed_THE = own_THE * own_TH1 + shared_THE * share_TH1
    out_THE = torch.where(has_T[:, None, None], mixed_THE.to(own_THE.dtype), own_THE)
    return out_THE, torch.where(has_T, lse_HT, own_HT)


def attend_with_shared(
    query_THE: Tensor,
    key_TKE: Tensor,
    value_TKE: Tensor,
    shared_key_MKE: Tensor,
    shared_value_MKE: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    stretches: Stretches,
    scale: float | None,
) -> Tensor:
    """[T, H, E], differentiable in all five tensors."""
    own = Call(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, True)
    shared = Call(
        stretches.cu_rows, stretches.cu_keys, stretches.max_rows, stretches.max_keys, False
    )
    tensors = (query_THE, key_TKE, value_TKE, shared_key_MKE, shared_value_MKE)
    tensors = tuple(tensor.contiguous() for tensor in tensors)
    return _Attend.apply(*tensors, own, shared, stretches.has_T, scale)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_THE: Tensor,
        key_TKE: Tensor,
        value_TKE: Tensor,
        shared_key_MKE: Tensor,
        shared_value_MKE: Tensor,
        own: Call,
        shared: Call,
        has_T: Tensor,
        scale: float | None,
    ) -> Tensor:
        *first, state = flash_forward(query_THE, key_TKE, value_TKE, own, scale)
        *second, shared_state = flash_forward(
            query_THE, shared_key_MKE, shared_value_MKE, shared, scale
        )
        out_THE, lse_HT = merge((first[0], first[1]), (second[0], second[1]), has_T)
        ctx.save_for_backward(
            query_THE, key_TKE, value_TKE, shared_key_MKE, shared_value_MKE, out_THE, lse_HT, has_T
        )
        ctx.calls = own, shared, scale, state, shared_state
        return out_THE

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor):
        query_THE, key_TKE, value_TKE, shared_key_MKE, shared_value_MKE, *rest = ctx.saved_tensors
        out_THE, lse_HT, has_T = rest
        own, shared, scale, state, shared_state = ctx.calls
        dout_THE = grad_outputs[0].contiguous()
        dquery_THE, dkey_TKE, dvalue_TKE = flash_backward(
            dout_THE, query_THE, key_TKE, value_TKE, out_THE, lse_HT, state, own, scale
        )
        more_THE, dshared_key, dshared_value = flash_backward(
            dout_THE, query_THE, shared_key_MKE, shared_value_MKE, out_THE, lse_HT, shared_state,
            shared, scale,
        )  # fmt: skip
        more_THE = torch.where(has_T[:, None, None], more_THE, 0)
        grads = (dquery_THE + more_THE, dkey_TKE, dvalue_TKE, dshared_key, dshared_value)
        return (*grads, None, None, None, None)


def _reference(
    query_THE: Tensor, key_MKE: Tensor, value_MKE: Tensor, call: Call, scale: float | None
) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp) as flash attention gives them; without a key zeros and +infinity."""
    out_THE = torch.zeros_like(query_THE)
    lse_HT = query_THE.new_full((query_THE.shape[1], query_THE.shape[0]), float("inf"))
    group = query_THE.shape[1] // key_MKE.shape[1]
    for scores_HQK, rows, keys in _scored(query_THE, key_MKE, call, scale):
        lse_HT[:, rows] = scores_HQK.logsumexp(-1)
        value_KHE = value_MKE[keys].repeat_interleave(group, 1)
        out_THE[rows] = torch.einsum("hqk,khe->qhe", scores_HQK.softmax(-1), value_KHE)
    return out_THE, lse_HT


def _reference_backward(
    dout_THE: Tensor, query_THE: Tensor, key_MKE: Tensor, value_MKE: Tensor, out_THE: Tensor,
    lse_HT: Tensor, call: Call, scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """P = exp(S - lse), dS = P (dout V^T - sum(dout out)): with the given out and lse."""
    grads = [torch.zeros_like(part) for part in (query_THE, key_MKE, value_MKE)]
    heads, factor = key_MKE.shape[1], _scale_of(query_THE, scale)
    group = query_THE.shape[1] // heads
    delta_HT = (dout_THE * out_THE).sum(-1).T
    for scores_HQK, rows, keys in _scored(query_THE, key_MKE, call, scale):
        shares_HQK = (scores_HQK - lse_HT[:, rows, None]).exp()
        key_KHE, value_KHE = (p[keys].repeat_interleave(group, 1) for p in (key_MKE, value_MKE))
        dshares_HQK = torch.einsum("qhe,khe->hqk", dout_THE[rows], value_KHE)
        dscores_HQK = shares_HQK * (dshares_HQK - delta_HT[:, rows, None]) * factor
        grads[0][rows] += torch.einsum("hqk,khe->qhe", dscores_HQK, key_KHE)
        dkey_KHE = torch.einsum("hqk,qhe->khe", dscores_HQK, query_THE[rows])
        dvalue_KHE = torch.einsum("hqk,qhe->khe", shares_HQK, dout_THE[rows])
        for grad_MKE, part_KHE in ((grads[1], dkey_KHE), (grads[2], dvalue_KHE)):
            grad_MKE[keys] += part_KHE.unflatten(1, (heads, group)).sum(2)
    return grads[0], grads[1], grads[2]


def _scale_of(query_THE: Tensor, scale: float | None) -> float:
    return query_THE.shape[-1] ** -0.5 if scale is None else scale


def _scored(
    query_THE: Tensor, key_MKE: Tensor, call: Call, scale: float | None
) -> Iterator[tuple[Tensor, slice, slice]]:
    """Scaled and masked scores of each stretch that has rows and keys, with both."""
    bounds = zip(
        itertools.pairwise(call.cu_rows.tolist()),
        itertools.pairwise(call.cu_keys.tolist()),
        strict=True,
    )
    group = query_THE.shape[1] // key_MKE.shape[1]
    for (start, stop), (first, last) in bounds:
        if stop > start and last > first:
            key_KHE = key_MKE[first:last].repeat_interleave(group, 1)
            scores_HQK = torch.einsum("qhe,khe->hqk", query_THE[start:stop], key_KHE)
            scores_HQK = scores_HQK * _scale_of(query_THE, scale)
            if call.causal:
                ones = torch.ones(stop - start, last - first, dtype=torch.bool)
                scores_HQK = scores_HQK.masked_fill(~ones.tril(), float("-inf"))
            yield scores_HQK, slice(start, stop), slice(first, last)
