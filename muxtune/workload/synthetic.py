"""Tasks without text: sequence lengths drawn from shipped token-length histograms.

Tasks that agree in histogram, tokenizer, sequences per step, max length and variant form a class.
A class has one period of batches, drawn once and shared by its tasks, so that 1e5 tasks cost
little and tables over a period are computed once per class. Sources and licences of the
histograms: ``data/seqlen/SOURCE.md``.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import math
from collections.abc import Sequence
from importlib import resources
from typing import NamedTuple

import numpy as np

from muxtune.errors import ConfigError
from muxtune.types import LengthSummary, Sample, TaskReadyData, TaskSpec
from muxtune.workload.fields import closest
from muxtune.workload.lengths import summarise

PREFERRED_TOKENIZER = "llama2-32k"
INLINE = "lengths:"  # a histogram written out as evenly spaced quantiles: lengths:5/12/30/64
INLINE_SAMPLES = 512


class Histogram(NamedTuple):
    """Token lengths of a data set, ascending, and how many sequences have each."""

    lengths_tokens: np.ndarray
    counts: np.ndarray

    @property
    def num_sequences(self) -> int:
        return int(self.counts.sum())

    def mean_tokens(self, max_length_tokens: int) -> float:
        """Mean length of the sequences when longer ones are cut to ``max_length_tokens``."""
        capped = np.minimum(self.lengths_tokens, max_length_tokens)
        return float((capped * self.counts).sum() / self.counts.sum())


@functools.cache
def _histograms() -> dict[str, dict[str, Histogram]]:
    file = resources.files("muxtune.workload") / "data" / "seqlen" / "histograms.csv"
    rows: dict[tuple[str, str], list[tuple[int, int]]] = {}
    with file.open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            pair = (int(row["length"]), int(row["count"]))
            rows.setdefault((row["dataset"], row["tokenizer"]), []).append(pair)
    tables: dict[str, dict[str, Histogram]] = {}
    for (dataset, tokenizer), pairs in rows.items():
        lengths, counts = np.array(sorted(pairs), dtype=np.int64).T
        tables.setdefault(dataset, {})[tokenizer] = Histogram(lengths, counts)
    return tables


def histogram_names() -> list[str]:
    return sorted(_histograms())


def tokenizer_of(name: str, tokenizer: str = "", where: str = "histogram") -> str:
    """The tokenizer column that is used for a histogram; "" means llama2-32k, or the only one.

    Raises ConfigError, listing what exists, for an unknown histogram or tokenizer.
    """
    if name.startswith(INLINE):
        _inline_histogram(name, where)
        return tokenizer
    tables = _histograms()
    if name not in tables:
        remedy = f"{closest(name, tables)}Choose one of: {', '.join(histogram_names())}"
        raise ConfigError(where, f"histogram '{name}' does not exist", remedy)
    known = tables[name]
    chosen = tokenizer or (PREFERRED_TOKENIZER if PREFERRED_TOKENIZER in known else min(known))
    if chosen not in known:
        problem = f"histogram '{name}' has no tokenizer '{tokenizer}'"
        raise ConfigError(where, problem, f"Choose one of: {', '.join(sorted(known))}")
    return chosen


def histogram(name: str, tokenizer: str = "", where: str = "histogram") -> Histogram:
    """A shipped histogram; the arguments and errors of ``tokenizer_of``."""
    if name.startswith(INLINE):
        return _inline_histogram(name, where)
    return _histograms()[name][tokenizer_of(name, tokenizer, where)]


def inline_histogram_name(quantiles_tokens: Sequence[int]) -> str:
    """The name of a histogram that is given by its quantiles, smallest and largest included."""
    return INLINE + "/".join(str(tokens) for tokens in quantiles_tokens)


@functools.lru_cache(maxsize=4_096)
def _inline_histogram(name: str, where: str = "histogram") -> Histogram:
    """Lengths between two quantiles are taken as evenly spread."""
    cells = name.removeprefix(INLINE).split("/")
    tokens = [int(cell) for cell in cells if cell.isdecimal()]
    if len(tokens) != len(cells) or sorted(tokens) != tokens or tokens[0] < 1:
        problem = f"'{name}' is no list of lengths"
        raise ConfigError(where, problem, f"Write whole numbers in order: {INLINE}5/12/30/64")
    at = (np.arange(INLINE_SAMPLES) + 0.5) / INLINE_SAMPLES * (len(tokens) - 1)
    drawn = np.rint(np.interp(at, np.arange(len(tokens)), tokens)).astype(np.int64)
    lengths, counts = np.unique(drawn, return_counts=True)
    return Histogram(lengths, counts)


class _Class(NamedTuple):
    key: str
    batches: tuple[tuple[Sample, ...], ...]  # one period
    summary: LengthSummary


class SyntheticLibrary:
    """TaskLibrary of tasks whose ``data.histogram`` is set.

    ``num_variants``: tasks of a class whose seeds differ modulo this number get other draws.
    A sequence of n tokens has n - 1 target tokens, as plain text has. ``epochs`` count the size
    of the original data set. ``length_scale`` multiplies every drawn length, before it is cut to
    the task's own longest. The same seed gives the same lengths, in whatever order tasks come.
    """

    def __init__(
        self,
        seed: int = 0,
        period_steps: int = 16,
        num_variants: int = 1,
        length_scale: float = 1.0,
    ) -> None:
        for field, value in (("period_steps", period_steps), ("num_variants", num_variants)):
            if value < 1:
                raise ConfigError(field, f"{value} is out of range", "Give at least 1")
        if not (math.isfinite(length_scale) and length_scale > 0):
            problem = f"{length_scale} is out of range"
            raise ConfigError("length_scale", problem, "Give a number above 0")
        self._length_scale = length_scale
        self._seed, self._period_steps, self._num_variants = seed, period_steps, num_variants
        self._classes: dict[tuple[str, str, int, int, int], _Class] = {}
        self._tasks: dict[str, tuple[_Class, TaskReadyData]] = {}

    def add(self, task: TaskSpec) -> TaskReadyData:
        """Raises ConfigError for an unknown histogram or a task that has none."""
        data = task.data
        key = (
            data.histogram,
            data.tokenizer,
            task.batch_size * task.accumulation,
            data.max_length_tokens,
            task.seed % self._num_variants,
        )
        drawn = self._classes.get(key) or self._draw(key, task.task_id)
        num_steps = task.num_steps or _steps_of_epochs(task)
        ready = TaskReadyData(num_steps, drawn.summary)
        self._tasks[task.task_id] = (drawn, ready)
        return ready

    def discard(self, task_id: str) -> None:
        self._tasks.pop(task_id, None)

    def batch(self, task_id: str, step: int) -> tuple[Sample, ...]:
        return self._tasks[task_id][0].batches[step % self._period_steps]

    def sample(self, task_id: str, index: int) -> Sample:
        """The sequence that batches call ``index``."""
        batches = self._tasks[task_id][0].batches
        return batches[index // len(batches[0])][index % len(batches[0])]

    def num_steps(self, task_id: str) -> int:
        return self._tasks[task_id][1].num_steps

    def period_steps(self, task_id: str) -> int:
        return self._period_steps

    def lengths_key(self, task_id: str) -> str:
        return self._tasks[task_id][0].key

    def _draw(self, key: tuple[str, str, int, int, int], task_id: str) -> _Class:
        name, tokenizer, sequences_per_step, max_length_tokens, variant = key
        where = f"task '{task_id}': histogram"
        if not name:
            remedy = f"Set it to one of: {', '.join(histogram_names())}"
            raise ConfigError(where, "is not set, so lengths cannot be drawn", remedy)
        tokenizer = tokenizer_of(name, tokenizer, where)
        label = f"{name}/{tokenizer}/b{sequences_per_step}/m{max_length_tokens}/v{variant}"
        lengths = self._lengths(label, histogram(name, tokenizer), sequences_per_step)
        tokens = np.clip(lengths, 2, max_length_tokens).astype(np.int64)
        digest = hashlib.blake2b(tokens.astype("<i8").tobytes(), digest_size=8).hexdigest()
        batches = _batches(tokens.tolist(), sequences_per_step)
        drawn = _Class(f"{label}/{digest}", batches, summarise(tokens, tokens - 1, digest))
        self._classes[key] = drawn
        return drawn

    def _lengths(self, label: str, table: Histogram, sequences_per_step: int) -> np.ndarray:
        # Seeded by the class's own label, so that draws do not depend on which class came first.
        entropy = hashlib.blake2b(label.encode(), digest_size=8).digest()
        random = np.random.default_rng([self._seed, int.from_bytes(entropy, "little")])
        # One draw from each of ``size`` equal slices of the distribution, then shuffled: a short
        # period still has nearly the histogram's mean, which offered load is computed from.
        size = self._period_steps * sequences_per_step
        ranks = (np.arange(size) + random.random(size)) / size
        cumulative = np.cumsum(table.counts) / table.counts.sum()
        at = np.minimum(np.searchsorted(cumulative, ranks, side="right"), len(cumulative) - 1)
        drawn = random.permutation(table.lengths_tokens[at])
        return drawn if self._length_scale == 1.0 else np.rint(drawn * self._length_scale)


def _batches(tokens: list[int], sequences_per_step: int) -> tuple[tuple[Sample, ...], ...]:
    samples = [Sample(index, count, count - 1) for index, count in enumerate(tokens)]
    starts = range(0, len(samples), sequences_per_step)
    return tuple(tuple(samples[start : start + sequences_per_step]) for start in starts)


def _steps_of_epochs(task: TaskSpec) -> int:
    if task.epochs is None:
        remedy = "Give exactly one of the two"
        raise ConfigError(f"task '{task.task_id}': steps, epochs", "neither is given", remedy)
    table = histogram(task.data.histogram, task.data.tokenizer)
    return max(1, math.ceil(task.epochs * table.num_sequences / task.sequences_per_step))
