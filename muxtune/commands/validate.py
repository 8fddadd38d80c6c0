"""``muxtune validate``: score a profile on what it cannot have known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from muxtune import build
from muxtune.config import ValidateConfig
from muxtune.cost.schema import load_profile
from muxtune.cost.shapes import model_shape
from muxtune.cost.shipped import profile_path
from muxtune.errors import ConfigError
from muxtune.report.run_folder import RunFolder
from muxtune.report.tables import make_console, make_table
from muxtune.validation.scoring import GOAL_COVERAGE, GOAL_PLANS, GOAL_TAU, GOALS

Report = Callable[[str, float, str], None]
LEAST_MAX_ROWS = 64  # two chunks of the shortest
COLUMNS = ("what", "cases", "mean", "p95", "bias", "in 90% interval", "repeats' spread", "goal")


def run(config: ValidateConfig, folder: RunFolder) -> dict[str, Any]:
    """Writes records, summary and plots into the folder; a second run there goes on."""
    build.need_torch()
    from muxtune.profiling.measure import profile_warnings_here
    from muxtune.validation.running import (
        ValidationOptions,
        other_shapes,
        shapes_named,
        validate,
    )

    _check(config)
    path = profile_path(config.profile)
    profile = load_profile(path)
    if config.budget_s:
        for line in profile_warnings_here(profile):  # before the time is spent, too
            make_console().print(f"warning: {line}", soft_wrap=True)
    shapes = shapes_named(config.models, model_shape) or other_shapes(profile)
    options = ValidationOptions(
        config.budget_s,
        config.num_cases,
        shapes,
        config.max_rows,
        config.max_tasks,
        config.case_s,
        config.dynamic_s,
        config.clock,
        config.min_rows,
        config.own_every,
        near_limit=config.near_limit,
    )
    try:
        with _progress() as report:
            summary = validate(folder.path, path, options, report)
    except (KeyboardInterrupt, SystemExit):
        folder.keep()
        text = (
            f"{folder.path}: stopped; the same command with output_dir={folder.path} goes on with "
            "what is left"
        )
        make_console(stderr=True).print(text, soft_wrap=True)
        raise
    show(summary, folder.path)
    return {
        "profile": summary["profile"],
        **{
            f"{name}_{key}": summary[name][key]
            for name in ("op", "step", "memory", "completion")
            if summary[name]
            for key in ("mean", "p95", "count")
        },
    }


def _check(config: ValidateConfig) -> None:
    if not config.profile:
        remedy = "Give what `muxtune profile` wrote, with profile=FILE"
        raise ConfigError("profile", "is not given", remedy)
    for name in ("budget_s", "case_s", "dynamic_s"):
        value = getattr(config, name)
        if not 0 <= value < float("inf"):
            raise ConfigError(name, f"is {value}", "give seconds, 0 or more")
    for name in ("num_cases", "max_tasks"):
        if getattr(config, name) < 1:
            raise ConfigError(name, f"is {getattr(config, name)}", "give at least 1")
    if config.max_rows < 0 or 0 < config.max_rows < LEAST_MAX_ROWS:
        remedy = f"give 0 (as profiled), or {LEAST_MAX_ROWS} or more"
        raise ConfigError("max_rows", f"is {config.max_rows}", remedy)
    for name in ("min_rows", "own_every", "near_limit"):
        if getattr(config, name) < 0:
            raise ConfigError(name, f"is {getattr(config, name)}", "give 0 or more")


def show(summary: dict[str, Any], path: Path) -> None:
    console = make_console()
    rows = [
        _row(name, summary[name], _goal(name, summary[name]))
        for name in ("op", "step", "memory", "completion")
        if summary[name]
    ]
    if summary["step_of_shapes"]:
        item = summary["step_of_shapes"]
        rows.append(_row("  step, by shapes alone, as planners ask", item, _goal("step", item)))
    rows += [
        _row(f"  step, {label} {value}", item, "")
        for label in ("grid", "mixed", "htasks", "shape")
        for value, item in summary["step_by"][label].items()
    ]
    console.print(make_table("Predicted against measured", COLUMNS, rows))
    of_shapes = {item["workload"]: item["tau"] for item in summary["rankings_of_shapes"]}
    for item in summary["rankings"]:
        met = (item["tau"] or 0.0) >= GOAL_TAU and item["plans"] >= GOAL_PLANS
        console.print(
            f"workload {item['workload']}: Kendall's tau {_tau(item['tau'])} of {item['plans']} "
            f"plans (goal {GOAL_TAU} of {GOAL_PLANS} plans or more: {_met(met)}; by shapes alone "
            f"{_tau(of_shapes.get(item['workload']))}); "
            f"{item['excluded']} of {item['pairs'] + item['excluded']} pairs within the repeats' "
            f"spread left out (with them {_tau(item['tau_of_all'])})",
            soft_wrap=True,
        )
    if twice := summary["run_to_run"]:
        console.print(
            f"{twice['count']} of these plans were run anew later: {twice['mean']:.1%} apart, "
            f"p95 {twice['p95']:.1%}",
            soft_wrap=True,
        )
    low, high = GOAL_COVERAGE
    for name in ("op", "step"):
        if summary[name]:
            share = summary[name]["coverage"]
            console.print(
                f"{name}: 90% intervals cover {share:.0%} (goal {low:.0%} to {high:.0%}: "
                f"{_met(low <= share <= high)})"
            )
    _show_failures(console, summary)
    for item in summary["ended_otherwise"]:
        console.print(
            f"dynamic run {item['run']}: {item['task_id']} was to be {item['predicted_state']} and "
            f"was {item['measured_state']}",
            soft_wrap=True,
        )
    for run_ in summary["dynamic"]:
        why = run_.get("error") or (run_["first_difference"] or {}).get("why", "the same decisions")
        same = run_.get("decides_the_same_again")
        later = "the same" if same else "otherwise"
        why += "" if same is None else f"; a second run decided {later}"
        console.print(f"dynamic run {run_['name']}: {why}", soft_wrap=True)
    for line in summary["warnings"]:
        console.print(f"warning: {line}", soft_wrap=True)
    for what, count in summary["left"].items():
        if count:
            console.print(f"{what}: {count} left; run again in the same folder to go on")
    for row in summary["attempts"][:-1]:
        console.print(_earlier(row), soft_wrap=True)
    console.print(f"wrote {path}", soft_wrap=True)


def _goal(name: str, item: dict[str, Any]) -> str:
    mean, tail = GOALS[name]
    at = "worst decile" if name == "completion" else "p95"
    asked = f"{mean:.0%}" + (f", {at} {tail:.0%}" if isfinite(tail) else "")
    return f"{asked}: {_met(item['met'])}"


def _met(is_met: bool) -> str:
    return "met" if is_met else "missed"


def _show_failures(console: Any, summary: dict[str, Any]) -> None:
    """What was asked and could not be measured, which no mean tells."""
    if failed := summary["failed_steps"]:
        first = failed[0]["error"]
        console.print(f"{len(failed)} steps failed, the first: {first}", soft_wrap=True)
    count = summary["predicted_to_fit_but_failed"]
    console.print(f"{count} cases failed that were to fit in memory")
    if names := summary["failed_ops"]:
        console.print(f"{len(names)} operations failed: {', '.join(names[:3])}", soft_wrap=True)


def _earlier(row: dict[str, Any]) -> str:
    """One attempt of before; every one is kept."""
    head = f"attempt {row['attempt']}, profile {row['profile'][:8]}"
    if "cut_off" in row:
        counts = ", ".join(f"{count} {name}" for name, count in row["cut_off"].items())
        return f"{head}: cut off after {counts}"
    told = [
        f"{name} {row[name]['mean']:.1%} of {row[name]['count']}" for name in GOALS if name in row
    ]
    return f"{head}: {', '.join(told) or 'nothing measured'}"


def _tau(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _row(name: str, item: dict[str, Any], goal: str) -> tuple[object, ...]:
    return (
        name,
        item["count"],
        f"{item['mean']:.1%}",
        f"{item['p95']:.1%}",
        f"{item['bias']:+.1%}",
        "-" if item["coverage"] is None else f"{item['coverage']:.0%}",
        f"{item['spread']:.1%}" if item["spread"] else "-",
        goal,
    )


@contextmanager
def _progress() -> Iterator[Report]:
    columns = (TextColumn("{task.fields[what]}"), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn()) as bar:
        task = bar.add_task("", total=1.0, what="validating")
        yield lambda what, share, text: bar.update(
            task, completed=share, description=text, what=what
        )
