"""Each task's own optimizer step: schedule, clipping, AdamW.

Shape suffixes: S adapter slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from muxtune.errors import ConfigError
from muxtune.runtime.bank import SlotPool, TaskState
from muxtune.types import OptimizerSpec
from muxtune_kernels import multi_task_adamw_

SCHEDULES = ("constant", "linear", "cosine")


class StepOutcome(NamedTuple):
    """``grad_norm``: before clipping. ``finite``: else nothing was applied."""

    lr: float
    grad_norm: float
    finite: bool


def learning_rate(spec: OptimizerSpec, step: int, num_steps: int) -> float:
    """The rate of optimizer step ``step`` (from 0), as the schedulers of transformers give it:
    linear warm-up from 0, then constant, linear decay to 0, or half a cosine."""
    if step < spec.warmup_steps:
        return spec.lr * step / max(1, spec.warmup_steps)
    if spec.schedule == "constant":
        return spec.lr
    decay_steps = max(1, num_steps - spec.warmup_steps)
    done = (step - spec.warmup_steps) / decay_steps
    if spec.schedule == "linear":
        return spec.lr * max(0.0, 1 - done)
    if spec.schedule == "cosine":
        return spec.lr * max(0.0, 0.5 * (1 + math.cos(math.pi * done)))
    remedy = f"Choose one of: {', '.join(SCHEDULES)}"
    raise ConfigError("optimizer.schedule", f"'{spec.schedule}' does not exist", remedy)


def close_steps(pool: SlotPool, slots: Sequence[int]) -> dict[int, StepOutcome]:
    """One optimizer step of the tasks in these slots; the others keep accumulating.

    A task whose gradient is not finite is left unchanged and reported; its gradient is cleared.
    """
    states = {slot: state for slot in slots if (state := pool.occupants[slot]) is not None}
    rates = {slot: _rate(state) for slot, state in states.items()}
    _fill_settings(pool, states, rates)
    result = multi_task_adamw_(pool.optimizer_pools, pool.settings)
    norms, skipped = result.grad_norm_S.tolist(), result.skipped_S.tolist()
    for slot, state in states.items():
        state.step += not skipped[slot]
        state.is_open = False
    return {slot: StepOutcome(rates[slot], norms[slot], not skipped[slot]) for slot in states}


def _rate(state: TaskState) -> float:
    return learning_rate(state.task.optimizer, state.step, state.num_steps)


def _fill_settings(pool: SlotPool, states: dict[int, TaskState], rates: dict[int, float]) -> None:
    """Host values into the pool's device tensors, which keep their addresses."""
    columns = [[0.0] * len(pool.slots) for _ in range(6)]
    active = [False] * len(pool.slots)
    for slot, state in states.items():
        spec = state.task.optimizer
        values = (
            rates[slot],
            spec.beta1,
            spec.beta2,
            spec.eps,
            spec.weight_decay,
            spec.max_grad_norm,
        )
        for column, value in zip(columns, values, strict=True):
            column[slot] = value
        active[slot] = True
    for tensor, column in zip(pool.settings[:6], columns, strict=True):
        tensor.copy_(torch.tensor(column, dtype=torch.float64))
    pool.settings.active_S.copy_(torch.tensor(active))
