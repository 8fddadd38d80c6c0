"""The runtime on CUDA: the same code above the op level, bfloat16 weights, varlen attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from muxtune.runtime.backbone import BackboneStore, random_weights
from muxtune.types import EventKind
from tests.runtime.runtime_helpers import (
    TINY,
    Bench,
    make_htask,
    make_plan,
    make_store,
    make_task,
    worst_gap,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS = 20


@pytest.fixture(scope="module")
def cuda_store() -> BackboneStore:
    return BackboneStore({"tiny": random_weights(TINY)}, "cuda", torch.bfloat16)


def tasks_of(dropout: float):
    return [
        make_task("a", num_steps=STEPS, dropout=dropout, rank=16),
        make_task(
            "b", num_steps=STEPS, dropout=dropout, rank=8, targets=("all-linear",), accumulation=2
        ),
        make_task("c", num_steps=STEPS, dropout=dropout, rank=16, targets=("down_proj", "q_proj")),
    ]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_loss_curves_are_those_of_the_cpu(
    cuda_store: BackboneStore, tmp_path: Path, dropout: float
) -> None:
    """The masks are the same on both, so dropout does not blur the comparison."""
    tasks = tasks_of(dropout)
    plan = make_plan([make_htask(tasks, 32, 2)])
    curves = []
    for name, store in (("cuda", cuda_store), ("cpu", make_store())):
        bench = Bench(tmp_path / name, store, evaluate_tokens=100)
        bench.run(plan, *tasks)
        assert bench.done() == {"a", "b", "c"}
        curves.append({task.task_id: bench.recorder.losses(task.task_id) for task in tasks})
    for task in tasks:
        on_cuda, on_cpu = (curve[task.task_id] for curve in curves)
        assert on_cuda == pytest.approx(on_cpu, abs=0.05)
        assert on_cpu[0] - on_cpu[-1] != pytest.approx(0.0, abs=0.02)


def test_same_shape_is_bit_for_bit_alone(cuda_store: BackboneStore, tmp_path: Path) -> None:
    """Deterministic mode: ``c`` in the same ShapeKey, with and without its neighbours."""
    tasks = tasks_of(0.1)
    together = make_htask(tasks, 32, 2)
    weights = []
    for name, members in (("together", tasks), ("alone", tasks[2:])):
        ids = {task.task_id for task in members}
        htask = together._replace(
            slot_of={key: slot for key, slot in together.slot_of.items() if key in ids},
            quota={key: quota for key, quota in together.quota.items() if key in ids},
        )
        bench = Bench(tmp_path / name, cuda_store, deterministic=True)
        bench.run(make_plan([htask]), *members)
        weights.append(bench.weights(tasks[2]))
    assert worst_gap(*weights) == 0.0


def test_a_nan_ends_its_own_task_only(cuda_store: BackboneStore, tmp_path: Path) -> None:
    tasks = tasks_of(0.0)
    plan = make_plan([make_htask(tasks, 32, 2)])
    whole = Bench(tmp_path / "whole", cuda_store)
    whole.run(plan, *tasks)
    bench = Bench(tmp_path / "hurt", cuda_store)
    bench.prepare(*tasks)
    bench.executor.apply(plan)
    bench.until_step(tasks[0], 3)
    for values in bench.state(tasks[0]).tensors.values():
        values.param.fill_(float("nan"))
    bench.until_ended(*tasks)
    assert [event.task_id for event in bench.of(EventKind.TASK_FAILED)] == ["a"]
    for task in tasks[1:]:
        assert worst_gap(bench.weights(task), whole.weights(task)) == 0.0
