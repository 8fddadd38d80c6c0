"""Whether a whole step of a profile is one: a file with a right hash may still hold anything."""

from __future__ import annotations

from typing import Any

from muxtune.cost.calibration import WholeStep
from muxtune.cost.number_checks import is_count, is_number
from muxtune.types import AdapterSlot, PassLayout, PassLoad, ShapeKey

MOST_LAYERS, MOST_S = 10_000, 1e9
_MOST_SLOTS, _MOST_ROWS, _MOST_PAIRS, _MOST_BYTES = 1_000_000, 1 << 24, 1e15, 1 << 62


def problem_of(step: WholeStep) -> str:
    """Nothing where it is as ``WholeStep`` says."""
    if not isinstance(step.name, str) or not step.name:
        return "has no name"
    name, times = f"'{step.name}'", step.repeats_s
    if not times or not all(is_number(t) and 0 < t <= MOST_S for t in times):
        return f"{name} has no times"
    # Less than 0 is where what had been freed before hid it.
    if not is_count(step.peak_bytes, -_MOST_BYTES):
        return f"{name} has peak_bytes {step.peak_bytes!r}, which are no bytes"
    for field in ("num_slots", "num_layers"):
        value, most = getattr(step, field), MOST_LAYERS if field == "num_layers" else _MOST_SLOTS
        if not is_count(value) or value > most:
            return f"{name} has {field} {value!r}, which is no count"
    if not isinstance(step.loads, tuple) or not step.loads:
        return f"{name} has no list of loads"
    for place, load in enumerate(step.loads):
        if not _is_load(load):
            return f"{name} has a load {place} that is none, or has a missing or odd number"
    return ""


def _is_load(load: Any) -> bool:
    if not isinstance(load, PassLoad) or not isinstance(load.shape, ShapeKey):
        return False
    shape, slots, closing = load.shape, load.shape.slots, load.optimizer_slots
    return (
        is_count(shape.chunk_tokens, 1)
        and is_count(shape.num_chunks, 1)
        and shape.padded_tokens <= _MOST_ROWS
        and is_count(shape.recompute)
        and isinstance(slots, tuple)
        and all(map(_is_slot, slots))
        and all(
            is_number(x) and 0 <= x <= _MOST_PAIRS for x in (load.attention_pairs, load.loss_rows)
        )
        and isinstance(closing, tuple)
        and all(is_count(slot) and slot < len(slots) for slot in closing)
        and (load.layout is None or _is_layout(load.layout, shape))
    )


def _is_slot(slot: Any) -> bool:
    return (
        isinstance(slot, AdapterSlot)
        and isinstance(slot.method, str)
        and is_count(slot.rank, 1)
        and isinstance(slot.targets, tuple)
        and all(isinstance(target, str) for target in slot.targets)
        and isinstance(slot.dropout, bool)
    )


def _is_layout(layout: Any, shape: ShapeKey) -> bool:
    if not isinstance(layout, PassLayout):
        return False
    rows, sequences = layout.slot_rows, layout.sequence_rows
    return (
        isinstance(rows, tuple)
        and isinstance(sequences, tuple)
        and len(rows) == len(shape.slots)
        and all(map(is_count, rows))
        and all(is_count(length, 1) for length in sequences)
        and sum(rows) <= shape.padded_tokens
    )
