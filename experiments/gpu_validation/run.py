"""Profile a device, then score the profile on its suite, in one go and within a time.

    PYTHONPATH=.:sim:kernels python3 experiments/gpu_validation/run.py --out OUT_FOLDER --budget 540

Needs one CUDA device (``--device cpu --model tiny`` tries the script out). Everything is written as
it comes, so that a run that is cut off leaves what it has; run again with the same folder, it goes
on. Eight files at most. What it leaves is a validation's folder: see README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from muxtune.cost.schema import load_profile
from muxtune.cost.shapes import ModelShape, model_shape
from muxtune.profiling.measure import profile_machine, write_profile
from muxtune.validation.running import ValidationOptions, shapes_named, validate

TINY = ModelShape("tiny", 2, 64, 4, 2, 16, 128, 256, tied_embeddings=True)
# Base models that are not profiled: of another width of the MLP, vocabulary and grouping of heads,
# of another width altogether, and fewer blocks of the profiled one. A few blocks are enough.
OTHERS = ("llama-3.1-8b:8", "llama-2-13b:8", "llama-2-7b:8")
TINY_GRID = {"rows": (64, 128, 256), "slots": (1, 4), "ranks": (16, 64)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--model", default="llama-2-7b")
    parser.add_argument("--others", default=",".join(OTHERS), help="NAME or NAME:LAYERS, by commas")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all of it")
    parser.add_argument("--profile-budget", type=float, default=170.0)
    parser.add_argument("--cases", type=int, default=240)
    parser.add_argument("--case-s", type=float, default=0.4)
    parser.add_argument("--dynamic-s", type=float, default=35.0, help="of each; 0: none")
    parser.add_argument("--max-rows", type=int, default=0)
    parser.add_argument("--clock", default="wall")
    args = parser.parse_args()
    start_s = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    is_tiny = args.model == "tiny"
    shape = TINY if is_tiny else model_shape(args.model)
    path = args.out / "profile.json"
    if not path.exists():
        _say("profiling", 0.0, f"{shape.name} on {args.device}")
        profile = profile_machine(
            shape,
            args.profile_budget,
            device=args.device,
            program="captured",
            clock=args.clock,
            max_rows=256 if is_tiny else args.max_rows,
            show_progress=False,
            **(TINY_GRID if is_tiny else {}),
        )
        write_profile(profile, path)
        _say("profiling", 1.0, f"{time.perf_counter() - start_s:.0f} s, {profile['quality']}")
    options = ValidationOptions(
        max(1.0, args.budget - (time.perf_counter() - start_s)),
        args.cases,
        () if is_tiny else shapes_named(args.others.split(","), model_shape),
        args.max_rows,
        8 if is_tiny else 32,
        args.case_s,
        args.dynamic_s,
    )
    report = validate(args.out, path, options, _say)
    shown = {key: report[key] for key in ("op", "step", "memory", "completion", "left", "warnings")}
    print(json.dumps(shown, indent=1), flush=True)
    print(load_profile(path).content_hash, f"{time.perf_counter() - start_s:.0f} s", flush=True)


def _say(what: str, share: float, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what} {share:.0%} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
