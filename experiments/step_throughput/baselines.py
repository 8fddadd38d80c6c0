"""What the step is compared with: the frozen backbone alone, HF PEFT one task at a time, and one
padded batch of all tasks.

Shape suffixes: T rows, D model features, H heads, E head features, B sequences, L padded length.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from muxtune.runtime.static_step import StaticModel
from muxtune.runtime.static_step.model import Block
from muxtune_kernels import multi_task_cross_entropy

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def gpu_seconds(run: Callable[[], object], repeats: int) -> list[float]:
    """Of each repeat, by device events."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    run()
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


class CompiledBackbone:
    """Forward, loss and input gradient of the frozen backbone, compiled blocks in a CUDA graph."""

    def __init__(self, model: StaticModel, cu_seqlens: list[int], max_seqlen: int) -> None:
        self.model, self.max_seqlen = model, max_seqlen
        device, self.num_rows = model.device, cu_seqlens[-1]
        generator = torch.Generator(device=device).manual_seed(0)
        vocab = model.embedding_VD.shape[0]
        self.ids_T = torch.randint(0, vocab, (self.num_rows,), device=device, generator=generator)
        self.cu_N = torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
        position_T = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(cu_seqlens)]).to(
            device
        )
        cos, sin = model.cos_LP[position_T], model.sin_LP[position_T]
        self.cos_T1E = torch.cat((cos, cos), -1)[:, None].to(model.dtype)
        self.sin_T1E = torch.cat((sin, sin), -1)[:, None].to(model.dtype)
        self.slot_T = torch.zeros(self.num_rows, dtype=torch.int32, device=device)
        self.scale_S = torch.full((1,), 1 / self.num_rows, device=device)
        self._compiled = torch.compile(self._block, dynamic=False, fullgraph=True)
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
            stream.synchronize()
            with torch.cuda.graph(self.graph, stream=stream):
                self.dx_TD = self._step()
        torch.cuda.synchronize()

    def _step(self) -> Tensor:
        model = self.model
        x_TD = model.embedding_VD.index_select(0, self.ids_T).requires_grad_()
        hidden_TD = x_TD
        for block in model.blocks:
            hidden_TD = self._compiled(hidden_TD, *_weights(block))
        width = (hidden_TD.shape[1],)
        normed_TD = functional.rms_norm(hidden_TD, width, model.final_norm_D, model.eps)
        loss_S = multi_task_cross_entropy(
            normed_TD, model.lm_head_VD, self.ids_T, self.slot_T, self.scale_S, 1
        )
        return torch.autograd.grad(loss_S.sum(), x_TD)[0]

    def _block(self, x_TD, norm_1, w_qkv, w_out, norm_2, w_gate_up, w_down) -> Tensor:
        heads, eps, width = self.model.heads, self.model.eps, (x_TD.shape[1],)
        qkv_TC = functional.linear(functional.rms_norm(x_TD, width, norm_1, eps), w_qkv)
        parts = (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)
        q, k, v = qkv_TC.unflatten(1, (sum(parts), heads.head_dim)).split(parts, dim=1)
        q, k = self._rotate(q), self._rotate(k)
        attended = torch.ops.aten._flash_attention_forward(
            q, k, v.contiguous(), self.cu_N, self.cu_N, self.max_seqlen, self.max_seqlen, 0.0,
            True, False,
        )[0]  # fmt: skip
        x_TD = x_TD + functional.linear(attended.flatten(1), w_out)
        gate_up = functional.linear(functional.rms_norm(x_TD, width, norm_2, eps), w_gate_up)
        gate, up = gate_up.chunk(2, dim=1)
        return x_TD + functional.linear(functional.silu(gate) * up, w_down)

    def _rotate(self, x_THE: Tensor) -> Tensor:
        left, right = x_THE.chunk(2, dim=-1)
        return x_THE * self.cos_T1E + torch.cat((-right, left), -1) * self.sin_T1E


def _weights(block: Block) -> tuple[Tensor, ...]:
    qkv, out, gate_up, down = (linear.weight_OD for linear in block.linears)
    return block.attention_norm_D, qkv, out, block.mlp_norm_D, gate_up, down


# ----------------------------------------------------------------------------------- HF PEFT


def peft_model(model: Any, rank: int) -> tuple[Any, torch.optim.Optimizer]:
    """One bf16 LoRA adapter on all seven linears, and its fused AdamW."""
    from peft import LoraConfig, get_peft_model

    torch.backends.cuda.enable_cudnn_sdp(False)
    model.config._attn_implementation = "sdpa"
    model.config.use_cache = False
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS)
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False).train()
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    return wrapped, torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def padded_batch(sequences: list[np.ndarray]) -> dict[str, Tensor]:
    longest = max(len(tokens) for tokens in sequences)
    ids_BL = np.zeros((len(sequences), longest), dtype=np.int64)
    mask_BL = np.zeros_like(ids_BL)
    for row, tokens in enumerate(sequences):
        ids_BL[row, : len(tokens)] = tokens
        mask_BL[row, : len(tokens)] = 1
    labels_BL = np.where(mask_BL == 1, ids_BL, -100)
    host = {"input_ids": ids_BL, "attention_mask": mask_BL, "labels": labels_BL}
    return {key: torch.from_numpy(value).pin_memory().cuda(non_blocking=True)
            for key, value in host.items()}  # fmt: skip


def time_steps(
    model: Any, optimizer: torch.optim.Optimizer, batches: Iterator[list[np.ndarray]],
    warm_up: int, count: int, limit_s: float,
) -> dict[str, float]:  # fmt: skip
    """Whole steps from host data on; stops early (and says so by ``steps``) at the limit."""

    def step() -> tuple[int, Tensor]:
        sequences = next(batches)
        loss = model(**padded_batch(sequences)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return sum(len(tokens) for tokens in sequences), loss.detach()

    losses = []
    for _ in range(warm_up):
        step()
    gc.collect()
    gc.freeze()  # the collector's passes over a large model would slow a baseline down
    gc.disable()
    torch.cuda.synchronize()
    start_s, tokens, done = time.perf_counter(), 0, 0
    while done < count and (done == 0 or time.perf_counter() - start_s < limit_s):
        num_tokens, loss = step()
        tokens, done = tokens + num_tokens, done + 1
        losses.append(loss)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start_s
    gc.enable()
    gc.unfreeze()
    assert all(torch.stack(losses).isfinite())
    return {
        "steps": done, "seconds": seconds, "effective_tokens": tokens,
        "effective_tokens_per_s": tokens / seconds,
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9,
    }  # fmt: skip
