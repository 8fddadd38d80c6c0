"""Monotone piecewise-linear tables of measured times, and non-negative affine fits."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from muxtune.errors import ProfileError


class Time(NamedTuple):
    """Seconds, the half-width of the 90% interval, and whether it lies outside of the data."""

    value_s: float
    half_width_s: float
    extrapolated: bool


class Leaf(NamedTuple):
    value_s: float
    half_width_s: float


def isotonic(values: Sequence[float]) -> list[float]:
    """The non-decreasing sequence nearest to ``values`` in least squares (pool adjacent
    violators); ``values`` itself when it does not decrease."""
    blocks: list[list[float]] = []  # mean, size
    for value in values:
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, size = blocks.pop()
            last = blocks[-1]
            last[0] = (last[0] * last[1] + mean * size) / (last[1] + size)
            last[1] += size
    return [mean for mean, size in blocks for _ in range(int(size))]


def interpolated(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """As ``np.interp``, which takes longer where points are few."""
    upper = bisect_right(xs, x)
    if upper in (0, len(xs)):
        return ys[min(upper, len(xs) - 1)]
    slope = (ys[upper] - ys[upper - 1]) / (xs[upper] - xs[upper - 1])
    return slope * (x - xs[upper - 1]) + ys[upper - 1]


class Table:
    """Measured times over a full grid of 0..n axes; multilinear between the points.

    Above the grid the last segment goes on (its slope is never negative, because values are made
    monotone along every axis); below it the first value holds, since small sizes are all
    overhead. Both are flagged as extrapolated. Above an axis that others follow, the last line is
    scaled as a whole by its growth at their largest sizes, so that it stays monotone along them.
    Outside of a later axis, lines of different slope may cross: there only that axis is monotone.
    """

    __slots__ = ("_axes", "_children", "_growth", "_leaves")

    def __init__(self, xs: tuple[float, ...], children: Sequence[Table] | Sequence[Leaf]) -> None:
        self._children = tuple(child for child in children if isinstance(child, Table))
        self._leaves = tuple(child for child in children if isinstance(child, Leaf))
        below = self._children[0]._axes if self._children else ()
        self._axes: tuple[tuple[float, ...], ...] = (xs, *below) if xs else ()
        self._growth = 0.0  # relative growth over the last segment
        if len(self._children) > 1:
            last, before = self._children[-1]._largest(), self._children[-2]._largest()
            self._growth = last.value_s / before.value_s - 1

    @classmethod
    def build(cls, name: str, points: Sequence[tuple[tuple[float, ...], Leaf]]) -> Table:
        """From (sizes, leaf) pairs. Raises ProfileError when the grid has holes or repeats."""
        grid = [sorted({sizes[axis] for sizes, _ in points}) for axis in range(len(points[0][0]))]
        by_size = dict(points)
        expected = int(np.prod([len(axis) for axis in grid], dtype=np.int64)) if grid else 1
        if len(by_size) != len(points) or len(points) != expected:
            raise ProfileError(
                f"profile op '{name}': {len(points)} points do not form a full grid of {expected}."
                " Measure again with `muxtune profile`"
            )
        values = np.array([by_size[index].value_s for index in _product(grid)])
        values = _monotone(values.reshape([len(axis) for axis in grid]))
        leaves = {
            index: Leaf(float(value), _scaled(by_size[index], float(value)))
            for index, value in zip(_product(grid), values.ravel(), strict=True)
        }
        return cls._nest(grid, (), leaves)

    @classmethod
    def _nest(
        cls, grid: list[list[float]], prefix: tuple[float, ...], leaves: dict[tuple, Leaf]
    ) -> Table:
        if not grid:
            return cls((), (leaves[prefix],))
        xs, rest = tuple(grid[0]), grid[1:]
        if not rest:
            return cls(xs, [leaves[(*prefix, x)] for x in xs])
        return cls(xs, [cls._nest(rest, (*prefix, x), leaves) for x in xs])

    def at(self, sizes: tuple[float, ...]) -> Time:
        """The time at ``sizes``, one number per axis."""
        places, outside = [], False
        for x, xs in zip(sizes, self._axes, strict=False):
            last = len(xs) - 1
            outside = outside or x < xs[0] or x > xs[last]
            upper, share = 0, 0.0
            if last and x > xs[0]:
                upper = min(bisect_right(xs, x), last)
                share = (x - xs[upper - 1]) / (xs[upper] - xs[upper - 1])
            places.append((upper, share))
        value, width = self._along(places, 0) if places else self._leaves[0]
        return Time(value, width, outside)

    def _along(self, places: Sequence[tuple[int, float]], axis: int) -> tuple[float, float]:
        """(value, half-width). ``places``: of each axis, which point is above (0: the first one's
        value holds) and how far it is there from the one below."""
        upper, share = places[axis]
        if self._leaves:
            low, high = self._leaves[max(upper - 1, 0)], self._leaves[upper]
        elif share > 1:
            value, width = self._children[upper]._along(places, axis + 1)
            scale = 1 + self._growth * (share - 1)
            return value * scale, width * scale
        else:
            high = self._children[upper]._along(places, axis + 1)
            low = self._children[upper - 1]._along(places, axis + 1) if upper else high
        if not upper:
            return high
        value = low[0] + share * (high[0] - low[0])
        return value, max(low[1] + share * (high[1] - low[1]), 0.0)

    def _largest(self) -> Leaf:
        return self._leaves[-1] if self._leaves else self._children[-1]._largest()


def _scaled(leaf: Leaf, value_s: float) -> float:
    return leaf.half_width_s * value_s / leaf.value_s


def _product(grid: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    rows: list[tuple[float, ...]] = [()]
    for axis in grid:
        rows = [(*row, x) for row in rows for x in axis]
    return rows


def _monotone(values: np.ndarray) -> np.ndarray:
    for axis in range(values.ndim):
        lines = np.moveaxis(values.copy(), axis, -1)
        for index in np.ndindex(lines.shape[:-1]):
            lines[index] = isotonic(lines[index].tolist())
        values = np.moveaxis(lines, -1, axis)
    # Pooling one axis may undo another; the running maximum settles it.
    for axis in range(values.ndim):
        values = np.maximum.accumulate(values, axis=axis)
    return values


class Grid(NamedTuple):
    """Values over a full grid, multilinear between its points and not monotone. Below an axis its
    first value holds, above the last segment goes on; both are flagged as extrapolated.
    ``leaves``: the last axis runs fastest; ``strides``: of each axis in them."""

    axes: tuple[tuple[float, ...], ...]
    strides: tuple[int, ...]
    leaves: tuple[Leaf, ...]

    @classmethod
    def of(cls, name: str, leaves: Mapping[tuple[float, ...], Leaf]) -> Grid:
        """Raises ProfileError when the grid has holes."""
        axes = tuple(tuple(sorted(set(axis))) for axis in zip(*leaves, strict=True))
        if len(leaves) != math.prod(map(len, axes)):
            raise ProfileError(
                f"profile op '{name}': {len(leaves)} points do not form a full grid."
                " Measure again with `muxtune profile`"
            )
        strides = tuple(math.prod(map(len, axes[place + 1 :])) for place in range(len(axes)))
        return cls(axes, strides, tuple(leaves[key] for key in sorted(leaves)))

    def at(self, sizes: Sequence[float]) -> Time:
        corners, outside = [(0, 1.0)], False  # places and weights
        for x, xs, stride in zip(sizes, self.axes, self.strides, strict=True):
            if x <= xs[0] or len(xs) == 1:
                outside |= x != xs[0]
                continue
            upper = min(bisect_right(xs, x), len(xs) - 1)
            share = (x - xs[upper - 1]) / (xs[upper] - xs[upper - 1])
            outside |= share > 1.0
            low, high, rest = (upper - 1) * stride, upper * stride, 1.0 - share
            above = [(place + high, weight * share) for place, weight in corners]
            corners = [(place + low, weight * rest) for place, weight in corners] + above
        value = width = 0.0
        for place, weight in corners:
            value_s, half_width_s = self.leaves[place]
            value += weight * value_s
            width += abs(weight) * half_width_s
        return Time(value, width, outside)


def smoothed(leaves: Mapping[float, Leaf], from_size: float, log_width: float) -> dict[float, Leaf]:
    """Times by size, of which those from ``from_size`` on are drawn to their neighbours: seconds
    over size follow a line over the logarithm of the size, fitted with Gaussian weights of
    ``log_width``. Half-widths stay."""
    sizes = [size for size in sorted(leaves) if size >= from_size]
    found = dict(leaves)
    if len(sizes) < 3:
        return found
    logs = np.log(sizes)
    rates = np.log([leaves[size].value_s / size for size in sizes])
    for size, at in zip(sizes, logs, strict=True):
        weights = np.exp(-(((logs - at) / log_width) ** 2) / 4)  # polyfit squares them
        rate = np.polyfit(logs - at, rates, 1, w=weights)[1]
        found[size] = leaves[size]._replace(value_s=float(size * np.exp(rate)))
    return found


class AffineFit(NamedTuple):
    """``coefficients`` (all >= 0) of the features, the largest size fitted, and the half-width of
    the relative error that covers 90% of the points and their measured spread."""

    coefficients: tuple[float, ...]
    relative_error: float
    max_size: float


def fit_affine(features: np.ndarray, leaves: Sequence[Leaf], max_size: float) -> AffineFit:
    """Least squares of the RELATIVE error with non-negative coefficients.

    ``features``: points x terms. With at most three terms every subset of active terms is tried,
    which is exact non-negative least squares.
    """
    times = np.array([leaf.value_s for leaf in leaves])
    scaled = features / times[:, None]
    best, best_error = None, np.inf
    terms = range(features.shape[1])
    for count in range(1, features.shape[1] + 1):
        for active in combinations(terms, count):
            solved, *_ = np.linalg.lstsq(scaled[:, active], np.ones(len(times)), rcond=None)
            error = float(np.sum((scaled[:, active] @ solved - 1.0) ** 2))
            if (solved >= 0).all() and error < best_error:
                best, best_error = (active, solved), error
    if best is None:
        raise ProfileError("a measured op fits no non-negative time. Run `muxtune profile` again")
    coefficients = np.zeros(features.shape[1])
    coefficients[list(best[0])] = best[1]
    residual = np.quantile(np.abs(scaled @ coefficients - 1.0), 0.9)
    spread = max(leaf.half_width_s / leaf.value_s for leaf in leaves)
    return AffineFit(
        tuple(float(c) for c in coefficients), float(residual + spread), float(max_size)
    )
