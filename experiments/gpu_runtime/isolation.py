"""Can a task tell that it has neighbours? 8 tasks, 30 steps, in company and each alone."""

from __future__ import annotations

from typing import Any

import torch
from bench import Bench, gap, htask_of, lora_task, plan_of, store_of

from muxtune.cost.shapes import ModelShape
from muxtune.types import TaskSpec

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
    """Four methods in one pass."""
    scaled = ("k_proj", "v_proj", "down_proj")
    after = ("o_proj", "down_proj")
    return [
        lora_task("a", "sst2", STEPS),
        lora_task("b", "sst2", STEPS, method="ia3", rank=0, alpha=0.0, targets=scaled),
        lora_task("c", "sst2", STEPS, method="bottleneck", rank=16, targets=after),
        lora_task("d", "openbookqa", STEPS, method="dora", rank=8, targets=("q_proj", "v_proj")),
        lora_task("e", "openbookqa", STEPS, rank=8, dropout=0.1),
        lora_task("f", "openbookqa", STEPS, method="ia3", rank=0, alpha=0.0, targets=scaled),
        lora_task("g", "rte", STEPS, method="bottleneck", rank=8, targets=after),
        lora_task("h", "rte", STEPS, rank=32, targets=("q_proj", "v_proj")),
    ]


def run(shape: ModelShape, device: str) -> dict[str, Any]:
    store = store_of(shape, device)
    out: dict[str, Any] = {"layers": shape.num_layers, "steps": STEPS}
    whole: dict[str, dict] = {}
    for name, tasks in (("lora", lora_tasks()), ("mixed_methods", mixed_tasks())):
        together, notices = _together(store, shape, tasks, True)
        whole = whole or together
        alone = {task.task_id: _alone(store, shape, tasks, task, True) for task in tasks}
        out[name] = {
            "captured": not notices,
            "notices": notices,
            "deterministic_gaps": {key: gap(together[key], alone[key]) for key in alone},
            "bit_identical": all(_same(together[key], alone[key]) for key in alone),
        }
    tasks = lora_tasks()
    out["faults"] = {
        what: _fault(store, shape, tasks, what, whole) for what in ("nan", "data", "cancel")
    }
    out["fast"] = _fast(store, shape, tasks)
    out["passed"] = bool(
        out["lora"]["bit_identical"]
        and out["mixed_methods"]["bit_identical"]
        and all(item["others_bit_identical"] for item in out["faults"].values())
        and out["fast"]["worst_gap"] <= out["fast"]["worst_library_gap"]
    )
    return out


def _same(left: dict, right: dict) -> bool:
    return all(torch.equal(left[key], right[key]) for key in left)


def _together(store: Any, shape: ModelShape, tasks: list[TaskSpec], exact: bool) -> tuple:
    bench = Bench(store, shape.vocab, deterministic=exact)
    bench.run(tasks, htask_of(tasks, QUOTA))
    weights = {task.task_id: bench.weights(task) for task in tasks}
    notices = bench.recorder.notices
    bench.close()
    return weights, notices


def _alone(
    store: Any, shape: ModelShape, tasks: list[TaskSpec], task: TaskSpec, exact: bool
) -> dict:
    """In the same shape, with nobody in the other slots."""
    whole = htask_of(tasks, QUOTA)
    own = {task.task_id}
    htask = whole._replace(
        slot_of={key: slot for key, slot in whole.slot_of.items() if key in own},
        quota={key: quota for key, quota in whole.quota.items() if key in own},
    )
    bench = Bench(store, shape.vocab, deterministic=exact)
    bench.run([task], htask)
    weights = bench.weights(task)
    bench.close()
    return weights


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


def _fast(store: Any, shape: ModelShape, tasks: list[TaskSpec]) -> dict[str, Any]:
    """Fast mode: company against solitude, beside solitude with one BLAS against another."""
    together, _ = _together(store, shape, tasks, False)
    gaps, library = {}, {}
    for task in tasks:
        alone = {}
        for blas in ("cublas", "cublaslt"):
            torch.backends.cuda.preferred_blas_library(blas)
            alone[blas] = _alone(store, shape, tasks, task, False)
        torch.backends.cuda.preferred_blas_library("default")
        gaps[task.task_id] = gap(together[task.task_id], alone["cublas"])
        library[task.task_id] = gap(alone["cublaslt"], alone["cublas"])
    return {
        "gaps": gaps, "library_gaps": library, "worst_gap": max(gaps.values()),
        "worst_library_gap": max(library.values()),
        "each_within": {key: gaps[key] <= library[key] for key in gaps},
    }  # fmt: skip
