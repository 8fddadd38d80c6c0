"""Whether a better plan is worth its transition.

When tasks leave or conditions change, the running plan can often go on: shapes stay as they are,
slots of tasks that left stay empty, a task that arrived gets an hTask of its own. Such a plan
prepares little. It is kept while what the better plan would gain up to the next finish, and what
was forgone by keeping before, is less than what the better plan costs to prepare: as with renting
or buying skis, at most twice the cost is lost to never knowing how long it will be used. But how
long at most is known, if nobody else comes: a plan that could not pay for itself before the last of
its tasks ends is not taken, whatever was forgone. Everything here is a function of the view and the
running plan.
"""

from __future__ import annotations

from typing import NamedTuple

from muxtune.types import NS_PER_S, HTask, InstanceView, Plan, Prediction


class Choice(NamedTuple):
    """Seconds in which every task takes one step if the running plan is kept, and under the better
    plan, and what the better one costs to prepare beyond what the kept one does."""

    kept_step_s: float
    new_step_s: float
    cost_s: float

    @property
    def gain_share(self) -> float:
        """Seconds that the better plan gains a second. A kept plan that is faster gains less than
        nothing."""
        return 1 - self.new_step_s / self.kept_step_s


class Verdict(NamedTuple):
    """Seconds: gained until ``horizon_s``, the next finish; forgone before; paid for it; and gained
    until the last finish."""

    gain_s: float
    forgone_s: float
    cost_s: float
    horizon_s: float
    most_gain_s: float

    @property
    def keeps(self) -> bool:
        return self.gain_s + self.forgone_s < self.cost_s or self.most_gain_s < self.cost_s


def horizons_s(instance: InstanceView, plan: Plan) -> tuple[float, float]:
    """Predicted times to the next and to the last finish of a task under the plan."""
    steps = plan.predicted.step_time_s
    ends = [
        max(1, task.num_steps - task.steps_done) * steps[task.task_id] for task in instance.tasks
    ]
    return min(ends), max(ends)


def weigh(choice: Choice, until_s: tuple[float, float], forgone_s: float = 0.0) -> Verdict:
    """``until_s``: to the next finish and to the last."""
    next_s, last_s = until_s
    share = choice.gain_share
    return Verdict(next_s * share, forgone_s, choice.cost_s, next_s, last_s * share)


def forgone_s(running: Prediction, now_ns: int) -> float:
    """What has been lost by now since running hTasks are kept: only time that has passed counts."""
    return running.forgone_s + running.forgone_share * (now_ns - running.kept_ns) / NS_PER_S


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
    forgone = f", and {verdict.forgone_s:.2g} s forgone before," if verdict.forgone_s else ""
    return (
        f"kept: {better} would gain {verdict.gain_s:.2g} s in the {verdict.horizon_s:.3g} s to the "
        f"next finish{forgone} and cost {verdict.cost_s:.2g} s to prepare"
    )
