"""Random tokens of drawn lengths: what a base model with random weights can be trained on.

For measuring speed and memory at a real model's shape; there is nothing to learn in it.
"""

from __future__ import annotations

import numpy as np

from muxtune.types import TaskReadyData, TaskSpec
from muxtune.workload.encoding import EncodedSequence
from muxtune.workload.synthetic import SyntheticLibrary


class RandomTexts(SyntheticLibrary):
    """A text library. Tokens depend on the task's seed and the sequence's index alone."""

    def __init__(self, vocab: int, seed: int = 0) -> None:
        super().__init__(seed)
        self._vocab = vocab
        self._seeds: dict[str, int] = {}

    def add(self, task: TaskSpec) -> TaskReadyData:
        self._seeds[task.task_id] = task.seed
        return super().add(task)

    def sequence(self, task_id: str, index: int) -> EncodedSequence:
        count = self.sample(task_id, index).tokens
        random = np.random.default_rng([self._seeds[task_id], index])
        tokens = random.integers(1, self._vocab, count, dtype=np.int32)
        is_target = np.ones(count, dtype=bool)
        is_target[-1] = False
        return EncodedSequence(tokens, is_target)

    def validation(self, task_id: str) -> tuple[EncodedSequence, ...]:
        """None: nothing can be learnt."""
        return ()
