"""An executor with one instance on one GPU, driven by hand-made plans; random tokens as data."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from muxtune.cost.shapes import ModelShape
from muxtune.planning.step_builder import StepBuilder
from muxtune.runtime import random_models
from muxtune.runtime.backbone import BackboneStore, random_weights
from muxtune.runtime.bank import adapter_slot
from muxtune.runtime.executor import TorchExecutor
from muxtune.runtime.options import TorchOptions
from muxtune.runtime.records import Recorder
from muxtune.types import (
    AdapterSpec,
    DataSpec,
    DispatchRule,
    Estimate,
    Event,
    EventKind,
    HTask,
    HTaskTurn,
    InstanceSpec,
    OptimizerSpec,
    Plan,
    Prediction,
    ReplicaShape,
    ShapeKey,
    TaskSpec,
)
from muxtune.workload.encoding import EncodedSequence
from muxtune.workload.random_texts import RandomTexts

INSTANCE, MODEL = "gpu", "model"
ENDS = {EventKind.TASK_DONE, EventKind.TASK_FAILED, EventKind.TASK_CANCELLED}
CHUNK_TOKENS = 64


class Texts(RandomTexts):
    """``broken``: tasks whose data raises from now on."""

    broken: frozenset[str] = frozenset()

    def sequence(self, task_id: str, index: int) -> EncodedSequence:
        if task_id in self.broken:
            raise OSError("planted: the data cannot be read")
        return super().sequence(task_id, index)


def store_of(shape: ModelShape, device: str) -> BackboneStore:
    random_models.LARGE_PARAMETERS = 0  # drawn where they are used, in seconds
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    where = torch.device(device)
    return BackboneStore({MODEL: random_weights(shape, 0, where, dtype)}, where, dtype)


def lora_task(task_id: str, histogram: str, steps: int, **adapter: Any) -> TaskSpec:
    """Batch 8, sequences of up to 256 tokens; ``adapter``: fields of ``AdapterSpec``, and
    ``accumulation``."""
    accumulation = adapter.pop("accumulation", 1)
    spec = AdapterSpec(**{"rank": 16, "alpha": 32.0, "targets": ("all-linear",), **adapter})
    return TaskSpec(
        task_id,
        MODEL,
        adapter=spec,
        data=DataSpec(histogram=histogram, max_length_tokens=256),
        optimizer=OptimizerSpec(lr=1e-3),
        batch_size=8,
        accumulation=accumulation,
        num_steps=steps,
        seed=sum(map(ord, task_id)),
    )


def htask_of(tasks: Sequence[TaskSpec | None], quota: int) -> HTask:
    """A slot each, as large as the task; None leaves a slot like the one before it free."""
    slots, slot_of = [], {}
    for task in tasks:
        slots.append(slots[-1] if task is None else adapter_slot(task))
        if task is not None:
            slot_of[task.task_id] = len(slots) - 1
    shape = ShapeKey(CHUNK_TOKENS, quota * len(slots), tuple(slots))
    return HTask((shape,), slot_of, dict.fromkeys(slot_of, quota))


def plan_of(htasks: Sequence[HTask], epoch: int = 0) -> Plan:
    zero = Estimate(0.0, 0.0, 0.0)
    prediction = Prediction(zero, 0.0, 0.0, zero, {}, {}, {}, 0.0)
    turns = tuple(HTaskTurn(index, None) for index in range(len(htasks)))
    return Plan(
        INSTANCE, epoch, frozenset(), (ReplicaShape(),), tuple(htasks), turns,
        DispatchRule.SINGLE, prediction,
    )  # fmt: skip


class Bench:
    def __init__(self, store: BackboneStore, vocab: int, **options: Any) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.texts, self.recorder = Texts(vocab), Recorder()
        settings = {"evaluate_tokens": 0, "checkpoint_steps": 0, **options}
        self.executor = TorchExecutor(
            StepBuilder(), store, self.texts, TorchOptions(self.folder, **settings),
            [self.recorder],
        )  # fmt: skip
        self.events: list[Event] = []
        self.executor.start(InstanceSpec(INSTANCE, MODEL, "gpu", 1 << 60))
        self.until(lambda: bool(self.of(EventKind.INSTANCE_READY)))

    def close(self) -> None:
        self.executor.stop(INSTANCE)
        self.executor.close()
        shutil.rmtree(self.folder)

    def of(self, kind: EventKind) -> list[Event]:
        return [event for event in self.events if event.kind is kind]

    def until(self, is_time: Callable[[], bool]) -> None:
        while not is_time():
            self.events += self.executor.wait(self.executor.now_ns + 2_000_000)

    def prepare(self, tasks: Sequence[TaskSpec]) -> None:
        for task in tasks:
            self.executor.prepare(task)
        ids = {task.task_id for task in tasks}
        self.until(lambda: ids <= {e.task_id for e in self.of(EventKind.TASK_READY)})

    def until_step(self, task_id: str, step: int) -> None:
        self.until(lambda: len(self.recorder.losses(task_id)) >= step)

    def until_ended(self, tasks: Sequence[TaskSpec]) -> None:
        ids = {task.task_id for task in tasks}
        self.until(lambda: ids <= {e.task_id for e in self.events if e.kind in ENDS})

    def run(self, tasks: Sequence[TaskSpec], htask: HTask) -> None:
        self.prepare(tasks)
        self.executor.apply(plan_of([htask]))
        self.until_ended(tasks)

    def replays(self) -> dict[int, int]:
        """Of each size of the captured step of the plan that ran last."""
        (instance,) = self.executor._instances.values()
        steps = [getattr(runner, "steps", None) for runner in instance._runners]
        return {n: count for item in steps if item for n, count in item.replays.items()}

    def weights(self, task: TaskSpec) -> dict[tuple[str, str], torch.Tensor]:
        state = self.executor.tasks[task.task_id].state
        assert state is not None
        return {key: values.param.clone().cpu() for key, values in state.tensors.items()}


def gap(left: dict, right: dict) -> float:
    """Norm-relative, over all of an adapter."""
    difference = sum(float((left[key] - right[key]).double().norm() ** 2) for key in left)
    return (difference / sum(float(right[key].double().norm() ** 2) for key in right)) ** 0.5
