"""Shared by the planners that pad: one sequence a row, zero-padded to the longest of the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from muxtune.errors import ConfigError
from muxtune.planners.base import (
    Arrangement,
    CostedArrangement,
    GroupShape,
    PlannerBase,
    Site,
    TaskClass,
    group_cost,
)
from muxtune.protocols import CostBook
from muxtune.types import PackRule, Refusal, ShapeKey

PAD_TO = ("longest_of_batch", "longest_of_tasks")


class PaddedPlanner(PlannerBase):
    """One hTask of padded rows in lock-step: a round is one optimizer step of every task.

    ``pad_to``: "longest_of_batch" pads each micro-batch to its longest sequence (rounded up to
    ``pad_multiple``, as tokenizers do for tensor cores); "longest_of_tasks" pads to the longest
    sequence that any of the tasks has, so that shapes never change. Batches that do not fit in
    memory are split into micro-batches of fewer rows.
    """

    def __init__(
        self, costs: CostBook, pad_to: str = "longest_of_batch", pad_multiple: int = 8
    ) -> None:
        super().__init__(costs)
        if pad_to not in PAD_TO:
            raise ConfigError("planner.pad_to", f"unknown '{pad_to}'", f"choose one of {PAD_TO}")
        if pad_multiple < 1:
            raise ConfigError("planner.pad_multiple", f"is {pad_multiple}", "give at least 1")
        self.pad_to, self.pad_multiple = pad_to, pad_multiple

    def arrange(self, site: Site, classes: tuple[TaskClass, ...]) -> CostedArrangement | Refusal:
        longest = max(self._padded(self.longest_tokens(task)) for task in classes)
        resident = self.resident_bytes(site, classes)
        needed = 0
        for split in _splits(max(task.sequences_per_step for task in classes)):
            quota = tuple(math.ceil(task.sequences_per_step / split) for task in classes)
            group = self._group(classes, quota, longest)
            needed = resident + self.cost(site).pass_bytes(group.shapes[-1], site.replica)
            needed = needed * site.memory_percent // 100
            if needed <= site.memory_limit_bytes:
                return self._costed(site, classes, group, needed)
        return self.refuse_memory(site, classes, needed)

    def _padded(self, tokens: int) -> int:
        return math.ceil(tokens / self.pad_multiple) * self.pad_multiple

    def _group(self, classes: Sequence[TaskClass], quota: tuple[int, ...], longest: int):
        slots = tuple(task.slot for task in classes)
        shortest = self.pad_multiple if self.pad_to == "longest_of_batch" else longest
        shapes = tuple(
            ShapeKey(tokens, sum(quota), slots)
            for tokens in range(shortest, longest + 1, self.pad_multiple)
        )
        return GroupShape(tuple(range(len(classes))), quota, shapes, PackRule.PAD)

    def _costed(
        self, site: Site, classes: Sequence[TaskClass], group: GroupShape, peak_bytes: int
    ) -> CostedArrangement:
        loads = [
            self.load(task, group.shapes[-1].chunk_tokens, quota, PackRule.PAD)
            for task, quota in zip(classes, group.quota, strict=True)
        ]
        longest = max(load.longest_row_tokens for load in loads)
        typical = next(
            s for s in group.shapes if s.chunk_tokens >= min(longest, group.shapes[-1].chunk_tokens)
        )
        cost = group_cost(group._replace(shapes=(typical,)), loads, self.cost(site), site)
        passes = max(cost.passes_per_step)
        rows = sum(group.quota)
        reason = f"{len(classes)} task(s) padded to {self.pad_to.replace('_', ' ')}, {rows} rows"
        return CostedArrangement(
            Arrangement((group,), (None,), reason),
            (cost,),
            (passes,),
            cost.pass_time_s * (passes + site.replica.pp - 1),  # the pipeline empties every step
            peak_bytes,
        )


def _splits(rows: int) -> list[int]:
    """How many micro-batches to split a batch into, fewest first, up to one row each."""
    return sorted({math.ceil(rows / size) for size in range(1, rows + 1)})
