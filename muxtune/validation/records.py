"""What a validation keeps of each case: JSON lines, appended as they come, so that a run that is
cut off loses nothing and goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from muxtune.report.run_folder import writing

ENDED = "the process ended while it ran"


class Records:
    """One file of JSON lines; every record has a ``name``, which is done once.

    ``stamp``: fields that all records get. What has begun is noted in a file beside; where the
    process ended before its record came, the next one records that as its error, unless the user
    stopped it (``forget_running``).
    """

    def __init__(self, path: Path, stamp: Mapping[str, Any] | None = None) -> None:
        self.path, self.stamp = path, dict(stamp or {})
        self.rows: list[dict[str, Any]] = read_lines(path)
        self._names = {row["name"] for row in self.rows}
        self._running = path.with_suffix(".running")
        for row in read_lines(self._running):
            if row["name"] not in self._names:
                self.add({**row, "error": ENDED})
        self._running.unlink(missing_ok=True)

    def has(self, name: str) -> bool:
        return name in self._names

    def begin(self, row: Mapping[str, Any]) -> None:
        """Note what is known of a record before its work is done. Raises OutputError."""
        self._running.unlink(missing_ok=True)
        append_line(self._running, {**self.stamp, **row})

    def forget_running(self) -> None:
        """What has begun was stopped on purpose: it is done another time."""
        self._running.unlink(missing_ok=True)

    def add(self, row: Mapping[str, Any]) -> None:
        """Raises OutputError."""
        self.rows.append(append_line(self.path, {**self.stamp, **row}))
        self._names.add(row["name"])
        self._running.unlink(missing_ok=True)


def append_line(path: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """Behind a line that was cut off a new one begins. Returns the row as it will be read. Raises
    OutputError."""
    line = json.dumps(row, sort_keys=True)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(f"{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())
    return json.loads(line)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; what was cut off, or is no record, is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict)]
