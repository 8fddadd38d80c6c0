"""A task resumed from its checkpoint ends bit for bit where it would have ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from muxtune.errors import OutputError
from muxtune.runtime.backbone import BackboneStore
from muxtune.runtime.checkpoint import fingerprint
from muxtune.types import EventKind, ResultData
from tests.runtime.runtime_helpers import (
    Bench,
    make_htask,
    make_plan,
    make_store,
    make_task,
    worst_gap,
)

TASK = make_task(
    "kept", num_steps=9, dropout=0.1, accumulation=2, schedule="cosine", weight_decay=0.1
)
OTHER = make_task("other", num_steps=9, rank=2)


def plan():
    return make_plan([make_htask([TASK, OTHER])], counts=[1])


@pytest.mark.parametrize("killed_after", [1, 4, 8])
def test_resume_is_exact(store: BackboneStore, tmp_path: Path, killed_after: int) -> None:
    whole = Bench(tmp_path / "whole", store, evaluate_tokens=40)
    whole.run(plan(), TASK, OTHER)

    killed = Bench(tmp_path / "run", store, checkpoint_steps=3, evaluate_tokens=40)
    killed.prepare(TASK, OTHER)
    killed.executor.apply(plan())
    killed.until_step(TASK, killed_after)
    killed.executor.close()

    resumed = Bench(tmp_path / "run", store, checkpoint_steps=3, evaluate_tokens=40, resume=True)
    resumed.run(plan(), TASK, OTHER)
    first = min(record.step for record in resumed.recorder.steps if record.task_id == "kept")
    assert first == killed_after // 3 * 3 + 1
    for task in (TASK, OTHER):
        assert worst_gap(resumed.weights(task), whole.weights(task)) == 0
    mine, theirs = (
        {event.task_id: event.data for event in bench.of(EventKind.TASK_DONE)}
        for bench in (resumed, whole)
    )
    for task_id, result in mine.items():
        assert isinstance(result, ResultData) and isinstance(theirs[task_id], ResultData)
        assert result._replace(output_path="") == theirs[task_id]._replace(output_path="")  # type: ignore[union-attr]


@pytest.mark.parametrize("step", ["eager", "captured"])
def test_every_method_resumes_exactly(tmp_path: Path, step: str) -> None:
    """The moments and gradients of each method's tensors go into the checkpoint and out of it."""
    common: dict[str, Any] = {"num_steps": 7, "rank": 2}
    tasks = [
        make_task("lora", **common, dropout=0.1, options={"use_rslora": True}),
        make_task("dora", **common, method="dora", targets=("q_proj", "up_proj")),
        make_task("ia3", **common, method="ia3", targets=("k_proj", "v_proj", "down_proj")),
        make_task("houlsby", **common, method="bottleneck", targets=("o_proj", "down_proj"),
                  dropout=0.2),
        make_task("prefix", **common, method="prefix", targets=()),
        make_task("prompt", **common, method="prompt", targets=()),
    ]  # fmt: skip
    options: dict[str, Any] = {"checkpoint_steps": 2, "step": step}
    # Its own for captured steps: fusing the weights changes where they lie.
    store, every = make_store(), make_plan([make_htask(tasks)], counts=[1])
    whole = Bench(tmp_path / "whole", store, **options)
    whole.run(every, *tasks)

    killed = Bench(tmp_path / "run", store, **options)
    killed.prepare(*tasks)
    killed.executor.apply(every)
    for task in tasks:
        killed.until_step(task, 3)
    killed.executor.close()

    resumed = Bench(tmp_path / "run", store, **options, resume=True)
    resumed.run(every, *tasks)
    assert not resumed.recorder.notices
    for task in tasks:
        steps = [r.step for r in resumed.recorder.steps if r.task_id == task.task_id]
        assert steps and steps[0] in (3, 5, 7), task.task_id
        assert worst_gap(resumed.weights(task), whole.weights(task)) == 0, task.task_id


def test_a_finished_task_is_told_again_without_training(
    store: BackboneStore, tmp_path: Path
) -> None:
    one = make_plan([make_htask([OTHER])])
    first = Bench(tmp_path, store, checkpoint_steps=9)
    first.run(one, OTHER)
    first.executor.close()
    again = Bench(tmp_path, store, resume=True)
    again.run(one, OTHER)
    assert again.recorder.steps == [] and again.done() == {"other"}


def test_a_checkpoint_of_other_settings_is_refused(store: BackboneStore, tmp_path: Path) -> None:
    first = Bench(tmp_path, store, checkpoint_steps=3)
    first.run(make_plan([make_htask([OTHER])]), OTHER)
    first.executor.close()
    changed = OTHER._replace(optimizer=OTHER.optimizer._replace(lr=0.5))
    bench = Bench(tmp_path, store, resume=True)
    bench.run(make_plan([make_htask([changed])]), changed)
    (failed,) = bench.of(EventKind.TASK_FAILED)
    assert "task with other settings" in failed.data.message  # type: ignore[union-attr]


def test_a_broken_checkpoint_is_named(store: BackboneStore, tmp_path: Path) -> None:
    first = Bench(tmp_path, store, checkpoint_steps=3)
    first.run(make_plan([make_htask([OTHER])]), OTHER)
    first.executor.close()
    (tmp_path / "checkpoints" / "other" / "state.json").write_text("{")
    bench = Bench(tmp_path, store, resume=True)
    bench.run(make_plan([make_htask([OTHER])]), OTHER)
    (failed,) = bench.of(EventKind.TASK_FAILED)
    assert "checkpoints/other" in failed.data.message  # type: ignore[union-attr]
    assert "cannot be read" in failed.data.message  # type: ignore[union-attr]


def test_a_full_disk_keeps_the_last_checkpoint(
    store: BackboneStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, store, checkpoint_steps=3)
    bench.prepare(OTHER)
    bench.executor.apply(make_plan([make_htask([OTHER])]))
    bench.until_step(OTHER, 3)
    bench.executor.close()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "state.safetensors")

    monkeypatch.setattr("muxtune.runtime.checkpoint.save_file", full)
    with pytest.raises(OutputError, match="No space left"):
        bench.until_step(OTHER, 6)
        bench.executor.close()
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["other"]
    resumed = Bench(tmp_path, store, resume=True)
    resumed.run(make_plan([make_htask([OTHER])]), OTHER)
    assert resumed.recorder.steps[0].step == 4


def test_the_fingerprint_ignores_what_does_not_change_the_training() -> None:
    same = [
        TASK._replace(arrival_ns=5, priority=3, tenant="else"),
        TASK._replace(data=TASK.data._replace(path="elsewhere.txt")),
    ]
    other = [
        TASK._replace(seed=1),
        TASK._replace(num_steps=10),
        TASK._replace(adapter=TASK.adapter._replace(rank=2)),
    ]
    mine = fingerprint(TASK, "hash")
    assert all(fingerprint(task, "hash") == mine for task in same)
    assert all(fingerprint(task, "hash") != mine for task in other)
    assert fingerprint(TASK, "other data") != mine
