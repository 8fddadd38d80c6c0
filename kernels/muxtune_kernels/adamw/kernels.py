"""Three launches for all pools and slots: partial norms, per-slot scalars, update.

Pools are reached through a table of addresses, so the number of launches does not grow with the
number of adapted linears. A slot's partial sums are added in an order that counts from its own
first row in every pool: its norm does not depend on which slot it sits in.

Shape suffixes: P pools, S slots, N elements of a block, J partial sums added at one time.
"""

# Triton's jit hides launch options and constexpr parameters from the type checker.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lasting import lasting
from ..rows import slot_offsets
from .types import AdamWPool, AdamWResult, AdamWSlots

_BLOCK = 2048
_GRAD, _PARAM, _AVG, _AVG_SQ, _COPY = (tl.constexpr(i) for i in range(5))
_SCALARS = tl.constexpr(9)


@triton.jit
def _place(block_pool_ptr, pool_start_ptr, pool_blocks_ptr, pool_row_ptr, pool_width_ptr,
           row_slot_ptr, BLOCK: tl.constexpr):  # fmt: skip
    """(pool, slot, element offsets, which of them lie in the row) of this program's block."""
    pid = tl.program_id(0)
    pool = tl.load(block_pool_ptr + pid)
    local = pid - tl.load(pool_start_ptr + pool)
    blocks = tl.load(pool_blocks_ptr + pool)
    width = tl.load(pool_width_ptr + pool)
    row = local // blocks
    column_N = (local % blocks) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(row_slot_ptr + tl.load(pool_row_ptr + pool) + row)
    return pool, slot, row.to(tl.int64) * width + column_N, column_N < width


@triton.jit
def _pointer(address_ptr, num_pools, pool, KIND: tl.constexpr, DTYPE: tl.constexpr):
    return tl.load(address_ptr + KIND * num_pools + pool).to(tl.pointer_type(DTYPE))


@triton.jit
def _square_sums_kernel(
    address_ptr, num_pools, block_pool_ptr, pool_start_ptr, pool_blocks_ptr, pool_row_ptr,
    pool_width_ptr, row_slot_ptr, active_ptr, sum_ptr, GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pool, slot, at_N, in_N = _place(block_pool_ptr, pool_start_ptr, pool_blocks_ptr, pool_row_ptr,
                                    pool_width_ptr, row_slot_ptr, BLOCK)  # fmt: skip
    if tl.load(active_ptr + slot) != 0:
        grad_ptr = _pointer(address_ptr, num_pools, pool, _GRAD, GRAD)
        grad_N = tl.load(grad_ptr + at_N, mask=in_N, other=0.0).to(tl.float32)
        tl.store(sum_ptr + tl.program_id(0), tl.sum(grad_N * grad_N, 0))


@triton.jit
def _slot_kernel(
    sum_ptr, pool_start_ptr, pool_blocks_ptr, slot_row_ptr, lr_ptr, beta1_ptr, beta2_ptr, eps_ptr,
    decay_ptr, max_norm_ptr, step_ptr, active_ptr, scalar_ptr, norm_ptr, skipped_ptr, num_pools,
    num_slots, max_sums, POOLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One slot a program: its norm, whether it steps, and the update's scalars in float64."""
    slot = tl.program_id(0)
    active = tl.load(active_ptr + slot) != 0
    p_P = tl.arange(0, POOLS)
    in_P = p_P < num_pools
    blocks_P = tl.load(pool_blocks_ptr + p_P, mask=in_P, other=0)
    at_P = slot_row_ptr + p_P * (num_slots + 1) + slot
    row_P = tl.load(at_P, mask=in_P, other=0)
    count_P = (tl.load(at_P + 1, mask=in_P, other=0) - row_P) * blocks_P
    first_P = tl.load(pool_start_ptr + p_P, mask=in_P, other=0) + row_P * blocks_P
    total_PJ = tl.zeros((POOLS, BLOCK), tl.float32)
    if active:
        for start in range(0, max_sums, BLOCK):
            j_J = start + tl.arange(0, BLOCK)
            total_PJ += tl.load(sum_ptr + first_P[:, None] + j_J[None, :],
                                mask=j_J[None, :] < count_P[:, None], other=0.0)  # fmt: skip
    norm = tl.sqrt(tl.sum(tl.sum(total_PJ, 1), 0))
    finite = norm < float("inf")
    steps = active & finite
    step = tl.load(step_ptr + slot) + steps.to(tl.int32)
    tl.store(step_ptr + slot, step)
    tl.store(norm_ptr + slot, norm)
    tl.store(skipped_ptr + slot, (active & (finite == 0)).to(tl.int8))
    lr = tl.load(lr_ptr + slot).to(tl.float64)
    beta1 = tl.load(beta1_ptr + slot).to(tl.float64)
    beta2 = tl.load(beta2_ptr + slot).to(tl.float64)
    max_norm = tl.load(max_norm_ptr + slot).to(tl.float64)
    clip = tl.minimum(max_norm / (norm.to(tl.float64) + 1e-6), 1.0)
    clip = tl.where((max_norm > 0) & (max_norm < float("inf")), clip, 1.0)
    count = tl.maximum(step, 1).to(tl.float64)
    bias1 = 1.0 - tl.where(beta1 > 0, tl.exp(count * tl.log(tl.maximum(beta1, 1e-300))), 0.0)
    bias2 = 1.0 - tl.where(beta2 > 0, tl.exp(count * tl.log(tl.maximum(beta2, 1e-300))), 0.0)
    out = scalar_ptr + slot * _SCALARS
    tl.store(out, steps.to(tl.float32))
    tl.store(out + 1, clip.to(tl.float32))
    tl.store(out + 2, (1.0 - lr * tl.load(decay_ptr + slot).to(tl.float64)).to(tl.float32))
    tl.store(out + 3, (1.0 - beta1).to(tl.float32))
    tl.store(out + 4, beta2.to(tl.float32))
    tl.store(out + 5, (1.0 - beta2).to(tl.float32))
    tl.store(out + 6, tl.sqrt(bias2).to(tl.float32))
    tl.store(out + 7, tl.load(eps_ptr + slot).to(tl.float32))
    tl.store(out + 8, (lr / bias1).to(tl.float32))


@triton.jit
def _update_kernel(
    address_ptr, num_pools, block_pool_ptr, pool_start_ptr, pool_blocks_ptr, pool_row_ptr,
    pool_width_ptr, row_slot_ptr, active_ptr, scalar_ptr, GRAD: tl.constexpr, COPY: tl.constexpr,
    ZERO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pool, slot, at_N, in_N = _place(block_pool_ptr, pool_start_ptr, pool_blocks_ptr, pool_row_ptr,
                                    pool_width_ptr, row_slot_ptr, BLOCK)  # fmt: skip
    if tl.load(active_ptr + slot) != 0:
        grad_ptr = _pointer(address_ptr, num_pools, pool, _GRAD, GRAD) + at_N
        scalars = scalar_ptr + slot * _SCALARS
        if tl.load(scalars) != 0:
            param_ptr = _pointer(address_ptr, num_pools, pool, _PARAM, tl.float32) + at_N
            avg_ptr = _pointer(address_ptr, num_pools, pool, _AVG, tl.float32) + at_N
            avg_sq_ptr = _pointer(address_ptr, num_pools, pool, _AVG_SQ, tl.float32) + at_N
            grad_N = tl.load(grad_ptr, mask=in_N, other=0.0).to(tl.float32)
            grad_N *= tl.load(scalars + 1)
            param_N = tl.load(param_ptr, mask=in_N, other=0.0) * tl.load(scalars + 2)
            avg_N = tl.load(avg_ptr, mask=in_N, other=0.0)
            avg_N += (grad_N - avg_N) * tl.load(scalars + 3)
            avg_sq_N = tl.load(avg_sq_ptr, mask=in_N, other=0.0) * tl.load(scalars + 4)
            avg_sq_N += grad_N * grad_N * tl.load(scalars + 5)
            denominator_N = tl.sqrt_rn(avg_sq_N) / tl.load(scalars + 6) + tl.load(scalars + 7)
            param_N -= tl.load(scalars + 8) * (avg_N / denominator_N)
            tl.store(param_ptr, param_N, mask=in_N)
            tl.store(avg_ptr, avg_N, mask=in_N)
            tl.store(avg_sq_ptr, avg_sq_N, mask=in_N)
            if COPY is not None:
                copy_ptr = _pointer(address_ptr, num_pools, pool, _COPY, COPY) + at_N
                tl.store(copy_ptr, param_N.to(COPY), mask=in_N)
        if ZERO:
            tl.store(grad_ptr, tl.zeros((BLOCK,), GRAD), mask=in_N)


class _Tables(NamedTuple):
    address: Tensor
    block_pool: Tensor
    pool_start: Tensor
    pool_blocks: Tensor
    pool_row: Tensor
    pool_width: Tensor
    row_slot: Tensor
    slot_row: Tensor
    max_sums: int


_TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
Shape = tuple[int, int, tuple[int, ...]]


@functools.lru_cache(maxsize=64)
@lasting
def _tables(addresses: tuple[int, ...], shapes: tuple[Shape, ...], device: torch.device) -> _Tables:
    """Built once for a set of pools, outside a capture. Shape: (rows, width, slot_rows)."""
    blocks = [triton.cdiv(width, _BLOCK) for _, width, _ in shapes]
    counts = [rows * per_row for (rows, _, _), per_row in zip(shapes, blocks, strict=True)]
    pool_row = slot_offsets([rows for rows, _, _ in shapes])[:-1]
    row_slot = [s for _, _, owned in shapes for s, rows in enumerate(owned) for _ in range(rows)]
    slot_row = [offset for _, _, owned in shapes for offset in slot_offsets(owned)]
    per_slot = [n * b for (_, _, owned), b in zip(shapes, blocks, strict=True) for n in owned]

    def int32(values) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    block_pool = torch.repeat_interleave(
        torch.arange(len(shapes), dtype=torch.int32), torch.tensor(counts)
    ).to(device)
    address = torch.tensor(addresses, dtype=torch.int64, device=device)
    return _Tables(
        address, block_pool, int32(slot_offsets(counts)[:-1]), int32(blocks), int32(pool_row),
        int32([width for _, width, _ in shapes]), int32(row_slot), int32(slot_row),
        max(per_slot, default=0),
    )  # fmt: skip


def tables_of(pools: Sequence[AdamWPool]) -> _Tables | None:
    if not pools:
        return None
    copies = [p.param_RD if p.compute_copy_RD is None else p.compute_copy_RD for p in pools]
    kinds = ([p.grad_RD for p in pools], [p.param_RD for p in pools],
             [p.exp_avg_RD for p in pools], [p.exp_avg_sq_RD for p in pools], copies)  # fmt: skip
    addresses = tuple(tensor.data_ptr() for kind in kinds for tensor in kind)
    device = pools[0].param_RD.device
    return _tables(addresses, tuple((*p.param_RD.shape, p.slot_rows) for p in pools), device)


def _one(values: set, what: str):
    if len(values) != 1:
        raise ValueError(f"pools differ in the dtype of their {what}: {values}")
    return values.pop()


def multi_task_adamw_cuda_(
    pools: Sequence[AdamWPool], slots: AdamWSlots, zero_grads: bool
) -> AdamWResult:
    """As `multi_task_adamw_`. All pools must share one gradient and one copy dtype."""
    num_slots, device = slots.step_S.numel(), slots.step_S.device
    norm_S = torch.zeros(num_slots, dtype=torch.float32, device=device)
    skipped_S = torch.zeros(num_slots, dtype=torch.int8, device=device)
    pools = [pool for pool in pools if pool.param_RD.numel()]
    if not pools or num_slots == 0:
        return AdamWResult(norm_S, skipped_S.bool())
    grad_type = _TRITON_TYPES[_one({p.grad_RD.dtype for p in pools}, "gradients")]
    copies = {None if (c := p.compute_copy_RD) is None else c.dtype for p in pools}
    copy_type = _TRITON_TYPES.get(_one(copies, "compute copies"))
    t = tables_of(pools)
    assert t is not None
    num_blocks, num_pools = t.block_pool.numel(), len(pools)
    active_S = slots.active_S.view(torch.int8)
    place = (t.address, num_pools, t.block_pool, t.pool_start, t.pool_blocks, t.pool_row,
             t.pool_width, t.row_slot, active_S)  # fmt: skip
    sums = torch.empty(num_blocks, dtype=torch.float32, device=device)
    scalars = torch.empty((num_slots, _SCALARS.value), dtype=torch.float32, device=device)
    _square_sums_kernel[(num_blocks,)](*place, sums, grad_type, _BLOCK)
    _slot_kernel[(num_slots,)](
        sums, t.pool_start, t.pool_blocks, t.slot_row, *slots[:6], slots.step_S, active_S, scalars,
        norm_S, skipped_S, num_pools, num_slots, t.max_sums, triton.next_power_of_2(num_pools), 16,
    )  # fmt: skip
    _update_kernel[(num_blocks,)](*place, scalars, grad_type, copy_type, zero_grads, _BLOCK)
    return AdamWResult(norm_S, skipped_S.bool())
