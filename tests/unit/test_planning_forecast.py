"""forecast, advance and rounds_until give what walking next_round gives, to the nanosecond."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.planning.step_builder import StepBuilder
from muxtune.types import Cursor, PackRule, PassCoefficients, Plan, ReplicaShape, ShapeKey
from tests.unit.planning_helpers import (
    COST,
    HandWalk,
    StubCost,
    TableLengths,
    draw_batches,
    make_plan,
    one_htask,
)


class SlowerCost(StubCost):
    def pass_coefficients(self, shape: ShapeKey, replica: ReplicaShape) -> PassCoefficients:
        coefficients = super().pass_coefficients(shape, replica)
        return coefficients._replace(base_s=3.1 * coefficients.base_s)


def random_htask(rng: random.Random, task_ids: list[str]):
    """A plan's hTask whose quotas and shapes hold every sequence of up to 100 tokens."""
    packing = rng.choice([PackRule.CHUNK, PackRule.PAD])
    if packing is PackRule.PAD:
        quota = {task_id: rng.randint(1, 3) for task_id in task_ids}
        total = sum(quota.values())
        ladder = rng.choice(
            [[(100, total)], [(16, total), (48, total), (100, total)], [(50, 1), (100, total)]]
        )
        return one_htask(quota, packing=packing, ladder=ladder)
    chunk_tokens = rng.choice([32, 64, 128])
    quota = {task_id: -(-100 // chunk_tokens) + rng.randint(0, 2) for task_id in task_ids}
    total = sum(quota.values())
    ladder = [(chunk_tokens, total)]
    if rng.random() < 0.4:
        ladder = [(chunk_tokens, max(1, total // 3)), (chunk_tokens, total)]
    return one_htask(quota, chunk_tokens, packing, ladder)


def random_case(seed: int) -> tuple[Plan, dict[str, Cursor], TableLengths]:
    rng = random.Random(seed)
    lengths, htasks, turns, cursors = TableLengths(), [], [], {}
    common_period = rng.choice([None, 3, 5])
    for index in range(rng.randint(1, 3)):
        task_ids = [f"h{index}t{number}" for number in range(rng.randint(1, 4))]
        for task_id in task_ids:
            batches = draw_batches(rng, common_period or rng.randint(1, 5), 5, 100)
            if rng.random() < 0.15:
                batches = draw_batches(rng, 12, 5, 100)
                lengths.add(task_id, batches, rng.randint(1, 12), periodic=False)
            else:
                lengths.add(task_id, batches, rng.randint(1, 14))
            cursors[task_id] = random_cursor(rng, task_id, lengths)
        htasks.append(random_htask(rng, task_ids))
        kind = rng.random()
        if kind < 0.45:
            turns += [(index, rng.randint(1, 3)) for _ in range(rng.randint(1, 2))]
        elif kind < 0.9:
            turns += [(index, None)] * rng.randint(1, 2)
        else:
            turns += [(index, None), (index, 1)]
    rng.shuffle(turns)
    drains = [task_id for task_id in cursors if rng.random() < 0.2]
    return make_plan(htasks, turns, drains), cursors, lengths


def random_cursor(rng: random.Random, task_id: str, lengths: TableLengths) -> Cursor:
    """Anywhere: at a step boundary, at the end, or with positions left that no packing left."""
    step = rng.randint(0, lengths.num_steps(task_id))
    if step == lengths.num_steps(task_id) or rng.random() < 0.5:
        return Cursor(step, None)
    positions = range(len(lengths.batch(task_id, step)))
    left = sorted(rng.sample(positions, rng.randint(1, len(positions))))
    return Cursor(step, tuple(left))


def check_case(plan: Plan, cursors: dict[str, Cursor], lengths: TableLengths) -> None:
    builder = StepBuilder()
    walk = HandWalk(plan, cursors, lengths)
    forecast = builder.forecast(plan, cursors, lengths, COST)
    assert forecast.exact
    if len(walk.ended(0)) == len(plan.task_ids):
        assert forecast == (0, 0, (), True)
        return
    rounds = walk.play_to_first_end()
    assert forecast.rounds == rounds
    assert forecast.task_ids == tuple(sorted(walk.ended(rounds) - walk.ended(0)))
    assert forecast.duration_ns == walk.duration_ns(COST, rounds)
    walk.play(rounds + 4)  # beyond the first end, too
    for at in range(len(walk.rounds) + 1):
        assert builder.advance(plan, cursors, lengths, at) == walk.cursors[at]
        assert builder.duration_ns(plan, cursors, lengths, COST, at) == walk.duration_ns(COST, at)
        check_totals(builder, walk, at)
        check_rounds_until(builder, walk, at)


def check_totals(builder: StepBuilder, walk: HandWalk, rounds: int) -> None:
    totals = builder.round_totals(walk.plan, walk.cursors[0], walk.lengths, rounds)
    walked = [each for one in walk.rounds[:rounds] for each in one]
    tokens = sum(
        piece.stop - piece.start
        for each in walked
        for chunk in each.chunks
        for piece in chunk.pieces
    )
    assert totals.effective_tokens == tokens
    assert totals.padded_tokens == sum(each.shape.padded_tokens for each in walked)
    assert totals.closes == {
        task_id: sum(task_id in each.closes_step for each in walked)
        for task_id in walk.plan.task_ids
    }


def check_rounds_until(builder: StepBuilder, walk: HandWalk, rounds: int) -> None:
    """Times of interruption inside of round ``rounds`` and at its very end."""
    if rounds == 0 or not walk.rounds[rounds - 1]:
        return
    end_ns = walk.duration_ns(COST, rounds)
    begin_ns = walk.duration_ns(COST, rounds - 1)
    for elapsed_ns in (begin_ns + 1, (begin_ns + end_ns) // 2, end_ns):
        answer = builder.rounds_until(walk.plan, walk.cursors[0], walk.lengths, COST, elapsed_ns)
        assert answer == (rounds, end_ns)


@pytest.mark.parametrize("seed", range(150))
def test_equals_walking(seed: int) -> None:
    check_case(*random_case(seed))


@settings(max_examples=60, deadline=None)
@given(st.integers(min_value=1_000, max_value=10**9))
def test_equals_walking_anywhere(seed: int) -> None:
    check_case(*random_case(seed))


@pytest.mark.parametrize("seed", range(40))
def test_going_on_from_an_advanced_cursor_is_the_same_as_staying(seed: int) -> None:
    plan, cursors, lengths = random_case(seed)
    builder = StepBuilder()
    for first, second in ((1, 2), (3, 1), (2, 5)):
        there = builder.advance(plan, cursors, lengths, first)
        stepped = builder.advance(plan, there, lengths, second)
        assert stepped == builder.advance(plan, cursors, lengths, first + second)


@pytest.mark.parametrize("seed", range(20))
def test_what_a_builder_was_asked_before_does_not_matter(seed: int) -> None:
    """Other cursors and another cost model in between."""
    plan, cursors, lengths = random_case(seed)
    builder, slower = StepBuilder(), SlowerCost()
    other = builder.advance(plan, cursors, lengths, 1)
    questions: list[tuple[dict[str, Cursor], Any]] = [
        (cursors, COST),
        (cursors, slower),
        (other, slower),
        (cursors, COST),
    ]
    for start, cost in questions:
        forecast = builder.forecast(plan, start, lengths, cost)
        assert forecast == StepBuilder().forecast(plan, start, lengths, cost)
        half_ns = forecast.duration_ns // 2
        until = builder.rounds_until(plan, start, lengths, cost, half_ns)
        assert until == StepBuilder().rounds_until(plan, start, lengths, cost, half_ns)


def test_a_forecast_without_tasks_or_with_ended_ones_only_is_empty() -> None:
    lengths = TableLengths()
    builder = StepBuilder()
    assert builder.forecast(make_plan([], []), {}, lengths, COST) == (0, 0, (), True)
    lengths.add("a", [[10]], num_steps=3)
    plan = make_plan([one_htask({"a": 1})], [(0, 1)])
    assert builder.forecast(plan, {"a": Cursor(3)}, lengths, COST) == (0, 0, (), True)
    assert builder.rounds_until(plan, {"a": Cursor(3)}, lengths, COST, 10**9) == (0, 0)


def test_tasks_that_end_in_the_same_round_are_all_named() -> None:
    lengths = TableLengths()
    for task_id, num_steps in (("a", 4), ("b", 4), ("c", 5)):
        lengths.add(task_id, [[10, 20]], num_steps)
    plan = make_plan([one_htask({"c": 1, "b": 1, "a": 1})], [(0, 1)])
    cursors = {task_id: Cursor() for task_id in "abc"}
    forecast = StepBuilder().forecast(plan, cursors, lengths, COST)
    assert (forecast.rounds, forecast.task_ids) == (4, ("a", "b"))


def test_a_draining_task_is_released_at_its_step_boundary() -> None:
    lengths = TableLengths()
    lengths.add("stays", [[40] * 6], num_steps=50)
    lengths.add("leaves", [[40] * 6], num_steps=50)
    htask = one_htask({"stays": 1, "leaves": 1})
    plan = make_plan([htask], [(0, 1)], drains=["leaves"])
    cursors = {"stays": Cursor(2), "leaves": Cursor(7, (1, 3, 5))}
    forecast = StepBuilder().forecast(plan, cursors, lengths, COST)
    assert (forecast.rounds, forecast.task_ids) == (3, ("leaves",))
    after = StepBuilder().advance(plan, cursors, lengths, 30)
    assert after["leaves"] == Cursor(8, None)
    assert after["stays"] == Cursor(7, None)


def aperiodic_case(num_steps: int) -> tuple[Plan, dict[str, Cursor], TableLengths]:
    rng, lengths = random.Random(5), TableLengths()
    for task_id in ("a", "b"):
        batches = draw_batches(rng, num_steps, 4, 60)
        lengths.add(task_id, batches, num_steps, periodic=False)
    plan = make_plan([one_htask({"a": 2, "b": 2}, 32)], [(0, 1)])
    return plan, {"a": Cursor(), "b": Cursor(3)}, lengths


def test_many_different_batches_are_walked_and_then_extrapolated() -> None:
    plan, cursors, lengths = aperiodic_case(num_steps=5_000)
    walked = StepBuilder(max_walked=100_000).forecast(plan, cursors, lengths, COST)
    guessed = StepBuilder(max_walked=3_000).forecast(plan, cursors, lengths, COST)
    assert walked.exact
    assert not guessed.exact
    assert guessed.task_ids == walked.task_ids
    assert guessed.rounds == pytest.approx(walked.rounds, rel=0.05)
    assert guessed.duration_ns == pytest.approx(walked.duration_ns, rel=0.05)


def test_walked_answers_agree_with_tables() -> None:
    plan, cursors, lengths = aperiodic_case(num_steps=300)
    tabled = StepBuilder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("muxtune.planning.tables._MAX_TABLE_STEPS", 10)
        walked = StepBuilder()
        forecast = walked.forecast(plan, cursors, lengths, COST)
        answers = [
            walked.rounds_until(plan, cursors, lengths, COST, forecast.duration_ns * share // 7)
            for share in range(9)
        ]
    assert tabled.forecast(plan, cursors, lengths, COST) == forecast
    for share, answer in enumerate(answers):
        elapsed_ns = forecast.duration_ns * share // 7
        assert tabled.rounds_until(plan, cursors, lengths, COST, elapsed_ns) == answer


def test_long_joint_periods_are_laid_out_in_stretches() -> None:
    lengths = TableLengths()
    rng = random.Random(9)
    for task_id, period in (("a", 61), ("b", 59), ("c", 53)):
        lengths.add(task_id, draw_batches(rng, period, 3, 60), num_steps=4_200 + period)
    htask = one_htask({"a": 1, "b": 1, "c": 1}, packing=PackRule.PAD, ladder=[(30, 3), (60, 3)])
    plan = make_plan([htask], [(0, None)])
    cursors = {task_id: Cursor(step) for step, task_id in enumerate("abc")}
    builder = StepBuilder()
    forecast = builder.forecast(plan, cursors, lengths, COST)
    assert (forecast.rounds, forecast.task_ids) == (4_251, ("c",))
    walk = HandWalk(plan, cursors, lengths).play(forecast.rounds)
    assert forecast.duration_ns == walk.duration_ns(COST, forecast.rounds)
    assert builder.advance(plan, cursors, lengths, 4_200) == walk.cursors[4_200]


def test_rounds_until_after_all_have_ended_gives_the_last_round() -> None:
    lengths = TableLengths()
    lengths.add("a", [[10]], num_steps=3)
    lengths.add("b", [[10]], num_steps=7)
    plan = make_plan([one_htask({"a": 1, "b": 1})], [(0, 2)])
    cursors = {"a": Cursor(), "b": Cursor()}
    builder = StepBuilder()
    rounds, duration_ns = builder.rounds_until(plan, cursors, lengths, COST, 10**15)
    assert rounds == 4
    assert duration_ns == builder.duration_ns(plan, cursors, lengths, COST, 4)
    assert builder.rounds_until(plan, cursors, lengths, COST, 0) == (0, 0)


def test_tables_survive_when_few_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muxtune.planning.step_builder._MAX_TABLES", 1)
    monkeypatch.setattr("muxtune.planning.step_builder._MAX_OVERLAYS", 1)
    monkeypatch.setattr("muxtune.planning.step_builder._MAX_REMAINDERS", 1)
    monkeypatch.setattr("muxtune.planning.step_builder._MAX_PLANS", 1)
    for seed in range(20):
        check_case(*random_case(seed))


def test_one_builder_serves_several_length_sources() -> None:
    builder = StepBuilder()
    for tokens in (10, 20, 30, 40, 50, 60):
        lengths = TableLengths()
        lengths.add("a", [[tokens] * 4], num_steps=2)
        plan = make_plan([one_htask({"a": 1})], [(0, 1)])
        cursors = {"a": Cursor()}
        walk = HandWalk(plan, cursors, lengths)
        forecast = builder.forecast(plan, cursors, lengths, COST)
        assert forecast.rounds == walk.play_to_first_end()
        assert forecast.duration_ns == walk.duration_ns(COST, forecast.rounds)
