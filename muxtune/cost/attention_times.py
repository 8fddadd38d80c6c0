"""What a profile tells of packed attention: of one call by its rows and pairs, of a mix of
sequences by their tiles, and as a form that is affine in rows and pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from muxtune.cost.attention import (
    MOST_TILES,
    SEQUENCES,
    TILE_ROWS,
    Device,
    PackedAttention,
    Point,
    sequence_counts,
)
from muxtune.cost.composition import Rates
from muxtune.cost.curves import Leaf, Time, fit_affine
from muxtune.cost.profiled import NOTHING_MEASURED, Measured, leaf_of
from muxtune.cost.tiles import Tiling
from muxtune.types import PassLayout

_KINDS = ("attention_forward", "attention_backward")
# Of calls of other mixes, 90% of them (a suite's: what lengths there are, pairs do not tell).
_ERROR = 0.18
_COUNTED_ERROR = 0.09  # where they do
_FEW_ROWS_POWER = 0.8  # of a call's time, by rows fewer than were measured


class AttentionTimes:
    """Of a profile's operations ``attention_forward.HxKxE`` (heads, key heads, head size) and
    ``attention_backward.HxKxE``. ``measured``: see ``muxtune.cost.profiled.Measured``."""

    def __init__(self, ops: Mapping[str, Any], tiling: Tiling | None, measured: Measured) -> None:
        self._ops, self._tiling, self._measured = ops, tiling, measured
        self._packed: dict[str, PackedAttention] = {}
        self._own: dict[str, tuple[float, PackedAttention] | None] = {}

    def rates(self, name: str) -> Rates:
        """Affine in a pass's rows and pairs. Of heads that were not measured: what the sequences of
        the measured points take with as many heads, where the profile tells them; else by work,
        which says too little of few rows where heads share keys."""
        measured, ratio, extrapolated = self._measured(name)
        points, counted = self._ops[measured]["points"], self._with_own_heads(name)
        leaves = [leaf_of(point) for point in points]
        if extrapolated and counted is not None:
            ratio, packed = counted
            calls = [Point.of(point) for point in points]
            own_s = [packed.seconds(call.rows, call.sequences) for call in calls]
            leaves = [_taking(s, leaf) for s, leaf in zip(own_s, leaves, strict=True)]
        features = np.array([(1.0, point["rows"], point["pairs"]) for point in points])
        fit = fit_affine(features, leaves, max(float(point["rows"]) for point in points))
        per_pass, per_row, per_pair = (ratio * number for number in fit.coefficients)
        most = NOTHING_MEASURED if extrapolated else fit.max_size
        return Rates(per_pass, per_row, per_pair, fit.relative_error, most)

    def of_call(self, name: str, rows: float, pairs: float, *sequences: float) -> Time:
        """Of one call by itself. ``sequences``: how many there are of 1, 2, ... tiles of the packed
        kernels (``muxtune.cost.attention``), by which it is counted; without them, and where the
        profile does not tell them, a row's time follows how far rows look back on average, between
        the mixes that were measured."""
        name, ratio, outside = self._measured(name)
        points = self._ops[name]["points"]
        known_rows = [point["rows"] for point in points]
        outside |= not min(known_rows) <= rows <= max(known_rows)
        if sequences and self._tells_sequences(name):
            value = self._packed_attention(name).seconds(rows, sequences)
            return Time(ratio * value, ratio * value * _COUNTED_ERROR, outside)
        value = _of_pairs(points, rows, pairs)
        return Time(ratio * value, ratio * value * _ERROR, outside)

    def of_layout(self, size: str, rows: float, layout: PassLayout) -> float | None:
        """Seconds of one block, both ways; None where the profile does not tell, or a sequence is
        longer than the packed kernels are meant for. ``size``: HxKxE of the block."""
        filler, tile = int(rows) - sum(layout.sequence_rows), TILE_ROWS
        lengths = [*layout.sequence_rows, *[tile] * (filler // tile)]
        lengths += [filler % tile] if filler % tile else []
        if max(lengths) > MOST_TILES * tile:
            return None
        counts, seconds = tuple(sequence_counts(lengths).values()), 0.0
        for kind in _KINDS:
            counted = self._with_own_heads(f"{kind}.{size}")
            if counted is None:
                return None
            ratio, packed = counted
            seconds += ratio * packed.seconds(rows, counts)
        return seconds

    def _tells_sequences(self, name: str) -> bool:
        return self._tiling is not None and SEQUENCES[0] in self._ops[name]["points"][0]

    def _with_own_heads(self, name: str) -> tuple[float, PackedAttention] | None:
        """How much wider heads are than the measured ones, and attention with as many heads."""
        if name not in self._own:
            measured, _, _ = self._measured(name)
            found = None
            if self._tells_sequences(measured):
                ratio = _head_size(name) / _head_size(measured)
                found = ratio, self._packed_attention(measured).on(self._device(name))
            self._own[name] = found
        return self._own[name]

    def _packed_attention(self, name: str) -> PackedAttention:
        if name not in self._packed:
            points = [Point.of(raw) for raw in self._ops[name]["points"]]
            backward = name.startswith(_KINDS[1])
            self._packed[name] = PackedAttention(self._device(name), backward, points)
        return self._packed[name]

    def _device(self, name: str) -> Device:
        assert self._tiling is not None
        heads, kv_heads, _ = map(int, name.partition(".")[2].split("x"))
        return Device(heads, kv_heads, self._tiling.num_multiprocessors)


def _taking(seconds: float, leaf: Leaf) -> Leaf:
    """As certain as another."""
    return Leaf(seconds, leaf.half_width_s * seconds / leaf.value_s)


def _head_size(name: str) -> int:
    return int(name.rsplit("x", 1)[1])


def _of_pairs(points: Sequence[Mapping[str, float]], rows: float, pairs: float) -> float:
    by_rows: dict[float, list[tuple[float, float]]] = {}
    for point in points:
        back = float(np.log2(point["pairs"] / point["rows"]))
        by_rows.setdefault(point["rows"], []).append((back, point["median_s"]))
    sizes, back = sorted(by_rows), float(np.log2(pairs / rows))
    seconds = []
    for mixes in (sorted(by_rows[size]) for size in sizes):
        known = [at for at, _ in mixes], [time_s for _, time_s in mixes]
        seconds.append(float(np.interp(back, *known)))
    value = float(np.interp(rows, sizes, seconds)) * max(1.0, rows / sizes[-1])
    return value * min(1.0, rows / sizes[0]) ** _FEW_ROWS_POWER
