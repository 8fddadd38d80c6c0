"""What tenants are promised, and how well a fleet kept it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from muxtune.deciding import TaskOutcome
from muxtune.errors import ConfigError
from muxtune.report.metrics import fairness_index, quantiles
from muxtune.report.recording import met_deadline
from muxtune.report.statistics import kaplan_meier
from muxtune.types import NS_PER_S, TaskState

FROM_START, FROM_ARRIVAL = "start", "arrival"


class ServiceLevel(NamedTuple):
    """``share`` of the tasks start within ``max_start_delay_s`` of their arrival and end within
    ``max_slowdown`` times what they would take alone under HF PEFT on the reference device,
    counted from their start or, with ``slowdown_from="arrival"``, from their arrival."""

    share: float = 0.95
    max_start_delay_s: float = 600.0
    max_slowdown: float = 3.0
    slowdown_from: str = FROM_START

    def checked(self) -> ServiceLevel:
        """Raises ConfigError that names the field."""
        where = "service_level"
        if not 0 < self.share <= 1:
            raise ConfigError(f"{where}.share", f"is {self.share}", "Give a number in (0, 1]")
        for name in ("max_start_delay_s", "max_slowdown"):
            if not getattr(self, name) > 0:
                problem = f"is {getattr(self, name)}"
                raise ConfigError(f"{where}.{name}", problem, "Give a number above 0")
        if self.slowdown_from not in (FROM_START, FROM_ARRIVAL):
            problem = f"'{self.slowdown_from}' does not exist"
            remedy = f"Choose {FROM_START} or {FROM_ARRIVAL}"
            raise ConfigError(f"{where}.slowdown_from", problem, remedy)
        return self


class Times(NamedTuple):
    """Of the tasks that are counted, [num_tasks] each, in seconds. A task that was refused or
    failed never starts and never ends: its times are infinite."""

    arrival_s: np.ndarray
    start_delay_s: np.ndarray
    completion_s: np.ndarray
    reference_s: np.ndarray  # alone under HF PEFT on the reference device
    deadline_met: np.ndarray  # NaN where the task has no deadline
    tenants: tuple[str, ...]

    @property
    def run_s(self) -> np.ndarray:
        return self.completion_s - np.where(
            np.isfinite(self.start_delay_s), self.start_delay_s, 0.0
        )


def times_of(
    outcomes: Sequence[TaskOutcome],
    reference_s: Mapping[str, float],
    since_ns: int = 0,
) -> Times:
    """Tasks that arrived before ``since_ns`` met a fleet that was still filling: not counted."""
    counted = sorted(
        (item for item in outcomes if item.arrival_ns >= since_ns),
        key=lambda item: (item.arrival_ns, item.task_id),
    )
    done = np.array([item.state is TaskState.DONE for item in counted], dtype=bool)
    start_ns = [
        item.placed_ns if item.first_start_ns is None else item.first_start_ns for item in counted
    ]
    arrival_ns = np.array([item.arrival_ns for item in counted], dtype=np.float64)
    started_ns = np.array([np.inf if at is None else at for at in start_ns], dtype=np.float64)
    ended_ns = np.array([item.ended_ns for item in counted], dtype=np.float64)
    return Times(
        arrival_s=arrival_ns / NS_PER_S,
        start_delay_s=np.where(done, started_ns - arrival_ns, np.inf) / NS_PER_S,
        completion_s=np.where(done, ended_ns - arrival_ns, np.inf) / NS_PER_S,
        reference_s=np.array([reference_s[item.task_id] for item in counted]),
        deadline_met=np.array(
            [np.nan if met is None else float(met) for met in map(met_deadline, counted)]
        ),
        tenants=tuple(item.tenant for item in counted),
    )


def well_served(times: Times, level: ServiceLevel) -> np.ndarray:
    """[num_tasks] whether the promise was kept."""
    spent_s = times.run_s if level.slowdown_from == FROM_START else times.completion_s
    in_time = spent_s <= level.max_slowdown * times.reference_s
    return (times.start_delay_s <= level.max_start_delay_s) & in_time


def is_well_served(outcome: TaskOutcome, reference_s: float, level: ServiceLevel) -> bool:
    """The same of one task, as it ends."""
    started_ns = outcome.placed_ns if outcome.first_start_ns is None else outcome.first_start_ns
    if outcome.state is not TaskState.DONE or started_ns is None:
        return False
    arrival_ns = outcome.arrival_ns
    since_ns = started_ns if level.slowdown_from == FROM_START else arrival_ns
    in_time = outcome.ended_ns - since_ns <= level.max_slowdown * reference_s * NS_PER_S
    return started_ns - arrival_ns <= level.max_start_delay_s * NS_PER_S and in_time


def served_share(times: Times, level: ServiceLevel) -> float:
    return float(well_served(times, level).mean()) if len(times.tenants) else 1.0


def window_row(times: Times, until_s: float) -> dict[str, Any]:
    """Completion times as somebody would tell them who stops looking at ``until_s``, when the
    last task arrives: the tasks that have not ended by then are not left out, but known to take
    longer (``kaplan_meier``). None where too few have ended to tell."""
    seen = times.arrival_s < until_s
    if not seen.any():
        return {"num_censored": 0, "window_p50_completion_time_s": None}
    left_s = until_s - times.arrival_s[seen]
    ended = times.completion_s[seen] <= left_s
    survival = kaplan_meier(np.minimum(times.completion_s[seen], left_s), ended)
    median_s = survival.quantile(0.5)
    return {
        "num_censored": survival.num_censored,
        "window_p50_completion_time_s": median_s if np.isfinite(median_s) else None,
    }


def service_row(times: Times, level: ServiceLevel) -> dict[str, Any]:
    """Flat figures of one run. ``finish_time_ratio``: arrival to end over the time alone under
    HF PEFT; ``slowdown``: the same from the start. ``fairness_index``: Jain's index of the tenants'
    mean finish-time ratios (Jain, Chiu and Hawe, 1984): 1 when all fare alike."""
    ended = np.isfinite(times.completion_s)
    ratio = times.completion_s[ended] / times.reference_s[ended]
    slowdown = times.run_s[ended] / times.reference_s[ended]
    known = times.deadline_met[~np.isnan(times.deadline_met)]
    return {
        "served_share": served_share(times, level),
        "num_counted": len(times.tenants),
        "num_not_ended": int((~ended).sum()),
        **quantiles("start_delay_s", times.start_delay_s[ended].tolist()),
        **quantiles("completion_time_s", times.completion_s[ended].tolist()),
        **quantiles("slowdown", slowdown.tolist()),
        **quantiles("finish_time_ratio", ratio.tolist()),
        "fairness_index": _fairness(ratio, np.array(times.tenants)[ended]),
        "deadlines_met_share": float(known.mean()) if len(known) else None,
    }


def _fairness(ratio: np.ndarray, tenants: np.ndarray) -> float | None:
    """None where there is nobody to be unfair to."""
    of_tenant = _by_tenant(ratio, tenants)
    return fairness_index(of_tenant) if len(of_tenant) > 1 else None


def _by_tenant(values: np.ndarray, tenants: np.ndarray) -> np.ndarray:
    return np.array([values[tenants == name].mean() for name in np.unique(tenants)])
