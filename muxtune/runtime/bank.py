"""Adapter state of tasks, laid out in pools of slots that a pass reads.

A task owns, for every parameter of its adapter, four matrices: weights, accumulated gradient and
AdamW's two moments. While the task is placed they are rows of its hTask's pool; otherwise they
are tensors of their own, in host memory. A plan change moves rows between pools, bit by bit the
same, so neither the model nor an open accumulation notices.

There are two kinds of pools: ``SlotPool``, for the eager pass, and ``static_pool.StaticPool``,
whose rows are laid out for the captured step.

Shape suffixes: R pool rows (the sum of the slots' rows), W width of a parameter, S slots.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from muxtune.errors import TaskError
from muxtune.runtime.adapters import adapter_method
from muxtune.runtime.adapters.contract import Place
from muxtune.runtime.adapters.site import SiteMethods
from muxtune.runtime.backbone import Backbone
from muxtune.runtime.linear import LinearSite
from muxtune.runtime.memory import free_bytes
from muxtune.runtime.prepended import VirtualTokens
from muxtune.types import AdapterSlot, HTask, TaskSpec
from muxtune_kernels import AdamWPool, AdamWSlots

ParameterKey = tuple[str, str]  # (site name, parameter name)
_MAX_DRAWERS = 16  # threads that draw a fresh adapter
_SPARE_BYTES = 2 << 30  # of a GPU that tasks on their way leave free


class TaskTensors(NamedTuple):
    """One parameter of one task, each [rows, width]: float32; the gradient as its pool keeps it.

    What is zero all over may be a single zero, expanded: read it, write to a pool's rows only.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def copy_to_zeros(self, target: TaskTensors) -> None:
        """To tensors that are zero: a fresh task's gradient and moments need not travel."""
        for theirs, mine in zip(target, self, strict=True):
            if not _is_one_zero(mine):
                theirs.copy_(mine)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self)

    def detached_copy(self, with_grad: bool, on_device: bool = False) -> TaskTensors:
        """In host memory, for a GPU's is what pools are made of; ``on_device``: where it is."""
        copy = torch.clone if on_device else _host_copy
        grad = copy(self.grad) if with_grad else no_gradient(self.grad)
        param, exp_avg, exp_avg_sq = (
            copy(tensor) for tensor in (self.param, self.exp_avg, self.exp_avg_sq)
        )
        return TaskTensors(param, grad, exp_avg, exp_avg_sq)


@dataclass
class TaskState:
    """All that training has made of a task, kept in one place: what a checkpoint holds.

    ``step``: optimizer steps applied, as far as results are known. ``step_loss``: the loss of the
    open step so far. ``is_open``: whether gradients of a step that is not closed are accumulated.
    """

    task: TaskSpec
    slot: AdapterSlot
    num_steps: int
    tensors: dict[ParameterKey, TaskTensors]
    step: int = 0
    step_loss: float = 0.0
    is_open: bool = False
    place: tuple[AdapterPool, int] | None = None

    @property
    def num_bytes(self) -> int:
        return sum(tensors.num_bytes for tensors in self.tensors.values())

    def parameters(self) -> dict[str, dict[str, Tensor]]:
        """Site name -> parameter name -> weights [rows, width]."""
        out: dict[str, dict[str, Tensor]] = {}
        for (site_name, name), tensors in self.tensors.items():
            out.setdefault(site_name, {})[name] = tensors.param
        return out


class AdapterPool(Protocol):
    """The adapters of one hTask, a slot each. Its tensors keep their addresses as long as the
    slots' shapes hold; tasks only fill them."""

    @property
    def slots(self) -> tuple[AdapterSlot, ...]: ...

    @property
    def occupants(self) -> list[TaskState | None]: ...

    def put(self, state: TaskState, slot: int) -> None:
        """Copy a task that has no place into a slot that fits; its tensors become the slot's."""
        ...

    def vacate(self, slot: int) -> None:
        """Nobody's from now on; what is in it may stay."""
        ...

    def has_room(self, state: TaskState, slot: int) -> bool:
        """Whether a slot that fits holds all that the task trains: options of a method may ask
        for more than a pool of another kind has."""
        ...


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
    """The pool of the eager pass; see ``AdapterPool``."""

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
        self.copied: TaskState | None = None
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

    def put(self, state: TaskState, slot: int) -> None:
        for (site_name, name), parameters in self._parameters():
            parameters.set_owned(slot, (site_name, name) in state.tensors)
            for tensor in parameters[:4]:
                tensor[parameters.rows_of(slot)] = 0
        for (site_name, name), old in state.tensors.items():
            parameters = self.sites[site_name].parameters[name]
            new = parameters.task_tensors(slot, old.param.shape[0])
            old.copy_to_zeros(new)
            state.tensors[site_name, name] = new
        self._describe(state, slot, state.task.adapter.dropout)
        self.settings.step_S[slot] = state.step

    def vacate(self, slot: int) -> None:
        self.describe_slot(slot, 0.0, 0.0)
        self.virtual.pop(slot, None)

    def has_room(self, state: TaskState, slot: int) -> bool:
        return True

    def fill_weights(self, state: TaskState, slot: int) -> None:
        """A copy of a task's weights alone, to compute with; the task, ``copied``, stays where it
        is."""
        self.copied = state
        for key, parameters in self._parameters():
            tensors = state.tensors.get(key)
            parameters.set_owned(slot, tensors is not None)
            if tensors is not None:
                start, count = parameters.rows_of(slot).start, tensors.param.shape[0]
                parameters.param_RW[start : start + count].copy_(tensors.param)
        self._describe(state, slot, 0.0)

    def _describe(self, state: TaskState, slot: int, rate: float) -> None:
        adapter = state.task.adapter
        method = adapter_method(adapter.method)
        self.describe_slot(slot, method.scale(adapter), rate)
        if method.place is not Place.LINEAR:
            site_name, name = next(iter(state.tensors))
            first = self.sites[site_name].parameters[name].rows_of(slot).start
            self.virtual[slot] = VirtualTokens(adapter.rank, first, method.place is Place.EMBEDDING)

    def _parameters(self) -> Iterator[tuple[ParameterKey, ParameterPool]]:
        for site_name, site in self.sites.items():
            for name, parameters in site.parameters.items():
                yield (site_name, name), parameters


class PoolKinds(Protocol):
    def other_pool(
        self, slots: tuple[AdapterSlot, ...], members: Mapping[int, TaskState]
    ) -> AdapterPool | None:
        """An empty pool for these slots and those who will be in them, or None where a
        ``SlotPool`` is wanted."""
        ...

    def keep(self, pools: Sequence[AdapterPool]) -> int:
        """What computes with the others of its pools, of which there are some, is let go; bytes
        of the device that this has freed."""
        ...

    def give_back(self) -> None:
        """Pools were let go: their memory is the device's again."""
        ...


class AdapterBank:
    """Makes, places and moves adapter state on one backbone.

    ``grad_dtype``: float64 for deterministic sums on the CPU, else float32. ``kinds``: who makes
    pools of other kinds.
    """

    def __init__(
        self,
        backbone: Backbone,
        grad_dtype: torch.dtype,
        kinds: PoolKinds | None = None,
    ) -> None:
        self.backbone, self.grad_dtype, self._kinds = backbone, grad_dtype, kinds
        self.pools: list[AdapterPool] = []

    def create(self, task: TaskSpec, num_steps: int) -> TaskState:
        """A fresh adapter as PEFT initialises it, drawn per (task seed, module name), so that
        sites may be drawn beside each other: others may be waiting."""
        place = adapter_method(task.adapter.method).place
        sites = self.backbone.sites_of(place, task.adapter.targets)
        with ThreadPoolExecutor(min(_MAX_DRAWERS, os.cpu_count() or 1)) as threads:
            drawn = list(threads.map(lambda site: self._drawn(task, site), sites))
        tensors = {
            (site.name, name): value
            for site, values in zip(sites, drawn, strict=True)
            for name, value in values.items()
        }
        return TaskState(task, adapter_slot(task), num_steps, tensors)

    def _drawn(self, task: TaskSpec, site: LinearSite) -> dict[str, TaskTensors]:
        base = getattr(self.backbone.model.get_submodule(site.name), "base", None)
        values = start_values(task, site, None if base is None else base.weight_OD)
        return {name: self._fresh(value) for name, value in values.items()}

    def arrange(
        self, htasks: Sequence[HTask], states: Mapping[str, TaskState]
    ) -> list[AdapterPool]:
        """Pools for these hTasks with their tasks in them; other tasks leave the bank's pools.

        A pool whose slots' shapes still fit is kept, and so are tasks that stay in their slot.
        Pools that nobody needs are let go before new ones are made, so that the two need not fit
        into the memory together: tasks that move wait on the device as far as there is room beside
        the new pools, or what was let go with the old ones has left some; the others on the host,
        which takes seconds. Raises TaskError when a task does not fit its slot.
        """
        members = [
            {slot: states[task_id] for task_id, slot in htask.slot_of.items() if task_id in states}
            for htask in htasks
        ]
        matched = [
            pool if pool is not None and _all_have_room(pool, own) else None
            for pool, own in zip(_match_pools(htasks, self.pools), members, strict=True)
        ]
        stay = {
            task_id: (pool, slot)
            for htask, pool in zip(htasks, matched, strict=True)
            for task_id, slot in htask.slot_of.items()
            if task_id in states and pool is not None
        }
        kept = [pool for pool in matched if pool is not None]
        loses = self._kinds is not None and len(kept) < len(self.pools)
        moving = {task_id for htask in htasks for task_id in htask.slot_of}
        leaving = [
            state
            for pool in self.pools
            for state in pool.occupants
            if state is not None and not _is_at(state, stay.get(state.task.task_id))
        ]
        room_bytes = self._kinds.keep(kept) if loses and self._kinds is not None else 0
        if any(state.task.task_id in moving for state in leaving):
            new = [states[key] for key in moving if key in states] if loses else []
            room_bytes = max(room_bytes, self._spare_bytes(new))
        waited = False
        for state in leaving:
            on_device = state.task.task_id in moving and state.num_bytes <= room_bytes
            room_bytes -= state.num_bytes if on_device else 0
            waited |= on_device
            take_out(state, on_device)
        del leaving
        self.pools = kept
        if loses and self._kinds is not None:
            self._kinds.give_back()
        pools: list[AdapterPool] = []
        for htask, pool, own in zip(htasks, matched, members, strict=True):
            pools.append(pool or self._new_pool(htask.shapes[0].slots, own))
            for task_id, slot in htask.slot_of.items():
                if task_id in states and not _is_at(states[task_id], (pools[-1], slot)):
                    _put_in(states[task_id], pools[-1], slot)
        self.pools = pools
        if waited and self._kinds is not None:
            self._kinds.give_back()  # what tasks waited in: graphs would find less than there is
        return pools

    def _spare_bytes(self, states: Iterable[TaskState]) -> int:
        """Free on the device even when there are new pools for these tasks."""
        new_bytes = sum(state.num_bytes for state in states)
        return max(0, free_bytes(self.backbone.device) - new_bytes - _SPARE_BYTES)

    def _fresh(self, value: Tensor) -> TaskTensors:
        param = value.to("cpu", torch.float32)
        nothing = no_gradient(param)
        return TaskTensors(param, nothing.to(self.grad_dtype), nothing, nothing)

    def _new_pool(
        self, slots: tuple[AdapterSlot, ...], members: Mapping[int, TaskState]
    ) -> AdapterPool:
        other = None if self._kinds is None else self._kinds.other_pool(slots, members)
        return other if other is not None else self.slot_pool(slots)

    def slot_pool(self, slots: tuple[AdapterSlot, ...], trains: bool = True) -> SlotPool:
        """An empty pool of the eager kind, beside those that the bank keeps; without gradients
        and moments unless it ``trains``."""
        device, count = self.backbone.device, len(slots)
        used = [self._sites_of(slot) for slot in slots]
        sites = {}
        for name in dict.fromkeys(
            [*self.backbone.sites, *(name for each in used for name in each)]
        ):
            users = [name in each for each in used]
            if any(users):
                site = next(each[name] for each in used if name in each)
                sites[name] = self._site_pool(site, slots, users, trains)

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
        self,
        site: LinearSite,
        slots: Sequence[AdapterSlot],
        users: Sequence[bool],
        trains: bool,
    ) -> SitePool:
        used = [slot for slot, uses in zip(slots, users, strict=True) if uses]
        shapes = [
            adapter_method(slot.method).shapes(slot, site) if uses else {}
            for slot, uses in zip(slots, users, strict=True)
        ]
        widths = {name: width for shape in shapes for name, (_, width) in shape.items()}
        parameters = {
            name: self._parameter_pool(
                tuple(shape.get(name, (0, 0))[0] for shape in shapes), width, trains
            )
            for name, width in widths.items()
        }
        names = sorted({slot.method for slot in used})
        return SitePool(SiteMethods(adapter_method(name) for name in names), parameters)

    def _parameter_pool(
        self, slot_rows: tuple[int, ...], width: int, trains: bool
    ) -> ParameterPool:
        shape, device = (sum(slot_rows), width), self.backbone.device
        starts = [sum(slot_rows[:slot]) for slot in range(len(slot_rows))]
        trained = shape if trains else (0, width)
        return ParameterPool(
            torch.zeros(shape, device=device),
            torch.zeros(trained, device=device, dtype=self.grad_dtype),
            torch.zeros(trained, device=device),
            torch.zeros(trained, device=device),
            slot_rows,
            tuple(slice(a, a + n) for a, n in zip(starts, slot_rows, strict=True)),
            [False] * len(slot_rows),
            torch.full((len(slot_rows) + 1,), shape[0], dtype=torch.int64, device=device),
        )


def _put_in(state: TaskState, pool: AdapterPool, slot: int) -> None:
    _check_fit(state, pool.slots[slot], slot)
    pool.put(state, slot)
    pool.occupants[slot] = state
    state.place = (pool, slot)


def take_out(state: TaskState, on_device: bool = False) -> None:
    """Give a task storage of its own, in host memory or where it is, and free its slot. One
    without a place comes to the host at most."""
    if state.place is None:
        state.tensors = {
            key: TaskTensors(*map(_on_host, four)) for key, four in state.tensors.items()
        }
        return
    # In a pool of another kind, what is left of a step that is closed is not cleared.
    with_grad = state.is_open or isinstance(state.place[0], SlotPool)
    state.tensors = {
        key: tensors.detached_copy(with_grad, on_device) for key, tensors in state.tensors.items()
    }
    _vacate(state)


def drop(state: TaskState) -> None:
    """Free a task's slot and its memory: nobody wants it any more."""
    state.tensors.clear()
    _vacate(state)


def no_gradient(like: Tensor) -> Tensor:
    """Zeros in host memory of a tensor's shape and dtype that take none."""
    return torch.zeros(1, dtype=like.dtype).expand(like.shape)


def _is_one_zero(tensor: Tensor) -> bool:
    """Expanded; see ``TaskTensors``."""
    return tensor.numel() > 1 and not any(tensor.stride())


def _on_host(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "cpu" else tensor.cpu()


def _host_copy(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.cpu().contiguous()


def _vacate(state: TaskState) -> None:
    if state.place is not None:
        pool, slot = state.place
        pool.vacate(slot)
        pool.occupants[slot] = None
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


def _is_at(state: TaskState, place: tuple[AdapterPool, int] | None) -> bool:
    if state.place is None or place is None:
        return state.place is place
    return state.place[0] is place[0] and state.place[1] == place[1]


def _match_pools(htasks: Sequence[HTask], pools: Sequence[AdapterPool]) -> list[AdapterPool | None]:
    """For each hTask a pool with the same slots, each pool once; the one that already holds most
    of its tasks in their slots comes first."""
    free = list(pools)
    matched: list[AdapterPool | None] = []
    for htask in htasks:
        fitting = [pool for pool in free if pool.slots == htask.shapes[0].slots]
        best = max(fitting, key=lambda pool: _num_staying(htask, pool), default=None)
        if best is not None:
            free = [pool for pool in free if pool is not best]
        matched.append(best)
    return matched


def _num_staying(htask: HTask, pool: AdapterPool) -> int:
    return sum(
        state is not None and htask.slot_of.get(state.task.task_id) == slot
        for slot, state in enumerate(pool.occupants)
    )


def _all_have_room(pool: AdapterPool, members: Mapping[int, TaskState]) -> bool:
    return all(pool.has_room(state, slot) for slot, state in members.items())


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
    "AdapterPool",
    "ParameterPool",
    "SitePool",
    "SlotPool",
    "TaskState",
    "TaskTensors",
    "adapter_slot",
    "drop",
    "grad_dtype_for",
    "no_gradient",
    "start_values",
    "take_out",
]
