"""A whole training step with windows of ranks, against the same step without."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from muxtune.runtime.static_step import (
    AdapterPools,
    CapturedSteps,
    SlotInput,
    SlotSpec,
    StaticModel,
    StepLayout,
    StepProgram,
)
from muxtune.runtime.static_step.adapters import LoraState
from muxtune.runtime.static_step.inputs import StepInputs

path = Path(__file__).parents[1] / "runtime" / "static_step_reference.py"
spec = importlib.util.spec_from_file_location("static_step_reference", path)
assert spec is not None and spec.loader is not None
ref = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ref)

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs in test_interpreter.py's subprocess"
)
SLOTS = (SlotSpec(4), SlotSpec(16), SlotSpec(3, ("q_proj", "down_proj")), SlotSpec(8))


def state_of(pools: AdapterPools, slot: int, seed: int) -> dict[str, LoraState]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LoraState(
            tuple(torch.randn(v.shape, generator=generator) * 0.05 for v in a[:1]),
            tuple(torch.randn(v.shape, generator=generator) * 0.05 for v in b[:1]),
        )
        for name, a, b in pools.views(slot)
    }


def steps_of(model, windows: bool, slots=SLOTS, dropout: bool = False) -> CapturedSteps:
    static = StaticModel.of(model, 64)
    pools = AdapterPools(static, slots, deterministic=False)
    for slot in range(len(slots)):
        pools.load(slot, state_of(pools, slot, slot), 0)
    inputs = StepInputs(StepLayout(48, len(slots), 24, 64, dropout), static.device)
    return CapturedSteps(StepProgram(static, pools, inputs, windows=windows), [48])


def without_windows(steps: CapturedSteps) -> list[bool]:
    """Of the first layer's linears."""
    windows = steps.program._windows
    assert windows is not None
    return [linear is None for linear in windows._linears[0]]


def slot_inputs(part: int) -> dict[int, SlotInput]:
    """Of the first or the second of two micro-batches of a step, or of the step after it. eps: else
    a gradient of rounding errors alone would decide which way a number goes."""
    return {
        slot: SlotInput(50, keeps=part == 1, closes=part > 0, scale=1.0 + slot, lr=0.01, eps=1e-4)
        for slot in (0, 1, 2)
    }


@interpreted
def test_a_step_with_windows_is_the_step_without() -> None:
    """Mixed ranks and targets, an idle slot, gradients over two micro-batches of which one task has
    rows in the first only, and a task that leaves between two steps for another."""
    model = ref.tiny_llama(256, 4, 1, intermediate=256)
    both = [steps_of(model, windows) for windows in (False, True)]
    assert without_windows(both[1]) == [False] * 4
    rng = np.random.default_rng(0)
    for part, present in enumerate(((0, 1, 2), (0, 1), (0, 2, 1))):
        batch = ref.random_batch(rng, {slot: [int(rng.integers(5, 16))] for slot in present})
        results = [s.step(batch, slot_inputs(part)).result() for s in both]
        for name in ("losses", "grad_norms"):
            one, other = (getattr(result, name) for result in results)
            assert other == pytest.approx(one, rel=2e-5, abs=1e-7)
        for pools in [steps.program.pools for steps in both if part == 1]:
            pools.load(1, state_of(pools, 1, 7), 0)  # another task
    for one, other in zip(*(s.program.pools.optimizer_pools for s in both), strict=True):
        error = (one.param_RD - other.param_RD).norm() / one.param_RD.norm()
        assert float(error) < 1e-5


@interpreted
def test_what_windows_do_not_fit_is_as_without() -> None:
    """Dropout; features that are no multiples; ranks that do not fit beside them."""
    wide, narrow = ref.tiny_llama(256, 4, 1, intermediate=256), ref.tiny_llama(64, 2, 1)
    assert steps_of(wide, True, dropout=True).program._windows is None
    assert without_windows(steps_of(narrow, True)) == [True, False, True, True]
    many = steps_of(wide, True, (SlotSpec(60), SlotSpec(60)))
    assert without_windows(many) == [True, False, False, False]


def test_deterministic_steps_have_no_windows() -> None:
    static = StaticModel.of(ref.tiny_llama(), 64)
    pools = AdapterPools(static, SLOTS, deterministic=True)
    inputs = StepInputs(StepLayout(64, len(SLOTS), 24, 64), static.device)
    with pytest.raises(ValueError, match="neighbours"):
        StepProgram(static, pools, inputs, deterministic=True, windows=True)


def test_factors_of_layers_lie_side_by_side() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from muxtune.runtime.static_step.windows import _Columns

    columns, weight = _Columns(), torch.zeros(32, 256)
    taken = [columns.take(weight, count, 64) for count in (100, 3, 90)]
    first, second, third = (t.data_ptr() for t in taken)
    assert second - first == 104 * 4  # the next that the copy engine can start at
    assert taken[2].untyped_storage().data_ptr() != taken[0].untyped_storage().data_ptr()
    assert third % 16 == 0 and all(t.stride() == weight.stride() for t in taken)
