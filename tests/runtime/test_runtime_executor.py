"""The executor protocol: events, boundaries, failures of one task, time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from muxtune.errors import ConfigError, DataError, OutputError
from muxtune.planning.step_builder import StepBuilder
from muxtune.runtime.backbone import BackboneStore
from muxtune.runtime.executor import METRICS_NAME, TorchExecutor
from muxtune.runtime.options import TorchOptions
from muxtune.runtime.records import Recorder
from muxtune.runtime.tasks import Phase
from muxtune.types import (
    EventKind,
    FailureData,
    InstanceSpec,
    ProgressData,
    ReplicaShape,
    ResultData,
    TaskReadyData,
)
from tests.runtime.runtime_helpers import (
    INSTANCE,
    NS,
    Bench,
    DrawnText,
    make_htask,
    make_plan,
    make_task,
    worst_gap,
)

A, B, C = (make_task(name, num_steps=6, batch_size=4, max_length_tokens=16) for name in "abc")


def alone(store: BackboneStore, folder: Path, task: Any) -> dict[Any, torch.Tensor]:
    bench = Bench(folder / "alone" / task.task_id, store)
    bench.run(make_plan([make_htask([task])]), task)
    return bench.weights(task)


def message(bench: Bench) -> str:
    (event,) = bench.of(EventKind.TASK_FAILED)
    assert isinstance(event.data, FailureData)
    return event.data.message


# --------------------------------------------------------------------------- the ordinary course


def test_a_run_from_ready_to_done(store: BackboneStore, tmp_path: Path) -> None:
    bench = Bench(tmp_path, store, evaluate_tokens=60)
    bench.run(make_plan([make_htask([A, B])], epoch=3), A, B)
    kinds = [event.kind for event in bench.events]
    assert kinds[0] is EventKind.INSTANCE_READY
    ready = bench.of(EventKind.TASK_READY)
    assert [event.task_id for event in ready] == ["a", "b"]
    assert all(isinstance(event.data, TaskReadyData) for event in ready)
    (applied,) = bench.of(EventKind.PLAN_APPLIED)
    assert (applied.epoch, applied.instance_id) == (3, INSTANCE)
    for event in bench.of(EventKind.TASK_DONE):
        assert isinstance(event.data, ResultData)
        assert event.epoch == 3 and event.data.steps == 6
        lengths = [bench.library.batch(event.task_id, step) for step in range(6)]
        assert event.data.effective_tokens == sum(s.tokens for batch in lengths for s in batch)
        assert event.data.final_loss == bench.recorder.losses(event.task_id)[-1]
        assert event.data.perplexity_before is not None
        assert event.data.perplexity_after != event.data.perplexity_before
        assert Path(event.data.output_path).is_dir()
    times = [event.time_ns for event in bench.events]
    assert times == sorted(times) and times[0] > 0


def test_events_of_one_instant_are_sorted_and_share_its_time(
    store: BackboneStore, tmp_path: Path
) -> None:
    bench = Bench(tmp_path, store)
    bench.prepare(A, B)
    bench.executor.apply(make_plan([make_htask([B, A])]))
    while len(bench.done()) < 2:
        batch = bench.step()
        assert len({event.time_ns for event in batch}) == 1
        assert batch == sorted(batch, key=lambda event: event.sort_key)
    assert [event.task_id for event in batch if event.kind is EventKind.TASK_DONE] == ["a", "b"]


def test_progress_counts_rounds_and_tokens(store: BackboneStore, tmp_path: Path) -> None:
    bench = Bench(tmp_path, store, progress_interval_s=0.0)
    bench.run(make_plan([make_htask([A, B])]), A, B)
    data = [event.data for event in bench.of(EventKind.PROGRESS)]
    data = [item for item in data if isinstance(item, ProgressData)]
    assert sum(item.rounds for item in data) == 6 == len(bench.recorder.rounds)
    lengths = [bench.library.batch(name, step) for name in "ab" for step in range(6)]
    effective = sum(sample.tokens for batch in lengths for sample in batch)
    assert sum(item.effective_tokens for item in data) == effective
    assert sum(item.padded_tokens for item in data) % 64 == 0
    assert sum(item.padded_tokens for item in data) >= effective
    assert data[-1].steps_done == {"a": 6, "b": 6}


def test_progress_is_told_when_a_plan_ends(store: BackboneStore, tmp_path: Path) -> None:
    bench = Bench(tmp_path, store)
    bench.prepare(A, B)
    bench.executor.apply(make_plan([make_htask([A])], 0))
    bench.until_step(A, 2)
    bench.executor.apply(make_plan([make_htask([A, B])], 1))
    bench.until_ended(A, B)
    progress = bench.of(EventKind.PROGRESS)
    assert [event.epoch for event in progress] == [0, 1]
    assert [event.data.rounds for event in progress] == [2, 6]  # type: ignore[union-attr]
    assert [event.epoch for event in bench.of(EventKind.PLAN_APPLIED)] == [0, 1]


def test_progress_comes_with_the_news_that_another_plan_will_answer(
    store: BackboneStore, tmp_path: Path
) -> None:
    """Else the next plan would be made without what the running one's rounds taught."""
    longer = A._replace(task_id="longer", num_steps=8)
    bench = Bench(tmp_path, store)
    bench.prepare(A, longer)
    bench.executor.apply(make_plan([make_htask([A, longer])]))
    while not bench.done():
        batch = bench.step()
    assert [event.kind for event in batch] == [EventKind.PROGRESS, EventKind.TASK_DONE]
    assert batch[0].data.rounds == 6  # type: ignore[union-attr]
    bench.until_ended(longer)
    assert bench.of(EventKind.PROGRESS)[-1].data.rounds == 2, "and is counted once"  # type: ignore


def test_metrics_are_one_line_a_step(store: BackboneStore, tmp_path: Path) -> None:
    bench = Bench(tmp_path, store)
    bench.run(make_plan([make_htask([A, B])]), A, B)
    lines = [json.loads(line) for line in (tmp_path / METRICS_NAME).read_text().splitlines()]
    assert len(lines) == 12
    assert {(line["task_id"], line["step"]) for line in lines} == {
        (name, step) for name in "ab" for step in range(1, 7)
    }
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 and line["lr"] == 1e-2 for line in lines)
    spans = {span.name for span in bench.recorder.spans}
    assert {"load", "prepare", "forward", "backward", "optimizer"} <= spans
    assert all(span.duration_ns > 0 for span in bench.recorder.spans)


def test_an_empty_plan_idles_and_drops_its_tasks(store: BackboneStore, tmp_path: Path) -> None:
    bench = Bench(tmp_path, store)
    bench.prepare(A)
    bench.executor.apply(make_plan([make_htask([A])], 0))
    bench.until_step(A, 2)
    bench.executor.apply(make_plan([], 1))
    bench.until(EventKind.PLAN_APPLIED, 2)
    assert bench.state(A).place is None and bench.state(A).step == 2
    assert bench.executor.wait(2**62) == []
    bench.executor.apply(make_plan([make_htask([A])], 2))
    bench.until_ended(A)
    assert worst_gap(bench.weights(A), alone(store, tmp_path, A)) == 0


def test_every_plan_has_a_round_before_it_gives_way(store: BackboneStore, tmp_path: Path) -> None:
    """Plans that come faster than takeovers must not stop training; as in the simulator
    (tests/sim/test_sim_executor.py)."""
    bench = Bench(tmp_path, store)
    bench.prepare(A, B)
    for epoch in range(4):
        bench.executor.apply(make_plan([make_htask([A, B] if epoch % 2 else [A])], epoch))
        bench.until(EventKind.PLAN_APPLIED, epoch + 1)
    bench.until_ended(A, B)
    progress = [(event.epoch, event.data.rounds) for event in bench.of(EventKind.PROGRESS)]  # type: ignore[union-attr]
    assert progress == [(0, 1), (1, 1), (2, 1), (3, 5)]


def test_of_two_plans_that_come_in_a_takeover_the_later_one_is_taken(
    store: BackboneStore, tmp_path: Path
) -> None:
    bench = Bench(tmp_path, store)
    bench.prepare(A, B, C)
    for epoch, tasks in enumerate(([A], [A, B])):
        bench.executor.apply(make_plan([make_htask(tasks)], epoch))
        bench.until(EventKind.PLAN_APPLIED)
    bench.executor.apply(make_plan([make_htask([A, B, C])], 2))
    bench.until_ended(A, B, C)
    assert [event.epoch for event in bench.of(EventKind.PLAN_APPLIED)] == [0, 2]


def test_a_plan_whose_only_task_is_cancelled_in_its_takeover_gives_way(
    store: BackboneStore, tmp_path: Path
) -> None:
    bench = Bench(tmp_path, store)
    bench.prepare(A, B)
    bench.executor.apply(make_plan([make_htask([A])], 0))
    bench.until(EventKind.PLAN_APPLIED)
    bench.executor.cancel("a")
    bench.executor.apply(make_plan([make_htask([B])], 1))
    bench.until_ended(A, B)
    assert bench.done() == {"b"} and not bench.recorder.losses("a")
    assert worst_gap(bench.weights(B), alone(store, tmp_path, B)) == 0


def test_under_pressure_the_next_plan_does_not_wait_for_a_round(
    store: BackboneStore, tmp_path: Path
) -> None:
    """The round is what there is no memory for."""
    bench = Bench(tmp_path, store)
    bench.prepare(A, B)
    bench.executor.apply(make_plan([make_htask([A, B])], 0))
    bench.until(EventKind.PLAN_APPLIED)
    bench.executor._instances[INSTANCE].press()
    bench.executor.apply(make_plan([make_htask([A])], 1))
    bench.until(EventKind.PLAN_APPLIED, 2)
    assert not bench.recorder.rounds


def test_a_draining_task_leaves_at_its_step_boundary(store: BackboneStore, tmp_path: Path) -> None:
    bench = Bench(tmp_path, store)
    bench.prepare(A, B)
    htask = make_htask([A, B], quota={"a": 1, "b": 2})
    bench.executor.apply(make_plan([htask], 0, counts=[1]))
    while bench.executor.tasks["a"].cursor.left is None:
        bench.tick()
    bench.executor.apply(make_plan([htask], 1, counts=[1], drains=["a"]))
    (released,) = bench.until(EventKind.TASK_RELEASED)
    assert released.task_id == "a" and released.data == bench.state(A).step >= 1
    assert bench.executor.tasks["a"].cursor.left is None
    assert bench.state(A).place is None
    bench.until_ended(B)
    assert bench.state(A).step == released.data


# --------------------------------------------------------------------------- failures of one task


def test_a_nan_loss_ends_its_own_task_only(store: BackboneStore, tmp_path: Path) -> None:
    bench = Bench(tmp_path, store)
    bench.prepare(A, B)
    bench.executor.apply(make_plan([make_htask([A, B])]))
    bench.until_step(A, 3)
    for values in bench.state(A).tensors.values():
        values.param.fill_(float("nan"))
    bench.until_ended(A, B)
    assert "task 'a': its loss is nan in step 4" in message(bench)
    assert bench.of(EventKind.TASK_FAILED)[0].data.steps == 3  # type: ignore[union-attr]
    assert bench.done() == {"b"}
    assert worst_gap(bench.weights(B), alone(store, tmp_path, B)) == 0
    assert not (tmp_path / "adapters" / "a").exists()


def test_a_gradient_that_is_not_finite_ends_its_own_task_only(
    store: BackboneStore, tmp_path: Path
) -> None:
    bench = Bench(tmp_path, store)
    bench.prepare(A, B)
    bench.executor.apply(make_plan([make_htask([A, B])]))
    bench.until_step(A, 2)
    next(iter(bench.state(A).tensors.values())).grad[0, 0] = float("inf")
    bench.until_ended(A, B)
    assert "the norm of its gradient is inf in step 3" in message(bench)
    assert worst_gap(bench.weights(B), alone(store, tmp_path, B)) == 0


@pytest.mark.parametrize("where", ["on_sequence", "on_batch"])
@pytest.mark.parametrize(
    "error", [DataError("x.jsonl", "line is cut", "Mend it", 7), ZeroDivisionError("oh")]
)
def test_an_exception_in_a_tasks_data_ends_it_only(
    store: BackboneStore, tmp_path: Path, where: str, error: Exception
) -> None:
    library = DrawnText()
    calls = 0

    def break_a(task_id: str, number: int) -> None:
        nonlocal calls
        calls += task_id == "a"
        if task_id == "a" and calls > 12:
            raise error

    setattr(library, where, break_a)
    bench = Bench(tmp_path, store, library)
    bench.run(make_plan([make_htask([A, B])]), A, B)
    assert "task 'a': its data cannot be used" in message(bench)
    assert ("x.jsonl:7: line is cut" in message(bench)) is isinstance(error, DataError)
    assert bench.done() == {"b"}
    assert worst_gap(bench.weights(B), alone(store, tmp_path, B)) == 0


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_pass_that_one_task_breaks_is_computed_again_without_it(
    store: BackboneStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """As when a task's own rows need more memory than there is."""
    from muxtune.runtime.adapters import stable_lora

    bench = Bench(tmp_path, store)
    bench.prepare(A, B, C)
    bench.executor.apply(make_plan([make_htask([A, B, C])]))
    bench.until_step(B, 3)
    name = {"forward": "_add_adapter", "backward": "_backward_span"}[phase]
    original = getattr(stable_lora, name)
    poisoned = bench.state(B).tensors["model.layers.1.self_attn.v_proj", "lora_A"]
    address = poisoned.param.data_ptr()

    def out_of_memory(*arguments: Any) -> Any:
        pools = [item for item in arguments if hasattr(item, "rows_of")]
        slot_rows = arguments[0].pool_rows if phase == "backward" else None
        rows = slot_rows or pools[0].rows_of(arguments[2][0])
        if pools[0].param_RW[rows].data_ptr() == address:
            raise torch.OutOfMemoryError("tried to allocate 3 TiB")
        return original(*arguments)

    monkeypatch.setattr(stable_lora, name, out_of_memory)
    bench.until_ended(A, B, C)
    assert "task 'b': OutOfMemoryError: tried to allocate 3 TiB" in message(bench)
    assert bench.done() == {"a", "c"}
    for task in (A, C):
        assert worst_gap(bench.weights(task), alone(store, tmp_path, task)) <= 1e-6


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"targets": ("q_prj",)}, "'q_prj' is no linear layer of tiny.*q_proj, k_proj"),
        ({"targets": ("lm_head",)}, "'lm_head' is no linear layer"),
        ({"rank": 0}, "adapter.rank"),
        ({"method": "prefixes"}, "adapter.method: 'prefixes' does not exist.*lora"),
        ({"schedule": "sometimes"}, "optimizer.schedule: 'sometimes'.*constant, linear, cosine"),
    ],
)
def test_what_cannot_be_trained_fails_when_it_is_prepared(
    store: BackboneStore, tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    bench = Bench(tmp_path, store)
    bench.prepare(make_task("bad", **changes))
    assert re.search(text, message(bench))


def test_an_unknown_model_fails_task_and_instance(store: BackboneStore, tmp_path: Path) -> None:
    bench = Bench(tmp_path, store)
    bench.prepare(make_task("lost")._replace(model="no-such-model"))
    assert "neither a folder, nor a GGUF file" in message(bench)
    bench.executor.start(InstanceSpec("i9", "no-such-model", "cpu", 1))
    (failed,) = bench.until(EventKind.INSTANCE_FAILED)
    assert failed.instance_id == "i9" and isinstance(failed.data, FailureData)


def test_more_than_one_gpu_an_instance_is_refused(store: BackboneStore, tmp_path: Path) -> None:
    bench = Bench(tmp_path, store)
    bench.executor.start(InstanceSpec("big", "tiny", "cpu", 1, (ReplicaShape(2, 1),)))
    (failed,) = bench.until(EventKind.INSTANCE_FAILED)
    assert "tp=1 and pp=1" in failed.data.message  # type: ignore[union-attr]


def test_results_that_cannot_be_written_end_the_run(store: BackboneStore, tmp_path: Path) -> None:
    bench = Bench(tmp_path / "out", store)
    bench.prepare(A)
    (tmp_path / "out").write_text("in the way")
    bench.executor.apply(make_plan([make_htask([A])]))
    with pytest.raises(OutputError, match="output_dir"):
        bench.until_ended(A)


# ------------------------------------------------------------------------------------ cancelling


def test_cancel_in_the_middle_of_a_round(store: BackboneStore, tmp_path: Path) -> None:
    bench = Bench(tmp_path, store)
    bench.prepare(A, B)
    bench.executor.apply(make_plan([make_htask([A, B], quota=1)]))
    bench.until_step(A, 2)
    while not any(span.name == "forward" for span in bench.recorder.spans[-3:]):
        bench.tick()
    bench.executor.cancel("a")
    bench.executor.cancel("a")
    (event,) = bench.until(EventKind.TASK_CANCELLED)
    assert event.data == 2 and event.instance_id == INSTANCE
    bench.until_ended(B)
    assert len(bench.recorder.losses("a")) == 2
    assert worst_gap(bench.weights(B), alone(store, tmp_path, B)) == 0
    bench.executor.cancel("b")
    assert bench.executor.tasks["b"].phase is Phase.DONE


def test_cancel_before_the_data_is_read(store: BackboneStore, tmp_path: Path) -> None:
    bench = Bench(tmp_path, store)
    bench.executor.prepare(A)
    bench.executor.cancel("a")
    assert [event.kind for event in bench.step()] == [EventKind.TASK_CANCELLED]
    assert bench.executor.wait(2**62) == []


def test_cancel_of_a_waiting_task(store: BackboneStore, tmp_path: Path) -> None:
    bench = Bench(tmp_path, store)
    bench.prepare(A)
    bench.executor.cancel("a")
    (event,) = bench.until(EventKind.TASK_CANCELLED)
    assert (event.data, event.instance_id) == (0, "")


# ------------------------------------------------------------------------------------- instances


def test_several_instances_take_turns_by_round(store: BackboneStore, tmp_path: Path) -> None:
    bench = Bench(tmp_path, store, instances=("i0", "i1", "i2"))
    tasks = {"i0": A, "i1": B, "i2": C}
    bench.prepare(A, B, C)
    for name, task in tasks.items():
        bench.executor.apply(make_plan([make_htask([task], quota=1)], instance_id=name))
    bench.until_ended(A, B, C)
    order = [record.instance_id for record in bench.recorder.rounds]
    assert order == ["i0", "i1", "i2"] * 6
    for task in (A, B, C):
        folder = tmp_path / task.task_id
        single = Bench(folder, store)
        single.run(make_plan([make_htask([task], quota=1)]), task)
        assert worst_gap(bench.weights(task), single.weights(task)) == 0
    backbone = store.get("tiny")
    extra = bench.executor.accounted_peak_bytes() - bench.executor.memory.peak_bytes()
    assert abs(extra - 2 * backbone.weight_bytes) < 50_000_000
    assert backbone.weight_bytes > 100_000


def test_a_stopped_instances_tasks_go_on_elsewhere(store: BackboneStore, tmp_path: Path) -> None:
    bench = Bench(tmp_path, store, instances=("i0", "i1"))
    bench.prepare(A)
    bench.executor.apply(make_plan([make_htask([A])], instance_id="i0"))
    bench.until_step(A, 3)
    while bench.executor.tasks["a"].cursor.step < 3:
        bench.tick()
    bench.executor.stop("i0")
    bench.until(EventKind.INSTANCE_STOPPED)
    bench.executor.apply(make_plan([make_htask([A])], instance_id="i1"))
    bench.until_ended(A)
    assert worst_gap(bench.weights(A), alone(store, tmp_path, A)) == 0
    with pytest.raises(ConfigError, match="'i0' is not running"):
        bench.executor.apply(make_plan([], instance_id="i0"))


def test_commands_may_come_twice(store: BackboneStore, tmp_path: Path) -> None:
    """As after a crash: answers come again, work is not done again."""
    bench = Bench(tmp_path, store)
    bench.run(make_plan([make_htask([A])]), A)
    steps = len(bench.recorder.steps)
    bench.executor.start(InstanceSpec(INSTANCE, "tiny", "cpu", 10**12))
    bench.until(EventKind.INSTANCE_READY, 2)
    bench.prepare(A)
    bench.executor.apply(make_plan([make_htask([A])], 1))
    first, again = bench.until(EventKind.TASK_DONE, 2)
    assert first.data == again.data and again.epoch == 1
    assert len(bench.recorder.steps) == steps


# ------------------------------------------------------------------------------------------ time


class ManualClock:
    def __init__(self) -> None:
        self.now_ns = 5 * NS

    def __call__(self) -> int:
        return self.now_ns


def timed_executor(
    store: BackboneStore, folder: Path, **options: Any
) -> tuple[TorchExecutor, ManualClock, Recorder]:
    clock, recorder = ManualClock(), Recorder()
    settings = TorchOptions(folder, evaluate_tokens=0, **options)
    executor = TorchExecutor(StepBuilder(), store, DrawnText(), settings, [recorder], clock)
    return executor, clock, recorder


def test_nothing_starts_at_until_and_an_open_round_goes_on(
    store: BackboneStore, tmp_path: Path
) -> None:
    executor, clock, recorder = timed_executor(store, tmp_path)
    assert executor.now_ns == 0
    executor.start(InstanceSpec(INSTANCE, "tiny", "cpu", 10**12))
    assert executor.wait(0) == []
    executor.prepare(A)
    executor.prepare(B)
    told = [(event.kind, event.task_id) for event in executor.wait(1)]
    # Together, so that one plan can be made for all.
    ready = [(EventKind.TASK_READY, task.task_id) for task in (A, B)]
    assert sorted(told) == sorted([(EventKind.INSTANCE_READY, ""), *ready])
    executor.apply(make_plan([make_htask([A], quota=1)]))
    assert [event.kind for event in executor.wait(1)] == [EventKind.PLAN_APPLIED]

    class Tick(Recorder):
        """Every forward pass takes a second."""

        def on_span(self, record: Any) -> None:
            if record.name == "forward":
                clock.now_ns += NS

    executor.listeners = (*executor.listeners, Tick())
    assert executor.wait(int(1.5 * NS)) == []
    forwards = [span for span in recorder.spans if span.name == "forward"]
    assert len(forwards) == 2 and executor.now_ns == 2 * NS  # late by less than a micro-batch
    assert executor.wait(2 * NS) == []
    assert len([span for span in recorder.spans if span.name == "forward"]) == 2
    events = executor.wait(2**62)
    while events[0].kind is EventKind.PROGRESS and len(events) == 1:
        events = executor.wait(2**62)
    assert [event.kind for event in events] == [EventKind.PROGRESS, EventKind.TASK_DONE]
    assert events[0].time_ns == executor.now_ns
    rounds_ns = [record.duration_ns for record in recorder.rounds]
    assert sum(rounds_ns) == len([s for s in recorder.spans if s.name == "forward"]) * NS


def test_idle_time_can_be_skipped(store: BackboneStore, tmp_path: Path) -> None:
    executor, clock, _ = timed_executor(store, tmp_path, skip_idle=True)
    assert executor.wait(7 * NS) == []
    assert executor.now_ns == 7 * NS and clock.now_ns == 5 * NS


def test_idle_time_is_waited_for(store: BackboneStore, tmp_path: Path) -> None:
    settings = TorchOptions(tmp_path)
    executor = TorchExecutor(StepBuilder(), store, DrawnText(), settings)
    until_ns = executor.now_ns + NS // 20
    assert executor.wait(until_ns) == []
    assert executor.now_ns >= until_ns


def test_data_and_state_of_tasks_that_ended_are_given_up(
    store: BackboneStore, tmp_path: Path
) -> None:
    bench = Bench(tmp_path, store)
    bench.run(make_plan([make_htask([A, B])]), A, B)
    assert bench.library.discarded == []
    states = [task.state for task in bench.executor.tasks.values()]
    bench.executor.apply(make_plan([], 1))
    bench.until(EventKind.PLAN_APPLIED, 2)
    assert sorted(bench.library.discarded) == ["a", "b"]
    assert [state and (len(state.tensors), state.place) for state in states] == [(0, None)] * 2
