"""Prefix tuning (Li and Liang 2021, arXiv 2101.00190): trained keys and values of every attention.

Each sequence of the task attends to ``rank`` virtual tokens before its own: their keys and values
are the parameters themselves, one matrix each a layer, not rotated; tokens count their positions
from ``rank`` on, as in PEFT. No projection network. Alpha has no meaning; no targets, no dropout.

Prefixes take no rows of a pass; see ``runtime.prepended``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from muxtune.runtime.adapters.checks import (
    check_no_dropout,
    check_no_targets,
    check_options,
    check_rank,
)
from muxtune.runtime.adapters.contract import AdapterMethod, Parameters, Place
from muxtune.runtime.linear import LinearSite
from muxtune.types import AdapterSlot, AdapterSpec

KEY, VALUE = "prefix_key", "prefix_value"
SAVED = "prompt_embeddings"


class Prefix(AdapterMethod):
    name = "prefix"
    place = Place.ATTENTION

    def check(self, spec: AdapterSpec) -> None:
        check_rank(spec)
        check_no_dropout(spec)
        check_no_targets(spec)
        check_options(spec)

    def shapes(self, slot: AdapterSlot, site: LinearSite) -> dict[str, tuple[int, int]]:
        return {KEY: (slot.rank, site.out_features), VALUE: (slot.rank, site.out_features)}

    def initialise(
        self,
        spec: AdapterSpec,
        site: LinearSite,
        generator: Generator,
        weight_OD: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Standard normal, as PEFT's embedding of the prefix."""
        shape = (spec.rank, site.out_features)
        return {name: torch.randn(shape, generator=generator) for name in (KEY, VALUE)}

    def save(self, parameters: Mapping[str, Parameters]) -> dict[str, Tensor]:
        """One matrix [virtual tokens, layers * 2 * width]: each layer's keys, then its values."""
        columns = [site[name] for site in parameters.values() for name in (KEY, VALUE)]
        return {SAVED: torch.cat(columns, dim=1)}

    def load(
        self, slot: AdapterSlot, sites: Sequence[LinearSite], tensors: Mapping[str, Tensor]
    ) -> dict[str, dict[str, Tensor]]:
        parts = tensors[SAVED].float().chunk(2 * len(sites), dim=1)
        return {
            site.name: {KEY: parts[2 * at].contiguous(), VALUE: parts[2 * at + 1].contiguous()}
            for at, site in enumerate(sites)
        }

    def peft_config(self, spec: AdapterSpec, sites: Sequence[LinearSite]) -> dict[str, Any]:
        return {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": spec.rank,
            "token_dim": sites[0].out_features,
            "num_attention_heads": sites[0].num_heads,
            "num_layers": len(sites),
            "num_transformer_submodules": 1,
            "encoder_hidden_size": sites[0].out_features,
            "prefix_projection": False,
        }
