"""The tasks of the measurement, and their rounds: lengths from the shipped histograms, packed by
the StepBuilder, fresh random tokens every step.

Shape suffixes: n tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from muxtune.planning.step_builder import StepBuilder
from muxtune.runtime.static_step import Sequence as PackedSequence
from muxtune.runtime.static_step import SlotInput
from muxtune.types import (
    AdapterSlot,
    Cursor,
    DataSpec,
    DispatchRule,
    Estimate,
    HTask,
    HTaskTurn,
    Plan,
    Prediction,
    ReplicaShape,
    ShapeKey,
    TaskSpec,
)
from muxtune.workload.synthetic import SyntheticLibrary

MIX = ("sst2", "sst2", "sst2", "openbookqa", "openbookqa", "openbookqa", "rte", "rte")
MAX_LENGTH_TOKENS = 512
BATCH_SIZE = 8
SCALE = 2.0
CHUNK_TOKENS = 64


class Round(NamedTuple):
    """One micro-batch, in which every task of it closes an optimizer step."""

    sequences: list[PackedSequence]
    slots: dict[int, SlotInput]
    effective_tokens: int


class Workload:
    """``num_tasks`` tasks of the mix; ``rounds`` gives micro-batches of up to ``fused`` tasks, or
    one for each of ``groups`` of tasks' numbers."""

    def __init__(
        self, num_tasks: int, ranks: tuple[int, ...], vocab: int, fused: int = 8,
        groups: Sequence[Sequence[int]] | None = None,
    ) -> None:  # fmt: skip
        if groups is None:
            starts = range(0, num_tasks, fused)
            groups = [range(first, min(first + fused, num_tasks)) for first in starts]
        self.ranks, self.vocab = ranks, vocab
        self.library = SyntheticLibrary(seed=0, period_steps=64, num_variants=64)
        self.names = [MIX[i % len(MIX)] for i in range(num_tasks)]
        for slot, name in enumerate(self.names):
            data = DataSpec(histogram=name, max_length_tokens=MAX_LENGTH_TOKENS)
            self.library.add(
                TaskSpec(f"t{slot:02d}", "llama-2-7b", data=data, num_steps=1 << 20, seed=slot)
            )
        self.plan = _plan(groups, ranks)
        self._builder = StepBuilder()
        self._slot_of = {f"t{slot:02d}": slot for slot in range(num_tasks)}

    def rounds(self, seed: int = 0) -> Iterator[list[Round]]:
        """Micro-batches of one round after another, without end."""
        random = np.random.default_rng(seed)
        cursors = {task_id: Cursor() for task_id in self._slot_of}
        while True:
            steps = {task_id: cursor.step for task_id, cursor in cursors.items()}
            micro_batches, cursors = self._builder.next_round(self.plan, cursors, self.library)
            yield [self._round(micro_batch, steps, random) for micro_batch in micro_batches]

    def _round(self, micro_batch, steps: dict[str, int], random: np.random.Generator) -> Round:
        sequences, slots = [], {}
        for chunk in micro_batch.chunks:
            slot, samples = self._slot_of[chunk.task_id], None
            for piece in chunk.pieces:
                if piece.start:
                    continue
                samples = samples or self.library.batch(chunk.task_id, steps[chunk.task_id])
                count = samples[piece.position].tokens
                tokens_n = random.integers(0, self.vocab, count)
                sequences.append(
                    PackedSequence(slot, tokens_n, np.ones(count, bool), piece.position)
                )
            slots[slot] = SlotInput(
                micro_batch.loss_tokens[chunk.task_id],
                keeps=False,
                closes=chunk.task_id in micro_batch.closes_step,
                scale=SCALE,
            )
        return Round(sequences, slots, sum(len(item.tokens_n) for item in sequences))

    def row_counts(self, multiple: int = 128, rounds: int = 64) -> list[int]:
        """Sizes that every round of a whole period fits."""
        sizes = set()
        for _, micro_batches in zip(range(rounds), self.rounds(), strict=False):
            for item in micro_batches:
                sizes.add(-(-item.effective_tokens // multiple) * multiple)
        return sorted(sizes)


def _plan(groups: Sequence[Sequence[int]], ranks: tuple[int, ...]) -> Plan:
    """Hand-made: each group of tasks is one hTask, each task closes its step at once."""
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    quota = BATCH_SIZE * MAX_LENGTH_TOKENS // CHUNK_TOKENS
    htasks = []
    for members in groups:
        slots = tuple(AdapterSlot("lora", ranks[slot], targets) for slot in members)
        shape = ShapeKey(CHUNK_TOKENS, quota * len(slots), slots)
        ids = [f"t{slot:02d}" for slot in members]
        htasks.append(HTask((shape,), {t: i for i, t in enumerate(ids)}, dict.fromkeys(ids, quota)))
    nothing = Estimate(0.0, 0.0, 0.0)
    prediction = Prediction(nothing, 0.0, 0.0, nothing, {}, {}, {}, 0.0)
    turns = tuple(HTaskTurn(index, None) for index in range(len(htasks)))
    return Plan(
        "gpu0", 0, frozenset(), (ReplicaShape(),), tuple(htasks), turns, DispatchRule.SINGLE,
        prediction,
    )  # fmt: skip
