"""Chrome trace JSON, which ui.perfetto.dev and chrome://tracing open, of real or simulated spans.

Format: the "Trace Event Format" document of the Chromium project; complete events (``ph: X``)
with microseconds, metadata events (``ph: M``) that name processes and threads, counters
(``ph: C``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from muxtune.report.run_folder import RunFolder


class Span(NamedTuple):
    """Something that took time. ``process`` and ``thread`` name the two levels of tracks, for
    instance an instance and its hTask. ``args`` are shown when the span is selected."""

    process: str
    thread: str
    name: str
    start_ns: int
    duration_ns: int
    args: Mapping[str, Any] = {}


class Counter(NamedTuple):
    """Values at a time, drawn as a stacked area on a track of their own."""

    process: str
    name: str
    time_ns: int
    values: Mapping[str, float]


def write_trace(path: Path, spans: Iterable[Span], counters: Iterable[Counter] = ()) -> Path:
    """Streams the events to ``path``. Raises OutputError when it cannot be written."""
    with RunFolder(Path(path).parent).stream(Path(path).name) as file:
        trace = TraceWriter(file)
        for span in spans:
            trace.span(span)
        for counter in counters:
            trace.counter(counter)
        trace.end()
    return Path(path)


class TraceWriter:
    """Writes events as they come; the file is whole after ``end``.

    Tracks are numbered in order of first use, as the format wants integers.
    """

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.processes: dict[str, int] = {}
        self.threads: dict[tuple[str, str], int] = {}
        self.separator = ""
        file.write('{"displayTimeUnit":"ms","traceEvents":[\n')

    def span(self, span: Span) -> None:
        self._emit(self._span_event(span))

    def counter(self, counter: Counter) -> None:
        self._emit(self._counter_event(counter))

    def end(self) -> None:
        self.file.write("\n]}\n")

    def _emit(self, event: Mapping[str, Any]) -> None:
        self.file.write(self.separator + json.dumps(event, separators=(",", ":")))
        self.separator = ",\n"

    def _span_event(self, span: Span) -> dict[str, Any]:
        return {
            "ph": "X",
            "name": span.name,
            "pid": self._process(span.process),
            "tid": self._thread(span.process, span.thread),
            "ts": span.start_ns / 1_000,
            "dur": span.duration_ns / 1_000,
            "args": dict(span.args),
        }

    def _counter_event(self, counter: Counter) -> dict[str, Any]:
        return {
            "ph": "C",
            "name": counter.name,
            "pid": self._process(counter.process),
            "ts": counter.time_ns / 1_000,
            "args": dict(counter.values),
        }

    def _process(self, name: str) -> int:
        if name not in self.processes:
            self.processes[name] = len(self.processes) + 1
            self._name("process_name", name, self.processes[name], 0)
        return self.processes[name]

    def _thread(self, process: str, name: str) -> int:
        key = (process, name)
        if key not in self.threads:
            self.threads[key] = len(self.threads) + 1
            self._name("thread_name", name, self._process(process), self.threads[key])
        return self.threads[key]

    def _name(self, kind: str, name: str, pid: int, tid: int) -> None:
        self._emit({"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}})
