"""The low-rank linear whose ranks are a window of the product's reduced features, against float32:
even and ragged spans, filler, an empty slot, a slot of NaN, in all its forms.

    PYTHONPATH=kernels python3 experiments/kernel_ratio/window_trial.py

`--ahead FOLDER` compiles all of it into a cache folder on a machine without a GPU; `move_cache`
afterwards says where it will lie.

Shape suffixes: T rows, D input features, O output features, R the sum of the ranks.
"""

import argparse
import faulthandler
import json
import os
import time
from collections.abc import Callable, Iterator
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
    environment,
    even_spans,
    ours_with_a_window,
    own_methods,
    ragged_spans,
    reference,
    run_case,
)
from torch import Tensor

from muxtune_kernels import slot_rows
from muxtune_kernels.multi_lora import launch, window
from muxtune_kernels.multi_lora.tuning import Tuning

Shape = tuple[int, int, int, int]
CHECKED: tuple[Shape, ...] = ((2048, 4096, 4096, 8), (2048, 4096, 4096, 32))
TIMED: tuple[Shape, ...] = ((8192, 4096, 4096, 8), (2048, 4096, 4096, 8), (2048, 4096, 4096, 32))


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


class Alone:
    """The small kernels of one size, each alone."""

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape, self.case = shape, Case(*shape, device=device)
        num_rows, width, num_out, num_tasks = shape
        self.layout = launch.layout_of(self.case.adapters, self.case.scale_S.device)
        self.tuning = window.window_tuning(num_rows, width, (num_out,), num_tasks, RANK, 2)
        self.a_RD, self.b_RO = self.case.a_RD.detach(), self.case.b_RO.detach()
        self.sets = [self.case.windowed(i) for i in range(self.case.num_sets)]
        shape_TJ = (num_rows, RANK)
        self.h = [torch.randn(*shape_TJ, device=device).bfloat16() for _ in self.sets]

    def dh_db(self, tuning: Tuning, contiguous: bool, sums: bool) -> Callable[[int], Any]:
        def run(i: int) -> Any:
            item, case = self.sets[i], self.case

            def sum_parts(parts: Tensor, partials: Tensor, h: Tensor, b: Tensor, *_: Any) -> Any:
                if not sums:
                    return parts, partials
                return window._window_sum(parts, partials, h, b, item.dy_TW, item.weight,
                                          case.row_tensors, case.window, self.layout,
                                          tuning)  # fmt: skip

            dy_TO = case.sets[i].dy_TO if contiguous else item.dy_TW[:, : item.weight.num_out]
            return launch.dh_db(
                dy_TO, self.h[i], self.b_RO.t(), case.row_tensors, case.adapters, self.layout,
                tuning, sum_parts=sum_parts,
            )  # fmt: skip

        return run

    def runs(self) -> Iterator[tuple[str, Callable[[int], Any]]]:
        yield "shrink", lambda i: window.window_shrink(
            self.sets[i].x_TW, self.sets[i].weight, self.case.row_tensors, self.case.window,
            self.layout, self.tuning)  # fmt: skip
        x = self.case.sets
        yield "shrink as without room", lambda i: launch.shrink(
            x[i].x_TD.detach(), self.a_RD, self.case.row_tensors, self.layout,
            self.tuning._replace(shrink_splits=1))  # fmt: skip
        yield "outer", lambda i: launch.outer(
            self.h[i], self.sets[i].x_TW[:, : self.shape[1]], self.a_RD, self.case.row_tensors,
            self.case.adapters, self.layout, self.tuning)  # fmt: skip
        yield "dh_db", self.dh_db(self.tuning, False, False)
        yield "dh_db, contiguous dy", self.dh_db(self.tuning, True, False)
        yield "dh_db and sum", self.dh_db(self.tuning, False, True)
        variants = (
            (64, 256, 8, 3, 1), (64, 256, 8, 3, 2), (32, 256, 8, 4, 1), (64, 128, 4, 4, 1),
            (64, 128, 4, 2, 1), (32, 128, 4, 4, 1), (32, 512, 8, 3, 1), (32, 512, 8, 3, 2),
            (64, 64, 4, 4, 1), (128, 128, 8, 3, 1),
        )  # fmt: skip
        for t, n, warps, stages, splits in variants:
            tuning = self.tuning._replace(
                db_t=t, db_n=n, db_warps=warps, db_stages=stages, db_splits=splits
            )
            yield f"dh_db and sum {t} {n} {warps} {stages} {splits}", self.dh_db(
                tuning, False, True)  # fmt: skip


def time_us(run: Callable[[int], Any], num_sets: int, calls: int = 6, repeats: int = 5) -> float:
    run(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            run(i % num_sets)
    times = []
    for _ in range(repeats + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(1e3 * start.elapsed_time(stop) / calls)
    return sorted(times[1:])[repeats // 2]


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
            for _, run in Alone(shape, "cpu").runs() if shape in TIMED else ():
                run(0)
            case = Case(*shape, device="cpu")
            for name, step in own_methods(case).items():
                if "window" in name or name in MORE_WINDOW_TRIALS:
                    step(case.sets[0])
        print(shape, compiled.count, f"{time.monotonic() - start_s:.0f} s", flush=True)


WITHOUT = (
    "concatenated", "grouped_mm", "muxtune_bf16_adapters", "muxtune_explicit_calls",
    "trial_fused_backward", "trial_library_backward", "few stages", "3/8 ahead, 16 ranks",
)  # fmt: skip


def in_order() -> list[Shape]:
    """The sizes that forms differ at first."""
    shapes = all_shapes(SIZES, TOKENS, TASKS)
    return sorted(shapes, key=lambda s: (s not in MORE_TRIED, s[2], s[0] != 8192, s[0]))


def main() -> None:
    start_s = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ahead", type=Path)
    parser.add_argument("--part", default="0/1", help="of the sizes, as 0/2")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=120.0)
    arguments = parser.parse_args()
    if arguments.ahead:
        ahead(arguments.ahead, *map(int, arguments.part.split("/")))
        return
    faulthandler.dump_traceback_later(20, exit=True)  # if whoever waits for h waits forever
    for text, error in checks(CHECKED[0], "cuda"):
        print("ok   " if error < 1.2e-2 else "WRONG", CHECKED[0], text, flush=True)
    faulthandler.cancel_dump_traceback_later()
    print(f"checked after {time.monotonic() - start_s:.1f} s", flush=True)
    for shape in TIMED[:2]:
        alone = Alone(shape, "cuda")
        for name, run in alone.runs():
            print(f"{shape} {name:32}{time_us(run, alone.case.num_sets):8.1f} us", flush=True)
        del alone
    print(f"alone after {time.monotonic() - start_s:.1f} s", flush=True)
    results = []
    for shape in in_order():
        if time.monotonic() - start_s > arguments.seconds:
            print(f"left out for want of time: {shape}", flush=True)
            continue
        results += run_case(shape, 3, 3, ("graph",), WITHOUT)
        torch.cuda.empty_cache()
        if arguments.out:
            report = {"environment": environment(), "rank": RANK, "results": results}
            arguments.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
