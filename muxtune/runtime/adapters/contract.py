"""What an adapter method is to the runtime. A method is one file: add it to ``METHODS``.

A method owns the parameters that it adds at a site (a frozen linear), their start values, the
forward over all slots that use it, and the translation to and from PEFT's file format. Where its
parameters live, their gradients, optimizer, checkpoints and migration are the bank's business
and the same for all methods.

Parameters are matrices whose rows are concatenated over the slots of a pool (pool form).

Shape suffixes: T rows of the micro-batch, D input features, O output features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Generator, Tensor

from muxtune.runtime.linear import BaseLinear, LinearSite
from muxtune.types import AdapterSlot, AdapterSpec

if TYPE_CHECKING:
    from muxtune.runtime.bank import SitePool
    from muxtune.runtime.passes import AdapterPass

Parameters = Mapping[str, Tensor]  # parameter name -> [rows, width], pool form


class AdapterMethod(Protocol):
    """A PEFT method in the form BaseOp + Dispatch + Adapter + Aggregate."""

    name: str

    def check(self, spec: AdapterSpec) -> None:
        """Raises ConfigError for settings that the method does not take."""
        ...

    def shapes(self, slot: AdapterSlot, site: LinearSite) -> dict[str, tuple[int, int]]:
        """Parameter name -> (rows, width) that one slot needs at a site it targets."""
        ...

    def scale(self, spec: AdapterSpec) -> float:
        """The factor that Aggregate gives the adapter's output."""
        ...

    def initialise(
        self, spec: AdapterSpec, site: LinearSite, generator: Generator
    ) -> dict[str, Tensor]:
        """Start values as PEFT draws them, float32, on the CPU."""
        ...

    def linear(
        self, x_TD: Tensor, base: BaseLinear, pool: SitePool, current: AdapterPass
    ) -> Tensor:
        """Base product plus every slot's adapter on its own rows; [T, O]."""
        ...

    def to_peft(self, site_name: str, parameters: Parameters) -> dict[str, Tensor]:
        """State dict entries as PEFT names and shapes them, adapter name left out."""
        ...

    def from_peft(
        self, slot: AdapterSlot, site: LinearSite, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The inverse of ``to_peft``. Raises KeyError for a tensor that is missing."""
        ...

    def peft_config(self, spec: AdapterSpec) -> dict[str, Any]:
        """The method's own entries of ``adapter_config.json``."""
        ...
