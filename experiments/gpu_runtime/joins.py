"""Join and leave: time to the newcomer's first step, and the others' stall."""

from __future__ import annotations

import statistics
from typing import Any

from bench import Bench, htask_of, lora_task, plan_of, store_of

from muxtune.cost.shapes import ModelShape
from muxtune.types import TaskSpec

STEPS = 400
QUOTA = 8


def companies() -> list[list[TaskSpec | None]]:
    """Four slots for three tasks; a fourth joins, leaves again; a fifth needs another shape."""
    a, b, c = (lora_task(name, "openbookqa", STEPS) for name in "abc")
    late, later = lora_task("late", "sst2", STEPS), lora_task("later", "sst2", STEPS)
    first = [a, b, c, None]
    return [first, [a, b, c, late], first, [*first, later], [a, b, c]]


def run(shape: ModelShape, device: str) -> dict[str, Any]:
    first, *others = companies()
    bench = Bench(store_of(shape, device), shape.vocab, deterministic=False)
    bench.prepare(list({t.task_id: t for tasks in (first, *others) for t in tasks if t}.values()))
    bench.executor.apply(plan_of([htask_of(first, QUOTA)]))
    bench.until_step("a", 12)
    out = {
        "median_step_ms": _median_ms(bench),
        "join_same_shape": _change(bench, others[0], 1, "late"),
        "leave_same_shape": _change(bench, others[1], 2),
        "join_new_shape": _change(bench, others[2], 3, "later"),
        "leave_new_shape": _change(bench, others[3], 4),
    }
    bench.close()
    return out


def _median_ms(bench: Bench) -> float:
    durations = [r.duration_ns for r in bench.recorder.steps if r.task_id == "a"][3:]
    return statistics.median(durations) / 1e6


def _change(bench: Bench, tasks: list, epoch: int, newcomer: str = "") -> dict[str, float]:
    done = len(bench.recorder.losses("a"))
    spans = len(bench.recorder.spans)
    start_ns = bench.executor.now_ns
    bench.executor.apply(plan_of([htask_of(tasks, QUOTA)], epoch))
    bench.until_step("a", done + 10)
    steps = [r for r in bench.recorder.steps if r.task_id == "a"][done:]
    usual_ns = statistics.median(r.duration_ns for r in steps[4:])
    captures = [s for s in bench.recorder.spans[spans:] if s.name == "capture"]
    out = {
        "stall_of_others_ms": (max(r.duration_ns for r in steps) - usual_ns) / 1e6,
        "captured_ms": sum(s.duration_ns for s in captures) / 1e6,
        "usual_step_ms": usual_ns / 1e6,
    }
    if newcomer:
        first = next(r for r in bench.recorder.steps if r.task_id == newcomer)
        out["to_first_step_ms"] = (first.time_ns - start_ns) / 1e6
    return out
