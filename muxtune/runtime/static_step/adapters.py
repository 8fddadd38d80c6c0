"""The tasks' LoRA factors, laid out for the fused linears, with gradients and AdamW's moments.

A slot's rows of a fused linear hold one rank for all members; a member that a task does not adapt
holds zeros there, which get zero gradients and stay zero.

Shape suffixes as in the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from muxtune.runtime.backbone import names_target
from muxtune.runtime.linear import module_key
from muxtune.runtime.static_step.model import FusedLinear, StaticModel
from muxtune_kernels import AdamWPool, AdamWSlots
from muxtune_kernels.multi_lora import LoraLinear
from muxtune_kernels.rows import slot_offsets

ALL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


Four = tuple[Tensor, Tensor, Tensor, Tensor]  # parameter, gradient, first and second moment


class SlotSpec(NamedTuple):
    """Capacity of one slot; ``targets``: as in ``AdapterSlot``."""

    rank: int
    targets: tuple[str, ...] = ALL_TARGETS

    def adapts(self, site_name: str) -> bool:
        return names_target(site_name, self.targets)


class SiteViews(NamedTuple):
    """Views of one slot's A [r, D] and B^T [r, O] at one site."""

    site_name: str
    a: Four
    b: Four


class LoraState(NamedTuple):
    """One adapter at one site: A [r, D] and B^T [r, O], each as parameter and moments (which may
    be left out)."""

    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]


class FusedPool(NamedTuple):
    """Parameters, gradient and moments of one fused linear. ``a``: [M * R, D] each, ``b``: [R, O].
    Order: parameter, gradient, first moment, second moment."""

    linear: FusedLinear
    slot_ranks: tuple[int, ...]
    a: Four
    b: Four
    lora: LoraLinear


class AdapterPools:
    """Slots of fixed ranks on every linear of a model. ``settings.step_S`` counts steps."""

    def __init__(self, model: StaticModel, slots: tuple[SlotSpec, ...], deterministic: bool):
        self.slots = slots
        self.layers = [
            tuple(self._pool(linear, model.device, deterministic) for linear in block.linears)
            for block in model.blocks
        ]
        self.optimizer_pools = [part for layer in self.layers for p in layer for part in _parts(p)]

        count = len(slots)
        self.settings = AdamWSlots(
            *(torch.zeros(count, dtype=torch.float64, device=model.device) for _ in range(6)),
            step_S=torch.zeros(count, dtype=torch.int32, device=model.device),
            active_S=torch.zeros(count, dtype=torch.bool, device=model.device),
        )

    @property
    def num_bytes(self) -> int:
        tensors = (t for layer in self.layers for pool in layer for t in (*pool.a, *pool.b))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _pool(self, linear: FusedLinear, device: torch.device, deterministic: bool) -> FusedPool:
        ranks = tuple(
            slot.rank if any(slot.adapts(name) for name in linear.names) else 0
            for slot in self.slots
        )
        members, total = len(linear.names), sum(ranks)
        a_shape = (members * total, linear.weight_OD.shape[1])
        b_shape = (total, linear.weight_OD.shape[0])
        a, b = _zeros(a_shape, device), _zeros(b_shape, device)
        lora = LoraLinear(
            linear.weight_OD,
            linear.bias_O,
            a[0],
            b[0],
            a[1],
            b[1],
            linear.out_features,
            ranks,
            # The members share one dropout mask, named after the first of them.
            module_key(linear.names[0]),
            deterministic,
        )
        return FusedPool(linear, ranks, a, b, lora)

    def views(self, slot: int) -> Iterator[SiteViews]:
        """The sites that a slot adapts."""
        for layer in self.layers:
            for pool in layer:
                yield from _views_of(pool, slot, self.slots[slot])

    @torch.no_grad()
    def load(self, slot: int, states: Mapping[str, LoraState], step: int) -> None:
        """Put a task's adapter into a slot; its gradient is cleared. A rank below the slot's
        fills the first rows, the rest are zero."""
        for name, a, b in self.views(slot):
            for view in (*a, *b):
                view.zero_()
            if name in states:
                for views, values in ((a, states[name].a), (b, states[name].b)):
                    without_grad = (views[0], *views[2:])
                    for view, value in zip(without_grad, values, strict=False):
                        view[: value.shape[0]].copy_(value)
        self.settings.step_S[slot] = step

    def save(self, slot: int, rank: int) -> dict[str, LoraState]:
        """Copies of a slot's adapter: parameter and moments of A and B^T by site."""
        return {
            name: LoraState(_saved(a, rank), _saved(b, rank)) for name, a, b in self.views(slot)
        }


def _zeros(shape: tuple[int, int], device: torch.device) -> Four:
    param, grad, exp_avg, exp_avg_sq = (
        torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(4)
    )
    return param, grad, exp_avg, exp_avg_sq


def _saved(views: Four, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    param, _, exp_avg, exp_avg_sq = (view[:rank].clone() for view in views)
    return param, exp_avg, exp_avg_sq


def _views_of(pool: FusedPool, slot: int, spec: SlotSpec) -> Iterator[SiteViews]:
    if pool.slot_ranks[slot] == 0:
        return
    offsets, widths = slot_offsets(pool.slot_ranks), slot_offsets(pool.linear.out_features)
    for member, name in enumerate(pool.linear.names):
        if not spec.adapts(name):
            continue
        start = member * offsets[-1] + offsets[slot]
        a_rows = slice(start, start + pool.slot_ranks[slot])
        rows, columns = slice(offsets[slot], offsets[slot + 1]), slice(*widths[member : member + 2])
        yield SiteViews(
            name,
            _cut(pool.a, lambda tensor, at=a_rows: tensor[at]),
            _cut(pool.b, lambda tensor, at=(rows, columns): tensor[at]),
        )


def _cut(tensors: Four, view: Callable[[Tensor], Tensor]) -> Four:
    param, grad, exp_avg, exp_avg_sq = (view(tensor) for tensor in tensors)
    return param, grad, exp_avg, exp_avg_sq


def _parts(pool: FusedPool) -> Iterator[AdamWPool]:
    total = sum(pool.slot_ranks)
    for member in range(len(pool.linear.names)):
        rows = slice(member * total, (member + 1) * total)
        yield AdamWPool(*(tensor[rows] for tensor in pool.a), slot_rows=pool.slot_ranks)
    yield AdamWPool(*pool.b, slot_rows=pool.slot_ranks)
