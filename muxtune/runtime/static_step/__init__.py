"""The whole training step of a micro-batch as one static program, captured in a CUDA graph.

``model``    the frozen weights of a Llama-family backbone, fused, and its rotary tables
``adapters`` the tasks' LoRA factors, gradients and moments, laid out for the fused linears
``extras``   the same for the other methods, and what they do around a linear
``virtual``  what prefixes and prompts put before a slot's sequences
``windows``  LoRA linears by products over windows of ranks, where they are asked for
``inputs``   everything that changes from step to step, in one buffer that one copy refills
``program``  forward, loss, backward and optimizer as explicit calls, without autograd
``captured`` the program of each row count as a CUDA graph, and the loop around its replays

Shape suffixes: T rows, D model features, F features of the MLP, V vocabulary, H query heads, K
key-value heads, E head features, P half of them, L positions, S adapter slots, R pool rows, N
sequence bounds.
"""

from muxtune.runtime.static_step.adapters import AdapterPools, SlotSpec
from muxtune.runtime.static_step.captured import CapturedSteps
from muxtune.runtime.static_step.extras import ExtraPools
from muxtune.runtime.static_step.inputs import Sequence, SlotInput, StepLayout
from muxtune.runtime.static_step.model import StaticModel, Unsupported
from muxtune.runtime.static_step.program import StepProgram

__all__ = [
    "AdapterPools",
    "CapturedSteps",
    "ExtraPools",
    "Sequence",
    "SlotInput",
    "SlotSpec",
    "StaticModel",
    "StepLayout",
    "StepProgram",
    "Unsupported",
]
