"""Shapes of decoder-only transformers: what a cost model needs to know of a base model.

Everything is arithmetic on published dimensions; no weights and no library are needed.
"""

from __future__ import annotations

import difflib
import re
from functools import lru_cache
from typing import NamedTuple

from muxtune.errors import ConfigError

RMSNORM, LAYERNORM = "rmsnorm", "layernorm"
_VARIANTS = re.compile(r"-(instruct|chat|base|it|hf|v\d+(\.\d+)?)(?=-|$)")
_GATED_TYPES = {"llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "phi3", "olmo2"}
# How a block's linears are named and fused, as transformers names them.
LLAMA, OPT, GPT2, GPT_NEOX = "llama", "opt", "gpt2", "gpt_neox"
FAMILIES = (LLAMA, OPT, GPT2, GPT_NEOX)


class Linear(NamedTuple):
    """A frozen linear layer of one block. ``split`` tells how tensor parallelism cuts it:
    "out" (column parallel) or "in" (row parallel)."""

    name: str
    in_features: int
    out_features: int
    split: str
    bias: bool = False

    def sharded(self, tp: int) -> Linear:
        if self.split == "out":
            return self._replace(out_features=self.out_features // tp)
        return self._replace(in_features=self.in_features // tp)

    @property
    def num_parameters(self) -> int:
        return self.in_features * self.out_features + (self.out_features if self.bias else 0)


class ModelShape(NamedTuple):
    """Dimensions of a dense decoder. ``weight_bytes``: bytes per parameter as GPUs hold it (the
    CPU runtime computes in fp32). ``position_rows``: learned position embeddings, 0 for rotary.
    ``family``: one of ``FAMILIES``; llama (gated) and opt (plain) have separate queries, keys and
    values, gpt2 and gpt_neox fuse them into one linear.
    """

    name: str
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    gated_mlp: bool = True
    tied_embeddings: bool = False
    norm: str = RMSNORM
    weight_bytes: int = 2
    qkv_bias: bool = False
    linear_bias: bool = False
    position_rows: int = 0
    family: str = LLAMA

    @property
    def fused_qkv(self) -> bool:
        return self.family in (GPT2, GPT_NEOX)

    @property
    def query_dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of the keys (and of the values) of one token in one layer."""
        return self.num_kv_heads * self.head_dim

    @property
    def rotary(self) -> bool:
        return self.position_rows == 0

    @property
    def block_linears(self) -> tuple[Linear, ...]:
        """The linear layers of one block, in the order in which they run."""
        return _block_linears(self)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Module name inside a block -> (input features, output features)."""
        return {item.name: (item.in_features, item.out_features) for item in self.block_linears}

    @property
    def norm_parameters(self) -> int:
        return self.hidden * (2 if self.norm == LAYERNORM else 1)

    @property
    def layer_parameters(self) -> int:
        """Parameters of one block: its linears and two norms."""
        return sum(item.num_parameters for item in self.block_linears) + 2 * self.norm_parameters

    @property
    def embedding_parameters(self) -> int:
        return (self.vocab + self.position_rows) * self.hidden

    @property
    def head_parameters(self) -> int:
        """The language-model head; 0 when it shares the embedding's matrix."""
        return 0 if self.tied_embeddings else self.vocab * self.hidden

    @property
    def num_parameters(self) -> int:
        edges = self.embedding_parameters + self.head_parameters + self.norm_parameters
        return self.num_layers * self.layer_parameters + edges

    def target_linears(self, targets: tuple[str, ...]) -> tuple[Linear, ...]:
        """The linears whose name is one of ``targets`` or ends with ``.target`` (PEFT's rule).

        Raises ConfigError when a target matches nothing.
        """
        return _target_linears(self, tuple(targets))


@lru_cache(maxsize=1024)
def _target_linears(shape: ModelShape, targets: tuple[str, ...]) -> tuple[Linear, ...]:
    linears = shape.block_linears
    if targets == ("all-linear",):
        return linears
    for target in targets:
        if not any(_matches(item.name, target) for item in linears):
            known = ", ".join(sorted(item.name.rsplit(".", 1)[-1] for item in linears))
            raise ConfigError(
                "adapter.targets",
                f"'{target}' is no linear layer of {shape.name}",
                f"choose among: {known}",
            )
    return tuple(item for item in linears if any(_matches(item.name, t) for t in targets))


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


@lru_cache(maxsize=256)
def _block_linears(shape: ModelShape) -> tuple[Linear, ...]:
    if shape.fused_qkv:
        return _fused_linears(shape)
    hidden, inner = shape.hidden, shape.intermediate
    qkv_bias, bias = shape.qkv_bias or shape.linear_bias, shape.linear_bias
    output_name, mlp = ("o_proj", "mlp.") if shape.gated_mlp else ("out_proj", "")
    attention = (
        Linear("self_attn.q_proj", hidden, shape.query_dim, "out", qkv_bias),
        Linear("self_attn.k_proj", hidden, shape.kv_dim, "out", qkv_bias),
        Linear("self_attn.v_proj", hidden, shape.kv_dim, "out", qkv_bias),
        Linear(f"self_attn.{output_name}", shape.query_dim, hidden, "in", bias),
    )
    if shape.gated_mlp:
        return (
            *attention,
            Linear(f"{mlp}gate_proj", hidden, inner, "out", bias),
            Linear(f"{mlp}up_proj", hidden, inner, "out", bias),
            Linear(f"{mlp}down_proj", inner, hidden, "in", bias),
        )
    return (
        *attention,
        Linear("fc1", hidden, inner, "out", bias),
        Linear("fc2", inner, hidden, "in", bias),
    )


_FUSED_NAMES = {
    GPT2: ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    GPT_NEOX: (
        "attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h",
    ),
}  # fmt: skip


def _fused_linears(shape: ModelShape) -> tuple[Linear, ...]:
    hidden, inner, bias = shape.hidden, shape.intermediate, shape.linear_bias
    qkv, out, up, down = _FUSED_NAMES[shape.family]
    width = shape.query_dim + 2 * shape.kv_dim
    return (
        Linear(qkv, hidden, width, "out", shape.qkv_bias or bias),
        Linear(out, shape.query_dim, hidden, "in", bias),
        Linear(up, hidden, inner, "out", bias),
        Linear(down, inner, hidden, "in", bias),
    )


def _opt(name: str, layers: int, hidden: int, heads: int) -> ModelShape:
    return ModelShape(
        name, layers, hidden, heads, heads, hidden // heads, 4 * hidden, 50272,
        gated_mlp=False, tied_embeddings=True, norm=LAYERNORM, qkv_bias=True, linear_bias=True,
        position_rows=2050, family=OPT,
    )  # fmt: skip


def _gpt2(name: str, layers: int, hidden: int, heads: int) -> ModelShape:
    return ModelShape(
        name, layers, hidden, heads, heads, hidden // heads, 4 * hidden, 50257,
        gated_mlp=False, tied_embeddings=True, norm=LAYERNORM, qkv_bias=True, linear_bias=True,
        position_rows=1024, family=GPT2,
    )  # fmt: skip


def _neox(name: str, layers: int, hidden: int, heads: int, vocab: int) -> ModelShape:
    return ModelShape(
        name, layers, hidden, heads, heads, hidden // heads, 4 * hidden, vocab,
        gated_mlp=False, norm=LAYERNORM, qkv_bias=True, linear_bias=True, family=GPT_NEOX,
    )  # fmt: skip


_TABLE = (
    ModelShape("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152, tied_embeddings=True),
    ModelShape("llama-2-7b", 32, 4096, 32, 32, 128, 11008, 32000),
    ModelShape("llama-2-13b", 40, 5120, 40, 40, 128, 13824, 32000),
    ModelShape("llama-2-70b", 80, 8192, 64, 8, 128, 28672, 32000),
    ModelShape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256),
    ModelShape("llama-3-70b", 80, 8192, 64, 8, 128, 28672, 128256),
    ModelShape("mistral-7b", 32, 4096, 32, 8, 128, 14336, 32000),
    ModelShape("qwen2.5-7b", 28, 3584, 28, 4, 128, 18944, 152064, qkv_bias=True),
    _opt("opt-125m", 12, 768, 12),
    _opt("opt-1.3b", 24, 2048, 32),
    _opt("gpt-2.7b", 32, 2560, 32),
    _opt("opt-6.7b", 32, 4096, 32),
    _opt("opt-13b", 40, 5120, 40),
    _opt("opt-30b", 48, 7168, 56),
    _gpt2("gpt2", 12, 768, 12),
    _gpt2("gpt2-xl", 48, 1600, 25),
    _neox("pythia-1.4b", 24, 2048, 16, 50304),
    _neox("gpt-neox-20b", 44, 6144, 64, 50432),
)
MODEL_SHAPES: dict[str, ModelShape] = {shape.name: shape for shape in _TABLE}
_ALIASES = {
    "llama2-7b": "llama-2-7b", "llama2-13b": "llama-2-13b", "llama2-70b": "llama-2-70b",
    "llama-3-8b": "llama-3.1-8b",
    "llama3-8b": "llama-3.1-8b", "llama3.1-8b": "llama-3.1-8b", "llama3-70b": "llama-3-70b",
    "llama-3.1-70b": "llama-3-70b", "gpt2.7b": "gpt-2.7b", "gpt3-2.7b": "gpt-2.7b",
    "opt-2.7b": "gpt-2.7b", "smollm2": "smollm2-135m", "meta-llama-3.1-8b": "llama-3.1-8b",
}  # fmt: skip


def normalise_model_name(name: str) -> str:
    """Lower case, without organisation and without suffixes that do not change the shape."""
    short = name.rsplit("/", 1)[-1].strip().lower().replace("_", "-").replace(" ", "-")
    short = _VARIANTS.sub("", short)
    return _ALIASES.get(short, short)


def model_shape(name: str) -> ModelShape:
    """A built-in shape by name, organisation prefix and ``-instruct``-like suffixes ignored.

    Raises ConfigError, listing the known names, for an unknown one.
    """
    key = normalise_model_name(name)
    if key in MODEL_SHAPES:
        return MODEL_SHAPES[key]
    close = difflib.get_close_matches(key, MODEL_SHAPES, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    known = ", ".join(sorted(MODEL_SHAPES))
    raise ConfigError(
        "model", f"the shape of '{name}' is not known", f"{hint}choose one of: {known}"
    )


def from_hf_config(config: object, name: str = "") -> ModelShape:
    """The shape that a Hugging Face config (or any object with its attributes) describes.

    Raises ConfigError naming the attribute that is missing or wrong.
    """
    hidden = _field(config, "hidden_size", "n_embd")
    heads = _field(config, "num_attention_heads", "n_head")
    model_type = str(getattr(config, "model_type", ""))
    gated = _is_gated(config, model_type)
    learned = model_type in {OPT, GPT2}
    plain = learned or model_type == GPT_NEOX
    layer_norm = plain or (not gated and hasattr(config, "layer_norm_elementwise_affine"))
    attention_bias = bool(getattr(config, "attention_bias", False))
    positions = _field(config, "max_position_embeddings", "n_positions") if learned else 0
    shape = ModelShape(
        name=name or str(getattr(config, "_name_or_path", "")) or model_type or "model",
        num_layers=_field(config, "num_hidden_layers", "n_layer"),
        hidden=hidden,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or hidden // heads,
        intermediate=_intermediate(config, hidden),
        vocab=_field(config, "vocab_size"),
        gated_mlp=gated,
        tied_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        norm=LAYERNORM if layer_norm else RMSNORM,
        qkv_bias=learned or model_type == "qwen2" or attention_bias,
        linear_bias=plain,
        position_rows=positions + 2 if model_type == OPT else positions,
        family=model_type if plain else LLAMA if gated else OPT,
    )
    return checked_shape(shape)


def _intermediate(config: object, hidden: int) -> int:
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        value = getattr(config, name, None)
        if value:
            return int(value)
    return 4 * hidden


def _is_gated(config: object, model_type: str) -> bool:
    if model_type:
        return model_type in _GATED_TYPES
    return str(getattr(config, "hidden_act", "silu")) in {"silu", "swish"}


def _field(config: object, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    raise ConfigError(
        f"model config.{names[0]}", "is missing", "pass the config of a dense decoder model"
    )


def checked_shape(shape: ModelShape) -> ModelShape:
    """The shape itself; ConfigError when a dimension is not positive or heads do not divide."""
    for name in ("num_layers", "hidden", "num_heads", "num_kv_heads", "head_dim", "intermediate"):
        if getattr(shape, name) < 1:
            raise ConfigError(f"model.{name}", f"is {getattr(shape, name)}", "give at least 1")
    if shape.family not in FAMILIES:
        raise ConfigError(
            "model.family", f"is '{shape.family}'", f"choose one of: {', '.join(FAMILIES)}"
        )
    if shape.num_heads % shape.num_kv_heads:
        raise ConfigError(
            "model.num_kv_heads",
            f"{shape.num_kv_heads} does not divide num_heads {shape.num_heads}",
            "query heads are shared evenly by the key-value heads",
        )
    return shape
