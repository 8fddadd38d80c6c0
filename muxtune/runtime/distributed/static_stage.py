"""A stage's part of a micro-batch as static operations: explicit calls, without autograd, each of
them a CUDA graph of its own.

Every visit of a round (see ``orchestration.problem``) has buffers of its own, so operations of
different visits may be replayed in any order that keeps each visit's own. A visit's graphs share
one memory pool, visits share none: what one has saved is never another's scratch.

Shape suffixes as in ``muxtune.runtime.static_step``; L layers of the stage.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalIterable=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muxtune.runtime.distributed.schedule import ATTENTION, Action, Operation, Part
from muxtune.runtime.static_step.adapters import AdapterPools, FusedPool
from muxtune.runtime.static_step.attention import (
    Packing,
    Rotary,
    attention_backward,
    attention_forward,
)
from muxtune.runtime.static_step.inputs import StepInputs
from muxtune.runtime.static_step.model import StaticModel
from muxtune.runtime.static_step.program import OVERLAP, OWN_SHRINK, determinism
from muxtune_kernels import AdamWSlots, multi_task_adamw_
from muxtune_kernels.block import add_rms_norm, rms_norm_backward, swiglu, swiglu_backward_
from muxtune_kernels.cross_entropy import multi_task_cross_entropy_grad
from muxtune_kernels.multi_lora import (
    LoraLinear,
    ReadyFlags,
    lora_linear_factor_grad,
    lora_linear_forward,
    lora_linear_input_grad,
)

LOSS_CHUNK_ROWS = 1024
_FORWARD_PRODUCTS, _LEAST_TILE_ROWS = 4, 64  # of a layer; of the tiles that flags are counted for


class StagePart(NamedTuple):
    """What a rank holds: ``model`` has the blocks of ``layers`` only, cut to this rank's features.
    ``tp``, ``step``: groups of the stage's ranks, or None."""

    model: StaticModel
    layers: range
    is_first: bool
    is_last: bool
    tp: Any = None
    step: Any = None


class _Unsettled(NamedTuple):
    """A gradient that must still be summed over the stage's ranks and go through a norm."""

    dnormed_TD: Tensor
    x_TD: Tensor
    weight_D: Tensor
    rstd_T: Tensor


class _AttentionHalf(NamedTuple):
    x_TD: Tensor
    normed_TD: Tensor
    rstd_T: Tensor
    h_qkv: Any
    qkv_TC: Tensor
    attended_TC: Tensor
    saved: Any
    h_out: Any


class _MlpHalf(NamedTuple):
    x_TD: Tensor
    normed_TD: Tensor
    rstd_T: Tensor
    h_gate_up: Any
    gate_up_TC: Tensor
    act_TF: Tensor
    h_down: Any


class VisitProgram:
    """One visit on one stage. ``run(operation)`` does its work on the current stream.

    ``received_TD``, ``gradient_TD``, ``squares_S``, ``norm_S``: where neighbours' messages go;
    ``metrics_2S``: losses, and gradient norms before clipping. ``deterministic``: no sum's order is
    left to chance. ``accumulates``: steps of several micro-batches where a stage has several
    ranks: these sum what they share after each, so before the next each counts its part of the sum
    only (``kept_share``, for which whoever runs the program gives 1 / ranks).
    """

    def __init__(
        self, part: StagePart, pools: AdapterPools, inputs: StepInputs, num_rows: int,
        deterministic: bool = False, accumulates: bool = False,
    ) -> None:  # fmt: skip
        self.part, self.pools, self.inputs, self.num_rows = part, pools, inputs, num_rows
        self.deterministic = deterministic
        model, num_slots = part.model, inputs.layout.num_slots
        width = model.final_norm_D.numel()
        rows = (num_rows, width)
        new = {"dtype": model.final_norm_D.dtype, "device": model.device}
        self.received_TD, self.gradient_TD = torch.zeros(rows, **new), torch.zeros(rows, **new)
        self.sent_TD, self.sent_gradient_TD = torch.zeros(rows, **new), torch.zeros(rows, **new)
        sums = {"dtype": torch.float32, "device": model.device}
        self.squares_S, self.norm_S = torch.zeros(num_slots, **sums), torch.zeros(num_slots, **sums)
        self.total_S = torch.zeros(num_slots, **sums)
        self.metrics_2S = torch.zeros((2, num_slots), **sums)
        self.memory: Any = None  # of its graphs, once one is captured
        self._x_TD: Tensor | None = None
        self._added_TD: Tensor | None = None
        self._dx_TD: Tensor | None = None
        self._unsettled: _Unsettled | None = None
        self._halves: dict[Part, Any] = {}
        on_cuda = model.device.type == "cuda"
        tiles = num_rows // _LEAST_TILE_ROWS + 1
        count = _FORWARD_PRODUCTS * len(part.layers) * tiles
        # Kernels that are compiled only are those of a GPU that is not there.
        takes_flags = OWN_SHRINK and model.final_norm_D.is_cuda
        self._flags = ReadyFlags(count, model.device) if takes_flags else None
        # What nobody waits for within an operation runs beside the rest of it, as in ``program``.
        self._side = _side_stream(model.device) if OVERLAP and on_cuda else None
        self._held: list[Any] = []  # is read there
        self._grads = [_slot_grads(pools, slot) for slot in range(num_slots)]
        # Of gradients that each of the stage's ranks holds alone, and of those that all hold.
        own, shared = _split_grads(pools)
        held = (own, shared) if part.step is not None else ([*own, *shared], [])
        self._own, self._shared = (_Squares(grads, num_slots, model.device) for grads in held)
        self.own_S = torch.zeros(num_slots, **sums)  # squares of the first, summed by the ranks
        self._summed_grads = [rows.grad_RW for rows in shared if rows.grad_RW.numel()]
        scales = accumulates and part.step is not None and bool(self._summed_grads)
        self.kept_share = torch.ones((), **sums) if scales else None
        self._last_part: Part | None = None  # of the backward
        fields = inputs.fields
        self._settings = AdamWSlots(
            *fields["settings"], step_S=pools.settings.step_S, active_S=fields["active"]
        )

    # -- what runs on the compute stream

    @torch.no_grad()
    def run(self, operation: Operation) -> None:
        with determinism(self.deterministic):
            self._run(operation)

    def _run(self, operation: Operation) -> None:
        if operation.action is Action.FORWARD:
            self._forward(operation)
        elif operation.action is Action.LOSS:
            self._loss()
        elif operation.action is Action.BACKWARD:
            self._backward(operation)
        elif operation.action is Action.OPTIMIZE:
            self._step()

    def _forward(self, operation: Operation) -> None:
        if self._flags is not None:
            self._flags.clear()  # the operation's own products count in them
        if self._starts(operation.parts[0]):
            self._enter()
        for part in operation.parts:
            self._forward_half(part)
        if operation.is_last and self.part.tp is None and not self.part.is_last:
            self.leave()

    def _starts(self, part: Part) -> bool:
        return part == (self.part.layers[0], ATTENTION)

    def _enter(self) -> None:
        self._added_TD = self._unsettled = None
        self._halves.clear()
        if self.part.is_first:
            ids_T = self.inputs.fields["input_ids"][: self.num_rows]
            self._x_TD = self.part.model.embedding_VD.index_select(0, ids_T)
        else:
            self._x_TD = self.received_TD

    @torch.no_grad()
    def leave(self) -> None:
        """The residual stream for the next stage."""
        torch.add(self._x_TD, self._added_TD, out=self.sent_TD)

    def _forward_half(self, part: Part) -> None:
        model, rows = self.part.model, self._rows
        index = part[0] - self.part.layers[0]
        block = model.blocks[index]
        qkv, out, gate_up, down = (pool.lora for pool in self.pools.layers[index])
        is_attention = part[1] == ATTENTION
        weight_D = block.attention_norm_D if is_attention else block.mlp_norm_D
        x_TD, normed_TD, rstd_T = add_rms_norm(self._x_TD, self._added_TD, weight_D, model.eps)
        if is_attention:
            qkv_TC, h_qkv = lora_linear_forward(normed_TD, qkv, rows)
            attended_TC, saved = attention_forward(qkv_TC, self._rotary, model.heads, self._packing)
            added_TD, h_out = lora_linear_forward(attended_TC, out, rows)
            self._halves[part] = _AttentionHalf(
                x_TD, normed_TD, rstd_T, h_qkv, qkv_TC, attended_TC, saved, h_out
            )
        else:
            gate_up_TC, h_gate_up = lora_linear_forward(normed_TD, gate_up, rows)
            act_TF = swiglu(gate_up_TC)
            added_TD, h_down = lora_linear_forward(act_TF, down, rows)
            self._halves[part] = _MlpHalf(
                x_TD, normed_TD, rstd_T, h_gate_up, gate_up_TC, act_TF, h_down
            )
        self._x_TD, self._added_TD = x_TD, added_TD

    def _loss(self) -> None:
        model, fields = self.part.model, self.inputs.fields
        x_TD, normed_TD, rstd_T = add_rms_norm(
            self._x_TD, self._added_TD, model.final_norm_D, model.eps
        )
        loss_S, dnormed_TD = multi_task_cross_entropy_grad(
            normed_TD, model.lm_head_VD, fields["labels"][: self.num_rows],
            fields["slot_of_row"][: self.num_rows], fields["loss_scale"],
            self.inputs.layout.num_slots, LOSS_CHUNK_ROWS,
        )  # fmt: skip
        self.metrics_2S[0].copy_(loss_S)
        self._dx_TD = rms_norm_backward(dnormed_TD, x_TD, model.final_norm_D, rstd_T, None)

    def _backward(self, operation: Operation) -> None:
        last = (self.part.layers[-1], "mlp")
        if operation.parts[0] == last:
            if self.kept_share is not None:
                scale_all = torch._foreach_mul_  # pyright: ignore[reportPrivateImportUsage]
                scale_all(self._summed_grads, self.kept_share)
            if not self.part.is_last:
                self._dx_TD = self.gradient_TD
        for part in operation.parts:
            self._settle()
            if part[1] == ATTENTION:
                self._attention_backward(part)
            else:
                self._mlp_backward(part)
            self._last_part = part
        self._join_side()
        if operation.is_last:
            self._sum_squares()
            if self.part.tp is None and not self.part.is_first:
                self.pass_gradient()

    @torch.no_grad()
    def pass_gradient(self) -> None:
        """The gradient of what the stage received, for the stage before."""
        self._settle()
        self.sent_gradient_TD.copy_(self._dx_TD)

    def _settle(self) -> None:
        left, self._unsettled = self._unsettled, None
        if left is not None:
            self._dx_TD = rms_norm_backward(
                left.dnormed_TD, left.x_TD, left.weight_D, left.rstd_T, self._dx_TD
            )

    def _mlp_backward(self, part: Part) -> None:
        index, kept, rows = part[0] - self.part.layers[0], self._halves.pop(part), self._rows
        _, _, gate_up, down = (pool.lora for pool in self.pools.layers[index])
        dact_TF, dh = lora_linear_input_grad(self._dx_TD, kept.act_TF, kept.h_down, down, rows)
        self._factor_grads(dh, kept.act_TF, down)
        dgate_up_TC = swiglu_backward_(dact_TF, kept.gate_up_TC)
        dnormed_TD, dh = lora_linear_input_grad(
            dgate_up_TC, kept.normed_TD, kept.h_gate_up, gate_up, rows
        )
        self._factor_grads(dh, kept.normed_TD, gate_up)
        weight_D = self.part.model.blocks[index].mlp_norm_D
        self._unsettled = _Unsettled(dnormed_TD, kept.x_TD, weight_D, kept.rstd_T)

    def _attention_backward(self, part: Part) -> None:
        index, kept, rows = part[0] - self.part.layers[0], self._halves.pop(part), self._rows
        model = self.part.model
        qkv, out, _, _ = (pool.lora for pool in self.pools.layers[index])
        dout_TC, dh = lora_linear_input_grad(self._dx_TD, kept.attended_TC, kept.h_out, out, rows)
        self._factor_grads(dh, kept.attended_TC, out)
        dqkv_TC = attention_backward(
            dout_TC, kept.qkv_TC, kept.attended_TC, kept.saved, self._rotary, model.heads,
            self._packing,
        )  # fmt: skip
        dnormed_TD, dh = lora_linear_input_grad(dqkv_TC, kept.normed_TD, kept.h_qkv, qkv, rows)
        self._factor_grads(dh, kept.normed_TD, qkv)
        weight_D = model.blocks[index].attention_norm_D
        self._unsettled = _Unsettled(dnormed_TD, kept.x_TD, weight_D, kept.rstd_T)

    def _factor_grads(self, dh: Any, x_TD: Tensor, lora: LoraLinear) -> None:
        if self._side is None:
            lora_linear_factor_grad(dh, x_TD, lora, self._rows)
            return
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            lora_linear_factor_grad(dh, x_TD, lora, self._rows)
        self._held.append((dh, x_TD))

    def _join_side(self) -> None:
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)
            self._held.clear()

    def packing(self, operation: Operation) -> Callable[[], None] | None:
        """What has to be done before a transfer where the stage's ranks meet first: it follows
        their last exchange, so no computation could have done it."""
        if self.part.tp is None:
            return None
        return {
            Action.SEND_ACTIVATIONS: self.leave,
            Action.SEND_GRADIENTS: self.pass_gradient,
        }.get(operation.action)

    # -- optimizer steps

    def _sum_squares(self) -> None:
        """This stage's; where its ranks must meet for them, of what each holds alone."""
        if self.part.step is None:
            self._total(self._own())
        else:
            self.own_S.copy_(self._own())

    @torch.no_grad()
    def part_again(self) -> None:
        """The stage's squares, when its ranks have summed up all that they share."""
        self._total(self.own_S + self._shared())

    def _total(self, own_S: Tensor) -> None:
        """With the stages after this one."""
        if self.part.is_last:
            self.total_S.copy_(own_S)
        else:
            torch.add(own_S, self.squares_S, out=self.total_S)

    def _step(self) -> None:
        squares_S = self.total_S if self.part.is_first else self.norm_S
        norm_S = squares_S.sqrt()
        self.metrics_2S[1].copy_(norm_S)
        most_S = self.inputs.fields["settings"][5].float()
        # A slot that goes on accumulating is left as it is.
        clips_S = (most_S > 0) & self.inputs.fields["active"]
        clip_S = torch.where(clips_S, (most_S / (norm_S + 1e-6)).clamp(max=1.0), 1.0)
        for grads, clip in zip(self._grads, clip_S.unbind(), strict=True):
            torch._foreach_mul_(grads, clip)  # pyright: ignore[reportPrivateImportUsage]
        free = self._settings._replace(max_grad_norm_S=torch.zeros_like(self._settings.lr_S))
        multi_task_adamw_(self.pools.optimizer_pools, free, zero_grads=False)

    def exchanged(self, backward: bool) -> tuple[Tensor, ...]:
        """What the ranks of the stage sum next. With the gradient of a half's input go those of
        its factors that all ranks hold, so that summing them overlaps too; last the squares."""
        if not backward:
            assert self._added_TD is not None
            return (self._added_TD,)
        assert self._unsettled is not None and self._last_part is not None
        grads = () if self.part.step is None else self._shared_grads(self._last_part)
        if self._last_part != (self.part.layers[0], ATTENTION):
            return (self._unsettled.dnormed_TD, *grads)
        # Nobody asks for the gradient of the embedding's output.
        passed = () if self.part.is_first else (self._unsettled.dnormed_TD,)
        return (*passed, *grads, self.own_S)

    def _shared_grads(self, part: Part) -> tuple[Tensor, ...]:
        """Of all slots: A of the half's column-parallel linears, B of its row-parallel one."""
        layer = self.pools.layers[part[0] - self.part.layers[0]]
        column, row = layer[:2] if part[1] == ATTENTION else layer[2:]
        return tuple(grad for grad in (column.a[1], row.b[1]) if grad.numel())

    @property
    def summed(self) -> list[tuple[Tensor, ...]]:
        """As large as whatever the stage's ranks sum at once."""
        return [
            (self.sent_TD, *self._shared_grads((layer, half)), self.own_S)
            for layer in self.part.layers for half in (ATTENTION, "mlp")
        ]  # fmt: skip

    @property
    def _rows(self) -> Any:
        return self.inputs.step_rows(self.num_rows)._replace(flags=self._flags)

    @property
    def _rotary(self) -> Rotary:
        model = self.part.model
        return Rotary(model.cos_LP, model.sin_LP, self.inputs.fields["positions"][: self.num_rows])

    @property
    def _packing(self) -> Packing:
        fields = self.inputs.fields
        return Packing(fields["cu_seqlens"], fields["tiles"], self.inputs.layout.max_seqlen)


@lru_cache(maxsize=8)
def _side_stream(device: torch.device) -> Any:
    """One for all visits: they compute one after another. The products come first."""
    return torch.cuda.Stream(device, priority=0)


def _slot_grads(pools: AdapterPools, slot: int) -> list[Tensor]:
    return [g for _, a, b in pools.views(slot) for g in (a[1], b[1])]


class _Rows(NamedTuple):
    """A gradient of which every slot has its rows: as many as its rank, once for each of
    ``num_blocks``."""

    grad_RW: Tensor
    slot_ranks: tuple[int, ...]
    num_blocks: int


def _split_grads(pools: AdapterPools) -> tuple[list[_Rows], list[_Rows]]:
    """(each rank's own, those that all ranks of a stage hold): the latter are of A of
    column-parallel linears and of B of the others."""
    own, shared = [], []
    for qkv, out, gate_up, down in pools.layers:
        for column, row in ((qkv, out), (gate_up, down)):
            a, b = _rows_of(column)
            shared.append(a)
            own.append(b)
            a, b = _rows_of(row)
            own.append(a)
            shared.append(b)
    return own, shared


def _rows_of(pool: FusedPool) -> tuple[_Rows, _Rows]:
    return (
        _Rows(pool.a[1], pool.slot_ranks, len(pool.linear.names)),
        _Rows(pool.b[1], pool.slot_ranks, 1),
    )


class _Squares:
    """Sums of squares by slot [S], always in the same order. Few kernels for all gradients: one a
    gradient took 3 ms for each hTask of a stage of 20 layers."""

    def __init__(self, grads: Sequence[_Rows], num_slots: int, device: torch.device) -> None:
        self._blocks: list[Tensor] = []
        places: list[list[int]] = [[] for _ in range(num_slots)]
        for rows in grads:
            by_slot = rows.grad_RW.split(list(rows.slot_ranks) * rows.num_blocks)
            for at, block_RW in enumerate(by_slot):
                if block_RW.numel():
                    places[at % num_slots].append(len(self._blocks))
                    self._blocks.append(block_RW)
        most = max(map(len, places), default=0)
        zero = len(self._blocks)
        padded = [own + [zero] * (most - len(own)) for own in places]
        self._place_SN = torch.tensor(padded, dtype=torch.int64, device=device)
        self._zero = torch.zeros((), dtype=torch.float32, device=device)

    def __call__(self) -> Tensor:
        norm_all = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]
        norms = norm_all(self._blocks) if self._blocks else ()
        squares_N = torch.stack([*norms, self._zero]).square()
        return squares_N[self._place_SN].sum(1)


Captured = Callable[[], None]


def capture(work: Callable[[], None], pool: Any, stream: Any) -> Captured:
    """``work`` as a CUDA graph; as it is on a CPU."""
    if stream is None:
        return work
    graph = torch.cuda.CUDAGraph()
    # Without what torch.cuda.graph does around it: a layout has thousands of graphs, and to
    # collect garbage for each would take longer than the rest.
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
    return graph.replay
