"""The captured step's operations, and the cost model that adds them up.

The captured step (``muxtune.runtime.static_step``) runs other operations than an eager pass: four
fused linears a block with the low-rank factors of all slots inside the product, one attention over
all packed rows, the loss on every row, one optimizer call over every slot. So a profile of it has
operations of its own:

- ``frozen_forward.DxO``, ``frozen_backward.DxO`` (rows): a fused linear without adapters;
- ``site_forward.DxO``, ``site_backward.DxO``, ``site_factor.DxO`` (slots, rank, rows): with
  ``slots`` adapters, ``rank`` the width to which the kernels pad the largest one; ``site_backward``
  gives the input gradient and B's, ``site_factor`` A's, on a second stream;
- ``mixed_forward.DxO`` and the others: the same with ``MIN_RANK`` in every other slot;
- ``part_forward.DxO`` and the others: the same where half of the rows are filler;
- ``attention_forward.HxKxE``, ``attention_backward.HxKxE``: points with rows and pairs, and how
  many sequences of how many tiles there are (not in older profiles);
- ``add_norm_forward.D``, ``add_norm_backward.D``, ``swiglu_forward.F``, ``swiglu_backward.F``,
  ``embedding.D``, ``full_loss.DxV`` (rows);
- ``adamw_idle``, ``adamw_active`` (elements): no slot, and every slot closes its step;
- ``extra_METHOD_forward.D``, ``extra_METHOD_backward.D`` (size, rows): what one block takes longer
  for slots of another method, whose size is as ``extra_size`` says; ``half_METHOD_forward.D`` and
  ``half_METHOD_backward.D``: where half of the rows are filler.

Rows are those of the shape: filler is computed too, but for the adapters. A load says how many
rows have a label; these are taken as the rows in use, so that adapters are charged by them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from muxtune.cost import attention, ops
from muxtune.cost.attention import SEQUENCES, PackedAttention, sequence_counts
from muxtune.cost.calibration import (
    EXTRAPOLATED_WIDENING,
    Composition,
    WholeStep,
    spread_of,
)
from muxtune.cost.composition import PassParts, Rates, Tally, nominal_load
from muxtune.cost.curves import (
    AffineFit,
    Grid,
    Table,
    Time,
    fit_affine,
    interpolated,
    smoothed,
)
from muxtune.cost.low_rank import (
    BACKWARD,
    FILL,
    FORWARD,
    Backward,
    Counts,
    Forward,
    Point,
    Products,
    Sizes,
    Use,
)
from muxtune.cost.memory import (
    STATIC_LOSS_ROWS,
    MemoryModel,
    MemoryOptions,
    stage_layers,
    widened,
)
from muxtune.cost.ops import Op
from muxtune.cost.profiled import (
    NOTHING_MEASURED,
    ProfiledCostModel,
    Timing,
    WorkRatio,
    leaf_of,
    of_another,
)
from muxtune.cost.residuals import (
    MIN_RELATIVE_ERROR,
    Adding,
    PassSums,
    StepSums,
    fit_adding,
)
from muxtune.cost.schema import Profile, parse_profile
from muxtune.cost.shapes import ModelShape
from muxtune.cost.tiles import Tiling
from muxtune.types import (
    AdapterSlot,
    Estimate,
    Estimates,
    PassLayout,
    PassLoad,
    Plan,
    ReplicaShape,
    ShapeKey,
)

UNKNOWN_CAPTURE = Estimate(1.0, 0.0, 5.0, True)  # seconds

MEMBERS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
_PRODUCTS = (FORWARD, BACKWARD)
_TP_DEGREES = (1, 2, 4, 8)
EXTRA_METHODS = ("ia3", "bottleneck", "prefix")
LEAST = "least of "  # before a method: what it takes for the fewest rows
MIN_RANK = 16
# Causes: what products take more with adapters, A's gradients beside them, and such products alone;
# a loss that power limits where it is measured by itself.
SITE, FACTOR, ADAPTED = "site", "factor", "adapted"
MANY_ROWS_LOSS = "loss of many rows"
_MANY_LOG_ROWS = 9.0, 10.0  # from none of a loss's time to all of it
_CATEGORY_OF: Mapping[str, str] = {
    **dict.fromkeys((SITE, FACTOR, *EXTRA_METHODS), ops.ADAPTERS), ADAPTED: ops.BACKBONE,
    **{LEAST + method: ops.ADAPTERS for method in EXTRA_METHODS}, MANY_ROWS_LOSS: ops.LOSS,
}  # fmt: skip
_NORMAL_90 = 1.645
_POWER_LIMITED_LOG_ROWS = 8.0, 9.5  # from none of a product's time to all of it
# Of calls of other mixes, 90% of them (a suite's: what lengths there are, pairs do not tell).
_ATTENTION_ERROR = 0.18
_ATTENTION_COUNTED_ERROR = 0.11  # where they do
_FEW_ROWS_POWER = 0.8  # of a call's time, by rows fewer than were measured
_SOLO = ReplicaShape()
# Shares of a call with adapters: the frozen product itself is always more than the rest.
_MOST_SPARED = {"forward": 0.4, "backward": 0.4, "factor": 0.9}
# 90% of errors between measured sizes, and of a quiet device's clock: those of the suites of five
# profiles, of two devices.
_BETWEEN: Mapping[str, float] = {
    "site_forward": 0.09, "site_backward": 0.07, "site_factor": 0.1, "frozen_forward": 0.1,
    "frozen_backward": 0.1, "full_loss": 0.12,
}  # fmt: skip
_BETWEEN_OTHERS = 0.06
# A library's products, whose kernels it chooses by size: more rows may be faster, which a monotone
# table would hide. What it chooses for one linear tells nothing of another.
_FROZEN = ("frozen_forward", "frozen_backward")
# A library's products of many rows vary more from one measurement to the next, with the device's
# clock, than from one number of rows to its neighbours.
_MANY_ROWS, _ROWS_LOG_WIDTH = 512.0, 0.15
# Of intervals of steps: what is drawn at random lies further from the profile's steps than these
# from each other. Over 200 drawn steps of an earlier profile, 90% of errors were within so much.
_DRAWN_WIDENING = 1.35
_EXTRA, _HALF = "extra_", "half_"  # other methods; where half of the rows are not theirs
_MOST_SPARED_BY_FILLER = 0.9  # of what another method adds


class Side(NamedTuple):
    """One of the products that adapters take part in."""

    name: str
    cause: str
    backward: bool


_SIDES = (Side("forward", SITE, False), Side("backward", SITE, True), Side("factor", FACTOR, True))


class FusedSite(NamedTuple):
    """Linears that read one input, as one; of one rank where the model is cut ``tp`` ways."""

    members: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]

    @property
    def size(self) -> str:
        return f"{self.in_features}x{sum(self.out_features)}"


def fused_sites(model: ModelShape, tp: int = 1) -> tuple[FusedSite, ...]:
    """Queries, keys and values; output; gate and up; down."""
    shards = {item.name.rsplit(".", 1)[-1]: item.sharded(tp) for item in model.block_linears}
    return tuple(
        FusedSite(
            members,
            shards[members[0]].in_features,
            tuple(shards[name].out_features for name in members),
        )
        for members in MEMBERS
    )


def padded_rank(ranks: Sequence[int]) -> int:
    return max(MIN_RANK, 1 << (max(ranks) - 1).bit_length())


def extra_size(model: ModelShape, slots: Sequence[AdapterSlot], method: str) -> float:
    """What a method's time grows with besides rows: adapted widths of IA3, the largest rank times
    the adapted widths of bottlenecks, virtual tokens of prefixes."""
    own = [slot for slot in slots if slot.method == method]
    if not own:
        return 0.0
    if method == "prefix":
        return float(max(slot.rank for slot in own))
    linears = {x.name: x.out_features for slot in own for x in ops.target_linears(model, slot)}
    width = float(sum(linears.values()))
    return width if method == "ia3" else width * padded_rank([slot.rank for slot in own])


def slot_elements(model: ModelShape, slot: AdapterSlot) -> int:
    """Trained numbers that the step's pools hold for a slot, over all layers: a fused linear has
    room for all of its members as soon as one is adapted."""
    return ops.adapter_parameters(model, widened(slot))


class StageSums(NamedTuple):
    """A pass on one stage by cause (``SITE``, ``FACTOR``, methods of ``EXTRA_METHODS``, else
    categories of ``ops``), as its operations alone say. ``pairs_s``, ``used_s``: of a query-key
    pair and a row in use, forward and backward; ``idle_s``: see ``_idle_s``."""

    blocks: Tally
    edges: Tally
    pairs_s: tuple[float, float]
    used_s: tuple[float, float]
    optimizer_s: tuple[float, ...]
    pair_error: float
    num_blocks: int
    idle_s: float


class SlotKind(NamedTuple):
    """What slots that are alike share. ``rank``: as padded; ``adapts``: of each fused linear,
    whether they have factors there; ``elements``: see ``slot_elements``."""

    rank: int
    adapts: tuple[bool, ...]
    elements: float


class Paid(NamedTuple):
    """A side of a fused linear with adapters. ``op``: its operation; ``rank``: that is paid;
    ``row_s``: what a row of filler spares."""

    side: Side
    op: str
    rank: float
    row_s: float


class SiteUse(NamedTuple):
    """How a shape's slots use a fused linear, of ``size``. ``count``: of slots with factors there;
    ``known``: whether captured steps know the methods of all."""

    size: str
    count: int
    known: bool
    paid: tuple[Paid, ...]


class SlotsUse(NamedTuple):
    """What a shape's slots mean for blocks of any number of rows. ``place``: among shapes, see
    ``_place_of_slots``; ``extras``: (method, size, slots) of ``EXTRA_METHODS``."""

    place: tuple[float, float, float]
    sites: tuple[SiteUse, ...]
    extras: tuple[tuple[str, float, int], ...]
    num_slots: int


class ExtraTime(NamedTuple):
    """What a block takes more for slots of another method. ``spared_s``: of it where all rows are
    filler; ``least_s``: of it for the fewest rows, mostly launches."""

    method: str
    backward: bool
    time: Time
    spared_s: float
    least_s: float

    def put(self, block: Tally, filler: float) -> None:
        """``filler``: share of the rows."""
        whole_s = self.time.value_s - filler * self.spared_s
        least_s = min(self.least_s, whole_s)
        block.put(LEAST + self.method, self.backward, least_s)
        block.put(self.method, self.backward, whole_s - least_s)


class RowsTimes(NamedTuple):
    """What blocks of ``rows`` take whatever their slots. ``frozen``: by the linear's size,
    forward and backward; ``lacking``: what the first block does not compute."""

    rows: float
    frozen: Mapping[str, tuple[Time, Time]]
    elementwise: Tally
    lacking: Tally


class CapturedCostModel(ProfiledCostModel):
    """``CostModel`` of captured steps, from a profile of their operations.

    Adapters cost what a site takes beyond its frozen product, and A's gradients, which run beside
    the products of the backward: how operations add up is fitted (``muxtune.cost.residuals``).
    Methods that no captured step knows count as LoRA of their rank, and as extrapolated.
    """

    adding: Adding | None = None  # how operations add up; None: as they are

    def __init__(
        self, model: ModelShape, profile: Any, memory: MemoryOptions | None = None
    ) -> None:
        program = (profile if isinstance(profile, Profile) else parse_profile(profile)).program
        self._tiling = Tiling.of_json(program["tiles"]) if "tiles" in program else None
        self._site_of_size: dict[str, FusedSite] = {}
        self._fitted: dict[str, Products] = {}
        self._grids: dict[str, Grid] = {}
        super().__init__(model, profile, memory)

    def _timing(self, name: str) -> Timing:
        """With what sizes between those that were measured are off by in its interval."""
        share = _BETWEEN.get(name.partition(".")[0], _BETWEEN_OTHERS)
        return partial(_with_between, self._measured_timing(name), share)

    def _measured_timing(self, name: str) -> Timing:
        """Products with adapters are counted (``muxtune.cost.low_rank``)."""
        kind, _, size = name.partition(".")
        if kind.startswith(_EXTRA):
            return partial(self._extra_time, name)
        if kind == "full_loss":
            return partial(self._loss_time, name, super()._timing(name))
        if kind == "site_factor" or (kind in _FROZEN and name in self.profile.ops):
            measured, ratio, outside = self._measured(name)
            known = self._grid(measured), self._table(measured)
            return partial(_as_measured, *known, ratio, outside)
        if self._tiling is None or kind not in _PRODUCTS:
            return super()._timing(name)
        like = self._measured_like(size)
        counted = partial(self._products(kind).at, like, self._sizes(size))
        return counted if like == size else partial(of_another, counted, 1.0)

    def _loss_time(self, name: str, timing: Timing, sizes: tuple[float, ...]) -> Time:
        """The loss takes whole chunks."""
        return timing((self._loss_rows(name, sizes[0]),))

    def _grid(self, name: str) -> Grid:
        if name not in self._grids:
            op = self._op(name)
            leaves = {tuple(p[axis] for axis in op["axes"]): leaf_of(p) for p in op["points"]}
            if op["axes"] == ["rows"]:
                by_rows = {rows: leaf for (rows,), leaf in leaves.items()}
                by_rows = smoothed(by_rows, _MANY_ROWS, _ROWS_LOG_WIDTH)
                leaves = {(rows,): leaf for rows, leaf in by_rows.items()}
            self._grids[name] = Grid.of(name, leaves)
        return self._grids[name]

    def _extra_time(self, name: str, size: tuple[float, ...]) -> Time:
        """What the fewest rows take is launches, whatever the width; the rest grows with it."""
        measured, ratio, outside = self._measured(name)
        key = ("extra", measured)
        if key not in self._memo:
            points = self.profile.ops[measured]["points"]
            leaves = {(point["size"], point["rows"]): leaf_of(point) for point in points}
            self._remember(key, Grid.of(measured, leaves))
        grid: Grid = self._memo[key]  # type: ignore[assignment]
        if not name.startswith(f"{_EXTRA}prefix"):  # sizes count the width
            ratio = size[0] / grid.axes[0][0] if len(grid.axes[0]) == 1 else 1.0
        least, (value, width, beyond) = grid.at((size[0], 0.0)).value_s, grid.at(size)
        value = least + ratio * (value - least)
        return Time(max(value, 0.0), ratio * width, outside or beyond)

    def _extra_row_s(self, name: str, size: float) -> float:
        """What a row spares that is of none of the method's slots."""
        key = ("extra row", name, size)
        if key not in self._memo:
            self._remember(key, self._measured_extra_row(name, size))
        return self._memo[key]  # type: ignore[return-value]

    def _measured_extra_row(self, name: str, size: float) -> float:
        measured = self._measured(name)[0]
        all_rows = [point["rows"] for point in self.profile.ops[measured]["points"]]
        half = self.profile.ops.get(measured.replace(_EXTRA, _HALF, 1))
        if half is None:  # as much as a row more takes
            low_s, high_s = (
                self._extra_time(name, (size, rows)).value_s
                for rows in (min(all_rows), max(all_rows))
            )
            return max(0.0, high_s - low_s) / max(1.0, max(all_rows) - min(all_rows))
        known, shares = [], []
        for point in sorted(half["points"], key=lambda point: point["size"]):
            whole_s = self._extra_time(measured, (point["size"], point["rows"])).value_s
            known.append(point["size"])
            shares.append(max(0.0, 1.0 - point["median_s"] / whole_s))
        rows, share = half["points"][0]["rows"], float(np.interp(size, known, shares))
        return share * self._extra_time(name, (size, rows)).value_s / (rows / 2)

    def _loss_rows(self, name: str, rows: float) -> float:
        """At least what was measured of its last chunk, which is computed whole."""
        begun = (rows - 1) // STATIC_LOSS_ROWS * STATIC_LOSS_ROWS
        key = ("measured of chunk", name, begun)
        if key not in self._memo:
            points = self.profile.ops[self._measured(name)[0]]["points"]
            beyond = [x["rows"] for x in points if begun < x["rows"] <= begun + STATIC_LOSS_ROWS]
            self._remember(key, min(beyond, default=begun + STATIC_LOSS_ROWS))
        return max(rows, self._memo[key])  # type: ignore[type-var]

    def _products(self, kind: str) -> Products:
        if kind not in self._fitted:
            assert self._tiling is not None
            points = {
                size: self._points(f"{kind}.{size}", self._sizes(size))
                for of_kind, _, size in (name.partition(".") for name in self.profile.ops)
                if of_kind == kind
            }
            side = Forward if kind == FORWARD else Backward
            counted = side(self._counts(), [point for own in points.values() for point in own])
            self._fitted[kind] = Products(kind, counted, points)
        return self._fitted[kind]

    def _points(self, name: str, sizes: Sizes) -> list[Point]:
        return [
            Point(sizes, int(raw["slots"]), raw["rank"], int(raw["rows"]), leaf_of(raw))
            for raw in self._op(name)["points"]
        ]

    def _counts(self) -> Counts:
        if ("counts",) not in self._memo:
            assert self._tiling is not None
            self._remember(("counts",), Counts(self._tiling))
        return self._memo["counts",]  # type: ignore[return-value]

    def _sizes(self, size: str) -> Sizes:
        site = self._site(size)
        return Sizes(site.in_features, site.out_features)

    def _measured_like(self, size: str) -> str:
        """The measured linears of these sizes, or those with the same part in a block."""
        if f"site_forward.{size}" in self.profile.ops:
            return size
        part = MEMBERS.index(self._site(size).members)
        return fused_sites(self.profile.model_shape)[part].size

    def _site(self, size: str) -> FusedSite:
        if not self._site_of_size:
            models = (self.profile.model_shape, self.model)
            sites = [s for model in models for tp in _TP_DEGREES for s in fused_sites(model, tp)]
            # Of equal sizes, this model's whole one.
            self._site_of_size = {s.size: s for s in (*sites, *fused_sites(self.model))}
        return self._site_of_size[size]

    def _fitted_composition(self, steps: Sequence[WholeStep]) -> Composition:
        models: dict[int, CapturedCostModel] = {}
        sums = []
        for step in steps:
            if step.num_layers not in models:
                found = self._of_depth(step)
                assert isinstance(found, CapturedCostModel)
                models[step.num_layers] = found
            passes = tuple(models[step.num_layers].pass_sums(load) for load in step.loads)
            sums.append(StepSums(passes, step.median_s, spread_of(step.repeats_s)))
        self.adding = fit_adding(sums)
        error = _NORMAL_90 * self.adding.typical_error
        return Composition(
            pass_s=self.adding.pass_s,
            relative_error=max(MIN_RELATIVE_ERROR, error),
            num_steps=len(steps),
        )

    def _of_depth(self, step: WholeStep) -> ProfiledCostModel:
        found = super()._of_depth(step)
        if isinstance(found, CapturedCostModel):
            found._fitted, found._grids = self._fitted, self._grids
        return found

    def _fitted_memory(self, steps: Sequence[WholeStep]) -> MemoryOptions:
        """Steps of a few blocks, which are not fitted to, tell how far off it is there."""
        options, errors = super()._fitted_memory(steps), []
        for step in self.profile.steps:
            if not step.num_layers or step.peak_bytes <= 0:
                continue
            memory = MemoryModel(self.model._replace(num_layers=step.num_layers), options)
            slots = [slot for load in step.loads[:1] for slot in load.shape.slots]
            slots *= max(1, step.num_slots // max(1, len(slots)))
            held = memory.resident_bytes(slots) - options.framework_bytes
            peak = held + max(memory.pass_bytes(load.shape) for load in step.loads)
            errors.append(peak / step.peak_bytes - 1.0)
        off = _NORMAL_90 * float(np.sqrt(np.mean(np.square(errors)))) if errors else 0.0
        return options._replace(relative_error=max(options.relative_error, off))

    def _compose_as(self, other: ProfiledCostModel) -> None:
        self.adding = other.adding if isinstance(other, CapturedCostModel) else None
        super()._compose_as(other)

    def pass_sums(self, load: PassLoad, replica: ReplicaShape = _SOLO) -> PassSums:
        """A pass on a single stage as its operations alone say."""
        if self._knows_layout(load, replica):
            return self._laid_out_sums(load)
        sums = self._sums_of(load.shape, replica)
        seconds = _by_cause(sums.blocks, sums.edges)
        attended_s = load.attention_pairs * sum(sums.pairs_s)
        used_s = load.loss_rows * sum(sums.used_s)
        seconds[ops.ATTENTION] = seconds.get(ops.ATTENTION, 0.0) + attended_s
        if used_s:
            seconds[SITE] = seconds.get(SITE, 0.0) + used_s
        blocks_s = sums.blocks.total_s + attended_s + used_s
        return self._pass_sums(load, replica, seconds, blocks_s, load.loss_rows)

    def _pass_sums(
        self,
        load: PassLoad,
        replica: ReplicaShape,
        seconds: dict[str, float],
        blocks_s: float,
        used_rows: float,
    ) -> PassSums:
        """``seconds``: without the optimizer's of slots that close a step."""
        sums = self._sums_of(load.shape, replica)
        closing_s = sum(sums.optimizer_s[slot] for slot in load.optimizer_slots)
        seconds[ops.OPTIMIZER] = seconds.get(ops.OPTIMIZER, 0.0) + closing_s
        adapters_s = seconds.get(SITE, 0.0) + seconds.get(FACTOR, 0.0)
        rows, of_slots = load.shape.padded_tokens, self._of_use(load.shape.slots, replica.tp)
        place = float(np.log2(max(1, rows))), *of_slots.place
        filler_s = (1.0 - used_rows / rows) * sums.idle_s
        return PassSums(seconds, blocks_s, sums.num_blocks, place, adapters_s, filler_s)

    # ------------------------------------------------------- passes of one certain micro-batch

    def _knows_layout(self, load: PassLoad, replica: ReplicaShape) -> bool:
        """Whether the layout says more than the shape: all rows of one stage on one rank, by a
        profile whose whole steps have layouts too."""
        if load.layout is None or not self._has_layouts or load.shape.recompute:
            return False
        if replica.tp * replica.pp > 1:
            return False
        return not any(slot.method == "prompt" for slot in load.shape.slots)

    @cached_property
    def _has_layouts(self) -> bool:
        loads = [load for step in self.profile.steps for load in step.loads]
        return self._tiling is not None and all(load.layout is not None for load in loads)

    def _laid_out_sums(self, load: PassLoad) -> PassSums:
        """Products by how slots meet in their tiles, attention by its sequences' tiles."""
        assert load.layout is not None
        shape, layout, layers = load.shape, load.layout, self.model.num_layers
        rows, used_rows = float(shape.padded_tokens), sum(layout.slot_rows)
        of_rows, block, blocks = self._of_rows(rows, 1), Tally(), Tally()
        slots = self._of_use(shape.slots, 1)
        for number, use in enumerate(slots.sites):
            self._add_laid_out(block, shape, layout, number, use, of_rows)
        block.merge(of_rows.elementwise, 1)
        for method, size, _ in slots.extras:
            own = zip(layout.slot_rows, shape.slots, strict=True)
            # Every row's attention has a part for virtual tokens.
            of_method = sum(count for count, slot in own if slot.method == method)
            filler = 1.0 - (used_rows if method == "prefix" else of_method) / rows
            for extra in self._extra_times(method, size, rows):
                extra.put(block, filler)
        attended_s = self._laid_out_attention_s(rows, layout)
        if attended_s is not None:
            block.put(ops.ATTENTION, True, attended_s)
        blocks.merge(block, layers)
        blocks.merge(of_rows.lacking, -1)
        if attended_s is None:
            sums = self._sums_of(shape, _SOLO)
            for side in (sums.blocks.forward_s, sums.blocks.backward_s):
                blocks.put(ops.ATTENTION, True, side.get(ops.ATTENTION, 0.0))
            blocks.put(ops.ATTENTION, True, load.attention_pairs * sum(sums.pairs_s))
        edges = Tally()
        edges.merge(self._edges_tally(rows, 1), 1)
        self._optimizers(edges, shape.slots)
        seconds = _by_cause(blocks, edges)
        return self._pass_sums(load, _SOLO, seconds, blocks.total_s, used_rows)

    def _add_laid_out(
        self,
        block: Tally,
        shape: ShapeKey,
        layout: PassLayout,
        number: int,
        use: SiteUse,
        of_rows: RowsTimes,
    ) -> None:
        alone, rows = of_rows.frozen[use.size], of_rows.rows
        if not use.count:
            for backward, time in enumerate(alone):
                block.charge(ops.BACKBONE, bool(backward), time)
            return
        kinds = [self._kind(slot) for slot in shape.slots]
        ranks = tuple([kind.rank if kind.adapts[number] else 0 for kind in kinds])
        like, site = self._measured_like(use.size), self._sizes(use.size)
        for side, op_name, rank, row_s in use.paid:
            if side.cause == SITE:
                products = self._products(op_name.partition(".")[0])
                use_of = Use(layout.slot_rows, ranks)
                whole_s = products.of_layout(like, site, use_of, shape.padded_tokens)
                alone_s = min(whole_s, alone[side.backward].value_s)
                block.put(ADAPTED, side.backward, alone_s)
                block.put(SITE, side.backward, whole_s - alone_s)
                continue
            whole_s = self._time(op_name, (float(use.count), rank, rows)).value_s
            row_s = min(row_s, _MOST_SPARED[side.name] * whole_s / rows)
            unused = (rows - sum(layout.slot_rows)) * use.count / len(ranks)
            block.put(side.cause, side.backward, whole_s - row_s * unused)

    def _laid_out_attention_s(self, rows: float, layout: PassLayout) -> float | None:
        """Of one block, both ways; None where the profile does not tell, or a sequence is longer
        than the packed kernels are meant for."""
        filler, tile = int(rows) - sum(layout.sequence_rows), attention.TILE_ROWS
        lengths = [*layout.sequence_rows, *[tile] * (filler // tile)]
        lengths += [filler % tile] if filler % tile else []
        if max(lengths) > attention.MOST_TILES * tile:
            return None
        counts, seconds = tuple(sequence_counts(lengths).values()), 0.0
        for kind in ("attention_forward", "attention_backward"):
            packed = self._own_attention(kind)
            if packed is None:
                return None
            ratio, counted = packed
            seconds += ratio * counted.seconds(rows, counts)
        return seconds

    def _own_attention(self, kind: str) -> tuple[float, PackedAttention] | None:
        """Counted with this model's heads, and how much wider they are than the measured ones."""
        key = ("own attention", kind)
        if key not in self._memo:
            model = self.model
            size = f"{model.num_heads}x{model.num_kv_heads}x{model.head_dim}"
            name, _, _ = self._measured(f"{kind}.{size}")
            found = None
            if self._tiling is not None and SEQUENCES[0] in self.profile.ops[name]["points"][0]:
                width = int(name.rsplit("x", 1)[1])
                heads = model.num_heads, model.num_kv_heads
                device = attention.Device(*heads, self._tiling.num_multiprocessors)
                found = model.head_dim / width, self._packed_attention(name).on(device)
            self._remember(key, found)
        return self._memo[key]  # type: ignore[return-value]

    def pass_times_s(self, loads: Sequence[PassLoad], replica: ReplicaShape = _SOLO) -> Estimates:
        """Of loads with a layout by that, of others as ``pass_coefficients`` say."""
        found = super().pass_times_s(loads, replica)
        if self.adding is None:
            return found
        for index, load in enumerate(loads):
            if not self._knows_layout(load, replica):
                continue
            sums = self._laid_out_sums(load)
            added = self.adding.at(sums)
            error = added.relative_error * _DRAWN_WIDENING
            error *= EXTRAPOLATED_WIDENING if found.extrapolated[index] else 1.0
            value = self.adding.seconds(sums, added)
            found.value[index] = value
            found.low[index], found.high[index] = value * max(0.0, 1 - error), value * (1 + error)
        return found

    def _place_of_slots(self, kinds: Counter[AdapterSlot]) -> tuple[float, float, float]:
        """Slots, ranks, and how much of the linears is adapted."""
        ranks, adapted = 0.0, 0.0
        for slot, count in kinds.items():
            kind = self._kind(slot)
            sites = sum(kind.adapts)
            ranks += count * sites * float(np.log2(kind.rank))
            adapted += count * sites
        share = adapted / (len(MEMBERS) * max(1, kinds.total()))
        rank = ranks / adapted if adapted else float(np.log2(MIN_RANK))
        return float(np.log2(max(1, kinds.total()))), rank, share

    def _stage_parts(
        self, shape: ShapeKey, replica: ReplicaShape, layers: int, first: bool, last: bool
    ) -> PassParts:
        """Adds up as the profile's whole steps say."""
        if first and last and layers == stage_layers(self.model, replica.pp)[0]:
            sums = self._sums_of(shape, replica)
        else:
            sums = self._stage_sums(shape, replica, layers, first, last)
        adding, tally = self.adding, Tally()
        rows, filler_s = shape.padded_tokens, 0.0
        g = h = error = 0.0
        of: Mapping[str, float] = {}  # factors of causes; others have 1
        if adding is not None:
            g, h, error = adding.at(self.pass_sums(nominal_load(shape), replica))
            of, filler_s = adding.factors, adding.filler * sums.idle_s
            constant_s = adding.pass_s + sums.num_blocks * adding.block_s + filler_s
            tally.put(ops.OVERHEAD, False, constant_s)

        def times(cause: str) -> float:
            return of.get(cause, 1.0) + g + (h if cause in (SITE, FACTOR) else 0.0)

        for part in (sums.blocks, sums.edges):
            in_blocks = part is sums.blocks
            for side, backward in ((part.forward_s, False), (part.backward_s, True)):
                for cause, seconds in side.items():
                    factor = times(cause) if in_blocks else of.get(cause, 1.0)
                    tally.put(_CATEGORY_OF.get(cause, cause), backward, factor * seconds)
            tally.widen(part.half_width_s, part.extrapolated)
        again = self._add_recompute(tally, shape)
        pair = [times(ops.ATTENTION) * value for value in sums.pairs_s]
        used = [times(SITE) * value for value in sums.used_s]
        used[1] -= filler_s / rows  # as the constant has it where all rows are filler
        closing = of.get(ops.OPTIMIZER, 1.0)
        parts = PassParts(
            tally.forward_s,
            tally.backward_s,
            (pair[0], pair[1] + again * pair[0]),
            (used[0], used[1] + again * used[0]),
            tuple([closing * value for value in sums.optimizer_s]),
            tally.half_width_s,
            sums.pair_error,
            0.0,
            tally.extrapolated,
        )
        if adding is None:
            return parts
        error *= _DRAWN_WIDENING * (EXTRAPOLATED_WIDENING if parts.extrapolated else 1.0)
        return parts._replace(half_width_s=error * parts.base_s, pair_error=error, loss_error=error)

    def _sums_of(self, shape: ShapeKey, replica: ReplicaShape) -> StageSums:
        """Of all blocks."""
        key = ("sums", *shape[:2], self._slots_number(shape.slots), shape.recompute, replica)
        if key not in self._memo:
            layers = stage_layers(self.model, replica.pp)[0]
            self._remember(key, self._stage_sums(shape, replica, layers, True, True))
        return self._memo[key]  # type: ignore[return-value]

    def _stage_sums(
        self, shape: ShapeKey, replica: ReplicaShape, layers: int, first: bool, last: bool
    ) -> StageSums:
        rows, blocks, edges = float(shape.padded_tokens), Tally(), Tally()
        per_used_s = [0.0, 0.0]
        blocks.merge(self._block_of(shape, rows, replica.tp, per_used_s), layers)
        if first:
            blocks.merge(self._of_rows(rows, replica.tp).lacking, -1)
        if first or last:
            edges.merge(self._edges_tally(rows, replica.pp), 1)
        pair_rates = self.attention_rates(replica.tp)
        for rate, backward in zip(pair_rates, (False, True), strict=True):
            blocks.put(ops.ATTENTION, backward, layers * (rate.per_call_s + rows * rate.per_row_s))
            blocks.extrapolated |= shape.padded_tokens > rate.max_size
        optimizer_s = self._optimizers(edges, shape.slots)
        return StageSums(
            blocks,
            edges,
            (layers * pair_rates[0].per_unit_s, layers * pair_rates[1].per_unit_s),
            (layers * per_used_s[0], layers * per_used_s[1]),
            optimizer_s,
            max(rate.relative_error for rate in pair_rates),
            layers,
            _idle_s(blocks, rows),
        )

    def _row_of_adapters_s(self, name: str, rank: float) -> float:
        """What a row of filler spares, by rank: measured where half of the rows were filler."""
        key = ("unused rows", name)
        if key not in self._memo:
            self._remember(key, self._measured_rows(name))
        ranks, seconds = self._memo[key]  # type: ignore[misc]
        return interpolated(rank, ranks, seconds) if ranks else 0.0

    def _of_rows(self, rows: float, tp: int) -> RowsTimes:
        key = ("of rows", rows, tp)
        if key not in self._memo:
            hidden, inner = self.model.hidden, self.model.intermediate // tp
            frozen = {
                size: (
                    self._time(f"frozen_forward.{size}", (rows,)),
                    self._time(f"frozen_backward.{size}", (rows,)),
                )
                for size in self._site_sizes(tp)
            }
            norm, norm_backward, swiglu, swiglu_backward = (
                self._time(name, (rows,))
                for name in (
                    f"add_norm_forward.{hidden}", f"add_norm_backward.{hidden}",
                    f"swiglu_forward.{inner}", f"swiglu_backward.{inner}",
                )
            )  # fmt: skip
            elementwise, lacking = Tally(), Tally()
            elementwise.charge(ops.ELEMENTWISE, False, norm, 2)
            elementwise.charge(ops.ELEMENTWISE, True, norm_backward, 2)
            elementwise.charge(ops.ELEMENTWISE, False, swiglu)
            elementwise.charge(ops.ELEMENTWISE, True, swiglu_backward)
            # Nobody asks for the gradient of the embedding's output.
            lacking.charge(ops.BACKBONE, True, frozen[self._site_sizes(tp)[0]][1])
            lacking.charge(ops.ELEMENTWISE, True, norm_backward)
            self._remember(key, RowsTimes(rows, frozen, elementwise, lacking))
        return self._memo[key]  # type: ignore[return-value]

    def _edges_tally(self, rows: float, pp: int) -> Tally:
        key = ("edges of rows", rows, pp)
        if key not in self._memo:
            tally = Tally()
            for op, time in self._edge_of(rows, pp):
                tally.add(op, time)
            self._remember(key, tally)
        return self._memo[key]  # type: ignore[return-value]

    def _of_use(self, slots: tuple[AdapterSlot, ...], tp: int) -> SlotsUse:
        key = ("use", self._slots_number(slots), tp)
        if key not in self._memo:
            kinds, sizes = Counter(slots), self._site_sizes(tp)
            sites = tuple(self._site_use(n, size, kinds) for n, size in enumerate(sizes))
            extras = []
            for method in EXTRA_METHODS:
                own = sum(count for slot, count in kinds.items() if slot.method == method)
                if own and (size := extra_size(self.model, tuple(kinds), method)):
                    extras.append((method, size, own))
            place = self._place_of_slots(kinds)
            self._remember(key, SlotsUse(place, sites, tuple(extras), kinds.total()))
        return self._memo[key]  # type: ignore[return-value]

    def _site_use(self, number: int, size: str, kinds: Counter[AdapterSlot]) -> SiteUse:
        users, ranks = [], []
        for slot, count in kinds.items():
            kind = self._kind(slot)
            if kind.adapts[number]:
                users.append(slot)
                ranks += [kind.rank] * count
        paid = []
        for side in _SIDES if users else ():
            name = f"{side.name}.{size}"
            rank = self._rank_paid(name, ranks)
            paid.append(Paid(side, f"site_{name}", rank, self._row_of_adapters_s(name, rank)))
        known = all(slot.method == "lora" for slot in users)
        return SiteUse(size, len(ranks), known, tuple(paid))

    def _measured_rows(self, name: str) -> tuple[list[float], list[float]]:
        """Nothing where it was not measured."""
        side = name.partition(".")[0]
        found = WorkRatio.of(f"part_{side}", self.profile.ops).nearest(f"part_{name}")
        if found is None:
            return [], []
        whole = f"site_{side}.{found.name.partition('.')[2]}"
        spared: dict[float, list[float]] = {}
        for point in self.profile.ops[found.name]["points"]:
            sizes = (point["slots"], point["rank"], point["rows"])
            more_s = self._of_sizes(whole, sizes) - point["median_s"]
            spared.setdefault(point["rank"], []).append(max(0.0, more_s) / (point["rows"] / 2))
        ranks = sorted(spared)
        return ranks, [found.ratio * float(np.mean(spared[rank])) for rank in ranks]

    def breakdown_s(self, load: PassLoad, replica: ReplicaShape = _SOLO) -> dict[str, float]:
        """See the base class; what rows in use cost is the adapters'."""
        found = super().breakdown_s(load, replica)
        parts = self._busiest_stage(load.shape, replica)
        used_s = load.loss_rows * sum(parts.per_loss_row_s)
        if used_s:
            found[ops.LOSS] -= used_s
            found[ops.ADAPTERS] = found.get(ops.ADAPTERS, 0.0) + used_s
        return found

    def _block_of(self, shape: ShapeKey, rows: float, tp: int, per_used_s: list[float]) -> Tally:
        """Where all rows are filler; what a row in use takes more is added to ``per_used_s``
        (forward, backward)."""
        of_rows, used, block = self._of_rows(rows, tp), self._of_use(shape.slots, tp), Tally()
        for site in used.sites:
            self._add_site(block, site, used.num_slots, of_rows, per_used_s)
        block.merge(of_rows.elementwise, 1)
        hidden = self.model.hidden
        for method, size, own in used.extras:
            # Rows are taken as even shares of the slots; attention is every row's.
            share = 1.0 if method == "prefix" else own / used.num_slots
            for extra in self._extra_times(method, size, rows):
                per_used_s[extra.backward] += share * extra.spared_s / rows
                extra.put(block, 1.0)
                block.widen(extra.time.half_width_s, extra.time.extrapolated)
        if tp > 1:
            moved = rows * hidden * self.dtype_bytes
            for backward in (False, True):
                name = f"all_reduce.tp{tp}"
                block.add(*self._timed(name, ops.COMMUNICATION, backward, (moved,), 2))
        return block

    def _extra_times(self, method: str, size: float, rows: float) -> Iterator[ExtraTime]:
        for backward, side in enumerate(("forward", "backward")):
            name = f"extra_{method}_{side}.{self.model.hidden}"
            time, least = self._time(name, (size, rows)), self._time(name, (size, 0.0))
            most_s = _MOST_SPARED_BY_FILLER * time.value_s
            spared_s = min(rows * self._extra_row_s(name, size), most_s)
            yield ExtraTime(method, bool(backward), time, spared_s, least.value_s)

    def _site_sizes(self, tp: int) -> tuple[str, ...]:
        key = ("fused sites", tp)
        if key not in self._memo:
            self._remember(key, tuple(site.size for site in fused_sites(self.model, tp)))
        return self._memo[key]  # type: ignore[return-value]

    def _add_site(
        self,
        block: Tally,
        use: SiteUse,
        num_slots: int,
        of_rows: RowsTimes,
        per_used_s: list[float],
    ) -> None:
        alone, rows = of_rows.frozen[use.size], of_rows.rows
        if not use.count:
            for backward, time in enumerate(alone):
                block.charge(ops.BACKBONE, bool(backward), time)
        for side, op_name, rank, row_s in use.paid:
            # Products are as they are where ``FILL`` of the rows are in use.
            sizes, used_rows = (float(use.count), rank, rows), rows
            if side.cause == SITE:
                sizes, used_rows = (*sizes, 0.0), FILL * rows
            whole_s, width_s, outside = self._time(op_name, sizes)
            row_s = min(row_s, _MOST_SPARED[side.name] * whole_s / rows)
            per_used_s[side.backward] += row_s * use.count / num_slots
            more_s = whole_s
            if side.cause == SITE:
                alone_s = min(whole_s, alone[side.backward].value_s)
                block.put(ADAPTED, side.backward, alone_s)
                more_s -= alone_s
            block.put(side.cause, side.backward, more_s - row_s * used_rows)
            block.widen(width_s, outside or not use.known)

    def _rank_paid(self, name: str, ranks: Sequence[int]) -> float:
        """Between the mean of the padded ranks, which a product pays for by each slot's rows, and
        the largest, to which other kernels pad all: as far as the profile's mixed ranks say."""
        most, mean = float(max(ranks)), sum(ranks) / len(ranks)
        if most == mean:
            return most
        return mean + self._share_of_largest(name) * (most - mean)

    def _share_of_largest(self, name: str) -> float:
        key = ("mixed", name)
        if key not in self._memo:
            self._remember(key, self._measured_share(name))
        return self._memo[key]  # type: ignore[return-value]

    def _measured_share(self, name: str) -> float:
        side, _, size = name.partition(".")
        if f"mixed_{name}" not in self.profile.ops:
            nearest = WorkRatio.of(f"mixed_{side}", self.profile.ops).nearest(f"mixed_{name}")
            if nearest is None:
                return 1.0
            size = nearest.name.partition(".")[2]
        point = self.profile.ops[f"mixed_{side}.{size}"]["points"][0]
        mean, most = (MIN_RANK + point["rank"]) / 2, float(point["rank"])
        low, high = (
            self._of_sizes(f"site_{side}.{size}", (point["slots"], rank, point["rows"]))
            for rank in (mean, most)
        )
        if high <= low:
            return 1.0
        return min(1.0, max(0.0, (point["median_s"] - low) / (high - low)))

    def _kind(self, slot: AdapterSlot) -> SlotKind:
        key = ("kind", slot)
        if key not in self._memo:
            adapted: set[str] = set()
            if slot.method not in EXTRA_METHODS:
                linears = ops.target_linears(self.model, slot)
                adapted.update(item.name.rsplit(".", 1)[-1] for item in linears)
            adapts = tuple(not adapted.isdisjoint(members) for members in MEMBERS)
            elements = float(slot_elements(self.model, slot))
            self._remember(key, SlotKind(padded_rank([slot.rank]), adapts, elements))
        return self._memo[key]  # type: ignore[return-value]

    def _edge_of(self, rows: float, pp: int) -> Iterator[tuple[Op, Time]]:
        hidden = self.model.hidden
        yield self._timed(f"embedding.{hidden}", ops.BACKBONE, False, (rows,))
        yield self._timed(f"add_norm_forward.{hidden}", ops.ELEMENTWISE, False, (rows,))
        yield self._timed(f"add_norm_backward.{hidden}", ops.ELEMENTWISE, True, (rows,))
        loss, time = self._timed(f"full_loss.{hidden}x{self.model.vocab}", ops.LOSS, False, (rows,))
        many = _share_between(rows, _MANY_LOG_ROWS)
        for cause, share in ((ops.LOSS, 1.0 - many), (MANY_ROWS_LOSS, many)):
            part = Time(share * time.value_s, share * time.half_width_s, time.extrapolated)
            yield loss._replace(category=cause), part
        if pp > 1:
            moved = rows * hidden * self.dtype_bytes
            for backward in (False, True):
                yield self._timed("p2p", ops.COMMUNICATION, backward, (moved,))

    def _timed(
        self, name: str, category: str, backward: bool, size: tuple[float, ...], count: int = 1
    ) -> tuple[Op, Time]:
        op = Op(name, category, backward, count, size, 0.0, 0.0, 0.0, 1)
        return op, self.op_time(op)

    def _of_sizes(self, name: str, size: tuple[float, ...]) -> float:
        return self._timed(name, ops.ADAPTERS, False, size)[1].value_s

    def _optimizers(self, tally: Tally, slots: tuple[AdapterSlot, ...]) -> tuple[float, ...]:
        """The call is part of every pass; a slot that closes its step adds its share of the
        difference."""
        key = ("optimizers", self._slots_number(slots))
        if key not in self._memo:
            self._remember(key, self._optimizer_times(slots))
        called, closing_s = self._memo[key]  # type: ignore[misc]
        if called:
            tally.add(*called)
        return closing_s

    def _optimizer_times(
        self, slots: tuple[AdapterSlot, ...]
    ) -> tuple[tuple[Op, Time] | None, tuple[float, ...]]:
        of_kind = {slot: self._kind(slot).elements for slot in Counter(slots)}
        elements = [of_kind[slot] for slot in slots]
        total = sum(elements)
        if not total:
            return None, (0.0,) * len(slots)
        called = self._timed("adamw_idle", ops.OPTIMIZER, True, (total,))
        _, active = self._timed("adamw_active", ops.OPTIMIZER, True, (total,))
        more = max(0.0, active.value_s - called[1].value_s)
        return called, tuple(more * count / total for count in elements)

    def _attention(self, name: str) -> Rates:
        name, ratio, extrapolated = self._measured(name)
        points = self.profile.ops[name]["points"]
        features = np.array([(1.0, point["rows"], point["pairs"]) for point in points])
        largest = max(float(point["rows"]) for point in points)
        fit = fit_affine(features, [leaf_of(point) for point in points], largest)
        per_pass, per_row, per_pair = (ratio * number for number in fit.coefficients)
        most = NOTHING_MEASURED if extrapolated else fit.max_size
        return Rates(per_pass, per_row, per_pair, fit.relative_error, most)

    def attention_time(self, name: str, rows: float, pairs: float, *sequences: float) -> Time:
        """Of one call by itself. ``sequences``: how many there are of 1, 2, ... tiles of the packed
        kernels (``muxtune.cost.attention``), by which it is counted; without them, and where the
        profile does not tell them, a row's time follows how far rows look back on average, between
        the mixes that were measured. Passes need a form that is affine in pairs."""
        name, ratio, outside = self._measured(name)
        points = self.profile.ops[name]["points"]
        known_rows = [point["rows"] for point in points]
        outside |= not min(known_rows) <= rows <= max(known_rows)
        if sequences and self._tiling is not None and SEQUENCES[0] in points[0]:
            value = self._packed_attention(name).seconds(rows, sequences)
            return Time(ratio * value, ratio * value * _ATTENTION_COUNTED_ERROR, outside)
        value = self._attention_of_pairs(points, rows, pairs)
        return Time(ratio * value, ratio * value * _ATTENTION_ERROR, outside)

    def _packed_attention(self, name: str) -> PackedAttention:
        key = ("packed attention", name)
        if key not in self._memo:
            kind, _, size = name.partition(".")
            heads, kv_heads, _ = map(int, size.split("x"))
            assert self._tiling is not None
            found = PackedAttention(
                attention.Device(heads, kv_heads, self._tiling.num_multiprocessors),
                kind == "attention_backward",
                [attention.Point.of(raw) for raw in self.profile.ops[name]["points"]],
            )
            self._remember(key, found)
        return self._memo[key]  # type: ignore[return-value]

    @staticmethod
    def _attention_of_pairs(
        points: Sequence[Mapping[str, float]], rows: float, pairs: float
    ) -> float:
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

    def loss_rates(self) -> tuple[Rates, Rates]:
        """Every row has its logits computed, so that rows with a label add nothing here."""
        free = Rates(0.0, 0.0, 0.0, 0.0, float("inf"))
        return free, free

    def capture_s(self, shape: ShapeKey, replica: ReplicaShape) -> Estimate:
        """By the blocks that were captured, whose launches take longest, and by rows, for a trial
        pass comes first; older profiles know nothing of rows. Nothing on a CPU, where the program
        runs as it is; a guess where no capture was measured."""
        if "capture" not in self.profile.ops:
            is_cpu = self.profile.device.get("kind") == "cpu"
            return Estimate(0.0, 0.0, 0.0, False) if is_cpu else UNKNOWN_CAPTURE
        if self.profile.ops["capture"]["axes"] == ["rows"]:
            (once_s, per_row_s), error, _ = self._capture_fit
            share = self.model.num_layers / self.profile.model_shape.num_layers
            value = share * (once_s + per_row_s * shape.padded_tokens)
            return Estimate(value, value * max(0.0, 1 - error), value * (1 + error), False)
        value, width, outside = self._table("capture").at((float(self.model.num_layers),))
        return Estimate(value, max(value - width, 0.0), value + width, outside)

    @cached_property
    def _capture_fit(self) -> AffineFit:
        return self._fit("capture", "rows", lambda rows: (1.0, rows))

    def captures_anew(self, previous: Plan, new: Plan) -> bool:
        """Graphs of an instance share a memory as large as the largest pass, which must come
        first: one that is larger has all captured anew."""
        before = [htask.shapes for htask in previous.htasks]
        most = max((_most_rows(shapes) for shapes in before), default=0)
        added = (h.shapes for h in new.htasks if _most_rows(h.shapes) > most > 0)
        return any(shapes not in before for shapes in added)


def _with_between(timing: Timing, share: float, sizes: tuple[float, ...]) -> Time:
    value, width, outside = timing(sizes)
    return Time(value, math.hypot(width, share * value), outside)


def _as_measured(
    grid: Grid, table: Table, ratio: float, other: bool, sizes: tuple[float, ...]
) -> Time:
    """Between measured sizes, whichever is faster; beyond the largest it grows as a monotone table
    does. ``other``: whether they are of another operation."""
    inside = tuple([min(x, xs[-1]) for x, xs in zip(sizes, grid.axes, strict=True)])
    value, width, below = grid.at(inside)
    if inside == sizes:
        return Time(ratio * value, ratio * width, other or below)
    ratio *= table.at(sizes).value_s / table.at(inside).value_s
    return Time(ratio * value, ratio * width, True)


def _by_cause(*tallies: Tally) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for tally in tallies:
        for side in (tally.forward_s, tally.backward_s):
            for cause, value in side.items():
                seconds[cause] = seconds.get(cause, 0.0) + value
    return seconds


def _idle_s(blocks: Tally, rows: float) -> float:
    """What products take that power limits, where filler draws less of it: not those of few rows,
    which wait for the memory."""
    products_s = sum(
        side.get(cause, 0.0)
        for side in (blocks.forward_s, blocks.backward_s)
        for cause in (ops.BACKBONE, ADAPTED)
    )
    return _share_between(rows, _POWER_LIMITED_LOG_ROWS) * products_s


def _share_between(rows: float, log_rows: tuple[float, float]) -> float:
    """How far the rows are from the first of these binary logarithms to the second."""
    low, high = log_rows
    return min(1.0, max(0.0, (math.log2(max(1.0, rows)) - low) / (high - low)))


def _most_rows(shapes: Sequence[ShapeKey]) -> int:
    return max(shape.padded_tokens for shape in shapes)
