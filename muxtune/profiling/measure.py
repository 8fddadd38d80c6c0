"""Measure this machine: a profile of single operations for one model.

The same code serves a CPU (fp32) and a CUDA device (bf16). Rows are measured adaptively: a coarse
grid first, then midpoints where a straight line misses the measured time.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from muxtune.cost.schema import (
    SCHEMA_VERSION,
    Profile,
    content_hash,
    parse_profile,
    profile_warnings,
)
from muxtune.cost.shapes import ModelShape, from_hf_config, model_shape
from muxtune.errors import ConfigError, OutputError
from muxtune.profiling import cases
from muxtune.profiling.bench import Bench, Case, Sweeper

ROWS = (16, 64, 256, 1024)
LENGTHS = (16, 64, 128, 256, 512, 1024)
LOSS_ROWS = (8, 64, 256)
RANKS = (4, 16, 64)
ADAPTER_ROWS = (16, 128, 1024)
ELEMENTS = (1 << 11, 1 << 14, 1 << 17)
LOAD_PARAMETERS = (1 << 14, 1 << 18, 1 << 21)
REFINE_ERROR = 0.08
MIN_SWEEPS = 3
ProgressCallback = Callable[[float, str], None]


def profile_machine(
    model: ModelShape | str | object,
    budget_s: float = 40.0,
    *,
    device: str = "cpu",
    deterministic: bool | None = None,
    rows: Sequence[int] = ROWS,
    ranks: Sequence[int] = RANKS,
    lengths: Sequence[int] = LENGTHS,
    show_progress: bool = True,
) -> dict[str, Any]:
    """A profile (the JSON of ``muxtune.cost.schema``) of ``model`` on this machine.

    ``model``: a shape, a built-in name, or a loaded transformers model (its config is read).
    ``deterministic``: adapters' gradient sums in float64, as the runtime takes them on the CPU by
    default. At least three repeats are made even when ``budget_s`` is too short for them.
    Raises ConfigError for a budget that is not positive or a device that is not there.
    """
    shape = _shape(model)
    if not 0 < budget_s < float("inf"):
        raise ConfigError("profile.budget_s", f"is {budget_s}", "give seconds, more than 0")
    target = _device(device)
    exact = target.type == "cpu" if deterministic is None else deterministic
    sum_dtype = torch.float64 if exact else torch.float32
    with _progress(show_progress) as report, torch.enable_grad():
        report(0.0, "warming up")
        bench = Bench(target, torch.float32 if target.type == "cpu" else torch.bfloat16)
        sweeper = Sweeper(bench)
        end = time.perf_counter() + budget_s
        for case_list in _all_cases(shape, rows, ranks, lengths, sum_dtype):
            sweeper.add(case_list)
        _refine_linears(shape, sweeper, rows)
        _sweep_until(sweeper, end, budget_s, report)
    raw = {
        "schema_version": SCHEMA_VERSION,
        "device": device_description(target),
        "software": software_description(),
        "model": shape._asdict(),
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "ops": _per_tensor(sweeper.ops()),
    }
    return {**raw, "content_hash": content_hash(raw)}


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


def _device(name: str) -> torch.device:
    target = torch.device("cuda" if name not in {"cpu", "cuda"} else name)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("profile.device", f"'{name}' is not there", "use cpu on this machine")
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
    kind = "cpu" if profile.device.get("kind") == "cpu" else "cuda"
    device = device_description(_device(kind))
    return profile_warnings(profile, device, software_description())


def device_description(device: torch.device) -> dict[str, Any]:
    """What a profile says of the device it was measured on."""
    if device.type == "cuda":
        figures = torch.cuda.get_device_properties(device)
        return {
            "name": figures.name,
            "kind": "gpu",
            "processor": figures.name,
            "memory_bytes": figures.total_memory,
            "cuda": torch.version.cuda,
        }
    return {
        "name": "cpu",
        "kind": "cpu",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


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
    for name in ("torch", "transformers", "triton"):
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
