"""The operations that a profile holds, as the torch runtime runs them.

Every case measures one operation of ``muxtune.cost.ops`` by name. None is a whole block or step.

Shape suffixes: T token rows, D input features, O output features, H query heads, K key-value
heads, E head features, F MLP features, V vocabulary, r rank.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor, nn
from torch.nn import functional

from muxtune.cost.shapes import Linear, ModelShape
from muxtune.profiling.bench import Bench, Body, Case
from muxtune_kernels import (
    AdamWPool,
    AdamWSlots,
    dropout_keep_mask,
    multi_task_adamw_,
    multi_task_cross_entropy,
    row_keys,
)

_FLOAT_BYTES = 4


def linear_case(linear: Linear, rows: int) -> Case:
    """y_TO = x_TD W^T and dx_TD = dy_TO W of a frozen linear."""
    inputs, outputs = linear.in_features, linear.out_features
    shape = f"{inputs}x{outputs}"

    def body(bench: Bench) -> Generator[None, None, None]:
        weight_OD, x_TD = bench.cold(outputs, inputs), bench.fresh(rows, inputs)
        bench.time(f"linear_forward.{shape}", lambda: functional.linear(x_TD, weight_OD))
        yield
        dy_TO = bench.fresh(rows, outputs)
        bench.time(f"linear_backward.{shape}", lambda: dy_TO @ weight_OD)

    return Case({"rows": rows}, body, _FLOAT_BYTES * inputs * outputs)


def _autograd_body(name: str, size: int | str, make) -> Body:
    """Forward through autograd, backward by ``torch.autograd.grad`` to all inputs.

    ``make(bench)`` answers the inputs that need gradients and a function of them.
    """

    def body(bench: Bench) -> Generator[None, None, None]:
        inputs, function = make(bench)
        for tensor in inputs:
            tensor.requires_grad_(True)
        out = bench.time(f"{name}_forward.{size}", lambda: function(*inputs))
        outs = out if isinstance(out, tuple) else (out,)
        yield
        grads = [torch.ones_like(tensor) for tensor in outs]
        bench.time(f"{name}_backward.{size}", lambda: torch.autograd.grad(outs, inputs, grads))

    return body


def norm_case(model: ModelShape, rows: int) -> Case:
    """RMSNorm as transformers writes it (in fp32, weight last), or torch's LayerNorm."""
    hidden = model.hidden

    def make(bench: Bench):
        weight_D = bench.cold(hidden)

        def rms_norm(x_TD: Tensor) -> Tensor:
            wide_TD = x_TD.to(torch.float32)
            scale_T1 = torch.rsqrt(wide_TD.pow(2).mean(-1, keepdim=True) + 1e-5)
            return weight_D * (wide_TD * scale_T1).to(x_TD.dtype)

        def layer_norm(x_TD: Tensor) -> Tensor:
            return functional.layer_norm(x_TD, (hidden,), weight_D, weight_D)

        return (bench.fresh(rows, hidden),), rms_norm if model.norm == "rmsnorm" else layer_norm

    return Case({"rows": rows}, _autograd_body("norm", hidden, make), 16.0 * rows * hidden)


def activation_case(model: ModelShape, rows: int) -> Case:
    """silu(gate) * up, or relu where the MLP has no gate."""
    inner = model.intermediate

    def make(bench: Bench):
        if not model.gated_mlp:
            return (bench.fresh(rows, inner),), functional.relu
        gated = (bench.fresh(rows, inner), bench.fresh(rows, inner))
        return gated, lambda gate_TF, up_TF: functional.silu(gate_TF) * up_TF

    kind = "gated" if model.gated_mlp else "plain"
    body = _autograd_body(f"{kind}_activation", inner, make)
    return Case({"rows": rows}, body, 20.0 * rows * inner)


def add_case(model: ModelShape, rows: int) -> Case:
    """An addition of the residual stream's width: residuals and sums of gradients."""
    hidden = model.hidden

    def body(bench: Bench) -> Generator[None, None, None]:
        left_TD, right_TD = bench.cold(rows, hidden), bench.fresh(rows, hidden)
        bench.time(f"add.{hidden}", lambda: left_TD + right_TD)
        yield

    return Case({"rows": rows}, body, 12.0 * rows * hidden)


def rotary_case(model: ModelShape, rows: int) -> Case:
    """Rotary embedding of queries and keys as transformers writes it."""
    size = model.head_dim

    def make(bench: Bench):
        cos_TE, sin_TE = bench.cold(rows, size), bench.cold(rows, size)
        heads = (model.num_heads, model.num_kv_heads)
        inputs = [bench.fresh(rows, n, size).transpose(0, 1)[None].detach() for n in heads]

        def rotate(x_1HTE: Tensor) -> Tensor:
            first, second = x_1HTE[..., : size // 2], x_1HTE[..., size // 2 :]
            return x_1HTE * cos_TE + torch.cat((-second, first), dim=-1) * sin_TE

        return inputs, lambda query, key: (rotate(query), rotate(key))

    body = _autograd_body("rotary", f"{model.query_dim}x{model.kv_dim}", make)
    return Case({"rows": rows}, body, 8.0 * rows * (model.query_dim + model.kv_dim))


def attention_case(model: ModelShape, length: int) -> Case:
    """One sequence's causal attention in the packed layout: views, SDPA, and putting the rows
    back in order."""
    shape = f"{model.num_heads}x{model.num_kv_heads}x{model.head_dim}"
    heads = (model.num_heads, model.num_kv_heads, model.num_kv_heads)
    grouped = model.num_heads != model.num_kv_heads

    def make(bench: Bench):
        inputs = [bench.fresh(1, n, length, model.head_dim) for n in heads]
        restore = torch.arange(length, device=bench.device)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out_1HTE = functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=grouped
            )
            out_THE = out_1HTE[0].transpose(0, 1).reshape(length, model.num_heads, -1)
            filler_1HE = out_THE.new_zeros(1, *out_THE.shape[1:])
            return torch.cat((out_THE, filler_1HE)).index_select(0, restore)

        return inputs, attend

    body = _autograd_body("attention", shape, make)
    return Case({"length": length}, body, 16.0 * length * (model.query_dim + model.kv_dim))


def embedding_case(model: ModelShape, rows: int) -> Case:
    def body(bench: Bench) -> Generator[None, None, None]:
        table_VD = bench.cold(min(model.vocab, 16384), model.hidden)
        ids_T = torch.randint(table_VD.shape[0], (rows,), device=bench.device)
        bench.time(f"embedding.{model.hidden}", lambda: functional.embedding(ids_T, table_VD))
        yield

    return Case({"rows": rows}, body, 8.0 * rows * model.hidden)


def loss_case(model: ModelShape, rows: int) -> Case:
    """Frozen head and cross-entropy on rows that all carry a label, by the runtime's operator."""
    hidden, vocab = model.hidden, model.vocab

    def body(bench: Bench) -> Generator[None, None, None]:
        head_VD = bench.cold(vocab, hidden)
        # Logits of about one, as a model's: far larger ones leave probabilities that are denormal
        # numbers, with which some processors compute more than ten times slower.
        hidden_TD = (bench.fresh(rows, hidden) / hidden**0.5).requires_grad_(True)
        labels_T = torch.randint(vocab, (rows,), device=bench.device)
        slot_of_row_T = torch.zeros(rows, dtype=torch.int32, device=bench.device)
        scale_S = torch.ones(1, device=bench.device)
        loss_S = bench.time(
            f"loss_forward.{hidden}x{vocab}",
            lambda: multi_task_cross_entropy(
                hidden_TD, head_VD, labels_T, slot_of_row_T, scale_S, 1
            ),
        )
        yield
        bench.time(
            f"loss_backward.{hidden}x{vocab}",
            lambda: torch.autograd.grad(loss_S, hidden_TD, torch.ones_like(loss_S)),
        )

    return Case({"rows": rows}, body, _FLOAT_BYTES * hidden * vocab)


def lora_case(linear: Linear, rank: int, rows: int, sum_dtype: torch.dtype) -> Case:
    """What a LoRA slot adds to a frozen linear: shrink and expand, and backward the gradients of
    A and B (summed over rows in ``sum_dtype``, added to the accumulated ones) and of x."""
    inputs, outputs = linear.in_features, linear.out_features
    shape = f"{inputs}x{outputs}"

    def body(bench: Bench) -> Generator[None, None, None]:
        a_rD, b_rO = bench.cold(rank, inputs), bench.cold(rank, outputs)
        sums = [torch.zeros_like(t, dtype=sum_dtype) for t in (a_rD, b_rO)]
        x_TD, y_TO = bench.fresh(rows, inputs), bench.fresh(rows, outputs)
        low_Tr = bench.time(
            f"adapter_lora_forward.{shape}", lambda: _lora_forward(x_TD, y_TO, a_rD, b_rO)
        )
        yield
        dx_TD, dy_TO = bench.fresh(rows, inputs), bench.fresh(rows, outputs)
        bench.time(
            f"adapter_lora_backward.{shape}",
            lambda: _lora_backward(x_TD, low_Tr, dx_TD, dy_TO, a_rD, b_rO, sums),
        )

    size = 4.0 * rank * (inputs + outputs) + _FLOAT_BYTES * rows * (inputs + rank)
    return Case({"rank": rank, "rows": rows}, body, size)


def _lora_forward(x_TD: Tensor, y_TO: Tensor, a_rD: Tensor, b_rO: Tensor) -> Tensor:
    low_Tr = x_TD @ a_rD.T
    y_TO.addmm_(low_Tr, b_rO, alpha=2.0)
    return low_Tr


def _lora_backward(
    x_TD: Tensor,
    low_Tr: Tensor,
    dx_TD: Tensor,
    dy_TO: Tensor,
    a_rD: Tensor,
    b_rO: Tensor,
    sums: list[Tensor],
) -> None:
    dlow_Tr = (dy_TO @ b_rO.T).mul_(2.0)
    kind = sums[0].dtype
    da_rD, db_rO = torch.zeros_like(sums[0]), torch.zeros_like(sums[1])
    da_rD.addmm_(dlow_Tr.to(kind).T, x_TD.to(kind))
    db_rO.addmm_(low_Tr.to(kind).T, dy_TO.to(kind), alpha=2.0)
    dx_TD += dlow_Tr @ a_rD
    sums[0].add_(da_rD)
    sums[1].add_(db_rO)


def dropout_case(in_features: int, rows: int) -> Case:
    """What dropout adds to an adapter: the mask and the kept input, and, backward, the kept input
    and the kept gradient."""

    def body(bench: Bench) -> Generator[None, None, None]:
        x_TD = bench.fresh(rows, in_features)
        row_key_T = row_keys(0, 1, 2, torch.arange(rows)).to(bench.device)

        def forward() -> Tensor:
            keep_TD = dropout_keep_mask(row_key_T, 7, in_features, 0.1)
            _ = x_TD * keep_TD * 1.1
            return keep_TD

        keep_TD = bench.time(f"adapter_dropout_forward.{in_features}", forward)
        yield
        dx_TD = bench.fresh(rows, in_features)
        bench.time(
            f"adapter_dropout_backward.{in_features}",
            lambda: (x_TD * keep_TD * 1.1, dx_TD * keep_TD * 1.1),
        )

    return Case({"rows": rows}, body, 10.0 * rows * in_features)


TENSORS_PER_STEP = 16


def adamw_case(elements: int, sum_dtype: torch.dtype) -> Case:
    """The runtime's optimizer on one tensor of ``elements`` numbers of one slot, clipping
    included; measured on a list of tensors, as it is called."""

    def body(bench: Bench) -> Generator[None, None, None]:
        settings = (3e-4, 0.9, 0.999, 1e-8, 0.01, 1.0)
        lr, beta1, beta2, eps, decay, clip = (
            torch.full((1,), value, dtype=torch.float64, device=bench.device) for value in settings
        )
        step = torch.zeros(1, dtype=torch.int32, device=bench.device)
        active = torch.ones(1, dtype=torch.bool, device=bench.device)
        slots = AdamWSlots(lr, beta1, beta2, eps, decay, clip, step, active)
        pools = [_adamw_pool(bench, elements, sum_dtype) for _ in range(TENSORS_PER_STEP)]

        def one_tensor_at_a_time() -> None:
            multi_task_adamw_(pools, slots)

        bench.time("adamw", one_tensor_at_a_time)
        yield

    return Case({"elements": elements}, body, 20.0 * elements * TENSORS_PER_STEP)


def _adamw_pool(bench: Bench, elements: int, sum_dtype: torch.dtype) -> AdamWPool:
    shape = (1, elements)
    param, moment = (torch.zeros(shape, device=bench.device) for _ in range(2))
    grad = torch.full(shape, 1e-3, dtype=sum_dtype, device=bench.device)
    return AdamWPool(param, grad, moment, torch.zeros_like(param), slot_rows=(1,))


class _Forwarding(torch.autograd.Function):
    """Nothing but the call: what a layer's own autograd functions cost besides their work."""

    @staticmethod
    def forward(ctx, x_TD: Tensor) -> Tensor:
        return x_TD.view_as(x_TD)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


class _Calling(nn.Module):
    def forward(self, x_TD: Tensor) -> Tensor:
        return _Forwarding.apply(x_TD.reshape(-1, x_TD.shape[-1]))  # type: ignore[return-value]


def layer_overhead_case(model: ModelShape) -> Case:
    """Module calls and autograd functions of one block, without work: one per linear, and the
    views between them."""
    calls = len(model.block_linears)
    module = nn.ModuleList([_Calling() for _ in range(calls)])

    def body(bench: Bench) -> Generator[None, None, None]:
        start = bench.fresh(1, 8).requires_grad_(True)

        def forward() -> Tensor:
            x_TD = start
            for call in module:
                x_TD = call(x_TD).view(1, 1, 8).transpose(0, 1).view(1, 8)
            return x_TD

        out = bench.time("layer_overhead_forward", forward)
        yield
        ones = torch.ones_like(out)
        bench.time("layer_overhead_backward", lambda: torch.autograd.grad(out, start, ones))

    return Case({}, body, 1.0)


def adapter_load_case(parameters: int) -> Case:
    """A fresh adapter's weights, gradients and moments, and their copies into an instance."""

    def body(bench: Bench) -> Generator[None, None, None]:
        def load() -> list[Tensor]:
            weight = torch.empty(parameters, device=bench.device).uniform_(-1, 1)
            state = [weight, *(torch.zeros_like(weight) for _ in range(3))]
            return [tensor.clone() for tensor in state]

        bench.time("adapter_load", load)
        yield

    return Case({"parameters": parameters}, body, 32.0 * parameters)
