"""The block operators in Triton: each reads and writes its tensors once, in float32 inside.

Shape suffixes as in `ops`; N features of a block, G heads of a block.
"""

# Triton's jit hides launch options and constexpr parameters from the type checker.
# pyright: reportCallIssue=false, reportArgumentType=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import Launcher

_WARPS = 4


@triton.jit
def _add_rms_norm_kernel(
    x_ptr, added_ptr, weight_ptr, sum_ptr, normed_ptr, rstd_ptr, width, eps,
    ADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d_N = tl.arange(0, BLOCK)
    in_N = d_N < width
    x_N = tl.load(x_ptr + row * width + d_N, mask=in_N, other=0.0)
    if ADDED:
        added_N = tl.load(added_ptr + row * width + d_N, mask=in_N, other=0.0)
        x_N = (x_N.to(tl.float32) + added_N.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * width + d_N, x_N, mask=in_N)
    wide_N = x_N.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide_N * wide_N, 0) / width + eps)
    weight_N = tl.load(weight_ptr + d_N, mask=in_N, other=0.0).to(tl.float32)
    normed_N = wide_N * rstd * weight_N
    tl.store(normed_ptr + row * width + d_N, normed_N.to(normed_ptr.dtype.element_ty), mask=in_N)
    tl.store(rstd_ptr + row, rstd)


def add_rms_norm_cuda(
    x_TD: Tensor, added_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, width = x_TD.shape
    sum_TD = x_TD if added_TD is None else torch.empty_like(x_TD)
    normed_TD = torch.empty_like(x_TD)
    rstd_T = torch.empty(num_rows, dtype=torch.float32, device=x_TD.device)
    _add_rms_norm(
        (num_rows, 1, 1),
        (x_TD, x_TD if added_TD is None else added_TD, weight_D, sum_TD, normed_TD, rstd_T),
        (width, eps),
        (added_TD is not None, triton.next_power_of_2(width)),
        _warps(width),
    )
    return sum_TD, normed_TD, rstd_T


@triton.jit
def _rms_norm_backward_kernel(
    dnormed_ptr, x_ptr, weight_ptr, rstd_ptr, dresidual_ptr, out_ptr, width,
    RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d_N = tl.arange(0, BLOCK)
    in_N = d_N < width
    at_N = row * width + d_N
    rstd = tl.load(rstd_ptr + row)
    scaled_N = tl.load(x_ptr + at_N, mask=in_N, other=0.0).to(tl.float32) * rstd
    g_N = tl.load(dnormed_ptr + at_N, mask=in_N, other=0.0).to(tl.float32)
    g_N *= tl.load(weight_ptr + d_N, mask=in_N, other=0.0).to(tl.float32)
    dx_N = (g_N - scaled_N * (tl.sum(g_N * scaled_N, 0) / width)) * rstd
    if RESIDUAL:
        dx_N += tl.load(dresidual_ptr + at_N, mask=in_N, other=0.0).to(tl.float32)
    tl.store(out_ptr + at_N, dx_N.to(out_ptr.dtype.element_ty), mask=in_N)


def rms_norm_backward_cuda(
    dnormed_TD: Tensor, x_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, dresidual_TD: Tensor | None
) -> Tensor:
    num_rows, width = x_TD.shape
    out_TD = torch.empty_like(x_TD)
    added_TD = out_TD if dresidual_TD is None else dresidual_TD
    _rms_norm_backward(
        (num_rows, 1, 1),
        (dnormed_TD, x_TD, weight_D, rstd_T, added_TD, out_TD),
        (width,),
        (dresidual_TD is not None, triton.next_power_of_2(width)),
        _warps(width),
    )
    return out_TD


def _warps(width: int) -> int:
    return max(1, min(16, int(triton.next_power_of_2(width)) // 512))


@triton.jit
def _rotate_kernel(
    qkv_ptr, cos_ptr, sin_ptr, position_ptr, stride,
    HEAD: tl.constexpr, HALF_PAD: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    p_P = tl.arange(0, HALF_PAD)
    half = HEAD // 2
    in_P = p_P < half
    angle_P = tl.load(position_ptr + row) * half + p_P
    cos_P = tl.load(cos_ptr + angle_P, mask=in_P, other=0.0)
    sin_P = tl.load(sin_ptr + angle_P, mask=in_P, other=0.0)
    head_G = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    left_GP = qkv_ptr + row * stride + head_G[:, None] * HEAD + p_P[None, :]
    mask = in_P[None, :] & (head_G >= 0)[:, None]
    x_GP = tl.load(left_GP, mask=mask, other=0.0).to(tl.float32)
    y_GP = tl.load(left_GP + half, mask=mask, other=0.0).to(tl.float32)
    dtype = qkv_ptr.dtype.element_ty
    tl.store(left_GP, (x_GP * cos_P[None, :] - y_GP * sin_P[None, :]).to(dtype), mask=mask)
    tl.store(left_GP + half, (y_GP * cos_P[None, :] + x_GP * sin_P[None, :]).to(dtype), mask=mask)


def rotate_cuda_(qkv_TC: Tensor, cos_LP: Tensor, sin_LP: Tensor, position_T: Tensor, heads) -> None:
    turned = heads.num_heads + heads.num_kv_heads
    group = math.gcd(turned, 16)
    _rotate(
        (qkv_TC.shape[0], turned // group, 1),
        (qkv_TC, cos_LP, sin_LP, position_T),
        (qkv_TC.stride(0),),
        (heads.head_dim, triton.next_power_of_2(heads.head_dim // 2), group),
        _WARPS if group > 4 else 1,
    )


@triton.jit
def _rotate_backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, out_ptr, cos_ptr, sin_ptr, position_ptr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD: tl.constexpr, HALF_PAD: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """BLOCK_G divides both numbers of heads, so a block is of one kind."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_G
    g_G = tl.arange(0, BLOCK_G)
    p_P = tl.arange(0, HALF_PAD)
    half = HEAD // 2
    mask = (p_P < half)[None, :] & (g_G >= 0)[:, None]
    inside_GP = g_G[:, None] * HEAD + p_P[None, :]
    if first < HEADS:
        source_GP = dq_ptr + (row * HEADS + first) * HEAD + inside_GP
    elif first < HEADS + KV_HEADS:
        source_GP = dk_ptr + (row * KV_HEADS + first - HEADS) * HEAD + inside_GP
    else:
        source_GP = dv_ptr + (row * KV_HEADS + first - HEADS - KV_HEADS) * HEAD + inside_GP
    x_GP = tl.load(source_GP, mask=mask, other=0.0).to(tl.float32)
    y_GP = tl.load(source_GP + half, mask=mask, other=0.0).to(tl.float32)
    out_GP = out_ptr + (row * (HEADS + 2 * KV_HEADS) + first) * HEAD + inside_GP
    angle_P = tl.load(position_ptr + row) * half + p_P
    turns = first < HEADS + KV_HEADS
    cos_P = tl.where(turns, tl.load(cos_ptr + angle_P, mask=p_P < half, other=0.0), 1.0)
    sin_P = tl.where(turns, tl.load(sin_ptr + angle_P, mask=p_P < half, other=0.0), 0.0)
    dtype = out_ptr.dtype.element_ty
    tl.store(out_GP, (x_GP * cos_P[None, :] + y_GP * sin_P[None, :]).to(dtype), mask=mask)
    tl.store(out_GP + half, (y_GP * cos_P[None, :] - x_GP * sin_P[None, :]).to(dtype), mask=mask)


def rotate_backward_cuda(
    dq_THE: Tensor, dk_TKE: Tensor, dv_TKE: Tensor, cos_LP: Tensor, sin_LP: Tensor,
    position_T: Tensor, heads,
) -> Tensor:  # fmt: skip
    num_rows = dq_THE.shape[0]
    out_TC = torch.empty((num_rows, heads.qkv_features), dtype=dq_THE.dtype, device=dq_THE.device)
    group = math.gcd(math.gcd(heads.num_heads, heads.num_kv_heads), 16)
    blocks = (heads.num_heads + 2 * heads.num_kv_heads) // group
    grads = (tensor.contiguous() for tensor in (dq_THE, dk_TKE, dv_TKE))
    half_pad = triton.next_power_of_2(heads.head_dim // 2)
    _rotate_backward(
        (num_rows, blocks, 1),
        (*grads, out_TC, cos_LP, sin_LP, position_T),
        (),
        (heads.num_heads, heads.num_kv_heads, heads.head_dim, half_pad, group),
        _WARPS if group > 4 else 1,
    )
    return out_TC


@triton.jit
def _swiglu_kernel(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f_N = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_N = f_N < width
    gate_N = tl.load(gate_up_ptr + row * 2 * width + f_N, mask=in_N, other=0.0).to(tl.float32)
    up_N = tl.load(gate_up_ptr + row * 2 * width + width + f_N, mask=in_N, other=0.0)
    out_N = gate_N * tl.sigmoid(gate_N) * up_N.to(tl.float32)
    tl.store(out_ptr + row * width + f_N, out_N.to(out_ptr.dtype.element_ty), mask=in_N)


def swiglu_cuda(gate_up_TC: Tensor) -> Tensor:
    num_rows, width = gate_up_TC.shape[0], gate_up_TC.shape[1] // 2
    out_TF = gate_up_TC.new_empty((num_rows, width))
    block = min(2048, triton.next_power_of_2(width))
    blocks = triton.cdiv(width, block)
    _swiglu((num_rows, blocks, 1), (gate_up_TC, out_TF), (width,), (block,), _WARPS)
    return out_TF


@triton.jit
def _swiglu_backward_kernel(dout_ptr, gate_up_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    f_N = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_N = f_N < width
    gate_ptr = gate_up_ptr + row * 2 * width + f_N
    gate_N = tl.load(gate_ptr, mask=in_N, other=0.0).to(tl.float32)
    up_N = tl.load(gate_ptr + width, mask=in_N, other=0.0).to(tl.float32)
    dout_N = tl.load(dout_ptr + row * width + f_N, mask=in_N, other=0.0).to(tl.float32)
    sigmoid_N = tl.sigmoid(gate_N)
    dgate_N = dout_N * up_N * sigmoid_N * (1.0 + gate_N * (1.0 - sigmoid_N))
    dtype = gate_up_ptr.dtype.element_ty
    tl.store(gate_ptr, dgate_N.to(dtype), mask=in_N)
    tl.store(gate_ptr + width, (dout_N * gate_N * sigmoid_N).to(dtype), mask=in_N)


def swiglu_backward_cuda_(dout_TF: Tensor, gate_up_TC: Tensor) -> Tensor:
    num_rows, width = dout_TF.shape
    block = min(2048, triton.next_power_of_2(width))
    blocks = triton.cdiv(width, block)
    _swiglu_backward((num_rows, blocks, 1), (dout_TF, gate_up_TC), (width,), (block,), _WARPS)
    return gate_up_TC


_add_rms_norm, _rms_norm_backward = map(Launcher, (_add_rms_norm_kernel, _rms_norm_backward_kernel))
_rotate, _rotate_backward = Launcher(_rotate_kernel), Launcher(_rotate_backward_kernel)
_swiglu, _swiglu_backward = Launcher(_swiglu_kernel), Launcher(_swiglu_backward_kernel)
