"""Step building for fleets: exact packing, mean times.

Where a task stands, and after how many rounds it ends, are the integers that ``StepBuilder`` gives.
What a round takes is the mean over all ways in which the tasks' batches can coincide, computed once
for an arrangement of task classes and then shared by every plan that has it; so time grows in
proportion to rounds, and questions about thousands of rounds cost as much as about one.

Plans that have no such mean (lengths without a period, micro-batches that may fit no shape, an
hTask visited in two ways) are left to ``StepBuilder``.

Legend of array shapes: T tasks, V units (micro-batches, or steps) of one period, K micro-batches of
a unit, S shapes, N chunk counts from 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil, inf
from typing import NamedTuple

import numpy as np

from muxtune.planning.facts import (
    Cursors,
    HTaskFacts,
    PlanFacts,
    TaskFacts,
    cursor_of,
    padded_pairs,
)
from muxtune.planning.packing import PackLoad
from muxtune.planning.step_builder import StepBuilder
from muxtune.planning.tables import CHUNKS, LONGEST, LOSS_ROWS, PAIRS, BoundedMemo, StepTable
from muxtune.protocols import CostModel, LengthSource
from muxtune.types import NS_PER_S, Cursor, Forecast, HTask, PackRule, Plan

_MAX_ARRANGEMENTS = 100_000
_MAX_PLANS = 8_192  # at least the busy instances of a fleet: each asks about its plan twice

# Task id, cursor, table, micro-batch (or step) stood at, units to the end, what is left of a step
# that another packing began, and the hTask.
_Row = tuple[str, Cursor, StepTable, int, int, Sequence[PackLoad], "_Group"]


class MeanStepBuilder(StepBuilder):
    """A ``StepBuilder`` whose durations are means: ``Forecast.exact`` says that its rounds and
    task ids are exact."""

    def __init__(self, max_walked: int = 20_000) -> None:
        super().__init__(max_walked)
        self._arrangements: BoundedMemo[_Arrangement] = BoundedMemo(_MAX_ARRANGEMENTS)
        self._courses: BoundedMemo[_MeanCourse] = BoundedMemo(_MAX_PLANS)

    def advance(
        self, plan: Plan, cursors: Cursors, lengths: LengthSource, rounds: int
    ) -> dict[str, Cursor]:
        course = self._mean_course(plan, cursors, lengths)
        if course is None:
            return super().advance(plan, cursors, lengths, rounds)
        return {**cursors, **course.cursors(rounds)}

    def forecast(
        self, plan: Plan, cursors: Cursors, lengths: LengthSource, cost: CostModel
    ) -> Forecast:
        course = self._mean_course(plan, cursors, lengths)
        if course is None or course.is_stuck:
            return super().forecast(plan, cursors, lengths, cost)
        return course.forecast(cost)

    def rounds_until(
        self,
        plan: Plan,
        cursors: Cursors,
        lengths: LengthSource,
        cost: CostModel,
        elapsed_ns: int,
    ) -> tuple[int, int]:
        course = self._mean_course(plan, cursors, lengths)
        if course is None or course.is_stuck:
            return super().rounds_until(plan, cursors, lengths, cost, elapsed_ns)
        return course.rounds_until(cost, elapsed_ns)

    def duration_ns(
        self, plan: Plan, cursors: Cursors, lengths: LengthSource, cost: CostModel, rounds: int
    ) -> int:
        course = self._mean_course(plan, cursors, lengths)
        if course is None or course.is_stuck:
            return super().duration_ns(plan, cursors, lengths, cost, rounds)
        return course.duration_ns(cost, rounds)

    def round_tokens(
        self, plan: Plan, cursors: Cursors, lengths: LengthSource, rounds: int
    ) -> tuple[int, int]:
        course = self._mean_course(plan, cursors, lengths)
        if course is None or course.is_stuck:
            return super().round_tokens(plan, cursors, lengths, rounds)
        return course.effective_tokens(rounds), course.padded_tokens(rounds)

    def padded_tokens(
        self, plan: Plan, cursors: Cursors, lengths: LengthSource, rounds: int
    ) -> int:
        course = self._mean_course(plan, cursors, lengths)
        if course is None or course.is_stuck:
            return super().padded_tokens(plan, cursors, lengths, rounds)
        return course.padded_tokens(rounds)

    def remainder(
        self,
        lengths: LengthSource,
        task_id: str,
        task: TaskFacts,
        htask: HTaskFacts,
        cursor: Cursor,
    ) -> list[PackLoad]:
        """What is left of the cursor's step, packed. ``task``: facts of one of its class."""
        return self._book(lengths).remainder(task._replace(task_id=task_id), htask, cursor)

    def _mean_course(
        self, plan: Plan, cursors: Cursors, lengths: LengthSource
    ) -> _MeanCourse | None:
        if len(plan.replicas) > 1:
            return None
        key = (id(plan), id(lengths))  # a course keeps both alive, so the ids stay theirs
        course = self._courses.get(key)
        if course is None or list(map(cursors.get, course.task_ids)) != course.start:
            arrangement = self._arrangement(plan, lengths)
            if arrangement.groups is None:
                return None
            course = _MeanCourse(plan, arrangement.groups, cursors, lengths, self)
            self._courses.put(key, course)
        return course

    def _arrangement(self, plan: Plan, lengths: LengthSource) -> _Arrangement:
        """What plans with the same classes in the same slots share. Shapes count as the same when
        they are the same object, as in plans made of one remembered arrangement: they are deep."""
        htasks = plan.htasks
        if len(htasks) == 1:
            groups_key = _group_key(htasks[0], lengths)
        else:
            groups_key = tuple([_group_key(htask, lengths) for htask in htasks])
        key = (id(lengths), plan.round, plan.replicas, groups_key)
        known = self._arrangements.get(key)
        if known is None:
            known = self._arrangements.put(key, self._new_arrangement(plan, lengths))
        return known

    def _new_arrangement(self, plan: Plan, lengths: LengthSource) -> _Arrangement:
        facts = self._plan_facts(plan, lengths)
        groups: list[_Group] | None = []
        for htask in facts.htasks:
            tables = None if htask.mixed else self._book(lengths).tables(htask)
            if tables is None or not _has_means(htask, tables):
                groups = None
                break
            groups.append(_Group(htask, facts, tables))
        return _Arrangement(plan, lengths, groups)


class _Arrangement(NamedTuple):
    """``plan`` and ``lengths`` keep what the memo's key names by identity alive."""

    plan: Plan
    lengths: LengthSource
    groups: list[_Group] | None


def _group_key(htask: HTask, lengths: LengthSource) -> tuple[object, ...]:
    quota = htask.quota
    if len(quota) == 1:
        ((task_id, chunks),) = quota.items()
        slot, key = htask.slot_of[task_id], lengths.lengths_key(task_id)
        return (id(htask.shapes), htask.packing is PackRule.PAD, chunks, slot, key)
    return (
        id(htask.shapes),
        htask.packing is PackRule.PAD,
        tuple(quota.values()),
        tuple(map(htask.slot_of.__getitem__, quota)),
        tuple(map(lengths.lengths_key, quota)),
    )


def _has_means(htask: HTaskFacts, tables: Sequence[StepTable]) -> bool:
    """Whether every micro-batch finds a shape, over whole periods."""
    if any(table.covered_steps != inf for table in tables):
        return False
    quota = sum(task.quota for task in htask.tasks)
    sizes = [num_chunks for _, num_chunks in htask.sizes]
    if htask.rule is PackRule.CHUNK:
        return quota <= sizes[-1] and sizes == sorted(sizes)
    rows_tokens = [chunk_tokens for chunk_tokens, _ in htask.sizes]
    return quota <= min(sizes) and rows_tokens == sorted(rows_tokens)


# -------------------------------------------------------------------------------------- means


class _Means(NamedTuple):
    """Of one unit: passes by shape, pairs, loss rows, and padded tokens."""

    passes_S: tuple[float, ...]
    pairs: float
    loss_rows: float
    padded_tokens: float


class _Group:
    """One hTask of an arrangement. Members are counted in the order of its quota; their facts are
    of the first plan that had the arrangement: its slots and quotas, not its task ids, hold."""

    def __init__(self, htask: HTaskFacts, facts: PlanFacts, tables: Sequence[StepTable]) -> None:
        self.htask, self.replica = htask, facts.replica
        self.units_per_round, self.by_steps = htask.units_per_round, htask.by_steps
        names = list(facts.plan.htasks[htask.index].quota)
        place = {task.task_id: at for at, task in enumerate(htask.tasks)}
        self.members = [(tables[place[name]], htask.tasks[place[name]]) for name in names]
        self._means: dict[tuple[int, ...], _Means] = {}
        self._unit_s: dict[tuple[int, ...], float] = {}
        self._cost: CostModel | None = None

    def means(self, active: tuple[int, ...]) -> _Means:
        """``active``: members that contribute."""
        found = self._means.get(active)
        if found is None:
            tables = [self.members[at][0] for at in active]
            found = self._means[active] = unit_means(self.htask, tables)
        return found

    def unit_s(self, cost: CostModel, active: tuple[int, ...]) -> float:
        """Mean seconds of a unit."""
        if cost is not self._cost:
            self._cost, self._unit_s = cost, {}
        found = self._unit_s.get(active)
        if found is None:
            found = self._unit_s[active] = self._unit_time_s(cost, active)
        return found

    def _unit_time_s(self, cost: CostModel, active: tuple[int, ...]) -> float:
        means = self.means(active)
        of_shape = [cost.pass_coefficients(shape, self.replica) for shape in self.htask.shapes]
        passes = sum(means.passes_S)
        if not passes:
            return 0.0
        pairs = list(zip(means.passes_S, of_shape, strict=True))
        seconds = sum(number * each.base_s for number, each in pairs)
        seconds += means.loss_rows * sum(n * each.per_loss_row_s for n, each in pairs) / passes
        if self.htask.rule is PackRule.PAD:
            for (number, each), shape in zip(pairs, self.htask.shapes, strict=True):
                seconds += number * padded_pairs(shape) * each.per_pair_s
        else:
            seconds += means.pairs * sum(n * each.per_pair_s for n, each in pairs) / passes
        for at in active:
            table, task = self.members[at]
            steps = 1.0 if self.by_steps else table.period_steps / table.num_micro_batches
            seconds += steps * of_shape[0].optimizer_s[task.slot]
        return seconds


def unit_means(htask: HTaskFacts, tables: Sequence[StepTable]) -> _Means:
    """Means over all ways in which the tasks' units can coincide, each as likely as the other."""
    num_shapes = len(htask.shapes)
    if not tables:
        return _Means((0.0,) * num_shapes, 0.0, 0.0, 0.0)
    width = max(table.most_micro_batches for table in tables) if htask.by_steps else 1
    loads = [_period_FVK(table, htask.by_steps, width) for table in tables]
    passes_S = np.zeros(num_shapes)
    for column in range(width):
        if htask.rule is PackRule.CHUNK:
            passes_S += _passes_by_chunks(htask, [load[CHUNKS][:, column] for load in loads])
        else:
            passes_S += _passes_by_longest(htask, [load[LONGEST][:, column] for load in loads])
    tokens_S = [shape.padded_tokens for shape in htask.shapes]
    return _Means(
        tuple(passes_S.tolist()),
        float(sum(load[PAIRS].sum() / len(load[PAIRS]) for load in loads)),
        float(sum(load[LOSS_ROWS].sum() / len(load[LOSS_ROWS]) for load in loads)),
        float(passes_S @ np.array(tokens_S)),
    )


def _period_FVK(table: StepTable, by_steps: bool, width: int) -> np.ndarray:
    num_units, summed_FVK, longest_VK = table.grid(by_steps, width)
    load_FVK = np.concatenate([summed_FVK, longest_VK[None]])
    return load_FVK.reshape(LONGEST + 1, -1, width)[:, :num_units]


def _passes_by_chunks(htask: HTaskFacts, chunks_TV: Sequence[np.ndarray]) -> np.ndarray:
    """[S] mean passes of each shape: the distribution of a sum is the convolution of its parts'.
    A micro-batch that no task contributes to is left out."""
    likely_N = np.ones(1)
    for chunks_V in chunks_TV:
        likely_N = np.convolve(likely_N, np.bincount(chunks_V) / len(chunks_V))
    below_N = np.cumsum(likely_N)
    sizes = np.minimum([num_chunks for _, num_chunks in htask.sizes], len(below_N) - 1)
    return np.diff(below_N[sizes], prepend=likely_N[0])


def _passes_by_longest(htask: HTaskFacts, longest_TV: Sequence[np.ndarray]) -> np.ndarray:
    """[S] mean passes of each shape: the longest row fits where every task's longest does."""
    tokens_S = np.array([chunk_tokens for chunk_tokens, _ in htask.sizes])
    fits_S, absent = np.ones(len(tokens_S)), 1.0
    for longest_V in longest_TV:
        ordered_V = np.sort(longest_V)
        fits_S *= np.searchsorted(ordered_V, tokens_S, side="right") / len(ordered_V)
        absent *= float(np.searchsorted(ordered_V, 0, side="right")) / len(ordered_V)
    return np.diff(fits_S, prepend=absent)


# ------------------------------------------------------------------------------------- courses


class _MeanCourse:
    """How a plan goes on from given cursors."""

    def __init__(
        self,
        plan: Plan,
        groups: list[_Group],
        cursors: Cursors,
        lengths: LengthSource,
        builder: MeanStepBuilder,
    ) -> None:
        self.plan, self.lengths = plan, lengths
        self.task_ids: list[str] = []
        self.start: list[Cursor] = []
        self.is_stuck = False  # a task at work that no round visits
        self._groups = groups
        self._rows: list[_Row] = []
        self._ends: list[list[tuple[int, int]]] = []  # by group: (member, rounds to its end)
        self._round_ns: tuple[CostModel | None, float] = (None, 0.0)  # while all are at work
        for group, htask in zip(groups, plan.htasks, strict=True):
            self._place(group, htask, cursors, builder)
        self._active = [tuple([member for member, _ in ends]) for ends in self._ends]
        self.first_end = min([end for ends in self._ends for _, end in ends], default=0)

    def _place(
        self, group: _Group, htask: HTask, cursors: Cursors, builder: MeanStepBuilder
    ) -> None:
        drains, per_round, by_steps = self.plan.drains, group.units_per_round, group.by_steps
        rows, at_work = self._rows, []
        self._ends.append(at_work)
        if len(htask.quota) == 1 and not drains and per_round and not by_steps:
            (task_id,) = htask.quota
            if self._place_alone(group, task_id, cursor_of(cursors, task_id)):
                return
        start_cursors = [cursor_of(cursors, task_id) for task_id in htask.quota]
        self.task_ids += htask.quota
        self.start += start_cursors
        each = zip(
            htask.quota,
            start_cursors,
            map(self.lengths.num_steps, htask.quota),
            group.members,
            strict=True,
        )
        for member, (task_id, cursor, last_step, (table, task)) in enumerate(each):
            step = cursor[0]
            if step >= last_step:
                continue
            if task_id in drains:
                if cursor[1] is None:
                    continue
                last_step = step + 1
            if not per_round:
                self.is_stuck = True
                return
            remainder: Sequence[PackLoad] = ()
            if by_steps:
                start, units = step, last_step - step
                if cursor[1] is not None:
                    remainder = builder.remainder(self.lengths, task_id, task, group.htask, cursor)
            else:
                start, end = table.span(cursor, last_step)
                if start is None:
                    remainder = builder.remainder(self.lengths, task_id, task, group.htask, cursor)
                    start = table.start_of(step + 1)
                    units = len(remainder) + end - start
                else:
                    units = end - start
            rows.append((task_id, cursor, table, start, units, remainder, group))
            at_work.append((member, -(-units // per_round)))

    def _place_alone(self, group: _Group, task_id: str, cursor: Cursor) -> bool:
        """The common case of ``_place``: one task, which no packing left within a step; False
        where it is another."""
        ((table, _),) = group.members
        last_step = self.lengths.num_steps(task_id)
        if cursor[0] >= last_step:
            return False
        start, end = table.span(cursor, last_step)
        if start is None:
            return False
        self.task_ids.append(task_id)
        self.start.append(cursor)
        self._rows.append((task_id, cursor, table, start, end - start, (), group))
        self._ends[-1].append((0, -((start - end) // group.units_per_round)))
        return True

    def cursors(self, rounds: int) -> dict[str, Cursor]:
        """Of the tasks at work."""
        after: dict[str, Cursor] = {}
        for task_id, cursor, table, start, units, remainder, group in self._rows:
            done = rounds * group.units_per_round
            if done > units:
                done = units
            if not remainder and not group.by_steps:
                after[task_id] = table.cursor_at(start + done)
            elif group.by_steps:
                after[task_id] = Cursor(start + done, None) if done else cursor
            elif done >= len(remainder):
                after[task_id] = table.cursor_at(start + done - len(remainder))
            elif done:
                rest = sorted(p for load in remainder[done:] for p in load.positions)
                after[task_id] = Cursor(cursor.step, tuple(rest))
        return after

    def effective_tokens(self, rounds: int) -> int:
        tokens = 0
        for _, _, table, start, units, remainder, group in self._rows:
            done = rounds * group.units_per_round
            if done > units:
                done = units
            if group.by_steps:
                stop = table.start_of(start + done)
                if remainder and done:
                    tokens += sum([load.tokens for load in remainder])
                    start += 1
                start = table.start_of(start)
            elif remainder:
                tokens += sum([load.tokens for load in remainder[:done]])
                stop = start + max(0, done - len(remainder))
            else:
                stop = start + done
            tokens += table.tokens_between(start, stop)
        return tokens

    def forecast(self, cost: CostModel) -> Forecast:
        first = self.first_end
        if not first:
            return Forecast(0, 0, (), True)
        if len(self.task_ids) == 1:
            return Forecast(first, self.duration_ns(cost, first), (self.task_ids[0],), True)
        names = []
        for htask, ends in zip(self.plan.htasks, self._ends, strict=True):
            for member, end in ends:
                if end == first:
                    names.append(list(htask.quota)[member])
        names.sort()
        return Forecast(first, self.duration_ns(cost, first), tuple(names), True)

    def duration_ns(self, cost: CostModel, rounds: int) -> int:
        if rounds <= self.first_end:
            return round(rounds * self._first_round_ns(cost))
        stretches = self._stretches(rounds)
        return round(sum(length * self._mean_ns(cost, active) for length, active in stretches))

    def padded_tokens(self, rounds: int) -> int:
        if rounds <= self.first_end:
            return round(rounds * self._mean_tokens(self._active))
        return round(
            sum(length * self._mean_tokens(active) for length, active in self._stretches(rounds))
        )

    def rounds_until(self, cost: CostModel, elapsed_ns: int) -> tuple[int, int]:
        if elapsed_ns <= 0 or not self.first_end:
            return 0, 0
        rounds = self._rounds_near(cost, elapsed_ns)
        duration_ns = self.duration_ns(cost, rounds)
        # Whole nanoseconds may put a boundary on either side of what real numbers say.
        while rounds > 1 and (before_ns := self.duration_ns(cost, rounds - 1)) >= elapsed_ns:
            rounds, duration_ns = rounds - 1, before_ns
        last = self._last_end()
        while duration_ns < elapsed_ns and rounds < last:
            rounds += 1
            duration_ns = self.duration_ns(cost, rounds)
        return rounds, duration_ns

    def _rounds_near(self, cost: CostModel, elapsed_ns: int) -> int:
        round_ns = self._first_round_ns(cost)
        if round_ns > 0 and elapsed_ns <= self.first_end * round_ns:
            return max(1, ceil(elapsed_ns / round_ns))
        rounds = 0
        for length, active in self._stretches(self._last_end()):
            ahead = elapsed_ns / max(self._mean_ns(cost, active), 1e-9)
            if ahead <= length:
                return rounds + ceil(ahead)
            rounds += length
            elapsed_ns -= round(length * self._mean_ns(cost, active))
        return rounds

    def _last_end(self) -> int:
        return max(end for ends in self._ends for _, end in ends)

    def _stretches(self, rounds: int) -> Iterator[tuple[int, list[tuple[int, ...]]]]:
        """(rounds, members at work by group), from one end of a task to the next."""
        before = 0
        for end in sorted({end for ends in self._ends for _, end in ends}):
            stop = min(end, rounds)
            if stop <= before:
                return
            active = self._active
            if before:
                active = [tuple(m for m, last in ends if last > before) for ends in self._ends]
            yield stop - before, active
            before = stop

    def _first_round_ns(self, cost: CostModel) -> float:
        if self._round_ns[0] is not cost:
            self._round_ns = (cost, self._mean_ns(cost, self._active))
        return self._round_ns[1]

    def _mean_ns(self, cost: CostModel, active: list[tuple[int, ...]]) -> float:
        seconds = 0.0
        for group, members in zip(self._groups, active, strict=True):
            if members:
                seconds += group.units_per_round * group.unit_s(cost, members)
        return seconds * NS_PER_S

    def _mean_tokens(self, active: list[tuple[int, ...]]) -> float:
        return sum(
            group.units_per_round * group.means(members).padded_tokens
            for group, members in zip(self._groups, active, strict=True)
        )
