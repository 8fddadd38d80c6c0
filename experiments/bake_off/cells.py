"""One cell of the experiment: one system at one load on one window of the trace.

A window is a stretch of the Philly trace of its own, so that seeds share no task. All systems get
the same window, the same tasks and the same arrival times at a load. The run goes on until every
task has ended, so nothing is censored. Scored are the tasks that arrive in the middle of the
window: the first fifth of the arrival span is warm-up, the last fifth only keeps the load up.
"""

from __future__ import annotations

import csv
import json
from array import array
from collections.abc import Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.bake_off.systems import System
from muxtune import build
from muxtune.commands.simulate import few_collections, fleet_options, fleet_summary
from muxtune.config import SimulateConfig, TraceWorkload, conf_dir, register_schemas
from muxtune.engine import Engine, TaskOutcome
from muxtune.types import NS_PER_S, Event, InstanceSpec, Plan, TaskState
from muxtune.workload.traces import PHILLY, Trace, read_trace

WARM_UP_SHARE, COOL_DOWN_SHARE = 0.2, 0.2
LEAST_SOLO_S = 60.0  # shorter tasks count as this long, so that a slowdown is of something
NUM_QUANTILES = 201


class Cell(NamedTuple):
    """``num_tasks`` of the trace that take at most ``max_hours`` alone under HF PEFT."""

    system: System
    load: float
    seed: int
    num_tasks: int
    num_gpus: int
    max_hours: float

    @property
    def file_name(self) -> str:
        return f"{self.system.name}-load{self.load:g}-seed{self.seed}.json"


def write_window(path: Path, seed: int, num_seeds: int, num_tasks: int, max_hours: float) -> None:
    """Window ``seed`` of ``num_seeds`` that are spread evenly over the trace, as a trace file."""
    trace = read_trace(PHILLY)
    rows = window_rows(trace, seed, num_seeds, num_tasks, max_hours)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("id", "tenant", "arrival_s", "duration_s"))
        for row in rows.tolist():
            arrival_s, duration_s = float(trace.arrival_s[row]), float(trace.duration_s[row])
            writer.writerow((trace.task_ids[row], trace.tenants[row], arrival_s, duration_s))
    partial.rename(path)


def window_rows(
    trace: Trace, seed: int, num_seeds: int, num_tasks: int, max_hours: float
) -> np.ndarray:
    """Rows of the trace. Raises ValueError where the windows would overlap."""
    rows = np.flatnonzero(trace.duration_s <= max_hours * 3600)
    stride = len(rows) // num_seeds
    if num_tasks > stride:
        raise ValueError(f"{num_seeds} windows of {num_tasks} tasks overlap: at most {stride} fit")
    return rows[seed * stride : seed * stride + num_tasks]


class Score:
    """Observer: the scored tasks' times, and how many GPUs hold a task while they arrive."""

    def __init__(
        self,
        solo_s: dict[str, float],
        from_ns: int,
        until_ns: int,
        gpus_of: dict[str, Sequence[str]],
    ) -> None:
        self._solo_s, self._from_ns, self._until_ns = solo_s, from_ns, until_ns
        self._gpus_of, self._plans = gpus_of, []
        self._holding: dict[str, bool] = {}
        self._num_held: dict[str, int] = {}
        self._busy_gpus = 0
        self._since_ns = self.busy_gpu_ns = 0
        self.completion_s, self.queueing_s, self.slowdown = array("d"), array("d"), array("d")
        self.num_unfinished = 0

    def on_plan(self, plan: Plan) -> None:
        self._plans.append((plan.instance_id, bool(plan.htasks)))

    def on_task_end(self, outcome: TaskOutcome) -> None:
        if not self._from_ns <= outcome.arrival_ns < self._until_ns:
            return
        if outcome.state is not TaskState.DONE or outcome.placed_ns is None:
            self.num_unfinished += 1
            return
        completion_s = (outcome.ended_ns - outcome.arrival_ns) / NS_PER_S
        self.completion_s.append(completion_s)
        self.queueing_s.append((outcome.placed_ns - outcome.arrival_ns) / NS_PER_S)
        self.slowdown.append(completion_s / max(self._solo_s[outcome.task_id], LEAST_SOLO_S))

    def on_batch(self, time_ns: int, events: Sequence[Event]) -> None:
        start = min(max(self._since_ns, self._from_ns), self._until_ns)
        end = min(max(time_ns, self._from_ns), self._until_ns)
        self.busy_gpu_ns += self._busy_gpus * (end - start)
        self._since_ns = time_ns
        for instance_id, holds in self._plans:
            if holds != self._holding.get(instance_id, False):
                self._holding[instance_id] = holds
                for gpu in self._gpus_of[instance_id]:
                    self._count(gpu, 1 if holds else -1)
        self._plans.clear()

    def _count(self, gpu: str, change: int) -> None:
        before = self._num_held.get(gpu, 0)
        self._num_held[gpu] = before + change
        self._busy_gpus += (before + change > 0) - (before > 0)


@lru_cache(maxsize=32)
def composed(words: tuple[str, ...]) -> SimulateConfig:
    """The settings of `muxtune simulate` with these overrides."""
    register_schemas()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return OmegaConf.to_object(compose("simulate", overrides=list(words)))  # type: ignore[return-value]


def config_of(cell: Cell, window: Path) -> SimulateConfig:
    words = (*cell.system.words, "cluster=h100_x64", "workload=philly", "output_dir=unused")
    config = deepcopy(composed(words))
    workload = config.workload
    assert isinstance(workload, TraceWorkload)
    workload.trace, workload.load = str(window), cell.load
    config.seed = workload.seed = cell.seed
    config.cluster.num_gpus = cell.num_gpus
    return config


_BOOKS: dict[tuple[str, str], Any] = {}


def run_cell(cell: Cell, windows: Path, runs: Path) -> Path:
    """Simulates one cell and writes its record, at once and whole."""
    path = runs / cell.file_name
    record = simulate(cell, windows / f"seed{cell.seed}.csv")
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1), encoding="utf-8")
    partial.rename(path)
    return path


def simulate(cell: Cell, window: Path) -> dict[str, Any]:
    """One flat record; times in seconds, quantiles evenly spaced from 0 to 1."""
    config = config_of(cell, window)
    # A worker keeps the cost models, whose memos the next cell of the style can use.
    key = (config.cost.style, config.cost.adapters)
    costs = _BOOKS.setdefault(key, build.cost_book(config))
    tasks: Any = build.tasks(config, costs)
    instances = joined(build.instances(config, costs, tasks), cell.system.replicas)
    executor = build.sim_executor(
        fleet_options(config, len(tasks)), costs, build.sim_library(config, tasks)
    )
    horizon_ns = round(tasks.horizon_s * NS_PER_S)
    score = Score(
        dict(solo_durations(window)),
        round(WARM_UP_SHARE * horizon_ns),
        round((1 - COOL_DOWN_SHARE) * horizon_ns),
        {spec.instance_id: spec.gpu_ids for spec in instances},
    )
    policy = build.cluster_policy(config.cluster_policy)
    planner = build.planner(config.planner, costs)
    engine = Engine(policy, planner, executor, tasks, instances, None, (score,))
    with few_collections():
        totals = engine.run()
    scored_ns = (1 - WARM_UP_SHARE - COOL_DOWN_SHARE) * horizon_ns * cell.num_gpus
    fleet = fleet_summary(instances, executor.instance_totals(), totals.end_ns)
    return {
        "system": cell.system.name,
        "load": cell.load,
        "seed": cell.seed,
        "num_tasks": totals.num_tasks,
        "num_done": totals.num_done,
        "num_scored": len(score.completion_s),
        "num_scored_unfinished": score.num_unfinished,
        "offered_load": tasks.offered_load,
        "horizon_h": tasks.horizon_s / 3600,
        "makespan_h": totals.end_s / 3600,
        "num_instances": len(instances),
        "busy_gpu_share": score.busy_gpu_ns / scored_ns,
        "busy_gpu_hours": fleet["busy_gpu_hours"],
        "effective_share": fleet["effective_share"],
        "tasks_per_busy_instance": fleet["concurrent_tasks_per_instance"],
        **spread("completion_s", score.completion_s),
        **spread("queueing_s", score.queueing_s),
        **spread("slowdown", score.slowdown),
    }


def joined(instances: Sequence[InstanceSpec], replicas: int) -> list[InstanceSpec]:
    """Every ``replicas`` neighbours as one instance."""
    groups = [instances[at : at + replicas] for at in range(0, len(instances), replicas)]
    return [
        group[0]._replace(
            replicas=tuple(each.replicas[0] for each in group),
            gpu_ids=tuple(gpu for each in group for gpu in each.gpu_ids),
        )
        for group in groups
    ]


def solo_durations(window: Path) -> list[tuple[str, float]]:
    """Seconds that each task takes alone under HF PEFT: what the trace gives."""
    with window.open(newline="", encoding="utf-8") as file:
        return [(row["id"], float(row["duration_s"])) for row in csv.DictReader(file)]


def spread(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Mean and quantiles."""
    data = np.asarray(values, dtype=np.float64)
    quantiles = np.quantile(data, np.linspace(0, 1, NUM_QUANTILES))
    return {f"mean_{name}": float(data.mean()), f"quantiles_{name}": quantiles.tolist()}
