"""Domain types to JSON and back, for the decision log and for plan states given on a command line.

A NamedTuple becomes ``{"_": "TypeName", field: value, ...}`` with default values left out; a
mapping becomes a plain object when its keys are strings, else a list of pairs; enums become their
values in fields that are known to hold them. The same value gives the same bytes.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from typing import Any

from muxtune import types

_TYPES: dict[str, type] = {
    name: kind
    for name, kind in vars(types).items()
    if isinstance(kind, type) and (hasattr(kind, "_fields") or issubclass(kind, enum.Enum))
}


def encode(value: object) -> Any:
    """A JSON-able form of a domain value. Raises TypeError for what is not plain data.

    Parts that occur several times (the slots of a ladder's shapes, a running plan) are encoded
    once, and shared by what is returned: do not change it.
    """
    return _encode(value, {})


def _encode(value: object, seen: dict[int, Any]) -> Any:
    """``seen``: encoded tuples by id; the value that is being encoded keeps them alive."""
    if isinstance(value, tuple):
        found = seen.get(id(value))
        if found is None:
            if hasattr(value, "_fields"):
                found = _encode_named(value, seen)
            else:
                found = [_encode(item, seen) for item in value]
            seen[id(value)] = found
        return found
    if value is None or (isinstance(value, (bool, int, float, str)) and not _is_enum(value)):
        return value
    if _is_enum(value):
        return {"_": type(value).__name__, "v": value.value}  # type: ignore[union-attr]
    if isinstance(value, Mapping):
        return _encode_mapping(value, seen)
    if isinstance(value, (set, frozenset)):
        return {"_": "frozenset", "v": sorted(_encode(item, seen) for item in value)}
    if isinstance(value, list):
        return [_encode(item, seen) for item in value]
    raise TypeError(f"cannot journal a value of type {type(value).__name__}")


def decode(value: Any) -> Any:
    """The inverse of ``encode``; lists come back as tuples."""
    if isinstance(value, list):
        return tuple(decode(item) for item in value)
    if not isinstance(value, dict):
        return value
    tag = value.get("_")
    if tag is None:
        return {key: decode(item) for key, item in value.items()}
    if tag == "frozenset":
        return frozenset(decode(item) for item in value["v"])
    if tag == "pairs":
        return {decode(key): decode(item) for key, item in value["v"]}
    kind = _TYPES[tag]
    if issubclass(kind, enum.Enum):
        return kind(value["v"])
    return kind(**{key: decode(item) for key, item in value.items() if key != "_"})


def dumps(value: object) -> str:
    """One line of canonical JSON."""
    return json.dumps(encode(value), sort_keys=True, separators=(",", ":"))


def loads(text: str) -> Any:
    return decode(json.loads(text))


def _is_enum(value: object) -> bool:
    return isinstance(value, enum.Enum)


def _encode_named(value: Any, seen: dict[int, Any]) -> dict[str, Any]:
    defaults = type(value)._field_defaults
    out: dict[str, Any] = {"_": type(value).__name__}
    for name, item in zip(value._fields, value, strict=True):
        if name not in defaults or item != defaults[name]:
            out[name] = _encode(item, seen)
    return out


def _encode_mapping(value: Mapping[Any, Any], seen: dict[int, Any]) -> Any:
    if all(isinstance(key, str) and key != "_" for key in value):
        return {key: _encode(item, seen) for key, item in value.items()}
    pairs = [[_encode(key, seen), _encode(item, seen)] for key, item in value.items()]
    return {"_": "pairs", "v": sorted(pairs, key=lambda pair: json.dumps(pair[0]))}
