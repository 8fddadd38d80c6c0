"""next_round and pass_load: what a round holds, and that a task cannot tell its neighbours."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune import codec
from muxtune.errors import ConfigError
from muxtune.planning.step_builder import StepBuilder, pass_load
from muxtune.types import Cursor, HTask, MicroBatch, PackRule, PassLayout, PassLoad
from tests.unit.planning_helpers import (
    COST,
    HandWalk,
    TableLengths,
    draw_batches,
    fresh,
    make_plan,
    make_shape,
    one_htask,
)


def drawn_lengths(seed: int, task_ids: list[str], num_steps: int = 4) -> TableLengths:
    lengths, rng = TableLengths(), random.Random(seed)
    for task_id in task_ids:
        lengths.add(task_id, draw_batches(rng, 3, 6, 100), num_steps)
    return lengths


def pieces_of(micro_batches: list[MicroBatch], task_id: str) -> list:
    """A task's contributions, in order: everything of it that a micro-batch tells."""
    return [
        (
            [chunk.pieces for chunk in each.chunks if chunk.task_id == task_id],
            each.steps[task_id],
            each.loss_tokens[task_id],
            task_id in each.closes_step,
        )
        for each in micro_batches
        if task_id in each.steps
    ]


def whole_run(plan, lengths: TableLengths) -> list[MicroBatch]:
    walk = HandWalk(plan, fresh(plan), lengths)
    while walk.ended(len(walk.rounds)) != set(plan.task_ids):
        walk.play(len(walk.rounds) + 1)
    return [each for one in walk.rounds for each in one]


def mixed_plan(packing: PackRule, count: int | None):
    quotas = {"a": 4, "b": 5, "c": 6}
    ladder = [(100, 15)] if packing is PackRule.PAD else [(32, 15)]
    return make_plan([one_htask(quotas, 32, packing, ladder)], [(0, count)])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(list(PackRule)), st.sampled_from([None, 1, 2, 3]))
def test_a_whole_run_computes_each_sequence_once(
    seed: int, packing: PackRule, count: int | None
) -> None:
    lengths = drawn_lengths(seed, ["a", "b", "c"])
    seen: dict[tuple[str, int, int], int] = {}
    closed: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    for each in whole_run(mixed_plan(packing, count), lengths):
        assert each.chunks
        assert each.packing is packing
        assert set(each.steps) == set(each.loss_tokens) == {c.task_id for c in each.chunks}
        for chunk in each.chunks:
            assert chunk.slot == "abc".index(chunk.task_id)
            for piece in chunk.pieces:
                key = (chunk.task_id, each.steps[chunk.task_id], piece.position)
                assert seen.get(key, 0) == piece.start
                seen[key] = piece.stop
        for task_id in each.closes_step:
            closed[task_id].append(each.steps[task_id])
        for task_id, step in each.steps.items():
            batch = lengths.batch(task_id, step)
            assert each.loss_tokens[task_id] == sum(sample.target_tokens for sample in batch)
    assert seen == {
        (task_id, step, position): sample.tokens
        for task_id in "abc"
        for step in range(4)
        for position, sample in enumerate(lengths.batch(task_id, step))
    }
    assert all(steps == [0, 1, 2, 3] for steps in closed.values())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(list(PackRule)))
def test_a_task_contributes_the_same_alone_and_with_neighbours(
    seed: int, packing: PackRule
) -> None:
    lengths = drawn_lengths(seed, ["a", "b", "c"])
    together = whole_run(mixed_plan(packing, 2), lengths)
    for task_id, quota in (("a", 4), ("b", 5), ("c", 6)):
        ladder = [(100, quota)] if packing is PackRule.PAD else [(32, quota)]
        alone = make_plan([one_htask({task_id: quota}, 32, packing, ladder)], [(0, 1)])
        assert pieces_of(together, task_id) == pieces_of(whole_run(alone, lengths), task_id)


def test_chunks_are_in_slot_order_whatever_the_order_of_mappings() -> None:
    lengths = drawn_lengths(1, ["a", "b", "c"])
    htask = one_htask({"a": 4, "b": 4, "c": 4}, 32)
    turned = htask._replace(quota={"c": 4, "a": 4, "b": 4}, slot_of={"b": 1, "c": 2, "a": 0})
    plan, other = make_plan([htask], [(0, 2)]), make_plan([turned], [(0, 2)])
    first = StepBuilder().next_round(plan, fresh(plan), lengths)
    assert first == StepBuilder().next_round(other, fresh(plan), lengths)
    stored = codec.loads(codec.dumps(plan))
    assert first == StepBuilder().next_round(stored, fresh(plan), lengths)
    assert [chunk.slot for chunk in first[0][0].chunks] == sorted(
        chunk.slot for chunk in first[0][0].chunks
    )


def test_a_turn_without_count_closes_one_step_of_each_task() -> None:
    lengths = TableLengths()
    lengths.add("short", [[30] * 2], num_steps=5)
    lengths.add("long", [[30] * 5], num_steps=5)
    plan = make_plan([one_htask({"short": 1, "long": 1}, 32)], [(0, None)])
    cursors = {"short": Cursor(1), "long": Cursor(2, (0, 4, 3))}
    micro_batches, after = StepBuilder().next_round(plan, cursors, lengths)
    assert [sorted(each.steps) for each in micro_batches] == [
        ["long", "short"],
        ["long", "short"],
        ["long"],
    ]
    assert after == {"short": Cursor(2), "long": Cursor(3)}


def test_a_counted_turn_leaves_tasks_in_the_middle_of_a_step() -> None:
    lengths = TableLengths()
    lengths.add("a", [[30] * 3], num_steps=2)
    plan = make_plan([one_htask({"a": 1}, 32)], [(0, 2)])
    micro_batches, after = StepBuilder().next_round(plan, {"a": Cursor()}, lengths)
    assert len(micro_batches) == 2
    assert after == {"a": Cursor(0, (2,))}
    micro_batches, after = StepBuilder().next_round(plan, after, lengths)
    assert [sorted(each.closes_step) for each in micro_batches] == [["a"], []]
    assert [each.steps["a"] for each in micro_batches] == [0, 1]


def test_ended_tasks_contribute_nothing_and_empty_micro_batches_are_left_out() -> None:
    lengths = TableLengths()
    for task_id in ("done", "released", "last"):
        lengths.add(task_id, [[30] * 2], num_steps=3)
    htasks = [one_htask({"done": 1, "released": 1}, 32), one_htask({"last": 1}, 32)]
    plan = make_plan(htasks, [(0, 3), (1, 4)], drains=["released"])
    cursors = {"done": Cursor(3), "released": Cursor(1), "last": Cursor(2)}
    builder = StepBuilder()
    assert builder.ended(plan, cursors, lengths) == {"done", "released"}
    micro_batches, after = builder.next_round(plan, cursors, lengths)
    assert [each.htask for each in micro_batches] == [1, 1]
    assert after == {**cursors, "last": Cursor(3)}
    assert builder.next_round(plan, after, lengths) == ([], after)


def test_cursors_of_other_tasks_come_back_unchanged() -> None:
    lengths = TableLengths()
    lengths.add("a", [[30]], num_steps=3)
    plan = make_plan([one_htask({"a": 1}, 32)], [(0, 1)])
    cursors = {"a": Cursor(), "elsewhere": Cursor(4, (1,))}
    builder = StepBuilder()
    for after in (
        builder.next_round(plan, cursors, lengths)[1],
        builder.advance(plan, cursors, lengths, 1),
    ):
        assert after == {"a": Cursor(1), "elsewhere": Cursor(4, (1,))}
    assert cursors["a"] == Cursor()


def test_the_first_shape_that_holds_the_micro_batch_is_taken() -> None:
    lengths = TableLengths()
    lengths.add("a", [[10, 20], [10, 60], [20, 30, 5]], num_steps=3)
    htask = one_htask({"a": 4}, packing=PackRule.PAD, ladder=[(20, 2), (64, 2), (64, 4)])
    plan = make_plan([htask], [(0, None)])
    shapes = [each.shape for each in whole_run(plan, lengths)]
    assert [(shape.chunk_tokens, shape.num_chunks) for shape in shapes] == [
        (20, 2),
        (64, 2),
        (64, 4),
    ]


def test_pass_load_of_packed_and_of_padded_passes() -> None:
    lengths = TableLengths()
    lengths.add("a", [[10, 50, 3]], num_steps=1)
    packed = make_plan([one_htask({"a": 3}, 32)], [(0, 1)])
    (micro_batch,), _ = StepBuilder().next_round(packed, {"a": Cursor()}, lengths)
    targets = sum(sample.target_tokens for sample in lengths.batch("a", 0))
    load = pass_load(micro_batch, lengths)
    pairs, layout = 10 * 11 / 2 + 50 * 51 / 2 + 3 * 4 / 2, PassLayout((63,), (50, 10, 3))
    assert load == (micro_batch.shape, pairs, targets, (0,), layout)
    padded = make_plan([one_htask({"a": 4}, packing=PackRule.PAD, ladder=[(64, 4)])], [(0, 1)])
    (micro_batch,), _ = StepBuilder().next_round(padded, {"a": Cursor()}, lengths)
    assert pass_load(micro_batch, lengths) == PassLoad(
        micro_batch.shape, 4 * 64 * 65 / 2, targets, (0,)
    )


def test_layouts_count_a_sequence_once_however_many_chunks_it_has() -> None:
    lengths = TableLengths()
    lengths.add("a", [[77, 3]], num_steps=1)  # three chunks of 32, the last with 13 rows and then 3
    lengths.add("b", [[33]], num_steps=1)
    plan = make_plan([one_htask({"a": 3, "idle": 1, "b": 2}, 32)], [(0, 1)])
    lengths.add("idle", [[5]], num_steps=1)
    cursors = {"a": Cursor(), "idle": Cursor(1), "b": Cursor()}
    (micro_batch,), _ = StepBuilder().next_round(plan, cursors, lengths)
    load = pass_load(micro_batch, lengths)
    assert load.layout == PassLayout((80, 0, 33), (77, 3, 33))
    assert load.attention_pairs == sum(n * (n + 1) / 2 for n in (77, 3, 33))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 7, 16, 33, 100]))
def test_layouts_are_of_the_rows_that_a_pass_really_has(seed: int, chunk_tokens: int) -> None:
    """Sequences lie whole in a pass, so that their pairs are the load's."""
    lengths = drawn_lengths(seed, ["a", "b", "c"])
    most = -(-100 // chunk_tokens)
    plan = make_plan([one_htask({"a": most, "b": most + 1, "c": most}, chunk_tokens)], [(0, None)])
    for each in whole_run(plan, lengths):
        load, pieces = pass_load(each, lengths), [0, 0, 0]
        for chunk in each.chunks:
            pieces[chunk.slot] += sum(piece.stop - piece.start for piece in chunk.pieces)
        assert load.layout is not None and load.layout.slot_rows == tuple(pieces)
        assert sum(load.layout.sequence_rows) == sum(pieces) <= each.shape.padded_tokens
        known = {
            (chunk.task_id, piece.position): lengths.batch(
                chunk.task_id, each.steps[chunk.task_id]
            )[piece.position].tokens
            for chunk in each.chunks
            for piece in chunk.pieces
        }
        assert sorted(load.layout.sequence_rows) == sorted(known.values())


def test_pass_load_names_the_slots_that_close() -> None:
    lengths = TableLengths()
    lengths.add("a", [[30] * 2], num_steps=1)
    lengths.add("b", [[30]], num_steps=1)
    plan = make_plan([one_htask({"a": 1, "b": 1}, 32)], [(0, None)])
    micro_batches, _ = StepBuilder().next_round(plan, fresh(plan), lengths)
    loads = [pass_load(each, lengths) for each in micro_batches]
    assert [load.optimizer_slots for load in loads] == [(1,), (0,)]


# ------------------------------------------------------------------------------- bad plans


def lengths_of_two() -> TableLengths:
    lengths = TableLengths()
    lengths.add("a", [[30]], num_steps=3)
    lengths.add("b", [[30]], num_steps=3)
    return lengths


def refused(htasks: list[HTask], turns: list, message: str) -> None:
    lengths, plan = lengths_of_two(), make_plan(htasks, turns)
    cursors = {"a": Cursor(), "b": Cursor()}
    with pytest.raises(ConfigError, match=message):
        StepBuilder().next_round(plan, cursors, lengths)
    with pytest.raises(ConfigError, match=message):
        StepBuilder().forecast(plan, cursors, lengths, COST)


GOOD = one_htask({"a": 1, "b": 1}, 32)


@pytest.mark.parametrize(
    ("htasks", "turns", "message"),
    [
        ([GOOD], [(1, 1)], "plan.round"),
        ([GOOD], [(0, 0)], "plan.round"),
        ([GOOD, one_htask({"a": 1}, 32)], [(0, 1), (1, 1)], "two hTasks"),
        ([GOOD._replace(slot_of={"a": 0})], [(0, 1)], r"tasks \['b'\] have no slot"),
        ([GOOD._replace(slot_of={"a": 0, "b": 0})], [(0, 1)], "not distinct slots"),
        ([GOOD._replace(slot_of={"a": 0, "b": 2})], [(0, 1)], "not distinct slots below 2"),
        ([GOOD._replace(shapes=())], [(0, 1)], "at least one shape"),
        ([GOOD._replace(shapes=(make_shape(32, 1, 2),))], [(0, 1)], "no shape holds"),
        ([GOOD._replace(shapes=(make_shape(32, 2, 2), make_shape(32, 4, 3)))], [(0, 1)], "slots"),
        ([GOOD._replace(shapes=(make_shape(32, 2, 2), make_shape(64, 2, 2)))], [(0, 1)], "differ"),
        ([GOOD._replace(shapes=(make_shape(16, 2, 2),))], [(0, 1)], "needs 2 chunks of 16"),
        ([GOOD._replace(quota={"a": 1, "b": 0})], [(0, 1)], "at least 1"),
    ],
)
def test_plans_that_cannot_be_carried_out_are_refused(htasks, turns, message) -> None:
    refused(htasks, turns, message)


def test_a_plan_whose_round_visits_nobody_is_refused_by_the_forecast() -> None:
    lengths, builder = lengths_of_two(), StepBuilder()
    plan = make_plan([one_htask({"a": 1}, 32), one_htask({"b": 1}, 32)], [(0, 1)])
    only_b = {"a": Cursor(3), "b": Cursor(1)}
    with pytest.raises(ConfigError, match=r"plan\.round"):
        builder.forecast(plan, only_b, lengths, COST)
    with pytest.raises(ConfigError, match=r"plan\.round"):
        builder.rounds_until(plan, only_b, lengths, COST, 5)


def test_a_task_without_cursor_is_named() -> None:
    lengths, plan = lengths_of_two(), make_plan([GOOD], [(0, 1)])
    for ask in (
        lambda: StepBuilder().next_round(plan, {"a": Cursor()}, lengths),
        lambda: StepBuilder().forecast(plan, {"a": Cursor()}, lengths, COST),
    ):
        with pytest.raises(ConfigError, match="task 'b' of the plan has no cursor"):
            ask()
