"""What packed attention takes by itself, counted from its sequences, then fitted.

The kernels (``muxtune_kernels.packed_attention``) cut every sequence into tiles of ``TILE_ROWS``
rows, however full the last one is. Forward, a program of a head and a tile looks at the tiles of
its sequence up to its own, and several programs share a multiprocessor. Backward, a sequence of
one tile is one program of a small kernel; one of two tiles is one wide program where every head
has keys of its own; and each tile of a longer one is a program that looks at all tiles of its
sequence. The last two fill a multiprocessor, so they take whole waves, of which each is as long as
its first program: those of the longest sequences come first.

So a mix of lengths counts by how many sequences of how many tiles it has, of which a number of
query-key pairs tells little. Sizes are in programs of a multiprocessor. Times are in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import NamedTuple

from muxtune.cost.low_rank import fit_speeds
from muxtune.cost.tiles import waves_begun

TILE_ROWS = 64
MOST_TILES = 16  # of a sequence for which these kernels are meant
# How many sequences of so many tiles there are, in a profile's points.
SEQUENCES = tuple(f"sequences_{tiles}" for tiles in range(1, MOST_TILES + 1))
# Usual speeds, in seconds of what they are counted by; the fit leaves them only for evidence.
_FORWARD_S = (1.5e-6, 1.3e-6, 1.0e-6, 0.9e-6, 1.1e-6)
# The last, of heads that share keys, no profile tells: a short sequence's program has code of its
# own for each of them, which a step finds in no cache. By a trace of a step's kernels on an H100.
_BACKWARD_S = (9e-6, 8e-6, 4e-6, 4e-6, 4e-6, 8e-6, 15e-6)


def sequence_counts(lengths: Sequence[int]) -> dict[str, float]:
    """How many sequences of how many tiles there are, by the names of ``SEQUENCES``. Raises
    ValueError for one that is empty or has more than ``MOST_TILES``."""
    counts = [0.0] * MOST_TILES
    for length in lengths:
        tiles = -(-length // TILE_ROWS)
        if not 1 <= tiles <= MOST_TILES:
            raise ValueError(f"a sequence of {length} rows, not of 1 to {MOST_TILES * TILE_ROWS}")
        counts[tiles - 1] += 1.0
    return dict(zip(SEQUENCES, counts, strict=True))


class Device(NamedTuple):
    """Heads, key heads, and the multiprocessors that they are spread over."""

    num_heads: int
    num_kv_heads: int
    num_multiprocessors: int

    def forward_terms(self, rows: float, sequences: Sequence[float]) -> list[float]:
        """Of a call: programs (one at least), tiles they look at, full tiles that are read, the
        longest row of tiles. ``sequences``: by their tiles, as ``SEQUENCES``."""
        per = self.num_heads / self.num_multiprocessors
        counted = list(enumerate(sequences, 1))
        programs = sum(tiles * count for tiles, count in counted)
        looks = sum(tiles * (tiles + 1) / 2 * count for tiles, count in counted)
        full = max(tiles for tiles, count in counted if count) - 1
        filled = (rows / TILE_ROWS - sum((t - 1) * n for t, n in counted)) / sum(sequences)
        return [1.0, max(1.0, per * programs), per * looks, per * rows / TILE_ROWS, full + filled]

    def backward_terms(self, rows: float, sequences: Sequence[float]) -> list[float]:
        """Of a call: of each wave the program that takes longest, if it is a wide one, or another
        of long sequences (half as keys, and half as the queries of each head that shares them), and
        the tiles it looks at; programs of short sequences (one at least); full tiles that are
        read; heads but one that a short sequence's program goes through."""
        members = self.num_heads // self.num_kv_heads
        per = self.num_kv_heads / self.num_multiprocessors
        wide = sequences[1] if members == 1 else 0.0
        long = [(t, n) for t, n in enumerate(sequences, 1) if n and t > (2 if wide else 1)][::-1]
        programs = [int(self.num_kv_heads * count) for count in (*(t * n for t, n in long), wide)]
        *begun, begun_wide = waves_begun(programs, self.num_multiprocessors)
        looks = sum(waves * (t + 1) for waves, (t, _) in zip(begun, long, strict=True))
        short = max(1.0, per * sequences[0]) if sequences[0] else 0.0
        of_rows = self.num_heads / self.num_multiprocessors * rows / TILE_ROWS
        others = (1 + members) / 2 * sum(begun)
        return [1.0, float(begun_wide), others, float(members * looks), members * short, of_rows,
                float(members - 1) if sequences[0] else 0.0]  # fmt: skip


class Point(NamedTuple):
    rows: float
    sequences: tuple[float, ...]
    seconds: float

    @classmethod
    def of(cls, raw: Mapping[str, float]) -> Point:
        """A profile's."""
        return cls(raw["rows"], tuple(raw[axis] for axis in SEQUENCES), raw["median_s"])


class PackedAttention:
    """Seconds of one call of one direction."""

    def __init__(self, device: Device, backward: bool, points: Sequence[Point]) -> None:
        self._backward = backward
        self._terms = device.backward_terms if backward else device.forward_terms
        terms = [self._terms(point.rows, point.sequences) for point in points]
        usual = _BACKWARD_S if backward else _FORWARD_S
        self._speeds_s = fit_speeds(terms, [point.seconds for point in points], usual)

    def on(self, device: Device) -> PackedAttention:
        """The same speeds with other heads."""
        found = copy(self)
        found._terms = device.backward_terms if self._backward else device.forward_terms
        return found

    def seconds(self, rows: float, sequences: Sequence[float]) -> float:
        terms = self._terms(rows, sequences)
        return sum(speed * term for speed, term in zip(self._speeds_s, terms, strict=True))
