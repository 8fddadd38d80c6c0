"""``muxtune capacity``: the smallest fleet that keeps a service level, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from muxtune import build
from muxtune.capacity.choices import PolicyChoice, policy_choices
from muxtune.capacity.jobs import crew
from muxtune.capacity.prices import Price, prices_of
from muxtune.capacity.service import ServiceLevel
from muxtune.capacity.study import Row, Study, run_study
from muxtune.config import CapacityConfig, TraceWorkload
from muxtune.cost.book import ANALYTIC, EXTRAPOLATED
from muxtune.cost.devices import DeviceFigures
from muxtune.errors import ConfigError
from muxtune.report.capacity_figures import draw_all
from muxtune.report.capacity_page import shown, write_page, write_tables
from muxtune.report.progress import StageProgress
from muxtune.report.run_folder import RunFolder
from muxtune.report.tables import make_console, make_table
from muxtune.workload.traces import read_trace


def run(config: CapacityConfig, folder: RunFolder) -> dict[str, Any]:
    """Writes tables (CSV and Parquet), pictures and report.html; returns the summary."""
    started_s = time.perf_counter()
    check(config)
    devices = config.devices or [config.cluster.device]
    prices = prices_of(devices, config.prices, config.sensitivity.price)
    figures = {device: _figures(config, device) for device in devices}
    choices = policy_choices(config.policies, config.baseline)
    study = _study(config, choices, prices, figures)
    tables: dict[str, Any] = dict(study.tables)
    for row in tables["answers"]:
        choice = next(choice for choice in choices if choice.name == row["policy"])
        row["figures"] = _kind_of_figures(config, choice, row["device"])
    drawings = draw_all(folder.path, tables)
    points = [row for drawing in drawings for row in drawing.rows]
    tables["figures"] = [{"row": number} | row for number, row in enumerate(points)]
    write_tables(folder, tables)
    notes = _notes(study, config)
    write_page(folder.path, tables, drawings, notes)
    _show(folder, study, notes)
    summary = _summary(config, study) | {"wall_time_s": time.perf_counter() - started_s}
    return summary


def check(config: CapacityConfig) -> None:
    """Raises ConfigError or DataError for what can be seen to be wrong before anything is
    simulated."""
    ServiceLevel(**vars(config.service_level)).checked()
    for name, low in (("num_seeds", 1), ("max_gpus", 1), ("workers", 0)):
        if getattr(config, name) < low:
            raise ConfigError(name, f"is {getattr(config, name)}", f"Give at least {low}")
    if not 0 <= config.warmup_share < 1:
        raise ConfigError("warmup_share", f"is {config.warmup_share}", "Give a number in [0, 1)")
    if not config.hours_per_month > 0:
        raise ConfigError("hours_per_month", f"is {config.hours_per_month}", "Give 730, or so")
    for name in ("load", "lengths", "times", "price"):
        value = getattr(config.sensitivity, name)
        if value is not None and not 0 <= value < 1:
            raise ConfigError(f"sensitivity.{name}", f"is {value}", "Give a number in [0, 1)")
    if config.workload.kind == "tasks" and getattr(config.workload, "tasks_file", ""):
        remedy = "Give a trace with the arrivals, workload=trace workload.trace=FILE"
        raise ConfigError("workload", "real data says nothing of arrivals to come", remedy)
    cluster = config.cluster
    if cluster.pools or cluster.replicas or build.fleet_changes(cluster):
        remedy = "Name kinds with devices=[...]; `muxtune simulate` plays the rest"
        problem = "a capacity answer is a fleet of one kind that neither fails, grows nor preempts"
        raise ConfigError("cluster", problem, remedy)
    if any(not isinstance(name, str) for name in config.devices):
        remedy = "Give names of devices, such as devices=[H100-SXM]"
        raise ConfigError("devices", f"are {config.devices}", remedy)
    if len(set(config.devices)) != len(config.devices):
        raise ConfigError("devices", "names a device twice", "Give each once")
    if isinstance(config.workload, TraceWorkload):
        read_trace(config.workload.trace)  # a bad line is told before workers are started


def _figures(config: CapacityConfig, device: str) -> DeviceFigures:
    return build.figures_of(replace(config.cluster, device=device))


def _kind_of_figures(config: CapacityConfig, choice: PolicyChoice, device: str) -> str:
    cluster = replace(config.cluster, device=device)
    cost = replace(config.cost, **choice.cost)
    book = build.published_costs(replace(config, cluster=cluster, cost=cost))
    return book.origin(config.model.name, device)


def _study(
    config: CapacityConfig,
    choices: Sequence[PolicyChoice],
    prices: Mapping[str, Price],
    figures: Mapping[str, DeviceFigures],
) -> Study:
    with StageProgress() as display, crew(config, choices) as workers:
        workers.told = display.on_progress
        return run_study(config, choices, prices, figures, workers)


def _notes(study: Study, config: CapacityConfig) -> list[str]:
    """What a reader of the answer has to know besides it."""
    notes = []
    if config.num_seeds < 5:
        notes.append("Few draws: read the intervals with care.")
    if config.workload.kind == "trace":
        notes.append(
            "Draws of a trace differ in what the trace does not tell; its arrivals are the same "
            "in all of them, so the intervals do not tell how another month would differ."
        )
    odd = [row for row in study.tables["answers"] if not row["monotone"]]
    for row in odd:
        notes.append(
            f"{row['policy']} on {row['device']}: a larger fleet served worse than a smaller one "
            "somewhere; the answer is the size above which none that was looked at fails."
        )
    for device in dict.fromkeys(row["device"] for row in study.tables["answers"]):
        stale = [
            row["text"]
            for row in study.tables["question"]
            if row["name"].startswith(f"price of {device} ") and "undated" in row["text"]
        ]
        if stale:
            notes.append(f"The price of {device} is undated: check it before quoting.")
    return notes


SHOWN = (
    *("policy", "device", "feasible", "num_gpus", "usd_per_month", "usd_per_million_tokens"),
    *("saving_same_device", "served_share"),
    *("p95_start_delay_s", "mean_completion_time_s", "p99_completion_time_s"),
)
HEADINGS = (
    *("policy", "device", "keeps level", "GPUs", "USD a month", "USD per M tokens"),
    *("saving", "served", "p95 queue", "mean completion", "p99 completion"),
)


def _show(folder: RunFolder, study: Study, notes: Sequence[str]) -> None:
    console = make_console()
    rows = [[shown(name, row[name]) for name in SHOWN] for row in study.tables["answers"]]
    console.print(make_table("Smallest fleets that keep the service level", HEADINGS, rows))
    for row in study.tables["answers"]:
        if not row["feasible"]:
            best = f"the best that can be had is {row['served_share']:.1%} of the tasks"
            what = f"{row['policy']} on {row['device']}: {row['reason']}; {best}"
            console.print(f"note: {what}, with {row['num_gpus']} GPUs", soft_wrap=True)
    if any(row["figures"] == ANALYTIC for row in study.tables["answers"]):
        notes = ["device figures are analytic: nothing was measured on the devices", *notes]
    if any(row["figures"] == EXTRAPOLATED for row in study.tables["answers"]):
        notes = ["times are extrapolated from the profile of another base model", *notes]
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True)
    console.print(f"wrote {folder.path / 'report.html'}", soft_wrap=True)


def _summary(config: CapacityConfig, study: Study) -> dict[str, Any]:
    answers = study.tables["answers"]
    best: Row = next((row for row in answers if row["recommended"]), {})
    names = (
        *("policy", "device", "num_gpus", "usd_per_month", "usd_per_million_tokens"),
        *("saving_best_baseline", "served_share", "mean_completion_time_s"),
    )
    return {
        "model": config.model.name,
        "workload": config.workload.kind,
        "load": getattr(config.workload, "load", None),
        "num_feasible": sum(row["feasible"] for row in answers),
        **{name: best.get(name) for name in names},
        "seed": config.seed,
    }
