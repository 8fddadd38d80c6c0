"""Step configurations on the real runners beside the cost model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from muxtune.cost.profiled import ProfiledCostModel
from muxtune.cost.schema import Profile
from muxtune.cost.shapes import ModelShape
from muxtune.errors import ConfigError
from muxtune.planning.step_builder import StepBuilder, pass_load
from muxtune.profiling.step_cases import StepCase, case_from_json, case_to_json
from muxtune.profiling.steps import StepBench, is_lost, whole_rounds
from muxtune.types import PassLoad, ReplicaShape
from muxtune.validation.models import Models
from muxtune.validation.records import Records
from muxtune.workload.synthetic import SyntheticLibrary

Report = Callable[[float, str], None]
_SOLO = ReplicaShape()


def predict(case: StepCase, model: ProfiledCostModel) -> dict[str, Any]:
    """Seconds and bytes of the passes that ``StepBench`` runs for the case, without a device."""
    plan, library = case.plan(), SyntheticLibrary(0)
    for spec in case.specs().values():
        library.add(spec)
    num_rounds, batches = whole_rounds(plan, library, StepBuilder())
    loads = [pass_load(batch, library) for batch in batches]
    times = model.pass_times_s(loads, _SOLO)
    parts: dict[str, float] = {}
    for load in loads:
        for category, seconds in model.breakdown_s(load).items():
            parts[category] = parts.get(category, 0.0) + seconds
    return {
        "predicted_s": float(times.value.sum()),
        "low_s": float(times.low.sum()),
        "high_s": float(times.high.sum()),
        "extrapolated": bool(times.extrapolated.any()),
        "breakdown_s": parts,
        "passes": len(loads),
        "rounds": num_rounds,
        "rows": sum(load.shape.padded_tokens for load in loads),
        "of_shapes": _of_shapes(loads, model),
        **predict_memory(case, model),
    }


def _of_shapes(loads: Sequence[PassLoad], model: ProfiledCostModel) -> dict[str, float]:
    """The same by the passes' shapes and sums alone, which is all that a planner knows of them."""
    times = model.pass_times_s([load._replace(layout=None) for load in loads], _SOLO)
    sums = {"predicted_s": times.value, "low_s": times.low, "high_s": times.high}
    return {name: float(values.sum()) for name, values in sums.items()}


def with_shapes(rows: Iterable[Mapping[str, Any]], models: Models) -> list[dict[str, Any]]:
    """Records of before they held what is predicted by shapes alone, with what is so now."""
    found = []
    for row in rows:
        more = {}
        if not row.get("error") and "of_shapes" not in row:
            case = case_from_json(row["case"])
            more = {"of_shapes": predict(case, models(case.shape))["of_shapes"]}
        found.append({**row, **more})
    return found


def predict_memory(case: StepCase, model: ProfiledCostModel) -> dict[str, float]:
    """Without what the framework itself takes, which no allocator counts."""
    ledgers = model.memory_ledger_bytes(case.plan())
    framework = model.memory.options.framework_bytes
    peak = ledgers.peak
    return {
        "predicted_bytes": peak.value - framework,
        "low_bytes": peak.low - framework,
        "high_bytes": peak.high - framework,
    }


def fits(limit_bytes: float, models: Models) -> Callable[[StepCase], bool]:
    return lambda case: predict_memory(case, models(case.shape))["predicted_bytes"] <= limit_bytes


def run_steps(
    cases: Sequence[StepCase],
    profile: Profile,
    models: Models,
    device: torch.device,
    records: Records,
    *,
    end_s: float,
    case_s: float = 1.0,
    min_repeats: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    report: Report = lambda _share, _text: None,
) -> int:
    """Runs what is not in ``records`` yet until ``end_s`` (``time.perf_counter``); how many are
    left. Cases that fail are recorded with their error."""
    _check_same_suite(cases, records)

    def predicted(case: StepCase) -> dict[str, Any]:
        return {"case": case_to_json(case), **predict(case, models(case.shape))}

    def measured(case: StepCase, bench: StepBench) -> dict[str, Any]:
        return _measured(case, bench, case_s, min_repeats)

    benches = _Benches(profile, device, clock)
    return _run_each(cases, benches, records, end_s, predicted, measured, report)


def run_again(
    cases: Sequence[StepCase],
    first_runs: Sequence[Mapping[str, Any]],
    profile: Profile,
    device: torch.device,
    records: Records,
    *,
    end_s: float,
    case_s: float = 1.0,
    min_repeats: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    report: Report = lambda _share, _text: None,
) -> int:
    """Prepares and runs the plans of the rankings anew, in the order of before: what a run differs
    by from the same one a minute later, its own repeats do not show. As ``run_steps``."""
    good = {row["name"] for row in first_runs if not row.get("error")}
    ranked = [case for case in cases if "workload" in case.labels and case.name in good]

    def measured(case: StepCase, bench: StepBench) -> dict[str, Any]:
        found = _measured(case, bench, case_s, min_repeats)
        return {key: found[key] for key in ("measured_s", "repeats_s", "error") if key in found}

    benches = _Benches(profile, device, clock)
    return _run_each(ranked, benches, records, end_s, lambda _: {}, measured, report)


def _run_each(
    cases: Sequence[StepCase],
    benches: _Benches,
    records: Records,
    end_s: float,
    known: Callable[[StepCase], dict[str, Any]],
    measured: Callable[[StepCase, StepBench], dict[str, Any]],
    report: Report,
) -> int:
    """Those without a record, until ``end_s``; how many are left."""
    todo, left = [case for case in cases if not records.has(case.name)], 0
    for number, case in enumerate(todo):
        if time.perf_counter() >= end_s:
            left = len(todo) - number
            break
        done = 1.0 - (len(todo) - number) / len(cases)
        report(done, f"{case.name} ({case.shape.name}, {len(case.tasks)} tasks)")
        bench = benches.of(case.shape)
        row = {"name": case.name, **known(case)}
        records.begin(row)
        records.add(row | measured(case, bench))
    benches.close()
    return left


class _Benches:
    """One at a time: the last one's model goes when another is asked for."""

    def __init__(self, profile: Profile, device: torch.device, clock: Callable[[], float]) -> None:
        self._profile, self._device, self._clock = profile, device, clock
        self._bench: StepBench | None = None

    def of(self, shape: ModelShape) -> StepBench:
        if self._bench is None or self._bench.shape != shape:
            self.close()
            self._bench = bench_of(self._profile, shape, self._device, self._clock)
        return self._bench

    def close(self) -> None:
        if self._bench is not None:
            self._bench.close()
            self._bench = None


def again(
    rows: Iterable[Mapping[str, Any]], model_of: Callable[[ModelShape], ProfiledCostModel]
) -> list[dict[str, Any]]:
    """The same measurements beside what other models predict."""
    cases = [(row, case_from_json(row["case"])) for row in rows]
    return [{**row, **predict(case, model_of(case.shape))} for row, case in cases]


def _check_same_suite(cases: Sequence[StepCase], records: Records) -> None:
    drawn = {case.name: case_to_json(case) for case in cases}
    for row in records.rows:
        if row["name"] in drawn and row["case"] != json.loads(json.dumps(drawn[row["name"]])):
            raise ConfigError(
                "output_dir",
                f"'{records.path.parent}' holds records of another suite ('{row['name']}' differs)",
                "Give num_cases, max_rows, max_tasks and models as before, or another folder",
            )


def bench_of(
    profile: Profile, shape: ModelShape, device: torch.device, clock: Callable[[], float]
) -> StepBench:
    """The program that was profiled, as it was asked to run."""
    return StepBench(
        shape,
        device,
        torch.bfloat16 if device.type == "cuda" else torch.float32,
        step=profile.style,
        deterministic=bool(profile.program.get("deterministic", True)),
        clock=clock,
    )


def _measured(case: StepCase, bench: StepBench, case_s: float, min_repeats: int) -> dict[str, Any]:
    try:
        found = bench.run(case, case_s, min_repeats)
    except Exception as error:
        if is_lost(bench.device):
            raise
        text = " ".join(str(error).split())[:500]
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        is_memory = known or "OutOfMemoryError" in text
        return {"error": f"{type(error).__name__}: {text}", "out_of_memory": is_memory}
    return {
        "measured_s": float(np.median(found.repeats_s)),
        "repeats_s": list(found.repeats_s),
        "measured_bytes": found.peak_bytes,
        "effective_tokens": found.effective_tokens,
        "capture_s": {str(rows): seconds for rows, seconds in found.capture_s.items()},
        "setup_s": found.setup_s,
        "error": "",
    }
