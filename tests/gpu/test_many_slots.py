"""The step with many slots, and several programs in one memory: apart from the other tests, for an
address that is wrong ends every test of its process. CUDA_LAUNCH_BLOCKING=1 names the launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from muxtune.runtime.static_step import Sequence as Rows
from muxtune.runtime.static_step.adapters import LoraState
from muxtune.runtime.static_step.captured import CaptureMemory
from muxtune.runtime.static_step.inputs import StepInputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VOCAB, RANK = 1000, 16
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 4,
    "num_key_value_heads": 4, "num_hidden_layers": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def static() -> StaticModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda"):
        model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE))
    return StaticModel.of(model.requires_grad_(False).bfloat16(), 1024)


def program_of(static: StaticModel, num_slots: int, max_rows: int, exact: bool) -> StepProgram:
    pools = AdapterPools(static, (SlotSpec(RANK),) * num_slots, exact)
    generator = torch.Generator(device="cuda").manual_seed(1)
    for slot in range(num_slots):
        states = {}
        for name, a, b in pools.views(slot):
            a_rD, b_rO = (
                torch.randn(x[0].shape, device="cuda", generator=generator) * 0.05 for x in (a, b)
            )
            states[name] = LoraState((a_rD,), (b_rO,))
        pools.load(slot, states, 0)
    layout = StepLayout(max_rows, num_slots, max_rows // 8, 512)
    return StepProgram(static, pools, StepInputs(layout, static.device), deterministic=exact)


def batch_of(num_slots: int, num_rows: int) -> list[Rows]:
    """Every slot has sequences of all lengths from two tokens on, as many as there is room for."""
    rng, rows, left = np.random.default_rng(num_slots), [], num_rows
    for number in range(8 * num_slots):
        count = min(left, 2 + int(rng.integers(0, 2 * num_rows // (8 * num_slots))))
        if count < 2:
            break
        tokens = rng.integers(0, VOCAB, count)
        rows.append(Rows(number % num_slots, tokens, np.ones(count, bool), number))
        left -= count
    return rows


def gradients(program: StepProgram) -> list[torch.Tensor]:
    pools = [pool.lora for layer in program.pools.layers for pool in layer]
    return [grad.clone() for lora in pools for grad in (lora.da_RD, lora.db_RO)]


def slots_of(num_slots: int) -> dict[int, SlotInput]:
    return {slot: SlotInput(50, closes=False, scale=2.0) for slot in range(num_slots)}


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(("num_slots", "num_rows"), [(3, 512), (8, 1024), (16, 2048), (32, 2048),
                                                     (64, 4096)])  # fmt: skip
def test_any_number_of_slots(
    static: StaticModel, num_slots: int, num_rows: int, captured: bool
) -> None:
    """Fast against deterministic mode, in which no sum is cut up."""
    found = []
    for exact in (False, True):
        program = program_of(static, num_slots, num_rows, exact)
        steps = CapturedSteps(program, [num_rows])
        batch, slots = batch_of(num_slots, num_rows - 100), slots_of(num_slots)
        if captured:
            steps.step(batch, slots).result()
        else:
            steps._hosts[0].fill(num_rows, batch, slots)
            steps._load(steps._hosts[0])
            program.run(num_rows)
        torch.cuda.synchronize()
        found.append(gradients(program))
    for left, right in zip(*found, strict=True):
        assert right.norm() > 0
        assert (left - right).norm() / right.norm() < 1e-2


def test_a_trial_leaves_nothing_in_the_memory_of_graphs(static: StaticModel) -> None:
    """What outlived it there would be overwritten by the replays of older graphs."""
    memory = CaptureMemory.of_its_own(static.device)
    CapturedSteps(program_of(static, 3, 1024, True), [1024], memory=memory).capture()
    later = CapturedSteps(program_of(static, 5, 1024, True), [1024], memory=memory)
    before = bytes_alive(memory)
    with torch.cuda.stream(memory.stream), memory.lent():
        later.compute(1024)
    memory.stream.synchronize()
    assert bytes_alive(memory) == before


def bytes_alive(memory: CaptureMemory) -> int:
    segments = torch.cuda.memory_snapshot()
    mine = [item for item in segments if tuple(item["segment_pool_id"]) == tuple(memory.pool)]
    return sum(item["allocated_size"] for item in mine)


def test_programs_that_share_memory_leave_each_other_alone(static: StaticModel) -> None:
    """As the hTasks of an instance: all sizes of all programs captured, then replayed in turn."""
    sizes: list[Sequence[int]] = [(2048, 1536), (4096, 3072), (4096, 2560)]
    numbers, found = (16, 8, 8), []
    for shared in (None, CaptureMemory.of_its_own(static.device)):
        steps = [
            CapturedSteps(program_of(static, n, max(rows), True), rows, memory=shared)
            for n, rows in zip(numbers, sizes, strict=True)
        ]
        for item in steps:
            item.capture()
        for turn in range(4):
            for item, n in zip(steps, numbers, strict=True):
                rows = item.row_counts[turn % 2]
                item.step(batch_of(n, rows - 60), slots_of(n), num_rows=rows).result()
        torch.cuda.synchronize()
        found.append([grad for item in steps for grad in gradients(item.program)])
    for left, right in zip(*found, strict=True):
        assert left.norm() > 0
        assert torch.equal(left, right)
