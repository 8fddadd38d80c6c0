"""``muxtune simulate``: a workload on a simulated fleet, to the last task."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from muxtune import build
from muxtune.config import SimulateConfig
from muxtune.engine import Engine, RunTotals
from muxtune.planning.journal import Journal
from muxtune.report.collecting import few_collections
from muxtune.report.metrics import TaskMetrics, fleet_summary
from muxtune.report.progress import FleetProgress
from muxtune.report.recording import Promises, RecordingPlanner, TaskRows, Troubles
from muxtune.report.run_folder import RunFolder
from muxtune.report.tables import format_seconds, make_console, make_table
from muxtune.report.task_table import write_parquet
from muxtune.types import NS_PER_S, InstanceSpec

EXACT_TIMES, MEAN_TIMES = "exact", "mean"
MAX_EXACT_TASKS = 2_000
SLOWDOWN_PLOT = "slowdown.png"
TASKS_FILE, PARQUET_FILE, TENANTS_FILE = "tasks.csv", "tasks.parquet", "tenants.csv"
SAMPLES_FILE, JOURNAL_FILE = "plan_samples.jsonl", "journal.jsonl"


def run(config: SimulateConfig, folder: RunFolder) -> dict[str, Any]:
    """Writes tasks.csv while it runs, then tasks.parquet with the same rows, tenants.csv and
    plan_samples.jsonl; returns the summary."""
    started_s = time.perf_counter()
    costs = build.published_costs(config)
    tasks = build.tasks(config, costs)
    instances = build.instances(config, costs, tasks)
    power = build.power_draw(config, instances, costs)
    planner = RecordingPlanner(
        build.planner(config.planner, costs), config.plan_samples, config.seed
    )
    backend = fleet_options(config, len(tasks))
    played = build.simulator_book(config, config.simulator_cost, costs)
    executor = build.sim_executor(
        backend,
        played,
        build.sim_library(config, tasks),
        build.hardware_options(config),
    )
    metrics, troubles = TaskMetrics(), Troubles()
    promises = Promises()
    observers = (metrics, troubles, promises)
    totals = _run_engine(config, folder, planner, executor, tasks, instances, observers)
    _copy_rows(folder)
    with folder.stream(SAMPLES_FILE) as file:
        file.writelines(f"{sample.dumps()}\n" for sample in planner.samples)
    with folder.stream(TENANTS_FILE) as file:
        metrics.write_tenants(file)
    down_ns = executor.down_ns()
    notes = build.notes_on_costs(costs, instances) + build.notes_on_profiles(costs)
    if played is not costs:
        more = build.notes_on_costs(played, instances) + build.notes_on_profiles(played)
        notes += [f"simulator_cost: {note}" for note in more]
    summary = {
        **_choices(config, tasks, instances),
        **_counts(totals),
        **metrics.summary(),
        **promises.summary(),
        **fleet_summary(instances, executor.instance_totals(), totals.end_ns, power, down_ns),
        "num_plans": totals.num_plans,
        "num_planner_calls": planner.num_calls,
        "mean_planning_us": planner.mean_us,
        "times": backend["times"],
        "figures": build.origin_of_times(costs, instances),
        "wall_time_s": time.perf_counter() - started_s,
    }
    if promises.rows:
        from muxtune.report.plots import slowdowns  # a second of imports, for few runs

        slowdowns(folder.path / SLOWDOWN_PLOT, promises.rows, summary["figures"])
    _show(folder, summary, tasks, notes)
    # Declared tasks are all wanted; of a trace some may be refused, which is a result.
    if config.workload.kind == "tasks" or not totals.num_done:
        summary["error"] = troubles.error()
    return summary


def _run_engine(
    config: SimulateConfig,
    folder: RunFolder,
    planner: RecordingPlanner,
    executor: Any,
    tasks: build.Tasks,
    instances: Sequence[InstanceSpec],
    observers: Sequence[Any],
) -> RunTotals:
    with ExitStack() as stack:
        file = stack.enter_context(folder.stream(TASKS_FILE))
        rows = stack.enter_context(TaskRows(file))
        display = stack.enter_context(FleetProgress(len(tasks)))
        journal = None
        if config.journal:
            # A simulation can be made again; it need not survive a power failure.
            journal = stack.enter_context(Journal(folder.path / JOURNAL_FILE, fsync=False))
        policy, first = build.fleet_policy(config, instances)
        told = (rows, display, *observers)
        options = build.engine_options(config, tell_waits=tells_waits(config, len(tasks)))
        engine = Engine(policy, planner, executor, tasks, first, journal, told, options)
        with few_collections():
            return engine.run()


def _copy_rows(folder: RunFolder) -> None:
    with folder.stream(PARQUET_FILE, "wb") as file:
        written = write_parquet(folder.path / TASKS_FILE, file)
    if not written:
        (folder.path / PARQUET_FILE).unlink()


def tells_waits(config: SimulateConfig, num_tasks: int) -> bool:
    """A fleet's queue is long, and its tasks' waits are known once it has run."""
    return num_tasks <= MAX_EXACT_TASKS or config.journal


def fleet_options(config: SimulateConfig, num_tasks: int) -> dict[str, Any]:
    """The backend's options, with what the user left open chosen by the size of the run: mean
    times above ``MAX_EXACT_TASKS`` tasks, and then no events of takeovers, which only tell
    ``first_start_s``, unless a journal is kept."""
    is_fleet = num_tasks > MAX_EXACT_TASKS
    chosen: dict[str, Any] = {"times": MEAN_TIMES if is_fleet else EXACT_TIMES}
    if is_fleet and not config.journal:
        chosen["emit_plan_applied"] = False
        # Where the planner believes what the simulator does, the last word of a plan cannot drift.
        chosen["emit_last_progress"] = config.simulator_cost.kind != "same"
    return chosen | config.backend


def _choices(
    config: SimulateConfig, tasks: build.Tasks, instances: Sequence[InstanceSpec]
) -> dict[str, Any]:
    """What a row of results has to say of its configuration."""
    return {
        "planner": config.planner["name"],
        "cluster_policy": config.cluster_policy["name"],
        "model": config.model.name,
        "device": config.cluster.device,
        "num_gpus": build.num_gpus(config.cluster),
        "num_instances": len(instances),
        "workload": config.workload.kind,
        "load": getattr(config.workload, "load", None),
        "offered_load": _finite(getattr(tasks, "offered_load", None)),
        "cost": config.cost.kind,
        "cost_style": config.cost.style,
        "cost_adapters": config.cost.adapters,
        "simulator_cost": config.simulator_cost.kind,
        "seed": config.seed,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _counts(totals: RunTotals) -> dict[str, Any]:
    return {
        "num_tasks": totals.num_tasks,
        "num_done": totals.num_done,
        "num_failed": totals.num_failed,
        "num_refused": totals.num_refused,
        "num_cancelled": totals.num_cancelled,
        "makespan_s": totals.end_ns / NS_PER_S,
        "effective_tokens": totals.effective_tokens,
    }


SHOWN = (
    ("tasks", "num_tasks", None),
    ("done", "num_done", None),
    ("refused", "num_refused", None),
    ("failed", "num_failed", None),
    ("offered load", "offered_load", None),
    ("makespan", "makespan_s", format_seconds),
    ("mean completion time", "mean_completion_time_s", format_seconds),
    ("p95 completion time", "p95_completion_time_s", format_seconds),
    ("p99 completion time", "p99_completion_time_s", format_seconds),
    ("mean queueing", "mean_queueing_s", format_seconds),
    ("p95 queueing", "p95_queueing_s", format_seconds),
    ("mean slowdown", "mean_slowdown", None),
    ("mean finish-time ratio", "mean_finish_time_ratio", None),
    ("deadlines met", "deadlines_met_share", "{:.1%}".format),
    ("effective tokens/s", "effective_tokens_per_s", None),
    ("padded tokens/s", "padded_tokens_per_s", None),
    ("utilisation", "utilisation", "{:.1%}".format),
    ("effective utilisation", "effective_utilisation", "{:.1%}".format),
    ("least memory headroom", "min_memory_headroom", "{:.1%}".format),
    ("energy (kWh)", "energy_kwh", None),
    ("GPU hours held", "gpu_hours", None),
    ("GPU hours busy", "busy_gpu_hours", None),
    ("concurrent tasks a busy instance", "concurrent_tasks_per_instance", None),
    ("plans", "num_plans", None),
    ("mean planning time", "mean_planning_us", "{:.0f} µs".format),
    ("simulated in", "wall_time_s", format_seconds),
)


def _show(
    folder: RunFolder, summary: dict[str, Any], tasks: build.Tasks, on_costs: Sequence[str]
) -> None:
    console = make_console()
    rows = [
        (label, form(summary[key]) if form and summary[key] is not None else summary[key])
        for label, key, form in SHOWN
        if summary[key] is not None
    ]
    title = f"{summary['planner']} on {summary['num_gpus']} x {summary['device']}"
    console.print(make_table(title, ("simulated", "value"), rows))
    notes = [*on_costs, *getattr(tasks, "notes", ())]
    if getattr(tasks, "overloaded", False):
        notes.append(
            "offered load is 1 or more: the queue grows until arrivals end, so means describe this "
            "finite run and no steady state"
        )
    if summary["times"] == MEAN_TIMES:
        notes.append(
            "every round of a plan takes what it takes in the mean; backend.times=exact adds up "
            "every pass"
        )
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True)
    console.print(f"wrote {folder.path}", soft_wrap=True)
