"""Every family of backbones: packed passes against plain transformers, adapters against PEFT."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from muxtune.cost.shapes import GPT2, GPT_NEOX, LAYERNORM, OPT, from_hf_config
from muxtune.errors import ConfigError
from muxtune.runtime.adapters import adapter_method
from muxtune.runtime.attention import pack_rows
from muxtune.runtime.backbone import Backbone, BackboneStore, Loaded, check_model, random_weights
from muxtune.runtime.bank import AdapterBank
from muxtune.runtime.tokenizers import ByteTokenizer
from muxtune.types import EventKind, TaskSpec
from tests.runtime.peft_reference import Batch, plain_copy
from tests.runtime.runtime_helpers import TINY, Bench, make_htask, make_plan, make_task, worst_gap
from tests.runtime.test_runtime_methods import (
    PeftTraining,
    as_saved,
    check_steps_by_hand,
    folder_of,
    hand_made,
    logits_of,
    our_names,
)

_PLAIN = TINY._replace(
    num_kv_heads=4, gated_mlp=False, tied_embeddings=True, norm=LAYERNORM,
    qkv_bias=True, linear_bias=True,
)  # fmt: skip
SHAPES = {
    "llama": TINY,
    OPT: _PLAIN._replace(position_rows=66, family=OPT),
    GPT2: _PLAIN._replace(position_rows=64, family=GPT2),
    GPT_NEOX: _PLAIN._replace(tied_embeddings=False, family=GPT_NEOX),
}
TARGETS = {
    "llama": (("q_proj", "down_proj"), ("k_proj", "down_proj")),
    "mistral": (("q_proj", "down_proj"), ("k_proj", "down_proj")),
    "qwen2": (("q_proj", "down_proj"), ("k_proj", "down_proj")),
    "qwen3": (("q_proj", "down_proj"), ("k_proj", "down_proj")),
    OPT: (("q_proj", "out_proj", "fc2"), ("k_proj", "fc2")),
    GPT2: (("c_attn", "c_proj", "c_fc"), ("c_attn", "mlp.c_proj")),
    GPT_NEOX: (
        ("query_key_value", "dense", "dense_4h_to_h"),
        ("query_key_value", "dense_4h_to_h"),
    ),
}
FAMILIES = list(TARGETS)
SEQUENCES = [(0, 11), (11, 2), (16, 17), (33, 11)]
ROWS = 46


def from_config(kind: str, **changes: Any) -> Loaded:
    """Random weights of a family that has no shape of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=128, pad_token_id=0,
        sliding_window=None,
    )  # fmt: skip
    config = AutoConfig.for_model(kind, **{**settings, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Loaded(AutoModelForCausalLM.from_config(config), ByteTokenizer(128, 64))


@pytest.fixture(scope="module", params=FAMILIES)
def backbones(request: pytest.FixtureRequest) -> BackboneStore:
    """A store whose model "tiny" is of the family that ``family_of`` tells."""
    kind = request.param
    known = SHAPES.get(kind)
    source = random_weights(known) if known else lambda: from_config(kind)
    store = BackboneStore({"tiny": source})
    model = store.get("tiny").model
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        # Fresh biases and norms are constants, which would hide that one is left out.
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return store


def family_of(store: BackboneStore) -> str:
    return store.get("tiny").model.config.model_type


def draw_ids() -> torch.Tensor:
    return torch.randint(1, 128, (ROWS,), generator=torch.Generator().manual_seed(4))


def positions() -> torch.Tensor:
    out = torch.zeros(ROWS, dtype=torch.int64)
    for start, count in SEQUENCES:
        out[start : start + count] = torch.arange(count)
    return out


def hidden(backbone: Backbone, ids: torch.Tensor) -> torch.Tensor:
    return backbone.hidden_TD(ids, positions(), pack_rows(SEQUENCES, ROWS))


def test_packed_rows_equal_each_sequence_alone_in_transformers(backbones: BackboneStore) -> None:
    backbone, ids = backbones.get("tiny"), draw_ids()
    plain = plain_copy(backbone.model).eval()
    with torch.no_grad():
        packed = hidden(backbone, ids) @ backbone.lm_head_VD.T
        for start, count in SEQUENCES:
            alone = plain(ids[None, start : start + count], use_cache=False).logits[0]
            torch.testing.assert_close(packed[start : start + count], alone, rtol=1e-4, atol=2e-5)


def test_changing_one_sequence_changes_no_bit_of_another(backbones: BackboneStore) -> None:
    backbone, ids = backbones.get("tiny"), draw_ids()
    changed = ids.clone()
    changed[16:33] = (changed[16:33] + 7) % 128
    with torch.no_grad():
        before, after = hidden(backbone, ids), hidden(backbone, changed)
    for start, count in SEQUENCES:
        rows = slice(start, start + count)
        if start == 16:
            assert (before[rows] != after[rows]).any(dim=1).all()
        else:
            assert torch.equal(before[rows], after[rows])


def test_the_shape_table_counts_every_weight(backbones: BackboneStore) -> None:
    backbone = backbones.get("tiny")
    config = backbone.model.config
    shape = from_hf_config(config)
    head_norms = 2 * 16 * 2 if config.model_type == "qwen3" else 0  # of queries and keys
    assert backbone.weight_bytes == 4 * (shape.num_parameters + head_norms)
    for name, size in shape.linears.items():
        sites = [site for site in backbone.sites.values() if site.name.endswith(f".0.{name}")]
        assert [(site.in_features, site.out_features) for site in sites] == [size]
    assert len(backbone.sites) == 2 * len(shape.linears)
    known = SHAPES.get(config.model_type)
    assert known is None or shape._replace(name="tiny") == known


def tasks_of(kind: str) -> list[TaskSpec]:
    lora, ia3 = TARGETS[kind]
    common: dict[str, Any] = {"num_steps": 3, "batch_size": 2}
    forward = {"feedforward_modules": [ia3[-1]]}
    return [
        make_task("lora", **common, targets=lora, lr=3e-3),
        make_task("dora", **common, targets=lora, lr=3e-3, method="dora", rank=3),
        make_task("ia3", **common, targets=ia3, lr=3e-2, method="ia3", options=forward),
        make_task("prefix", **common, targets=(), lr=3e-2, method="prefix", rank=3),
        make_task("prompt", **common, targets=(), lr=3e-2, method="prompt", rank=5),
        make_task(
            "rslora", **common, targets=lora, lr=3e-3, rank=3, alpha=7.5, dropout=0.2,
            options={"use_rslora": True},
        ),
    ]  # fmt: skip


def one_layer_task(backbone: Backbone) -> TaskSpec:
    """Targets by their whole names: two linears of the second block alone."""
    sites = [name for name in backbone.sites if ".1." in name]
    return make_task("one-layer", num_steps=3, batch_size=2, targets=(sites[0], sites[-1]), lr=3e-3)


def test_mixed_methods_train_as_peft_alone_and_peft_loads_them(
    backbones: BackboneStore, tmp_path: Path
) -> None:
    """Losses, gradient norms and weights over steps; the packed gradients are PEFT's own."""
    from peft import PeftModel

    backbone, tasks = backbones.get("tiny"), tasks_of(family_of(backbones))
    tasks.append(one_layer_task(backbone))
    bench = Bench(tmp_path, backbones)
    bench.run(make_plan([make_htask(tasks, chunk_tokens=24)]), *tasks)
    assert bench.done() == {task.task_id for task in tasks}, bench.events
    for task in tasks:
        run = PeftTraining(backbones, task)
        records = [item for item in bench.recorder.steps if item.task_id == task.task_id]
        for step, record in enumerate(records):
            loss, norm = run.step(bench.library.step_sequences(task.task_id, step))
            assert record.loss == pytest.approx(loss, abs=1e-4), (task.task_id, step)
            assert record.grad_norm == pytest.approx(norm, rel=1e-3), (task.task_id, step)
        assert worst_gap(as_saved(bench.weights(task), task), our_names(run.trained)) < 1e-3
        folder = folder_of(bench, task.task_id)
        loaded = PeftModel.from_pretrained(plain_copy(backbone.model), folder).eval()
        ids = torch.from_numpy(bench.library.validation(task.task_id)[0].tokens).long()
        with torch.no_grad():
            theirs = loaded(input_ids=ids[None]).logits[0][-len(ids) :]
        torch.testing.assert_close(logits_of(bench, task, ids), theirs, rtol=1e-4, atol=1e-4)


def test_a_bottleneck_equals_two_linears_by_hand(backbones: BackboneStore, tmp_path: Path) -> None:
    """In every family: losses of two steps, and the folder that is saved."""
    targets = tuple(name.rpartition(".")[2] for name in TARGETS[family_of(backbones)][0][-2:])
    task = make_task("it", num_steps=2, batch_size=2, targets=targets, lr=3e-3, method="bottleneck")
    bench = Bench(tmp_path, backbones)
    bench.run(make_plan([make_htask([task], chunk_tokens=24)]), task)
    start = AdapterBank(backbones.get("tiny"), torch.float32).create(task, 2).parameters()
    method = adapter_method("bottleneck")
    tensors = {k: v for site in start for k, v in method.to_peft(site, start[site]).items()}
    model = hand_made(backbones, task, tensors)
    check_steps_by_hand(
        model,
        task.optimizer.lr,
        bench.recorder.steps,
        lambda step: Batch(bench.library.step_sequences("it", step), range(2)),
    )
    saved = load_file(Path(folder_of(bench, "it")) / "adapter_model.safetensors")
    ids = torch.from_numpy(bench.library.validation("it")[0].tokens).long()
    with torch.no_grad():
        theirs = hand_made(backbones, task, saved).eval()(input_ids=ids[None]).logits[0]
    torch.testing.assert_close(logits_of(bench, task, ids), theirs, rtol=1e-4, atol=1e-4)


def test_a_conv1d_is_kept_once_and_under_its_own_name() -> None:
    backbone = BackboneStore({"tiny": random_weights(SHAPES[GPT2])}).get("tiny")
    linear = backbone.model.get_submodule("transformer.h.0.attn.c_attn")
    assert linear.weight.shape == (64, 192) and linear.base.weight_OD.shape == (192, 64)
    assert linear.weight.data_ptr() == linear.base.weight_OD.data_ptr()
    x = torch.randn(3, 64)
    expected = functional.linear(x, linear.weight.T, linear.bias)
    torch.testing.assert_close(linear(x), expected)


@pytest.mark.parametrize("kind", [OPT, GPT2])
def test_sequences_beyond_the_learned_positions_are_refused(kind: str, tmp_path: Path) -> None:
    store = BackboneStore({"tiny": random_weights(SHAPES[kind])})
    bench = Bench(tmp_path, store)
    target = TARGETS[kind][0]
    bench.prepare(make_task("long", targets=target, max_length_tokens=65))
    (failure,) = [event.data for event in bench.events if event.task_id == "long"]
    assert isinstance(failure, tuple) and "64 positions" in str(failure)
    assert AdapterBank(store.get("tiny"), torch.float32)  # the model itself is sound


LONG_ROPE = {
    "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
    "rope_theta": 1e4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mistral", {"sliding_window": 16}),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}),
        ("phi3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 16}),
    ],
)
def test_sequences_that_a_window_would_cut_are_refused(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    store = BackboneStore({"tiny": lambda: from_config(kind, **changes)})
    bench = Bench(tmp_path, store)
    for longest in (16, 17):
        task = make_task(f"of-{longest}", targets=("o_proj",), max_length_tokens=longest)
        bench.prepare(task)
    (failure,) = [event for event in bench.events if event.kind is EventKind.TASK_FAILED]
    assert failure.task_id == "of-17" and "more than the 16 that" in str(failure.data)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("phi", {}, "adds a bias to its logits"),
        ("granite", {"logits_scaling": 8.0}, "logits_scaling"),
        ("cohere", {"logit_scale": 0.0625}, "logit_scale"),
    ],
)
def test_models_whose_logits_are_not_the_heads_product_are_refused(
    kind: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        BackboneStore({"tiny": lambda: from_config(kind, **changes)}).get("tiny")


def config_of(**changes: Any) -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(model_type="x", **changes),
        parameters=lambda: [torch.zeros(1, dtype=torch.int8 if changes.get("raw") else None)],
        _supports_attention_backend=not changes.get("own_attention"),
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (config_of(quantization_config={"bits": 4}), "is quantised"),
        (config_of(raw=True), "quantised weights"),
        (config_of(num_local_experts=8), "mixture of experts"),
        (config_of(own_attention=True), "packed attention"),
    ],
)
def test_models_that_would_be_computed_wrongly_are_refused(model: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_model("it", model)
    check_model("it", config_of())
