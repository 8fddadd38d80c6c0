"""Host side: which tiles of rows the attention programs compute.

Shape suffixes: W tiles, N bounds.
"""

from collections.abc import Sequence

import numpy as np

TILE_ROWS = 64


def max_tiles(num_rows: int, num_sequences: int) -> int:
    """Tiles that any packing of that many sequences into that many rows needs at most."""
    return num_rows // TILE_ROWS + num_sequences


def attention_tiles(bounds_N: Sequence[int] | np.ndarray, num_tiles: int) -> np.ndarray:
    """int32 [num_tiles, 3]: first row of a sequence, one past its last, first row of the tile.

    Tiles with the most work come first, so that no program starts late and ends last; unused
    entries are zeros. Raises ValueError when there are more tiles than that.
    """
    bounds = np.asarray(bounds_N, dtype=np.int64)
    lengths = np.diff(bounds)
    counts = -(-lengths // TILE_ROWS)
    total = int(counts.sum())
    if total > num_tiles:
        raise ValueError(f"{total} attention tiles, room for {num_tiles}")
    starts = np.repeat(bounds[:-1], counts)
    ordinal = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    tiles = np.zeros((num_tiles, 3), dtype=np.int32)
    found = np.stack((starts, np.repeat(bounds[1:], counts), starts + TILE_ROWS * ordinal), axis=1)
    tiles[:total] = found[np.argsort(-np.repeat(lengths, counts), kind="stable")]
    return tiles
