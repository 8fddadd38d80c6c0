"""Whether a better plan is worth its transition.

When tasks leave or conditions change, the running plan can often go on: shapes stay as they are,
slots of tasks that left stay empty, a task that arrived gets an hTask of its own. Such a plan
prepares little. It is kept when the better plan's gain up to the next finish is less than what
the better plan costs to prepare. Everything here is a function of the view and the running plan.
"""

from __future__ import annotations

from typing import NamedTuple

from muxtune.types import HTask, InstanceView, Plan

# A transition that takes less than this share of the time to the next finish is not weighed.
LEAST_SHARE = 0.1


class Verdict(NamedTuple):
    """Seconds: gained until ``horizon_s``, the next finish, and paid for it."""

    gain_s: float
    cost_s: float
    horizon_s: float

    @property
    def keeps(self) -> bool:
        return self.gain_s < self.cost_s


def horizon_s(instance: InstanceView, plan: Plan) -> float:
    """Predicted time to the next finish of a task under the plan."""
    steps = plan.predicted.step_time_s
    return min(
        max(1, task.num_steps - task.steps_done) * steps[task.task_id] for task in instance.tasks
    )


def weigh(kept_step_s: float, new_step_s: float, cost_s: float, until_s: float) -> Verdict:
    """``kept_step_s`` and ``new_step_s``: time in which every task takes one step."""
    return Verdict(until_s * (1 - new_step_s / kept_step_s), cost_s, until_s)


def carried_htasks(instance: InstanceView, previous: Plan) -> tuple[HTask, ...]:
    """The running hTasks without the tasks that left."""
    present = {task.task_id for task in instance.tasks}
    return tuple(
        htask._replace(
            slot_of={name: slot for name, slot in htask.slot_of.items() if name in present},
            quota={name: quota for name, quota in htask.quota.items() if name in present},
        )
        for htask in previous.htasks
        if not present.isdisjoint(htask.quota)
    )


def reason(verdict: Verdict, better: str) -> str:
    return (
        f"kept: {better} would gain {verdict.gain_s:.2g} s in the {verdict.horizon_s:.3g} s to the "
        f"next finish and cost {verdict.cost_s:.2g} s to prepare"
    )
