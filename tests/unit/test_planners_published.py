"""The defining property of each published planner, on a cost model reckoned by hand."""

# The hand-made cost model has only what planners ask for.
# pyright: reportArgumentType=false

from __future__ import annotations

import random
from typing import Any

import pytest

from muxtune.cost.analytic import AnalyticCostModel, AnalyticOptions
from muxtune.cost.devices import device_figures
from muxtune.cost.shapes import model_shape
from muxtune.errors import ConfigError
from muxtune.planners.lorafusion import LoraFusionPlanner, head_with_tail
from muxtune.planners.mlora import MLoraPlanner
from muxtune.planners.tlora import TLoraPlanner, tokens_per_s
from muxtune.planning.orchestration import RoundProblem, bubble_account, lorapp
from muxtune.planning.step_builder import StepBuilder
from muxtune.registry import PLANNERS
from muxtune.types import (
    AdapterSlot,
    Cursor,
    InstanceView,
    Plan,
    Refusal,
    ReplicaShape,
    ShapeKey,
    TaskView,
)
from tests.unit.planner_helpers import HandCost, task, view
from tests.unit.planning_helpers import TableLengths
from tests.unit.test_orchestration_player import pass_graph

NAMES = ("exclusive", "exclusive_fast", "batched", "mlora", "lorafusion", "tlora", "muxtune")


def piped(tasks: list[TaskView], num_stages: int) -> InstanceView:
    return view(*tasks)._replace(replicas=(ReplicaShape(1, num_stages),))


def planned(planner: Any, instance: InstanceView) -> Plan:
    plan = planner.plan(instance, None)
    assert isinstance(plan, Plan), plan
    return plan


def lengths_of(tasks: list[TaskView], num_steps: int) -> TableLengths:
    lengths = TableLengths()
    for item in tasks:
        batch = [item.lengths.max_tokens] * item.sequences_per_step
        lengths.add(item.task_id, [batch], num_steps)
    return lengths


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_plans_a_single_task_with_the_costs_it_is_given(name: str):
    """Twice as slow a machine makes the plan predict twice the time: no speed of its own."""
    seconds = [
        planned(
            PLANNERS.get(name)(costs=lambda model, device, s=row_s: HandCost(row_s=s)),
            view(task("a")),
        ).predicted.tasks_step_time_s
        for row_s in (1e-4, 2e-4)
    ]
    assert seconds[1] == pytest.approx(2 * seconds[0])


# -------------------------------------------------------------------------------------- mLoRA


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 6, 8, 11])
def test_lorapp_idles_for_the_missing_adapters_only(depth: int, num_tasks: int):
    """Bubble max((D - L) / D, 0), in the plan and when its turns are played."""
    tasks = [task(f"t{i}") for i in range(num_tasks)]
    plan = planned(MLoraPlanner(lambda model, device: HandCost()), piped(tasks, depth))
    expected = max((depth - num_tasks) / depth, 0.0)
    passes_s = [1e-4 * htask.shapes[-1].padded_tokens for htask in plan.htasks]
    bubble = 1 - sum(passes_s) / plan.predicted.round_time_s.value
    assert len(plan.htasks) == min(num_tasks, depth)
    if num_tasks % depth == 0 or num_tasks < depth:  # else batches are unequal
        assert bubble == pytest.approx(expected)
    if depth > 1 and num_tasks <= depth:
        assert played_bubble(plan, depth) == pytest.approx(expected, abs=1e-9)


def played_bubble(plan: Plan, depth: int) -> float:
    graph, durations = pass_graph(depth), (10,) * (2 * depth) + (0,) * depth
    count = len(plan.htasks)
    problem = RoundProblem((graph,) * count, (durations,) * count, plan.round, depth)
    return bubble_account(lorapp(problem, rounds=12)).steady_bubble


def test_batch_lora_fuses_all_on_one_gpu_and_a_stage_s_share_in_a_pipeline():
    tasks = [task(f"t{i}") for i in range(6)]
    planner = MLoraPlanner(lambda model, device: HandCost())
    assert len(planned(planner, view(*tasks)).htasks) == 1
    sizes = [len(htask.quota) for htask in planned(planner, piped(tasks, 4)).htasks]
    assert sorted(sizes) == [1, 1, 2, 2]


def test_separate_adapter_kernels_cost_launches_and_grouped_ones_do_not():
    """What tells mLoRA's execution from LoRAFusion's is in the costs."""
    shape = ShapeKey(64, 8, (AdapterSlot("lora", 16, ("q_proj", "v_proj")),) * 8)
    seconds = {
        grouped: AnalyticCostModel(
            model_shape("llama-2-7b"),
            device_figures("H100-SXM"),
            AnalyticOptions.eager(grouped_adapters=grouped),
        )
        .pass_coefficients(shape, ReplicaShape())
        .base_s
        for grouped in (True, False)
    }
    assert seconds[False] > 1.3 * seconds[True]


# --------------------------------------------------------------------------------- LoRAFusion


def test_head_is_paired_with_tail():
    assert head_with_tail([10, 500, 40, 90, 20]) == [(0, 1), (4, 3), (2,)]


def distances(plan: Plan, tasks: list[TaskView], num_steps: int = 5) -> list[int]:
    """Micro-batches from the last one of a task's step to the first of its next one, plus 0 for
    neighbours, of all tasks."""
    lengths, builder = lengths_of(tasks, num_steps), StepBuilder()
    cursors = {item.task_id: Cursor() for item in tasks}
    closed: dict[str, int] = {}
    found, at = [], 0
    for _ in range(num_steps):
        batches, cursors = builder.next_round(plan, cursors, lengths)
        for batch in batches:
            starts = {name for name in batch.steps if name in closed}
            found += [at - closed.pop(name) for name in sorted(starts)]
            closed.update(dict.fromkeys(batch.closes_step, at))
            at += 1
    return found


@pytest.mark.parametrize("stages", [2, 3, 4, 6])
def test_dependent_batches_are_at_least_the_pipeline_apart(stages: int):
    """In a pipeline of S stages a task's next batch begins S or more micro-batches later."""
    draw = random.Random(stages)
    for _ in range(10):
        tasks = [
            task(f"t{i}", length=draw.randint(20, 300), batch=draw.randint(1, 6))
            for i in range(2 * stages + draw.randint(0, 6))
        ]
        planner = LoraFusionPlanner(lambda model, device: HandCost())
        plan = planned(planner, piped(tasks, stages))
        assert min(distances(plan, tasks)) >= stages, plan.reason
        assert "idle" not in plan.reason


def test_missing_micro_batches_are_counted_as_idle_time():
    """Two adapters in four stages: two of every four micro-batch times are empty."""
    tasks = [task("a"), task("b")]
    planner = LoraFusionPlanner(lambda model, device: HandCost(), capacity_tokens=4096)
    plan = planned(planner, piped(tasks, 4))
    assert min(distances(plan, tasks)) == 2 and "2 passes idle" in plan.reason
    pass_s = 1e-4 * plan.htasks[0].shapes[-1].padded_tokens
    assert plan.predicted.round_time_s.value == pytest.approx(4 * pass_s)


def test_micro_batches_stay_within_the_capacity():
    tasks = [task(f"t{i}", length=50 * (i + 1)) for i in range(6)]
    for capacity in (512, 1024, 4096):
        planner = LoraFusionPlanner(lambda model, device: HandCost(), capacity_tokens=capacity)
        plan = planned(planner, view(*tasks))
        largest = max(htask.shapes[-1].padded_tokens for htask in plan.htasks)
        assert capacity / 2 < largest <= capacity


def test_groups_are_merged_where_that_saves_a_micro_batch():
    """Four small pairs fit into one micro-batch, unless a pipeline needs them apart."""
    tasks = [task(f"t{i}", length=16 + i) for i in range(8)]
    planner = LoraFusionPlanner(lambda model, device: HandCost(), capacity_tokens=8192)
    assert len(planned(planner, view(*tasks)).htasks) == 1
    assert len(planned(planner, piped(tasks, 4)).htasks) == 4


# -------------------------------------------------------------------------------------- tLoRA


def grow(planner: TLoraPlanner, tasks: list[TaskView]) -> tuple[Plan, list[TaskView]]:
    """Adds tasks one by one, as an engine does, and keeps those that the planner takes."""
    plan, held = planned(planner, view(tasks[0])), [tasks[0]]
    for item in tasks[1:]:
        answer = planner.plan(view(*held, item), plan)
        if isinstance(answer, Plan):
            plan, held = answer, [*held, item]
    return plan, held


@pytest.mark.parametrize("bound", [1.1, 1.5, 2.0, 4.0])
def test_no_job_is_slowed_beyond_its_bound(bound: float):
    draw = random.Random(7)
    for _ in range(8):
        tasks = [
            task(
                f"t{i:02d}", length=draw.randint(16, 400), batch=draw.randint(1, 8),
                max_slowdown=draw.choice([None, None, 1.3]),
            )
            for i in range(10)
        ]  # fmt: skip
        cost = HandCost(launch_s=0.05, row_s=2e-5, knee_rows=600)
        planner = TLoraPlanner(lambda model, device, cost=cost: cost, slowdown_bound=bound)
        plan, held = grow(planner, tasks)
        for item in held:
            solo_s = plan.predicted.solo_step_time_s[item.task_id]
            allowed = min(bound, item.max_slowdown or bound)
            assert plan.predicted.step_time_s[item.task_id] <= allowed * solo_s * (1 + 1e-9)


def test_a_group_grows_only_while_joint_throughput_rises():
    """A machine that is full with one task gains nothing by a second."""
    tasks = [task("a", 128), task("b", 128)]
    full = TLoraPlanner(lambda model, device: HandCost(rank_row_s=1e-6), slowdown_bound=100.0)
    first = planned(full, view(tasks[0]))
    answer = full.plan(view(*tasks), first)
    assert isinstance(answer, Refusal) and "residual capacity" in answer.remedy
    idle = TLoraPlanner(lambda model, device: HandCost(knee_rows=5000), slowdown_bound=100.0)
    first = planned(idle, view(tasks[0]))
    joint = idle.plan(view(*tasks), first)
    assert isinstance(joint, Plan) and tokens_per_s(joint) > tokens_per_s(first)


def test_those_who_stay_are_planned_when_somebody_leaves():
    cost = HandCost(rank_row_s=1e-6)
    planner = TLoraPlanner(lambda model, device: cost, slowdown_bound=100.0)
    both = planned(planner, view(task("a"), task("b")))
    assert isinstance(planner.plan(view(task("a")), both), Plan)


@pytest.mark.parametrize(
    ("name", "options", "field"),
    [
        ("tlora", {"slowdown_bound": 0.5}, "slowdown_bound"),
        ("lorafusion", {"capacity_tokens": -1}, "capacity_tokens"),
        ("lorafusion", {"tile_tokens": 0}, "tile_tokens"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any], field: str):
    with pytest.raises(ConfigError, match=field):
        PLANNERS.get(name)(costs=lambda model, device: HandCost(), **options)
