"""What commands that train for real share: their tasks, and what a user should know beforehand."""

from __future__ import annotations

from collections.abc import Sequence

from muxtune import build
from muxtune.config import CommonConfig
from muxtune.engine import TaskOutcome
from muxtune.errors import ConfigError
from muxtune.report.tables import make_console
from muxtune.types import Event, InstanceSpec, Plan, TaskSpec


class Outcomes:
    """Observer that keeps every task's outcome and every plan; for runs of a few tasks."""

    def __init__(self) -> None:
        self.tasks: list[TaskOutcome] = []
        self.plans: dict[tuple[str, int], Plan] = {}

    def on_plan(self, plan: Plan) -> None:
        self.plans[plan.instance_id, plan.epoch] = plan

    def on_task_end(self, outcome: TaskOutcome) -> None:
        self.tasks.append(outcome)

    def on_batch(self, time_ns: int, events: Sequence[Event]) -> None:
        pass


def real_tasks(config: CommonConfig, costs: build.CostBook) -> list[TaskSpec]:
    """Raises ConfigError for a task whose method does not take its settings, or that has no text
    to train on. A random base model may be given random tokens, as many as a histogram says."""
    tasks = list(build.tasks(config, costs))
    for task in tasks:
        build.check_adapter(task)
        if not task.data.path and not (config.model.random and task.data.histogram):
            raise ConfigError(
                f"task '{task.task_id}': data",
                "has drawn lengths only, and there is nothing to train on",
                "Give it a data file, or use `muxtune simulate`",
            )
    return tasks


def warn_of_costs(costs: build.CostBook, instances: Sequence[InstanceSpec]) -> None:
    """Names in which respects a profile is of another machine than this one, and what nothing was
    measured of."""
    from muxtune.profiling.measure import profile_warnings_here

    lines = [line for profile in costs.profiles for line in profile_warnings_here(profile)]
    told = [f"warning: {line}" for line in lines] + [
        f"note: {note}" for note in build.notes_on_costs(costs, instances)
    ]
    for line in told:
        make_console().print(line, soft_wrap=True)


def device_notice(config: CommonConfig, computes_on: str) -> str:
    """What to know where ``computes_on``, cpu or cuda, is not the kind of device that is planned
    for, or a GPU is left idle; else empty."""
    name = config.cluster.device
    planned_for_gpu = build.figures_of(config.cluster).kind == "gpu"
    if computes_on == "cuda" and not planned_for_gpu:
        return (
            f"cluster.device={name} is planned for as a CPU, with the host's memory, but this run "
            "computes on cuda. Say which GPU it is, such as cluster.device=H100-SXM"
        )
    if computes_on == "cuda":
        return ""
    if planned_for_gpu:
        return (
            f"cluster.device={name} is planned for, but this run computes on the CPU. Where torch "
            "should see a GPU, backend.device=cuda says why it does not; else say cluster=local_cpu"
        )
    return idle_gpu_notice() if name == build.LOCAL else ""


def idle_gpu_notice() -> str:
    """Where torch sees a GPU that a run on the local CPU leaves idle; else empty."""
    if not build.torch_sees_cuda():
        return ""
    return (
        "this machine has a GPU, which cluster=local_cpu leaves idle. To use it name it, such as "
        "cluster=h100_x1, or cluster=h100_x1 cluster.device=A100-80GB-SXM"
    )
