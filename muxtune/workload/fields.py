"""Checked conversion of configured values: what a field must be, and what to say if it is not."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from muxtune.errors import ConfigError


class Field(NamedTuple):
    """``convert`` raises ValueError for a value of the wrong kind; ``holds`` is the range.

    ``remedy``: what to do about a bad value; a function where telling it costs something.
    """

    convert: Callable[[Any], Any]
    kind: str
    holds: Callable[[Any], bool] = lambda value: True
    remedy: str | Callable[[], str] = ""

    def read(self, where: str, value: Any) -> Any:
        """The converted value. Raises ConfigError with ``where``, the value and the remedy."""
        try:
            converted = self.convert(value)
        except (ValueError, TypeError, OverflowError):
            raise ConfigError(where, f"{value!r} is not {self.kind}", self._advice()) from None
        if not self.holds(converted):
            raise ConfigError(where, f"{value!r} is out of range", self._advice())
        return converted

    def _advice(self) -> str:
        remedy = self.remedy() if callable(self.remedy) else self.remedy
        return remedy or f"Give {self.kind}"


def to_int(value: Any) -> int:
    """Whole numbers only: 8, 8.0 and "8", but neither True nor 8.5."""
    if isinstance(value, bool):
        raise ValueError(value)
    number = float(value) if isinstance(value, str) else value
    if int(number) != number:
        raise ValueError(value)
    return int(number)


def to_float(value: Any) -> float:
    """Finite numbers; also text, because YAML 1.1 reads ``1e-3`` as a string."""
    if isinstance(value, bool):
        raise ValueError(value)
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def to_text(value: Any) -> str:
    """Non-empty text. Whole numbers count as text: a tenant may be called 7."""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or str(value).strip() == "":
        raise ValueError(value)
    return str(value)


def to_names(value: Any) -> tuple[str, ...]:
    """A list of distinct names, or one name."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, Sequence) or not items or len(set(items)) != len(items):
        raise ValueError(value)
    return tuple(to_text(item) for item in items)


def optional(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Lets a null through."""
    return lambda value: None if value is None else convert(value)


def one_of(names: Iterable[str]) -> Callable[[Any], str]:
    known = tuple(names)

    def convert(value: Any) -> str:
        if value not in known:
            raise ValueError(value)
        return value

    return convert


def check_keys(where: str, given: Iterable[Any], known: Collection[str]) -> None:
    """Raises ConfigError for a key that does not exist, with the closest one that does."""
    for key in given:
        if key not in known:
            remedy = f"{closest(str(key), known)}Known fields: {', '.join(sorted(known))}"
            raise ConfigError(f"{where}: {key}", "this field does not exist", remedy)


def closest(name: str, known: Iterable[str]) -> str:
    """``Did you mean 'x'? `` or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean '{close[0]}'? " if close else ""


def as_mapping(where: str, value: Any, remedy: str) -> Mapping[str, Any]:
    """``value`` when it is a mapping, else ConfigError."""
    if not isinstance(value, Mapping):
        kind = "nothing" if value is None else f"a {type(value).__name__}"
        raise ConfigError(where, f"expected fields with values, found {kind}", remedy)
    return value
