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
rows have a label; these are taken as the rows in use, so that adapters are charged by them. A load
of one certain micro-batch has a layout, which says it of every slot and sequence.

``fused_sites`` and ``slot_uses`` tell what slots are to the linears, ``site_products``,
``attention_times`` and ``extra_methods`` what operations take, ``blocks`` what a block of them
takes, and ``residuals`` how blocks and the rest add up.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from muxtune.cost import ops
from muxtune.cost.attention_times import AttentionTimes
from muxtune.cost.blocks import Blocks
from muxtune.cost.calibration import (
    EXTRAPOLATED_WIDENING,
    Composition,
    WholeStep,
    spread_of,
)
from muxtune.cost.causes import ADAPTED, FACTOR, MANY_ROWS_LOSS, SITE, by_cause, category_of
from muxtune.cost.composition import PassParts, Rates, Tally, nominal_load
from muxtune.cost.curves import Grid, Table, Time, smoothed
from muxtune.cost.extra_methods import EXTRA, ExtraMethods
from muxtune.cost.factor_gradients import FACTOR_GRADIENT
from muxtune.cost.low_rank import BACKWARD, FORWARD
from muxtune.cost.memory import STATIC_LOSS_ROWS, MemoryModel, MemoryOptions, stage_layers
from muxtune.cost.ops import Op
from muxtune.cost.profiled import ProfiledCostModel, Timing, leaf_of, of_another
from muxtune.cost.residuals import (
    MIN_RELATIVE_ERROR,
    Adding,
    PassSums,
    StepSums,
    fit_adding,
    least_error,
)
from muxtune.cost.schema import Profile, parse_profile
from muxtune.cost.shapes import ModelShape
from muxtune.cost.site_products import SiteProducts
from muxtune.cost.slot_uses import SlotsUse, SlotUses
from muxtune.cost.takeovers import CaptureTimes
from muxtune.cost.tiles import Tiling, library_waste
from muxtune.types import (
    AdapterSlot,
    Estimate,
    Estimates,
    PassLoad,
    Plan,
    ReplicaShape,
    ShapeKey,
)

UNKNOWN_CAPTURE = Estimate(1.0, 0.0, 5.0, True)  # seconds

_PRODUCTS = (FORWARD, BACKWARD)
_MANY_LOG_ROWS = 9.0, 10.0  # from none of a loss's time to all of it
_NORMAL_90 = 1.645
_POWER_LIMITED_LOG_ROWS = 8.0, 9.5  # from none of a product's time to all of it
_POWER_LIMITED = ops.BACKBONE, ADAPTED, ops.LOSS, MANY_ROWS_LOSS
# Of the rows in filler, beyond which a clock rises no further: it has reached its highest. As seven
# suites of two devices show: 16% are spared there, and where more rows are filler.
_MOST_SPARING = 2 / 3
_SOLO = ReplicaShape()
# 90% of errors between measured sizes, and of a quiet device's clock: those of the suites of eight
# profiles, of two devices.
_BETWEEN: Mapping[str, float] = {
    "site_forward": 0.07, "site_backward": 0.06, "site_factor": 0.07, "frozen_forward": 0.09,
    "frozen_backward": 0.09, "full_loss": 0.1,
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
# Of passes with a layout, those of base models that were not measured too, for they are counted.
# Over nine suites of H100s and H200s 90% of errors were within 1.0 to 1.6, 1.4 for the newest of
# both (`experiments/gpu_validation/rescore.py --by`).
_COUNTED_WIDENING = 1.35


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


class CapturedCostModel(ProfiledCostModel):
    """``CostModel`` of captured steps, from a profile of their operations.

    Adapters cost what a site takes beyond its frozen product, and A's gradients, which run beside
    the products of the backward: how operations add up is fitted (``muxtune.cost.residuals``).
    Methods that no captured step knows count as LoRA of their rank, and as extrapolated.
    """

    adding: Adding | None = None  # how operations add up; None: as they are
    laid_out_adding: Adding | None = None  # of loads with a layout; None: as of others

    def __init__(
        self, model: ModelShape, profile: Any, memory: MemoryOptions | None = None
    ) -> None:
        program = (profile if isinstance(profile, Profile) else parse_profile(profile)).program
        self._tiling = Tiling.of_json(program["tiles"]) if "tiles" in program else None
        self._grids: dict[str, Grid] = {}
        super().__init__(model, profile, memory)
        if not self.composition.num_steps:
            self.composition = Composition(relative_error=least_error(None))

    @cached_property
    def _products(self) -> SiteProducts | None:
        """None where the profile does not tell the device's tiles."""
        return SiteProducts(self.model, self.profile, self._tiling) if self._tiling else None

    @cached_property
    def _counted_kinds(self) -> tuple[str, ...]:
        """The deterministic form of A's gradients only: the other cuts a slot's rows up."""
        if self._products is None:
            return ()
        exact = self.profile.program.get("deterministic", False)
        return (*_PRODUCTS, FACTOR_GRADIENT) if exact else _PRODUCTS

    @cached_property
    def _attention_times(self) -> AttentionTimes:
        return AttentionTimes(self.profile.ops, self._tiling, self._measured)

    @cached_property
    def _extras(self) -> ExtraMethods:
        return ExtraMethods(self.profile.ops, self.model.hidden, self._time, self._measured)

    @cached_property
    def _slots(self) -> SlotUses:
        return SlotUses(self.model, self.profile.ops, self._time)

    @cached_property
    def _blocks(self) -> Blocks:
        parts = self._slots, self._extras, self._attention_times, self._products
        return Blocks(self.model, self._time, *parts)

    def _timing(self, name: str) -> Timing:
        """With what sizes between those that were measured are off by in its interval."""
        share = _BETWEEN.get(name.partition(".")[0], _BETWEEN_OTHERS)
        return partial(_with_between, self._measured_timing(name), share)

    def _measured_timing(self, name: str) -> Timing:
        """Products with adapters are counted (``muxtune.cost.low_rank``)."""
        kind, _, size = name.partition(".")
        if kind.startswith(EXTRA):
            return partial(self._extras.measured_time, name)
        if kind == "full_loss":
            return partial(self._loss_time, name, super()._timing(name))
        if kind in self._counted_kinds:
            assert self._products is not None
            product = self._products.of(kind, size)
            return product.at if product.like == size else partial(of_another, product.at, 1.0)
        if kind == FACTOR_GRADIENT or (kind in _FROZEN and name in self.profile.ops):
            measured, ratio, outside = self._measured(name)
            known = self._grid(measured), self._table(measured)
            return partial(_as_measured, *known, ratio, outside)
        if kind in _FROZEN and self._tiling is not None:
            return partial(self._other_frozen_time, name, super()._timing(name), self._tiling)
        return super()._timing(name)

    def _other_frozen_time(
        self, name: str, timing: Timing, tiling: Tiling, sizes: tuple[float, ...]
    ) -> Time:
        """Of a linear that was not measured: its tiles leave another share of the last wave idle
        than those of the linear that it is taken from."""
        rows, own, like = max(1, int(sizes[0])), _columns(name), _columns(self._measured(name)[0])
        own_waste, like_waste = (
            library_waste(rows, columns, tiling.num_multiprocessors) for columns in (own, like)
        )
        return _scaled(timing(sizes), own_waste / like_waste)

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

    def _loss_rows(self, name: str, rows: float) -> float:
        """At least what was measured of its last chunk, which is computed whole."""
        begun = (rows - 1) // STATIC_LOSS_ROWS * STATIC_LOSS_ROWS
        key = ("measured of chunk", name, begun)
        if key not in self._memo:
            points = self.profile.ops[self._measured(name)[0]]["points"]
            beyond = [x["rows"] for x in points if begun < x["rows"] <= begun + STATIC_LOSS_ROWS]
            self._remember(key, min(beyond, default=begun + STATIC_LOSS_ROWS))
        return max(rows, self._memo[key])  # type: ignore[type-var]

    def _fitted_composition(self, steps: Sequence[WholeStep]) -> Composition:
        """Of steps that all have layouts also how passes with one add up: what is counted for them
        is off by other shares than what is typical of their shapes."""
        models: dict[int, CapturedCostModel] = {}
        for step in steps:
            if step.num_layers not in models:
                found = self._of_depth(step)
                assert isinstance(found, CapturedCostModel)
                models[step.num_layers] = found

        def fitted(laid_out: bool) -> Adding:
            sums = []
            for step in steps:
                model = models[step.num_layers]
                sums_of = model._any_sums if laid_out else model.pass_sums
                passes = tuple(sums_of(load) for load in step.loads)
                sums.append(StepSums(passes, step.median_s, spread_of(step.repeats_s)))
            return fit_adding(sums)

        self.adding = fitted(False)
        loads = [load for step in steps for load in step.loads]
        if self._tiling is not None and all(load.layout is not None for load in loads):
            self.laid_out_adding = fitted(True)
        error = _NORMAL_90 * self.adding.typical_error
        return Composition(
            pass_s=self.adding.pass_s,
            relative_error=max(MIN_RELATIVE_ERROR, error, least_error(self.adding)),
            num_steps=len(steps),
        )

    def _of_depth(self, step: WholeStep) -> ProfiledCostModel:
        found = super()._of_depth(step)
        if isinstance(found, CapturedCostModel):
            found._products, found._grids = self._products, self._grids
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
        if isinstance(other, CapturedCostModel):
            self.adding, self.laid_out_adding = other.adding, other.laid_out_adding
        super()._compose_as(other)

    def pass_sums(self, load: PassLoad, replica: ReplicaShape = _SOLO) -> PassSums:
        """A pass on a single stage as its operations alone say, whatever its layout."""
        sums = self._sums_of(load.shape, replica)
        seconds = by_cause(sums.blocks, sums.edges)
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
        powered_rows: float,
    ) -> PassSums:
        """``seconds``: without the optimizer's of slots that close a step; ``powered_rows``: those
        that products compute with at all of their power."""
        sums = self._sums_of(load.shape, replica)
        closing_s = sum(sums.optimizer_s[slot] for slot in load.optimizer_slots)
        seconds[ops.OPTIMIZER] = seconds.get(ops.OPTIMIZER, 0.0) + closing_s
        adapters_s = seconds.get(SITE, 0.0) + seconds.get(FACTOR, 0.0)
        rows, of_slots = load.shape.padded_tokens, self._of_use(load.shape.slots, replica.tp)
        place = float(np.log2(max(1, rows))), *of_slots.place
        filler_s = (1.0 - powered_rows / rows) * sums.idle_s
        return PassSums(seconds, blocks_s, sums.num_blocks, place, adapters_s, filler_s)

    # ------------------------------------------------------- passes of one certain micro-batch

    def _adding_of(self, load: PassLoad, replica: ReplicaShape) -> Adding | None:
        """By which a load adds up by its layout; None: as loads without one."""
        return self.laid_out_adding if _tells_more(load, replica) else None

    def _any_sums(self, load: PassLoad) -> PassSums:
        return self._laid_out_sums(load)[0] if _tells_more(load, _SOLO) else self.pass_sums(load)

    def _laid_out_sums(self, load: PassLoad) -> tuple[PassSums, Tally]:
        """Products by how slots meet in their tiles, attention by its sequences' tiles; and what of
        it is in blocks."""
        assert load.layout is not None
        shape, layout, layers = load.shape, load.layout, self.model.num_layers
        rows, used_rows = float(shape.padded_tokens), sum(layout.slot_rows)
        used, blocks = self._of_use(shape.slots, 1), Tally()
        attended_s = self._blocks.attention_s(shape.slots, rows, layout)
        block = self._blocks.laid_out(shape.slots, used, shape.padded_tokens, layout, attended_s)
        blocks.merge(block, layers)
        blocks.merge(self._blocks.of_rows(rows, 1).lacking, -1)
        if attended_s is None:
            sums = self._sums_of(shape, _SOLO)
            for side in (sums.blocks.forward_s, sums.blocks.backward_s):
                blocks.put(ops.ATTENTION, True, side.get(ops.ATTENTION, 0.0))
            blocks.put(ops.ATTENTION, True, load.attention_pairs * sum(sums.pairs_s))
        edges = Tally()
        edges.merge(self._edges_tally(rows, 1), 1)
        self._optimizers(edges, shape.slots)
        seconds = by_cause(blocks, edges)
        powered_rows = max(used_rows, (1.0 - _MOST_SPARING) * rows)
        return self._pass_sums(load, _SOLO, seconds, blocks.total_s, powered_rows), blocks

    def _laid_out_breakdown_s(self, load: PassLoad, adding: Adding) -> dict[str, float]:
        sums, blocks = self._laid_out_sums(load)
        added, found = adding.at(sums), dict.fromkeys(ops.CATEGORIES, 0.0)
        for cause, seconds in sums.seconds.items():
            found[category_of(cause)] += adding.factors.get(cause, 1.0) * seconds
        for cause, seconds in by_cause(blocks).items():
            more = added.g + (added.h if cause in (SITE, FACTOR) else 0.0)
            found[category_of(cause)] += more * seconds
        found[ops.BACKBONE] += adding.filler * sums.filler_s
        found[ops.OVERHEAD] += adding.pass_s + sums.num_blocks * adding.block_s
        return {category: seconds for category, seconds in found.items() if seconds}

    def pass_times_s(self, loads: Sequence[PassLoad], replica: ReplicaShape = _SOLO) -> Estimates:
        """Of loads with a layout by that, of others as ``pass_coefficients`` say."""
        found = super().pass_times_s(loads, replica)
        for index, load in enumerate(loads):
            adding = self._adding_of(load, replica)
            if adding is None:
                continue
            sums, _ = self._laid_out_sums(load)
            added = adding.at(sums)
            error = max(added.relative_error * _COUNTED_WIDENING, least_error(adding))
            value = adding.seconds(sums, added)
            found.value[index] = value
            found.low[index], found.high[index] = value * max(0.0, 1 - error), value * (1 + error)
        return found

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
            tally.put(ops.OVERHEAD, False, adding.pass_s + sums.num_blocks * adding.block_s)
            tally.put(ops.BACKBONE, True, filler_s)

        def times(cause: str) -> float:
            return of.get(cause, 1.0) + g + (h if cause in (SITE, FACTOR) else 0.0)

        for part in (sums.blocks, sums.edges):
            in_blocks = part is sums.blocks
            for side, backward in ((part.forward_s, False), (part.backward_s, True)):
                for cause, seconds in side.items():
                    factor = times(cause) if in_blocks else of.get(cause, 1.0)
                    tally.put(category_of(cause), backward, factor * seconds)
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
        least = least_error(adding)
        if adding is None:
            half_width_s = max(parts.half_width_s, least * parts.base_s)
            pair_error = max(parts.pair_error, least)
            return parts._replace(
                half_width_s=half_width_s, pair_error=pair_error, loss_error=least
            )
        error *= _DRAWN_WIDENING * (EXTRAPOLATED_WIDENING if parts.extrapolated else 1.0)
        error = max(error, least)
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
            blocks.merge(self._blocks.of_rows(rows, replica.tp).lacking, -1)
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
            _idle_s(rows, blocks, edges),
        )

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
            self._remember(key, self._slots.of(Counter(slots), self._blocks.site_sizes(tp)))
        return self._memo[key]  # type: ignore[return-value]

    def breakdown_s(self, load: PassLoad, replica: ReplicaShape = _SOLO) -> dict[str, float]:
        """See the base class. What rows in use cost is the adapters', but for the products' that
        filler would have taken less."""
        adding = self._adding_of(load, replica)
        if adding is not None:
            return self._laid_out_breakdown_s(load, adding)
        found = super().breakdown_s(load, replica)
        parts = self._busiest_stage(load.shape, replica)
        used_s = load.loss_rows * sum(parts.per_loss_row_s)
        if used_s:
            idle_s = self._sums_of(load.shape, replica).idle_s
            rows = load.shape.padded_tokens
            filler_s = self.adding.filler * idle_s / rows if self.adding is not None else 0.0
            found[ops.LOSS] -= used_s
            found[ops.BACKBONE] -= load.loss_rows * filler_s
            more_s = used_s + load.loss_rows * filler_s
            found[ops.ADAPTERS] = found.get(ops.ADAPTERS, 0.0) + more_s
        return found

    def _block_of(self, shape: ShapeKey, rows: float, tp: int, per_used_s: list[float]) -> Tally:
        """Where all rows are filler; what a row in use takes more is added to ``per_used_s``
        (forward, backward)."""
        block = self._blocks.typical(self._of_use(shape.slots, tp), rows, tp, per_used_s)
        if tp > 1:
            moved = rows * self.model.hidden * self.dtype_bytes
            for backward in (False, True):
                name = f"all_reduce.tp{tp}"
                block.add(*self._timed(name, ops.COMMUNICATION, backward, (moved,), 2))
        return block

    def _edge_of(self, rows: float, pp: int) -> Iterator[tuple[Op, Time]]:
        hidden = self.model.hidden
        yield self._timed(f"embedding.{hidden}", ops.BACKBONE, False, (rows,))
        yield self._timed(f"add_norm_forward.{hidden}", ops.ELEMENTWISE, False, (rows,))
        yield self._timed(f"add_norm_backward.{hidden}", ops.ELEMENTWISE, True, (rows,))
        loss, time = self._timed(f"full_loss.{hidden}x{self.model.vocab}", ops.LOSS, False, (rows,))
        many = _share_between(rows, _MANY_LOG_ROWS)
        yield loss._replace(category=ops.LOSS), _scaled(time, 1.0 - many)
        yield loss._replace(category=MANY_ROWS_LOSS), _scaled(self._many_rows_loss(rows), many)
        if pp > 1:
            moved = rows * hidden * self.dtype_bytes
            for backward in (False, True):
                yield self._timed("p2p", ops.COMMUNICATION, backward, (moved,))

    def _many_rows_loss(self, rows: float) -> Time:
        """By the work of the profile's own model, whose steps tell how much faster it is there than
        alone, where power limits it: another vocabulary's was measured at another clock."""
        own = self.profile.model_shape
        time = self._time(f"full_loss.{own.hidden}x{own.vocab}", (rows,))
        return _scaled(time, self.model.hidden * self.model.vocab / (own.hidden * own.vocab))

    def _timed(
        self, name: str, category: str, backward: bool, size: tuple[float, ...], count: int = 1
    ) -> tuple[Op, Time]:
        op = Op(name, category, backward, count, size, 0.0, 0.0, 0.0, 1)
        return op, self.op_time(op)

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
        of_kind = {slot: self._slots.kind(slot).elements for slot in Counter(slots)}
        elements = [of_kind[slot] for slot in slots]
        total = sum(elements)
        if not total:
            return None, (0.0,) * len(slots)
        called = self._timed("adamw_idle", ops.OPTIMIZER, True, (total,))
        _, active = self._timed("adamw_active", ops.OPTIMIZER, True, (total,))
        more = max(0.0, active.value_s - called[1].value_s)
        return called, tuple(more * count / total for count in elements)

    def attention_time(self, name: str, rows: float, pairs: float, *sequences: float) -> Time:
        """See ``AttentionTimes.of_call``. Passes need a form that is affine in pairs."""
        return self._attention_times.of_call(name, rows, pairs, *sequences)

    def _attention(self, name: str) -> Rates:
        return self._attention_times.rates(name)

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
        if self._captures_by_rows is not None:
            return self._of_blocks(self._captures_by_rows.each(shape.padded_tokens))
        value, width, outside = self._table("capture").at((float(self.model.num_layers),))
        return Estimate(value, max(value - width, 0.0), value + width, outside)

    def first_capture_s(self, largest: ShapeKey, replica: ReplicaShape) -> Estimate:
        """All blocks try it out, and the memory of all sizes is got for it; nothing in profiles
        that do not tell such captures apart."""
        if self._captures_by_rows is None:
            return super().first_capture_s(largest, replica)
        return self._of_blocks(self._captures_by_rows.first_more(largest.padded_tokens))

    @cached_property
    def _captures_by_rows(self) -> CaptureTimes | None:
        op = self.profile.ops.get("capture")
        return None if op is None or "rows" not in op["axes"] else CaptureTimes(op)

    def _of_blocks(self, whole: Estimate) -> Estimate:
        """Of the blocks that this model has."""
        share = self.model.num_layers / self.profile.model_shape.num_layers
        low, high = share * whole.low, share * whole.high
        return whole._replace(value=share * whole.value, low=low, high=high)

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


def _columns(name: str) -> int:
    """Of what a frozen product gives, by its name."""
    kind, _, size = name.partition(".")
    inputs, _, outputs = size.partition("x")
    return int(outputs if kind == "frozen_forward" else inputs)


def _scaled(time: Time, ratio: float) -> Time:
    return Time(ratio * time.value_s, ratio * time.half_width_s, time.extrapolated)


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


def _idle_s(rows: float, *tallies: Tally) -> float:
    """What products take that power limits, the loss's too, where filler draws less of it: not
    those of few rows, which wait for the memory."""
    seconds = by_cause(*tallies)
    products_s = sum(seconds.get(cause, 0.0) for cause in _POWER_LIMITED)
    return _share_between(rows, _POWER_LIMITED_LOG_ROWS) * products_s


def _share_between(rows: float, log_rows: tuple[float, float]) -> float:
    """How far the rows are from the first of these binary logarithms to the second."""
    low, high = log_rows
    return min(1.0, max(0.0, (math.log2(max(1.0, rows)) - low) / (high - low)))


def _tells_more(load: PassLoad, replica: ReplicaShape) -> bool:
    """Whether a layout tells more than the shape: of all rows, on one rank."""
    if load.layout is None or load.shape.recompute or replica.tp * replica.pp > 1:
        return False
    return not any(slot.method == "prompt" for slot in load.shape.slots)


def _most_rows(shapes: Sequence[ShapeKey]) -> int:
    return max(shape.padded_tokens for shape in shapes)
