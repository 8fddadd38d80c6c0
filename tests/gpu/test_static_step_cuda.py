"""The captured step on a GPU, small: against float32 autograd, isolation, accumulation, NaN."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalIterable=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHAPE = {
    "vocab_size": 1000, "hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 2,
}  # fmt: skip
PATH = Path(__file__).parents[2] / "experiments" / "step_throughput" / "check.py"


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("step_throughput_check", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def static():
    from transformers import LlamaConfig, LlamaForCausalLM

    from muxtune.runtime.static_step import StaticModel

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).requires_grad_(False).bfloat16()
    return StaticModel.of(model, 512)


def test_gradients_isolation_and_repeatability(check) -> None:
    found = check.run(SHAPE)
    assert found["passed"], found


def test_replays_accumulate(check, static) -> None:
    batch = check._batch(SHAPE["vocab_size"])
    parts = [batch[::2], batch[1::2]]
    grads = []
    for keeps in (False, True):
        steps = check._steps(static, deterministic=True)
        total = None
        for index, part in enumerate(parts):
            steps.step(part, check._slots(closes=False, keeps=keeps and index > 0)).result()
            now = torch.cat([p.db_RO.flatten() for p in _loras(steps)])
            total = now.clone() if total is None or keeps else total + now
        grads.append(total)
    assert grads[0].norm() > 0
    assert (grads[0] - grads[1]).norm() / grads[0].norm() < 1e-5


def test_an_idle_slot_and_a_nan_leave_the_others_alone(check, static) -> None:
    batch = check._batch(SHAPE["vocab_size"])
    steps = check._steps(static, deterministic=True)
    before = steps.program.pools.save(3, check.RANKS[3])
    own = [item for item in batch if item.slot != 3]
    slots = {slot: item for slot, item in check._slots().items() if slot != 3}
    steps.program.pools.layers[0][0].b[0][0, 0] = float("nan")  # slot 0
    result = steps.step(own, slots).result()
    assert result.skipped == [True, False, False, False]
    assert check._same(before, steps.program.pools.save(3, check.RANKS[3]))
    moved = steps.program.pools.save(1, check.RANKS[1])
    assert all(x.isfinite().all() for state in moved.values() for x in (*state.a, *state.b))


def test_a_further_size_is_prepared_in_the_memory_that_graphs_share(check, static) -> None:
    """Its trial too: a pass never needs its memory twice. And the graphs' memory is known."""
    from muxtune.runtime.static_step import AdapterPools, SlotSpec, StepLayout, StepProgram
    from muxtune.runtime.static_step.captured import CapturedSteps, CaptureMemory
    from muxtune.runtime.static_step.inputs import StepInputs

    pools = AdapterPools(static, tuple(SlotSpec(rank) for rank in check.RANKS), False)
    inputs = StepInputs(StepLayout(8192, len(check.RANKS), 64, 256), static.device)
    memory = CaptureMemory.of_its_own(static.device)
    steps = CapturedSteps(StepProgram(static, pools, inputs), [8192, 7168], memory=memory)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    steps.capture([8192])
    pass_bytes = torch.cuda.max_memory_allocated() - before
    assert memory.idle_bytes() >= 0.9 * pass_bytes
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    steps.capture([7168])
    assert torch.cuda.max_memory_reserved() - reserved < 0.2 * pass_bytes
    batch = check._batch(SHAPE["vocab_size"])
    losses = [
        steps.step(batch, check._slots(closes=False), num_rows=n).result() for n in (8192, 7168)
    ]
    assert losses[0].losses == pytest.approx(losses[1].losses, rel=1e-5)
    assert min(losses[0].losses) > 0


def test_in_fast_mode_a_size_changes_no_bit_of_a_task(check, static) -> None:
    """Rows behind a task's own, and how many of them there are, are nobody's business."""
    from muxtune.runtime.static_step import CapturedSteps

    batch, grads = check._batch(SHAPE["vocab_size"]), []
    program = check._steps(static, deterministic=False).program
    for num_rows in (768, 704, 656):
        steps = CapturedSteps(program, [num_rows])
        steps.step(batch, check._slots(closes=False)).result()
        grads.append(
            [p.da_RD.clone() for p in _loras(steps)] + [p.db_RO.clone() for p in _loras(steps)]
        )
    for other in grads[1:]:
        for left, right in zip(grads[0], other, strict=True):
            assert torch.equal(left, right)


def _loras(steps):
    return [pool.lora for layer in steps.program.pools.layers for pool in layer]
