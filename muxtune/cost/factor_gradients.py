"""Gradients of A as the captured step's kernels compute them: counted, then fitted.

A program takes ``COLUMNS`` of the inputs and all of one slot's rows, in steps of as many rows as
fit its shared memory, so each slot is as many programs as there are blocks of columns, and those of
the slots with most rows come first. A few share a multiprocessor, so they run in waves, each as
long as its slot's steps; more work a multiprocessor takes longer also where waves are as many.
Inputs come from the cache, as far as it holds them. What all of it takes is a sum of few things,
each of a speed that the profile's own points tell.

This is of the deterministic form, which does not cut a slot's rows up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from muxtune.cost.low_rank import FILL, Point, Sizes, even_rows, fit_speeds
from muxtune.cost.tiles import waves_begun

FACTOR_GRADIENT = "site_factor"
COLUMNS = 32  # of one program
_MOST_ROWS, _SHARED_BYTES, _BUFFERS, _NUMBER_BYTES = 256, 100_000, 3, 2
# Programs that share a multiprocessor, by rows of a step and padded ranks: so many does its shared
# memory hold, or of the first two its registers (as compiled for compute capability 9.0).
_SHARING = {(256, 16): 3, (256, 32): 3, (128, 64): 4, (128, 128): 2, (64, 128): 4, (64, 256): 2}
_FEWEST_SHARING = 2
# Usual speeds, in seconds of what ``_terms`` says; the fit leaves them only for evidence.
_USUAL_S = (1.3e-6, 0.5e-6, 0.24e-6, 0.22e-6, 0.3e-6, 0.31e-6, 0.24e-6, 0.1e-6)
# Of an H100 or H200, whose multiprocessors have half of the second-level cache near them.
_CACHE_BYTES = 25e6
_UNIT_NUMBERS, _UNIT_RANKS, _UNIT_ROWS = 1e4, 64.0, 128.0


class Program(NamedTuple):
    """``step_rows``: that a step of its loop goes over; ``padded_ranks``: of all members;
    ``sharing``: how many of them a multiprocessor has at once."""

    step_rows: int
    padded_ranks: int
    sharing: int

    @classmethod
    def of(cls, ranks: int) -> Program:
        """``ranks``: padded, of all members together."""
        rows, padded = _MOST_ROWS, 1 << (ranks - 1).bit_length()
        row_bytes = (COLUMNS + ranks) * _NUMBER_BYTES * _BUFFERS
        while rows > 16 and rows * row_bytes > _SHARED_BYTES:
            rows //= 2
        return cls(rows, padded, _SHARING.get((rows, padded), _FEWEST_SHARING))

    @property
    def numbers(self) -> float:
        """That a step loads, in 1e4."""
        return self.step_rows * (COLUMNS + self.padded_ranks) / _UNIT_NUMBERS


class Alike(NamedTuple):
    """Slots with as many rows."""

    slots: int
    rows: int


def even_slots(slots: int, used_rows: int) -> list[Alike]:
    """Most rows first; as ``even_rows``."""
    counted = Counter(even_rows(slots, used_rows))
    return [Alike(counted[rows], rows) for rows in sorted(counted, reverse=True)]


class FactorGradient:
    """Seconds of dA = dh^T x on ``num_multiprocessors``."""

    def __init__(self, num_multiprocessors: int, points: Sequence[Point]) -> None:
        self._num_multiprocessors = num_multiprocessors
        self._programs: dict[int, Program] = {}
        terms = [self._terms(p.site, even_slots(p.slots, p.rows), int(p.rank)) for p in points]
        self.speeds = fit_speeds(terms, [p.measured.value_s for p in points], _USUAL_S)

    def seconds(self, site: Sizes, slots: int, rank: float, rows: int, used_rows: int) -> float:
        """``used_rows``: 0 where they are as a step's passes mostly have them. Between the ranks to
        which kernels pad, as far as the rank is from the one to the other."""
        of_slots = even_slots(slots, used_rows or int(FILL * rows))
        low = 1 << (int(rank).bit_length() - 1)
        low_s = self._seconds(site, of_slots, low)
        if rank == low:
            return low_s
        return low_s + (rank / low - 1.0) * (self._seconds(site, of_slots, 2 * low) - low_s)

    def _seconds(self, site: Sizes, of_slots: Sequence[Alike], rank: int) -> float:
        terms = self._terms(site, of_slots, rank)
        return sum([speed * term for speed, term in zip(self.speeds, terms, strict=True)])

    def _terms(self, site: Sizes, of_slots: Sequence[Alike], rank: int) -> list[float]:
        """The launch; waves; and of a multiprocessor: what its programs load first, what they
        write, the steps' loads, rows; then the steps' loads of the waves' longest programs; and
        megabytes of inputs that the cache does not hold."""
        program = self._program(rank * len(site.out_features))
        blocks = -(-site.in_features // COLUMNS)
        each, numbers = blocks / self._num_multiprocessors, program.numbers
        at_once = program.sharing * self._num_multiprocessors
        waves = waves_begun([blocks * alike.slots for alike in of_slots], at_once)
        slots = rows = steps = num_waves = longest = 0
        for alike, begun in zip(of_slots, waves, strict=True):
            of_one = -(-alike.rows // program.step_rows)
            slots, rows = slots + alike.slots, rows + alike.slots * alike.rows
            steps, longest = steps + alike.slots * of_one, longest + begun * of_one
            num_waves += begun
        return [
            1.0,
            float(num_waves),
            each * slots * numbers,
            each * slots * program.padded_ranks / _UNIT_RANKS,
            each * steps * numbers,
            each * rows / _UNIT_ROWS,
            longest * numbers,
            max(0.0, rows * site.in_features * _NUMBER_BYTES - _CACHE_BYTES) / 1e6,
        ]

    def _program(self, ranks: int) -> Program:
        if ranks not in self._programs:
            self._programs[ranks] = Program.of(ranks)
        return self._programs[ranks]
