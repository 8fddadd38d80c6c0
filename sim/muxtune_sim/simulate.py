"""An engine on a simulated executor, wired."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from muxtune.engine import (
    DEFAULT_OPTIONS,
    BatchLog,
    Engine,
    EngineOptions,
    Observer,
    RunTotals,
)
from muxtune.planning.step_builder import StepBuilder
from muxtune.protocols import ClusterPolicy, CostBook, InstancePlanner, TaskLibrary
from muxtune.types import InstanceSpec, TaskSpec
from muxtune_sim.executor import SimExecutor
from muxtune_sim.options import DEFAULT_SIM_OPTIONS, InstanceTotals, SimOptions, make_builder


class SimReport(NamedTuple):
    totals: RunTotals
    instances: tuple[InstanceTotals, ...]


def simulate(
    policy: ClusterPolicy,
    planner: InstancePlanner,
    costs: CostBook,
    library: TaskLibrary,
    tasks: Iterable[TaskSpec],
    instances: Sequence[InstanceSpec],
    options: SimOptions = DEFAULT_SIM_OPTIONS,
    journal: BatchLog | None = None,
    observers: Sequence[Observer] = (),
    engine_options: EngineOptions = DEFAULT_OPTIONS,
    builder: StepBuilder | None = None,
) -> SimReport:
    """Runs ``tasks`` to the last one. ``costs`` is the simulator's own book: giving the planner
    another one studies prediction error."""
    executor = SimExecutor(builder or make_builder(options), costs, library, options)
    engine = Engine(policy, planner, executor, tasks, instances, journal, observers, engine_options)
    totals = engine.run()
    return SimReport(totals, tuple(executor.instance_totals()))
