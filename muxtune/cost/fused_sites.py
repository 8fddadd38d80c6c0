"""The captured step's fused linears, and how large its slots are to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from muxtune.cost import ops
from muxtune.cost.memory import widened
from muxtune.cost.shapes import ModelShape
from muxtune.types import AdapterSlot

MEMBERS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
MIN_RANK = 16


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


def padded_rank(ranks: Sequence[float]) -> int:
    """To which the kernels pad the largest."""
    return max(MIN_RANK, 1 << (int(max(ranks)) - 1).bit_length())


def stepped_rank(rank: int) -> int:
    """In whole steps of the kernels' low-rank products, which leave out what no rank of a slot
    is in, and read and write its own ranks only."""
    return -(-rank // MIN_RANK) * MIN_RANK


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
