"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691): trained embeddings before every sequence.

``rank`` virtual tokens; the sequence's own count their positions from ``rank`` on. The virtual
tokens see only each other, so a pass computes them once for all sequences of the task, in rows
below those of the micro-batch; see ``runtime.prepended``. A row carries a loss where the task's
data says so, never a virtual token. Alpha has no meaning; no targets, no dropout.
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
from muxtune.runtime.adapters.prefix import SAVED
from muxtune.runtime.linear import LinearSite
from muxtune.types import AdapterSlot, AdapterSpec

PROMPT = "prompt"


class Prompt(AdapterMethod):
    name = "prompt"
    place = Place.EMBEDDING

    def check(self, spec: AdapterSpec) -> None:
        check_rank(spec)
        check_no_dropout(spec)
        check_no_targets(spec)
        check_options(spec)

    def shapes(self, slot: AdapterSlot, site: LinearSite) -> dict[str, tuple[int, int]]:
        return {PROMPT: (slot.rank, site.out_features)}

    def initialise(
        self,
        spec: AdapterSpec,
        site: LinearSite,
        generator: Generator,
        weight_OD: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Standard normal, as PEFT with ``prompt_tuning_init=RANDOM``."""
        return {PROMPT: torch.randn(spec.rank, site.out_features, generator=generator)}

    def to_peft(self, site_name: str, parameters: Parameters) -> dict[str, Tensor]:
        return {SAVED: parameters[PROMPT]}

    def from_peft(
        self, slot: AdapterSlot, site: LinearSite, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return {PROMPT: tensors[SAVED].float()}

    def peft_config(self, spec: AdapterSpec, sites: Sequence[LinearSite]) -> dict[str, Any]:
        return {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": spec.rank,
            "token_dim": sites[0].out_features,
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",
        }
