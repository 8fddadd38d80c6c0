"""The runtime's tasks: from prepared to ended, whichever instance they are on."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from muxtune.protocols import LengthSource
from muxtune.runtime.bank import TaskState
from muxtune.runtime.batch import TextLibrary
from muxtune.types import Cursor, ResultData, Sample, TaskReadyData, TaskSpec


class Phase(enum.Enum):
    LIVE = enum.auto()
    DONE = enum.auto()
    GONE = enum.auto()  # failed or cancelled


@dataclass
class RuntimeTask:
    """``state`` is None until the task is first placed. ``open_*`` belong to the open step."""

    spec: TaskSpec
    ready: TaskReadyData
    cursor: Cursor = field(default_factory=Cursor)
    phase: Phase = Phase.LIVE
    state: TaskState | None = None
    perplexity_before: float | None = None
    final_loss: float | None = None
    effective_tokens: int = 0
    open_tokens: int = 0
    last_step_ns: int = 0
    result: ResultData | None = None

    @property
    def num_steps(self) -> int:
        return self.ready.num_steps

    @property
    def steps_done(self) -> int:
        return 0 if self.state is None else self.state.step

    def end(self, phase: Phase) -> None:
        """It contributes to no further micro-batch; an open accumulation is lost."""
        self.phase = phase
        self.cursor = Cursor(self.num_steps, None)


class TaskDataFailure(Exception):
    """A task's data raised: the failure is this task's own."""

    def __init__(self, task_id: str, error: Exception) -> None:
        super().__init__(str(error))
        self.task_id, self.error = task_id, error


class GuardedLengths:
    """A LengthSource that tells whose data failed. One object for the whole run, because the
    step builder's tables are kept by it."""

    def __init__(self, library: TextLibrary, tasks: Mapping[str, RuntimeTask]) -> None:
        self._library, self._tasks = library, tasks

    def batch(self, task_id: str, step: int) -> tuple[Sample, ...]:
        try:
            return self._library.batch(task_id, step)
        except Exception as error:
            raise TaskDataFailure(task_id, error) from error

    def num_steps(self, task_id: str) -> int:
        return self._tasks[task_id].num_steps

    def period_steps(self, task_id: str) -> int | None:
        return self._library.period_steps(task_id)

    def lengths_key(self, task_id: str) -> str:
        return self._library.lengths_key(task_id)


_: type[LengthSource] = GuardedLengths
