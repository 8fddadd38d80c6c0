"""Captured steps with windows of ranks beside the same with fused products, on a GPU."""

from __future__ import annotations

from typing import Any

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
from tests.gpu.test_many_slots import batch_of, gradients, static  # noqa: F401  (a fixture)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NUM_ROWS = 1024


def steps_of(model: StaticModel, ranks: tuple[int, ...], windows: bool) -> CapturedSteps:
    pools = AdapterPools(model, tuple(map(SlotSpec, ranks)), False)
    generator = torch.Generator(device="cuda").manual_seed(1)
    for slot in range(len(ranks)):
        states = {}
        for name, a, b in pools.views(slot):
            a_rD, b_rO = (
                torch.randn(x[0].shape, device="cuda", generator=generator) * 0.05 for x in (a, b)
            )
            states[name] = LoraState((a_rD,), (b_rO,))
        pools.load(slot, states, 0)
    inputs = StepInputs(StepLayout(NUM_ROWS, len(ranks), NUM_ROWS // 8, 512), model.device)
    return CapturedSteps(StepProgram(model, pools, inputs, windows=windows), [NUM_ROWS])


@pytest.mark.parametrize("ranks", [(16,) * 8, (3, 64, 16, 5, 8), (12,)])
def test_a_captured_step_with_windows(static: Any, ranks: tuple[int, ...]) -> None:  # noqa: F811
    """Replays are the same bit for bit; gradients lie as near to those of fused products as bf16
    lets two forms be."""
    batch = batch_of(len(ranks), NUM_ROWS - 40)
    found = []
    for windows in (False, True):
        steps = steps_of(static, ranks, windows)
        assert (steps.program._windows is not None) == windows
        steps.program.optimizes = False
        slots = {slot: SlotInput(300, lr=1e-3) for slot in range(len(ranks))}
        kept = []
        for _ in range(3):
            losses = steps.step(batch, slots).result().losses
            torch.cuda.synchronize()
            kept.append((losses, gradients(steps.program)))
        assert all(losses == kept[0][0] for losses, _ in kept)
        for _, grads in kept[1:]:
            assert all(map(torch.equal, grads, kept[0][1]))
        found.append(kept[0])
    (fused_losses, fused), (losses, grads) = found
    assert losses == pytest.approx(fused_losses, rel=5e-3)
    for one, other in zip(fused, grads, strict=True):
        assert float((one - other).norm() / one.norm()) < 3e-2
