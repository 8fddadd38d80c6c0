"""Why a plan is as it is, in words: gains, what memory and promises forbid, the runner-up."""

# The hand-made cost model has only what planners ask for.
# pyright: reportArgumentType=false

from __future__ import annotations

from muxtune.planners.explanation import (
    Alternative,
    alternatives,
    fusions,
    saturation_tokens,
    unpromised,
)
from muxtune.planners.muxtune import MuxTunePlanner
from muxtune.report.why import Why, why_lines
from muxtune.types import InstanceView, Plan, ReplicaShape
from tests.unit.planner_helpers import HandCost, task, view


def explained(instance: InstanceView, cost: HandCost, **options) -> tuple[Plan, Why]:
    def make(more) -> MuxTunePlanner:
        return MuxTunePlanner(lambda model, device: cost, **options, **more)

    plan = make({}).plan(instance, None)
    assert isinstance(plan, Plan)
    return plan, Why(
        plan,
        1000.0,
        saturation_tokens(cost, ReplicaShape(), 16),
        tuple(htask.shapes[-1].padded_tokens for htask in plan.htasks),
        instance.memory_limit_bytes,
        fusions(instance, plan, make({})),
        alternatives(instance, plan, make),
        unpromised(instance, plan, make),
    )


def line(why: Why, beginning: str) -> str:
    (found,) = [text for text in why_lines(why) if text.startswith(beginning)]
    return found


def test_saturation_is_read_off_the_cost_model():
    """A pass of fewer rows than the knee takes as long as one of the knee's."""
    for knee in (64, 512):
        assert saturation_tokens(HandCost(knee_rows=knee), ReplicaShape(), 16) == knee
    assert saturation_tokens(HandCost(), ReplicaShape(), 16) == 16


def test_what_fusing_gains_and_the_runner_up_are_told_in_seconds_and_tokens():
    plan, why = explained(view(task("a", 48), task("b", 48)), HandCost(launch_s=0.05))
    assert len(plan.htasks) == 1
    now_s = plan.predicted.tasks_step_time_s
    (split,) = why.fusions
    assert split.step_time_s is not None
    lost = 1000 / now_s - 1000 / split.step_time_s
    fused = line(why, "fused: a, b")
    assert f"({split.slower:.1%}) slower" in fused and f"{lost:,.0f} fewer" in fused
    best = next(item for item in why.alternatives if item.slower > 5e-4)
    assert best.name in line(why, "runner-up") and f"{best.slower:.1%}" in line(why, "runner-up")
    equal = Alternative("the same in other words", now_s, 0.0)
    told = line(why._replace(alternatives=[equal, *why.alternatives]), "runner-up")
    assert "other words" not in told


def test_what_memory_and_promises_forbid_is_told():
    tasks = [task("a", 96, max_slowdown=1.5), task("b", 96), task("c", 96)]
    plan, why = explained(view(*tasks), HandCost(launch_s=0.05))
    free = MuxTunePlanner(lambda model, device: HandCost(launch_s=0.05)).plan(
        view(*(each._replace(max_slowdown=None) for each in tasks)), None
    )
    assert isinstance(free, Plan)
    gain = 1 - free.predicted.tasks_step_time_s / plan.predicted.tasks_step_time_s
    assert gain > 0.01 and f"({gain:.1%}) faster" in line(why, "promises forbid")
    cost = HandCost(launch_s=0.05)
    resident = cost.resident_bytes([None] * 2, None)
    tight = view(task("a", 96), task("b", 96), limit=resident + 100)
    plan, why = explained(tight, cost)
    assert len(plan.htasks) == 2 and why.fusions[0].step_time_s is None
    assert "a | b" in line(why, "memory forbids")
