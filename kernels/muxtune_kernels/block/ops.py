"""Dispatch of the block operators by device.

Shape suffixes: T rows, D model features, F features of the MLP, H query heads, K key-value heads,
E head features, P half of them, L positions of the rotary table.
"""

from typing import NamedTuple

from torch import Tensor

from . import reference


class Heads(NamedTuple):
    """Of one attention block: a row of QKV is [H * E | K * E | K * E]."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def qkv_features(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


def add_rms_norm(
    x_TD: Tensor, added_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(x + added, rms_norm(x + added) * weight, 1 / rms as float32 [T]).

    Computed in float32 and rounded once; the sum is rounded to the dtype of x before its norm,
    as the residual stream that the next block sees. added None: the sum is x itself.
    """
    if x_TD.is_cuda:
        from .kernels import add_rms_norm_cuda

        return add_rms_norm_cuda(x_TD, added_TD, weight_D, eps)
    return reference.add_rms_norm(x_TD, added_TD, weight_D, eps)


def rms_norm_backward(
    dnormed_TD: Tensor, x_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, dresidual_TD: Tensor | None
) -> Tensor:
    """Gradient of the residual stream: that of the norm's input, plus dresidual; [T, D]."""
    if x_TD.is_cuda:
        from .kernels import rms_norm_backward_cuda

        return rms_norm_backward_cuda(dnormed_TD, x_TD, weight_D, rstd_T, dresidual_TD)
    return reference.rms_norm_backward(dnormed_TD, x_TD, weight_D, rstd_T, dresidual_TD)


def rotate_(qkv_TC: Tensor, cos_LP: Tensor, sin_LP: Tensor, position_T: Tensor, heads: Heads):
    """Rotary embedding of the query and key heads, in place.

    qkv_TC: [T, heads.qkv_features], contiguous. cos_LP, sin_LP: float32. position_T: int32.
    Feature i is rotated with feature i + P (the layout of transformers' Llama).
    """
    if qkv_TC.is_cuda:
        from .kernels import rotate_cuda_

        rotate_cuda_(qkv_TC, cos_LP, sin_LP, position_T, heads)
        return
    reference.rotate_(qkv_TC, cos_LP, sin_LP, position_T, heads)


def rotate_backward(
    dq_THE: Tensor, dk_TKE: Tensor, dv_TKE: Tensor, cos_LP: Tensor, sin_LP: Tensor,
    position_T: Tensor, heads: Heads,
) -> Tensor:  # fmt: skip
    """Gradient of the whole QKV row, [T, heads.qkv_features]: the heads put side by side again,
    those of queries and keys rotated back."""
    if dq_THE.is_cuda:
        from .kernels import rotate_backward_cuda

        return rotate_backward_cuda(dq_THE, dk_TKE, dv_TKE, cos_LP, sin_LP, position_T, heads)
    return reference.rotate_backward(dq_THE, dk_TKE, dv_TKE, cos_LP, sin_LP, position_T, heads)


def swiglu(gate_up_TC: Tensor) -> Tensor:
    """silu(gate) * up of [T, 2 F] rows, gate first; [T, F]."""
    if gate_up_TC.is_cuda:
        from .kernels import swiglu_cuda

        return swiglu_cuda(gate_up_TC)
    return reference.swiglu(gate_up_TC)


def swiglu_backward_(dout_TF: Tensor, gate_up_TC: Tensor) -> Tensor:
    """Gradient of the [T, 2 F] rows, written over them."""
    if gate_up_TC.is_cuda:
        from .kernels import swiglu_backward_cuda_

        return swiglu_backward_cuda_(dout_TF, gate_up_TC)
    return reference.swiglu_backward_(dout_TF, gate_up_TC)
