"""Time of the multi-task low-rank linear over the plain frozen linear, forward and backward.

    PYTHONPATH=kernels python3 experiments/kernel_ratio/run.py --out kernel_ratio.json
    PYTHONPATH=kernels python3 experiments/kernel_ratio/plot.py kernel_ratio.json kernel_ratio.png

Needs one CUDA device. Every method is checked against a float32 reference on the timed inputs
first; nothing is timed when a check is red. All methods of a case are timed in turn within each
repeat, in one order and in the other, the plain linear before and after each, so that a ratio
compares neighbours in time; the spread is over the repeats. Inputs rotate among sets that together
exceed the L2 cache.

Shape suffixes: T rows, D input features, O output features, R the sum of the ranks, S tasks.
"""

import argparse
import gc
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from muxtune_kernels import RowDropout, SlotRows, multi_lora_linear, row_keys, slot_rows
from muxtune_kernels.multi_lora import launch, window_op
from muxtune_kernels.multi_lora.window import LinearWithWindows

RANK = 16
SCALE = 2.0
SIZES = ((4096, 4096), (4096, 14336))
TOKENS = (2048, 8192, 16384)
TASKS = (1, 4, 8, 32)
MIN_ROTATED_BYTES = 200e6
TOLERANCE = 1.2e-2
MODES = ("graph", "eager")
LEAST_EAGER_US = 10_000


class Inputs(NamedTuple):
    """One of the rotating sets, and the adapters; A [R, D] and B^T [R, O] in bf16 and float32."""

    x_TD: Tensor
    weight_OD: Tensor
    dy_TO: Tensor


class Case:
    """One size: its rotating inputs, rows, and adapters in the forms that the methods want."""

    def __init__(
        self, num_rows: int, width: int, num_out: int, num_tasks: int, device: str = "cuda"
    ) -> None:
        self.shape, self.device = (num_rows, width, num_out, num_tasks), device
        generator = torch.Generator(device=device).manual_seed(num_rows + num_out + num_tasks)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, generator=generator)

        set_bytes = 2 * (num_rows * (width + num_out) + width * num_out)
        self.num_sets = max(2, int(MIN_ROTATED_BYTES / set_bytes) + 1)
        self.sets = [
            Inputs(
                normal(num_rows, width).bfloat16().requires_grad_(),
                (normal(num_out, width) * width**-0.5).bfloat16(),
                normal(num_rows, num_out).bfloat16(),
            )
            for _ in range(self.num_sets)
        ]
        rank = RANK * num_tasks
        self.a_RD = (normal(rank, width) * width**-0.5).requires_grad_()
        self.b_RO = (normal(rank, num_out) * RANK**-0.5).requires_grad_()
        self.rows = slot_rows(even_spans(num_rows, num_tasks), num_rows, num_tasks, device)
        self.scale_S = torch.full((num_tasks,), SCALE, device=device)
        self.adapters = launch.Adapters((RANK,) * num_tasks, (num_out,))
        self._with_windows: dict[int, LinearWithWindows] = {}

    def with_windows(self, index: int) -> LinearWithWindows:
        """The set's weight as it is, the factors beside it."""
        if index not in self._with_windows:
            weight_OD = self.sets[index].weight_OD
            linear = window_op.linear_with_windows(weight_OD, self.adapters.slot_ranks)
            linear.refresh(self.a_RD.detach(), self.b_RO.detach())
            self._with_windows[index] = linear
        return self._with_windows[index]


def even_spans(num_rows: int, num_tasks: int) -> list[tuple[int, int, int]]:
    edges = [slot * num_rows // num_tasks for slot in range(num_tasks + 1)]
    return [(slot, edges[slot], edges[slot + 1]) for slot in range(num_tasks)]


def ragged_spans(num_rows: int, num_tasks: int) -> list[tuple[int, int, int]]:
    """Spans off every tile edge, of lengths 1 : 2 : 3 in turn, with filler at the end."""
    weights = [1 + slot % 3 for slot in range(num_tasks)]
    unit = (num_rows - 37) // sum(weights)
    edges = [unit * sum(weights[:slot]) for slot in range(num_tasks + 1)]
    return [(slot, edges[slot], edges[slot + 1]) for slot in range(num_tasks)]


_grouped_mm = getattr(torch, "_grouped_mm")  # noqa: B009  (not part of torch's typed API)
Step = Callable[[Inputs], tuple[Tensor, ...]]


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_OD: Tensor) -> Tensor:
        ctx.save_for_backward(weight_OD)
        return x_TD @ weight_OD.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        return grads[0] @ ctx.saved_tensors[0], None


def plain(case: Case) -> Step:
    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        y_TO = _FrozenLinear.apply(inputs.x_TD, inputs.weight_OD)
        return y_TO, *torch.autograd.grad(y_TO, (inputs.x_TD,), inputs.dy_TO)

    return step


class _Concatenated(torch.autograd.Function):
    """All tasks' factors side by side and a mask; cuBLAS only, accumulating where it can."""

    @staticmethod
    def forward(ctx: Any, x_TD, weight_OD, a_RD, b_RO, mask_TR) -> Tensor:
        h_TR = (x_TD @ a_RD.t()).mul_(mask_TR)
        ctx.save_for_backward(x_TD, weight_OD, a_RD, b_RO, mask_TR, h_TR)
        return (x_TD @ weight_OD.t()).addmm_(h_TR, b_RO)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        x_TD, weight_OD, a_RD, b_RO, mask_TR, h_TR = ctx.saved_tensors
        dy_TO = grads[0]
        dh_TR = (dy_TO @ b_RO.t()).mul_(mask_TR)
        dx_TD = (dy_TO @ weight_OD).addmm_(dh_TR, a_RD)
        return dx_TD, None, dh_TR.t() @ x_TD, h_TR.t() @ dy_TO, None


def concatenated(case: Case) -> Step:
    a_RD = case.a_RD.detach().bfloat16().requires_grad_()
    b_RO = case.b_RO.detach().bfloat16().requires_grad_()
    slot_T = case.rows.slot_of_row_T.repeat_interleave(1)
    slot_R = torch.arange(len(case.scale_S), device="cuda").repeat_interleave(RANK)
    mask_TR = ((slot_T[:, None] == slot_R) * SCALE).bfloat16()

    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        y_TO = _Concatenated.apply(inputs.x_TD, inputs.weight_OD, a_RD, b_RO, mask_TR)
        return y_TO, *torch.autograd.grad(y_TO, (inputs.x_TD, a_RD, b_RO), inputs.dy_TO)

    return step


def grouped_mm(case: Case) -> Step:
    num_tasks = len(case.scale_S)
    a_SDR = case.a_RD.detach().view(num_tasks, RANK, -1).transpose(1, 2).bfloat16().contiguous()
    b_SRO = (case.b_RO.detach() * SCALE).view(num_tasks, RANK, -1).bfloat16().contiguous()
    a_SDR.requires_grad_()
    b_SRO.requires_grad_()
    stop_S = torch.tensor([stop for _, _, stop in case.rows.spans], dtype=torch.int32).cuda()

    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        h_TR = _grouped_mm(inputs.x_TD, a_SDR, offs=stop_S)
        y_TO = inputs.x_TD @ inputs.weight_OD.t() + _grouped_mm(h_TR, b_SRO, offs=stop_S)
        dx, da, db = torch.autograd.grad(y_TO, (inputs.x_TD, a_SDR, b_SRO), inputs.dy_TO)
        return y_TO, dx, da.transpose(1, 2).flatten(0, 1), db.flatten(0, 1) * SCALE

    return step


def ours(
    case: Case, dtype: torch.dtype, rows: SlotRows | None = None,
    dropout: RowDropout | None = None, deterministic: bool = False,
) -> Step:  # fmt: skip
    a_RD = case.a_RD.detach().to(dtype).requires_grad_()
    b_OR = case.b_RO.detach().to(dtype).t().requires_grad_()
    ranks, rows = (RANK,) * len(case.scale_S), rows or case.rows

    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        y_TO = multi_lora_linear(
            inputs.x_TD, inputs.weight_OD, None, a_RD, b_OR, ranks, case.scale_S, rows,
            dropout, 1, deterministic,
        )  # fmt: skip
        dx, da, db = torch.autograd.grad(y_TO, (inputs.x_TD, a_RD, b_OR), inputs.dy_TO)
        return y_TO, dx, da, db.t()

    return step


def ours_with_windows(case: Case) -> Step:
    """Whoever changes the factors copies them to where the products read them, once an optimizer
    step: 5 us here, not counted, like the cast of bf16 adapters; nor is the table of windows, once
    a micro-batch."""
    index_of = {id(inputs): index for index, inputs in enumerate(case.sets)}
    a_RD, b_RO = (t.detach().requires_grad_() for t in (case.a_RD, case.b_RO))
    rows = window_op.rows_with_windows(case.rows, case.scale_S, case.with_windows(0))

    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        linear = case.with_windows(index_of[id(inputs)])
        y_TO = window_op.multi_lora_linear_with_windows(inputs.x_TD, a_RD, b_RO, linear, rows)
        return y_TO, *torch.autograd.grad(y_TO, (inputs.x_TD, a_RD, b_RO), inputs.dy_TO)

    return step


def methods_of(case: Case, without: Sequence[str] = ()) -> dict[str, Step]:
    """Plain, ours and the baselines; a baseline that this torch cannot run is left out, aloud."""
    baselines = {"concatenated": concatenated(case), "grouped_mm": grouped_mm(case)}
    methods = {"plain": plain(case), **own_methods(case), **baselines}
    methods = {name: step for name, step in methods.items() if name not in without}
    for name in baselines:
        if name not in methods:
            continue
        try:
            methods[name](case.sets[0])
        except Exception as error:
            print(f"{name} does not run at {case.shape}: {error}", flush=True)
            del methods[name]
    return methods


def own_methods(case: Case) -> dict[str, Step]:
    return {
        "muxtune_fp32_adapters": ours(case, torch.float32),
        "muxtune_bf16_adapters": ours(case, torch.bfloat16),
        "muxtune_windows": ours_with_windows(case),
    }


def has_extras(shape: tuple[int, int, int, int]) -> bool:
    return shape[3] == 8 and shape[0] == 8192


def all_shapes(
    sizes: Sequence[tuple[int, int]], tokens: Sequence[int], tasks: Sequence[int]
) -> list[tuple[int, int, int, int]]:
    return [
        (num_rows, width, num_out, num_tasks)
        for width, num_out in sizes
        for num_rows in tokens
        for num_tasks in tasks
    ]


def extras_of(case: Case) -> dict[str, Step]:
    num_rows, _, _, num_tasks = case.shape
    ragged = slot_rows(ragged_spans(num_rows, num_tasks), num_rows, num_tasks, case.device)
    keys_T = row_keys(0, 0, 0, torch.arange(num_rows)).to(case.device)
    dropout = RowDropout(keys_T, torch.full((num_tasks,), 0.05, device=case.device))
    return {
        "muxtune_ragged_rows": ours(case, torch.float32, rows=ragged),
        "muxtune_dropout": ours(case, torch.float32, dropout=dropout),
        "muxtune_deterministic": ours(case, torch.float32, deterministic=True),
    }


def reference(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """Float32, a task at a time, from bf16-rounded adapters."""
    x_TD, weight_OD, dy_TO = (t.detach().float() for t in inputs)
    a_RD, b_RO = (t.detach().bfloat16().float() for t in (case.a_RD, case.b_RO))
    y_TO, dx_TD = x_TD @ weight_OD.t(), dy_TO @ weight_OD
    da_RD, db_RO = torch.zeros_like(a_RD), torch.zeros_like(b_RO)
    for slot, start, stop in case.rows.spans:
        ranks, rows = slice(slot * RANK, (slot + 1) * RANK), slice(start, stop)
        h, dh = x_TD[rows] @ a_RD[ranks].t() * SCALE, dy_TO[rows] @ b_RO[ranks].t() * SCALE
        y_TO[rows] += h @ b_RO[ranks]
        dx_TD[rows] += dh @ a_RD[ranks]
        da_RD[ranks], db_RO[ranks] = dh.t() @ x_TD[rows], h.t() @ dy_TO[rows]
    return y_TO, dx_TD, da_RD, db_RO


def check(case: Case, methods: dict[str, Step]) -> dict[str, list[float]]:
    """Relative errors of (y, dx, dA, dB) a method. Raises SystemExit when one is too large."""
    wanted = reference(case, case.sets[0])
    errors = {}
    for name, step in methods.items():
        if name == "plain":
            continue
        got = step(case.sets[0])
        errors[name] = [
            float((g.detach().float() - w).norm() / w.norm())
            for g, w in zip(got, wanted, strict=True)
        ]
        if not max(errors[name]) < TOLERANCE:
            raise SystemExit(f"{name} is wrong at {case.shape}: {errors[name]}; nothing reported")
    return errors


def graphed(case: Case, step: Step, steps: int) -> Callable[[], None]:
    """A replay of `steps` steps over the rotating sets."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for inputs in case.sets:
            step(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(steps):
            step(case.sets[i % case.num_sets])
    return graph.replay


def looped(case: Case, step: Step, steps: int) -> Callable[[], None]:
    def run() -> None:
        for i in range(steps):
            step(case.sets[i % case.num_sets])

    run()
    return run


def measure(
    case: Case, methods: dict[str, Step], use_graph: bool, repeats: int, steps: int
) -> dict[str, dict[str, float]]:
    """Microseconds a step (`host_us`: until the host is done), and the ratio to the plain linear
    timed before and after: median, least and greatest over the repeats. Eagerly so many steps that
    the first one's wait for the host does not count."""
    prepare = graphed if use_graph else looped
    if not use_graph:
        plain_us, _ = time_us(looped(case, methods["plain"], steps), steps)
        steps = max(steps, math.ceil(LEAST_EAGER_US / plain_us))
    runs = {name: prepare(case, step, steps) for name, step in methods.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    host: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        before, _ = time_us(runs["plain"], steps)
        for name, run in list(runs.items())[:: -1 if repeat % 2 else 1]:
            us, host_us = time_us(run, steps)
            after, _ = time_us(runs["plain"], steps)
            if repeat:
                times[name].append(us)
                host[name].append(host_us)
                ratios[name].append(2 * us / (before + after))
            before = after
    return {name: summary(times[name], ratios[name], host[name]) for name in runs}


def time_us(run: Callable[[], None], steps: int) -> tuple[float, float]:
    """Microseconds a step: of the device, and until the host is done."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    before_s = time.perf_counter()
    run()
    host_us = 1e6 * (time.perf_counter() - before_s)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3 / steps, host_us / steps


def summary(values_us: list[float], ratios: list[float], host_us: list[float]) -> dict[str, float]:
    return {
        "step_us": statistics.median(values_us),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "host_us": statistics.median(host_us),
    }


def environment() -> dict[str, str]:
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "date": os.environ.get("MEASURED_ON", time.strftime("%Y-%m-%d")),
    }


def run_case(
    shape: tuple[int, int, int, int], repeats: int, steps: int, modes: Sequence[str] = MODES,
    without: Sequence[str] = (),
) -> list[dict[str, Any]]:  # fmt: skip
    case = Case(*shape)
    methods = methods_of(case, without)
    errors = check(case, methods)
    if has_extras(shape):
        methods |= extras_of(case)
    results = []
    for mode in modes:
        measured = measure(case, methods, mode == "graph", repeats, steps)
        row = dict(zip(("tokens", "in", "out", "tasks"), shape, strict=True))
        results.append(row | {"mode": mode, "methods": measured, "errors": errors})
        line = "  ".join(f"{name} {m['ratio']:.3f}" for name, m in measured.items())
        if mode == "eager":
            line += "  host us " + " ".join(f"{m['host_us']:.0f}" for m in measured.values())
        print(f"{shape} {mode:5s} {measured['plain']['step_us']:8.1f} us  {line}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--tasks", type=int, nargs="*", default=TASKS)
    parser.add_argument("--out-features", type=int, nargs="*", default=[out for _, out in SIZES])
    parser.add_argument("--modes", nargs="*", choices=MODES, default=MODES)
    parser.add_argument("--without", nargs="*", default=[], help="methods")
    parser.add_argument("--seconds", type=float, default=600.0, help="starts no case after that")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    gc.disable()  # the host's time is measured too
    results, start_s = [], time.monotonic()
    sizes = [size for size in SIZES if size[1] in arguments.out_features]
    shapes = all_shapes(sizes, arguments.tokens, arguments.tasks)
    for shape in shapes:
        if time.monotonic() - start_s > arguments.seconds:
            print(f"left out for want of time: {shape}", flush=True)
            continue
        results += run_case(
            shape, arguments.repeats, arguments.steps, arguments.modes, arguments.without
        )
        gc.collect()
        torch.cuda.empty_cache()
        report = {"environment": environment(), "rank": RANK, "results": results}
        arguments.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
