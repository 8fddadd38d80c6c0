"""A rank's part of a model as the static operations take it, and what they cannot do.

Shape suffixes as in ``muxtune.runtime.static_step``.
"""

from __future__ import annotations

from typing import Any

import torch

from muxtune.runtime.distributed.links import Links
from muxtune.runtime.distributed.sharding import StageBackbone
from muxtune.runtime.distributed.static_stage import StagePart
from muxtune.runtime.runners import HALF, longest_tokens
from muxtune.runtime.static_step.model import (
    StaticModel,
    Unsupported,
    blocks_of,
    heads_of,
    rotary_tables,
)
from muxtune.types import Plan


def stage_part(backbone: StageBackbone, links: Links) -> StagePart:
    """The backbone's linears become views of the fused ones. Raises Unsupported."""
    on_cuda = backbone.device.type == "cuda"
    if on_cuda and backbone.dtype not in HALF:
        raise Unsupported(f"the static step computes no {backbone.dtype} on CUDA")
    model = _stage_model(backbone)
    return StagePart(
        model, backbone.layers, backbone.is_first, backbone.is_last, links.tp, links.step
    )


def _stage_model(backbone: StageBackbone) -> StaticModel:
    """What other stages hold has one row here, or another's place."""
    model: Any = backbone.model
    config, base = model.config, model.base_model
    blocks = blocks_of(model, backbone.layers)
    nothing_1D = torch.zeros((1, config.hidden_size), dtype=backbone.dtype, device=backbone.device)
    first, last = backbone.is_first, backbone.is_last
    return StaticModel(
        blocks,
        base.embed_tokens.weight.detach() if first else nothing_1D,
        base.norm.weight.detach() if last else blocks[0].attention_norm_D,
        model.get_output_embeddings().weight.detach() if last else nothing_1D,
        heads_of(config, backbone.replica.tp),
        config.rms_norm_eps,
        *rotary_tables(base, longest_tokens(config)),
    )


def refusal(plan: Plan) -> str:
    """Why a plan's rounds cannot run as static visits on ranks; empty where they can."""
    if len(plan.replicas) > 1:
        return "several replicas meet for every step"
    if not plan.order and any(shape.tp > 1 and shape.pp > 1 for shape in plan.replicas):
        return "stages of several ranks capture a plan only if it has an order"
    slots = {slot for htask in plan.htasks for slot in htask.shapes[0].slots}
    others = sorted({slot.method for slot in slots} - {"lora"})
    if others:
        return f"ranks capture lora only, not {', '.join(others)}"
    shares_linears = any(replica.tp > 1 for replica in plan.replicas)
    if shares_linears and any(slot.dropout for slot in slots):
        return "ranks that share linears (cluster.tp) capture no dropout"
    if any(shape.recompute for htask in plan.htasks for shape in htask.shapes):
        return "its plan recomputes blocks, which captured stages do not"
    return ""
