"""Kernels of the GPU experiments, compiled on a machine without a GPU into a folder for another.

    PYTHONPATH=.:sim:kernels python3 experiments/gpu_runtime/compile_ahead.py --out kernels_h100

On the machine with the GPU: ``TRITON_CACHE_DIR=kernels_h100``. Both need the same minor version of
Python, the same version of Triton and the same commit. Triton keeps whole paths: say with ``--at``
where the folder will lie there.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "step_throughput"))


class Done(NamedTuple):
    """What a worker has compiled for one case; ``new``: what was not there yet."""

    name: str
    kernels: int
    new: int
    seconds: float
    error: str = ""


def case_names() -> list[str]:
    from run import CASES  # type: ignore[import-not-found]

    return list(CASES)


def compile_case(name: str, target: str, deterministic: bool) -> Done:
    """Runs in a worker: a case of the step throughput, as it is planned and captured there."""
    start_s, folder = time.monotonic(), Path(os.environ["TRITON_CACHE_DIR"])
    before = {item.name for item in folder.iterdir()}
    try:
        compiled = _compiled(name, target, deterministic)
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return Done(name, 0, 0, time.monotonic() - start_s, text)
    found = {each for folders in compiled.folders.values() for each in folders}
    return Done(name, compiled.count, len(found - before), time.monotonic() - start_s)


def _compiled(name: str, target: str, deterministic: bool) -> Any:
    import product  # type: ignore[import-not-found]
    from run import CASES  # type: ignore[import-not-found]

    from muxtune.profiling.ahead import compile_plan
    from muxtune_kernels.without_gpu import TARGETS

    with tempfile.TemporaryDirectory() as place:
        shape, plan, tasks, lengths = product.planned(CASES[name], Path(place), rounds=50)
    return compile_plan(shape, plan, tasks, lengths, TARGETS[target], deterministic)


def compile_all(args: Any) -> list[Done]:
    from rich.progress import Progress

    done: list[Done] = []
    pool = ProcessPoolExecutor(args.workers, mp_context=get_context("spawn"))
    futures = [
        pool.submit(compile_case, name, args.target, args.deterministic) for name in args.cases
    ]
    try:
        with Progress(disable=not sys.stderr.isatty()) as progress:
            bar = progress.add_task("compiling", total=len(futures))
            for future in as_completed(futures, args.limit_s):
                done.append(future.result())
                progress.update(bar, advance=1)
                print(_line(done[-1]), flush=True)
    except TimeoutError:
        left = ", ".join(sorted(set(args.cases) - {item.name for item in done}))
        print(f"the time was up: not, or not wholly, compiled: {left}", flush=True)
    finally:
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)
    return done


def _line(item: Done) -> str:
    what = item.error or f"{item.kernels} kernels, {item.new} of them new"
    return f"{item.name:16} {item.seconds:6.1f} s   {what}"


def main() -> None:
    args = arguments()
    from muxtune_kernels.without_gpu import move_cache

    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(out)
    move_cache(out, out)  # what an earlier call has moved
    done = compile_all(args)
    move_cache(out, args.at or out)
    failed = [item.name for item in done if item.error]
    sys.exit(1 if failed or len(done) < len(args.cases) else 0)


def arguments() -> Any:
    names = case_names()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="Triton's cache folder to fill")
    parser.add_argument("--at", type=Path, help="the folder's path where it will be used")
    parser.add_argument("--cases", default="", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--target", choices=("h100", "h200"), default="h100")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--limit-s", type=float, default=3600.0)
    args = parser.parse_args()
    args.cases = args.cases.split(",") if args.cases else names
    unknown = sorted(set(args.cases) - set(names))
    if unknown:
        parser.error(f"--cases: no {', '.join(unknown)}; choose of {', '.join(names)}")
    if args.workers < 1 or args.limit_s <= 0:
        parser.error("--workers and --limit-s must be positive")
    return args


if __name__ == "__main__":
    main()
