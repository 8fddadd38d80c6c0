"""Packed causal attention in Triton.

Head features are kept in two halves, as the rotary embedding pairs them: a score is the sum of
two products over half the features, and gradients are rotated back without a shuffle.

Shape suffixes: B rows of a tile (M of queries, N of keys), E head features, P half of them.
"""

# Triton's jit hides launch options and constexpr parameters from the type checker.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import Launcher
from .tiles import TILE_ROWS

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _angles(cos_ptr, sin_ptr, position_ptr, row_B, in_B, HALF: tl.constexpr):
    position_B = tl.load(position_ptr + row_B, mask=in_B, other=0)
    at_BP = position_B[:, None] * HALF + tl.arange(0, HALF)[None, :]
    cos_BP = tl.load(cos_ptr + at_BP, mask=in_B[:, None], other=0.0)
    sin_BP = tl.load(sin_ptr + at_BP, mask=in_B[:, None], other=0.0)
    return cos_BP, sin_BP


@triton.jit
def _load_rotated(ptr, row_B, in_B, stride, cos_BP, sin_BP, HALF: tl.constexpr):
    at_BP = ptr + row_B.to(tl.int64)[:, None] * stride + tl.arange(0, HALF)[None, :]
    left_BP = tl.load(at_BP, mask=in_B[:, None], other=0.0)
    right_BP = tl.load(at_BP + HALF, mask=in_B[:, None], other=0.0)
    dtype = left_BP.dtype
    left_BP, right_BP = left_BP.to(tl.float32), right_BP.to(tl.float32)
    return (
        (left_BP * cos_BP - right_BP * sin_BP).to(dtype),
        (right_BP * cos_BP + left_BP * sin_BP).to(dtype),
    )


@triton.jit
def _store_back(ptr, row_B, in_B, stride, left_BP, right_BP, cos_BP, sin_BP, HALF: tl.constexpr):
    """Rotated back: the gradient before the rotation."""
    at_BP = ptr + row_B.to(tl.int64)[:, None] * stride + tl.arange(0, HALF)[None, :]
    dtype = ptr.dtype.element_ty
    tl.store(at_BP, (left_BP * cos_BP + right_BP * sin_BP).to(dtype), mask=in_B[:, None])
    tl.store(at_BP + HALF, (right_BP * cos_BP - left_BP * sin_BP).to(dtype), mask=in_B[:, None])


@triton.jit
def _rows_of(ptr, row_B, in_B, stride, HEAD: tl.constexpr):
    at_BE = ptr + row_B.to(tl.int64)[:, None] * stride + tl.arange(0, HEAD)[None, :]
    return tl.load(at_BE, mask=in_B[:, None], other=0.0)


@triton.jit
def _scores(ql_MP, qr_MP, kl_NP, kr_NP, row_M, row_N, stop, scale):
    """Scaled for exp2; -inf where a key is later than the query or beyond the sequence."""
    s_MN = tl.dot(ql_MP, tl.trans(kl_NP), input_precision="ieee")
    s_MN = tl.dot(qr_MP, tl.trans(kr_NP), s_MN, input_precision="ieee") * (scale * _LOG2_E)
    seen_MN = (row_N[None, :] <= row_M[:, None]) & (row_N < stop)[None, :]
    return tl.where(seen_MN, s_MN, float("-inf"))


@triton.jit
def _tile(tiles_ptr):
    """(first row of the sequence, one past its last, first row of the tile); stop 0: no tile."""
    at = tiles_ptr + 3 * tl.program_id(1)
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def _forward_kernel(
    qkv_ptr, out_ptr, lse_ptr, cos_ptr, sin_ptr, position_ptr, tiles_ptr, num_rows, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    start, stop, first = _tile(tiles_ptr)
    if first < stop:
        head_dim = 2 * HALF
        stride = (HEADS + 2 * KV_HEADS) * head_dim
        kv_head = head // (HEADS // KV_HEADS)
        k_ptr = qkv_ptr + (HEADS + kv_head) * head_dim
        v_ptr = k_ptr + KV_HEADS * head_dim
        row_M = first + tl.arange(0, BLOCK)
        in_M = row_M < stop
        cos_MP, sin_MP = _angles(cos_ptr, sin_ptr, position_ptr, row_M, in_M, HALF)
        ql_MP, qr_MP = _load_rotated(
            qkv_ptr + head * head_dim, row_M, in_M, stride, cos_MP, sin_MP, HALF
        )
        high_M = tl.full((BLOCK,), float("-inf"), tl.float32)
        sum_M = tl.zeros((BLOCK,), tl.float32)
        acc_ME = tl.zeros((BLOCK, 2 * HALF), tl.float32)
        for at in range(start, first + 1, BLOCK):
            row_N = at + tl.arange(0, BLOCK)
            in_N = row_N < stop
            cos_NP, sin_NP = _angles(cos_ptr, sin_ptr, position_ptr, row_N, in_N, HALF)
            kl_NP, kr_NP = _load_rotated(k_ptr, row_N, in_N, stride, cos_NP, sin_NP, HALF)
            v_NE = _rows_of(v_ptr, row_N, in_N, stride, 2 * HALF)
            s_MN = _scores(ql_MP, qr_MP, kl_NP, kr_NP, row_M, row_N, stop, scale)
            new_M = tl.maximum(high_M, tl.max(s_MN, 1))
            p_MN = tl.exp2(s_MN - new_M[:, None])
            shrink_M = tl.exp2(high_M - new_M)
            sum_M = sum_M * shrink_M + tl.sum(p_MN, 1)
            acc_ME = acc_ME * shrink_M[:, None]
            acc_ME = tl.dot(p_MN.to(v_NE.dtype), v_NE, acc_ME, input_precision="ieee")
            high_M = new_M
        acc_ME = acc_ME / sum_M[:, None]
        at_ME = (out_ptr + row_M.to(tl.int64)[:, None] * (HEADS * head_dim) + head * head_dim
                 + tl.arange(0, 2 * HALF)[None, :])  # fmt: skip
        tl.store(at_ME, acc_ME.to(out_ptr.dtype.element_ty), mask=in_M[:, None])
        tl.store(lse_ptr + head * num_rows + row_M, high_M + tl.log2(sum_M), mask=in_M)


@triton.jit
def _backward_one(
    dout_ptr, qkv_ptr, dqkv_ptr, cos_ptr, sin_ptr, position_ptr, start, stop, kv_head, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A sequence of one tile: everything from one read of q, k, v and the output's gradient."""
    head_dim = 2 * HALF
    stride = (HEADS + 2 * KV_HEADS) * head_dim
    k_at = (HEADS + kv_head) * head_dim
    v_at = k_at + KV_HEADS * head_dim
    row_B = start + tl.arange(0, BLOCK)
    in_B = row_B < stop
    cos_BP, sin_BP = _angles(cos_ptr, sin_ptr, position_ptr, row_B, in_B, HALF)
    kl_BP, kr_BP = _load_rotated(qkv_ptr + k_at, row_B, in_B, stride, cos_BP, sin_BP, HALF)
    v_BE = _rows_of(qkv_ptr + v_at, row_B, in_B, stride, 2 * HALF)
    dtype = v_BE.dtype
    dkl_BP = tl.zeros((BLOCK, HALF), tl.float32)
    dkr_BP = tl.zeros((BLOCK, HALF), tl.float32)
    dv_BE = tl.zeros((BLOCK, 2 * HALF), tl.float32)
    for member in tl.static_range(HEADS // KV_HEADS):
        q_at = (kv_head * (HEADS // KV_HEADS) + member) * head_dim
        ql_BP, qr_BP = _load_rotated(qkv_ptr + q_at, row_B, in_B, stride, cos_BP, sin_BP, HALF)
        do_BE = _rows_of(dout_ptr + q_at, row_B, in_B, HEADS * head_dim, 2 * HALF)
        s_BB = _scores(ql_BP, qr_BP, kl_BP, kr_BP, row_B, row_B, stop, scale)
        p_BB = tl.exp2(s_BB - tl.max(s_BB, 1)[:, None])
        p_BB = p_BB / tl.sum(p_BB, 1)[:, None]
        dv_BE = tl.dot(tl.trans(p_BB.to(dtype)), do_BE, dv_BE, input_precision="ieee")
        dp_BB = tl.dot(do_BE, tl.trans(v_BE), input_precision="ieee")
        delta_B = tl.sum(p_BB * dp_BB, 1)
        ds_BB = (p_BB * (dp_BB - delta_B[:, None]) * scale).to(dtype)
        dql_BP = tl.dot(ds_BB, kl_BP, input_precision="ieee")
        dqr_BP = tl.dot(ds_BB, kr_BP, input_precision="ieee")
        _store_back(dqkv_ptr + q_at, row_B, in_B, stride, dql_BP, dqr_BP, cos_BP, sin_BP, HALF)
        dkl_BP = tl.dot(tl.trans(ds_BB), ql_BP, dkl_BP, input_precision="ieee")
        dkr_BP = tl.dot(tl.trans(ds_BB), qr_BP, dkr_BP, input_precision="ieee")
    _store_back(dqkv_ptr + k_at, row_B, in_B, stride, dkl_BP, dkr_BP, cos_BP, sin_BP, HALF)
    at_BE = dqkv_ptr + v_at + row_B.to(tl.int64)[:, None] * stride + tl.arange(0, 2 * HALF)[None, :]
    tl.store(at_BE, dv_BE.to(dtype), mask=in_B[:, None])


@triton.jit
def _ds_tile(
    ql_MP, qr_MP, do_ME, o_ME, lse_M, kl_NP, kr_NP, v_NE, row_M, row_N, stop, scale,
):  # fmt: skip
    """(p, ds) of one tile of a longer sequence, in the dtype of the products."""
    s_MN = _scores(ql_MP, qr_MP, kl_NP, kr_NP, row_M, row_N, stop, scale)
    p_MN = tl.exp2(s_MN - lse_M[:, None])
    dp_MN = tl.dot(do_ME, tl.trans(v_NE), input_precision="ieee")
    delta_M = tl.sum(do_ME.to(tl.float32) * o_ME.to(tl.float32), 1)
    ds_MN = p_MN * (dp_MN - delta_M[:, None]) * scale
    return p_MN.to(v_NE.dtype), ds_MN.to(v_NE.dtype)


@triton.jit
def _backward_keys(
    dout_ptr, qkv_ptr, out_ptr, lse_ptr, dqkv_ptr, cos_ptr, sin_ptr, position_ptr, start, stop,
    at, kv_head, num_rows, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys: over all tiles of queries from it on."""
    head_dim = 2 * HALF
    stride = (HEADS + 2 * KV_HEADS) * head_dim
    k_at = (HEADS + kv_head) * head_dim
    v_at = k_at + KV_HEADS * head_dim
    row_N = at + tl.arange(0, BLOCK)
    in_N = row_N < stop
    cos_NP, sin_NP = _angles(cos_ptr, sin_ptr, position_ptr, row_N, in_N, HALF)
    kl_NP, kr_NP = _load_rotated(qkv_ptr + k_at, row_N, in_N, stride, cos_NP, sin_NP, HALF)
    v_NE = _rows_of(qkv_ptr + v_at, row_N, in_N, stride, 2 * HALF)
    dkl_NP = tl.zeros((BLOCK, HALF), tl.float32)
    dkr_NP = tl.zeros((BLOCK, HALF), tl.float32)
    dv_NE = tl.zeros((BLOCK, 2 * HALF), tl.float32)
    for member in range(HEADS // KV_HEADS):
        head = kv_head * (HEADS // KV_HEADS) + member
        q_at = head * head_dim
        for first in range(at, stop, BLOCK):
            row_M = first + tl.arange(0, BLOCK)
            in_M = row_M < stop
            cos_MP, sin_MP = _angles(cos_ptr, sin_ptr, position_ptr, row_M, in_M, HALF)
            ql_MP, qr_MP = _load_rotated(qkv_ptr + q_at, row_M, in_M, stride, cos_MP, sin_MP, HALF)
            do_ME = _rows_of(dout_ptr + q_at, row_M, in_M, HEADS * head_dim, 2 * HALF)
            o_ME = _rows_of(out_ptr + q_at, row_M, in_M, HEADS * head_dim, 2 * HALF)
            lse_M = tl.load(lse_ptr + head * num_rows + row_M, mask=in_M, other=0.0)
            p_MN, ds_MN = _ds_tile(ql_MP, qr_MP, do_ME, o_ME, lse_M, kl_NP, kr_NP, v_NE, row_M,
                                   row_N, stop, scale)  # fmt: skip
            # A query row beyond the sequence has no normaliser: its p is not a probability.
            p_MN = tl.where(in_M[:, None], p_MN, 0.0).to(v_NE.dtype)
            ds_MN = tl.where(in_M[:, None], ds_MN, 0.0).to(v_NE.dtype)
            dv_NE = tl.dot(tl.trans(p_MN), do_ME, dv_NE, input_precision="ieee")
            dkl_NP = tl.dot(tl.trans(ds_MN), ql_MP, dkl_NP, input_precision="ieee")
            dkr_NP = tl.dot(tl.trans(ds_MN), qr_MP, dkr_NP, input_precision="ieee")
    _store_back(dqkv_ptr + k_at, row_N, in_N, stride, dkl_NP, dkr_NP, cos_NP, sin_NP, HALF)
    at_NE = dqkv_ptr + v_at + row_N.to(tl.int64)[:, None] * stride + tl.arange(0, 2 * HALF)[None, :]
    tl.store(at_NE, dv_NE.to(v_NE.dtype), mask=in_N[:, None])


@triton.jit
def _backward_queries(
    dout_ptr, qkv_ptr, out_ptr, lse_ptr, dqkv_ptr, cos_ptr, sin_ptr, position_ptr, start, stop,
    first, head, num_rows, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries: over all tiles of keys up to it."""
    head_dim = 2 * HALF
    stride = (HEADS + 2 * KV_HEADS) * head_dim
    q_at = head * head_dim
    k_at = (HEADS + head // (HEADS // KV_HEADS)) * head_dim
    v_at = k_at + KV_HEADS * head_dim
    row_M = first + tl.arange(0, BLOCK)
    in_M = row_M < stop
    cos_MP, sin_MP = _angles(cos_ptr, sin_ptr, position_ptr, row_M, in_M, HALF)
    ql_MP, qr_MP = _load_rotated(qkv_ptr + q_at, row_M, in_M, stride, cos_MP, sin_MP, HALF)
    do_ME = _rows_of(dout_ptr + q_at, row_M, in_M, HEADS * head_dim, 2 * HALF)
    o_ME = _rows_of(out_ptr + q_at, row_M, in_M, HEADS * head_dim, 2 * HALF)
    lse_M = tl.load(lse_ptr + head * num_rows + row_M, mask=in_M, other=0.0)
    dql_MP = tl.zeros((BLOCK, HALF), tl.float32)
    dqr_MP = tl.zeros((BLOCK, HALF), tl.float32)
    for at in range(start, first + 1, BLOCK):
        row_N = at + tl.arange(0, BLOCK)
        in_N = row_N < stop
        cos_NP, sin_NP = _angles(cos_ptr, sin_ptr, position_ptr, row_N, in_N, HALF)
        kl_NP, kr_NP = _load_rotated(qkv_ptr + k_at, row_N, in_N, stride, cos_NP, sin_NP, HALF)
        v_NE = _rows_of(qkv_ptr + v_at, row_N, in_N, stride, 2 * HALF)
        _, ds_MN = _ds_tile(ql_MP, qr_MP, do_ME, o_ME, lse_M, kl_NP, kr_NP, v_NE, row_M, row_N,
                            stop, scale)  # fmt: skip
        dql_MP = tl.dot(ds_MN, kl_NP, dql_MP, input_precision="ieee")
        dqr_MP = tl.dot(ds_MN, kr_NP, dqr_MP, input_precision="ieee")
    _store_back(dqkv_ptr + q_at, row_M, in_M, stride, dql_MP, dqr_MP, cos_MP, sin_MP, HALF)


@triton.jit
def _backward_short_kernel(
    dout_ptr, qkv_ptr, dqkv_ptr, cos_ptr, sin_ptr, position_ptr, tiles_ptr, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sequences of one tile. A kernel of its own: small programs share a multiprocessor."""
    start, stop, first = _tile(tiles_ptr)
    if (stop > first) & (stop - start <= BLOCK):
        _backward_one(dout_ptr, qkv_ptr, dqkv_ptr, cos_ptr, sin_ptr, position_ptr, start, stop,
                      tl.program_id(0), scale, HEADS, KV_HEADS, HALF, BLOCK)  # fmt: skip


@triton.jit
def _backward_long_kernel(
    dout_ptr, qkv_ptr, out_ptr, lse_ptr, dqkv_ptr, cos_ptr, sin_ptr, position_ptr, tiles_ptr,
    num_rows, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The others. WIDE: two tiles are computed as one, by the program of the first; else each
    tile is a program, first as keys and then as queries."""
    kv_head = tl.program_id(0)
    start, stop, first = _tile(tiles_ptr)
    if (stop > first) & (stop - start > BLOCK):
        if WIDE and stop - start <= 2 * BLOCK:
            if first == start:
                _backward_one(
                    dout_ptr, qkv_ptr, dqkv_ptr, cos_ptr, sin_ptr, position_ptr, start, stop,
                    kv_head, scale, HEADS, KV_HEADS, HALF, 2 * BLOCK,
                )  # fmt: skip
        else:
            _backward_keys(
                dout_ptr, qkv_ptr, out_ptr, lse_ptr, dqkv_ptr, cos_ptr, sin_ptr, position_ptr,
                start, stop, first, kv_head, num_rows, scale, HEADS, KV_HEADS, HALF, BLOCK,
            )  # fmt: skip
            for member in range(HEADS // KV_HEADS):
                _backward_queries(
                    dout_ptr, qkv_ptr, out_ptr, lse_ptr, dqkv_ptr, cos_ptr, sin_ptr,
                    position_ptr, start, stop, first, kv_head * (HEADS // KV_HEADS) + member,
                    num_rows, scale, HEADS, KV_HEADS, HALF, BLOCK,
                )  # fmt: skip


def forward_cuda(
    qkv_TC: Tensor, cos_LP: Tensor, sin_LP: Tensor, position_T: Tensor, tiles_W3: Tensor, heads
) -> tuple[Tensor, Tensor]:
    num_rows, half = qkv_TC.shape[0], heads.head_dim // 2
    out_TC = qkv_TC.new_empty((num_rows, heads.num_heads * heads.head_dim))
    lse_HT = torch.empty((heads.num_heads, num_rows), dtype=torch.float32, device=qkv_TC.device)
    _forward(
        (heads.num_heads, tiles_W3.shape[0], 1),
        (qkv_TC, out_TC, lse_HT, cos_LP, sin_LP, position_T, tiles_W3),
        (num_rows, heads.head_dim**-0.5),
        (heads.num_heads, heads.num_kv_heads, half, TILE_ROWS),
        num_warps=4,
        num_stages=1,
    )
    return out_TC, lse_HT


def backward_cuda(
    dout_TC: Tensor, qkv_TC: Tensor, out_TC: Tensor, lse_HT: Tensor, cos_LP: Tensor,
    sin_LP: Tensor, position_T: Tensor, tiles_W3: Tensor, heads, short_warps: int = 4,
    long_warps: int = 8,
) -> Tensor:  # fmt: skip
    num_rows, half = qkv_TC.shape[0], heads.head_dim // 2
    dqkv_TC = torch.empty_like(qkv_TC)
    grid = (heads.num_kv_heads, tiles_W3.shape[0], 1)
    constants = (heads.num_heads, heads.num_kv_heads, half, TILE_ROWS)
    scale = heads.head_dim**-0.5
    angles = (cos_LP, sin_LP, position_T, tiles_W3)
    _backward_long(
        grid,
        (dout_TC, qkv_TC, out_TC, lse_HT, dqkv_TC, *angles),
        (num_rows, scale),
        (*constants, heads.num_heads == heads.num_kv_heads),
        long_warps,
        num_stages=1,
    )
    _backward_short(
        grid, (dout_TC, qkv_TC, dqkv_TC, *angles), (scale,), constants, short_warps, num_stages=1
    )
    return dqkv_TC


_forward = Launcher(_forward_kernel)
_backward_long, _backward_short = Launcher(_backward_long_kernel), Launcher(_backward_short_kernel)
