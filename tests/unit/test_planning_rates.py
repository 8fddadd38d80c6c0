"""Mean times: where tasks stand and end is what the exact builder says; only time is a mean."""

from __future__ import annotations

import random

import pytest

from muxtune.planning.rates import MeanStepBuilder, _CourseAlone, _MeanCourse
from muxtune.planning.step_builder import StepBuilder
from muxtune.types import Cursor, PackRule
from tests.unit.planning_helpers import (
    COST,
    TableLengths,
    draw_batches,
    fresh,
    make_plan,
    one_htask,
)
from tests.unit.test_planning_forecast import random_case


@pytest.mark.parametrize("seed", range(60))
def test_rounds_ends_and_cursors_are_exact(seed: int):
    plan, cursors, lengths = random_case(seed)
    mean, exact = MeanStepBuilder(), StepBuilder()
    found = mean.forecast(plan, cursors, lengths, COST)
    expected = exact.forecast(plan, cursors, lengths, COST)
    assert (found.rounds, found.task_ids) == (expected.rounds, expected.task_ids)
    for rounds in (0, 1, found.rounds // 2, found.rounds, found.rounds + 3):
        arguments = (plan, {**cursors, "elsewhere": Cursor(3)}, lengths, rounds)
        assert mean.advance(*arguments) == exact.advance(*arguments)
        assert mean.round_tokens(*arguments)[0] == exact.round_tokens(*arguments)[0]


@pytest.mark.parametrize("seed", range(40))
def test_rounds_until_is_the_inverse_of_duration(seed: int):
    plan, cursors, lengths = random_case(seed)
    builder = MeanStepBuilder()
    rounds = max(1, builder.forecast(plan, cursors, lengths, COST).rounds)
    for elapsed_rounds in {1, max(1, rounds // 2), rounds}:
        at_ns = builder.duration_ns(plan, cursors, lengths, COST, elapsed_rounds)
        if at_ns == 0:
            continue
        for elapsed_ns in (at_ns - 1, at_ns, 1):
            found, found_ns = builder.rounds_until(plan, cursors, lengths, COST, elapsed_ns)
            assert found_ns == builder.duration_ns(plan, cursors, lengths, COST, found)
            assert found_ns >= elapsed_ns
            if found:
                before_ns = builder.duration_ns(plan, cursors, lengths, COST, found - 1)
                assert before_ns < elapsed_ns or found == 1


LADDERS = {
    PackRule.CHUNK: [(64, 4), (64, 6), (64, 9)],
    PackRule.PAD: [(32, 9), (64, 9), (100, 9)],
}


@pytest.mark.parametrize("packing", list(PackRule))
@pytest.mark.parametrize("count", [1, None])
def test_times_are_the_means_of_many_rounds(packing: PackRule, count: int | None):
    """Periods without a common divisor meet in every way, each as often as the other. Of turns
    that are counted, periods count micro-batches: here one a step."""
    sequences, tokens = (6, 100) if count is None else (3, 60)
    rng = random.Random(3)
    lengths = TableLengths()
    for task_id, period in (("a", 5), ("b", 7), ("c", 8)):
        lengths.add(task_id, draw_batches(rng, period, sequences, tokens), 10_000)
    htask = one_htask({"a": 3, "b": 3, "c": 3}, 64, packing, LADDERS[packing])
    plan = make_plan([htask], [(0, count)])
    rounds = 5 * 7 * 8 * 8
    arguments = (plan, fresh(plan), lengths, COST, rounds)
    exact_ns = StepBuilder().duration_ns(*arguments)
    assert MeanStepBuilder().duration_ns(*arguments) == pytest.approx(exact_ns, rel=1e-9)
    exact = StepBuilder().round_tokens(plan, fresh(plan), lengths, rounds)
    found = MeanStepBuilder().round_tokens(plan, fresh(plan), lengths, rounds)
    assert found == (exact[0], pytest.approx(exact[1], rel=1e-9))


def test_a_task_alone_takes_its_exact_time_over_whole_periods():
    rng = random.Random(1)
    lengths = TableLengths()
    lengths.add("a", draw_batches(rng, 6, 5, 100), 600)
    plan = make_plan([one_htask({"a": 3}, 64)], [(0, None)])
    arguments = (plan, fresh(plan), lengths, COST, 600)
    exact_ns = StepBuilder().duration_ns(*arguments)
    assert abs(MeanStepBuilder().duration_ns(*arguments) - exact_ns) <= 1


@pytest.mark.parametrize("count", [1, 2, None])
@pytest.mark.parametrize("step", [0, 3])
def test_a_task_alone_is_answered_as_one_of_many(count: int | None, step: int):
    """Beside a task that has ended, which takes the general way."""
    rng = random.Random(5)
    lengths = TableLengths()
    lengths.add("a", draw_batches(rng, 6, 5, 100), 40)
    lengths.add("ended", draw_batches(rng, 3, 5, 100), 40)
    alone = make_plan([one_htask({"a": 3}, 64, ladder=[(64, 6)])], [(0, count)])
    beside = make_plan([one_htask({"a": 3, "ended": 3}, 64, ladder=[(64, 6)])], [(0, count)])
    cursors = {"a": Cursor(step), "ended": Cursor(40)}
    builder = MeanStepBuilder()
    one = builder.course(alone, cursors, lengths, COST)
    many = builder.course(beside, cursors, lengths, COST)
    assert (type(one), type(many)) == (_CourseAlone, _MeanCourse)
    first = many.forecast()
    assert one.forecast() == first
    for rounds in (0, 1, first.rounds // 2, first.rounds, first.rounds + 3):
        assert one.advance(rounds)["a"] == many.advance(rounds)["a"]
        assert one.round_tokens(rounds) == many.round_tokens(rounds)
    for elapsed_ns in (0, 1, first.duration_ns // 3, first.duration_ns, 2 * first.duration_ns):
        assert one.rounds_until(elapsed_ns) == many.rounds_until(elapsed_ns)
    assert builder.round_tokens(alone, cursors, lengths, 2) == one.round_tokens(2)


def test_tasks_that_end_no_longer_take_time():
    rng = random.Random(2)
    lengths = TableLengths()
    lengths.add("short", draw_batches(rng, 4, 5, 100), 8)
    lengths.add("long", draw_batches(rng, 4, 5, 100), 80)
    plan = make_plan([one_htask({"short": 3}, 64), one_htask({"long": 3}, 64)], [(0, 1), (1, 1)])
    builder, cursors = MeanStepBuilder(), fresh(plan)
    first = builder.forecast(plan, cursors, lengths, COST)
    assert first.task_ids == ("short",)
    after = builder.advance(plan, cursors, lengths, first.rounds)
    assert after["short"] == Cursor(8)
    rest = builder.forecast(plan, after, lengths, COST)
    whole_ns = builder.duration_ns(plan, cursors, lengths, COST, first.rounds + rest.rounds)
    assert rest.task_ids == ("long",)
    assert abs(first.duration_ns + rest.duration_ns - whole_ns) <= 1
    assert rest.duration_ns / rest.rounds < first.duration_ns / first.rounds


def test_arrangements_are_shared_by_plans_and_not_mixed_up():
    """Two plans of the same objects but of tasks with other lengths differ in time."""
    rng = random.Random(4)
    lengths = TableLengths()
    lengths.add("light", [[10, 10]], 50)
    lengths.add("heavy", draw_batches(rng, 3, 5, 100), 50)
    light = make_plan([one_htask({"light": 3}, 64)], [(0, 1)])
    htask = light.htasks[0]._replace(slot_of={"heavy": 0}, quota={"heavy": 3})
    heavy = light._replace(htasks=(htask,))
    builder = MeanStepBuilder()
    times = [builder.duration_ns(p, fresh(p), lengths, COST, 10) for p in (light, heavy)]
    alone = [MeanStepBuilder().duration_ns(p, fresh(p), lengths, COST, 10) for p in (light, heavy)]
    assert times == alone and times[0] != times[1]
