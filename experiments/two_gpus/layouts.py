"""Random weights of one rank's part of a Llama: the same values under every layout.

Shape suffixes: D input features, O output features, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from muxtune.cost.shapes import ModelShape
from muxtune.runtime.distributed.layout import cut_of, layers_of
from muxtune.runtime.distributed.static_stage import StagePart
from muxtune.runtime.static_step.adapters import AdapterPools
from muxtune.runtime.static_step.model import Block, FusedLinear, StaticModel
from muxtune.types import ReplicaShape
from muxtune_kernels.block import Heads

GROUPS = (
    ("self_attn", ("q_proj", "k_proj", "v_proj")),
    ("self_attn", ("o_proj",)),
    ("mlp", ("gate_proj", "up_proj")),
    ("mlp", ("down_proj",)),
)
MAX_POSITIONS = 4096


def drawn(name: str, shape: tuple[int, ...], scale: float, device: torch.device) -> Tensor:
    """Normal numbers that depend on the name alone."""
    seed = int.from_bytes(hashlib.blake2s(name.encode(), digest_size=6).digest(), "big")
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).mul_(scale)


class Weights:
    """Of one rank."""

    def __init__(
        self, shape: ModelShape, replica: ReplicaShape, stage: int, part: int,
        device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.shape, self.replica, self.stage, self.part = shape, replica, stage, part
        self.device, self.dtype = device, dtype
        self.layers = layers_of(shape, replica.pp, stage)
        self.sizes = {item.name.rsplit(".", 1)[-1]: (item.in_features, item.out_features)
                      for item in shape.block_linears}  # fmt: skip

    def stage_part(self, tp: Any = None, step: Any = None) -> StagePart:
        is_last = self.stage == self.replica.pp - 1
        return StagePart(self._model(is_last), self.layers, self.stage == 0, is_last, tp, step)

    def _model(self, is_last: bool) -> StaticModel:
        shape, tp = self.shape, self.replica.tp
        width, vocab = shape.hidden, shape.vocab
        rows = vocab if self.stage == 0 else 1
        embedding_VD = drawn("embedding", (rows, width), 1.0, self.device).to(self.dtype)
        head_rows = vocab if is_last else 1
        head_VD = drawn("head", (head_rows, width), width**-0.5, self.device).to(self.dtype)
        ones_D = torch.ones(width, dtype=self.dtype, device=self.device)
        blocks = tuple(
            Block(tuple(self._linear(i, *group) for group in GROUPS), ones_D, ones_D)
            for i in self.layers
        )
        heads = Heads(shape.num_heads // tp, shape.num_kv_heads // tp, shape.head_dim)
        cos_LP, sin_LP = _rotary(shape.head_dim, self.device)
        return StaticModel(blocks, embedding_VD, ones_D, head_VD, heads, 1e-5, cos_LP, sin_LP)

    def _linear(self, layer: int, parent: str, members: tuple[str, ...]) -> FusedLinear:
        names = tuple(f"model.layers.{layer}.{parent}.{member}" for member in members)
        weights = [self._whole(name)[self._slices(name)].to(self.dtype) for name in names]
        widths = tuple(weight.shape[0] for weight in weights)
        return FusedLinear(names, torch.cat(weights).contiguous(), None, widths)

    def _whole(self, name: str) -> Tensor:
        inputs, outputs = self.sizes[name.rsplit(".", 1)[-1]]
        return drawn(name, (outputs, inputs), inputs**-0.5, self.device)

    def _cut(self, name: str) -> Any:
        return cut_of(name, *self.sizes[name.rsplit(".", 1)[-1]], self.part, self.replica.tp)

    def _slices(self, name: str) -> tuple[slice, slice]:
        cut = self._cut(name)
        own = slice(cut.start, cut.stop) if cut.axis else slice(None)
        return (own, slice(None)) if cut.axis != "in" else (slice(None), own)

    @torch.no_grad()
    def fill_adapters(self, pools: AdapterPools, tasks: Sequence[int]) -> None:
        """Both factors random, so that every gradient is there from the first step on."""
        for slot, task in enumerate(tasks):
            for name, a, b in pools.views(slot):
                inputs, outputs = self.sizes[name.rsplit(".", 1)[-1]]
                rank, cut = a[0].shape[0], self._cut(name)
                for letter, tensors, size in (("A", a, inputs), ("B", b, outputs)):
                    key = f"{name}/{letter}/{task}"
                    scale = size**-0.5 if letter == "A" else 1e-3
                    whole = drawn(key, (rank, size), scale, self.device)
                    columns = cut.of_parameter(f"lora_{letter}") or slice(None)
                    tensors[0].copy_(whole[:, columns])


def _rotary(head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """float32 tables [L, P] of Llama's rotary embedding."""
    half = torch.arange(0, head_dim, 2, device=device).float() / head_dim
    angle_LP = torch.arange(MAX_POSITIONS, device=device)[:, None] * 10000.0 ** -half[None]
    return angle_LP.cos().contiguous(), angle_LP.sin().contiguous()
