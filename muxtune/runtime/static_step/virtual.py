"""What a slot's sequences see before their own tokens: prefixes and prompts.

A prefix is keys and values of each attention. A prompt is embeddings, in rows of its own: the last
rows of every pass, a stretch for each slot that may have one, computed once for all sequences of
the slot, whose own keys and values are then shared like a prefix's. A stretch is one causal
sequence as long as the slot's rank: what a smaller task leaves over comes last, is zero and is seen
by nobody.

Shape suffixes as in the package; U rows of the table of all keys that may be shared (prompts' rows,
then prefixes'), R those of the slots' tasks one below the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from muxtune.runtime.prepended import Stretches
from muxtune.runtime.static_step.extra_pool import Pool, owners
from muxtune.types import AdapterSlot
from muxtune_kernels.block import Heads
from muxtune_kernels.multi_lora import StepRows
from muxtune_kernels.rows import slot_offsets

VIRTUAL = ("prefix", "prompt")


def virtual_ranks(slots: Sequence[AdapterSlot], method: str) -> list[int]:
    return [slot.rank if slot.method == method else 0 for slot in slots]


class VirtualTable(NamedTuple):
    """Which rows of the table are whose. ``first_S``: a slot's first row; ``slot_of_row_U``.
    ``index_R`` gathers the rows of the slots' tasks one below the other, ``count_S`` (int32) is
    how many each has: filled as tasks come."""

    num_prompt_rows: int
    max_keys: int
    first_S: tuple[int, ...]
    slot_of_row_U: Tensor
    index_R: Tensor
    count_S: Tensor

    @classmethod
    def of(
        cls, prompts: Sequence[int], prefixes: Sequence[int], device: torch.device
    ) -> VirtualTable:
        """From the slots' ranks; a slot has one or the other."""
        num_prompt_rows = sum(prompts)
        pairs = zip(prompts, slot_offsets(prompts), slot_offsets(prefixes), strict=False)
        first_S = tuple(own if rank else num_prompt_rows + other for rank, own, other in pairs)
        slot_of_row_U = torch.cat([owners(ranks) for ranks in (prompts, prefixes)]).to(device)
        return cls(
            num_prompt_rows, max((*prompts, *prefixes)), first_S, slot_of_row_U,
            torch.zeros_like(slot_of_row_U),
            torch.zeros(len(prompts), dtype=torch.int32, device=device),
        )  # fmt: skip

    def place(self, slot: int, count: int) -> None:
        """A slot's task has so many virtual tokens."""
        self.count_S[slot] = count
        counts = self.count_S.tolist()
        rows = [
            first + at for first, n in zip(self.first_S, counts, strict=True) for at in range(n)
        ]
        self.index_R[: len(rows)] = torch.tensor(rows, dtype=torch.int64).to(self.index_R.device)

    def stretches(self, rows: StepRows, num_rows: int) -> Stretches:
        """A slot's rows are a stretch; slots lie in order, filler and prompts behind them."""
        bounds_S3 = rows.rows.slot_bounds_S3
        assert bounds_S3 is not None
        stop_S, counts_S = bounds_S3[:, 1].cummax(0).values, self.count_S.cumsum(0)
        zero, slot_T = stop_S.new_zeros(1), rows.rows.slot_of_row_T.long()
        count_T = self.count_S.index_select(0, slot_T.clamp(min=0))
        return Stretches(
            torch.cat([zero, stop_S, stop_S.new_full((1,), num_rows)]).int(),
            torch.cat([zero, counts_S, counts_S[-1:]]).int(),
            self.index_R,
            num_rows,
            self.max_keys,
            (slot_T >= 0) & (count_T > 0),
        )

    def shifted(self, position_T: Tensor, rows: StepRows) -> Tensor:
        """Positions behind the virtual tokens."""
        slot_T = rows.rows.slot_of_row_T.long()
        count_T = self.count_S.index_select(0, slot_T.clamp(min=0))
        return position_T + torch.where(slot_T >= 0, count_T, 0)

    def is_real(self, rows: StepRows) -> Tensor:
        """Bool [R]: of slots without rows in this pass, and behind the last key, nothing was
        computed."""
        bounds_S3 = rows.rows.slot_bounds_S3
        assert bounds_S3 is not None
        place_R = torch.arange(len(self.index_R), device=self.index_R.device)
        slot_R = self.slot_of_row_U.index_select(0, self.index_R)
        return (place_R < self.count_S.sum()) & (bounds_S3[:, 2] > 0).index_select(0, slot_R)


class SharedKeys(NamedTuple):
    """One attention's shared keys and values in a pass. ``own_PKE``: of prefixes, keys and values;
    None without any. ``is_real_R``: as ``VirtualTable.is_real``."""

    own_PKE: tuple[Tensor, Tensor] | None
    table: VirtualTable
    stretches: Stretches
    is_real_R: Tensor

    def gathered(self, key_TKE: Tensor, value_TKE: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [R, K, E], from the pass's own (rotated) and the prefixes'."""
        count = self.table.num_prompt_rows
        tables = [part_TKE[part_TKE.shape[0] - count :] for part_TKE in (key_TKE, value_TKE)]
        if self.own_PKE is not None:
            tables = [torch.cat(pair) for pair in zip(tables, self.own_PKE, strict=True)]
        key_UKE, value_UKE = tables
        index_R = self.table.index_R
        return key_UKE.index_select(0, index_R), value_UKE.index_select(0, index_R)

    def scattered(self, grad_RKE: Tensor) -> Tensor:
        """The gradient of the whole table [U, K, E] in float32, from that of ``gathered``."""
        grad_RKE = torch.where(self.is_real_R[:, None, None], grad_RKE.float(), 0)
        total_UKE = grad_RKE.new_zeros((len(self.table.slot_of_row_U), *grad_RKE.shape[1:]))
        return total_UKE.index_add_(0, self.table.index_R, grad_RKE)


class Prefixes(NamedTuple):
    """One attention's trained keys and values (None without prefixes), and what is shared by all
    layers."""

    key: Pool | None
    value: Pool | None
    table: VirtualTable

    def keys(self, dtype: torch.dtype, heads: Heads) -> tuple[Tensor, Tensor] | None:
        if self.key is None or self.value is None:
            return None
        shape = (heads.num_kv_heads, heads.head_dim)
        key, value = (
            pool.tensors[0].to(dtype).unflatten(1, shape) for pool in (self.key, self.value)
        )
        return key, value

    def store(self, dkey_UKE: Tensor, dvalue_UKE: Tensor, rows: StepRows) -> None:
        """The table's gradients, to where the optimizer reads them."""
        for pool, grad_UKE in ((self.key, dkey_UKE), (self.value, dvalue_UKE)):
            if pool is not None:
                pool.store(grad_UKE[self.table.num_prompt_rows :].flatten(1), rows.keep_S)


class Prompts(NamedTuple):
    """The trained embeddings of all slots: the last rows of every pass."""

    pool: Pool

    @property
    def num_rows(self) -> int:
        return self.pool.tensors[0].shape[0]

    def embed_(self, x_TD: Tensor) -> None:
        x_TD[x_TD.shape[0] - self.num_rows :] = self.pool.tensors[0]

    def store(self, dx_TD: Tensor, rows: StepRows) -> None:
        """The gradient of what ``embed_`` has written."""
        self.pool.store(dx_TD[dx_TD.shape[0] - self.num_rows :].float(), rows.keep_S)
