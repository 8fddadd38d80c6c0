"""What the runtime tells of its work while it works: steps, rounds, and where time went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, NamedTuple

from muxtune.errors import OutputError


class StepRecord(NamedTuple):
    """One optimizer step of one task. ``loss``: mean over the step's targets. ``grad_norm``:
    before clipping. ``step``: steps done, this one included. ``duration_ns``: since the task's
    previous step, or since it joined."""

    time_ns: int
    instance_id: str
    epoch: int
    task_id: str
    step: int
    num_steps: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    target_tokens: int
    duration_ns: int


class RoundRecord(NamedTuple):
    """One round of an instance's plan; evaluations and other instances' work not included."""

    start_ns: int
    duration_ns: int
    instance_id: str
    epoch: int
    micro_batches: int
    effective_tokens: int
    padded_tokens: int


class SpanPlace(NamedTuple):
    """Where one operation of a micro-batch ran, on an instance of several ranks. ``stream``:
    compute or comm. ``round``: since the plan began; ``micro_batch``: of its hTask in the round;
    ``direction``: forward or backward; ``kind``: of the plan's subgraph."""

    rank: int
    stage: int
    stream: str
    round: int
    micro_batch: int
    direction: str
    kind: str


class SpanRecord(NamedTuple):
    """A stretch of work. ``name``: forward, backward, optimizer (or step, a captured one as a
    whole), capture, evaluate, load, prepare or checkpoint. ``htask`` is -1 outside of a
    micro-batch. With a ``place``: an operation of a rank, ``name`` being that of the plan's
    subgraph and ``task_ids`` all of the hTask."""

    name: str
    instance_id: str
    htask: int
    start_ns: int
    duration_ns: int
    task_ids: tuple[str, ...]
    place: SpanPlace | None = None


class StepListener:
    """Receives records as they are made; override what you need. It must not raise."""

    def on_step(self, record: StepRecord) -> None:
        """A task took an optimizer step."""

    def on_round(self, record: RoundRecord) -> None:
        """An instance finished a round."""

    def on_span(self, record: SpanRecord) -> None:
        """A stretch of work ended."""

    def on_notice(self, text: str) -> None:
        """Something that a user should know; each text comes once."""


class Recorder(StepListener):
    """Keeps all records in memory, for reports and tests."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.rounds: list[RoundRecord] = []
        self.spans: list[SpanRecord] = []
        self.notices: list[str] = []

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_round(self, record: RoundRecord) -> None:
        self.rounds.append(record)

    def on_span(self, record: SpanRecord) -> None:
        self.spans.append(record)

    def on_notice(self, text: str) -> None:
        self.notices.append(text)

    def losses(self, task_id: str) -> list[float]:
        return [record.loss for record in self.steps if record.task_id == task_id]


class MetricsWriter(StepListener):
    """One JSON line an optimizer step, on disk when the step is over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def on_step(self, record: StepRecord) -> None:
        """Raises OutputError when the line cannot be written."""
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(json.dumps(record._asdict(), separators=(",", ":")) + "\n")
            self._file.flush()
        except OSError as error:
            raise OutputError(
                f"output_dir: cannot write '{self.path}': {error.strerror or error}. "
                "Free space there or choose another folder with output_dir=PATH"
            ) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
