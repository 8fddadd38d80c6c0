"""The static step as the executor runs it, on the CPU: beside the eager pass of the same tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from muxtune.errors import DataError
from muxtune.runtime import executor
from muxtune.runtime.backbone import BackboneStore
from muxtune.runtime.captured_runner import (
    DEPTH,
    MAX_CLOSE_SIZES,
    CapturedRunner,
    close_sizes,
)
from muxtune.runtime.static_step.captured import HostResult, Pending
from muxtune.runtime.static_step.pool import StaticPool
from muxtune.types import AdapterSlot, EventKind, PackRule, TaskSpec
from tests.runtime.runtime_helpers import (
    Bench,
    DrawnText,
    make_htask,
    make_plan,
    make_store,
    make_task,
    worst_gap,
)

STEPS = 8
EAGER: dict[str, Any] = {"step": "eager"}
CAPTURED: dict[str, Any] = {"step": "captured"}


def tasks_of(dropout: float = 0.0) -> list[TaskSpec]:
    """Ranks, targets (parts of fused linears too), batch sizes and accumulation differ."""
    common = {"num_steps": STEPS, "dropout": dropout}
    return [
        make_task("a", **common),
        make_task("b", **common, rank=8, targets=("q_proj", "o_proj", "down_proj"), batch_size=5),
        make_task("c", **common, rank=2, targets=("all-linear",), accumulation=2),
        make_task("d", **common, rank=1, max_length_tokens=9, batch_size=7, weight_decay=0.1,
                  targets=("model.layers.1.self_attn.k_proj", "up_proj"), schedule="cosine"),
    ]  # fmt: skip


def mixed_tasks() -> list[TaskSpec]:
    """Every method that has a static form, beside LoRA."""
    common: dict[str, Any] = {"num_steps": STEPS}
    places = ("o_proj", "down_proj")
    return [
        make_task("lora", **common, targets=("all-linear",), rank=2),
        make_task("ia3", **common, method="ia3", targets=("k_proj", "v_proj", "down_proj"), rank=0),
        make_task("houlsby", **common, method="bottleneck", targets=places, dropout=0.2, rank=3),
        make_task("prefix", **common, method="prefix", targets=(), rank=3, accumulation=2),
        make_task("prefix 1", **common, method="prefix", targets=(), rank=1, batch_size=5),
        make_task("dora", **common, method="dora", targets=("q_proj", "up_proj"), rank=2),
        make_task("prompt", **common, method="prompt", targets=(), rank=2, batch_size=2),
    ]


def trained(folder: Path, store: BackboneStore, tasks: Sequence[TaskSpec], **options) -> Bench:
    bench = Bench(folder, store, **options)
    bench.run(make_plan([make_htask(tasks)]), *tasks)
    assert bench.done() == {task.task_id for task in tasks}, bench.events
    return bench


def runners(bench: Bench) -> list:
    (instance,) = bench.executor._instances.values()
    return instance._runners


@pytest.fixture(scope="module")
def store() -> BackboneStore:
    """Its own: fusing the weights changes where they lie."""
    return make_store()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("deterministic", [True, False])
def test_losses_norms_and_adapters_are_those_of_the_eager_pass(
    store: BackboneStore, tmp_path: Path, dropout: float, deterministic: bool
) -> None:
    """Dropout too: the masks of both are the same."""
    tasks = tasks_of(dropout)
    mode = {"deterministic": deterministic, "evaluate_tokens": 60}
    eager = trained(tmp_path / "eager", store, tasks, **EAGER, **mode)
    captured = trained(tmp_path / "captured", store, tasks, **CAPTURED, **mode)
    assert isinstance(runners(captured)[0], CapturedRunner)
    assert not isinstance(runners(eager)[0], CapturedRunner)
    for left, right in zip(_sorted(eager), _sorted(captured), strict=True):
        assert left[:2] == right[:2]
        assert left[2:] == pytest.approx(right[2:], rel=2e-4)
    for task in tasks:
        assert worst_gap(captured.weights(task), eager.weights(task)) < 1e-3
        results = [bench.executor.tasks[task.task_id].result for bench in (eager, captured)]
        assert results[0] is not None and results[1] is not None
        assert results[0][3:] == pytest.approx(results[1][3:], rel=1e-3)
        assert results[0].perplexity_before is not None
        assert results[0][:2] == results[1][:2]
    assert not captured.recorder.notices


@pytest.mark.parametrize("deterministic", [True, False])
def test_mixed_methods_are_those_of_the_eager_pass(
    store: BackboneStore, tmp_path: Path, deterministic: bool
) -> None:
    tasks = mixed_tasks()
    mode = {"deterministic": deterministic, "evaluate_tokens": 60}
    eager = trained(tmp_path / "eager", store, tasks, **EAGER, **mode)
    captured = trained(tmp_path / "captured", store, tasks, **CAPTURED, **mode)
    assert isinstance(runners(captured)[0], CapturedRunner)
    for left, right in zip(_sorted(eager), _sorted(captured), strict=True):
        assert left[:2] == right[:2]
        assert left[2:] == pytest.approx(right[2:], rel=5e-4)
    for task in tasks:
        assert worst_gap(captured.weights(task), eager.weights(task)) < 2e-3
        results = [bench.executor.tasks[task.task_id].result for bench in (eager, captured)]
        assert results[0] is not None and results[1] is not None
        assert results[0].perplexity_after == pytest.approx(results[1].perplexity_after, rel=1e-3)
    assert not captured.recorder.notices


def _sorted(bench: Bench) -> list[tuple]:
    return sorted(
        (r.task_id, r.step, r.loss, r.grad_norm, r.lr, r.tokens) for r in bench.recorder.steps
    )


def test_a_round_counts_when_it_was_read_and_lasts_as_long_as_the_device_computes(
    store: BackboneStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To start the first passes of a plan takes nothing, and those that still run when somebody
    asks are no progress yet: a few rounds would look far too fast."""
    read, num_read = Pending.result, 0

    def counted(self: Pending) -> HostResult:
        nonlocal num_read
        num_read += 1
        return read(self)

    monkeypatch.setattr(Pending, "result", counted)
    task = make_task("r", num_steps=8)
    bench = Bench(tmp_path, store, **CAPTURED)
    bench.prepare(task)
    bench.executor.apply(make_plan([make_htask([task])], counts=[1]))  # a pass each round
    rounds = bench.recorder.rounds
    while len(bench.recorder.steps) < 8:
        assert len(rounds) == num_read
        bench.tick()
    assert len(rounds) >= 8
    ends = [record.start_ns + record.duration_ns for record in rounds]
    assert all(end <= after.start_ns for end, after in zip(ends, rounds[1:], strict=False))
    taken_ns = sum(record.duration_ns for record in rounds)
    assert taken_ns > 0.8 * (ends[-1] - rounds[0].start_ns)


def test_the_first_gradients_are_those_of_the_eager_pass(
    store: BackboneStore, tmp_path: Path
) -> None:
    """In the middle of a step, so that they are still there."""
    task = make_task("g", accumulation=8, targets=("all-linear",), dropout=0.2)
    grads = []
    for mode in (EAGER, CAPTURED):
        bench = Bench(tmp_path / mode["step"], store, **mode)
        bench.prepare(task)
        bench.executor.apply(make_plan([make_htask([task])], counts=[1]))
        places = {bench.executor.tasks["g"].cursor}
        while len(places) < 3:  # two rounds were started
            bench.tick()
            places.add(bench.executor.tasks["g"].cursor)
        grads.append({key: t.grad.clone().float() for key, t in bench.state(task).tensors.items()})
        assert bench.state(task).is_open
    assert worst_gap(
        {k: g for k, g in grads[1].items() if g.any()},
        {k: g for k, g in grads[0].items() if g.any()},
    ) < 1e-4  # fmt: skip


def test_results_come_late_and_in_order(store: BackboneStore, tmp_path: Path) -> None:
    tasks = tasks_of()
    bench = Bench(tmp_path, store, **CAPTURED)
    bench.prepare(*tasks)
    bench.executor.apply(make_plan([make_htask(tasks)]))
    (instance,) = bench.executor._instances.values()
    most = 0
    while bench.done() != {task.task_id for task in tasks}:
        bench.tick()
        most = max(most, len(instance._started))
    assert most == DEPTH
    for task in tasks:
        steps = [r.step for r in bench.recorder.steps if r.task_id == task.task_id]
        assert steps == list(range(1, STEPS + 1))


@pytest.mark.parametrize("kind", ["lora", "mixed"])
def test_together_is_bit_for_bit_alone(store: BackboneStore, tmp_path: Path, kind: str) -> None:
    tasks = tasks_of(0.1) if kind == "lora" else mixed_tasks()
    whole = make_htask(tasks)
    together = trained(tmp_path / "together", store, tasks, **CAPTURED)
    for task in tasks:
        own = {task.task_id}
        htask = whole._replace(
            slot_of={key: slot for key, slot in whole.slot_of.items() if key in own},
            quota={key: quota for key, quota in whole.quota.items() if key in own},
        )
        alone = Bench(tmp_path / task.task_id, store, **CAPTURED)
        alone.run(make_plan([htask]), task)
        assert worst_gap(alone.weights(task), together.weights(task)) == 0.0


def test_joins_leaves_and_plan_changes_in_the_middle_of_steps(
    store: BackboneStore, tmp_path: Path
) -> None:
    """Every round another plan, in which every method joins and leaves captured steps of others;
    one of them runs an hTask eagerly, so gradients and moments move between the two kinds of
    pools."""
    every = [tasks_of(0.1)[1], *mixed_tasks()[1:4], *mixed_tasks()[5:]]
    tasks = [task._replace(num_steps=5) for task in every]
    eager = trained(tmp_path / "eager", store, tasks, **EAGER)
    bench = Bench(tmp_path / "captured", store, **CAPTURED)
    bench.prepare(*tasks)
    dora = AdapterSlot("dora", 1, ("k_proj", "v_proj", "down_proj"), True)
    groups = [[tasks], [tasks[3:], tasks[:3]], [tasks[::-1]], [tasks[:1], tasks[4:], tasks[1:4]]]
    epoch = mixed = in_mid_step = 0
    while bench.done() < {task.task_id for task in tasks}:
        htasks = [make_htask(group) for group in groups[epoch % len(groups)]]
        if epoch % 3 == 2:  # a slot of a method that the program does not know, and nobody in it
            shape = htasks[0].shapes[0]
            htasks[0] = htasks[0]._replace(shapes=(shape._replace(slots=(*shape.slots, dora)),))
        bench.executor.apply(make_plan(htasks, epoch, counts=[1] * len(htasks)))
        bench.until(EventKind.PLAN_APPLIED, epoch + 1)
        in_mid_step += sum(item.cursor.left is not None for item in bench.executor.tasks.values())
        kinds = {type(runner) for runner in runners(bench)}
        mixed += len(kinds) == 2
        epoch += 1
        while len(bench.recorder.rounds) < epoch and len(bench.done()) < len(tasks):
            bench.tick()
    assert epoch > 8 and in_mid_step > 8 and mixed > 1
    for task in tasks:
        assert worst_gap(bench.weights(task), eager.weights(task)) < 1e-3
    assert [text for text in bench.recorder.notices if "knows no 'dora'" in text]
    assert len(bench.recorder.notices) == len(set(bench.recorder.notices)) == 1


def test_a_join_into_a_shape_that_holds_keeps_program_and_addresses(
    store: BackboneStore, tmp_path: Path
) -> None:
    first, second = (make_task(name, num_steps=12) for name in ("x", "y"))
    whole = make_htask([first, second])
    alone = whole._replace(slot_of={"x": 0}, quota={"x": 2})
    bench = Bench(tmp_path, store, **CAPTURED)
    bench.prepare(first, second)
    bench.executor.apply(make_plan([alone]))
    bench.until_step(first, 4)
    (before,) = runners(bench)
    address = bench.state(first).tensors["model.layers.0.self_attn.q_proj", "lora_A"]
    bench.executor.apply(make_plan([whole], 1))
    bench.until_ended(first, second)
    (after,) = runners(bench)
    assert after is before
    same = bench.state(first).tensors["model.layers.0.self_attn.q_proj", "lora_A"]
    assert same.param.data_ptr() == address.param.data_ptr()
    alone_y = Bench(tmp_path / "y", store, **CAPTURED)
    alone_y.run(make_plan([whole._replace(slot_of={"y": 1}, quota={"y": 2})]), second)
    assert worst_gap(bench.weights(second), alone_y.weights(second)) == 0.0


@pytest.mark.parametrize("what", ["weights", "data", "cancel"])
def test_one_tasks_end_is_nobody_elses(store: BackboneStore, tmp_path: Path, what: str) -> None:
    tasks = tasks_of()
    whole = trained(tmp_path / "whole", store, tasks, **CAPTURED)
    library = DrawnText()
    bench = Bench(tmp_path / "hurt", store, library, checkpoint_steps=1, **CAPTURED)
    bench.prepare(*tasks)
    bench.executor.apply(make_plan([make_htask(tasks)]))
    bench.until_step(tasks[0], 3)
    if what == "weights":
        for values in bench.state(tasks[0]).tensors.values():
            values.param.fill_(float("nan"))
    elif what == "data":

        def bad(task_id: str, index: int) -> None:
            if task_id == "a":
                raise DataError("a.jsonl", "is broken", "Mend it")

        library.on_sequence = bad
    else:
        bench.executor.cancel("a")
    bench.until_ended(*tasks)
    bench.executor.close()
    ended = EventKind.TASK_CANCELLED if what == "cancel" else EventKind.TASK_FAILED
    assert [event.task_id for event in bench.of(ended)] == ["a"]
    assert bench.done() == {"b", "c", "d"}
    for task in tasks[1:]:
        assert worst_gap(bench.weights(task), whole.weights(task)) == 0.0


def test_a_nan_leaves_its_tasks_weights_alone_until_it_is_told(
    store: BackboneStore, tmp_path: Path
) -> None:
    """Its own weights are not touched although more of its passes are under way."""
    task = make_task("n", num_steps=9)
    bench = Bench(tmp_path, store, **CAPTURED)
    bench.prepare(task)
    bench.executor.apply(make_plan([make_htask([task])]))
    bench.until_step(task, 3)
    (instance,) = bench.executor._instances.values()
    instance.settle_all()
    pool = runners(bench)[0].pool
    assert isinstance(pool, StaticPool)
    key = ("model.layers.1.self_attn.v_proj", "lora_B")
    bench.state(task).tensors[key].param[0, 0] = float("nan")
    others = {
        name: tensors.param.clone()
        for name, tensors in pool._tensors(0)
        if name != key
    }  # fmt: skip
    bench.until_ended(task)
    (event,) = bench.of(EventKind.TASK_FAILED)
    assert "its loss is nan in step" in str(event.data)
    for name, tensors in pool._tensors(0):
        assert name == key or torch.equal(tensors.param, others[name])


def test_a_step_that_cannot_be_captured_runs_eagerly(
    store: BackboneStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels that do not fit, say: the run goes on and says so."""
    tasks = tasks_of()
    eager = trained(tmp_path / "eager", store, tasks, **EAGER)

    def fails(self: CapturedRunner, *_: object) -> bool:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(CapturedRunner, "prepare", fails)
    bench = trained(tmp_path / "captured", store, tasks, **CAPTURED)
    assert not isinstance(runners(bench)[0], CapturedRunner)
    (notice,) = bench.recorder.notices
    assert "runs eagerly" in notice and "out of resource" in notice
    for task in tasks:
        assert worst_gap(bench.weights(task), eager.weights(task)) == 0.0


def test_each_of_two_kinds_of_slots_may_be_refused(
    store: BackboneStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second refusal comes when the pools of the first have been made anew."""
    tasks = tasks_of()

    def fails(self: CapturedRunner, *_: object) -> bool:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(CapturedRunner, "prepare", fails)
    bench = Bench(tmp_path, store, **CAPTURED)
    bench.run(make_plan([make_htask(tasks[:1]), make_htask(tasks[1:])]), *tasks)
    assert bench.done() == {task.task_id for task in tasks}
    assert len(bench.recorder.notices) == 2


def test_padded_plans_run_too(store: BackboneStore, tmp_path: Path) -> None:
    tasks = tasks_of()[:2]
    htask = make_htask(tasks, 48, 4, PackRule.PAD)
    weights = []
    fast: dict[str, Any] = {**CAPTURED, "deterministic": False}
    for mode in (EAGER, fast):
        bench = Bench(tmp_path / mode["step"], store, **mode)
        bench.run(make_plan([htask]), *tasks)
        weights.append([bench.weights(task) for task in tasks])
        if mode["step"] == "captured":
            sizes = runners(bench)[0].steps.row_counts
            assert sizes == [htask.shapes[0].padded_tokens], "others would never run"
    for left, right in zip(*weights, strict=True):
        assert worst_gap(left, right) < 1e-4


def test_an_input_that_fused_linears_share_cannot_be_scaled_for_one(
    store: BackboneStore, tmp_path: Path
) -> None:
    options = {"feedforward_modules": ["up_proj"]}
    task = make_task("ia3", method="ia3", targets=("up_proj", "v_proj"), options=options)
    bench = Bench(tmp_path, store, **CAPTURED)
    bench.prepare(task)
    (failure,) = bench.of(EventKind.TASK_FAILED)
    assert "names up_proj" in str(failure.data) and "backend.step=eager" in str(failure.data)


def test_where_a_task_scales_the_input_of_a_fused_linear_its_htask_runs_eagerly(
    store: BackboneStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a captured step is not insisted on (auto, on a GPU); it joins a captured one."""
    monkeypatch.setattr(executor, "_check_captured", lambda *_: None)
    options = {"feedforward_modules": ["up_proj"]}
    ia3 = {"method": "ia3", "targets": ("up_proj", "v_proj"), "num_steps": STEPS}
    plain, other = make_task("plain", **ia3), make_task("other", num_steps=STEPS)
    scaled = make_task("scaled", **ia3, options=options)
    weights = []
    for mode in (CAPTURED, EAGER):
        bench = Bench(tmp_path / mode["step"], store, **mode)
        bench.prepare(plain, other, scaled)
        bench.executor.apply(make_plan([make_htask([other, plain])]))
        bench.until_step(other, 2)
        slots = make_htask([other, scaled]).shapes[0].slots
        bench.executor.apply(make_plan([make_htask([other, scaled], slots=slots)], 1))
        bench.until_ended(other, scaled)
        weights.append((bench.weights(other), bench.weights(scaled)))
        assert not isinstance(runners(bench)[0], CapturedRunner)
        told = [text for text in bench.recorder.notices if "scales the input" in text]
        assert len(told) == (mode is CAPTURED)
    for left, right in zip(*weights, strict=True):
        assert worst_gap(left, right) < 1e-3


def test_recomputed_blocks_change_no_bit_of_any_method(
    store: BackboneStore, tmp_path: Path
) -> None:
    tasks, weights = mixed_tasks(), []
    for blocks in (0, 1, 2):
        htask = make_htask(tasks)
        shape = htask.shapes[0]._replace(recompute=blocks)
        bench = Bench(tmp_path / str(blocks), store, **CAPTURED)
        bench.run(make_plan([htask._replace(shapes=(shape,))]), *tasks)
        (runner,) = runners(bench)
        assert set(runner.steps.recompute.values()) == {blocks}
        weights.append([bench.weights(task) for task in tasks])
    for other in weights[1:]:
        for left, right in zip(weights[0], other, strict=True):
            assert worst_gap(left, right) == 0.0


def test_sizes_are_those_that_the_micro_batches_to_come_are_best_off_with() -> None:
    rows = [3400, 3450, 3600, 3610, 3700]
    assert sorted(close_sizes(rows, [4096], 4096)) == [3456, 3648, 3712]
    assert close_sizes(rows, [3712, 3648, 3456], 4096) == [], "what there is is close enough"
    assert close_sizes([], [4096], 4096) == []
    assert close_sizes([4090], [4096], 4096) == []
    assert close_sizes(rows, [4096], 4096, is_later=True) == [3712], "the others wait meanwhile"
    wide = range(100, 4000, 100)
    spread = close_sizes(wide, [4096], 4096)
    assert len(spread) == MAX_CLOSE_SIZES
    taken = sum(min(size for size in (*spread, 4096) if size >= count) for count in wide)
    assert taken < 0.7 * len(wide) * 4096


def test_a_micro_batch_takes_the_smallest_size_that_is_there(
    store: BackboneStore, tmp_path: Path
) -> None:
    """Fast mode: fewer rows than its shape has; deterministic: always its shape's."""
    task = make_task("a", num_steps=STEPS, max_length_tokens=60, batch_size=8)
    for deterministic in (False, True):
        bench = Bench(tmp_path / str(deterministic), store, **CAPTURED, deterministic=deterministic)
        bench.run(make_plan([make_htask([task], 64, 16)]), task)
        (runner,) = runners(bench)
        sizes = set(runner.steps.replays)
        assert sizes == {1024} if deterministic else max(sizes) < 1024
