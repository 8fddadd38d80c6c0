"""Every kernel of the multi-task low-rank linear alone, under many block sizes.

    PYTHONPATH=kernels python3 experiments/kernel_ratio/tune.py --out tune.json [--seconds 30]

Microseconds and TB/s (the least bytes that the kernel must move, by the time) under a CUDA graph,
inputs rotating past the L2 cache. `--warm I/N` only compiles the I-th of N parts of the variants,
so that N processes fill Triton's cache. What is chosen goes into muxtune_kernels/multi_lora/tuning.

Shape suffixes: T rows, D input features, O output features.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from run import RANK, Case, environment
from torch import Tensor

from muxtune_kernels.multi_lora import launch, window
from muxtune_kernels.multi_lora.tuning import GemmBlocks, Tuning, tuning_of

SHAPES = (
    (8192, 4096, 4096, 8),
    (2048, 4096, 4096, 1),
    (2048, 4096, 4096, 32),
    (8192, 4096, 4096, 1),
    (2048, 4096, 4096, 8),
    (8192, 4096, 4096, 32),
    (2048, 4096, 14336, 32),
    (3824, 4096, 12288, 8),
    (3824, 11008, 4096, 8),
)
Run = Callable[[int], Any]


class Bench:
    """The operands of every kernel of one shape, one of each for each of the rotating sets."""

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        self.case = case = Case(*shape)
        num_rows, width, num_out, num_tasks = shape
        self.adapters = launch.Adapters((RANK,) * num_tasks, (num_out,))
        self.layout = launch.layout_of(self.adapters, case.sets[0].x_TD.device)
        bounds_S3 = case.rows.slot_bounds_S3
        assert bounds_S3 is not None
        self.rows = launch.RowTensors(case.rows.slot_of_row_T, bounds_S3, case.scale_S, None)
        self.tuning = tuning_of(num_rows, width, (num_out,), num_tasks, 16, 2, False)
        self.a_RD, self.b_RO = case.a_RD.detach(), case.b_RO.detach()
        self.x = [inputs.x_TD.detach() for inputs in case.sets]
        self.h = [torch.randn(num_rows, 16, device="cuda").bfloat16() for _ in case.sets]
        self.windows = [case.with_windows(i) for i in range(case.num_sets)]
        self.window_rows = window.rows_with_windows(case.rows, case.scale_S, self.windows[0])

    def kernels(self) -> Iterator[tuple[str, str, float, Run]]:
        """(kernel, variant, least bytes, call)."""
        num_rows, width, num_out, _ = self.case.shape
        x_bytes, dy_bytes = 2.0 * num_rows * width, 2.0 * num_rows * num_out
        factors = 4.0 * self.a_RD.shape[0]
        yield from self._shrinks(x_bytes + factors * width)
        yield from self._dh_dbs(dy_bytes + 2 * factors * num_out)
        yield from self._outers(x_bytes + factors * width)
        yield "place", "as shipped", 6.0 * self.a_RD.shape[0] * (width + num_out), self._place
        yield from self._products(x_bytes + dy_bytes + 2.0 * width * num_out)

    def _variants(self, **choices: tuple[Any, ...]) -> Iterator[tuple[str, Tuning]]:
        yield "as shipped", self.tuning
        for values in itertools.product(*choices.values()):
            changes = dict(zip(choices, values, strict=True))
            yield " ".join(map(str, values)), self.tuning._replace(**changes)

    def _shrinks(self, least: float) -> Iterator[tuple[str, str, float, Run]]:
        small = self.case.shape[0] < 4096
        choices = {"shrink_t": (16, 32) if small else (32, 64), "shrink_k": (128, 256),
                   "shrink_stages": (3, 4)}  # fmt: skip
        for name, tuning in self._variants(**choices, shrink_splits=(2, 4) if small else (1,)):
            yield "shrink", name, least, lambda i, t=tuning: launch.shrink(
                self.x[i], self.a_RD, self.rows, self.layout, t)  # fmt: skip
        for name, tuning in self._variants(**choices):
            yield "windowed shrink", name, least, lambda i, t=tuning: self._windowed_shrink(i, t)

    def _windowed_shrink(self, i: int, tuning: Tuning) -> Any:
        (factors, _), (rows, of_rows) = self.windows[i], self.window_rows
        return window.window_shrink(
            self.x[i], factors.a_PD, factors.bad_S, self.beside(i, False), rows, of_rows,
            self.layout, tuning,
        )  # fmt: skip

    def beside(self, i: int, is_dy: bool) -> Tensor:
        return torch.empty_like(self.case.sets[i].dy_TO if is_dy else self.x[i])

    def _dh_dbs(self, least: float) -> Iterator[tuple[str, str, float, Run]]:
        splits = (self.tuning.db_splits, 1, 2) if self.case.shape[3] == 8 else (
            self.tuning.db_splits,)  # fmt: skip
        for name, tuning in self._variants(
            db_t=(32, 64, 128), db_n=(128, 256), db_stages=(2, 3, 4),
            db_warps=(4, 8), db_splits=tuple(sorted(set(splits))),
        ):  # fmt: skip
            block = tuning.db_t * tuning.db_n
            wide_enough = block >= 8192 and (tuning.db_warps == 4) == (tuning.db_n == 128)
            if name == "as shipped" or (wide_enough and block * tuning.db_stages <= 65536):
                yield "dh_db", name, least, lambda i, t=tuning: self._dh_db(i, t)
        for name, tuning in self._variants(db_n=(128, 256), sum_t=(2, 4, 8)):
            yield "dh_db and sum", name, least, lambda i, t=tuning: launch.dh_db(
                self.case.sets[i].dy_TO, self.h[i], self.b_RO.t(), self.rows, self.adapters,
                self.layout, t)  # fmt: skip

    def _dh_db(self, i: int, tuning: Tuning) -> Any:
        return launch.dh_db_parts(
            self.case.sets[i].dy_TO, self.h[i], self.b_RO.t(), self.rows, self.adapters,
            self.layout, tuning)  # fmt: skip

    def _outers(self, least: float) -> Iterator[tuple[str, str, float, Run]]:
        splits = (1, 2, 4) if self.case.shape[3] < 32 else (1,)
        for name, tuning in self._variants(
            da_t=(32, 64, 128, 256), da_n=(32, 64, 128, 256), da_stages=(2, 3, 4),
            da_warps=(4, 8), da_splits=splits,
        ):  # fmt: skip
            block = tuning.da_t * tuning.da_n
            programs = self.case.shape[1] // tuning.da_n * self.case.shape[3] * tuning.da_splits
            fits = block in (8192, 16384) and block * tuning.da_stages <= 49152
            fits &= (tuning.da_warps == 8) == (block == 16384)
            if name == "as shipped" or (fits and 100 <= programs <= 1100):
                yield "outer", name, least, lambda i, t=tuning: launch.outer(
                    self.h[i], self.x[i], self.a_RD, self.rows, self.adapters, self.layout,
                    t)  # fmt: skip

    def _place(self, i: int) -> None:
        self.windows[i].refresh(self.a_RD, self.b_RO)

    def _products(self, least: float) -> Iterator[tuple[str, str, float, Run]]:
        sets = self.case.sets
        yield "forward", "plain", least, lambda i: self.x[i] @ sets[i].weight_OD.t()
        yield "backward", "plain", least, lambda i: sets[i].dy_TO @ sets[i].weight_OD
        yield "forward", "library", least, lambda i: self._library(i, True)
        yield "backward", "library", least, lambda i: self._library(i, False)
        yield "forward", "windows", least, lambda i: self._windowed(i, True)
        yield "backward", "windows", least, lambda i: self._windowed(i, False)
        for blocks in (
            GemmBlocks(128, 256, 64, 8, 3, True, 1.0), GemmBlocks(128, 256, 64, 8, 4, True, 1.0),
            GemmBlocks(128, 128, 64, 4, 4, False, 1.0), GemmBlocks(128, 128, 64, 8, 4, False, 1.0),
            GemmBlocks(64, 256, 64, 4, 4, True, 1.0), GemmBlocks(64, 128, 64, 4, 4, False, 1.0),
        ):  # fmt: skip
            name = f"fused {blocks.t} {blocks.n} {blocks.warps} {blocks.stages}"
            yield "forward", name, least, lambda i, b=blocks: self._fused(i, b, True)
            yield "backward", name, least, lambda i, b=blocks: self._fused(i, b, False)

    def _windowed(self, i: int, forward: bool) -> Any:
        factors, own = self.windows[i].factors, self.x[i] if forward else self.case.sets[i].dy_TO
        num_out, width = factors.weight_OD.shape
        out_TN = own.new_empty((own.shape[0], num_out if forward else width))
        ranks, tile = (factors.bt_OD, (256, 64)) if forward else (factors.a_PD, (64, 256))
        window.window_linear(
            window.Operand(own, torch.zeros_like(own), (128, 64)),
            window.Operand(factors.weight_OD, ranks, tile), out_TN, self.window_rows.window,
            self.layout, forward,
        )  # fmt: skip
        return out_TN

    def _library(self, i: int, forward: bool) -> Any:
        weight_OD, dy_TO = self.case.sets[i].weight_OD, self.case.sets[i].dy_TO
        if forward:
            y_TO = launch.expand(self.h[i], self.b_RO.t(), None, self.rows, (weight_OD.shape[0],),
                                 self.layout, self.tuning, False)  # fmt: skip
            return y_TO.addmm_(self.x[i], weight_OD.t())
        dx_TD = launch.expand(self.h[i], self.a_RD.t(), None, self.rows, (weight_OD.shape[1],),
                              self.layout, self.tuning, True)  # fmt: skip
        return dx_TD.addmm_(dy_TO, weight_OD)

    def _fused(self, i: int, blocks: GemmBlocks, forward: bool) -> Any:
        inputs = self.case.sets[i]
        left = self.x[i] if forward else inputs.dy_TO
        factor = self.b_RO if forward else self.a_RD
        return launch.linear(left, inputs.weight_OD, None, self.h[i], factor, self.rows,
                             self.layout, blocks, forward)  # fmt: skip


class Timed(NamedTuple):
    shape: tuple[int, int, int, int]
    kernel: str
    variant: str
    us: float
    least_us: float
    terabytes_s: float


def time_us(run: Run, num_sets: int, calls: int = 8, repeats: int = 5) -> tuple[float, float]:
    """(median, least) microseconds a call."""
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
    return statistics.median(times[1:]), min(times[1:])


def report(timed: list[Timed]) -> None:
    """The best four of each kernel, and those that are always of interest."""
    for kernel in dict.fromkeys(found.kernel for found in timed):
        of_kernel = sorted((t for t in timed if t.kernel == kernel), key=lambda found: found.us)
        always = ("as shipped", "plain", "library", "windows")
        shown = [t for i, t in enumerate(of_kernel) if i < 4 or t.variant in always]
        line = "; ".join(f"{t.variant} {t.us:.1f} us {t.terabytes_s:.2f}" for t in shown)
        print(f"{kernel:14}{line}", flush=True)


def measure(shape: tuple[int, int, int, int], stop_s: float) -> list[Timed]:
    bench, timed = Bench(shape), []
    for kernel, variant, least, run in bench.kernels():
        if time.monotonic() > stop_s:
            print(f"no time for {shape} {kernel}", flush=True)
            break
        try:
            us, least_us = time_us(run, bench.case.num_sets)
        except Exception as error:
            print(f"{shape} {kernel} {variant} does not run: {error!r:.150}", flush=True)
            continue
        timed.append(Timed(shape, kernel, variant, us, least_us, least / us / 1e6))
    print(f"== {shape}", flush=True)
    report(timed)
    return timed


def warm(part: int, parts: int, shapes: tuple[tuple[int, int, int, int], ...]) -> None:
    for shape in shapes:
        bench = Bench(shape)
        for index, (kernel, variant, _, run) in enumerate(bench.kernels()):
            if index % parts == part:
                try:
                    run(0)
                except Exception as error:
                    print(f"{shape} {kernel} {variant} does not run: {error!r:.150}", flush=True)
        torch.cuda.synchronize()
        del bench
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--warm")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="the first so many")
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    shapes = SHAPES[: arguments.shapes]
    if arguments.warm:
        part, parts = map(int, arguments.warm.split("/"))
        warm(part, parts, shapes)
        return
    timed: list[Timed] = []
    stop_s = time.monotonic() + arguments.seconds
    for shape in shapes:
        timed += measure(shape, stop_s)
        torch.cuda.empty_cache()
        if arguments.out:
            arguments.out.write_text(json.dumps(
                {"environment": environment(), "timed": [t._asdict() for t in timed]}, indent=1
            ))  # fmt: skip


if __name__ == "__main__":
    main()
