"""One parameter of a method other than LoRA at one site, for all slots.

Shape suffixes as in the package; U pool rows, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Four = tuple[Tensor, Tensor, Tensor, Tensor]  # parameter, gradient, first and second moment


def owners(slot_rows: Sequence[int]) -> Tensor:
    """int64 [U]: whose each row is, of slots that have so many."""
    slots = [slot for slot, count in enumerate(slot_rows) for _ in range(count)]
    return torch.tensor(slots, dtype=torch.int64)


class Pool(NamedTuple):
    """One parameter at one site. ``row_of_slot_S``, int64 [S + 1]: a slot's first row, or the
    number of rows where its task has none, as filler's."""

    tensors: Four
    slot_rows: tuple[int, ...]
    row_of_slot_S: Tensor
    slot_of_row_U: Tensor

    @classmethod
    def of(cls, slot_rows: Sequence[int], width: int, device: torch.device) -> Pool:
        rows = sum(slot_rows)
        param, grad, exp_avg, exp_avg_sq = (
            torch.zeros((rows, width), dtype=torch.float32, device=device) for _ in range(4)
        )
        row_of_slot_S = torch.full((len(slot_rows) + 1,), rows, dtype=torch.int64, device=device)
        slot_of_row_U = owners(slot_rows).to(device)
        four = param, grad, exp_avg, exp_avg_sq
        return cls(four, tuple(slot_rows), row_of_slot_S, slot_of_row_U)

    def rows_of(self, slot: int) -> slice:
        start = sum(self.slot_rows[:slot])
        return slice(start, start + self.slot_rows[slot])

    def views(self, slot: int) -> Four:
        rows = self.rows_of(slot)
        param, grad, exp_avg, exp_avg_sq = (tensor[rows] for tensor in self.tensors)
        return param, grad, exp_avg, exp_avg_sq

    def set_owned(self, slot: int, owned: bool) -> None:
        self.row_of_slot_S[slot] = self.rows_of(slot).start if owned else self.tensors[0].shape[0]

    def store(self, grad_UW: Tensor, keep_S: Tensor) -> None:
        """The gradient: written, or added for slots that keep what they have."""
        keeps_U1 = keep_S.index_select(0, self.slot_of_row_U).bool()[:, None]
        self.tensors[1].copy_(grad_UW + torch.where(keeps_U1, self.tensors[1], 0))
