"""The low-rank linear whose ranks are a window of the product's reduced features, against float32:
even and ragged spans, filler, an empty slot, a slot of NaN, in all its forms.

    PYTHONPATH=kernels python3 experiments/kernel_ratio/window_trial.py

`--ahead FOLDER` compiles all of it into a cache folder on a machine without a GPU; `move_cache`
afterwards says where it will lie.

Shape suffixes: T rows, D input features, O output features, R the sum of the ranks.
"""

import argparse
import faulthandler
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from run import (
    MORE_TRIED,
    MORE_WINDOW_TRIALS,
    RANK,
    SIZES,
    TASKS,
    TOKENS,
    Case,
    all_shapes,
    even_spans,
    ours_with_a_window,
    own_methods,
    ragged_spans,
    reference,
)

from muxtune_kernels import slot_rows
from muxtune_kernels.multi_lora import launch, window

Shape = tuple[int, int, int, int]
CHECKED: tuple[Shape, ...] = ((2048, 4096, 4096, 8), (2048, 4096, 4096, 32))


def checks(shape: Shape, device: str) -> Iterator[tuple[str, float]]:
    """(what, largest relative error of y, dx, dA, dB): even spans, ragged ones with filler and an
    empty slot, and the same with a slot of NaN, all others of which must be as without."""
    num_rows, _, _, num_tasks = shape
    ragged = [span for span in ragged_spans(num_rows, num_tasks) if span[0] != 2]
    for name, spans in (("even", even_spans(num_rows, num_tasks)), ("ragged", ragged)):
        case = Case(*shape, device=device)
        case.rows = slot_rows(spans, num_rows, num_tasks, device)
        bounds_S3 = case.rows.slot_bounds_S3
        assert bounds_S3 is not None
        case.row_tensors = launch.RowTensors(case.rows.slot_of_row_T, bounds_S3, case.scale_S, None)
        case.window = window.window_of(case.row_tensors, case.adapters)
        for label, sides in (("all apart", ""), ("dA beside", "dA"), ("h and dA beside", "h dA")):
            step = ours_with_a_window(case, sides)
            got = step(case.sets[0])
            if device == "cpu":
                continue
            pairs = zip(got, reference(case, case.sets[0]), strict=True)
            errors = [float((g.float() - w).norm() / w.norm()) for g, w in pairs]
            again = step(case.sets[0])
            same = all(torch.equal(p, q) for p, q in zip(got, again, strict=True))
            yield f"{name} {label} {[round(e, 5) for e in errors]} again {same}", max(errors)
            yield from _with_nan(case, step, got, name)


def _with_nan(case: Case, step: Any, clean: Any, name: str) -> Iterator[tuple[str, float]]:
    start, stop = next(span[1:] for span in case.rows.spans if span[0] == 1)
    weight, x_TW, _ = case.windowed(0)
    kept, factor = x_TW[start].clone(), case.a_RD.detach()
    own_T = case.rows.slot_of_row_T != 1
    own_R = torch.arange(factor.shape[0], device=factor.device) // RANK != 1
    x_TW[start] = float("nan")
    before = factor[RANK, 3].clone()
    factor[RANK, 3] = float("inf")
    window.widen_weight(weight, factor, case.b_RO.detach(), case.adapters)
    y, dx, da, db = step(case.sets[0])
    same = all(
        torch.equal(p, q)
        for p, q in ((y[own_T], clean[0][own_T]), (dx[own_T], clean[1][own_T]),
                     (da[own_R], clean[2][own_R]), (db[own_R], clean[3][own_R]))
    )  # fmt: skip
    poisoned = not y[start:stop].isfinite().all()
    x_TW[start], factor[RANK, 3] = kept, before
    window.widen_weight(weight, factor, case.b_RO.detach(), case.adapters)
    yield f"{name} NaN of a slot: others same {same}, own not finite {poisoned}", float(not same)


def ahead(folder: Path, part: int, parts: int) -> None:
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    from muxtune_kernels.without_gpu import TARGETS, compiling_for

    shapes = sorted(all_shapes(SIZES, TOKENS, TASKS), key=lambda shape: shape not in MORE_TRIED)
    for shape in shapes[part::parts]:
        start_s = time.monotonic()
        with compiling_for(TARGETS["h100"]) as compiled:
            if shape in CHECKED:
                list(checks(shape, "cpu"))
            case = Case(*shape, device="cpu")
            for name, step in own_methods(case).items():
                if "window" in name or name in MORE_WINDOW_TRIALS:
                    step(case.sets[0])
        print(shape, compiled.count, f"{time.monotonic() - start_s:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ahead", type=Path)
    parser.add_argument("--part", default="0/1", help="of the sizes, as 0/2")
    arguments = parser.parse_args()
    if arguments.ahead:
        ahead(arguments.ahead, *map(int, arguments.part.split("/")))
        return
    faulthandler.dump_traceback_later(40, exit=True)  # if whoever waits for h waits forever
    wrong = 0
    for shape in CHECKED:
        for text, error in checks(shape, "cuda"):
            wrong += not error < 1.2e-2
            print("ok   " if error < 1.2e-2 else "WRONG", shape, text, flush=True)
        torch.cuda.empty_cache()
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
