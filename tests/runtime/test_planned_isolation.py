"""The muxtune planner's own plans on the real executor: several hTasks, a chunk length that it
chose, and still no task can tell whether it has neighbours."""

# The hand-made cost model has only what planners ask for.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOptionalOperand=false, reportOperatorIssue=false

from __future__ import annotations

from pathlib import Path

import pytest

from muxtune.fleet import task_view
from muxtune.planners.muxtune import MuxTunePlanner
from muxtune.runtime.backbone import BackboneStore
from muxtune.types import InstanceView, LengthSummary, Plan, TaskReadyData, TaskSpec
from tests.runtime.runtime_helpers import (
    Bench,
    make_htask,
    make_plan,
    make_task,
    worst_gap,
)
from tests.unit.planner_helpers import HandCost

STEPS = 6


def tasks_of() -> list[TaskSpec]:
    common = {"num_steps": STEPS, "dropout": 0.1}
    return [
        make_task("a", **common),
        make_task("b", **common, rank=8, targets=("q_proj", "o_proj"), batch_size=5),
        make_task("c", **common, rank=2, targets=("all-linear",), max_length_tokens=9),
        make_task("d", **common, rank=16, targets=("up_proj",), batch_size=2),
    ]


def ready(task: TaskSpec) -> TaskReadyData:
    """What a library tells of lengths spread evenly from 2 to the longest."""
    longest = task.data.max_length_tokens
    quantiles = tuple(round(2 + (longest - 2) * at / 32) for at in range(33))
    mean = (2 + longest) / 2
    square = sum(n * n for n in quantiles) / 33
    return TaskReadyData(
        STEPS, LengthSummary(23, mean, mean - 1, square, longest, quantiles, str(task.seed))
    )


def plan_of(tasks: list[TaskSpec], cost: HandCost, limit_bytes: int = 10**9) -> Plan:
    views = tuple(task_view(task, ready(task)) for task in tasks)
    view = InstanceView("i0", 0, views, None, limit_bytes, model="tiny", device="cpu")
    plan = MuxTunePlanner(lambda model, device: cost, tile_tokens=8).plan(view, None)
    assert isinstance(plan, Plan), plan
    return plan


# Little memory; or rows that cost by everybody's ranks, so that fewer neighbours are quicker.
SPLITS = {
    "memory": (HandCost(launch_s=1e-3), 1040 + 80),
    "cost": (HandCost(launch_s=1e-6, rank_row_s=1e-4), 10**9),
}


@pytest.mark.parametrize("why", SPLITS)
def test_what_the_planner_plans_is_bit_for_bit_alone(
    store: BackboneStore, tmp_path: Path, why: str
) -> None:
    tasks = tasks_of()
    plan = plan_of(tasks, *SPLITS[why])
    assert len(plan.htasks) >= 2 and sorted(plan.task_ids) == ["a", "b", "c", "d"]
    together = Bench(tmp_path / "together", store)
    together.run(plan, *tasks)
    for task in tasks:
        (htask,) = [htask for htask in plan.htasks if task.task_id in htask.quota]
        chunk, quota = htask.shapes[0].chunk_tokens, htask.quota[task.task_id]
        alone = Bench(tmp_path / task.task_id, store)
        alone.run(make_plan([make_htask([task], chunk, quota)]), task)
        gap = worst_gap(together.weights(task), alone.weights(task))
        assert gap == 0.0, f"{task.task_id} in chunks of {chunk}"


def test_the_planner_s_plan_alone_is_the_same_training(
    store: BackboneStore, tmp_path: Path
) -> None:
    """Planned alone a task may get other chunks, which changes rounding and nothing else."""
    tasks = tasks_of()
    plan = plan_of(tasks, *SPLITS["memory"])
    together = Bench(tmp_path / "together", store)
    together.run(plan, *tasks)
    alone = Bench(tmp_path / "alone", store)
    alone.run(plan_of(tasks[:1], HandCost(launch_s=1e-3)), tasks[0])
    assert worst_gap(together.weights(tasks[0]), alone.weights(tasks[0])) <= 1e-5
