"""Forms of the low-rank linear whose ranks are a window of the product's reduced features: each
kernel alone, then the whole operator, after a check against float32.

    PYTHONPATH=kernels python3 experiments/kernel_ratio/window_trial.py --out trial.json

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
    RANK,
    Case,
    even_spans,
    measure,
    ours,
    ours_with_a_window,
    ours_with_room,
    plain,
    ragged_spans,
    reference,
)
from torch import Tensor

from muxtune_kernels import slot_rows
from muxtune_kernels.multi_lora import launch, window
from muxtune_kernels.multi_lora.tuning import Tuning, tuning_of

Shape = tuple[int, int, int, int]
CHECKED: tuple[Shape, ...] = ((2048, 4096, 4096, 8), (2048, 4096, 4096, 32))
TUNED: tuple[Shape, ...] = ((8192, 4096, 4096, 8), (2048, 4096, 4096, 8), (2048, 4096, 4096, 32))
RATIOS: tuple[Shape, ...] = (
    (8192, 4096, 4096, 8),
    (2048, 4096, 4096, 8),
    (2048, 4096, 4096, 32),
    (8192, 4096, 4096, 32),
    (8192, 4096, 4096, 1),
    (2048, 4096, 4096, 1),
    (16384, 4096, 4096, 8),
    (2048, 4096, 14336, 32),
    (8192, 4096, 14336, 8),
)
Blocks = window.Blocks


class Bench:
    def __init__(self, shape: Shape, device: str) -> None:
        self.shape, self.case = shape, Case(*shape, device=device)
        num_rows, width, num_out, num_tasks = shape
        self.layout = launch.layout_of(self.case.adapters, self.case.scale_S.device)
        self.tuning = tuning_of(num_rows, width, (num_out,), num_tasks, RANK, 2, False)
        self.a_RD, self.b_RO = self.case.a_RD.detach(), self.case.b_RO.detach()
        self.rows = self.case.row_tensors
        self.sets = [self.case.windowed(i) for i in range(self.case.num_sets)]
        self.h = [
            torch.randn(num_rows, RANK, device=device).bfloat16() for _ in range(self.case.num_sets)
        ]

    def forward(self, blocks: Blocks) -> Callable[[int], Any]:
        def run(i: int) -> Any:
            item = self.sets[i]
            side = window.Side(self.h[i], item.x_TW) if blocks.side else None
            return window.window_linear(item.x_TW, item.weight, self.case.window, self.layout,
                                        blocks, True, self.rows, side)  # fmt: skip

        return run

    def backward(self, blocks: Blocks) -> Callable[[int], Any]:
        def run(i: int) -> Any:
            item, side = self.sets[i], None
            if blocks.side:
                side = window.Side(self.h[i], item.x_TW, torch.empty_like(self.a_RD))
            return window.window_linear(item.dy_TW, item.weight, self.case.window, self.layout,
                                        blocks, False, self.rows, side)  # fmt: skip

        return run

    def shrink(self, tuning: Tuning) -> Callable[[int], Any]:
        return lambda i: window.window_shrink(
            self.sets[i].x_TW, self.sets[i].weight, self.rows, self.case.window, self.layout, tuning
        )

    def dh_db(self, tuning: Tuning) -> Callable[[int], Any]:
        def run(i: int) -> Any:
            item = self.sets[i]

            def sum_parts(parts: Tensor, partials: Tensor, h: Tensor, b: Tensor, *_: Any) -> Any:
                return window._window_sum(parts, partials, h, b, item.dy_TW, item.weight, self.rows,
                                          self.case.window, self.layout, tuning)  # fmt: skip

            return launch.dh_db(
                item.dy_TW[:, : item.weight.num_out], self.h[i], self.b_RO.t(), self.rows,
                self.case.adapters, self.layout, tuning, sum_parts=sum_parts,
            )  # fmt: skip

        return run

    def variants(self) -> Iterator[tuple[str, Callable[[int], Any]]]:
        num_rows, _, _, tasks = self.shape
        case = self.case
        yield "forward plain", lambda i: case.sets[i].x_TD @ case.sets[i].weight_OD.t()
        yield "backward plain", lambda i: case.sets[i].dy_TO @ case.sets[i].weight_OD
        if case.has_room:
            yield "forward room", lambda i: case.wide_of(i).forward_product()
            yield "backward room", lambda i: case.wide_of(i).backward_product()
        products = (
            Blocks(132), Blocks(128), Blocks(132, 4), Blocks(128, 4), Blocks(128, 3, False),
            Blocks(128, group=16), Blocks(128, group=4),
        )  # fmt: skip
        for blocks in products:
            yield f"forward {_name(blocks)}", self.forward(blocks)
            yield f"backward {_name(blocks)}", self.backward(blocks)
        sides = (
            Blocks(128, side=4), Blocks(128, side=4, side_t=64, side_n=256),
            Blocks(128, side=4, side_stages=5), Blocks(128, side=4, side_n=1024, side_t=16),
            Blocks(128, side=4, side_t=16, side_stages=8),
            Blocks(124, side=8),
        )  # fmt: skip
        for blocks in sides:
            yield f"backward {_name(blocks)}", self.backward(blocks)
        for blocks in (
            Blocks(128, side=4), Blocks(128, side=4, side_stages=6), Blocks(124, side=8),
            Blocks(128, side=4, side_stages=6, group=16),
        ):  # fmt: skip
            yield f"forward {_name(blocks)}", self.forward(blocks)
        yield "outer", lambda i: launch.outer(
            self.h[i], self.sets[i].x_TW[:, : self.shape[1]], self.a_RD, self.rows, case.adapters,
            self.layout, self.tuning)  # fmt: skip
        shrinks = ((16, 256, 3), (16, 256, 6), (16, 512, 4), (32, 256, 4)) if num_rows < 4096 else (
            (64, 128, 4), (64, 128, 6), (32, 256, 4), (32, 128, 6), (64, 256, 4))  # fmt: skip
        for t, k, stages in shrinks:
            tuning = self.tuning._replace(shrink_t=t, shrink_k=k, shrink_stages=stages)
            yield f"shrink {t} {k} {stages}", self.shrink(tuning)
        for db_n, sum_t in ((128, 4), (256, 4), (256, 8), (256, 16), (256, 2)):
            if not (tasks == 32 and db_n == 256):
                tuning = self.tuning._replace(db_n=db_n, db_warps=db_n // 32, sum_t=sum_t)
                yield f"dh_db and sum {db_n} {sum_t}", self.dh_db(tuning)


def _name(blocks: Blocks) -> str:
    plainly = Blocks(0)
    changes = [f"{k}={v}" for k, v in blocks._asdict().items() if v != getattr(plainly, k)]
    return " ".join(changes)


def steps_of(case: Case) -> dict[str, Any]:
    small = case.shape[0] < 4096
    shrink = {"shrink_t": 16, "shrink_k": 256, "shrink_stages": 6} if small else {}
    steps = {
        "plain": plain(case),
        "muxtune_fp32_adapters": ours(case, torch.float32),
        "window": ours_with_a_window(case),
        "h apart": ours_with_a_window(case, "dA", **shrink),
        "all apart": ours_with_a_window(case, "", **shrink),
    }
    if case.has_room:
        steps["with room"] = ours_with_room(case)
    return steps


def checks(shape: Shape, device: str, h_apart: bool = False) -> Iterator[tuple[str, float]]:
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
        for label, sides in (("beside", "dA" if h_apart else "h dA"), ("apart", "")):
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

    for shape in list(dict.fromkeys((*CHECKED, *TUNED, *RATIOS)))[part::parts]:
        start_s = time.monotonic()
        with compiling_for(TARGETS["h100"]) as compiled:
            if shape in CHECKED:
                list(checks(shape, "cpu"))
            if shape in TUNED:
                for name, run in Bench(shape, "cpu").variants():
                    try:
                        run(0)
                    except Exception as error:
                        print(f"{shape} {name}: {error!r:.200}", flush=True)
            if shape in RATIOS:
                case = Case(*shape, device="cpu")
                for step in steps_of(case).values():
                    step(case.sets[0])
        print(shape, compiled.count, f"{time.monotonic() - start_s:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ahead", type=Path)
    parser.add_argument("--part", default="0/1", help="of the sizes, as 0/2")
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--h-apart", action="store_true", help="without products that wait for h")
    arguments = parser.parse_args()
    if arguments.ahead:
        ahead(arguments.ahead, *map(int, arguments.part.split("/")))
        return
    stop_s = time.monotonic() + arguments.seconds
    found: dict[str, Any] = {"checks": [], "alone": [], "ratios": []}

    def keep() -> None:
        if arguments.out:
            arguments.out.write_text(json.dumps(found, indent=1))

    faulthandler.dump_traceback_later(35, exit=True)  # if whoever waits for h waits forever
    for shape in CHECKED:
        for text, error in checks(shape, "cuda", arguments.h_apart):
            found["checks"].append([shape, text, error])
            print("ok   " if error < 1.2e-2 else "WRONG", shape, text, flush=True)
        torch.cuda.empty_cache()
    faulthandler.cancel_dump_traceback_later()
    keep()
    for shape in RATIOS[:3]:
        found["ratios"].append([shape, ratios(shape, arguments.h_apart)])
        keep()
    for shape in TUNED:
        bench = Bench(shape, "cuda")
        for name, run in bench.variants():
            if time.monotonic() > stop_s:
                break
            if arguments.h_apart and name.startswith("forward") and "side" in name:
                continue
            try:
                us = time_us(run, bench.case.num_sets)
            except Exception as error:
                print(f"{shape} {name} does not run: {error!r:.150}", flush=True)
                continue
            found["alone"].append([shape, name, us])
            print(f"{shape} {name:40} {us:8.1f}", flush=True)
        del bench
        torch.cuda.empty_cache()
        keep()
    for shape in RATIOS[3:]:
        if time.monotonic() < stop_s:
            found["ratios"].append([shape, ratios(shape, arguments.h_apart)])
            keep()


def ratios(shape: Shape, h_apart: bool) -> dict[str, Any]:
    case = Case(*shape)
    steps = steps_of(case)
    if h_apart:
        del steps["window"]
    measured = measure(case, steps, True, 3, 4)
    line = "  ".join(
        f"{name} {m['ratio']:.3f} ({m['step_us']:.0f})" for name, m in measured.items()
    )
    print(shape, line, flush=True)
    del case
    torch.cuda.empty_cache()
    return measured


if __name__ == "__main__":
    main()
