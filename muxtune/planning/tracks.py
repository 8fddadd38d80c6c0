"""How one hTask goes on from given cursors, without walking: a track answers for any number of
units (micro-batches, or steps of each task; see HTaskFacts) what was done and where tasks stand.

Two kinds. A ``SeparableTrack`` serves hTasks of one shape whose turns are counted: every count is
a sum over tasks. A ``JointTrack`` serves the rest, where the shape of a micro-batch, or how many
a step takes, depends on all tasks together: it lays the tasks' tables over each other, once for a
joint period. Both give the integers that walking gives (``walking.Counts``).

Legend of array shapes: U units, K micro-batches of a unit, F fields of a load, S shapes, C columns
of ``Counts`` (or their three kinds).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
from typing import NamedTuple, Protocol

import numpy as np

from muxtune.errors import ConfigError
from muxtune.planning.facts import HTaskFacts, TaskFacts, padded_pairs
from muxtune.planning.packing import PackLoad
from muxtune.planning.tables import CHUNKS, LONGEST, BoundedMemo, StepTable, TableBook
from muxtune.planning.walking import Counts, TaskFeed, play_micro_batches, play_step
from muxtune.types import Cursor, PackRule

# Units laid out at once: of a joint period, or of a stretch where that would be too long.
_MAX_JOINT_UNITS = 4_096
_NO_UNITS = np.zeros(0, np.int64)
_NO_LOADS: list[PackLoad] = []


class HTaskTrack(Protocol):
    """``ends`` maps each task that is still at work to the units after which it ends."""

    htask: HTaskFacts
    ends: dict[str, int]

    def counts(self, units: int) -> list[int]:
        """``Counts.values`` of the first ``units`` units, without the tokens at its end."""
        ...

    def tokens(self, units: int) -> int:
        """Effective tokens of the first ``units`` units; apart, for few ask."""
        ...

    def cursors(self, units: int) -> dict[str, Cursor]: ...


class Place(NamedTuple):
    """Where a task stands in its table. ``remainder``: packed rest of a step that another
    packing left behind; it comes before micro-batch ``start``. ``remaining``: micro-batches until
    the task ends, the remainder's included."""

    task: TaskFacts
    table: StepTable
    cursor: Cursor
    remainder: list[PackLoad]
    start: int
    remaining: int

    @property
    def remaining_steps(self) -> int:
        if self.remaining == 0:
            return 0
        return 1 if self.task.draining else self.task.num_steps - self.cursor.step

    def cursor_after(self, micro_batches: int) -> Cursor:
        done = min(micro_batches, self.remaining)
        if done == 0:
            return self.cursor
        beyond = done - len(self.remainder)
        if beyond >= 0:
            return self.table.cursor_at(self.start + beyond)
        rest = sorted(p for load in self.remainder[done:] for p in load.positions)
        return Cursor(self.cursor.step, tuple(rest))

    def tokens_before(self, micro_batch: int) -> int:
        """From the cursor to a micro-batch of the table, the remainder included."""
        tokens = sum(load.tokens for load in self.remainder)
        return tokens + _between(self.table.tokens, self.start, micro_batch)


def place_of(
    task: TaskFacts, table: StepTable, cursor: Cursor, htask: HTaskFacts, book: TableBook
) -> Place:
    step, left = cursor
    _, _, _, num_steps, draining = task
    if step >= num_steps or (draining and left is None):
        return Place(task, table, cursor, _NO_LOADS, 0, 0)
    end = table.start_of(step + 1 if draining else num_steps)
    start = table.find(cursor)
    if start is not None:
        return Place(task, table, cursor, _NO_LOADS, start, end - start)
    remainder, start = book.remainder(task, htask, cursor), table.start_of(step + 1)
    return Place(task, table, cursor, remainder, start, len(remainder) + end - start)


def _between(cumulative: list[int], start: int, stop: int) -> int:
    """Sum over [start, stop) of a periodic sequence given by its cumulative sums."""
    length = len(cumulative) - 1
    first, first_at = divmod(start, length)
    last, last_at = divmod(stop, length)
    return (last - first) * cumulative[-1] + cumulative[last_at] - cumulative[first_at]


# ------------------------------------------------------------------------------- separable


class SeparableTrack:
    """One shape, counted turns: each task runs through its own table, blind to the others."""

    def __init__(self, htask: HTaskFacts, places: Sequence[Place]) -> None:
        self.htask, self._places = htask, places
        self.ends: dict[str, int] = {}
        self._last_end = 0
        self._after_remainder: list[Place] = []
        # Of other places: column of closed steps, micro-batch stood at, micro-batches to go,
        # steps closed before, table.
        self._rows: list[tuple[int, int, int, int, StepTable]] = []
        for place in places:
            task, table, cursor, remainder, start, remaining = place
            if remaining:
                self.ends[task.task_id] = remaining
                self._last_end = max(self._last_end, remaining)
                if remainder:
                    self._after_remainder.append(place)
                else:
                    self._rows.append((3 + task.slot, start, remaining, cursor.step, table))
        self._is_padded = htask.rule is PackRule.PAD
        self._pairs_before = self._loss_rows_before = 0
        # What the tables hold before the cursors, by the very loop that will be asked.
        _, self._pairs_before, self._loss_rows_before, *_ = self._table_counts(0)

    def counts(self, units: int) -> list[int]:
        values = self._table_counts(units)
        for place in self._after_remainder:
            _add_after_remainder(values, place, units)
        if self._is_padded:
            values[1] = values[0] * padded_pairs(self.htask.shapes[0])
        return values

    def _table_counts(self, units: int) -> list[int]:
        """This loop is most of what a forecast costs."""
        values = [0] * (3 + self.htask.num_slots)
        pairs, loss_rows = -self._pairs_before, -self._loss_rows_before
        for column, start, remaining, steps_before, table in self._rows:
            done = start + (units if units < remaining else remaining)
            periods, at = divmod(done, table.num_micro_batches)
            pairs += periods * table.all_pairs + table.pairs[at]
            loss_rows += periods * table.all_loss_rows + table.loss_rows[at]
            values[column] = periods * table.period_steps + table.step_of[at] - steps_before
        values[0] = units if units < self._last_end else self._last_end
        values[1], values[2] = pairs, loss_rows
        return values

    def tokens(self, units: int) -> int:
        return sum(_tokens_after(place, units) for place in self._places)

    def cursors(self, units: int) -> dict[str, Cursor]:
        return {place.task.task_id: place.cursor_after(units) for place in self._places}


def _add_after_remainder(values: list[int], place: Place, units: int) -> None:
    done = min(units, place.remaining)
    loads = place.remainder[:done]
    stop = place.start + done - len(loads)
    values[1] += sum(load.attention_pairs for load in loads)
    values[1] += _between(place.table.pairs, place.start, stop)
    values[2] += sum(load.loss_rows for load in loads)
    values[2] += _between(place.table.loss_rows, place.start, stop)
    values[3 + place.task.slot] += place.cursor_after(done).step - place.cursor.step


def _tokens_after(place: Place, micro_batches: int) -> int:
    done = min(micro_batches, place.remaining)
    beyond = done - len(place.remainder)
    if beyond >= 0:
        return place.tokens_before(place.start + beyond)
    return sum(load.tokens for load in place.remainder[:done])


# ----------------------------------------------------------------------------------- joint


class Overlay(NamedTuple):
    """Several tasks' tables laid over each other, one row a unit. ``cumulative_UC`` has a row
    more than there are units; its columns are micro-batches, pairs and loss rows a shape.
    ``misfits_U``: units with a micro-batch that no shape holds. ``tables`` keeps them alive, for
    the memo's key names them by identity."""

    num_units: int
    cumulative_UC: np.ndarray
    misfits_U: np.ndarray
    tables: tuple[StepTable, ...]


class _Stretch(NamedTuple):
    """Units in which the same tasks are at work and none holds a foreign remainder."""

    first_unit: int
    num_units: int
    overlay: Overlay
    offset: int  # of its first unit in the overlay

    def counts_C(self, units: int) -> np.ndarray:
        cumulative_UC = self.overlay.cumulative_UC
        periods, at = divmod(self.offset + units, self.overlay.num_units)
        return periods * cumulative_UC[-1] + cumulative_UC[at] - cumulative_UC[self.offset]


class _Prefix(NamedTuple):
    """Units that were walked, because a task holds the remainder of another packing."""

    first_unit: int
    num_units: int
    counts_UC: np.ndarray

    def counts_C(self, units: int) -> np.ndarray:
        return self.counts_UC[units]


class JointTrack:
    """Shapes or turns that depend on all tasks together; see the module's docstring.

    A chain of stretches, each made when it is asked for: a new one begins where a task ends.
    """

    def __init__(
        self,
        htask: HTaskFacts,
        places: Sequence[Place],
        book: TableBook,
        overlays: BoundedMemo[Overlay],
    ) -> None:
        self.htask, self._places = htask, places
        self._book, self._overlays = book, overlays
        self.ends = {
            place.task.task_id: place.remaining_steps if htask.by_steps else place.remaining
            for place in places
            if place.remaining
        }
        self._last_end = max(self.ends.values(), default=0)
        self._stretches: list[_Stretch | _Prefix] = []
        self._counts_before: list[np.ndarray] = []
        self._laid_out = 0

    def counts(self, units: int) -> list[int]:
        units = min(units, self._last_end)
        counts_C = self._counts_C(units)
        values = counts_C.tolist()
        if self.htask.rule is PackRule.PAD:
            num_shapes = len(self.htask.shapes)
            for index, shape in enumerate(self.htask.shapes):
                values[num_shapes + index] = values[index] * padded_pairs(shape)
        return values + self._closes(units)

    def tokens(self, units: int) -> int:
        if not self.htask.by_steps:
            return sum(_tokens_after(place, units) for place in self._places)
        return sum(
            place.tokens_before(place.table.start_of(cursor.step))
            for place in self._places
            if (cursor := self._cursor(place, units)) != place.cursor
        )

    def cursors(self, units: int) -> dict[str, Cursor]:
        return {place.task.task_id: self._cursor(place, units) for place in self._places}

    def _cursor(self, place: Place, units: int) -> Cursor:
        if not self.htask.by_steps:
            return place.cursor_after(units)
        done = min(units, self.ends.get(place.task.task_id, 0))
        return Cursor(place.cursor.step + done, None) if done else place.cursor

    def _closes(self, units: int) -> list[int]:
        closes = [0] * self.htask.num_slots
        for place in self._places:
            done = min(units, self.ends.get(place.task.task_id, 0))
            if not self.htask.by_steps:
                done = place.cursor_after(done).step - place.cursor.step
            closes[place.task.slot] = done
        return closes

    def _counts_C(self, units: int) -> np.ndarray:
        while self._laid_out < units:
            self._lay_out_more()
        for stretch, before_C in zip(self._stretches, self._counts_before, strict=True):
            if units <= stretch.first_unit + stretch.num_units:
                return before_C + stretch.counts_C(units - stretch.first_unit)
        return np.zeros(3 * len(self.htask.shapes), np.int64)

    def _lay_out_more(self) -> None:
        before_C = self._counts_C(self._laid_out)
        cursors = self.cursors(self._laid_out)
        stretch = self._next_stretch(self._laid_out, cursors)
        self._stretches.append(stretch)
        self._counts_before.append(before_C)
        self._laid_out += stretch.num_units

    def _next_stretch(self, first_unit: int, cursors: dict[str, Cursor]) -> _Stretch | _Prefix:
        by_steps = self.htask.by_steps
        at_work, entries, ends = [], [], []
        num_walked = 0
        for place in self._places:
            task_id = place.task.task_id
            end = self.ends.get(task_id, 0)
            if end <= first_unit:
                continue
            cursor = cursors[task_id]
            start = cursor.step if by_steps else place.table.find(cursor)
            if start is None or (by_steps and cursor.left is not None):
                num_walked = max(num_walked, self._foreign_units(place, cursor))
            at_work.append((place, cursor))
            entries.append((place, start or 0))
            ends.append(end)
        if num_walked:
            return self._walk(first_unit, num_walked, at_work)
        return self._lay_over(first_unit, min(ends) - first_unit, entries)

    def _foreign_units(self, place: Place, cursor: Cursor) -> int:
        """Units until the task is where its table knows it."""
        if self.htask.by_steps:
            return 1
        return len(self._book.remainder(place.task, self.htask, cursor))

    def _walk(
        self, first_unit: int, num_units: int, at_work: list[tuple[Place, Cursor]]
    ) -> _Prefix:
        counts, rows = Counts(self.htask), []
        feeds = [
            TaskFeed(place.task, self.htask, cursor, self._book.lengths)
            for place, cursor in at_work
        ]
        num_columns = 3 * len(self.htask.shapes)
        rows.append(counts.values[:num_columns])
        for _ in range(num_units):
            if self.htask.by_steps:
                play_step(self.htask, feeds, counts.take)
            else:
                play_micro_batches(self.htask, feeds, 1, counts.take)
            rows.append(counts.values[:num_columns])
        return _Prefix(first_unit, num_units, np.array(rows, np.int64))

    def _lay_over(
        self, first_unit: int, num_units: int, entries: list[tuple[Place, int]]
    ) -> _Stretch:
        tables = tuple(place.table for place, _ in entries)
        lengths = [
            table.period_steps if self.htask.by_steps else table.num_micro_batches
            for table in tables
        ]
        period = lcm(*lengths)
        starts = [start for _, start in entries]
        quota = sum(place.task.quota for place, _ in entries)
        if period > _MAX_JOINT_UNITS:
            num_units = min(num_units, _MAX_JOINT_UNITS)
            overlay = lay_over(self.htask, tables, starts, num_units, quota)
            stretch = _Stretch(first_unit, num_units, overlay, 0)
        else:
            overlay = self._periodic_overlay(tables, starts, lengths, period, quota)
            stretch = _Stretch(first_unit, num_units, overlay, starts[0] % period)
        _check_misfits(self.htask, stretch)
        return stretch

    def _periodic_overlay(
        self,
        tables: tuple[StepTable, ...],
        starts: list[int],
        lengths: list[int],
        period: int,
        quota: int,
    ) -> Overlay:
        """Laid out from where the first task stands at its own beginning, so that the same tasks
        find the same overlay however far they have come."""
        offsets = [
            (start - starts[0]) % length for start, length in zip(starts, lengths, strict=True)
        ]
        key = (tuple(map(id, tables)), tuple(offsets), self.htask.sizes, self.htask.by_steps)
        known = self._overlays.get(key)
        if known is not None:
            return known
        return self._overlays.put(key, lay_over(self.htask, tables, offsets, period, quota))


def lay_over(
    htask: HTaskFacts,
    tables: tuple[StepTable, ...],
    starts: Sequence[int],
    num_units: int,
    quota: int,
) -> Overlay:
    """``starts``: unit of each table at the overlay's first unit. ``quota``: of all tasks."""
    load_FUK = _add_up(htask, tables, starts, num_units)
    shape_UK, misfits_U = _shape_indexes(htask, load_FUK, quota)
    num_shapes = len(htask.shapes)
    counted_CUK = load_FUK[:LONGEST]
    counted_CUK[CHUNKS] = load_FUK[CHUNKS] > 0  # from here on: one micro-batch, where there is one
    of_shape_UKS = shape_UK[:, :, None] == np.arange(num_shapes)
    by_shape_CUS = np.add.reduce(counted_CUK[:, :, :, None] * of_shape_UKS, axis=2)
    cumulative_UC = np.zeros((num_units + 1, 3 * num_shapes), np.int64)
    counted_UC = by_shape_CUS.transpose(1, 0, 2).reshape(num_units, 3 * num_shapes)
    np.add.accumulate(counted_UC, axis=0, out=cumulative_UC[1:])
    return Overlay(num_units, cumulative_UC, misfits_U, tables)


def _add_up(
    htask: HTaskFacts, tables: tuple[StepTable, ...], starts: Sequence[int], num_units: int
) -> np.ndarray:
    """Loads of all tasks together, ``load_FUK``."""
    width = max(table.most_micro_batches for table in tables) if htask.by_steps else 1
    total_FUK = np.zeros((LONGEST + 1, num_units * width), np.int64)
    summed_FUK, longest_UK = total_FUK[:LONGEST], total_FUK[LONGEST]
    for table, start in zip(tables, starts, strict=True):
        period, part_FVK, part_longest_VK = table.grid(htask.by_steps, width)
        if num_units <= period:
            first = start % period * width
            at = slice(first, first + num_units * width)
        else:
            at = np.arange(start * width, (start + num_units) * width) % (period * width)
        np.add(summed_FUK, part_FVK[:, at], out=summed_FUK)
        np.maximum(longest_UK, part_longest_VK[at], out=longest_UK)
    return total_FUK.reshape(LONGEST + 1, num_units, width)


def _shape_indexes(
    htask: HTaskFacts, load_FUK: np.ndarray, quota: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first shape that holds each micro-batch, and units where there is none."""
    longest_UK, shapes = load_FUK[LONGEST], htask.shapes
    rows_tokens = [chunk_tokens for chunk_tokens, _ in htask.sizes]
    if quota <= min(num_chunks for _, num_chunks in htask.sizes) and (
        rows_tokens == sorted(rows_tokens)
    ):
        # Every shape has the chunks, and packing saw to it that the longest row fits the last.
        if htask.rule is PackRule.CHUNK or len(shapes) == 1:
            return np.zeros(longest_UK.shape, np.int64), _NO_UNITS
        return np.array(rows_tokens).searchsorted(longest_UK), _NO_UNITS
    index_UK = np.full(longest_UK.shape, len(shapes))
    for index in reversed(range(len(shapes))):
        fits_UK = load_FUK[CHUNKS] <= shapes[index].num_chunks
        if htask.rule is PackRule.PAD:
            fits_UK &= longest_UK <= shapes[index].chunk_tokens
        index_UK[fits_UK] = index
    return index_UK, np.flatnonzero((index_UK == len(shapes)).any(axis=1))


def _check_misfits(htask: HTaskFacts, stretch: _Stretch) -> None:
    """Raises ConfigError where the stretch meets a micro-batch that no shape holds."""
    overlay = stretch.overlay
    if not overlay.misfits_U.size:
        return
    ahead_U = (overlay.misfits_U - stretch.offset) % overlay.num_units
    if (ahead_U < stretch.num_units).any():
        raise ConfigError(
            f"htasks[{htask.index}].shapes",
            "no shape holds all micro-batches of its tasks",
            "add a larger shape, or lower the quotas",
        )
