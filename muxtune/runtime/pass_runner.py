"""How an hTask's micro-batches are computed: the contract, and the eager implementation.

A runner owns one pool of adapters. ``start`` computes a micro-batch and takes the optimizer steps
that it closes; the result may come later, so that a device never waits for the host. Runners:

- ``EagerRunner``: autograd, op by op; any model and method; its results are there at once;
- ``captured_runner.CapturedRunner``: the whole step as one program, a CUDA graph on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from muxtune.runtime.backbone import Backbone
from muxtune.runtime.bank import AdapterPool, SlotPool, TaskState
from muxtune.runtime.batch import DropoutSeed, PassTensors, Placed, lay_out
from muxtune.runtime.optimizer import StepOutcome, close_steps
from muxtune.runtime.training import Mark, train_pass
from muxtune.types import MicroBatch


class PassWork(NamedTuple):
    """A micro-batch of live tasks only. ``placed``: sequences of the tasks that have rows in it.
    ``slot_of``: the slots of these tasks and of those in ``closing``, which take an optimizer
    step after it (with or without rows)."""

    micro_batch: MicroBatch
    placed: Mapping[str, Sequence[Placed]]
    slot_of: Mapping[str, int]
    closing: tuple[str, ...]

    @property
    def task_ids(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.placed, *self.closing]))


class PassResult(NamedTuple):
    """``losses``: of tasks with rows, a part of their optimizer batch's mean. ``outcomes``: of
    tasks that took a step; one whose loss was not finite may be missing."""

    losses: Mapping[str, float]
    outcomes: Mapping[str, StepOutcome]


class PendingPass(Protocol):
    def result(self) -> PassResult:
        """Waits for the device if it must. Counts the tasks' steps (``TaskState.step``); called
        once, in the order in which passes were started."""
        ...


class PassRunner(Protocol):
    """``depth``: passes that may be started before the first one's result is read. ``phases``:
    whether ``start`` marks phases of work that is over when it returns."""

    depth: int
    phases: bool

    @property
    def pool(self) -> AdapterPool: ...

    def start(self, work: PassWork, mark: Mark) -> PendingPass:
        """All or nothing: an exception leaves weights, gradients and counts as they were.

        A loss or a gradient norm that is not finite touches its own task only, whose weights
        stay as they are.
        """
        ...


class Done(NamedTuple):
    """The result of a pass that is over."""

    value: PassResult

    def result(self) -> PassResult:
        return self.value


class EagerRunner:
    """Autograd through the backbone's modules, then one optimizer call."""

    depth, phases = 0, True

    def __init__(self, backbone: Backbone, pool: SlotPool, deterministic: bool) -> None:
        self.backbone, self.pool, self.deterministic = backbone, pool, deterministic

    def start(self, work: PassWork, mark: Mark) -> PendingPass:
        losses: dict[str, float] = {}
        if work.placed:
            tensors = tensors_of(work, self.pool, self.backbone.pad_id, self.backbone.device)
            by_slot = train_pass(self.backbone, self.pool, tensors, self.deterministic, mark)
            losses = {task_id: by_slot[work.slot_of[task_id]] for task_id in work.placed}
            for task_id in work.placed:
                state_of(work, self.pool, task_id).is_open = True
        closing = [t for t in work.closing if math.isfinite(losses.get(t, 0.0))]
        outcomes = {}
        if closing:
            mark("optimizer")
            by_slot = close_steps(self.pool, [work.slot_of[task_id] for task_id in closing])
            outcomes = {task_id: by_slot[work.slot_of[task_id]] for task_id in closing}
        return Done(PassResult(losses, outcomes))


def state_of(work: PassWork, pool: AdapterPool, task_id: str) -> TaskState:
    state = pool.occupants[work.slot_of[task_id]]
    assert state is not None
    return state


def tensors_of(
    work: PassWork, pool: SlotPool, pad_id: int, device: torch.device | str
) -> PassTensors:
    """The input of an eager pass."""

    def seed(task_id: str) -> DropoutSeed:
        task = state_of(work, pool, task_id).task
        return DropoutSeed(task.seed, work.micro_batch.steps[task_id], task.adapter.dropout)

    return lay_out(
        work.micro_batch,
        [item for items in work.placed.values() for item in items],
        work.slot_of,
        {work.slot_of[task_id]: seed(task_id) for task_id in work.placed},
        len(pool.slots),
        pad_id,
        device,
        pool.virtual,
    )
