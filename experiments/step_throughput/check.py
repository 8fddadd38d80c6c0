"""Is the step right? Two blocks of the measured shape in bf16 against float32 autograd, beside
plain bf16 autograd of the same model; and a task alone against the same task among neighbours,
bit for bit, in deterministic mode."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalIterable=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from muxtune.runtime.static_step import (
    AdapterPools,
    CapturedSteps,
    Sequence,
    SlotInput,
    SlotSpec,
    StaticModel,
    StepLayout,
    StepProgram,
)
from muxtune.runtime.static_step.adapters import LoraState
from muxtune.runtime.static_step.inputs import StepInputs

LLAMA_2_7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_attention_heads": 32, "num_key_value_heads": 32,
}  # fmt: skip
# Norm-relative errors against float32 may not exceed those of plain bf16 autograd by more.
ALLOWED_OVER_PLAIN = 1.2
LENGTHS = {0: [31, 64], 1: [200, 7, 90], 2: [130], 3: [12, 12, 12, 9]}
RANKS = (16, 8, 16, 4)
NUM_ROWS = 768


def run(shape: dict[str, int]) -> dict[str, Any]:
    """Every figure, and whether all hold. Raises nothing: the caller reads ``passed``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**shape, "num_hidden_layers": 2}, tie_word_embeddings=False)
    torch.manual_seed(0)
    with torch.device("cuda"):
        exact = LlamaForCausalLM(config).requires_grad_(False).eval()
    rounded = {k: v.bfloat16() for k, v in exact.state_dict().items()}
    exact.load_state_dict({k: v.float() for k, v in rounded.items()})
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).requires_grad_(False).eval().bfloat16()
    model.load_state_dict(rounded)
    static = StaticModel.of(model, 512)
    batch = _batch(shape["vocab_size"])
    out: dict[str, Any] = {}
    steps = _steps(static, deterministic=False)
    out.update(_against_autograd(exact, model, steps, batch))
    out["isolation_bit_identical"] = _isolation(static, batch, moved=False)
    out["isolation_at_other_rows_bit_identical"] = _isolation(static, batch, moved=True)
    out["replays_bit_identical"] = _repeatable(static, batch)
    out["passed"] = bool(
        all(
            out[f"{kind}_error"] <= ALLOWED_OVER_PLAIN * out[f"plain_bf16_{kind}_error"]
            for kind in ("grad_a", "grad_b")
        )
        and out["loss_error"] < 1e-2
        and out["isolation_bit_identical"]
        and out["replays_bit_identical"]
    )
    return out


def _batch(vocab: int) -> list[Sequence]:
    random = np.random.default_rng(0)
    return [
        Sequence(slot, random.integers(0, vocab, n), np.ones(n, bool), position)
        for slot, lengths in LENGTHS.items()
        for position, n in enumerate(lengths)
    ]


def _slots(closes: bool = True, keeps: bool = False) -> dict[int, SlotInput]:
    return {
        slot: SlotInput(
            sum(lengths) - len(lengths), keeps, closes, scale=1.0 + slot, lr=1e-3, max_grad_norm=1.0
        )
        for slot, lengths in LENGTHS.items()
    }


def _steps(static: StaticModel, deterministic: bool, seed: int = 0) -> CapturedSteps:
    pools = AdapterPools(static, tuple(SlotSpec(rank) for rank in RANKS), deterministic)
    generator = torch.Generator(device="cuda").manual_seed(seed)
    for slot in range(len(RANKS)):
        states = {}
        for name, a, b in pools.views(slot):
            a_rD = torch.randn(a[0].shape, device="cuda", generator=generator)
            b_rO = torch.randn(b[0].shape, device="cuda", generator=generator)
            states[name] = LoraState((a_rD * a_rD.shape[1] ** -0.5,), (b_rO * 0.05,))
        pools.load(slot, states, 0)
    return CapturedSteps(program_of(static, pools, deterministic), [NUM_ROWS])


def program_of(static: StaticModel, pools: AdapterPools, deterministic: bool) -> StepProgram:
    inputs = StepInputs(StepLayout(NUM_ROWS, len(RANKS), 32, 256), static.device)
    return StepProgram(static, pools, inputs, deterministic=deterministic)


def blank_program(static: StaticModel, deterministic: bool) -> StepProgram:
    """Adapters without values, to compile its kernels."""
    pools = AdapterPools(static, tuple(SlotSpec(rank) for rank in RANKS), deterministic)
    return program_of(static, pools, deterministic)


def _against_autograd(
    exact: Any, model: Any, steps: CapturedSteps, batch: list[Sequence]
) -> dict[str, float]:
    """Norm-relative errors of the losses and of all gradients of A and of B, per-slot maximum;
    the same of plain autograd through ``model`` (bf16), which sets what bf16 can do."""
    got = steps.step(batch, _slots(closes=False)).result()
    torch.cuda.synchronize()
    mine, true, plain = {}, _leaves(steps), _leaves(steps)
    for slot in LENGTHS:
        mine[slot] = {name: (a[1], b[1]) for name, a, b in steps.program.pools.views(slot)}
    losses = _plain_losses(exact, true, batch)
    plain_losses = _plain_losses(model, plain, batch)
    exact_losses = torch.tensor(losses)
    out = {
        "loss_error": _relative(torch.tensor(got.losses), exact_losses),
        "plain_bf16_loss_error": _relative(torch.tensor(plain_losses), exact_losses),
    }
    true, plain = _grads(true), _grads(plain)
    for index, kind in enumerate("ab"):
        out[f"grad_{kind}_error"] = _worst(mine, true, index)
        out[f"plain_bf16_grad_{kind}_error"] = _worst(plain, true, index)
    return out


def _leaves(steps: CapturedSteps) -> dict:
    """slot -> site -> (A, B^T) that autograd can follow."""
    return {
        slot: {
            name: (a[0].clone().requires_grad_(), b[0].clone().requires_grad_())
            for name, a, b in steps.program.pools.views(slot)
        }
        for slot in LENGTHS
    }


def _grads(leaves: dict) -> dict:
    return {
        slot: {name: (a.grad, b.grad) for name, (a, b) in sites.items()}
        for slot, sites in leaves.items()
    }


def _worst(mine: dict, true: dict, index: int) -> float:
    return max(
        _relative(
            torch.cat([mine[slot][name][index].flatten() for name in true[slot]]),
            torch.cat([pair[index].flatten() for pair in true[slot].values()]),
        )
        for slot in true
    )


def _relative(mine: torch.Tensor, true: torch.Tensor) -> float:
    return float((mine.double() - true.double()).norm() / true.double().norm())


def _plain_losses(exact: Any, factors: dict, batch: list[Sequence]) -> list[float]:
    slots, losses, handles = _slots(), [0.0] * len(RANKS), []
    current = [0]
    for name, module in exact.named_modules():
        if name in factors[0]:

            def hook(_, inputs, y, name=name):
                a_rD, b_rO = factors[current[0]][name]
                x = inputs[0]
                delta = x @ a_rD.T.to(x.dtype) @ b_rO.to(x.dtype)
                return y + slots[current[0]].scale * delta

            handles.append(module.register_forward_hook(hook))
    for item in batch:
        current[0] = item.slot
        ids = torch.from_numpy(item.tokens_n).cuda()[None]
        logits = exact(input_ids=ids, use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        loss = loss / slots[item.slot].loss_tokens
        loss.backward()
        losses[item.slot] += loss.item()
    for handle in handles:
        handle.remove()
    return losses


def _isolation(static: StaticModel, batch: list[Sequence], moved: bool) -> bool:
    """Three steps of slot 1 alone and among others; ``moved``: alone it starts at row 0."""
    states = []
    for alone in (False, True):
        steps = _steps(static, deterministic=True)
        first = {0: 0, 1: 0 if moved and alone else 100, 2: 420, 3: 600}
        own = [item for item in batch if item.slot == 1 or not alone]
        slots = {s: x for s, x in _slots().items() if s == 1 or not alone}
        for _ in range(3):
            steps.step(own, slots, first_rows=first).result()
        torch.cuda.synchronize()
        states.append(steps.program.pools.save(1, RANKS[1]))
    return _same(*states)


def _repeatable(static: StaticModel, batch: list[Sequence]) -> bool:
    states = []
    for _ in range(2):
        steps = _steps(static, deterministic=True)
        for _ in range(2):
            steps.step(batch, _slots()).result()
        torch.cuda.synchronize()
        states.append(steps.program.pools.save(2, RANKS[2]))
    return _same(*states)


def _same(one: dict[str, LoraState], other: dict[str, LoraState]) -> bool:
    return all(
        torch.equal(x, y)
        for name, state in one.items()
        for x, y in zip((*state.a, *state.b), (*other[name].a, *other[name].b), strict=True)
    )
