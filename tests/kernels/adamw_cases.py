"""Pools and settings that the AdamW tests share."""

import torch

from muxtune_kernels import AdamWPool, AdamWSlots

SLOT_ROWS = ((4, 2, 3, 1), (1, 2, 0, 3), (0, 0, 1, 0))
WIDTHS = (70, 2100, 10)
S = 4


def slots_of(device: torch.device | str = "cpu") -> AdamWSlots:
    def column(*values: float) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    return AdamWSlots(
        lr_S=column(1e-3, 2e-3, 1e-3, 1e-2),
        beta1_S=column(0.9, 0.8, 0.9, 0.95),
        beta2_S=column(0.999, 0.99, 0.999, 0.9),
        eps_S=column(1e-8, 1e-6, 1e-8, 1e-8),
        weight_decay_S=column(0.01, 0.1, 0, 0),
        max_grad_norm_S=column(1.0, 0.0, float("inf"), 1e6),
        step_S=torch.zeros(S, dtype=torch.int32, device=device),
        active_S=torch.ones(S, dtype=torch.bool, device=device),
    )


def pools_of(
    device: torch.device | str = "cpu", copy: torch.dtype | None = None, seed: int = 0
) -> list[AdamWPool]:
    generator = torch.Generator().manual_seed(seed)
    pools = []
    for rows, width in zip(SLOT_ROWS, WIDTHS, strict=True):
        shape = (sum(rows), width)
        param, grad = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
        compute_copy = None if copy is None else torch.zeros(shape, dtype=copy, device=device)
        first, second = (torch.zeros(shape, device=device) for _ in range(2))
        pools.append(AdamWPool(param, grad, first, second, rows, compute_copy))
    return pools


def fresh_grads(pools: list[AdamWPool], seed: int) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for pool in pools:
        pool.grad_RD.copy_(torch.randn(pool.grad_RD.shape, generator=generator))
