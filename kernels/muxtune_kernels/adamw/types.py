"""What the multi-task AdamW works on.

Shape suffixes: R pool rows, D features of a row, S slots.
"""

from typing import NamedTuple

from torch import Tensor


class AdamWPool(NamedTuple):
    """One kind of adapter tensor of all slots, as rows; every row belongs to one slot.

    param_RD: float32 [R, D], contiguous: the master copy. Slot s owns the slot_rows[s] rows that
        follow those of the slots before it (for a LoRA A pool slot_rows is slot_ranks; store a B
        pool as [R, O] and pass its transpose to the linear).
    grad_RD: [R, D], contiguous, float32 or bfloat16; read, and cleared on request.
    exp_avg_RD, exp_avg_sq_RD: float32 [R, D], the optimizer's moments.
    compute_copy_RD: optional [R, D] in the model's dtype, rewritten in the same pass.
    """

    param_RD: Tensor
    grad_RD: Tensor
    exp_avg_RD: Tensor
    exp_avg_sq_RD: Tensor
    slot_rows: tuple[int, ...]
    compute_copy_RD: Tensor | None = None


class AdamWSlots(NamedTuple):
    """Per-slot settings, device tensors that the host fills between steps.

    lr_S ... max_grad_norm_S: float64 [S] (float32 hyperparameters such as 0.999 would already
        be off by 1e-5 in 1 - beta); max_grad_norm <= 0 or inf means no clipping.
    step_S: int32 [S], optimizer steps taken; counted up in place where a step is applied.
    active_S: bool [S], whether the slot closes a step now; the others are left untouched.
    """

    lr_S: Tensor
    beta1_S: Tensor
    beta2_S: Tensor
    eps_S: Tensor
    weight_decay_S: Tensor
    max_grad_norm_S: Tensor
    step_S: Tensor
    active_S: Tensor


class AdamWResult(NamedTuple):
    """grad_norm_S: float32 [S], before clipping, 0 where inactive.

    skipped_S: bool [S]; True where an active slot's gradient norm is not finite, so that its
    parameters, moments and step count are unchanged.
    """

    grad_norm_S: Tensor
    skipped_S: Tensor
