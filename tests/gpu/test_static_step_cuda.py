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


def _loras(steps):
    return [pool.lora for layer in steps.program.pools.layers for pool in layer]
