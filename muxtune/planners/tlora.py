"""`tlora`: jobs are fused while that raises joint throughput and slows none beyond its bound
(tLoRA, arXiv 2602.07263; known to us from second-hand summaries).

Known: heterogeneous LoRA jobs are fused into one shared super-model with fused kernels; a
scheduler groups jobs by residual capacity as long as the group's throughput rises and no job's
slowdown exceeds its bound. So this planner refuses a task beside those that run when the predicted
effective tokens/s of all do not exceed those without it, or when some task would run slower than
``slowdown_bound`` times its predicted time alone on this instance. The cluster policy of the same
name offers a waiting task to the instance of most residual capacity first.

Assumptions. The bound's value is not known to us; 2 is the default, and a task's own
``max_slowdown`` is kept if it is tighter. All jobs of a group share every pass (one hTask). What
it does about padding is not known: it is given packing, the best we have. Running groups are not
taken apart to regroup them.
"""

from __future__ import annotations

from collections.abc import Sequence

from muxtune.errors import ConfigError
from muxtune.planners.base import CostedArrangement, Site, TaskClass
from muxtune.planners.muxtune import MuxTunePlanner
from muxtune.protocols import CostBook
from muxtune.registry import PLANNERS
from muxtune.types import InstanceView, Plan, Refusal, TaskView


@PLANNERS.register("tlora")
class TLoraPlanner(MuxTunePlanner):
    """See the module's docstring. ``alignment`` as of the planner ``muxtune``."""

    def __init__(
        self, costs: CostBook, slowdown_bound: float = 2.0, alignment: str = "chunk"
    ) -> None:
        super().__init__(costs, fusion="all_spatial", alignment=alignment, orchestration=False)
        if not slowdown_bound >= 1:
            raise ConfigError("planner.slowdown_bound", f"is {slowdown_bound}", "give at least 1")
        self.slowdown_bound = float(slowdown_bound)

    def plan(self, instance: InstanceView, previous: Plan | None) -> Plan | Refusal:
        bounded = instance._replace(tasks=tuple([self._bounded(t) for t in instance.tasks]))
        answer = super().plan(bounded, previous)
        if isinstance(answer, Refusal) or previous is None or answer is previous:
            return answer
        stayed = [t for t in bounded.tasks if t.task_id in previous.predicted.step_time_s]
        if not stayed or len(stayed) == len(bounded.tasks):
            return answer
        without = super().plan(bounded._replace(tasks=tuple(stayed)), None)
        if isinstance(without, Plan) and tokens_per_s(answer) <= tokens_per_s(without):
            return Refusal(
                f"{len(bounded.tasks)} tasks together would train {tokens_per_s(answer):.0f} "
                f"tokens/s, {len(stayed)} of them {tokens_per_s(without):.0f}",
                tuple(task.task_id for task in bounded.tasks),
                remedy="place it on an instance with residual capacity",
            )
        return answer

    def arrange_paced(
        self, site: Site, classes: tuple[TaskClass, ...], solo_s: Sequence[float]
    ) -> CostedArrangement | None:
        """A group that breaks a bound is refused, not paced."""
        return None

    def _bounded(self, task: TaskView) -> TaskView:
        bound = min(task.max_slowdown or self.slowdown_bound, self.slowdown_bound)
        return task._replace(max_slowdown=bound)


def tokens_per_s(plan: Plan) -> float:
    """Predicted effective tokens a second of all tasks together."""
    return plan.predicted.round_effective_tokens / plan.predicted.round_time_s.value
