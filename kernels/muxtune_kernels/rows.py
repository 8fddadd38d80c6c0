"""Which slot owns which row of a micro-batch.

Shape suffixes: T rows (packed tokens), S adapter slots.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Span = tuple[int, int, int]


class SlotRows(NamedTuple):
    """The rows of one micro-batch, shared by all linears of a pass.

    slot_of_row_T: int32 [T]; the slot whose adapter a row uses, -1 for filler (base op only).
    spans: host side (slot, start, stop), ascending and disjoint; what the CPU path loops over.
        The CUDA path never reads it, so a captured graph serves every layout of the rows.
    slot_bounds_S3: int32 [S, 3], first row, one past the last row and number of rows of each
        slot, as `slot_bounds` makes it; None lets every CUDA call compute it anew (more kernels).
    """

    slot_of_row_T: Tensor
    spans: tuple[Span, ...]
    slot_bounds_S3: Tensor | None = None


def slot_rows(
    spans: Iterable[Span], num_rows: int, num_slots: int, device: torch.device | str = "cpu"
) -> SlotRows:
    """Rows from host-side spans; rows in no span are filler.

    Raises ValueError when spans overlap, leave [0, num_rows), or name an unknown slot.
    """
    ordered = tuple(sorted(spans, key=lambda span: span[1]))
    slot_of_row_T = torch.full((num_rows,), -1, dtype=torch.int32)
    last_stop = 0
    for slot, start, stop in ordered:
        if not (0 <= slot < num_slots and last_stop <= start <= stop <= num_rows):
            raise ValueError(f"bad span {(slot, start, stop)} of {num_rows} rows")
        slot_of_row_T[start:stop] = slot
        last_stop = stop
    bounds_S3 = _host_bounds(ordered, num_slots)
    return SlotRows(slot_of_row_T.to(device), ordered, bounds_S3.to(device))


def spans_of(slot_of_row: Sequence[int] | Tensor) -> tuple[Span, ...]:
    """The maximal runs of equal slots, filler left out. Reads the tensor on the host."""
    slots = slot_of_row.tolist() if isinstance(slot_of_row, Tensor) else list(slot_of_row)
    edges = [i for i in range(len(slots)) if i == 0 or slots[i] != slots[i - 1]]
    stops = [*edges[1:], len(slots)]
    return tuple((slots[a], a, b) for a, b in zip(edges, stops, strict=True) if slots[a] >= 0)


def _host_bounds(spans: Sequence[Span], num_slots: int) -> Tensor:
    bounds = [[0, 0, 0] for _ in range(num_slots)]
    for slot, start, stop in spans:
        if start < stop:
            first, last, count = bounds[slot]
            start, stop = (min(first, start), max(last, stop)) if count else (start, stop)
            bounds[slot] = [start, stop, 0]
        bounds[slot][2] = sum(c - b for s, b, c in spans if s == slot)
    return torch.tensor(bounds, dtype=torch.int32).reshape(num_slots, 3)


def slot_bounds(slot_of_row_T: Tensor, num_slots: int) -> Tensor:
    """int32 [S, 3]: first row, one past the last row, number of rows; zeros for an empty slot.

    Device side and free of host syncs, so it may be part of a captured graph.
    """
    num_rows = slot_of_row_T.numel()
    if num_rows == 0 or num_slots == 0:
        return slot_of_row_T.new_zeros((num_slots, 3))
    row_T = torch.arange(num_rows, device=slot_of_row_T.device, dtype=torch.int32)
    slot_S = torch.arange(num_slots, device=slot_of_row_T.device, dtype=torch.int32)
    owned_ST = slot_of_row_T == slot_S[:, None]
    stop_S = torch.where(owned_ST, row_T + 1, 0).amax(1)
    start_S = torch.where(owned_ST, row_T, num_rows).amin(1)
    columns = (torch.where(stop_S > 0, start_S, 0), stop_S, owned_ST.sum(1))
    return torch.stack(columns, 1).to(torch.int32)


def slot_offsets(slot_ranks: Sequence[int]) -> tuple[int, ...]:
    """First pool row of each slot, and the total: len(slot_ranks) + 1 numbers."""
    offsets = [0]
    for rank in slot_ranks:
        if rank < 0:
            raise ValueError(f"a slot's rank is negative: {tuple(slot_ranks)}")
        offsets.append(offsets[-1] + rank)
    return tuple(offsets)
