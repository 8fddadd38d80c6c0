"""Models of transformers with random weights, of a shape's family and dimensions."""

from __future__ import annotations

from typing import Any

import torch

from muxtune.cost.shapes import GPT2, GPT_NEOX, LLAMA, OPT, ModelShape
from muxtune.errors import ConfigError

MAX_LENGTH_TOKENS = 4096  # of rotary models; learned positions have as many as the shape says
LARGE_PARAMETERS = 200_000_000
_OPT_UNUSED_POSITIONS = 2


def check_random(shape: ModelShape) -> None:
    """Raises ConfigError for a shape that no family of transformers can have."""
    fits = {
        LLAMA: shape.gated_mlp and shape.rotary,
        OPT: not shape.gated_mlp and not shape.rotary,
        GPT2: not shape.gated_mlp and not shape.rotary,
        GPT_NEOX: not shape.gated_mlp and shape.rotary,
    }
    if not fits[shape.family]:
        problem = f"{shape.name} has no {shape.family} blocks (see gated_mlp and position_rows)"
        raise ConfigError("model", problem, "Set the shape's family")
    whole = shape.head_dim * shape.num_heads == shape.hidden
    if shape.family != LLAMA and (not whole or shape.num_kv_heads != shape.num_heads):
        problem = f"{shape.name}: {shape.family} heads share no keys and fill the hidden width"
        raise ConfigError(
            "model", problem, "Set num_kv_heads to num_heads, head_dim to their share"
        )


def random_model(
    shape: ModelShape,
    seed: int,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Any, int]:
    """The model, and its longest sequence in tokens; leaves torch's global generators alone.

    Weights are drawn on the CPU in float32, so that every device gets the same; those of a large
    model where they will be used (``device`` and ``dtype``), which takes seconds, not minutes.
    """
    config, longest = _config(shape)
    from transformers import AutoModelForCausalLM

    if device is None or device.type != "cuda" or shape.num_parameters < LARGE_PARAMETERS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config), longest
    with torch.random.fork_rng(devices=[device]), torch.device(device):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype), longest


def blank_model(shape: ModelShape, dtype: torch.dtype) -> Any:
    """A model whose weights hold anything; where tensors have no memory, it takes none."""
    config, _ = _config(shape)
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(False)


def _config(shape: ModelShape) -> tuple[Any, int]:
    from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, OPTConfig

    common: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "tie_word_embeddings": shape.tied_embeddings,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if shape.family == OPT:
        longest = shape.position_rows - _OPT_UNUSED_POSITIONS
        return OPTConfig(
            **common,
            ffn_dim=shape.intermediate,
            max_position_embeddings=longest,
            word_embed_proj_dim=shape.hidden,
            dropout=0.0,
        ), longest
    if shape.family == GPT2:
        return GPT2Config(
            **common,
            n_inner=shape.intermediate,
            n_positions=shape.position_rows,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ), shape.position_rows
    common |= {
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": MAX_LENGTH_TOKENS,
    }
    if shape.family == GPT_NEOX:
        return GPTNeoXConfig(**common), MAX_LENGTH_TOKENS
    return LlamaConfig(
        **common,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        attention_bias=shape.qkv_bias,
    ), MAX_LENGTH_TOKENS
