"""Packed causal attention in plain torch, one sequence at a time; differentiable.

Shape suffixes as in `op`.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalIterable=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false

import itertools

import torch
from torch import Tensor
from torch.nn import functional

from ..block.ops import Heads
from ..block.reference import rotated


def packed_attention_reference(
    qkv_TC: Tensor, cos_LP: Tensor, sin_LP: Tensor, position_T: Tensor, cu_seqlens_N: Tensor,
    heads: Heads,
) -> Tensor:  # fmt: skip
    """[T, H * E]; rows beyond the last bound are not computed and must not exist."""
    parts = (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)
    rows_TXE = qkv_TC.unflatten(1, (sum(parts), heads.head_dim))
    query_THE, key_TKE, value_TKE = rows_TXE.split(parts, dim=1)
    index_T = position_T.long()
    angles = cos_LP[index_T][:, None], sin_LP[index_T][:, None]
    query_THE, key_TKE = rotated(query_THE, *angles), rotated(key_TKE, *angles)
    bounds, out = cu_seqlens_N.tolist(), []
    for start, stop in itertools.pairwise(bounds):
        if start < stop:
            rows = [part[start:stop].transpose(0, 1) for part in (query_THE, key_TKE, value_TKE)]
            out_HLE = functional.scaled_dot_product_attention(
                *rows, is_causal=True, enable_gqa=heads.num_heads != heads.num_kv_heads
            )
            out.append(out_HLE.transpose(0, 1).flatten(1))
    return torch.cat(out)
