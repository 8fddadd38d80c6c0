"""What changes from step to step, in one buffer: filled on the host, moved by one copy.

Rows are laid out densely: a slot's sequences follow those of the slot before, without alignment
(the kernels take ragged rows), and what is left at the end is filler. Filler rows form sequences
of their own, so that attention computes every row and no row holds what was there before.

Shape suffixes as in the package.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from muxtune_kernels import RowDropout, SlotRows, row_keys
from muxtune_kernels.multi_lora import StepRows
from muxtune_kernels.packed_attention import attention_tiles, max_tiles
from muxtune_kernels.packed_attention.tiles import TILE_ROWS

IGNORED_LABEL = -100
_ALIGN_BYTES = 256


class Sequence(NamedTuple):
    """One sequence of one slot. ``is_target_n``: whether token i is learnt (as the label of the
    row before it). ``position``: in its task's optimizer batch; with the seed, the step and the
    token's position it decides the dropout mask."""

    slot: int
    tokens_n: np.ndarray
    is_target_n: np.ndarray
    position: int = 0


class SlotInput(NamedTuple):
    """A slot's side of one micro-batch. ``loss_tokens``: target tokens of the task's whole
    optimizer batch. ``keeps``: add to the gradient of earlier micro-batches of this optimizer
    step. ``closes``: take the optimizer step after this one."""

    loss_tokens: int
    keeps: bool = False
    closes: bool = True
    scale: float = 1.0
    lr: float = 2e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    dropout: float = 0.0
    seed: int = 0
    step: int = 0


class Field(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class StepLayout(NamedTuple):
    """Sizes of the buffer. ``max_bounds``: sequences and stretches of filler that it can hold.
    ``tuned_rows``: see ``StepRows``; 0: ``max_rows``. ``prompts``: ranks of the slots that may have
    one, whose rows are the last of every micro-batch; see ``virtual``."""

    max_rows: int
    num_slots: int
    max_bounds: int
    max_seqlen: int
    dropout: bool = False
    tuned_rows: int = 0
    prompts: tuple[int, ...] = ()

    @property
    def prompt_rows(self) -> int:
        return sum(self.prompts)

    @property
    def fields(self) -> tuple[Field, ...]:
        rows, slots = self.max_rows, self.num_slots
        fields = [
            Field("input_ids", torch.int64, (rows,)),
            Field("labels", torch.int64, (rows,)),
            Field("positions", torch.int32, (rows,)),
            Field("slot_of_row", torch.int32, (rows,)),
            Field("cu_seqlens", torch.int32, (self.max_bounds + 1,)),
            Field("tiles", torch.int32, (max_tiles(rows, self.max_bounds), 3)),
            Field("slot_bounds", torch.int32, (slots, 3)),
            Field("keep", torch.int32, (slots,)),
            Field("scale", torch.float32, (slots,)),
            Field("rate", torch.float32, (slots,)),
            Field("loss_scale", torch.float32, (slots,)),
            Field("settings", torch.float64, (6, slots)),
            Field("active", torch.bool, (slots,)),
        ]
        if self.dropout:
            fields.append(Field("row_key", torch.int64, (rows,)))
        return tuple(fields)

    @property
    def num_bytes(self) -> int:
        return sum(_padded_bytes(field) for field in self.fields)

    def split(self, buffer: Tensor) -> dict[str, Tensor]:
        """The fields as views of one byte buffer."""
        views, start = {}, 0
        for field in self.fields:
            count = _num_bytes(field)
            views[field.name] = buffer[start : start + count].view(field.dtype).view(field.shape)
            start += _padded_bytes(field)
        return views


def _num_bytes(field: Field) -> int:
    return int(np.prod(field.shape)) * field.dtype.itemsize


def _padded_bytes(field: Field) -> int:
    return -(-_num_bytes(field) // _ALIGN_BYTES) * _ALIGN_BYTES


class StepInputs:
    """The device's buffer, whose addresses never change."""

    def __init__(self, layout: StepLayout, device: torch.device) -> None:
        self.layout = layout
        self.buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device)
        self.fields = layout.split(self.buffer)
        self.spans: tuple[tuple[int, int, int], ...] = ()  # for the CPU; see SlotRows

    def step_rows(self, num_rows: int) -> StepRows:
        fields = self.fields
        rows = SlotRows(fields["slot_of_row"][:num_rows], self.spans, fields["slot_bounds"])
        dropout = None
        if self.layout.dropout:
            dropout = RowDropout(fields["row_key"][:num_rows], fields["rate"])
        tuned_rows = self.layout.tuned_rows or self.layout.max_rows
        return StepRows(rows, fields["scale"], dropout, fields["keep"], tuned_rows)


class HostBuffer:
    """The host's side of the buffer, pinned where there is a device to copy to."""

    def __init__(self, layout: StepLayout, pinned: bool) -> None:
        self.layout = layout
        self.buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8, pin_memory=pinned)
        self.arrays = {name: view.numpy() for name, view in layout.split(self.buffer).items()}
        self.spans: tuple[tuple[int, int, int], ...] = ()

    def fill(
        self,
        num_rows: int,
        sequences: Iterable[Sequence],
        slots: Mapping[int, SlotInput],
        pad_id: int = 0,
        first_rows: Mapping[int, int] | None = None,
    ) -> None:
        """One micro-batch. Slots without an entry in ``slots`` are idle: their gradients stay.

        ``first_rows``: a slot's first row, where it is not to follow the slot before.
        Raises ValueError when the rows or bounds do not suffice.
        """
        ordered = sorted(sequences, key=lambda sequence: sequence.slot)
        room = num_rows - self.layout.prompt_rows
        starts = _place(ordered, first_rows or {}, room, self.layout.max_seqlen)
        self._fill_rows(num_rows, ordered, starts, pad_id)
        self._fill_bounds(num_rows, ordered, starts)
        self._fill_slots(slots)
        if self.layout.dropout:
            self._fill_row_keys(ordered, starts, slots)

    def _fill_rows(
        self, num_rows: int, ordered: list[Sequence], starts: list[int], pad_id: int
    ) -> None:
        arrays = self.arrays
        arrays["input_ids"][:num_rows] = pad_id
        arrays["labels"][:num_rows] = IGNORED_LABEL
        arrays["slot_of_row"][:num_rows] = -1
        arrays["positions"][:num_rows] = 0
        count = np.arange(self.layout.max_seqlen, dtype=np.int32)
        for (slot, tokens_n, is_target_n, _), start in zip(ordered, starts, strict=True):
            stop = start + len(tokens_n)
            arrays["input_ids"][start:stop] = tokens_n
            arrays["labels"][start : stop - 1] = np.where(
                is_target_n[1:], tokens_n[1:], IGNORED_LABEL
            )
            arrays["slot_of_row"][start:stop] = slot
            arrays["positions"][start:stop] = count[: stop - start]

    def _fill_bounds(self, num_rows: int, ordered: list[Sequence], starts: list[int]) -> None:
        bounds, spans = [0], {}
        cu_seqlens = self.arrays["cu_seqlens"]
        stops = [start + len(item.tokens_n) for item, start in zip(ordered, starts, strict=True)]
        prompts, end = self.layout.prompts, num_rows - self.layout.prompt_rows
        gaps = [start - stop for stop, start in zip([0, *stops], [*starts, end], strict=True)]
        room = len(cu_seqlens) - 1 - len(ordered) - len(prompts)
        length = self._filler_length(gaps, room)
        for (slot, *_), start, stop in zip(ordered, starts, stops, strict=True):
            self._fill_gap(bounds, start, length)
            bounds.append(stop)
            spans[slot] = (spans.get(slot, (start,))[0], stop)
        self._fill_gap(bounds, end, length)
        for count in prompts:
            self._fill_gap(bounds, bounds[-1] + count, count)
        if len(bounds) > len(cu_seqlens):
            raise ValueError(f"{len(bounds) - 1} sequences, room for {len(cu_seqlens) - 1}")
        cu_seqlens[: len(bounds)] = bounds
        cu_seqlens[len(bounds) :] = num_rows
        tiles_W3 = self.arrays["tiles"]
        tiles_W3[:] = attention_tiles(bounds, len(tiles_W3))
        slot_bounds = self.arrays["slot_bounds"]
        slot_bounds[:] = 0
        for slot, (start, stop) in spans.items():
            slot_bounds[slot] = (start, stop, stop - start)
        self.spans = tuple(sorted(((s, *span) for s, span in spans.items()), key=lambda x: x[1]))

    def _filler_length(self, gaps: list[int], room: int) -> int:
        """Of filler's sequences: one tile of the attention, whose work grows with the square of a
        sequence's tiles; longer where there is no room for so many bounds."""
        length, most = min(TILE_ROWS, self.layout.max_seqlen), self.layout.max_seqlen
        while length < most and sum(-(-gap // length) for gap in gaps) > room:
            length *= 2
        return min(length, most)

    def _fill_gap(self, bounds: list[int], stop: int, length_tokens: int) -> None:
        while bounds[-1] < stop:
            last, length = bounds[-1], min(length_tokens, stop - bounds[-1])
            bounds.append(last + length)
            self.arrays["positions"][last : last + length] = np.arange(length)

    def _fill_slots(self, slots: Mapping[int, SlotInput]) -> None:
        arrays = self.arrays
        for name in ("scale", "rate", "loss_scale", "settings", "active"):
            arrays[name][...] = 0
        arrays["keep"][:] = 1
        for slot, item in slots.items():
            arrays["keep"][slot] = item.keeps
            arrays["scale"][slot] = item.scale
            arrays["rate"][slot] = item.dropout
            arrays["loss_scale"][slot] = 1 / max(1, item.loss_tokens)
            arrays["settings"][:, slot] = (
                item.lr, item.beta1, item.beta2, item.eps, item.weight_decay, item.max_grad_norm
            )  # fmt: skip
            arrays["active"][slot] = item.closes

    def _fill_row_keys(
        self, ordered: list[Sequence], starts: list[int], slots: Mapping[int, SlotInput]
    ) -> None:
        for (slot, tokens_n, _, position), start in zip(ordered, starts, strict=True):
            item = slots[slot]
            if item.dropout:
                keys = row_keys(item.seed, item.step, position, torch.arange(len(tokens_n)))
                self.arrays["row_key"][start : start + len(tokens_n)] = keys.numpy()


def _place(
    ordered: list[Sequence], first_rows: Mapping[int, int], num_rows: int, max_seqlen: int
) -> list[int]:
    starts, row, last_slot = [], 0, -1
    for sequence in ordered:
        if sequence.slot != last_slot:
            last_slot = sequence.slot
            first = first_rows.get(last_slot, row)
            if first < row:
                raise ValueError(f"slot {last_slot} starts at row {first}, taken up to {row}")
            row = first
        starts.append(row)
        row += len(sequence.tokens_n)
        if len(sequence.tokens_n) > max_seqlen:
            raise ValueError(f"a sequence of {len(sequence.tokens_n)} tokens, at most {max_seqlen}")
    if row > num_rows:
        raise ValueError(f"{row} rows of sequences, room for {num_rows}")
    return starts
