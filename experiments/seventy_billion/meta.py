"""Parameter counts and shard sizes by construction: the real modules on the meta device, cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from muxtune.cost.memory import MemoryModel, memory_options, stage_layers
from muxtune.cost.shapes import ModelShape, model_shape
from muxtune.types import ReplicaShape

ROW_CUT = ("o_proj.weight", "down_proj.weight")  # inputs are cut; all other linears' outputs


def build(shape: ModelShape) -> LlamaForCausalLM:
    """The transformers model of a Llama shape, without memory."""
    config = LlamaConfig(
        num_hidden_layers=shape.num_layers, hidden_size=shape.hidden,
        num_attention_heads=shape.num_heads, num_key_value_heads=shape.num_kv_heads,
        intermediate_size=shape.intermediate, vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied_embeddings,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def check_shards(model: str, replicas: Sequence[ReplicaShape]) -> dict[str, Any]:
    """Cuts every parameter of the meta model for each replica shape and adds up the bytes of each
    stage's rank 0. Raises AssertionError where the memory model or the shape says otherwise."""
    shape = model_shape(model)
    tensors = {name: tuple(item.shape) for name, item in build(shape).named_parameters()}
    count = sum(_size(dims) for dims in tensors.values())
    assert count == shape.num_parameters, (count, shape.num_parameters)
    memory = MemoryModel(shape, memory_options(shape, "gpu"))
    shards = []
    for replica in replicas:
        if shape.num_kv_heads % replica.tp:
            continue
        for stage in range(replica.pp):
            held = sum(_shard(name, dims, replica, stage, shape) for name, dims in tensors.items())
            said = memory.backbone_bytes(replica, stage)
            assert held * shape.weight_bytes == said, (replica, stage, held, said)
            shards.append({**replica._asdict(), "stage": stage, "bytes": said})
    return {"parameters": count, "shards": shards}


def _size(dims: Sequence[int]) -> int:
    total = 1
    for size in dims:
        total *= size
    return total


def _shard(
    name: str, dims: tuple[int, ...], replica: ReplicaShape, stage: int, shape: ModelShape
) -> int:
    """Numbers of one parameter that rank 0 of a stage holds; 0 if another stage has it."""
    if _stage_of(name, replica.pp, shape) != stage:
        return 0
    if len(dims) == 1:  # norms are on every rank
        return dims[0]
    cut = 1 if name.endswith(ROW_CUT) else 0
    assert dims[cut] % replica.tp == 0, (name, dims, replica)
    return _size(dims) // replica.tp


def _stage_of(name: str, num_stages: int, shape: ModelShape) -> int:
    if not name.startswith("model.layers."):
        return 0 if name.startswith("model.embed") else num_stages - 1
    layer, first = int(name.split(".")[2]), 0
    for stage, layers in enumerate(stage_layers(shape, num_stages)):
        first += layers
        if layer < first:
            return stage
    raise ValueError(name)
