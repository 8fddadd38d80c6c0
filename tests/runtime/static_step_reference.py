"""A model of transformers with plain LoRA modules, one sequence at a time: what the static step
must reproduce. Also makes tiny models, adapters and micro-batches."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalIterable=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from muxtune.runtime.static_step import Sequence, SlotInput, SlotSpec
from muxtune.runtime.static_step.adapters import AdapterPools, LoraState


def tiny_llama(
    hidden: int = 64, kv_heads: int = 2, layers: int = 2, seed: int = 0, intermediate: int = 96
) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=257, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=kv_heads,
        max_position_embeddings=512, rope_theta=5000.0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
        else:
            parameter.data *= 3
    return model


class PlainLora(nn.Module):
    """One linear with the adapters of all slots; ``current`` says whose turn it is."""

    def __init__(self, linear: nn.Linear, current: list[int]) -> None:
        super().__init__()
        self.linear, self.current = linear, current
        self.factors: dict[int, tuple[Tensor, Tensor, float]] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.linear.weight, self.linear.bias)
        if self.current[0] in self.factors:
            a_rD, b_rO, scale = self.factors[self.current[0]]
            y = y + scale * (x @ a_rD.T @ b_rO)
        return y


class Reference:
    """Tasks' adapters trained by autograd and ``torch.optim.AdamW``."""

    def __init__(self, model: LlamaForCausalLM, slots: tuple[SlotSpec, ...], seed: int) -> None:
        self.model, self.current = model, [0]
        self.lora: dict[str, PlainLora] = {}
        self.factors: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and "lm_head" not in name:
                parent = model.get_submodule(name.rpartition(".")[0])
                self.lora[name] = PlainLora(module, self.current)
                setattr(parent, name.rpartition(".")[2], self.lora[name])
        generator = torch.Generator().manual_seed(seed)
        for slot, spec in enumerate(slots):
            self.factors[slot] = {}
            for name, lora in self.lora.items():
                if name.rpartition(".")[2] in spec.targets:
                    out, width = lora.linear.weight.shape
                    a = torch.randn(spec.rank, width, generator=generator) / math.sqrt(width)
                    b = torch.randn(spec.rank, out, generator=generator) * 0.1
                    self.factors[slot][name] = (a.requires_grad_(), b.requires_grad_())

    def fill(self, pools: AdapterPools) -> None:
        for slot, factors in self.factors.items():
            states = {}
            for name, (a, b) in factors.items():
                moments = [(x.detach(), torch.zeros_like(x), torch.zeros_like(x)) for x in (a, b)]
                states[name] = LoraState(*moments)
            pools.load(slot, states, 0)

    def backward(self, sequences: list[Sequence], slots: dict[int, SlotInput]) -> dict[int, float]:
        losses = dict.fromkeys(slots, 0.0)
        for slot, tokens_n, is_target_n, _ in sequences:
            self.current[0] = slot
            for name, lora in self.lora.items():
                lora.factors = {
                    s: (*f[name], slots[s].scale) for s, f in self.factors.items()
                    if name in f and s in slots
                }  # fmt: skip
            ids = torch.from_numpy(tokens_n)[None]
            logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            labels = torch.where(torch.from_numpy(is_target_n[1:]), ids[0, 1:], -100)
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            loss = loss / slots[slot].loss_tokens
            loss.backward()
            losses[slot] += loss.item()
        return losses

    def parameters(self, slot: int) -> list[Tensor]:
        return [x for pair in self.factors[slot].values() for x in pair]


def random_batch(
    rng: np.random.Generator, lengths_of: dict[int, list[int]], vocab: int = 257
) -> list[Sequence]:
    return [
        Sequence(slot, rng.integers(0, vocab, n), np.arange(n) >= min(2, n - 1), position)
        for slot, lengths in lengths_of.items()
        for position, n in enumerate(lengths)
    ]


def target_tokens(sequences: list[Sequence], slot: int) -> int:
    return sum(int(s.is_target_n[1:].sum()) for s in sequences if s.slot == slot)
