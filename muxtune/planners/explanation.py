"""Why a plan is as it is: what else there was, where filler comes from, what would help most.

All of it is asked on demand, by planning the same tasks again under other options or conditions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple, Protocol, cast

from muxtune.cost.shapes import ModelShape
from muxtune.errors import MuxTuneError
from muxtune.protocols import CostModel, InstancePlanner
from muxtune.types import InstanceView, MicroBatch, PackRule, Plan, ReplicaShape, ShapeKey

MakePlanner = Callable[[Mapping[str, object]], InstancePlanner]

MAX_PAIRED = 4
SATURATED, MOST_TOKENS = 0.9, 1 << 15  # of the token rate of passes as long as this
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


class Fusion(NamedTuple):
    """Why tasks share an hTask, or do not: seconds until every task of the instance has taken a
    step, were only these otherwise; None where memory forbids that. ``task_ids``: of the hTasks
    concerned; ``apart``: these are hTasks that could be one, else one that could be an hTask a
    task."""

    task_ids: tuple[tuple[str, ...], ...]
    apart: bool
    step_time_s: float | None
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


def saturation_tokens(cost: CostModel, replica: ReplicaShape, chunk_tokens: int) -> int:
    """Tokens from which on a longer pass hardly computes more tokens a second: where it reaches
    ``SATURATED`` of the rate of a very long one, in chunks of this length, without adapters."""
    sizes = [1 << i for i in range(max(1, (MOST_TOKENS // chunk_tokens).bit_length()))]
    shapes = [ShapeKey(chunk_tokens, size, ()) for size in sizes]
    rates = [s.padded_tokens / cost.pass_coefficients(s, replica).base_s for s in shapes]
    pairs = zip(shapes, rates, strict=True)
    return next(shape.padded_tokens for shape, rate in pairs if rate >= SATURATED * max(rates))


def unpromised(instance: InstanceView, plan: Plan, make_planner: MakePlanner) -> Alternative | None:
    """What could be done were nobody promised a ``max_slowdown``; None where nobody is, or where
    it makes no difference."""
    if not any(task.max_slowdown for task in instance.tasks):
        return None
    tasks = tuple([task._replace(max_slowdown=None) for task in instance.tasks])
    free = instance._replace(tasks=tasks)
    return _alternative("without promises", free, plan, make_planner, {})


class Partitioner(Protocol):
    """A planner that can say what another partition into hTasks would take, where it chooses."""

    chooses_htasks: bool

    def partition_step_s(
        self, instance: InstanceView, partition: Sequence[Sequence[str]]
    ) -> float | None: ...


def fusions(instance: InstanceView, plan: Plan, planner: InstancePlanner) -> list[Fusion]:
    """Each hTask of several tasks, and each two of the first ``MAX_PAIRED`` hTasks; empty for
    planners that cannot choose."""
    if not getattr(planner, "chooses_htasks", False):
        return []
    ask = cast(Partitioner, planner).partition_step_s
    groups = [tuple(sorted(htask.quota)) for htask in plan.htasks]
    found: list[tuple[tuple[tuple[str, ...], ...], bool, list[Sequence[str]]]] = []
    for group in groups:
        if len(group) > 1:
            others = [other for other in groups if other != group]
            found.append(((group,), False, [*others, *((name,) for name in group)]))
    for one, two in combinations(groups[:MAX_PAIRED], 2):
        others = [other for other in groups if other not in (one, two)]
        found.append(((one, two), True, [*others, (*one, *two)]))
    now_s = plan.predicted.tasks_step_time_s
    asked = [(names, apart, ask(instance, cut)) for names, apart, cut in found]
    return [Fusion(names, apart, s, s / now_s - 1 if s else math.inf) for names, apart, s in asked]


def layouts(
    instance: InstanceView, plan: Plan, make_planner: MakePlanner, model: ModelShape
) -> list[Alternative]:
    """The same tasks on as many GPUs in every other layout that the model can be cut to."""
    num_gpus = instance.replicas[0].num_gpus
    found = []
    for tp in range(1, num_gpus + 1):
        replica = ReplicaShape(tp, num_gpus // tp)
        if num_gpus % tp or replica == instance.replicas[0] or replica.pp > model.num_layers:
            continue
        other = instance._replace(replicas=(replica,))
        found.append(_alternative(f"TP {tp} x PP {replica.pp}", other, plan, make_planner, {}))
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
    if not isinstance(other, Plan):
        return None
    if other.htasks == plan.htasks and other.replicas == plan.replicas:
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
