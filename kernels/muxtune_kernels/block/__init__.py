"""The small operators of a Llama-family block, forward and backward, without autograd.

A frozen backbone needs input gradients only, so a whole block is an explicit sequence of calls;
these are the ones between its linears and its attention.
"""

from .ops import (
    Heads,
    add_rms_norm,
    rms_norm_backward,
    rotate_,
    rotate_backward,
    swiglu,
    swiglu_backward_,
)

__all__ = [
    "Heads",
    "add_rms_norm",
    "rms_norm_backward",
    "rotate_",
    "rotate_backward",
    "swiglu",
    "swiglu_backward_",
]
