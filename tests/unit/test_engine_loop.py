"""The engine's loop on the simulated executor with stand-ins for cost and planner."""

from __future__ import annotations

from typing import Any

import pytest

from muxtune.engine import EngineOptions
from muxtune.errors import ConfigError, MuxTuneError
from muxtune.registry import CLUSTER_POLICIES
from muxtune.types import (
    AdapterSpec,
    Drain,
    Event,
    EventKind,
    Place,
    Plan,
    Refusal,
    StartInstance,
    StopInstance,
    TaskState,
    WakeAt,
)
from muxtune_sim import SimOptions
from tests.sim.fakes import GB, FakePlanner, Run, instance, seconds, task


def shared(**options: Any) -> Any:
    return CLUSTER_POLICIES.get("fifo_shared")(**options)


class Script:
    """A policy that answers the n-th event of a kind by what the test wrote down."""

    def __init__(self, answers: dict[EventKind, Any]) -> None:
        self.answers, self.seen = answers, []

    def on_event(self, event: Event, fleet: Any) -> list[Any]:
        self.seen.append(event)
        answer = self.answers.get(event.kind)
        return list(answer(event, fleet)) if answer else []


def place_on(instance_id: str) -> Any:
    return lambda event, fleet: [Place(event.task_id, instance_id)]


def test_a_task_runs_and_is_told():
    run = Run(shared(), [task("a", steps=10, batch_size=2, tenant="acme")], [instance()])
    totals = run.run()
    outcome = run.told.by_id()["a"]
    assert (totals.num_done, totals.end_ns) == (1, seconds(20))
    assert outcome.state is TaskState.DONE
    assert (outcome.tenant, outcome.steps, outcome.instance_id) == ("acme", 10, "i0")
    assert outcome.effective_tokens == 10 * 2 * 64
    assert outcome.solo_time_s == pytest.approx(20.0)
    assert (outcome.ready_ns, outcome.placed_ns, outcome.first_start_ns) == (0, 0, 0)


def test_a_plan_takes_over_at_a_round_boundary():
    run = Run(shared(), [task("a", 10), task("b", 5, arrival_s=2.5)], [instance()])
    run.run()
    applied = run.told.events(EventKind.PLAN_APPLIED)
    assert [event.time_ns for event in applied[:2]] == [0, seconds(3)]
    assert run.told.by_id()["b"].first_start_ns == seconds(3)
    assert run.ended_s == {"b": 8.0, "a": 10.0}


def test_an_arrival_at_the_instant_of_a_finish_is_one_batch():
    run = Run(shared(), [task("a", 4), task("b", 3, arrival_s=4.0)], [instance()])
    run.run()
    batch = next(batch for batch in run.journal.batches if batch.time_ns == seconds(4))
    kinds = [event.kind for event in batch.events]
    arrived = [EventKind.TASK_ARRIVED, EventKind.TASK_READY]
    assert kinds == [EventKind.PROGRESS, EventKind.TASK_DONE, *arrived]
    assert run.ended_s == {"a": 4.0, "b": 7.0}


def test_events_of_one_instant_are_one_batch():
    run = Run(shared(), [task("a", 6), task("b", 6), task("c", 6)], [instance()])
    run.run()
    last = run.journal.batches[-1]
    done = [event.task_id for event in last.events if event.kind is EventKind.TASK_DONE]
    assert done == ["a", "b", "c"]
    arrivals = [b for b in run.journal.batches if any(e.kind == 41 for e in b.events)]
    assert len(arrivals) == 1


def test_the_last_task_leaves_an_empty_plan_of_the_next_epoch():
    run = Run(shared(), [task("a", 2), task("b", 2, arrival_s=5)], [instance()])
    run.run()
    assert [(plan.epoch, plan.task_ids) for plan in run.told.plans] == [
        (0, ("a",)),
        (1, ()),
        (2, ("b",)),
        (3, ()),
    ]


def test_a_refused_placement_is_undone_and_told():
    tasks = [task("a", 4), task("b", 4, adapter=AdapterSpec(rank=64))]
    run = Run(shared(), tasks, [instance(memory_gb=8)], FakePlanner({64: 8}))
    totals = run.run()
    assert totals.num_placements_refused == 1
    refusal = next(r for batch in run.journal.batches for r in batch.refusals)
    assert (refusal.needed_bytes, refusal.available_bytes) == (9 * GB, 8 * GB)
    assert refusal.task_ids == ("a", "b")
    assert run.ended_s == {"a": 4.0, "b": 8.0}
    assert run.told.by_id()["b"].placed_ns == seconds(4)


def test_a_task_that_never_fits_is_refused_with_bytes():
    tasks = [task("a", 4), task("big", 4, adapter=AdapterSpec(rank=64)), task("c", 4)]
    run = Run(shared(), tasks, [instance(memory_gb=8)], FakePlanner({64: 20}))
    totals = run.run()
    outcome = run.told.by_id()["big"]
    assert totals.num_refused == 1 and totals.num_done == 2
    assert outcome.state is TaskState.REFUSED
    assert "20,000,000,000 bytes" in outcome.message and "8,000,000,000" in outcome.message
    assert "buy memory" in outcome.message


def test_one_refusal_among_several_placements_keeps_the_others():
    tasks = [task(name, 4) for name in "abc"] + [task("d", 4, adapter=AdapterSpec(rank=64))]
    run = Run(shared(), tasks, [instance(memory_gb=8)], FakePlanner({64: 7}))
    run.run()
    assert run.told.plans[0].task_ids == ("a", "b", "c")
    assert run.ended_s["d"] == 8.0


def test_a_policy_that_ignores_refusals_is_named():
    stubborn = Script(
        {
            EventKind.TASK_READY: place_on("i0"),
            EventKind.PLACEMENT_REFUSED: place_on("i0"),
        }
    )
    run = Run(stubborn, [task("a")], [instance(memory_gb=1)], FakePlanner({16: 2}))
    with pytest.raises(ConfigError, match="cluster_policy: it placed task 'a'"):
        run.run()


def test_cancelling_a_running_task_at_the_end_of_its_round():
    tasks = [task("a", 100, cancel_ns=seconds(2.5)), task("b", 10)]
    run = Run(shared(), tasks, [instance()])
    totals = run.run()
    outcome = run.told.by_id()["a"]
    assert (outcome.state, outcome.ended_ns, outcome.steps) == (
        TaskState.CANCELLED,
        seconds(3),
        3,
    )
    assert run.ended_s["b"] == 10.0 and totals.num_cancelled == 1


def test_cancelling_a_queued_task():
    tasks = [task("a", 10), task("b", 10, cancel_ns=seconds(2.5))]
    run = Run(shared(max_tasks_per_instance=1), tasks, [instance()])
    run.run()
    outcome = run.told.by_id()["b"]
    assert (outcome.state, outcome.ended_ns, outcome.placed_ns) == (
        TaskState.CANCELLED,
        seconds(2.5),
        None,
    )


def test_cancelling_a_task_that_has_ended_changes_nothing():
    run = Run(shared(), [task("a", 2, cancel_ns=seconds(9)), task("b", 12)], [instance()])
    run.run()
    assert run.told.by_id()["a"].state is TaskState.DONE
    assert run.ended_s == {"a": 2.0, "b": 12.0}


def test_cancelling_before_the_task_is_ready():
    options = SimOptions(prepare_s=5.0)
    run = Run(shared(), [task("a", 2, cancel_ns=seconds(1))], [instance()], options=options)
    run.run()
    assert run.told.by_id()["a"].state is TaskState.CANCELLED
    assert run.ended_s == {"a": 1.0}


def test_a_failing_task_takes_nobody_along():
    options = SimOptions(fail_task_at_ns={"a": seconds(2.2)})
    run = Run(shared(), [task("a", 10), task("b", 10)], [instance()], options=options)
    run.run()
    failed, other = run.told.by_id()["a"], run.told.by_id()["b"]
    assert (failed.state, failed.ended_ns, failed.message) == (
        TaskState.FAILED,
        seconds(3),
        "injected failure",
    )
    assert (other.state, other.ended_ns, other.steps) == (TaskState.DONE, seconds(10), 10)


def test_a_task_with_bad_data_fails_alone():
    run = Run(shared(), [task("bad", 3), task("b", 3)], [instance()])
    run.run()
    failed = run.told.by_id()["bad"]
    assert failed.state is TaskState.FAILED and "Give it other data" in failed.message
    assert run.ended_s["b"] == 3.0


def test_an_instance_that_fails_gives_its_tasks_back():
    options = SimOptions(fail_instance_at_ns={"i0": seconds(4.5)})
    run = Run(shared(), [task("a", 10)], [instance("i0"), instance("i1")], options=options)
    run.run()
    outcome = run.told.by_id()["a"]
    assert (outcome.state, outcome.instance_id) == (TaskState.DONE, "i1")
    assert outcome.ended_ns == seconds(4.5 + 6), "four of ten steps were done before"


def test_a_drained_task_leaves_at_its_step_boundary_and_goes_on_elsewhere():
    state: dict[str, bool] = {}

    def wake(event: Event, fleet: Any) -> list[Any]:
        return [Drain("a")]

    def ready(event: Event, fleet: Any) -> list[Any]:
        return [Place(event.task_id, "i0"), WakeAt(seconds(2.5))] if not state else []

    script = Script(
        {
            EventKind.TASK_READY: ready,
            EventKind.WAKE: wake,
            EventKind.TASK_RELEASED: place_on("i1"),
        }
    )
    tasks = [task("a", 4, batch_size=4)]
    run = Run(script, tasks, [instance("i0"), instance("i1")])
    run.run()
    released = run.told.events(EventKind.TASK_RELEASED)
    assert [(event.time_ns, event.data) for event in released] == [(seconds(4), 1)]
    assert run.told.by_id()["a"].instance_id == "i1"
    assert run.ended_s == {"a": 16.0}, "no step was lost"


def test_a_policy_can_start_and_stop_instances():
    def ready(event: Event, fleet: Any) -> list[Any]:
        return [StartInstance(instance("grown"))]

    def up(event: Event, fleet: Any) -> list[Any]:
        return [Place(task.task_id, event.instance_id) for task in fleet.queue]

    def done(event: Event, fleet: Any) -> list[Any]:
        return [StopInstance(event.instance_id)]

    kinds = EventKind
    script = Script({kinds.TASK_READY: ready, kinds.INSTANCE_READY: up, kinds.TASK_DONE: done})
    run = Run(script, [task("a", 3)], [], options=SimOptions(start_s=60.0))
    run.run()
    assert run.ended_s == {"a": 63.0}


def test_queued_tasks_that_nobody_places_are_an_error():
    run = Run(Script({}), [task("a"), task("b")], [instance()])
    with pytest.raises(MuxTuneError, match="2 tasks wait for ever"):
        run.run()


@pytest.mark.parametrize(
    ("action", "problem"),
    [
        (Place("nobody", "i0"), "is not queued"),
        (Place("a", "nowhere"), "is not ready"),
        (Place("a", "other"), "serves another"),
        (Drain("a"), "is not placed"),
        (StopInstance("nowhere"), "is unknown"),
        (StartInstance(instance("i0")), "exists already"),
        (WakeAt(0), "has passed"),
    ],
)
def test_impossible_actions_name_the_policy(action: Any, problem: str):
    script = Script({EventKind.TASK_READY: lambda event, fleet: [action]})
    run = Run(script, [task("a")], [instance(), instance("other", model="another")])
    with pytest.raises(ConfigError, match=problem):
        run.run()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda plan: plan._replace(epoch=7), "epoch 7"),
        (lambda plan: plan._replace(htasks=()), r"misses \['a'\]"),
        (lambda plan: plan._replace(instance_id="other"), "of 'other'"),
    ],
)
def test_a_plan_that_breaks_the_contract_names_the_planner(change: Any, problem: str):
    class Broken(FakePlanner):
        def plan(self, instance: Any, previous: Plan | None) -> Plan | Refusal:
            return change(super().plan(instance, previous))

    run = Run(shared(), [task("a")], [instance()], Broken())
    with pytest.raises(ConfigError, match=problem):
        run.run()


def test_duplicate_ids_in_a_list_are_found_before_anything_starts():
    with pytest.raises(ConfigError, match="'a' occurs more than once"):
        Run(shared(), [task("a"), task("b"), task("a")], [instance()])


def test_duplicate_ids_in_a_stream_are_found_at_the_pull():
    run = Run(shared(), iter([task("a"), task("b"), task("a")]), [instance()])
    with pytest.raises(ConfigError, match="'a' occurs more than once"):
        run.run()


def test_unsorted_arrivals_are_an_error():
    run = Run(shared(), iter([task("a", arrival_s=2), task("b", arrival_s=1)]), [instance()])
    with pytest.raises(ConfigError, match="'b' arrives before 'a'"):
        run.run()


def test_tasks_are_pulled_lazily():
    pulled = []

    def stream() -> Any:
        for index in range(3):
            pulled.append(index)
            yield task(f"t{index}", 2, arrival_s=10.0 * index)

    run = Run(shared(), stream(), [instance()])
    assert pulled == [0]
    run.run()
    assert pulled == [0, 1, 2]


# ------------------------------------------------------------------------------ drift, pressure


def test_drift_corrects_the_plan_once():
    """Rounds take 1.5 s where the planner expects 1 s: found at the first finish."""
    tasks = [task("a", 4), task("b", 20)]
    run = Run(shared(), tasks, [instance()], FakePlanner(pass_s=1.0), pass_s=1.5)
    totals = run.run()
    assert totals.num_drifts == 1
    corrected = run.told.plans[1]
    assert corrected.task_ids == ("b",)
    assert corrected.predicted.round_time_s.value == pytest.approx(1.5)
    assert run.ended_s == {"a": 6.0, "b": 30.0}


def test_no_drift_within_the_interval_and_the_tolerance():
    tasks = [task("a", 4), task("b", 20)]
    run = Run(shared(), tasks, [instance()], FakePlanner(pass_s=1.0, error=0.1), pass_s=1.19)
    assert run.run().num_drifts == 0


def test_no_drift_from_few_rounds():
    tasks = [task("a", 4), task("b", 20)]
    options = EngineOptions(drift_min_rounds=30)
    planner = FakePlanner(pass_s=1.0)
    run = Run(shared(), tasks, [instance()], planner, pass_s=1.5, engine_options=options)
    assert run.run().num_drifts == 0


@pytest.mark.parametrize(("prepare_s", "ready_s"), [(0.0, 1.0), (5.0, 6.0)])
def test_a_task_is_ready_in_the_batch_of_its_arrival_unless_that_takes_time(prepare_s, ready_s):
    options = SimOptions(prepare_s=prepare_s)
    run = Run(shared(), [task("a", 2, arrival_s=1.0)], [instance()], options=options)
    run.run()
    ready = EventKind.TASK_READY
    (batch,) = [b for b in run.journal.batches if ready in [event.kind for event in b.events]]
    assert batch.time_ns == seconds(ready_s)
    kinds = [event.kind for event in batch.events]
    assert kinds == ([ready] if prepare_s else [EventKind.TASK_ARRIVED, ready])
    assert run.ended_s == {"a": ready_s + 2.0}
