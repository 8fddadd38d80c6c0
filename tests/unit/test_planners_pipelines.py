"""Properties of plans for pipelines: memory in flight, dependencies, what playing them chose."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.near_optimum.by_iteration import cost_of
from experiments.near_optimum.instances import random_instance
from experiments.paper_figures.testbeds import CASES, H100, MIXED, Assumptions, books
from experiments.paper_figures.testbeds import view as paper_view
from muxtune.commands.train import PREDICTED_ROUNDS, write_plan_trace
from muxtune.cost import CostBook
from muxtune.errors import ConfigError
from muxtune.planners.base import site_of
from muxtune.planners.muxtune import PLAY_SEARCH, MuxTunePlanner
from muxtune.planners.played import Player, held_bytes
from muxtune.planning.orchestration import (
    NO_CONTENTION,
    Contention,
    RoundGraph,
    pipeline_limits,
    play,
    played,
    round_problem,
)
from muxtune.planning.orchestration.accounting import contended_bound_ns
from muxtune.protocols import CostModel
from muxtune.types import Plan, ReplicaShape

COSTS = CostBook()
ROUNDS = 6


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(2, 4))
def test_memory_and_dependencies_hold_on_every_stage(seed: int, num_stages: int):
    view = random_instance(seed, COSTS, 4)._replace(replicas=(ReplicaShape(1, num_stages),))
    planner = MuxTunePlanner(COSTS, plays=3)
    plan = planner.plan(view, None)
    if not isinstance(plan, Plan):
        assert plan.needed_bytes > plan.available_bytes
        return
    model = planner.cost(site_of(view))
    ledgers = model.memory_ledger_bytes(plan)
    assert ledgers.peak.value <= plan.predicted.peak_memory_bytes.value * (1 + 1e-9)
    assert plan.predicted.peak_memory_bytes.value <= view.memory_limit_bytes
    if plan.order:
        check_order(plan, model)


def check_order(plan: Plan, model) -> None:
    """Plays the order under the memory that the ledgers count; every wait is waited for."""
    limits = pipeline_limits(held_bytes(model, plan), plan.replicas[0].pp)
    problem = round_problem(plan, model.subgraph_times_s(plan))._replace(**limits._asdict())
    timeline = play(plan.order, problem, ROUNDS)
    graph = RoundGraph(problem)
    for op, item in enumerate(graph.subgraphs):
        first = graph.first_op[graph.visit_of[op]]
        for before in item.depends_on:
            assert (timeline.start_ns[:, op] >= timeline.end_ns[:, first + before]).all()
    for before, after in graph.step_edges(ROUNDS):
        start, end = timeline.start_ns.ravel(), timeline.end_ns.ravel()
        assert start[after] >= end[before], "a step entered before the last one's optimizer"


@pytest.mark.parametrize("replica", [ReplicaShape(1, 4), ReplicaShape(2, 2)])
def test_a_round_without_an_order_is_predicted_as_it_was_played(replica: ReplicaShape):
    view = random_instance(4, COSTS, 4)._replace(replicas=(replica,))
    planner = MuxTunePlanner(COSTS, plays=3)
    plan = planner.plan(view, None)
    assert isinstance(plan, Plan) and not plan.order
    model, predicted = planner.cost(site_of(view)), plan.predicted
    contention = Contention(*model.subgraph_times_s(plan).contention)
    search = contention if replica.tp > 1 else NO_CONTENTION
    player = Player(model, replica, PLAY_SEARCH, search)
    classes = {task.task_id: planner.class_of_view(task) for task in view.tasks}
    costs = [cost_of(planner, site_of(view), classes, htask) for htask in plan.htasks]
    pieces = [
        player.piece(htask, cost.pass_time_s, max(cost.passes_per_step))
        for htask, cost in zip(plan.htasks, costs, strict=True)
    ]
    assert predicted.round_time_s.value == pytest.approx(player.whole_step_s(pieces), rel=1e-9)
    assert predicted.played_ratio != 1
    assert sum(predicted.breakdown_s.values()) == pytest.approx(predicted.round_time_s.value)


def test_communication_is_hidden_where_two_smaller_micro_batches_fit_in_memory(tmp_path: Path):
    """The largest micro-batches leave no memory for a second one, and a fifth of the round to their
    collectives; what is exposed beside a second one is contention, which no order avoids."""
    case, heavy = CASES[0], Assumptions(tasks=4, batch=32)
    costs = books(case, heavy)[0]
    view = paper_view(case, MIXED, heavy, costs)
    plan = MuxTunePlanner(costs).plan(view, None)
    plain = MuxTunePlanner(costs, orchestration=False).plan(view, None)
    assert isinstance(plan, Plan) and isinstance(plain, Plan) and plan.order
    assert plan.predicted.tasks_step_time_s < 0.93 * plain.predicted.tasks_step_time_s
    times = costs(view.model, view.device).subgraph_times_s(plan)
    timeline, contention = played(plan, times), Contention(*times.contention)
    bound_ns = contended_bound_ns(timeline.graph, contention)
    assert timeline.period_ns <= 1.005 * bound_ns
    assert plan.predicted.peak_memory_bytes.value <= view.memory_limit_bytes
    check_plan_trace(tmp_path / "plan_trace.json", plan, costs(view.model, view.device))


def check_plan_trace(path: Path, plan: Plan, cost: CostModel) -> None:
    """What `muxtune train` writes of an order: every stage's two streams, as long as predicted."""
    write_plan_trace(path, plan, cost)
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]
    assert len({event["tid"] for event in events}) == 2 * plan.replicas[0].pp
    end_ms = max(event["ts"] + event["dur"] for event in events) / 1e3
    rounds = end_ms / (1e3 * plan.predicted.round_time_s.value)
    assert PREDICTED_ROUNDS <= rounds < PREDICTED_ROUNDS + 1.5


def test_where_uncounted_rounds_do_not_overlap_a_plan_with_an_order_is_better():
    view = random_instance(8, COSTS, 4)._replace(replicas=(ReplicaShape(1, 2),))
    plans = [
        MuxTunePlanner(COSTS, plays=6, rounds_overlap=does).plan(view, None)
        for does in (True, False)
    ]
    found = [(bool(plan.order), plan.predicted) for plan in plans if isinstance(plan, Plan)]
    assert [has_order for has_order, _ in found] == [False, True]
    times_s = [predicted.tasks_step_time_s for _, predicted in found]
    assert times_s[0] < times_s[1] < 1.1 * times_s[0]


def test_a_plain_plan_that_plays_better_than_its_closed_form_is_not_missed():
    light = Assumptions(tasks=4, batch=4)
    case = next(c for c in CASES if c.testbed is H100 and c.replica.pp == 4)
    costs = books(case, light)[0]
    view = paper_view(case, MIXED, light, costs)
    times = []
    for fusion in ("planned", "all_temporal"):
        plan = MuxTunePlanner(costs, fusion=fusion, plays=8).plan(view, None)
        assert isinstance(plan, Plan)
        times.append(plan.predicted.tasks_step_time_s)
    assert times[0] <= times[1] * (1 + 1e-9)


@pytest.mark.parametrize("seed", [62])
def test_playing_never_strays_far_from_the_closed_form(seed: int):
    view = random_instance(seed, COSTS, 5)
    plain = MuxTunePlanner(COSTS, plays=0).plan(view, None)
    played = MuxTunePlanner(COSTS, plays=8).plan(view, None)
    assert isinstance(plain, Plan) and isinstance(played, Plan)
    ratio = played.predicted.tasks_step_time_s / plain.predicted.tasks_step_time_s
    assert ratio <= 1.06 and sorted(played.task_ids) == sorted(plain.task_ids)
    assert MuxTunePlanner(COSTS, plays=8).plan(view, None) == played


def test_playing_finds_what_the_closed_form_does_not():
    from experiments.near_optimum.by_iteration import Judge, step_s

    view = random_instance(4, COSTS, 5)
    played = [
        step_s(Judge(planner, view), planner)[0]
        for planner in (MuxTunePlanner(COSTS, plays=0), MuxTunePlanner(COSTS, plays=40))
    ]
    assert played[0] is not None and played[1] is not None
    assert played[1] < 0.97 * played[0]


@pytest.mark.parametrize(
    ("option", "value"), [("plays", -1), ("promise_margin", -0.1), ("promise_margin", math.nan)]
)
def test_options_out_of_range_are_refused_by_name(option: str, value: float):
    with pytest.raises(ConfigError, match=rf"planner\.{option}"):
        MuxTunePlanner(COSTS, **{option: value})  # pyright: ignore[reportArgumentType]
