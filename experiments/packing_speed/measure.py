"""How long the step builder takes: microseconds per call at 8 and 64 tasks.

    python experiments/packing_speed/measure.py [--output times.json]

``fresh`` calls meet a plan that was never seen (tables are warm, as in a fleet simulation where
tasks repeat); ``again`` calls meet cursors that the same plan was already asked about.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from muxtune.planning.packing import pack_loads, pack_step
from muxtune.planning.step_builder import StepBuilder
from muxtune.types import (
    AdapterSlot,
    Cursor,
    DispatchRule,
    Estimate,
    HTask,
    HTaskTurn,
    PackRule,
    PassCoefficients,
    Plan,
    Prediction,
    ReplicaShape,
    Sample,
    ShapeKey,
)

PERIOD_STEPS = 16
LADDER_TOKENS = (64, 128, 192, 256)
CHUNK_TOKENS = 128


class DrawnLengths:
    """``num_kinds`` kinds of tasks, 8 sequences a step, lengths up to 256 tokens."""

    def __init__(self, num_kinds: int, seed: int) -> None:
        rng = random.Random(seed)
        self._batches = [
            [
                tuple(
                    Sample(position, tokens := rng.randint(16, 256), tokens - 1)
                    for position in range(8)
                )
                for _ in range(PERIOD_STEPS)
            ]
            for _ in range(num_kinds)
        ]

    def kind(self, task_id: str) -> int:
        return int(task_id) % len(self._batches)

    def batch(self, task_id: str, step: int) -> tuple[Sample, ...]:
        return self._batches[self.kind(task_id)][step % PERIOD_STEPS]

    def num_steps(self, task_id: str) -> int:
        return 500 + 7 * int(task_id)

    def period_steps(self, task_id: str) -> int | None:
        return PERIOD_STEPS

    def lengths_key(self, task_id: str) -> str:
        return str(self.kind(task_id))


class AffineCost:
    def pass_coefficients(self, shape: ShapeKey, replica: ReplicaShape) -> PassCoefficients:
        base_s = 0.01 + 1e-5 * shape.padded_tokens
        return PassCoefficients(base_s, 1e-9, 1e-7, (1e-3,) * len(shape.slots), 0.1)


def make_plan(kind: str, num_tasks: int) -> Plan:
    """``muxtune``: two hTasks of one shape each, counted turns; ``batched``: one padded hTask on
    a ladder, a step each; ``exclusive``: the same with one task."""
    slot = AdapterSlot("lora", 16, ("q_proj", "v_proj"))
    htasks, turns = [], []
    num_htasks = 2 if kind == "muxtune" else 1
    for index in range(num_htasks):
        task_ids = [str(number) for number in range(index, num_tasks, num_htasks)]
        per_task = 3 if kind == "muxtune" else 4
        slots, chunks = (slot,) * len(task_ids), per_task * len(task_ids)
        rows = (CHUNK_TOKENS,) if kind == "muxtune" else LADDER_TOKENS
        htasks.append(
            HTask(
                tuple(ShapeKey(tokens, chunks, slots) for tokens in rows),
                {task_id: number for number, task_id in enumerate(task_ids)},
                dict.fromkeys(task_ids, per_task),
                PackRule.CHUNK if kind == "muxtune" else PackRule.PAD,
            )
        )
        turns.append(HTaskTurn(index, 1 + index if kind == "muxtune" else None))
    zero = Estimate(0.0, 0.0, 0.0)
    predicted = Prediction(zero, 0.0, 0.0, zero, {}, {}, {}, 0.0)
    replicas = (ReplicaShape(),)
    rule = DispatchRule.SINGLE
    return Plan("i", 0, frozenset(), replicas, tuple(htasks), tuple(turns), rule, predicted)


def median_us(calls: Sequence[Callable[[], object]]) -> float:
    """Wall-clock time; measure on an idle machine."""
    return statistics.median(map(time_us, calls))


def time_us(call: Callable[[], object]) -> float:
    begin = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - begin) / 1e3


def measure_plan(kind: str, num_tasks: int, repeats: int) -> dict[str, float]:
    """Medians over plans that are met one after the other, as a simulation meets them."""
    builder, lengths = StepBuilder(), DrawnLengths(64, 0)
    cost: Any = AffineCost()  # the builder asks a CostModel for nothing else
    rng = random.Random(1)
    warm_up = make_plan(kind, num_tasks)
    builder.forecast(warm_up, dict.fromkeys(warm_up.task_ids, Cursor()), lengths, cost)
    times: dict[str, list[float]] = {}
    for index in range(repeats):
        plan = make_plan(kind, num_tasks)
        start = {task_id: Cursor(rng.randint(0, 99)) for task_id in plan.task_ids}
        asked = (plan, start, lengths)
        forecast = partial(builder.forecast, *asked, cost)
        times.setdefault("forecast_fresh_us", []).append(time_us(forecast))
        times.setdefault("forecast_again_us", []).append(time_us(forecast))
        elapsed_ns = int(forecast().duration_ns * (index % 97) / 97)
        rounds_until = partial(builder.rounds_until, *asked, cost, elapsed_ns)
        times.setdefault("rounds_until_us", []).append(time_us(rounds_until))
        rounds, _ = rounds_until()
        advance = partial(builder.advance, *asked, rounds)
        times.setdefault("advance_us", []).append(time_us(advance))
        if index % 10 == 0:
            next_round = partial(builder.next_round, *asked)
            times.setdefault("next_round_us", []).append(time_us(next_round))
    return {name: statistics.median(each) for name, each in times.items()}


def measure_packing(num_sequences: int) -> dict[str, float]:
    rng = random.Random(2)
    samples = [Sample(i, tokens := rng.randint(16, 256), tokens - 1) for i in range(num_sequences)]
    return {
        f"{pack.__name__}_{rule.value}_us": median_us(
            [partial(pack, samples, None, 256, 4, rule)] * 500
        )
        for pack in (pack_step, pack_loads)
        for rule in PackRule
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Microseconds per call of the step builder.")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repeats", type=int, default=500)
    options = parser.parse_args()
    results: dict[str, object] = {"python": platform.python_version()}
    cases = [("exclusive", 1), ("batched", 8), ("muxtune", 8), ("batched", 64), ("muxtune", 64)]
    for kind, num_tasks in cases:
        results[f"{kind}, {num_tasks} tasks"] = measure_plan(kind, num_tasks, options.repeats)
    for num_sequences in (8, 64):
        results[f"packing, {num_sequences} sequences"] = measure_packing(num_sequences)
    text = json.dumps(results, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
