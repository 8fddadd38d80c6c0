"""Step times and memory of four systems on the same tasks, all by the one cost model.

- ``hf_peft``: an instance per task, eager kernels, the paper's parallelism, padded; the instances
  of one group of GPUs take turns.
- ``nemo``: the same with fast kernels.
- ``sl_peft``: one backbone, all tasks in each micro-batch, zero-padded to the longest of them.
- ``muxtune``: this project's planner and its played order.

In a pipeline the three baselines run 1F1B with a flush a step, in the number of micro-batches that
is fastest for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.paper_figures.testbeds import Assumptions, Case, books, padded, view
from muxtune.planners.batched import BatchedPlanner
from muxtune.planners.exclusive import ExclusivePlanner
from muxtune.planners.muxtune import MuxTunePlanner
from muxtune.protocols import InstancePlanner
from muxtune.types import InstanceView, LengthSummary, Plan, Refusal, TaskView

BASELINES = ("hf_peft", "nemo", "sl_peft")
NAMES = {"hf_peft": "HF-PEFT", "nemo": "NeMo", "sl_peft": "SL-PEFT", "muxtune": "MuxTune"}
SWITCHES: dict[str, dict[str, object]] = {
    "fusion": {"fusion": "all_temporal"},
    "orchestration": {"orchestration": False},
}


def step_times_s(case: Case, data: str, assumed: Assumptions) -> dict[str, float | None]:
    """Seconds until every task of the instance has taken one step; None: does not fit."""
    fast, eager = books(case, assumed)
    where = view(case, data, assumed, fast)
    fixed = padded(where)
    return {
        "hf_peft": _in_turn(ExclusivePlanner(eager), fixed),
        "nemo": _in_turn(ExclusivePlanner(fast), fixed),
        "sl_peft": step_s(BatchedPlanner(fast, pad_to="longest_of_tasks"), fixed),
        "muxtune": step_s(MuxTunePlanner(fast), where),
    }


def step_s(planner: InstancePlanner, where: InstanceView) -> float | None:
    plan = planner.plan(where, None)
    return plan.predicted.tasks_step_time_s if isinstance(plan, Plan) else None


def _in_turn(planner: InstancePlanner, where: InstanceView) -> float | None:
    """One task after the other on the same GPUs."""
    times = [step_s(planner, where._replace(tasks=(task,))) for task in where.tasks]
    return None if None in times else sum(time for time in times if time is not None)


def ratios(times: Mapping[str, float | None]) -> dict[str, float]:
    """Throughput of ours over each baseline that fits."""
    ours = times["muxtune"]
    if ours is None:
        return {}
    found = {name: times[name] for name in BASELINES}
    return {name: seconds / ours for name, seconds in found.items() if seconds is not None}


def ablation(case: Case, data: str, assumed: Assumptions) -> dict[str, float]:
    """Throughput lost when one part of ours is switched off: an hTask a task; turns that drain
    before the next; rows zero-padded to the longest of their hTask, or to the longest of all."""
    fast, _ = books(case, assumed)
    where = view(case, data, assumed, fast)
    planner = MuxTunePlanner(fast)
    whole = planner.plan(where, None)
    assert isinstance(whole, Plan), whole
    groups = [tuple(htask.quota) for htask in whole.htasks]
    aligned_s = planner.partition_step_s(where, groups)
    padded_s = planner.partition_step_s(zero_padded(where, groups), groups)
    everyone = [tuple(task.task_id for task in where.tasks)]
    pairs: dict[str, tuple[float | None, float | None]] = {
        name: (whole.predicted.tasks_step_time_s, step_s(MuxTunePlanner(fast, **options), where))  # type: ignore[arg-type]
        for name, options in SWITCHES.items()
    }
    pairs["alignment"] = (aligned_s, padded_s)
    pairs["alignment, all"] = (
        whole.predicted.tasks_step_time_s,
        step_s(MuxTunePlanner(fast), zero_padded(where, everyone)),
    )
    return {
        name: 1 - with_s / without_s
        for name, (with_s, without_s) in pairs.items()
        if with_s is not None and without_s is not None
    }


def zero_padded(where: InstanceView, groups: Sequence[Sequence[str]]) -> InstanceView:
    """Every sequence as long as the longest of its group."""
    group_of = {name: index for index, names in enumerate(groups) for name in names}
    longest: dict[int, LengthSummary] = {}
    for task in where.tasks:
        known = longest.setdefault(group_of[task.task_id], task.lengths)
        if task.lengths.max_tokens > known.max_tokens:
            longest[group_of[task.task_id]] = task.lengths
    return where._replace(
        tasks=tuple(task._replace(lengths=longest[group_of[task.task_id]]) for task in where.tasks)
    )


def memory_bytes(case: Case, data: str, assumed: Assumptions) -> dict[str, list[float]]:
    """Least bytes of the fullest GPU with 1, 2, ... ``assumed.tasks`` tasks hosted at once, each
    system in the smallest micro-batches that it can form. Of systems of one instance a task every
    instance keeps its backbone and its activations' memory, as processes do."""
    fast, eager = books(case, assumed)
    where = view(case, data, assumed, fast)
    hf_peft, nemo = (
        [_least_bytes(ExclusivePlanner(book), where, (task,)) for task in where.tasks]
        for book in (eager, fast)
    )
    counts = range(1, assumed.tasks + 1)
    sl_peft = BatchedPlanner(fast, pad_to="longest_of_tasks")
    return {
        "hf_peft": [sum(hf_peft[:n]) for n in counts],
        "nemo": [sum(nemo[:n]) for n in counts],
        "sl_peft": [_least_bytes(sl_peft, where, where.tasks[:n]) for n in counts],
        "muxtune": [_least_bytes(MuxTunePlanner(fast), where, where.tasks[:n]) for n in counts],
    }


def _least_bytes(
    planner: InstancePlanner, where: InstanceView, tasks: tuple[TaskView, ...]
) -> float:
    """What a planner says it needs at least when it is given nothing."""
    refusal = planner.plan(where._replace(tasks=tasks, memory_limit_bytes=1), None)
    assert isinstance(refusal, Refusal), refusal
    return refusal.needed_bytes
