"""Finding, loading and freezing base models; the multi-task linears in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from muxtune.cost.shapes import from_hf_config
from muxtune.errors import ConfigError
from muxtune.runtime.attention import pack_rows
from muxtune.runtime.backbone import (
    BackboneStore,
    gguf_file,
    local_folder,
    packaged_gguf,
    random_weights,
)
from muxtune.runtime.linear import MultiTaskLinear
from tests.runtime.peft_reference import plain_copy
from tests.runtime.runtime_helpers import TINY, make_store


def test_all_linears_but_the_head_are_multi_task_and_frozen(store: BackboneStore) -> None:
    backbone = store.get("tiny")
    model = backbone.model
    replaced = [name for name, m in model.named_modules() if isinstance(m, MultiTaskLinear)]
    assert replaced == list(backbone.sites) and len(replaced) == 14
    plain = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert plain == ["lm_head"]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert backbone.weight_bytes == 4 * from_hf_config(model.config).num_parameters
    assert from_hf_config(model.config)._replace(name="tiny") == TINY


def test_base_forward_equals_transformers(store: BackboneStore) -> None:
    backbone = store.get("tiny")
    ids = torch.randint(1, 128, (12,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine = backbone.hidden_TD(ids, torch.arange(12), pack_rows([(0, 12)], 12))
        theirs = plain_copy(backbone.model).model(ids[None]).last_hidden_state[0]
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_targets_match_as_in_peft(store: BackboneStore) -> None:
    backbone = store.get("tiny")
    names = [site.name for site in backbone.matching_sites(("q_proj", "mlp.down_proj"))]
    assert names == [
        f"model.layers.{layer}.{module}"
        for layer in range(2)
        for module in ("self_attn.q_proj", "mlp.down_proj")
    ]
    whole = "model.layers.1.self_attn.v_proj"
    assert [site.name for site in backbone.matching_sites((whole,))] == [whole]
    assert len(backbone.matching_sites(("all-linear",))) == 14
    with pytest.raises(ConfigError, match="'proj' is no linear layer"):
        backbone.matching_sites(("q_proj", "proj"))


def test_module_keys_are_stable_and_those_of_the_inputs(store: BackboneStore) -> None:
    """Query, key and value, and gate and up, read the same input: they share dropout masks."""
    keys = {name: site.key for name, site in store.get("tiny").sites.items()}
    assert len(keys) == 14
    assert len(set(keys.values())) == 2 * 4
    attention = "model.layers.1.self_attn"
    assert keys[f"{attention}.q_proj"] == keys[f"{attention}.v_proj"]
    assert keys[f"{attention}.q_proj"] != keys[f"{attention}.o_proj"]
    assert keys["model.layers.0.self_attn.q_proj"] == 254586338


def test_one_object_a_name(store: BackboneStore) -> None:
    assert store.get("tiny") is store.get("tiny")
    assert store.tokenizer("tiny").encode("Az") == [65, 122]


def test_random_weights_are_seeded_and_leave_the_global_state_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, second, other = (make_store(seed).get("tiny") for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.lm_head_VD, second.lm_head_VD)
    assert not torch.equal(first.lm_head_VD, other.lm_head_VD)


def test_a_saved_folder_is_found_by_its_path(store: BackboneStore, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain_copy(store.get("tiny").model).save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({"<s>": 0, "hello": 1}, unk_token="<s>"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>").save_pretrained(tmp_path)
    loaded = BackboneStore().get(str(tmp_path))
    assert torch.equal(loaded.lm_head_VD, store.get("tiny").lm_head_VD)
    assert loaded.tokenizer.encode("hello") == [1]
    assert loaded.tokenizer.max_length_tokens == 4096


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda folder: local_folder(folder), "holds no config.json"),
        (lambda folder: gguf_file(folder / "x.gguf"), r"x.gguf' does not exist"),
        (lambda folder: packaged_gguf("no_such_package"), "no-such-package.*not installed"),
        (lambda folder: random_weights(TINY._replace(gated_mlp=False)), "no llama blocks"),
        (lambda folder: random_weights(TINY._replace(family="gpt2")), "no gpt2 blocks"),
        (lambda folder: BackboneStore().get("nothing"), "neither a folder, nor a GGUF file"),
        (lambda folder: BackboneStore().get(str(folder)), "holds no config.json"),
        (lambda folder: BackboneStore().get("random:nothing"), "is not known"),
    ],
)
def test_what_cannot_be_loaded_says_why(tmp_path: Path, make, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make(tmp_path)


def test_a_quantised_folder_is_refused(store: BackboneStore, tmp_path: Path) -> None:
    model = plain_copy(store.get("tiny").model)
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    entry = '{\n  "quantization_config": {"quant_method": "gptq", "bits": 4},'
    (tmp_path / "config.json").write_text(config.replace("{", entry, 1))
    with pytest.raises(ConfigError, match="is quantised"):
        BackboneStore().get(str(tmp_path))
