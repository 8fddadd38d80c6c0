"""How the slots of one certain micro-batch meet in a product's tiles of rows.

A slot's rows follow those of the slot before; filler comes last. A tile that is one slot's needs
its factors alone. One that several share, or that ends in filler, goes through its slots two by
two, from the first to the last that has rows there: a read of the rows for every two of which one
is present, and low-rank steps for every two whether present or not. Where there are filler and
few slots, a few such tiles take far longer than the others, and hold these up in part; a product
ends with the multiprocessor that has most of them.

Shape suffixes: N tiles of rows, W waves, P multiprocessors.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np

# Of what two slots take in a tile, one that has it to itself: in making h, and in low-rank steps.
ALONE, ALONE_STEP = 0.6, 0.4
_GROUP_TILES = 8  # tiles of rows that the kernels go through side by side
# How far a wave's slowest tile holds up the others, which share its memory: neither not at all nor
# wholly, as six suites of two devices have it.
HELD_UP = 0.5
STEP_RANK = 16.0


class Meeting(NamedTuple):
    """``most_pairs``: reads of the rows of the fullest tile, one for two slots; ``steps_N``: of
    low-rank products with ``STEP_RANK`` ranks of two slots at the end of each tile; ``used``: tiles
    that have any."""

    most_pairs: float
    steps_N: np.ndarray
    used: int

    def most_steps(self, tiles_across: int, num_multiprocessors: int) -> float:
        """Between those of the multiprocessor with most, and of the slowest tile of every wave.
        ``tiles_across``: tiles of columns."""
        places = _places(len(self.steps_N), tiles_across, num_multiprocessors)
        steps_WP = np.append(self.steps_N, 0.0)[places]
        alone, held_up = steps_WP.sum(axis=0).max(), steps_WP.max(axis=1).sum()
        return float(alone + HELD_UP * (held_up - alone))


@lru_cache(maxsize=4096)
def meet(
    slot_rows: tuple[int, ...], ranks: tuple[float, ...], num_rows: int, tile_rows: int
) -> Meeting:
    """``ranks``: as padded, of every slot; 0 where it does not adapt the linear."""
    ends = list(accumulate(slot_rows))
    steps_N = np.zeros(-(-num_rows // tile_rows))
    most, used, slot = 0.0, 0, 0
    for tile in range(-(-ends[-1] // tile_rows) if ends else 0):
        start, stop = tile * tile_rows, min((tile + 1) * tile_rows, num_rows)
        while ends[slot] <= start:
            slot += 1
        if ends[slot] >= stop:
            pairs, steps = ALONE * (ranks[slot] > 0), ALONE_STEP * ranks[slot]
        else:
            pairs, steps = _of_several(slot_rows, ranks, ends, slot, stop)
        most, used = max(most, pairs), used + (steps > 0)
        steps_N[tile] = steps / STEP_RANK
    return Meeting(most, steps_N, used)


def _of_several(
    slot_rows: tuple[int, ...], ranks: tuple[float, ...], ends: list[int], first: int, stop: int
) -> tuple[float, float]:
    """(pairs of slots that are read, steps of one rank) of a tile that begins in ``first``."""
    last = first
    while last + 1 < len(ends) and ends[last] < min(stop, ends[-1]):
        last += 1
    here = [ranks[slot] if slot_rows[slot] else 0 for slot in range(first, last + 1)]
    read = sum(max(here[at : at + 2]) > 0 for at in range(0, len(here), 2))
    return float(read), float(max(here) * -(-len(here) // 2))


@lru_cache(maxsize=1024)
def _places(tiles_down: int, tiles_across: int, num_multiprocessors: int) -> np.ndarray:
    """Tiles of rows [W, P] in the order in which they are computed; ``tiles_down``: none."""
    count = tiles_down * tiles_across
    tile = np.arange(count)
    group, within = np.divmod(tile, _GROUP_TILES * tiles_across)
    size = np.minimum(tiles_down - group * _GROUP_TILES, _GROUP_TILES)
    waves = -(-count // num_multiprocessors)
    places = np.full(waves * num_multiprocessors, tiles_down)
    places[:count] = group * _GROUP_TILES + within % size
    return places.reshape(waves, num_multiprocessors)
