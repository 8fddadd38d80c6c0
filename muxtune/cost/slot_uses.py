"""What a captured step's slots mean for blocks of any number of rows: which fused linears they
take part in, what rank each product pays for, and what a row of filler spares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from muxtune.cost import ops
from muxtune.cost.causes import EXTRA_METHODS, FACTOR, SITE
from muxtune.cost.composition import kept
from muxtune.cost.curves import interpolated
from muxtune.cost.fused_sites import (
    MEMBERS,
    MIN_RANK,
    extra_size,
    padded_rank,
    slot_elements,
    stepped_rank,
)
from muxtune.cost.profiled import TimeOf, WorkRatio
from muxtune.cost.shapes import ModelShape
from muxtune.types import AdapterSlot

# Shares of a call with adapters: the frozen product itself is always more than the rest.
_MOST_SPARED = {"forward": 0.4, "backward": 0.4, "factor": 0.9}


class Side(NamedTuple):
    """One of the products that adapters take part in."""

    name: str
    cause: str
    backward: bool


_SIDES = (Side("forward", SITE, False), Side("backward", SITE, True), Side("factor", FACTOR, True))


class SlotKind(NamedTuple):
    """What slots that are alike share. ``rank``: as padded; ``stepped``: see ``stepped_rank``;
    ``adapts``: of each fused linear, whether they have factors there; ``elements``: see
    ``slot_elements``."""

    rank: int
    stepped: int
    adapts: tuple[bool, ...]
    elements: float


class Paid(NamedTuple):
    """A side of a fused linear with adapters. ``op``: its operation; ``rank``: that is paid;
    ``row_s``: what a row of filler spares."""

    side: Side
    op: str
    rank: float
    row_s: float

    def spared_s(self, whole_s: float, rows: float) -> float:
        """By a row of filler, of a call of ``rows`` that takes ``whole_s``."""
        return min(self.row_s, _MOST_SPARED[self.side.name] * whole_s / rows)


class SiteUse(NamedTuple):
    """How a shape's slots use a fused linear, of ``size``. ``count``: of slots with factors there;
    ``known``: whether captured steps know the methods of all."""

    size: str
    count: int
    known: bool
    paid: tuple[Paid, ...]


class SlotsUse(NamedTuple):
    """``place``: of the slots among shapes, see ``SlotUses.place``; ``extras``: (method, size,
    slots) of ``EXTRA_METHODS``."""

    place: tuple[float, float, float]
    sites: tuple[SiteUse, ...]
    extras: tuple[tuple[str, float, int], ...]
    num_slots: int


class SlotUses:
    """Of a model's slots, by a profile's operations. ``time_of``: of an operation."""

    def __init__(self, model: ModelShape, profile_ops: Mapping[str, Any], time_of: TimeOf) -> None:
        self._model, self._ops, self._time_of = model, profile_ops, time_of
        self._kinds: dict[AdapterSlot, SlotKind] = {}
        self._shares: dict[str, float] = {}
        self._spared: dict[str, tuple[list[float], list[float]]] = {}

    def of(self, kinds: Counter[AdapterSlot], sizes: Sequence[str]) -> SlotsUse:
        """``sizes``: of the fused linears."""
        sites = tuple(self._site_use(n, size, kinds) for n, size in enumerate(sizes))
        extras = []
        for method in EXTRA_METHODS:
            own = sum(count for slot, count in kinds.items() if slot.method == method)
            if own and (size := extra_size(self._model, tuple(kinds), method)):
                extras.append((method, size, own))
        return SlotsUse(self.place(kinds), sites, tuple(extras), kinds.total())

    def kind(self, slot: AdapterSlot) -> SlotKind:
        found = self._kinds.get(slot)
        return kept(self._kinds, slot, self._kind(slot)) if found is None else found

    def _kind(self, slot: AdapterSlot) -> SlotKind:
        adapted: set[str] = set()
        if slot.method not in EXTRA_METHODS:
            linears = ops.target_linears(self._model, slot)
            adapted.update(item.name.rsplit(".", 1)[-1] for item in linears)
        adapts = tuple(not adapted.isdisjoint(members) for members in MEMBERS)
        elements = float(slot_elements(self._model, slot))
        return SlotKind(padded_rank([slot.rank]), stepped_rank(slot.rank), adapts, elements)

    def place(self, kinds: Counter[AdapterSlot]) -> tuple[float, float, float]:
        """Slots, ranks, and how much of the linears is adapted."""
        ranks, adapted = 0.0, 0.0
        for slot, count in kinds.items():
            kind = self.kind(slot)
            sites = sum(kind.adapts)
            ranks += count * sites * float(np.log2(kind.rank))
            adapted += count * sites
        share = adapted / (len(MEMBERS) * max(1, kinds.total()))
        rank = ranks / adapted if adapted else float(np.log2(MIN_RANK))
        return float(np.log2(max(1, kinds.total()))), rank, share

    def _site_use(self, number: int, size: str, kinds: Counter[AdapterSlot]) -> SiteUse:
        users, ranks = [], []
        for slot, count in kinds.items():
            kind = self.kind(slot)
            if kind.adapts[number]:
                users.append(slot)
                ranks += [kind.rank] * count
        paid = []
        for side in _SIDES if users else ():
            name = f"{side.name}.{size}"
            rank = self.rank_paid(name, ranks)
            paid.append(Paid(side, f"site_{name}", rank, self.row_s(name, rank)))
        known = all(slot.method == "lora" for slot in users)
        return SiteUse(size, len(ranks), known, tuple(paid))

    def rank_paid(self, name: str, ranks: Sequence[int]) -> float:
        """Between the mean of the padded ranks, which a product pays for by each slot's rows, and
        the largest, to which other kernels pad all: as far as the profile's mixed ranks say."""
        most, mean = float(max(ranks)), sum(ranks) / len(ranks)
        if most == mean:
            return most
        if name not in self._shares:
            self._shares[name] = self._measured_share(name)
        return mean + self._shares[name] * (most - mean)

    def _measured_share(self, name: str) -> float:
        side, _, size = name.partition(".")
        if f"mixed_{name}" not in self._ops:
            nearest = WorkRatio.of(f"mixed_{side}", self._ops).nearest(f"mixed_{name}")
            if nearest is None:
                return 1.0
            size = nearest.name.partition(".")[2]
        point = self._ops[f"mixed_{side}.{size}"]["points"][0]
        mean, most = (MIN_RANK + point["rank"]) / 2, float(point["rank"])
        low, high = (
            self._time_of(f"site_{side}.{size}", (point["slots"], rank, point["rows"])).value_s
            for rank in (mean, most)
        )
        if high <= low:
            return 1.0
        return min(1.0, max(0.0, (point["median_s"] - low) / (high - low)))

    def row_s(self, name: str, rank: float) -> float:
        """What a row of filler spares, by rank: measured where half of the rows were filler."""
        if name not in self._spared:
            self._spared[name] = self._measured_rows(name)
        ranks, seconds = self._spared[name]
        return interpolated(rank, ranks, seconds) if ranks else 0.0

    def _measured_rows(self, name: str) -> tuple[list[float], list[float]]:
        """Nothing where it was not measured; of another linear it is the same share of its own
        time."""
        side, _, size = name.partition(".")
        found = WorkRatio.of(f"part_{side}", self._ops).nearest(f"part_{name}")
        if found is None:
            return [], []
        measured = found.name.partition(".")[2]
        spared: dict[float, list[float]] = {}
        for point in self._ops[found.name]["points"]:
            sizes = (point["slots"], point["rank"], point["rows"])
            whole_s, own_s = (
                self._time_of(f"site_{side}.{of}", sizes).value_s for of in (measured, size)
            )
            share = max(0.0, 1.0 - point["median_s"] / whole_s)
            spared.setdefault(point["rank"], []).append(share * own_s / (point["rows"] / 2))
        ranks = sorted(spared)
        return ranks, [float(np.mean(spared[rank])) for rank in ranks]
