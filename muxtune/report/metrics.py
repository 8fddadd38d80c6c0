"""What a run on a fleet was worth: waiting, slowdown, fairness, use of the GPUs, energy.

Definitions, all over tasks that were done:

- completion time: from arrival to end; queueing: from arrival to the first placement.
- slowdown: time since the first placement over ``solo_time_s``, the predicted time of the task
  alone on the instance where it ended. Time that it was preempted counts.
- finish-time ratio: completion time over ``solo_time_s``; 1 means as if the fleet were the task's
  own. It is the finish-time fairness of Themis (NSDI'20) with the task alone as the reference.
- fairness index: Jain's, (sum x)^2 / (n sum x^2), of the finish-time ratios; 1: all alike.
- effective utilisation: share of the GPU time held in which an instance worked, times the share of
  computed token rows that tasks needed and that no failure undid.
- energy: ``power_w`` while busy and ``idle_power_share`` of it otherwise, no cooling; GPUs that
  have failed draw nothing.
"""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from muxtune.engine import QuietObserver, TaskOutcome
from muxtune.report.recording import DONE, met_deadline
from muxtune.types import NS_PER_S, InstanceSpec

NS_PER_HOUR = 3_600 * NS_PER_S
JOULES_PER_KWH = 3.6e6


class TenantTimes:
    """Of one tenant; five numbers a task that was done."""

    def __init__(self) -> None:
        self.completion_s, self.queueing_s = array("d"), array("d")
        self.slowdown, self.finish_time_ratio = array("d"), array("d")
        self.num_tasks = self.num_deadlines = self.num_met = 0
        self.num_placements = self.lost_steps = self.effective_tokens = 0

    def add(self, outcome: TaskOutcome) -> None:
        (
            _, _, _, state, arrival_ns, _, placed_ns, _, ended_ns, _, _, tokens, solo_s, _, _, _,
            _, _, _, deadline_ns, num_placements, lost_steps, _, _,
        ) = outcome  # fmt: skip
        self.num_tasks += 1
        self.num_placements += num_placements
        self.lost_steps += lost_steps
        if deadline_ns is not None:
            self.num_deadlines += 1
            self.num_met += bool(met_deadline(outcome))
        if state is not DONE:
            return
        if placed_ns is None:
            placed_ns = ended_ns
        self.effective_tokens += tokens
        completion_s = (ended_ns - arrival_ns) / NS_PER_S
        self.completion_s.append(completion_s)
        self.queueing_s.append((placed_ns - arrival_ns) / NS_PER_S)
        if solo_s and ended_ns > placed_ns:  # see ``slowdown`` and ``finish_time_ratio``
            self.slowdown.append((ended_ns - placed_ns) / NS_PER_S / solo_s)
            self.finish_time_ratio.append(completion_s / solo_s)


class TaskMetrics(QuietObserver):
    """Observer that keeps what quantiles need, by tenant."""

    def __init__(self) -> None:
        self.tenants: dict[str, TenantTimes] = {}

    def on_task_end(self, outcome: TaskOutcome) -> None:
        times = self.tenants.get(outcome.tenant)
        if times is None:
            times = self.tenants[outcome.tenant] = TenantTimes()
        times.add(outcome)

    def summary(self) -> dict[str, Any]:
        """Over all tenants."""
        return times_summary(list(self.tenants.values()))

    def write_tenants(self, file: IO[str]) -> None:
        """One CSV row a tenant, sorted by name."""
        rows = [
            {"tenant": name, "num_tasks": times.num_tasks, "num_done": len(times.completion_s)}
            | times_summary([times])
            for name, times in sorted(self.tenants.items())
        ]
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["tenant"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def times_summary(parts: Sequence[TenantTimes]) -> dict[str, Any]:
    deadlines = sum(part.num_deadlines for part in parts)
    ratios = _joined(part.finish_time_ratio for part in parts)
    return {
        **quantiles("completion_time_s", _joined(part.completion_s for part in parts)),
        **quantiles("queueing_s", _joined(part.queueing_s for part in parts)),
        **quantiles("slowdown", _joined(part.slowdown for part in parts)),
        **quantiles("finish_time_ratio", ratios),
        "max_finish_time_ratio": float(ratios.max()) if len(ratios) else None,
        "fairness_index": fairness_index(ratios),
        "deadlines_met_share": (
            sum(part.num_met for part in parts) / deadlines if deadlines else None
        ),
        "num_placements": sum(part.num_placements for part in parts),
        "num_lost_steps": sum(part.lost_steps for part in parts),
        "done_effective_tokens": sum(part.effective_tokens for part in parts),
    }


def fairness_index(values: np.ndarray) -> float | None:
    """Jain's index, from 1 / n (one has all) to 1."""
    squares = float((values**2).sum())
    return float(values.sum()) ** 2 / (len(values) * squares) if squares else None


def _joined(parts: Iterable[Sequence[float]]) -> np.ndarray:
    arrays = [np.asarray(part, dtype=np.float64) for part in parts]
    return np.concatenate(arrays) if arrays else np.empty(0)


def quantiles(name: str, values: Sequence[float] | np.ndarray) -> dict[str, float | None]:
    """mean, p50, p95 and p99 under ``mean_NAME`` and so on; None for no values."""
    if not len(values):
        return dict.fromkeys(f"{label}_{name}" for label in ("mean", "p50", "p95", "p99"))
    data = np.asarray(values, dtype=np.float64)
    p50, p95, p99 = (float(value) for value in np.quantile(data, (0.5, 0.95, 0.99)))
    return {
        f"mean_{name}": float(data.mean()),
        f"p50_{name}": p50,
        f"p95_{name}": p95,
        f"p99_{name}": p99,
    }


class PowerDraw(NamedTuple):
    """Of the GPUs. ``power_w``: by device name, 0 where it is not known."""

    power_w: Mapping[str, float] = {}
    idle_power_share: float = 0.1


NO_POWER = PowerDraw()


def fleet_summary(
    instances: Sequence[InstanceSpec],
    totals: Sequence[Any],
    end_ns: int,
    power: PowerDraw = NO_POWER,
    failed_ns: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Throughput, use of the GPUs, memory, energy and concurrency over the whole run.

    ``totals`` are ``InstanceTotals`` of the simulated executor; an instance that was started
    several times has several. A GPU that several instances share counts once among those held;
    its busy time is that of its instances, at most the run's. ``failed_ns``: by GPU, for how long
    it was down; such a GPU is held but neither busy nor idle. ``started_gpu_hours`` are those with
    an instance, which an elastic fleet pays for instead of those held.
    """
    failed_ns = failed_ns or {}
    device_of = {gpu: spec.device for spec in instances for gpu in spec.gpu_ids}
    gpus_of = {spec.instance_id: spec.gpu_ids for spec in instances}
    busy_ns, up_ns = dict.fromkeys(device_of, 0), dict.fromkeys(device_of, 0)
    for item in totals:
        for gpu in gpus_of.get(item.instance_id, ()):
            busy_ns[gpu] = min(end_ns, busy_ns[gpu] + item.busy_ns)
            up_ns[gpu] = min(end_ns, up_ns[gpu] + item.up_ns)
    lost = sum(item.lost_tokens for item in totals)
    effective = sum(item.effective_tokens for item in totals) - lost
    padded = sum(item.padded_tokens for item in totals)
    instance_busy_ns = sum(item.busy_ns for item in totals)
    held_ns = len(device_of) * end_ns
    busy, failed = sum(busy_ns.values()), sum(failed_ns.values())
    utilisation = busy / held_ns if held_ns else None
    share = effective / padded if padded else None
    return {
        "effective_tokens_per_s": effective * NS_PER_S / end_ns if end_ns else None,
        "padded_tokens_per_s": padded * NS_PER_S / end_ns if end_ns else None,
        "effective_share": share,
        "lost_tokens": lost,
        "utilisation": utilisation,
        "effective_utilisation": utilisation * share if utilisation and share else None,
        "gpu_hours": held_ns / NS_PER_HOUR,
        "busy_gpu_hours": busy / NS_PER_HOUR,
        "idle_gpu_hours": max(0, held_ns - busy - failed) / NS_PER_HOUR,
        "failed_gpu_hours": failed / NS_PER_HOUR,
        "started_gpu_hours": sum(up_ns.values()) / NS_PER_HOUR,
        "energy_kwh": energy_kwh(device_of, busy_ns, failed_ns, end_ns, power),
        **memory_headroom(instances, totals),
        "concurrent_tasks_per_instance": (
            sum(item.task_ns for item in totals) / instance_busy_ns if instance_busy_ns else None
        ),
    }


def energy_kwh(
    device_of: Mapping[str, str],
    busy_ns: Mapping[str, int],
    failed_ns: Mapping[str, int],
    end_ns: int,
    power: PowerDraw,
) -> float | None:
    """None when the power of a device is not known."""
    joules = 0.0
    for gpu, device in device_of.items():
        power_w = power.power_w.get(device, 0.0)
        if not power_w:
            return None
        idle_ns = max(0, end_ns - busy_ns[gpu] - failed_ns.get(gpu, 0))
        joules += power_w * (busy_ns[gpu] + power.idle_power_share * idle_ns) / NS_PER_S
    return joules / JOULES_PER_KWH


def memory_headroom(
    instances: Sequence[InstanceSpec], totals: Sequence[Any]
) -> dict[str, float | None]:
    """Share of the memory limit that the largest plan of an instance left free, by prediction;
    over the instances that ever had a plan."""
    limit = {spec.instance_id: spec.memory_limit_bytes for spec in instances}
    shares = [
        1.0 - item.peak_predicted_memory_bytes / limit[item.instance_id]
        for item in totals
        if item.peak_predicted_memory_bytes and item.instance_id in limit
    ]
    return {
        "min_memory_headroom": min(shares) if shares else None,
        "mean_memory_headroom": sum(shares) / len(shares) if shares else None,
    }
