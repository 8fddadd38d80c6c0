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
_NEAR, _NEAR_OF_FEW = 1.02, 0.5  # interpolation is better than that; the fewer tasks, the worse
_BOUNDS = 400
_FORBIDDEN_S = 1e6
_MEMO_KINDS, _MEMO_RULES, _MEMO_TIMES = 64, 8, 100_000

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
    classes: Sequence[ClassTable],
    slots: Sequence[AdapterSlot],
    tables: PassTables,
    rules: Rules,
    memo: Memo | None = None,
) -> list[list[Part]]:
    """Partitions of the least time, and the plain ones (all in one, each by itself) that come
    close, for these times are interpolated; best first. Empty where nothing fits in memory.

    ``classes`` and ``slots``: of each task; equal classes are the same objects. ``memo``: what
    earlier calls with the same ``tables`` found; its owner keeps those tables and classes.
    """
    known = _sorted_tasks(classes, slots, tables, rules, memo)
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
    classes: Sequence[ClassTable],
    slots: Sequence[AdapterSlot],
    tables: PassTables,
    rules: Rules,
    memo: Memo | None = None,
) -> _SortedTasks:
    tokens = [each.step_tokens for each in classes]
    order = sorted(range(len(classes)), key=tokens.__getitem__)
    kinds = list(dict.fromkeys([id(classes[i]) for i in order]))
    number = {kind: at for at, kind in enumerate(kinds)}
    kind_of = [number[id(each)] for each in classes]
    tasks_of: list[list[int]] = [[] for _ in kinds]
    for i in order:
        tasks_of[kind_of[i]].append(i)
    key, memo = (id(tables), *kinds), {} if memo is None else memo
    if key not in memo:
        first = [tasks[0] for tasks in tasks_of]
        chosen = [classes[i] for i in first], [slots[i] for i in first]
        _make_room(memo)
        memo[key] = KnownKinds(Kinds.of(*chosen), {})
    costs = _costs_of(memo[key], [len(tasks) for tasks in tasks_of], tables, rules)
    return _SortedTasks(costs, order, kind_of, tasks_of)


def _make_room(memo: Memo) -> None:
    if len(memo) >= _MEMO_KINDS or sum(known.size for known in memo.values()) >= _MEMO_TIMES:
        memo.clear()


def _costs_of(
    known: KnownKinds, num_tasks: Sequence[int], tables: PassTables, rules: Rules
) -> GroupCosts:
    """Group times of one set of classes hold whatever the number of tasks, but for memory."""
    whole_D = np.array(num_tasks, dtype=float)
    quota_CL = known.kinds.quota_CLD @ whole_D
    tables.cover(float(quota_CL.max()), sum(num_tasks))
    is_tight = _may_not_fit(known.kinds, quota_CL, sum(num_tasks), tables, rules)
    key = rules if is_tight else rules._replace(pass_limit_bytes=math.inf)
    if rules.num_stages > 1 or key not in known.costs:
        if len(known.costs) >= _MEMO_RULES:
            known.costs.clear()
        known.costs[key] = GroupCosts(known.kinds, tables, rules, is_tight)
    return known.costs[key]


def _may_not_fit(
    kinds: Kinds, quota_CL: np.ndarray, num_tasks: int, tables: PassTables, rules: Rules
) -> bool:
    """False where even the largest passes of all tasks fit, which spares looking at each."""
    largest: Sizes = tables.sizes(quota_CL.max(axis=1)[:, None, None])
    whole = np.array([num_tasks])
    slots = dict.fromkeys(kinds.slots)
    added = max(tables.adapter_bytes(slot, whole, largest).max() for slot in slots)
    return bool(tables.base_bytes(largest).max() + added > rules.pass_limit_bytes)


def _near(costs: GroupCosts, found: list[Counts]) -> list[list[Counts]]:
    whole = tuple(map(sum, zip(*found, strict=True)))
    units = zip(_units(len(whole)), whole, strict=True)
    singles = [unit for unit, count in units for _ in range(count)]
    near_s = (_NEAR + _NEAR_OF_FEW / len(singles)) * costs.round_s(found)
    plain = [groups for groups in ([whole], singles) if sorted(groups) != sorted(found)]
    return [found, *(groups for groups in plain if costs.round_s(groups) <= near_s)]


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


class Kinds(NamedTuple):
    """Different classes of tasks, in the order of tokens a step. ``quota_CLD``: at all levels."""

    classes: list[ClassTable]
    slots: list[AdapterSlot]
    quota_CLD: np.ndarray
    changes: int

    @classmethod
    def of(cls, classes: list[ClassTable], slots: list[AdapterSlot]) -> Kinds:
        changes = 0
        for table in classes:
            changes |= table.changes
        quota_CLD = np.stack([table.values[QUOTA] for table in classes], axis=-1)
        return cls(classes, slots, quota_CLD, changes)


class GroupCosts:
    """Seconds of a step of all tasks of a group, by bound of the latency; remembered."""

    def __init__(self, kinds: Kinds, tables: PassTables, rules: Rules, is_tight: bool) -> None:
        self.classes, self.slots, self.tables, self.rules = *kinds[:2], tables, rules
        self._is_tight = is_tight
        self.levels = levels_of(kinds.changes, dense=is_tight or rules.num_stages > 1)
        values = np.stack([t.values[:, :, self.levels] for t in self.classes], axis=-1)
        self._passes, self._gap = values[PASSES], values[GAP]
        # What adds up over the tasks of a group: of time, but for the size of the pass, all at once
        seconds_D = np.array([tables.optimizer_s(slot) for slot in self.slots]) / values[PASSES]
        seconds_D += tables.per_pair_s * values[PAIRS] + tables.per_loss_row_s * values[LOSS_ROWS]
        self._added = np.stack([values[QUOTA], values[CHUNKS], values[VARIANCE], seconds_D])
        self.bounds_K = np.array([math.inf])
        self._time_K: dict[Counts, np.ndarray] = {}
        self._best_Q: dict[Counts, int] = {}  # the choice, where no latency bounds it

    @property
    def size(self) -> int:
        return len(self._time_K)

    def set_bounds(self, low_s: float, high_s: float) -> None:
        """Of the latency, in a pipeline."""
        self.bounds_K = np.geomspace(low_s, high_s, _BOUNDS)
        self._time_K.clear()

    def times_EK(self, groups: Sequence[Counts]) -> np.ndarray:
        known = self._time_K
        new = [group for group in dict.fromkeys(groups) if group not in known]
        if new:
            time_CLE, passes_CLE = self._group_times(np.array(new, dtype=float).T)
            time_QE = time_CLE.reshape(-1, len(new))
            if len(self.bounds_K) == 1:
                best_E = time_QE.argmin(axis=0)
                known.update(zip(new, time_QE[best_E, np.arange(len(new)), None], strict=True))
                self._best_Q.update(zip(new, best_E.tolist(), strict=True))
            else:
                latency_QE = self._latency(time_QE, passes_CLE)
                known.update(zip(new, self._bounded(time_QE, latency_QE), strict=True))
        return np.array([known[group] for group in groups])

    def choices(self, groups: Sequence[Counts]) -> tuple[np.ndarray, np.ndarray]:
        """Time and latency ``[Q, E]`` of every chunk length and level; infinite where memory is
        short."""
        time_CLE, passes_CLE = self._group_times(np.array(groups, dtype=float).T)
        time_QE = time_CLE.reshape(-1, len(groups))
        return time_QE, self._latency(time_QE, passes_CLE)

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

    def _latency(self, time_QE: np.ndarray, passes_CLE: np.ndarray) -> np.ndarray:
        waits = self.rules.num_stages - 1
        return time_QE * (1 + waits / passes_CLE.reshape(time_QE.shape))

    def _bounded(self, time_QE: np.ndarray, latency_QE: np.ndarray) -> np.ndarray:
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
        quota_CLE, chunks_CLE, variance_CLE, time_CLE = self._added @ count_DE
        count_E = count_DE.sum(axis=0).astype(np.int64)
        tables, of_slot = self.tables, self._count_slots(count_DE)
        at = tables.sizes(self._filled(quota_CLE, chunks_CLE, variance_CLE, count_DE, count_E))
        time_CLE += tables.base_s(at)
        time_CLE += tables.adapters_s(of_slot, count_E, at)
        passes_CLE = _most_passes(self._passes, count_DE)
        time_CLE *= passes_CLE
        if self._is_tight:
            need_CLE = self._need_bytes(quota_CLE, count_E, of_slot)
            time_CLE[need_CLE > self.rules.pass_limit_bytes] = np.inf
        return time_CLE, passes_CLE

    def _filled(
        self,
        quota_CLE: np.ndarray,
        chunks_CLE: np.ndarray,
        variance_CLE: np.ndarray,
        count_DE: np.ndarray,
        count_E: np.ndarray,
    ) -> np.ndarray:
        """Chunks that an average pass computes. Of one task the ladder's gap is known. The sum of
        several is nearly normal; half a chunk less, because chunks are whole."""
        if self.rules.num_shapes == 1:
            return quota_CLE
        gap_CLE = np.sqrt(variance_CLE, out=variance_CLE)
        gap_CLE *= normal_gap(self.rules.num_shapes)
        gap_CLE -= 0.5
        np.maximum(gap_CLE, 0.0, out=gap_CLE)
        single = np.flatnonzero(count_E == 1)
        if single.size:
            gap_CLE[..., single] = self._gap @ count_DE[:, single]
        chunks_CLE += gap_CLE
        return np.minimum(chunks_CLE, quota_CLE, out=chunks_CLE)

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


def _most_passes(passes_CLD: np.ndarray, count_DE: np.ndarray) -> np.ndarray:
    """[C, L, E]: most micro-batches per step of a group's tasks."""
    groups, kinds = np.nonzero(count_DE.T)  # by group
    starts = np.searchsorted(groups, np.arange(count_DE.shape[1]))
    return np.maximum.reduceat(passes_CLD.take(kinds, axis=-1), starts, axis=-1)


class KnownKinds(NamedTuple):
    """``costs``: by the rules that they hold under."""

    kinds: Kinds
    costs: dict[Rules, GroupCosts]

    @property
    def size(self) -> int:
        return sum(each.size for each in self.costs.values())


Memo = dict[tuple[int, ...], KnownKinds]


# ------------------------------------------------------------------------------ the program


def _contiguous(
    kinds: Sequence[int], bounds: Sequence[int], longest: int, num_kinds: int
) -> list[Counts]:
    """Groups of up to ``longest`` consecutive blocks, in the order of ``_spans``."""
    before = np.zeros((len(kinds) + 1, num_kinds), dtype=np.int64)
    before[np.arange(1, len(before)), list(kinds)] = 1
    at = before.cumsum(axis=0)[list(bounds)]
    spans = np.array(_spans(len(bounds) - 1, longest))
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
