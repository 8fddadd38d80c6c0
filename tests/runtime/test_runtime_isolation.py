"""A task cannot tell whether it has neighbours, nor how it was packed, nor that plans changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from muxtune.runtime.backbone import BackboneStore
from muxtune.types import AdapterSlot, EventKind, PackRule, Plan, TaskSpec
from tests.runtime.runtime_helpers import Bench, make_htask, make_plan, make_task, worst_gap

STEPS = 20
Weights = dict[tuple[str, str], torch.Tensor]


def five_tasks() -> list[TaskSpec]:
    """Ranks, targets, batch sizes, lengths, accumulation differ; dropout is on.

    ``eps`` lies above the rounding of a gradient: below it AdamW would blow that rounding up to a
    whole step, and no two ways to add up would agree.
    """
    common = {"num_steps": STEPS, "dropout": 0.1, "eps": 1e-6}
    return [
        make_task("a", **common),
        make_task("b", **common, rank=8, targets=("q_proj", "o_proj", "down_proj"), batch_size=5),
        make_task("c", **common, rank=2, targets=("all-linear",), accumulation=2),
        make_task("d", **common, rank=1, max_length_tokens=9, batch_size=7, weight_decay=0.1),
        make_task("e", **common, rank=16, targets=("up_proj",), batch_size=1, accumulation=3),
    ]


def run_alone(store: BackboneStore, folder: Path, task: TaskSpec, plan: Plan) -> Weights:
    bench = Bench(folder / task.task_id, store)
    bench.run(plan, task)
    return bench.weights(task)


@pytest.fixture(scope="module")
def alone(store: BackboneStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Weights]:
    """Each task by itself, under the chunks that it also gets in company."""
    folder = tmp_path_factory.mktemp("alone")
    return {
        task.task_id: run_alone(store, folder, task, make_plan([make_htask([task])]))
        for task in five_tasks()
    }


def check(bench: Bench, tasks: Sequence[TaskSpec], alone: dict[str, Weights], limit: float) -> None:
    for task in tasks:
        weights = bench.weights(task)
        assert worst_gap(weights, alone[task.task_id]) <= limit, task.task_id
        moved = [float(w.norm()) for (_, name), w in weights.items() if name == "lora_B"]
        assert min(moved) > 1e-3


def test_together_is_bit_for_bit_alone(
    store: BackboneStore, tmp_path: Path, alone: dict[str, Weights]
) -> None:
    tasks = five_tasks()
    bench = Bench(tmp_path, store)
    bench.run(make_plan([make_htask(tasks)]), *tasks)
    check(bench, tasks, alone, 0.0)


@pytest.mark.parametrize("counts", [(None, None), (2, 1)])
def test_two_htasks_in_turn(
    store: BackboneStore, tmp_path: Path, alone: dict[str, Weights], counts: tuple[int | None, int]
) -> None:
    tasks = five_tasks()
    bench = Bench(tmp_path, store)
    htasks = [make_htask(tasks[:2]), make_htask(tasks[:1:-1])]
    bench.run(make_plan(htasks, counts=counts), *tasks)
    check(bench, tasks, alone, 0.0)


@pytest.mark.parametrize(
    ("chunk_tokens", "quota", "packing"),
    [
        (32, 1, PackRule.CHUNK),
        (8, 3, PackRule.CHUNK),
        (128, 1, PackRule.CHUNK),
        (24, 2, PackRule.PAD),
        (40, 7, PackRule.PAD),
    ],
)
def test_other_chunks_and_padding_give_the_same_adapters(
    store: BackboneStore,
    tmp_path: Path,
    alone: dict[str, Weights],
    chunk_tokens: int,
    quota: int,
    packing: PackRule,
) -> None:
    tasks = five_tasks()
    bench = Bench(tmp_path, store)
    bench.run(make_plan([make_htask(tasks, chunk_tokens, quota, packing)]), *tasks)
    check(bench, tasks, alone, 1e-5)


def test_larger_slots_change_nothing(
    store: BackboneStore, tmp_path: Path, alone: dict[str, Weights]
) -> None:
    task = five_tasks()[0]
    slots = [AdapterSlot("lora", 9, ("q_proj", "k_proj", "v_proj"))]
    bench = Bench(tmp_path, store)
    bench.run(make_plan([make_htask([task], slots=slots)]), task)
    check(bench, [task], alone, 1e-5)


def test_plan_changes_in_the_middle_of_steps_keep_what_was_accumulated(
    store: BackboneStore, tmp_path: Path, alone: dict[str, Weights]
) -> None:
    """Every round another plan: pools, slots, chunk lengths and quotas change all the time."""
    tasks = five_tasks()
    bench = Bench(tmp_path, store)
    bench.prepare(*tasks)
    arrangements = [
        ([tasks], 16, 2),
        ([tasks[::-1]], 8, 3),
        ([tasks[:2], tasks[2:]], 16, 2),
        ([tasks[3:], tasks[:1], tasks[1:3]], 24, 1),
    ]
    epoch, in_mid_step = 0, 0
    while bench.done() < {task.task_id for task in tasks}:
        groups, chunk_tokens, quota = arrangements[epoch % len(arrangements)]
        htasks = [make_htask(group, chunk_tokens, quota) for group in groups]
        bench.executor.apply(make_plan(htasks, epoch, counts=[1] * len(groups)))
        bench.until(EventKind.PLAN_APPLIED, epoch + 1)
        in_mid_step += sum(item.cursor.left is not None for item in bench.executor.tasks.values())
        epoch += 1
        while len(bench.recorder.rounds) < epoch and len(bench.done()) < len(tasks):
            bench.tick()
    assert epoch > 20 and in_mid_step > 20
    check(bench, tasks, alone, 1e-5)


def test_joining_leaving_failing_and_cancelled_neighbours(
    store: BackboneStore, tmp_path: Path, alone: dict[str, Weights]
) -> None:
    """``c`` trains throughout; the others come and go in every way there is."""
    a, b, c, d, e = five_tasks()
    bench = Bench(tmp_path, store)
    bench.prepare(a, b, c, d, e)
    executor = bench.executor
    executor.apply(make_plan([make_htask([a, c])], 0, counts=[1]))
    bench.until_step(c, 3)
    executor.apply(make_plan([make_htask([b, a, c, d])], 1, counts=[1]))
    bench.until_step(c, 5)
    executor.cancel("b")
    bench.until_step(c, 7)
    bench.state(d).tensors["model.layers.0.self_attn.q_proj", "lora_A"].param.fill_(float("nan"))
    bench.until(EventKind.TASK_FAILED)
    executor.apply(make_plan([make_htask([a, c])], 2, counts=[1], drains=["a"]))
    bench.until(EventKind.TASK_RELEASED)
    executor.apply(make_plan([make_htask([c, e])], 3, counts=[1]))
    bench.until_step(c, 12)
    executor.apply(make_plan([make_htask([e, c, a])], 4, counts=[1]))
    bench.until_ended(a, c, e)
    check(bench, [a, c, e], alone, 1e-5)
    assert [event.task_id for event in bench.of(EventKind.TASK_CANCELLED)] == ["b"]
    assert [event.task_id for event in bench.of(EventKind.TASK_FAILED)] == ["d"]
    assert sorted(event.task_id for event in bench.of(EventKind.TASK_DONE)) == ["a", "c", "e"]


def test_fast_mode_is_equal_to_rounding(
    store: BackboneStore, tmp_path: Path, alone: dict[str, Weights]
) -> None:
    """With sums of gradients in float32, and the kernels' form of the linear."""
    tasks = five_tasks()[:2]
    bench = Bench(tmp_path, store, deterministic=False)
    bench.run(make_plan([make_htask(tasks, 32)]), *tasks)
    check(bench, tasks, alone, 1e-4)
