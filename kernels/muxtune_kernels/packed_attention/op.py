"""Explicit forward and backward of packed causal attention on CUDA.

Made for fine-tuning batches: many sequences of tens of tokens. One program computes a whole short
sequence of a head, so its backward needs neither the forward's output nor its normalisers, and no
atomics; queries and keys are rotated as they are read, so no rotated copy is ever written.

Shape suffixes: T rows, C features of a QKV row, H query heads, K key-value heads, E head features,
P half of them, L positions of the rotary tables, W tiles.
"""

from torch import Tensor

from ..block.ops import Heads

MAX_SEQLEN = 1024


def fits_packed_attention(qkv_TC: Tensor, heads: Heads, max_seqlen: int) -> bool:
    """Whether this form is meant for it; longer sequences are better off with flash attention."""
    half = heads.head_dim // 2
    return (
        qkv_TC.is_cuda
        and max_seqlen <= MAX_SEQLEN
        and half in (16, 32, 64)
        and heads.head_dim == 2 * half
    )


def packed_attention_forward(
    qkv_TC: Tensor, cos_LP: Tensor, sin_LP: Tensor, position_T: Tensor, tiles_W3: Tensor,
    heads: Heads,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [T, H * E], log2 of the softmax normalisers, float32 [H, T]).

    qkv_TC: not rotated; [H * E | K * E | K * E] a row, contiguous. cos_LP, sin_LP: float32.
    position_T: int32. tiles_W3: from `attention_tiles`, on the device; every row must lie in a
    sequence, for rows outside of the tiles are not written.
    """
    from .kernels import forward_cuda

    return forward_cuda(qkv_TC, cos_LP, sin_LP, position_T, tiles_W3, heads)


def packed_attention_backward(
    dout_TC: Tensor, qkv_TC: Tensor, out_TC: Tensor, lse_HT: Tensor, cos_LP: Tensor,
    sin_LP: Tensor, position_T: Tensor, tiles_W3: Tensor, heads: Heads,
) -> Tensor:  # fmt: skip
    """Gradient of the QKV rows before their rotation, [T, C]."""
    from .kernels import backward_cuda

    return backward_cuda(
        dout_TC, qkv_TC, out_TC, lse_HT, cos_LP, sin_LP, position_T, tiles_W3, heads
    )
