"""Optimizer steps of tasks whose adapters are spread over ranks.

A step clips by the norm of the task's whole gradient, so ranks add up their sums of squares before
any of them steps. Factors that all ranks of a stage hold get the sum of the ranks' gradients, and
count once.

Shape suffixes: S slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from muxtune.runtime.bank import SlotPool
from muxtune.runtime.distributed.links import Links
from muxtune.runtime.distributed.sharding import StageBackbone
from muxtune_kernels import multi_task_adamw_


class SlotStep(NamedTuple):
    """AdamW's settings for one step of one slot."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    max_grad_norm: float


class StageOptimizer:
    """Steps of what one rank holds."""

    def __init__(self, backbone: StageBackbone, links: Links) -> None:
        self.backbone, self.links = backbone, links
        self._num_replicas = len(links.layout.replicas)

    @torch.no_grad()
    def squares(self, pool: SlotPool, closing: Iterable[int]) -> Tensor:
        """The stage's sum of squared gradients by slot, float64 [S]; 0 for slots that go on."""
        slots = sorted(closing)
        if self._num_replicas > 1:  # known only when all replicas are through
            return torch.zeros(len(pool.slots), dtype=torch.float64, device=self.backbone.device)
        self._sum_shared(pool, slots)
        parts = [self._sum_of_squares(pool, slots, shared) for shared in (False, True)]
        if self.links.step is not None:
            dist.all_reduce(parts[0], group=self.links.step)
        return parts[0] + parts[1]

    @torch.no_grad()
    def step(
        self, pool: SlotPool, closing: Mapping[int, SlotStep], squares_S: Tensor
    ) -> dict[int, float]:
        """Every closing slot takes its step, or none where its norm is not finite; the norms."""
        if self._num_replicas > 1:
            squares_S = self._sum_replicas(pool, sorted(closing))
        norms = {slot: math.sqrt(square) if (square := float(squares_S[slot])) >= 0 else math.nan
                 for slot in closing}  # fmt: skip
        finite = {slot: closing[slot] for slot, norm in norms.items() if math.isfinite(norm)}
        for slot in closing:
            scale = _clip(norms[slot], closing[slot].max_grad_norm) if slot in finite else 0.0
            for grad in _grads(pool, slot):
                if slot not in finite:
                    grad.zero_()
                elif scale < 1.0:
                    grad.mul_(scale)
        _fill(pool, finite)
        multi_task_adamw_(pool.optimizer_pools, pool.settings)
        for slot in finite:
            if (state := pool.occupants[slot]) is not None:
                state.step += 1
        return norms

    # -- sums over ranks

    def _is_shared(self, site_name: str, name: str) -> bool:
        """Held by all ranks of the stage, each with a part of the gradient."""
        cut = self.backbone.cuts[site_name]
        return bool(cut.axis) and cut.of_parameter(name) is None

    def _parts(
        self, pool: SlotPool, slots: Iterable[int], shared: bool
    ) -> list[tuple[int, Tensor]]:
        return [
            (slot, parameters.grad_RW[parameters.rows_of(slot)])
            for site_name, site in pool.sites.items()
            for name, parameters in site.parameters.items()
            if self._is_shared(site_name, name) is shared
            for slot in slots
            if parameters.slot_rows[slot]
        ]

    def _sum_shared(self, pool: SlotPool, slots: Iterable[int]) -> None:
        if self.links.step is None:
            return
        parts = [grad for _, grad in self._parts(pool, slots, True)]
        if parts:
            flat = torch.cat([grad.flatten() for grad in parts])
            dist.all_reduce(flat, group=self.links.step)
            _spread(flat, parts)

    def _sum_of_squares(self, pool: SlotPool, slots: Iterable[int], shared: bool) -> Tensor:
        sums_S = torch.zeros(len(pool.slots), dtype=torch.float64, device=self.backbone.device)
        for slot, grad in self._parts(pool, slots, shared):
            sums_S[slot] += grad.double().square().sum()
        return sums_S

    def _sum_replicas(self, pool: SlotPool, slots: Iterable[int]) -> Tensor:
        """Every rank adds what it holds to the whole gradients, and takes its own back: over
        replicas of any shapes, and over the ranks of a stage, in one sum."""
        squares_S = torch.zeros(len(pool.slots), dtype=torch.float64, device=self.backbone.device)
        for slot in slots:
            places, total = self._places(pool, slot)
            flat = torch.zeros(total, dtype=torch.float64, device=self.backbone.device)
            for place, grad in places:
                place(flat).add_(grad)
            dist.all_reduce(flat, group=self.links.all)
            squares_S[slot] = flat.square().sum()
            for place, grad in places:
                grad.copy_(place(flat))
        return squares_S

    def _places(self, pool: SlotPool, slot: int):
        """(view into the whole gradient, own gradient) of each parameter, and the whole's size."""
        kind = pool.slots[slot]
        total, places = 0, []
        for site in self.backbone.matching_sites(kind.targets):
            for name, (rows, width) in _whole_shapes(kind, site).items():
                start, stop = total, total + rows * width
                total = stop
                if site.name in pool.sites:
                    parameters = pool.sites[site.name].parameters[name]
                    columns = self.backbone.cuts[site.name].of_parameter(name) or slice(None)
                    grad = parameters.grad_RW[parameters.rows_of(slot)]
                    view = _view(start, stop, (rows, width), columns)
                    places.append((view, grad))
        return places, total


def _view(start: int, stop: int, shape: tuple[int, int], columns: slice):
    return lambda flat: flat[start:stop].view(shape)[:, columns]


def _whole_shapes(kind, site) -> dict[str, tuple[int, int]]:
    from muxtune.runtime.adapters import adapter_method

    return adapter_method(kind.method).shapes(kind, site)


def _spread(flat: Tensor, parts: Iterable[Tensor]) -> None:
    start = 0
    for part in parts:
        part.copy_(flat[start : start + part.numel()].view(part.shape))
        start += part.numel()


def _grads(pool: SlotPool, slot: int) -> list[Tensor]:
    return [
        parameters.grad_RW[parameters.rows_of(slot)]
        for site in pool.sites.values()
        for parameters in site.parameters.values()
    ]


def _clip(norm: float, max_norm: float) -> float:
    """As torch.nn.utils.clip_grad_norm_."""
    return min(max_norm / (norm + 1e-6), 1.0) if 0 < max_norm < math.inf else 1.0


def _fill(pool: SlotPool, closing: Mapping[int, SlotStep]) -> None:
    """Settings without clipping, which has been done."""
    for field, tensor in zip(SlotStep._fields[:5], pool.settings[:5], strict=True):
        values = [getattr(closing[s], field) if s in closing else 0.0
                  for s in range(len(pool.slots))]  # fmt: skip
        tensor.copy_(torch.tensor(values, dtype=torch.float64))
    pool.settings.max_grad_norm_S.zero_()
    active = [slot in closing for slot in range(len(pool.slots))]
    pool.settings.active_S.copy_(torch.tensor(active))
