"""What one class of tasks computes a micro-batch, by how many micro-batches a step is spread over.

A *level* is a number of micro-batches per optimizer step that all tasks of an hTask keep to. It
fixes each task's quota: the smallest one whose expected number of micro-batches per step does not
exceed the level. Smaller quotas at the same level could only make the pass shorter, so nothing
else needs to be looked at.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from muxtune.planners.ladder import Fill
from muxtune.planning.expected import ExpectedLoad

# Where memory is tight every twentieth counts; elsewhere the whole ones of COARSE will do.
LEVELS = (
    *(1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35, 1.4, 1.45, 1.5, 1.6, 1.7, 1.75, 1.8, 1.9, 2.0),
    *(2.1, 2.25, 2.35, 2.5, 2.65, 2.8, 3.0, 3.15, 3.35, 3.5, 3.75, 4.0, 4.25, 4.5, 4.75, 5.0, 5.5),
    *(6.0, 6.5, 7.0, 7.5, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 16.0, 20.0, 24.0, 32.0),
    *(48.0, math.inf),
)
COARSE = frozenset(
    (1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0, 24.0)
)
QUOTA, PASSES, CHUNKS, VARIANCE, GAP, PAIRS, LOSS_ROWS = range(7)

Point = tuple[int, ExpectedLoad]  # a quota and what it leads to


class Curve(NamedTuple):
    """One class's points for one chunk length, from the smallest quota up, and the point of each
    level."""

    points: tuple[Point, ...]
    point_of_level: tuple[int, ...]

    @classmethod
    def of(cls, points: tuple[Point, ...]) -> Curve:
        passes = [load.micro_batches_per_step for _, load in points]
        chosen = (next((i for i, n in enumerate(passes) if n <= level), None) for level in LEVELS)
        return cls(points, tuple(len(points) - 1 if i is None else i for i in chosen))

    def at_level(self, level: int) -> Point:
        return self.points[self.point_of_level[level]]

    @property
    def changes(self) -> int:
        """Bit l: level l has another point than level l - 1."""
        chosen = self.point_of_level
        return sum(1 << at for at in range(1, len(chosen)) if chosen[at] != chosen[at - 1])


class ClassTable(NamedTuple):
    """A class's curves for several chunk lengths as one array ``[columns, C, L]``."""

    curves: tuple[Curve, ...]
    values: np.ndarray
    changes: int
    step_tokens: float

    @classmethod
    def of(cls, curves: tuple[Curve, ...], num_shapes: int) -> ClassTable:
        rows = []
        for curve in curves:
            of_point = [_row(*point, num_shapes) for point in curve.points]
            rows.append([of_point[i] for i in curve.point_of_level])
        changes = 0
        for curve in curves:
            changes |= curve.changes
        tokens = curves[0].points[0][1].effective_tokens_per_step
        return cls(curves, np.array(rows).transpose(2, 0, 1), changes, tokens)


def _row(quota: int, load: ExpectedLoad, num_shapes: int) -> tuple[float, ...]:
    """Quota, micro-batches a step, then of a micro-batch: mean and variance of its chunks, by how
    many the shapes that the task alone would take exceed them, mean pairs and loss rows."""
    passes = load.micro_batches_per_step
    mean = load.chunks_per_step / passes
    square = sum(share * n * n for n, share in enumerate(load.chunk_shares))
    return (
        float(quota),
        passes,
        mean,
        max(0.0, square - mean * mean),
        Fill.of([load.chunk_shares], quota).mean_size(num_shapes) - mean,
        load.attention_pairs_per_step / passes,
        load.loss_rows_per_step / passes,
    )


def levels_of(changes: int, dense: bool) -> list[int]:
    """Levels worth looking at: of those with the same points only one."""
    found, differs = [0], False
    for at in range(1, len(LEVELS)):
        differs = differs or bool(changes >> at & 1)
        if differs and (dense or LEVELS[at] in COARSE):
            found.append(at)
            differs = False
    return found
