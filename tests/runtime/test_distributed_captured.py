"""Rounds as static visits on ranks, what captured stages are on a GPU, against eager ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from muxtune.errors import DataError
from muxtune.runtime.backbone import BackboneStore, random_weights
from muxtune.runtime.distributed.static_runner import StaticPrograms
from muxtune.types import AdapterSlot, EventKind, Plan, ReplicaShape, TaskSpec
from tests.runtime.distributed_helpers import (
    SHAPE,
    Ranks,
    counted_plan,
    five_tasks,
    random_order,
    run_world,
    spread,
    whole_weights,
)
from tests.runtime.runtime_helpers import (
    Bench,
    DrawnText,
    make_htask,
    make_plan,
    make_task,
    worst_gap,
)

torch.set_num_threads(1)

STEPS, FEW_STEPS = 20, 3
PIPELINE, TENSOR, BOTH = (ReplicaShape(1, 2),), (ReplicaShape(2, 1),), (ReplicaShape(2, 2),)
THREE = (ReplicaShape(1, 3),)
LAYERS = 3
# Layout, whether the plan has an order, whether messages go by memory that ranks share, steps.
CASES: dict[str, tuple[Any, bool, bool, int]] = {
    "pipeline": (PIPELINE, False, False, STEPS),
    "ordered pipeline": (PIPELINE, True, True, FEW_STEPS),
    "tensor": (TENSOR, False, True, STEPS),
    "ordered tensor": (TENSOR, True, False, FEW_STEPS),
    "three stages": (THREE, False, True, FEW_STEPS),
    "ordered both": (BOTH, True, True, FEW_STEPS),
}
# Eager ranks train the same under all layouts and orders (``test_distributed``).
LIKE = {STEPS: "pipeline", FEW_STEPS: "ordered pipeline"}
DORA = AdapterSlot("dora", 1, ("k_proj",))


def tasks_of(steps: int) -> list[TaskSpec]:
    """Without dropout, whose masks fused linears share; steps of one micro-batch and of several."""
    return five_tasks(steps, dropout=0.0, lr=3e-3)


def plan_of(tasks: list[TaskSpec], replicas: Any, ordered: bool) -> Plan:
    """Without an order hTasks of one task have several micro-batches under way."""
    if ordered:
        htasks = [make_htask(tasks[:2], quota=4), make_htask(tasks[:1:-1], quota=4)]
        return random_order(counted_plan(htasks, replicas), 3)
    htasks = [make_htask(tasks[:3], quota=4), *(make_htask([task]) for task in tasks[3:])]
    return spread(make_plan(htasks), replicas)


def like(name: str) -> str:
    replicas, _, _, steps = CASES[name]
    return name if replicas == THREE else LIKE[steps]


class Outcome:
    def __init__(self, bench: Bench, tasks: list[TaskSpec]) -> None:
        self.weights = {task.task_id: whole_weights(bench, task) for task in tasks}
        self.losses = {task.task_id: bench.recorder.losses(task.task_id) for task in tasks}
        self.norms = {
            step.task_id: step.grad_norm for step in bench.recorder.steps
        }  # of the last step


def each_way(rank: int, names: list[str], folder: Path) -> None:
    for name in names:
        replicas, ordered, shares, steps = CASES[name]
        shape = SHAPE._replace(num_layers=LAYERS) if replicas == THREE else SHAPE
        for captures in (False, True) if name == like(name) else (True,):
            ranks = Ranks(rank, replicas, shape=shape, captures=captures, shares=shares)
            if rank:
                ranks.serve()
                continue
            tasks = tasks_of(steps)
            bench = ranks.bench(folder / f"{name}-{captures}", checkpoint_steps=2)
            bench.run(plan_of(tasks, replicas, ordered), *tasks)
            assert (ranks.worker.static is not None) is captures, ranks.worker.why_eager
            assert not [text for text in bench.recorder.notices if "eagerly" in text]
            torch.save(Outcome(bench, tasks), folder / f"{name}-{captures}.pt")
            ranks.stop()


# ---------------------------------------------------------------- what happens while tasks train


def prepared(programs: StaticPrograms) -> list[int]:
    return [id(item) for item in programs._known.values()]


def joins(rank: int, folder: Path) -> None:
    """A join into slots that hold keeps what is captured; a method that is not known, and nobody
    in its slot, turns to eager passes in the middle of steps, and back."""
    ranks = Ranks(rank, PIPELINE, captures=True, shares=True)
    if rank:
        ranks.serve()
        return
    assert ranks.worker.programs is not None
    tasks = tasks_of(10)
    whole = make_htask(tasks, quota=4)
    shape = whole.shapes[0]
    alone = whole._replace(slot_of={"a": 0, "c": 2}, quota={"a": 4, "c": 4})
    mixed = whole._replace(shapes=(shape._replace(slots=(*shape.slots, DORA)),))
    bench = ranks.bench(folder / "joins")
    bench.prepare(*tasks)
    kept, kinds, in_mid_step = [], [], 0
    for epoch, htask in enumerate((alone, whole, mixed, whole)):
        plan = spread(make_plan([htask], epoch, counts=[1]), PIPELINE)
        if epoch == 1:
            plan = random_order(plan, 1)
        bench.executor.apply(plan)
        bench.until(EventKind.PLAN_APPLIED, epoch + 1)
        in_mid_step += sum(item.cursor.left is not None for item in bench.executor.tasks.values())
        kept.append(prepared(ranks.worker.programs))
        kinds.append(ranks.worker.static is not None)
        count = len(bench.recorder.rounds)
        while len(bench.recorder.rounds) < count + 2:
            bench.tick()
    bench.until_ended(*tasks)
    assert kinds == [True, True, False, True] and in_mid_step > 2
    assert kept[0][:1] == kept[1][:1] and not kept[2]
    assert [text for text in bench.recorder.notices if "capture lora only, not dora" in text]
    torch.save(Outcome(bench, tasks), folder / "joins.pt")
    ranks.stop()


def ends(rank: int, folder: Path) -> None:
    """Of one task, for three reasons, while the others go on."""
    for what in ("", "weights", "data", "cancel"):
        ranks = Ranks(rank, PIPELINE, captures=True)
        if rank:
            ranks.serve()
            continue
        tasks, library = tasks_of(12)[:3], DrawnText()
        bench = ranks.bench(folder / f"ends-{what}", library=library)
        bench.prepare(*tasks)
        bench.executor.apply(plan_of(tasks, PIPELINE, True))
        bench.until_step(tasks[0], 2)
        hurt(what, bench, library)
        bench.until_ended(*tasks)
        ended = EventKind.TASK_CANCELLED if what == "cancel" else EventKind.TASK_FAILED
        assert [event.task_id for event in bench.of(ended)] == (["a"] if what else []), what
        torch.save(Outcome(bench, tasks[1:]), folder / f"ends-{what}.pt")
        ranks.stop()


def hurt(what: str, bench: Bench, library: DrawnText) -> None:
    if what == "weights":
        for values in bench.executor.tasks["a"].state.tensors.values():  # pyright: ignore
            values.param.fill_(float("nan"))
    elif what == "data":

        def bad(task_id: str, index: int) -> None:
            if task_id == "a":
                raise DataError("a.jsonl", "is broken", "Mend it")

        library.on_sequence = bad
    elif what == "cancel":
        bench.executor.cancel("a")


def no_capture(rank: int, folder: Path) -> None:
    """One rank cannot: all run eagerly, and the run says why."""
    ranks = Ranks(rank, PIPELINE, captures=True)
    if rank == 1:

        def fail(*_: Any) -> None:
            raise torch.OutOfMemoryError("no memory for a graph")

        assert ranks.worker.programs is not None
        ranks.worker.programs._make = fail  # type: ignore[method-assign]
        ranks.serve()
        return
    tasks = tasks_of(FEW_STEPS)
    bench = ranks.bench(folder / "no-capture")
    bench.run(plan_of(tasks, PIPELINE, True), *tasks)
    assert [text for text in bench.recorder.notices if "no memory for a graph" in text]
    assert ranks.worker.static is None
    torch.save(Outcome(bench, tasks), folder / "no-capture.pt")
    ranks.stop()


def dropping() -> list[TaskSpec]:
    return five_tasks(2, dropout=0.2)


def dropout(rank: int, folder: Path) -> None:
    ranks = Ranks(rank, PIPELINE, captures=True)
    if rank:
        ranks.serve()
        return
    bench = ranks.bench(folder / "dropout")
    bench.run(plan_of(dropping(), PIPELINE, False), *dropping())
    torch.save(Outcome(bench, dropping()), folder / "dropout.pt")
    ranks.stop()


def two_ranks(rank: int, folder: Path) -> None:
    dropout(rank, folder)
    each_way(rank, [n for n, case in CASES.items() if case[0] in (PIPELINE, TENSOR)], folder)
    joins(rank, folder)
    ends(rank, folder)
    no_capture(rank, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all worlds have left."""
    path = tmp_path_factory.mktemp("captured")
    run_world(2, two_ranks, path)
    run_world(3, each_way, [name for name, case in CASES.items() if case[0] == THREE], path)
    run_world(4, each_way, ["ordered both"], path)
    return path


def found(folder: Path, name: str) -> Outcome:
    return torch.load(folder / f"{name}.pt", weights_only=False)


def check(mine: Outcome, theirs: Outcome, gap: float) -> None:
    assert mine.weights.keys() == theirs.weights.keys()
    for task_id, weights in theirs.weights.items():
        assert worst_gap(mine.weights[task_id], weights) <= gap, task_id
        assert mine.losses[task_id] == pytest.approx(theirs.losses[task_id], rel=1e-4), task_id
        assert mine.norms[task_id] == pytest.approx(theirs.norms[task_id], rel=1e-3), task_id


@pytest.mark.parametrize("name", list(CASES))
def test_static_visits_train_what_eager_ranks_train(folder: Path, name: str) -> None:
    check(found(folder, f"{name}-True"), found(folder, f"{like(name)}-False"), 1e-3)


def one_process(folder: Path, tasks: list[TaskSpec], plan: Plan) -> Outcome:
    bench = Bench(folder, BackboneStore({"tiny": random_weights(SHAPE, 0)}), step="captured")
    bench.run(plan, *tasks)
    weights: Mapping[str, Any] = {task.task_id: bench.weights(task) for task in tasks}
    outcome = Outcome.__new__(Outcome)
    outcome.weights = dict(weights)
    outcome.losses = {task.task_id: bench.recorder.losses(task.task_id) for task in tasks}
    outcome.norms = {step.task_id: step.grad_norm for step in bench.recorder.steps}
    return outcome


def test_joins_and_plans_in_the_middle_of_steps_change_nothing(
    folder: Path, tmp_path: Path
) -> None:
    tasks = tasks_of(10)
    alone = one_process(tmp_path, tasks, make_plan([make_htask(tasks, quota=4)]))
    check(found(folder, "joins"), alone, 1e-3)


@pytest.mark.parametrize("what", ["weights", "data", "cancel"])
def test_one_tasks_end_is_nobody_elses(folder: Path, what: str) -> None:
    mine, whole = found(folder, f"ends-{what}"), found(folder, "ends-")
    for task_id, weights in whole.weights.items():
        assert worst_gap(mine.weights[task_id], weights) == 0.0, task_id
        assert mine.losses[task_id] == whole.losses[task_id]


def test_where_one_rank_cannot_capture_all_run_eagerly(folder: Path) -> None:
    check(found(folder, "no-capture"), found(folder, "ordered pipeline-False"), 1e-6)


def test_dropout_on_stages_is_that_of_one_captured_process(folder: Path, tmp_path: Path) -> None:
    tasks = dropping()
    alone = one_process(tmp_path, tasks, plan_of(tasks, (ReplicaShape(),), False))
    check(found(folder, "dropout"), alone, 1e-4)


@pytest.mark.parametrize(
    ("replicas", "changes", "said"),
    [
        ((ReplicaShape(), ReplicaShape()), {}, "several replicas"),
        (BOTH, {}, "only if it has an order"),
        (TENSOR, {"dropout": 0.1}, "no dropout"),
        (PIPELINE, {"method": "ia3"}, "not ia3"),
    ],
)
def test_what_cannot_be_captured_is_named(replicas: Any, changes: Any, said: str) -> None:
    from muxtune.runtime.distributed.static_part import refusal

    plan = spread(make_plan([make_htask([make_task("x", **changes)])]), replicas)
    assert said in refusal(plan)
