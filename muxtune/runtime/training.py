"""One pass of an hTask: forward, per-task losses, backward into the tasks' own gradients.

Shape suffixes: T rows, D model features, S adapter slots.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, nullcontext

import torch

from muxtune.runtime.backbone import Backbone
from muxtune.runtime.bank import SlotPool
from muxtune.runtime.batch import PassTensors
from muxtune.runtime.passes import AdapterPass
from muxtune_kernels import multi_task_cross_entropy, multi_task_nll

Mark = Callable[[str], object]  # called with a phase's name when the phase begins


def train_pass(
    backbone: Backbone,
    pool: SlotPool,
    tensors: PassTensors,
    deterministic: bool,
    mark: Mark = lambda phase: None,
) -> list[float]:
    """The slots' losses (sums over target rows divided by their optimizer batch's targets).

    Gradients are added to the pool's accumulated ones, all or none: an exception leaves them as
    they were. A loss that is not finite touches its own slot's gradients only.
    """
    current = AdapterPass(
        pool,
        tensors.rows,
        tensors.dropout,
        deterministic,
        anchor=torch.zeros((), device=backbone.device, requires_grad=True),
    )
    mark("forward")
    with _running(backbone, current):
        hidden_TD = backbone.hidden_TD(tensors.input_ids_T, tensors.position_ids_T, tensors.packed)
        loss_S = multi_task_cross_entropy(
            hidden_TD,
            backbone.lm_head_VD,
            tensors.labels_T,
            tensors.rows.slot_of_row_T,
            tensors.loss_scale_S,
            tensors.num_slots,
        )
        losses = loss_S.tolist()
        mark("backward")
        if loss_S.requires_grad:
            loss_S.sum().backward()
    current.commit()
    return losses


@torch.no_grad()
def score_pass(
    backbone: Backbone, pool: SlotPool | None, tensors: PassTensors, deterministic: bool
) -> tuple[list[float], list[int]]:
    """Per slot: sum of negative log-likelihoods (nats) and number of targets; no dropout.
    Without a pool the base model is scored."""
    current = (
        None if pool is None else AdapterPass(pool, tensors.rows, None, deterministic, anchor=None)
    )
    with _running(backbone, current) if current else nullcontext():
        hidden_TD = backbone.hidden_TD(tensors.input_ids_T, tensors.position_ids_T, tensors.packed)
    nll_S, targets_S = multi_task_nll(
        hidden_TD,
        backbone.lm_head_VD,
        tensors.labels_T,
        tensors.rows.slot_of_row_T,
        tensors.num_slots,
    )
    return nll_S.tolist(), targets_S.tolist()


@contextmanager
def _running(backbone: Backbone, current: AdapterPass):
    backbone.state.current = current
    try:
        yield
    finally:
        backbone.state.current = None
