"""Hardware that fails, instances that follow the load, quotas, preemption, moves."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.cluster_policies.lifecycle import Lifecycle, LifecycleOptions
from muxtune.deciding import EngineOptions
from muxtune.engine import replay
from muxtune.errors import ConfigError, MuxTuneError
from muxtune.hardware import FailureRules, NodeSpec, TenantRules
from muxtune.registry import CLUSTER_POLICIES
from muxtune.types import Drain, DrainInstance, Event, EventKind, Place, TaskState
from muxtune_sim import SimOptions
from tests.sim.fakes import (
    CHUNK_TOKENS,
    FakeCost,
    FakePlanner,
    Run,
    exactly,
    instance,
    seconds,
    task,
)

OPTIONS = SimOptions()


def shared(**options: Any) -> Any:
    return CLUSTER_POLICIES.get("fifo_shared")(**options)


def slots(count: int, **fields: Any) -> list[Any]:
    return [instance(f"i{n}", gpu_ids=(f"g{n}",), **fields) for n in range(count)]


def one_gpu_nodes(count: int, spot: bool = False) -> tuple[NodeSpec, ...]:
    return tuple(NodeSpec(f"n{n}", (f"g{n}",), spot) for n in range(count))


def lifecycle(count: int, inner: Any = None, **options: Any) -> Lifecycle:
    return Lifecycle(inner or shared(), slots(count), LifecycleOptions(**options))


def run_of(policy: Lifecycle, tasks: Any, options: SimOptions = OPTIONS, **rest: Any) -> Run:
    return Run(policy, tasks, policy.first_instances(), options=options, **rest)


def kinds(run: Run, kind: EventKind) -> list[Event]:
    return run.told.events(kind)


# ------------------------------------------------------------------------------------- failures


def failing(count: int, **rules: Any) -> SimOptions:
    spot = "spot_lifetime_s" in rules
    return OPTIONS._replace(nodes=one_gpu_nodes(count, spot), failures=FailureRules(**rules))


def test_tasks_of_a_failed_gpu_go_on_from_their_checkpoint_once_it_is_repaired():
    options = failing(1, gpu_mtbf_s=60.0, gpu_repair_s=30.0)._replace(checkpoint_steps=7)
    run = run_of(lifecycle(1), [task("a", steps=100)], options)
    totals = run.run()
    failed = kinds(run, EventKind.INSTANCE_FAILED)
    assert totals.num_done == 1 and failed
    for event in failed:
        assert all(steps % 7 == 0 for steps in event.data.kept_steps.values())  # type: ignore[attr-defined]
    outcome = run.told.outcomes[0]
    assert outcome.lost_steps > 0 and outcome.num_placements == 1 + len(failed)
    lost = sum(item.lost_tokens for item in run.executor.instance_totals())
    assert lost >= outcome.lost_steps * CHUNK_TOKENS  # and what was open of a step
    downs = [event.time_ns for event in kinds(run, EventKind.GPUS_DOWN)]
    ups = [event.time_ns for event in kinds(run, EventKind.GPUS_UP)]
    assert [up - down for down, up in zip(downs, ups, strict=False)] == [seconds(30)] * len(ups)


def test_without_a_lifecycle_the_instance_stays_lost_and_the_run_says_so():
    options = failing(1, gpu_mtbf_s=60.0, gpu_repair_s=30.0)
    run = Run(shared(), [task("a", steps=1000)], slots(1), options=options)
    totals = run.run()  # the policy refuses a task that no instance serves
    assert totals.num_refused == 1


def test_hardware_that_fails_for_ever_does_not_hide_that_nobody_places_tasks(monkeypatch):
    monkeypatch.setattr("muxtune.engine.MAX_IDLE_BATCHES", 20)

    class Idle:
        def on_event(self, event: Event, fleet: Any) -> list[Any]:
            return []

    options = failing(2, gpu_mtbf_s=60.0, gpu_repair_s=1e7)
    run = Run(Idle(), [task("a")], slots(2), options=options)
    with pytest.raises(MuxTuneError, match="wait for ever"):
        run.run()


def test_a_node_takes_all_its_gpus_with_it_and_a_gpu_of_its_own_failure_comes_back_later():
    nodes = (NodeSpec("n0", ("g0", "g1")), NodeSpec("n1", ("g2",)))
    rules = FailureRules(node_mtbf_s=50.0, node_repair_s=10.0)
    policy = Lifecycle(shared(max_tasks_per_instance=1), slots(3))
    options = OPTIONS._replace(nodes=nodes, failures=rules)
    run = run_of(policy, [task(f"t{n}", steps=100) for n in range(3)], options)
    assert run.run().num_done == 3
    of_n0 = [e for e in kinds(run, EventKind.GPUS_DOWN) if e.data.unit == "n0"]  # type: ignore[attr-defined]
    assert of_n0 and all(e.data.gpu_ids == ("g0", "g1") for e in of_n0)  # type: ignore[attr-defined]
    failed = {e.instance_id for e in kinds(run, EventKind.INSTANCE_FAILED)}
    assert failed >= {"i0", "i1"}


def test_adding_a_node_changes_no_others_fate():
    def downs_of_g0(count: int) -> list[int]:
        options = failing(count, gpu_mtbf_s=40.0, gpu_repair_s=5.0)
        run = run_of(lifecycle(count, shared(max_tasks_per_instance=1)), [task("a", 300)], options)
        run.run()
        events = kinds(run, EventKind.GPUS_DOWN)
        return [e.time_ns for e in events if e.data.unit == "g0"][:3]  # type: ignore[attr-defined]

    assert len(downs_of_g0(1)) == 3
    assert downs_of_g0(1)[0] == downs_of_g0(2)[0]


def test_on_notice_tasks_move_away_and_lose_nothing():
    rules = {"spot_lifetime_s": 100.0, "spot_notice_s": 20.0, "spot_absence_s": 50.0}
    options = failing(2, **rules)._replace(checkpoint_steps=1_000)
    run = run_of(lifecycle(2), [task("a", 150), task("b", 150)], options)
    assert run.run().num_done == 2
    assert kinds(run, EventKind.GPUS_NOTICE) and kinds(run, EventKind.INSTANCE_STOPPED)
    assert not kinds(run, EventKind.INSTANCE_FAILED)
    assert all(outcome.lost_steps == 0 for outcome in run.told.outcomes)
    moved = [outcome for outcome in run.told.outcomes if outcome.num_placements > 1]
    assert moved
    assert sum(item.lost_tokens for item in run.executor.instance_totals()) == 0


# ---------------------------------------------------------------------------- start-up, the load


class SlowStart(FakeCost):
    """An instance takes 40 s to start, a task 3 s to be written out."""

    def startup_s(self, replica: Any) -> Any:
        return exactly(40.0)

    def checkpoint_s(self, slot: Any) -> Any:
        return exactly(3.0)


def with_cost(run: Run, cost: FakeCost) -> Run:
    run.executor._costs = lambda model, device: cost  # type: ignore[assignment]
    return run


def test_a_start_takes_what_the_cost_model_says():
    options = OPTIONS._replace(charge_startup=True)
    run = with_cost(Run(shared(), [task("a", 10)], slots(1), options=options), SlowStart())
    run.run()
    assert run.ended_s == {"a": 50.0}


def test_an_elastic_fleet_grows_with_the_queue_and_shrinks_when_idle():
    policy = lifecycle(4, shared(max_tasks_per_instance=1), elastic=True, idle_s=30.0)
    tasks = [task(f"t{n}", 20, 100.0) for n in range(4)] + [task("late", 5, 400.0)]
    run = run_of(policy, tasks, OPTIONS._replace(start_s=10.0))
    assert run.run().num_done == 5
    ready = [(e.time_ns, e.instance_id) for e in kinds(run, EventKind.INSTANCE_READY)]
    assert ready == [(seconds(10), "i0"), *((seconds(110), f"i{n}") for n in (1, 2, 3))]
    stopped = [(e.time_ns, e.instance_id) for e in kinds(run, EventKind.INSTANCE_STOPPED)]
    assert stopped == [(seconds(150), "i0"), (seconds(160), "i2"), (seconds(160), "i3")]
    assert run.ended_s["late"] == 405.0


def test_a_stop_while_starting_leaves_no_ready_instance_behind():
    run = Run(shared(), [], slots(1), options=OPTIONS._replace(start_s=10.0))
    sim = run.executor
    sim.start(slots(1)[0])
    sim.stop("i0")
    assert [event.kind for event in sim.wait(seconds(60))] == [EventKind.INSTANCE_STOPPED]
    assert sim.wait(seconds(60)) == []


@pytest.mark.parametrize("option", ["min_instances", "tasks_per_instance", "idle_s"])
def test_lifecycle_options_out_of_range_are_refused(option: str):
    with pytest.raises(ConfigError, match=option):
        lifecycle(1, **{option: -1})


# ------------------------------------------------------------------------- quotas and preemption


def test_a_tenant_at_its_quota_waits_and_lets_others_pass():
    tasks = [task(f"a{n}", 10, tenant="a") for n in range(3)] + [task("b", 10, 1.0, tenant="b")]
    options = EngineOptions(tenants={"a": TenantRules(max_tasks=1)})
    policy = shared(max_tasks_per_instance=1)
    run = Run(policy, tasks, slots(4), engine_options=options)
    run.run()
    assert run.ended_s == {"a0": 10.0, "b": 11.0, "a1": 20.0, "a2": 30.0}


def test_a_held_task_can_be_withdrawn():
    tasks = [task("a0", 10, tenant="a"), task("a1", 10, tenant="a", cancel_ns=seconds(4))]
    options = EngineOptions(tenants={"a": TenantRules(max_tasks=1)})
    run = Run(shared(), tasks, slots(1), engine_options=options)
    totals = run.run()
    assert (totals.num_done, totals.num_cancelled) == (1, 1)
    assert run.ended_s == {"a1": 4.0, "a0": 10.0}


def test_an_urgent_task_takes_the_place_of_the_youngest_of_the_least_urgent():
    inner = shared(max_tasks_per_instance=1, discipline="priority")
    policy = lifecycle(2, inner, preempt=True)
    tasks = [task("old", 50), task("young", 50, 1.0), task("urgent", 10, 20.0, priority=5)]
    run = run_of(policy, tasks)
    run.run()
    outcomes = run.told.by_id()
    assert run.ended_s["urgent"] == 30.0 and run.ended_s["old"] == 50.0
    assert outcomes["young"].num_placements == 2 and outcomes["young"].lost_steps == 0
    assert run.ended_s["young"] == 60.0 + 1.0  # ten seconds of waiting


def test_leaving_costs_what_the_cost_model_says():
    inner = shared(max_tasks_per_instance=1, discipline="priority")
    policy = lifecycle(1, inner, preempt=True)
    tasks = [task("young", 50), task("urgent", 10, 20.0, priority=5)]
    options = OPTIONS._replace(charge_checkpoints=True)
    run = with_cost(run_of(policy, tasks, options), SlowStart())
    run.run()
    assert run.ended_s["urgent"] == 33.0  # young is written out first, urgent leaves done
    assert run.ended_s["young"] == 63.0


# --------------------------------------------------------------------------------- conservation


class Restless:
    """Places like its inner policy, and makes random tasks and instances move."""

    def __init__(self, inner: Any, draws: list[int]) -> None:
        self.inner, self.draws = inner, draws
        self.asked = 0

    def on_event(self, event: Event, fleet: Any) -> list[Any]:
        actions = self.inner.on_event(event, fleet)
        self.asked += 1
        draw = self.draws[self.asked % len(self.draws)]
        touched = {a.instance_id for a in actions if isinstance(a, Place | DrainInstance)}
        views = [v for v in fleet.instances.values() if v.instance_id not in touched and v.tasks]
        if not views or self.asked > 300:
            return actions
        view = views[draw % len(views)]
        if draw % 7 == 0:
            actions.append(DrainInstance(view.instance_id))
        elif draw % 3 == 0:
            actions.append(Drain(view.tasks[draw % len(view.tasks)].task_id))
        return actions


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    gaps=st.lists(st.integers(0, 40), min_size=12, max_size=12),
    draws=st.lists(st.integers(0, 1000), min_size=1, max_size=8),
    gpu_mtbf_s=st.sampled_from([0.0, 30.0, 120.0]),
    spot_s=st.sampled_from([0.0, 60.0]),
    checkpoint_steps=st.integers(0, 9),
    quota=st.one_of(st.none(), st.integers(1, 3)),
    start_s=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 5),
)
def test_nothing_is_lost_or_done_twice(
    lengths, gaps, draws, gpu_mtbf_s, spot_s, checkpoint_steps, quota, start_s, seed
):
    """Whatever fails and moves: every task ends once with all its steps, tokens and GPU time add
    up, and the journal replays."""
    rules = FailureRules(gpu_mtbf_s, 10.0, 200.0 * bool(gpu_mtbf_s), 15.0, spot_s, 8.0, 20.0, seed)
    options = OPTIONS._replace(
        nodes=(NodeSpec("n0", ("g0", "g1")), NodeSpec("n1", ("g2",), spot=True)),
        failures=rules,
        checkpoint_steps=checkpoint_steps,
        start_s=start_s,
    )
    arrivals = [sum(gaps[: n + 1]) for n in range(len(lengths))]
    tasks = [
        task(f"t{n}", steps, arrivals[n], 1 + n % 2, tenant=f"x{n % 2}", priority=n % 3)
        for n, steps in enumerate(lengths)
    ]
    engine_options = EngineOptions(tenants={"x0": TenantRules(quota)})

    def policy() -> Any:
        inner = shared(max_tasks_per_instance=3, discipline="priority")
        return Restless(Lifecycle(inner, slots(3), LifecycleOptions(preempt=True)), draws)

    run = Run(policy(), tasks, slots(3), options=options, engine_options=engine_options)
    totals = run.run()
    assert totals.num_done == totals.num_tasks == len(tasks)
    assert sorted(run.ended_s) == sorted(spec.task_id for spec in tasks)
    wanted = {spec.task_id: spec.num_steps for spec in tasks}
    assert {o.task_id: o.steps for o in run.told.outcomes} == wanted
    assert all(o.state is TaskState.DONE for o in run.told.outcomes)

    parts = run.executor.instance_totals()
    given_tokens = sum(item.effective_tokens - item.lost_tokens for item in parts)
    assert given_tokens == totals.effective_tokens
    assert totals.effective_tokens == CHUNK_TOKENS * sum(
        (spec.num_steps or 0) * spec.sequences_per_step for spec in tasks
    )
    down_ns = run.executor.down_ns()
    for number in range(3):
        mine = [item for item in parts if item.instance_id == f"i{number}"]
        up_ns = sum(item.up_ns for item in mine)
        assert sum(item.busy_ns for item in mine) <= up_ns
        assert up_ns + down_ns.get(f"g{number}", 0) <= run.executor.now_ns
        if not spot_s and not any(d % 7 == 0 for d in draws):  # nothing but failures stops one
            assert up_ns + down_ns.get(f"g{number}", 0) == run.executor.now_ns
    again = replay(run.journal.batches, policy(), FakePlanner(), engine_options)
    assert again == []


def test_the_same_seed_fails_the_same_bytes():
    def lines() -> list[str]:
        options = failing(3, gpu_mtbf_s=50.0, gpu_repair_s=10.0)
        run = run_of(lifecycle(3), [task(f"t{n}", 80, n) for n in range(9)], options)
        run.run()
        return run.journal.lines

    assert lines() == lines() and any("GPU failure" in line for line in lines())


def test_hardware_that_never_fails_costs_nothing_and_changes_nothing():
    def lines(options: SimOptions) -> list[str]:
        run = Run(shared(), [task(f"t{n}", 8, n) for n in range(5)], slots(2), options=options)
        run.run()
        return run.journal.lines

    assert lines(OPTIONS) == lines(OPTIONS._replace(nodes=one_gpu_nodes(2)))
