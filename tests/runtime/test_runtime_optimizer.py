"""Schedules, clipping and AdamW of several tasks at once, each against torch and transformers."""

from __future__ import annotations

import pytest
import torch

from muxtune.errors import ConfigError
from muxtune.runtime.backbone import BackboneStore
from muxtune.runtime.bank import AdapterBank, SlotPool
from muxtune.runtime.optimizer import close_steps, learning_rate
from muxtune.types import OptimizerSpec
from tests.runtime.runtime_helpers import make_htask, make_task


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 4, 30])
def test_rates_are_those_of_transformers(schedule: str, warmup: int) -> None:
    from transformers import get_scheduler

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, warmup, 20)
    spec = OptimizerSpec(lr=0.3, schedule=schedule, warmup_steps=warmup)
    for step in range(20):
        assert learning_rate(spec, step, 20) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_an_unknown_schedule_lists_those_that_exist() -> None:
    with pytest.raises(ConfigError, match="constant, linear, cosine"):
        learning_rate(OptimizerSpec(schedule="stairs"), 1, 2)


def test_tasks_of_a_pool_step_each_by_its_own_settings(store: BackboneStore) -> None:
    tasks = [
        make_task("x", rank=4, lr=1e-2, max_grad_norm=0.5, weight_decay=0.2),
        make_task("y", rank=2, lr=3e-2, max_grad_norm=0.0, beta1=0.7, targets=("down_proj",)),
        make_task("z", rank=1, lr=5e-2),
    ]
    bank = AdapterBank(store.get("tiny"), torch.float64)
    states = {task.task_id: bank.create(task, 10) for task in tasks}
    (pool,) = bank.arrange([make_htask(tasks)], states)
    assert isinstance(pool, SlotPool)
    mine: dict[str, list[torch.nn.Parameter]] = {}
    optimizers = {}
    for task in tasks:
        values = states[task.task_id].tensors.values()
        mine[task.task_id] = [torch.nn.Parameter(item.param.clone()) for item in values]
        spec = task.optimizer
        optimizers[task.task_id] = torch.optim.AdamW(
            mine[task.task_id],
            lr=spec.lr,
            betas=(spec.beta1, spec.beta2),
            weight_decay=spec.weight_decay,
        )
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        closing = [slot for slot in range(3) if slot != 2 or step % 2]
        for slot, task in enumerate(tasks):
            state = states[task.task_id]
            for parameter, values in zip(mine[task.task_id], state.tensors.values(), strict=True):
                grad = torch.randn(parameter.shape, generator=generator)
                values.grad.add_(grad)
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad
            if slot in closing:
                limit = task.optimizer.max_grad_norm or float("inf")
                norm = torch.nn.utils.clip_grad_norm_(mine[task.task_id], limit)
                optimizers[task.task_id].step()
                optimizers[task.task_id].zero_grad()
        outcomes = close_steps(pool, closing)
        assert list(outcomes) == closing
        assert outcomes[closing[-1]].grad_norm == pytest.approx(norm.item(), rel=1e-5)
        for task in tasks:
            state = states[task.task_id]
            for parameter, values in zip(mine[task.task_id], state.tensors.values(), strict=True):
                torch.testing.assert_close(values.param, parameter.data, rtol=1e-5, atol=1e-7)
    assert [states[task.task_id].step for task in tasks] == [6, 6, 3]


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_cleared(
    store: BackboneStore,
) -> None:
    tasks = [make_task("x"), make_task("y")]
    bank = AdapterBank(store.get("tiny"), torch.float64)
    states = {task.task_id: bank.create(task, 10) for task in tasks}
    (pool,) = bank.arrange([make_htask(tasks)], states)
    assert isinstance(pool, SlotPool)
    for values in [*states["x"].tensors.values(), *states["y"].tensors.values()]:
        values.grad.fill_(1.0)
    key, first = next(iter(states["x"].tensors.items()))
    first.grad[0, 0] = float("nan")
    before = first.param.clone()
    outcomes = close_steps(pool, [0, 1])
    assert not outcomes[0].finite and outcomes[1].finite
    assert (states["x"].step, states["y"].step) == (0, 1)
    assert torch.equal(states["x"].tensors[key].param, before)
    assert not states["x"].tensors[key].grad.any()
