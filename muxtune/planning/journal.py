"""The decision log: append-only JSON lines, one batch of events and what was decided on it a line.

First line: ``{"schema": 2, "config": ..., "versions": ...}``. Every other line: ``{"index",
"time_ns", "events", "actions", "plans", "refusals"}`` in the form of ``muxtune.codec``. Plans are
written in full, when they change. Equal decisions give equal bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

from muxtune import codec
from muxtune.errors import DataError, OutputError
from muxtune.types import Action, Event, Plan, Refusal

SCHEMA_VERSION = 2


class JournalBatch(NamedTuple):
    """Events of one instant, and the decisions on them."""

    index: int
    time_ns: int
    events: tuple[Event, ...]
    actions: tuple[Action, ...] = ()
    plans: tuple[Plan, ...] = ()
    refusals: tuple[Refusal, ...] = ()


class JournalRecord(NamedTuple):
    """A journal that was read. ``torn_line``: what a crash left of the last line, "" if nothing;
    ``intact_bytes``: the length of what comes before it."""

    config: Any
    versions: Mapping[str, str]
    batches: tuple[JournalBatch, ...]
    torn_line: str
    intact_bytes: int


class Journal:
    """Writes a decision log. With ``fsync`` a written batch survives a power failure; without, a
    crash of the machine may lose the last ones, but one of the process may not."""

    def __init__(
        self,
        path: str | Path,
        config: object = None,
        versions: Mapping[str, str] | None = None,
        fsync: bool = True,
    ) -> None:
        """Starts a new log, in place of one that is there. Raises OutputError."""
        self.path, self._fsync = Path(path), fsync
        self.next_index = 0
        self._file = self._open("wb")
        self._num_bytes = 0
        header = {
            "schema": SCHEMA_VERSION,
            "config": codec.encode(config),
            "versions": dict(versions or {}),
        }
        self._write_line(header)

    @classmethod
    def resume(cls, path: str | Path, fsync: bool = True) -> tuple[Journal, JournalRecord]:
        """Goes on with a log; a torn last line is cut off. Raises DataError, OutputError."""
        record = read_journal(path)
        journal = cls.__new__(cls)
        journal.path, journal._fsync = Path(path), fsync
        journal.next_index = len(record.batches)
        journal._file = journal._open("r+b")
        journal._num_bytes = record.intact_bytes
        try:
            journal._cut()
        except OSError as error:
            raise journal._output_error(error) from error
        return journal, record

    def write(
        self,
        time_ns: int,
        events: Sequence[Event],
        actions: Sequence[Action] = (),
        plans: Sequence[Plan] = (),
        refusals: Sequence[Refusal] = (),
    ) -> JournalBatch:
        """Appends one batch. Raises OutputError; then the log ends with the batch before."""
        batch = JournalBatch(
            self.next_index,
            time_ns,
            tuple(events),
            tuple(actions),
            tuple(plans),
            tuple(refusals),
        )
        self._write_line({name: codec.encode(item) for name, item in batch._asdict().items()})
        self.next_index += 1
        return batch

    def close(self) -> None:
        """Raises OutputError when the last bytes cannot be written."""
        try:
            self._file.close()
        except OSError as error:
            raise self._output_error(error) from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self, mode: str) -> BinaryIO:
        # Unbuffered: a line is handed to the system in one piece or is cut off again.
        try:
            return self.path.open(mode, buffering=0)  # type: ignore[return-value]
        except OSError as error:
            raise self._output_error(error) from error

    def _write_line(self, value: object) -> None:
        line = json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"
        try:
            self._write_all(line)
            if self._fsync:
                os.fsync(self._file.fileno())
        except OSError as error:
            self._cut_quietly()
            raise self._output_error(error) from error
        self._num_bytes += len(line)

    def _write_all(self, line: bytes) -> None:
        rest = memoryview(line)
        while rest:
            rest = rest[self._file.write(rest) :]

    def _cut(self) -> None:
        self._file.truncate(self._num_bytes)
        self._file.seek(self._num_bytes)

    def _cut_quietly(self) -> None:
        try:
            self._cut()
        except OSError:
            return  # a torn last line stays, which reading tolerates; the write's error is raised

    def _output_error(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self.path}: the decision log cannot be written ({error.strerror or error}). "
            "Free disk space, or choose an output folder that can be written to"
        )


def read_journal(path: str | Path) -> JournalRecord:
    """Raises DataError, naming file and line, for a log that is missing, of another schema, or
    damaged anywhere but in its last line."""
    where = str(path)
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(
            where, f"cannot be read ({error.strerror})", "name a decision log"
        ) from error
    lines, torn = _split(content)
    if not lines:
        raise DataError(where, "holds no header", "name a decision log that a run has written")
    header = _parse_header(where, lines[0])
    batches = tuple(
        _parse_batch(where, number, line) for number, line in enumerate(lines[1:], start=2)
    )
    return JournalRecord(
        config=codec.decode(header["config"]),
        versions=header["versions"],
        batches=batches,
        torn_line=torn.decode(errors="replace"),
        intact_bytes=len(content) - len(torn),
    )


def _split(content: bytes) -> tuple[list[bytes], bytes]:
    """Whole lines, and what a crash left of the last one. A machine that lost power may also
    leave a last line with its end but not its middle."""
    *lines, torn = content.split(b"\n")
    if lines and not torn and not _is_json(lines[-1]):
        torn = lines.pop() + b"\n"
    return lines, torn


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _parse_header(where: str, line: bytes) -> dict[str, Any]:
    try:
        header = json.loads(line)
        schema = header["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(where, "does not begin with a header", "name a decision log", 1) from error
    if schema != SCHEMA_VERSION:
        raise DataError(
            where,
            f"has schema version {schema}, this program reads {SCHEMA_VERSION}",
            "read it with the version of muxtune that wrote it",
            1,
        )
    return header


def _parse_batch(where: str, number: int, line: bytes) -> JournalBatch:
    try:
        batch = JournalBatch(**{name: codec.decode(v) for name, v in json.loads(line).items()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            where,
            f"this line is not a batch of events ({error})",
            "restore the file; only its last line may be damaged",
            number,
        ) from error
    if batch.index != number - 2:
        raise DataError(
            where,
            f"batch {batch.index} stands where {number - 2} is due",
            "restore the file; a line was lost or added",
            number,
        )
    return batch
