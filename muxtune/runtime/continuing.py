"""A run that goes on after a kill: what its journal and its metrics tell of the time before."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from muxtune.errors import OutputError
from muxtune.planning.journal import JournalBatch
from muxtune.runtime.folders import PARTIAL
from muxtune.types import EventKind, Reject, TaskReadyData

_ENDS = {EventKind.TASK_DONE, EventKind.TASK_FAILED, EventKind.TASK_CANCELLED}


class Past(NamedTuple):
    """``ready``: what each task's data was when it was first read. ``ended``: tasks whose end is
    in the journal, so that they are not run again."""

    now_ns: int
    ready: dict[str, TaskReadyData]
    ended: set[str]


def read_past(records: Iterable[JournalBatch]) -> Past:
    now_ns, ready, ended = 0, {}, set()
    for record in records:
        now_ns = record.time_ns
        for event in record.events:
            if event.kind in _ENDS:
                ended.add(event.task_id)
            elif isinstance(event.data, TaskReadyData):
                ready.setdefault(event.task_id, event.data)
        ended.update(action.task_id for action in record.actions if isinstance(action, Reject))
    return Past(now_ns, ready, ended)


def keep_metrics(path: Path, last_step: Callable[[str], int | None]) -> int:
    """Drops the lines of steps that are going to be redone, and what a kill left of the last line.

    ``last_step``: the last step of a task that stands, None for all. Returns the time of the
    latest line that is kept, 0 for none. Raises OutputError.
    """
    if not path.exists():
        return 0
    latest_ns = 0
    partial = path.with_name(path.name + PARTIAL)
    try:
        with path.open("rb") as old, partial.open("wb") as new:
            for line in old:
                record = _parse(line)
                last = None if record is None else last_step(record["task_id"])
                if record is not None and (last is None or record["step"] <= last):
                    new.write(line)
                    latest_ns = max(latest_ns, record["time_ns"])
            new.flush()
            os.fsync(new.fileno())
        partial.replace(path)
    except OSError as error:
        raise OutputError(
            f"output_dir: cannot write '{path}': {error.strerror or error}. "
            "Free space there, then resume again"
        ) from error
    return latest_ns


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
