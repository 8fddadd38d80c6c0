"""Real data sets: files to encoded sequences, and each task's own order of batches.

A task's documents are split into training and held-out ones by a draw seeded with the task's
seed; equal documents stay on one side. Each epoch reshuffles the training sequences, and batches
are taken from the endless stream of epochs, so one batch may span two. Nothing here depends on
other tasks or on any scheduling decision.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from muxtune.errors import ConfigError, DataError
from muxtune.types import Sample, TaskReadyData, TaskSpec
from muxtune.workload.encoding import (
    EncodedExample,
    EncodedSequence,
    Tokenizer,
    encode_example,
)
from muxtune.workload.examples import (
    ChatExample,
    CompletionExample,
    Example,
    Message,
    TextExample,
    read_examples,
)
from muxtune.workload.lengths import summarise

__all__ = [
    "ChatExample",
    "CompletionExample",
    "DatasetLibrary",
    "EncodedSequence",
    "Example",
    "Message",
    "TextExample",
    "Tokenizer",
    "encode_example",
    "read_examples",
    "split_documents",
]

_log = logging.getLogger(__name__)

_SPLIT, _SHUFFLE = 0, 1  # purposes of a seed, so that the two draws are independent
_KEPT_PERMUTATIONS = 8
_KEPT_FILES = 64


def split_documents(keys: Sequence[object], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indexes of training and of held-out documents, each in file order.

    ``keys``: equal keys mean equal documents; they stay together, and a held-out one counts once.
    ``share`` of the distinct documents is held out: at least one when the share is above 0, never
    all. Raises ValueError when that is impossible.
    """
    first_of: dict[object, int] = {}
    for index, key in enumerate(keys):
        first_of.setdefault(key, index)
    distinct = list(first_of.values())
    if share == 0:
        return list(range(len(keys))), []
    if len(distinct) < 2:
        raise ValueError("fewer than two distinct documents")
    num_held = min(max(1, round(share * len(distinct))), len(distinct) - 1)
    order = np.random.default_rng([seed, _SPLIT]).permutation(len(distinct))
    held = sorted(distinct[position] for position in order[:num_held].tolist())
    held_keys = {keys[index] for index in held}
    return [index for index, key in enumerate(keys) if key not in held_keys], held


class _File(NamedTuple):
    """An encoded file: its documents that hold at least one sequence, and how many were cut."""

    documents: tuple[EncodedExample, ...]
    digests: tuple[bytes, ...]
    num_cut: int


class DatasetLibrary:
    """TaskLibrary of tasks whose ``data.path`` is set.

    ``tokenizer_for`` maps a base model's name to its tokenizer; it may raise ConfigError.
    Encoded files are kept in memory and shared by tasks with the same model, format and maximum.
    """

    def __init__(self, tokenizer_for: Callable[[str], Tokenizer]) -> None:
        self._tokenizer_for = tokenizer_for
        self._files: dict[tuple[object, ...], _File] = {}
        self._tasks: dict[str, _TaskData] = {}

    def add(self, task: TaskSpec) -> TaskReadyData:
        """Reads, encodes and splits the task's data; epochs become steps, rounded up.

        Raises DataError for a bad file, ConfigError for a maximum length that the model does not
        allow or a task without a path.
        """
        file = self._file(task)
        training, held_out = _split(task, file)
        data = _TaskData(task, training, held_out, _notes(task, file))
        for note in data.notes:
            _log.warning("task '%s': %s", task.task_id, note)
        self._tasks[task.task_id] = data
        return data.ready

    def discard(self, task_id: str) -> None:
        self._tasks.pop(task_id, None)

    def batch(self, task_id: str, step: int) -> tuple[Sample, ...]:
        return self._tasks[task_id].batch(step)

    def num_steps(self, task_id: str) -> int:
        return self._tasks[task_id].ready.num_steps

    def period_steps(self, task_id: str) -> int | None:
        """None: every epoch has an order of its own."""
        return None

    def lengths_key(self, task_id: str) -> str:
        return self._tasks[task_id].key

    def sequence(self, task_id: str, index: int) -> EncodedSequence:
        """A training sequence by its ``Sample.index``."""
        return self._tasks[task_id].training[index]

    def validation(self, task_id: str) -> tuple[EncodedSequence, ...]:
        """The held-out sequences, in file order; empty for a validation share of 0."""
        return self._tasks[task_id].held_out

    def notes(self, task_id: str) -> tuple[str, ...]:
        """What a tenant should know of the data, such as examples that were cut."""
        return self._tasks[task_id].notes

    def _file(self, task: TaskSpec) -> _File:
        data = task.data
        if not data.path:
            remedy = "Name a data file; lengths without text can only be simulated"
            raise ConfigError(f"task '{task.task_id}': data", "is not set", remedy)
        tokenizer = self._tokenizer_for(task.model)
        _check_max_length(task, tokenizer)
        key = (_version(data.path), task.model, data.format, data.max_length_tokens)
        if key not in self._files:
            encoded = _encode_file(data.path, data.format, data.max_length_tokens, tokenizer)
            while len(self._files) >= _KEPT_FILES:
                del self._files[next(iter(self._files))]
            self._files[key] = encoded
        return self._files[key]


def _version(path: str) -> tuple[object, ...]:
    try:
        status = Path(path).stat()
    except OSError:
        return (path,)  # reading it will tell what is wrong
    return (path, status.st_mtime_ns, status.st_size, status.st_ino)


def _check_max_length(task: TaskSpec, tokenizer: Tokenizer) -> None:
    allowed, wanted = tokenizer.max_length_tokens, task.data.max_length_tokens
    if allowed is not None and wanted > allowed:
        raise ConfigError(
            f"task '{task.task_id}': max_length",
            f"{wanted} tokens is a longer sequence than model '{task.model}' allows ({allowed})",
            f"Give at most {allowed}",
        )


def _encode_file(path: str, format: str, max_length_tokens: int, tokenizer: Tokenizer) -> _File:
    examples = read_examples(path, format)
    encoded = [encode_example(example, tokenizer, max_length_tokens, path) for example in examples]
    documents = tuple(document for document in encoded if document.sequences)
    if not documents:
        raise DataError(path, "no document has two tokens, so nothing is learnt", "Add text")
    digests = tuple(_digest(document.sequences) for document in documents)
    return _File(documents, digests, sum(document.cut for document in documents))


def _digest(sequences: Sequence[EncodedSequence]) -> bytes:
    """Equal for equal lengths, tokens and targets only."""
    digest = hashlib.blake2b(digest_size=16)
    for tokens, target_mask in sequences:
        digest.update(len(tokens).to_bytes(8, "little"))
        digest.update(tokens.astype("<i4").tobytes())
        digest.update(target_mask.tobytes())
    return digest.digest()


def _split(
    task: TaskSpec, file: _File
) -> tuple[tuple[EncodedSequence, ...], tuple[EncodedSequence, ...]]:
    try:
        sides = split_documents(file.digests, task.data.validation_share, task.seed)
    except ValueError as problem:
        remedy = "Add documents, or set validation_share to 0"
        raise DataError(task.data.path, f"{problem}, so none can be held out", remedy) from None
    training, held_out = (
        tuple(sequence for index in side for sequence in file.documents[index].sequences)
        for side in sides
    )
    return training, held_out


def _notes(task: TaskSpec, file: _File) -> tuple[str, ...]:
    if not file.num_cut:
        return ()
    return (
        f"{file.num_cut} of {len(file.documents)} examples are longer than max_length "
        f"{task.data.max_length_tokens}; their tails are not learnt. Raise max_length to keep them",
    )


class _TaskData:
    """One task's sequences and the order in which it meets them."""

    def __init__(
        self,
        task: TaskSpec,
        training: tuple[EncodedSequence, ...],
        held_out: tuple[EncodedSequence, ...],
        notes: tuple[str, ...],
    ) -> None:
        self.training, self.held_out, self.notes = training, held_out, notes
        self._seed, self._sequences_per_step = task.seed, task.sequences_per_step
        self._samples = [
            Sample(index, len(sequence.tokens), sequence.target_tokens)
            for index, sequence in enumerate(training)
        ]
        self._permutations: dict[int, list[int]] = {}
        digest = _digest(training).hex()
        self.key = f"{digest}/s{task.seed}/b{task.sequences_per_step}"
        _, tokens, target_tokens = np.array(self._samples).T
        summary = summarise(tokens, target_tokens, digest)
        self.ready = TaskReadyData(_num_steps(task, len(training)), summary)

    def batch(self, step: int) -> tuple[Sample, ...]:
        first = step * self._sequences_per_step
        size = len(self._samples)
        return tuple(
            self._samples[self._permutation(position // size)[position % size]]
            for position in range(first, first + self._sequences_per_step)
        )

    def _permutation(self, epoch: int) -> list[int]:
        known = self._permutations.get(epoch)
        if known is not None:
            return known
        if len(self._permutations) >= _KEPT_PERMUTATIONS:
            del self._permutations[min(self._permutations)]
        random = np.random.default_rng([self._seed, _SHUFFLE, epoch])
        order = random.permutation(len(self._samples)).tolist()
        self._permutations[epoch] = order
        return order


def _num_steps(task: TaskSpec, num_sequences: int) -> int:
    if task.num_steps is not None:
        return task.num_steps
    if task.epochs is None:
        remedy = "Give exactly one of the two"
        raise ConfigError(f"task '{task.task_id}': steps, epochs", "neither is given", remedy)
    return max(1, math.ceil(task.epochs * num_sequences / task.sequences_per_step))
