"""Effective tokens of whole tasks, from prefix sums that tasks with equal lengths share."""

from __future__ import annotations

from itertools import accumulate

from muxtune.protocols import LengthSource
from muxtune.types import Cursor


class TokenTables:
    """``tokens(task_id, steps)``: what a task's first ``steps`` optimizer steps consume."""

    def __init__(self, lengths: LengthSource) -> None:
        self._lengths = lengths
        self._sums: dict[str, list[int]] = {}

    def tokens_at(self, task_id: str, cursor: Cursor) -> int:
        """Up to a cursor, which may stand within a step."""
        step, positions = cursor
        tokens = self.tokens(task_id, step) if step else 0
        if positions is None:
            return tokens
        batch = self._lengths.batch(task_id, step)
        left = sum(batch[position].tokens for position in positions)
        return tokens + sum(sample.tokens for sample in batch) - left

    def tokens(self, task_id: str, steps: int) -> int:
        period = self._lengths.period_steps(task_id)
        if period is None:
            return sum(self._step_tokens(task_id, step) for step in range(steps))
        sums = self._period_sums(task_id, period)
        periods, rest = divmod(steps, period)
        return periods * sums[period] + sums[rest]

    def _period_sums(self, task_id: str, period: int) -> list[int]:
        key = self._lengths.lengths_key(task_id)
        sums = self._sums.get(key)
        if sums is None:
            steps = (self._step_tokens(task_id, step) for step in range(period))
            sums = self._sums[key] = list(accumulate(steps, initial=0))
        return sums

    def _step_tokens(self, task_id: str, step: int) -> int:
        return sum(sample.tokens for sample in self._lengths.batch(task_id, step))
