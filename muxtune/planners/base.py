"""What every instance planner shares: task classes, predictions, memory checks, assembling a Plan.

A planner arranges *classes* of tasks, never task ids: two tasks with the same adapter slot, batch
size and lengths are interchangeable, so an arrangement is memoised on the multiset of classes and
bound to the ids afterwards. Everything is costed by the injected CostModel; no planner holds a
speed constant of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from muxtune.errors import ConfigError
from muxtune.planners.promises import Budget, budget_of, lateness, waited_s, within
from muxtune.planning.expected import ExpectedLoad, expected_load
from muxtune.planning.orchestration import ONE_GPU, Pace, pace_of
from muxtune.protocols import CostBook, CostModel
from muxtune.types import (
    NO_EPOCH,
    NS_PER_S,
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
    RankStream,
    Refusal,
    ReplicaShape,
    ShapeKey,
    SubgraphRef,
    TaskView,
    new_tuple,
)

_Value = TypeVar("_Value")

MEMO_ARRANGEMENTS = 200_000
MEMO_TASKS = 20_000
TRIES = 3  # of a plan whose takeover tightens the bounds that it is made for
# Slowdowns that deadlines are rounded down to; beyond the last a deadline binds nobody.
DEADLINE_STEPS = (1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0)


# The part of a view that a Site is made of, as it stands there.
OF_SITE = slice(
    InstanceView._fields.index("memory_limit_bytes"), InstanceView._fields.index("replicas") + 1
)


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
    others: tuple[ReplicaShape, ...] = ()  # replicas beside the first, for planners that use them

    def corrected_bytes(self, predicted: int) -> int:
        """What the cost model predicts, as pressure has taught to read it."""
        return predicted * self.memory_percent // 100

    def free_bytes(self, resident: int) -> int:
        """Of the cost model's bytes, those left beside ``resident`` ones."""
        return self.memory_limit_bytes * 100 // self.memory_percent - resident


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


class KnownParts(NamedTuple):
    """A class's key, and what keeps alive the parts of a view that it was looked up by: views are
    rebuilt, but tasks that are alike share these parts."""

    key: str
    slot: AdapterSlot
    lengths: LengthSummary


class CostedArrangement(NamedTuple):
    """``played_ratio``: see ``Prediction``."""

    arrangement: Arrangement
    group_costs: tuple[GroupCost, ...]
    passes: tuple[float, ...]  # micro-batches of each group in one round
    round_time_s: float
    peak_bytes: int
    played_ratio: float = 1.0


class Answer(NamedTuple):
    """What is remembered of a multiset of classes: the arrangement, and what plans of it predict
    but for the task ids."""

    costed: CostedArrangement
    prediction: Prediction
    step_times_s: tuple[float, ...]
    solo_times_s: tuple[float, ...]
    turns: tuple[HTaskTurn, ...]
    order: Mapping[RankStream, tuple[SubgraphRef, ...]] = {}
    interleaves: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """Stand-ins for task ids."""
        return tuple(map(str, range(len(self.step_times_s))))


class PlannerBase:
    """Memo, refusal by memory and slowdown, binding to task ids.

    A planner implements ``arrange``: classes (sorted) at a site to a costed arrangement, or a
    Refusal. ``takes_one_task`` planners refuse a second task.
    """

    takes_one_task = False
    deals_replicas = False  # whether replicas beside an instance's first are taken into account
    promise_margin = 0.0  # share of a max_slowdown that is kept in hand, because predictions err

    def __init__(self, costs: CostBook) -> None:
        self.costs = costs
        self._memo: dict[tuple[tuple[object, ...], tuple[str, ...]], Answer | Refusal] = {}
        self._solo: dict[tuple[Site, TaskClass], float] = {}
        self._keys: dict[TaskClass, str] = {}
        self._known: dict[tuple[object, ...], KnownParts] = {}
        self._classes: dict[str, TaskClass] = {}
        self.lengths: dict[str, LengthSummary] = {}

    # -- the protocol

    def plan(self, instance: InstanceView, previous: Plan | None) -> Plan | Refusal:
        """See ``InstancePlanner.plan``. Returns ``previous`` itself when nothing changes."""
        tasks = instance.tasks
        if not tasks:
            return Refusal("an instance without tasks needs no plan", ())
        promised = False
        for task in tasks:
            if task.deadline_ns is not None:
                return self._plan_in_time(instance, previous)
            promised = promised or task.placed_ns is not None
        plan = self._plan_for_life if promised else self._plan
        return plan(instance, previous)

    def _plan_in_time(self, instance: InstanceView, previous: Plan | None) -> Plan | Refusal:
        """With deadlines as bounds on the slowdown. They keep a task out that would break them;
        where none came and they cannot all be kept any more, they are let go."""
        answer = self._plan_for_life(self._with_deadlines(instance), previous)
        if isinstance(answer, Plan) or not answer.predicted_slowdown:
            return answer
        running = {} if previous is None else previous.predicted.step_time_s
        if any(task.task_id not in running for task in instance.tasks):
            remedy = f"{answer.remedy}, or give the task with a deadline a later one"
            return answer._replace(remedy=remedy)
        return self._plan_for_life(instance, previous)

    def _plan_for_life(self, instance: InstanceView, previous: Plan | None) -> Plan | Refusal:
        """Promises are kept over the whole lives of tasks (``muxtune.planners.promises``): a
        newcomer that would break one is refused; without one the plan that is least late is taken.
        """
        budgets = self._budgets(instance, previous)
        if not budgets or len(instance.tasks) == 1:
            return self._plan(instance, previous)
        broken: Refusal | None = None
        least: tuple[float, Plan] | None = None
        for answer in self._attempts(instance, previous, budgets):
            if isinstance(answer, Refusal):
                broken = broken or answer
                continue
            late_s, refusal = lateness(
                budgets,
                answer,
                previous,
                self._takeover_s(instance, answer, previous),
                self.promise_margin,
            )
            if refusal is None:
                return answer
            broken = broken or refusal
            if least is None or late_s < least[0]:
                least = late_s, answer
        running = {} if previous is None else previous.predicted.step_time_s
        if broken is not None and any(task.task_id not in running for task in instance.tasks):
            return broken
        return self._plan(instance, previous) if least is None else least[1]

    def _attempts(
        self, instance: InstanceView, previous: Plan | None, budgets: Sequence[Budget]
    ) -> Iterator[Plan | Refusal]:
        """Plans at ever tighter bounds, as far as what they cost to take over asks for it; then the
        running plan, kept and added to, in the same way."""
        for make in (self._plan, self.plan_kept):
            takeover_s = 0.0
            for _ in range(TRIES):
                bounded = within(instance, budgets, takeover_s, waited_s(previous))
                answer = None if bounded is None else make(bounded, previous)
                if answer is None:
                    break
                if isinstance(answer, Plan):
                    takeover_s = self._takeover_s(instance, answer, previous)
                    told_s = takeover_s + waited_s(previous)
                    prediction = answer.predicted._replace(takeover_s=told_s)
                    answer = answer if answer is previous else answer._replace(predicted=prediction)
                yield answer
                if isinstance(answer, Refusal):
                    break

    def _budgets(self, instance: InstanceView, previous: Plan | None) -> list[Budget]:
        site = site_of(instance)
        promised = [task for task in instance.tasks if task.placed_ns is not None]
        found = [
            budget_of(task, self._alone_step_s(site, task), instance.now_ns, previous)
            for task in promised
        ]
        return [budget for budget in found if budget is not None]

    def _takeover_s(self, instance: InstanceView, plan: Plan, previous: Plan | None) -> float:
        """What the plan prepares before its first round, and the round that a task ends within."""
        if plan is previous:
            return plan.predicted.round_time_s.value
        prepared = self.cost(site_of(instance)).transition_s(previous, plan)
        return prepared.value + plan.predicted.round_time_s.value

    def _alone_step_s(self, site: Site, task: TaskView) -> float:
        return self.solo_step_time_s(site, self.class_of_view(task))

    def plan_kept(self, instance: InstanceView, previous: Plan | None) -> Plan | None:
        """The running plan with the tasks that came and without those that left, for planners that
        can tell; None where it does not hold them or breaks a promise."""
        return None

    def _with_deadlines(self, instance: InstanceView) -> InstanceView:
        site = site_of(instance)
        tasks = tuple([self._in_time(site, task, instance.now_ns) for task in instance.tasks])
        return instance._replace(tasks=tasks)

    def _in_time(self, site: Site, task: TaskView, now_ns: int) -> TaskView:
        """``max_slowdown`` such that the task ends by its deadline, in steps so that classes stay
        few; none where it would be late even alone."""
        if task.deadline_ns is None:
            return task
        alone_s = self._alone_step_s(site, task)
        left_s = (task.deadline_ns - now_ns) / NS_PER_S
        slack = left_s / max(1e-12, alone_s * max(1, task.num_steps - task.steps_done))
        bound = max((step for step in DEADLINE_STEPS if step <= slack), default=None)
        if bound is None or (task.max_slowdown is not None and task.max_slowdown <= bound):
            return task
        return task._replace(max_slowdown=bound)

    def _plan(self, instance: InstanceView, previous: Plan | None) -> Plan | Refusal:
        tasks = instance.tasks
        if len(tasks) == 1:
            alone = tasks[0]
            keys, ids = (self._key_of(alone),), (alone.task_id,)
        else:
            keyed = sorted([(self._key_of(task), task.task_id) for task in tasks])
            keys, ids = zip(*keyed, strict=True)
        answer = self._memo.get((instance[OF_SITE], keys))
        if answer is None:
            answer = self._remember(instance, keys)
        if isinstance(answer, Refusal):
            return answer._replace(task_ids=ids)
        plan = bind(instance, ids, answer, previous)
        return plan if plan is previous else self.settle(instance, plan, answer, previous)

    def settle(
        self, instance: InstanceView, plan: Plan, answer: Answer, previous: Plan | None
    ) -> Plan:
        """The last word on a new plan, for planners that may rather keep the running one."""
        return plan

    def arrange(self, site: Site, classes: tuple[TaskClass, ...]) -> CostedArrangement | Refusal:
        raise NotImplementedError

    def arrange_paced(
        self, site: Site, classes: tuple[TaskClass, ...], solo_s: Sequence[float]
    ) -> CostedArrangement | None:
        """Another arrangement, where ``arrange`` breaks a promise of ``max_slowdown``."""
        return None

    def orchestrate(self, site: Site, answer: Answer) -> Answer:
        """Orders the subgraphs of a round, for planners that do."""
        return answer

    # -- for planners

    def cost(self, site: Site) -> CostModel:
        return self.costs(site.model, site.device)

    def load(self, task: TaskClass, chunk_tokens: int, quota: int, rule: PackRule) -> ExpectedLoad:
        """What one optimizer step of a task of this class is expected to compute."""
        lengths = self.lengths[task.lengths_hash]
        return expected_load(lengths, task.sequences_per_step, chunk_tokens, quota, rule)

    def longest_tokens(self, task: TaskClass) -> int:
        return self.lengths[task.lengths_hash].max_tokens

    def resident_bytes(self, site: Site, classes: Sequence[TaskClass]) -> int:
        slots = tuple(task.slot for task in classes)
        return self.cost(site).resident_bytes(slots, site.replica)

    def refuse_memory(self, site: Site, classes: Sequence[TaskClass], needed: int) -> Refusal:
        alone = len(classes) == 1
        what = "this task does not" if alone else f"these {len(classes)} tasks together do not"
        return Refusal(
            f"{what} fit into the memory of an instance of {site.model}",
            (),
            needed_bytes=needed,
            available_bytes=site.memory_limit_bytes,
            remedy="use a device with more memory, or lower max_length, batch_size or rank",
        )

    def solo_step_time_s(self, site: Site, task: TaskClass) -> float:
        """Predicted seconds a step of the task alone on this site, under the same planner."""
        if task.max_slowdown:
            task = task._replace(max_slowdown=0.0)
        known = self._solo.get((site, task))
        if known is None:
            costed = self.arrange(site, (task,))
            if isinstance(costed, Refusal):
                known = 0.0
            elif site.replica.num_gpus > 1:
                known = self._finished(site, costed, (0.0,)).step_times_s[0]
            else:
                known = step_times_s(costed, 1)[0]
            self._solo[site, task] = known
        return known

    def class_of_view(self, task: TaskView) -> TaskClass:
        return self._classes[self._key_of(task)]

    def forget_plans(self) -> None:
        """Only time changes: every answer is a function of the question."""
        self._memo.clear()

    # -- inside

    def _key_of(self, task: TaskView) -> str:
        """A string that orders and names the task's class; strings remember their hash."""
        parts = (
            id(task.slot),
            id(task.lengths),
            task.sequences_per_step,
            task.max_length_tokens,
            task.max_slowdown,
        )
        known = self._known.get(parts)
        if known is None:
            if len(self._known) >= MEMO_TASKS:
                self._known.clear()
            known = KnownParts(self._new_key(task), task.slot, task.lengths)
            self._known[parts] = known
        return known[0]

    def _new_key(self, task: TaskView) -> str:
        found = class_of(task)
        key = self._keys.get(found)
        if key is None:
            key = self._keys[found] = repr(tuple(found))
            self._classes[key] = found
            self.lengths[found.lengths_hash] = task.lengths
        return key

    def _remember(self, instance: InstanceView, keys: tuple[str, ...]) -> Answer | Refusal:
        if len(self._memo) >= MEMO_ARRANGEMENTS:
            self._memo.clear()
        classes = tuple(self._classes[key] for key in keys)
        answer = self._answer(site_of(instance), classes)
        self._memo[instance[OF_SITE], keys] = answer
        return answer

    def _answer(self, site: Site, classes: tuple[TaskClass, ...]) -> Answer | Refusal:
        if self.takes_one_task and len(classes) > 1:
            remedy = "use another instance"
            return Refusal("this planner runs one task an instance", (), remedy=remedy)
        impossible = refuse_impossible(classes)
        costed = impossible or self.arrange(site, classes)
        if isinstance(costed, Refusal):
            return costed
        solo = tuple(of_each(classes, lambda task: self.solo_step_time_s(site, task)))
        answer = self._finished(site, costed, solo)
        refusal = refuse_slow(classes, answer.step_times_s, solo, self.promise_margin)
        if refusal is not None:
            costed = self.arrange_paced(site, classes, solo)
            return refusal if costed is None else self._finished(site, costed, solo)
        return answer

    def _finished(self, site: Site, costed: CostedArrangement, solo: tuple[float, ...]) -> Answer:
        """What rounds of several GPUs really take, and where the time of a round goes."""
        answer, pace = self.orchestrate(site, answer_of(costed, solo)), ONE_GPU
        if site.replica.num_gpus > 1:
            plan = bind(nameless(site), answer.names, answer, None)
            times_s = [group.pass_time_s for group in costed.group_costs]
            pace = pace_of(plan, self.cost(site), costed.passes, times_s)
            answer = paced(answer, pace)
        spent_s = round_breakdown_s(self.cost(site), site.replica, costed, pace)
        prediction = answer.prediction
        total_s = sum(spent_s.values())
        if total_s:
            scale = prediction.round_time_s.value / total_s
            spent_s = {name: scale * seconds for name, seconds in spent_s.items()}
        return answer._replace(prediction=prediction._replace(breakdown_s=spent_s))


def of_each(classes: Sequence[TaskClass], ask: Callable[[TaskClass], _Value]) -> list[_Value]:
    """Asked once of each object: classes hash slowly, and equal ones mostly are one object."""
    known = {id(task): ask(task) for task in {id(task): task for task in classes}.values()}
    return [known[id(task)] for task in classes]


def answer_of(costed: CostedArrangement, solo_s: tuple[float, ...]) -> Answer:
    steps = tuple(step_times_s(costed, len(solo_s)))
    turns = tuple(HTaskTurn(i, n) for i, n in enumerate(costed.arrangement.counts))
    return Answer(costed, prediction_of(costed, steps), steps, solo_s, turns)


def paced(answer: Answer, pace: Pace) -> Answer:
    """The answer with the times that its rounds take at this pace."""
    costed, old = answer.costed, answer.prediction
    serial_s = sum(
        n * group.pass_time_s for n, group in zip(costed.passes, costed.group_costs, strict=True)
    )
    ratio = pace.factor * serial_s / costed.round_time_s
    estimate = old.round_time_s
    round_time_s = estimate._replace(
        value=ratio * estimate.value, low=ratio * estimate.low, high=ratio * estimate.high
    )
    return answer._replace(
        costed=costed._replace(round_time_s=ratio * costed.round_time_s),
        step_times_s=tuple(ratio * seconds for seconds in answer.step_times_s),
        prediction=old._replace(
            round_time_s=round_time_s, tasks_step_time_s=ratio * old.tasks_step_time_s
        ),
    )


def nameless(site: Site) -> InstanceView:
    """For plans of a shape alone, whose instance and tasks do not matter."""
    return InstanceView("", 0, (), None, 0, replicas=(site.replica,))


def round_breakdown_s(
    cost: CostModel, replica: ReplicaShape, costed: CostedArrangement, pace: Pace
) -> dict[str, float]:
    """Seconds of a round by cause, averaged over the stages: ``compute`` (the backbone),
    ``adapters``, ``loss``, ``optimizer``, ``padding`` (the share of filler rows in compute and
    adapters), ``exposed_communication`` and ``bubbles``."""
    names = ("compute", "adapters", "loss", "optimizer", "padding")
    spent: dict[str, float] = dict.fromkeys(names, 0.0)
    for group, cost_of, passes in zip(
        costed.arrangement.groups, costed.group_costs, costed.passes, strict=True
    ):
        filler = 1 - cost_of.effective_tokens / cost_of.padded_tokens
        closing = cost.pass_coefficients(group.shapes[-1], replica).optimizer_s
        optimizer_s = sum(s / n for s, n in zip(closing, cost_of.passes_per_step, strict=False))
        parts = cost.breakdown_s(cost_of.load, replica)
        working_s = sum(parts.values()) - parts.get("communication", 0.0)
        # The load is that of the largest shape; the mean micro-batch may take a smaller one.
        scale = passes * (cost_of.pass_time_s - optimizer_s) / sum(parts.values())
        by_rows_s = working_s - parts.get("loss", 0.0) - parts.get("attention", 0.0)
        by_rows_s -= parts.get("adapters", 0.0) + parts.get("overhead", 0.0)
        padding_s = filler * (by_rows_s + parts.get("adapters", 0.0))
        adapters_s = (1 - filler) * parts.get("adapters", 0.0)
        spent["adapters"] += scale * adapters_s
        spent["loss"] += scale * parts.get("loss", 0.0)
        spent["padding"] += scale * padding_s
        spent["compute"] += scale * (working_s - adapters_s - parts.get("loss", 0.0) - padding_s)
        spent["optimizer"] += passes * optimizer_s
    working_s = sum(spent.values())
    for name, share in (
        ("exposed_communication", pace.exposed_communication),
        ("bubbles", pace.bubbles),
    ):
        spent[name] = working_s * share / pace.computing
    return {name: seconds for name, seconds in spent.items() if seconds}


def refuse_impossible(classes: Sequence[TaskClass]) -> Refusal | None:
    """A Refusal when a task may not even be as slow as alone."""
    for task in classes:
        if task.max_slowdown and not task.max_slowdown >= 1:
            return Refusal(
                f"max_slowdown is {task.max_slowdown:g}: no task runs faster than alone",
                (),
                remedy="give max_slowdown of at least 1, or none",
            )
    return None


def planned_slowdown(task: TaskClass, margin: float) -> float:
    """What is planned for a promise: a little less than was promised; 0 where nothing was."""
    return max(1.0, task.max_slowdown / (1 + margin)) if task.max_slowdown else 0.0


def refuse_slow(
    classes: Sequence[TaskClass],
    steps_s: Sequence[float],
    solo_s: Sequence[float],
    margin: float = 0.0,
) -> Refusal | None:
    """A Refusal when a task would run slower than its ``max_slowdown``, less ``margin``, allows."""
    for task, step_s, alone_s in zip(classes, steps_s, solo_s, strict=True):
        most_s = planned_slowdown(task, margin) * alone_s
        if most_s and len(classes) > 1 and step_s > most_s:
            return Refusal(
                f"a task with max_slowdown={task.max_slowdown:g} would run at {step_s:.3g} s a "
                f"step, {step_s / alone_s:.2f} times its {alone_s:.3g} s alone",
                (),
                predicted_slowdown=step_s / alone_s,
                remedy="place it on a less loaded instance",
                needed_s=step_s,
                available_s=most_s,
            )
    return None


def prediction_of(costed: CostedArrangement, steps_s: Sequence[float]) -> Prediction:
    """All of a plan's prediction but what names tasks."""
    pairs = list(zip(costed.group_costs, costed.passes, strict=True))
    time_s = costed.round_time_s
    error_s = sum(cost.pass_time_s * n * cost.relative_error for cost, n in pairs)
    outside = any(cost.extrapolated for cost, _ in pairs)
    peak = float(costed.peak_bytes)
    return Prediction(
        round_time_s=Estimate(time_s, max(0.0, time_s - error_s), time_s + error_s, outside),
        round_effective_tokens=sum(cost.effective_tokens * n for cost, n in pairs),
        round_padded_tokens=sum(cost.padded_tokens * n for cost, n in pairs),
        peak_memory_bytes=Estimate(peak, peak, peak),
        step_time_s={},
        solo_step_time_s={},
        breakdown_s={},
        tasks_step_time_s=max(steps_s),
        played_ratio=costed.played_ratio,
    )


def bind(
    instance: InstanceView, ids: tuple[str, ...], answer: Answer, previous: Plan | None
) -> Plan:
    costed, base, step_times_s, solo_times_s, turns, order, interleaves = answer
    groups, _, reason = costed[0]
    if len(groups) == 1:
        htasks = (_bind_group(groups[0], ids),)
    else:
        htasks = tuple([_bind_group(group, ids) for group in groups])
    epoch = NO_EPOCH if previous is None else previous.epoch
    if (
        previous is not None
        and previous.htasks
        and previous.htasks == htasks
        and previous.round == turns
        and previous.drains == instance.draining
    ):
        return previous
    steps_s = dict(zip(ids, step_times_s, strict=True))
    solo_s = dict(zip(ids, solo_times_s, strict=True))
    # What Prediction(...) and Plan(...) do, without their keyword handling: fleets plan often.
    prediction = new_tuple(Prediction, (*base[:4], steps_s, solo_s, *base[6:]))
    name, _, _, _, _, _, _, _, replicas, draining, _ = instance
    dispatch = DispatchRule.SINGLE if len(replicas) == 1 else DispatchRule.BALANCED
    head = (name, epoch + 1, draining, replicas, htasks, turns, dispatch, prediction)
    return new_tuple(Plan, (*head, order, reason, interleaves))


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
        instance.replicas[1:],
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
    shape_shares: Sequence[float] = (1.0,),
    slots: Sequence[int] | None = None,
) -> GroupCost:
    """The average micro-batch of a group whose tasks all keep contributing.

    ``shape_shares``: share of micro-batches that take each of the group's shapes. ``slots``: of
    each member; None: in order. Raises ConfigError for costs that are negative or not numbers.
    """
    passes = tuple([load.micro_batches_per_step for load in loads])
    pairs = sum([x.attention_pairs_per_step / n for x, n in zip(loads, passes, strict=True)])
    rows = sum([x.loss_rows_per_step / n for x, n in zip(loads, passes, strict=True)])
    tokens = sum([x.effective_tokens_per_step / n for x, n in zip(loads, passes, strict=True)])
    time_s = error_s = padded = optimizer_s = 0.0
    extrapolated, of_slots = False, None
    for shape, share in zip(group.shapes, shape_shares, strict=True):
        c = cost.pass_coefficients(shape, site.replica)
        seconds = c.base_s + pairs * c.per_pair_s + rows * c.per_loss_row_s
        if c.optimizer_s is not of_slots:  # which the shapes of a ladder share
            of_slots = c.optimizer_s
            closing = of_slots if slots is None else [of_slots[slot] for slot in slots]
            optimizer_s = sum([s / n for s, n in zip(closing, passes, strict=True)])
        seconds += optimizer_s
        if not 0 < seconds < math.inf:
            raise bad_cost(shape, seconds)
        time_s += share * seconds
        error_s += share * seconds * c.relative_error
        padded += share * shape.padded_tokens
        extrapolated |= c.extrapolated
    return GroupCost(
        time_s * site.time_percent / 100,
        error_s / time_s,
        extrapolated,
        tokens,
        padded,
        passes,
        PassLoad(group.shapes[-1], pairs, rows),
    )


def bad_cost(shape: ShapeKey, seconds: float) -> ConfigError:
    return ConfigError(
        "cost",
        f"a pass of {shape.num_chunks} x {shape.chunk_tokens} tokens is said to take {seconds} s",
        "correct the profile or the figures: times are positive numbers",
    )


def _bind_group(group: GroupShape, ids: tuple[str, ...]) -> HTask:
    members, quota, shapes, packing = group
    if len(members) == 1:
        name = ids[members[0]]
        return new_tuple(HTask, (shapes, {name: 0}, {name: quota[0]}, packing))
    names = [ids[member] for member in members]
    return HTask(
        shapes,
        {name: slot for slot, name in enumerate(names)},
        dict(zip(names, quota, strict=True)),
        packing,
    )
