"""Shapes against published parameter counts, devices against the published figures."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from muxtune.cost.devices import checked_figures, device_figures, device_table
from muxtune.cost.shapes import MODEL_SHAPES, checked_shape, from_hf_config, model_shape
from muxtune.errors import ConfigError

# Published counts of the released checkpoints.
PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "gpt-2.7b": 2_651_596_800,
    "opt-30b": 29_974_540_288,
    "llama-2-70b": 68_976_648_192,
    "opt-125m": 125_239_296,
    "opt-1.3b": 1_315_758_080,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "pythia-1.4b": 1_414_647_808,
    "gpt-neox-20b": 20_554_567_680,
}


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_parameter_counts_are_those_of_the_checkpoints(name: str) -> None:
    assert MODEL_SHAPES[name].num_parameters == PARAMETERS[name]


def test_every_builtin_shape_is_counted_and_consistent() -> None:
    assert set(MODEL_SHAPES) == set(PARAMETERS)
    for shape in MODEL_SHAPES.values():
        assert checked_shape(shape) is shape


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("meta-llama/Llama-2-7b-hf", "llama-2-7b"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"),
        ("Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b"),
    ],
)
def test_model_names_are_read_forgivingly(spelling: str, name: str) -> None:
    assert model_shape(spelling).name == name


def test_unknown_model_lists_the_known_ones_and_a_close_one() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'llama-2-7b'.*opt-30b") as caught:
        model_shape("llama-2-7c")
    assert caught.value.field == "model"


def test_hf_config_of_llama_kind_gives_the_builtin_shape() -> None:
    config = SimpleNamespace(
        model_type="llama", hidden_size=576, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, intermediate_size=1536, vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    assert from_hf_config(config, "smollm2-135m") == MODEL_SHAPES["smollm2-135m"]


def test_hf_config_of_opt_kind_gives_the_builtin_shape() -> None:
    config = SimpleNamespace(
        model_type="opt", hidden_size=7168, num_hidden_layers=48, num_attention_heads=56,
        ffn_dim=28672, vocab_size=50272, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    assert from_hf_config(config, "opt-30b") == MODEL_SHAPES["opt-30b"]


def test_hf_config_without_a_dimension_names_it() -> None:
    with pytest.raises(ConfigError, match=r"model config\.hidden_size"):
        from_hf_config(SimpleNamespace(model_type="llama"))


def test_shape_with_heads_that_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_kv_heads"):
        checked_shape(MODEL_SHAPES["llama-2-7b"]._replace(num_kv_heads=5))


def test_targets_are_matched_as_peft_does() -> None:
    shape = MODEL_SHAPES["smollm2-135m"]
    names = [linear.name for linear in shape.target_linears(("q_proj", "mlp.down_proj"))]
    assert names == ["self_attn.q_proj", "mlp.down_proj"]
    assert len(shape.target_linears(("all-linear",))) == 7
    with pytest.raises(ConfigError, match=r"'proj' is no linear.*q_proj"):
        shape.target_linears(("proj",))


def test_devices_are_found_by_any_usual_spelling() -> None:
    assert device_figures("NVIDIA H100 SXM").name == "H100-SXM"
    assert device_figures("h100").peak_flops == 989e12
    assert device_figures("a100").memory_bytes == 80_000_000_000
    # NVLink is quoted for both directions together; where there is none, PCIe counts.
    assert device_figures("H100-SXM").link_bytes_per_s == 450e9
    assert device_figures("L40S").link_bytes_per_s == 32e9


def test_unknown_device_lists_those_known() -> None:
    with pytest.raises(ConfigError, match=r"choose one of: A40.*cpu"):
        device_figures("TPU-v9")


def test_overrides_replace_single_figures_and_are_checked() -> None:
    assert device_figures("cpu", {"peak_flops": 5e11}).peak_flops == 5e11
    with pytest.raises(ConfigError, match=r"device\.peak_flop"):
        device_figures("cpu", {"peak_flop": 1.0})
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"device\.peak_flops"):
            device_figures("cpu", {"peak_flops": wrong})


def test_every_builtin_device_is_sane() -> None:
    for figures in device_table().values():
        assert checked_figures(figures) is figures
        low, typical, high = figures.usd_per_hour
        assert low <= typical <= high


def test_cost_package_imports_without_torch_and_simulator() -> None:
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'simpy', 'triton', 'transformers')))\n"
        "import muxtune.cost"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
