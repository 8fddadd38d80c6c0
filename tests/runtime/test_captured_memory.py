"""What captured hTasks hold, counted in bytes on the CPU: as much as the ledger says, in every
transition between plans, without the help of the garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from muxtune.cost.memory import MemoryModel, memory_options
from muxtune.runtime.backbone import Backbone, BackboneStore
from muxtune.runtime.bank import AdapterBank, TaskState, grad_dtype_for
from muxtune.runtime.captured_runner import (
    MAX_CLOSE_SIZES,
    MAX_SIZES,
    MIN_CLOSE_SIZES,
    CapturedRunner,
    sizes_left,
)
from muxtune.runtime.options import TorchOptions
from muxtune.runtime.pass_runner import PassRunner
from muxtune.runtime.runners import Runners
from muxtune.runtime.static_step.pool import StaticPool
from muxtune.types import HTask, TaskSpec
from tests.runtime.runtime_helpers import TINY, make_htask, make_plan, make_store, make_task

TASKS = [
    make_task(f"t{i}", rank=2 + i % 3, targets=("all-linear",) if i % 2 else ("q_proj", "up_proj"))
    for i in range(32)
]


class Instance:
    """Pools and runners as ``RunningInstance`` makes them; ``held``: bytes of the pools that are
    alive whenever one more was made."""

    def __init__(self, backbone: Backbone, folder: Path) -> None:
        options = TorchOptions(folder, step="captured", deterministic=False)
        self.notices: list[str] = []
        self.kinds = Runners(backbone, options, self.notices.append)
        self.bank = AdapterBank(backbone, grad_dtype_for(backbone.device, False), self.kinds)
        self.states: dict[str, TaskState] = {}
        self.runners: list[PassRunner] = []

    def take_over(self, htasks: Sequence[HTask], tasks: Sequence[TaskSpec]) -> list[PassRunner]:
        for task in tasks:
            if task.task_id not in self.states:
                self.states[task.task_id] = self.bank.create(task, 4)
        self.runners = []
        pools = self.bank.arrange(htasks, self.states)
        self.runners = self.kinds.arrange(htasks, pools)
        assert all(isinstance(item, CapturedRunner) for item in self.runners)
        return self.runners


@pytest.fixture(scope="module")
def store() -> BackboneStore:
    return make_store()


@pytest.fixture
def instance(store: BackboneStore, tmp_path: Path) -> Instance:
    return Instance(store.get("tiny"), tmp_path)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    alive: weakref.WeakSet[StaticPool] = weakref.WeakSet()
    seen: list[int] = []
    make = StaticPool.__init__

    def counted(self: StaticPool, *args: Any) -> None:
        make(self, *args)
        alive.add(self)
        seen.append(sum(pool.adapters.num_bytes for pool in alive))

    monkeypatch.setattr(StaticPool, "__init__", counted)
    gc.disable()
    yield seen
    gc.enable()


def grouped(tasks: Sequence[TaskSpec], count: int, quota: int = 2) -> list[HTask]:
    return [make_htask(tasks[first::count], quota=quota) for first in range(count)]


def trained_bytes(htasks: Sequence[HTask]) -> int:
    """As the ledger of the plan has it."""
    model = MemoryModel(TINY, memory_options(TINY, "gpu"))
    (ledger,) = model.ledgers(make_plan(htasks)).ledgers
    return sum(ledger.items[key] for key in ("adapter_weights", "adapter_gradients",
                                             "optimizer_state"))  # fmt: skip


def test_old_pools_are_gone_before_new_ones_are_made(instance: Instance, held: list[int]) -> None:
    """32 tasks in one hTask, in two, three, five, and in fewer slots: never more than a plan's."""
    for count, tasks in ((1, TASKS), (2, TASKS), (3, TASKS[::-1]), (5, TASKS), (2, TASKS[:9])):
        htasks = grouped(tasks, count)
        held.clear()
        instance.take_over(htasks, tasks)
        assert max(held) == trained_bytes(htasks)
        assert len(held) == count


def test_a_pool_that_stays_counts_once(instance: Instance, held: list[int]) -> None:
    first, second = grouped(TASKS[:8], 2)
    stays = instance.take_over([first, second], TASKS[:8])[1]
    held.clear()
    other = make_htask(TASKS[8:20])
    runners = instance.take_over([other, second], TASKS)
    assert held == [trained_bytes([other, second])]
    assert runners[1].pool is stays.pool


def test_programs_of_plans_before_are_gone(instance: Instance, held: list[int]) -> None:
    """They hold their graphs, which hold the memory that they compute in."""
    before = [weakref.ref(item) for item in instance.take_over(grouped(TASKS, 3), TASKS)]
    instance.take_over(grouped(TASKS, 2), TASKS)
    assert held and not any(ref() for ref in before)


def test_the_largest_pass_is_captured_first_or_all_are_captured_anew(instance: Instance) -> None:
    """All graphs of an instance compute in one memory; it is as large as the largest only then."""
    small, large = make_htask(TASKS[:4], quota=2), make_htask(TASKS[4:8], quota=4)
    (stays,) = instance.take_over([small], TASKS[:8])
    tiny = make_htask(TASKS[8:10], quota=1)
    assert instance.take_over([tiny, small], TASKS)[1] is stays, "its memory holds the new one"
    again = instance.take_over([large, small], TASKS)
    assert again[1] is not stays and again[1].pool is stays.pool
    assert instance.take_over([tiny, large, small], TASKS)[1:] == again
    # The same slots in a larger shape, and nothing else.
    larger = small._replace(shapes=make_htask(TASKS[:4], quota=9).shapes)
    (grown,) = instance.take_over([larger], TASKS)
    assert isinstance(grown, CapturedRunner) and grown.pool is stays.pool
    assert instance.kinds._memory_rows == grown.max_rows


def test_many_htasks_have_fewer_sizes_each() -> None:
    assert sizes_left([4]) == sizes_left([4, 4]) == MAX_CLOSE_SIZES
    assert sizes_left([4, 4, 4]) == 4
    assert sizes_left([4] * 9) == MIN_CLOSE_SIZES
    for count in (1, 2, 3, 4):
        assert count * (4 + sizes_left([4] * count)) <= MAX_SIZES
    assert sizes_left([]) == MAX_CLOSE_SIZES
