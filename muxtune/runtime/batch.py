"""Micro-batches to tensors: which token lies in which row, and what each row is for.

Shape suffixes: T rows of the micro-batch, S adapter slots, n tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from muxtune.protocols import TaskLibrary
from muxtune.runtime.attention import PackedRows, pack_rows
from muxtune.runtime.prepended import KeySource, VirtualPlan, VirtualTokens, plan_virtual
from muxtune.types import MicroBatch, PackRule
from muxtune.workload.encoding import EncodedSequence
from muxtune_kernels import RowDropout, SlotRows, row_keys, slot_rows

IGNORED_LABEL = -100


class TextLibrary(TaskLibrary, Protocol):
    """A task library that holds text, as ``DatasetLibrary`` does."""

    def sequence(self, task_id: str, index: int) -> EncodedSequence: ...

    def validation(self, task_id: str) -> tuple[EncodedSequence, ...]: ...


class Placed(NamedTuple):
    """A whole sequence in the rows from ``row`` on. ``position``: in its step's batch."""

    slot: int
    row: int
    position: int
    sequence: EncodedSequence


class PassTensors(NamedTuple):
    """Input of one pass. ``loss_scale_S``: 1 / target tokens of each task's optimizer batch."""

    input_ids_T: Tensor
    position_ids_T: Tensor
    labels_T: Tensor
    packed: PackedRows
    rows: SlotRows
    dropout: RowDropout | None
    loss_scale_S: Tensor

    @property
    def num_slots(self) -> int:
        return self.loss_scale_S.numel()


class DropoutSeed(NamedTuple):
    """What a slot's dropout mask depends on besides the token and the module."""

    seed: int
    step: int
    rate: float


def place_task(
    micro_batch: MicroBatch, task_id: str, library: TextLibrary, slot_of: Mapping[str, int]
) -> list[Placed]:
    """One task's sequences of a micro-batch, each at its first row.

    Raises whatever the library raises for the task's data.
    """
    samples = library.batch(task_id, micro_batch.steps[task_id])
    placed = []
    for index, chunk in enumerate(micro_batch.chunks):
        row = index * micro_batch.shape.chunk_tokens
        for piece in chunk.pieces if chunk.task_id == task_id else ():
            if piece.start == 0:
                sequence = library.sequence(task_id, samples[piece.position].index)
                placed.append(Placed(slot_of[task_id], row, piece.position, sequence))
            row += piece.stop - piece.start
    return placed


def lay_out(
    micro_batch: MicroBatch,
    placed: Sequence[Placed],
    slot_of: Mapping[str, int],
    dropouts: Mapping[int, DropoutSeed],
    num_slots: int,
    pad_id: int,
    device: torch.device | str = "cpu",
    virtual: Mapping[int, VirtualTokens] | None = None,
) -> PassTensors:
    """Tensors of a whole micro-batch. A slot's chunks are its span, their filler included, so
    that shapes depend on the plan alone. Under the PAD rule each row is one causal sequence."""
    chunk_tokens, num_rows = micro_batch.shape.chunk_tokens, micro_batch.shape.padded_tokens
    if micro_batch.packing is PackRule.PAD:
        sequences = [(start, chunk_tokens) for start in range(0, num_rows, chunk_tokens)]
    else:
        sequences = [(item.row, len(item.sequence.tokens)) for item in placed]
    spans = _chunk_spans(micro_batch, slot_of)
    scale_S = torch.zeros(num_slots)
    for task_id, tokens in micro_batch.loss_tokens.items():
        if task_id in slot_of:
            scale_S[slot_of[task_id]] = 1 / max(tokens, 1)
    return assemble(placed, sequences, spans, scale_S, dropouts, num_rows, pad_id, device, virtual)


def assemble(
    placed: Sequence[Placed],
    sequences: Sequence[tuple[int, int]],
    spans: Iterable[tuple[int, int, int]],
    loss_scale_S: Tensor,
    dropouts: Mapping[int, DropoutSeed],
    num_rows: int,
    pad_id: int,
    device: torch.device | str,
    virtual: Mapping[int, VirtualTokens] | None = None,
) -> PassTensors:
    """``sequences``: (first row, rows) of what attends to itself; ``spans``: (slot, start, stop),
    the rows of each slot; ``virtual``: what comes before the sequences of a slot. Prompts get
    rows below the ``num_rows`` of the micro-batch."""
    spans = list(spans)
    plan = plan_virtual(virtual or {}, (slot for slot, *_ in spans), num_rows)
    sequences, sources = _with_sources(sorted(sequences), spans, plan)
    num_rows = plan.num_rows
    input_ids = np.full(num_rows, pad_id, dtype=np.int64)
    labels = np.full(num_rows, IGNORED_LABEL, dtype=np.int64)
    position_ids = np.zeros(num_rows, dtype=np.int64)
    for (row, count), source in zip(sequences, sources, strict=True):
        first = 0 if source is None else source.count
        position_ids[row : row + count] = np.arange(first, first + count)
    for item in placed:
        tokens, target_mask = item.sequence
        input_ids[item.row : item.row + len(tokens)] = tokens
        _label(labels[item.row : item.row + len(tokens)], tokens, target_mask)
    num_slots = loss_scale_S.numel()
    return PassTensors(
        torch.from_numpy(input_ids).to(device),
        torch.from_numpy(position_ids).to(device),
        torch.from_numpy(labels).to(device),
        pack_rows(sequences, num_rows, device, plan, sources),
        slot_rows(spans, num_rows, num_slots, device),
        _row_dropout(placed, dropouts, num_rows, num_slots, device),
        loss_scale_S.to(device),
    )


def _with_sources(
    sequences: list[tuple[int, int]], spans: Sequence[tuple[int, int, int]], plan: VirtualPlan
) -> tuple[list[tuple[int, int]], list[KeySource | None]]:
    """The sequences with the prompts behind them, and which shared keys come before each."""
    if not plan.sources:
        return sequences, [None] * len(sequences)
    slot_of_row = np.full(max(stop for *_, stop in spans), -1)
    for slot, start, stop in spans:
        slot_of_row[start:stop] = slot
    slots = [slot_of_row[row] if row < len(slot_of_row) else -1 for row, _ in sequences]
    sources = [plan.sources.get(int(slot)) for slot in slots]
    return [*sequences, *plan.prompts], [*sources, *[None] * len(plan.prompts)]


def _label(labels: np.ndarray, tokens: np.ndarray, target_mask: np.ndarray) -> None:
    """Row i predicts token i + 1 where its mask says so."""
    labels[:-1] = np.where(target_mask[:-1], tokens[1:], IGNORED_LABEL)


def _chunk_spans(micro_batch: MicroBatch, slot_of: Mapping[str, int]) -> list[tuple[int, int, int]]:
    """Neighbouring chunks of one slot become one span."""
    spans: list[tuple[int, int, int]] = []
    size = micro_batch.shape.chunk_tokens
    for index, chunk in enumerate(micro_batch.chunks):
        slot = slot_of.get(chunk.task_id)
        if slot is None:
            continue
        start, stop = index * size, (index + 1) * size
        if spans and spans[-1][0] == slot and spans[-1][2] == start:
            start = spans.pop()[1]
        spans.append((slot, start, stop))
    return spans


def _row_dropout(
    placed: Sequence[Placed],
    dropouts: Mapping[int, DropoutSeed],
    num_rows: int,
    num_slots: int,
    device: torch.device | str,
) -> RowDropout | None:
    """Keys of (task seed, step, position in the batch, token position): free of the packing."""
    if not any(item.rate for item in dropouts.values()):
        return None
    row_key_T = torch.zeros(num_rows, dtype=torch.int64)
    rate_S = torch.zeros(num_slots)
    for slot, (seed, step, rate) in dropouts.items():
        rate_S[slot] = rate
        mine = [item for item in placed if item.slot == slot] if rate else []
        if not mine:
            continue
        counts = [len(item.sequence.tokens) for item in mine]
        tokens = np.concatenate([np.arange(count) for count in counts])
        rows = np.repeat([item.row for item in mine], counts) + tokens
        positions = np.repeat([item.position for item in mine], counts)
        row_key_T[torch.from_numpy(rows)] = row_keys(
            seed, step, torch.from_numpy(positions), torch.from_numpy(tokens)
        )
    return RowDropout(row_key_T.to(device), rate_S.to(device))
