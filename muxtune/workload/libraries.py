"""One task library for drawn lengths and for real data side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from muxtune.protocols import TaskLibrary
from muxtune.types import Sample, TaskReadyData, TaskSpec
from muxtune.workload.encoding import EncodedSequence
from muxtune.workload.synthetic import SyntheticLibrary


class MixedLibrary:
    """A TaskLibrary for both kinds of tasks: drawn lengths and real data."""

    def __init__(self, synthetic: SyntheticLibrary, datasets: Callable[[], TaskLibrary]) -> None:
        self._synthetic, self._make_datasets = synthetic, datasets
        self._datasets: TaskLibrary | None = None
        self._home: dict[str, TaskLibrary] = {}

    @property
    def datasets(self) -> TaskLibrary:
        """Made when the first task with real data comes: it needs the model's tokenizer."""
        if self._datasets is None:
            self._datasets = self._make_datasets()
        return self._datasets

    def add(self, task: TaskSpec) -> TaskReadyData:
        home = self._synthetic if task.data.histogram else self.datasets
        ready = home.add(task)
        self._home[task.task_id] = home
        return ready

    def discard(self, task_id: str) -> None:
        home = self._home.pop(task_id, None)
        if home is not None:
            home.discard(task_id)

    def batch(self, task_id: str, step: int) -> tuple[Sample, ...]:
        return self._home[task_id].batch(task_id, step)

    def num_steps(self, task_id: str) -> int:
        return self._home[task_id].num_steps(task_id)

    def period_steps(self, task_id: str) -> int | None:
        return self._home[task_id].period_steps(task_id)

    def lengths_key(self, task_id: str) -> str:
        return self._home[task_id].lengths_key(task_id)


class MixedTextLibrary(MixedLibrary):
    """A MixedLibrary whose tasks have text to train on."""

    def sequence(self, task_id: str, index: int) -> EncodedSequence:
        home: Any = self._home[task_id]
        return home.sequence(task_id, index)

    def validation(self, task_id: str) -> tuple[EncodedSequence, ...]:
        home: Any = self._home[task_id]
        return home.validation(task_id)
