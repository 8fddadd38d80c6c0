"""What the layers of a backbone need to know of the micro-batch that runs through them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from muxtune_kernels import RowDropout, SlotRows

if TYPE_CHECKING:
    from muxtune.runtime.bank import ParameterPool, SlotPool


@dataclass
class AdapterPass:
    """One micro-batch's adapters: the pool, and which slot owns which rows.

    ``deterministic``: row sums of the adapters' gradients in float64, so that they do not depend
    on how the rows were packed. Gradients are staged here and committed to the pool only when
    the whole backward is through: a pass that fails half-way leaves no trace.
    """

    pool: SlotPool
    rows: SlotRows
    dropout: RowDropout | None
    deterministic: bool
    anchor: Tensor | None = None  # ties an op to autograd whose inputs need no gradient
    leaves: list[tuple[ParameterPool, Tensor]] = field(default_factory=list)
    staged: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def leaf(self, parameters: ParameterPool) -> Tensor:
        """The pool's weights as a leaf of this pass's autograd graph; [R, W]."""
        leaf_RW = parameters.param_RW.detach().requires_grad_(self.anchor is not None)
        self.leaves.append((parameters, leaf_RW))
        return leaf_RW

    def stage(self, parameters: ParameterPool, pool_rows: slice, grad_rW: Tensor) -> None:
        """A gradient of some rows of a pool, to be added when all is through."""
        self.staged.append((parameters.grad_RW[pool_rows], grad_rW))

    def commit(self) -> None:
        """Add this pass's gradients to the accumulated ones."""
        for target_rW, grad_rW in self.staged:
            target_rW.add_(grad_rW)
        for parameters, leaf_RW in self.leaves:
            if leaf_RW.grad is not None:
                parameters.grad_RW.add_(leaf_RW.grad)
        self.staged.clear()
        self.leaves.clear()


@dataclass
class PassState:
    """Shared by all layers of a backbone. ``current`` is None outside of a pass: base op only."""

    current: AdapterPass | None = None
