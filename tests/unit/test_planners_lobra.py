"""LobRA: joint steps over replicas, buckets, and dispatch that beats dispatch by length."""

# The hand-made cost model has only what planners ask for.
# pyright: reportArgumentType=false

from __future__ import annotations

import random

import numpy as np
import pytest

from muxtune.cost.analytic import AnalyticCostModel
from muxtune.cost.devices import device_figures
from muxtune.cost.shapes import model_shape
from muxtune.errors import ConfigError
from muxtune.planners.lobra import LobraPlanner
from muxtune.planning.lobra import (
    Buckets,
    Configuration,
    LayerTimes,
    ReplicaGroup,
    ReplicaTimes,
    dispatch_by_length,
    dispatch_step,
    fill,
    plan_deployment,
    slowest_s,
)
from muxtune.planning.lobra.from_costs import configurations, replica_times
from muxtune.planning.replica_dispatch import deal
from muxtune.planning.step_builder import StepBuilder, pass_load
from muxtune.types import (
    NS_PER_S,
    AdapterSlot,
    Cursor,
    DispatchRule,
    Estimates,
    HTaskTurn,
    Plan,
    Refusal,
    ReplicaShape,
)
from tests.unit.planner_helpers import HandCost, task, view
from tests.unit.planning_helpers import TableLengths

ONE, TWO = ReplicaShape(), ReplicaShape(2, 1)


class ReplicaCost(HandCost):
    """A replica of n GPUs is n times as fast; times of loads, as a course asks for them."""

    def pass_coefficients(self, shape, replica):
        found = super().pass_coefficients(shape, replica)
        return found._replace(base_s=found.base_s / replica.num_gpus)

    def pass_times_s(self, loads, replica):
        values = [self.pass_coefficients(load.shape, replica).base_s for load in loads]
        value = np.array(values)
        return Estimates(value, value, value, np.zeros(len(value), dtype=bool))


COST = ReplicaCost()


def planned(tasks, replicas, **options) -> Plan:
    planner = LobraPlanner(lambda model, device: COST, **options)
    plan = planner.plan(view(*tasks)._replace(replicas=replicas), None)
    assert isinstance(plan, Plan), plan
    return plan


def lengths_of(tasks, num_steps: int = 6) -> TableLengths:
    """Each task has two steps more than the one before."""
    seed, lengths = random.Random(3), TableLengths()
    for number, item in enumerate(tasks):
        most = item.lengths.max_tokens
        batch = [[seed.randint(most // 2, most) for _ in range(item.sequences_per_step)]
                 for _ in range(num_steps)]  # fmt: skip
        lengths.add(item.task_id, batch, num_steps + 2 * number)
    return lengths


def test_tasks_of_unlike_lengths_get_buckets_of_their_own():
    tasks = [task("a", 16), task("b", 16), task("c", 512)]
    plan = planned(tasks, (ONE,))
    assert sorted(sorted(htask.quota) for htask in plan.htasks) == [["a", "b"], ["c"]]
    assert plan.dispatch is DispatchRule.SINGLE
    assert len(planned(tasks, (ONE,), max_buckets=1).htasks) == 1


def test_more_replicas_take_shares_of_a_step():
    tasks = [task(f"t{i}", batch=16) for i in range(4)]
    seconds = [planned(tasks, (ONE,) * n).predicted.tasks_step_time_s for n in (1, 2, 4)]
    assert planned(tasks, (ONE, TWO)).dispatch is DispatchRule.BALANCED
    # Whole rows, and one more than a replica's share.
    assert seconds[1] == pytest.approx(seconds[0] * 33 / 64)
    assert seconds[2] == pytest.approx(seconds[0] * 17 / 64)


def test_what_no_replica_holds_is_refused():
    planner = LobraPlanner(lambda model, device: COST)
    answer = planner.plan(view(task("a", 512), limit=1100)._replace(replicas=(ONE, ONE)), None)
    assert isinstance(answer, Refusal) and answer.needed_bytes > 1100


@pytest.mark.parametrize("replicas", [(ONE, ONE), (ONE, TWO, TWO)])
def test_a_course_over_replicas_is_that_of_dealing_round_by_round(replicas):
    """Cursors and ends exactly; time as the mean of the rounds it looked at."""
    tasks = [task("a", 40, batch=5), task("b", 90, batch=3)]
    lengths, builder = lengths_of(tasks, 4), StepBuilder()
    plan = planned(tasks, replicas)
    cursors = {item.task_id: Cursor() for item in tasks}
    forecast = builder.forecast(plan, cursors, lengths, COST)
    assert (forecast.rounds, forecast.task_ids, forecast.exact) == (4, ("a",), False)
    seconds, walked = 0.0, cursors
    for rounds in range(1, 8):
        batches, walked = builder.next_round(plan, walked, lengths)
        assert builder.advance(plan, cursors, lengths, rounds) == walked
        if rounds <= forecast.rounds:
            seconds += sum(slowest(batch, plan, lengths) for batch in batches)
    assert forecast.duration_ns == pytest.approx(seconds * NS_PER_S, abs=2)
    half = builder.rounds_until(plan, cursors, lengths, COST, forecast.duration_ns // 2)
    assert half[0] == 2


def slowest(batch, plan: Plan, lengths) -> float:
    parts = zip(deal(batch, plan.replicas), plan.replicas, strict=True)
    return max(
        float(COST.pass_times_s([pass_load(part, lengths)], replica).value[0])
        for part, replica in parts
        if part.chunks
    )


def test_counted_turns_over_replicas_are_refused():
    tasks = [task("a")]
    plan = planned(tasks, (ONE, ONE))._replace(round=(HTaskTurn(0, 1),))
    with pytest.raises(ConfigError, match="counted turns"):
        StepBuilder().forecast(plan, {"a": Cursor()}, lengths_of(tasks), COST)


# ------------------------------------------------------------------------ dispatch, deployment


def test_a_step_is_never_slower_than_dispatch_by_length():
    """On random replicas and batches, whole sequences dealt out."""
    times = ReplicaTimes(
        LayerTimes({tp: (0.0, 0.0, 1e-6 / tp**0.8, 0.0, 0.0, 2e-4) for tp in (1, 2, 4)}), 8
    )
    better = 0
    for number in range(25):
        seed = random.Random(number)
        groups = [
            ReplicaGroup(Configuration(ReplicaShape(tp, 1), 1024 * tp * tp), seed.randint(1, 3))
            for tp in (1, 2, 4)
        ]
        lengths = sorted(seed.sample(range(128, 8192, 128), 4))
        counts = tuple(seed.randint(1, 40) for _ in lengths)
        buckets = Buckets(tuple(lengths), counts, sum(lengths))
        by_length = fill(times, groups, buckets, dispatch_by_length(times, groups, buckets))
        ours_s = slowest_s(times, dispatch_step(times, groups, buckets))
        assert ours_s <= slowest_s(times, by_length)
        better += ours_s < 0.9 * slowest_s(times, by_length)
    assert better >= 10


def test_short_sequences_on_large_gpus_are_deployed_on_one_gpu_each():
    """Why the bake-off gives LobRA replicas of one GPU: the deployment planner would, too."""
    cost = AnalyticCostModel(model_shape("llama-2-7b"), device_figures("H100-SXM"))
    slots = (AdapterSlot("lora", 16, ("q_proj", "v_proj")),) * 8
    shapes = [ReplicaShape(tp, 1) for tp in (1, 2, 4)]
    found = plan_deployment(
        replica_times(cost, slots, shapes, (64, 128, 256, 512)),
        configurations(cost, slots, shapes, 72_000_000_000),
        8,
        Buckets((64, 128, 256), (48, 24, 24), 10_000),
    )
    assert str(found) == "<1,1> x 8"
