"""Adapter methods that a task may name, and the options each one takes.

The runtime adds a method here when it implements it, so that a task file is checked before any
model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping

METHODS: tuple[str, ...] = ("lora", "dora", "ia3", "bottleneck")
METHOD_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "lora": ("use_rslora",),
    "dora": ("use_rslora",),
    "ia3": ("feedforward_modules",),
    "bottleneck": (),
}
