"""Parameter counts and shard sizes by construction: the runtime's own stages on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from muxtune.cost.memory import MemoryModel, memory_options
from muxtune.cost.shapes import ModelShape, model_shape
from muxtune.runtime.distributed.layout import Layout, Place
from muxtune.runtime.distributed.sharding import StageBackbone
from muxtune.types import ReplicaShape
from muxtune.workload.encoding import Tokenizer

_NO_TEXT = cast(Tokenizer, None)  # nothing is read


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
    """Cuts the meta model as the rank that would train does, for every stage of each replica shape,
    and adds up what the stage's first rank holds. Raises AssertionError where the memory model or
    the shape says otherwise."""
    shape = model_shape(model)
    count = _numbers(build(shape))
    assert count == shape.num_parameters, (count, shape.num_parameters)
    memory = MemoryModel(shape, memory_options(shape, "gpu"))
    shards = []
    for replica in replicas:
        if shape.num_kv_heads % replica.tp:
            continue
        layout = Layout((replica,))
        for place in layout.places[:: replica.tp]:
            held = _numbers(_stage(model, shape, layout, place)) * shape.weight_bytes
            said = memory.backbone_bytes(replica, place.stage)
            assert held == said, (replica, place.stage, held, said)
            shards.append({**replica._asdict(), "stage": place.stage, "bytes": said})
    return {"parameters": count, "shards": shards}


def _stage(name: str, shape: ModelShape, layout: Layout, place: Place) -> nn.Module:
    return StageBackbone(name, build(shape), _NO_TEXT, layout, place, "meta", torch.bfloat16).model


def _numbers(model: nn.Module) -> int:
    """Of a tied matrix once."""
    return sum(parameter.numel() for parameter in model.parameters())
