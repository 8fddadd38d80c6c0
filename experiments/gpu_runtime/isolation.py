"""Can a task tell that it has neighbours? 8 tasks, 30 steps, in company and each alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from bench import Bench, gap, htask_of, lora_task, plan_of, store_of

from muxtune.cost.shapes import ModelShape
from muxtune.types import EventKind, HTask, TaskSpec

STEPS = 30
QUOTA = 8


def lora_tasks() -> list[TaskSpec]:
    """Ranks, targets, dropout and accumulation differ."""
    return [
        lora_task("a", "sst2", STEPS),
        lora_task("b", "sst2", STEPS, rank=8, dropout=0.1),
        lora_task("c", "sst2", STEPS, rank=64, targets=("q_proj", "v_proj")),
        lora_task("d", "openbookqa", STEPS, rank=32, accumulation=2),
        lora_task("e", "openbookqa", STEPS, rank=16, targets=("o_proj", "down_proj", "k_proj")),
        lora_task("f", "openbookqa", STEPS, rank=4, dropout=0.05),
        lora_task("g", "rte", STEPS, rank=16),
        lora_task("h", "rte", STEPS, rank=8, targets=("gate_proj", "up_proj", "down_proj")),
    ]


def mixed_tasks() -> list[TaskSpec]:
    """Six methods in one pass."""
    ia3 = {"method": "ia3", "rank": 0, "alpha": 0.0, "targets": ("k_proj", "v_proj", "down_proj")}
    after = {"method": "bottleneck", "targets": ("o_proj", "down_proj")}
    prefix = {"method": "prefix", "targets": ()}
    return [
        lora_task("a", "sst2", STEPS),
        lora_task("b", "sst2", STEPS, **ia3),
        lora_task("c", "sst2", STEPS, rank=16, **after),
        lora_task("d", "openbookqa", STEPS, rank=8, **prefix),
        lora_task("e", "openbookqa", STEPS, rank=8, method="dora"),
        lora_task("f", "openbookqa", STEPS, rank=8, method="prompt", targets=()),
        lora_task("g", "rte", STEPS, rank=8, dropout=0.1, **after),
        lora_task("h", "rte", STEPS, rank=16, **prefix),
    ]


def lora(shape: ModelShape, device: str) -> Iterator[dict[str, Any]]:
    return _exact(shape, device, lora_tasks())


def mixed(shape: ModelShape, device: str) -> Iterator[dict[str, Any]]:
    return _exact(shape, device, mixed_tasks())


def _exact(shape: ModelShape, device: str, tasks: list[TaskSpec]) -> Iterator[dict[str, Any]]:
    """Deterministic mode: each adapter in company and alone, bit for bit; what is known after each
    task, ``passed`` after the last one only."""
    store = store_of(shape, device)
    together = _together(store, shape, tasks, True)
    gaps, same = {}, {}
    known = {
        "layers": shape.num_layers, "steps": STEPS, "captured": not together.notices,
        "notices": together.notices, "gaps": gaps, "bit_identical": same,
    }  # fmt: skip
    for task in tasks:
        key = task.task_id
        alone = _alone(store, shape, tasks, task, True).weights[key]
        gaps[key], same[key] = (
            gap(together.weights[key], alone),
            _same(together.weights[key], alone),
        )
        yield known
    yield known | {"passed": not together.notices and all(same.values())}


def faults(shape: ModelShape, device: str) -> Iterator[dict[str, Any]]:
    """A NaN planted in one task, an exception in its data, a cancel: the others bit for bit."""
    store, tasks = store_of(shape, device), lora_tasks()
    whole = _together(store, shape, tasks, True).weights
    out: dict[str, Any] = {}
    for what in ("nan", "data", "cancel"):
        out[what] = _fault(store, shape, tasks, what, whole)
        yield out
    yield out | {"passed": all(item["others_bit_identical"] for item in out.values())}


def fast(shape: ModelShape, device: str) -> Iterator[dict[str, Any]]:
    """Fast mode: company against solitude, beside solitude with one BLAS against another."""
    store, tasks = store_of(shape, device), lora_tasks()
    together = _together(store, shape, tasks, False)
    gaps, spreads, sizes = {}, {}, {}
    known = {
        "layers": shape.num_layers, "steps": STEPS, "gaps": gaps, "library_gaps": spreads,
        "sizes_together": together.replays, "sizes_alone": sizes,
    }  # fmt: skip
    for task in tasks:
        key = task.task_id
        solo, other = (
            _solo_with(store, shape, tasks, task, blas) for blas in ("cublas", "cublaslt")
        )
        gaps[key] = gap(together.weights[key], solo.weights[key])
        spreads[key] = gap(other.weights[key], solo.weights[key])
        sizes[key] = solo.replays
        yield known
    yield known | {
        "worst_gap": max(gaps.values()), "worst_library_gap": max(spreads.values()),
        "passed": all(gaps[key] <= spreads[key] for key in gaps),
    }  # fmt: skip


def _solo_with(
    store: Any, shape: ModelShape, tasks: list[TaskSpec], task: TaskSpec, blas: str
) -> Trained:
    if torch.cuda.is_available():
        torch.backends.cuda.preferred_blas_library(blas)
    try:
        return _alone(store, shape, tasks, task, False)
    finally:
        if torch.cuda.is_available():
            torch.backends.cuda.preferred_blas_library("default")


class Trained(NamedTuple):
    """``replays``: of each size, where the step was captured."""

    weights: dict[str, dict]
    notices: list[str]
    replays: dict[int, int]


def _same(left: dict, right: dict) -> bool:
    return all(torch.equal(left[key], right[key]) for key in left)


def _together(store: Any, shape: ModelShape, tasks: list[TaskSpec], exact: bool) -> Trained:
    return _trained(store, shape, tasks, htask_of(tasks, QUOTA), exact)


def _alone(
    store: Any, shape: ModelShape, tasks: list[TaskSpec], task: TaskSpec, exact: bool
) -> Trained:
    return _trained(store, shape, [task], htask_alone(tasks, task), exact)


def htask_alone(tasks: list[TaskSpec], task: TaskSpec) -> HTask:
    """In the same shape, with nobody in the other slots."""
    whole = htask_of(tasks, QUOTA)
    own = {task.task_id}
    return whole._replace(
        slot_of={key: slot for key, slot in whole.slot_of.items() if key in own},
        quota={key: quota for key, quota in whole.quota.items() if key in own},
    )


def _trained(
    store: Any, shape: ModelShape, tasks: list[TaskSpec], htask: HTask, exact: bool
) -> Trained:
    bench = Bench(store, shape.vocab, deterministic=exact)
    bench.run(tasks, htask)
    done = {event.task_id for event in bench.of(EventKind.TASK_DONE)}
    assert done == {task.task_id for task in tasks}, bench.events
    weights = {task.task_id: bench.weights(task) for task in tasks}
    trained = Trained(weights, bench.recorder.notices, bench.replays())
    bench.close()
    return trained


def _fault(
    store: Any, shape: ModelShape, tasks: list[TaskSpec], what: str, whole: dict[str, dict]
) -> dict[str, Any]:
    bench = Bench(store, shape.vocab, deterministic=True)
    bench.prepare(tasks)
    bench.executor.apply(plan_of([htask_of(tasks, QUOTA)]))
    bench.until_step("a", 7)
    if what == "nan":
        state = bench.executor.tasks["a"].state
        assert state is not None
        next(iter(state.tensors.values())).param.fill_(float("nan"))
    elif what == "data":
        bench.texts.broken = frozenset({"a"})
    else:
        bench.executor.cancel("a")
    bench.until_ended(tasks)
    ended = {event.task_id: event.kind.name for event in bench.events if event.task_id}
    same = all(_same(bench.weights(task), whole[task.task_id]) for task in tasks[1:])
    bench.close()
    return {"ended": ended, "others_bit_identical": same}
