"""The simulated executor itself: the protocol, contention, what it charges, what it counts."""

from __future__ import annotations

from typing import Any

import pytest

from muxtune.cost.scaled import ScaledCostBook
from muxtune.fleet import task_view
from muxtune.planning.step_builder import StepBuilder
from muxtune.registry import CLUSTER_POLICIES
from muxtune.types import AdapterSlot, EventKind, InstanceView, ProgressData, TaskState
from muxtune_sim import SimExecutor, SimOptions, simulate
from tests.sim.fakes import (
    GB,
    FakeLibrary,
    FakePlanner,
    Run,
    fake_book,
    instance,
    one_htask_plan,
    seconds,
    task,
)

FOREVER_NS = 1 << 62


def shared(**options: Any) -> Any:
    return CLUSTER_POLICIES.get("fifo_shared")(**options)


def colocated() -> Any:
    return CLUSTER_POLICIES.get("fifo_colocated")()


def executor(options: SimOptions = SimOptions(), **costs: float) -> SimExecutor:  # noqa: B008
    return SimExecutor(StepBuilder(), fake_book(**costs), FakeLibrary(), options)


def kinds(events: Any) -> list[EventKind]:
    return [event.kind for event in events]


# -------------------------------------------------------------------------------- the protocol


def test_wait_stops_at_until_and_starts_nothing_there():
    sim = executor()
    assert sim.wait(seconds(5)) == [] and sim.now_ns == seconds(5)
    sim.start(instance())
    assert kinds(sim.wait(seconds(5))) == [EventKind.INSTANCE_READY]
    assert sim.wait(seconds(5)) == []


def test_wait_without_anything_to_come_returns_nothing():
    assert executor().wait(FOREVER_NS) == []


def prepared(sim: SimExecutor, *specs: Any) -> Any:
    """Starts i0, prepares the tasks, and returns a plan for all of them."""
    sim.start(instance())
    for spec in specs:
        sim.prepare(spec)
    sim.wait(FOREVER_NS)
    views = tuple(task_view(spec, sim.library.add(spec)) for spec in specs)
    view = InstanceView("i0", 0, views, None, 16 * GB)
    plan = one_htask_plan(view, None, 1.0, 0.1, GB)
    sim.apply(plan)
    return plan


@pytest.mark.parametrize("finish_s", [0.0, 2.0])
def test_a_task_is_told_as_done_when_it_is_written(finish_s: float):
    sim = executor(finish_s=finish_s)
    prepared(sim, task("a", 3), task("b", 5))
    told = {}
    for _ in range(4):
        for event in sim.wait(FOREVER_NS):
            told[event.kind, event.task_id] = event
    ends = [told[EventKind.TASK_DONE, name].time_ns for name in "ab"]
    both = executor(finish_s=0.0)
    prepared(both, task("a", 3), task("b", 5))
    plain = {}
    for _ in range(4):
        for event in both.wait(FOREVER_NS):
            plain[event.kind, event.task_id] = event
    # Each end waits for its own writing, and the second for the first's.
    first, second = (plain[EventKind.TASK_DONE, name].time_ns for name in "ab")
    assert ends == [first + seconds(finish_s), second + 2 * seconds(finish_s)]
    progress = [e for (kind, _), e in told.items() if kind is EventKind.PROGRESS]
    assert all(e.data == plain[EventKind.PROGRESS, e.task_id].data for e in progress)


def test_a_scaled_cost_model_charges_ends_where_its_own_does():
    scaled = ScaledCostBook(fake_book(finish_s=2.0), 1.5)("m", "d")
    assert scaled.charges_ends and not ScaledCostBook(fake_book(), 1.5)("m", "d").charges_ends
    assert scaled.finish_s(AdapterSlot("lora", 16, ("q_proj",))).value == 3.0


def test_commands_are_idempotent_and_answered_again():
    sim = executor()
    plan = prepared(sim, task("a", 3))
    assert kinds(sim.wait(FOREVER_NS)) == [EventKind.PLAN_APPLIED]
    sim.start(instance())
    answer = sim.prepare(task("a", 3))
    assert answer is not None and answer.kind is EventKind.TASK_READY
    sim.apply(plan)
    again = kinds(sim.wait(FOREVER_NS))
    assert again == [EventKind.INSTANCE_READY, EventKind.PLAN_APPLIED]
    events = sim.wait(FOREVER_NS)
    assert kinds(events) == [EventKind.PROGRESS, EventKind.TASK_DONE]
    assert events[0].time_ns == seconds(3)
    sim.apply(plan)
    assert EventKind.TASK_DONE in kinds(sim.wait(FOREVER_NS))


def test_unknown_names_are_ignored():
    sim = executor()
    plan = prepared(sim, task("a", 3))
    sim.wait(FOREVER_NS)
    sim.cancel("nobody")
    sim.stop("nowhere")
    sim.apply(plan._replace(instance_id="nowhere"))
    assert kinds(sim.wait(FOREVER_NS)) == [EventKind.PROGRESS, EventKind.TASK_DONE]


def test_progress_tells_what_was_done():
    sim = executor()
    prepared(sim, task("a", 3, batch_size=2), task("b", 4))
    sim.wait(FOREVER_NS)
    progress = sim.wait(FOREVER_NS)[0].data
    assert isinstance(progress, ProgressData)
    assert (progress.rounds, progress.duration_ns) == (4, seconds(4))
    assert (progress.effective_tokens, progress.padded_tokens) == (4 * 128, 4 * 128)
    assert progress.steps_done == {"a": 2, "b": 4}


# ------------------------------------------------------------------------------- what is charged


def test_a_transition_takes_time():
    run = Run(shared(), [task("a", 10)], [instance()], transition_s=2.0)
    run.run()
    (totals,) = run.executor.instance_totals()
    assert run.ended_s == {"a": 12.0}
    assert (totals.transition_ns, totals.busy_ns) == (seconds(2), seconds(12))


def test_a_plan_that_comes_during_a_takeover_waits_for_a_round():
    """As the real executor (tests/runtime/test_runtime_executor.py)."""
    tasks = [task("a", 10), task("b", 3, arrival_s=1.0)]
    run = Run(shared(), tasks, [instance()], transition_s=2.0)
    run.run()
    applied = [event.time_ns / 1e9 for event in run.told.events(EventKind.PLAN_APPLIED)]
    assert applied[:2] == [0.0, 3.0]


def test_planning_takes_time_in_which_the_old_plan_goes_on():
    options = SimOptions(planning_base_s=2.0, planning_per_task_s=0.25)
    tasks = [task("a", 10), task("b", 3, arrival_s=4.0)]
    run = Run(shared(), tasks, [instance()], options=options)
    run.run()
    applied = [event.time_ns / 1e9 for event in run.told.events(EventKind.PLAN_APPLIED)]
    # a alone is known at 2.25 s; the plan with b at 6.5 s and taken at the next boundary.
    assert applied[:2] == [2.25, 7.25]
    assert run.ended_s == {"b": 10.25, "a": 12.25}


def test_a_finish_under_the_old_plan_while_the_new_one_is_being_made():
    options = SimOptions(planning_base_s=3.0)
    tasks = [task("a", 4), task("b", 9), task("c", 2, arrival_s=5.0)]
    run = Run(shared(), tasks, [instance()], options=options)
    run.run()
    assert run.ended_s == {"a": 7.0, "c": 10.0, "b": 12.0}


def test_a_task_withdrawn_while_its_first_plan_is_being_made():
    options = SimOptions(planning_base_s=3.0)
    tasks = [task("a", 12), task("b", 5, arrival_s=4.0, cancel_ns=seconds(5))]
    run = Run(shared(), tasks, [instance()], options=options)
    run.run()
    assert run.told.by_id()["b"].state is TaskState.CANCELLED
    assert run.ended_s == {"b": 5.0, "a": 15.0}


def test_plans_made_faster_than_they_become_known_are_not_put_off():
    """Each takes 3 s to make, and one a second is made: each is taken in its turn."""
    options = SimOptions(planning_base_s=3.0)
    tasks = [task(f"t{index}", 20, arrival_s=float(index)) for index in range(10)]
    run = Run(shared(), tasks, [instance()], options=options)
    run.run()
    starts = [run.told.by_id()[f"t{index}"].first_start_ns for index in range(10)]
    assert starts[-1] == seconds(12)


def test_every_plan_runs_at_least_one_round():
    """Arrivals faster than a transition must not starve the tasks that run."""
    tasks = [task("a", 5), *(task(f"t{index}", 1, 0.5 + 0.5 * index) for index in range(20))]
    run = Run(shared(max_tasks_per_instance=32), tasks, [instance(memory_gb=64)], transition_s=1.0)
    run.run()
    assert run.ended_s["a"] <= 10.0


def test_a_plan_that_is_sooner_made_does_not_overtake_the_one_before_it():
    """b ends while a plan of three tasks is made, which takes longer than that of the two left."""
    options = SimOptions(planning_per_task_s=2.0)
    tasks = [task("a", 20), task("b", 6), task("c", 3, arrival_s=9.5)]
    run = Run(shared(), tasks, [instance()], options=options)
    run.run()
    applied = [(e.time_ns / 1e9, e.epoch) for e in run.told.events(EventKind.PLAN_APPLIED)]
    assert applied[:3] == [(4.0, 0), (16.0, 2), (21.0, 3)]
    assert run.ended_s == {"b": 10.0, "c": 19.0, "a": 24.0}


# ------------------------------------------------------------------------------------ one thread


def of_one_thread(
    tasks: Any,
    transition_s: float = 0.0,
    finish_s: float = 0.0,
    planning_s: float = 0.0,
    passes_ahead: int = 0,
) -> Run:
    options = SimOptions(one_thread=True, planning_base_s=planning_s, passes_ahead=passes_ahead)
    policy = shared(max_tasks_per_instance=3)
    run = Run(
        policy, tasks, [instance()], options=options, transition_s=transition_s, finish_s=finish_s
    )
    run.run()
    return run


def told(run: Run, kind: EventKind) -> list[tuple[float, str]]:
    return [(event.time_ns / 1e9, event.task_id) for event in run.told.events(kind)]


def test_what_arrives_in_a_takeover_is_heard_at_its_end_and_planned_for_together():
    tasks = [task("a", 9), task("b", 9, arrival_s=0.5), task("c", 9, arrival_s=1.2)]
    run = of_one_thread(tasks, transition_s=2.0)
    assert told(run, EventKind.TASK_READY) == [(0.0, "a"), (2.0, "b"), (2.0, "c")]
    assert [time_s for time_s, _ in told(run, EventKind.PLAN_APPLIED)][:2] == [2.0, 5.0]
    assert [len(plan.task_ids) for plan in run.told.plans][:2] == [1, 3]


def test_what_arrives_while_results_are_written_is_heard_with_them():
    tasks = [task("a", 2), task("b", 5), task("c", 9, arrival_s=3.0)]
    run = of_one_thread(tasks, finish_s=2.0)
    assert told(run, EventKind.TASK_DONE)[0] == (4.0, "a")
    assert told(run, EventKind.TASK_READY)[-1] == (4.0, "c")


def test_planning_holds_one_thread_up_where_no_pass_is_under_way():
    tasks = [task("a", 9), task("b", 9, arrival_s=4.5)]
    run = of_one_thread(tasks, transition_s=1.0, planning_s=0.7)
    applied = [time_s for time_s, _ in told(run, EventKind.PLAN_APPLIED)]
    # The first waits for its plan; the second's is made during the round that ends at 5.7 s.
    assert applied[:2] == [1.7, 6.7]


def test_a_plan_waits_for_passes_that_were_started_before_it():
    """As the real executor, which on a GPU reads results two passes late; a task's end it reads at
    once, and plans that come then overtake those that wait."""
    run = of_one_thread([task("a", 9), task("b", 9, arrival_s=3.5)], passes_ahead=2)
    applied = [time_s for time_s, _ in told(run, EventKind.PLAN_APPLIED)]
    assert applied[:2] == [0.0, 6.0]
    tasks = [task("a", 9), task("b", 4), task("c", 9, arrival_s=3.5)]
    run = of_one_thread(tasks, passes_ahead=2)
    plans = {plan.epoch: len(plan.task_ids) for plan in run.told.plans}
    applied = [(e.time_ns / 1e9, plans[e.epoch]) for e in run.told.events(EventKind.PLAN_APPLIED)]
    assert applied[:3] == [(0.0, 2), (4.0, 2), (9.0, 1)]
    assert run.ended_s == {"b": 4.0, "a": 9.0, "c": 13.0}


def test_a_task_that_is_withdrawn_leaves_one_thread_at_once():
    tasks = [task("a", 9), task("b", 9, cancel_ns=seconds(3.4))]
    run = of_one_thread(tasks)
    assert told(run, EventKind.TASK_CANCELLED) == [(3.4, "b")]
    assert run.told.by_id()["b"].steps == 3 and run.ended_s["a"] == 9.0


def test_a_task_that_is_withdrawn_in_its_last_round_is_not_done():
    run = of_one_thread([task("a", 9), task("b", 4, cancel_ns=seconds(3.4))])
    assert told(run, EventKind.TASK_DONE) == [(9.0, "a")]


def test_one_thread_tells_of_rounds_beside_other_news():
    tasks = [task("a", 20), task("b", 20, arrival_s=7.5), task("c", 20, arrival_s=9.5)]
    run = of_one_thread(tasks)
    progress: list[Any] = run.told.events(EventKind.PROGRESS)
    data = [(e.time_ns / 1e9, e.data.rounds, e.data.duration_ns / 1e9) for e in progress]
    # c's news comes after one round, too few to judge by: it is told when the plan ends.
    assert data[:4] == [(7.5, 7, 7.0), (8.0, 1, 1.0), (10.0, 2, 2.0), (20.0, 10, 10.0)]
    tokens = sum(event.data.effective_tokens for event in progress)
    assert tokens == 60 * 64


# ------------------------------------------------------------------------------------ contention


def on_one_gpu(count: int) -> list[Any]:
    return [instance(f"i{index}", gpu_ids=("g0",)) for index in range(count)]


def test_two_busy_instances_on_one_gpu_run_at_half_speed():
    run = Run(colocated(), [task("a", 10), task("b", 10)], on_one_gpu(2))
    run.run()
    assert run.ended_s == {"a": 20.0, "b": 20.0}


def test_a_change_of_speed_retimes_what_runs():
    """a alone for 6 s; with b at half speed for 2 * 3 s; a alone again for 1 s."""
    run = Run(colocated(), [task("a", 10), task("b", 3, arrival_s=6.0)], on_one_gpu(2))
    run.run()
    assert run.ended_s == {"b": 12.0, "a": 13.0}


def test_three_instances_share_a_gpu():
    """Processor sharing: 3 * 2 s until c ends, then 2 * 2 s until b ends, then a alone."""
    tasks = [task("a", 6), task("b", 4), task("c", 2)]
    run = Run(colocated(), tasks, on_one_gpu(3))
    run.run()
    assert run.ended_s == {"c": 6.0, "b": 10.0, "a": 12.0}


def test_instances_on_their_own_gpus_do_not_contend():
    instances = [instance("i0", gpu_ids=("g0",)), instance("i1", gpu_ids=("g1",))]
    run = Run(colocated(), [task("a", 10), task("b", 10)], instances)
    run.run()
    assert run.ended_s == {"a": 10.0, "b": 10.0}


def test_an_instance_on_two_gpus_runs_as_fast_as_the_more_crowded_one():
    instances = [instance("i0", gpu_ids=("g0", "g1")), instance("i1", gpu_ids=("g1",))]
    run = Run(colocated(), [task("a", 4), task("b", 10)], instances)
    run.run()
    hosts = {name: outcome.instance_id for name, outcome in run.told.by_id().items()}
    assert hosts == {"a": "i0", "b": "i1"}
    assert run.ended_s == {"a": 8.0, "b": 14.0}


def test_drift_is_not_blamed_on_the_transition():
    run = Run(shared(), [task("a", 10), task("b", 30)], [instance()], transition_s=50.0)
    assert run.run().num_drifts == 0


# -------------------------------------------------------------------------------------- counting


def test_totals_of_an_instance():
    tasks = [task("a", 10), task("b", 5, arrival_s=2.5)]
    run = Run(shared(), tasks, [instance()], pass_s=1.0)
    run.run()
    (totals,) = run.executor.instance_totals()
    assert (totals.busy_ns, totals.task_ns) == (seconds(10), seconds(15))
    assert totals.mean_tasks == pytest.approx(1.5)
    assert totals.effective_tokens == 15 * 64 and totals.rounds == 10
    assert totals.peak_predicted_memory_bytes == 2 * GB


@pytest.mark.parametrize("emit_progress", [True, False])
def test_quiet_and_talkative_runs_count_the_same(emit_progress: bool):
    options = SimOptions(emit_progress=emit_progress, emit_plan_applied=emit_progress)
    tasks = [task(f"t{index}", 3 + index, 0.7 * index, 1 + index % 3) for index in range(9)]
    run = Run(shared(), tasks, [instance(), instance("i1")], options=options)
    totals = run.run()
    counted = run.executor.instance_totals()
    tokens = sum(item.effective_tokens for item in counted)
    assert tokens == totals.effective_tokens == sum((3 + i) * (1 + i % 3) * 64 for i in range(9))
    assert sum(item.padded_tokens for item in counted) == tokens
    talks = run.told.events(EventKind.PROGRESS) + run.told.events(EventKind.PLAN_APPLIED)
    assert bool(talks) is emit_progress


def test_quiet_and_talkative_runs_end_at_the_same_times():
    """And take over as many plans, those of emptied instances too (i1 is emptied by the run's last
    event, after which nothing is waited for)."""
    ended, plans = [], []
    for talks in (True, False):
        options = SimOptions(emit_progress=talks, emit_plan_applied=talks)
        tasks = [task(f"t{index}", 3 + index, 0.7 * index, 1 + index % 3) for index in range(9)]
        run = Run(shared(), tasks, [instance(), instance("i1")], options=options)
        run.run()
        ended.append(run.ended_s)
        plans.append(run.executor.instance_totals()[0].plans)
    assert ended[0] == ended[1]
    assert plans[0] == plans[1]


def test_partly_done_work_of_a_withdrawn_task_is_counted():
    """Two of five rounds of its second step are done when it leaves."""
    tasks = [task("a", 4, batch_size=5, cancel_ns=seconds(7))]
    run = Run(shared(), tasks, [instance()])
    run.run()
    (totals,) = run.executor.instance_totals()
    assert run.told.by_id()["a"].state is TaskState.CANCELLED
    assert totals.effective_tokens == totals.padded_tokens == 7 * 64


def test_the_library_forgets_tasks_that_have_ended():
    tasks = [task("x", 50, 0.0, cancel_ns=seconds(20))]
    tasks += [task(f"t{index}", 2, 3.0 * index) for index in range(5)]
    run = Run(shared(), tasks, [instance()])
    run.run()
    assert len(run.library.tasks) <= 1, "at most what the last plan held"


def test_simulate_wires_everything():
    report = simulate(
        shared(), FakePlanner(), fake_book(), FakeLibrary(), [task("a", 3)], [instance()]
    )
    assert report.totals.num_done == 1 and report.totals.end_s == 3.0
    assert report.instances[0].busy_ns == seconds(3)
