"""Time and memory of a pass by its size, sampled from the cost model for quick look-up.

A pass of a group is taken as a pass without adapters plus what each of its slots adds; both are
sampled on geometric grids and interpolated in between. What a search chooses by these tables is
costed by the cost model itself afterwards.

Array suffixes: C chunk lengths, K cells of a grid, N counts of slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from muxtune.planners.base import bad_cost
from muxtune.protocols import CostModel
from muxtune.types import AdapterSlot, PassCoefficients, ReplicaShape, ShapeKey

_MAX_SIZE = 1 << 20


def _geometric(most: int, divisor: int) -> list[int]:
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(sizes[-1] + max(1, sizes[-1] // divisor))
    return sizes


SIZES = _geometric(_MAX_SIZE, 4)
ROW_SIZES = _geometric(_MAX_SIZE, 1)
COUNTS = _geometric(1 << 14, 1)
_EXACT_CELLS = 1 << 13  # sizes below are found by index, larger ones by search


class Grid:
    """Finds the cell of a size on a geometric grid."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = np.array(sizes, dtype=float)
        whole = np.arange(_EXACT_CELLS)
        self._cells = self._search(whole)

    def cell(self, sizes: np.ndarray) -> np.ndarray:
        whole = sizes.astype(np.int64)
        if not whole.size or whole.max() < _EXACT_CELLS:
            return self._cells.take(whole)
        return self._search(sizes)

    def cells_up_to(self, size: float) -> int:
        """Cells that sizes up to ``size`` fall into."""
        return min(int(np.searchsorted(self.sizes, size, side="right")), len(self.sizes) - 1)

    def _search(self, sizes: np.ndarray) -> np.ndarray:
        found = np.searchsorted(self.sizes, sizes, side="right") - 1
        return np.clip(found, 0, len(self.sizes) - 2)


CHUNK_GRID, ROW_GRID = Grid(SIZES), Grid(ROW_SIZES)


class Lines(NamedTuple):
    """A piecewise linear function: the line of each cell; leading axes as the user likes."""

    intercept: np.ndarray
    slope: np.ndarray

    @classmethod
    def through(cls, values: np.ndarray, grid: Grid) -> Lines:
        """``values`` at the grid's first points, on the last axis."""
        at = grid.sizes[: values.shape[-1]]
        slope = np.diff(values, axis=-1) / np.diff(at)
        return cls(values[..., :-1] - slope * at[:-1], slope)

    def look_up(self, index: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """``index``: into the flattened lines."""
        return self.intercept.ravel().take(index) + self.slope.ravel().take(index) * sizes


class Sizes(NamedTuple):
    """Passes of many groups, ``[C, ...]``: chunks, the same in units of the smallest chunk
    length, and their cells on both grids."""

    chunks: np.ndarray
    rows: np.ndarray
    cell: np.ndarray
    row_cell: np.ndarray


class PassTables:
    """Seconds and bytes of passes on one site for some chunk lengths; sampled when needed."""

    def __init__(self, cost: CostModel, replica: ReplicaShape, chunks: tuple[int, ...]) -> None:
        self.cost, self.replica, self.chunks = cost, replica, chunks
        self._rows_a_chunk = np.array(chunks, dtype=float)[:, None, None] / chunks[0]
        self._num_cells = self._num_row_cells = 0
        self._most_count = 0
        self._base: tuple[Lines, Lines] | None = None
        self._adapters: dict[AdapterSlot, tuple[Lines, Lines]] = {}
        self._optimizer_s: dict[AdapterSlot, float] = {}
        affine = self._coefficients(chunks[0], 1, ())
        self.per_pair_s, self.per_loss_row_s = affine.per_pair_s, affine.per_loss_row_s

    def cover(self, most_chunks: float, most_count: int) -> None:
        """Makes the tables reach passes of ``most_chunks`` chunks and ``most_count`` slots."""
        cells = CHUNK_GRID.cells_up_to(most_chunks) + 1
        if cells > self._num_cells:
            self._num_cells = min(cells + 6, len(SIZES) - 1)
            top = SIZES[self._num_cells] * self.chunks[-1] / self.chunks[0]
            self._num_row_cells = ROW_GRID.cells_up_to(top)
            self._base = None
            self._adapters.clear()
        if most_count > self._most_count:
            self._most_count = max(most_count, 2 * self._most_count)
            self._adapters.clear()

    def sizes(self, chunks_CLE: np.ndarray) -> Sizes:
        offset = np.arange(len(self.chunks))[:, None, None] * self._num_cells
        rows = chunks_CLE * self._rows_a_chunk
        return Sizes(chunks_CLE, rows, CHUNK_GRID.cell(chunks_CLE) + offset, ROW_GRID.cell(rows))

    def base_s(self, at: Sizes) -> np.ndarray:
        """Seconds without adapters, but for attention pairs and loss rows."""
        return self._base_lines()[0].look_up(at.cell, at.chunks)

    def base_bytes(self, at: Sizes) -> np.ndarray:
        return self._base_lines()[1].look_up(at.cell, at.chunks)

    def adapters_s(
        self, of_slot: Mapping[AdapterSlot, np.ndarray], count: np.ndarray, at: Sizes
    ) -> np.ndarray:
        """Seconds that the slots of groups add, ``count`` in each, ``of_slot`` of them equal."""
        lines = [(number[:, None], self._adapter_lines(s)[0]) for s, number in of_slot.items()]
        together = Lines(
            sum([number * line.intercept[count] for number, line in lines]),  # type: ignore[arg-type]
            sum([number * line.slope[count] for number, line in lines]),  # type: ignore[arg-type]
        )
        index = at.row_cell + np.arange(len(count)) * self._num_row_cells
        return together.look_up(index, at.rows)

    def adapter_bytes(self, slot: AdapterSlot, count: np.ndarray, at: Sizes) -> np.ndarray:
        """Bytes that ``count`` such slots add together."""
        index = at.row_cell + count * self._num_row_cells
        return self._adapter_lines(slot)[1].look_up(index, at.rows)

    def optimizer_s(self, slot: AdapterSlot) -> float:
        if slot not in self._optimizer_s:
            coefficients = self._coefficients(self.chunks[0], 1, (slot,))
            self._optimizer_s[slot] = coefficients.optimizer_s[0]
        return self._optimizer_s[slot]

    # -- inside

    def _base_lines(self) -> tuple[Lines, Lines]:
        if self._base is None:
            sizes = SIZES[: self._num_cells + 1]
            both = [self._sample(chunk, sizes, ()) for chunk in self.chunks]
            seconds, needed = np.array(both).transpose(1, 0, 2)
            self._base = Lines.through(seconds, CHUNK_GRID), Lines.through(needed, CHUNK_GRID)
        return self._base

    def _adapter_lines(self, slot: AdapterSlot) -> tuple[Lines, Lines]:
        """``[N, K]`` for every count from 0 up, in units of rows."""
        if slot not in self._adapters:
            rows = ROW_SIZES[: self._num_row_cells + 1]
            plain = self._sample(self.chunks[0], rows, ())
            known = COUNTS[: int(np.searchsorted(COUNTS, self._most_count)) + 1]
            added = np.array(
                [self._sample(self.chunks[0], rows, (slot,) * count) - plain for count in known]
            )
            each_s = added[:, 0] / np.array(known)[:, None]
            counts = np.arange(self._most_count + 1)
            lines = (_blend(table, known, counts) for table in (each_s, added[:, 1]))
            seconds, needed = (Lines.through(table, ROW_GRID) for table in lines)
            self._adapters[slot] = seconds, needed
        return self._adapters[slot]

    def _sample(
        self, chunk: int, sizes: Sequence[int], slots: tuple[AdapterSlot, ...]
    ) -> np.ndarray:
        """[2, sizes]: seconds, bytes."""
        seconds = [self._coefficients(chunk, size, slots).base_s for size in sizes]
        shapes = [ShapeKey(chunk, size, slots) for size in sizes]
        needed = [self.cost.pass_bytes(shape, self.replica) for shape in shapes]
        return np.array([seconds, needed], dtype=float)

    def _coefficients(
        self, chunk: int, size: int, slots: tuple[AdapterSlot, ...]
    ) -> PassCoefficients:
        shape = ShapeKey(chunk, size, slots)
        found = self.cost.pass_coefficients(shape, self.replica)
        if not 0 <= found.base_s < float("inf"):
            raise bad_cost(shape, found.base_s)
        return found


def _blend(table: np.ndarray, known: Sequence[int], counts: np.ndarray) -> np.ndarray:
    """Rows for every count from rows at the known ones."""
    columns = [np.interp(counts, known, table[:, at]) for at in range(table.shape[1])]
    return np.stack(columns, axis=1)
