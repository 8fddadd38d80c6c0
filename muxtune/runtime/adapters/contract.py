"""What an adapter method is to the runtime. A method is one file: add it to ``METHODS``.

A method owns the parameters that it adds at a site (a frozen linear), their start values, what it
does to its slots' rows, and the translation to and from PEFT's file format. Where its parameters
live, their gradients, optimizer, checkpoints and migration are the bank's business and the same
for all methods.

At a site a pass runs three stages (``site.SiteMethods``), each once for ALL slots:

- Dispatch: each method of the site may change what the frozen product reads;
- BaseOp with the low-rank factors of every slot that has them (parameters ``lora_A`` and
  ``lora_B``, shared by all methods that use low-rank factors), fused into one op;
- Aggregate: each method of the site may change what comes out.

So the number of ops at a site depends on the number of methods present, not on that of tasks. A
method touches the rows of its own slots only and leaves all others bit by bit the same.

Methods that put virtual tokens before the sequences (``Place.ATTENTION``, ``Place.EMBEDDING``) have
no stages: the attention reads their parameters (``runtime.prepended``).

Parameters are matrices whose rows are concatenated over the slots of a pool (pool form). Slots of
other methods have no rows. A slot may be larger than its task: its spare rows are zero, and at
sites that the task does not target ``ParameterPool.owned`` is false.

Shape suffixes: T rows of the micro-batch, D input features, O output features.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Generator, Tensor

from muxtune.runtime.linear import BaseLinear, LinearSite
from muxtune.types import AdapterSlot, AdapterSpec

if TYPE_CHECKING:
    from muxtune.runtime.bank import SitePool
    from muxtune.runtime.passes import AdapterPass

Parameters = Mapping[str, Tensor]  # parameter name -> [rows, width], pool form


class Place(enum.Enum):
    """Where a method's parameters sit: at the linears that a task targets, at every attention
    (its sites are the attention modules, as wide as a token's keys), or at the embedding."""

    LINEAR = enum.auto()
    ATTENTION = enum.auto()
    EMBEDDING = enum.auto()


class AdapterMethod(Protocol):
    """A PEFT method in the form BaseOp + Dispatch + Adapter + Aggregate.

    Inherit from it: both stages do nothing unless they are overridden.
    """

    name: str
    place: Place = Place.LINEAR

    def check(self, spec: AdapterSpec) -> None:
        """Raises ConfigError for settings that the method does not take."""
        ...

    def shapes(self, slot: AdapterSlot, site: LinearSite) -> dict[str, tuple[int, int]]:
        """Parameter name -> (rows, width) that one slot needs at a site it targets. Every task
        that fits the slot must find its parameters here, whatever its options."""
        ...

    def scale(self, spec: AdapterSpec) -> float:
        """The factor of the low-rank product; 1 for methods without one."""
        return 1.0

    def initialise(
        self,
        spec: AdapterSpec,
        site: LinearSite,
        generator: Generator,
        weight_OD: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Start values as PEFT draws them, float32, on the CPU. ``weight_OD``: the frozen
        weight, for methods that start from it."""
        ...

    def dispatch(
        self, x_TD: Tensor, base: BaseLinear, pool: SitePool, current: AdapterPass
    ) -> Tensor:
        """What the frozen product reads; [T, D]."""
        return x_TD

    def aggregate(
        self, x_TD: Tensor, y_TO: Tensor, base: BaseLinear, pool: SitePool, current: AdapterPass
    ) -> Tensor:
        """What leaves the site, from the frozen and low-rank products' sum; [T, O]. ``x_TD``: what
        the frozen product has read."""
        return y_TO

    def save(self, parameters: Mapping[str, Parameters]) -> dict[str, Tensor]:
        """The saved folder's tensors, from the parameters of each site by name."""
        tensors: dict[str, Tensor] = {}
        for site_name, values in parameters.items():
            tensors.update(self.to_peft(site_name, values))
        return tensors

    def load(
        self, slot: AdapterSlot, sites: Sequence[LinearSite], tensors: Mapping[str, Tensor]
    ) -> dict[str, dict[str, Tensor]]:
        """The inverse of ``save``. Raises KeyError for a tensor that is missing."""
        return {site.name: dict(self.from_peft(slot, site, tensors)) for site in sites}

    def to_peft(self, site_name: str, parameters: Parameters) -> dict[str, Tensor]:
        """One site's state dict entries as PEFT names and shapes them, adapter name left out."""
        raise TypeError(f"{self.name} keeps all sites in one tensor")

    def from_peft(
        self, slot: AdapterSlot, site: LinearSite, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The inverse of ``to_peft``. Raises KeyError for a tensor that is missing."""
        raise TypeError(f"{self.name} keeps all sites in one tensor")

    def peft_config(self, spec: AdapterSpec, sites: Sequence[LinearSite]) -> dict[str, Any]:
        """The method's own entries of ``adapter_config.json``. ``spec.targets`` are names."""
        ...
