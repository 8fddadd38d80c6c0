"""The number of operations of a whole pass, forward and backward, does not grow with the tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from muxtune.runtime import training
from muxtune.runtime.adapters import METHODS, bottleneck, low_rank
from muxtune.runtime.backbone import BackboneStore
from muxtune.runtime.bank import AdapterBank, SlotPool
from muxtune.runtime.batch import DropoutSeed, Placed, assemble
from muxtune.runtime.static_step import StepProgram, extras, program
from muxtune.types import TaskSpec
from muxtune.workload.encoding import EncodedSequence
from muxtune.workload.methods import WITHOUT_TARGETS
from tests.runtime.runtime_helpers import Bench, make_htask, make_plan, make_store, make_task

TOKENS = 8


class CountOps(TorchDispatchMode):
    """Counts what would launch something: no views, and nothing while it is paused."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.is_paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.is_paused and not func.is_view:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def paused(self, name: str) -> Iterator[None]:
        if not self.is_paused:
            self.counts[name] += 1
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before


def as_one_kernel(kernel: Callable[..., Tensor], counter: CountOps) -> Callable[..., Tensor]:
    """Counts once forward and once backward: on CUDA the kernel's launches are fixed
    (tests/kernels counts them), here a reference loops over the slots."""
    name = kernel.__name__

    class Whole(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Tensor:
            with counter.paused(name), torch.enable_grad():
                leaves = [
                    part.detach().requires_grad_(part.requires_grad)
                    if isinstance(part, Tensor)
                    else part
                    for part in args
                ]
                ctx.out, ctx.leaves = kernel(*leaves), leaves
                return ctx.out.detach()

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor):
            wanted = [p for p in ctx.leaves if isinstance(p, Tensor) and p.requires_grad]
            with counter.paused(f"{name} backward"):
                found = torch.autograd.grad(ctx.out, wanted, grad_outputs[0], allow_unused=True)
            grads = {id(leaf): grad for leaf, grad in zip(wanted, found, strict=True)}
            return tuple(grads.get(id(part)) for part in ctx.leaves)

    return lambda *args: Whole.apply(*args)


def tasks_of(count: int, dropout: float) -> list[TaskSpec]:
    """``count`` tasks of each method; all linears, or all attentions, hold all methods."""
    droppable = {"lora", "dora", "bottleneck"}
    return [
        make_task(
            f"{method}{number}",
            method=method,
            targets=() if method in WITHOUT_TARGETS else ("q_proj", "v_proj", "down_proj"),
            dropout=dropout if method in droppable else 0.0,
        )
        for number in range(count)
        for method in sorted(METHODS)
    ]


def count_ops(
    store: BackboneStore, monkeypatch: pytest.MonkeyPatch, count: int, dropout: float
) -> Counter[str]:
    backbone, tasks = store.get("tiny"), tasks_of(count, dropout)
    bank = AdapterBank(backbone, torch.float32)
    (pool,) = bank.arrange([make_htask(tasks)], {t.task_id: bank.create(t, 1) for t in tasks})
    assert isinstance(pool, SlotPool)
    sequence = EncodedSequence(np.arange(1, TOKENS + 1), np.ones(TOKENS, dtype=bool))
    placed = [Placed(slot, slot * TOKENS, 0, sequence) for slot in range(len(tasks))]
    tensors = assemble(
        placed,
        [(item.row, TOKENS) for item in placed],
        [(item.slot, item.row, item.row + TOKENS) for item in placed],
        torch.ones(len(tasks)),
        {s: DropoutSeed(s, 0, task.adapter.dropout) for s, task in enumerate(tasks)},
        TOKENS * len(tasks),
        0,
        "cpu",
        pool.virtual,
    )
    counter = CountOps()
    with monkeypatch.context() as patch:
        for module, name in (
            (low_rank, "multi_lora_linear"),
            (bottleneck, "multi_task_bottleneck"),
            (training, "multi_task_cross_entropy"),
        ):
            patch.setattr(module, name, as_one_kernel(getattr(module, name), counter))
        training.train_pass(
            backbone, pool, tensors, deterministic=False
        )  # fills what is kept by shape
        for site in pool.sites.values():
            for parameters in site.parameters.values():
                parameters.grad_RW.zero_()
                parameters.param_RW.add_(0.01)  # some start at zero, and so would gradients
        counter.counts.clear()
        with counter:
            training.train_pass(backbone, pool, tensors, deterministic=False)
    for site in pool.sites.values():
        for name, parameters in site.parameters.items():
            # Nothing was counted that did nothing: IA3 has one of its two vectors at a site.
            assert parameters.grad_RW.any() or not any(parameters.owned), name
    return counter.counts


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_two_and_eight_tasks_of_every_method_take_the_same_operations(
    store: BackboneStore, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    few, many = (count_ops(store, monkeypatch, count, dropout) for count in (2, 8))
    assert few == many
    # Forward and backward of the low-rank product at the three targets of two layers.
    assert few["multi_lora_linear"] == few["multi_lora_linear backward"] == 6
    assert few["multi_task_bottleneck"] == few["multi_task_bottleneck backward"] == 6


STATIC_KERNELS = (
    (program, "lora_linear_forward"),
    (program, "lora_linear_input_grad"),
    (program, "lora_linear_factor_grad"),
    (program, "multi_task_cross_entropy_grad"),
    (program, "multi_task_adamw_"),
    (program, "attention_with_shared"),
    (program, "attention_with_shared_backward"),
    (extras, "bottleneck_forward"),
    (extras, "bottleneck_backward"),
    (extras, "scale_slot_rows_"),
    (extras, "scale_slot_rows_backward_"),
)


def count_static_ops(monkeypatch: pytest.MonkeyPatch, folder: Path, count: int) -> Counter[str]:
    """Of one whole captured step, optimizer included, as the executor runs it."""
    tasks = [task._replace(num_steps=1) for task in tasks_of(count, dropout=0.0)]
    counter, run = CountOps(), StepProgram.run

    def counted(self: StepProgram, *arguments: Any) -> Any:
        counter.counts.clear()
        with counter:
            return run(self, *arguments)

    with monkeypatch.context() as patch:
        for module, name in STATIC_KERNELS:
            patch.setattr(module, name, paused_kernel(getattr(module, name), counter))
        patch.setattr(StepProgram, "run", counted)
        bench = Bench(folder, make_store(), step="captured")
        bench.run(make_plan([make_htask(tasks)]), *tasks)
    assert len(bench.done()) == len(tasks) and not bench.recorder.notices
    return counter.counts


def paused_kernel(kernel: Callable[..., Any], counter: CountOps) -> Callable[..., Any]:
    def whole(*args: Any, **kwargs: Any) -> Any:
        with counter.paused(kernel.__name__):
            return kernel(*args, **kwargs)

    return whole


def test_captured_steps_of_two_and_four_tasks_of_every_method_take_the_same_operations(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    few, many = (count_static_ops(monkeypatch, tmp_path / str(count), count) for count in (2, 4))
    assert few == many
    assert few["lora_linear_forward"] == 4 * 2 and few["multi_task_adamw_"] == 1  # by layer; once
    assert few["bottleneck_forward"] == few["bottleneck_backward"] == 6
