"""Errors that a user can act on. Every message names the field and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class MuxTuneError(Exception):
    """Base of all errors that the command line prints without a traceback.

    One that is raised in a worker process reaches its parent as it is; by Python's own way it would
    be made anew of its message alone, which most kinds cannot, and the whole pool would break.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, (type(self), self.args, self.__dict__)


def _remade(
    kind: type[MuxTuneError], args: tuple[object, ...], fields: Mapping[str, object]
) -> MuxTuneError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


class ConfigError(MuxTuneError):
    """A configured value is wrong: names the field, the value and the remedy."""

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(f"{field}: {problem}. {remedy}")
        self.field, self.problem, self.remedy = field, problem, remedy


class DataError(MuxTuneError):
    """A data file is wrong: names the file, where it has one the line, and the remedy."""

    def __init__(self, path: str, problem: str, remedy: str, line: int | None = None) -> None:
        where = path if line is None else f"{path}:{line}"
        super().__init__(f"{where}: {problem}. {remedy}")
        self.path, self.line = path, line


class OutputError(MuxTuneError):
    """Results cannot be written: names the path and the remedy."""


class TaskError(MuxTuneError):
    """One task cannot go on; the others lose nothing."""

    def __init__(self, task_id: str, problem: str, remedy: str) -> None:
        super().__init__(f"task '{task_id}': {problem}. {remedy}")
        self.task_id = task_id


class ProfileError(MuxTuneError):
    """A profile is missing, of another schema version, incomplete or altered."""
