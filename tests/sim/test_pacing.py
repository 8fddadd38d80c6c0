"""Instances of several GPUs: planner, fleet simulation and iteration player agree on a round."""

from __future__ import annotations

import pytest

from muxtune.cost import CostBook
from muxtune.cost.book import profiled_model
from muxtune.cost.schema import load_profile
from muxtune.cost.shipped import profile_path
from muxtune.planners.base import PlannerBase
from muxtune.planners.batched import BatchedPlanner
from muxtune.planners.muxtune import MuxTunePlanner
from muxtune.planning.orchestration import played, round_time_s
from muxtune.planning.rates import MeanStepBuilder
from muxtune.planning.step_builder import StepBuilder, pass_load
from muxtune.types import (
    AdapterSlot,
    Cursor,
    HTaskTurn,
    InstanceView,
    LengthSummary,
    Plan,
    ReplicaShape,
    Sample,
    TaskView,
)
from muxtune_sim.pacing import Pacer

COSTS = CostBook()
SLOT = AdapterSlot("lora", 16, ("q_proj", "v_proj"))
WIDE = AdapterSlot("lora", 64, ("all-linear",))
ROUNDS = 40


class EqualLengths:
    """Every sequence has as many tokens, all with a loss; with 128 a full chunk is what a step
    holds."""

    def __init__(self, sequences: int, tokens: int = 128) -> None:
        self.sequences, self.tokens = sequences, tokens

    def batch(self, task_id: str, step: int) -> tuple[Sample, ...]:
        return tuple(Sample(index, self.tokens, self.tokens) for index in range(self.sequences))

    def num_steps(self, task_id: str) -> int:
        return ROUNDS

    def period_steps(self, task_id: str) -> int:
        return 1

    def lengths_key(self, task_id: str) -> str:
        return "equal"


def view_of(replica: ReplicaShape, num_tasks: int, sequences: int) -> InstanceView:
    lengths = LengthSummary(100, 128, 128, 128**2, 128, (128,) * 33, "equal")
    tasks = tuple(
        TaskView(f"t{i}", "t", "llama-2-7b", SLOT, sequences, 128, lengths, ROUNDS, 0, 0)
        for i in range(num_tasks)
    )
    return InstanceView(
        "i", 0, tasks, None, 70 * 10**9, model="llama-2-7b", device="H100-SXM", replicas=(replica,)
    )


def planned(
    replica: ReplicaShape,
    num_tasks: int,
    sequences: int,
    planner: type[PlannerBase] = MuxTunePlanner,
    **options,
):
    plan = planner(COSTS, **options).plan(view_of(replica, num_tasks, sequences), None)
    assert isinstance(plan, Plan), plan
    return plan


def round_s(plan: Plan, sequences: int, builder: StepBuilder) -> tuple[float, float]:
    """(simulated seconds of a round, of filling and draining once)."""
    lengths, cursors = EqualLengths(sequences), {name: Cursor() for name in plan.task_ids}
    timed = Pacer(builder, lengths).timed(plan, cursors, COSTS("llama-2-7b", "H100-SXM"))
    forecast = builder.forecast(plan, cursors, lengths, timed.cost)
    return forecast.duration_ns / forecast.rounds / 1e9, timed.once_s


@pytest.mark.parametrize("builder", [StepBuilder, MeanStepBuilder])
@pytest.mark.parametrize("replica", [ReplicaShape(1, 4), ReplicaShape(2, 1), ReplicaShape(2, 2)])
def test_an_ordered_plan_is_simulated_at_the_players_pace(replica, builder):
    plan = planned(replica, 8, 8, fusion="all_temporal", chunk_tokens=128, max_shapes=1)
    assert plan.order
    times = COSTS("llama-2-7b", "H100-SXM").subgraph_times_s(plan)
    timeline = played(plan, times, 30)
    simulated, once_s = round_s(plan, 8, builder())
    assert simulated == pytest.approx(timeline.period_ns / 1e9, rel=1e-6)
    assert simulated == pytest.approx(plan.predicted.round_time_s.value, rel=1e-3)
    whole_s = 30 * simulated + once_s
    assert whole_s == pytest.approx(timeline.makespan_ns / 1e9, rel=0.01)


@pytest.mark.parametrize("stages", [2, 4])
def test_one_task_at_a_time_waits_for_its_optimizer(stages):
    alone = planned(ReplicaShape(1, stages), 1, 4, chunk_tokens=128, max_shapes=1, plays=0)
    plan = alone._replace(order={})
    htask = plan.htasks[0]
    plan = plan._replace(
        htasks=(htask._replace(quota={"t0": 1}, shapes=(htask.shapes[0]._replace(num_chunks=1),)),),
        round=(HTaskTurn(0, None),),
    )
    cost = COSTS("llama-2-7b", "H100-SXM")
    serial = StepBuilder().forecast(plan, {"t0": Cursor()}, EqualLengths(4), cost)
    simulated, _ = round_s(plan, 4, StepBuilder())
    passes_s = serial.duration_ns / serial.rounds / 1e9
    assert simulated == pytest.approx(passes_s * (4 + stages - 1) / 4, rel=1e-6)


def test_padded_planners_predict_what_is_simulated():
    plan = planned(ReplicaShape(1, 4), 4, 8, BatchedPlanner)
    simulated, _ = round_s(plan, 8, StepBuilder())
    assert simulated == pytest.approx(plan.predicted.round_time_s.value, rel=1e-3)


def test_a_played_round_without_an_order_is_simulated_as_it_was_predicted():
    plan = planned(ReplicaShape(1, 4), 2, 8, max_shapes=1)
    assert not plan.order and plan.predicted.played_ratio != 1
    simulated, _ = round_s(plan, 8, StepBuilder())
    assert simulated == pytest.approx(plan.predicted.round_time_s.value, rel=1e-3)


def test_without_interleaving_every_turn_drains():
    replica, tasks = ReplicaShape(1, 4), 8
    on = planned(replica, tasks, 8, fusion="all_temporal")
    off = planned(replica, tasks, 8, fusion="all_temporal", orchestration=False)
    assert off.interleaves is False and not off.order
    assert off.predicted.round_time_s.value > 2 * on.predicted.round_time_s.value
    simulated, _ = round_s(off, 8, StepBuilder())
    assert simulated == pytest.approx(off.predicted.round_time_s.value, rel=0.05)


def test_layouts_set_the_pace_where_a_task_has_left_its_slot():
    """Between two that are left in a tile, an empty slot takes longer than a mean over slots."""
    profile = load_profile(profile_path("h100-sxm_llama-2-7b", shipped_only=True))
    cost = profiled_model(profile.model_shape, profile)
    full = planned(ReplicaShape(), 3, 3, fusion="all_spatial", chunk_tokens=64, max_shapes=1)
    (htask,) = full.htasks
    gone = next(name for name, slot in htask.slot_of.items() if slot == 1)
    kept = {name: slot for name, slot in htask.slot_of.items() if name != gone}
    quota = {name: htask.quota[name] for name in kept}
    shapes = tuple([x._replace(slots=(WIDE,) * len(x.slots)) for x in htask.shapes])
    plan = full._replace(htasks=(htask._replace(shapes=shapes, slot_of=kept, quota=quota),))
    lengths, builder = EqualLengths(3, 100), StepBuilder()  # slots meet within tiles
    cursors = {name: Cursor() for name in full.task_ids}  # of the one that has left, too
    batches, _ = builder.next_round(plan, {name: Cursor() for name in kept}, lengths)
    loads = [pass_load(batch, lengths) for batch in batches]
    by_layouts_s = float(cost.pass_times_s(loads, ReplicaShape()).value.sum())

    def simulated_s(of: Plan, by_layouts: bool) -> float:
        paced = Pacer(builder, lengths, by_layouts).timed(of, cursors, cost).cost
        forecast = builder.forecast(of, {n: cursors[n] for n in of.task_ids}, lengths, paced)
        return forecast.duration_ns / forecast.rounds / 1e9

    assert simulated_s(plan, True) == pytest.approx(by_layouts_s, rel=1e-6)
    assert simulated_s(plan, True) > 1.01 * simulated_s(plan, False)
    nothing = plan._replace(htasks=())
    assert Pacer(builder, lengths, True).timed(nothing, {}, cost).cost is cost


def test_closed_forms():
    assert round_time_s([1, 1], [2.0, 3.0], 1) == 5.0
    assert round_time_s([1, 1], [2.0, 3.0], 4) == 12.0  # the larger waits for its own optimizer
    assert round_time_s([1] * 8, [1.0] * 8, 4) == 8.0
    assert round_time_s([1] * 8, [1.0] * 8, 4, interleaves=False) == 32.0


@pytest.mark.parametrize("replica", [ReplicaShape(), ReplicaShape(1, 4), ReplicaShape(2, 1)])
def test_the_breakdown_adds_up_to_the_round(replica):
    predicted = planned(replica, 8, 8, fusion="all_temporal").predicted
    spent = predicted.breakdown_s
    assert sum(spent.values()) == pytest.approx(predicted.round_time_s.value)
    assert {"compute", "adapters", "loss", "optimizer"} <= spent.keys()
    assert min(spent.values()) >= 0
    assert ("exposed_communication" in spent) == (replica.num_gpus > 1)
    assert ("bubbles" in spent) == (replica.pp > 1)


@pytest.mark.parametrize("orchestration", [True, False])
@pytest.mark.parametrize("replica", [ReplicaShape(1, 4), ReplicaShape(2, 1)])
def test_the_planned_partition_is_never_slower_than_a_plain_one(replica, orchestration):
    def step_s(fusion: str) -> float:
        plan = planned(replica, 6, 8, fusion=fusion, orchestration=orchestration)
        return plan.predicted.tasks_step_time_s

    best = step_s("planned")
    assert best <= min(step_s("all_spatial"), step_s("all_temporal")) * (1 + 1e-9)
