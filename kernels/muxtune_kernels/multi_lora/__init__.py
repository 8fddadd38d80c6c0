"""One frozen linear with many tasks' low-rank adapters."""

from .explicit import (
    LoraLinear,
    StepRows,
    lora_linear_factor_grad,
    lora_linear_forward,
    lora_linear_input_grad,
)
from .flags import ReadyFlags
from .op import multi_lora_linear, multi_lora_linear_group
from .reference import multi_lora_linear_reference

__all__ = [
    "LoraLinear",
    "ReadyFlags",
    "StepRows",
    "lora_linear_factor_grad",
    "lora_linear_forward",
    "lora_linear_input_grad",
    "multi_lora_linear",
    "multi_lora_linear_group",
    "multi_lora_linear_reference",
]
