"""One block of a captured pass, from the times of its operations.

A block is either typical of its shape: then rows in use are a number that is multiplied by what one
of them takes. Or it is of one certain micro-batch: then products are counted by how slots meet in
their tiles, and attention by its sequences' tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from muxtune.cost import ops
from muxtune.cost.attention_times import AttentionTimes
from muxtune.cost.causes import ADAPTED, SITE
from muxtune.cost.composition import Tally, kept
from muxtune.cost.curves import Time
from muxtune.cost.extra_methods import ExtraMethods
from muxtune.cost.fused_sites import fused_sites
from muxtune.cost.low_rank import FILL, Use
from muxtune.cost.profiled import TimeOf
from muxtune.cost.shapes import ModelShape
from muxtune.cost.site_products import SiteProducts
from muxtune.cost.slot_uses import Paid, SiteUse, SlotsUse, SlotUses
from muxtune.types import AdapterSlot, PassLayout


class RowsTimes(NamedTuple):
    """What blocks of ``rows`` take whatever their slots. ``frozen``: by the linear's size,
    forward and backward; ``lacking``: what the first block does not compute."""

    rows: float
    frozen: Mapping[str, tuple[Time, Time]]
    elementwise: Tally
    lacking: Tally


class Blocks:
    """``time_of``: of an operation, with its interval; ``products``: None where the profile does
    not tell the device's tiles."""

    def __init__(
        self,
        model: ModelShape,
        time_of: TimeOf,
        slots: SlotUses,
        extras: ExtraMethods,
        attention: AttentionTimes,
        products: SiteProducts | None,
    ) -> None:
        self._model, self._time_of, self._slots = model, time_of, slots
        self._extras, self._attention, self._products = extras, attention, products
        self._heads = f"{model.num_heads}x{model.num_kv_heads}x{model.head_dim}"
        self._own_keys = f"{model.num_heads}x{model.num_heads}x{model.head_dim}"
        self._sizes: dict[int, tuple[str, ...]] = {}
        self._of_rows: dict[tuple[float, int], RowsTimes] = {}

    def site_sizes(self, tp: int) -> tuple[str, ...]:
        """Of the fused linears of one rank."""
        if tp not in self._sizes:
            self._sizes[tp] = tuple(site.size for site in fused_sites(self._model, tp))
        return self._sizes[tp]

    def of_rows(self, rows: float, tp: int) -> RowsTimes:
        found = self._of_rows.get((rows, tp))
        if found is None:
            found = kept(self._of_rows, (rows, tp), self._rows_times(rows, tp))
        return found

    def _rows_times(self, rows: float, tp: int) -> RowsTimes:
        hidden, inner = self._model.hidden, self._model.intermediate // tp
        frozen = {
            size: (
                self._time_of(f"frozen_forward.{size}", (rows,)),
                self._time_of(f"frozen_backward.{size}", (rows,)),
            )
            for size in self.site_sizes(tp)
        }
        norm, norm_backward, swiglu, swiglu_backward = (
            self._time_of(name, (rows,))
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
        lacking.charge(ops.BACKBONE, True, frozen[self.site_sizes(tp)[0]][1])
        lacking.charge(ops.ELEMENTWISE, True, norm_backward)
        return RowsTimes(rows, frozen, elementwise, lacking)

    # ------------------------------------------------------------------- typical of its shape

    def typical(self, used: SlotsUse, rows: float, tp: int, per_used_s: list[float]) -> Tally:
        """Without attention, and where all rows are filler; what a row in use takes more is added
        to ``per_used_s`` (forward, backward)."""
        of_rows, block = self.of_rows(rows, tp), Tally()
        for site in used.sites:
            self._add_site(block, site, used.num_slots, of_rows, per_used_s)
        block.merge(of_rows.elementwise, 1)
        for method, size, own in used.extras:
            # Rows are taken as even shares of the slots; attention is every row's.
            share = 1.0 if method == "prefix" else own / used.num_slots
            for extra in self._extras.times(method, size, rows):
                per_used_s[extra.backward] += share * extra.spared_s / rows
                extra.put(block, 1.0)
                block.widen(extra.time.half_width_s, extra.time.extrapolated)
        return block

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
            _add_frozen(block, alone)
        for paid in use.paid:
            side = paid.side
            # Products are as they are where ``FILL`` of the rows are in use.
            sizes, used_rows = (float(use.count), paid.rank, rows), rows
            if side.cause == SITE:
                sizes, used_rows = (*sizes, 0.0), FILL * rows
            whole_s, width_s, outside = self._time_of(paid.op, sizes)
            row_s = paid.spared_s(whole_s, rows)
            per_used_s[side.backward] += row_s * use.count / num_slots
            more_s = whole_s
            if side.cause == SITE:
                alone_s = min(whole_s, alone[side.backward].value_s)
                block.put(ADAPTED, side.backward, alone_s)
                more_s -= alone_s
            block.put(side.cause, side.backward, more_s - row_s * used_rows)
            block.widen(width_s, outside or not use.known)

    # -------------------------------------------------------------- of one certain micro-batch

    def laid_out(
        self,
        slots: tuple[AdapterSlot, ...],
        used: SlotsUse,
        padded_rows: int,
        layout: PassLayout,
        attended_s: float | None,
    ) -> Tally:
        """``attended_s``: see ``attention_s``; None: without attention."""
        rows, block = float(padded_rows), Tally()
        of_rows = self.of_rows(rows, 1)
        for number, use in enumerate(used.sites):
            if not use.count:
                _add_frozen(block, of_rows.frozen[use.size])
                continue
            ranks = self._ranks(slots, number)
            for paid in use.paid:
                if paid.side.cause == SITE:
                    self._add_product(block, Use(layout.slot_rows, ranks), use, paid, of_rows)
                else:
                    self._add_factor(block, Use(layout.slot_rows, ranks), paid, rows)
        block.merge(of_rows.elementwise, 1)
        for method, size, _ in used.extras:
            own = zip(layout.slot_rows, slots, strict=True)
            # Every row's attention has a part for virtual tokens.
            of_method = sum(count for count, slot in own if slot.method == method)
            own_rows = sum(layout.slot_rows) if method == "prefix" else of_method
            for extra in self._extras.times(method, size, rows):
                extra.put(block, 1.0 - own_rows / rows)
        if attended_s is not None:
            block.put(ops.ATTENTION, True, attended_s)
        return block

    def attention_s(
        self, slots: tuple[AdapterSlot, ...], rows: float, layout: PassLayout
    ) -> float | None:
        """Of one block, both ways; see ``AttentionTimes.of_layout``. With prefixes it is a
        library's, which takes no longer where heads share keys."""
        prefixed = any(slot.method == "prefix" for slot in slots)
        heads = self._own_keys if prefixed else self._heads
        return self._attention.of_layout(heads, rows, layout)

    def _ranks(self, slots: tuple[AdapterSlot, ...], number: int) -> tuple[int, ...]:
        """In whole low-rank steps; 0 of slots that do not adapt the linear."""
        kinds = [self._slots.kind(slot) for slot in slots]
        return tuple([kind.stepped if kind.adapts[number] else 0 for kind in kinds])

    def _add_product(
        self, block: Tally, use_of: Use, use: SiteUse, paid: Paid, of_rows: RowsTimes
    ) -> None:
        assert self._products is not None
        backward = paid.side.backward
        product = self._products.of(paid.op.partition(".")[0], use.size)
        whole_s = product.of_layout(use_of, int(of_rows.rows))
        alone_s = min(whole_s, of_rows.frozen[use.size][backward].value_s)
        block.put(ADAPTED, backward, alone_s)
        block.put(SITE, backward, whole_s - alone_s)

    def _add_factor(self, block: Tally, use_of: Use, paid: Paid, rows: float) -> None:
        """Slots without rows have nothing to add to what they keep."""
        active = len(use_of.active_ranks)
        whole_s = self._time_of(paid.op, (float(max(1, active)), paid.rank, rows)).value_s
        unused = (rows - sum(use_of.slot_rows)) * use_of.slots / len(use_of.ranks)
        spared_s = paid.spared_s(whole_s, rows) * unused
        block.put(paid.side.cause, paid.side.backward, whole_s - spared_s)


def _add_frozen(block: Tally, forward_and_backward: tuple[Time, Time]) -> None:
    for backward, time in enumerate(forward_and_backward):
        block.charge(ops.BACKBONE, bool(backward), time)
