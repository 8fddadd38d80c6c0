"""The FIFO policies: order, placement, waiting, rejection."""

from __future__ import annotations

from typing import Any

import pytest

from muxtune.errors import ConfigError
from muxtune.registry import CLUSTER_POLICIES
from muxtune.types import AdapterSpec, Event, EventKind, TaskState
from muxtune_sim import SimOptions
from tests.sim.fakes import GB, FakePlanner, Run, instance, seconds, task


def make(name: str, **options: Any) -> Any:
    return CLUSTER_POLICIES.get(name)(**options)


def test_the_policies_are_registered():
    names = CLUSTER_POLICIES.names()
    assert {"fifo_exclusive", "fifo_colocated", "fifo_shared"} <= set(names)


@pytest.mark.parametrize("name", ["fifo_exclusive", "fifo_colocated", "fifo_shared"])
def test_tasks_start_in_order_of_arrival_then_id(name: str):
    tasks = [task("z", 5), task("b", 5, 1.0), task("a", 5, 2.0), task("c", 5, 2.0)]
    options = {"max_tasks_per_instance": 1} if name == "fifo_shared" else {}
    run = Run(make(name, **options), tasks, [instance()])
    run.run()
    assert [outcome.task_id for outcome in run.told.outcomes] == ["z", "b", "a", "c"]
    assert run.ended_s == {"z": 5.0, "b": 10.0, "a": 15.0, "c": 20.0}


def test_priority_counts_only_when_asked_for():
    tasks = [task("first", 5), task("plain", 5, 1.0), task("urgent", 5, 2.0, priority=3)]
    for discipline, order in (("fifo", "plain"), ("priority", "urgent")):
        run = Run(make("fifo_exclusive", discipline=discipline), tasks, [instance()])
        run.run()
        assert run.told.outcomes[1].task_id == order


def test_shared_spreads_over_the_least_loaded():
    tasks = [task(f"t{index}", 5) for index in range(5)]
    run = Run(make("fifo_shared"), tasks, [instance("i0"), instance("i1")])
    run.run()
    hosts = {name: outcome.instance_id for name, outcome in run.told.by_id().items()}
    assert hosts == {"t0": "i0", "t1": "i1", "t2": "i0", "t3": "i1", "t4": "i0"}


def test_shared_fills_up_to_its_limit():
    tasks = [task(f"t{index}", 5) for index in range(5)]
    run = Run(make("fifo_shared", max_tasks_per_instance=2), tasks, [instance("i0")])
    run.run()
    assert max(len(plan.task_ids) for plan in run.told.plans) == 2
    assert run.ended_s == {"t0": 5.0, "t1": 5.0, "t2": 10.0, "t3": 10.0, "t4": 15.0}


def test_the_head_of_the_line_is_waited_for():
    """big needs an empty instance; small ones behind it do not overtake."""
    tasks = [task("a", 5), task("big", 5, 1.0, adapter=AdapterSpec(rank=64)), task("c", 5, 2.0)]
    run = Run(make("fifo_shared"), tasks, [instance(memory_gb=8)], FakePlanner({64: 8}))
    run.run()
    assert run.ended_s == {"a": 5.0, "big": 10.0, "c": 15.0}


def test_a_blocked_head_costs_no_planning_until_something_changes():
    tasks = [task("a", 100), task("big", 5, 1.0, adapter=AdapterSpec(rank=64))]
    tasks += [task(f"t{index}", 5, 2.0 + index) for index in range(50)]
    run = Run(make("fifo_shared"), tasks, [instance(memory_gb=8)], FakePlanner({64: 8}))
    totals = run.run()
    assert totals.num_done == 52
    before_100s = [b for b in run.journal.batches if 0 < b.time_ns < seconds(100)]
    asked = [item for batch in before_100s for item in batch.refusals if item.needed_bytes]
    assert len(asked) == 1


def test_a_refused_head_tries_other_instances():
    tasks = [
        task("a", 50, adapter=AdapterSpec(rank=7)),
        task("b1", 50),
        task("b2", 50),
        task("mid", 5, 1.0, adapter=AdapterSpec(rank=5)),
    ]
    instances = [instance("i0", 8), instance("i1", 8)]
    run = Run(make("fifo_shared"), tasks, instances, FakePlanner({7: 7, 5: 5}))
    run.run()
    hosts = {name: outcome.instance_id for name, outcome in run.told.by_id().items()}
    assert hosts["mid"] == "i1" and run.told.by_id()["mid"].placed_ns == seconds(1)


def test_unequal_instances_reject_only_what_none_can_take():
    tasks = [
        task("big", 5, adapter=AdapterSpec(rank=64)),
        task("huge", 5, adapter=AdapterSpec(rank=128)),
        task("c", 5),
    ]
    instances = [instance("i0", 8), instance("i1", 32)]
    run = Run(make("fifo_shared"), tasks, instances, FakePlanner({64: 20, 128: 64}))
    run.run()
    outcomes = run.told.by_id()
    assert (outcomes["big"].state, outcomes["big"].instance_id) == (TaskState.DONE, "i1")
    assert outcomes["huge"].state is TaskState.REFUSED
    assert f"{64 * GB:,} bytes" in outcomes["huge"].message
    assert outcomes["c"].state is TaskState.DONE


def test_a_model_that_nobody_serves_is_rejected_with_a_remedy():
    tasks = [task("a", 5, model="gpt-x"), task("b", 5)]
    run = Run(make("fifo_shared"), tasks, [instance()])
    run.run()
    outcome = run.told.by_id()["a"]
    assert outcome.state is TaskState.REFUSED
    assert "gpt-x" in outcome.message and "add an instance" in outcome.message
    assert run.ended_s["b"] == 5.0


def test_a_model_whose_instance_is_starting_is_waited_for():
    run = Run(make("fifo_shared"), [task("a", 5)], [instance()], options=SimOptions(start_s=30.0))
    run.run()
    assert run.ended_s == {"a": 35.0}


def test_models_have_lines_of_their_own():
    tasks = [task("a", 50), task("b", 50, 1.0), task("x", 5, 2.0, model="n")]
    instances = [instance("i0"), instance("j0", model="n")]
    run = Run(make("fifo_exclusive"), tasks, instances)
    run.run()
    assert run.ended_s == {"x": 7.0, "a": 50.0, "b": 100.0}


def test_colocated_fills_gpus_evenly():
    instances = [
        instance(f"g{gpu}-{copy}", gpu_ids=(f"g{gpu}",)) for gpu in range(2) for copy in range(3)
    ]
    tasks = [task(f"t{index}", 10) for index in range(4)]
    run = Run(make("fifo_colocated"), tasks, instances)
    run.run()
    hosts = [run.told.by_id()[f"t{index}"].instance_id for index in range(4)]
    assert hosts == ["g0-0", "g1-0", "g0-1", "g1-1"]


def test_a_limit_below_one_is_an_error():
    with pytest.raises(ConfigError, match="max_tasks_per_instance"):
        make("fifo_shared", max_tasks_per_instance=0)


class CountingFleet:
    """A full fleet of 64 instances with 10,000 queued tasks; counts what is looked at."""

    def __init__(self) -> None:
        self.looks = 0
        self.queue = range(10_000)
        self.changed: frozenset[str] = frozenset()
        self.starting: dict[str, Any] = {}
        self.waiting_models = ("m",)

    def least_loaded(self, model: str) -> Any:
        for index in range(64):
            self.looks += 1
            yield f"i{index}"

    def load(self, instance_id: str) -> int:
        self.looks += 1
        return 16

    def waiting(self, model: str, discipline: Any = None) -> Any:
        for _ in self.queue:
            self.looks += 1
            yield None


@pytest.mark.parametrize("name", ["fifo_shared", "fifo_exclusive"])
def test_an_event_on_a_full_fleet_looks_at_little(name: str):
    fleet: Any = CountingFleet()
    assert make(name).on_event(Event(0, EventKind.TASK_READY, "t"), fleet) == []
    assert fleet.looks <= 4
