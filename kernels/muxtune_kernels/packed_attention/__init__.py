"""Causal attention of short packed sequences with the rotary embedding in it."""

from .op import fits_packed_attention, packed_attention_backward, packed_attention_forward
from .reference import packed_attention_reference
from .tiles import attention_tiles, max_tiles

__all__ = [
    "attention_tiles",
    "fits_packed_attention",
    "max_tiles",
    "packed_attention_backward",
    "packed_attention_forward",
    "packed_attention_reference",
]
