"""Kernels of the GPU experiments, compiled on a machine without a GPU into a folder for another.

    PYTHONPATH=.:sim:kernels python3 experiments/gpu_runtime/compile_ahead.py --out kernels_h100

What is asked for is found out first, by all that is to run; what several ask for is compiled once.
On the machine with the GPU: ``TRITON_CACHE_DIR=kernels_h100``. Both need the same minor version of
Python, the same version of Triton and the same commit. Triton keeps whole paths: say with ``--at``
where the folder will lie there. ``--slim`` leaves a small copy of it, with only what launches need.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from muxtune.cost.shapes import ModelShape
    from muxtune.types import HTask, Plan, TaskSpec
    from muxtune_kernels.without_gpu import Wanted

HERE = Path(__file__).resolve().parent
# Two of them have a module ``run``.
sys.path[:0] = [str(HERE.parent / "step_throughput"), str(HERE), str(HERE.parent.parent)]

PROFILE, SUITE, RUNS = "profile", "suite", "runs"
RATIO, STAGES = "kernel_ratio", "two_gpus"
COMMAND = "two_gpus_command"
CHECK, BOUND = "check", "bound"
RUNTIME = ("isolation", "kill", "joins", "memory")  # parts of this folder's run.py
PIECE = 12  # of a profile's or a suite's operations and steps, which one worker runs through
RUNS_PIECE = 3  # of its dynamic runs' steps, which have all blocks of a model
RATIO_PARTS = 8
PROFILED, MAX_ROWS = "llama-2-7b", 4096  # as experiments/gpu_validation/run.py has them


class Piece(NamedTuple):
    """What one worker finds out about. ``ask`` takes ``arguments``, the target's name and whether
    steps are deterministic where they need not be."""

    name: str
    ask: Callable[..., set[Wanted]]
    arguments: tuple[Any, ...]


class Asked(NamedTuple):
    name: str
    wanted: set[Wanted]
    seconds: float
    error: str = ""


class Done(NamedTuple):
    """``new``: it was not there yet."""

    name: str
    new: bool
    seconds: float
    error: str = ""


def all_names() -> list[str]:
    from run import CASES  # type: ignore[import-not-found]

    return [*CASES, CHECK, BOUND, *RUNTIME, PROFILE, RATIO, SUITE, RUNS, STAGES, COMMAND]


def pieces_of(names: Sequence[str], profile: Path) -> list[Piece]:
    found: list[Piece] = []
    for name in names:
        if name in (PROFILE, SUITE, RUNS):
            jobs = profile_jobs() if name == PROFILE else suite_jobs(profile, name == RUNS)
            count = max(1, len(jobs) // (RUNS_PIECE if name == RUNS else PIECE))
            # Those that follow each other are of one model.
            ends = [len(jobs) * part // count for part in range(count + 1)]
            found += [
                Piece(f"{name} {part + 1}/{count}", ask_jobs, (jobs[ends[part] : ends[part + 1]],))
                for part in range(count)
            ]
        elif name == RATIO:
            found += [Piece(f"{name} {i}", ask_ratio, (i,)) for i in range(RATIO_PARTS)]
        elif name == STAGES:
            from experiments.two_gpus.ahead import STAGE_PHASES
            from experiments.two_gpus.warm import kinds

            found += [
                Piece(f"{name}, {config.name}", ask_stages, (spared, config))
                for spared, config in kinds(STAGE_PHASES)
            ]
        elif name == COMMAND:
            from experiments.two_gpus.command import COMPILED

            found += [Piece(f"{name}, {layout}", ask_command, (layout,)) for layout in COMPILED]
        elif name in (CHECK, BOUND):
            found.append(Piece(name, ask_check if name == CHECK else ask_bound, ()))
        elif name in RUNTIME:
            found.append(Piece(name, ask_runtime, (name,)))
        else:
            found.append(Piece(name, ask_case, (name,)))
    return found


def find_out(piece: Piece, target: str, deterministic: bool) -> Asked:
    """Runs in a worker."""
    start_s = time.monotonic()
    try:
        wanted = piece.ask(*piece.arguments, target, deterministic)
    except Exception as error:
        return Asked(piece.name, set(), time.monotonic() - start_s, _told(error))
    return Asked(piece.name, wanted, time.monotonic() - start_s)


def compile_one(wanted: Wanted, target: str) -> Done:
    """Runs in a worker."""
    from muxtune_kernels.without_gpu import TARGETS, compile_wanted

    start_s, folder = time.monotonic(), Path(os.environ["TRITON_CACHE_DIR"])
    began_s = time.time()
    try:
        made = folder / compile_wanted(wanted, TARGETS[target])
    except Exception as error:
        return Done(wanted.name, True, time.monotonic() - start_s, _told(error))
    is_new = made.stat().st_mtime >= began_s - 1.0
    return Done(wanted.name, is_new, time.monotonic() - start_s)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def ask_case(name: str, target: str, deterministic: bool) -> set[Wanted]:
    """A case of the step throughput, as it is planned and captured there."""
    import product  # type: ignore[import-not-found]
    from run import CASES  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as place:
        case = CASES[name]
        shape, plan, tasks, lengths = product.planned(case, Path(place), rounds=50)
    windows = "backend.lora_products=windows" in case.overrides
    return _of_plans([(shape, plan, tasks, lengths)], target, deterministic, windows)


def ask_check(target: str, _deterministic: bool) -> set[Wanted]:
    """Of the measured shape, and of the small one of the tests marked gpu."""
    import check  # type: ignore[import-not-found]

    from muxtune.cost.shapes import model_shape
    from muxtune.profiling.ahead import blank_static_model
    from muxtune_kernels.without_gpu import TARGETS, asking_for

    found: set[Wanted] = set()
    measured = model_shape(PROFILED)._replace(num_layers=2)
    small = measured._replace(
        hidden=512, num_heads=4, num_kv_heads=2, intermediate=768, vocab=1000, num_layers=2
    )
    for shape in (measured, small):
        with asking_for(TARGETS[target]) as wanted:
            model = blank_static_model(shape, max_positions=512)
            for exact in (False, True):
                check.blank_program(model, exact).run(check.NUM_ROWS)
        found |= wanted
    return found


def ask_bound(target: str, _deterministic: bool) -> set[Wanted]:
    """The frozen program alone, in sizes that eight tasks take."""
    import frozen  # type: ignore[import-not-found]

    from muxtune.cost.shapes import model_shape
    from muxtune.profiling.ahead import blank_static_model
    from muxtune_kernels.without_gpu import TARGETS, asking_for

    sizes = [3712, 3520, 2048]
    with asking_for(TARGETS[target]) as wanted:
        model = blank_static_model(model_shape(PROFILED))
        program = frozen.program_without_adapters(model, 8, max(sizes))
        for rows in sizes:
            program.run(rows)
    return wanted


def _of_plans(
    plans: Iterable[tuple[ModelShape, Plan, dict[str, TaskSpec], Any]],
    target: str,
    deterministic: bool,
    windows: bool = False,
) -> set[Wanted]:
    from muxtune.profiling.ahead import launch_plan
    from muxtune_kernels.without_gpu import TARGETS, asking_for

    found: set[Wanted] = set()
    for shape, plan, tasks, lengths in plans:
        with asking_for(TARGETS[target]) as wanted:
            launch_plan(shape, plan, tasks, lengths, deterministic, windows=windows)
        found |= wanted
    return found


def ask_jobs(jobs: list[Any], target: str, _deterministic: bool) -> set[Wanted]:
    """Operations and steps of a profile or a suite, which are deterministic."""
    from muxtune.profiling.ahead import asked_by
    from muxtune_kernels.without_gpu import TARGETS

    return asked_by(jobs, TARGETS[target])


def profile_jobs() -> list[Any]:
    from muxtune.cost.shapes import model_shape
    from muxtune.profiling.calibration_cases import shallow
    from muxtune.profiling.captured_cases import few_block_cases, whole_cases
    from muxtune.profiling.captured_profile import op_jobs, rows_up_to
    from muxtune.profiling.compiling import step_jobs
    from muxtune.profiling.takeovers import takeover_jobs

    shape = model_shape(PROFILED)
    few = shallow(shape)
    cases = [*(few_block_cases(few, MAX_ROWS) if few else ()), *whole_cases(shape, MAX_ROWS)]
    steps = [job for case in cases for job in step_jobs(case.shape, case.plan(), case.specs())]
    return [*op_jobs(shape, rows_up_to(MAX_ROWS)), *steps, *takeover_jobs(shape, MAX_ROWS)]


def suite_jobs(path: Path, runs_only: bool) -> list[Any]:
    """What experiments/gpu_validation/run.py measures, by its defaults, of what is not given, or
    the plans of its dynamic runs."""
    from muxtune.validation.attempts import Attempt
    from muxtune.validation.running import drawn_of, jobs_of

    validation = SimpleNamespace(**runpy.run_path(str(HERE.parent / "gpu_validation" / "run.py")))
    with tempfile.TemporaryDirectory() as place:
        args = validation.arguments().parse_args(["--out", place])
        attempt = Attempt(Path(place), path)
        options = validation.options_of(args, 1.0)
        drawn = drawn_of(attempt, options)
        if drawn.no_runs:
            print(f"no dynamic runs: {drawn.no_runs}", flush=True)
        return drawn.of_runs if runs_only else jobs_of(attempt, drawn, options)


def ask_runtime(name: str, target: str, deterministic: bool) -> set[Wanted]:
    """A part of this folder's run.py."""
    from muxtune.cost.shapes import model_shape

    shape = model_shape(PROFILED)
    return {"isolation": _isolation, "kill": _kill, "joins": _joins, "memory": _memory}[name](
        shape, target
    )


def _isolation(shape: ModelShape, target: str) -> set[Wanted]:
    """In deterministic mode a task alone takes the same sizes."""
    import isolation  # type: ignore[import-not-found]
    from bench import htask_of  # type: ignore[import-not-found]

    few, tasks = shape._replace(num_layers=2), isolation.lora_tasks()
    companies = [tasks, isolation.mixed_tasks()]
    found = set()
    for members in companies:
        found |= _by_hand(few, htask_of(members, isolation.QUOTA), members, target, True)
    found |= _by_hand(few, htask_of(tasks, isolation.QUOTA), tasks, target, False)
    for task in tasks:
        found |= _by_hand(few, isolation.htask_alone(tasks, task), [task], target, False)
    return found


def _joins(shape: ModelShape, target: str) -> set[Wanted]:
    import joins  # type: ignore[import-not-found]
    from bench import htask_of  # type: ignore[import-not-found]

    found = set()
    for members in joins.companies():
        tasks = [task for task in members if task is not None]
        found |= _by_hand(shape, htask_of(members, joins.QUOTA), tasks, target, False)
    return found


def _by_hand(
    shape: ModelShape, htask: HTask, tasks: list[TaskSpec], target: str, exact: bool
) -> set[Wanted]:
    """Of a plan with one hTask, as ``bench`` makes it."""
    from bench import plan_of  # type: ignore[import-not-found]

    from muxtune.workload.random_texts import RandomTexts

    texts = RandomTexts(shape.vocab)
    for task in tasks:
        texts.add(task)
    by_id = {task.task_id: task for task in tasks}
    return _of_plans([(shape, plan_of([htask]), by_id, texts)], target, exact)


def _kill(_: ModelShape, target: str) -> set[Wanted]:
    import kill  # type: ignore[import-not-found]

    plans = [
        (shape, plan, {task.task_id: task for task in tasks}, None)
        for shape, plan, tasks in kill.plans()
    ]
    return _of_plans(plans, target, True)


def _memory(shape: ModelShape, target: str) -> set[Wanted]:
    import memory  # type: ignore[import-not-found]

    plans = [
        (shape, plan, {task.task_id: task for task in tasks}, None)
        for plan, tasks in memory.plans(shape)
    ]
    return _of_plans(plans, target, True)


def ask_ratio(part: int, target: str, _deterministic: bool) -> set[Wanted]:
    """Ours of the methods that experiments/kernel_ratio times: every so many sizes."""
    from muxtune_kernels.without_gpu import TARGETS, asking_for

    path = HERE.parent / "kernel_ratio" / "run.py"  # not the module ``run`` of the other folder
    ratio = SimpleNamespace(**runpy.run_path(str(path)))
    shapes = ratio.all_shapes(ratio.SIZES, ratio.TOKENS, ratio.TASKS)
    found: set[Wanted] = set()
    for shape in shapes[part::RATIO_PARTS]:
        with asking_for(TARGETS[target]) as wanted:
            case = ratio.Case(*shape, device="cpu")
            extras = ratio.extras_of(case) if ratio.has_extras(shape) else {}
            for step in (ratio.own_methods(case) | extras).values():
                step(case.sets[0])
        found |= wanted
    return found


def ask_stages(spared: int, config: Any, target: str, _deterministic: bool) -> set[Wanted]:
    """Of the first phases that experiments/two_gpus measures."""
    from experiments.two_gpus.ahead import launch_stages
    from muxtune_kernels.without_gpu import TARGETS, asking_for

    with asking_for(TARGETS[target]) as wanted:
        launch_stages(config, spared)
    return wanted


def ask_command(layout: str, target: str, _deterministic: bool) -> set[Wanted]:
    """Of ``muxtune train`` as experiments/two_gpus/command.py runs it."""
    from experiments.two_gpus.ahead import launch_command
    from experiments.two_gpus.command import words
    from muxtune_kernels.without_gpu import TARGETS, asking_for

    with asking_for(TARGETS[target]) as wanted:
        launch_command(words(layout))
    return wanted


def compile_all(args: Any) -> bool:
    """Whether all went well, within the time."""
    from rich.progress import Progress

    end_s = time.monotonic() + args.limit_s
    pieces = pieces_of(args.cases, args.profile)
    pool = ProcessPoolExecutor(args.workers, mp_context=get_context("spawn"))
    try:
        with Progress(disable=not sys.stderr.isatty()) as progress:
            asked = [
                pool.submit(find_out, piece, args.target, args.deterministic) for piece in pieces
            ]
            wanted: set[Wanted] = set()
            made: list[Future[Done]] = []
            for future in _finished(asked, end_s, progress, "asking"):
                found: Asked = future.result()
                made += [pool.submit(compile_one, x, args.target) for x in found.wanted - wanted]
                new = len(found.wanted - wanted)
                wanted |= found.wanted
                what = found.error or f"{len(found.wanted)} kernels, {new} of them not asked before"
                print(f"{found.name:16} {found.seconds:6.1f} s   {what}", flush=True)
            done = [item.result() for item in _finished(made, end_s, progress, "compiling")]
    except TimeoutError:
        print("the time was up: not all is compiled", flush=True)
        return False
    finally:
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)
    return _concluded(asked, done)


def _finished(
    futures: Sequence[Future[Any]], end_s: float, progress: Any, title: str
) -> Iterator[Future[Any]]:
    bar = progress.add_task(title, total=len(futures))
    for future in as_completed(futures, max(0.0, end_s - time.monotonic())):
        yield future
        progress.update(bar, advance=1)


def _concluded(asked: Sequence[Future[Asked]], done: Sequence[Done]) -> bool:
    errors = [f"{x.name}: {x.error}" for x in done if x.error]
    errors += [f"{x.name}: {x.error}" for x in (future.result() for future in asked) if x.error]
    seconds = sum(x.seconds for x in done if x.new)
    new = sum(x.new for x in done)
    print(f"{len(done)} kernels, {new} of them new ({seconds:.0f} s of one core)", flush=True)
    for text in errors:
        print(f"FAILED {text}", flush=True)
    return not errors


def main() -> None:
    args = arguments()
    from muxtune_kernels.without_gpu import move_cache, slim_cache

    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(out)
    move_cache(out, out)  # what an earlier call has moved
    is_done = compile_all(args)
    if args.slim:
        slim_cache(out, args.slim, args.at or args.slim.resolve())
    else:
        move_cache(out, args.at or out)
    sys.exit(0 if is_done else 1)


def arguments() -> Any:
    names = all_names()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="Triton's cache folder to fill")
    parser.add_argument("--at", type=Path, help="the folder's path where it will be used")
    parser.add_argument(
        "--slim", type=Path, metavar="FOLDER",
        help="a copy with only what launches need, which is used --at that path in place of --out",
    )  # fmt: skip
    parser.add_argument("--cases", default="", help=f"of {', '.join(names)}; default: of one GPU")
    parser.add_argument("--profile", type=Path, help="whose hash draws the suite")
    parser.add_argument("--target", choices=("h100", "h200"), default="h100")
    parser.add_argument("--deterministic", action="store_true", help="steps of the throughput")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--limit-s", type=float, default=3600.0)
    args = parser.parse_args()
    no_default = (STAGES, COMMAND, RUNS) if args.profile else (STAGES, COMMAND, RUNS, SUITE)
    default = [name for name in names if name not in no_default]
    args.cases = args.cases.split(",") if args.cases else default
    unknown = sorted(set(args.cases) - set(names))
    if unknown:
        parser.error(f"--cases: no {', '.join(unknown)}; choose of {', '.join(names)}")
    if {SUITE, RUNS} & set(args.cases) and not args.profile:
        parser.error("--cases suite or runs: give the --profile whose hash draws it")
    if args.slim and args.slim.resolve().is_relative_to(args.out.resolve()):
        parser.error("--slim: give a folder outside of --out")
    if args.workers < 1 or args.limit_s <= 0:
        parser.error("--workers and --limit-s must be positive")
    return args


if __name__ == "__main__":
    main()
