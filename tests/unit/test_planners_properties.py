"""Properties of every plan that the muxtune planner makes, on random tasks and memory limits."""

# The hand-made cost model has only what planners ask for.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOptionalOperand=false, reportOperatorIssue=false

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from muxtune.planners.muxtune import MuxTunePlanner
from muxtune.planning.step_builder import StepBuilder
from muxtune.types import Cursor, Plan, Refusal, Sample
from tests.unit.planner_helpers import HandCost, task, view

ROUNDS = 40

task_fields = st.tuples(
    st.integers(1, 200), st.integers(1, 9), st.sampled_from((4, 8, 64))
)  # length, sequences a step, rank
questions = st.tuples(
    st.lists(task_fields, min_size=1, max_size=6),
    st.integers(1000, 4000),  # memory, in rows
    st.sampled_from(((0.0, 0.0), (1e-2, 0.0), (1e-3, 1e-6))),  # launch_s, rank_row_s
)


class EqualLengths:
    """Every sequence of a task is as long as its name says."""

    def __init__(self, fields):
        self.fields = fields

    def batch(self, task_id, step):
        length, sequences, _ = self.fields[int(task_id)]
        return tuple(Sample(step * sequences + i, length, length - 1) for i in range(sequences))

    def num_steps(self, task_id):
        return 5

    def period_steps(self, task_id):
        return None

    def lengths_key(self, task_id):
        return task_id


def asked(question):
    fields, rows, (launch_s, rank_row_s) = question
    cost = HandCost(launch_s=launch_s, rank_row_s=rank_row_s)
    tasks = [task(str(i), n, b, r) for i, (n, b, r) in enumerate(fields)]
    return MuxTunePlanner(lambda model, device: cost), cost, view(*tasks, limit=rows)


@settings(max_examples=60, deadline=None)
@given(questions)
def test_memory_is_never_exceeded_and_a_refusal_is_true(question):
    planner, cost, instance = asked(question)
    answer = planner.plan(instance, None)
    resident = cost.resident_bytes(instance.tasks, None)
    if isinstance(answer, Refusal):
        longest = max(length for length, _, _ in question[0])
        assert resident + 16 * -(-longest // 16) > instance.memory_limit_bytes
        assert answer.needed_bytes > answer.available_bytes == instance.memory_limit_bytes
        return
    largest = max(shape.padded_tokens for htask in answer.htasks for shape in htask.shapes)
    assert resident + largest <= instance.memory_limit_bytes
    assert answer.predicted.peak_memory_bytes.value == resident + largest


@settings(max_examples=40, deadline=None)
@given(questions)
def test_tasks_keep_their_batches_and_order(question):
    planner, _, instance = asked(question)
    plan = planner.plan(instance, None)
    if isinstance(plan, Refusal):
        return
    assert sorted(plan.task_ids) == sorted(view.task_id for view in instance.tasks)
    lengths, builder = EqualLengths(question[0]), StepBuilder()
    cursors = {task_id: Cursor() for task_id in plan.task_ids}
    seen: dict[str, list[tuple[int, int]]] = {task_id: [] for task_id in plan.task_ids}
    for _ in range(ROUNDS):
        micro_batches, cursors = builder.next_round(plan, cursors, lengths)
        for micro_batch in micro_batches:
            check_chunks(micro_batch, seen)
    for task_id, computed in seen.items():
        _, sequences, _ = question[0][int(task_id)]
        steps = [step for step, _ in computed]
        assert steps == sorted(steps)
        for step in range(cursors[task_id].step):
            positions = sorted(position for at, position in computed if at == step)
            assert positions == list(range(sequences))


def check_chunks(micro_batch, seen):
    """Sequences lie whole and in order in chunks of one task; each once."""
    reached: dict[tuple[str, int], int] = {}
    for chunk in micro_batch.chunks:
        tokens = sum(piece.stop - piece.start for piece in chunk.pieces)
        assert tokens <= micro_batch.shape.chunk_tokens
        for piece in chunk.pieces:
            key = (chunk.task_id, piece.position)
            assert piece.start == reached.get(key, 0)
            reached[key] = piece.stop
            if piece.start == 0:
                seen[chunk.task_id].append((micro_batch.steps[chunk.task_id], piece.position))


@settings(max_examples=40, deadline=None)
@given(questions)
@example(([(65, 1, 4), (65, 5, 4)], 1340, (0.01, 0.0)))  # two ladders, far from a normal sum
def test_never_worse_than_the_plain_arrangements_and_the_same_in_any_order(question):
    planner, _, instance = asked(question)
    plan = planner.plan(instance, None)
    backwards = instance._replace(tasks=instance.tasks[::-1])
    assert MuxTunePlanner(planner.costs).plan(backwards, None) == plan
    for fusion in ("all_spatial", "all_temporal"):
        plain = MuxTunePlanner(planner.costs, fusion=fusion).plan(instance, None)
        if isinstance(plain, Plan):
            assert isinstance(plan, Plan)
            most = plain.predicted.tasks_step_time_s * (1 + 2e-3)
            assert plan.predicted.tasks_step_time_s <= most
