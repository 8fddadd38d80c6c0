"""Plain HF PEFT training of one task, written without anything of muxtune.runtime but the start
values (and, for dropout, the mask's definition), as a tenant would write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from muxtune.types import TaskSpec
from muxtune.workload.encoding import EncodedSequence
from muxtune_kernels import dropout_keep_mask, row_keys


class Batch:
    """One padded batch. ``positions``: of its sequences in the optimizer batch."""

    def __init__(self, sequences: Sequence[EncodedSequence], positions: Sequence[int]) -> None:
        longest = max(len(item.tokens) for item in sequences)
        self.positions = list(positions)
        self.input_ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
        self.attention_mask = torch.zeros(len(sequences), longest, dtype=torch.int64)
        self.labels = torch.full((len(sequences), longest), -100)
        for row, (tokens, mask) in enumerate(sequences):
            count = len(tokens)
            ids = torch.from_numpy(tokens.astype(np.int64))
            self.input_ids[row, :count] = ids
            self.attention_mask[row, :count] = 1
            learnt = torch.from_numpy(mask[:-1])
            self.labels[row, : count - 1] = torch.where(learnt, ids[1:], -100)


class SeededDropout(torch.nn.Module):
    """Our mask in the place of torch's: a function of seed, step, sequence, token and module."""

    def __init__(self, module_key: int, rate: float, run: Any) -> None:
        super().__init__()
        self.module_key, self.rate, self.run = module_key, rate, run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch = self.run.batch
        assert batch is not None
        rows, tokens = batch.input_ids.shape
        features = x.shape[-1]  # of [rows, tokens, features], flattened in OPT's MLP
        sample = torch.tensor(batch.positions)[:, None].expand(rows, tokens).flatten()
        token = torch.arange(tokens).repeat(rows)
        keys = row_keys(self.run.task.seed, self.run.step, sample, token)
        keep = dropout_keep_mask(keys, self.module_key, features, self.rate)
        return x * keep.view(x.shape) / (1 - self.rate)


class PeftRun:
    """Trains ``plain_model`` (which is changed) with PEFT and torch's own optimizer."""

    def __init__(
        self,
        plain_model: Any,
        task: TaskSpec,
        start_a: Mapping[str, torch.Tensor],
        module_keys: Mapping[str, int] | None = None,
    ) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import get_scheduler

        spec, settings = task.adapter, task.optimizer
        self.task, self.step, self.batch = task, 0, None
        config = LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,  # type: ignore[arg-type]
            lora_dropout=0.0,
            target_modules=list(spec.targets),
            task_type="CAUSAL_LM",
        )
        self.model = get_peft_model(plain_model, config)
        self.model.train()
        self.modules = {
            name.removeprefix("base_model.model."): module
            for name, module in self.model.named_modules()
            if hasattr(module, "lora_A")
        }
        assert set(self.modules) == set(start_a)
        for name, module in self.modules.items():
            module.lora_A["default"].weight.data.copy_(start_a[name])
            if module_keys is not None:
                module.lora_dropout["default"] = SeededDropout(
                    module_keys[name], spec.dropout, self
                )
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
        name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
        self.scheduler = get_scheduler(name, self.optimizer, settings.warmup_steps, task.num_steps)

    def train_step(self, sequences: Sequence[EncodedSequence]) -> tuple[float, float]:
        """(loss, gradient norm) of one optimizer step over ``accumulation`` padded batches."""
        size = self.task.batch_size
        total = sum(item.target_tokens for item in sequences)
        loss_sum = 0.0
        for first in range(0, len(sequences), size):
            part = sequences[first : first + size]
            self.batch = Batch(part, range(first, first + len(part)))
            logits = self.model(
                input_ids=self.batch.input_ids, attention_mask=self.batch.attention_mask
            ).logits
            nll = functional.cross_entropy(
                logits.flatten(0, 1), self.batch.labels.flatten(), reduction="sum"
            )
            (nll / total).backward()
            loss_sum += nll.item()
        limit = self.task.optimizer.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss_sum / total, float(norm)

    def weights(self) -> dict[tuple[str, str], torch.Tensor]:
        """As ``TaskState`` keys and shapes them."""
        out = {}
        for name, module in self.modules.items():
            out[name, "lora_A"] = module.lora_A["default"].weight.detach()
            out[name, "lora_B"] = module.lora_B["default"].weight.detach().T
        return out


def plain_copy(model: Any) -> Any:
    """An untouched transformers model with the weights of a backbone's."""
    from transformers import AutoModelForCausalLM

    config = model.config.__class__(**model.config.to_dict())
    copy = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    copy.load_state_dict(model.state_dict())
    copy.tie_weights()
    return copy.float()
