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
from muxtune.planning.step_builder import PlanCourse, StepBuilder
from muxtune.planning.tables import CHUNKS, LONGEST, LOSS_ROWS, PAIRS, BoundedMemo, StepTable
from muxtune.protocols import CostModel, LengthSource
from muxtune.types import NS_PER_S, Cursor, Forecast, HTask, PackRule, Plan, new_tuple

_MAX_ARRANGEMENTS = 100_000
PAD = PackRule.PAD  # an enumeration looks its members up in Python

# Task id, cursor, table, micro-batch (or step) stood at, units to the end, what is left of a step
# that another packing began, and the hTask.
_Row = tuple[str, Cursor, StepTable, int, int, Sequence[PackLoad], "_Group"]


class MeanStepBuilder(StepBuilder):
    """A ``StepBuilder`` whose durations are means: ``Forecast.exact`` says that its rounds and
    task ids are exact."""

    def __init__(self, max_walked: int = 20_000) -> None:
        super().__init__(max_walked)
        self._arrangements: BoundedMemo[_Arrangement] = BoundedMemo(_MAX_ARRANGEMENTS)

    def course(
        self, plan: Plan, cursors: Cursors, lengths: LengthSource, cost: CostModel
    ) -> PlanCourse:
        course = self._mean_course(plan, cursors, lengths, cost)
        if course is None or course.is_stuck:
            return super().course(plan, cursors, lengths, cost)
        return course

    def advance(
        self, plan: Plan, cursors: Cursors, lengths: LengthSource, rounds: int
    ) -> dict[str, Cursor]:
        course = self._mean_course(plan, cursors, lengths)
        if course is None:
            return super().advance(plan, cursors, lengths, rounds)
        return {**cursors, **course.advance(rounds)}

    def forecast(
        self, plan: Plan, cursors: Cursors, lengths: LengthSource, cost: CostModel
    ) -> Forecast:
        course = self._mean_course(plan, cursors, lengths, cost)
        if course is None or course.is_stuck:
            return super().forecast(plan, cursors, lengths, cost)
        return course.forecast()

    def rounds_until(
        self,
        plan: Plan,
        cursors: Cursors,
        lengths: LengthSource,
        cost: CostModel,
        elapsed_ns: int,
    ) -> tuple[int, int]:
        course = self._mean_course(plan, cursors, lengths, cost)
        if course is None or course.is_stuck:
            return super().rounds_until(plan, cursors, lengths, cost, elapsed_ns)
        return course.rounds_until(elapsed_ns)

    def duration_ns(
        self, plan: Plan, cursors: Cursors, lengths: LengthSource, cost: CostModel, rounds: int
    ) -> int:
        course = self._mean_course(plan, cursors, lengths, cost)
        if course is None or course.is_stuck:
            return super().duration_ns(plan, cursors, lengths, cost, rounds)
        return course.duration_ns(rounds)

    def round_tokens(
        self, plan: Plan, cursors: Cursors, lengths: LengthSource, rounds: int
    ) -> tuple[int, int]:
        course = self._mean_course(plan, cursors, lengths)
        if course is None or course.is_stuck:
            return super().round_tokens(plan, cursors, lengths, rounds)
        return course.round_tokens(rounds)

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
        self,
        plan: Plan,
        cursors: Cursors,
        lengths: LengthSource,
        cost: CostModel | None = None,
    ) -> _MeanCourse | None:
        """``cost``: needed for answers in time."""
        if len(plan.replicas) > 1:
            return None
        groups = self._groups(plan, lengths)
        if groups is None:
            return None
        if len(groups) == 1 and len(groups[0].members) == 1 and not plan.drains:
            (task_id,) = plan.htasks[0].quota
            alone = _course_alone(task_id, groups[0], cursors, lengths, cost)
            if alone is not None:
                return alone
        return _MeanCourse(plan, groups, cursors, lengths, self, cost)

    def _groups(self, plan: Plan, lengths: LengthSource) -> list[_Group] | None:
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
        return known.groups

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
    shapes, slot_of, quota, packing = htask
    if len(quota) == 1:
        ((task_id, chunks),) = quota.items()
        return (id(shapes), packing is PAD, chunks, slot_of[task_id], lengths.lengths_key(task_id))
    return (
        id(shapes),
        packing is PAD,
        tuple(quota.values()),
        tuple(map(slot_of.__getitem__, quota)),
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
        self._alone: tuple[CostModel | None, tuple[float, float]] = (None, (0.0, 0.0))

    def alone(self, cost: CostModel | None) -> tuple[float, float]:
        """Mean nanoseconds and padded tokens of a round while the first member is at work."""
        known, found = self._alone
        if known is not cost or not found[1]:
            per_round = self.units_per_round
            round_ns = 0.0 if cost is None else per_round * self.unit_s(cost, (0,)) * NS_PER_S
            found = (round_ns, per_round * self.means((0,)).padded_tokens)
            self._alone = (cost, found)
        return found

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
    """How a plan goes on from given cursors. ``cost`` may be None where no times are asked for."""

    def __init__(
        self,
        plan: Plan,
        groups: list[_Group],
        cursors: Cursors,
        lengths: LengthSource,
        builder: MeanStepBuilder,
        cost: CostModel | None,
    ) -> None:
        self.plan, self.lengths, self._start = plan, lengths, cursors
        self.is_stuck = False  # a task at work that no round visits
        self._groups, self._cost = groups, cost
        self._rows: list[_Row] = []
        self._ends: list[list[tuple[int, int]]] = []  # by group: (member, rounds to its end)
        for group, htask in zip(groups, plan.htasks, strict=True):
            self._place(group, htask, cursors, builder)
        self._active = [tuple([member for member, _ in ends]) for ends in self._ends]
        self.first_end = min([end for ends in self._ends for _, end in ends], default=0)
        self._round_ns = -1.0  # of a round while all are at work, once it is known

    def _place(
        self, group: _Group, htask: HTask, cursors: Cursors, builder: MeanStepBuilder
    ) -> None:
        drains, per_round, by_steps = self.plan.drains, group.units_per_round, group.by_steps
        rows, at_work = self._rows, []
        self._ends.append(at_work)
        each = zip(
            htask.quota, map(self.lengths.num_steps, htask.quota), group.members, strict=True
        )
        for member, (task_id, last_step, (table, task)) in enumerate(each):
            cursor = cursor_of(cursors, task_id)
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

    def advance(self, rounds: int) -> dict[str, Cursor]:
        after = dict(self._start)
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

    def round_tokens(self, rounds: int) -> tuple[int, int]:
        return self._effective_tokens(rounds), self.padded_tokens(rounds)

    def _effective_tokens(self, rounds: int) -> int:
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

    def forecast(self) -> Forecast:
        first = self.first_end
        if not first:
            return Forecast(0, 0, (), True)
        names = []
        for htask, ends in zip(self.plan.htasks, self._ends, strict=True):
            for member, end in ends:
                if end == first:
                    names.append(list(htask.quota)[member])
        names.sort()
        return Forecast(first, self.duration_ns(first), tuple(names), True)

    def duration_ns(self, rounds: int) -> int:
        if rounds <= self.first_end:
            return round(rounds * self._first_round_ns())
        stretches = self._stretches(rounds)
        return round(sum(length * self._mean_ns(active) for length, active in stretches))

    def padded_tokens(self, rounds: int) -> int:
        if rounds <= self.first_end:
            return round(rounds * self._mean_tokens(self._active))
        return round(
            sum(length * self._mean_tokens(active) for length, active in self._stretches(rounds))
        )

    def rounds_until(self, elapsed_ns: int) -> tuple[int, int]:
        if elapsed_ns <= 0 or not self.first_end:
            return 0, 0
        rounds = self._rounds_near(elapsed_ns)
        duration_ns = self.duration_ns(rounds)
        # Whole nanoseconds may put a boundary on either side of what real numbers say.
        while rounds > 1 and (before_ns := self.duration_ns(rounds - 1)) >= elapsed_ns:
            rounds, duration_ns = rounds - 1, before_ns
        last = self._last_end()
        while duration_ns < elapsed_ns and rounds < last:
            rounds += 1
            duration_ns = self.duration_ns(rounds)
        return rounds, duration_ns

    def _rounds_near(self, elapsed_ns: int) -> int:
        round_ns = self._first_round_ns()
        if round_ns > 0 and elapsed_ns <= self.first_end * round_ns:
            return max(1, ceil(elapsed_ns / round_ns))
        rounds = 0
        for length, active in self._stretches(self._last_end()):
            ahead = elapsed_ns / max(self._mean_ns(active), 1e-9)
            if ahead <= length:
                return rounds + ceil(ahead)
            rounds += length
            elapsed_ns -= round(length * self._mean_ns(active))
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

    def _first_round_ns(self) -> float:
        if self._round_ns < 0:
            self._round_ns = self._mean_ns(self._active)
        return self._round_ns

    def _mean_ns(self, active: list[tuple[int, ...]]) -> float:
        assert self._cost is not None
        seconds = 0.0
        for group, members in zip(self._groups, active, strict=True):
            if members:
                seconds += group.units_per_round * group.unit_s(self._cost, members)
        return seconds * NS_PER_S

    def _mean_tokens(self, active: list[tuple[int, ...]]) -> float:
        return sum(
            group.units_per_round * group.means(members).padded_tokens
            for group, members in zip(self._groups, active, strict=True)
        )


class _CourseAlone(_MeanCourse):
    """The common case of one task, which no packing left within a step."""

    is_stuck = False

    def __init__(
        self,
        group: _Group,
        task_id: str,
        table: StepTable,
        first: int,
        last: int,
        cost: CostModel | None,
    ) -> None:
        self._group, self._task_id, self._table, self._cost = group, task_id, table, cost
        self._first, self._num_units = first, last - first
        self.first_end = -((first - last) // group.units_per_round)
        self._round_ns, self._round_tokens = group.alone(cost)

    def forecast(self) -> Forecast:
        rounds = self.first_end
        duration_ns = round(rounds * self._round_ns)
        # What Forecast(...) does, without its keyword handling: every lone task is asked for.
        return new_tuple(Forecast, (rounds, duration_ns, (self._task_id,), True))

    def advance(self, rounds: int) -> dict[str, Cursor]:
        unit = self._first + min(rounds * self._group.units_per_round, self._num_units)
        by_steps = self._group.by_steps
        return {self._task_id: Cursor(unit) if by_steps else self._table.cursor_at(unit)}

    def padded_tokens(self, rounds: int) -> int:
        return round(min(rounds, self.first_end) * self._round_tokens)

    def _effective_tokens(self, rounds: int) -> int:
        start, table = self._first, self._table
        stop = start + min(rounds * self._group.units_per_round, self._num_units)
        if self._group.by_steps:
            start, stop = table.start_of(start), table.start_of(stop)
        return table.tokens_between(start, stop)

    def duration_ns(self, rounds: int) -> int:
        return round(min(rounds, self.first_end) * self._round_ns)

    def _rounds_near(self, elapsed_ns: int) -> int:
        if elapsed_ns <= self.first_end * self._round_ns:
            return max(1, ceil(elapsed_ns / self._round_ns))
        return self.first_end

    def _last_end(self) -> int:
        return self.first_end


def _course_alone(
    task_id: str, group: _Group, cursors: Cursors, lengths: LengthSource, cost: CostModel | None
) -> _CourseAlone | None:
    """None where the general course is needed."""
    cursor, last_step = cursor_of(cursors, task_id), lengths.num_steps(task_id)
    step, left = cursor
    if step >= last_step or not group.units_per_round:
        return None
    table = group.members[0][0]
    if group.by_steps:
        start, end = (step if left is None else None), last_step
    else:
        start, end = table.span(cursor, last_step)
    return None if start is None else _CourseAlone(group, task_id, table, start, end, cost)
