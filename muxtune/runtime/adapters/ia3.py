"""IA3 (Liu et al. 2022, arXiv 2205.05638): y = (x W^T + b) * l, or (x * l) W^T + b.

The input form is for feed-forward targets: option ``feedforward_modules``, a list of targets; by
default those targets whose names PEFT takes for feed-forward in the models it knows. Rank and
alpha have no meaning.

A slot has room for both forms, so that what a slot can hold does not depend on options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from muxtune.errors import ConfigError
from muxtune.runtime.adapters.checks import check_no_dropout, check_options
from muxtune.runtime.adapters.contract import AdapterMethod, Parameters
from muxtune.runtime.adapters.scaling import scale_rows
from muxtune.runtime.linear import BaseLinear, LinearSite
from muxtune.types import AdapterSlot, AdapterSpec

if TYPE_CHECKING:
    from muxtune.runtime.bank import SitePool
    from muxtune.runtime.passes import AdapterPass

IN, OUT = "ia3_in", "ia3_out"
FEEDFORWARD_OPTION = "feedforward_modules"
FEEDFORWARD_NAMES = ("down_proj", "fc2", "dense_4h_to_h", "mlp.c_proj", "wo", "w2")


class IA3(AdapterMethod):
    name = "ia3"

    def check(self, spec: AdapterSpec) -> None:
        check_no_dropout(spec)
        check_options(spec)
        _feedforward(spec)

    def shapes(self, slot: AdapterSlot, site: LinearSite) -> dict[str, tuple[int, int]]:
        return {IN: (1, site.in_features), OUT: (1, site.out_features)}

    def initialise(
        self,
        spec: AdapterSpec,
        site: LinearSite,
        generator: Generator,
        weight_OD: Tensor | None = None,
    ) -> dict[str, Tensor]:
        if reads_input(spec, site.name):
            return {IN: torch.ones(1, site.in_features)}
        return {OUT: torch.ones(1, site.out_features)}

    def dispatch(
        self, x_TD: Tensor, base: BaseLinear, pool: SitePool, current: AdapterPass
    ) -> Tensor:
        vectors = pool.parameters[IN]
        return scale_rows(x_TD, vectors, current) if any(vectors.owned) else x_TD

    def aggregate(
        self, x_TD: Tensor, y_TO: Tensor, base: BaseLinear, pool: SitePool, current: AdapterPass
    ) -> Tensor:
        vectors = pool.parameters[OUT]
        return scale_rows(y_TO, vectors, current) if any(vectors.owned) else y_TO

    def to_peft(self, site_name: str, parameters: Parameters) -> dict[str, Tensor]:
        vector = parameters[IN] if IN in parameters else parameters[OUT].T
        return {f"base_model.model.{site_name}.ia3_l": vector}

    def from_peft(
        self, slot: AdapterSlot, site: LinearSite, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT keeps an input's vector as a row, an output's as a column."""
        vector = tensors[f"base_model.model.{site.name}.ia3_l"].float()
        if vector.shape[0] == 1:
            return {IN: vector}
        return {OUT: vector.T.contiguous()}

    def peft_config(self, spec: AdapterSpec, sites: Sequence[LinearSite]) -> dict[str, Any]:
        return {
            "peft_type": "IA3",
            "target_modules": list(spec.targets),
            "feedforward_modules": list(_feedforward(spec)),
            "fan_in_fan_out": False,
            "init_ia3_weights": True,
        }


def reads_input(spec: AdapterSpec, site_name: str) -> bool:
    """Whether the vector is over the site's inputs."""
    return any(site_name.endswith(name) for name in _feedforward(spec))


def _feedforward(spec: AdapterSpec) -> tuple[str, ...]:
    """Names, as PEFT matches them: a site is feed-forward when its name ends with one."""
    everywhere = spec.targets == ("all-linear",)
    given = spec.options.get(FEEDFORWARD_OPTION)
    if given is None:
        if everywhere:
            return FEEDFORWARD_NAMES
        return tuple(target for target in spec.targets if target.endswith(FEEDFORWARD_NAMES))
    field = f"adapter.options.{FEEDFORWARD_OPTION}"
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
        raise ConfigError(field, f"is {given!r}", "Give a list of targets")
    stray = ", ".join(sorted(set(given) - set(spec.targets)))
    if stray and not everywhere:
        raise ConfigError(field, f"names {stray}, which is no target", "Add it to the targets")
    return tuple(given)
