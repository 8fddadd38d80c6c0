"""``muxtune profile``: measure the operations of a model on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from muxtune import build
from muxtune.commands import RUN_FILE
from muxtune.commands.profile_parts import Parts, numbered
from muxtune.commands.real_runs import idle_gpu_notice
from muxtune.config import ProfileConfig
from muxtune.cost.schema import CAPTURED, load_profile
from muxtune.errors import ConfigError, ProfileError
from muxtune.report.run_folder import SUMMARY, RunFolder, write_whole, writing
from muxtune.report.tables import format_seconds, make_console, make_table

SETTINGS = ("deterministic", "steps", "max_rows", "clock", "file")  # that parts depend on
OVERRUN, OVERRUN_S = 1.2, 5.0  # times and seconds over the budget from which it is told
MOST_NAME_BYTES = 200  # file systems allow 255, and others are named after it


def run(config: ProfileConfig, folder: RunFolder) -> dict[str, Any]:
    """Writes the profile into the folder and prints what was measured. One that is stopped goes on
    when it is run there again."""
    _check(config, folder.path)
    build.need_torch()
    from muxtune.profiling.measure import (
        SIGNS_AT_START,
        checked_request,
        device_description,
        profile_machine,
        profile_warnings_here,
        software_description,
        write_profile,
    )
    from muxtune.profiling.steps import is_lost

    device = "cpu" if config.cluster.device == build.LOCAL else config.cluster.device
    if device == "cpu" and (notice := idle_gpu_notice()):
        make_console().print(f"note: {notice}", soft_wrap=True)
    shape = build.shape_of(config.model)
    num_ranks, exchanges = build.instance_gpus(config.cluster), {}
    if num_ranks > 1:  # first, because ranks are forked, and no fork may use a GPU that we use
        from muxtune.profiling.exchanges import measure_exchanges

        exchanges = measure_exchanges(num_ranks, "cpu" if device == "cpu" else "cuda")
    asked = checked_request(shape, config.budget_s, device, config.program, config.clock)
    settings = {
        "model": shape._asdict(),
        "device": device_description(asked.device),
        "software": software_description(),
        "program": asked.style,
        **{name: getattr(config, name) for name in SETTINGS},
    }
    path, console = folder.path / config.file, make_console()
    parts = Parts(folder, settings, (SIGNS_AT_START,))
    with parts.until_written(lambda: is_lost(asked.device)) as kept:
        profile = profile_machine(
            shape,
            config.budget_s,
            device=device,
            program=config.program,
            deterministic=config.deterministic,
            steps=config.steps,
            max_rows=config.max_rows,
            clock=config.clock,
            exchanges=exchanges,
            kept=kept,
        )
        older = keep_older(path)
        write_profile(profile, path)
    console.print(make_table(_title(profile), COLUMNS, _rows(profile)))
    for line in profile_warnings_here(load_profile(path)):
        console.print(f"warning: {line}", soft_wrap=True)
    for line in _left_out(profile["quality"]["left_out"]):
        console.print(f"left out: {line}", soft_wrap=True)
    if line := overrun(profile, config.budget_s):
        console.print(line, soft_wrap=True)
    if older is not None:
        console.print(f"kept the profile that was there as {older}", soft_wrap=True)
    console.print(f"wrote {path}; use it with cost=profile cost.path={path}", soft_wrap=True)
    return {
        "model": profile["model"]["name"],
        "device": profile["device"]["name"],
        "num_ops": len(profile["ops"]),
        "num_steps": len(profile["steps"]),
        "spread": profile["quality"]["spread"],
        "num_points": sum(len(op["points"]) for op in profile["ops"].values()),
        "content_hash": profile["content_hash"],
        "path": str(path),
    }


def overrun(profile: Mapping[str, Any], budget_s: float) -> str:
    """Why it took much longer than was asked for; nothing where it did not."""
    seconds = profile["quality"]["seconds"]
    if seconds <= OVERRUN * budget_s + OVERRUN_S:
        return ""
    what = "three repeats of every operation, of which its median and interval are told"
    if profile["program"]["style"] == CAPTURED:
        what = "the operations that every prediction needs"
    if profile["steps"]:
        what += ", and the first whole steps, which tell how they add up"
    took, asked = format_seconds(seconds), format_seconds(budget_s)
    return f"took {took} of the {asked} asked for: however small budget_s is, {what}, are measured"


def keep_older(path: Path) -> Path | None:
    """A copy, beside it, of a profile that is about to be written over: under its content's hash,
    or a number where it cannot be read. Raises OutputError."""
    if not path.exists():
        return None
    with writing(path):
        content = path.read_bytes()
    try:
        kept = path.with_name(f"{path.stem}-{load_profile(path).content_hash[:8]}.json")
    except ProfileError:
        kept = numbered(path)
    if kept.exists() and kept.read_bytes() != content:
        kept = numbered(path)
    write_whole(kept, content)
    return kept


def _check(config: ProfileConfig, path: Path) -> None:
    """Before anything is measured."""
    if config.max_rows < 0:
        raise ConfigError("max_rows", f"is {config.max_rows}", "give 0 (the default) or more")
    name, problem = config.file, ""
    if not name:
        problem = "is empty"
    elif "/" in name or "\\" in name:
        problem = f"'{name}' is a path, not a name"
    elif Path(name).suffix != ".json":
        problem = f"'{name}' does not end in .json"
    elif name in (RUN_FILE, SUMMARY):
        problem = f"'{name}' is what every command writes"
    elif len(os.fsencode(name)) > MOST_NAME_BYTES:
        problem = f"is longer than {MOST_NAME_BYTES} bytes"
    elif (path / name).is_dir():
        problem = f"'{name}' is a folder in '{path}'"
    if problem:
        remedy = "Give a name such as profile.json; output_dir=PATH chooses its folder"
        raise ConfigError("file", problem, remedy)


COLUMNS = ("operation", "points", "smallest size", "time", "largest size", "time", "spread")


def _left_out(lines: Sequence[str]) -> list[str]:
    """One line for all of one reason; ``lines``: what, and behind a colon why."""
    names: dict[str, list[str]] = {}
    for line in lines:
        name, _, reason = line.partition(": ")
        names.setdefault(reason, []).append(name)
    return [f"{', '.join(found)}: {reason}" for reason, found in names.items()]


def _title(profile: dict[str, Any]) -> str:
    device = profile["device"]
    threads = f", {device['threads']} threads" if "threads" in device else ""
    return f"{profile['model']['name']} on {device.get('processor', device['name'])}{threads}"


def _rows(profile: dict[str, Any]) -> list[tuple[object, ...]]:
    return [_row(name, op["axes"], op["points"]) for name, op in sorted(profile["ops"].items())]


def _row(name: str, axes: list[str], points: list[dict[str, Any]]) -> tuple[object, ...]:
    """``spread``: the middle 90% of the repeats over the median, at a typical point."""
    ordered = sorted(points, key=lambda point: [point[axis] for axis in axes])
    first, last = ordered[0], ordered[-1]
    spread = median((point["p95_s"] - point["p05_s"]) / point["median_s"] for point in points)
    return (
        name,
        len(points),
        _size(first, axes),
        format_seconds(first["median_s"]),
        _size(last, axes),
        format_seconds(last["median_s"]),
        f"{spread:.0%}",
    )


def _size(point: dict[str, Any], axes: list[str]) -> str:
    return ", ".join(f"{axis} {point[axis]:g}" for axis in axes) or "-"
