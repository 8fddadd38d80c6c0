"""What a plan says to the step builder, checked once and laid out for quick use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from muxtune.errors import ConfigError
from muxtune.protocols import LengthSource
from muxtune.types import Cursor, HTask, PackRule, Plan, ReplicaShape, ShapeKey

Cursors = Mapping[str, Cursor]


class TaskFacts(NamedTuple):
    """One task of one hTask of a plan; sorts by slot."""

    slot: int
    task_id: str
    quota: int
    num_steps: int
    draining: bool

    def has_ended(self, cursor: Cursor) -> bool:
        """Whether the task contributes no more: finished, or released at its step boundary."""
        return cursor.step >= self.num_steps or (self.draining and cursor.left is None)


class HTaskFacts(NamedTuple):
    """One hTask. ``tasks`` are in slot order, which is the order of chunks in a micro-batch.

    A unit is what a turn repeats: a micro-batch where turns have counts, a step of each task
    where they have none. ``units_per_round`` is 0 where a round does not visit the hTask, and
    ``mixed`` says that a round visits it in both ways, so that no single unit describes it.
    """

    index: int
    shapes: tuple[ShapeKey, ...]
    sizes: tuple[tuple[int, int], ...]  # (chunk_tokens, num_chunks) of the shapes
    rule: PackRule
    chunk_tokens: int
    num_slots: int
    tasks: tuple[TaskFacts, ...]
    units_per_round: int
    by_steps: bool
    mixed: bool
    is_separable: bool  # no count depends on two tasks together

    def shape_index(self, num_chunks: int, longest_tokens: int) -> int:
        """The first shape that holds a micro-batch. Raises ConfigError when none does."""
        for index, shape in enumerate(self.shapes):
            if shape.num_chunks >= num_chunks and (
                self.rule is PackRule.CHUNK or shape.chunk_tokens >= longest_tokens
            ):
                return index
        raise ConfigError(
            f"htasks[{self.index}].shapes",
            f"no shape holds a micro-batch of {num_chunks} chunks whose longest row has "
            f"{longest_tokens} tokens",
            "add a larger shape, or lower the quotas",
        )

    def pass_pairs(self, shape_index: int, packed_pairs: int) -> int:
        """Attention pairs that a pass pays for: a padded pass computes all of its rows in full."""
        if self.rule is PackRule.CHUNK:
            return packed_pairs
        return padded_pairs(self.shapes[shape_index])


class PlanFacts(NamedTuple):
    plan: Plan
    lengths: LengthSource
    replica: ReplicaShape
    htasks: tuple[HTaskFacts, ...]
    task_ids: tuple[str, ...]  # by hTask, then by slot


def padded_pairs(shape: ShapeKey) -> int:
    """Query-key pairs of a pass in which every row is one causal sequence of ``chunk_tokens``."""
    return shape.num_chunks * shape.chunk_tokens * (shape.chunk_tokens + 1) // 2


def plan_facts(plan: Plan, lengths: LengthSource) -> PlanFacts:
    """Raises ConfigError for a plan that cannot be stepped through."""
    counts_of: list[list[int | None]] = [[] for _ in plan.htasks]
    for turn in plan.round:
        if not 0 <= turn.htask < len(counts_of) or (turn.count is not None and turn.count < 1):
            raise ConfigError(
                "plan.round",
                f"turn {tuple(turn)} names no hTask of {len(plan.htasks)} or counts below 1",
                "let every turn name an hTask, with a count of at least 1 or none",
            )
        counts_of[turn.htask].append(turn.count)
    htasks = tuple(
        [
            _htask_facts(plan, index, htask, counts_of[index], lengths)
            for index, htask in enumerate(plan.htasks)
        ]
    )
    task_ids = tuple([task.task_id for htask in htasks for task in htask.tasks])
    if len(set(task_ids)) != len(task_ids):
        twice = sorted({task_id for task_id in task_ids if task_ids.count(task_id) > 1})
        raise ConfigError(
            "plan.htasks", f"tasks {twice} are in two hTasks", "put each task into one hTask"
        )
    # Dispatch over unequal replicas comes later; until then every micro-batch goes to the first.
    replica = plan.replicas[0] if plan.replicas else ReplicaShape()
    return PlanFacts(plan, lengths, replica, htasks, task_ids)


def cursor_of(cursors: Cursors, task_id: str) -> Cursor:
    try:
        return cursors[task_id]
    except KeyError:
        raise ConfigError(
            "cursors", f"task '{task_id}' of the plan has no cursor", "give every task a Cursor"
        ) from None


def _htask_facts(
    plan: Plan, index: int, htask: HTask, counts: list[int | None], lengths: LengthSource
) -> HTaskFacts:
    """``counts``: of the turns of a round that visit the hTask."""
    num_step_turns = counts.count(None)
    chunk_tokens, num_slots = _check_shapes(index, htask)
    tasks = _task_facts(plan, index, htask, lengths, num_slots)
    by_steps = num_step_turns > 0
    quota = sum([task.quota for task in tasks])
    return HTaskFacts(
        index=index,
        shapes=htask.shapes,
        sizes=tuple([(shape.chunk_tokens, shape.num_chunks) for shape in htask.shapes]),
        rule=htask.packing,
        chunk_tokens=chunk_tokens,
        num_slots=num_slots,
        tasks=tasks,
        units_per_round=num_step_turns or sum([count for count in counts if count is not None]),
        by_steps=by_steps,
        mixed=0 < num_step_turns < len(counts),
        is_separable=not by_steps
        and len(htask.shapes) == 1
        and quota <= htask.shapes[0].num_chunks,
    )


def _check_shapes(index: int, htask: HTask) -> tuple[int, int]:
    """Chunk tokens to pack by, and the number of slots."""
    shapes = htask.shapes
    if len(shapes) == 1:
        return shapes[0].chunk_tokens, len(shapes[0].slots)
    field = f"htasks[{index}].shapes"
    if not shapes:
        raise ConfigError(field, "there is none", "give at least one shape")
    num_slots = len(shapes[0].slots)
    lengths_tokens = {shape.chunk_tokens for shape in shapes}
    if htask.packing is PackRule.CHUNK and len(lengths_tokens) > 1:
        raise ConfigError(
            field,
            f"chunk lengths {sorted(lengths_tokens)} differ under the chunk rule",
            "let shapes of one hTask differ in num_chunks only",
        )
    if {len(shape.slots) for shape in shapes} != {num_slots}:
        raise ConfigError(field, "their slots differ", "give all shapes the same slots")
    return max(lengths_tokens), num_slots


def _task_facts(
    plan: Plan, index: int, htask: HTask, lengths: LengthSource, num_slots: int
) -> tuple[TaskFacts, ...]:
    slot_of, num_steps, drains = htask.slot_of, lengths.num_steps, plan.drains
    try:
        tasks = [
            TaskFacts(slot_of[task_id], task_id, quota, num_steps(task_id), task_id in drains)
            for task_id, quota in htask.quota.items()
        ]
    except KeyError:
        missing = sorted(set(htask.quota) - set(slot_of))
        if not missing:
            raise
        raise ConfigError(
            f"htasks[{index}].slot_of", f"tasks {missing} have no slot", "give each task one"
        ) from None
    tasks.sort()
    slots = [task.slot for task in tasks]
    if slots and (len(set(slots)) != len(slots) or slots[0] < 0 or slots[-1] >= num_slots):
        raise ConfigError(
            f"htasks[{index}].slot_of",
            f"slots {slots} are not distinct slots below {num_slots}",
            "give each task its own slot of the shape",
        )
    return tuple(tasks)
