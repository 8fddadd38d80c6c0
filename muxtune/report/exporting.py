"""The log of a run as a trace: what a service did today, to be asked about tomorrow.

Every task that arrived is a row in the schema of ``muxtune.workload.traces``, finished or not: a
task that was cut off asked for all its steps. Texts stay where they are; of a task's sequences the
trace holds quantiles of their lengths (``lengths:5/12/30/64``).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from muxtune.errors import DataError
from muxtune.planning.journal import JournalBatch, read_journal
from muxtune.types import NS_PER_S, EventKind, TaskReadyData, TaskSpec
from muxtune.workload.synthetic import inline_histogram_name

JOURNAL_FILE = "journal.jsonl"
COLUMNS = (
    *("id", "arrival_s", "steps", "tenant", "model", "method", "rank", "targets", "batch_size"),
    *("accumulation", "max_length_tokens", "histogram", "tokenizer", "priority", "max_slowdown"),
    "deadline_s",
)


def export_trace(folder: Path | str) -> str:
    """CSV text of the run in ``folder``. Raises DataError when it kept no journal, when that is
    damaged, and when no task in it ever became ready."""
    path = Path(folder) / JOURNAL_FILE
    if not path.is_file():
        remedy = "`muxtune train` keeps one; give `muxtune simulate` journal=true"
        raise DataError(str(folder), f"holds no {JOURNAL_FILE}", remedy)
    rows = list(_rows(read_journal(path).batches))
    if not rows:
        remedy = "Export a run that got as far as reading its tasks' data"
        raise DataError(str(path), "tells of no task that became ready", remedy)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(rows)
    return text.getvalue()


def _rows(batches: Iterable[JournalBatch]) -> Iterable[tuple[object, ...]]:
    """By arrival. A task that was never ready (bad data) is none that a fleet has to serve."""
    specs: dict[str, TaskSpec] = {}
    ready: dict[str, TaskReadyData] = {}
    for batch in batches:
        for event in batch.events:
            if event.kind is EventKind.TASK_ARRIVED and isinstance(event.data, TaskSpec):
                specs.setdefault(event.task_id, event.data)
            elif event.kind is EventKind.TASK_READY and isinstance(event.data, TaskReadyData):
                ready.setdefault(event.task_id, event.data)
    arrived = sorted(specs.values(), key=lambda task: (task.arrival_ns, task.task_id))
    return [_row(task, ready[task.task_id]) for task in arrived if task.task_id in ready]


def _row(task: TaskSpec, ready: TaskReadyData) -> tuple[object, ...]:
    data = task.data
    histogram = data.histogram or inline_histogram_name(ready.lengths.quantiles_tokens)
    return (
        task.task_id,
        f"{task.arrival_ns / NS_PER_S:.9f}",
        ready.num_steps,
        task.tenant,
        task.model,
        task.adapter.method,
        task.adapter.rank,
        "|".join(task.adapter.targets),
        task.batch_size,
        task.accumulation,
        data.max_length_tokens,
        histogram,
        data.tokenizer,
        task.priority,
        _blank(task.max_slowdown),
        _blank(None if task.deadline_ns is None else task.deadline_ns / NS_PER_S),
    )


def _blank(value: float | None) -> object:
    return "" if value is None else value
