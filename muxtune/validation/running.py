"""One validation from a frozen profile to its report."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from muxtune.cost.schema import CAPTURED, Profile
from muxtune.cost.shapes import LLAMA, ModelShape
from muxtune.cost.sharing import sharing_warnings, worst
from muxtune.errors import ConfigError, OutputError
from muxtune.profiling.compiling import Compilers, OpJob, StepJob, step_jobs
from muxtune.profiling.machine_check import check_jobs, check_machine
from muxtune.profiling.measure import clock_of, profile_warnings_here
from muxtune.profiling.sharing import signs_at_start, signs_now
from muxtune.profiling.step_cases import StepCase
from muxtune.profiling.steps import is_lost, short_collections
from muxtune.report.run_folder import provenance, write_whole, writing
from muxtune.validation.attempts import REPORT, Attempt
from muxtune.validation.dynamic import (
    NUM_DYNAMIC,
    PLANNED_SHARE,
    DynamicCase,
    draw_dynamic,
    planned,
    run_dynamic,
    with_prediction,
)
from muxtune.validation.models import Models
from muxtune.validation.plots import draw_all
from muxtune.validation.scoring import summarise, usable, with_second_ends
from muxtune.validation.single_ops import op_jobs, run_ops
from muxtune.validation.steps import (
    Report,
    fits,
    predict_memory,
    run_again,
    run_steps,
    with_shapes,
)
from muxtune.validation.suite import SuiteOptions, draw_near_limit, draw_suite

WALL, LOCK = "wall", ".lock"
MEMORY_SHARE = 0.85  # of the device's, above which a case is not drawn
COMPILING_SHARE, OPS_SHARE = 0.33, 0.1
MOST_TIMES_AS_LONG, MOST_MORE_S = 2.0, 30.0  # a dynamic run takes than it was drawn for


class ValidationOptions(NamedTuple):
    """``budget_s``: seconds for all of it; 0 scores and draws what is there. ``max_rows``: of a
    micro-batch; 0: the largest that was profiled. ``dynamic_s``: of each dynamic run, 0: none.
    ``min_rows``, ``own_every``: see ``SuiteOptions``. ``steps_first``: share of the time for steps
    after which the dynamic runs come. ``min_repeats``: of each step. ``checks_machine``: carry the
    profile to the machine at hand first (``muxtune.cost.machine``). ``near_limit``: on a GPU, how
    many further cases nearly fill its memory."""

    budget_s: float
    num_cases: int = 240
    other_shapes: tuple[ModelShape, ...] = ()
    max_rows: int = 0
    max_tasks: int = 32
    case_s: float = 0.5
    dynamic_s: float = 0.0
    clock: str = ""  # as the profile was taken
    min_rows: int = 0
    own_every: int = 0
    steps_first: float = 0.6
    min_repeats: int = 3
    checks_machine: bool = False
    near_limit: int = 4


def validate(
    folder: Path,
    profile_path: Path,
    options: ValidationOptions,
    report: Callable[[str, float, str], None] = lambda _what, _share, _text: None,
    compilers: Compilers | None = None,
    before_runs: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Runs what is left of the suite within the budget and writes report.json and plots.
    ``compilers``: who compiles kernels ahead (default: its own); ``before_runs``: what the dynamic
    runs wait for."""
    with only_one(folder):
        return _validate(folder, profile_path, options, report, compilers, before_runs)


def _validate(
    folder: Path,
    profile_path: Path,
    options: ValidationOptions,
    report: Callable[[str, float, str], None],
    compilers: Compilers | None,
    before_runs: Callable[[], None],
) -> dict[str, Any]:
    attempt = Attempt(folder, profile_path)
    profile = attempt.profile
    device = torch.device("cpu" if profile.device.get("kind") == "cpu" else "cuda")
    if options.budget_s and device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "profile",
            f"is of a {profile.device_name}, and there is no GPU here",
            "Validate it there; budget_s=0 scores what was measured before",
        )
    warnings = profile_warnings_here(profile) if options.budget_s else []
    if options.dynamic_s and (options.clock or profile_clock(profile)) != WALL:
        warnings.append(
            "no dynamic runs: they take wall time, and the profile's is the process's own. Profile"
            " with clock=wall on a quiet machine"
        )
    if options.budget_s:
        signs = signs_at_start(device)
        for line in sharing_warnings("validation", signs):  # before the time is spent, too
            report("the device", 0.0, line)
        exact = bool(profile.program.get("deterministic", True))
        with (
            nullcontext(compilers) if compilers else Compilers(device, exact) as helpers,
            short_collections(),
        ):
            try:
                left = _run(attempt, device, options, report, helpers, before_runs)
            except (KeyboardInterrupt, SystemExit):
                for records in attempt.records.values():
                    records.forget_running()
                raise
            signs = worst([signs, signs_now(device)])
    steps = with_shapes(attempt.steps, attempt.models_here)
    predicted = attempt.predicted_runs()
    rows = [steps, attempt.records["ops"].rows, _with_predictions(attempt, predicted)]
    summary = summarise(*rows)
    if options.budget_s:
        measured_by = {"options": told(options), "commit": provenance()["git_commit"]}
        summary["attempt"] = attempt.conclude(summary, left, signs, warnings, measured_by)
    warnings = attempt.warnings() + sharing_warnings("validation", attempt.signs())
    summary |= {
        "device": dict(profile.device),
        "software": dict(profile.software),
        "program": dict(profile.program),
        "profile": profile.content_hash,
        "checked_machine": attempt.is_checked,
        "clock": options.clock or profile_clock(profile),
        "left": attempt.left(),
        "attempts": attempt.concluded(),
        "predicted_runs": predicted | {row["name"]: row["predicted"] for row in usable(rows[2])},
        "warnings": warnings,
        "provenance": provenance(),
    }
    write_whole(folder / REPORT, json.dumps(summary, indent=1) + "\n")
    draw_all(folder, profile.device_name, *rows)
    return summary


def told(options: ValidationOptions) -> dict[str, Any]:
    """Options as plain JSON, base models by their names."""
    return options._asdict() | {"other_shapes": [shape.name for shape in options.other_shapes]}


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Raises OutputError where another process validates into the folder."""
    path = folder / LOCK
    taken = OutputError(
        f"output_dir: another process validates into '{folder}'. Wait for its end, or choose "
        "another folder with output_dir=PATH"
    )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise taken from None
        # One that has just ended may have removed the file between our opening and locking it.
        if not path.exists() or not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            raise taken
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def profile_clock(profile: Profile) -> str:
    return str(profile.program.get("clock", WALL))


def _with_predictions(attempt: Attempt, before: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was predicted first stays, as it does of steps, whatever later code would say.
    None where there is no simulator: they are added when the folder is scored elsewhere."""
    found = []
    for row in attempt.records["dynamic"].rows:
        known = before.get(row["name"])
        if known is None and find_spec("simpy") is None:
            continue
        try:
            found.append(with_prediction(row, attempt.here, known))
        except Exception as error:  # what was measured of others is to be scored all the same
            found.append({**row, "error": f"no prediction: {error}"})
    return with_second_ends(found, attempt.records["runs_again"].rows)


def _run(
    attempt: Attempt,
    device: torch.device,
    options: ValidationOptions,
    report: Callable[[str, float, str], None],
    compilers: Compilers,
    before_runs: Callable[[], None],
) -> dict[str, int]:
    profile, records = attempt.profile, attempt.records
    clock = options.clock or profile_clock(profile)
    now, end_s = clock_of(clock, device), time.perf_counter() + options.budget_s
    of: Callable[[str], Report] = lambda what: lambda share, text: report(what, share, text)  # noqa: E731
    drawn, left = drawn_of(attempt, options), {}
    cases, runs = drawn.cases, drawn.runs
    if drawn.no_runs:
        report("dynamic runs", 0.0, f"none: {drawn.no_runs}")
        left = {"dynamic": NUM_DYNAMIC}
    limit_s = COMPILING_SHARE * options.budget_s
    for text in compilers.compile(jobs_of(attempt, drawn, options), of("compiling"), limit_s):
        report("compiling", 1.0, text)
    if options.checks_machine and not attempt.is_checked:
        most = grid_rows(profile, options)[-1]
        check = check_machine(profile, device, most, clock=now, report=of("checking the machine"))
        for text in check["failed"]:
            report("checking the machine", 1.0, text)
        attempt.carry_to(check)
    here, models = attempt.here, attempt.models_here
    start_s = time.perf_counter()
    left |= {
        "ops": run_ops(
            here, models, device, records["ops"],
            end_s=start_s + OPS_SHARE * (end_s - start_s), clock=now, report=of("operations"),
        )
    }  # fmt: skip

    def steps_until(until_s: float) -> int:
        return run_steps(
            cases, here, models, device, records["steps"], end_s=until_s,
            case_s=options.case_s, min_repeats=options.min_repeats, clock=now,
            report=of("steps"),
        )  # fmt: skip

    if runs:
        # A run that is cut off later has something of everything.
        steps_until(start_s + options.steps_first * (end_s - start_s))
        before_runs()
        left["dynamic"] = _run_dynamic(
            attempt, "dynamic", runs, device, options.dynamic_s, end_s, of("dynamic runs")
        )
    left["steps"] = steps_until(end_s)
    left["again"] = run_again(
        cases, records["steps"].rows, here, device, records["again"], end_s=end_s,
        case_s=options.case_s, min_repeats=options.min_repeats, clock=now, report=of("again"),
    )  # fmt: skip
    if runs:
        first = {row["name"] for row in usable(records["dynamic"].rows)}
        left["runs_again"] = _run_dynamic(
            attempt, "runs_again", [run for run in runs if run.name in first], device,
            options.dynamic_s, end_s, of("dynamic runs again"),
        )  # fmt: skip
    return left


class Drawn(NamedTuple):
    """A suite: all step cases; the dynamic runs where some are left, and their plans' steps; why
    there are no runs."""

    cases: list[StepCase]
    runs: list[DynamicCase]
    of_runs: list[StepJob]
    no_runs: str = ""


def drawn_of(attempt: Attempt, options: ValidationOptions) -> Drawn:
    """What the profile's hash draws. Needs no device."""
    cases = suite_of(attempt.models, options)
    try:
        runs = _dynamic_cases(attempt, options)
        return Drawn(cases, runs, _jobs_of_runs(runs, attempt.profile))
    except Exception as error:  # a profile that nobody can plan with has operations and steps
        return Drawn(cases, [], [], str(error))


def jobs_of(attempt: Attempt, drawn: Drawn, options: ValidationOptions) -> list[OpJob | StepJob]:
    """All that has to be compiled for what is left of a suite."""
    records, profile = attempt.records, attempt.profile
    todo = [case for case in drawn.cases if not records["steps"].has(case.name)]
    jobs = [*op_jobs(profile, records["ops"]), *_jobs_of(todo), *drawn.of_runs]
    if options.checks_machine and not attempt.is_checked:
        jobs += check_jobs(profile, grid_rows(profile, options)[-1])
    return jobs


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in what takes longer, in a process's main thread; elsewhere nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _dynamic_cases(attempt: Attempt, options: ValidationOptions) -> list[DynamicCase]:
    """None where all were run, and those that did not fail once more: drawing takes a while."""
    profile, records = attempt.profile, attempt.records
    if not options.dynamic_s or (options.clock or profile_clock(profile)) != WALL:
        return []
    first = records["dynamic"].rows
    if len(first) >= NUM_DYNAMIC and len(records["runs_again"].rows) >= len(usable(first)):
        return []
    return draw_dynamic(attempt.models, options.dynamic_s, grid_rows(profile, options)[-1])


def _jobs_of(cases: Sequence[StepCase]) -> list[StepJob]:
    return [job for case in cases for job in step_jobs(case.shape, case.plan(), case.specs())]


def _jobs_of_runs(runs: Sequence[DynamicCase], profile: Profile) -> list[StepJob]:
    """Of the plans that the simulator makes."""
    if not runs or profile.style != CAPTURED or find_spec("simpy") is None:
        return []
    shape, jobs = profile.model_shape, []
    for run in runs:
        specs = {task.task_id: task for task in run.tasks}
        for plan in planned(run, profile):
            jobs += step_jobs(shape, plan, specs)
    return jobs


def _run_dynamic(
    attempt: Attempt,
    name: str,
    cases: Sequence[DynamicCase],
    device: torch.device,
    duration_s: float,
    end_s: float,
    report: Report,
) -> int:
    """``name``: of the records; those that are in them are over. How many are left."""
    records, profile = attempt.records[name], attempt.here
    todo = [case for case in cases if not records.has(case.name)]
    for number, case in enumerate(todo):
        if time.perf_counter() + duration_s > end_s:
            return len(todo) - number
        report(number / len(todo), case.name)
        records.begin({"name": case.name})
        try:
            with limited(MOST_TIMES_AS_LONG * duration_s + MOST_MORE_S):
                found = run_dynamic(case, profile, device)
            records.add(found)
        except Exception as error:
            if is_lost(device):
                raise
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            records.add({"name": case.name, "error": text})
    return 0


def suite_of(models: Models, options: ValidationOptions) -> list[StepCase]:
    profile = models.profile
    limit = MEMORY_SHARE * profile.memory_bytes
    suite = SuiteOptions(
        options.num_cases,
        (profile.model_shape, *options.other_shapes),
        grid_rows(profile, options),
        options.max_tasks,
        _methods(profile),
        options.min_rows,
        options.own_every,
    )
    cases = draw_suite(profile.content_hash, suite, fits(limit, models))
    if profile.device.get("kind") != "gpu":  # a CPU's memory is others', too
        return cases
    framework_bytes = models(profile.model_shape).memory.options.framework_bytes
    return cases + draw_near_limit(
        profile.content_hash,
        suite,
        lambda case: framework_bytes + predict_memory(case, models(case.shape))["predicted_bytes"],
        PLANNED_SHARE * profile.memory_bytes,
        options.near_limit,
    )


def _methods(profile: Profile) -> tuple[str, ...]:
    """Besides LoRA: those that the profile has operations of, or that eager passes compute."""
    if profile.style != CAPTURED:
        return ("ia3", "bottleneck", "prefix") if profile.model_shape.family == LLAMA else ()
    return tuple(
        method
        for method in ("ia3", "bottleneck", "prefix")
        if any(name.startswith(f"extra_{method}_") for name in profile.ops)
    )


def grid_rows(profile: Profile, options: ValidationOptions) -> tuple[int, ...]:
    """Row counts at which products were measured, those of a captured pass with adapters."""
    products = ("site_forward", "linear_forward")
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
