"""One frozen linear with many tasks' low-rank adapters."""

from .op import multi_lora_linear, multi_lora_linear_group
from .reference import multi_lora_linear_reference

__all__ = ["multi_lora_linear", "multi_lora_linear_group", "multi_lora_linear_reference"]
