"""Which tasks share an hTask: a dynamic program, and a local search on what it finds.

Tasks are sorted by tokens per step; the program looks at all contiguous groups, each at its best
chunk length and level: F(i) = min over j < i of F(j) + time of tasks j+1..i as one hTask. Where
several hTasks come out, tasks are then moved and exchanged between them as long as that helps.

In a pipeline of S stages a step of an hTask takes its n micro-batches and S - 1 more from entering
to its optimizer, and only then may its next step enter (see ``rounds``). So a round takes
max(sum of times, longest such latency); the program runs for several bounds of the latency at
once. On one stage there is one bound, infinity.

Array suffixes: C chunk lengths, L levels, D different classes of tasks, E candidate groups, Q = C x
L choices of a group, K bounds of the latency.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from muxtune.planners.curves import (
    CHUNKS,
    GAP,
    LOSS_ROWS,
    PAIRS,
    PASSES,
    QUOTA,
    VARIANCE,
    ClassTable,
    levels_of,
)
from muxtune.planners.ladder import normal_gap
from muxtune.planners.tables import PassTables, Sizes
from muxtune.types import AdapterSlot

# More tasks than this are taken in blocks of neighbours, so that the program stays small.
MAX_SINGLE, NUM_BLOCKS = 24, 16
_MAX_SEARCHED_TASKS = 32  # by the local search
_MAX_IMPROVEMENTS = 16
_WORTHWHILE = 1 - 5e-4
_NEAR = 1.02  # interpolation is better than that
_BOUNDS = 400
_FORBIDDEN_S = 1e6

Counts = tuple[int, ...]  # a group: how many tasks of each class


class Part(NamedTuple):
    """One chosen hTask: task indexes, index of its chunk length, level."""

    members: tuple[int, ...]
    chunk: int
    level: int


class Rules(NamedTuple):
    """``num_shapes``: of a ladder; with 1 every micro-batch computes its whole quota. ``fusion``:
    planned, all_spatial or all_temporal. ``num_stages``: of the pipeline."""

    pass_limit_bytes: float
    num_shapes: int
    fusion: str = "planned"
    num_stages: int = 1


def split_tasks(
    classes: Sequence[ClassTable], slots: Sequence[AdapterSlot], tables: PassTables, rules: Rules
) -> list[list[Part]]:
    """Partitions of the least time, and the plain ones (all in one, each by itself) that come
    close, for these times are interpolated; best first. Empty where nothing fits in memory.

    ``classes`` and ``slots``: of each task; equal classes are the same objects.
    """
    known = _sorted_tasks(classes, slots, tables, rules)
    found = _search(known.costs, [known.kind_of[i] for i in known.order], rules)
    if found is None:
        return []
    near = _near(known.costs, found) if rules.fusion == "planned" else [found]
    return [known.costs.parts(groups, known.tasks_of) for groups in near]


def cut_tasks(
    classes: Sequence[ClassTable],
    slots: Sequence[AdapterSlot],
    tables: PassTables,
    rules: Rules,
    partition: Sequence[Sequence[int]],
) -> list[Part]:
    """This partition of the tasks, each group at its best; empty where it does not fit. Equal
    tasks may change places."""
    known = _sorted_tasks(classes, slots, tables, rules)
    costs, kinds = known.costs, range(len(known.tasks_of))
    groups = [
        tuple(sum(known.kind_of[i] == kind for i in group) for kind in kinds) for group in partition
    ]
    total_s = float(costs.times_EK(groups).sum(axis=0).min())
    if not math.isfinite(total_s):
        return []
    if rules.num_stages > 1:
        costs.set_bounds(total_s, total_s * rules.num_stages)
    return costs.parts(groups, known.tasks_of)


class _SortedTasks(NamedTuple):
    """``order``: task indexes by tokens a step; ``kind_of``: class number of each task."""

    costs: GroupCosts
    order: list[int]
    kind_of: list[int]
    tasks_of: list[list[int]]


def _sorted_tasks(
    classes: Sequence[ClassTable], slots: Sequence[AdapterSlot], tables: PassTables, rules: Rules
) -> _SortedTasks:
    order = sorted(range(len(classes)), key=lambda i: (classes[i].step_tokens, i))
    kinds = list(dict.fromkeys(id(classes[i]) for i in order))
    number = {kind: at for at, kind in enumerate(kinds)}
    kind_of = [number[id(each)] for each in classes]
    tasks_of: list[list[int]] = [[] for _ in kinds]
    for i in order:
        tasks_of[kind_of[i]].append(i)
    first = [tasks[0] for tasks in tasks_of]
    costs = GroupCosts([classes[i] for i in first], [slots[i] for i in first],
                       [len(tasks) for tasks in tasks_of], tables, rules)  # fmt: skip
    return _SortedTasks(costs, order, kind_of, tasks_of)


def _near(costs: GroupCosts, found: list[Counts]) -> list[list[Counts]]:
    whole = tuple(map(sum, zip(*found, strict=True)))
    units = zip(_units(len(whole)), whole, strict=True)
    singles = [unit for unit, count in units for _ in range(count)]
    best_s = costs.round_s(found)
    plain = [groups for groups in ([whole], singles) if sorted(groups) != sorted(found)]
    return [found, *(groups for groups in plain if costs.round_s(groups) <= _NEAR * best_s)]


@lru_cache(maxsize=64)
def _units(num_kinds: int) -> list[Counts]:
    """One task of each class by itself."""
    return [tuple([int(k == kind) for k in range(num_kinds)]) for kind in range(num_kinds)]


def _search(costs: GroupCosts, kinds: Sequence[int], rules: Rules) -> list[Counts] | None:
    """``kinds``: class of each task in sorted order."""
    for size in _block_sizes(len(kinds), rules.fusion):
        bounds = (*range(0, len(kinds), size), len(kinds))
        longest = len(bounds) - 1 if rules.fusion == "planned" else 1
        groups = _contiguous(kinds, bounds, longest, len(costs.classes))
        if rules.fusion == "planned" and rules.num_stages == 1:
            costs.times_EK([*groups, *_units(len(costs.classes))])  # all that is asked for, at once
        found = _program(costs, groups, len(bounds) - 1, longest)
        if found is not None:
            searched = rules.fusion == "planned" and len(kinds) <= _MAX_SEARCHED_TASKS
            several = len(found) > 1 or (rules.num_stages > 1 and len(kinds) > 1)
            return _improved(costs, found) if searched and several else found
    return None


def _block_sizes(num_tasks: int, fusion: str) -> list[int]:
    """Tasks a block; smaller ones are tried where memory asks for smaller groups."""
    if fusion == "all_temporal":
        return [1]
    if fusion == "all_spatial":
        return [num_tasks]
    size = 1 if num_tasks <= MAX_SINGLE else -(-num_tasks // NUM_BLOCKS)
    return [size >> halvings for halvings in range(size.bit_length())]


# --------------------------------------------------------------------------- costs of groups


class GroupCosts:
    """Seconds of a step of all tasks of a group, by bound of the latency; remembered."""

    def __init__(
        self,
        classes: Sequence[ClassTable],
        slots: Sequence[AdapterSlot],
        num_tasks: Sequence[int],
        tables: PassTables,
        rules: Rules,
    ) -> None:
        self.classes, self.slots, self.tables, self.rules = classes, slots, tables, rules
        whole_D = np.array(num_tasks, dtype=float)
        self._whole = int(whole_D.sum())
        quota_CLD = np.stack([table.values[QUOTA] for table in classes], axis=-1)
        tables.cover(float((quota_CLD @ whole_D).max()), self._whole)
        self._is_tight = self._may_not_fit(quota_CLD @ whole_D)
        changes = 0
        for table in classes:
            changes |= table.changes
        self.levels = levels_of(changes, dense=self._is_tight or rules.num_stages > 1)
        self._values = np.stack([t.values[:, :, self.levels] for t in classes], axis=-1)
        self.bounds_K = np.array([math.inf])
        self._time_K: dict[Counts, np.ndarray] = {}
        self._best_Q: dict[Counts, int] = {}  # the choice, where no latency bounds it

    def set_bounds(self, low_s: float, high_s: float) -> None:
        """Of the latency, in a pipeline."""
        self.bounds_K = np.geomspace(low_s, high_s, _BOUNDS)
        self._time_K.clear()

    def times_EK(self, groups: Sequence[Counts]) -> np.ndarray:
        new = [group for group in dict.fromkeys(groups) if group not in self._time_K]
        if new:
            time_QE, latency_QE = self.choices(new)
            self._time_K.update(zip(new, self._bounded(time_QE, latency_QE), strict=True))
            if len(self.bounds_K) == 1:
                self._best_Q.update(zip(new, time_QE.argmin(axis=0).tolist(), strict=True))
        return np.array([self._time_K[group] for group in groups])

    def choices(self, groups: Sequence[Counts]) -> tuple[np.ndarray, np.ndarray]:
        """Time and latency ``[Q, E]`` of every chunk length and level; infinite where memory is
        short."""
        time_CLE, passes_CLE = self._group_times(np.array(groups, dtype=float).T)
        time_QE = time_CLE.reshape(-1, len(groups))
        waits = self.rules.num_stages - 1
        return time_QE, time_QE * (1 + waits / passes_CLE.reshape(time_QE.shape))

    def round_times_s(self, totals_K: np.ndarray) -> np.ndarray:
        """Of sums of group times ``[..., K]``: the least round."""
        if len(self.bounds_K) == 1:
            return totals_K[..., 0]
        return np.maximum(totals_K, self.bounds_K).min(axis=-1)

    def round_s(self, groups: Sequence[Counts]) -> float:
        return float(self.round_times_s(self.times_EK(groups).sum(axis=0)))

    def parts(self, groups: Sequence[Counts], tasks_of: Sequence[Sequence[int]]) -> list[Part]:
        """The groups with the choice that makes the round shortest, over task indexes."""
        left = [list(tasks) for tasks in tasks_of]
        parts = []
        for group, best in zip(groups, self._best_choices(groups), strict=True):
            chunk, level = divmod(best, len(self.levels))
            members = [left[kind].pop(0) for kind, count in enumerate(group) for _ in range(count)]
            parts.append(Part(tuple(members), chunk, self.levels[level]))
        return parts

    # -- inside

    def _best_choices(self, groups: Sequence[Counts]) -> list[int]:
        totals_K = self.times_EK(groups).sum(axis=0)
        if len(self.bounds_K) == 1:
            return [self._best_Q[group] for group in groups]
        bound = self.bounds_K[np.maximum(totals_K, self.bounds_K).argmin()]
        time_QE, latency_QE = self.choices(groups)
        return np.where(latency_QE <= bound, time_QE, np.inf).argmin(axis=0).tolist()

    def _bounded(self, time_QE: np.ndarray, latency_QE: np.ndarray) -> np.ndarray:
        if len(self.bounds_K) == 1:
            return time_QE.min(axis=0)[:, None]
        order_QE = latency_QE.argsort(axis=0)
        best_QE = np.minimum.accumulate(np.take_along_axis(time_QE, order_QE, axis=0), axis=0)
        sorted_QE = np.take_along_axis(latency_QE, order_QE, axis=0)
        rows = []
        for best_Q, latency_Q in zip(best_QE.T, sorted_QE.T, strict=True):
            within_K = np.searchsorted(latency_Q, self.bounds_K, side="right")
            rows.append(np.concatenate([[np.inf], best_Q])[within_K])
        return np.array(rows)

    def _group_times(self, count_DE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[C, L, E] seconds of one step of all tasks, and the micro-batches that it takes."""
        sums = self._values @ count_DE  # [columns, C, L, E]
        count_E = count_DE.sum(axis=0).astype(np.int64)
        tables = self.tables
        at = tables.sizes(_filled(sums, count_E, self.rules.num_shapes))
        time_CLE = tables.base_s(at)
        time_CLE += sums[PAIRS] * tables.per_pair_s + sums[LOSS_ROWS] * tables.per_loss_row_s
        of_slot = self._count_slots(count_DE)
        for slot, of_slot_E in of_slot.items():
            time_CLE += of_slot_E * tables.adapter_s(slot, count_E, at)
        seconds_D = np.array([tables.optimizer_s(slot) for slot in self.slots])
        time_CLE += (seconds_D / self._values[PASSES]) @ count_DE
        passes_CLE = _most_passes(self._values[PASSES], count_DE)
        time_CLE *= passes_CLE
        if self._is_tight:
            need_CLE = self._need_bytes(sums[QUOTA], count_E, of_slot)
            time_CLE[need_CLE > self.rules.pass_limit_bytes] = np.inf
        return time_CLE, passes_CLE

    def _count_slots(self, count_DE: np.ndarray) -> dict[AdapterSlot, np.ndarray]:
        of_slot: dict[AdapterSlot, np.ndarray] = {}
        for slot, count_E in zip(self.slots, count_DE, strict=True):
            of_slot[slot] = of_slot[slot] + count_E if slot in of_slot else count_E
        return of_slot

    def _need_bytes(
        self, quota_CLE: np.ndarray, count_E: np.ndarray, of_slot: dict[AdapterSlot, np.ndarray]
    ) -> np.ndarray:
        largest = self.tables.sizes(quota_CLE)
        need_CLE = self.tables.base_bytes(largest)
        added_CLE = np.zeros_like(need_CLE)
        for slot, of_slot_E in of_slot.items():
            bytes_CLE = self.tables.adapter_bytes(slot, count_E, largest)
            np.maximum(added_CLE, bytes_CLE, out=added_CLE, where=of_slot_E > 0)
        return need_CLE + added_CLE

    def _may_not_fit(self, quota_CL: np.ndarray) -> bool:
        """False where even the largest passes of all tasks fit, which spares looking at each."""
        largest: Sizes = self.tables.sizes(quota_CL.max(axis=1)[:, None, None])
        whole = np.array([self._whole])
        added = max(self.tables.adapter_bytes(slot, whole, largest).max() for slot in self.slots)
        return bool(self.tables.base_bytes(largest).max() + added > self.rules.pass_limit_bytes)


def _filled(sums: np.ndarray, count_E: np.ndarray, num_shapes: int) -> np.ndarray:
    """Chunks that an average pass computes. Of one task the ladder's gap is known. The sum of
    several is nearly normal; half a chunk less, because chunks are whole."""
    if num_shapes == 1:
        return sums[QUOTA]
    joint = normal_gap(num_shapes) * np.sqrt(sums[VARIANCE]) - 0.5
    gap = np.where(count_E == 1, sums[GAP], np.maximum(joint, 0.0))
    return np.minimum(sums[CHUNKS] + gap, sums[QUOTA])


def _most_passes(passes_CLD: np.ndarray, count_DE: np.ndarray) -> np.ndarray:
    """[C, L, E]: most micro-batches per step of a group's tasks."""
    most = np.zeros((*passes_CLD.shape[:-1], count_DE.shape[1]))
    for kind, count_E in enumerate(count_DE):
        np.maximum(most, passes_CLD[..., kind, None] * (count_E > 0), out=most)
    return most


# ------------------------------------------------------------------------------ the program


def _contiguous(
    kinds: Sequence[int], bounds: Sequence[int], longest: int, num_kinds: int
) -> list[Counts]:
    """Groups of up to ``longest`` consecutive blocks, in the order of ``_spans``."""
    before = [[0] * num_kinds]
    for kind in kinds:
        before.append([*before[-1]])
        before[-1][kind] += 1
    spans = np.array(_spans(len(bounds) - 1, longest))
    at = np.array(before)[np.array(bounds)]
    return list(map(tuple, (at[spans[:, 1]] - at[spans[:, 0]]).tolist()))


@lru_cache(maxsize=64)
def _spans(num_blocks: int, longest: int) -> tuple[tuple[int, int], ...]:
    return tuple(
        (start, end)
        for start in range(num_blocks)
        for end in range(start + 1, min(start + longest, num_blocks) + 1)
    )


def _program(
    costs: GroupCosts, groups: Sequence[Counts], num_blocks: int, longest: int
) -> list[Counts] | None:
    found, total_s = _least_sum(costs, groups, num_blocks, longest)
    if found is not None and costs.rules.num_stages > 1:
        # No round is shorter than the least sum, nor longer than all latencies in a row.
        costs.set_bounds(total_s, total_s * costs.rules.num_stages)
        found, _ = _least_sum(costs, groups, num_blocks, longest)
    return found


def _least_sum(
    costs: GroupCosts, groups: Sequence[Counts], num_blocks: int, longest: int
) -> tuple[list[Counts] | None, float]:
    """The best partition under the best bound of the latency, and its sum."""
    spans, time_EK = _spans(num_blocks, longest), costs.times_EK(groups)
    time_SEK = np.full((num_blocks + 1, num_blocks + 1, time_EK.shape[1]), np.inf)
    time_SEK[tuple(np.array(spans).T)] = time_EK
    best_EK = np.full((num_blocks + 1, time_EK.shape[1]), np.inf)
    best_EK[0] = 0.0
    last = [np.zeros(0, np.int64)] * (num_blocks + 1)
    for end in range(1, num_blocks + 1):
        totals = best_EK[:end] + time_SEK[:end, end]
        last[end] = totals.argmin(axis=0)
        best_EK[end] = totals.min(axis=0)
    rounds_K = np.maximum(best_EK[num_blocks], costs.bounds_K)
    bound = 0 if len(rounds_K) == 1 else int(rounds_K.argmin())
    if not np.isfinite(best_EK[num_blocks, bound]):
        return None, math.inf
    at, found, end = {span: i for i, span in enumerate(spans)}, [], num_blocks
    while end:
        start = int(last[end][bound])
        found.append(groups[at[start, end]])
        end = start
    return found[::-1], float(best_EK[num_blocks, bound])


# -------------------------------------------------------------------------- the local search


class Change(NamedTuple):
    """Replaces groups ``old`` (indexes) by ``new``."""

    old: tuple[int, ...]
    new: tuple[Counts, ...]


def _improved(costs: GroupCosts, groups: list[Counts]) -> list[Counts]:
    """Moves a task, exchanges two or joins two groups, always what helps most, while it does."""
    for _ in range(_MAX_IMPROVEMENTS):
        changes = _changes(groups)
        if not changes:
            return groups
        time_EK = _finite(costs.times_EK(groups))
        total_K = time_EK.sum(axis=0)
        now_s = costs.round_s(groups)
        flat = [group for change in changes for group in change.new]
        starts = np.cumsum([0, *(len(change.new) for change in changes[:-1])])
        new_K = np.add.reduceat(_finite(costs.times_EK(flat)), starts, axis=0)
        old_K = np.array([sum(time_EK[i] for i in change.old) for change in changes])
        rounds = costs.round_times_s(total_K - old_K + new_K)
        best = int(rounds.argmin())
        if not rounds[best] < _WORTHWHILE * now_s:
            return groups
        old, new = changes[best]
        groups = [group for i, group in enumerate(groups) if i not in old] + list(new)
    return groups


def _finite(time_EK: np.ndarray) -> np.ndarray:
    """Sums of these can be taken from each other."""
    return np.minimum(time_EK, _FORBIDDEN_S)


def _changes(groups: Sequence[Counts]) -> list[Change]:
    kinds = range(len(groups[0]))
    found = []
    for a, here in enumerate(groups):
        for kind in (k for k in kinds if here[k]):
            single = tuple(int(k == kind) for k in kinds)
            less = _minus(here, single)
            if any(less):
                found.append(Change((a,), (less, single)))
            for b, there in enumerate(groups):
                if b != a:
                    found.append(_pair(a, b, less, _plus(there, single)))
                if b > a:
                    found.extend(
                        _pair(a, b, _plus(less, other), _minus(_plus(there, single), other))
                        for other in (tuple(int(k == o) for k in kinds)
                                      for o in kinds if there[o] and o != kind)
                    )  # fmt: skip
        found.extend(Change((a, b), (_plus(here, groups[b]),)) for b in range(a + 1, len(groups)))
    return found


def _pair(a: int, b: int, first: Counts, second: Counts) -> Change:
    return Change((a, b), (first, second) if any(first) else (second,))


def _plus(left: Counts, right: Counts) -> Counts:
    return tuple(map(int.__add__, left, right))


def _minus(left: Counts, right: Counts) -> Counts:
    return tuple(map(int.__sub__, left, right))
