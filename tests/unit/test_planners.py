"""The built-in planners on a cost model small enough to reason about by hand."""

# The hand-made cost model has only what planners ask for.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOptionalOperand=false, reportOperatorIssue=false

from __future__ import annotations

import pytest

from muxtune.errors import ConfigError
from muxtune.planners.batched import BatchedPlanner
from muxtune.planners.exclusive import ExclusivePlanner
from muxtune.planners.muxtune import MuxTunePlanner
from muxtune.registry import PLANNERS
from muxtune.types import PackRule, Plan, Refusal
from tests.unit.planner_helpers import HandCost, planned, task, view


def test_one_htask_wins_where_launches_dominate():
    plan = planned(HandCost(launch_s=1.0), task("a"), task("b"), task("c"))
    assert len(plan.htasks) == 1
    assert set(plan.htasks[0].quota) == {"a", "b", "c"}


def test_one_htask_wins_below_the_saturation_point():
    plan = planned(HandCost(knee_rows=1024), task("a"), task("b", batch=2))
    assert len(plan.htasks) == 1


def test_two_htasks_win_where_concatenated_adapters_cost_more_than_a_launch():
    """Fused, every row pays for every rank; apart, only for its own: 4 x 64 rows each."""
    cost = HandCost(launch_s=1e-4, rank_row_s=1e-5)
    plan = planned(cost, task("a", rank=64), task("b", rank=64, length=48))
    assert len(plan.htasks) == 2
    fused = planned(cost, task("a", rank=64), task("b", rank=64, length=48), fusion="all_spatial")
    assert plan.predicted.round_time_s.value < fused.predicted.round_time_s.value


def test_two_htasks_win_where_one_does_not_fit_memory():
    """Steps of 5 and 3 chunks, memory for 5: fused they take two passes of 3 + 2 chunks, 10 in
    all with filler; apart 5 + 3."""
    tasks = [task("a", length=16, batch=5), task("b", length=16, batch=3)]
    plan = planned(HandCost(), *tasks, limit=1020 + 5 * 16, max_shapes=1)
    assert sorted(htask.shapes[-1].num_chunks for htask in plan.htasks) == [3, 5]
    assert plan.predicted.peak_memory_bytes.value == 1020 + 5 * 16
    assert len(planned(HandCost(launch_s=1e-3), *tasks).htasks) == 1


def test_memory_limit_splits_a_step_into_micro_batches():
    plan = planned(HandCost(), task("a", batch=16), limit=1010 + 4 * 64)
    (htask,) = plan.htasks
    assert htask.shapes[-1].padded_tokens <= 4 * 64


def test_refusal_carries_bytes():
    planner = MuxTunePlanner(lambda model, device: HandCost())
    refusal = planner.plan(view(task("a"), limit=1040), None)
    assert isinstance(refusal, Refusal)
    assert refusal.needed_bytes == 1010 + 64 and refusal.available_bytes == 1040
    assert refusal.task_ids == ("a",)


def test_chunk_length_follows_the_lengths():
    """48-token sequences fill 16-token chunks exactly; 64-token chunks would waste a quarter."""
    plan = planned(HandCost(), task("a", length=48))
    assert plan.predicted.round_effective_tokens == plan.predicted.round_padded_tokens


def test_same_tasks_same_plan_in_any_order_and_unchanged_is_previous():
    cost = HandCost(launch_s=1e-3)
    planner = MuxTunePlanner(lambda model, device: cost)
    tasks = [task("a", 48), task("b", 64, 8), task("c", 100, 2)]
    first = planner.plan(view(*tasks), None)
    assert isinstance(first, Plan) and first.epoch == 0
    assert planner.plan(view(*tasks[::-1]), first) is first
    assert MuxTunePlanner(lambda model, device: cost).plan(view(*tasks[::-1]), None) == first
    grown = planner.plan(view(*tasks, task("d", 64, 8)), first)
    assert isinstance(grown, Plan) and grown.epoch == 1


@pytest.mark.parametrize(
    "field", [{"sequences_per_step": 64}, {"max_length_tokens": 16}, {"max_slowdown": 9.0}]
)
def test_tasks_that_share_slot_and_lengths_may_be_of_different_classes(field: dict[str, int]):
    """Fleets hand out the same objects to many tasks; those are what classes are looked up by."""
    one = task("a", batch=4)
    other = one._replace(task_id="b", **field)
    assert other.slot is one.slot and other.lengths is one.lengths
    planner = MuxTunePlanner(lambda model, device: HandCost(launch_s=1e-3))
    fresh = MuxTunePlanner(lambda model, device: HandCost(launch_s=1e-3))
    assert planner.class_of_view(one) != planner.class_of_view(other)
    assert planner.plan(view(other), None) == fresh.plan(view(other), None)


def test_max_slowdown_refuses_the_neighbour_that_would_break_it():
    planner = MuxTunePlanner(lambda model, device: HandCost(), promise_margin=0.0)
    tasks = [task(name, max_slowdown=2.0) for name in "abc"]
    assert isinstance(planner.plan(view(*tasks[:2]), None), Plan)
    refusal = planner.plan(view(*tasks), None)
    assert isinstance(refusal, Refusal) and refusal.predicted_slowdown == pytest.approx(3.0)


def test_exclusive_pads_and_refuses_a_second_task():
    planner = ExclusivePlanner(lambda model, device: HandCost())
    plan = planner.plan(view(task("a", length=61)), None)
    assert isinstance(plan, Plan)
    assert plan.htasks[0].packing is PackRule.PAD
    assert plan.predicted.round_padded_tokens == 4 * 64
    assert isinstance(planner.plan(view(task("a"), task("b")), None), Refusal)


def test_batched_pads_every_row_to_the_longest():
    planner = BatchedPlanner(lambda model, device: HandCost())
    plan = planner.plan(view(task("a", length=32), task("b", length=64, batch=2)), None)
    assert isinstance(plan, Plan)
    assert plan.predicted.round_padded_tokens == 6 * 64
    assert plan.predicted.round_effective_tokens == 4 * 32 + 2 * 64


def test_batched_splits_rows_when_memory_is_short():
    planner = BatchedPlanner(lambda model, device: HandCost())
    plan = planner.plan(view(task("a", batch=8), limit=1010 + 2 * 64), None)
    assert isinstance(plan, Plan) and plan.htasks[0].quota == {"a": 2}


def test_several_htasks_take_turns_in_proportion():
    plan = planned(HandCost(), task("a"), task("b", batch=8), fusion="all_temporal")
    assert len(plan.round) == 2
    steps = plan.predicted.step_time_s
    assert max(steps.values()) <= 1.35 * min(steps.values())


def test_bad_options_name_the_field_and_what_exists():
    with pytest.raises(ConfigError, match=r"planner\.fusion.*planned"):
        MuxTunePlanner(lambda model, device: HandCost(), fusion="both")
    with pytest.raises(ConfigError, match=r"planner\.chunk_tokens.*multiple"):
        MuxTunePlanner(lambda model, device: HandCost(), chunk_tokens=40)
    with pytest.raises(ConfigError, match=r"planner\.tile_tokens.*1 or more"):
        MuxTunePlanner(lambda model, device: HandCost(), tile_tokens=0)
    with pytest.raises(ConfigError, match=r"planner: 'muxtun' does not exist.*'muxtune'.*batched"):
        PLANNERS.get("muxtun")
