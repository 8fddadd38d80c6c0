"""What plans predict against what StepBuilder packs and the cost model says of it."""

from __future__ import annotations

import random

import pytest

from muxtune.cost import CostBook
from muxtune.fleet import task_view
from muxtune.planners.muxtune import MuxTunePlanner
from muxtune.planning.step_builder import StepBuilder
from muxtune.types import AdapterSpec, Cursor, DataSpec, InstanceView, Plan, TaskSpec, TaskView
from muxtune.workload.synthetic import SyntheticLibrary

MODEL, DEVICE = "llama-2-7b", "H100-SXM"
COSTS = CostBook()
KINDS = (("sst2", 64), ("openbookqa", 128), ("rte", 256))
ROUNDS = 400


def drawn_tasks(library: SyntheticLibrary, count: int, seed: int) -> list[TaskView]:
    rng = random.Random(seed)
    views = []
    for index in range(count):
        histogram, longest = rng.choice(KINDS)
        spec = TaskSpec(
            f"task-{index}",
            MODEL,
            data=DataSpec(histogram=histogram, max_length_tokens=longest),
            batch_size=rng.choice((4, 8, 16)),
            num_steps=10_000,
            adapter=AdapterSpec(rank=rng.choice((8, 16, 64))),
        )
        views.append(task_view(spec, library.add(spec)))
    return views


@pytest.mark.parametrize("limit_bytes", [74_000_000_000, 18_000_000_000])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_rounds_and_steps_come_out_as_predicted(count, limit_bytes):
    library = SyntheticLibrary(seed=5, period_steps=128)
    views = drawn_tasks(library, count, seed=count)
    instance = InstanceView("i", 0, tuple(views), None, limit_bytes, model=MODEL, device=DEVICE)
    plan = MuxTunePlanner(COSTS).plan(instance, None)
    assert isinstance(plan, Plan), plan
    builder, cursors = StepBuilder(), {view.task_id: Cursor() for view in views}
    seconds = builder.duration_ns(plan, cursors, library, COSTS(MODEL, DEVICE), ROUNDS) / 1e9
    totals = builder.round_totals(plan, cursors, library, ROUNDS)
    predicted = plan.predicted
    assert predicted.round_time_s.value == pytest.approx(seconds / ROUNDS, rel=0.02)
    padded = predicted.round_padded_tokens * ROUNDS
    assert padded == pytest.approx(totals.padded_tokens, rel=0.03)
    slowest = max(seconds / closed for closed in totals.closes.values())
    assert predicted.tasks_step_time_s == pytest.approx(slowest, rel=0.02)


def test_a_ladder_computes_less_filler_than_one_static_shape():
    library = SyntheticLibrary(seed=5, period_steps=128)
    views = drawn_tasks(library, 8, seed=8)
    instance = InstanceView("i", 0, tuple(views), None, 74_000_000_000, model=MODEL, device=DEVICE)
    shares = {}
    for num_shapes in (1, 4):
        plan = MuxTunePlanner(COSTS, max_shapes=num_shapes).plan(instance, None)
        assert isinstance(plan, Plan)
        builder, cursors = StepBuilder(), {view.task_id: Cursor() for view in views}
        totals = builder.round_totals(plan, cursors, library, ROUNDS)
        shares[num_shapes] = totals.effective_tokens / totals.padded_tokens
    assert shares[4] > 0.8 > shares[1]
