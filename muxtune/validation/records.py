"""What a validation keeps of each case: JSON lines, appended as they come, so that a run that is
cut off loses nothing and goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from muxtune.errors import OutputError


class Records:
    """One file of JSON lines; every record has a ``name``, which is done once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = read_lines(path)
        self._names = {row["name"] for row in self.rows}

    def has(self, name: str) -> bool:
        return name in self._names

    def add(self, row: Mapping[str, Any]) -> None:
        """Raises OutputError."""
        line = json.dumps(row, sort_keys=True) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written ({error})") from error
        self.rows.append(json.loads(line))
        self._names.add(row["name"])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a last one that was cut off is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
