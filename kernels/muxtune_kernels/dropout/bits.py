"""The dropout hash as Triton code; the same bits as `dropout_keep_mask`."""

import triton
import triton.language as tl


@triton.jit
def _mix(word):
    word = (word ^ (word >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    word = (word ^ (word >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return word ^ (word >> 16)


@triton.jit
def row_words(row_key_T, module_word):
    """uint32 [T] from int64 row keys and the mixed module key (`mix_word` of it)."""
    return _mix(row_key_T.to(tl.uint32) ^ module_word.to(tl.uint32))


@triton.jit
def keep_bits(row_word_T, first_feature, threshold_T, NUM_FEATURES: tl.constexpr):
    """bool [T, NUM_FEATURES] from an even feature on. threshold_T: int32, rate * 65536."""
    pair_P = (first_feature // 2 + tl.arange(0, NUM_FEATURES // 2)).to(tl.uint32)
    hash_TP = _mix(row_word_T[:, None] + pair_P[None, :] * tl.full((), 0x9E3779B9, tl.uint32))
    bits_TD = tl.interleave((hash_TP & 0xFFFF).to(tl.int32), (hash_TP >> 16).to(tl.int32))
    return bits_TD >= threshold_T[:, None]
