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


class PassTables:
    """Base time and bytes of a pass by its size in chunks, without adapters; and what ``count``
    equal slots add. Sampled lazily from the cost model on a geometric grid of sizes."""

    def __init__(self, cost: CostModel, replica: ReplicaShape, chunk_tokens: int) -> None:
        self.cost, self.replica, self.chunk_tokens = cost, replica, chunk_tokens
        self._grid_C = np.array(_grid(), dtype=float)
        self._sampled: dict[tuple[AdapterSlot, ...], tuple[np.ndarray, np.ndarray]] = {}
        self._limit = 0
        self.affine = self._coefficients(1, ())
        self._optimizer_s: dict[AdapterSlot, float] = {}

    def cover(self, num_chunks: float) -> None:
        """Makes the tables reach ``num_chunks``."""
        needed = int(np.searchsorted(self._grid_C, num_chunks)) + 1
        if needed > self._limit:
            self._limit = min(needed, len(self._grid_C))
            self._sampled.clear()

    def base(self, chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Seconds and bytes without adapters."""
        return self._interpolate((), chunks)

    def adapter(
        self, slot: AdapterSlot, count: int, chunks: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Seconds and bytes that one of ``count`` slots adds to a pass of ``chunks``."""
        time_s, needed = self._interpolate((slot,) * count, chunks)
        base_s, base_bytes = self.base(chunks)
        return (time_s - base_s) / count, needed - base_bytes

    def optimizer_s(self, slot: AdapterSlot) -> float:
        if slot not in self._optimizer_s:
            self._optimizer_s[slot] = self._coefficients(1, (slot,)).optimizer_s[0]
        return self._optimizer_s[slot]

    def _interpolate(
        self, slots: tuple[AdapterSlot, ...], chunks: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        if slots not in self._sampled:
            sizes = [int(size) for size in self._grid_C[: self._limit]]
            times = np.array([self._coefficients(size, slots).base_s for size in sizes])
            needs = np.array(
                [self.cost.pass_bytes(self._shape(n, slots), self.replica) for n in sizes]
            )
            self._sampled[slots] = times, needs.astype(float)
        times, needs = self._sampled[slots]
        grid_C = self._grid_C[: self._limit]
        return np.interp(chunks, grid_C, times), np.interp(chunks, grid_C, needs)

    def _coefficients(self, size: int, slots: tuple[AdapterSlot, ...]) -> PassCoefficients:
        return self.cost.pass_coefficients(self._shape(size, slots), self.replica)

    def _shape(self, size: int, slots: tuple[AdapterSlot, ...]) -> ShapeKey:
        return ShapeKey(self.chunk_tokens, size, slots)


def _grid() -> list[int]:
    sizes, size = [], 1
    while size <= MAX_CHUNKS:
        sizes.append(size)
        size += max(1, size // 4)
    return sizes


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
    """[S, E] seconds of one step of tasks S..E-1 as one hTask, and the level that attains it."""
    num_levels, num_tasks, _ = stacked.shape
    prefix = np.zeros((num_levels, num_tasks + 1, stacked.shape[2]))
    np.cumsum(stacked, axis=1, out=prefix[:, 1:])
    optimizer = np.zeros((num_levels, num_tasks + 1))
    seconds_N = np.array([tables.optimizer_s(slot) for slot in slots])
    np.cumsum(seconds_N / stacked[:, :, PASSES], axis=1, out=optimizer[:, 1:])
    tables.cover(float(prefix[:, -1, QUOTA].max()))
    kinds = {slot: np.cumsum([0] + [s == slot for s in slots]) for slot in dict.fromkeys(slots)}
    time_SE = np.full((num_tasks + 1, num_tasks + 1), np.inf)
    level_SE = np.zeros((num_tasks + 1, num_tasks + 1), dtype=int)
    passes_LS = stacked[:, :, PASSES]
    for size in range(1, num_tasks + 1):
        sums = prefix[:, size:] - prefix[:, :-size]  # [L, groups of this size, columns]
        passes_LS = (
            passes_LS
            if size == 1
            else np.maximum(passes_LS[:, :-1], stacked[:, size - 1 :, PASSES])
        )
        chunks = sums[:, :, QUOTA if static else CHUNKS]
        time, needed = tables.base(chunks)
        if not static:
            needed = tables.base(sums[:, :, QUOTA])[1]
        most = np.zeros_like(needed)
        for slot, counts in kinds.items():
            of_kind = counts[size:] - counts[:-size]
            adapter_s, adapter_bytes = tables.adapter(slot, size, chunks)
            time = time + of_kind * adapter_s
            if not static:
                adapter_bytes = tables.adapter(slot, size, sums[:, :, QUOTA])[1]
            most = np.where(of_kind > 0, np.maximum(most, adapter_bytes), most)
        time = time + sums[:, :, PAIRS] * tables.affine.per_pair_s
        time = time + sums[:, :, LOSS_ROWS] * tables.affine.per_loss_row_s
        time = (time + optimizer[:, size:] - optimizer[:, :-size]) * passes_LS
        time = np.where(needed + most <= pass_limit_bytes, time, np.inf)
        starts = np.arange(num_tasks - size + 1)
        best = np.argmin(time, axis=0)
        level_SE[starts, starts + size] = best
        time_SE[starts, starts + size] = time[best, starts]
    return time_SE, level_SE


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
