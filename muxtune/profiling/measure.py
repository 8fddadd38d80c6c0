"""Measure this machine: a profile of single operations for one model.

The same code serves a CPU (fp32) and a CUDA device (bf16). What is measured are the operations of
the program that the runtime runs there: an eager pass, or the captured step. Rows are measured
adaptively: a coarse grid first, then midpoints where a straight line misses the measured time. A
few whole steps come with it, to calibrate how operations add up (``muxtune.cost.calibration``).
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from muxtune.cost.calibration import WholeStep
from muxtune.cost.devices import device_table
from muxtune.cost.schema import (
    CAPTURED,
    EAGER,
    SCHEMA_VERSION,
    Profile,
    content_hash,
    parse_profile,
    profile_warnings,
)
from muxtune.cost.shapes import LLAMA, ModelShape, from_hf_config, model_shape
from muxtune.cost.sharing import worst
from muxtune.errors import ConfigError, OutputError
from muxtune.profiling import captured_profile, cases
from muxtune.profiling.bench import Bench, Case, Sweeper, summarise
from muxtune.profiling.calibration_cases import calibration_cases, shallow, shallow_cases
from muxtune.profiling.captured_cases import few_block_cases, whole_cases
from muxtune.profiling.captured_ops import tiling_here
from muxtune.profiling.compiling import Compilers, StepJob, step_jobs
from muxtune.profiling.sharing import signs_at_start, signs_now
from muxtune.profiling.step_cases import StepCase
from muxtune.profiling.steps import StepBench, is_lost, short_collections
from muxtune.profiling.takeovers import measure_takeovers, takeover_jobs
from muxtune.runtime.bank import grad_dtype_for

ROWS = (16, 64, 256, 1024)
LENGTHS = (16, 64, 128, 256, 512, 1024)
LOSS_ROWS = (8, 64, 256)
RANKS = (4, 16, 64)
ADAPTER_ROWS = (16, 128, 1024)
ELEMENTS = (1 << 11, 1 << 14, 1 << 17)
LOAD_PARAMETERS = (1 << 14, 1 << 18, 1 << 21)
REFINE_ERROR = 0.08
MIN_SWEEPS, MIN_STEPS = 3, 3
JOIN_RANKS = (8, 32)
SIGNS_AT_START = "signs at a start"  # a part in which nothing is measured of the model
SETUP_S = 0.5
MOST_REPEATS_S = 0.5  # of one whole step
SHORT_STEP_S = 2.0  # a whole step, its repeats and preparation included
STEPS_SHARE = 0.4  # of the budget
LEAST_STEPS_SHARE = 0.25  # also where the operations took longer than theirs
SHALLOW_SHARE = 0.35  # of the time for steps, at most, for those of a few blocks
# Of captured steps more is measured: how they overlap is in no operation.
CAPTURED_STEPS_SHARE, CAPTURED_SHALLOW_SHARE = 0.45, 0.6
MAX_ROWS = {"cpu": 512, "cuda": 8192}
ProgressCallback = Callable[[float, str], None]


def profile_machine(
    model: ModelShape | str | object,
    budget_s: float = 40.0,
    *,
    device: str = "cpu",
    program: str = "auto",
    deterministic: bool | None = None,
    rows: Sequence[int] = (),
    ranks: Sequence[int] = (),
    lengths: Sequence[int] = LENGTHS,
    slots: Sequence[int] = captured_profile.SLOTS,
    steps: bool = True,
    max_rows: int = 0,
    clock: str = "wall",
    show_progress: bool = True,
    compilers: Compilers | None = None,
    tell: ProgressCallback | None = None,
    exchanges: Mapping[str, Any] = MappingProxyType({}),
    kept: captured_profile.Kept | None = None,
) -> dict[str, Any]:
    """A profile (the JSON of ``muxtune.cost.schema``) of ``model`` on this machine.

    ``model``: a shape, a built-in name, or a loaded transformers model (its config is read).
    ``program``: captured or eager; auto: as the runtime chooses, captured on CUDA.
    ``deterministic``: as the runtime is asked to run; by default it is. ``steps``: measure whole
    steps too, of up to ``max_rows`` rows. ``clock``: wall, or cpu: the process's own time, for a
    CPU that others use too (of one thread). At least three repeats are made even when ``budget_s``
    is too short for them. ``compilers``: who compiles kernels ahead (default: its own).
    ``tell``: is told of progress in place of the bar that ``show_progress`` draws. ``kept``: where
    parts are put as they come, so that a profile goes on after its process was ended.
    ``exchanges``: operations between ranks, measured before (``profiling.exchanges``).
    Raises ConfigError for a budget that is not positive or a device that is not there.
    """
    shape = _shape(model)
    target, style, now = checked_request(shape, budget_s, device, program, clock)
    exact = True if deterministic is None else deterministic
    dtype = torch.float32 if target.type == "cpu" else torch.bfloat16
    is_captured = style == CAPTURED
    steps_share = CAPTURED_STEPS_SHARE if is_captured else STEPS_SHARE
    ops_budget_s = budget_s * (1.0 - steps_share) if steps else budget_s
    signs = _signs_at_start(target, kept)
    clocks, left_out, whole = [clocks_now(target)], [], []
    most = max_rows or MAX_ROWS[target.type]
    share, begun_s = ops_budget_s / budget_s, time.perf_counter()
    with (
        nullcontext(tell) if tell else _progress(show_progress) as report,
        torch.enable_grad(),
        short_collections(),
        nullcontext(compilers) if compilers else Compilers(target, exact) as helpers,
    ):
        report(0.0, "warming up")
        if kept is not None and kept.has("operations"):
            found = next(row for row in kept.rows if row["name"] == "operations")
            ops, left_out = found["ops"], found["left_out"]
        elif style == CAPTURED:
            ops, left_out = captured_profile.measure_captured(
                shape, target, dtype, budget_s=ops_budget_s, deterministic=exact,
                rows=rows or captured_profile.rows_up_to(most), slots=slots,
                ranks=ranks or captured_profile.RANKS,
                compilers=helpers,
                steps=_step_jobs(shape, most) if steps else (),
                clock=now,
                report=lambda done, text: report(share * done, text),
                kept=kept,
            )  # fmt: skip
            ops |= _adapter_loads(Bench(target, dtype, now))
        else:
            grids = (rows or ROWS, ranks or RANKS, lengths)
            ops = _measure_eager(
                shape, Bench(target, dtype, now), ops_budget_s, exact, grids, report
            )
        clocks.append(clocks_now(target))
        if kept is not None and not kept.has("operations"):
            kept.add({"name": "operations", "ops": ops, "left_out": left_out})
        if steps:
            now_s = time.perf_counter()
            end_s = max(begun_s + budget_s, now_s + LEAST_STEPS_SHARE * budget_s)
            if few := shallow(shape):
                # First, for they are short, and nothing else tells what a pass costs once from
                # what every block costs.
                bench = StepBench(few, target, dtype, step=style, deterministic=exact, clock=now)
                shallow_share = CAPTURED_SHALLOW_SHARE if is_captured else SHALLOW_SHARE
                until_s = now_s + shallow_share * (end_s - now_s)
                wanted = (few_block_cases if is_captured else shallow_cases)(few, most)
                more, _, failed = _whole_steps(bench, wanted, until_s, report, kept)
                whole += [step._replace(num_layers=few.num_layers) for step in more]
                left_out += failed
                bench.close()
            bench = StepBench(shape, target, dtype, step=style, deterministic=exact, clock=now)
            if not is_captured:
                left_out += _add_joins(ops, bench, kept)  # before what may take longer than is left
            wanted = (whole_cases if is_captured else calibration_cases)(shape, most)
            more, captures, failed = _whole_steps(bench, wanted, end_s, report, kept)
            whole += more
            left_out += failed
            if captures:
                ops["capture"] = _capture_op(shape, captures)
            if is_captured:
                left_out += _add_takeovers(ops, bench, most, end_s, kept)
            bench.close()
        ops |= exchanges
        signs.append(signs_now(target))
        clocks.append(clocks_now(target))
    if style == CAPTURED and target.type == "cuda" and "capture" not in ops:
        left_out.append("capture: no step was captured, so its time is a guess")
    raw = {
        "schema_version": SCHEMA_VERSION,
        "device": device_description(target),
        "software": software_description(),
        "model": shape._asdict(),
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "program": _program(style, exact, clock, target),
        "ops": ops,
        "steps": [step.to_json() for step in whole],
        "clocks": {"samples": clocks},
        "quality": {
            "spread": typical_spread(ops),
            **worst(signs),
            "left_out": left_out,
            "seconds": round(time.perf_counter() - begun_s, 1),
        },
    }
    return {**raw, "content_hash": content_hash(raw)}


class Request(NamedTuple):
    """Where, which program's operations, and by which clock."""

    device: torch.device
    style: str
    now: Callable[[], float]


def checked_request(
    shape: ModelShape, budget_s: float, device: str, program: str, clock: str
) -> Request:
    """Raises ConfigError. As of ``profile_machine``."""
    if not 0 < budget_s < float("inf"):
        raise ConfigError("budget_s", f"is {budget_s}", "give seconds, more than 0")
    target = checked_device(device)
    style = program
    if program == "auto":
        style = CAPTURED if target.type == "cuda" and shape.family == LLAMA else EAGER
    if style not in (CAPTURED, EAGER):
        raise ConfigError("program", f"is '{program}'", "Choose auto, captured or eager")
    return Request(target, style, clock_of(clock, target))


def _signs_at_start(
    device: torch.device, kept: captured_profile.Kept | None
) -> list[dict[str, float]]:
    """Also of processes that measured parts of the profile before and were ended."""
    now = signs_at_start(device)
    if kept is None or not now:
        return [now]
    kept.add({"name": SIGNS_AT_START, "signs": now})
    return [row["signs"] for row in kept.rows if row["name"] == SIGNS_AT_START]


def _program(style: str, deterministic: bool, clock: str, device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"style": style, "deterministic": deterministic, "clock": clock}
    if style == CAPTURED and device.type == "cuda":
        found["tiles"] = tiling_here()
    return found


def clock_of(name: str, device: torch.device) -> Callable[[], float]:
    """Raises ConfigError for one that does not exist or cannot be used there."""
    if name == "wall":
        return time.perf_counter
    if name != "cpu" or device.type != "cpu" or torch.get_num_threads() > 1:
        problem = f"'{name}' is not for {device.type} and {torch.get_num_threads()} threads"
        raise ConfigError("clock", problem, "choose wall, or cpu with OMP_NUM_THREADS=1 on a CPU")
    return time.process_time


def _measure_eager(
    shape: ModelShape,
    bench: Bench,
    budget_s: float,
    exact: bool,
    grids: tuple[Sequence[int], Sequence[int], Sequence[int]],
    report: ProgressCallback,
) -> dict[str, Any]:
    sweeper = Sweeper(bench)
    sum_dtype = grad_dtype_for(bench.device, exact)
    end = time.perf_counter() + budget_s
    for case_list in _all_cases(shape, *grids, sum_dtype):
        sweeper.add(case_list)
    _refine_linears(shape, sweeper, grids[0])
    _sweep_until(sweeper, end, budget_s, report)
    return _per_tensor(sweeper.ops())


def _adapter_loads(bench: Bench) -> dict[str, Any]:
    sweeper = Sweeper(bench)
    sweeper.add([cases.adapter_load_case(count) for count in (*LOAD_PARAMETERS, 1 << 24)])
    for _ in range(MIN_SWEEPS):
        sweeper.sweep()
    return sweeper.ops()


def _step_jobs(shape: ModelShape, max_rows: int) -> list[StepJob]:
    """Of captured steps."""
    wanted = [
        *whole_cases(shape, max_rows),
        *(few_block_cases(few, max_rows) if (few := shallow(shape)) else ()),
    ]
    jobs = [job for case in wanted for job in step_jobs(shape, case.plan(), case.specs())]
    return [*jobs, *takeover_jobs(shape, max_rows)]


def _whole_steps(
    bench: StepBench,
    wanted: Sequence[StepCase],
    end_s: float,
    report: ProgressCallback,
    kept: captured_profile.Kept | None,
) -> tuple[list[WholeStep], list[float], list[str]]:
    """(steps, seconds of each capture, what is missing and why). The first one always runs, two
    more also when the budget is used up, if they are short."""
    steps: list[WholeStep] = []
    captures, missing = [], []
    per_row_s = 0.0
    for number, case in enumerate(wanted):
        if kept is not None and kept.has(case.name):
            row = next(row for row in kept.rows if row["name"] == case.name)
            if "step" in row:
                steps.append(WholeStep.of_json(row["step"]))
                captures += row["captures"]
            else:
                missing.append(f"{case.name}: {row['error']}")
            continue
        left_s = end_s - time.perf_counter()
        about_s = SETUP_S + per_row_s * case.micro_batch_tokens
        spared_s = SHORT_STEP_S if number < MIN_STEPS else 0.0
        if number and about_s > max(left_s, spared_s):
            missing.append(f"{case.name}: the budget was used up")
            continue
        report(1.0 - LEAST_STEPS_SHARE * (1 - number / len(wanted)), case.name)
        if kept is not None:
            kept.begin({"name": case.name})
        try:
            share_s = left_s / (len(wanted) - number) / 2
            found = bench.run(case, min(max(0.0, share_s), MOST_REPEATS_S))
        except Exception as error:
            if is_lost(bench.device):
                raise
            missing.append(f"{case.name}: {type(error).__name__}: {' '.join(str(error).split())}")
            continue
        times_s, peak_bytes = found.repeats_s, found.peak_bytes
        steps.append(WholeStep(case.name, found.loads, times_s, peak_bytes, len(case.tasks)))
        captures += found.capture_s.values()
        if kept is not None:
            row = {"step": steps[-1].to_json(), "captures": list(found.capture_s.values())}
            kept.add({"name": case.name, **row})
        # To warm up, and three repeats; what was compiled says nothing of the next one.
        per_row_s = 4 * median(times_s) / case.micro_batch_tokens
    return steps, captures, missing


def _add_takeovers(
    ops: dict[str, Any],
    bench: StepBench,
    max_rows: int,
    end_s: float,
    kept: captured_profile.Kept | None,
) -> list[str]:
    """What plans and ends of tasks cost on the executor that trains. What went wrong."""
    if kept is not None and kept.has("takeovers"):
        row = next(row for row in kept.rows if row["name"] == "takeovers")
        ops |= row.get("ops", {})
        return [f"takeovers: {row['error']}"] if row.get("error") else []
    if kept is not None:
        kept.begin({"name": "takeovers"})
    try:
        found = measure_takeovers(
            bench.shape, bench.store, step=bench.options.step,
            deterministic=bench.options.deterministic, max_rows=max_rows, end_s=end_s,
        )  # fmt: skip
    except Exception as error:
        if is_lost(bench.device):
            raise
        return [f"takeovers: {type(error).__name__}: {' '.join(str(error).split())[:300]}"]
    ops |= found
    if kept is not None:
        kept.add({"name": "takeovers", "ops": found})
    return []


def _add_joins(
    ops: dict[str, Any], bench: StepBench, kept: captured_profile.Kept | None
) -> list[str]:
    """Making a task and putting it in its place, and moving it, by trained numbers. What went
    wrong."""
    wrong = []
    for name, measure in (("join", bench.joins), ("move", bench.moves)):
        if kept is not None and kept.has(name):
            row = next(row for row in kept.rows if row["name"] == name)
            ops |= row.get("ops", {})
            wrong += [f"{name}: {row['error']}"] if row.get("error") else []
            continue
        if kept is not None:
            kept.begin({"name": name})
        try:
            found = [measure(rank) for rank in JOIN_RANKS]
        except Exception as error:
            if is_lost(bench.device):
                raise
            wrong.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())}")
            continue
        points = [{"parameters": float(count), **summarise(seconds)} for count, seconds in found]
        ops[name] = {"unit": "s", "axes": ["parameters"], "points": points}
        if kept is not None:
            kept.add({"name": name, "ops": {name: ops[name]}})
    return wrong


def _capture_op(shape: ModelShape, seconds: Sequence[float]) -> dict[str, Any]:
    """Of kernels that are compiled already, which the median tells."""
    point = {"layers": float(shape.num_layers), **summarise(sorted(seconds))}
    return {"unit": "s", "axes": ["layers"], "points": [point]}


def typical_spread(ops: dict[str, Any]) -> float:
    """The middle 90% of a point's repeats over their median, at a typical point."""
    spreads = [
        (point["p95_s"] - point["p05_s"]) / point["median_s"]
        for op in ops.values()
        for point in op["points"]
    ]
    return median(spreads) if spreads else 0.0


def clocks_now(device: torch.device) -> dict[str, Any]:
    """Clocks, power and temperature of a GPU as it stands, where the driver tells; else the load
    of the machine."""
    if device.type != "cuda":
        return {"load_average": os.getloadavg()[0]}
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu,utilization.gpu"
    text = _nvidia_smi(f"--query-gpu={fields}")
    values = [value.strip() for value in text.split(",")]
    return dict(zip(fields.split(","), values, strict=False)) if text else {}


def _nvidia_smi(query: str) -> str:
    """The first GPU's line, or nothing where the tool is not there."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else ""


def write_profile(profile: dict[str, Any], path: str | Path) -> Path:
    """Checks the profile and writes it whole or not at all. Raises OutputError."""
    parse_profile(profile)
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(profile, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise OutputError(f"{target}: the profile cannot be written ({error})") from error
    return target


def _shape(model: ModelShape | str | object) -> ModelShape:
    if isinstance(model, ModelShape):
        return model
    if isinstance(model, str):
        return model_shape(model)
    return from_hf_config(getattr(model, "config", model))


def checked_device(name: str) -> torch.device:
    target = torch.device("cuda" if name not in {"cpu", "cuda"} else name)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "cluster.device", f"there is no GPU for '{name}'", "choose cluster=local_cpu"
        )
    return target


def _all_cases(
    shape: ModelShape,
    rows: Sequence[int],
    ranks: Sequence[int],
    lengths: Sequence[int],
    sum_dtype: torch.dtype,
) -> Iterator[list[Case]]:
    linears = _distinct_linears(shape)
    for linear in linears:
        yield [cases.linear_case(linear, count) for count in rows]
    simple = [cases.norm_case, cases.activation_case, cases.add_case, cases.embedding_case]
    for make in [*simple, cases.rotary_case] if shape.rotary else simple:
        yield [make(shape, count) for count in rows]
    yield [cases.attention_case(shape, length) for length in lengths]
    yield [cases.loss_case(shape, count) for count in LOSS_ROWS]
    for linear in linears:
        yield [
            cases.lora_case(linear, rank, count, sum_dtype)
            for rank in ranks
            for count in sorted({min(count, max(rows)) for count in ADAPTER_ROWS})
        ]
    for in_features in sorted({linear.in_features for linear in linears}):
        yield [cases.dropout_case(in_features, count) for count in rows]
    yield [cases.adamw_case(count, sum_dtype) for count in ELEMENTS]
    yield [cases.adapter_load_case(count) for count in LOAD_PARAMETERS]
    yield [cases.layer_overhead_case(shape)]


def _distinct_linears(shape: ModelShape):
    by_size = {(item.in_features, item.out_features): item for item in shape.block_linears}
    return list(by_size.values())


def _refine_linears(shape: ModelShape, sweeper: Sweeper, rows: Sequence[int]) -> None:
    """Adds midpoints of the rows grid where a line between neighbours is off, twice at most."""
    for linear in _distinct_linears(shape):
        times = {count: sweeper.rough_s(cases.linear_case(linear, count)) for count in rows}
        for _ in range(2):
            middles = [int(math.sqrt(a * b)) for a, b in pairwise(sorted(times)) if b >= a + 8]
            measured = {m: sweeper.rough_s(cases.linear_case(linear, m)) for m in middles}
            bent = [m for m in middles if _off(times, m, measured[m]) > REFINE_ERROR]
            sweeper.add([cases.linear_case(linear, count) for count in bent])
            times.update({count: measured[count] for count in bent})


def _off(times: dict[int, float], rows: int, measured_s: float) -> float:
    """Relative error of the straight line between the known neighbours of ``rows``."""
    below, above = max(r for r in times if r < rows), min(r for r in times if r > rows)
    share = (rows - below) / (above - below)
    line = times[below] + share * (times[above] - times[below])
    return abs(line - measured_s) / measured_s


def _sweep_until(sweeper: Sweeper, end: float, budget_s: float, report: ProgressCallback) -> None:
    longest = 0.0
    while sweeper.num_sweeps < MIN_SWEEPS or time.perf_counter() + longest < end:
        start = time.perf_counter()
        sweeper.sweep()
        longest = max(longest, time.perf_counter() - start)
        left = max(0.0, end - time.perf_counter())
        report(1.0 - left / budget_s, f"sweep {sweeper.num_sweeps}")
    report(1.0, f"{sweeper.num_sweeps} sweeps")


def _per_tensor(ops: dict[str, Any]) -> dict[str, Any]:
    """An optimizer call is measured on a list of tensors; the profile holds one tensor's share."""
    for point in ops["adamw"]["points"]:
        for name in ("median_s", "p05_s", "p95_s"):
            point[name] /= cases.TENSORS_PER_STEP
    return ops


def profile_warnings_here(profile: Profile) -> list[str]:
    """In which respects this machine differs from the profiled one; empty: in none."""
    is_gpu = profile.device.get("kind") != "cpu" and torch.cuda.is_available()
    device = device_description(torch.device("cuda" if is_gpu else "cpu"))
    return profile_warnings(profile, device, software_description())


def device_description(device: torch.device) -> dict[str, Any]:
    """What a profile says of the device it was measured on."""
    if device.type == "cuda":
        figures = torch.cuda.get_device_properties(device)
        return {
            "name": short_device_name(figures.name),
            "kind": "gpu",
            "processor": figures.name,
            "memory_bytes": figures.total_memory,
            "cuda": torch.version.cuda,
            "driver": _nvidia_smi("--query-gpu=driver_version"),
        }
    return {
        "name": "cpu",
        "kind": "cpu",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def short_device_name(full: str) -> str:
    """The name in the device table of what a driver calls by a longer one, where it is there:
    ``NVIDIA H100 80GB HBM3`` is ``H100-SXM``."""
    words = full.lower().replace("-", " ").split()
    scores = {}
    for name in device_table():
        family, *rest = name.lower().split("-")
        if family in words:
            matched = sum(any(word.startswith(part) for word in words) for part in rest)
            # Without a word for it, a part is the common one for servers.
            scores[name] = (matched, "sxm" in rest)
    return max(scores, key=lambda name: scores[name]) if scores else full


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def software_description() -> dict[str, str]:
    """Versions that a profile's times depend on."""
    found = {"python": platform.python_version()}
    for name in ("muxtune", "torch", "transformers", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def _progress(show: bool) -> Iterator[ProgressCallback]:
    if not show:
        yield lambda _share, _text: None
        return
    columns = (TextColumn("profiling"), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn()) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda share, text: bar.update(task, completed=share, description=text)
