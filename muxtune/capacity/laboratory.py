"""One simulated fleet: what a number of GPUs of one kind does with one draw of the tasks.

Everything random hangs on the seed and nothing on the fleet, so that two fleets, policies or
assumptions are compared on the very same tasks (common random numbers).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from muxtune import build
from muxtune.alone import Alone, checked_reference_s, hf_peft_alone
from muxtune.capacity.choices import PolicyChoice
from muxtune.capacity.service import (
    ServiceLevel,
    Times,
    is_well_served,
    served_share,
    service_row,
    times_of,
    window_row,
)
from muxtune.config import CapacityConfig, ModelConfig
from muxtune.cost.book import CostBook
from muxtune.cost.scaled import ScaledCostBook
from muxtune.deciding import TaskOutcome
from muxtune.engine import Engine, QuietObserver
from muxtune.errors import ConfigError, MuxTuneError
from muxtune.protocols import InstancePlanner
from muxtune.report.collecting import few_collections
from muxtune.types import NS_PER_S, Event, InstanceSpec, TaskSpec
from muxtune.workload.synthetic import SyntheticLibrary

MAX_EXACT_TASKS = 2_000  # of a pool; above, every round of a plan takes its mean time


class Variant(NamedTuple):
    """What is assumed otherwise than asked. ``load``: arrivals come that many times as fast.
    ``lengths``: sequences are that many times as long. ``times``: everything takes that many
    times as long as the cost model says, which the planner does not know. ``memory``: GPUs have
    that many times the memory. ``even``: arrivals are evenly spaced."""

    load: float = 1.0
    lengths: float = 1.0
    times: float = 1.0
    memory: float = 1.0
    even: bool = False


AS_ASKED = Variant()


class Pool(NamedTuple):
    """GPUs of one kind that host one base model under one policy."""

    policy: str
    device: str
    model: str


class Case(NamedTuple):
    """A pool, a draw of the tasks, and what is assumed."""

    pool: Pool
    seed: int
    variant: Variant = AS_ASKED


class Demand(NamedTuple):
    """One draw of the tasks of one base model, ``reference_s`` alone under HF PEFT each."""

    tasks: tuple[TaskSpec, ...]
    reference_s: Mapping[str, float]
    horizon_s: float  # from the first to the last arrival of all base models

    @property
    def busy_gpus(self) -> float:
        """GPUs that the tasks would keep busy, each alone under HF PEFT."""
        return sum(self.reference_s.values()) / self.horizon_s


class Run(NamedTuple):
    """One flat row, and the times of the tasks behind it."""

    row: dict[str, Any]
    times: Times
    outcomes: tuple[TaskOutcome, ...]


class Laboratory:
    """Simulates fleets for one question; keeps task draws, costs and planners between runs."""

    def __init__(self, config: CapacityConfig, choices: Sequence[PolicyChoice]) -> None:
        self.config = config
        self.choices = {choice.name: choice for choice in choices}
        self.level = ServiceLevel(**vars(config.service_level)).checked()
        self._demands: dict[tuple[int, float], dict[str, Demand]] = {}
        self._costs: dict[Pool, CostBook] = {}
        self._planners: dict[Pool, InstancePlanner] = {}
        self._per_gpu: dict[Pool, int] = {}

    # -- the tasks

    def demand(self, case: Case) -> Demand:
        """The draw of a case's base model. Raises ConfigError when all tasks arrive at once."""
        found = self.demands(case.seed, case.variant.lengths)[case.pool.model]
        return arriving(found, case.variant)

    def demands(self, seed: int, lengths: float = 1.0) -> dict[str, Demand]:
        """By base model, sorted."""
        key = (seed, lengths)
        if key not in self._demands:
            self._demands[key] = self._draw(seed, lengths)
        return self._demands[key]

    def _draw(self, seed: int, lengths: float) -> dict[str, Demand]:
        config = replace(self.config, seed=seed, workload=_seeded(self.config.workload, seed))
        costs = build.cost_book(config)
        tasks = [longer(task, lengths) for task in build.tasks(config, costs)]
        horizon_s = tasks[-1].arrival_ns / NS_PER_S if tasks else 0.0
        if horizon_s <= 0:
            problem = "all tasks arrive at once, so there is no rate to plan for"
            raise ConfigError("workload", problem, "Give tasks that arrive over time")
        library = SyntheticLibrary(seed, length_scale=lengths)
        device = build.device_name(config.cluster, config.cost)
        return {
            model: _demand(
                [task for task in tasks if task.model == model],
                hf_peft_alone(costs, library, model, device),
                horizon_s,
            )
            for model in sorted({task.model for task in tasks})
        }

    # -- the fleet

    def instances(self, case: Case, num_gpus: int) -> list[InstanceSpec]:
        config = self._config(case.pool, case.seed, num_gpus)
        if config.cluster.instances_per_gpu == build.AUTO:
            config.cluster.instances_per_gpu = self._colocated(case)
        specs = build.instances(config, self._book(case.pool))
        factor = case.variant.memory
        return [
            spec._replace(memory_limit_bytes=int(spec.memory_limit_bytes * factor))
            for spec in specs
        ]

    def _colocated(self, case: Case) -> int:
        pool = case.pool
        if pool not in self._per_gpu:
            choice = self.choices[pool.policy]
            config = self._config(pool, case.seed, choice.tp * choice.pp)
            demand = self.demands(case.seed)[pool.model]
            self._per_gpu[pool] = len(build.instances(config, self._book(pool), demand.tasks))
        return self._per_gpu[pool]

    def _config(self, pool: Pool, seed: int, num_gpus: int) -> CapacityConfig:
        choice = self.choices[pool.policy]
        cluster = replace(
            self.config.cluster,
            device=pool.device,
            num_gpus=num_gpus,
            tp=choice.tp,
            pp=choice.pp,
            instances_per_gpu=choice.instances_per_gpu,
        )
        same = pool.model == self.config.model.name
        model = self.config.model if same else ModelConfig(name=pool.model)
        cost = replace(self.config.cost, **choice.cost)
        policy = dict(choice.cluster_policy)
        changes = {"cluster": cluster, "model": model, "cost": cost, "cluster_policy": policy}
        return replace(self.config, seed=seed, **changes)

    def _book(self, pool: Pool) -> CostBook:
        if pool not in self._costs:
            config = self._config(pool, self.config.seed, self.smallest(pool))
            self._costs[pool] = build.published_costs(config)
        return self._costs[pool]

    def _planner(self, pool: Pool) -> InstancePlanner:
        if pool not in self._planners:
            choice = self.choices[pool.policy]
            self._planners[pool] = build.planner(choice.planner, self._book(pool))
        return self._planners[pool]

    # -- running

    def run(self, case: Case, num_gpus: int) -> Run:
        """To the last task. Raises MuxTuneError that names the policy when tasks can never run."""
        demand, instances = self.demand(case), self.instances(case, num_gpus)
        outcomes, executor = self._engine_run(case, demand, instances, allowed=math.inf)
        times = self._times(demand, outcomes)
        row = self._row(case, num_gpus, demand, instances, executor.instance_totals(), outcomes)
        row |= service_row(times, self.level) | window_row(times, demand.horizon_s)
        return Run(row, times, tuple(outcomes))

    def served_share(self, case: Case, num_gpus: int) -> float:
        """As ``run`` tells; once the service level is out of reach, what it still could be. A
        fleet that gets more work than it has time for keeps no promise for long, even where the
        trace ends before its queue is long enough to tell: below the level, too."""
        demand, instances = self.demand(case), self.instances(case, num_gpus)
        num_counted = sum(task.arrival_ns >= self._since_ns(demand) for task in demand.tasks)
        allowed = (1.0 - self.level.share) * num_counted + 1e-9
        too_few = math.nextafter(self.level.share, 0.0)
        try:
            outcomes, executor = self._engine_run(case, demand, instances, allowed)
        except _Missed:
            return too_few
        share = served_share(self._times(demand, outcomes), self.level)
        busy_gpu_s = _gpu_busy_s(instances, executor.instance_totals(), outcomes)
        return share if busy_gpu_s <= num_gpus * demand.horizon_s else min(share, too_few)

    def _engine_run(
        self, case: Case, demand: Demand, instances: Sequence[InstanceSpec], allowed: float
    ) -> tuple[list[TaskOutcome], Any]:
        since_ns, reference_s, level = self._since_ns(demand), demand.reference_s, self.level

        def is_bad(outcome: TaskOutcome) -> bool:
            counts = outcome.arrival_ns >= since_ns
            return counts and not is_well_served(outcome, reference_s[outcome.task_id], level)

        never = math.isinf(allowed)
        outcomes = _Outcomes((lambda _: False) if never else is_bad, allowed)
        executor = self._executor(case, len(demand.tasks))
        config = self._config(case.pool, case.seed, self.smallest(case.pool))
        policy, first = build.fleet_policy(config, instances)
        planner = self._planner(case.pool)
        options = build.engine_options(config, tell_waits=False)
        engine = Engine(policy, planner, executor, demand.tasks, first, None, (outcomes,), options)
        try:
            with few_collections():
                engine.run()
        except MuxTuneError as error:
            raise MuxTuneError(f"policies: '{case.pool.policy}': {error}") from None
        return outcomes.found, executor

    def _executor(self, case: Case, num_tasks: int) -> Any:
        options = {"times": "mean" if num_tasks > MAX_EXACT_TASKS else "exact"}
        costs: Any = self._book(case.pool)
        if case.variant.times != 1.0:
            costs = ScaledCostBook(costs, case.variant.times)
        library = SyntheticLibrary(case.seed, length_scale=case.variant.lengths)
        hardware = build.hardware_options(self.config)
        return build.sim_executor(options | self.config.backend, costs, library, hardware)

    def _times(self, demand: Demand, outcomes: Sequence[TaskOutcome]) -> Times:
        return times_of(outcomes, demand.reference_s, self._since_ns(demand))

    def _since_ns(self, demand: Demand) -> int:
        return int(self.config.warmup_share * demand.horizon_s * NS_PER_S)

    def _row(
        self,
        case: Case,
        num_gpus: int,
        demand: Demand,
        instances: Sequence[InstanceSpec],
        totals: Sequence[Any],
        outcomes: Sequence[TaskOutcome],
    ) -> dict[str, Any]:
        """Use of the GPUs is counted against the time in which tasks arrive: what a fleet that
        goes on for ever does in that time, without the tail of a trace that just ends."""
        busy_gpu_s = _gpu_busy_s(instances, totals, outcomes)
        held_gpu_s = num_gpus * demand.horizon_s
        effective = sum(item.effective_tokens for item in totals)
        padded = sum(item.padded_tokens for item in totals)
        busy_share = busy_gpu_s / held_gpu_s
        peak = max((item.peak_predicted_memory_bytes for item in totals), default=0)
        return {
            **case.pool._asdict(),
            "seed": case.seed,
            **case.variant._asdict(),
            "num_gpus": num_gpus,
            "num_tasks": len(demand.tasks),
            "horizon_s": demand.horizon_s,
            "offered_load": demand.busy_gpus / num_gpus,
            "effective_tokens": effective,
            "busy_share": busy_share,
            "keeps_up": busy_share <= 1.0,
            "effective_share": effective / padded if padded else None,
            "effective_utilisation": busy_share * effective / padded if padded else None,
            "busy_gpu_hours": busy_gpu_s / 3_600,
            "memory_headroom_share": 1.0 - peak / instances[0].memory_limit_bytes,
            "mean_tasks_per_busy_instance": _mean_tasks(totals),
        }

    # -- what no fleet can better

    def alone_share(self, case: Case) -> float:
        """Share of the tasks that keep the promise when each has an idle instance to itself."""
        demand, alone = self.demand(case), self._alone(case)
        limit = self.level.max_slowdown / case.variant.times
        kept = [
            alone.time_s(task) <= limit * demand.reference_s[task.task_id] for task in demand.tasks
        ]
        return sum(kept) / len(kept)

    def relative_error(self, case: Case) -> float:
        """Half-width of the cost model's own 90% interval, the widest over the tasks."""
        alone = self._alone(case)
        return max(alone.relative_error(task) for task in self.demand(case).tasks)

    def _alone(self, case: Case) -> Alone:
        site = self.instances(case, self.smallest(case.pool))[0]
        library = SyntheticLibrary(case.seed, length_scale=case.variant.lengths)
        return Alone(self._planner(case.pool), library, site)

    def smallest(self, pool: Pool) -> int:
        return self.choices[pool.policy].tp * self.choices[pool.policy].pp


class _Missed(Exception):
    """So many tasks were not served well that the service level cannot be kept any more."""


class _Outcomes(QuietObserver):
    """An observer that keeps how tasks ended, and stops the run once more than
    ``allowed`` of them were served badly."""

    def __init__(self, is_bad: Callable[[TaskOutcome], bool], allowed: float) -> None:
        self.found: list[TaskOutcome] = []
        self.num_bad, self._is_bad, self._allowed = 0, is_bad, allowed

    def on_task_end(self, outcome: TaskOutcome) -> None:
        self.found.append(outcome)
        self.num_bad += self._is_bad(outcome)

    def on_batch(self, time_ns: int, events: Sequence[Event]) -> None:
        if self.num_bad > self._allowed:
            raise _Missed


def longer(task: TaskSpec, factor: float) -> TaskSpec:
    """The task with sequences ``factor`` times as long, in as many steps."""
    if factor == 1.0:
        return task
    cap = max(2, round(task.data.max_length_tokens * factor))
    return task._replace(data=task.data._replace(max_length_tokens=cap))


def arriving(demand: Demand, variant: Variant) -> Demand:
    """The same tasks, sooner after each other or evenly spaced; deadlines keep their distance."""
    if variant.load == 1.0 and not variant.even:
        return demand
    horizon_s = demand.horizon_s / variant.load
    last = max(1, len(demand.tasks) - 1)
    moved = [
        round(index / last * horizon_s * NS_PER_S)
        if variant.even
        else round(task.arrival_ns / variant.load)
        for index, task in enumerate(demand.tasks)
    ]
    tasks = tuple(_moved(task, to_ns) for task, to_ns in zip(demand.tasks, moved, strict=True))
    return demand._replace(tasks=tasks, horizon_s=horizon_s)


def _moved(task: TaskSpec, to_ns: int) -> TaskSpec:
    deadline_ns = task.deadline_ns
    if deadline_ns is not None:
        deadline_ns += to_ns - task.arrival_ns
    return task._replace(arrival_ns=to_ns, deadline_ns=deadline_ns)


def _demand(tasks: Sequence[TaskSpec], alone: Alone, horizon_s: float) -> Demand:
    times_s = {task.task_id: checked_reference_s(alone, task) for task in tasks}
    return Demand(tuple(tasks), times_s, horizon_s)


def _seeded(workload: Any, seed: int) -> Any:
    return replace(workload, seed=seed) if hasattr(workload, "seed") else workload


def _gpu_busy_s(
    instances: Sequence[InstanceSpec], totals: Sequence[Any], outcomes: Sequence[TaskOutcome]
) -> float:
    """GPU-seconds in which there was work. Instances that share a GPU are busy at the same time:
    there the time counts in which any of their tasks was being worked on."""
    gpus_of = {spec.instance_id: spec.gpu_ids for spec in instances}
    if len({gpu for spec in instances for gpu in spec.gpu_ids}) == sum(map(len, gpus_of.values())):
        return sum(item.busy_ns * len(gpus_of[item.instance_id]) for item in totals) / NS_PER_S
    spans: dict[str, list[tuple[int, int]]] = {}
    for item in outcomes:
        started_ns = item.placed_ns if item.first_start_ns is None else item.first_start_ns
        if started_ns is not None:
            for gpu in gpus_of.get(item.instance_id, ()):
                spans.setdefault(gpu, []).append((started_ns, item.ended_ns))
    return sum(covered_ns(found) for found in spans.values()) / NS_PER_S


def covered_ns(spans: Sequence[tuple[int, int]]) -> int:
    """Length of the union of (start, end)."""
    total, reach = 0, -1
    for start, end in sorted(spans):
        total += max(0, end - max(start, reach))
        reach = max(reach, end)
    return total


def _mean_tasks(totals: Sequence[Any]) -> float | None:
    busy_ns = sum(item.busy_ns for item in totals)
    return sum(item.task_ns for item in totals) / busy_ns if busy_ns else None
