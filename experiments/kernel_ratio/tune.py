"""Ratio of the whole operator under other block sizes; how `muxtune_kernels` got its own.

    PYTHONPATH=kernels python3 experiments/kernel_ratio/tune.py [--warm I/N] [--profile]
        [--choose tuning.json]

--warm only compiles the I-th of N parts of the variants, so that N processes fill Triton's cache.
--choose writes the best variant of every kernel, where it gains more than the noise.
"""

import argparse
import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from run import Case, Step, measure, ours, plain

from muxtune_kernels.multi_lora import autograd, launch, tuning

CASES = (
    (2048, 4096, 4096, 8),
    (8192, 4096, 4096, 8),
    (8192, 4096, 14336, 8),
    (2048, 4096, 4096, 1),
    (2048, 4096, 4096, 32),
)
BIG = tuning.GemmBlocks(128, 256, 64, 8, 3, True, 1.0)
# By kernel: only one variant of a kernel is chosen.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "gemm": [
        {"gemm": BIG._replace(halves=False)},
        {"gemm": BIG._replace(stages=4)},
        {"gemm": BIG._replace(n=128, warps=4, stages=4, halves=False)},
        {"fused": False},
    ],
    "shrink": [
        {"shrink_stages": 3},
        {"shrink_k": 256, "shrink_stages": 3},
        {"shrink_k": 64, "shrink_stages": 5},
        {"shrink_splits": 2},
        {"shrink_splits": 1},
    ],
    "dh_db": [
        {"db_stages": 3},
        {"db_stages": 5, "db_t": 32},
        {"db_n": 128, "db_warps": 4, "db_stages": 4},
        {"db_n": 256, "db_warps": 8, "db_stages": 3},
        {"db_n": 64, "db_t": 64, "db_warps": 4, "db_stages": 4},
    ],
    "sum": [{"sum_t": 1}, {"sum_t": 2}, {"sum_t": 8}],
    "da": [
        {"da_stages": 3},
        {"da_stages": 5},
        {"da_n": 64, "da_t": 64, "da_splits": 1},
        {"da_n": 64, "da_t": 128, "da_splits": 1},
        {"da_n": 128, "da_t": 32, "da_stages": 5},
        {"da_n": 256, "da_t": 32},
    ],
    "warps": [{"warps": 8}],
}


@contextlib.contextmanager
def variant(changes: dict[str, Any]) -> Iterator[None]:
    own_tuning, own_blocks = autograd.tuning_of, launch.gemm_blocks
    gemm = tuning.GemmBlocks(*changes["gemm"]) if "gemm" in changes else None
    rest = {name: value for name, value in changes.items() if name != "gemm"}
    autograd.tuning_of = lambda *key: own_tuning(*key)._replace(**rest)
    if gemm is not None:
        launch.gemm_blocks = lambda *_: gemm
    try:
        yield
    finally:
        autograd.tuning_of, launch.gemm_blocks = own_tuning, own_blocks


def varied(case: Case, changes: dict[str, Any], dtype: torch.dtype) -> Step:
    step = ours(case, dtype)

    def run(inputs):
        with variant(changes):
            return step(inputs)

    return run


def steps_of(case: Case) -> dict[str, Step]:
    steps = {"plain": plain(case)}
    steps["as shipped"] = varied(case, {}, torch.float32)
    for changes in (changes for group in VARIANTS.values() for changes in group):
        steps[name_of(changes)] = varied(case, changes, torch.float32)
    steps["as shipped, bf16 adapters"] = varied(case, {}, torch.bfloat16)
    return steps


def name_of(changes: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in changes.items())


def choice(ratios: dict[str, list[float]], least_gain: float = 0.004) -> dict[str, Any]:
    """The best variant of each kernel by its geometric mean over the cases."""

    def mean_log(name: str) -> float:
        values = ratios.get(name, [])
        complete = len(values) == len(CASES)
        return sum(map(math.log, values)) / len(CASES) if complete else math.inf

    chosen: dict[str, Any] = {}
    for group in VARIANTS.values():
        best = min(group, key=lambda changes: mean_log(name_of(changes)))
        if mean_log(name_of(best)) < mean_log("as shipped") - least_gain:
            chosen |= best
    return chosen


def working(case: Case, steps: dict[str, Step]) -> dict[str, Step]:
    kept = {}
    for name, step in steps.items():
        try:
            step(case.sets[0])
            kept[name] = step
        except Exception as error:
            print(f"{name} does not run: {error!r:.200}", flush=True)
    return kept


def profile(case: Case, step: Step) -> None:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recorded:
        for i in range(8):
            step(case.sets[i % case.num_sets])
        torch.cuda.synchronize()
    for event in recorded.key_averages():
        print(f"   {event.device_time_total / 8:8.1f} us x{event.count / 8:g} {event.key[:70]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--warm")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--choose", type=Path)
    arguments = parser.parse_args()
    if arguments.warm:
        part, parts = map(int, arguments.warm.split("/"))
        for shape in (CASES[0], CASES[2], CASES[3], CASES[4]):
            case = Case(*shape)
            working(case, dict(list(steps_of(case).items())[part::parts]))
        return
    ratios: dict[str, list[float]] = {}
    for shape in CASES:
        case = Case(*shape)
        steps = working(case, steps_of(case))
        if arguments.profile:
            print(shape)
            for name in ("plain", "as shipped"):
                profile(case, steps[name])
        measured = measure(case, steps, True, 7, 4)
        print(f"{shape} plain {measured['plain']['step_us']:.1f} us", flush=True)
        for name, m in sorted(measured.items(), key=lambda item: item[1]["ratio"]):
            print(f"   {m['ratio']:.3f} ({m['ratio_min']:.3f}-{m['ratio_max']:.3f}) {name}")
            ratios.setdefault(name, []).append(m["ratio"])
        torch.cuda.empty_cache()
    print("choice:", chosen := choice(ratios))
    if arguments.choose:
        arguments.choose.write_text(json.dumps(chosen))


if __name__ == "__main__":
    main()
