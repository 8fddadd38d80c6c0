"""Held-out perplexity of a task, through the same packed path that trains it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from muxtune.runtime.backbone import Backbone
from muxtune.runtime.bank import AdapterBank, SlotPool, TaskState
from muxtune.runtime.batch import PassTensors, Placed, assemble
from muxtune.workload.encoding import EncodedSequence

ROWS_PER_PASS = 512

# By slot: sums of negative log-likelihoods, and numbers of targets; see ``score_pass``.
Score = Callable[[SlotPool, PassTensors], tuple[list[float], list[int]]]


def perplexity(
    backbone: Backbone,
    state: TaskState,
    sequences: Sequence[EncodedSequence],
    max_tokens: int,
    score: Score,
) -> float | None:
    """exp of the mean loss over the targets of the first sequences that ``max_tokens`` allow.

    At least one sequence is taken; None when there is none or ``max_tokens`` is 0. The task must
    have a place in a pool.
    """
    chosen = _within(sequences, max_tokens)
    if not chosen or state.place is None:
        return None
    pool, slot = _scoring_place(backbone, state)
    total_nll, total_targets = 0.0, 0
    for group in _passes(chosen):
        tensors = pack_for_slot(backbone, group, pool, slot)
        nll_S, targets_S = score(pool, tensors)
        total_nll, total_targets = total_nll + nll_S[slot], total_targets + targets_S[slot]
    return _exp(total_nll / total_targets) if total_targets else None


def _scoring_place(backbone: Backbone, state: TaskState) -> tuple[SlotPool, int]:
    """The task's own place, or where it is laid out for training only, a copy of its weights."""
    assert state.place is not None
    pool, slot = state.place
    if isinstance(pool, SlotPool):
        return pool, slot
    alone = AdapterBank(backbone, torch.float32).slot_pool((state.slot,), trains=False)
    alone.fill_weights(state, 0)
    return alone, 0


def _exp(mean_loss: float) -> float:
    return math.exp(mean_loss) if mean_loss < 700 else math.inf


def _within(sequences: Sequence[EncodedSequence], max_tokens: int) -> list[EncodedSequence]:
    chosen, total = [], 0
    for sequence in sequences if max_tokens > 0 else ():
        total += len(sequence.tokens)
        if chosen and total > max_tokens:
            break
        chosen.append(sequence)
    return chosen


def _passes(sequences: Sequence[EncodedSequence]) -> Iterator[list[EncodedSequence]]:
    group: list[EncodedSequence] = []
    rows = 0
    for sequence in sequences:
        if group and rows + len(sequence.tokens) > ROWS_PER_PASS:
            yield group
            group, rows = [], 0
        group.append(sequence)
        rows += len(sequence.tokens)
    yield group


def pack_for_slot(
    backbone: Backbone, sequences: Sequence[EncodedSequence], pool: SlotPool, slot: int
) -> PassTensors:
    """Sequences one after another, all in one slot."""
    placed, row = [], 0
    for sequence in sequences:
        placed.append(Placed(slot, row, 0, sequence))
        row += len(sequence.tokens)
    return assemble(
        placed,
        [(item.row, len(item.sequence.tokens)) for item in placed],
        [(slot, 0, row)],
        torch.ones(len(pool.slots)),
        {},
        row,
        backbone.pad_id,
        backbone.device,
        pool.virtual,
    )
