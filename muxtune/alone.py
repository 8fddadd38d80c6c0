"""How long a task takes, and how much memory, when it has an idle instance to itself."""

from __future__ import annotations

from muxtune.cost.analytic import AnalyticOptions
from muxtune.cost.book import CostBook
from muxtune.errors import ConfigError
from muxtune.fleet import instance_view, task_view
from muxtune.protocols import InstancePlanner, TaskLibrary
from muxtune.registry import PLANNERS
from muxtune.types import InstanceSpec, Plan, Refusal, TaskSpec

SOLO_PLANNER = "exclusive"  # what "alone under HF PEFT" means for offered load and durations
UNBOUNDED_BYTES = 1 << 60


class Alone:
    """Single tasks under one planner on one instance, of whatever base model they are; tasks that
    differ in id, tenant, times and steps only are planned once."""

    def __init__(self, planner: InstancePlanner, library: TaskLibrary, site: InstanceSpec) -> None:
        self._planner, self._library, self._site = planner, library, site
        self._answers: dict[tuple[object, ...], tuple[str, Plan | Refusal]] = {}

    def time_s(self, task: TaskSpec) -> float:
        """For all its steps; infinite when the instance cannot take it at all."""
        planned_id, answer = self._answer(task)
        if not isinstance(answer, Plan):
            return float("inf")
        num_steps = self._library.add(task).num_steps
        self._library.discard(task.task_id)
        return num_steps * answer.predicted.step_time_s[planned_id]

    def tokens_per_s(self, task: TaskSpec) -> float:
        """Effective tokens a second. Raises ConfigError when the instance cannot take it."""
        planned_id, plan = self._plan(task)
        view = task_view(task, self._library.add(task))
        self._library.discard(task.task_id)
        tokens = view.lengths.mean_tokens * view.sequences_per_step
        return tokens / plan.predicted.step_time_s[planned_id]

    def peak_bytes(self, task: TaskSpec) -> float:
        """Raises ConfigError when the instance cannot take it."""
        return self._plan(task)[1].predicted.peak_memory_bytes.value

    def relative_error(self, task: TaskSpec) -> float:
        """Half-width of the 90% interval of a round over its time; 0 where there is no plan."""
        answer = self._answer(task)[1]
        if not isinstance(answer, Plan):
            return 0.0
        time = answer.predicted.round_time_s
        return (time.high - time.low) / 2 / time.value

    def _plan(self, task: TaskSpec) -> tuple[str, Plan]:
        planned_id, answer = self._answer(task)
        if not isinstance(answer, Plan):
            raise ConfigError("workload", answer.reason, answer.remedy)
        return planned_id, answer

    def _answer(self, task: TaskSpec) -> tuple[str, Plan | Refusal]:
        """And the id of the task that it was planned for."""
        key = (kind_of(task), task.seed if task.data.path else 0)
        if key not in self._answers:
            view = task_view(task, self._library.add(task))
            self._library.discard(task.task_id)
            site = self._site._replace(model=task.model)
            answer = self._planner.plan(instance_view(site, (view,)), None)
            self._answers[key] = task.task_id, answer
        return self._answers[key]


def kind_of(task: TaskSpec) -> tuple[object, ...]:
    """Tasks of one kind differ in id, tenant, times and steps only."""
    data = task.data
    return (
        *(task.model, task.adapter.method, task.adapter.rank, task.adapter.targets),
        *(task.adapter.dropout > 0, task.batch_size, task.accumulation, task.max_slowdown),
        *(data.max_length_tokens, data.histogram, data.tokenizer, data.path),
    )


def hf_peft_alone(costs: CostBook, library: TaskLibrary, model: str, device: str) -> Alone:
    """The reference of every promise and of offered load: the task alone, padded, and, where no
    profile says otherwise, eager. Memory is no limit, as it is none of the promise."""
    planner = PLANNERS.get(SOLO_PLANNER)(costs=costs.with_options(AnalyticOptions.eager()))
    return Alone(planner, library, InstanceSpec("alone", model, device, UNBOUNDED_BYTES))


def checked_reference_s(alone: Alone, task: TaskSpec) -> float:
    """Raises ConfigError for a task that has no time alone."""
    time_s = alone.time_s(task)
    if not 0 < time_s < float("inf"):
        problem = f"task '{task.task_id}' would take {time_s} s alone"
        raise ConfigError("workload", problem, "Check the device's and the model's figures")
    return time_s
