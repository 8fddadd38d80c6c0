"""Passes as captured steps: one program for forward, loss, backward and optimizer, replayed.

Joins, leaves and data only fill buffers as long as the pool's slots and the sizes hold. In
deterministic mode a micro-batch always has the rows of its own shape; else it takes the smallest
of a few sizes that holds its tokens, because rows need no alignment here: besides the shapes' own
sizes those that fit the micro-batches to come. All are captured when a plan takes over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from muxtune.planning.step_builder import StepBuilder
from muxtune.protocols import LengthSource
from muxtune.runtime.adapters import adapter_method
from muxtune.runtime.batch import Placed
from muxtune.runtime.optimizer import StepOutcome, learning_rate
from muxtune.runtime.pass_runner import PassResult, PassWork, PendingPass, state_of
from muxtune.runtime.static_step import (
    CapturedSteps,
    SlotInput,
    StaticModel,
    StepLayout,
    StepProgram,
)
from muxtune.runtime.static_step import Sequence as Rows
from muxtune.runtime.static_step.captured import CaptureMemory, Pending
from muxtune.runtime.static_step.inputs import StepInputs
from muxtune.runtime.static_step.pool import StaticPool
from muxtune.runtime.tasks import TaskDataFailure
from muxtune.runtime.training import Mark
from muxtune.types import Cursor, HTask, MicroBatch, PackRule, Plan, TaskSpec
from muxtune.workload.encoding import EncodedSequence

DEPTH = 2  # results are read this many passes late
MAX_CLOSE_SIZES = 8
# Of all hTasks of an instance together: each is a graph, which takes some 30 MB of the GPU beside
# the memory that it computes in, and half a second to capture.
MAX_SIZES, MIN_CLOSE_SIZES = 24, 2
_LEAST_GAIN = 0.003  # of all rows: a size costs half a second of capturing
# A join or a leave in a shape that holds: the others wait for the capture and for nothing else.
_MAX_LATER_SIZES, _LEAST_LATER_GAIN = 2, 0.03
# Whole tiles of the products (128 rows) gained nothing when they were measured: the library's
# choices depend on the size too, and 3,712 rows took 2% longer than 3,824.
_SIZE_STEP = 64
_MIN_SEQLEN = 512
_BOUNDS_STEP = 64
_ROUNDS_AHEAD = 32  # looked at for the sizes of micro-batches to be captured with a plan


class Capacity(NamedTuple):
    """What a program is made for besides its pool; see ``StepLayout``. ``blocks``: row counts of
    the hTask's shapes, prompts' rows included, and how many blocks each recomputes."""

    layout: StepLayout
    blocks: Mapping[int, int]

    def holds(self, other: Capacity) -> bool:
        mine, theirs = self.layout, other.layout
        return (
            mine.max_bounds >= theirs.max_bounds
            and mine.max_seqlen >= theirs.max_seqlen
            and mine.dropout == theirs.dropout
            and other.blocks.items() <= self.blocks.items()
        )

    def close_sizes(
        self, tokens: Collection[int], given: Collection[int], is_later: bool, most: int
    ) -> list[int]:
        """Sizes for micro-batches with so many tokens, besides those ``given``."""
        rows = {count + self.layout.prompt_rows for count in tokens}
        return close_sizes(rows, given, self.layout.max_rows, is_later, most)


def capacity_of(htask: HTask, tasks: Iterable[TaskSpec], longest_tokens: int) -> Capacity:
    """Generous in what joining tasks may change: the number and the length of sequences (to at
    most ``longest_tokens``, beyond which they are refused)."""
    slots = htask.shapes[0].slots
    prompts = tuple(slot.rank for slot in slots if slot.method == "prompt")
    by_size = sorted(
        ((s.padded_tokens + sum(prompts), s.recompute) for s in htask.shapes), reverse=True
    )
    blocks = dict(by_size)  # of shapes of one size the one that recomputes least
    shapes = sorted(blocks)
    specs = list(tasks)
    longest = max([_MIN_SEQLEN, *prompts, *(spec.data.max_length_tokens for spec in specs)])
    max_seqlen = min(1 << (longest - 1).bit_length(), longest_tokens)
    sequences = sum(spec.sequences_per_step for spec in specs)
    wanted = max(shapes[-1] // 32, sequences) + shapes[-1] // max_seqlen + 1 + len(prompts)
    max_bounds = -(-wanted // _BOUNDS_STEP) * _BOUNDS_STEP
    layout = StepLayout(
        shapes[-1], len(slots), max_bounds, max_seqlen, any(slot.dropout for slot in slots),
        shapes[0], prompts,
    )  # fmt: skip
    return Capacity(layout, blocks)


def sizes_left(given: Sequence[int]) -> int:
    """Close sizes for each hTask of an instance. ``given``: how many its shapes have."""
    left = (MAX_SIZES - sum(given)) // max(1, len(given))
    return min(MAX_CLOSE_SIZES, max(MIN_CLOSE_SIZES, left))


def close_sizes(
    rows: Collection[int],
    given: Collection[int],
    most: int,
    is_later: bool = False,
    count: int = MAX_CLOSE_SIZES,
) -> list[int]:
    """Up to ``count`` sizes, besides those ``given``, that micro-batches with ``rows``
    tokens are best off with: rows need no alignment to chunks, so a shape's own size is a part
    too large for them. Each next size is the one that leaves least filler. ``is_later``: fewer,
    and only those that gain much.
    """
    least_gain = _LEAST_GAIN
    if is_later:
        count, least_gain = min(count, _MAX_LATER_SIZES), _LEAST_LATER_GAIN
    whole = {-(-tokens // _SIZE_STEP) * _SIZE_STEP for tokens in rows}
    sizes, added = set(given), []
    for _ in range(count):
        candidates = [size for size in sorted(whole - sizes) if size <= most]
        best = min(candidates, key=lambda size: _rows_taken(rows, {*sizes, size}), default=None)
        if best is None:
            break
        taken = _rows_taken(rows, sizes)
        if taken - _rows_taken(rows, {*sizes, best}) < least_gain * taken:
            break
        sizes.add(best)
        added.append(best)
    return added


def _rows_taken(rows: Collection[int], sizes: Collection[int]) -> int:
    return sum(min((size for size in sizes if size >= count), default=0) for count in rows)


def rows_ahead(
    plan: Plan, cursors: Mapping[str, Cursor], builder: StepBuilder, lengths: LengthSource
) -> dict[int, set[int]]:
    """Tokens of the micro-batches of the next rounds, by hTask."""
    rows: dict[int, set[int]] = {}
    for _ in range(_ROUNDS_AHEAD):
        try:
            micro_batches, cursors = builder.next_round(plan, cursors, lengths)
        except TaskDataFailure:
            break  # the round itself will tell
        for item in micro_batches:
            if item.packing is PackRule.PAD:
                continue  # runs in the rows of its shape
            pieces = [piece for chunk in item.chunks for piece in chunk.pieces]
            tokens = sum(piece.stop - piece.start for piece in pieces)
            rows.setdefault(item.htask, set()).add(tokens)
    return rows


def program_of(
    model: StaticModel,
    pool: StaticPool,
    layout: StepLayout,
    deterministic: bool,
    windows: bool = False,
) -> StepProgram:
    """What is captured."""
    return StepProgram(
        model,
        pool.adapters,
        StepInputs(layout, model.device),
        deterministic=deterministic,
        extras=pool.extras,
        windows=windows,
    )


class CapturedRunner:
    """See ``PassRunner``. ``capture_s``: seconds spent on preparing sizes."""

    depth, phases = DEPTH, False

    def __init__(
        self,
        model: StaticModel,
        pool: StaticPool,
        capacity: Capacity,
        deterministic: bool,
        pad_id: int = 0,
        memory: CaptureMemory | None = None,
        windows: bool = False,
    ) -> None:
        self.pool, self.capacity, self.deterministic = pool, capacity, deterministic
        self.is_prepared = False
        program = program_of(model, pool, capacity.layout, deterministic, windows)
        self.steps = CapturedSteps(program, capacity.blocks, pad_id, memory, capacity.blocks)

    @property
    def capture_s(self) -> float:
        return sum(self.steps.capture_s.values())

    @property
    def max_rows(self) -> int:
        return self.capacity.layout.max_rows

    def prepare(self, rows_ahead: Collection[int] = (), most_close: int = MAX_CLOSE_SIZES) -> bool:
        """Capture the shapes' sizes, and up to ``most_close`` that micro-batches with
        ``rows_ahead`` tokens are best off with; False if all are there. Nothing is captured
        later, while tasks wait."""
        before = len(self.steps.capture_s)
        is_later, self.is_prepared = self.is_prepared, True
        self.steps.capture(self.capacity.blocks)
        if not self.deterministic:
            close = self.capacity.close_sizes(
                rows_ahead, self.steps.row_counts, is_later, most_close
            )
            with contextlib.suppress(torch.OutOfMemoryError):  # the shapes' own sizes will do
                self.steps.capture(close)
        return len(self.steps.capture_s) > before

    def start(self, work: PassWork, mark: Mark) -> PendingPass:
        rows = rows_of(work.placed)
        slots = {
            work.slot_of[task_id]: self._slot_input(work, task_id) for task_id in work.task_ids
        }
        pending = self.steps.step(rows, slots, num_rows=self._num_rows(work, rows))
        for task_id in work.task_ids:
            state_of(work, self.pool, task_id).is_open = task_id not in work.closing
        return _Captured(work, pending, self.pool)

    def _num_rows(self, work: PassWork, rows: Sequence[Rows]) -> int:
        count = rows_needed(work.micro_batch, rows, self.deterministic)
        return self.steps.ready_size_for(count + self.capacity.layout.prompt_rows)

    def _slot_input(self, work: PassWork, task_id: str) -> SlotInput:
        state, micro_batch = state_of(work, self.pool, task_id), work.micro_batch
        closes = task_id in work.closing
        return slot_input(state.task, state.num_steps, micro_batch, state.is_open, closes)


def rows_of(placed: Mapping[str, Sequence[Placed]]) -> list[Rows]:
    """Each task's sequences as the static step takes them."""
    return [
        Rows(item.slot, item.sequence.tokens, _is_learnt(item.sequence), item.position)
        for items in placed.values()
        for item in items
    ]


def rows_needed(micro_batch: MicroBatch, rows: Sequence[Rows], deterministic: bool) -> int:
    """Without prompts: those of the shape where neighbours or the rule must not matter."""
    if deterministic or micro_batch.packing is PackRule.PAD:
        return micro_batch.shape.padded_tokens
    return sum(len(item.tokens_n) for item in rows)


def slot_input(
    task: TaskSpec, num_steps: int, micro_batch: MicroBatch, keeps: bool, closes: bool
) -> SlotInput:
    """A task's side of a micro-batch; ``keeps`` and ``closes`` as in ``SlotInput``."""
    optimizer, step = task.optimizer, micro_batch.steps[task.task_id]
    return SlotInput(
        micro_batch.loss_tokens[task.task_id],
        keeps=keeps,
        closes=closes,
        scale=adapter_method(task.adapter.method).scale(task.adapter),
        lr=learning_rate(optimizer, step, num_steps),
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        dropout=task.adapter.dropout,
        seed=task.seed,
        step=step,
    )


def _is_learnt(sequence: EncodedSequence) -> np.ndarray:
    """The mask tells of a row whether what follows it is a target; here, of a token."""
    return np.concatenate(([False], sequence.target_mask[:-1]))


class _Captured:
    """A pass that may still run. Its tasks may have left their slots when it is read."""

    def __init__(self, work: PassWork, pending: Pending, pool: StaticPool) -> None:
        self.work, self.pending = work, pending
        self._states = {
            task_id: state
            for task_id in work.closing
            if (state := pool.occupants[work.slot_of[task_id]]) is not None
        }

    def result(self) -> PassResult:
        host, slot_of = self.pending.result(), self.work.slot_of
        outcomes = {}
        for task_id, state in self._states.items():
            slot = slot_of[task_id]
            step = self.work.micro_batch.steps[task_id]
            rate = learning_rate(state.task.optimizer, step, state.num_steps)
            outcomes[task_id] = StepOutcome(rate, host.grad_norms[slot], not host.skipped[slot])
            state.step += not host.skipped[slot]
        losses = {task_id: host.losses[slot_of[task_id]] for task_id in self.work.placed}
        return PassResult(losses, outcomes)


__all__ = [
    "DEPTH", "Capacity", "CapturedRunner", "capacity_of", "close_sizes", "program_of", "rows_ahead",
    "rows_needed", "rows_of", "slot_input",
]  # fmt: skip
