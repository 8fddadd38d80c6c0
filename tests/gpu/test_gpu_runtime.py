"""The runtime on CUDA: captured steps and the eager pass, bfloat16 weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from muxtune.cost.shapes import ModelShape
from muxtune.runtime.backbone import BackboneStore, random_weights
from muxtune.runtime.captured_runner import CapturedRunner
from muxtune.types import EventKind
from tests.runtime import test_captured_runner as on_any_device
from tests.runtime.runtime_helpers import (
    Bench,
    make_htask,
    make_plan,
    make_task,
    worst_gap,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS = 20
MODES = ["captured", "eager"]
# Heads of 64 features take our own packed attention, those of 16 flash attention.
SHAPES = [
    ModelShape("tiny", 2, 64, 4, 2, 16, 128, 128),
    ModelShape("wide", 2, 256, 4, 2, 64, 512, 128),
]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: shape.name)
def stores(request: pytest.FixtureRequest) -> tuple[BackboneStore, BackboneStore]:
    """The same weights on CUDA and on the CPU."""
    source = random_weights(request.param)
    cuda = BackboneStore({"tiny": source}, "cuda", torch.bfloat16)
    return cuda, BackboneStore({"tiny": random_weights(request.param)})


@pytest.fixture
def cuda_store(stores: tuple[BackboneStore, BackboneStore]) -> BackboneStore:
    return stores[0]


def tasks_of(dropout: float):
    return [
        make_task("a", num_steps=STEPS, dropout=dropout, rank=16),
        make_task(
            "b", num_steps=STEPS, dropout=dropout, rank=8, targets=("all-linear",), accumulation=2
        ),
        make_task("c", num_steps=STEPS, dropout=dropout, rank=16, targets=("down_proj", "q_proj")),
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_loss_curves_are_those_of_the_cpu(
    stores: tuple[BackboneStore, BackboneStore], tmp_path: Path, dropout: float, mode: str
) -> None:
    """The masks are the same on both, so dropout does not blur the comparison. A rate at which
    rounding does not grow from step to step."""
    tasks = [
        task._replace(optimizer=task.optimizer._replace(lr=2e-3)) for task in tasks_of(dropout)
    ]
    plan = make_plan([make_htask(tasks, 32, 2)])
    curves = []
    for name, store in zip(("cuda", "cpu"), stores, strict=True):
        step = mode if name == "cuda" else "eager"
        bench = Bench(tmp_path / name, store, evaluate_tokens=100, step=step)
        bench.run(plan, *tasks)
        assert bench.done() == {"a", "b", "c"}
        curves.append({task.task_id: bench.recorder.losses(task.task_id) for task in tasks})
    for task in tasks:
        on_cuda, on_cpu = (curve[task.task_id] for curve in curves)
        assert on_cuda == pytest.approx(on_cpu, abs=0.02)
        assert on_cpu[0] - on_cpu[-1] != pytest.approx(0.0, abs=0.02)


def test_mixed_methods_are_those_of_the_cpu(
    stores: tuple[BackboneStore, BackboneStore], tmp_path: Path
) -> None:
    tasks = [
        task._replace(optimizer=task.optimizer._replace(lr=2e-3))
        for task in on_any_device.mixed_tasks()
    ]
    plan, curves = make_plan([make_htask(tasks)]), []
    for name, store in zip(("cuda", "cpu"), stores, strict=True):
        bench = Bench(tmp_path / name, store, step="auto" if name == "cuda" else "eager")
        bench.run(plan, *tasks)
        ids = [task.task_id for task in tasks]
        assert bench.done() == set(ids), bench.events
        curves.append({task_id: bench.recorder.losses(task_id) for task_id in ids})
        (runner,) = on_any_device.runners(bench)
        assert isinstance(runner, CapturedRunner) == (name == "cuda")
        assert not bench.recorder.notices
    for task_id, on_cuda in curves[0].items():
        assert on_cuda == pytest.approx(curves[1][task_id], abs=0.03), task_id


def test_recomputed_blocks_change_no_bit(cuda_store: BackboneStore, tmp_path: Path) -> None:
    on_any_device.test_recomputed_blocks_change_no_bit_of_any_method(cuda_store, tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_same_shape_is_bit_for_bit_alone(
    cuda_store: BackboneStore, tmp_path: Path, mode: str
) -> None:
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
        bench = Bench(tmp_path / name, cuda_store, deterministic=True, step=mode)
        bench.run(make_plan([htask]), *members)
        weights.append(bench.weights(tasks[2]))
    assert worst_gap(*weights) == 0.0


@pytest.mark.parametrize("mode", MODES)
def test_a_nan_ends_its_own_task_only(cuda_store: BackboneStore, tmp_path: Path, mode: str) -> None:
    tasks = tasks_of(0.0)
    plan = make_plan([make_htask(tasks, 32, 2)])
    whole = Bench(tmp_path / "whole", cuda_store, step=mode)
    whole.run(plan, *tasks)
    bench = Bench(tmp_path / "hurt", cuda_store, step=mode)
    bench.prepare(*tasks)
    bench.executor.apply(plan)
    bench.until_step(tasks[0], 3)
    for values in bench.state(tasks[0]).tensors.values():
        values.param.fill_(float("nan"))
    bench.until_ended(*tasks)
    assert [event.task_id for event in bench.of(EventKind.TASK_FAILED)] == ["a"]
    for task in tasks[1:]:
        assert worst_gap(bench.weights(task), whole.weights(task)) == 0.0


def test_captured_is_what_a_gpu_does_by_itself(cuda_store: BackboneStore, tmp_path: Path) -> None:
    tasks = tasks_of(0.0)
    bench = Bench(tmp_path, cuda_store)
    bench.run(make_plan([make_htask(tasks, 32, 2)]), *tasks)
    (runner,) = on_any_device.runners(bench)
    assert isinstance(runner, CapturedRunner)
    assert runner.steps.capture_s
    assert "capture" in {span.name for span in bench.recorder.spans}


def test_joins_and_results_as_on_the_cpu(cuda_store: BackboneStore, tmp_path: Path) -> None:
    on_any_device.test_results_come_late_and_in_order(cuda_store, tmp_path / "order")
    join = on_any_device.test_a_join_into_a_shape_that_holds_keeps_program_and_addresses
    join(cuda_store, tmp_path / "join")
    for kind in ("lora", "mixed"):
        on_any_device.test_together_is_bit_for_bit_alone(cuda_store, tmp_path / kind, kind)


@pytest.mark.parametrize("what", ["weights", "data", "cancel"])
def test_one_tasks_end_is_nobody_elses(
    cuda_store: BackboneStore, tmp_path: Path, what: str
) -> None:
    on_any_device.test_one_tasks_end_is_nobody_elses(cuda_store, tmp_path, what)


def test_plan_changes_move_adapters_between_graphs(
    cuda_store: BackboneStore, tmp_path: Path
) -> None:
    """Bit for bit the same as one plan, where the rows of a micro-batch stay as many."""
    tasks = tasks_of(0.1)
    whole = Bench(tmp_path / "whole", cuda_store)
    whole.run(make_plan([make_htask(tasks, 32, 2)]), *tasks)
    bench = Bench(tmp_path / "changed", cuda_store)
    bench.prepare(*tasks)
    epoch = 0
    while bench.done() < {task.task_id for task in tasks}:
        order = tasks if epoch % 2 else tasks[::-1]
        bench.executor.apply(make_plan([make_htask(order, 32, 2)], epoch, counts=[1]))
        bench.until(EventKind.PLAN_APPLIED, epoch + 1)
        epoch += 1
        while len(bench.recorder.rounds) < epoch and len(bench.done()) < len(tasks):
            bench.tick()
    assert epoch > 10
    for task in tasks:
        assert worst_gap(bench.weights(task), whole.weights(task)) == 0.0
