"""A stage's forward and backward by halves of layers, with autograd inside each half.

No autograd graph crosses a half: the residual stream goes in and out as plain tensors, and what a
half adds to it is a part of a sum where its ranks share the work. So whoever schedules may put an
exchange, or another micro-batch, between any two halves.

Shape suffixes: T rows of a micro-batch, D model features, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muxtune.runtime.batch import PassTensors
from muxtune.runtime.distributed.schedule import ATTENTION, Part
from muxtune.runtime.distributed.sharding import StageBackbone
from muxtune.runtime.passes import AdapterPass
from muxtune_kernels import multi_task_cross_entropy, multi_task_nll


class _Half(NamedTuple):
    """What the backward of a half needs: its leaves and what came of them."""

    x_TD: Tensor
    normed_TD: Tensor
    entry_TD: Tensor
    added_TD: Tensor


class _Unsettled(NamedTuple):
    """The gradient of a half's normed input: it must still be summed over the stage's ranks and
    go back through the norm."""

    x_TD: Tensor
    normed_TD: Tensor
    grad_TD: Tensor


@dataclass
class EagerPass:
    """One micro-batch on one stage. ``x_TD + added_TD``: the residual stream so far.
    ``exchanged``: what the next sum over the stage's ranks is of."""

    tensors: PassTensors
    adapters: AdapterPass
    x_TD: Tensor | None = None
    added_TD: Tensor | None = None
    dx_TD: Tensor | None = None
    rotary: Any = None
    halves: dict[Part, _Half] = field(default_factory=dict)
    unsettled: _Unsettled | None = None
    loss_S: Tensor | None = None

    def exchanged(self, backward: bool) -> Tensor:
        tensor = self.added_TD
        if backward:
            tensor = None if self.unsettled is None else self.unsettled.grad_TD
        assert tensor is not None
        return tensor


class EagerStage:
    """Runs passes on what one rank holds of the model."""

    def __init__(self, backbone: StageBackbone, deterministic: bool) -> None:
        self.backbone, self.deterministic = backbone, deterministic
        self.base = backbone.model.base_model

    def begin(self, tensors: PassTensors, pool: Any) -> EagerPass:
        device = self.backbone.device
        anchor = torch.zeros((), device=device, requires_grad=True)
        adapters = AdapterPass(pool, tensors.rows, tensors.dropout, self.deterministic, anchor)
        return EagerPass(tensors, adapters)

    def enter(self, current: EagerPass, received_TD: Tensor | None) -> None:
        """The residual stream: looked up on the first stage, received on the others."""
        if received_TD is None:
            received_TD = self.base.embed_tokens(current.tensors.input_ids_T)
        assert received_TD is not None
        current.x_TD = received_TD.detach()

    def forward(self, current: EagerPass, parts: Sequence[Part]) -> None:
        if current.rotary is None:
            positions = current.tensors.position_ids_T[None]
            current.rotary = self.base.rotary_emb(current.x_TD, positions)
        for part in parts:
            self._forward_half(current, part)

    @torch.no_grad()
    def leave(self, current: EagerPass) -> Tensor:
        """The residual stream for the next stage."""
        assert current.x_TD is not None
        return current.x_TD if current.added_TD is None else current.x_TD + current.added_TD

    def loss(self, current: EagerPass) -> None:
        """Sets the losses by slot and the gradient of the residual stream."""
        x_TD = self.leave(current).requires_grad_()
        with torch.enable_grad():
            loss_S = multi_task_cross_entropy(
                self.base.norm(x_TD),
                self.backbone.lm_head_VD,
                current.tensors.labels_T,
                current.tensors.rows.slot_of_row_T,
                current.tensors.loss_scale_S,
                current.tensors.num_slots,
            )
            if loss_S.requires_grad:
                loss_S.sum().backward()
        current.loss_S = loss_S.detach()
        current.dx_TD = torch.zeros_like(x_TD) if x_TD.grad is None else x_TD.grad

    def scores(self, current: EagerPass) -> tuple[Tensor, Tensor]:
        """Negative log-likelihoods and numbers of targets by slot, on the last stage."""
        return multi_task_nll(
            self.base.norm(self.leave(current)),
            self.backbone.lm_head_VD,
            current.tensors.labels_T,
            current.tensors.rows.slot_of_row_T,
            current.tensors.num_slots,
        )

    def backward(self, current: EagerPass, parts: Sequence[Part]) -> None:
        for part in parts:
            self._settle(current)
            half = current.halves.pop(part)
            torch.autograd.backward(half.added_TD, current.dx_TD)
            assert half.entry_TD.grad is not None
            current.unsettled = _Unsettled(half.x_TD, half.normed_TD, half.entry_TD.grad)

    def gradient(self, current: EagerPass) -> Tensor:
        """Of the residual stream that the stage received."""
        self._settle(current)
        assert current.dx_TD is not None
        return current.dx_TD

    def _forward_half(self, current: EagerPass, part: Part) -> None:
        layer = self.base.layers[part[0]]
        is_attention = part[1] == ATTENTION
        norm = layer.input_layernorm if is_attention else layer.post_attention_layernorm
        x_TD = self.leave(current).detach().requires_grad_()
        with torch.enable_grad():
            normed_TD = norm(x_TD)
            entry_TD = normed_TD.detach().requires_grad_()
            self.backbone.state.current = current.adapters
            try:
                added_TD = self._attend(layer, entry_TD, current) if is_attention else (
                    layer.mlp(entry_TD[None])[0])  # fmt: skip
            finally:
                self.backbone.state.current = None
        if current.adapters.anchor is not None:
            current.halves[part] = _Half(x_TD, normed_TD, entry_TD, added_TD)
        # A copy: the exchange sums it in place, and autograd keeps the original.
        current.x_TD, current.added_TD = x_TD.detach(), added_TD.detach().clone()

    def _attend(self, layer: Any, entry_TD: Tensor, current: EagerPass) -> Tensor:
        out, _ = layer.self_attn(
            hidden_states=entry_TD[None],
            position_embeddings=current.rotary,
            attention_mask=None,
            packed=current.tensors.packed,
        )
        return out[0]

    def _settle(self, current: EagerPass) -> None:
        left, current.unsettled = current.unsettled, None
        if left is None:
            return
        torch.autograd.backward(left.normed_TD, left.grad_TD)
        assert current.dx_TD is not None and left.x_TD.grad is not None
        current.dx_TD = current.dx_TD + left.x_TD.grad
