"""One validation from a frozen profile to its report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from muxtune.cost.schema import CAPTURED, Profile
from muxtune.cost.shapes import LLAMA, ModelShape
from muxtune.errors import ConfigError
from muxtune.profiling.measure import checked_device, clock_of, profile_warnings_here
from muxtune.report.run_folder import provenance
from muxtune.validation.attempts import REPORT, Attempt
from muxtune.validation.dynamic import draw_dynamic, run_dynamic, with_prediction
from muxtune.validation.plots import draw_all
from muxtune.validation.scoring import summarise
from muxtune.validation.single_ops import run_ops
from muxtune.validation.steps import Models, Report, fits, run_steps
from muxtune.validation.suite import SuiteOptions, draw_suite

WALL = "wall"
MEMORY_SHARE = 0.85  # of the device's, above which a case is not drawn
OPS_SHARE, STEPS_FIRST_SHARE = 0.1, 0.5


class ValidationOptions(NamedTuple):
    """``budget_s``: seconds for all of it; 0 scores and draws what is there. ``max_rows``: of a
    micro-batch; 0: the largest that was profiled. ``dynamic_s``: of each dynamic run, 0: none."""

    budget_s: float
    num_cases: int = 240
    other_shapes: tuple[ModelShape, ...] = ()
    max_rows: int = 0
    max_tasks: int = 32
    case_s: float = 0.5
    dynamic_s: float = 0.0
    clock: str = ""  # as the profile was taken


def validate(
    folder: Path,
    profile_path: Path,
    options: ValidationOptions,
    report: Callable[[str, float, str], None] = lambda _what, _share, _text: None,
) -> dict[str, Any]:
    """Runs what is left of the suite within the budget and writes report.json and plots."""
    attempt = Attempt(folder, profile_path)
    profile = attempt.profile
    device = torch.device("cpu" if profile.device.get("kind") == "cpu" else "cuda")
    if options.budget_s:
        device = checked_device(device.type)
    warnings = profile_warnings_here(profile) if options.budget_s else []
    if options.dynamic_s and (options.clock or profile_clock(profile)) != WALL:
        warnings.append(
            "no dynamic runs: they take wall time, and the profile's is the process's own. Profile"
            " with clock=wall on a quiet machine"
        )
    left = _run(attempt, device, options, report) if options.budget_s else {}
    rows = [attempt.records[name].rows for name in ("steps", "ops")]
    rows.append(_with_predictions(attempt))
    summary = summarise(*rows)
    if options.budget_s:
        summary["attempt"] = attempt.conclude(summary, left)
    summary |= {
        "device": dict(profile.device),
        "software": dict(profile.software),
        "program": dict(profile.program),
        "profile": profile.content_hash,
        "clock": options.clock or profile_clock(profile),
        "left": left,
        "warnings": warnings,
        "provenance": provenance(),
    }
    (folder / REPORT).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    draw_all(folder, *rows)
    return summary


def profile_clock(profile: Profile) -> str:
    return str(profile.program.get("clock", WALL))


def _with_predictions(attempt: Attempt) -> list[dict[str, Any]]:
    """None where there is no simulator: they are added when the folder is scored elsewhere."""
    rows = attempt.records["dynamic"].rows
    try:
        import simpy  # noqa: F401
    except ImportError:
        return []
    return [with_prediction(row, attempt.profile) for row in rows]


def _run(
    attempt: Attempt,
    device: torch.device,
    options: ValidationOptions,
    report: Callable[[str, float, str], None],
) -> dict[str, int]:
    profile = attempt.profile
    clock = options.clock or profile_clock(profile)
    now = clock_of(clock, device)
    start_s = time.perf_counter()
    end_s = start_s + options.budget_s
    of: Callable[[str], Report] = lambda what: lambda share, text: report(what, share, text)  # noqa: E731
    left = {
        "ops": run_ops(
            profile, device, attempt.records["ops"],
            end_s=start_s + OPS_SHARE * options.budget_s, clock=now, report=of("operations"),
        )
    }  # fmt: skip
    cases = suite_of(profile, options)

    def steps_until(until_s: float) -> int:
        return run_steps(
            cases, profile, device, attempt.records["steps"], end_s=until_s,
            case_s=options.case_s, clock=now, report=of("steps"),
        )  # fmt: skip

    if options.dynamic_s and clock == WALL:
        # Kernels are compiled by then, which is no part of a run, and a run that is cut off later
        # has something of everything.
        steps_until(start_s + STEPS_FIRST_SHARE * options.budget_s)
        left["dynamic"] = _run_dynamic(attempt, device, options, end_s, of("dynamic runs"))
    left["steps"] = steps_until(end_s)
    return left


def _run_dynamic(
    attempt: Attempt, device: torch.device, options: ValidationOptions, end_s: float, report: Report
) -> int:
    records, profile = attempt.records["dynamic"], attempt.profile
    cases = draw_dynamic(profile, options.dynamic_s, _grid_rows(profile, options)[-1])
    todo = [case for case in cases if not records.has(case.name)]
    for number, case in enumerate(todo):
        if time.perf_counter() + options.dynamic_s > end_s:
            return len(todo) - number
        report(number / len(todo), case.name)
        try:
            records.add(run_dynamic(case, profile, device))
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            records.add({"name": case.name, "error": text})
    return 0


def suite_of(profile: Profile, options: ValidationOptions) -> list[Any]:
    limit = MEMORY_SHARE * float(profile.device["memory_bytes"])
    suite = SuiteOptions(
        options.num_cases,
        (profile.model_shape, *options.other_shapes),
        _grid_rows(profile, options),
        options.max_tasks,
        _methods(profile),
    )
    return draw_suite(profile.content_hash, suite, fits(limit, Models(profile)))


def _methods(profile: Profile) -> tuple[str, ...]:
    """Besides LoRA: those that the profile has operations of, or that eager passes compute."""
    if profile.style != CAPTURED:
        return ("ia3", "bottleneck", "prefix") if profile.model_shape.family == LLAMA else ()
    return tuple(
        method
        for method in ("ia3", "bottleneck", "prefix")
        if any(name.startswith(f"extra_{method}_") for name in profile.ops)
    )


def _grid_rows(profile: Profile, options: ValidationOptions) -> tuple[int, ...]:
    """Row counts at which products were measured."""
    products = ("frozen_forward", "linear_forward")
    found = {
        int(point["rows"])
        for name, op in profile.ops.items()
        if name.startswith(products)
        for point in op["points"]
    }
    limit = options.max_rows or max(found)
    return tuple(sorted(rows for rows in found if rows <= limit)) or (limit,)


def other_shapes(profile: Profile) -> tuple[ModelShape, ...]:
    """Base models that were not profiled: fewer blocks of the same, and narrower ones."""
    shape = profile.model_shape
    narrow = shape._replace(
        name=f"{shape.name}-narrow",
        num_layers=max(1, shape.num_layers // 4),
        hidden=shape.hidden * 3 // 4,
        num_heads=max(1, shape.num_heads * 3 // 4),
        num_kv_heads=_divisor(max(1, shape.num_heads * 3 // 4), shape.num_kv_heads),
        intermediate=shape.intermediate * 5 // 4 // 128 * 128 or shape.intermediate,
    )
    short = shape._replace(name=f"{shape.name}-short", num_layers=max(1, shape.num_layers // 4))
    return short, narrow


def _divisor(heads: int, wanted: int) -> int:
    return max(n for n in range(1, min(heads, wanted) + 1) if heads % n == 0)


def shapes_named(
    names: Sequence[str], known: Callable[[str], ModelShape]
) -> tuple[ModelShape, ...]:
    """``NAME`` or ``NAME:LAYERS``, of which the first blocks are taken."""
    shapes = []
    for name in names:
        base, _, layers = name.partition(":")
        shape = known(base)
        if layers:
            if not (layers.isdigit() and 1 <= int(layers) <= shape.num_layers):
                remedy = f"Give NAME, or NAME:LAYERS with 1 to {shape.num_layers} layers"
                raise ConfigError("models", f"'{name}'", remedy)
            shape = shape._replace(name=f"{base}-{layers}-layers", num_layers=int(layers))
        shapes.append(shape)
    return tuple(shapes)
