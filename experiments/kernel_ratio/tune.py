"""Ratio of the whole operator under other block sizes; how `muxtune_kernels` got its own.

    PYTHONPATH=kernels python3 experiments/kernel_ratio/tune.py [--warm I/N] [--profile]

--warm only compiles the I-th of N parts of the variants, so that N processes fill Triton's cache.
"""

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from run import Case, Step, measure, ours, plain

from muxtune_kernels.multi_lora import autograd, launch, tuning

CASES = (
    (2048, 4096, 4096, 8),
    (8192, 4096, 4096, 8),
    (2048, 4096, 14336, 8),
    (8192, 4096, 14336, 8),
    (2048, 4096, 4096, 1),
    (2048, 4096, 4096, 32),
)
BIG = tuning.GemmBlocks(128, 256, 64, 8, 3, True, 1.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "pdl": {"pdl": True},
    "gemm 4 stages": {"gemm": BIG._replace(stages=4)},
    "gemm 4 stages pdl": {"gemm": BIG._replace(stages=4), "pdl": True},
    "gemm 128x128": {"gemm": BIG._replace(n=128, warps=4, stages=4, halves=False)},
    "gemm 3 whole": {"gemm": BIG._replace(halves=False)},
    "cublas": {"fused": False},
    "no split": {"shrink_splits": 1},
    "split 2": {"shrink_splits": 2},
    "split 8": {"shrink_splits": 8},
    "shrink t32": {"shrink_t": 32},
    "shrink k256 s3": {"shrink_k": 256, "shrink_stages": 3, "db_stages": 3},
    "shrink t32 k256": {"shrink_t": 32, "shrink_k": 256, "shrink_stages": 3},
    "da n64": {"da_n": 64, "da_splits": 1},
    "da n64 t128": {"da_n": 64, "da_t": 128, "da_stages": 3},
    "da n256 t32": {"da_n": 256, "da_t": 32},
    "da t128": {"da_t": 128, "da_stages": 3},
    "da splits 2": {"da_splits": 2},
    "db n64": {"db_n": 64, "db_splits": 1},
    "db n64 t128": {"db_n": 64, "db_t": 128, "db_stages": 3},
    "db t32": {"db_t": 32},
    "db stages 3": {"db_stages": 3},
    "db splits 2": {"db_splits": 2},
    "8 warps": {"warps": 8},
}


@contextlib.contextmanager
def variant(changes: dict[str, Any]) -> Iterator[None]:
    own_tuning, own_blocks = autograd.tuning_of, launch.gemm_blocks
    gemm = changes.get("gemm")
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
    for name, changes in VARIANTS.items():
        steps[name] = varied(case, changes, torch.float32)
    steps["as shipped, bf16 adapters"] = varied(case, {}, torch.bfloat16)
    return steps


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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--warm")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    if arguments.warm:
        part, parts = map(int, arguments.warm.split("/"))
        for shape in ((2048, 4096, 4096, 8), (8192, 4096, 4096, 8), (2048, 4096, 4096, 1)):
            case = Case(*shape)
            working(case, dict(list(steps_of(case).items())[part::parts]))
        return
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
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
