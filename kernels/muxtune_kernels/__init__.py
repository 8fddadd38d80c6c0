"""Fused multi-task operators: float32 references in torch, fast forms in Triton."""

from .adamw import AdamWPool, AdamWResult, AdamWSlots, multi_task_adamw_
from .cross_entropy import multi_task_cross_entropy, multi_task_nll
from .dropout import RowDropout, dropout_keep_mask, row_keys
from .multi_lora import multi_lora_linear, multi_lora_linear_group
from .rows import SlotRows, slot_bounds, slot_rows, spans_of

__all__ = [
    "AdamWPool",
    "AdamWResult",
    "AdamWSlots",
    "RowDropout",
    "SlotRows",
    "dropout_keep_mask",
    "multi_lora_linear",
    "multi_lora_linear_group",
    "multi_task_adamw_",
    "multi_task_cross_entropy",
    "multi_task_nll",
    "row_keys",
    "slot_bounds",
    "slot_rows",
    "spans_of",
]
