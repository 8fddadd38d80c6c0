"""What a simulation assumes besides the cost model, and what it tells of each instance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from muxtune.errors import ConfigError
from muxtune.hardware import NO_FAILURES, FailureRules, NodeSpec
from muxtune.planning.rates import MeanStepBuilder
from muxtune.planning.step_builder import StepBuilder
from muxtune.types import NS_PER_S

EXACT, MEAN, LAYOUTS = "exact", "mean", "layouts"


class SimOptions(NamedTuple):
    """Times in seconds; the ``fail_*`` mappings inject failures at nanoseconds of the run.

    planning_base_s, planning_per_task_s: from a decision to the moment the instance knows of it.
    one_thread: the engine decides on the thread that trains, as beside the real executor. What
        happens while a plan takes over or results are written is heard at the end of it, all at
        once; a plan that is made then holds the instance up; a withdrawn task leaves at once; and
        news comes with what was done so far. Meant for one instance.
    passes_ahead: of one thread, which starts so many before it reads a result; a plan that takes
        over waits for them.
    prepare_s: reading a task's data. start_s: until an instance is ready.
    charge_transitions: let a plan's takeover cost what the cost model says.
    emit_plan_applied, emit_progress: tell the engine of takeovers and of work done; a fleet of
    tens of thousands of tasks does without. emit_last_progress: also of work after which no task
    of the instance is left, which tells of a drift and nothing else.
    times: "exact" adds up every pass of a plan; "mean" lets every round of a plan take what it
    takes in the mean (``muxtune.planning.rates``). Where tasks stand is exact in both.
    charge_startup: let an instance's start take what the cost model says, besides start_s.
    charge_checkpoints: let a task that leaves unfinished be written out at the cost model's price.
    checkpoint_steps: optimizer steps between the checkpoints of a task; 0: every step. What a task
    did since is lost when its instance fails. A task that joins an instance was just written.
    nodes, failures: the hardware, and how it fails; by default it does not.
    fail_task_at_ns: task id to the time at which it fails, recognised at the end of its round.
    fail_instance_at_ns: instance id to the time at which it is lost with all its open steps.
    """

    planning_base_s: float = 0.0
    planning_per_task_s: float = 0.0
    one_thread: bool = False
    passes_ahead: int = 0
    prepare_s: float = 0.0
    start_s: float = 0.0
    charge_transitions: bool = True
    emit_plan_applied: bool = True
    emit_progress: bool = True
    emit_last_progress: bool = True
    times: str = EXACT
    charge_startup: bool = False
    charge_checkpoints: bool = False
    checkpoint_steps: int = 0
    nodes: tuple[NodeSpec, ...] = ()
    failures: FailureRules = NO_FAILURES
    fail_task_at_ns: Mapping[str, int] = {}
    fail_instance_at_ns: Mapping[str, int] = {}


DEFAULT_SIM_OPTIONS = SimOptions()


def make_builder(options: SimOptions) -> StepBuilder:
    """Raises ConfigError for ``times`` that do not exist."""
    builders: dict[str, type[StepBuilder]] = {
        EXACT: StepBuilder, MEAN: MeanStepBuilder, LAYOUTS: StepBuilder,
    }  # fmt: skip
    if options.times not in builders:
        raise ConfigError(
            "backend.times",
            f"'{options.times}' does not exist",
            f"Choose {', '.join(builders)}",
        )
    return builders[options.times]()


class InstanceTotals(NamedTuple):
    """``busy_ns``: with work, transitions included. ``task_ns``: the sum over tasks of the time
    that each was being worked on, so that ``task_ns / busy_ns`` is the mean concurrency.
    ``lost_tokens``: those of ``effective_tokens`` that were undone, because a failure or a dropped
    step took them back. ``up_ns``: from its start, loading included, to its end."""

    instance_id: str
    busy_ns: int
    transition_ns: int
    task_ns: int
    rounds: int
    plans: int
    effective_tokens: int
    padded_tokens: int
    peak_predicted_memory_bytes: int
    lost_tokens: int
    up_ns: int

    @property
    def mean_tasks(self) -> float:
        return self.task_ns / self.busy_ns if self.busy_ns else 0.0


def to_ns(seconds: float) -> int:
    return round(seconds * NS_PER_S)
