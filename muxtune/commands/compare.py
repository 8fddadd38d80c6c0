"""``muxtune compare``: the same tasks simulated and really run, predicted beside measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from muxtune import build
from muxtune.commands.real_runs import Outcomes, device_notice, real_tasks, warn_of_costs
from muxtune.config import CompareConfig
from muxtune.cost.book import CostBook
from muxtune.deciding import EngineOptions
from muxtune.engine import Engine, Observer, RunTotals
from muxtune.errors import ConfigError, MuxTuneError
from muxtune.report.plots import PredictedMeasured, predicted_vs_measured, throughput_by_planner
from muxtune.report.progress import TaskProgress
from muxtune.report.recording import Troubles
from muxtune.report.run_folder import RunFolder
from muxtune.report.tables import format_bytes, format_seconds, make_console, make_table
from muxtune.types import NS_PER_S, InstanceSpec, Plan, TaskSpec

# A planner that takes one task an instance needs a policy that places them so.
POLICY_OF_PLANNER = {"exclusive": "fifo_exclusive"}


class StepTime(NamedTuple):
    """Seconds in which every task takes one optimizer step, from the plans that ran longest.

    ``tasks``: how many tasks the figure covers.
    """

    predicted_s: float
    low_s: float
    high_s: float
    measured_s: float
    tasks: int


class Comparison(NamedTuple):
    """One planner on one set of tasks."""

    planner: str
    step: StepTime
    predicted_makespan_s: float
    measured_training_s: float
    effective_tokens_per_s: float
    padded_tokens_per_s: float
    predicted_peak_bytes: float
    measured_peak_bytes: int

    @property
    def error(self) -> float:
        """Of the predicted step time, relative to the measured one."""
        return self.step.predicted_s / self.step.measured_s - 1.0


def run(
    config: CompareConfig, folder: RunFolder, loaded: build.BackboneStore | None = None
) -> dict[str, Any]:
    """Writes compare.json and the plots; raises MuxTuneError when a task does not end well.

    ``loaded``: backbones that a caller has in memory already.
    """
    build.need_torch()
    build.check_fleet_stays(config.cluster)
    costs = build.cost_book(config)
    tasks = _shortened(real_tasks(config, costs), config.steps)
    instances = build.instances(config, costs, tasks)
    warn_of_costs(costs, instances)
    figures = {"figures": build.origin_of_times(costs, instances)}
    store = loaded or build.backbone_store(config)
    if notice := device_notice(config, store.device.type):
        make_console().print(f"note: {notice}", soft_wrap=True)
    names = config.planners or [config.planner["name"]]
    rows = [_compare(config, name, costs, tasks, store, folder.path) for name in names]
    folder.write_json("compare.json", [_as_json(row) | figures for row in rows])
    _plot(folder.path, rows)
    _show(folder, rows)
    return (_summary(rows[0]) | figures) | {
        f"{row.planner}.{key}": value for row in rows[1:] for key, value in _summary(row).items()
    }


def _shortened(tasks: list[TaskSpec], steps: int | None) -> list[TaskSpec]:
    """All arrive at once, so that one plan holds all of them; no held-out share is scored."""
    if steps is not None and steps < 2:
        raise ConfigError("steps", f"is {steps}", "Give at least 2: the first warms up")
    tasks = [task._replace(arrival_ns=0, cancel_ns=None) for task in tasks]
    if steps is None:
        return tasks
    return [task._replace(num_steps=steps, epochs=None) for task in tasks]


def _compare(
    config: CompareConfig,
    name: str,
    costs: CostBook,
    tasks: list[TaskSpec],
    store: Any,
    output_dir: Path,
) -> Comparison:
    # Options on the command line belong to the planner that was chosen there.
    options = config.planner if config.planner["name"] == name else {"name": name}
    policy = {"name": POLICY_OF_PLANNER.get(name, config.cluster_policy["name"])}
    instances = build.instances(config, costs, tasks)
    # What is measured must not correct what it is compared with.
    uncorrected = build.engine_options(config)._replace(drift_tolerance=math.inf)
    simulated = build.sim_executor(
        config.backend,
        build.simulator_book(config, config.simulator_cost, costs),
        build.library(config, store),
    )
    predicted, _ = _run(options, policy, costs, simulated, tasks, instances, uncorrected)
    with TaskProgress() as display:
        listener = RoundsAndSteps(display)
        real = build.torch_executor(
            {**config.torch, "evaluate_tokens": 0},
            output_dir / name,
            store,
            build.text_library(config, store),
            (listener,),
            field="torch",
        )
        display.line(f"planner {name}")
        try:
            _, plans = _run(options, policy, costs, real, tasks, instances, uncorrected, (display,))
        finally:
            real.close()
    training_s = sum(item.duration_ns for item in listener.rounds) / NS_PER_S
    return Comparison(
        name,
        step_time(plans, listener),
        predicted.end_ns / NS_PER_S,
        training_s,
        sum(item.effective_tokens for item in listener.rounds) / training_s,
        sum(item.padded_tokens for item in listener.rounds) / training_s,
        max(plan.predicted.peak_memory_bytes.value for plan in plans.values()),
        real.accounted_peak_bytes(),
    )


def _run(
    options: dict[str, Any],
    policy: dict[str, Any],
    costs: CostBook,
    executor: Any,
    tasks: list[TaskSpec],
    instances: Sequence[InstanceSpec],
    rules: EngineOptions,
    displays: Sequence[Observer] = (),
) -> tuple[RunTotals, dict[tuple[str, int], Plan]]:
    outcomes, troubles = Outcomes(), Troubles()
    engine = Engine(
        build.cluster_policy(policy),
        build.planner(options, costs),
        executor,
        tasks,
        instances,
        observers=(outcomes, troubles, *displays),
        options=rules,
    )
    totals = engine.run()
    if troubles.num_tasks:
        raise MuxTuneError(f"compare: planner '{options['name']}': {troubles.error()}")
    return totals, outcomes.plans


class RoundsAndSteps:
    """Keeps the rounds and steps of a real run (``muxtune.runtime.records.StepListener``), and
    shows the steps."""

    def __init__(self, display: TaskProgress | None = None) -> None:
        self.display = display
        self.rounds: list[Any] = []
        self.steps: list[Any] = []

    def on_step(self, record: Any) -> None:
        self.steps.append(record)
        if self.display is not None:
            self.display.on_step(
                record.task_id, record.step, record.num_steps, record.loss, record.tokens
            )

    def on_round(self, record: Any) -> None:
        self.rounds.append(record)

    def on_span(self, record: Any) -> None:
        pass


def step_time(plans: dict[tuple[str, int], Plan], records: RoundsAndSteps) -> StepTime:
    """Predicted and measured step time of the set of tasks.

    Each task counts in the plan with the most tasks that it took steps in. Tasks of one plan run
    side by side, so the slowest counts; tasks that never shared a plan ran one after another, so
    they add up (one instance a task, one at a time).
    """
    measured = measured_step_times_s(records)
    best: dict[str, tuple[str, int]] = {}
    for key, task_id in sorted(measured):
        if task_id not in best or len(plans[key].task_ids) > len(plans[best[task_id]].task_ids):
            best[task_id] = key
    if not best:
        raise MuxTuneError("compare: no task took two steps. Give more steps with steps=N")
    total = StepTime(0.0, 0.0, 0.0, 0.0, len(best))
    for key in sorted(set(best.values())):
        members = [task_id for task_id, where in best.items() if where == key]
        predicted = plans[key].predicted
        round_s = predicted.round_time_s
        value_s = max(predicted.step_time_s[task_id] for task_id in members)
        total = StepTime(
            total.predicted_s + value_s,
            total.low_s + value_s * round_s.low / round_s.value,
            total.high_s + value_s * round_s.high / round_s.value,
            total.measured_s + max(measured[key, task_id] for task_id in members),
            total.tasks,
        )
    return total


def measured_step_times_s(
    records: RoundsAndSteps,
) -> dict[tuple[tuple[str, int], str], float]:
    """((instance, epoch), task) -> seconds of rounds for each of the task's steps.

    The first round of a plan warms up: it is left out where there is another.
    """
    times: dict[tuple[tuple[str, int], str], float] = {}
    rounds_of: dict[tuple[str, int], list[Any]] = {}
    for item in records.rounds:
        rounds_of.setdefault((item.instance_id, item.epoch), []).append(item)
    for key, rounds in rounds_of.items():
        kept = rounds[1:] or rounds
        since_ns = kept[0].start_ns
        duration_ns = sum(item.duration_ns for item in kept)
        counts: dict[str, int] = {}
        for step in records.steps:
            if (step.instance_id, step.epoch) == key and step.time_ns >= since_ns:
                counts[step.task_id] = counts.get(step.task_id, 0) + 1
        for task_id, count in counts.items():
            times[key, task_id] = duration_ns / NS_PER_S / count
    return times


# ------------------------------------------------------------------------------------- presenting


def _as_json(row: Comparison) -> dict[str, Any]:
    return row._asdict() | {"step": row.step._asdict(), "relative_error": row.error}


def _summary(row: Comparison) -> dict[str, Any]:
    return {
        "planner": row.planner,
        "predicted_step_time_s": row.step.predicted_s,
        "measured_step_time_s": row.step.measured_s,
        "relative_error": row.error,
        "effective_tokens_per_s": row.effective_tokens_per_s,
        "padded_tokens_per_s": row.padded_tokens_per_s,
        "predicted_peak_bytes": row.predicted_peak_bytes,
        "measured_peak_bytes": row.measured_peak_bytes,
    }


COLUMNS = (
    *("planner", "step predicted", "step measured", "error", "run predicted", "run measured"),
    *("effective tok/s", "padded tok/s", "peak predicted", "peak measured"),
)


def _show(folder: RunFolder, rows: Sequence[Comparison]) -> None:
    table = [
        (
            row.planner,
            format_seconds(row.step.predicted_s),
            format_seconds(row.step.measured_s),
            f"{row.error:+.1%}",
            format_seconds(row.predicted_makespan_s),
            format_seconds(row.measured_training_s),
            row.effective_tokens_per_s,
            row.padded_tokens_per_s,
            format_bytes(row.predicted_peak_bytes),
            format_bytes(row.measured_peak_bytes),
        )
        for row in rows
    ]
    console = make_console()
    console.print(make_table("Step of every task: predicted beside measured", COLUMNS, table))
    console.print(f"wrote {folder.path}", soft_wrap=True)


def _plot(folder: Path, rows: Sequence[Comparison]) -> None:
    predicted_vs_measured(
        folder / "step_time.png",
        [
            PredictedMeasured(
                row.planner,
                row.step.predicted_s,
                row.step.measured_s,
                row.step.low_s,
                row.step.high_s,
            )
            for row in rows
        ],
    )
    throughput_by_planner(
        folder / "throughput.png",
        [(row.planner, row.effective_tokens_per_s, row.padded_tokens_per_s) for row in rows],
    )
