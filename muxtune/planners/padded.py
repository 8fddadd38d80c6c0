"""Shared by the planners that pad: one sequence a row, zero-padded to the longest of the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from muxtune.errors import ConfigError
from muxtune.planners.base import (
    Arrangement,
    CostedArrangement,
    GroupCost,
    GroupShape,
    PlannerBase,
    Site,
    TaskClass,
    group_cost,
)
from muxtune.protocols import CostBook
from muxtune.types import PackRule, Refusal, ShapeKey

ALL_BLOCKS = 1 << 16  # a shape counts no more blocks than the model has
PAD_TO = ("longest_of_batch", "longest_of_tasks")


class PaddedGroup(NamedTuple):
    """One padded hTask, its cost, and the memory peak with it."""

    shape: GroupShape
    cost: GroupCost
    peak_bytes: int
    fits: bool

    def step_time_s(self, num_stages: int = 1) -> float:
        """By itself in a pipeline, which empties every step."""
        return (max(self.cost.passes_per_step) + num_stages - 1) * self.cost.pass_time_s


class PaddedPlanner(PlannerBase):
    """One hTask of padded rows in lock-step: a round is one optimizer step of every task.

    ``pad_to``: "longest_of_batch" pads each micro-batch to its longest sequence (rounded up to
    ``pad_multiple``, as tokenizers do for tensor cores); "longest_of_tasks" pads to the longest
    sequence that any of the tasks has, so that shapes never change. Batches that do not fit in
    memory are split into micro-batches of fewer rows (in a pipeline into as many as are fastest);
    with ``recompute`` the activations of all
    blocks may be recomputed instead, where that is predicted to take less time (captured steps
    do so, the eager pass does not).
    """

    def __init__(
        self,
        costs: CostBook,
        pad_to: str = "longest_of_batch",
        pad_multiple: int = 8,
        recompute: bool = False,
    ) -> None:
        super().__init__(costs)
        if pad_to not in PAD_TO:
            raise ConfigError("planner.pad_to", f"unknown '{pad_to}'", f"choose one of {PAD_TO}")
        if pad_multiple < 1:
            raise ConfigError("planner.pad_multiple", f"is {pad_multiple}", "give at least 1")
        self.pad_to, self.pad_multiple, self.recompute = pad_to, pad_multiple, recompute

    def arrange(self, site: Site, classes: tuple[TaskClass, ...]) -> CostedArrangement | Refusal:
        resident = self.resident_bytes(site, classes)
        stages = site.replica.pp
        found = self.padded_group(site, classes, range(len(classes)), resident, stages)
        if not found.fits:
            return self.refuse_memory(site, classes, found.peak_bytes)
        rows = sum(found.shape.quota)
        padded_to = self.pad_to.replace("_", " ")
        reason = f"{len(classes)} task(s) padded to {padded_to}, {rows} rows"
        passes = max(found.cost.passes_per_step)
        return CostedArrangement(
            Arrangement((found.shape,), (None,), reason),
            (found.cost,),
            (passes,),
            found.step_time_s(stages),
            found.peak_bytes,
        )

    # -- for planners

    def padded_group(
        self,
        site: Site,
        classes: Sequence[TaskClass],
        members: Sequence[int],
        resident: int,
        num_stages: int = 1,
    ) -> PaddedGroup:
        """``members`` of the classes in one padded batch, split into as few micro-batches as fit
        beside ``resident`` bytes, or the fastest number where a pipeline of ``num_stages`` empties
        every step; where none fits, into single rows."""

        def split(recompute: int) -> PaddedGroup:
            return self._best_split(site, classes, members, resident, num_stages, recompute)

        found = [split(0)]
        if self.recompute and not (found[0].fits and max(found[0].cost.passes_per_step) <= 1):
            found.append(split(ALL_BLOCKS))
        fitting = [group for group in found if group.fits]
        return min(fitting or found[-1:], key=lambda group: group.step_time_s(num_stages))

    # -- inside

    def _best_split(
        self,
        site: Site,
        classes: Sequence[TaskClass],
        members: Sequence[int],
        resident: int,
        num_stages: int,
        recompute: int,
    ) -> PaddedGroup:
        chosen = [classes[i] for i in members]
        longest = max(self._padded(self.longest_tokens(task)) for task in chosen)
        found: list[PaddedGroup] = []
        for split in _splits(max(task.sequences_per_step for task in chosen)):
            quota = tuple(math.ceil(task.sequences_per_step / split) for task in chosen)
            shape = self._group(chosen, quota, longest, recompute)
            peak = resident + self.cost(site).pass_bytes(shape.shapes[-1], site.replica)
            peak = site.corrected_bytes(peak)
            fits = peak <= site.memory_limit_bytes
            if fits or sum(quota) == len(quota):
                cost = self._cost_of(site, chosen, shape)
                members_shape = shape._replace(members=tuple(members))
                found.append(PaddedGroup(members_shape, cost, peak, fits))
            if fits and num_stages == 1:
                break
        fitting = [group for group in found if group.fits]
        return min(fitting or found, key=lambda group: group.step_time_s(num_stages))

    def _padded(self, tokens: int) -> int:
        return math.ceil(tokens / self.pad_multiple) * self.pad_multiple

    def _group(
        self, classes: Sequence[TaskClass], quota: tuple[int, ...], longest: int, recompute: int
    ) -> GroupShape:
        slots = tuple(task.slot for task in classes)
        shortest = self.pad_multiple if self.pad_to == "longest_of_batch" else longest
        shapes = tuple(
            ShapeKey(tokens, sum(quota), slots, recompute)
            for tokens in range(shortest, longest + 1, self.pad_multiple)
        )
        return GroupShape(tuple(range(len(classes))), quota, shapes, PackRule.PAD)

    def _cost_of(
        self, site: Site, classes: Sequence[TaskClass], group: GroupShape, share: float = 1.0
    ) -> GroupCost:
        """``share``: of the sequences that this pass computes."""
        loads = [
            self.load(task, group.shapes[-1].chunk_tokens, quota, PackRule.PAD)
            for task, quota in zip(classes, group.quota, strict=True)
        ]
        if share < 1:
            loads = [
                load._replace(
                    attention_pairs_per_step=share * load.attention_pairs_per_step,
                    loss_rows_per_step=share * load.loss_rows_per_step,
                    effective_tokens_per_step=share * load.effective_tokens_per_step,
                )
                for load in loads
            ]
        longest = max(load.longest_row_tokens for load in loads)
        typical = next(
            s for s in group.shapes if s.chunk_tokens >= min(longest, group.shapes[-1].chunk_tokens)
        )
        return group_cost(group._replace(shapes=(typical,)), loads, self.cost(site), site)


def _splits(rows: int) -> list[int]:
    """How many micro-batches to split a batch into, fewest first, up to one row each."""
    return sorted({math.ceil(rows / size) for size in range(1, rows + 1)})
