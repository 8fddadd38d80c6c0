"""Iteration-level simulation: what it reports of a plan, and its pictures."""

from __future__ import annotations

import json

import pytest

from muxtune.cost.shapes import model_shape
from muxtune.cost.subgraphs import StageSeconds, SubgraphOptions, subgraph_times
from muxtune.errors import ConfigError
from muxtune.planning.orchestration import (
    Contention,
    bound_ratio,
    periodic_template,
    play,
    round_problem,
)
from muxtune.report.gantt import gantt, gantt_panels, schedule_trace
from muxtune.types import (
    DispatchRule,
    HTask,
    HTaskTurn,
    Plan,
    Prediction,
    ReplicaShape,
    ShapeKey,
    SubgraphTimes,
)
from muxtune_sim.iteration import IterationOptions, simulate_iteration

MODEL = model_shape("smollm2-135m")  # 30 layers, 3 key-value heads


class Table:
    """100 us of compute a stage and direction and chunk, 30 us of all-reduces, 1 us transfers."""

    def stage_seconds(self, shape, replica, stage, backward) -> StageSeconds:
        exchange_s = 30e-6 if replica.tp > 1 else 0.0
        return StageSeconds(shape.num_chunks * 100e-6, 0.0, exchange_s, 0.0, 1e-6)

    def optimizer_s(self, shape, replica, stage) -> float:
        return 2e-6

    def message_s(self, num_bytes: int) -> float:
        return 1e-6


def planned(replica: ReplicaShape, chunks: list[int]) -> tuple[Plan, SubgraphTimes]:
    htasks = tuple(HTask((ShapeKey(64, count, ()),), {}, {}) for count in chunks)
    turns = tuple(HTaskTurn(index, 1) for index in range(len(chunks)))
    plan = Plan(
        "i", 0, frozenset(), (replica,), htasks, turns, DispatchRule.SINGLE,
        Prediction(None, 0, 0, None, {}, {}, {}, 0), {},  # type: ignore[arg-type]
    )  # fmt: skip
    times = subgraph_times(plan, MODEL, Table(), SubgraphOptions(3))
    order = periodic_template(round_problem(plan, times)).order
    return plan._replace(order=order), times


def test_without_contention_it_is_the_planners_player():
    plan, times = planned(ReplicaShape(1, 4), [1, 2, 1, 3, 1, 1])
    report = simulate_iteration(plan, times)
    played = play(plan.order, round_problem(plan, times), 10)
    assert (report.timeline.end_ns == played.end_ns).all()
    assert report.round_time_s == pytest.approx(played.period_ns / 1e9)


def test_idle_time_is_split_without_remainder():
    plan, times = planned(ReplicaShape(1, 4), [1, 1, 1, 1, 1, 1, 1, 1])
    report = simulate_iteration(plan, times, IterationOptions(rounds=50))
    bubbles = report.bubbles
    assert bubbles.busy + bubbles.fill_drain + bubbles.imbalance + bubbles.stalls == pytest.approx(
        1
    )
    assert bubbles.imbalance == pytest.approx(0, abs=1e-5)  # whole nanoseconds
    assert bubbles.steady_bubble < 0.01
    assert 1.0 < bound_ratio(report.timeline) < 1.02
    mean = sum(report.utilisation[f"stage {stage} compute"] for stage in range(4)) / 4
    assert mean == pytest.approx(bubbles.busy)


def test_one_task_exposes_its_all_reduces_and_two_hide_them():
    alone, times = planned(ReplicaShape(3, 1), [1])
    exposed = simulate_iteration(alone, times)
    assert exposed.exposed_comm == pytest.approx(60 / 262, rel=0.02)
    assert exposed.overlapped_comm == 0
    together, times = planned(ReplicaShape(3, 1), [1, 1])
    hidden = simulate_iteration(together, times, IterationOptions(rounds=20))
    assert hidden.exposed_comm < 0.02
    assert hidden.overlapped_comm > 0.25


def test_contention_takes_back_part_of_the_overlap():
    plan, times = planned(ReplicaShape(3, 1), [1, 1])
    free = simulate_iteration(plan, times, IterationOptions(rounds=20))
    options = IterationOptions(rounds=20, contention=Contention(2.0, 1.2))
    contended = simulate_iteration(plan, times, options)
    # At most the all-reduces, 1.2 times 120 us a round, slow compute to a half.
    lost_s = contended.round_time_s - free.round_time_s
    assert 0.8 * 72e-6 < lost_s < 1.05 * 72e-6


def test_a_plan_without_an_order_is_refused():
    plan, times = planned(ReplicaShape(1, 2), [1, 1])
    with pytest.raises(ConfigError, match=r"plan\.order"):
        simulate_iteration(plan._replace(order={}), times)


def test_an_order_over_the_memory_is_refused():
    plan, times = planned(ReplicaShape(1, 4), [1] * 6)
    units = ((10,) * 4,) * 6
    options = IterationOptions(activation_units=units, capacity_units=(10, 10, 10, 10))
    with pytest.raises(ConfigError, match="in flight"):
        simulate_iteration(plan, times, options)


def test_gantt_and_trace(tmp_path):
    plan, times = planned(ReplicaShape(3, 2), [1, 2, 1])
    report = simulate_iteration(plan, times, IterationOptions(rounds=3))
    spans = list(report.spans(["a", "b", "c"]))
    path = gantt(tmp_path / "gantt.png", spans, "three tasks")
    assert path.read_bytes().startswith(b"\x89PNG")
    gantt_panels(tmp_path / "two.png", [("x", spans, None), ("y", spans, (0, 10**5))], "two")
    schedule_trace(tmp_path / "trace.json", spans)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    assert len(complete) == len(spans)
    threads = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert threads == {"compute", "comm"}
