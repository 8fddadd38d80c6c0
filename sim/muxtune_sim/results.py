"""Result rows that reach the disk while the run goes on, and appear under their name at its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet

from muxtune.engine import TaskOutcome
from muxtune.errors import OutputError
from muxtune.types import Event, Plan

SCHEMA = pa.schema(
    [
        ("task_id", pa.string()),
        ("tenant", pa.string()),
        ("model", pa.string()),
        ("state", pa.string()),
        ("arrival_ns", pa.int64()),
        ("ready_ns", pa.int64()),
        ("placed_ns", pa.int64()),
        ("first_start_ns", pa.int64()),
        ("ended_ns", pa.int64()),
        ("instance_id", pa.string()),
        ("steps", pa.int64()),
        ("effective_tokens", pa.int64()),
        ("solo_time_s", pa.float64()),
        ("message", pa.string()),
        ("output_path", pa.string()),
        ("final_loss", pa.float64()),
        ("perplexity_before", pa.float64()),
        ("perplexity_after", pa.float64()),
    ]
)
ROWS_PER_WRITE = 4096


class ResultSink:
    """An engine observer that writes one row a task, in the order in which tasks end.

    ``path`` ends in .csv or .parquet. Use it as a context manager: rows go to ``path`` + ".part",
    which takes its name when the block ends well and is removed when it does not. Raises
    OutputError where the file cannot be written, a full disk included.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._part = self.path.with_name(self.path.name + ".part")
        self._rows: list[TaskOutcome] = []
        self._writer: Any = None
        if self.path.suffix not in (".csv", ".parquet"):
            raise OutputError(f"{self.path}: results are .csv or .parquet. Give one of these names")

    def __enter__(self) -> ResultSink:
        kind = pa_csv.CSVWriter if self.path.suffix == ".csv" else pa_parquet.ParquetWriter
        with _told(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = kind(str(self._part), SCHEMA)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._flush()
            self._close()
            if error is None:
                with _told(self.path):
                    self._part.replace(self.path)
        finally:
            self._part.unlink(missing_ok=True)

    def on_plan(self, plan: Plan) -> None:
        """Plans are the journal's."""

    def on_task_end(self, outcome: TaskOutcome) -> None:
        self._rows.append(outcome)
        if len(self._rows) >= ROWS_PER_WRITE:
            self._flush()

    def on_batch(self, time_ns: int, events: Sequence[Event]) -> None:
        """Nothing to write."""

    def _flush(self) -> None:
        if not self._rows:
            return
        columns = list(zip(*self._rows, strict=True))
        columns[3] = tuple(state.value for state in columns[3])
        arrays = [
            pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)
        ]
        with _told(self.path):
            self._writer.write(pa.record_batch(arrays, schema=SCHEMA))
        self._rows.clear()

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with _told(self.path):
                writer.close()


class _told:
    """Turns a failed write into an OutputError that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, OSError):
            raise OutputError(
                f"{self.path}: cannot write results ({error}). "
                "Free disk space or choose a writable output folder"
            ) from error
