"""Adapter methods that a task may name, and the options each one takes.

The runtime adds a method here when it implements it, so that a task file is checked before any
model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping

METHODS: tuple[str, ...] = ("lora", "dora", "ia3", "bottleneck", "prefix", "prompt")
METHOD_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "lora": ("use_rslora",),
    "dora": ("use_rslora",),
    "ia3": ("feedforward_modules",),
    "bottleneck": (),
    "prefix": (),
    "prompt": (),
}
# They adapt no linear, so a task's targets do not apply; rank is the number of virtual tokens.
WITHOUT_TARGETS: tuple[str, ...] = ("prefix", "prompt")
# Adapters known by names of their own, and how a task asks for them here.
KNOWN_AS: Mapping[str, str] = {
    "rslora": "lora with options: {use_rslora: true}",
    "houlsby": "bottleneck with targets: [o_proj, down_proj]",
    "serial": "bottleneck",
    "adapter": "bottleneck",
}


def own_targets(method: str, targets: tuple[str, ...]) -> tuple[str, ...]:
    """``targets`` for a method that adapts linears, none for one that does not."""
    return () if method in WITHOUT_TARGETS else targets
