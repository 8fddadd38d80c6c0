"""Counter-based dropout: the keep bit is a hash of (row key, module key, feature).

Shape suffixes: T rows, D features, P pairs of features, S slots.
The mixer is lowbias32 by Christopher Wellons (https://nullprogram.com/blog/2018/07/31/). One
32-bit hash serves two neighbouring features, 16 bits each, so rates are multiples of 2**-16.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GOLDEN = 0x9E3779B9
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
_MASK = 0xFFFFFFFF


class RowDropout(NamedTuple):
    """Per-task dropout of one micro-batch.

    row_key_T: int64 [T] holding uint32 keys, from `row_keys`.
    rate_S: float32 [S], the drop probability of each slot; 0 = off.
    """

    row_key_T: Tensor
    rate_S: Tensor


def row_keys(
    seed: int, step: int, sample: Tensor | Sequence[int] | int, position: Tensor | Sequence[int]
) -> Tensor:
    """int64 [T] of uint32 keys from (task seed, step, sample in the batch, token position).

    `sample` and `position` broadcast. Made on the host; equal arguments give equal keys, so a
    token's mask is the same in whatever micro-batch, row or neighbourhood it is computed.
    """
    word = mix_word(seed & _MASK)
    for value in (seed >> 32, step):
        word = mix_word(word + (value & _MASK) + GOLDEN)
    sample_T = torch.as_tensor(sample, dtype=torch.int64)
    position_T = torch.as_tensor(position, dtype=torch.int64)
    key = _mix(_to_int32(sample_T + (word + GOLDEN)))
    key = _mix(_to_int32(key.long() + position_T + GOLDEN))
    return key.long() & _MASK


def dropout_keep_mask(
    row_key_T: Tensor, module_key: int, num_features: int, rate: float | Tensor
) -> Tensor:
    """bool [T, D]: True where a value is kept; the caller scales kept values by 1 / (1 - rate).

    rate: one drop probability, or float32 [T], one a row. The Triton kernels compute the same
    bits. Any device.
    """
    num_pairs = (num_features + 1) // 2
    row_T = _mix(_to_int32(row_key_T.long() ^ mix_word(module_key & _MASK)))
    pair_P = torch.arange(num_pairs, device=row_key_T.device) * GOLDEN
    hash_TP = _mix(row_T[:, None] + _to_int32(pair_P))
    bits_TP2 = torch.stack((hash_TP & 0xFFFF, (hash_TP >> 16) & 0xFFFF), dim=-1)
    bits_TD = bits_TP2.flatten(1)[:, :num_features]
    if isinstance(rate, Tensor):
        return bits_TD >= (rate.float() * 65536 + 0.5).floor().int()[:, None]
    return bits_TD >= int(rate * 65536 + 0.5)


def mix_word(word: int) -> int:
    """lowbias32 of one Python int taken modulo 2**32."""
    word &= _MASK
    word = ((word ^ (word >> 16)) * _MULTIPLIERS[0]) & _MASK
    word = ((word ^ (word >> 15)) * _MULTIPLIERS[1]) & _MASK
    return word ^ (word >> 16)


def _to_int32(value: Tensor) -> Tensor:
    low = value & _MASK
    return torch.where(low > 0x7FFFFFFF, low - (1 << 32), low).to(torch.int32)


def _mix(word: Tensor) -> Tensor:
    # int32 has no unsigned shift: shift arithmetically, then clear the copies of the sign.
    word = (word ^ ((word >> 16) & 0xFFFF)) * _MULTIPLIERS[0]
    word = (word ^ ((word >> 15) & 0x1FFFF)) * (_MULTIPLIERS[1] - (1 << 32))
    return word ^ ((word >> 16) & 0xFFFF)
