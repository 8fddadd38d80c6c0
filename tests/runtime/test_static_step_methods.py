"""Mixed methods in the static step against the eager pass, which is tested against PEFT."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from muxtune.runtime.adapters import adapter_method
from muxtune.runtime.backbone import Backbone
from muxtune.runtime.bank import AdapterBank, SlotPool, TaskState, adapter_slot
from muxtune.runtime.batch import DropoutSeed, Placed, assemble
from muxtune.runtime.static_step import (
    AdapterPools,
    Sequence,
    SlotInput,
    SlotSpec,
    StaticModel,
    StepLayout,
    StepProgram,
    Unsupported,
)
from muxtune.runtime.static_step.adapters import ALL_TARGETS, LoraState
from muxtune.runtime.static_step.extras import ExtraPools
from muxtune.runtime.static_step.inputs import HostBuffer, StepInputs
from muxtune.runtime.static_step.pool import LOW_RANK
from muxtune.runtime.tokenizers import ByteTokenizer
from muxtune.runtime.training import train_pass
from muxtune.types import AdapterSlot, TaskSpec
from muxtune.workload.encoding import EncodedSequence
from tests.runtime.runtime_helpers import make_htask, make_task
from tests.runtime.static_step_reference import tiny_llama

LENGTHS = {
    0: [9, 4], 1: [7, 7], 2: [5, 12], 3: [6], 4: [3, 8], 5: [10], 6: [4, 4], 7: [8, 3], 8: [5, 2],
    9: [6],
}  # fmt: skip
PROMPTS = (4, 3)  # ranks of their slots, one more than their tasks'
NUM_ROWS = 140  # some filler
MAX_POSITIONS = 64


def tasks() -> list[TaskSpec]:
    return [
        make_task("lora", targets=("q_proj", "v_proj", "down_proj"), rank=3),
        make_task("ia3", method="ia3", targets=("k_proj", "v_proj", "down_proj")),
        make_task("bottleneck", method="bottleneck", targets=("o_proj", "down_proj"), rank=5),
        make_task("prefix", method="prefix", targets=(), rank=4),
        make_task("dropped", method="bottleneck", targets=("up_proj",), rank=2, dropout=0.3),
        make_task("ia3 out", method="ia3", targets=("gate_proj", "o_proj"),
                  options={"feedforward_modules": []}),
        make_task("prefix 2", method="prefix", targets=(), rank=2),
        make_task("dora", method="dora", targets=("k_proj", "v_proj", "down_proj"), rank=3),
        make_task("prompt", method="prompt", targets=(), rank=3),
        make_task("prompt 2", method="prompt", targets=(), rank=2),
    ]  # fmt: skip


def slots_of(specs: list[TaskSpec]) -> tuple[AdapterSlot, ...]:
    """Larger than their tasks: one more rank, and more targets for IA3."""
    return tuple(
        adapter_slot(task)._replace(
            rank=task.adapter.rank + 1,
            targets=ALL_TARGETS if task.adapter.method == "ia3" else task.adapter.targets,
        )
        for task in specs
    )


class Setting(NamedTuple):
    specs: list[TaskSpec]
    states: list[TaskState]
    backbone: Backbone
    placed: list[Placed]


def setting() -> Setting:
    specs = tasks()
    backbone = Backbone("tiny", tiny_llama(), ByteTokenizer(257, MAX_POSITIONS))
    bank = AdapterBank(backbone, torch.float32)
    states = [bank.create(task, 1) for task in specs]
    generator = torch.Generator().manual_seed(5)
    for state in states:
        for values in state.tensors.values():
            values.param.add_(0.2 * torch.randn(values.param.shape, generator=generator))
    rng, placed, row = np.random.default_rng(0), [], 0
    for slot, lengths in LENGTHS.items():
        for position, count in enumerate(lengths):
            mask = np.arange(count) < count - 1
            sequence = EncodedSequence(rng.integers(0, 257, count).astype(np.int32), mask)
            placed.append(Placed(slot, row, position, sequence))
            row += count
    return Setting(specs, states, backbone, placed)


def target_tokens(at: Setting, slot: int) -> int:
    return sum(item.sequence.target_tokens for item in at.placed if item.slot == slot)


def eager(at: Setting) -> tuple[list[float], list[dict[tuple[str, str], Tensor]]]:
    """Losses and gradients by slot."""
    bank = AdapterBank(at.backbone, torch.float32)
    by_id = {state.task.task_id: state for state in at.states}
    (pool,) = bank.arrange([make_htask(at.specs, slots=slots_of(at.specs))], by_id)
    assert isinstance(pool, SlotPool)
    spans = []
    for slot in LENGTHS:
        rows = [item for item in at.placed if item.slot == slot]
        spans.append((slot, rows[0].row, rows[-1].row + len(rows[-1].sequence.tokens)))
    dropouts = {s: DropoutSeed(t.seed, 3, t.adapter.dropout) for s, t in enumerate(at.specs)}
    scale_S = torch.tensor([1 / target_tokens(at, slot) for slot in LENGTHS])
    sequences = [(item.row, len(item.sequence.tokens)) for item in at.placed]
    tensors = assemble(
        at.placed, sequences, spans, scale_S, dropouts, NUM_ROWS, 0, "cpu", pool.virtual
    )
    losses = train_pass(at.backbone, pool, tensors, deterministic=False)
    return losses, [
        {key: values.grad.clone() for key, values in state.tensors.items()} for state in at.states
    ]


class Static(NamedTuple):
    program: StepProgram
    pools: AdapterPools
    extras: ExtraPools


def static(at: Setting, keeps: frozenset[int] = frozenset(), on_gpu: bool = False) -> Static:
    """A program with the tasks in its slots and their rows in its inputs."""
    plain: Any = tiny_llama()
    if on_gpu:
        plain = plain.cuda().bfloat16()
    model = StaticModel.of(plain, MAX_POSITIONS)
    slots = slots_of(at.specs)
    specs = tuple(
        SlotSpec(slot.rank, slot.targets) if slot.method in LOW_RANK else SlotSpec(0, ())
        for slot in slots
    )
    pools = AdapterPools(model, specs, True)
    extras = ExtraPools(model, slots, True, pools)
    for slot, state in enumerate(at.states):
        if state.slot.method in LOW_RANK:
            sites = {site for site, _ in state.tensors}
            pools.load(slot, {site: _lora(state, site) for site in sites}, 0)
        if state.slot.method != "lora":
            fill(extras, slot, {key: v.param for key, v in state.tensors.items()})
    layout = StepLayout(NUM_ROWS, len(slots), 28, 16, dropout=True, prompts=PROMPTS)
    inputs, host = StepInputs(layout, model.device), HostBuffer(layout, False)
    rows = [Sequence(p.slot, p.sequence.tokens, _learnt(p.sequence), p.position) for p in at.placed]
    host.fill(NUM_ROWS, rows, {s: slot_input(at, s, s in keeps) for s in LENGTHS})
    inputs.buffer.copy_(host.buffer)
    inputs.spans = host.spans
    return Static(StepProgram(model, pools, inputs, True, extras=extras), pools, extras)


def fill(extras: ExtraPools, slot: int, params: dict[tuple[str, str], Tensor]) -> None:
    for key, views in extras.views(slot):
        if key in params:
            views[0][: params[key].shape[0]] = params[key]
    extras.take(slot, {key: param.shape[0] for key, param in params.items()})


def gradients(extras: ExtraPools, slot: int) -> dict[tuple[str, str], Tensor]:
    return {key: views[1] for key, views in extras.views(slot)}


def _lora(state: TaskState, site: str) -> LoraState:
    a, b = (state.tensors[site, name].param for name in ("lora_A", "lora_B"))
    return LoraState(*((x, torch.zeros_like(x), torch.zeros_like(x)) for x in (a, b)))


def _learnt(sequence: EncodedSequence) -> np.ndarray:
    return np.concatenate(([False], sequence.target_mask[:-1]))


def slot_input(at: Setting, slot: int, keeps: bool) -> SlotInput:
    task = at.specs[slot]
    return SlotInput(
        target_tokens(at, slot),
        keeps=keeps,
        scale=adapter_method(task.adapter.method).scale(task.adapter),
        dropout=task.adapter.dropout,
        seed=task.seed,
        step=3,
    )


def test_losses_and_gradients_equal_the_eager_pass() -> None:
    at = setting()
    losses, grads = eager(at)
    made = static(at)
    made.program.optimizes = False
    result = made.program.run(NUM_ROWS)
    torch.testing.assert_close(result.loss_S, torch.tensor(losses), rtol=1e-5, atol=1e-5)
    for slot, wanted in enumerate(grads):
        found = gradients(made.extras, slot)
        for site, a, b in made.pools.views(slot):
            found[site, "lora_A"], found[site, "lora_B"] = a[1], b[1]
        assert wanted.keys() <= found.keys()
        for key, grad in found.items():
            if key in wanted:
                own = grad[: wanted[key].shape[0]]
                torch.testing.assert_close(own, wanted[key], rtol=1e-4, atol=1e-6, msg=str(key))
                assert wanted[key].any(), key
                grad = grad[wanted[key].shape[0] :]
            assert not grad.any(), f"{key}: a spare row has a gradient"


def test_gradients_are_kept_or_overwritten_by_slot() -> None:
    at = setting()
    once = static(at)
    once.program.optimizes = False
    once.program.run(NUM_ROWS)
    first = [gradients(once.extras, slot) for slot in LENGTHS]
    keeps = frozenset({1, 2, 3})
    twice = static(at, keeps)
    twice.program.optimizes = False
    twice.program.run(NUM_ROWS)
    twice.program.run(NUM_ROWS)
    for slot in LENGTHS:
        for key, grad in gradients(twice.extras, slot).items():
            factor = 2 if slot in keeps else 1
            torch.testing.assert_close(grad, factor * first[slot][key], rtol=1e-5, atol=1e-7)


def test_the_optimizer_steps_every_method_and_no_spare_row() -> None:
    at = setting()
    made = static(at)
    made.program.run(NUM_ROWS)
    for slot, state in enumerate(at.states):
        if state.slot.method == "lora":
            continue
        for key, (rows, *_) in made.extras.views(slot):
            count = state.tensors[key].param.shape[0] if key in state.tensors else 0
            assert not rows[count:].any(), key
            if count:
                gap = (rows[:count] - state.tensors[key].param).abs().max()
                assert 0 < float(gap) < 1e-2, key


def test_dora_with_dropout_has_no_static_form() -> None:
    model = StaticModel.of(tiny_llama(), MAX_POSITIONS)
    with pytest.raises(Unsupported, match="dora"):
        ExtraPools(model, (AdapterSlot("dora", 4, (), True),), True)


def test_rotary_tables_must_reach_behind_the_virtual_tokens() -> None:
    model = StaticModel.of(tiny_llama(), 20)
    slots = (AdapterSlot("prefix", 8, ()),)
    pools = AdapterPools(model, (SlotSpec(0, ()),), True)
    inputs = StepInputs(StepLayout(32, 1, 8, 16), model.device)
    with pytest.raises(ValueError, match="20 positions"):
        StepProgram(model, pools, inputs, extras=ExtraPools(model, slots, True))


@pytest.mark.gpu
def test_a_replayed_graph_of_mixed_methods_gives_the_programs_own_bits() -> None:
    """Nothing in the step waits for the host; bfloat16 beside the CPU's float32."""
    at = setting()
    exact, made = static(at), static(at, on_gpu=True)
    for one in (exact, made):
        one.program.optimizes = False
        one.program.run(NUM_ROWS)
    first = [g.clone() for slot in LENGTHS for g in gradients(made.extras, slot).values()]
    wanted = [g for slot in LENGTHS for g in gradients(exact.extras, slot).values()]
    for left, right in zip(first, wanted, strict=True):
        gap = (left.cpu() - right).norm()
        assert float(gap) <= 0.1 * float(right.norm()) + 1e-4
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made.program.run(NUM_ROWS)
    for grad in gradients(made.extras, 1).values():
        grad.fill_(9.0)
    graph.replay()
    torch.cuda.synchronize()
    again = [g for slot in LENGTHS for g in gradients(made.extras, slot).values()]
    for left, right in zip(again, first, strict=True):
        assert torch.equal(left, right)
