"""Multi-task AdamW in plain torch, slot by slot.

Shape suffixes: R pool rows, D features of a row, S slots.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..rows import slot_offsets
from .types import AdamWPool, AdamWResult, AdamWSlots


@torch.no_grad()
def multi_task_adamw_reference_(
    pools: Sequence[AdamWPool], slots: AdamWSlots, zero_grads: bool = True
) -> AdamWResult:
    """As `multi_task_adamw_`; reads the settings on the host."""
    num_slots = slots.step_S.numel()
    norm_S = torch.zeros(num_slots, dtype=torch.float32)
    skipped_S = torch.zeros(num_slots, dtype=torch.bool)
    for slot in range(num_slots):
        if not bool(slots.active_S[slot]):
            continue
        parts = [part for pool in pools if (part := _slot_part(pool, slot)) is not None]
        norm_S[slot] = _norm([part[1] for part in parts])
        if math.isfinite(norm_S[slot]):
            slots.step_S[slot] += 1
            for part in parts:
                _update_(part, slots, slot, float(norm_S[slot]))
        else:
            skipped_S[slot] = True
        if zero_grads:
            for part in parts:
                part[1].zero_()
    device = slots.step_S.device
    return AdamWResult(norm_S.to(device), skipped_S.to(device))


def _slot_part(pool: AdamWPool, slot: int) -> tuple[Tensor, ...] | None:
    offsets = slot_offsets(pool.slot_rows)
    start, stop = offsets[slot], offsets[slot + 1]
    if start == stop:
        return None
    tensors = (pool.param_RD, pool.grad_RD, pool.exp_avg_RD, pool.exp_avg_sq_RD)
    part = tuple(tensor[start:stop] for tensor in tensors)
    return part if pool.compute_copy_RD is None else (*part, pool.compute_copy_RD[start:stop])


def _norm(grads: list[Tensor]) -> Tensor:
    if not grads:
        return torch.zeros(())
    return torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(grad.float()) for grad in grads])
    )


def _update_(part: tuple[Tensor, ...], slots: AdamWSlots, slot: int, norm: float) -> None:
    """torch.optim.AdamW's update after torch.nn.utils.clip_grad_norm_."""
    param, grad, exp_avg, exp_avg_sq, *copies = part
    lr, beta1, beta2, eps, decay, max_norm = (float(values[slot]) for values in slots[:6])
    step = int(slots.step_S[slot])
    clip = min(max_norm / (norm + 1e-6), 1.0) if 0 < max_norm < math.inf else 1.0
    clipped = grad.float() * clip
    param.mul_(1 - lr * decay)
    exp_avg.lerp_(clipped, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(clipped, clipped, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
    for copy in copies:
        copy.copy_(param)
