"""Dispatch of the multi-task AdamW by device."""

from collections.abc import Sequence

from .reference import multi_task_adamw_reference_
from .types import AdamWPool, AdamWResult, AdamWSlots

__all__ = ["AdamWPool", "AdamWResult", "AdamWSlots", "adamw_tables", "multi_task_adamw_"]


def adamw_tables(pools: Sequence[AdamWPool]) -> object:
    """What a captured `multi_task_adamw_` over CUDA pools points to: hold it as long as the graph
    lives, for the cache of these tables lets the oldest ones go."""
    from .kernels import tables_of

    return tables_of([pool for pool in pools if pool.param_RD.numel()])


def multi_task_adamw_(
    pools: Sequence[AdamWPool], slots: AdamWSlots, zero_grads: bool = True
) -> AdamWResult:
    """One optimizer step of every active slot, in place; (grad_norm_S, skipped_S).

    For each active slot, as `torch.nn.utils.clip_grad_norm_` over all its rows in all pools
    followed by `torch.optim.AdamW`: own learning rate, betas, eps, decay, clipping norm and step
    count. Inactive slots are not touched. Active slots whose gradient norm is not finite are
    skipped and flagged. `zero_grads` clears the gradients of active slots (skipped ones too), so
    that gradients of slots that do not close a step keep accumulating.
    Raises ValueError when a pool's rows do not match its slot_rows.
    """
    num_slots = slots.step_S.numel()
    for pool in pools:
        if len(pool.slot_rows) != num_slots or sum(pool.slot_rows) != pool.param_RD.shape[0]:
            raise ValueError(f"slot_rows {pool.slot_rows} of a pool {tuple(pool.param_RD.shape)}")
    if slots.step_S.is_cuda:
        from .kernels import multi_task_adamw_cuda_  # triton is needed on CUDA only

        return multi_task_adamw_cuda_(pools, slots, zero_grads)
    return multi_task_adamw_reference_(pools, slots, zero_grads)
