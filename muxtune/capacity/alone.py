"""How long a task takes when it has an idle instance to itself."""

from __future__ import annotations

from muxtune import build
from muxtune.cost.analytic import AnalyticOptions
from muxtune.cost.book import CostBook
from muxtune.errors import ConfigError
from muxtune.fleet import task_view
from muxtune.protocols import InstancePlanner, TaskLibrary
from muxtune.registry import PLANNERS
from muxtune.types import InstanceSpec, InstanceView, Plan, TaskSpec

UNBOUNDED_BYTES = 1 << 60


class Alone:
    """Times of single tasks under one planner on one instance; tasks that differ in id, tenant,
    times and steps only are planned once."""

    def __init__(self, planner: InstancePlanner, library: TaskLibrary, site: InstanceSpec) -> None:
        self._planner, self._library, self._site = planner, library, site
        self._plans: dict[tuple[object, ...], tuple[str, Plan | None]] = {}

    def time_s(self, task: TaskSpec) -> float:
        """For all its steps; infinite when the instance cannot take it at all."""
        planned_id, plan = self._plan(task)
        if plan is None:
            return float("inf")
        num_steps = self._library.add(task).num_steps
        self._library.discard(task.task_id)
        return num_steps * plan.predicted.step_time_s[planned_id]

    def relative_error(self, task: TaskSpec) -> float:
        """Half-width of the 90% interval of a round over its time; 0 where there is no plan."""
        plan = self._plan(task)[1]
        if plan is None:
            return 0.0
        time = plan.predicted.round_time_s
        return (time.high - time.low) / 2 / time.value

    def _plan(self, task: TaskSpec) -> tuple[str, Plan | None]:
        key = (build.kind_of(task), task.model, task.seed if task.data.path else 0)
        if key not in self._plans:
            view = task_view(task, self._library.add(task))
            self._library.discard(task.task_id)
            answer = self._planner.plan(self._view(view), None)
            self._plans[key] = (task.task_id, answer if isinstance(answer, Plan) else None)
        return self._plans[key]

    def _view(self, task: object) -> InstanceView:
        site = self._site
        return InstanceView(
            instance_id=site.instance_id,
            now_ns=0,
            tasks=(task,),  # type: ignore[arg-type]
            running_plan=None,
            memory_limit_bytes=site.memory_limit_bytes,
            model=site.model,
            device=site.device,
            replicas=site.replicas,
            gpu_ids=site.gpu_ids,
        )


def hf_peft_alone(costs: CostBook, library: TaskLibrary, model: str, device: str) -> Alone:
    """The reference of every promise: the task alone, padded, eager, whatever the policy. Memory
    is no limit, as it is none of the promise."""
    planner = PLANNERS.get(build.SOLO_PLANNER)(costs=costs.with_options(AnalyticOptions.eager()))
    return Alone(planner, library, InstanceSpec("alone", model, device, UNBOUNDED_BYTES))


def checked_reference_s(alone: Alone, task: TaskSpec) -> float:
    """Raises ConfigError for a task that has no time alone."""
    time_s = alone.time_s(task)
    if not 0 < time_s < float("inf"):
        problem = f"task '{task.task_id}' would take {time_s} s alone"
        raise ConfigError("workload", problem, "Check the device's and the model's figures")
    return time_s
