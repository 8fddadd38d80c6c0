"""Profile a device, then score the profile on its suite, in one go and within a time.

    PYTHONPATH=.:sim:kernels python3 experiments/gpu_validation/run.py --out OUT_FOLDER --budget 500

Needs one CUDA device (``--device cpu --model tiny`` tries the script out). Everything is written as
it comes, so that a run that is cut off leaves what it has; run again with the same folder, it goes
on. What it leaves is a validation's folder: see README.md.

Profile and suite have a process each: the second one finds the device as it was. ``--only profile``
and ``--only suite`` part them for good; they may then run on two machines of a kind, which
``--check`` looks at first. ``--ahead``: kernels were compiled before (``compile_ahead.py``), and no
processes compile them here but those of the dynamic runs' plans, without the GPU, while
operations and steps are timed.

``--rehearse``: every part once, on few layers and sizes, beside other work; its times mean nothing.
Its first process is killed where the suite's steps begin, so that the next one goes on. It then
scores without the device, and lets damaged profiles be refused; ends with 3 where a part failed.
Its report is ``rehearsal.json``.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from muxtune.cost.schema import content_hash, load_profile
from muxtune.cost.shapes import ModelShape, model_shape
from muxtune.errors import MuxTuneError
from muxtune.profiling.compiling import Compilers
from muxtune.profiling.measure import (
    checked_device,
    profile_machine,
    profile_warnings_here,
    write_profile,
)
from muxtune.profiling.steps import is_lost
from muxtune.report.kernel_cache import kernels_there
from muxtune.validation.records import Records
from muxtune.validation.running import ValidationOptions, shapes_named, validate

TINY = ModelShape("tiny", 10, 64, 4, 2, 16, 128, 256, tied_embeddings=True)
TINY_OTHERS = (
    TINY._replace(name="tiny short", num_layers=2),
    TINY._replace(name="tiny narrow", num_layers=2, hidden=48, intermediate=192),
)
# Base models that are not profiled: of another width of the MLP, vocabulary and grouping of heads,
# of another width altogether, and fewer blocks of the profiled one. A few blocks are enough.
OTHERS = ("llama-3.1-8b:4", "llama-2-13b:3", "llama-2-7b:5")
MIN_ROWS = 384
OWN_EVERY = 36  # the profiled base model has many blocks: a case of it takes seconds
PARTS, COMPILED, KILLED = "profile.parts.jsonl", "compiled.txt", "killed.txt"
SHORT_S = 10.0
MAX_STARTS, LEAST_S, REHEARSAL_S, PARTS_FAILED = 8, 20.0, 170.0, 3
START_S, REPORT_S = 8.0, 15.0  # of a process; of what a suite writes when its time is up
RUNS_COMPILED_S = 120.0
COMPILE_AHEAD = Path(__file__).resolve().parents[1] / "gpu_runtime" / "compile_ahead.py"
TINY_GRID = {"rows": (64, 128, 256), "slots": (1, 4), "ranks": (16, 64)}
REHEARSAL_GRID = {"rows": (256, 1024), "slots": (1, 4), "ranks": (16, 64)}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--model", default="llama-2-7b", help="NAME, NAME:LAYERS or tiny")
    parser.add_argument("--others", default=",".join(OTHERS), help="NAME or NAME:LAYERS, by commas")
    parser.add_argument("--budget", type=float, default=440.0, help="seconds for all of it")
    parser.add_argument("--profile-budget", type=float, default=170.0)
    parser.add_argument("--cases", type=int, default=201)
    parser.add_argument("--case-s", type=float, default=0.25, help="until power has settled")
    parser.add_argument("--repeats", type=int, default=2, help="of each step, at least")
    parser.add_argument("--dynamic-s", type=float, default=45.0, help="of each; 0: none")
    parser.add_argument("--max-rows", type=int, default=4096, help="0: as profiled")
    parser.add_argument("--clock", default="wall")
    parser.add_argument("--only", default="both", choices=("both", "profile", "suite"))
    parser.add_argument("--ahead", action="store_true", help="kernels are compiled already")
    parser.add_argument(
        "--check", action="store_true",
        help="carry the profile to the machine at hand, which is another, before its suite",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=0, help="that compile; 0: by the machine")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = arguments().parse_args()
    if not args.child:
        budget_s = min(args.budget, REHEARSAL_S) if args.rehearse else args.budget
        sys.exit(supervise_parts(args, time.monotonic() + budget_s))
    args.out.mkdir(parents=True, exist_ok=True)
    device = checked_device(args.device)
    if args.rehearse:
        is_tiny = args.model == "tiny"
        if not is_tiny:
            args.model, args.others = "llama-2-7b:9", "llama-3.1-8b:2,llama-2-13b:2"
        args.cases, args.case_s, args.dynamic_s = 30, 0.05, 4.0
        args.profile_budget = 20.0 if is_tiny else args.profile_budget
        args.max_rows = 256 if is_tiny else 1024
    done, before = args.out / COMPILED, kernels_there()
    helpers = torch.device("cpu") if args.ahead else device  # where there are no helpers
    with Compilers(helpers, deterministic=True, workers=args.workers, done=done) as compilers:
        if args.rehearse:
            sys.exit(rehearse(args, compilers))
        run(args, compilers)
    print(f"kernels compiled here: {kernels_there() - before} of {kernels_there()}", flush=True)


def supervise_parts(args: argparse.Namespace, end_s: float) -> int:
    parts = [args.only]
    if args.only == "both" and not args.rehearse:
        parts = ["profile", "suite"]
    for part in parts:
        status = supervise(part, end_s, args.out)
        if status:
            return status
    return 0


@contextmanager
def compiling_runs(profile: Path) -> Iterator[Callable[[], None]]:
    """Kernels of its dynamic runs' plans, by two of the processors while operations and steps are
    timed on the GPU: others are compiled before anything is timed by whoever needs them, but a
    run's takeovers are timed. Gives what waits for them."""
    folder = os.environ.get("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
    options = ["--cases", "runs", "--profile", str(profile), "--out", folder, "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, str(COMPILE_AHEAD), *options, "--limit-s", str(RUNS_COMPILED_S)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        preexec_fn=lambda: os.nice(10),
    )
    try:
        yield lambda: None if process.wait() == 0 else _say("compiling", 1.0, "runs: not all")
    finally:
        process.kill()
        process.wait()


def supervise(part: str, end_s: float, out: Path) -> int:
    """The work in a process of its own, which an error on a GPU ends: what has begun is recorded
    as failed then, and the next process goes on behind it."""
    for start in range(1, MAX_STARTS + 1):
        begun_s, written = time.monotonic(), _written(out)
        left_s = end_s - begun_s
        options = [*sys.argv[1:], "--child", "--only", part, "--budget", f"{left_s:.0f}"]
        done = subprocess.run([sys.executable, "-X", "faulthandler", __file__, *options])
        now_s = time.monotonic()
        is_over = done.returncode in (0, PARTS_FAILED) or end_s - now_s < LEAST_S
        ends_again = now_s - begun_s < SHORT_S and _written(out) == written
        if is_over or ends_again:
            return done.returncode
        _say("process", 1.0, f"{start} ended with {done.returncode}")
    return 1


def _written(out: Path) -> int:
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def run(args: argparse.Namespace, compilers: Compilers) -> dict[str, Any]:
    start_s = time.perf_counter()
    is_tiny = args.model == "tiny"
    shape = TINY if is_tiny else shapes_named([args.model], model_shape)[0]
    path = args.out / "profile.json"
    if args.only == "suite" and not path.exists():
        raise SystemExit(f"{path} is not there: measure it with --only profile")
    if not path.exists():
        _say("profiling", 0.0, f"{shape.name} on {args.device}")
        grid: dict[str, Any] = TINY_GRID if is_tiny else REHEARSAL_GRID if args.rehearse else {}
        profile = profile_machine(
            shape,
            min(args.profile_budget, args.budget),
            device=args.device,
            program="captured",
            clock=args.clock,
            max_rows=256 if is_tiny else args.max_rows,
            tell=lambda share, text: _say("profiling", share, text),
            compilers=compilers,
            kept=Records(args.out / PARTS),
            **grid,
        )
        write_profile(profile, path)
        if not args.rehearse:
            (args.out / PARTS).unlink(missing_ok=True)
        _say("profiling", 1.0, f"{time.perf_counter() - start_s:.0f} s, {profile['quality']}")
    if args.only == "profile":
        print(load_profile(path).content_hash, f"{time.perf_counter() - start_s:.0f} s", flush=True)
        return {}
    left_s = args.budget - (time.perf_counter() - start_s)
    spared_s = min(START_S + REPORT_S, 0.3 * left_s)
    options = options_of(args, max(1.0, left_s - spared_s))
    ahead = args.ahead and args.device == "cuda"
    with compiling_runs(path) if ahead else nullcontext(_nothing) as before_runs:
        say = _say_and_die if args.rehearse else _say
        report = validate(args.out, path, options, say, compilers, before_runs=before_runs)
    if not args.rehearse and not any(report["left"].values()):
        (args.out / COMPILED).unlink(missing_ok=True)
    shown = {key: report[key] for key in ("op", "step", "memory", "completion", "left", "warnings")}
    print(json.dumps(shown, indent=1), flush=True)
    print(load_profile(path).content_hash, f"{time.perf_counter() - start_s:.0f} s", flush=True)
    return report


def options_of(args: argparse.Namespace, budget_s: float) -> ValidationOptions:
    """Of the suite that a profile draws; the budget does not change it."""
    is_tiny = args.model == "tiny"
    return ValidationOptions(
        budget_s,
        args.cases,
        TINY_OTHERS if is_tiny else shapes_named(args.others.split(","), model_shape),
        256 if is_tiny else args.max_rows,
        8 if is_tiny or args.rehearse else 32,
        args.case_s,
        args.dynamic_s,
        min_rows=64 if is_tiny else MIN_ROWS,
        own_every=OWN_EVERY,
        steps_first=0.25 if args.rehearse else 0.6,
        min_repeats=args.repeats,
        checks_machine=args.check,
    )


def rehearse(args: argparse.Namespace, compilers: Compilers) -> int:
    """An exit status."""
    faulthandler.register(signal.SIGTERM, chain=True)  # where it stood when its time was up
    parts: dict[str, Any] = {"torch": torch.__version__}

    def part(name: str, work: Callable[[], Any]) -> None:
        start_s = time.perf_counter()
        try:
            found = work()
        except Exception:
            if is_lost(torch.device(args.device)):
                raise  # another process goes on
            parts[name] = {"failed": traceback.format_exc()[-3000:]}
        else:
            parts[name] = {"found": found, "s": round(time.perf_counter() - start_s, 1)}
        (args.out / "rehearsal.json").write_text(json.dumps(parts, indent=1) + "\n")
        _say(name, 1.0, "failed" if "failed" in parts[name] else "done")

    part("profile and suite", lambda: run(args, compilers))
    path = args.out / "profile.json"
    rest = ValidationOptions(5.0, args.cases, (), args.max_rows)
    part("how a product slows down", lambda: _slowing(args.device))
    part("what was left out", lambda: json.loads(path.read_text())["quality"])
    part("again without the device", lambda: _again(args.out, path, rest))
    part("refusals", lambda: _refusals(args.out, path, rest))
    failed = [name for name, found in parts.items() if "failed" in found]
    print(f"{len(failed)} parts failed {failed}", flush=True)
    return PARTS_FAILED if failed else 0


def _say_and_die(what: str, share: float, text: str) -> None:
    """As an error of a kernel would end the process: once, in the middle of the suite."""
    _say(what, share, text)
    marker = Path(sys.argv[sys.argv.index("--out") + 1]) / KILLED
    if what == "steps" and share > 0.0 and not marker.exists():
        marker.write_text("here\n")
        os.kill(os.getpid(), signal.SIGKILL)


def _slowing(device: str) -> list[tuple[float, float]]:
    """(ms since the start, ms of one product) of products that run without a pause: power, and
    with it the clock, settles after some time, which measurements should wait for."""
    if device != "cuda":
        return []
    x_TD, w_OD = (torch.randn(n, 4096, device=device, dtype=torch.bfloat16) for n in (4096, 22016))
    torch.cuda.synchronize()
    time.sleep(1.0)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(801)]
    for mark in marks:
        mark.record()
        _ = x_TD @ w_OD.T
    torch.cuda.synchronize()
    ends = [marks[0].elapsed_time(mark) for mark in marks]
    return [(round(ends[i], 1), round((ends[i + 20] - ends[i]) / 20, 4)) for i in range(0, 800, 20)]


def _again(folder: Path, path: Path, options: ValidationOptions) -> dict[str, Any]:
    report = validate(folder, path, options._replace(budget_s=0.0))
    pictures = [folder / name for name in ("predicted_measured.png", "errors.png")]
    return {"steps": report["step"].get("count"), "pictures": [x.exists() for x in pictures]}


def _refusals(folder: Path, path: Path, options: ValidationOptions) -> list[str]:
    """What is said to a damaged profile, and of one from elsewhere."""
    raw = json.loads(path.read_text())
    raw["device"] |= {"name": "H200-SXM", "driver": "1.0"}
    raw["software"]["torch"] = "1.0"
    texts = [path.read_text()[:-40], path.read_text().replace('"repeats": 5', '"repeats": 6')]
    said = []
    for number, text in enumerate(texts):
        bad = folder / f"damaged-{number}.json"
        bad.write_text(text)
        try:
            validate(folder / "damaged", bad, options)
            raise AssertionError(f"damaged profile {number} was accepted")
        except MuxTuneError as error:
            said.append(str(error))
        bad.unlink()
    other = folder / "other.json"
    other.write_text(json.dumps({**raw, "content_hash": content_hash(raw)}))
    warnings = profile_warnings_here(load_profile(other))
    if len(warnings) < 2:
        raise AssertionError(f"no warnings of another device: {warnings}")
    return [*said, *warnings]


def _nothing() -> None:
    pass


def _say(what: str, share: float, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what} {share:.0%} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
