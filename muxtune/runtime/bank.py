"""Adapter state of tasks, laid out in pools of slots that a pass reads.

A task owns, for every parameter of its adapter, four matrices: weights, accumulated gradient and
AdamW's two moments. While the task is placed they are rows of its hTask's pool; otherwise they
are tensors of their own. A plan change moves rows between pools, bit by bit the same, so neither
the model nor an open accumulation notices.

Shape suffixes: R pool rows (the sum of the slots' rows), W width of a parameter, S slots.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from muxtune.errors import TaskError
from muxtune.runtime.adapters import adapter_method
from muxtune.runtime.adapters.contract import Place
from muxtune.runtime.adapters.site import SiteMethods
from muxtune.runtime.backbone import Backbone
from muxtune.runtime.linear import LinearSite
from muxtune.runtime.prepended import VirtualTokens
from muxtune.types import AdapterSlot, HTask, TaskSpec
from muxtune_kernels import AdamWPool, AdamWSlots

ParameterKey = tuple[str, str]  # (site name, parameter name)


class TaskTensors(NamedTuple):
    """One parameter of one task, each [rows, width]: float32; the gradient as the bank keeps it."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def detached_copy(self) -> TaskTensors:
        return TaskTensors(*(tensor.clone() for tensor in self))


@dataclass
class TaskState:
    """All that training has made of a task, kept in one place: what a checkpoint holds.

    ``step``: optimizer steps applied. ``step_loss``: the loss of the open step so far.
    """

    task: TaskSpec
    slot: AdapterSlot
    num_steps: int
    tensors: dict[ParameterKey, TaskTensors]
    step: int = 0
    step_loss: float = 0.0
    place: tuple[SlotPool, int] | None = None

    def parameters(self) -> dict[str, dict[str, Tensor]]:
        """Site name -> parameter name -> weights [rows, width]."""
        out: dict[str, dict[str, Tensor]] = {}
        for (site_name, name), tensors in self.tensors.items():
            out.setdefault(site_name, {})[name] = tensors.param
        return out


class ParameterPool(NamedTuple):
    """One parameter of one site for all slots; slot s owns ``slot_rows[s]`` consecutive rows.

    ``owned[s]``: whether the task in slot s has this parameter here (a slot may be larger than
    its task). ``row_of_slot_S``, int64 [S + 1] on the device, tells the same to ops over all
    rows: the first row of slot s, or the number of rows where it is not owned, as is the last.
    """

    param_RW: Tensor
    grad_RW: Tensor
    exp_avg_RW: Tensor
    exp_avg_sq_RW: Tensor
    slot_rows: tuple[int, ...]
    slices: tuple[slice, ...]
    owned: list[bool]
    row_of_slot_S: Tensor

    def set_owned(self, slot: int, owned: bool) -> None:
        self.owned[slot] = owned
        self.row_of_slot_S[slot] = self.slices[slot].start if owned else self.param_RW.shape[0]

    def rows_of(self, slot: int) -> slice:
        return self.slices[slot]

    def task_tensors(self, slot: int, num_rows: int) -> TaskTensors:
        """Views of the first ``num_rows`` rows of a slot."""
        start = self.slices[slot].start
        return TaskTensors(*(tensor[start : start + num_rows] for tensor in self[:4]))

    def optimizer_pool(self) -> AdamWPool:
        return AdamWPool(*self[:4], slot_rows=self.slot_rows)


class SitePool(NamedTuple):
    """What is added at one site for all slots. ``method``: the methods that its slots use, as
    one. Methods with a parameter of the same name share its pool."""

    method: SiteMethods
    parameters: dict[str, ParameterPool]


@dataclass
class SlotPool:
    """The adapters of one hTask. Its tensors keep their addresses as long as the slots' shapes
    hold; tasks only fill them."""

    slots: tuple[AdapterSlot, ...]
    sites: dict[str, SitePool]
    settings: AdamWSlots
    scale_S: Tensor
    rate_S: Tensor
    occupants: list[TaskState | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.occupants = [None] * len(self.slots)
        self.scales = [0.0] * len(self.slots)
        self.virtual: dict[int, VirtualTokens] = {}
        self.rates = [0.0] * len(self.slots)
        self.optimizer_pools = [
            parameters.optimizer_pool()
            for site in self.sites.values()
            for parameters in site.parameters.values()
        ]

    def describe_slot(self, slot: int, scale: float, rate: float) -> None:
        """Set a slot's output factor and dropout rate, on the host and on the device."""
        self.scales[slot], self.rates[slot] = scale, rate
        self.scale_S[slot], self.rate_S[slot] = scale, rate


class AdapterBank:
    """Makes, places and moves adapter state on one backbone.

    ``grad_dtype``: float64 for deterministic sums on the CPU, else float32.
    """

    def __init__(self, backbone: Backbone, grad_dtype: torch.dtype) -> None:
        self.backbone, self.grad_dtype = backbone, grad_dtype
        self.pools: list[SlotPool] = []

    def create(self, task: TaskSpec, num_steps: int) -> TaskState:
        """A fresh adapter as PEFT initialises it, drawn per (task seed, module name)."""
        tensors = {}
        place = adapter_method(task.adapter.method).place
        for site in self.backbone.sites_of(place, task.adapter.targets):
            base = getattr(self.backbone.model.get_submodule(site.name), "base", None)
            weight_OD = None if base is None else base.weight_OD
            for name, value in start_values(task, site, weight_OD).items():
                tensors[site.name, name] = self._fresh(value)
        return TaskState(task, adapter_slot(task), num_steps, tensors)

    def arrange(self, htasks: Sequence[HTask], states: Mapping[str, TaskState]) -> list[SlotPool]:
        """Pools for these hTasks with their tasks in them; other tasks leave the bank's pools.

        A pool whose slots' shapes still fit is kept, and so are tasks that stay in their slot.
        Raises TaskError when a task does not fit its slot.
        """
        wanted = _match_pools(htasks, self.pools)
        pools = [
            pool if pool is not None else self._pool(htask.shapes[0].slots)
            for htask, pool in zip(htasks, wanted, strict=True)
        ]
        target = {
            task_id: (pool, slot)
            for htask, pool in zip(htasks, pools, strict=True)
            for task_id, slot in htask.slot_of.items()
            if task_id in states
        }
        for pool in self.pools:
            for state in [state for state in pool.occupants if state is not None]:
                if not _is_at(state, target.get(state.task.task_id)):
                    take_out(state)
        for task_id, (pool, slot) in target.items():
            if not _is_at(states[task_id], (pool, slot)):
                self._put_in(states[task_id], pool, slot)
        self.pools = pools
        return pools

    def _fresh(self, value: Tensor) -> TaskTensors:
        param = value.to(self.backbone.device, torch.float32)
        return TaskTensors(
            param,
            torch.zeros_like(param, dtype=self.grad_dtype),
            torch.zeros_like(param),
            torch.zeros_like(param),
        )

    def _pool(self, slots: tuple[AdapterSlot, ...]) -> SlotPool:
        device, count = self.backbone.device, len(slots)
        used = [self._sites_of(slot) for slot in slots]
        sites = {}
        for name in dict.fromkeys(
            [*self.backbone.sites, *(name for each in used for name in each)]
        ):
            users = [name in each for each in used]
            if any(users):
                site = next(each[name] for each in used if name in each)
                sites[name] = self._site_pool(site, slots, users)

        def zeros(dtype: torch.dtype) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        settings = AdamWSlots(
            **{name: zeros(torch.float64) for name in AdamWSlots._fields[:6]},
            step_S=zeros(torch.int32),
            active_S=zeros(torch.bool),
        )
        return SlotPool(slots, sites, settings, zeros(torch.float32), zeros(torch.float32))

    def _sites_of(self, slot: AdapterSlot) -> dict[str, LinearSite]:
        place, backbone = adapter_method(slot.method).place, self.backbone
        if place is not Place.LINEAR:
            return {site.name: site for site in backbone.sites_of(place, ())}
        named = backbone.sites.items()
        return {name: site for name, site in named if backbone.is_target(name, slot.targets)}

    def _site_pool(
        self, site: LinearSite, slots: Sequence[AdapterSlot], users: Sequence[bool]
    ) -> SitePool:
        used = [slot for slot, uses in zip(slots, users, strict=True) if uses]
        shapes = [
            adapter_method(slot.method).shapes(slot, site) if uses else {}
            for slot, uses in zip(slots, users, strict=True)
        ]
        widths = {name: width for shape in shapes for name, (_, width) in shape.items()}
        parameters = {
            name: self._parameter_pool(tuple(shape.get(name, (0, 0))[0] for shape in shapes), width)
            for name, width in widths.items()
        }
        names = sorted({slot.method for slot in used})
        return SitePool(SiteMethods(adapter_method(name) for name in names), parameters)

    def _parameter_pool(self, slot_rows: tuple[int, ...], width: int) -> ParameterPool:
        shape, device = (sum(slot_rows), width), self.backbone.device
        starts = [sum(slot_rows[:slot]) for slot in range(len(slot_rows))]
        return ParameterPool(
            torch.zeros(shape, device=device),
            torch.zeros(shape, device=device, dtype=self.grad_dtype),
            torch.zeros(shape, device=device),
            torch.zeros(shape, device=device),
            slot_rows,
            tuple(slice(a, a + n) for a, n in zip(starts, slot_rows, strict=True)),
            [False] * len(slot_rows),
            torch.full((len(slot_rows) + 1,), shape[0], dtype=torch.int64, device=device),
        )

    def _put_in(self, state: TaskState, pool: SlotPool, slot: int) -> None:
        _check_fit(state, pool.slots[slot], slot)
        for site_name, site in pool.sites.items():
            for name, parameters in site.parameters.items():
                parameters.set_owned(slot, (site_name, name) in state.tensors)
                for tensor in parameters[:4]:
                    tensor[parameters.rows_of(slot)] = 0
        for (site_name, name), old in state.tensors.items():
            parameters = pool.sites[site_name].parameters[name]
            new = parameters.task_tensors(slot, old.param.shape[0])
            for target, source in zip(new, old, strict=True):
                target.copy_(source)
            state.tensors[site_name, name] = new
        adapter = state.task.adapter
        scale = adapter_method(adapter.method).scale(adapter)
        pool.describe_slot(slot, scale, adapter.dropout)
        place = adapter_method(adapter.method).place
        if place is not Place.LINEAR:
            site_name, name = next(iter(state.tensors))
            first = pool.sites[site_name].parameters[name].rows_of(slot).start
            pool.virtual[slot] = VirtualTokens(adapter.rank, first, place is Place.EMBEDDING)
        pool.settings.step_S[slot] = state.step
        pool.occupants[slot] = state
        state.place = (pool, slot)


def take_out(state: TaskState) -> None:
    """Give a task storage of its own and free its slot; nothing happens to one without a place."""
    if state.place is None:
        return
    pool, slot = state.place
    state.tensors = {key: tensors.detached_copy() for key, tensors in state.tensors.items()}
    pool.occupants[slot] = None
    pool.describe_slot(slot, 0.0, 0.0)
    pool.virtual.pop(slot, None)
    state.place = None


def adapter_slot(task: TaskSpec) -> AdapterSlot:
    adapter = task.adapter
    return AdapterSlot(adapter.method, adapter.rank, adapter.targets, adapter.dropout > 0)


def start_values(task: TaskSpec, site: LinearSite, weight_OD: Tensor | None) -> dict[str, Tensor]:
    """A fresh adapter at one site, in pool form: the same on every machine."""
    generator = torch.Generator().manual_seed(_seed(task.seed, site.name))
    method = adapter_method(task.adapter.method)
    return method.initialise(task.adapter, site, generator, weight_OD)


def _seed(task_seed: int, site_name: str) -> int:
    digest = hashlib.blake2s(f"{task_seed}/{site_name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _is_at(state: TaskState, place: tuple[SlotPool, int] | None) -> bool:
    if state.place is None or place is None:
        return state.place is place
    return state.place[0] is place[0] and state.place[1] == place[1]


def _match_pools(htasks: Sequence[HTask], pools: Sequence[SlotPool]) -> list[SlotPool | None]:
    """For each hTask a pool with the same slots, each pool once; the one that already holds most
    of its tasks in their slots comes first."""
    free = list(pools)
    matched: list[SlotPool | None] = []
    for htask in htasks:
        fitting = [pool for pool in free if pool.slots == htask.shapes[0].slots]
        best = max(fitting, key=lambda pool: _num_staying(htask, pool), default=None)
        if best is not None:
            free = [pool for pool in free if pool is not best]
        matched.append(best)
    return matched


def _num_staying(htask: HTask, pool: SlotPool) -> int:
    return sum(
        state is not None and htask.slot_of.get(state.task.task_id) == slot
        for slot, state in enumerate(pool.occupants)
    )


def _check_fit(state: TaskState, slot: AdapterSlot, index: int) -> None:
    own = state.slot
    if (
        own.method == slot.method
        and own.rank <= slot.rank
        and set(own.targets) <= set(slot.targets)
    ):
        return
    raise TaskError(
        state.task.task_id,
        f"its adapter ({own.method}, rank {own.rank}, {', '.join(own.targets)}) does not fit "
        f"slot {index} ({slot.method}, rank {slot.rank}, {', '.join(slot.targets)})",
        "Plan a slot of the same method with at least its rank and targets",
    )


def grad_dtype_for(device: torch.device, deterministic: bool) -> torch.dtype:
    return torch.float64 if deterministic and device.type == "cpu" else torch.float32


__all__ = [
    "AdapterBank",
    "ParameterPool",
    "SitePool",
    "SlotPool",
    "TaskState",
    "TaskTensors",
    "adapter_slot",
    "grad_dtype_for",
    "start_values",
    "take_out",
]
