"""Times of passes, as a plan's rounds take them.

A step builder adds up passes one after the other, each by the sums of its shape. On several GPUs
they overlap, or wait for each other; ``muxtune.planning.orchestration.pace`` tells by which factor
that changes a round. On one GPU the layouts of a plan's micro-batches tell more than their sums: a
slot that a task has left, between others of the same tile, makes products longer that a mean over
full shapes does not. Either way the factor becomes a cost model whose passes take that much
longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from muxtune.planning.orchestration import Pace, pace_of
from muxtune.planning.step_builder import ShapeTotals, StepBuilder, pass_load
from muxtune.protocols import CostModel, LengthSource
from muxtune.types import Cursor, PassCoefficients, Plan, ReplicaShape, ShapeKey

SAMPLED_ROUNDS = 8
LAYOUT_ROUNDS = 4
_MAX_KNOWN = 4_096


class TimedPlan(NamedTuple):
    """``cost``: to be asked for coefficients only. ``once_s``: what filling and draining take."""

    cost: CostModel
    once_s: float


class PacedCost:
    """Another cost model's passes, each ``factor`` times as long."""

    def __init__(self, cost: CostModel, factor: float) -> None:
        self._cost, self._factor = cost, factor
        self._known: dict[tuple[ShapeKey, ReplicaShape], PassCoefficients] = {}

    def pass_coefficients(self, shape: ShapeKey, replica: ReplicaShape) -> PassCoefficients:
        key = (shape, replica)
        if key not in self._known:
            old, factor = self._cost.pass_coefficients(shape, replica), self._factor
            self._known[key] = old._replace(
                base_s=factor * old.base_s,
                per_pair_s=factor * old.per_pair_s,
                per_loss_row_s=factor * old.per_loss_row_s,
                optimizer_s=tuple(factor * seconds for seconds in old.optimizer_s),
            )
        return self._known[key]


class Pacer:
    """Times plans; what it was asked it remembers, because plans of one arrangement share their
    order and their shapes."""

    def __init__(
        self, builder: StepBuilder, lengths: LengthSource, by_layouts: bool = False
    ) -> None:
        """``by_layouts``: on one GPU, too, where the cost model tells more by a layout."""
        self._builder, self._lengths, self._by_layouts = builder, lengths, by_layouts
        self._paces: dict[tuple[Any, ...], tuple[Plan, Pace]] = {}
        self._costs: dict[tuple[int, float], PacedCost] = {}
        self._unpaced: dict[int, TimedPlan] = {}  # by the identity of the cost, which they hold

    def timed(self, plan: Plan, cursors: Mapping[str, Cursor], cost: CostModel) -> TimedPlan:
        """From these cursors on. Raises ConfigError for an order that is not valid."""
        if not plan.htasks or len(plan.replicas) != 1 or plan.replicas[0].num_gpus == 1:
            # Several replicas meet after every micro-batch: nothing interleaves.
            if self._by_layouts and plan.htasks and len(plan.replicas) == 1:
                return TimedPlan(self._paced(cost, self._by_layout(plan, cursors, cost)), 0.0)
            found = self._unpaced.get(id(cost))
            return found or self._unpaced.setdefault(id(cost), TimedPlan(cost, 0.0))
        passes, times_s = self._mean_passes(plan, cursors, cost)
        pace = self._ordered(plan, cost) if plan.order else pace_of(plan, cost, passes, times_s)
        serial_s = sum(n * t for n, t in zip(passes, times_s, strict=True))
        return TimedPlan(self._paced(cost, pace.factor), pace.once * pace.factor * serial_s)

    def _paced(self, cost: CostModel, factor: float) -> CostModel:
        key = (id(cost), round(factor, 9))
        if key not in self._costs:
            if len(self._costs) >= _MAX_KNOWN:
                self._costs.clear()
            self._costs[key] = PacedCost(cost, factor)
        return cast(CostModel, self._costs[key])

    def _by_layout(self, plan: Plan, cursors: Mapping[str, Cursor], cost: CostModel) -> float:
        """What the next rounds' passes take by their layouts, over what their sums say."""
        loads, at = [], {task_id: cursors[task_id] for task_id in plan.task_ids}
        for _ in range(LAYOUT_ROUNDS):
            batches, after = self._builder.next_round(plan, at, self._lengths)
            loads += [pass_load(batch, self._lengths) for batch in batches]
            at = dict(after)
        replica = plan.replicas[0]
        by_layout_s, by_sums_s = (
            float(cost.pass_times_s(of, replica).value.sum())
            for of in (loads, [load._replace(layout=None) for load in loads])
        )
        return by_layout_s / by_sums_s if by_sums_s else 1.0

    def _ordered(self, plan: Plan, cost: CostModel) -> Pace:
        shapes = tuple(id(htask.shapes) for htask in plan.htasks)
        key = (id(plan.order), id(cost), plan.round, shapes)
        if key not in self._paces:
            if len(self._paces) >= _MAX_KNOWN:
                self._paces.clear()
            # The entry keeps the plan alive, so that the ids stay its.
            self._paces[key] = (plan, pace_of(plan, cost, (), ()))
        return self._paces[key][1]

    def _mean_passes(
        self, plan: Plan, cursors: Mapping[str, Cursor], cost: CostModel
    ) -> tuple[list[float], list[float]]:
        """Of each hTask: micro-batches a round, and their mean time."""
        totals = self._builder.round_totals(plan, dict(cursors), self._lengths, SAMPLED_ROUNDS)
        passes, seconds = [0.0] * len(plan.htasks), [0.0] * len(plan.htasks)
        for item in totals.shapes:
            passes[item.htask] += item.micro_batches / SAMPLED_ROUNDS
            seconds[item.htask] += _seconds(item, plan, cost) / SAMPLED_ROUNDS
        for htask, item in enumerate(plan.htasks):
            closing = cost.pass_coefficients(item.shapes[-1], plan.replicas[0]).optimizer_s
            for task_id, slot in item.slot_of.items():
                seconds[htask] += totals.closes.get(task_id, 0) * closing[slot] / SAMPLED_ROUNDS
        times_s = [s / n if n else 0.0 for s, n in zip(seconds, passes, strict=True)]
        return passes, times_s


def _seconds(item: ShapeTotals, plan: Plan, cost: CostModel) -> float:
    each = cost.pass_coefficients(item.shape, plan.replicas[0])
    seconds = item.micro_batches * each.base_s + item.attention_pairs * each.per_pair_s
    return seconds + item.loss_rows * each.per_loss_row_s
