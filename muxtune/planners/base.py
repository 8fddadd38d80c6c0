"""What every instance planner shares: task classes, predictions, memory checks, assembling a Plan.

A planner arranges *classes* of tasks, never task ids: two tasks with the same adapter slot, batch
size and lengths are interchangeable, so an arrangement is memoised on the multiset of classes and
bound to the ids afterwards. Everything is costed by the injected CostModel; no planner holds a
speed constant of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from muxtune.planning.expected import ExpectedLoad, expected_load
from muxtune.protocols import CostBook, CostModel
from muxtune.types import (
    NO_EPOCH,
    AdapterSlot,
    DispatchRule,
    Estimate,
    HTask,
    HTaskTurn,
    InstanceView,
    LengthSummary,
    PackRule,
    PassLoad,
    Plan,
    Prediction,
    Refusal,
    ReplicaShape,
    ShapeKey,
    TaskView,
)

MEMO_ARRANGEMENTS = 200_000


class TaskClass(NamedTuple):
    """All that planning depends on of a task; equal classes are interchangeable."""

    slot: AdapterSlot
    sequences_per_step: int
    max_length_tokens: int
    max_slowdown: float
    lengths_hash: str


class Site(NamedTuple):
    """Where tasks are planned: the instance without its tasks."""

    model: str
    device: str
    replica: ReplicaShape
    memory_limit_bytes: int
    time_percent: int
    memory_percent: int


class GroupShape(NamedTuple):
    """One hTask over class indexes: its quota by member, and the shapes that hold it."""

    members: tuple[int, ...]
    quota: tuple[int, ...]
    shapes: tuple[ShapeKey, ...]
    packing: PackRule


class Arrangement(NamedTuple):
    """A decision over classes, in their sorted order, before it is bound to task ids."""

    groups: tuple[GroupShape, ...]
    counts: tuple[int | None, ...]
    reason: str


class GroupCost(NamedTuple):
    """Of an average micro-batch of one group."""

    pass_time_s: float
    relative_error: float
    extrapolated: bool
    effective_tokens: float
    padded_tokens: float
    passes_per_step: tuple[float, ...]  # by member
    load: PassLoad


class CostedArrangement(NamedTuple):
    arrangement: Arrangement
    group_costs: tuple[GroupCost, ...]
    passes: tuple[float, ...]  # micro-batches of each group in one round
    round_time_s: float
    peak_bytes: int


class PlannerBase:
    """Memo, refusal by memory and slowdown, binding to task ids.

    A planner implements ``arrange``: classes (sorted) at a site to a costed arrangement, or a
    Refusal. ``takes_one_task`` planners refuse a second task.
    """

    takes_one_task = False

    def __init__(self, costs: CostBook) -> None:
        self.costs = costs
        self._memo: dict[tuple[Site, tuple[TaskClass, ...]], CostedArrangement | Refusal] = {}
        self._lengths: dict[str, LengthSummary] = {}

    # -- the protocol

    def plan(self, instance: InstanceView, previous: Plan | None) -> Plan | Refusal:
        """See ``InstancePlanner.plan``. Returns ``previous`` itself when nothing changes."""
        site = site_of(instance)
        keyed = sorted((class_of(task), task.task_id) for task in instance.tasks)
        if not keyed:
            return Refusal("an instance without tasks needs no plan", ())
        for task in instance.tasks:
            self._lengths.setdefault(task.lengths.content_hash, task.lengths)
        classes = tuple(key for key, _ in keyed)
        ids = tuple(task_id for _, task_id in keyed)
        costed = self._arranged(site, classes)
        if isinstance(costed, Refusal):
            return costed._replace(task_ids=ids)
        return self._bind(instance, site, classes, ids, costed, previous)

    def arrange(self, site: Site, classes: tuple[TaskClass, ...]) -> CostedArrangement | Refusal:
        raise NotImplementedError

    # -- for planners

    def cost(self, site: Site) -> CostModel:
        return self.costs(site.model, site.device)

    def load(self, task: TaskClass, chunk_tokens: int, quota: int, rule: PackRule) -> ExpectedLoad:
        """What one optimizer step of a task of this class is expected to compute."""
        lengths = self._lengths[task.lengths_hash]
        return expected_load(lengths, task.sequences_per_step, chunk_tokens, quota, rule)

    def longest_tokens(self, task: TaskClass) -> int:
        return self._lengths[task.lengths_hash].max_tokens

    def resident_bytes(self, site: Site, classes: Sequence[TaskClass]) -> int:
        slots = tuple(task.slot for task in classes)
        return self.cost(site).resident_bytes(slots, site.replica)

    def refuse_memory(self, site: Site, classes: Sequence[TaskClass], needed: int) -> Refusal:
        what = "this task alone" if len(classes) == 1 else f"these {len(classes)} tasks together"
        return Refusal(
            f"{what} need {needed / 1e9:.2f} GB of memory on an instance of {site.model} that has "
            f"{site.memory_limit_bytes / 1e9:.2f} GB",
            (),
            needed_bytes=needed,
            available_bytes=site.memory_limit_bytes,
            remedy="use a device with more memory, or lower max_length, batch_size or rank",
        )

    def solo_step_time_s(self, site: Site, task: TaskClass) -> float:
        """Predicted seconds a step of the task alone on this site, under the same planner."""
        costed = self._arranged(site, (task._replace(max_slowdown=0.0),))
        return 0.0 if isinstance(costed, Refusal) else step_times_s(costed, 1)[0]

    # -- inside

    def _arranged(self, site: Site, classes: tuple[TaskClass, ...]) -> CostedArrangement | Refusal:
        key = (site, classes)
        found = self._memo.get(key)
        if found is None:
            if len(self._memo) >= MEMO_ARRANGEMENTS:
                self._memo.clear()
            found = self._memo[key] = self._arrange_checked(site, classes)
        return found

    def _arrange_checked(
        self, site: Site, classes: tuple[TaskClass, ...]
    ) -> CostedArrangement | Refusal:
        if self.takes_one_task and len(classes) > 1:
            return Refusal(
                "this planner runs one task an instance", (), remedy="use another instance"
            )
        costed = self.arrange(site, classes)
        if isinstance(costed, Refusal):
            return costed
        return self._refuse_slow(site, classes, costed) or costed

    def _refuse_slow(
        self, site: Site, classes: tuple[TaskClass, ...], costed: CostedArrangement
    ) -> Refusal | None:
        if len(classes) < 2 or not any(task.max_slowdown for task in classes):
            return None
        for task, step_s in zip(classes, step_times_s(costed, len(classes)), strict=True):
            solo_s = self.solo_step_time_s(site, task)
            if task.max_slowdown and step_s > task.max_slowdown * solo_s:
                return Refusal(
                    f"a task with max_slowdown={task.max_slowdown:g} would run at {step_s:.3g} s a "
                    f"step, {step_s / solo_s:.2f} times its {solo_s:.3g} s alone",
                    (),
                    predicted_slowdown=step_s / solo_s,
                    remedy="place it on a less loaded instance",
                )
        return None

    def _bind(
        self,
        instance: InstanceView,
        site: Site,
        classes: tuple[TaskClass, ...],
        ids: tuple[str, ...],
        costed: CostedArrangement,
        previous: Plan | None,
    ) -> Plan:
        htasks = tuple(_bind_group(group, ids) for group in costed.arrangement.groups)
        turns = tuple(HTaskTurn(i, n) for i, n in enumerate(costed.arrangement.counts))
        if (
            previous is not None
            and previous.htasks == htasks
            and previous.round == turns
            and previous.drains == instance.draining
        ):
            return previous
        epoch = NO_EPOCH if previous is None else previous.epoch
        return Plan(
            instance.instance_id,
            epoch + 1,
            instance.draining,
            instance.replicas,
            htasks,
            turns,
            DispatchRule.SINGLE,
            self._predict(site, classes, ids, costed),
            reason=costed.arrangement.reason,
        )

    def _predict(
        self,
        site: Site,
        classes: tuple[TaskClass, ...],
        ids: tuple[str, ...],
        costed: CostedArrangement,
    ) -> Prediction:
        steps = step_times_s(costed, len(ids))
        pairs = list(zip(costed.group_costs, costed.passes, strict=True))
        time_s = costed.round_time_s
        error_s = sum(cost.pass_time_s * n * cost.relative_error for cost, n in pairs)
        return Prediction(
            round_time_s=Estimate(
                time_s,
                max(0.0, time_s - error_s),
                time_s + error_s,
                any(cost.extrapolated for cost, _ in pairs),
            ),
            round_effective_tokens=sum(cost.effective_tokens * n for cost, n in pairs),
            round_padded_tokens=sum(cost.padded_tokens * n for cost, n in pairs),
            peak_memory_bytes=Estimate(*(float(costed.peak_bytes),) * 3),
            step_time_s=dict(zip(ids, steps, strict=True)),
            solo_step_time_s={
                task_id: self.solo_step_time_s(site, task)
                for task_id, task in zip(ids, classes, strict=True)
            },
            breakdown_s={},
            tasks_step_time_s=max(steps),
        )


def class_of(task: TaskView) -> TaskClass:
    return TaskClass(
        task.slot,
        task.sequences_per_step,
        task.max_length_tokens,
        task.max_slowdown or 0.0,
        task.lengths.content_hash,
    )


def site_of(instance: InstanceView) -> Site:
    return Site(
        instance.model,
        instance.device,
        instance.replicas[0],
        instance.memory_limit_bytes,
        instance.corrections.time_percent,
        instance.corrections.memory_percent,
    )


def step_times_s(costed: CostedArrangement, num_tasks: int) -> list[float]:
    """Seconds between optimizer steps of each task, by class index."""
    out = [costed.round_time_s] * num_tasks  # a lock-step round is one step of every task
    arrangement = costed.arrangement
    for group, count, cost in zip(
        arrangement.groups, arrangement.counts, costed.group_costs, strict=True
    ):
        if count is not None:
            for member, per_step in zip(group.members, cost.passes_per_step, strict=True):
                out[member] = costed.round_time_s * per_step / count
    return out


def group_cost(
    group: GroupShape,
    loads: Sequence[ExpectedLoad],
    cost: CostModel,
    site: Site,
    mean_chunks: float | None = None,
) -> GroupCost:
    """The average micro-batch of a group whose tasks all keep contributing.

    ``mean_chunks``: rows of chunks that an average micro-batch fills; decides the shape it takes
    of a ladder. Default: the sum over members.
    """
    passes = tuple(load.micro_batches_per_step for load in loads)
    if mean_chunks is None:
        mean_chunks = sum(x.chunks_per_step / n for x, n in zip(loads, passes, strict=True))
    shape = typical_shape(group.shapes, mean_chunks)
    pairs = sum(x.attention_pairs_per_step / n for x, n in zip(loads, passes, strict=True))
    rows = sum(x.loss_rows_per_step / n for x, n in zip(loads, passes, strict=True))
    c = cost.pass_coefficients(shape, site.replica)
    time_s = c.base_s + pairs * c.per_pair_s + rows * c.per_loss_row_s
    time_s += sum(s / n for s, n in zip(c.optimizer_s, passes, strict=True))
    return GroupCost(
        time_s * site.time_percent / 100,
        c.relative_error,
        c.extrapolated,
        sum(x.effective_tokens_per_step / n for x, n in zip(loads, passes, strict=True)),
        float(shape.padded_tokens),
        passes,
        PassLoad(shape, pairs, rows),
    )


def typical_shape(shapes: Sequence[ShapeKey], mean_chunks: float) -> ShapeKey:
    """The first shape of the ladder that holds an average micro-batch."""
    for shape in shapes:
        if shape.num_chunks >= mean_chunks - 1e-9:
            return shape
    return shapes[-1]


def _bind_group(group: GroupShape, ids: tuple[str, ...]) -> HTask:
    names = [ids[member] for member in group.members]
    return HTask(
        group.shapes,
        {name: slot for slot, name in enumerate(names)},
        dict(zip(names, group.quota, strict=True)),
        group.packing,
    )
