"""How the tiles of a product fill a device, as the captured step's kernels choose them.

A product of T rows and N output features is cut into tiles; all multiprocessors compute one at a
time, so its time grows in waves: a few rows more can cost a wave, or nothing. The kernels take the
tiles that finish first. The profile tells which there are (its ``program.tiles``); a test holds
this arithmetic against the kernels' own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from muxtune.cost.number_checks import is_count, is_number
from muxtune.errors import ProfileError

# Of a wave's time, by the share of multiprocessors that are idle in it. Judged by whole steps of 96
# tiles on 132 multiprocessors (the calibration steps of two devices), which no size says alone; of
# several waves by steps of a suite whose profile is none of those that are shipped.
IDLE_SPARES, IDLE_LATER_SPARES, LEAST_OF_WAVE = 0.85, 0.4, 0.6
# What a last wave of half tiles takes, over a whole one: more than the kernels count on when they
# choose. Judged as the above.
HALF_WAVE = 0.7

_MOST = 1 << 20  # multiprocessors, and rows or columns of a tile: far more than there are
# Rows and columns of a library's tiles, either way round, as a trace of steps shows them on an
# H100, and their speeds, as the kernels' own have them by size.
_LIBRARY_TILES = (
    (64, 128, 0.7), (64, 256, 0.8), (128, 128, 0.87), (128, 160, 0.91), (128, 192, 0.94),
    (128, 224, 0.97), (128, 256, 1.0), (192, 192, 1.0), (128, 320, 1.02),
)  # fmt: skip


class Tile(NamedTuple):
    """``efficiency``: relative speed of a full tile; ``halves``: whether a last wave that is at
    most half full is computed in half tiles. ``columns``: also what members' edges must be
    multiples of."""

    rows: int
    columns: int
    efficiency: float
    halves: bool


class Launch(NamedTuple):
    """A product's tiles: ``count`` of them in ``waves``, of which the last may be of half tiles and
    so less than one. ``free``: multiprocessors without a tile in the last wave, 0 where all have
    one; ``busy``: share of all waves' time in which multiprocessors compute; ``across``: tiles of
    columns."""

    tile: Tile
    count: int
    waves: float
    free: int
    busy: float
    across: int


class Tiling(NamedTuple):
    """``half_cost``: of half a tile, over a whole one."""

    num_multiprocessors: int
    half_cost: float
    tiles: tuple[Tile, ...]

    @classmethod
    def of_json(cls, raw: Mapping[str, Any]) -> Tiling:
        """Raises ProfileError where it is not as ``program.tiles`` of a profile is."""
        wrong = "profile: program.tiles are no tiles of a GPU ({}). Run `muxtune profile` again"
        try:
            tiles = tuple(Tile(*item) for item in raw["tiles"])
            found = cls(raw["num_multiprocessors"], raw["half_cost"], tiles)
        except (KeyError, TypeError) as error:
            raise ProfileError(wrong.format(f"{type(error).__name__}: {error}")) from error
        if not found._is_one():
            raise ProfileError(wrong.format("a missing or odd number"))
        return found

    def _is_one(self) -> bool:
        of_tiles = (
            all(is_count(side, 1) and side <= _MOST for side in tile[:2])
            and is_number(tile.efficiency)
            and tile.efficiency > 0
            and isinstance(tile.halves, bool)
            for tile in self.tiles
        )
        return (
            is_count(self.num_multiprocessors, 1)
            and self.num_multiprocessors <= _MOST
            and is_number(self.half_cost)
            and 0 < self.half_cost <= 1
            and bool(self.tiles)
            and all(of_tiles)
        )

    def units(self, num_rows: int, widths: Sequence[int], inner: int) -> float:
        """What the product's time grows with: numbers of a tile, times waves, times ``inner``
        (features that are summed over). ``widths``: of the members' outputs. Waves that leave
        multiprocessors idle take less: those at work have more of the memory and power."""
        tile = self.best(num_rows, widths)
        cost, count = self._cost(tile, num_rows, sum(widths)), self._count(tile, num_rows, widths)
        waves = cost * tile.efficiency / (tile.rows * tile.columns)
        spares = IDLE_SPARES if count <= self.num_multiprocessors else IDLE_LATER_SPARES
        idle = max(0.0, 1.0 - count / (self.num_multiprocessors * waves))
        return inner * cost * max(LEAST_OF_WAVE, 1.0 - spares * idle)

    def launch(self, num_rows: int, widths: Sequence[int]) -> Launch:
        tile = self.best(num_rows, widths)
        count = self._count(tile, num_rows, widths)
        full, rest = divmod(count, self.num_multiprocessors)
        waves, taken = float(full + (rest > 0)), rest
        if tile.halves and full and 0 < 2 * rest <= self.num_multiprocessors:
            waves, taken = full + HALF_WAVE, 2 * rest
        free = self.num_multiprocessors - taken if taken else 0
        busy, across = count / (self.num_multiprocessors * waves), -(-sum(widths) // tile.columns)
        return Launch(tile, count, waves, free, busy, across)

    def _count(self, tile: Tile, num_rows: int, widths: Sequence[int]) -> int:
        return -(-num_rows // tile.rows) * -(-sum(widths) // tile.columns)

    def best(self, num_rows: int, widths: Sequence[int]) -> Tile:
        """The tile that finishes first."""
        fitting = [
            tile
            for tile in self.tiles
            if len(widths) == 1 or all(width % tile.columns == 0 for width in widths)
        ]
        num_columns = sum(widths)
        return min(fitting or self.tiles, key=lambda t: self._cost(t, num_rows, num_columns))

    def _cost(self, tile: Tile, num_rows: int, num_columns: int) -> float:
        count = -(-num_rows // tile.rows) * -(-num_columns // tile.columns)
        full, rest = divmod(count, self.num_multiprocessors)
        waves = full + (rest > 0)
        if tile.halves and full and 0 < 2 * rest <= self.num_multiprocessors:
            waves -= 1 - self.half_cost
        return waves * tile.rows * tile.columns / tile.efficiency


def waves_begun(programs: Sequence[int], at_once: int) -> Iterator[int]:
    """How many waves begin in each of these groups of programs, which follow each other."""
    before = 0
    for count in programs:
        after = before + count
        yield -(-after // at_once) - -(-before // at_once)
        before = after


@lru_cache(maxsize=4096)
def library_waste(num_rows: int, num_columns: int, num_multiprocessors: int) -> float:
    """What whole waves of a library's tiles take, of those that finish first, over a device that is
    full of large ones to the end."""
    units = []
    for rows, columns, speed in _LIBRARY_TILES:
        for down, across in ((rows, columns), (columns, rows)):
            tiles = math.ceil(num_rows / down) * math.ceil(num_columns / across)
            units.append(math.ceil(tiles / num_multiprocessors) * rows * columns / speed)
    return min(units) * num_multiprocessors / (num_rows * num_columns)
