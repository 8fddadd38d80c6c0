"""Loss curves, gradients and adapters equal plain HF PEFT training of each task."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from muxtune.runtime.backbone import BackboneStore
from muxtune.runtime.bank import AdapterBank
from muxtune.types import TaskSpec
from tests.runtime.peft_reference import PeftRun, plain_copy
from tests.runtime.runtime_helpers import Bench, make_htask, make_plan, make_task, worst_gap

STEPS = 20
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tasks_of(dropout: float) -> list[TaskSpec]:
    """Ranks, targets, batch sizes, lengths, accumulation, schedules, clipping: all differ."""
    common = {"num_steps": STEPS, "dropout": dropout}
    return [
        make_task("plain", lr=3e-3, **common),
        make_task(
            "warm",
            **common,
            rank=8,
            targets=ALL,
            batch_size=2,
            accumulation=2,
            schedule="linear",
            warmup_steps=3,
            weight_decay=0.1,
            lr=5e-3,
            max_grad_norm=0.05,
        ),
        make_task(
            "wave",
            **common,
            rank=2,
            alpha=3.0,
            targets=("down_proj", "k_proj"),
            batch_size=1,
            accumulation=3,
            max_length_tokens=12,
            schedule="cosine",
            max_grad_norm=0.0,
            beta1=0.8,
            beta2=0.95,
            eps=1e-6,
        ),
    ]


def peft_run(store: BackboneStore, task: TaskSpec, with_masks: bool) -> PeftRun:
    backbone = store.get("tiny")
    state = AdapterBank(backbone, torch.float32).create(task, STEPS)
    start_a = {site: values["lora_A"] for site, values in state.parameters().items()}
    keys = {name: site.key for name, site in backbone.sites.items()}
    return PeftRun(plain_copy(backbone.model), task, start_a, keys if with_masks else None)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_twenty_steps_of_three_tasks_together_equal_peft_alone(
    store: BackboneStore, tmp_path: Path, dropout: float
) -> None:
    tasks = tasks_of(dropout)
    bench = Bench(tmp_path, store)
    bench.run(make_plan([make_htask(tasks, chunk_tokens=24)]), *tasks)
    for task in tasks:
        run = peft_run(store, task, dropout > 0)
        records = [item for item in bench.recorder.steps if item.task_id == task.task_id]
        assert len(records) == STEPS
        for step, record in enumerate(records):
            loss, norm = run.train_step(bench.library.step_sequences(task.task_id, step))
            assert record.loss == pytest.approx(loss, abs=1e-4), (task.task_id, step)
            assert record.grad_norm == pytest.approx(norm, rel=1e-3), (task.task_id, step)
        assert worst_gap(bench.weights(task), run.weights()) < 1e-3
        assert abs(records[-1].loss - records[0].loss) > 1e-2  # it did learn something


def test_first_gradients_equal_autograd_of_peft(store: BackboneStore, tmp_path: Path) -> None:
    """Before any optimizer: accumulated gradients of a half-done step, B away from zero."""
    task = make_task("one", targets=ALL, batch_size=4, num_steps=2, lr=0.0, max_grad_norm=0.0)
    bench = Bench(tmp_path, store)
    bench.prepare(task)
    bench.executor.apply(make_plan([make_htask([task], chunk_tokens=24, quota=8)]))
    while bench.executor.tasks["one"].state is None:
        bench.tick()
    generator = torch.Generator().manual_seed(0)
    for (_, name), values in bench.state(task).tensors.items():
        if name == "lora_B":
            values.param.copy_(torch.randn(values.param.shape, generator=generator) * 0.1)
    run = peft_run(store, task, False)
    for name, module in run.modules.items():
        b_ro = bench.state(task).tensors[name, "lora_B"].param
        module.lora_B["default"].weight.data.copy_(b_ro.T)
    bench.until_step(task, 1)
    record = bench.recorder.steps[0]
    loss, norm = run.train_step(bench.library.step_sequences("one", 0))
    assert record.loss == pytest.approx(loss, abs=1e-5)
    assert record.grad_norm == pytest.approx(norm, rel=1e-5)
    for name, module in run.modules.items():
        moment = run.optimizer.state[module.lora_A["default"].weight]["exp_avg"]
        mine = bench.state(task).tensors[name, "lora_A"].exp_avg
        torch.testing.assert_close(mine, moment, rtol=1e-4, atol=1e-7)
