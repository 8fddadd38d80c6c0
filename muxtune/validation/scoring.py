"""From records to figures: errors, intervals, rankings, beside how far repeats spread. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from muxtune.cost.calibration import spread_of
from muxtune.types import NS_PER_S
from muxtune.validation.records import ENDED

Row = Mapping[str, Any]


class Errors(NamedTuple):
    """Relative errors of predictions, as shares. ``coverage``: how many of the measured values lie
    inside the 90% interval. ``spread``: half of the middle 90% of the repeats over their median,
    at a typical case; 0 of what was measured once. ``extrapolated``: share of the cases that the
    model flagged."""

    count: int
    mean: float
    p95: float
    worst: float
    bias: float
    coverage: float | None
    spread: float
    extrapolated: float


def relative_error(row: Row, kind: str = "s") -> float:
    return row[f"predicted_{kind}"] / row[f"measured_{kind}"] - 1.0


def errors_of(rows: Sequence[Row], kind: str = "s") -> Errors | None:
    """``kind``: which unit: s or bytes. None without rows."""
    if not rows:
        return None
    errors = np.array([relative_error(row, kind) for row in rows])
    inside = [
        row[f"low_{kind}"] <= row[f"measured_{kind}"] <= row[f"high_{kind}"]
        for row in rows
        if f"low_{kind}" in row
    ]
    timed = rows if kind == "s" else ()
    spreads = [spread_of(row["repeats_s"]) for row in timed if row.get("repeats_s")]
    sizes = np.abs(errors)
    return Errors(
        len(rows),
        float(sizes.mean()),
        float(np.quantile(sizes, 0.95)),
        float(sizes.max()),
        float(errors.mean()),
        float(np.mean(inside)) if inside else None,
        float(np.median(spreads)) if spreads else 0.0,
        float(np.mean([bool(row.get("extrapolated")) for row in rows])),
    )


def usable(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if not row.get("error")]


def with_second_runs(steps: Iterable[Row], again: Iterable[Row]) -> list[dict[str, Any]]:
    """``again``: the same steps, prepared and run anew later. A step's time is the mean of both
    runs'; its repeats are those of both, so that what a device does otherwise a minute later counts
    as spread. ``runs_s``: each run's."""
    later = {row["name"]: row for row in usable(again)}
    return [
        _with_second_run(row, later[row["name"]])
        if row["name"] in later and not row.get("error")
        else dict(row)
        for row in steps
    ]


def _with_second_run(row: Row, later: Row) -> dict[str, Any]:
    runs = [row["measured_s"], later["measured_s"]]
    repeats = [*row["repeats_s"], *later["repeats_s"]]
    return {**row, "measured_s": sum(runs) / 2, "repeats_s": repeats, "runs_s": runs}


def run_to_run(rows: Iterable[Row]) -> dict[str, Any]:
    """How far two runs of a step lie apart, over their mean; empty where none was run twice."""
    pairs = [row["runs_s"] for row in usable(rows) if "runs_s" in row]
    if not pairs:
        return {}
    apart = [2 * abs(first - second) / (first + second) for first, second in pairs]
    return {
        "count": len(apart),
        "mean": float(np.mean(apart)),
        "p95": float(np.quantile(apart, 0.95)),
    }


def with_second_ends(runs: Iterable[Row], again: Iterable[Row]) -> list[dict[str, Any]]:
    """``again``: the same dynamic runs, later. A task's completion time is the mean of both, where
    it was done in both; its repeats are the two. Whether both runs decided the same is told."""
    later = {row["name"]: row["measured"] for row in usable(again)}
    return [
        _with_second_ends(run, later[run["name"]])
        if run["name"] in later and "tasks" in run and not run.get("error")
        else dict(run)
        for run in runs
    ]


def _with_second_ends(run: Row, later: Row) -> dict[str, Any]:
    tasks = []
    for task in run["tasks"]:
        both = [log["ended"][task["task_id"]] for log in (run["measured"], later)]
        seconds = [end["ended_ns"] / NS_PER_S - task["arrival_s"] for end in both]
        if {end["state"] for end in both} == {"done"}:
            task = {**task, "measured_s": sum(seconds) / 2, "repeats_s": seconds}
        tasks.append(task)
    same = run["measured"]["lines"] == later["lines"]
    return {**run, "tasks": tasks, "decides_the_same_again": same}


class Ranking(NamedTuple):
    """Kendall's tau of predicted and measured seconds per token over a workload's plans.
    ``excluded``: pairs that the repeats' spread does not tell apart, ``tau`` without them;
    ``tau_of_all``: with them."""

    workload: int
    plans: int
    pairs: int
    excluded: int
    tau: float | None
    tau_of_all: float | None


def rankings(rows: Sequence[Row]) -> list[Ranking]:
    by_workload: dict[int, list[Row]] = {}
    for row in usable(rows):
        workload = row["case"]["labels"].get("workload")
        if workload is not None:
            by_workload.setdefault(int(workload), []).append(row)
    return [_ranking(key, group) for key, group in sorted(by_workload.items())]


def _ranking(workload: int, rows: Sequence[Row]) -> Ranking:
    told, untold = [], []
    for left, right in combinations(rows, 2):
        measured = [row["measured_s"] / row["effective_tokens"] for row in (left, right)]
        predicted = [row["predicted_s"] / row["effective_tokens"] for row in (left, right)]
        noise = sum(
            value * spread_of(row["repeats_s"])
            for value, row in zip(measured, (left, right), strict=True)
        )
        agree = (measured[0] - measured[1]) * (predicted[0] - predicted[1])
        pairs = told if abs(measured[0] - measured[1]) > noise else untold
        pairs.append((agree > 0) - (agree < 0))
    return Ranking(
        workload, len(rows), len(told), len(untold), _mean(told), _mean([*told, *untold])
    )


def _mean(signs: Sequence[int]) -> float | None:
    return sum(signs) / len(signs) if signs else None


GOALS: Mapping[str, tuple[float, float]] = {
    # mean, and the 95th percentile; of completion times the 90th
    "op": (0.05, 0.12),
    "step": (0.03, 0.06),
    "memory": (0.05, float("inf")),
    "completion": (0.05, 0.08),
}


GOAL_COVERAGE = (0.85, 0.95)  # of 90% intervals
GOAL_TAU, GOAL_PLANS = 0.95, 12  # of at least so many plans


def summarise(
    steps: Sequence[Row], single_ops: Sequence[Row], dynamic: Sequence[Row]
) -> dict[str, Any]:
    """Everything that a report says, as plain JSON."""
    good = usable(steps)
    op_rows = [op for row in usable(single_ops) for op in row["ops"]]
    ends, of_shapes = finished(dynamic), by_shapes(good)
    # On a CPU a tiny model's memory may hide in what the process had freed before.
    memory = [row for row in good if row.get("measured_bytes", 0) > 0]
    groups = {
        "step": errors_of(good),
        "memory": errors_of(memory, "bytes"),
        "op": errors_of(op_rows),
        "completion": errors_of(ends),
    }
    found = {name: _scored(name, errors) for name, errors in groups.items()}
    found["step_of_shapes"] = _scored("step", errors_of(of_shapes))
    if found["completion"]:
        mean, goal = GOALS["completion"]
        worst = float(np.quantile([abs(relative_error(row)) for row in ends], 0.9))
        met = found["completion"]["mean"] <= mean and worst <= goal and not ended_otherwise(dynamic)
        found["completion"] |= {"worst_decile": worst, "met": met}
    return {
        **found,
        "step_by": {
            name: _by(good, lambda row, name=name: row["case"]["labels"].get(name))
            for name in ("grid", "mixed", "profiled_shape")
        }
        | {
            "htasks": _by(good, lambda row: len(row["case"]["htasks"]) > 1),
            "extrapolated": _by(good, lambda row: row["extrapolated"]),
            "shape": _by(good, lambda row: row["case"]["shape"]["name"]),
        },
        "memory_by": {
            "near_limit": _by(
                memory, lambda row: bool(row["case"]["labels"].get("near_limit")), "bytes"
            )
        },
        "op_by_kind": _by(op_rows, lambda row: row["op"].partition(".")[0]),
        "rankings": [item._asdict() for item in rankings(steps)],
        "rankings_of_shapes": [item._asdict() for item in rankings(of_shapes)],
        "run_to_run": run_to_run(steps),
        "failed_steps": [
            {"name": row["name"], "error": row["error"], "fit": row["predicted_bytes"]}
            for row in steps
            if row.get("error")
        ],
        # A process that was ended may have been so for memory.
        "predicted_to_fit_but_failed": sum(
            bool(row.get("out_of_memory")) or row.get("error") == ENDED for row in steps
        ),
        "failed_ops": [row["name"] for row in single_ops if row.get("error")],
        "ended_otherwise": ended_otherwise(dynamic),
        "dynamic": [_dynamic(run) for run in dynamic],
    }


def finished(dynamic: Sequence[Row]) -> list[Row]:
    """Tasks that were done both as predicted and as measured."""
    return [
        task
        for run in usable(dynamic)
        for task in run["tasks"]
        if task["predicted_state"] == task["measured_state"] == "done"
    ]


def ended_otherwise(dynamic: Sequence[Row]) -> list[dict[str, Any]]:
    """Tasks that ended in another state than predicted, whose times no mean holds."""
    keys = ("task_id", "predicted_state", "measured_state")
    return [
        {"run": run["name"], **{key: task[key] for key in keys}}
        for run in usable(dynamic)
        for task in run["tasks"]
        if task["predicted_state"] != task["measured_state"]
    ]


def by_shapes(steps: Sequence[Row]) -> list[Row]:
    """The steps beside what is predicted by their passes' shapes alone, as planners ask; those
    without such a prediction are left out."""
    return [{**row, **row["of_shapes"]} for row in steps if "of_shapes" in row]


def _scored(name: str, errors: Errors | None) -> dict[str, Any]:
    if errors is None:
        return {}
    mean, p95 = GOALS[name]
    return errors._asdict() | {"goal_mean": mean, "met": errors.mean <= mean and errors.p95 <= p95}


def _by(rows: Sequence[Row], key: Any, kind: str = "s") -> dict[str, dict[str, Any]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(key(row)), []).append(row)
    found = {name: errors_of(group, kind) for name, group in sorted(groups.items())}
    return {name: errors._asdict() for name, errors in found.items() if errors is not None}


def _dynamic(run: Row) -> dict[str, Any]:
    if run.get("error"):
        return {"name": run["name"], "error": run["error"]}
    keys = ("name", "same_completion_order", "first_difference", "drifts", "decides_the_same_again")
    return {key: run[key] for key in keys if key in run}
