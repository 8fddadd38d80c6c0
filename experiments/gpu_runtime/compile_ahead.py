"""Kernels of the GPU experiments, compiled on a machine without a GPU into a folder for another.

    PYTHONPATH=.:sim:kernels python3 experiments/gpu_runtime/compile_ahead.py --out kernels_h100

On the machine with the GPU: ``TRITON_CACHE_DIR=kernels_h100``. Both need the same minor version of
Python, the same version of Triton and the same commit. Triton keeps whole paths: say with ``--at``
where the folder will lie there.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from muxtune_kernels.without_gpu import Compiled, Target

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "step_throughput"), str(HERE.parent.parent)]


PROFILE, RATIO, STAGES = "profile", "kernel_ratio", "two_gpus"
PARTS = {PROFILE: 12, RATIO: 8, STAGES: 10}  # of others: one
PROFILED, MAX_ROWS = "llama-2-7b", 4096  # as experiments/gpu_validation/run.py has them


class Job(NamedTuple):
    """Every ``parts``-th of a case's pieces, from ``part`` on."""

    name: str
    part: int = 0
    parts: int = 1


class Done(NamedTuple):
    """What a worker has compiled; ``new``: what was not there yet."""

    job: Job
    kernels: int
    new: int
    seconds: float
    error: str = ""


def all_names() -> list[str]:
    from run import CASES  # type: ignore[import-not-found]

    return [*CASES, *PARTS]


def jobs_of(names: list[str]) -> list[Job]:
    counts = {name: PARTS.get(name, 1) for name in names}
    return [Job(name, part, parts) for name, parts in counts.items() for part in range(parts)]


def compile_job(job: Job, target: str, deterministic: bool) -> Done:
    """Runs in a worker."""
    from muxtune_kernels.without_gpu import TARGETS

    start_s, folder = time.monotonic(), Path(os.environ["TRITON_CACHE_DIR"])
    before = {item.name for item in folder.iterdir()}
    found: set[str] = set()
    compiled = {PROFILE: _of_profile, RATIO: _of_ratio, STAGES: _of_stages}.get(job.name, _of_case)
    try:
        for item in compiled(job, TARGETS[target], deterministic):
            found |= {each for folders in item.folders.values() for each in folders}
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return Done(job, 0, 0, time.monotonic() - start_s, text)
    return Done(job, len(found), len(found - before), time.monotonic() - start_s)


def _of_case(job: Job, target: Target, deterministic: bool) -> Iterator[Compiled]:
    """A case of the step throughput, as it is planned and captured there."""
    import product  # type: ignore[import-not-found]
    from run import CASES  # type: ignore[import-not-found]

    from muxtune.profiling.ahead import compile_plan

    with tempfile.TemporaryDirectory() as place:
        shape, plan, tasks, lengths = product.planned(CASES[job.name], Path(place), rounds=50)
    yield compile_plan(shape, plan, tasks, lengths, target, deterministic)


def _of_profile(job: Job, target: Target, _deterministic: bool) -> Iterator[Compiled]:
    """Operations and steps of a profile, which is of deterministic ones."""
    from muxtune.cost.shapes import model_shape
    from muxtune.profiling.ahead import compile_ops, compile_plan
    from muxtune.profiling.calibration_cases import shallow
    from muxtune.profiling.captured_cases import few_block_cases, whole_cases
    from muxtune.profiling.captured_profile import op_jobs, rows_up_to

    shape, mine = model_shape(PROFILED), slice(job.part, None, job.parts)
    yield compile_ops(shape, op_jobs(shape, rows_up_to(MAX_ROWS))[mine], target)
    few = shallow(shape)
    cases = [*(few_block_cases(few, MAX_ROWS) if few else ()), *whole_cases(shape, MAX_ROWS)]
    for case in cases[mine]:
        yield compile_plan(case.shape, case.plan(), case.specs(), None, target, True)


def _of_ratio(job: Job, target: Target, _deterministic: bool) -> Iterator[Compiled]:
    """Ours of the methods that experiments/kernel_ratio times."""
    from muxtune_kernels.without_gpu import compiling_for

    path = HERE.parent / "kernel_ratio" / "run.py"  # not the module ``run`` of the other folder
    ratio = SimpleNamespace(**runpy.run_path(str(path)))
    shapes = ratio.all_shapes(ratio.SIZES, ratio.TOKENS, ratio.TASKS)
    for shape in shapes[job.part :: job.parts]:
        with compiling_for(target) as compiled:
            case = ratio.Case(*shape, device="cpu")
            extras = ratio.extras_of(case) if ratio.has_extras(shape) else {}
            for step in (ratio.own_methods(case) | extras).values():
                step(case.sets[0])
        yield compiled


def _of_stages(job: Job, target: Target, _deterministic: bool) -> Iterator[Compiled]:
    """Of the first phases that experiments/two_gpus measures."""
    from experiments.two_gpus.ahead import STAGE_PHASES, compile_stages
    from experiments.two_gpus.warm import kinds

    for spared, config in kinds(STAGE_PHASES)[job.part :: job.parts]:
        yield compile_stages(config, spared, target)


def compile_all(args: Any) -> list[Done]:
    from rich.progress import Progress

    done: list[Done] = []
    jobs = jobs_of(args.cases)
    pool = ProcessPoolExecutor(args.workers, mp_context=get_context("spawn"))
    futures = [pool.submit(compile_job, job, args.target, args.deterministic) for job in jobs]
    try:
        with Progress(disable=not sys.stderr.isatty()) as progress:
            bar = progress.add_task("compiling", total=len(futures))
            for future in as_completed(futures, args.limit_s):
                done.append(future.result())
                progress.update(bar, advance=1)
                print(_line(done[-1]), flush=True)
    except TimeoutError:
        left = ", ".join(_title(job) for job in jobs if job not in {item.job for item in done})
        print(f"the time was up: not, or not wholly, compiled: {left}", flush=True)
    finally:
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)
    return done


def _title(job: Job) -> str:
    return job.name if job.parts == 1 else f"{job.name} {job.part + 1}/{job.parts}"


def _line(item: Done) -> str:
    what = item.error or f"{item.kernels} kernels, {item.new} of them new"
    return f"{_title(item.job):16} {item.seconds:6.1f} s   {what}"


def main() -> None:
    args = arguments()
    from muxtune_kernels.without_gpu import move_cache

    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(out)
    move_cache(out, out)  # what an earlier call has moved
    done = compile_all(args)
    move_cache(out, args.at or out)
    failed = any(item.error for item in done)
    sys.exit(1 if failed or len(done) < len(jobs_of(args.cases)) else 0)


def arguments() -> Any:
    names = all_names()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="Triton's cache folder to fill")
    parser.add_argument("--at", type=Path, help="the folder's path where it will be used")
    parser.add_argument("--cases", default="", help=f"of {', '.join(names)}; default: of one GPU")
    parser.add_argument("--target", choices=("h100", "h200"), default="h100")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--limit-s", type=float, default=3600.0)
    args = parser.parse_args()
    of_one_gpu = [name for name in names if name != STAGES]
    args.cases = args.cases.split(",") if args.cases else of_one_gpu
    unknown = sorted(set(args.cases) - set(names))
    if unknown:
        parser.error(f"--cases: no {', '.join(unknown)}; choose of {', '.join(names)}")
    if args.workers < 1 or args.limit_s <= 0:
        parser.error("--workers and --limit-s must be positive")
    return args


if __name__ == "__main__":
    main()
