"""Checks of settings that several methods share; each raises ConfigError with the remedy."""

from __future__ import annotations

from muxtune.errors import ConfigError
from muxtune.types import AdapterSpec
from muxtune.workload.methods import METHOD_OPTIONS


def check_rank(spec: AdapterSpec) -> None:
    if spec.rank < 1:
        raise ConfigError("adapter.rank", f"is {spec.rank}", "Give a rank of at least 1")


def check_dropout(spec: AdapterSpec) -> None:
    if not 0 <= spec.dropout < 1:
        raise ConfigError("adapter.dropout", f"is {spec.dropout}", "Give a number in [0, 1)")


def check_no_dropout(spec: AdapterSpec) -> None:
    if spec.dropout:
        problem = f"is {spec.dropout}, but {spec.method} takes none"
        raise ConfigError("adapter.dropout", problem, "Give 0, or leave it out")


def check_no_targets(spec: AdapterSpec) -> None:
    if spec.targets:
        problem = f"names {', '.join(spec.targets)}, but {spec.method} adapts no linear"
        raise ConfigError("adapter.targets", problem, "Give an empty list")


def check_options(spec: AdapterSpec) -> None:
    known = METHOD_OPTIONS[spec.method]
    unknown = ", ".join(sorted(set(spec.options) - set(known)))
    if unknown:
        takes = ", ".join(known) or "none"
        problem = f"{spec.method} takes {takes}, not {unknown}"
        raise ConfigError("adapter.options", problem, "Remove what it does not take")


def switch(spec: AdapterSpec, option: str) -> bool:
    """An option that is true or false; false when it is not given."""
    value = spec.options.get(option, False)
    if not isinstance(value, bool):
        raise ConfigError(f"adapter.options.{option}", f"is {value!r}", "Give true or false")
    return value
