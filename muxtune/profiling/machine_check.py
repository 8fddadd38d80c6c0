"""The short check by which a profile is carried to the machine at hand (``muxtune.cost.machine``).

It repeats points that the profile holds, so that it needs nothing that was not compiled for it.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from muxtune.cost.machine import step_rows
from muxtune.cost.schema import CAPTURED, Profile
from muxtune.profiling.calibration_cases import shallow
from muxtune.profiling.captured_cases import few_block_cases
from muxtune.profiling.captured_ops import CapturedOps
from muxtune.profiling.compiling import StepJob, step_jobs
from muxtune.profiling.step_cases import StepCase
from muxtune.profiling.steps import StepBench, is_lost
from muxtune.profiling.takeovers import measure_takeovers, takeover_jobs

NUM_STEPS, STEP_S = 12, 0.4
PRODUCT_ROWS = (256, 512, 1024, 1536, 2048, 3072, 4096)
Report = Callable[[float, str], None]


def check_machine(
    profile: Profile, device: torch.device, max_rows: int, *, clock: Callable[[], float],
    report: Report = lambda _share, _text: None,
) -> dict[str, Any]:  # fmt: skip
    """What ``muxtune.cost.machine.carried`` takes. Only of captured programs; of others there is
    nothing to repeat. What fails is left out, and told by ``failed``."""
    found: dict[str, Any] = {"profile": profile.content_hash, "products": [], "steps": []}
    found |= {"ops": {}, "failed": []}
    if profile.style != CAPTURED:
        return found
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def part(name: str, share: float, work: Callable[[], Any]) -> None:
        report(share, name)
        try:
            work()
        except Exception as error:
            if is_lost(device):
                raise
            text = " ".join(str(error).split())[:300]
            found["failed"].append(f"{name}: {type(error).__name__}: {text}")

    here = (device, dtype, clock)
    part("products", 0.0, lambda: found["products"].extend(_products(profile, *here)))
    few = shallow(profile.model_shape)
    if few is not None:
        cases = few_block_cases(few, max_rows)
        part("steps", 0.2, lambda: found["steps"].extend(_steps(profile, cases, *here)))
    takeovers = lambda: _takeovers(profile, device, dtype, max_rows)  # noqa: E731
    part("takeovers", 0.6, lambda: found["ops"].update(takeovers()))
    return found


def check_jobs(profile: Profile, max_rows: int) -> list[StepJob]:
    """What a check has compiled."""
    if profile.style != CAPTURED:
        return []
    shape = profile.model_shape
    few = shallow(shape)
    cases = few_block_cases(few, max_rows)[:NUM_STEPS] if few is not None else []
    jobs = [job for case in cases for job in step_jobs(case.shape, case.plan(), case.specs())]
    return [*jobs, *takeover_jobs(shape, max_rows)]


def _products(
    profile: Profile, device: torch.device, dtype: torch.dtype, clock: Callable[[], float]
) -> list[tuple[float, float, float]]:
    """(rows, seconds in the profile, seconds here) of the fused linears without adapters."""
    bench = CapturedOps(profile.model_shape, device, dtype, clock=clock)
    then: dict[tuple[str, float], float] = {
        (name, point["rows"]): point["median_s"]
        for name, op in profile.ops.items()
        if name.startswith("frozen_")
        for point in op["points"]
    }
    known = {rows for _, rows in then}
    for rows in PRODUCT_ROWS:
        if rows in known:
            bench.products(rows)
    return [
        (point.sizes["rows"], then[point.name, point.sizes["rows"]], median(point.seconds))
        for point in bench.points
        if (point.name, point.sizes["rows"]) in then
    ]


def _steps(
    profile: Profile,
    cases: list[StepCase],
    device: torch.device,
    dtype: torch.dtype,
    clock: Callable[[], float],
) -> list[tuple[float, float, float]]:
    """The same of whole steps of a few blocks."""
    then = {step.name: step for step in profile.steps if step.num_layers}
    wanted = [case for case in cases if case.name in then][:NUM_STEPS]
    if not wanted:
        return []
    exact = bool(profile.program.get("deterministic", True))
    bench = StepBench(
        wanted[0].shape, device, dtype, step=profile.style, deterministic=exact, clock=clock
    )
    found = []
    try:
        for case in wanted:
            repeats_s = bench.run(case, STEP_S).repeats_s
            step = then[case.name]
            found.append((step_rows(step), step.median_s, median(repeats_s)))
    finally:
        bench.close()
    return found


def _takeovers(
    profile: Profile, device: torch.device, dtype: torch.dtype, max_rows: int
) -> dict[str, Any]:
    exact = bool(profile.program.get("deterministic", True))
    bench = StepBench(profile.model_shape, device, dtype, step=profile.style, deterministic=exact)
    try:
        return measure_takeovers(
            bench.shape,
            bench.store,
            step=profile.style,
            deterministic=exact,
            max_rows=max_rows,
            repeats=2,
        )
    finally:
        bench.close()


__all__ = ["check_jobs", "check_machine"]
