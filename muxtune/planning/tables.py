"""Prefix tables over one period of a task's batches: packing once, then arithmetic.

Legend of array shapes: V units (micro-batches, or steps) of two periods one after the other, so
that a period from any offset on is a slice; K micro-batches of a unit (1, or the most that a step
has); F fields of a load.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import accumulate
from math import inf
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from muxtune.planning.facts import HTaskFacts, TaskFacts
from muxtune.planning.packing import PackLoad, pack_loads
from muxtune.protocols import LengthSource
from muxtune.types import Cursor, PackRule, new_tuple

Value = TypeVar("Value")
_SHORT_PERIOD_STEPS = 64
_MAX_TABLE_STEPS = 4_096


class BoundedMemo(Generic[Value]):
    """A memo that forgets what was not used for long: entries live in a young generation, and go
    to an old one, to be lost with it unless they are used, whenever the young one is full. Unlike
    a list of last uses this costs nothing on the common path."""

    def __init__(self, max_entries: int) -> None:
        self._young: dict[Hashable, Value] = {}
        self._old: dict[Hashable, Value] = {}
        self._max_young = max(1, max_entries // 2)

    def get(self, key: Hashable) -> Value | None:
        value = self._young.get(key)
        if value is None:
            value = self._old.get(key)
            if value is not None:
                self.put(key, value)
        return value

    def put(self, key: Hashable, value: Value) -> Value:
        if len(self._young) >= self._max_young:
            self._old, self._young = self._young, {}
        self._young[key] = value
        return value

    def __len__(self) -> int:
        return len(self._young.keys() | self._old.keys())


# Fields of a grid; the first three add up over tasks, of the last one the largest counts.
CHUNKS, PAIRS, LOSS_ROWS, LONGEST = range(4)


class Grid(NamedTuple):
    """Loads of one period's units, flat over V and K. Entries of micro-batches that a unit does
    not have are 0."""

    num_units: int
    summed_FVK: np.ndarray
    longest_VK: np.ndarray


class StepTable:
    """One period of one task's batches, packed under one chunk length, quota and rule; or as many
    steps, ``covered_steps``, as have been asked for of a period that is long or does not end.

    Lists hold cumulative values before the micro-batch (or step) of that index; the last entry
    is the whole period's.
    """

    def __init__(self, loads: list[list[PackLoad]], covered_steps: float) -> None:
        """``loads``: of each step, its micro-batches. ``covered_steps`` is infinite for a whole
        period."""
        self.covered_steps = covered_steps
        flat = [load for step in loads for load in step]
        self.period_steps = len(loads)
        self.num_micro_batches = len(flat)
        self.first_of_step = [0, *accumulate(len(step) for step in loads)]
        self.step_of = [s for s, step in enumerate(loads) for _ in step] + [len(loads)]
        self.pairs = [0, *accumulate(load.attention_pairs for load in flat)]
        self.loss_rows = [0, *accumulate(load.loss_rows for load in flat)]
        self.all_pairs, self.all_loss_rows = self.pairs[-1], self.loss_rows[-1]
        self.tokens = [0, *accumulate(load.tokens for load in flat)]
        self.left = [left for step in loads for left in _left_before(step)]
        self._micro_batch_of = {
            (step, left): index
            for index, (step, left) in enumerate(zip(self.step_of, self.left, strict=False))
        }
        self.most_micro_batches = max(len(step) for step in loads)  # of any step
        self._loads = loads
        self._grids: dict[tuple[bool, int], Grid] = {}

    def start_of(self, step: int) -> int:
        """Micro-batches before a step, counted over all periods."""
        periods, step_in_period = divmod(step, self.period_steps)
        return periods * self.num_micro_batches + self.first_of_step[step_in_period]

    def find(self, cursor: Cursor) -> int | None:
        """Micro-batches before the cursor, or None when it stands where this packing never
        does: another chunk length or quota left it in the middle of a step."""
        periods, step_in_period = divmod(cursor.step, self.period_steps)
        at = self._micro_batch_of.get((step_in_period, cursor.left))
        return None if at is None else periods * self.num_micro_batches + at

    def tokens_between(self, start: int, stop: int) -> int:
        """Effective tokens of micro-batches [start, stop), counted over all periods."""
        length, tokens = self.num_micro_batches, self.tokens
        first, first_at = divmod(start, length)
        last, last_at = divmod(stop, length)
        return (last - first) * tokens[length] + tokens[last_at] - tokens[first_at]

    def span(self, cursor: Cursor, last_step: int) -> tuple[int | None, int]:
        """``find(cursor)`` and ``start_of(last_step)`` in one call, for the loops over all tasks of
        a plan."""
        step, left = cursor
        period_steps, period_micro_batches = self.period_steps, self.num_micro_batches
        periods, step_in_period = divmod(last_step, period_steps)
        end = periods * period_micro_batches + self.first_of_step[step_in_period]
        periods, step_in_period = divmod(step, period_steps)
        at = self._micro_batch_of.get((step_in_period, left))
        return (None if at is None else periods * period_micro_batches + at), end

    def cursor_at(self, micro_batches: int) -> Cursor:
        periods, at = divmod(micro_batches, self.num_micro_batches)
        step = periods * self.period_steps + self.step_of[at]
        # What Cursor(...) does, without its keyword handling: this is asked for every task.
        return new_tuple(Cursor, (step, self.left[at]))

    def grid(self, by_steps: bool, width: int) -> Grid:
        """Loads by step, ``width`` micro-batches wide, or by micro-batch (width 1)."""
        key = (by_steps, width)
        grid = self._grids.get(key)
        if grid is None:
            grid = self._grids[key] = self._make_grid(by_steps, width)
        return grid

    def _make_grid(self, by_steps: bool, width: int) -> Grid:
        units = self._loads if by_steps else [[load] for step in self._loads for load in step]
        load_FVK = np.zeros((LONGEST + 1, 2 * len(units), width), np.int64)
        for at, loads in enumerate([*units, *units]):
            for column, load in enumerate(loads):
                load_FVK[CHUNKS, at, column] = load.num_chunks
                load_FVK[PAIRS, at, column] = load.attention_pairs
                load_FVK[LOSS_ROWS, at, column] = load.loss_rows
                load_FVK[LONGEST, at, column] = load.longest_tokens
        flat = load_FVK.reshape(LONGEST + 1, -1)
        return Grid(len(units), flat[:LONGEST], flat[LONGEST])


def _left_before(step: list[PackLoad]) -> list[tuple[int, ...] | None]:
    """Cursor.left before each micro-batch of a step."""
    left: list[tuple[int, ...] | None] = [None]
    rest = {position for load in step for position in load.positions}
    for load in step[:-1]:
        rest.difference_update(load.positions)
        left.append(tuple(sorted(rest)))
    return left


class TableBook:
    """Tables and packed remainders of one LengthSource, made once, forgotten when unused. Keys
    hold the rule as a bool, because enum members hash slowly and every task is looked up."""

    def __init__(self, lengths: LengthSource, max_tables: int, max_remainders: int) -> None:
        self.lengths = lengths
        self._tables: BoundedMemo[StepTable] = BoundedMemo(max_tables)
        self._remainders: BoundedMemo[list[PackLoad]] = BoundedMemo(max_remainders)

    def tables(self, htask: HTaskFacts) -> list[StepTable] | None:
        """One a task; None where one has too many different batches to pack them beforehand."""
        chunk_tokens, is_padded = htask.chunk_tokens, htask.rule is PackRule.PAD
        lengths_key, known = self.lengths.lengths_key, self._tables.get
        tables: list[StepTable] = []
        for task in htask.tasks:
            _, task_id, quota, num_steps, _ = task
            key = (lengths_key(task_id), quota, chunk_tokens, is_padded)
            table = known(key)
            if table is None or num_steps > table.covered_steps:
                table = self._make_table(key, task, htask)
                if table is None:
                    return None
            tables.append(table)
        return tables

    def remainder(self, task: TaskFacts, htask: HTaskFacts, cursor: Cursor) -> list[PackLoad]:
        """What is left of the cursor's step, packed."""
        period = self.lengths.period_steps(task.task_id)
        step = cursor.step if period is None else cursor.step % period
        lengths_key, is_padded = self.lengths.lengths_key(task.task_id), htask.rule is PackRule.PAD
        key = (lengths_key, task.quota, htask.chunk_tokens, is_padded, step, cursor.left)
        known = self._remainders.get(key)
        if known is not None:
            return known
        samples = self.lengths.batch(task.task_id, cursor.step)
        loads = pack_loads(samples, cursor.left, htask.chunk_tokens, task.quota, htask.rule)
        return self._remainders.put(key, loads)

    def _make_table(self, key: Hashable, task: TaskFacts, htask: HTaskFacts) -> StepTable | None:
        """Short periods are packed whole, so that tasks of different lengths share a table; of
        others, as many steps as the task has."""
        num_steps: float = max(1, task.num_steps)
        period = self.lengths.period_steps(task.task_id)
        if period is not None and (period <= _SHORT_PERIOD_STEPS or period <= num_steps):
            num_steps, covered_steps = period, inf
        else:
            covered_steps = num_steps
        if num_steps > _MAX_TABLE_STEPS:
            return None
        batches = (self.lengths.batch(task.task_id, step) for step in range(int(num_steps)))
        packed = [
            pack_loads(samples, None, htask.chunk_tokens, task.quota, htask.rule)
            for samples in batches
        ]
        return self._tables.put(key, StepTable(packed, covered_steps))
