"""Products with adapters as the captured step's kernels compute them: counted, then fitted.

What a product takes is a sum of few things, each counted from its sizes and each of a speed that
the profile's own points tell: its waves of tiles; the making of h = x A^T, for which one
program reads a tile's rows once for every two slots that meet in it, while the others compute
their first tile and then wait; the low-rank steps at the end of every tile, again one for every
two slots in it; and backward, one program for each slot and block of outputs, which leave their
parts of dh to be summed. So slots count by how many meet in a tile, and rows by how many tiles
and waves they make: both change by jumps, which no line between measured sizes would find.

What is left between a count and its measurement is kept as a ratio (``Products.seconds``), which
changes little from size to size and lies between those of the sizes around.

Shape suffixes: U numbers of rows in use, N tiles of rows.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from muxtune.cost.curves import Grid, Leaf, Time
from muxtune.cost.fused_sites import padded_rank
from muxtune.cost.meeting import ALONE as _ALONE
from muxtune.cost.meeting import ALONE_STEP as _ALONE_STEP
from muxtune.cost.meeting import meet
from muxtune.cost.tiles import Launch, Tiling

FORWARD, BACKWARD = "site_forward", "site_backward"
_RANKS = (16.0, 32.0, 64.0)  # those that kernels pad to, of which the first factor's reads depend
_PASS_WIDTH = 4096.0  # of the inputs that a pass over a tile's rows is counted by
_SUM_BLOCK = 128  # outputs of one program of the backward's first kernel
_UNEVEN_ROWS = 21  # slots differ by; none begins where a tile does
_FILLS = 0.35, 0.65, 0.95  # shares of rows in use of a step's passes
FILL = 0.65  # their mean
# Of the only wave's time, by the share of multiprocessors that are idle. Judged by single products
# of few rows and steps of a wider model, on two devices.
_IDLE_SPARES = 0.4
_IDLE_LATER_SPARES = 0.25  # of several waves; judged by five suites of single products
_PRIOR = 0.02  # of a point's time: what a term's usual speed weighs
_ROUNDS = 6  # of finding which of two things a product waits for, and the speeds
# A product of many rows differs by 2% from one measurement to the next, with the device's clock:
# ratios are means over those around, by distances of (slots, rank, rows), in octaves. Judged by the
# single products, and the steps, of six suites of two devices.
_SMOOTH_FROM_ROWS, _SMOOTH = 1000.0, np.array([1.2, 1.0, 0.5])


_Place = tuple[float, float, float]  # binary logarithms of slots, rank and rows


class Sizes(NamedTuple):
    """Of a fused linear: its inputs, and its members' outputs."""

    in_features: int
    out_features: tuple[int, ...]


class Met(NamedTuple):
    """How slots meet in tiles of rows. ``most_pairs``: reads of the rows of the fullest tile, one
    for two slots; ``mean_pairs``: of all tiles with several slots, over all tiles; ``alone``: share
    of the tiles that are one slot's."""

    most_pairs: float
    mean_pairs: float
    alone: float

    @classmethod
    def of(cls, slots: int, rows: int, used_rows: Sequence[int], tile_rows: int) -> Met:
        """Of slots with nearly equal shares of the rows in use, which come before the others; the
        mean over ``used_rows``. A tile is one slot's where no row of it is filler."""
        fullest, pairs, alone = [], 0, 0
        for used in used_rows:
            share = max(used, slots) // slots
            met = _slots_met(slots, share, rows, tile_rows)
            pairs_met = [count // 2 + 1 for count in met.values()]
            begun = -(-min(share * slots, rows) // tile_rows)
            fullest.append(max(float(max(pairs_met, default=0)), _ALONE))
            pairs, alone = pairs + sum(pairs_met), alone + begun - len(met)
        tiles = len(fullest) * -(-rows // tile_rows)
        return cls(sum(fullest) / len(fullest), pairs / tiles, alone / tiles)

    def steps(self, waves: float) -> float:
        """Of 16 ranks: a single wave ends with its fullest tile; of several waves a mean tile's."""
        mean = self.mean_pairs + _ALONE_STEP * self.alone
        if waves > 1.0:
            return mean
        return max(mean, self.most_pairs if self.most_pairs >= 1.0 else _ALONE_STEP)

    @classmethod
    def typical(cls, slots: int, rows: int, tile_rows: int) -> Met:
        """Of a step's passes, whose first is nearly full and whose last nearly empty."""
        return cls.of(slots, rows, [int(share * rows) - 1 for share in _FILLS], tile_rows)


def _slots_met(slots: int, share: int, rows: int, tile_rows: int) -> Mapping[int, int]:
    """By tile in which a slot ends before the tile does: after how many of its slots another
    begins. Of two slots the first has fewer rows, but for the last of an odd number."""
    used, uneven = slots * share, min(_UNEVEN_ROWS, share // 4)
    ends = [*range(share - uneven, used - uneven, 2 * share), *range(2 * share, used, 2 * share)]
    found = Counter([end // tile_rows for end in ends if end % tile_rows and end < rows])
    if used % tile_rows and used < rows:
        found[used // tile_rows] += 0  # its last slot, which only filler follows
    return found


def even_rows(slots: int, used_rows: int) -> tuple[int, ...]:
    """Of each slot, whose shares are nearly even, as a profile's points have them."""
    share = max(used_rows, slots) // slots
    off, pairs = min(_UNEVEN_ROWS, share // 4), slots // 2
    return (share - off, share + off) * pairs + (share,) * (slots % 2)


class Use(NamedTuple):
    """Of a linear by one certain micro-batch. ``slot_rows``: rows in use of every slot; ``ranks``:
    in whole low-rank steps, 0 of slots that do not adapt the linear."""

    slot_rows: tuple[int, ...]
    ranks: tuple[float, ...]

    @property
    def slots(self) -> int:
        """That adapt it."""
        return sum(rank > 0 for rank in self.ranks)

    @property
    def padded_rank(self) -> int:
        """To which the kernels pad the largest."""
        return padded_rank(self.ranks)

    @property
    def active_ranks(self) -> list[float]:
        """Of slots with rows."""
        both = zip(self.slot_rows, self.ranks, strict=True)
        return [rank for rows, rank in both if rows and rank]


class Counts:
    """What a product's time is counted by, of a tiling. Remembers how slots meet."""

    def __init__(self, tiling: Tiling) -> None:
        self.tiling = tiling
        # Launches are the same for all rows up to the next multiple.
        self._step_rows = math.gcd(*[tile.rows for tile in tiling.tiles])
        self._met: dict[tuple[int, int, int, int], Met] = {}
        self._launches: dict[tuple[int, tuple[int, ...], int], _Tiles] = {}
        self._kinds = [(tile.rows, tile.columns) for tile in tiling.tiles]
        self._heights = sorted({tile.rows for tile in tiling.tiles})
        self.usual_work_s = [_TILE_WORK_S / tile.efficiency for tile in tiling.tiles]

    def met(self, slots: int, rows: int, used_rows: int, tile_rows: int) -> Met:
        """``used_rows``: 0 where they are as a step's passes mostly have them."""
        key = slots, rows, used_rows, tile_rows
        if key not in self._met:
            if used_rows:
                self._met[key] = Met.of(slots, rows, (used_rows,), tile_rows)
            else:
                self._met[key] = Met.typical(slots, rows, tile_rows)
        return self._met[key]

    def tiles(self, rows: int, widths: tuple[int, ...], inner: int) -> _Tiles:
        key = -(-rows // self._step_rows), widths, inner
        found = self._launches.get(key)
        if found is None:
            found = self._launches[key] = self._tiles(self.tiling.launch(rows, widths), inner)
        return found

    def _tiles(self, launch: Launch, inner: int) -> _Tiles:
        tile, waves = launch.tile, launch.waves
        kind, height = self._kinds.index((tile.rows, tile.columns)), self._heights.index(tile.rows)
        work, across = _tile_work(launch, inner), launch.across
        return _Tiles(waves, math.ceil(waves), launch.free, tile.rows, across, kind, height, work)

    def forward(self, site: Sizes, slots: int, rank: float, rows: int, used_rows: int) -> _Forward:
        if used_rows:
            use = Use(even_rows(slots, used_rows), (rank,) * slots)
            return self.forward_of(site, use, rows)
        tiles = self.tiles(rows, site.out_features, site.in_features)
        met, members = self.met(slots, rows, 0, tiles.tile_rows), len(site.out_features)
        fills = [int(fill * rows) for fill in _FILLS]
        in_turn = [-(-used // tiles.tile_rows) * members > tiles.free for used in fills]
        return _Forward(
            tiles,
            met.most_pairs * site.in_features / _PASS_WIDTH,
            rank / _RANKS[0] * met.steps(tiles.waves),
            sum(in_turn) / len(in_turn),
        )

    def forward_of(self, site: Sizes, use: Use, rows: int) -> _Forward:
        """Of one certain micro-batch."""
        tiles = self.tiles(rows, site.out_features, site.in_features)
        met = meet(use.slot_rows, use.ranks, rows, tiles.tile_rows)
        steps = met.most_steps(tiles.across, self.tiling.num_multiprocessors)
        return _Forward(
            tiles,
            met.most_pairs * site.in_features / _PASS_WIDTH,
            steps / tiles.begun,
            float(met.used * len(site.out_features) > tiles.free),
        )

    def backward_of(self, site: Sizes, use: Use, rows: int) -> _Backward:
        """Of one certain micro-batch; slots without rows have nothing to sum."""
        members = len(site.out_features)
        tiles = self.tiles(rows, (site.in_features,), sum(site.out_features))
        met = meet(use.slot_rows, use.ranks, rows, tiles.tile_rows)
        blocks, active = _sum_blocks(site), use.active_ranks
        each = blocks / self.tiling.num_multiprocessors
        steps = met.most_steps(tiles.across, self.tiling.num_multiprocessors)
        return _Backward(
            tiles,
            members * steps / tiles.begun,
            each * len(active),
            each * sum(active) / _RANKS[0],
            rows * use.padded_rank * blocks / 1e6,
        )

    def backward(
        self, site: Sizes, slots: int, rank: float, rows: int, used_rows: int
    ) -> _Backward:
        members = len(site.out_features)
        tiles = self.tiles(rows, (site.in_features,), sum(site.out_features))
        met = self.met(slots, rows, used_rows, tiles.tile_rows)
        blocks = _sum_blocks(site)
        programs = blocks * slots / self.tiling.num_multiprocessors
        steps = rank / _RANKS[0]
        return _Backward(
            tiles,
            steps * members * met.steps(tiles.waves),
            programs,
            programs * steps,
            rows * rank * blocks / 1e6,
        )


def _sum_blocks(site: Sizes) -> int:
    """Of outputs, of all members: narrower ones have fewer."""
    return sum([-(-width // _SUM_BLOCK) for width in site.out_features])


def _tile_work(launch: Launch, inner: int) -> float:
    """Of a tile, in 1e9; less where multiprocessors are idle, which leave power and memory to the
    others."""
    spares = _IDLE_SPARES if launch.waves <= 1.0 else _IDLE_LATER_SPARES
    work = launch.tile.rows * launch.tile.columns * inner / 1e9
    return work * (1.0 - spares * (1.0 - launch.busy))


class _Tiles(NamedTuple):
    """Of a launch. ``begun``: waves, the last as a whole one; ``free``, ``across``: see ``Launch``;
    ``kind``, ``height``: places of the tile and its rows; ``work``: multiply-adds of a tile, in
    1e9."""

    waves: float
    begun: int
    free: int
    tile_rows: int
    across: int
    kind: int
    height: int
    work: float


class _Forward(NamedTuple):
    """``passes``: over the rows of the fullest tile, by ``_PASS_WIDTH`` inputs; ``steps``: low-rank
    steps of a tile; ``in_turn``: share of passes in which some that make h, of rows in use,
    have a tile in the last wave too."""

    tiles: _Tiles
    passes: float
    steps: float
    in_turn: float


class _Backward(NamedTuple):
    """``steps``: as of ``_Forward``; ``programs``: of the first kernel, over multiprocessors;
    ``ranked``: times their rank; ``parts``: numbers of dh that are left to be summed, in 1e6."""

    tiles: _Tiles
    steps: float
    programs: float
    ranked: float
    parts: float


class Point(NamedTuple):
    site: Sizes
    slots: int
    rank: float
    rows: int
    measured: Leaf


# Usual speeds, in seconds of what they are counted by; the fit leaves them only for evidence.
_TILE_WORK_S, _TILE_S, _STEP_S, _PASS_S = 3e-4, 5e-6, 3e-6, (20e-6, 32e-6, 48e-6)
_FIRST_S, _PROGRAM_S, _RANKED_S, _PART_S = 10e-6, 0.2e-6, 1e-6, 2e-6


class Forward:
    """Seconds of y = x W^T + s (x A^T) B^T."""

    def __init__(self, counts: Counts, points: Sequence[Point]) -> None:
        self.counts = counts
        tiles, heights = len(counts._kinds), len(counts._heights)
        usual = [*counts.usual_work_s, *[_STEP_S] * tiles, _TILE_S, *[*_PASS_S] * heights]
        self.speeds = usual
        counted = [self._counted(point) for point in points]
        for _ in range(_ROUNDS):
            terms = [self._terms(*item) for item in counted]
            self.speeds = fit_speeds(terms, [p.measured.value_s for p in points], usual)

    def _counted(self, point: Point) -> tuple[_Forward, float]:
        site, slots, rank, rows, _ = point
        return self.counts.forward(site, slots, rank, rows, rows), rank

    def _pass_weights(self, item: _Forward, rank: float) -> list[tuple[int, float]]:
        """Places among the speeds of a pass, and how much each counts: ranks lie between two."""
        above_it = len(self.counts._heights) - item.tiles.height
        first = len(self.speeds) - len(_RANKS) * above_it
        if rank <= _RANKS[0]:
            return [(first, 1.0)]
        for place in (1, 2):
            if rank <= _RANKS[place]:
                share = (rank - _RANKS[place - 1]) / (_RANKS[place] - _RANKS[place - 1])
                return [(first + place - 1, 1.0 - share), (first + place, share)]
        return [(first + 2, rank / _RANKS[2])]

    def _parts(self, item: _Forward, rank: float) -> tuple[float, float]:
        """(seconds of making h, of a tile's product)."""
        speeds, tiles = self.speeds, item.tiles
        pass_s = sum([weight * speeds[at] for at, weight in self._pass_weights(item, rank)])
        return item.passes * pass_s, speeds[tiles.kind] * tiles.work

    def _terms(self, item: _Forward, rank: float) -> list[float]:
        """What the speeds are multiplied by."""
        made_s, tile_s = self._parts(item, rank)
        kinds, tiles = len(self.counts._kinds), item.tiles
        terms = [0.0] * len(self.speeds)
        waits = made_s > tile_s
        terms[tiles.kind] = tiles.work * (tiles.waves - (waits and not item.in_turn))
        terms[kinds + tiles.kind] = item.steps * tiles.begun
        terms[2 * kinds] = tiles.begun
        if waits or item.in_turn:
            for at, weight in self._pass_weights(item, rank):
                terms[at] = weight * item.passes
        return terms

    def seconds(self, site: Sizes, slots: int, rank: float, rows: int, used_rows: int) -> float:
        return self._seconds(self.counts.forward(site, slots, rank, rows, used_rows), rank)

    def seconds_of(self, site: Sizes, use: Use, rows: int) -> float:
        return self._seconds(self.counts.forward_of(site, use, rows), float(use.padded_rank))

    def _seconds(self, item: _Forward, rank: float) -> float:
        made_s, tile_s = self._parts(item, rank)
        tiles, kinds = item.tiles, len(self.counts._kinds)
        ends_s = self.speeds[kinds + tiles.kind] * item.steps + self.speeds[2 * kinds]
        first_s = max(made_s, tile_s) + item.in_turn * min(made_s, tile_s)
        return first_s + (tiles.waves - 1.0) * tile_s + tiles.begun * ends_s


class Backward:
    """Seconds of dh = s dy B, dB = dy^T h and dx = dy W + dh A."""

    def __init__(self, counts: Counts, points: Sequence[Point]) -> None:
        self.counts = counts
        tiles = len(counts._kinds)
        usual = [*counts.usual_work_s, *[_STEP_S] * tiles]
        usual += [_TILE_S, _FIRST_S, _PROGRAM_S, _RANKED_S, _PART_S]
        terms = [self._terms(*point[:4], point.rows) for point in points]
        self.speeds = fit_speeds(terms, [p.measured.value_s for p in points], usual)

    def _terms(
        self, site: Sizes, slots: int, rank: float, rows: int, used_rows: int
    ) -> list[float]:
        """What the speeds are multiplied by."""
        terms = [0.0] * (2 * len(self.counts._kinds) + 5)
        item = self.counts.backward(site, slots, rank, rows, used_rows)
        for at, term in self._placed_terms(item):
            terms[at] = term
        return terms

    def _placed_terms(self, item: _Backward) -> list[tuple[int, float]]:
        """Places among the speeds, and what each is multiplied by; the others by nothing."""
        tiles, kinds = item.tiles, len(self.counts._kinds)
        return [
            (tiles.kind, tiles.work * tiles.waves),
            (kinds + tiles.kind, item.steps * tiles.begun),
            (2 * kinds, tiles.begun),
            (2 * kinds + 1, 1.0),
            (2 * kinds + 2, item.programs),
            (2 * kinds + 3, item.ranked),
            (2 * kinds + 4, item.parts),
        ]

    def seconds(self, site: Sizes, slots: int, rank: float, rows: int, used_rows: int) -> float:
        return self._seconds(self.counts.backward(site, slots, rank, rows, used_rows))

    def seconds_of(self, site: Sizes, use: Use, rows: int) -> float:
        return self._seconds(self.counts.backward_of(site, use, rows))

    def _seconds(self, item: _Backward) -> float:
        return sum([self.speeds[at] * term for at, term in self._placed_terms(item)])


def fit_speeds(
    terms: Sequence[Sequence[float]], measured_s: Sequence[float], usual: Sequence[float]
) -> list[float]:
    """Speeds, none negative, by least squares of relative errors. Each is drawn to its usual one,
    which holds where no point has that term."""
    if not terms:
        return list(usual)
    scale = np.array(usual)
    rows = np.array(terms) * scale / np.array(measured_s)[:, None]
    stacked = np.concatenate([rows, _PRIOR * np.eye(len(scale))])
    wanted = np.concatenate([np.ones(len(rows)), np.full(len(scale), _PRIOR)])
    active = np.arange(len(scale))
    while True:
        solved = np.linalg.lstsq(stacked[:, active], wanted, rcond=None)[0]
        if (solved >= 0).all():
            break
        active = active[solved > 0]
    speeds = np.zeros(len(scale))
    speeds[active] = solved
    return [float(value) for value in speeds * scale]


class _Ratios:
    """Of one linear, over logarithms of slots, rank and rows: multilinear between the points, and
    the nearest beyond them. As ``Grid``, but asked thousands of times a second."""

    def __init__(self, name: str, points: Mapping[_Place, Leaf]) -> None:
        """Raises ProfileError when there are holes."""
        grid = Grid.of(name, points)
        self._axes, self._strides = grid.axes, grid.strides
        self._values = [leaf.value_s for leaf in grid.leaves]
        self._widths = [leaf.half_width_s for leaf in grid.leaves]
        self._places: dict[tuple[int, float], tuple[int, int, float, bool]] = {}

    def at(self, sizes: tuple[float, float, float]) -> tuple[float, float, bool]:
        """(ratio, half-width, whether it is outside)."""
        i, up_i, u, beyond_i = self._place(0, sizes[0])
        j, up_j, v, beyond_j = self._place(1, sizes[1])
        k, up_k, w, beyond_k = self._place(2, sizes[2])
        low, high = i + j + k, i + j + k + up_i
        corners = low, low + up_k, low + up_j, low + up_j + up_k
        corners += high, high + up_k, high + up_j, high + up_j + up_k
        found = []
        for values in (self._values, self._widths):
            a, b, c, d, e, f, g, h = [values[corner] for corner in corners]
            a, c, e, g = a + w * (b - a), c + w * (d - c), e + w * (f - e), g + w * (h - g)
            a, e = a + v * (c - a), e + v * (g - e)
            found.append(a + u * (e - a))
        return found[0], found[1], beyond_i or beyond_j or beyond_k

    def _place(self, axis: int, size: float) -> tuple[int, int, float, bool]:
        """(offset of the point below, from there to the one above, share of the way, outside)."""
        known = self._places.get((axis, size))
        if known is None:
            x, xs, stride = math.log2(size), self._axes[axis], self._strides[axis]
            inside = min(max(x, xs[0]), xs[-1])
            below = max(0, min(bisect_right(xs, inside), len(xs) - 1) - 1)
            up = stride if len(xs) > 1 else 0
            share = (inside - xs[below]) / (xs[below + 1] - xs[below]) if up else 0.0
            known = self._places[axis, size] = below * stride, up, share, inside != x
        return known


class Counted(Protocol):
    """What a product takes as it is counted."""

    def seconds(self, site: Sizes, slots: int, rank: float, rows: int, used_rows: int) -> float:
        """``used_rows``: 0 where they are as a step's passes mostly have them."""
        ...


class Products:
    """One direction's products with adapters: what is counted of them, times what the points
    around say that it is off by."""

    def __init__(
        self,
        name: str,
        counted: Counted,
        points: Mapping[str, Sequence[Point]],
        kept: float = 1.0,
    ) -> None:
        """``points``: by the size of the linear that was measured; ``kept``: of the
        logarithms of their ratios, the share that holds between them, too. Raises ProfileError
        when they leave holes."""
        self.counted, self._kept = counted, kept
        self._ratios = {
            size: _Ratios(f"{name}.{size}", self._ratios_of(own)) for size, own in points.items()
        }

    def _ratios_of(self, points: Sequence[Point]) -> dict[_Place, Leaf]:
        """A's gradients' stay as they are: smoothing changed nothing."""
        found = {_place(point): self._ratio(point) for point in points}
        return _smoothed(found) if isinstance(self.counted, Forward | Backward) else found

    def _ratio(self, point: Point) -> Leaf:
        counted_s = self.counted.seconds(*point[:4], point.rows)
        ratio = (point.measured.value_s / counted_s) ** self._kept
        return Leaf(ratio, point.measured.half_width_s / counted_s)

    def at(self, like: str, site: Sizes, sizes: Sequence[float]) -> Time:
        """``like``: the measured linear whose ratios hold. ``sizes``: slots, rank, rows, and rows
        in use where these are not all; 0: as a step's passes mostly have them."""
        slots, rank, rows = max(1, int(sizes[0])), sizes[1], max(1, int(sizes[2]))
        used_rows = int(sizes[3]) if len(sizes) > 3 else rows
        counted_s = self.counted.seconds(site, slots, rank, rows, used_rows)
        ratio, width, outside = self._ratios[like].at((slots, rank, rows))
        return Time(counted_s * ratio, counted_s * width, outside)

    def of_layout(self, like: str, site: Sizes, use: Use, rows: int) -> float:
        """Seconds in one certain micro-batch; not of A's gradients."""
        assert isinstance(self.counted, Forward | Backward)
        ratio, _, _ = self._ratios[like].at(
            (max(1, len(use.active_ranks)), float(use.padded_rank), rows)
        )
        return ratio * self.counted.seconds_of(site, use, rows)


def _place(point: Point) -> _Place:
    return math.log2(point.slots), math.log2(point.rank), math.log2(point.rows)


def _smoothed(ratios: Mapping[_Place, Leaf]) -> dict[_Place, Leaf]:
    """Weighted by a Gaussian of the distances; half-widths stay."""
    found, least = dict(ratios), math.log2(_SMOOTH_FROM_ROWS)
    places = [place for place in ratios if place[2] >= least]
    if not places:
        return found
    apart = (np.array(places)[:, None] - np.array(places)[None, :]) / _SMOOTH
    weights = np.exp(-0.5 * (apart**2).sum(axis=2))
    logs = np.log([ratios[place].value_s for place in places])
    means = np.exp(weights @ logs / weights.sum(axis=1))
    for place, mean in zip(places, means.tolist(), strict=True):
        found[place] = ratios[place]._replace(value_s=mean)
    return found
