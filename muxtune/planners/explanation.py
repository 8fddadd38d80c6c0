"""Why a plan is as it is: what else there was, where filler comes from, what would help most.

All of it is asked on demand, by planning the same tasks again under other options or conditions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from muxtune.errors import MuxTuneError
from muxtune.protocols import InstancePlanner
from muxtune.types import InstanceView, MicroBatch, PackRule, Plan

MakePlanner = Callable[[Mapping[str, object]], InstancePlanner]

ALTERNATIVES: tuple[tuple[str, Mapping[str, object]], ...] = (
    ("all tasks in one hTask", {"fusion": "all_spatial"}),
    ("every task in an hTask of its own", {"fusion": "all_temporal"}),
    ("padded rows", {"alignment": "pad"}),
    *((f"chunks of {n} tokens", {"chunk_tokens": n}) for n in (16, 32, 64, 128, 256, 512)),
)


class Alternative(NamedTuple):
    """``slower``: its time for a step of every task over the plan's, less one."""

    name: str
    step_time_s: float
    slower: float


class Padding(NamedTuple):
    """Token rows by use. ``inside_tasks``: padding of a task's sequences to its own chunks, or to
    its own longest row; ``between_tasks``: padding to rows as long as another task's longest;
    ``budget``: chunks or rows of the shape that nothing fills."""

    effective: int
    inside_tasks: int
    between_tasks: int
    budget: int


def alternatives(
    instance: InstanceView, plan: Plan, make_planner: MakePlanner
) -> list[Alternative]:
    """Other plans for the same tasks, best first; those equal to the plan are left out."""
    found = [
        _alternative(name, instance, plan, make_planner, options) for name, options in ALTERNATIVES
    ]
    return sorted((item for item in found if item is not None), key=lambda item: item.slower)


def remedies(instance: InstanceView, plan: Plan, make_planner: MakePlanner) -> list[Alternative]:
    """What would help, most helpful first: ``slower`` is negative where it does."""
    roomy = instance._replace(memory_limit_bytes=2 * instance.memory_limit_bytes)
    found = [
        _alternative("twice the memory", roomy, plan, make_planner, {}),
        _alternative("16 shapes an hTask", instance, plan, make_planner, {"max_shapes": 16}),
        _alternative("row tiles of 8 tokens", instance, plan, make_planner, {"tile_tokens": 8}),
    ]
    return sorted((item for item in found if item is not None), key=lambda item: item.slower)


def _alternative(
    name: str,
    instance: InstanceView,
    plan: Plan,
    make_planner: MakePlanner,
    options: Mapping[str, object],
) -> Alternative | None:
    try:
        other = make_planner(options).plan(instance, None)
    except MuxTuneError:  # an option that this planner does not have, or that does not fit
        return None
    if not isinstance(other, Plan) or other.htasks == plan.htasks:
        return None
    step_s = other.predicted.tasks_step_time_s
    return Alternative(name, step_s, step_s / plan.predicted.tasks_step_time_s - 1)


def padding(micro_batches: Sequence[MicroBatch]) -> Padding:
    """Where the token rows of these micro-batches go."""
    effective = inside = between = budget = 0
    for micro_batch in micro_batches:
        row = micro_batch.shape.chunk_tokens
        longest: dict[str, int] = {}
        used = [sum(piece.stop - piece.start for piece in c.pieces) for c in micro_batch.chunks]
        for chunk, tokens in zip(micro_batch.chunks, used, strict=True):
            longest[chunk.task_id] = max(longest.get(chunk.task_id, 0), tokens)
        for chunk, tokens in zip(micro_batch.chunks, used, strict=True):
            own = longest[chunk.task_id] if micro_batch.packing is PackRule.PAD else row
            effective += tokens
            inside += own - tokens
            between += row - own
        budget += micro_batch.shape.padded_tokens - row * len(micro_batch.chunks)
    return Padding(effective, inside, between, budget)
