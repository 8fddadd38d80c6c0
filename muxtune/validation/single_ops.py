"""Single operations at sizes between those of the profile, measured beside the cost model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from muxtune.cost import ops
from muxtune.cost.attention import SEQUENCES, sequence_counts
from muxtune.cost.captured import CapturedCostModel
from muxtune.cost.fused_sites import padded_rank
from muxtune.cost.profiled import ProfiledCostModel
from muxtune.cost.schema import CAPTURED, Profile
from muxtune.profiling import cases
from muxtune.profiling.bench import Bench, Case, Sweeper
from muxtune.profiling.captured_ops import CapturedOps, mixed_lengths
from muxtune.profiling.captured_profile import MIXES
from muxtune.profiling.compiling import OpJob
from muxtune.profiling.steps import is_lost
from muxtune.runtime.bank import grad_dtype_for
from muxtune.validation.models import Models
from muxtune.validation.records import Records
from muxtune.validation.steps import Report
from muxtune.validation.suite import seed_of

NUM_DRAWS = 12
_SWEEPS = 3
_ROW_STEP = 32
_MIXED = ("sst2", "openbookqa", "rte", "gsm8k", "arc_easy", "arc_challenge", "code_alpaca_2k")


def run_ops(
    profile: Profile,
    models: Models,
    device: torch.device,
    records: Records,
    *,
    end_s: float,
    clock: Callable[[], float] = time.perf_counter,
    report: Report = lambda _share, _text: None,
) -> int:
    """Draws sizes by the profile's hash and measures them until ``end_s``; how many are left."""
    model, captured = models(profile.model_shape), profile.style == CAPTURED
    draws = _draws(profile)
    todo = [(name, draw) for name, draw in draws if not records.has(name)]
    bench: Any = None
    for number, (name, draw) in enumerate(todo):
        if time.perf_counter() >= end_s:
            return len(todo) - number
        report(1.0 - (len(todo) - number) / len(draws), name)
        if bench is None:
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            exact = bool(profile.program.get("deterministic", True))
            bench = (
                CapturedOps(profile.model_shape, device, dtype, deterministic=exact, clock=clock)
                if captured
                else Bench(device, dtype, clock)
            )
        records.begin({"name": name, "ops": []})
        try:
            points: list[_Measured] = _points(bench, draw) if captured else draw(bench)
            rows = [_scored(model, *point) for point in points]
            records.add({"name": name, "ops": rows, "error": ""})
        except Exception as error:
            if is_lost(device):
                raise
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            records.add({"name": name, "ops": [], "error": text})
    return 0


def _draws(profile: Profile) -> list[tuple[str, Any]]:
    random = np.random.default_rng(seed_of(profile.content_hash) + 1)
    captured = profile.style == CAPTURED
    return list((_captured_draws if captured else _eager_draws)(profile, random))


_Measured = tuple[str, tuple[float, ...], list[float]]


def _scored(
    model: ProfiledCostModel, name: str, size: tuple[float, ...], seconds: list[float]
) -> dict[str, Any]:
    if name.startswith("attention"):
        value, width, outside = _attention_time(model, name, size)
    else:
        op = ops.Op(name, ops.BACKBONE, False, 1, size, 0.0, 0.0, 0.0, 1)
        value, width, outside = model.op_time(op)
    return {
        "op": name,
        "size": list(size),
        "predicted_s": value,
        "low_s": max(0.0, value - width),
        "high_s": value + width,
        "extrapolated": outside,
        "measured_s": float(np.median(seconds)),
        "repeats_s": seconds,
    }


def _attention_time(
    model: ProfiledCostModel, name: str, size: tuple[float, ...]
) -> tuple[float, float, bool]:
    if isinstance(model, CapturedCostModel):
        return model.attention_time(name, *size)
    rate = model.attention_rates(1)[name.startswith("attention_backward")]
    rows, pairs = size if len(size) == 2 else (size[0], size[0] * (size[0] + 1) / 2)
    value = rate.per_call_s + rows * rate.per_row_s + pairs * rate.per_unit_s
    return value, value * rate.relative_error, rows > rate.max_size


def again(
    rows: Iterable[Mapping[str, Any]], profile: Profile, model_of: Callable[[Profile], Any]
) -> list[dict[str, Any]]:
    """The same measurements beside what ``model_of`` predicts of a captured profile. Where older
    records or profiles do not tell the sequences of an attention, they are drawn again."""
    model = model_of(with_sequences(profile))
    return [{**row, "ops": [_again(model, row["name"], op) for op in row["ops"]]} for row in rows]


def _again(model: CapturedCostModel, draw: str, op: Mapping[str, Any]) -> dict[str, Any]:
    size = tuple(op["size"])
    if op["op"].startswith("attention") and len(size) == 2:
        mix, seed = draw.split(", ")[1:]
        lengths = mixed_lengths(mix, int(size[0]), int(seed))
        size = (*size, *sequence_counts(lengths).values())
    return _scored(model, op["op"], size, op["repeats_s"])


def with_sequences(profile: Profile) -> Profile:
    """An older profile's attention beside the sequences that its mixes draw."""
    ops = {
        name: {**op, "points": [*map(_drawn_again, op["points"])]}
        if profile.style == CAPTURED and name.startswith("attention")
        else op
        for name, op in profile.ops.items()
    }
    return profile._replace(ops=ops)


def _drawn_again(point: Mapping[str, Any]) -> dict[str, Any]:
    """Raises ValueError where no mix has the point's pairs."""
    if SEQUENCES[0] in point:
        return dict(point)
    for mix in MIXES:
        lengths = mixed_lengths(mix, int(point["rows"]))
        if sum(n * (n + 1) / 2 for n in lengths) == point["pairs"]:
            return {**point, **sequence_counts(lengths)}
    raise ValueError(f"no mix of {point['rows']:g} rows has {point['pairs']:g} query-key pairs")


_Call = tuple[str, tuple[Any, ...]]  # a method of CapturedOps and its arguments


def _captured_draws(profile: Profile, random: np.random.Generator) -> Iterator[tuple[str, _Call]]:
    sites = next(op for name, op in profile.ops.items() if name.startswith("site_forward"))
    largest = max(point["rows"] for point in sites["points"])
    most_slots = int(max(point["slots"] for point in sites["points"]))
    for _ in range(NUM_DRAWS):
        # Shapes have whole chunks, of which the smallest that is used has this many rows.
        rows = int(np.exp(random.uniform(np.log(largest / 32), np.log(largest))))
        rows = max(_ROW_STEP, rows // _ROW_STEP * _ROW_STEP)
        slots = int(random.integers(1, most_slots + 1))
        rank = int(random.choice((16, 32, 64)))
        yield f"{rows} rows", ("rows", (rows,))
        name = f"{slots} adapters of rank {rank}, {rows} rows"
        yield name, ("sites", (slots, rank, rows))
        mix = "+".join(sorted(random.choice(_MIXED, 2, replace=False)))
        seed = int(random.integers(1, 1000))
        yield f"attention of {rows} rows, {mix}, {seed}", ("attention", (rows, mix, seed))
    yield f"optimizer {padded_rank([24])}", ("optimizer", (4, 24))


def op_jobs(profile: Profile, records: Records) -> list[OpJob]:
    """What has to be compiled for the operations that are not in ``records``."""
    if profile.style != CAPTURED:
        return []
    calls = [call for name, call in _draws(profile) if not records.has(name)]
    return [OpJob(profile.model_shape, *call) for call in calls]


def _points(bench: CapturedOps, call: _Call) -> list[_Measured]:
    first = len(bench.points)
    getattr(bench, call[0])(*call[1])
    return [(p.name, tuple(p.sizes.values()), p.seconds) for p in bench.points[first:]]


def _eager_draws(
    profile: Profile, random: np.random.Generator
) -> Iterator[tuple[str, Callable[[Bench], list[_Measured]]]]:
    shape = profile.model_shape
    linears = list({(x.in_features, x.out_features): x for x in shape.block_linears}.values())
    points = next(op for name, op in profile.ops.items() if name.startswith("linear_"))["points"]
    least, most = (f(point["rows"] for point in points) for f in (min, max))
    exact = bool(profile.program.get("deterministic", True))
    is_cpu = profile.device.get("kind") == "cpu"
    sums = grad_dtype_for(torch.device("cpu" if is_cpu else "cuda"), exact)
    for _ in range(NUM_DRAWS):
        rows = int(np.exp(random.uniform(np.log(least), np.log(most))))
        rank, linear = int(random.integers(4, 65)), linears[int(random.integers(len(linears)))]
        length = int(random.integers(16, min(512, most) + 1))
        drawn = [
            (f"linear {linear.name} {rows}", cases.linear_case(linear, rows)),
            (f"lora {linear.name} {rank} {rows}", cases.lora_case(linear, rank, rows, sums)),
            (f"norm {rows}", cases.norm_case(shape, rows)),
            (f"activation {rows}", cases.activation_case(shape, rows)),
            (f"attention {length}", cases.attention_case(shape, length)),
        ]
        for name, case in drawn:
            yield name, lambda bench, case=case: _swept(bench, case)


def _swept(bench: Bench, case: Case) -> list[_Measured]:
    sweeper = Sweeper(bench)
    sweeper.add([case])
    for _ in range(_SWEEPS):
        sweeper.sweep()
    size = tuple(float(value) for value in case.sizes.values())
    return [
        (name, size, [op["points"][0][key] for key in ("p05_s", "median_s", "p95_s")])
        for name, op in sweeper.ops().items()
    ]
