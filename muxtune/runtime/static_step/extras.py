"""Methods other than LoRA in the static step: explicit forms with static shapes. What prefixes and
prompts put before a slot's sequences is in ``virtual``.

Their tensors lie beside those of ``AdapterPools``; every launch serves all slots, and nothing waits
for the host, so a step with mixed methods is captured like one of LoRA alone. What a slot's task
does not have here (a slot may be larger) is told by device tensors that ``load`` fills.

A pool's four tensors: parameter, gradient, first and second moment.

Shape suffixes as in the package; U pool rows, one for each slot that may have a vector, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muxtune.runtime.adapters import bottleneck as bottleneck_method
from muxtune.runtime.adapters import dora, ia3, prefix
from muxtune.runtime.adapters.prompt import PROMPT
from muxtune.runtime.adapters.scaling import owned_rows, row_factors
from muxtune.runtime.linear import module_key
from muxtune.runtime.static_step.adapters import AdapterPools
from muxtune.runtime.static_step.extra_pool import Four, Pool
from muxtune.runtime.static_step.model import EMBEDDING, FusedLinear, StaticModel, Unsupported
from muxtune.runtime.static_step.virtual import (
    VIRTUAL,
    Prefixes,
    Prompts,
    VirtualTable,
    virtual_ranks,
)
from muxtune.types import AdapterSlot
from muxtune_kernels import AdamWPool
from muxtune_kernels.bottleneck import (
    BottleneckGrads,
    BottleneckPool,
    bottleneck_backward,
    bottleneck_forward,
)
from muxtune_kernels.multi_lora import LoraLinear, StepRows
from muxtune_kernels.row_scaling import (
    SlotVectors,
    scale_slot_rows_,
    scale_slot_rows_backward_,
)
from muxtune_kernels.rows import slot_offsets
from muxtune_kernels.segments import segment_sum

METHODS = ("lora", "dora", "ia3", "bottleneck", "prefix", "prompt")


class Scale(NamedTuple):
    """IA3's vectors over some columns of what a fused linear reads or writes."""

    columns: slice
    pool: Pool

    def forward_(self, x_TW: Tensor, rows: StepRows) -> Tensor:
        """The owners' rows in place; their values before, other rows of which hold anything."""
        part = x_TW[:, self.columns]
        kept = torch.empty(part.shape, dtype=part.dtype, device=part.device)
        scale_slot_rows_(part, part, self._vectors(rows), kept)
        return kept

    def backward_(self, dout_TW: Tensor, kept: Tensor, rows: StepRows) -> None:
        """The owners' rows in place; the vectors' gradient goes where the optimizer reads it."""
        part = dout_TW[:, self.columns]
        scale_slot_rows_backward_(part, part, kept, self._vectors(rows))

    def _vectors(self, rows: StepRows) -> SlotVectors:
        bounds_S3, pool = rows.rows.slot_bounds_S3, self.pool
        assert bounds_S3 is not None
        return SlotVectors(
            pool.tensors[0], pool.tensors[1], pool.slot_of_row_U, pool.row_of_slot_S, bounds_S3,
            rows.keep_S,
        )  # fmt: skip


def _scaled_(scales: Sequence[Scale], x_TW: Tensor, rows: StepRows) -> list[Tensor]:
    """In place: the columns of every scale, which do not meet. What the backward wants."""
    return [scale.forward_(x_TW, rows) for scale in scales]


def _scaled_backward_(
    scales: Sequence[Scale], dout_TW: Tensor, kept: Sequence[Tensor], rows: StepRows
) -> Tensor:
    for scale, part in zip(scales, kept, strict=True):
        scale.backward_(dout_TW, part, rows)
    return dout_TW


class Magnitudes(NamedTuple):
    """DoRA behind one member of a fused linear: outputs scaled by m / |W + s B A| (see
    ``adapters.dora``), the bias left out. All slots at once, idle ones too: shapes, and so the
    bits of a slot, are the same whoever else is there. ``a_rows_Nr``, ``b_rows_Nr``: where
    the slots' A and B lie in the pools; ``is_real_Nr``: False beyond a slot's rank."""

    columns: slice
    pool: Pool
    lora: LoraLinear
    square_O: Tensor
    a_rows_Nr: Tensor
    b_rows_Nr: Tensor
    is_real_Nr: Tensor
    slot_N: Tensor

    def forward(self, y_TC: Tensor, rows: StepRows) -> tuple[Tensor, Any]:
        """(a changed copy, what the backward wants besides y)."""
        norm_NO = self._norms(rows)
        factor_NO = self.pool.tensors[0] / norm_NO
        factor_TO = row_factors(factor_NO, self.pool.row_of_slot_S, rows.rows.slot_of_row_T)
        z_TC, bias_O = y_TC.clone(), self._bias()
        z_TO = y_TC[:, self.columns] * factor_TO
        z_TC[:, self.columns] = z_TO if bias_O is None else z_TO + bias_O * (1 - factor_TO)
        return z_TC, (norm_NO, factor_NO)

    def backward(
        self, dz_TC: Tensor, y_TC: Tensor, saved: Any, rows: StepRows, deterministic: bool
    ) -> Tensor:
        norm_NO, factor_NO = saved
        dpart_TO, part_TO, bias_O = dz_TC[:, self.columns], y_TC[:, self.columns], self._bias()
        product_TO = dpart_TO * (part_TO if bias_O is None else part_TO - bias_O)
        sums_NO = segment_sum(product_TO, rows.rows, self.pool.slot_rows, deterministic)
        owned_N1 = owned_rows(self.pool.row_of_slot_S, self.pool.slot_rows)[:, None]
        self.pool.store(torch.where(owned_N1, sums_NO / norm_NO, 0), rows.keep_S)
        factor_TO = row_factors(factor_NO, self.pool.row_of_slot_S, rows.rows.slot_of_row_T)
        dy_TC = dz_TC.clone()
        dy_TC[:, self.columns] = (dpart_TO * factor_TO).to(dz_TC.dtype)
        return dy_TC

    def _bias(self) -> Tensor | None:
        return None if self.lora.bias_O is None else self.lora.bias_O[self.columns]

    def _norms(self, rows: StepRows) -> Tensor:
        """[N, O], each slot's by itself: a NaN stays where it is."""
        a_NrD = self._taken(self.lora.a_RD, self.a_rows_Nr)
        b_NrO = self._taken(self.lora.b_RO[:, self.columns], self.b_rows_Nr)
        weight_OD = self.lora.weight_OD[self.columns]
        shared_NrO = torch.matmul(a_NrD.to(weight_OD.dtype), weight_OD.T).float()
        own_NrO = torch.bmm(torch.bmm(a_NrD, a_NrD.mT), b_NrO)
        scale_N11 = rows.scale_S.index_select(0, self.slot_N).view(-1, 1, 1)
        extra_NrO = b_NrO * (2 * scale_N11 * shared_NrO + scale_N11.square() * own_NrO)
        return (self.square_O + extra_NrO.sum(1)).clamp(min=dora.SMALLEST_SQUARE).sqrt()

    def _taken(self, factor_RW: Tensor, rows_Nr: Tensor) -> Tensor:
        taken_NrW = factor_RW.index_select(0, rows_Nr.flatten()).unflatten(0, rows_Nr.shape)
        return torch.where(self.is_real_Nr[:, :, None], taken_NrW, 0)


class Bottlenecks(NamedTuple):
    """The bottlenecks behind one member of a fused linear."""

    columns: slice
    pools: tuple[Pool, Pool, Pool, Pool]  # in the order of the method's NAMES
    module_key: int
    deterministic: bool

    def forward(self, y_TC: Tensor, rows: StepRows) -> tuple[Tensor, Any]:
        """(a changed copy, what the backward wants besides y)."""
        z_TO, inner = bottleneck_forward(
            y_TC[:, self.columns].contiguous(), self._pool(0), rows.rows, rows.dropout
        )
        return self._with(y_TC, z_TO), inner

    def backward(self, dz_TC: Tensor, y_TC: Tensor, inner: Any, rows: StepRows) -> Tensor:
        targets = BottleneckGrads(*self._pool(1)[:4])
        dy_TO, _ = bottleneck_backward(
            dz_TC[:, self.columns].contiguous(), y_TC[:, self.columns].contiguous(), inner,
            self._pool(0), rows.rows, rows.dropout, targets, rows.keep_S,
        )  # fmt: skip
        return self._with(dz_TC, dy_TO)

    def _with(self, whole_TC: Tensor, part_TO: Tensor) -> Tensor:
        """The part among the other members' columns; where there are none, the part."""
        if part_TO.shape == whole_TC.shape:
            return part_TO
        out_TC = whole_TC.clone()
        out_TC[:, self.columns] = part_TO
        return out_TC

    def _pool(self, kind: int) -> BottleneckPool:
        """Of the parameters (0) or their gradients (1)."""
        down, down_bias, up, up_bias = (pool.tensors[kind] for pool in self.pools)
        row_of_slot_S = self.pools[0].row_of_slot_S
        owned_S = row_of_slot_S[:-1] < row_of_slot_S[-1]
        return BottleneckPool(
            down, down_bias.squeeze(1), up, up_bias, owned_S, self.pools[0].slot_rows,
            self.module_key, self.deterministic,
        )  # fmt: skip


class SiteExtras(NamedTuple):
    """Around one fused linear, in the order in which they run. ``owns_input``, ``owns_grad``:
    nobody else reads what the linear reads, and the gradient of what it writes: scaled in place."""

    scales_in: tuple[Scale, ...]
    magnitudes: tuple[Magnitudes, ...]
    scales_out: tuple[Scale, ...]
    bottlenecks: tuple[Bottlenecks, ...]
    owns_input: bool
    owns_grad: bool

    def before(self, x_TD: Tensor, rows: StepRows) -> tuple[Tensor, Any]:
        """(what the linear reads, what the backward wants)."""
        if not self.scales_in:
            return x_TD, None
        x_TD = x_TD if self.owns_input else x_TD.clone()
        return x_TD, _scaled_(self.scales_in, x_TD, rows)

    def after(self, y_TC: Tensor, rows: StepRows) -> tuple[Tensor, list[Any]]:
        """(what leaves the site, what the backward wants). Nobody else has y."""
        saved: list[Any] = []
        for magnitude in self.magnitudes:
            z_TC, norms = magnitude.forward(y_TC, rows)
            saved.append((y_TC, norms))
            y_TC = z_TC
        if self.scales_out:
            saved.append(_scaled_(self.scales_out, y_TC, rows))
        for item in self.bottlenecks:
            z_TC, inner = item.forward(y_TC, rows)
            saved.append((y_TC, inner))
            y_TC = z_TC
        return y_TC, saved

    def after_backward(
        self, dy_TC: Tensor, saved: list[Any], rows: StepRows, deterministic: bool
    ) -> Tensor:
        for item in reversed(self.bottlenecks):
            y_TC, inner = saved.pop()
            dy_TC = item.backward(dy_TC, y_TC, inner, rows)
        if self.scales_out:
            dy_TC = dy_TC if self.owns_grad or self.bottlenecks else dy_TC.clone()
            dy_TC = _scaled_backward_(self.scales_out, dy_TC, saved.pop(), rows)
        for magnitude in reversed(self.magnitudes):
            y_TC, norms = saved.pop()
            dy_TC = magnitude.backward(dy_TC, y_TC, norms, rows, deterministic)
        return dy_TC

    def before_backward(self, dx_TD: Tensor, saved: Any, rows: StepRows) -> Tensor:
        """Nobody else has dx."""
        return _scaled_backward_(self.scales_in, dx_TD, saved, rows) if self.scales_in else dx_TD


class ExtraPools:
    """The slots' tensors besides low-rank factors, on every block of a model. ``adapters``: their
    low-rank factors, which DoRA's norms are of.

    Raises Unsupported for a method that has no static form.
    """

    def __init__(
        self,
        model: StaticModel,
        slots: tuple[AdapterSlot, ...],
        deterministic: bool,
        adapters: AdapterPools | None = None,
    ) -> None:
        for slot in slots:
            if slot.method not in METHODS:
                raise Unsupported(f"the static step knows no '{slot.method}'")
            if slot.method == "dora" and slot.dropout:
                raise Unsupported("the static step knows no 'dora' with dropout")
        self.slots, self.deterministic, self.device = slots, deterministic, model.device
        self._pools: dict[tuple[str, str], Pool] = {}
        loras = [None] * len(model.blocks) if adapters is None else adapters.layers
        self.layers = [
            tuple(
                self._site(linear, None if pools is None else pools[index].lora)
                for index, linear in enumerate(block.linears)
            )
            for block, pools in zip(model.blocks, loras, strict=True)
        ]
        self.prompts = self._prompts(model)
        self.prefixes = self._all_prefixes(model)

    @property
    def optimizer_pools(self) -> list[AdamWPool]:
        return [AdamWPool(*p.tensors, slot_rows=p.slot_rows) for p in self._pools.values()]

    @property
    def max_virtual_tokens(self) -> int:
        return max((s.rank for s in self.slots if s.method in VIRTUAL), default=0)

    def views(self, slot: int) -> Iterator[tuple[tuple[str, str], Four]]:
        """A slot's rows by (site name, parameter name)."""
        for key, pool in self._pools.items():
            if pool.slot_rows[slot]:
                yield key, pool.views(slot)

    @torch.no_grad()
    def take(self, slot: int, rows_of: Mapping[tuple[str, str], int]) -> None:
        """Tell the step what a slot's task has here: number of rows by (site name, parameter
        name). The rows themselves are filled through ``views``, spare ones with zeros."""
        for key, pool in self._pools.items():
            if pool.slot_rows[slot]:
                pool.set_owned(slot, key in rows_of)
        if self.slots[slot].method in VIRTUAL:
            self.prefixes[0].table.place(slot, max(rows_of.values(), default=0))

    def _pool(self, key: tuple[str, str], slot_rows: Sequence[int], width: int) -> Pool:
        self._pools[key] = Pool.of(slot_rows, width, self.device)
        return self._pools[key]

    def _users(self, method: str, site_name: str) -> list[bool]:
        """Which slots have this method here."""
        return [slot.method == method and _names(site_name, slot.targets) for slot in self.slots]

    def _ranks(self, method: str, site_name: str) -> list[int]:
        """0 for slots without this method here, else the rank."""
        users = self._users(method, site_name)
        return [slot.rank * uses for slot, uses in zip(self.slots, users, strict=True)]

    def _site(self, linear: FusedLinear, lora: LoraLinear | None) -> SiteExtras:
        edges, scales_in, scales_out, items = slot_offsets(linear.out_features), [], [], []
        magnitudes = []
        for member, name in enumerate(linear.names):
            columns = slice(edges[member], edges[member + 1])
            vectors = [int(uses) for uses in self._users("ia3", name)]
            if any(vectors):
                width = linear.out_features[member]
                scales_out.append(Scale(columns, self._pool((name, ia3.OUT), vectors, width)))
                if len(linear.names) == 1:  # else the members would need inputs of their own
                    inputs = linear.weight_OD.shape[1]
                    pool = self._pool((name, ia3.IN), vectors, inputs)
                    scales_in.append(Scale(slice(0, inputs), pool))
            ranks = self._ranks("dora", name)
            if any(ranks):
                assert lora is not None
                magnitudes.append(self._magnitudes(name, columns, ranks, member, lora))
            ranks = self._ranks("bottleneck", name)
            if any(ranks):
                items.append(self._bottlenecks(name, columns, ranks, linear.out_features[member]))
        # The MLP's activation is read by its last linear only; the gradients of what attention and
        # the activation read have no other reader than the linear that wrote it, but those of what
        # is added to the residual stream do.
        is_last, is_first = linear.names[0].endswith("down_proj"), len(linear.names) > 1
        return SiteExtras(
            tuple(scales_in), tuple(magnitudes), tuple(scales_out), tuple(items), is_last, is_first
        )

    def _magnitudes(
        self, name: str, columns: slice, ranks: Sequence[int], member: int, lora: LoraLinear
    ) -> Magnitudes:
        slots = [slot for slot, rank in enumerate(ranks) if rank]
        width = columns.stop - columns.start
        pool = self._pool((name, dora.MAGNITUDE), [int(rank > 0) for rank in ranks], width)
        offsets, most = slot_offsets(lora.slot_ranks), max(ranks)
        # Beyond its rank a slot's own first row stands in, and does not count.
        rows = [
            [offsets[slot] + (at if at < ranks[slot] else 0) for at in range(most)]
            for slot in slots
        ]
        b_rows_Nr = torch.tensor(rows, dtype=torch.int64, device=self.device)
        real = [[at < ranks[slot] for at in range(most)] for slot in slots]
        weight_OD = lora.weight_OD[columns]
        norm_O = torch.linalg.vector_norm(weight_OD, dim=1, dtype=torch.float32)
        return Magnitudes(
            columns, pool, lora, norm_O.square(), b_rows_Nr + member * offsets[-1], b_rows_Nr,
            torch.tensor(real, device=self.device), torch.tensor(slots, device=self.device),
        )  # fmt: skip

    def _bottlenecks(
        self, name: str, columns: slice, ranks: Sequence[int], width: int
    ) -> Bottlenecks:
        used = [int(rank > 0) for rank in ranks]
        shapes = ((ranks, width), (ranks, 1), (ranks, width), (used, width))
        pools = [
            self._pool((name, parameter), rows, columns_of)
            for parameter, (rows, columns_of) in zip(bottleneck_method.NAMES, shapes, strict=True)
        ]
        four = (pools[0], pools[1], pools[2], pools[3])
        return Bottlenecks(columns, four, module_key(name), self.deterministic)

    def _prompts(self, model: StaticModel) -> Prompts | None:
        ranks = virtual_ranks(self.slots, "prompt")
        if not any(ranks):
            return None
        width = model.embedding_VD.shape[1]
        return Prompts(self._pool((EMBEDDING, PROMPT), ranks, width))

    def _all_prefixes(self, model: StaticModel) -> list[Prefixes]:
        ranks, prompts = (virtual_ranks(self.slots, name) for name in ("prefix", "prompt"))
        if not any((*ranks, *prompts)):
            return []
        table = VirtualTable.of(prompts, ranks, self.device)
        if not any(ranks):
            return [Prefixes(None, None, table)] * len(model.blocks)
        width = model.heads.num_kv_heads * model.heads.head_dim
        found = []
        for block in model.blocks:
            site = block.linears[0].names[0].rpartition(".")[0]
            key, value = (self._pool((site, n), ranks, width) for n in (prefix.KEY, prefix.VALUE))
            found.append(Prefixes(key, value, table))
        return found


def _names(site_name: str, targets: tuple[str, ...]) -> bool:
    return targets == ("all-linear",) or any(
        site_name == target or site_name.endswith(f".{target}") for target in targets
    )
