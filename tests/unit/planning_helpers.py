"""Stand-ins for the tests of muxtune.planning: lengths, costs, plans, and walking by hand."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from math import fsum
from typing import Any

from muxtune.planning.step_builder import StepBuilder, pass_load
from muxtune.types import (
    NS_PER_S,
    AdapterSlot,
    Cursor,
    DispatchRule,
    Estimate,
    HTask,
    HTaskTurn,
    MicroBatch,
    PackRule,
    PassCoefficients,
    Plan,
    Prediction,
    ReplicaShape,
    Sample,
    ShapeKey,
)

SLOT = AdapterSlot("lora", 8, ("q_proj",))


class TableLengths:
    """Lengths of each task: a list of batches that repeats, or is all there is."""

    def __init__(self) -> None:
        self._batches: dict[str, list[tuple[Sample, ...]]] = {}
        self._num_steps: dict[str, int] = {}
        self._periodic: dict[str, bool] = {}

    def add(
        self,
        task_id: str,
        batches: Sequence[Sequence[int]],
        num_steps: int,
        periodic: bool = True,
    ) -> None:
        self._batches[task_id] = [
            tuple(
                Sample(step * 1000 + position, tokens, max(0, tokens - 1 - position % 3))
                for position, tokens in enumerate(batch)
            )
            for step, batch in enumerate(batches)
        ]
        self._num_steps[task_id], self._periodic[task_id] = num_steps, periodic

    def batch(self, task_id: str, step: int) -> tuple[Sample, ...]:
        batches = self._batches[task_id]
        return batches[step % len(batches)] if self._periodic[task_id] else batches[step]

    def num_steps(self, task_id: str) -> int:
        return self._num_steps[task_id]

    def period_steps(self, task_id: str) -> int | None:
        return len(self._batches[task_id]) if self._periodic[task_id] else None

    def lengths_key(self, task_id: str) -> str:
        return task_id


class StubCost:
    """An affine cost with odd constants, so that a wrong count shows in the nanoseconds."""

    def pass_coefficients(self, shape: ShapeKey, replica: ReplicaShape) -> PassCoefficients:
        base_s = 1e-3 + shape.padded_tokens * 1.7e-6 + shape.num_chunks * 1e-7
        optimizer_s = tuple(3.3e-5 * (slot + 1) for slot in range(len(shape.slots)))
        per_pair_s = 1.3e-10 * (1 + shape.chunk_tokens / 1000)
        return PassCoefficients(base_s, per_pair_s, 2.9e-8, optimizer_s, 0.1)


COST: Any = StubCost()  # the builder asks a CostModel for nothing else


def make_shape(chunk_tokens: int, num_chunks: int, num_slots: int) -> ShapeKey:
    return ShapeKey(chunk_tokens, num_chunks, (SLOT,) * num_slots)


def make_plan(
    htasks: Sequence[HTask], turns: Sequence[tuple[int, int | None]], drains: Sequence[str] = ()
) -> Plan:
    zero = Estimate(0.0, 0.0, 0.0)
    return Plan(
        instance_id="i0",
        epoch=0,
        drains=frozenset(drains),
        replicas=(ReplicaShape(),),
        htasks=tuple(htasks),
        round=tuple(HTaskTurn(htask, count) for htask, count in turns),
        dispatch=DispatchRule.SINGLE,
        predicted=Prediction(zero, 0.0, 0.0, zero, {}, {}, {}, 0.0),
    )


def one_htask(
    quota: Mapping[str, int],
    chunk_tokens: int = 64,
    packing: PackRule = PackRule.CHUNK,
    ladder: Sequence[tuple[int, int]] = (),
) -> HTask:
    """Slots in the order of ``quota``; one shape that holds all quotas, or the ladder's."""
    sizes = ladder or [(chunk_tokens, sum(quota.values()))]
    shapes = tuple(make_shape(tokens, chunks, len(quota)) for tokens, chunks in sizes)
    return HTask(shapes, {task_id: slot for slot, task_id in enumerate(quota)}, quota, packing)


def fresh(plan: Plan) -> dict[str, Cursor]:
    return {task_id: Cursor() for task_id in plan.task_ids}


def draw_batches(
    seed: random.Random, num_steps: int, most_sequences: int, most_tokens: int
) -> list[list[int]]:
    return [
        [seed.randint(1, most_tokens) for _ in range(seed.randint(1, most_sequences))]
        for _ in range(num_steps)
    ]


class HandWalk:
    """Rounds by ``next_round`` alone, with durations summed as the definition says."""

    def __init__(self, plan: Plan, cursors: Mapping[str, Cursor], lengths: TableLengths) -> None:
        self.plan, self.lengths = plan, lengths
        self.cursors = [dict(cursors)]
        self.rounds: list[list[MicroBatch]] = []
        self._builder = StepBuilder()

    def ended(self, rounds: int) -> set[str]:
        cursors = self.cursors[rounds]
        return {
            task_id
            for task_id in self.plan.task_ids
            if cursors[task_id].step >= self.lengths.num_steps(task_id)
            or (task_id in self.plan.drains and cursors[task_id].left is None)
        }

    def play(self, rounds: int) -> HandWalk:
        for _ in range(rounds - len(self.rounds)):
            micro_batches, cursors = self._builder.next_round(
                self.plan, self.cursors[-1], self.lengths
            )
            self.rounds.append(micro_batches)
            self.cursors.append(cursors)
        return self

    def play_to_first_end(self, at_most: int = 10_000) -> int:
        while self.ended(len(self.rounds)) == self.ended(0):
            assert len(self.rounds) < at_most
            self.play(len(self.rounds) + 1)
        return len(self.rounds)

    def duration_ns(self, cost: StubCost, rounds: int) -> int:
        """Integers by (hTask, shape), one product each, rounded once."""
        counts: dict[tuple[Any, ...], float] = {}
        for micro_batch in (each for one in self.rounds[:rounds] for each in one):
            load = pass_load(micro_batch, self.lengths)
            coefficients = cost.pass_coefficients(load.shape, ReplicaShape())
            where = (micro_batch.htask, load.shape)
            for what, count, seconds in (
                ("base", 1, coefficients.base_s),
                ("pairs", load.attention_pairs, coefficients.per_pair_s),
                ("rows", load.loss_rows, coefficients.per_loss_row_s),
            ):
                key = (what, where, seconds)
                counts[key] = counts.get(key, 0) + int(count)
            for slot in load.optimizer_slots:
                key = ("close", micro_batch.htask, slot, coefficients.optimizer_s[slot])
                counts[key] = counts.get(key, 0) + 1
        return round(fsum(count * key[-1] for key, count in counts.items()) * NS_PER_S)
