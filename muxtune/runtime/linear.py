"""The unified PEFT layer: BaseOp + Dispatch + Adapter + Aggregate on one frozen linear.

Every adaptable linear of a backbone is replaced ONCE by a ``MultiTaskLinear``. What it adds to
the frozen product is decided by the pass that runs: a pool of adapter slots and the rows that
each slot owns. So tasks join, leave and move without the model being touched.

Shape suffixes: T rows, D input features, O output features.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from muxtune.runtime.passes import PassState


# Linears that read the same input drop the same features of it, so that they can be computed as
# one: each counts as the first of them.
_SHARES_MASK = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


class LinearSite(NamedTuple):
    """An adaptable linear. ``key`` names it in dropout masks: stable across runs and machines,
    and the same for linears that read the same input.
    ``fan_in_fan_out``: it is a Conv1D, whose own weight is [D, O].
    ``first_feature``: of the whole linear's input, where this is a part of one.

    Methods that adapt no linear have sites of the same form: an attention module, as wide as a
    token's keys in all their ``num_heads`` heads, or the embedding, as wide as its rows."""

    name: str
    in_features: int
    out_features: int
    key: int
    fan_in_fan_out: bool = False
    first_feature: int = 0
    num_heads: int = 0


class BaseLinear(NamedTuple):
    """The frozen operator at a site."""

    site: LinearSite
    weight_OD: Tensor
    bias_O: Tensor | None


def module_key(name: str) -> int:
    """31 bits of a hash of the module's name, the ``module_key`` of the dropout masks."""
    parent, dot, last = name.rpartition(".")
    name = parent + dot + _SHARES_MASK.get(last, last)
    return int.from_bytes(hashlib.blake2s(name.encode(), digest_size=4).digest(), "big") >> 1


def is_adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """The linear of GPT-2 in transformers, with the weight the other way round."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


class MultiTaskLinear(nn.Module):
    """A frozen linear that adds each row's own adapter. ``state`` is shared by all of them."""

    def __init__(self, name: str, linear: nn.Module, state: PassState) -> None:
        super().__init__()
        source: Any = linear
        swapped = _is_conv1d(linear)
        weight_OD = source.weight.detach()
        if swapped:
            # One copy, in the order that the kernels read; the model's own name keeps its order.
            weight_OD = weight_OD.T.contiguous()
            source.weight.data = weight_OD.T
        self.weight, self.bias, self.state = source.weight, source.bias, state
        self.out_features, self.in_features = weight_OD.shape
        site = LinearSite(name, self.in_features, self.out_features, module_key(name), swapped)
        self.base = BaseLinear(site, weight_OD, None if self.bias is None else self.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., O]; leading dimensions together are the rows of the pass."""
        current = self.state.current
        site_pool = None if current is None else current.pool.sites.get(self.base.site.name)
        if site_pool is None:
            return functional.linear(x, self.base.weight_OD, self.base.bias_O)
        assert current is not None
        x_TD = x.reshape(-1, self.in_features)
        y_TO = site_pool.method.linear(x_TD, self.base, site_pool, current)
        return y_TO.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
