"""Adapter state in pools: what moves, moves bit for bit; what fits, stays where it is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import cast

import pytest
import torch

from muxtune.errors import TaskError
from muxtune.runtime import bank as bank_module
from muxtune.runtime.backbone import BackboneStore
from muxtune.runtime.bank import (
    _SPARE_BYTES,
    AdapterBank,
    AdapterPool,
    SlotPool,
    TaskState,
    TaskTensors,
    grad_dtype_for,
    take_out,
)
from muxtune.types import AdapterSlot, HTask
from tests.runtime.runtime_helpers import make_htask, make_task

TASKS = [
    make_task("x", rank=4),
    make_task("y", rank=2, targets=("down_proj", "q_proj")),
    make_task("z", rank=3, targets=("all-linear",)),
]


def arrange(bank: AdapterBank, htasks: list[HTask], states: dict[str, TaskState]) -> list[SlotPool]:
    pools = bank.arrange(htasks, states)
    assert all(isinstance(pool, SlotPool) for pool in pools)
    return cast(list[SlotPool], pools)


def fill(states: dict[str, TaskState]) -> dict[str, dict[tuple[str, str], TaskTensors]]:
    """Draws all four matrices of every parameter; copies of them."""
    generator = torch.Generator().manual_seed(0)
    copies = {}
    for task_id, state in states.items():
        for key, tensors in state.tensors.items():
            drawn = (torch.randn(t.shape, generator=generator).to(t.dtype) for t in tensors)
            state.tensors[key] = TaskTensors(*drawn)
        copies[task_id] = {
            key: values.detached_copy(with_grad=True) for key, values in state.tensors.items()
        }
    return copies


class Kinds:
    """Says how much of the device is free after each change."""

    def __init__(self, room_bytes: int) -> None:
        self.room_bytes, self.given_back = room_bytes, 0
        self.told: list[int] = []

    def other_pool(self, slots: object, members: object) -> None:
        return None

    def keep(self, pools: Sequence[AdapterPool]) -> int:
        self.told.append(len(pools))
        return self.room_bytes

    def give_back(self) -> None:
        self.given_back += 1


@pytest.mark.parametrize("room_bytes", [0, 60_000, 1 << 30])
def test_every_arrangement_keeps_every_bit(store: BackboneStore, room_bytes: int) -> None:
    """Whether tasks wait on the device or on the host, or some here and some there."""
    kinds = Kinds(room_bytes)
    bank = AdapterBank(store.get("tiny"), torch.float64, kinds)
    states = {task.task_id: bank.create(task, 4) for task in TASKS}
    copies = fill(states)
    for order in permutations(TASKS):
        for cut in (1, 2, 3):
            groups = [group for group in (order[:cut], order[cut:]) if group]
            pools = arrange(bank, [make_htask(group) for group in groups], states)
            for pool, group in zip(pools, groups, strict=True):
                for slot, task in enumerate(group):
                    assert states[task.task_id].place == (pool, slot)
                    assert pool.scales[slot] == task.adapter.alpha / task.adapter.rank
    arrange(bank, [], states)
    assert kinds.given_back > 6
    for task_id, state in states.items():
        assert state.place is None
        for key, values in state.tensors.items():
            assert all(map(torch.equal, values, copies[task_id][key]))


def test_tasks_wait_on_the_device_as_far_as_there_is_room(
    store: BackboneStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only those that move within the bank: one that leaves may be away for long."""
    stayed: list[int] = []
    clone = TaskTensors.detached_copy

    def noted(self: TaskTensors, with_grad: bool, on_device: bool = False) -> TaskTensors:
        stayed.append(self.num_bytes if on_device else 0)
        return clone(self, with_grad, on_device)

    monkeypatch.setattr(TaskTensors, "detached_copy", noted)
    kinds = Kinds(1 << 30)
    bank = AdapterBank(store.get("tiny"), torch.float64, kinds)
    states = {task.task_id: bank.create(task, 4) for task in TASKS}
    arrange(bank, [make_htask(TASKS)], states)
    sizes = {task_id: state.num_bytes for task_id, state in states.items()}
    for room, wanted in ((1 << 30, sizes["x"] + sizes["y"]), (sizes["x"], sizes["x"]), (0, 0)):
        kinds.room_bytes = room
        stayed.clear()
        arrange(bank, [make_htask(TASKS[:2])], states)
        assert sum(stayed) == wanted
        arrange(bank, [make_htask(TASKS)], states)


@pytest.mark.parametrize(("spare_bytes", "stay"), [(1 << 20, 2), (1, 0)])
def test_tasks_wait_on_the_device_where_it_is_free_beside_the_new_pools(
    store: BackboneStore, monkeypatch: pytest.MonkeyPatch, spare_bytes: int, stay: int
) -> None:
    """Whatever was let go with the old pools, which may be less than a large adapter."""
    stayed: list[bool] = []
    clone = TaskTensors.detached_copy

    def noted(self: TaskTensors, with_grad: bool, on_device: bool = False) -> TaskTensors:
        stayed.append(on_device)
        return clone(self, with_grad, on_device)

    bank = AdapterBank(store.get("tiny"), torch.float64, Kinds(0))
    states = {task.task_id: bank.create(task, 4) for task in TASKS}
    arrange(bank, [make_htask(TASKS)], states)
    needed = sum(states[task.task_id].num_bytes for task in TASKS[:2])
    monkeypatch.setattr(TaskTensors, "detached_copy", noted)
    monkeypatch.setattr(bank_module, "free_bytes", lambda _: needed + _SPARE_BYTES + spare_bytes)
    arrange(bank, [make_htask(TASKS[:2])], states)
    moved = len(states["x"].tensors), len(states["y"].tensors)
    assert sum(stayed) == sum(moved[:stay])


def test_a_placed_tasks_tensors_are_the_pools_own_rows(store: BackboneStore) -> None:
    bank = AdapterBank(store.get("tiny"), torch.float64)
    states = {task.task_id: bank.create(task, 4) for task in TASKS}
    (pool,) = arrange(bank, [make_htask(TASKS)], states)
    site = "model.layers.0.self_attn.q_proj"
    parameters = pool.sites[site].parameters["lora_A"]
    assert parameters.slot_rows == (4, 2, 3)
    states["y"].tensors[site, "lora_A"].param.fill_(7.0)
    assert torch.equal(parameters.param_RW[4:6], torch.full((2, 64), 7.0))
    assert pool.sites["model.layers.0.self_attn.k_proj"].parameters["lora_A"].slot_rows == (0, 0, 3)


def test_a_pool_whose_slots_fit_is_kept_with_its_addresses(store: BackboneStore) -> None:
    same = [make_task(name, rank=4) for name in ("p", "q", "r")]
    bank = AdapterBank(store.get("tiny"), torch.float32)
    states = {task.task_id: bank.create(task, 4) for task in same}
    copies = fill(states)
    (first,) = arrange(bank, [make_htask(same[:2])], states)
    (second,) = arrange(bank, [make_htask([same[2], same[1]])], states)
    assert second is first
    assert [state.task.task_id for state in first.occupants if state] == ["r", "q"]
    for task in same:
        tensors = states[task.task_id].tensors
        for key, values in tensors.items():
            assert all(map(torch.equal, values, copies[task.task_id][key]))
    (swapped,) = arrange(bank, [make_htask([same[1], same[2]])], states)
    assert swapped is first
    for key, values in states["q"].tensors.items():
        assert all(map(torch.equal, values, copies["q"][key]))


def test_what_a_slot_held_before_is_gone(store: BackboneStore) -> None:
    slots = [AdapterSlot("lora", 8, ("all-linear",))]
    bank = AdapterBank(store.get("tiny"), torch.float32)
    big, small = make_task("big", rank=8, targets=("all-linear",)), TASKS[1]
    wide = AdapterSlot("lora", 8, (*store.get("tiny").target_names, "all-linear"))
    states = {task.task_id: bank.create(task, 4) for task in (big, small)}
    fill(states)
    (pool,) = arrange(bank, [make_htask([big], slots=[wide])], states)
    (again,) = arrange(bank, [make_htask([small], slots=[wide])], states)
    assert again is pool and slots
    for (site, name), values in states["small" if "small" in states else "y"].tensors.items():
        parameters = pool.sites[site].parameters[name]
        assert torch.equal(parameters.param_RW[:2], values.param)
        assert not parameters.param_RW[2:].any()
        assert not parameters.exp_avg_sq_RW[2:].any()
    untouched = pool.sites["model.layers.0.self_attn.k_proj"].parameters["lora_B"]
    assert not untouched.param_RW.any()


@pytest.mark.parametrize(
    "slot",
    [AdapterSlot("lora", 3, ("q_proj", "v_proj")), AdapterSlot("lora", 4, ("q_proj",))],
)
def test_a_slot_that_is_too_small_is_refused(store: BackboneStore, slot: AdapterSlot) -> None:
    bank = AdapterBank(store.get("tiny"), torch.float32)
    states = {"x": bank.create(TASKS[0], 4)}
    with pytest.raises(TaskError, match=r"'x'.*does not fit slot 0.*at least its rank"):
        arrange(bank, [make_htask([TASKS[0]], slots=[slot])], states)


def test_taking_out_twice_is_harmless(store: BackboneStore) -> None:
    bank = AdapterBank(store.get("tiny"), torch.float32)
    states = {"x": bank.create(TASKS[0], 4)}
    arrange(bank, [make_htask([TASKS[0]])], states)
    take_out(states["x"])
    take_out(states["x"])
    assert states["x"].place is None


def test_only_the_cpu_sums_in_float64() -> None:
    assert grad_dtype_for(torch.device("cpu"), True) is torch.float64
    assert grad_dtype_for(torch.device("cpu"), False) is torch.float32
    assert grad_dtype_for(torch.device("cuda"), True) is torch.float32


def test_whoever_makes_pools_is_told_only_when_some_are_let_go(store: BackboneStore) -> None:
    """Freeing what a GPU's allocator keeps takes time, and a plan often keeps every pool."""

    bank = AdapterBank(store.get("tiny"), torch.float64, kinds := Kinds(0))
    states = {task.task_id: bank.create(task, 4) for task in TASKS}
    together = [make_htask(TASKS)]
    for htasks in (together, together, [make_htask(TASKS[:2])], [make_htask(TASKS[:2])], []):
        bank.arrange(htasks, states)
    assert kinds.told == [0, 0] and kinds.given_back == 2


def test_what_tasks_waited_in_on_the_device_is_given_back_too(store: BackboneStore) -> None:
    """Else the next graphs find it taken, which looks as if memory were short."""
    bank = AdapterBank(store.get("tiny"), torch.float64, kinds := Kinds(1 << 30))
    states = {task.task_id: bank.create(task, 4) for task in TASKS}
    bank.arrange([make_htask(TASKS)], states)
    assert kinds.given_back == 0
    bank.arrange([make_htask(TASKS[:2])], states)
    assert kinds.given_back == 2


def test_tasks_that_change_slots_of_a_kept_pool_wait_on_the_device_too(
    store: BackboneStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its neighbour has left, and somebody else comes: no pool is let go, and there is room."""
    same = [make_task(name, rank=4) for name in ("p", "q", "r")]
    stayed: list[bool] = []
    clone = TaskTensors.detached_copy

    def noted(self: TaskTensors, with_grad: bool, on_device: bool = False) -> TaskTensors:
        stayed.append(on_device)
        return clone(self, with_grad, on_device)

    bank = AdapterBank(store.get("tiny"), torch.float32, kinds := Kinds(0))
    states = {task.task_id: bank.create(task, 4) for task in same}
    copies = fill(states)
    (first,) = arrange(bank, [make_htask(same[:2])], states)
    monkeypatch.setattr(TaskTensors, "detached_copy", noted)
    monkeypatch.setattr(bank_module, "free_bytes", lambda _: 1 << 40)
    (second,) = arrange(bank, [make_htask(same[1:])], states)
    assert second is first and not kinds.told
    assert stayed.count(True) == len(states["q"].tensors)
    for key, values in states["q"].tensors.items():
        assert all(map(torch.equal, values, copies["q"][key]))
