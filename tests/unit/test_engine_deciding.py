"""The Decider on hand-made events: pressure, superseded news, repeated news."""

from __future__ import annotations

from typing import Any

import pytest

from muxtune.deciding import Decider, Decision, EngineOptions
from muxtune.registry import CLUSTER_POLICIES
from muxtune.types import (
    DriftData,
    Event,
    EventKind,
    PressureData,
    ProgressData,
    ResultData,
    TaskReadyData,
    TaskState,
)
from tests.sim.fakes import GB, SUMMARY, FakePlanner, instance, seconds, task


def started(num_tasks: int, memory_gb: int = 8, priorities: tuple[int, ...] = ()) -> Decider:
    """One instance with tasks t0, t1, ... of one GB each, placed at times 0, 1, ... seconds."""
    policy = CLUSTER_POLICIES.get("fifo_shared")()
    decider = Decider(policy, FakePlanner(), EngineOptions())
    decider.begin([instance(memory_gb=memory_gb)])
    tell(decider, 0, EventKind.INSTANCE_READY)
    for index in range(num_tasks):
        priority = priorities[index] if priorities else 0
        spec = task(f"t{index}", 10, arrival_s=index, priority=priority)
        now_ns = spec.arrival_ns
        decider.decide(now_ns, [Event(now_ns, EventKind.TASK_ARRIVED, spec.task_id, data=spec)])
        ready = Event(now_ns, EventKind.TASK_READY, spec.task_id, data=TaskReadyData(10, SUMMARY))
        decider.decide(now_ns, [ready])
    return decider


def tell(
    decider: Decider,
    time_s: float,
    kind: EventKind,
    data: Any = None,
    epoch: int | None = None,
    task_id: str = "",
) -> Decision:
    record = decider.fleet.records["i0"]
    epoch = record.epoch if epoch is None else epoch
    event = Event(seconds(time_s), kind, task_id, "i0", epoch, data)
    return decider.decide(event.time_ns, [event])


def test_pressure_lowers_the_limit_and_sheds_the_youngest_task():
    decider = started(4)
    decision = tell(decider, 5, EventKind.MEMORY_PRESSURE, PressureData(10 * GB, 8 * GB))
    # Predicted 4 GB used 10 of 8 GB, so 4 * 0.8 less 2% should fit: 3.136 GB, 39% of 8 GB.
    assert decider.fleet.records["i0"].memory_limit_bytes == 8 * GB * 39 // 100
    (plan,) = decision.batch.plans
    assert plan.task_ids == ("t0", "t1", "t2") and plan.drains == {"t3"}
    assert [refusal.needed_bytes for refusal in decision.batch.refusals] == [4 * GB]
    assert decider.fleet.tasks["t3"].state is TaskState.PLACED, "until the executor let it go"
    tell(decider, 6, EventKind.TASK_RELEASED, 2, task_id="t3")
    waiting = decider.fleet.tasks["t3"]
    assert waiting.state is TaskState.QUEUED and waiting.ready_view.steps_done == 2


def test_pressure_sheds_the_least_urgent_first():
    decider = started(4, priorities=(1, 0, 1, 2))
    tell(decider, 5, EventKind.MEMORY_PRESSURE, PressureData(10 * GB, 8 * GB))
    assert decider.fleet.records["i0"].shed == {"t1"}


def test_pressure_of_a_superseded_epoch_is_not_acted_on():
    decider = started(4)
    old = decider.fleet.records["i0"].epoch - 1
    news = PressureData(10 * GB, 8 * GB)
    decision = tell(decider, 5, EventKind.MEMORY_PRESSURE, news, epoch=old)
    assert decision.batch.plans == ()
    assert decider.fleet.records["i0"].memory_limit_bytes == 8 * GB


def test_the_limit_is_whole_again_once_the_instance_is_empty():
    decider = started(2)
    tell(decider, 5, EventKind.MEMORY_PRESSURE, PressureData(9 * GB, 8 * GB))
    assert decider.fleet.records["i0"].memory_limit_bytes < 8 * GB
    for task_id in ("t0", "t1"):
        tell(decider, 6, EventKind.TASK_DONE, ResultData(10, 1), task_id=task_id)
    assert decider.fleet.records["i0"].memory_limit_bytes == 8 * GB
    assert decider.fleet.instances["i0"].memory_limit_bytes == 8 * GB


def test_progress_of_a_superseded_epoch_tells_steps_but_no_drift():
    decider = started(2)
    data = ProgressData(10, seconds(100), 1, 1, {"t0": 7})
    old = decider.fleet.records["i0"].epoch - 1
    decision = tell(decider, 50, EventKind.PROGRESS, data, epoch=old)
    assert not decision.raised and decision.batch.plans == ()
    assert decider.fleet.tasks["t0"].ready_view.steps_done == 7


def test_drift_is_quantised_and_not_raised_twice():
    decider = started(2)
    data = ProgressData(10, seconds(13.1), 1, 1, {})
    decision = tell(decider, 50, EventKind.PROGRESS, data)
    (event,) = decision.raised
    assert event.kind is EventKind.DRIFT and isinstance(event.data, DriftData)
    assert event.data.measured_s == pytest.approx(1.31) and event.data.predicted.value == 1.0
    assert event.data.time_percent == 130
    assert decider.fleet.instances["i0"].corrections.time_percent == 130
    (plan,) = decision.batch.plans
    assert plan.predicted.round_time_s.value == pytest.approx(1.3)
    again = tell(decider, 70, EventKind.PROGRESS, data)
    assert not again.raised and again.batch.plans == ()


def test_news_of_a_task_that_has_ended_changes_nothing():
    decider = started(2)
    first = tell(decider, 5, EventKind.TASK_DONE, ResultData(10, 1), task_id="t0")
    again = tell(decider, 6, EventKind.TASK_DONE, ResultData(10, 1), task_id="t0")
    assert len(first.outcomes) == 1 and not again.outcomes
    assert again.batch.plans == () and not again.commands
    assert len(again.batch.events) == 1, "it is journalled all the same"


def test_views_are_rebuilt_only_on_change():
    decider = started(2)
    view = decider.fleet.instances["i0"]
    tell(decider, 5, EventKind.WAKE)
    assert decider.fleet.instances["i0"] is view
    tell(decider, 6, EventKind.TASK_DONE, ResultData(10, 1), task_id="t0")
    changed = decider.fleet.instances["i0"]
    assert changed is not view and [item.task_id for item in changed.tasks] == ["t1"]
