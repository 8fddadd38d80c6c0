"""Step configurations as data: which tasks, fused how, in what packing, on which model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from muxtune.cost.shapes import ModelShape
from muxtune.types import (
    AdapterSlot,
    AdapterSpec,
    DataSpec,
    DispatchRule,
    Estimate,
    HTask,
    HTaskTurn,
    OptimizerSpec,
    PackRule,
    Plan,
    Prediction,
    ReplicaShape,
    ShapeKey,
    TaskSpec,
)
from muxtune.workload.synthetic import histogram

# What each method is trained on; prefixes sit on no linear.
TARGETS: Mapping[str, tuple[str, ...]] = {
    "lora": ("all-linear",),
    "ia3": ("k_proj", "v_proj", "down_proj"),
    "bottleneck": ("o_proj", "down_proj"),
    "prefix": (),
}
INSTANCE = "bench"
_NEVER_ENDS = 1 << 20


class StepTask(NamedTuple):
    """``histogram``: of ``muxtune.workload.synthetic``."""

    method: str = "lora"
    rank: int = 16
    histogram: str = "openbookqa"
    max_length_tokens: int = 256
    batch_size: int = 8
    dropout: float = 0.0
    targets: tuple[str, ...] = ()

    def spec(self, task_id: str, model: str, seed: int) -> TaskSpec:
        """Whose learning rate is too small for random weights to go astray."""
        targets = self.targets or TARGETS[self.method]
        adapter = AdapterSpec(self.method, self.rank, 2.0 * self.rank, self.dropout, targets)
        data = DataSpec(histogram=self.histogram, max_length_tokens=self.max_length_tokens)
        return TaskSpec(
            task_id, model, adapter=adapter, data=data, optimizer=OptimizerSpec(lr=1e-6),
            batch_size=self.batch_size, num_steps=_NEVER_ENDS, seed=seed,
        )  # fmt: skip


class StepCase(NamedTuple):
    """``htasks``: members of each, by place in ``tasks``. ``micro_batch_tokens``: rows of one
    micro-batch, divided evenly among the members; at least their longest sequences."""

    name: str
    shape: ModelShape
    tasks: tuple[StepTask, ...]
    htasks: tuple[tuple[int, ...], ...]
    chunk_tokens: int = 64
    micro_batch_tokens: int = 2048
    packing: str = PackRule.CHUNK
    labels: Mapping[str, Any] = {}

    def specs(self) -> dict[str, TaskSpec]:
        return {
            task_name(index): task.spec(task_name(index), self.shape.name, index)
            for index, task in enumerate(self.tasks)
        }

    def plan(self) -> Plan:
        """Each hTask runs until each of its tasks closes a step, one after the other."""
        return plan_of([self._htask(members) for members in self.htasks])

    def _htask(self, members: Sequence[int]) -> HTask:
        tasks = [self.tasks[index] for index in members]
        share = self.micro_batch_tokens // (self.chunk_tokens * len(members))
        if self.packing == PackRule.PAD:
            quota = max(1, share)
        else:
            quota = max(share, *(-(-t.max_length_tokens // self.chunk_tokens) for t in tasks))
        slots = tuple(
            AdapterSlot(t.method, t.rank, t.targets or TARGETS[t.method], t.dropout > 0)
            for t in tasks
        )
        shape = ShapeKey(self.chunk_tokens, quota * len(members), slots)
        slot_of = {task_name(index): slot for slot, index in enumerate(members)}
        return HTask((shape,), slot_of, dict.fromkeys(slot_of, quota), PackRule(self.packing))


def mean_tokens(name: str, longest: int) -> float:
    """Of a histogram's sequences, cut to ``longest`` tokens."""
    table = histogram(name)
    return float(np.average(np.minimum(table.lengths_tokens, longest), weights=table.counts))


def task_name(index: int) -> str:
    return f"t{index:02d}"


def plan_of(htasks: Sequence[HTask], epoch: int = 0) -> Plan:
    """On one GPU, with no prediction."""
    zero = Estimate(0.0, 0.0, 0.0)
    nothing = Prediction(zero, 0.0, 0.0, zero, {}, {}, {}, 0.0)
    turns = tuple(HTaskTurn(index, None) for index in range(len(htasks)))
    return Plan(
        INSTANCE, epoch, frozenset(), (ReplicaShape(),), tuple(htasks), turns,
        DispatchRule.SINGLE, nothing,
    )  # fmt: skip


def case_to_json(case: StepCase) -> dict[str, Any]:
    return case._asdict() | {
        "shape": case.shape._asdict(),
        "tasks": [task._asdict() for task in case.tasks],
        "packing": str(case.packing),
    }


def case_from_json(raw: Mapping[str, Any]) -> StepCase:
    tasks = tuple(StepTask(**{**t, "targets": tuple(t["targets"])}) for t in raw["tasks"])
    htasks = tuple(tuple(members) for members in raw["htasks"])
    shape = ModelShape(**raw["shape"])
    return StepCase(**{**raw, "shape": shape, "tasks": tasks, "htasks": htasks})
