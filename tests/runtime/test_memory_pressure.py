"""The memory monitor: what it measures, when it tells, and that the run ends as it would have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from muxtune.build import CostBook
from muxtune.cluster_policies.fifo_shared import FifoShared
from muxtune.cost.memory import MemoryOptions
from muxtune.engine import Engine, replay
from muxtune.planners.muxtune import MuxTunePlanner
from muxtune.planning.journal import Journal, JournalBatch, read_journal
from muxtune.planning.step_builder import StepBuilder
from muxtune.runtime.backbone import BackboneStore
from muxtune.runtime.captured_runner import CapturedRunner
from muxtune.runtime.memory import MemoryMeter, MemoryMonitor
from muxtune.runtime.options import TorchOptions
from muxtune.runtime.records import StepListener
from muxtune.types import Event, EventKind, InstanceSpec, Plan, PressureData
from tests.runtime.runtime_helpers import (
    TINY,
    Bench,
    DrawnText,
    Keeping,
    make_htask,
    make_plan,
    make_store,
    make_task,
    worst_gap,
)

MB = 1_000_000
LIMIT_BYTES, BALLAST_BYTES = 400 * MB, 700 * MB
# A ledger in which what a plan can change weighs as much as in a real model, because the
# engine's limits are whole percents of an instance's memory, of which the tiny model needs less.
BOOK = CostBook(
    models={"tiny": TINY}, memory=MemoryOptions(4, 8, framework_bytes=0, activation_factor=60)
)
TASKS = [
    make_task(name, num_steps=25, batch_size=6, rank=rank, max_length_tokens=60)
    for name, rank in (("a", 2), ("b", 4), ("c", 8))
]


class ScriptedMeter(MemoryMeter):
    """Says what a test wants."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.recent_bytes = self.now_bytes = self.marks = self.retries = 0

    def mark(self) -> None:
        self.marks += 1

    def recent_peak_bytes(self) -> int:
        return self.recent_bytes

    def current_bytes(self) -> int:
        return self.now_bytes

    def num_retries(self) -> int:
        return self.retries


def test_it_tells_once_an_epoch_and_only_of_what_that_epoch_used() -> None:
    meter = ScriptedMeter()
    monitor = MemoryMonitor(meter, 0.9)
    monitor.begin(0)
    meter.recent_bytes = 2000
    assert monitor.check("i", 0, 1000) is None, "the peak is of the plan before"
    assert meter.marks == 1
    meter.recent_bytes = 900
    assert monitor.check("i", 0, 1000) is None
    meter.recent_bytes = 901
    assert monitor.check("i", 0, 1000) == PressureData(901, 900)
    assert monitor.check("i", 0, 1000) is None
    assert monitor.check("i", 1, 1000) is None
    assert monitor.check("i", 1, 1000) == PressureData(901, 900)
    assert meter.marks == 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_the_process_held_before_does_not_count(device: str) -> None:
    """A GPU's plans come close to its limit: of what else has computed there, little is enough to
    take a plan for too large that does what its ledger says."""
    meter = ScriptedMeter()
    meter.device, meter.now_bytes, meter.retries = torch.device(device), 5000, 3
    monitor = MemoryMonitor(meter, 1.0)
    monitor.begin(weight_bytes=300)
    meter.recent_bytes = 5000
    for _ in range(2):
        assert monitor.check("i", 0, 300) is None
    meter.recent_bytes = 5001
    assert monitor.check("i", 0, 300) == PressureData(301, 300)


def test_an_allocator_that_had_to_free_its_cache_is_pressure() -> None:
    meter = ScriptedMeter()
    monitor = MemoryMonitor(meter, 1.0)
    monitor.begin(0)
    meter.recent_bytes = 10
    assert [monitor.check("i", 0, 100) for _ in range(3)] == [None] * 3
    meter.retries = 1
    assert monitor.check("i", 0, 100) == PressureData(101, 100)


def test_a_share_of_zero_is_off() -> None:
    monitor = MemoryMonitor(MemoryMeter(torch.device("cpu")), 0.0)
    monitor.begin(0)
    assert [monitor.check("i", 0, 1) for _ in range(3)] == [None] * 3


def test_the_meter_sees_a_peak_that_has_passed() -> None:
    meter = MemoryMeter(torch.device("cpu"))
    meter.mark()
    before = meter.recent_peak_bytes()
    np.ones(200 * MB // 8).sum()
    assert meter.recent_peak_bytes() - before > 150 * MB
    whole = meter.peak_bytes()
    meter.mark()
    assert meter.recent_peak_bytes() < before + 100 * MB
    assert meter.peak_bytes() >= whole


class Ballast(StepListener):
    """Takes memory in the middle of a plan, as a leak or a neighbour would, and gives it back when
    the next plan has taken over."""

    def __init__(self, at_step: int) -> None:
        self.at_step, self.steps = at_step, 0
        self.held: np.ndarray | None = None

    def on_step(self, record: object) -> None:
        self.steps += 1
        if self.steps == self.at_step:
            self.held = np.ones(BALLAST_BYTES // 8)

    def on_event(self, event: Event) -> None:
        if event.kind is EventKind.MEMORY_PRESSURE:
            self.held = None


class Telling(Keeping):
    """Hands its events to the ballast too."""

    ballast: Ballast

    def wait(self, until_ns: int) -> list[Event]:
        events = super().wait(until_ns)
        for event in events:
            self.ballast.on_event(event)
        return events


def train(
    store: BackboneStore, folder: Path, at_step: int, step: str = "auto"
) -> tuple[Keeping, tuple[JournalBatch, ...]]:
    ballast = Ballast(at_step)
    options = TorchOptions(folder, evaluate_tokens=0, step=step)
    executor = Telling(StepBuilder(), store, DrawnText(), options, [ballast])
    executor.ballast = ballast
    instance = InstanceSpec("i0", "tiny", "cpu", LIMIT_BYTES)
    folder.mkdir()
    with Journal(folder / "journal.jsonl") as journal:
        totals = Engine(
            FifoShared(), MuxTunePlanner(BOOK), executor, TASKS, [instance], journal
        ).run()
    executor.close()
    assert totals.num_done == len(TASKS)
    return executor, read_journal(folder / "journal.jsonl").batches


def largest_pass_tokens(plan: Plan) -> int:
    shapes = [shape for htask in plan.htasks for shape in htask.shapes]
    return max((shape.padded_tokens for shape in shapes), default=0)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's counters")
def test_pressure_makes_micro_batches_smaller_and_changes_no_adapter(
    store: BackboneStore, tmp_path: Path
) -> None:
    calm, calm_batches = train(store, tmp_path / "calm", at_step=0)
    pressed, batches = train(store, tmp_path / "pressed", at_step=20)
    assert not told(calm_batches)
    (event,) = told(batches)
    assert isinstance(event.data, PressureData)
    assert event.data.used_bytes > BALLAST_BYTES > event.data.limit_bytes
    plans = {plan.epoch: plan for batch in batches for plan in batch.plans}
    assert largest_pass_tokens(plans[event.epoch + 1]) < largest_pass_tokens(plans[event.epoch])
    for task in TASKS:
        gap = worst_gap(pressed.final[task.task_id], calm.final[task.task_id])
        assert gap <= 1e-5, task.task_id
    assert replay(batches, FifoShared(), MuxTunePlanner(BOOK)) == []


@pytest.mark.parametrize("is_pressed", [False, True])
def test_the_plan_that_answers_pressure_shares_no_memory_with_its_predecessor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_pressed: bool
) -> None:
    """Graphs share one memory, as large as the largest of them ever was: a smaller plan would be
    found to need as much, and be followed by a smaller one still."""
    answers = iter([None, PressureData(2, 1)] if is_pressed else [])
    monkeypatch.setattr(MemoryMonitor, "check", lambda *_: next(answers, None))
    bench, task = Bench(tmp_path, make_store(), step="captured"), make_task("a", num_steps=9)
    bench.prepare(task)
    bench.executor.apply(make_plan([make_htask([task])]))
    if is_pressed:
        bench.until(EventKind.MEMORY_PRESSURE)
    else:
        bench.until_step(task, 2)
    instance = bench.executor._instances["i0"]
    (before,) = instance._runners
    bench.executor.apply(make_plan([make_htask([task])], 1))
    bench.until_step(task, 5)
    (after,) = instance._runners
    assert after.pool is before.pool
    assert (after is before) is not is_pressed
    bench.until_ended(task)


def test_a_plan_that_does_not_fit_is_followed_by_a_smaller_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the ledger said: the allocator has the last word, and no task is lost."""
    store, prepare = make_store(), CapturedRunner.prepare
    calm, calm_batches = train(store, tmp_path / "calm", 0, "captured")
    most = max(largest_pass_tokens(plan) for batch in calm_batches for plan in batch.plans) - 1
    refused: list[int] = []

    def full(self: CapturedRunner, *args: Any) -> bool:
        if self.max_rows > most:
            refused.append(self.max_rows)
            raise torch.OutOfMemoryError("tried to allocate")
        return prepare(self, *args)

    monkeypatch.setattr(CapturedRunner, "prepare", full)
    pressed, batches = train(store, tmp_path / "pressed", 0, "captured")
    assert refused and len(told(batches)) == len(refused)
    for event in told(batches):
        plans = {plan.epoch: plan for batch in batches for plan in batch.plans}
        assert largest_pass_tokens(plans[event.epoch]) > most
    for task in TASKS:
        gap = worst_gap(pressed.final[task.task_id], calm.final[task.task_id])
        assert gap <= 1e-4, task.task_id
    assert replay(batches, FifoShared(), MuxTunePlanner(BOOK)) == []


def test_a_task_that_does_not_fit_alone_ends(tmp_path: Path, monkeypatch: Any) -> None:
    def full(self: CapturedRunner, *_: Any) -> bool:
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(CapturedRunner, "prepare", full)
    bench, task = Bench(tmp_path, make_store(), step="captured"), make_task("large")
    bench.prepare(task)
    bench.executor.apply(make_plan([make_htask([task])]))
    bench.until_ended(task)
    (event,) = bench.of(EventKind.TASK_FAILED)
    assert "it does not fit into the memory (OutOfMemoryError: tried" in str(event.data)
    assert not bench.of(EventKind.MEMORY_PRESSURE)


def told(batches: tuple[JournalBatch, ...]) -> list[Event]:
    events = [event for batch in batches for event in batch.events]
    return [event for event in events if event.kind is EventKind.MEMORY_PRESSURE]
