"""The dynamic program: which tasks share an hTask.

Tasks are sorted by tokens per step; candidates are all contiguous groups, each at its best chunk
length and level. F(i) = min over j < i of F(j) + time of tasks j+1..i as one hTask. In a pipeline
of S stages a step of an hTask takes its n micro-batches and S - 1 more from entering to its
optimizer, and only then may its next step enter; so the program minimises
max(sum, longest such latency) (see ``rounds``).

Array suffixes: C chunk lengths, L levels, N tasks in sorted order, P blocks of tasks, E candidate
groups (edges of the program's graph, by start, then end), Q = C x L.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from muxtune.planners.curves import (
    CHUNKS,
    LOSS_ROWS,
    PAIRS,
    PASSES,
    QUOTA,
    VARIANCE,
    ClassTable,
    levels_of,
)
from muxtune.planners.tables import PassTables, Sizes
from muxtune.types import AdapterSlot

# More tasks than this are taken in blocks of neighbours, so that the program stays small.
MAX_BLOCKS = 32
_LATENCY_TOLERANCE = 1e-3


class Part(NamedTuple):
    """One chosen hTask: task indexes, index of its chunk length, level."""

    members: tuple[int, ...]
    chunk: int
    level: int


class Edges(NamedTuple):
    """Groups of consecutive blocks."""

    start_E: np.ndarray
    end_E: np.ndarray
    first_of_start: tuple[int, ...]


@lru_cache(maxsize=64)
def _edges(num_blocks: int, longest: int) -> Edges:
    """Groups of at most ``longest`` blocks."""
    pairs = [
        (start, end)
        for start in range(num_blocks)
        for end in range(start + 1, min(start + longest, num_blocks) + 1)
    ]
    start_E, end_E = np.array(pairs).T
    first = tuple(np.searchsorted(start_E, np.arange(num_blocks)).tolist())
    return Edges(start_E, end_E, first)


class Rules(NamedTuple):
    """``ladder_gap``: None where every micro-batch computes its whole quota, else how far the
    size of a pass lies above the mean, in standard deviations. ``fusion``: planned, all_spatial
    or all_temporal. ``num_stages``: of the pipeline."""

    pass_limit_bytes: float
    ladder_gap: float | None
    fusion: str = "planned"
    num_stages: int = 1

    @property
    def longest(self) -> int:
        """Most blocks in a group; blocks of all_spatial hold all tasks."""
        return MAX_BLOCKS << 1 if self.fusion == "planned" else 1


def split_tasks(
    classes: Sequence[ClassTable], slots: Sequence[AdapterSlot], tables: PassTables, rules: Rules
) -> list[Part] | None:
    """The groups of least time, or None where no group of the allowed kinds fits in memory."""
    order = sorted(range(len(classes)), key=lambda i: (classes[i].step_tokens, i))
    classes, slots = [classes[i] for i in order], [slots[i] for i in order]
    for size in _block_sizes(len(order), rules.fusion):
        bounds = [*range(0, len(order), size), len(order)]
        parts = _split_blocks(classes, slots, bounds, tables, rules)
        if parts is not None:
            return [part._replace(members=tuple(order[i] for i in part.members)) for part in parts]
    return None


def _block_sizes(num_tasks: int, fusion: str) -> list[int]:
    """Tasks a block; smaller ones are tried where memory asks for smaller groups."""
    if fusion == "all_temporal":
        return [1]
    if fusion == "all_spatial":
        return [num_tasks]
    size = -(-num_tasks // MAX_BLOCKS)
    return [size >> halvings for halvings in range(size.bit_length())]


def _split_blocks(
    classes: Sequence[ClassTable],
    slots: Sequence[AdapterSlot],
    bounds: list[int],
    tables: PassTables,
    rules: Rules,
) -> list[Part] | None:
    changes = 0
    for table in classes:
        changes |= table.changes
    levels = levels_of(changes)
    stacked = np.stack([table.values[:, :, levels] for table in classes], axis=-1)
    time_CLE, passes_CLE = _group_times(stacked, slots, np.array(bounds), tables, rules)
    groups = Groups.of(time_CLE, passes_CLE, len(bounds) - 1, rules)
    found = _least_sum(groups.times()) if rules.num_stages == 1 else _least_round(groups)
    if found is None:
        return None
    parts = []
    for start, end, choice in found:
        chunk, level = divmod(choice, len(levels))
        parts.append(Part(tuple(range(bounds[start], bounds[end])), chunk, levels[level]))
    return parts


def _group_times(
    stacked: np.ndarray,
    slots: Sequence[AdapterSlot],
    bounds: np.ndarray,
    tables: PassTables,
    rules: Rules,
) -> tuple[np.ndarray, np.ndarray]:
    """[C, L, E] seconds of one step of all tasks of each group, infinite where memory is short;
    and the micro-batches that it takes."""
    edges = _edges(len(bounds) - 1, rules.longest)
    first_E, last_E = bounds[edges.start_E], bounds[edges.end_E]
    prefix = np.zeros((*stacked.shape[:-1], stacked.shape[-1] + 1))
    np.cumsum(stacked, axis=-1, out=prefix[..., 1:])
    sums = prefix[..., last_E] - prefix[..., first_E]  # [columns, C, L, E]
    count_E = last_E - first_E
    tables.cover(float(prefix[QUOTA, :, :, -1].max()), len(slots))
    at = tables.sizes(_filled(sums, rules.ladder_gap))
    time_CLE = tables.base_s(at)
    time_CLE += sums[PAIRS] * tables.per_pair_s + sums[LOSS_ROWS] * tables.per_loss_row_s
    kinds = dict.fromkeys(slots)
    of_kind = {}
    for slot in kinds:
        before_N = np.cumsum([0, *(s == slot for s in slots)])
        of_kind[slot] = before_N[last_E] - before_N[first_E]
        time_CLE += of_kind[slot] * tables.adapter_s(slot, count_E, at)
    time_CLE += _optimizers(stacked[PASSES], slots, tables, first_E, last_E)
    passes_CLE = _most_passes(stacked[PASSES], bounds, rules.longest)
    time_CLE *= passes_CLE
    largest = tables.sizes(sums[QUOTA])
    if _may_not_fit(largest, kinds, count_E, tables, rules):
        need = tables.base_bytes(largest)
        added = np.zeros_like(need)
        for slot, of_kind_E in of_kind.items():
            bytes_CLE = tables.adapter_bytes(slot, count_E, largest)
            np.maximum(added, bytes_CLE, out=added, where=of_kind_E > 0)
        time_CLE[need + added > rules.pass_limit_bytes] = np.inf
    return time_CLE, passes_CLE


def _filled(sums: np.ndarray, gap: float | None) -> np.ndarray:
    if gap is None:
        return sums[QUOTA]
    return np.minimum(sums[CHUNKS] + gap * np.sqrt(sums[VARIANCE]), sums[QUOTA])


def _optimizers(
    passes_CLN: np.ndarray,
    slots: Sequence[AdapterSlot],
    tables: PassTables,
    first_E: np.ndarray,
    last_E: np.ndarray,
) -> np.ndarray:
    """Each task's optimizer runs once in as many micro-batches as its step takes."""
    seconds_N = np.array([tables.optimizer_s(slot) for slot in slots])
    prefix = np.zeros((*passes_CLN.shape[:-1], len(slots) + 1))
    np.cumsum(seconds_N / passes_CLN, axis=-1, out=prefix[..., 1:])
    return prefix[..., last_E] - prefix[..., first_E]


def _most_passes(passes_CLN: np.ndarray, bounds: np.ndarray, longest: int) -> np.ndarray:
    """[C, L, E]: most micro-batches per step of a group's tasks."""
    of_block = np.maximum.reduceat(passes_CLN, bounds[:-1], axis=-1)
    if longest == 1:
        return of_block
    rows = [
        np.maximum.accumulate(of_block[..., start : start + longest], axis=-1)
        for start in range(len(bounds) - 1)
    ]
    return np.concatenate(rows, axis=-1)


def _may_not_fit(
    largest: Sizes,
    kinds: Sequence[AdapterSlot] | dict[AdapterSlot, None],
    count_E: np.ndarray,
    tables: PassTables,
    rules: Rules,
) -> bool:
    """False where even the largest passes of all fit, which spares looking at each."""
    most = Sizes(*(values.max(axis=(1, 2), keepdims=True) for values in largest))
    whole = count_E.max()
    added = max(tables.adapter_bytes(slot, whole, most).max() for slot in kinds)
    return bool((tables.base_bytes(most) + added > rules.pass_limit_bytes).any())


# ------------------------------------------------------------------------------ the program

Cut = tuple[int, int, int]  # start, end, index of the group's choice of chunk length and level


class Groups(NamedTuple):
    """Candidate groups with all their choices: seconds of a step, and its latency."""

    time_QE: np.ndarray
    latency_QE: np.ndarray
    edges: Edges
    num_blocks: int

    @classmethod
    def of(
        cls, time_CLE: np.ndarray, passes_CLE: np.ndarray, num_blocks: int, rules: Rules
    ) -> Groups:
        flat = time_CLE.reshape(-1, time_CLE.shape[-1])
        latency = flat
        if rules.num_stages > 1:
            latency = flat * (1 + (rules.num_stages - 1) / passes_CLE.reshape(flat.shape))
        return cls(flat, latency, _edges(num_blocks, rules.longest), num_blocks)

    def times(self, most_latency_s: float = math.inf) -> Choices:
        """The best choice of each group that keeps within a latency."""
        time_QE = self.time_QE
        if most_latency_s < math.inf:
            time_QE = np.where(self.latency_QE <= most_latency_s, time_QE, np.inf)
        best_E = time_QE.argmin(axis=0)
        size = self.num_blocks + 1
        time_SE, choice_SE = np.full((size, size), np.inf), np.zeros((size, size), np.int64)
        at = (self.edges.start_E, self.edges.end_E)
        time_SE[at] = time_QE[best_E, np.arange(len(best_E))]
        choice_SE[at] = best_E
        return Choices(time_SE, choice_SE)

    def round_time_s(self, cuts: Sequence[Cut]) -> float:
        chosen = [
            (choice, self.edges.first_of_start[start] + end - start - 1)
            for start, end, choice in cuts
        ]
        total = sum(float(self.time_QE[at]) for at in chosen)
        return max(total, *(float(self.latency_QE[at]) for at in chosen))


class Choices(NamedTuple):
    time_SE: np.ndarray
    choice_SE: np.ndarray


def _least_sum(choices: Choices) -> list[Cut] | None:
    """The best partition, or None where there is none."""
    time_SE, choice_SE = choices
    num_blocks = len(time_SE) - 1
    best, last = np.full(num_blocks + 1, np.inf), [0] * (num_blocks + 1)
    best[0] = 0.0
    for end in range(1, num_blocks + 1):
        totals = best[:end] + time_SE[:end, end]
        last[end] = int(totals.argmin())
        best[end] = totals[last[end]]
    if not np.isfinite(best[num_blocks]):
        return None
    cuts, end = [], num_blocks
    while end:
        start = last[end]
        cuts.append((start, end, int(choice_SE[start, end])))
        end = start
    return cuts[::-1]


def _least_round(groups: Groups) -> list[Cut] | None:
    """Least max(sum, latency). The sum can only fall as higher latencies are allowed, so the
    best limit lies where the two meet, and is closed in on."""
    best = _least_sum(groups.times())
    if best is None:
        return None
    best_s = high = groups.round_time_s(best)
    low = sum(groups.times().time_SE[start, end] for start, end, _ in best)
    while high > low * (1 + _LATENCY_TOLERANCE):
        limit = (high * low) ** 0.5
        cuts = _least_sum(groups.times(limit))
        round_s = math.inf if cuts is None else groups.round_time_s(cuts)
        if cuts is not None and round_s < best_s:
            best, best_s = cuts, round_s
        # Where even the sum exceeds the limit, less latency cannot help.
        if round_s > limit:
            low = limit
        else:
            high = limit
    return best
