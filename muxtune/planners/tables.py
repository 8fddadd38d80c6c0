"""The dynamic program of the `muxtune` planner, on tables that sample the cost model.

Array suffixes: L levels of micro-batches per step, N tasks in sorted order, S group start, E group
end, C sizes in chunks. A level fixes each task's quota: the smallest one whose expected number of
micro-batches per step does not exceed the level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from muxtune.planning.expected import ExpectedLoad
from muxtune.protocols import CostModel
from muxtune.types import AdapterSlot, PassCoefficients, ReplicaShape, ShapeKey

PASSES_PER_STEP = (
    *(1.0, 1.1, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0, 24.0, 32.0),
    *(48.0, math.inf),
)
LEVELS_L = np.array(PASSES_PER_STEP)
MAX_CHUNKS = 1 << 20


class Curve(NamedTuple):
    """One class's load at every level; columns of ``table`` are in the order of ``COLUMNS``."""

    points: tuple[tuple[int, ExpectedLoad], ...]
    point_of_level: tuple[int, ...]
    table: np.ndarray  # [L, columns]
    step_chunks: float

    @classmethod
    def of(cls, points: tuple[tuple[int, ExpectedLoad], ...]) -> Curve:
        passes = [load.micro_batches_per_step for _, load in points]
        chosen = tuple(
            next((i for i, n in enumerate(passes) if n <= level), len(points) - 1)
            for level in PASSES_PER_STEP
        )
        table = np.array([_row(*points[i]) for i in chosen])
        return cls(points, chosen, table, points[-1][1].chunks_per_step)

    def at_level(self, level: int) -> tuple[int, ExpectedLoad]:
        return self.points[self.point_of_level[level]]


QUOTA, PASSES, CHUNKS, PAIRS, LOSS_ROWS = range(5)


def _row(quota: int, load: ExpectedLoad) -> tuple[float, ...]:
    """Quota, micro-batches a step, and means of a micro-batch."""
    passes = load.micro_batches_per_step
    return (
        float(quota),
        passes,
        load.chunks_per_step / passes,
        load.attention_pairs_per_step / passes,
        load.loss_rows_per_step / passes,
    )


class Split(NamedTuple):
    """Groups of task indexes with the level that each takes, and the time of one step of all."""

    groups: tuple[tuple[tuple[int, ...], int], ...]
    time_s: float


class At(NamedTuple):
    """Where sizes in chunks lie on the grid: cell below, and the share of the way to the next."""

    cell: np.ndarray
    share: np.ndarray


class PassTables:
    """Base time and bytes of a pass by its size in chunks, without adapters; and what each of
    ``count`` equal slots adds. Sampled lazily from the cost model on geometric grids."""

    def __init__(self, cost: CostModel, replica: ReplicaShape, chunk_tokens: int) -> None:
        self.cost, self.replica, self.chunk_tokens = cost, replica, chunk_tokens
        self._grid_C = np.array(SIZES, dtype=float)
        self._limit = 0
        self._base: np.ndarray | None = None
        self._adapter: dict[AdapterSlot, dict[int, np.ndarray]] = {}
        self.affine = self._coefficients(1, ())
        self._optimizer_s: dict[AdapterSlot, float] = {}

    def cover(self, num_chunks: float) -> None:
        """Makes the tables reach ``num_chunks``."""
        needed = int(np.searchsorted(self._grid_C, num_chunks)) + 2
        if needed > self._limit:
            self._limit = min(needed + 4, len(self._grid_C))
            self._base = None
            self._adapter.clear()

    def at(self, chunks: np.ndarray) -> At:
        cell = np.clip(np.searchsorted(self._grid_C, chunks, side="right") - 1, 0, self._limit - 2)
        below = self._grid_C[cell]
        return At(cell, (chunks - below) / (self._grid_C[cell + 1] - below))

    def base(self, at: At) -> np.ndarray:
        """[2, ...]: seconds and bytes without adapters."""
        if self._base is None:
            self._base = self._sample(())
        return _between(self._base, at.cell, at.share)

    def adapter(self, slot: AdapterSlot, count: np.ndarray, at: At) -> np.ndarray:
        """[2, ...]: seconds that one of ``count`` such slots adds to a pass, and the bytes that
        all of them add. ``count`` broadcasts with the sizes."""
        most = int(count.max())
        rows = [n for n in COUNTS if n <= most]
        if rows[-1] < most:
            rows.append(COUNTS[len(rows)])
        table = np.stack([self._added(slot, n) for n in rows], axis=1)  # [2, counts, sizes]
        grid = np.array(rows, dtype=float)
        row = np.clip(np.searchsorted(grid, count, side="right") - 1, 0, max(len(grid) - 2, 0))
        above = np.minimum(row + 1, len(grid) - 1)
        gap = np.maximum(grid[above] - grid[row], 1.0)
        share = np.clip((count - grid[row]) / gap, 0.0, 1.0)
        low = table[:, row, at.cell] * (1 - at.share) + table[:, row, at.cell + 1] * at.share
        high = table[:, above, at.cell] * (1 - at.share) + table[:, above, at.cell + 1] * at.share
        return low * (1 - share) + high * share

    def optimizer_s(self, slot: AdapterSlot) -> float:
        if slot not in self._optimizer_s:
            self._optimizer_s[slot] = self._coefficients(1, (slot,)).optimizer_s[0]
        return self._optimizer_s[slot]

    def _added(self, slot: AdapterSlot, count: int) -> np.ndarray:
        known = self._adapter.setdefault(slot, {})
        if count not in known:
            if self._base is None:
                self._base = self._sample(())
            added = self._sample((slot,) * count) - self._base
            known[count] = added / np.array([[count], [1]])
        return known[count]

    def _sample(self, slots: tuple[AdapterSlot, ...]) -> np.ndarray:
        sizes = SIZES[: self._limit]
        seconds = [self._coefficients(size, slots).base_s for size in sizes]
        needed = [self.cost.pass_bytes(self._shape(n, slots), self.replica) for n in sizes]
        return np.array([seconds, needed], dtype=float)

    def _coefficients(self, size: int, slots: tuple[AdapterSlot, ...]) -> PassCoefficients:
        return self.cost.pass_coefficients(self._shape(size, slots), self.replica)

    def _shape(self, size: int, slots: tuple[AdapterSlot, ...]) -> ShapeKey:
        return ShapeKey(self.chunk_tokens, size, slots)


def _between(table: np.ndarray, cell: np.ndarray, share: np.ndarray) -> np.ndarray:
    return table[:, cell] * (1 - share) + table[:, cell + 1] * share


def _geometric(most: int, divisor: int) -> list[int]:
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(sizes[-1] + max(1, sizes[-1] // divisor))
    return sizes


SIZES = _geometric(MAX_CHUNKS, 4)
COUNTS = _geometric(1 << 12, 2)


def split_tasks(
    curves: Sequence[Curve],
    slots: Sequence[AdapterSlot],
    tables: PassTables,
    pass_limit_bytes: int,
    fusion: str,
    static: bool,
) -> Split | None:
    """The groups of least time, or None where no group of the allowed kinds fits in memory.

    ``static``: every micro-batch computes its whole quota, else only the chunks that it fills.
    """
    order = sorted(range(len(curves)), key=lambda i: (curves[i].step_chunks, i))
    stacked = np.stack([curves[i].table for i in order], axis=1)  # [L, N, columns]
    sorted_slots = [slots[i] for i in order]
    time_SE, level_SE = _group_times(stacked, sorted_slots, tables, pass_limit_bytes, static)
    cuts = _cuts(time_SE, fusion)
    if cuts is None:
        return None
    groups = tuple((tuple(order[start:end]), int(level_SE[start, end])) for start, end in cuts)
    return Split(groups, float(sum(time_SE[start, end] for start, end in cuts)))


def _group_times(
    stacked: np.ndarray,
    slots: Sequence[AdapterSlot],
    tables: PassTables,
    pass_limit_bytes: int,
    static: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """[S, E] seconds of one step of tasks S..E-1 as one hTask, and the level that attains it.

    All groups at all levels are costed at once; those that are none (E <= S) come out infinite.
    """
    num_tasks = stacked.shape[1]
    tables.cover(float(stacked[:, :, QUOTA].sum(axis=1).max()))
    start_G, end_G = np.triu_indices(num_tasks + 1, k=1)
    sums_LGc = _sums(stacked)[:, start_G, end_G]
    count_G = (end_G - start_G).astype(float)
    filled = tables.at(sums_LGc[:, :, QUOTA if static else CHUNKS])
    largest = filled if static else tables.at(sums_LGc[:, :, QUOTA])
    time_LG, need_LG = tables.base(filled)[0], tables.base(largest)[1]
    most_LG = np.zeros_like(need_LG)
    for slot in dict.fromkeys(slots):
        before_N = np.cumsum([0.0, *(float(s == slot) for s in slots)])
        of_kind_G = before_N[end_G] - before_N[start_G]
        time_LG = time_LG + of_kind_G * tables.adapter(slot, count_G, filled)[0]
        added_LG = tables.adapter(slot, count_G, largest)[1]
        most_LG = np.where(of_kind_G > 0, np.maximum(most_LG, added_LG), most_LG)
    time_LG += sums_LGc[:, :, PAIRS] * tables.affine.per_pair_s
    time_LG += sums_LGc[:, :, LOSS_ROWS] * tables.affine.per_loss_row_s
    seconds_N = np.array([tables.optimizer_s(slot) for slot in slots])
    time_LG += _sums((seconds_N / stacked[:, :, PASSES])[:, :, None])[:, start_G, end_G, 0]
    time_LG *= _running_maximum(stacked[:, :, PASSES])[:, start_G, end_G]
    time_LG = np.where(need_LG + most_LG <= pass_limit_bytes, time_LG, np.inf)
    level_G = np.argmin(time_LG, axis=0)
    time_SE = np.full((num_tasks + 1, num_tasks + 1), np.inf)
    level_SE = np.zeros((num_tasks + 1, num_tasks + 1), dtype=int)
    time_SE[start_G, end_G] = time_LG[level_G, np.arange(len(level_G))]
    level_SE[start_G, end_G] = level_G
    return time_SE, level_SE


def _sums(values_LNc: np.ndarray) -> np.ndarray:
    """[L, S, E, columns]: sums over tasks S..E-1."""
    levels, num_tasks, columns = values_LNc.shape
    prefix = np.zeros((levels, num_tasks + 1, columns))
    np.cumsum(values_LNc, axis=1, out=prefix[:, 1:])
    return prefix[:, None, :] - prefix[:, :, None]


def _running_maximum(values_LN: np.ndarray) -> np.ndarray:
    """[L, S, E]: maximum over tasks S..E-1; 0 for an empty range."""
    levels, num_tasks = values_LN.shape
    out = np.zeros((levels, num_tasks + 1, num_tasks + 1))
    for start in range(num_tasks):
        out[:, start, start + 1 :] = np.maximum.accumulate(values_LN[:, start:], axis=1)
    return out


def _cuts(time_SE: np.ndarray, fusion: str) -> list[tuple[int, int]] | None:
    """The dynamic program: (start, end) of each group of the best partition."""
    num_tasks = len(time_SE) - 1
    if fusion == "all_spatial":
        return [(0, num_tasks)] if np.isfinite(time_SE[0, num_tasks]) else None
    best, last = np.full(num_tasks + 1, np.inf), np.zeros(num_tasks + 1, dtype=int)
    best[0] = 0.0
    for end in range(1, num_tasks + 1):
        first = end - 1 if fusion == "all_temporal" else 0
        totals = best[first:end] + time_SE[first:end, end]
        last[end] = first + int(np.argmin(totals))
        best[end] = totals[last[end] - first]
    if not np.isfinite(best[num_tasks]):
        return None
    cuts, end = [], num_tasks
    while end:
        cuts.append((int(last[end]), end))
        end = int(last[end])
    return cuts[::-1]
