"""A few questions of experiments/near_optimum, plans judged by the iteration-level simulation."""

from __future__ import annotations

import pytest

from experiments.near_optimum.by_iteration import (
    Judge,
    best_played,
    cost_of,
    examine,
    piece_of,
    proof,
    step_s,
)
from experiments.near_optimum.instances import random_instance
from experiments.near_optimum.near_optimum import summary
from muxtune.cost import CostBook
from muxtune.planners.muxtune import MuxTunePlanner
from muxtune.types import Plan

COSTS = CostBook()
SEEDS = (0, 2, 5, 8, 10, 18)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [examine(seed, COSTS) for seed in SEEDS]


def test_played_plans_are_near_the_best_of_all_that_were_played(rows):
    found = summary(rows)
    assert found["solved"] == len(SEEDS) and found["several_htasks_best"] >= 4
    assert found["mean_ratio"] <= 1.02 and found["worst_ratio"] <= 1.10
    assert proof(rows)["optimum_proven"] >= 4
    assert max(found["worst_over_other"].values()) <= 1.005


def test_one_stage_plays_as_the_closed_form_says():
    view = random_instance(0, COSTS, 5)
    planner = MuxTunePlanner(COSTS)
    plan = planner.plan(view, None)
    assert isinstance(plan, Plan) and view.replicas[0].pp == 1
    played_s, _ = step_s(Judge(planner, view), planner)
    assert played_s == pytest.approx(plan.predicted.tasks_step_time_s, rel=1e-6)


def test_the_search_finds_better_than_a_bad_plan():
    """All tasks in one hTask on a pipeline leave stages idle."""
    view = random_instance(8, COSTS, 5)
    planner = MuxTunePlanner(COSTS, fusion="all_spatial")
    judge = Judge(planner, view)
    bad_s, num_htasks = step_s(judge, planner)
    assert bad_s is not None
    classes = tuple(planner.class_of_view(task) for task in view.tasks)
    best = best_played(judge, classes, bad_s, num_htasks)
    assert best is not None and best.step_s < 0.9 * bad_s and best.bound_s <= best.step_s


def test_no_bound_exceeds_what_is_played():
    for seed in (4, 8):
        view = random_instance(seed, COSTS, 5)
        planner = MuxTunePlanner(COSTS)
        judge, plan = Judge(planner, view), planner.plan(view, None)
        assert isinstance(plan, Plan)
        classes = {task.task_id: planner.class_of_view(task) for task in view.tasks}
        pieces = [piece_of(judge, h, cost_of(planner, judge.site, classes, h)) for h in plan.htasks]
        assert judge.bound_s(pieces) <= judge.plan_s(plan, pieces) * (1 + 1e-6)
