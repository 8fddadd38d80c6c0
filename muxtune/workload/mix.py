"""What drawn tasks look like: a mixture of entries whose fields are values or distributions.

    - weight: 3                    # relative to the other entries; default 1
      histogram: sst2              # one value ...
      max_length_tokens: 64
      rank: {8: 0.5, 16: 0.5}      # ... or values with weights, drawn apart from other fields
      batch_size: {4: 1, 8: 2}

A task draws an entry by weight, then each field of the entry. Every field has a random stream of
its own, so changing the distribution of one leaves the draws of the others as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from muxtune.errors import ConfigError
from muxtune.workload import methods
from muxtune.workload.fields import (
    Field,
    as_mapping,
    check_keys,
    one_of,
    optional,
    to_float,
    to_int,
    to_names,
    to_text,
)
from muxtune.workload.synthetic import INLINE, histogram_names, tokenizer_of


def _from(low: float) -> Callable[[Any], bool]:
    return lambda value: value is None or value >= low


_COUNT = Field(to_int, "a whole number", _from(1), "Give a whole number of at least 1")


def _histogram_name(value: Any) -> str:
    if isinstance(value, str) and value.startswith(INLINE):
        return value
    return one_of(histogram_names())(value)


def _histogram_remedy() -> str:
    return f"Choose one of: {', '.join(histogram_names())}"


MIX_FIELDS: dict[str, Field] = {
    "model": Field(to_text, "a base model's name"),
    "histogram": Field(_histogram_name, "a histogram that exists", remedy=_histogram_remedy),
    "tokenizer": Field(lambda value: str(value or ""), "a tokenizer of the histogram"),
    "method": Field(
        one_of(methods.METHODS), "a known method", remedy=f"Known: {', '.join(methods.METHODS)}"
    ),
    "rank": _COUNT,
    "targets": Field(to_names, "a list of module names", remedy="List names, or say all-linear"),
    "batch_size": _COUNT,
    "accumulation": _COUNT,
    "max_length_tokens": Field(to_int, "a whole number", _from(2), "Give at least 2 tokens"),
    "priority": Field(to_int, "a whole number", remedy="Give a whole number; larger is sooner"),
    "max_slowdown": Field(optional(to_float), "a number", _from(1), "Give 1 or more, or null"),
}
_WEIGHT = Field(to_float, "a number", _from(0), "Give a weight of at least 0")
_DEFAULTS: dict[str, Any] = {
    "tokenizer": "",
    "method": "lora",
    "rank": 16,
    "targets": "all-linear",
    "batch_size": 8,
    "accumulation": 1,
    "max_length_tokens": 512,
    "priority": 0,
    "max_slowdown": None,
}
# Classification, question answering, arithmetic and code, in the sizes that fine-tuning services
# advertise. Shares, ranks and batch sizes are an assumption: no public trace tells them.
DEFAULT_MIX: tuple[Mapping[str, Any], ...] = tuple(
    {
        "histogram": histogram,
        "weight": weight,
        "max_length_tokens": max_length_tokens,
        "rank": {8: 0.3, 16: 0.4, 32: 0.3},
        "batch_size": {4: 0.25, 8: 0.5, 16: 0.25},
    }
    for histogram, weight, max_length_tokens in (
        ("sst2", 0.25, 64),
        ("openbookqa", 0.2, 128),
        ("rte", 0.2, 256),
        ("gsm8k", 0.2, 512),
        ("code_alpaca_2k", 0.15, 512),
    )
)


class Distribution(NamedTuple):
    """Values and where the shares of each end, the last at 1."""

    values: tuple[Any, ...]
    ends: np.ndarray


class MixEntry(NamedTuple):
    weight: float
    fields: Mapping[str, Distribution]


class Draws(NamedTuple):
    """For each field the values that occur, and [num_tasks] indexes into them."""

    values: dict[str, list[Any]]
    index: dict[str, np.ndarray]


class TaskMix(NamedTuple):
    entries: tuple[MixEntry, ...]

    def draw(self, num_tasks: int, seed: int) -> Draws:
        """Fields of ``num_tasks`` tasks; the same seed gives the same."""
        streams = np.random.SeedSequence(seed).spawn(1 + len(MIX_FIELDS))
        uniform = [np.random.default_rng(stream).random(num_tasks) for stream in streams]
        ends = _ends([entry.weight for entry in self.entries])
        entry_of = np.searchsorted(ends, uniform[0], side="right")
        draws = Draws({}, {})
        for name, numbers in zip(MIX_FIELDS, uniform[1:], strict=True):
            values: list[Any] = []
            index = np.zeros(num_tasks, dtype=np.int64)
            for number, entry in enumerate(self.entries):
                chosen = entry_of == number
                distribution = entry.fields[name]
                drawn = np.searchsorted(distribution.ends, numbers[chosen], side="right")
                index[chosen] = drawn + len(values)
                values.extend(distribution.values)
            draws.values[name], draws.index[name] = values, index
        return draws


def task_mix(
    content: Any = DEFAULT_MIX, model: str | Mapping[str, float] = "", where: str = "mix"
) -> TaskMix:
    """A checked mix from one entry or a list of them; ``model``, a name or names with their
    popularity, is for entries that name none.

    Raises ConfigError that names ``where``, the entry, the field and the remedy.
    """
    entries = [content] if isinstance(content, Mapping) else content
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        remedy = "List at least one entry with a histogram"
        raise ConfigError(where, "holds no entry", remedy)
    read = tuple(
        _entry(entry, model, f"{where}: entry {number}")
        for number, entry in enumerate(entries, start=1)
    )
    if sum(entry.weight for entry in read) <= 0:
        raise ConfigError(where, "all weights are 0", "Give an entry a weight above 0")
    return TaskMix(read)


def _entry(content: Any, model: str | Mapping[str, float], where: str) -> MixEntry:
    given = as_mapping(where, content, "Write fields such as 'histogram: sst2'")
    check_keys(where, given, {*MIX_FIELDS, "weight"})
    complete = {**_DEFAULTS, "model": model, **given}
    weight = _WEIGHT.read(f"{where}: weight", complete.pop("weight", 1.0))
    if "histogram" not in complete:
        raise ConfigError(f"{where}: histogram", "is missing", _histogram_remedy())
    fields = {name: _distribution(name, complete[name], f"{where}: {name}") for name in MIX_FIELDS}
    for name in fields["histogram"].values:
        for tokenizer in fields["tokenizer"].values:
            tokenizer_of(name, tokenizer, f"{where}: tokenizer")
    return MixEntry(weight, fields)


def _distribution(name: str, value: Any, where: str) -> Distribution:
    field = MIX_FIELDS[name]
    if not isinstance(value, Mapping):
        return Distribution((field.read(where, value),), np.ones(1))
    weights = [_WEIGHT.read(f"{where}: {key}", weight) for key, weight in value.items()]
    if sum(weights) <= 0:
        raise ConfigError(where, "all weights are 0", "Give a value a weight above 0")
    return Distribution(tuple(field.read(where, key) for key in value), _ends(weights))


def _ends(weights: Sequence[float]) -> np.ndarray:
    """Where each value's share of [0, 1) ends; a value of weight 0 is never drawn."""
    ends = np.cumsum(weights)
    ends = ends / ends[-1]
    # The sum may round to below 1, and what follows the last positive weight must stay beyond 1.
    ends[np.flatnonzero(np.asarray(weights) > 0)[-1] :] = 1.0
    return ends
