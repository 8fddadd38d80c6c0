"""Whether promises of ``max_slowdown`` are kept over the whole lives of tasks.

A plan at the promised pace breaks the promise nonetheless when taking plans over costs time: the
running round is waited for, adapters are loaded, shapes captured, and a task ends with a round. So
a promise is a budget of seconds from the first placement on: ``max_slowdown`` times the time alone.
What is left of it, less what the next plan costs to take over, is what its steps may take; a
task's pace is never planned to be slower than the promise itself, even if it has time in hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from muxtune.types import NS_PER_S, InstanceView, Plan, Refusal, TaskView

BOUNDS_PER_UNIT = 40  # bounds are rounded down, so that classes of tasks stay few
_ROUNDING = 1e-9


class Budget(NamedTuple):
    """Of one promised task: seconds left of its promise, seconds that its steps to do would take
    alone, and their number. ``is_new``: it waits for the end of the running round."""

    task_id: str
    max_slowdown: float
    left_s: float
    alone_s: float
    steps_left: float
    is_new: bool


class Lateness(NamedTuple):
    """``late_s``: by how much the latest task would break its promise, 0 where none does."""

    late_s: float
    refusal: Refusal | None


NOT_LATE = Lateness(0.0, None)


def budget_of(
    task: TaskView, alone_step_s: float, now_ns: int, running: Plan | None
) -> Budget | None:
    """None for a task without a promise, or whose promise could not be kept even alone."""
    if task.max_slowdown is None or task.placed_ns is None or not alone_step_s:
        return None
    step_s = None if running is None else running.predicted.step_time_s.get(task.task_id)
    steps_left = max(1.0, task.num_steps - task.steps_done)
    if running is not None and step_s:
        worked_s = (now_ns - task.steps_ns) / NS_PER_S - running.predicted.takeover_s
        steps_left = max(1.0, steps_left - max(0.0, worked_s) / step_s)
    spent_s = (now_ns - task.placed_ns) / NS_PER_S
    left_s = task.max_slowdown * alone_step_s * task.num_steps - spent_s
    alone_s = alone_step_s * steps_left
    if left_s < alone_s:
        return None
    return Budget(task.task_id, task.max_slowdown, left_s, alone_s, steps_left, not step_s)


def waited_s(running: Plan | None) -> float:
    """A plan takes over at the end of a round."""
    return 0.0 if running is None else running.predicted.round_time_s.value


def within(
    instance: InstanceView, budgets: Sequence[Budget], takeover_s: float, wait_s: float
) -> InstanceView | None:
    """The view with bounds that leave room for a takeover, for which newcomers wait ``wait_s``
    besides; None where a task has no such room."""
    bounds: dict[str, float] = {}
    for budget in budgets:
        spent_s = takeover_s + (wait_s if budget.is_new else 0.0)
        slack = (budget.left_s - spent_s) / budget.alone_s
        if slack < budget.max_slowdown * (1 - _ROUNDING):
            bound = math.floor(slack * BOUNDS_PER_UNIT) / BOUNDS_PER_UNIT
            if bound < 1:
                return None
            bounds[budget.task_id] = bound
    if not bounds:
        return instance
    tasks = [
        task._replace(max_slowdown=bounds[task.task_id]) if task.task_id in bounds else task
        for task in instance.tasks
    ]
    return instance._replace(tasks=tuple(tasks))


def lateness(
    budgets: Sequence[Budget], plan: Plan, running: Plan | None, takeover_s: float, margin: float
) -> Lateness:
    """Of the task that a plan would make latest."""
    worst = NOT_LATE
    for budget in budgets:
        spent_s = takeover_s + (waited_s(running) if budget.is_new else 0.0)
        step_s = plan.predicted.step_time_s[budget.task_id]
        needed_s = spent_s + budget.steps_left * step_s * (1 + margin)
        late_s = needed_s - budget.left_s
        if late_s > max(worst.late_s, _ROUNDING * budget.left_s):
            worst = Lateness(late_s, _refusal(budget, needed_s, spent_s))
    return worst


def _refusal(budget: Budget, needed_s: float, spent_s: float) -> Refusal:
    return Refusal(
        f"a task with max_slowdown={budget.max_slowdown:g} would take {needed_s:.4g} s to its end, "
        f"{spent_s:.3g} s of them to take the plan over, and may take {budget.left_s:.4g} s",
        (),
        predicted_slowdown=needed_s / budget.alone_s,
        remedy="place it on a less loaded instance",
        needed_s=needed_s / budget.steps_left,
        available_s=budget.left_s / budget.steps_left,
    )
