"""The frozen weights of a Llama-family backbone, with Q, K, V and gate, up each as one matrix.

Shape suffixes as in the package.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from muxtune_kernels.block import Heads

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
PARENTS = ("self_attn", "self_attn", "mlp", "mlp")


class Unsupported(Exception):
    """This backbone or plan has no static step; the message says why."""


EMBEDDING = "model.embed_tokens"  # its site, in every architecture of ``check_architecture``


class FusedLinear(NamedTuple):
    """Linears that read the same input, one below the other. ``names``: the members' sites."""

    names: tuple[str, ...]
    weight_OD: Tensor
    bias_O: Tensor | None
    out_features: tuple[int, ...]


class Block(NamedTuple):
    """``linears``: QKV, attention output, gate and up, down."""

    linears: tuple[FusedLinear, ...]
    attention_norm_D: Tensor
    mlp_norm_D: Tensor


class StaticModel(NamedTuple):
    """``cos_LP``, ``sin_LP``: float32 rotary tables."""

    blocks: tuple[Block, ...]
    embedding_VD: Tensor
    final_norm_D: Tensor
    lm_head_VD: Tensor
    heads: Heads
    eps: float
    cos_LP: Tensor
    sin_LP: Tensor

    @property
    def device(self) -> torch.device:
        return self.embedding_VD.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding_VD.dtype

    @classmethod
    def of(cls, model: Any, max_positions: int) -> StaticModel:
        """From a causal language model of transformers. Its linears' weights become views of the
        fused ones, so no second copy is kept. Raises Unsupported for another architecture."""
        check_architecture(model)
        base = model.base_model
        return cls(
            blocks_of(model, range(len(base.layers))),
            base.embed_tokens.weight.detach(),
            base.norm.weight.detach(),
            model.get_output_embeddings().weight.detach(),
            heads_of(model.config),
            model.config.rms_norm_eps,
            *rotary_tables(base, max_positions),
        )


def check_architecture(model: Any) -> None:
    """Raises Unsupported unless the model is a plain Llama-family decoder."""
    kind = getattr(model.config, "model_type", "")
    if kind not in ("llama", "mistral", "qwen2"):
        raise Unsupported(f"the static step knows no '{kind}' blocks (llama, mistral, qwen2 only)")
    if getattr(model.config, "hidden_act", "silu") != "silu":
        raise Unsupported(f"the static step knows no '{model.config.hidden_act}' activation")
    rotary = getattr(model.base_model.rotary_emb, "rope_type", "default")
    if rotary in ("dynamic", "longrope"):
        raise Unsupported(f"the static step knows no '{rotary}' rotary embedding")
    layer = model.base_model.layers[0]
    if hasattr(layer.self_attn, "q_norm"):
        raise Unsupported("the static step knows no query and key norms")


def blocks_of(model: Any, layers: range) -> tuple[Block, ...]:
    """Their linears' weights become views of the fused ones."""
    return tuple(_block(f"model.layers.{i}", model.base_model.layers[i]) for i in layers)


def heads_of(config: Any, parts: int = 1) -> Heads:
    """Of one of so many equal parts of the model's heads."""
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // queries
    return Heads(queries // parts, keys // parts, head_dim)


def _block(name: str, layer: Any) -> Block:
    fused = []
    for parent_name, members in zip(PARENTS, GROUPS, strict=True):
        parent = getattr(layer, parent_name)
        names = tuple(f"{name}.{parent_name}.{member}" for member in members)
        fused.append(_fuse(names, [getattr(parent, member) for member in members]))
    return Block(
        tuple(fused),
        layer.input_layernorm.weight.detach(),
        layer.post_attention_layernorm.weight.detach(),
    )


def _fuse(names: tuple[str, ...], linears: list[nn.Module]) -> FusedLinear:
    weights: list[Any] = [linear.weight for linear in linears]
    biases: list[Any] = [linear.bias for linear in linears]
    widths = tuple(weight.shape[0] for weight in weights)
    if len(linears) == 1:
        bias_O = None if biases[0] is None else biases[0].detach()
        return FusedLinear(names, weights[0].detach(), bias_O, widths)
    weight_OD = torch.cat([weight.detach() for weight in weights])
    for weight, part in zip(weights, weight_OD.split(widths), strict=True):
        weight.data = part
    for linear in linears:
        _follow(linear)
    bias_O = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
    return FusedLinear(names, weight_OD, bias_O, widths)


def _follow(linear: Any) -> None:
    """A multi-task linear keeps a detached view of its weight: let it follow."""
    if hasattr(linear, "base"):
        linear.base = linear.base._replace(weight_OD=linear.weight.detach())


def rotary_tables(base: Any, max_positions: int) -> tuple[Tensor, Tensor]:
    """As the model's own rotary module gives them, in float32."""
    rotary = base.rotary_emb
    device = rotary.inv_freq.device
    like = torch.zeros(1, dtype=torch.float32, device=device)
    cos, sin = rotary(like, torch.arange(max_positions, device=device)[None])
    half = cos.shape[-1] // 2
    return cos[0, :, :half].float().contiguous(), sin[0, :, :half].float().contiguous()
