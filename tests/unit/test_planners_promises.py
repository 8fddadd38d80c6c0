"""What the muxtune planner promises: bounds on slowdown, hysteresis, switches, honest refusals."""

# The hand-made cost model has only what planners ask for.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOptionalOperand=false, reportOperatorIssue=false

from __future__ import annotations

import math

import pytest

from muxtune.cost import CostBook
from muxtune.errors import ConfigError
from muxtune.planners.muxtune import MuxTunePlanner
from muxtune.planners.pacing import Demand, paced_turns
from muxtune.planners.rounds import round_of, turn_counts
from muxtune.types import LengthSummary, PackRule, PassCoefficients, Plan, Refusal, ReplicaShape
from tests.unit.planner_helpers import HandCost, planned, task, view

MIXED = LengthSummary(
    100, 40.0, 39.0, 1804.0, 64, tuple(round(16 + 48 * i / 32) for i in range(33)), "mixed"
)


def planner_of(cost: HandCost, **options) -> MuxTunePlanner:
    return MuxTunePlanner(lambda model, device: cost, **{"hysteresis": True, **options})


# ------------------------------------------------------------------------------ max_slowdown


def test_a_promised_task_gets_more_turns_than_its_neighbours():
    tasks = [task("a", max_slowdown=2.0), task("b"), task("c"), task("d")]
    plan = planned(HandCost(), *tasks)
    assert plan.predicted.step_time_s["a"] <= 2 * plan.predicted.solo_step_time_s["a"] * (1 + 1e-9)
    assert plan.predicted.step_time_s["b"] > 2 * plan.predicted.solo_step_time_s["b"]
    (promised,) = [htask for htask in plan.htasks if "a" in htask.quota]
    assert set(promised.quota) == {"a"}


def test_promises_beyond_the_whole_device_are_refused_with_the_slowdown():
    tasks = [task(name, max_slowdown=2.0) for name in "abc"]
    refusal = planner_of(HandCost()).plan(view(*tasks), None)
    assert isinstance(refusal, Refusal)
    assert refusal.predicted_slowdown == pytest.approx(3.0)
    assert set(refusal.task_ids) == {"a", "b", "c"}


@pytest.mark.parametrize("bound", [0.5, -1.0, math.nan])
def test_a_slowdown_below_one_is_refused(bound):
    refusal = planner_of(HandCost()).plan(view(task("a", max_slowdown=bound)), None)
    assert isinstance(refusal, Refusal) and "max_slowdown" in refusal.reason


def test_paced_turns_are_the_fewest_that_keep_the_promise():
    free, promised = Demand(1.0, 1.0, 0.0), Demand(1.0, 1.0, 1 / 2.5)
    pair = paced_turns([free, promised])
    assert pair is not None and pair.counts == (1, 1)
    turns = paced_turns([free, free, free, promised])
    assert turns is not None
    assert turns.round_time_s / turns.counts[3] <= 2.5
    assert paced_turns([promised, promised, promised]) is None


# -------------------------------------------------------------------------------- hysteresis


def fleet_of(planner: MuxTunePlanner, *names: str, **fields) -> tuple[Plan, list]:
    tasks = [task(name, **fields) for name in names]
    plan = planner.plan(view(*tasks), None)
    assert isinstance(plan, Plan)
    return plan, tasks


def test_a_departure_near_the_end_keeps_the_shapes():
    """New shapes take seconds; ten steps of what is left take less than one."""
    planner = planner_of(HandCost(launch_s=1e-3))
    before, tasks = fleet_of(planner, "a", "b", "c")
    after = planner.plan(view(*tasks[:2]), before)
    assert isinstance(after, Plan) and after.reason.startswith("kept:")
    assert after.epoch == before.epoch + 1
    assert after.htasks[0].shapes == before.htasks[0].shapes
    assert set(after.htasks[0].quota) == {"a", "b"}
    assert after.htasks[0].slot_of == {n: before.htasks[0].slot_of[n] for n in "ab"}


def test_a_departure_far_from_the_end_takes_the_better_plan():
    planner = planner_of(HandCost(launch_s=1e-3))
    before, tasks = fleet_of(planner, "a", "b", "c", num_steps=1_000_000)
    after = planner.plan(view(*tasks[:2]), before)
    assert isinstance(after, Plan)
    assert after.htasks == planner.plan(view(*tasks[:2]), None).htasks


def test_what_was_forgone_is_what_time_has_passed_and_in_the_end_the_better_plan_is_taken():
    planner = planner_of(HandCost(launch_s=1e-3))
    tasks = [task("a"), task("b", num_steps=1_000_000), task("c")]
    before = planner.plan(view(*tasks), None)
    assert isinstance(before, Plan)
    left = view(*tasks[:2])
    kept = planner.plan(left, before)
    assert isinstance(kept, Plan) and 0 < kept.predicted.forgone_share < 1
    again = kept
    for _ in range(50):  # asked often within one instant, nothing more is forgone
        again = planner.plan(left, again)
        assert isinstance(again, Plan) and again.predicted.forgone_s == 0
    later = left._replace(now_ns=10**9)
    half = planner.plan(later, kept)
    assert isinstance(half, Plan)
    assert half.predicted.forgone_s == pytest.approx(kept.predicted.forgone_share)
    much_later = left._replace(now_ns=10**15)
    assert planner.plan(much_later, kept).htasks == planner.plan(left, None).htasks  # type: ignore[union-attr]


def test_a_plan_that_cannot_pay_for_itself_before_all_end_is_never_taken():
    planner = planner_of(HandCost(launch_s=1e-3))
    before, tasks = fleet_of(planner, "a", "b", "c")
    left = view(*tasks[:2])
    kept = planner.plan(left, before)
    assert isinstance(kept, Plan)
    much_later = planner.plan(left._replace(now_ns=10**15), kept)
    assert isinstance(much_later, Plan) and much_later.reason.startswith("kept:")
    assert much_later.predicted.forgone_s > 1e3


def test_hysteresis_depends_on_the_view_and_the_running_plan_only():
    cost = HandCost(launch_s=1e-3)
    used = planner_of(cost)
    before, tasks = fleet_of(used, "a", "b", "c", "d")
    for kept in (tasks[:3], tasks[1:], tasks[:1]):
        used.plan(view(*kept), before)
    assert used.plan(view(*tasks[:2]), before) == planner_of(cost).plan(view(*tasks[:2]), before)


def test_hysteresis_can_be_switched_off():
    planner = planner_of(HandCost(launch_s=1e-3), hysteresis=False)
    before, tasks = fleet_of(planner, "a", "b", "c")
    after = planner.plan(view(*tasks[:2]), before)
    assert isinstance(after, Plan) and not after.reason.startswith("kept:")


def test_an_arrival_that_is_not_worth_new_shapes_gets_an_htask_of_its_own():
    """Mixed lengths have a ladder of shapes, all of which a fifth adapter would change; by itself
    the newcomer, all of one length, needs one."""
    planner = planner_of(HandCost(launch_s=1e-3))
    before, tasks = fleet_of(planner, "a", "b", "c", lengths=MIXED)
    after = planner.plan(view(*tasks, task("d")), before)
    assert isinstance(after, Plan) and after.reason.startswith("kept:")
    assert after.htasks[: len(before.htasks)] == before.htasks
    assert set(after.htasks[-1].quota) == {"d"}
    assert len(after.round) == len(after.htasks)


# ---------------------------------------------------------------------------------- switches


def test_switches_of_the_levels():
    tasks = [task("a", 48), task("b", 100)]
    assert len(planned(HandCost(), *tasks, fusion="all_temporal").htasks) == 2
    assert len(planned(HandCost(), *tasks, fusion="all_spatial").htasks) == 1
    off = planner_of(HandCost(), fusion="off")
    assert isinstance(off.plan(view(*tasks), None), Refusal)
    assert isinstance(off.plan(view(tasks[0]), None), Plan)
    padded = planned(HandCost(), *tasks, alignment="pad")
    assert {htask.packing for htask in padded.htasks} == {PackRule.PAD}
    packed = planned(HandCost(), *tasks, alignment="pack")
    assert {s.chunk_tokens for htask in packed.htasks for s in htask.shapes} == {128}


@pytest.mark.parametrize(("option", "value"), [("fusion", "both"), ("alignment", "none")])
def test_an_unknown_switch_names_what_exists(option, value):
    with pytest.raises(ConfigError, match=rf"planner\.{option}.*choose one of"):
        planner_of(HandCost(), **{option: value})


# ----------------------------------------------------------------------------------- rounds


def test_turns_are_exact_where_they_can_be_and_near_where_not():
    assert turn_counts([2.0, 4.0, 1.0], [1.0, 1.0, 1.0]) == (2, 4, 1)
    assert turn_counts([1.3, 1.3], [1.0, 2.0]) == (1, 1)
    turns = round_of((1.0, 1.1, 1.84, 2.0), (0.13, 0.17, 0.19, 0.21), 1)
    least = 1.0 * 0.13 + 1.1 * 0.17 + 1.84 * 0.19 + 2.0 * 0.21
    assert least <= turns.step_time_s <= 1.01 * least


def test_a_pipeline_waits_for_the_latency_of_its_longest_htask():
    assert round_of((1.0,), (1.0,), 4).round_time_s == 4.0
    assert round_of((1.0,) * 4, (1.0,) * 4, 4).round_time_s == 4.0
    assert round_of((8.0,), (1.0,), 4).round_time_s == 11.0  # 8 micro-batches, then 3 to drain


# ---------------------------------------------------------------------------------- bad input


class BadCost(HandCost):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def pass_coefficients(self, shape, replica):
        return PassCoefficients(self.seconds, 0.0, 0.0, (0.0,) * len(shape.slots), 0.1)


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_costs_that_are_no_times_are_refused(seconds):
    with pytest.raises(ConfigError, match=r"cost: a pass of .* is said to take"):
        planner_of(BadCost(seconds)).plan(view(task("a")), None)


@pytest.mark.parametrize(
    ("replica", "message"), [(ReplicaShape(3, 1), "tp"), (ReplicaShape(1, 64), "pp|stages|layers")]
)
def test_a_replica_that_the_model_does_not_divide_by_is_refused(replica, message):
    where = view(task("a"))._replace(model="llama-2-7b", device="H100-SXM", replicas=(replica,))
    with pytest.raises(ConfigError, match=message):
        MuxTunePlanner(CostBook()).plan(where, None)


def test_sequences_longer_than_a_fixed_chunk_span_several():
    plan = planned(HandCost(), task("a", 100), chunk_tokens=32)
    assert plan.htasks[0].quota["a"] >= 4
