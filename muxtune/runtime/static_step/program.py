"""One training step as explicit calls: forward, loss, backward, optimizer; no autograd.

A frozen backbone needs input gradients only, so the backward is a second walk over the blocks.
Writing it out decides when each activation dies, keeps every address static and lets the factor
gradients, which nobody waits for, run beside the next product on a second stream.

Shape suffixes as in the package.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muxtune.runtime.prepended import Stretches
from muxtune.runtime.static_step.adapters import AdapterPools
from muxtune.runtime.static_step.attention import (
    Packing,
    Rotary,
    attention_backward,
    attention_forward,
    attention_with_shared,
    attention_with_shared_backward,
)
from muxtune.runtime.static_step.extras import ExtraPools, SiteExtras
from muxtune.runtime.static_step.inputs import StepInputs
from muxtune.runtime.static_step.model import StaticModel
from muxtune.runtime.static_step.virtual import SharedKeys
from muxtune.runtime.static_step.windows import StepWindows, WindowedLinear
from muxtune_kernels import AdamWSlots, multi_task_adamw_
from muxtune_kernels.block import (
    add_rms_norm,
    rms_norm_backward,
    swiglu,
    swiglu_backward_,
)
from muxtune_kernels.cross_entropy import multi_task_cross_entropy_grad
from muxtune_kernels.multi_lora import (
    LoraLinear,
    ReadyFlags,
    StepRows,
    lora_linear_factor_grad,
    lora_linear_forward,
    lora_linear_input_grad,
)

OWN_SHRINK, OVERLAP = True, True  # what programs do that are not told
_LEAST_TILE_ROWS = 64
_PRODUCTS_A_BLOCK = 12  # four forward, four again where a block is recomputed, four backward


class StepResult(NamedTuple):
    """Per slot, float32 [S]: loss of this micro-batch (a part of the optimizer batch's mean),
    gradient norm before clipping where a step was closed, 1 where it was skipped."""

    loss_S: Tensor
    grad_norm_S: Tensor
    skipped_S: Tensor


class Saved(NamedTuple):
    """What the backward of one block needs; ``h_*`` hold what the linears have read."""

    x_in_TD: Tensor
    rstd_in_T: Tensor
    h_qkv: Any
    qkv_TC: Tensor
    attended_TC: Tensor
    attention: Any
    h_out: Any
    x_mid_TD: Tensor
    rstd_mid_T: Tensor
    h_gate_up: Any
    gate_up_TC: Tensor
    h_down: Any


class _Site(NamedTuple):
    """A fused linear with its low-rank factors and what other methods put around it."""

    lora: LoraLinear
    extras: SiteExtras | None
    windowed: WindowedLinear | None = None

    def forward(self, x_TD: Tensor, rows: StepRows) -> tuple[Tensor, Any]:
        """(y, (h, what the product has read, what comes behind it, what before))."""
        if self.windowed is not None:
            y_TC, h = self.windowed.forward(x_TD)
            return y_TC, (h, x_TD, None, None)
        if self.extras is None:
            y_TC, h = lora_linear_forward(x_TD, self.lora, rows)
            return y_TC, (h, x_TD, None, None)
        read_TD, scaled = self.extras.before(x_TD, rows)
        y_TC, h = lora_linear_forward(read_TD, self.lora, rows)
        y_TC, around = self.extras.after(y_TC, rows)
        return y_TC, (h, read_TD, around, scaled)


class StepProgram:
    """Runs a step of any number of rows up to the layout's. ``overlap``: factor gradients on a
    second stream. ``own_shrink``: products make their adapters' low-rank h themselves where that
    is faster; else kernels of their own always do. ``windows``: products of LoRA slots run on over
    windows of ranks (``windows.py``) where neither dropout nor another method is in the way.
    ``deterministic``: no sum's order is left to chance. ``extras``: the slots of methods that have
    more than low-rank factors. ``recompute`` of a run: of how many blocks, the first ones, only the
    input is kept; the backward computes the rest again, to the same bits (Chen et al. 2016, arXiv
    1604.06174). Raises ValueError for windows in deterministic mode."""

    def __init__(
        self,
        model: StaticModel,
        pools: AdapterPools,
        inputs: StepInputs,
        deterministic: bool = False,
        overlap: bool = OVERLAP,
        loss_chunk_rows: int = 1024,
        extras: ExtraPools | None = None,
        own_shrink: bool = OWN_SHRINK,
        windows: bool = False,
    ) -> None:
        if windows and deterministic:
            raise ValueError("with windows a row's bits may depend on its neighbours")
        self.model, self.pools, self.inputs, self.extras = model, pools, inputs, extras
        self._optimizer_pools = [
            *pools.optimizer_pools,
            *([] if extras is None else extras.optimizer_pools),
        ]
        virtual = 0 if extras is None else extras.max_virtual_tokens
        if inputs.layout.max_seqlen + virtual > model.cos_LP.shape[0]:
            raise ValueError(f"the rotary tables have {model.cos_LP.shape[0]} positions, too few")
        self.deterministic, self.loss_chunk_rows = deterministic, loss_chunk_rows
        self.optimizes = True  # False: gradients only, to measure what the optimizer costs
        fields = inputs.fields
        self._settings = AdamWSlots(
            *fields["settings"], step_S=pools.settings.step_S, active_S=fields["active"]
        )
        num_slots = inputs.layout.num_slots
        self.metrics = torch.zeros((3, num_slots), dtype=torch.float32, device=model.device)
        on_cuda = model.device.type == "cuda"
        # Low priority: the products that the backward waits for come first.
        self._side = torch.cuda.Stream(model.device, priority=0) if overlap and on_cuda else None
        self._held: list[Any] = []
        tiles = inputs.layout.max_rows // _LEAST_TILE_ROWS + 1
        count = _PRODUCTS_A_BLOCK * len(model.blocks) * tiles
        self._flags = ReadyFlags(count, model.device) if own_shrink else None
        self._rotary = Rotary(model.cos_LP, model.sin_LP, inputs.fields["positions"])
        fits = extras is None and not inputs.layout.dropout and _runs_triton(inputs.buffer)
        self._windows = StepWindows(pools) if windows and fits else None
        self._prompts = None if extras is None else extras.prompts
        if inputs.layout.prompt_rows != (0 if self._prompts is None else self._prompts.num_rows):
            raise ValueError(f"rows for prompts {inputs.layout.prompts}, the slots have others")
        self._stretches: Stretches | None = None
        self._is_real_R: Tensor | None = None
        self._blocks = list(range(len(model.blocks)))  # all that a run goes through

    def run_few(self, num_rows: int, recompute: int = 0) -> None:
        """Every kernel and library call of a run of this size, by the first block and the last:
        the first asks for no gradient of its input, and the others are alike. What it computes
        means nothing."""
        blocks = self._blocks
        self._blocks = sorted({blocks[0], blocks[-1]})
        try:
            self.run(num_rows, recompute)
        finally:
            self._blocks = blocks

    @torch.no_grad()
    def run(self, num_rows: int, recompute: int = 0) -> StepResult:
        """Reads the input buffer, updates the pools, writes ``metrics``."""
        with determinism(self.deterministic):
            if self._flags is not None:
                self._flags.clear()
            rows = self.inputs.step_rows(num_rows)._replace(flags=self._flags)
            self._lay_out(num_rows, rows)
            if self._windows is not None:
                self._windows.begin(rows)
            hidden, saved = self._forward(num_rows, rows, recompute)
            loss_S, dnormed_TD = self._loss(num_rows, hidden[1])
            self._backward(num_rows, rows, hidden, saved, dnormed_TD)
            if self._windows is not None:
                self._windows.end()
            self.metrics[0].copy_(loss_S)
            if not self.optimizes:
                return StepResult(*self.metrics)
            result = multi_task_adamw_(self._optimizer_pools, self._settings, zero_grads=False)
        self.metrics[1].copy_(result.grad_norm_S)
        self.metrics[2].copy_(result.skipped_S)
        return StepResult(*self.metrics)

    def _forward(
        self, num_rows: int, rows: StepRows, recompute: int
    ) -> tuple[tuple[Tensor, Tensor, Tensor], list[Saved | Tensor]]:
        ids_T = self.inputs.fields["input_ids"][:num_rows]
        x_TD, added_TD = self.model.embedding_VD.index_select(0, ids_T), None
        if self._prompts is not None:
            self._prompts.embed_(x_TD)
        saved: list[Saved | Tensor] = []
        for index in self._blocks:
            kept, added_TD = self._block_forward(index, x_TD, added_TD, rows)
            x_TD = kept.x_mid_TD
            saved.append(kept.x_in_TD if index < recompute else kept)
        return add_rms_norm(x_TD, added_TD, self.model.final_norm_D, self.model.eps), saved

    def _block_forward(
        self, index: int, x_TD: Tensor, added_TD: Tensor | None, rows: StepRows
    ) -> tuple[Saved, Tensor]:
        """(what the backward needs, the MLP's output, not yet added to the residual stream)."""
        model = self.model
        block, (qkv, out, gate_up, down) = model.blocks[index], self._sites(index)
        x_TD, normed_in_TD, rstd_in_T = add_rms_norm(
            x_TD, added_TD, block.attention_norm_D, model.eps
        )
        qkv_TC, h_qkv = qkv.forward(normed_in_TD, rows)
        attended_TC, attention = self._attend(index, qkv_TC)
        out_TD, h_out = out.forward(attended_TC, rows)
        x_mid_TD, normed_mid_TD, rstd_mid_T = add_rms_norm(
            x_TD, out_TD, block.mlp_norm_D, model.eps
        )
        gate_up_TC, h_gate_up = gate_up.forward(normed_mid_TD, rows)
        act_TF = swiglu(gate_up_TC)
        down_TD, h_down = down.forward(act_TF, rows)
        kept = Saved(
            x_TD, rstd_in_T, h_qkv, qkv_TC, attended_TC, attention, h_out, x_mid_TD, rstd_mid_T,
            h_gate_up, gate_up_TC, h_down,
        )  # fmt: skip
        return kept, down_TD

    def _loss(self, num_rows: int, normed_TD: Tensor) -> tuple[Tensor, Tensor]:
        fields = self.inputs.fields
        return multi_task_cross_entropy_grad(
            normed_TD,
            self.model.lm_head_VD,
            fields["labels"][:num_rows],
            fields["slot_of_row"][:num_rows],
            fields["loss_scale"],
            self.inputs.layout.num_slots,
            min(self.loss_chunk_rows, self.inputs.layout.max_rows),
            whole_chunks=True,
        )

    def _backward(
        self,
        num_rows: int,
        rows: StepRows,
        hidden: tuple[Tensor, Tensor, Tensor],
        saved: list[Saved | Tensor],
        dnormed_TD: Tensor,
    ) -> None:
        model = self.model
        x_TD, _, rstd_T = hidden
        dx_TD = rms_norm_backward(dnormed_TD, x_TD, model.final_norm_D, rstd_T, None)
        for index in reversed(self._blocks):
            kept = saved.pop()
            if isinstance(kept, Tensor):
                kept, _ = self._block_forward(index, kept, None, rows)
            dx_TD = self._block_backward(index, kept, dx_TD, rows)
            del kept  # before the next block is computed again
            self._join_side()
        self._join_side()
        if self._prompts is not None:
            self._prompts.store(dx_TD, rows)

    def _block_backward(self, index: int, kept: Saved, dx_TD: Tensor, rows: StepRows) -> Tensor:
        block, (qkv, out, gate_up, down) = self.model.blocks[index], self._sites(index)
        dact_TF = self._linear_backward(down, dx_TD, kept.h_down, rows)
        dgate_up_TC = swiglu_backward_(_some(dact_TF), kept.gate_up_TC)
        dnormed_TD = self._linear_backward(gate_up, dgate_up_TC, kept.h_gate_up, rows)
        dx_TD = rms_norm_backward(
            _some(dnormed_TD), kept.x_mid_TD, block.mlp_norm_D, kept.rstd_mid_T, dx_TD
        )
        dout_TC = self._linear_backward(out, dx_TD, kept.h_out, rows)
        dqkv_TC = self._attend_backward(index, _some(dout_TC), kept, rows)
        # Nobody but a prompt asks for the gradient of the embedding's output.
        needs_dx = index > 0 or self._prompts is not None
        dnormed_TD = self._linear_backward(qkv, dqkv_TC, kept.h_qkv, rows, needs_dx)
        if dnormed_TD is None:
            return dx_TD
        return rms_norm_backward(
            dnormed_TD, kept.x_in_TD, block.attention_norm_D, kept.rstd_in_T, dx_TD
        )

    # -- linears with what surrounds them

    def _sites(self, index: int) -> tuple[_Site, ...]:
        loras = [pool.lora for pool in self.pools.layers[index]]
        if self._windows is not None:
            pairs = zip(loras, self._windows.of_layer(index), strict=True)
            return tuple(_Site(lora, None, windowed) for lora, windowed in pairs)
        if self.extras is None:
            return tuple(_Site(lora, None) for lora in loras)
        pairs = zip(loras, self.extras.layers[index], strict=True)
        return tuple(_Site(lora, extras) for lora, extras in pairs)

    def _linear_backward(
        self, site: _Site, dy_TC: Tensor, saved: Any, rows: StepRows, needs_dx: bool = True
    ) -> Tensor | None:
        h, read_TD, around, scaled = saved
        if site.windowed is not None:
            return self._windowed_backward(site.windowed, dy_TC, read_TD, h, needs_dx)
        if site.extras is not None:
            dy_TC = site.extras.after_backward(dy_TC, around, rows, self.deterministic)
        dx_TD, made = lora_linear_input_grad(dy_TC, read_TD, h, site.lora, rows, needs_dx)
        self._aside(
            lambda: lora_linear_factor_grad(made, read_TD, site.lora, rows), (made, read_TD)
        )
        if site.extras is None or dx_TD is None:
            return dx_TD
        return site.extras.before_backward(dx_TD, scaled, rows)

    # -- attention

    def _attend(self, index: int, qkv_TC: Tensor) -> tuple[Tensor, Any]:
        rotary, heads, shared = self._rotary, self.model.heads, self._shared(index)
        if shared is None:
            return attention_forward(qkv_TC, rotary, heads, self._packing())
        return attention_with_shared(qkv_TC, rotary, heads, self._packing(), shared)

    def _attend_backward(self, index: int, dout_TC: Tensor, kept: Saved, rows: StepRows) -> Tensor:
        rotary, heads, shared = self._rotary, self.model.heads, self._shared(index)
        if shared is None:
            return attention_backward(
                dout_TC, kept.qkv_TC, kept.attended_TC, kept.attention, rotary, heads,
                self._packing(),
            )  # fmt: skip
        assert self.extras is not None
        dqkv_TC, *grads = attention_with_shared_backward(
            dout_TC, kept.qkv_TC, kept.attention, rotary, heads, self._packing(), shared
        )
        self.extras.prefixes[index].store(grads[0], grads[1], rows)
        return dqkv_TC

    def _lay_out(self, num_rows: int, rows: StepRows) -> None:
        """What the attention of every block is told of this micro-batch."""
        position_T, self._stretches = self.inputs.fields["positions"][:num_rows], None
        if self.extras is not None and self.extras.prefixes:
            table = self.extras.prefixes[0].table  # of one layer as of all
            position_T = table.shifted(position_T, rows)
            self._stretches = table.stretches(rows, num_rows)
            self._is_real_R = table.is_real(rows)
        self._rotary = Rotary(self.model.cos_LP, self.model.sin_LP, position_T)

    def _shared(self, index: int) -> SharedKeys | None:
        if self.extras is None or self._stretches is None:
            return None
        prefixes = self.extras.prefixes[index]
        own_PKE = prefixes.keys(self.model.dtype, self.model.heads)
        return SharedKeys(own_PKE, prefixes.table, self._stretches, _some(self._is_real_R))

    def _packing(self) -> Packing:
        fields = self.inputs.fields
        return Packing(fields["cu_seqlens"], fields["tiles"], self.inputs.layout.max_seqlen)

    # -- the second stream

    def _windowed_backward(
        self, linear: WindowedLinear, dy_TC: Tensor, x_TD: Tensor, h_TJ: Tensor, needs_dx: bool
    ) -> Tensor | None:
        dh_TJ, beside_TC = linear.shrink_dy(dy_TC)
        since = None if self._side is None else torch.cuda.current_stream().record_event()
        # The product first, or small kernels would fill the multiprocessors before it.
        dx_TD = linear.input_grad(dy_TC, beside_TC) if needs_dx else None
        self._aside(
            lambda: linear.factor_grads(dh_TJ, h_TJ, dy_TC, x_TD), (dh_TJ, h_TJ, dy_TC, x_TD), since
        )
        return dx_TD

    def _aside(self, call: Callable[[], object], read: tuple[Any, ...], since: Any = None) -> None:
        """``call``, which reads ``read``, beside what comes next. ``since``: an event of this
        stream that it waits for; None: now."""
        if self._side is None:
            call()
            return
        self._side.wait_event(since or torch.cuda.current_stream().record_event())
        with torch.cuda.stream(self._side):
            call()
        # Memory must not be handed out again before the side stream has read it.
        self._held.append(read)

    def _join_side(self) -> None:
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)
            self._held.clear()


def _runs_triton(tensor: Tensor) -> bool:
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def _some(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


@contextlib.contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Attention's backward without atomics. Nothing else here has a second form."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic  # its stub does not know the setting
    fills = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = fills
