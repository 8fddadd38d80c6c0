"""The static step on the CPU: float32, against autograd, clipping and torch.optim.AdamW."""

import importlib.util
import sys
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
    Unsupported,
)
from muxtune.runtime.static_step.inputs import HostBuffer, Sequence, StepInputs

spec = importlib.util.spec_from_file_location(
    "static_step_reference", Path(__file__).with_name("static_step_reference.py")
)
assert spec is not None
assert spec.loader is not None
ref = sys.modules.setdefault("static_step_reference", importlib.util.module_from_spec(spec))
spec.loader.exec_module(ref)

SLOTS = (
    SlotSpec(4),
    SlotSpec(3, ("q_proj", "v_proj")),
    SlotSpec(2, ("o_proj", "down_proj", "gate_proj")),
)


def steps_of(model, slots=SLOTS, rows=(96, 128), dropout=False) -> CapturedSteps:
    static = StaticModel.of(model, 64)
    pools = AdapterPools(static, slots, deterministic=True)
    layout = StepLayout(max(rows), len(slots), 24, 40, dropout)
    inputs = StepInputs(layout, static.device)
    return CapturedSteps(StepProgram(static, pools, inputs, deterministic=True), rows)


def test_two_steps_with_accumulation_equal_autograd_and_torch_adamw() -> None:
    model = ref.tiny_llama()
    steps = steps_of(model)
    reference = ref.Reference(model, SLOTS, seed=1)
    reference.fill(steps.program.pools)
    optimizers = {
        s: torch.optim.AdamW(reference.parameters(s), lr=0.01 * (s + 1), weight_decay=0.1)
        for s in range(3)
    }
    rng = np.random.default_rng(0)
    for step in range(2):
        batches = [
            ref.random_batch(rng, {0: [5, 17], 1: [9], 2: [30, 2]}),
            ref.random_batch(rng, {0: [11], 2: [21]}),
        ]
        everything = [item for batch in batches for item in batch]
        for part, batch in enumerate(batches):
            slots = {
                slot: SlotInput(
                    ref.target_tokens(everything, slot), keeps=part > 0, closes=part == 1,
                    scale=1.0 + slot, lr=0.01 * (slot + 1), weight_decay=0.1, max_grad_norm=0.5,
                )
                for slot in range(3)
            }  # fmt: skip
            result = steps.step(batch, slots).result()
            losses = reference.backward(batch, slots)
            assert result.losses == pytest.approx([losses[s] for s in range(3)], rel=1e-5)
        for slot, optimizer in optimizers.items():
            norm = torch.nn.utils.clip_grad_norm_(reference.parameters(slot), 0.5)
            assert result.grad_norms[slot] == pytest.approx(float(norm), rel=1e-4)
            optimizer.step()
            optimizer.zero_grad()
        assert step + 1 == int(steps.program.pools.settings.step_S[1])
    for slot in range(3):
        saved = steps.program.pools.save(slot, SLOTS[slot].rank)
        assert set(saved) == set(reference.factors[slot])
        for name, (a, b) in reference.factors[slot].items():
            torch.testing.assert_close(saved[name].a[0], a.detach(), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(saved[name].b[0], b.detach(), rtol=1e-3, atol=1e-4)


def test_a_task_cannot_tell_that_it_has_neighbours() -> None:
    states = []
    for neighbours in (False, True):
        model = ref.tiny_llama()
        steps = steps_of(model)
        ref.Reference(model, SLOTS, seed=1).fill(steps.program.pools)
        rng = np.random.default_rng(3)
        for _ in range(3):
            batch = ref.random_batch(rng, {0: [5, 17], 1: [9, 13], 2: [30]})
            own = [item for item in batch if neighbours or item.slot == 1]
            slots = {s: SlotInput(20, lr=0.01) for s in {item.slot for item in own}}
            steps.step(own, slots, first_rows={1: 30, 2: 60}).result()
        states.append(steps.program.pools.save(1, 3))
    for name, alone in states[0].items():
        for x, y in zip(
            (*alone.a, *alone.b), (*states[1][name].a, *states[1][name].b), strict=True
        ):
            assert torch.equal(x, y)


def test_a_nan_stays_with_its_task() -> None:
    model = ref.tiny_llama()
    steps = steps_of(model)
    ref.Reference(model, SLOTS, seed=1).fill(steps.program.pools)
    before = steps.program.pools.save(0, 4)
    steps.program.pools.layers[0][0].b[0][0, 0] = float("nan")  # slot 0
    batch = ref.random_batch(np.random.default_rng(3), {0: [5, 17], 1: [9, 13], 2: [30]})
    result = steps.step(batch, {s: SlotInput(20) for s in range(3)}).result()
    assert result.skipped == [True, False, False]
    assert np.isfinite(result.losses[1:]).all()
    after = steps.program.pools.save(0, 4)
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(before[name].a[0], after[name].a[0])
    for slot in (1, 2):
        for state in steps.program.pools.save(slot, 2).values():
            assert all(tensor.isfinite().all() for tensor in (*state.a, *state.b))


def test_dropout_depends_on_the_token_and_not_on_its_row() -> None:
    losses = []
    for first_row in (0, 7):
        model = ref.tiny_llama()
        steps = steps_of(model, dropout=True)
        ref.Reference(model, SLOTS, seed=1).fill(steps.program.pools)
        batch = ref.random_batch(np.random.default_rng(3), {0: [5, 17]})
        slots = {0: SlotInput(20, dropout=0.5, seed=5, step=2, scale=2.0)}
        losses.append(steps.step(batch, slots, first_rows={0: first_row}).result().losses[0])
        slots = {0: slots[0]._replace(dropout=0.0)}
        assert steps.step(batch, slots).result().losses[0] != losses[-1]
    assert losses[0] == losses[1]


def test_too_many_rows_and_unknown_architectures_are_refused() -> None:
    model = ref.tiny_llama()
    steps = steps_of(model)
    batch = ref.random_batch(np.random.default_rng(3), {0: [40, 40, 40, 40]})
    with pytest.raises(ValueError, match="the largest size holds 128"):
        steps.step(batch, {0: SlotInput(20)})
    model.config.model_type = "opt"
    with pytest.raises(Unsupported, match="opt"):
        StaticModel.of(model, 64)


@pytest.mark.parametrize("recompute", [1, 2, 9])
def test_recomputed_blocks_give_the_same_bits_and_keep_less(
    recompute: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, kept = [], []
    for blocks in (0, recompute):
        model = ref.tiny_llama()
        made = steps_of(model, dropout=True)
        ref.Reference(model, SLOTS, seed=1).fill(made.program.pools)
        steps = CapturedSteps(made.program, [128], recompute={128: blocks})
        backward = steps.program._backward

        def spy(num_rows, rows, hidden, saved, dnormed, backward=backward):
            kept.append([isinstance(item, torch.Tensor) for item in saved])
            backward(num_rows, rows, hidden, saved, dnormed)

        monkeypatch.setattr(steps.program, "_backward", spy)
        batch = ref.random_batch(np.random.default_rng(3), {0: [5, 17], 1: [9, 13], 2: [30]})
        slots = {s: SlotInput(20, closes=False, dropout=0.2, seed=s) for s in range(3)}
        losses = steps.step(batch, slots).result().losses
        pools = [pool for layer in made.program.pools.layers for pool in layer]
        results.append((losses, [g.clone() for p in pools for g in (p.a[1], p.b[1])]))
    assert kept == [[False, False], [recompute > 0, recompute > 1]]
    assert results[0][0] == results[1][0]
    assert any(grad.any() for grad in results[0][1])
    for left, right in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(left, right)


def test_filler_lies_in_sequences_of_one_tile_where_there_is_room_for_their_bounds() -> None:
    for max_bounds, longest in ((24, 64), (3, 512)):
        host = HostBuffer(StepLayout(600, 1, max_bounds, 512), False)
        tokens_n = np.ones(25, dtype=np.int64)
        host.fill(600, [Sequence(0, tokens_n, tokens_n > 0)], {0: SlotInput(24)})
        bounds_N = host.arrays["cu_seqlens"]
        lengths = np.diff(bounds_N[: max_bounds + 1])
        assert bounds_N[-1] == 600 and lengths[0] == 25 and lengths[1:].max() == longest
        positions_T = host.arrays["positions"]
        assert (positions_T[bounds_N[1:3]] == 0).all() and positions_T.max() == longest - 1
