"""Forms of the multi-task low-rank linear side by side, for the four linears of a block.

    PYTHONPATH=kernels python3 experiments/kernel_ratio/variants.py --out variants.json

Needs one CUDA device. As in a training step: explicit calls, forward and backward apart, gradients
of the factors into their places, on a second stream where a form says so, all under a CUDA graph.
Every form is first compared with a float32 reference, and with itself bit for bit over several
runs; a form that is off is not timed. Cases come in the order of what they tell; `--seconds` ends
the list. `--workers` processes compile the kernels first.

Shape suffixes: T rows, D input features, O output features, R the sum of the ranks, S tasks.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from run import SCALE, TOLERANCE, environment, ragged_spans
from torch import Tensor

from muxtune_kernels import slot_rows
from muxtune_kernels.multi_lora import ReadyFlags, launch
from muxtune_kernels.multi_lora.tuning import tuning_of

FAMILIES = {
    "qkv": (4096, (4096, 4096, 4096)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (11008, 11008)),
    "down": (11008, (4096,)),
}
BLOCK = "block"  # all four, as a step walks them
RUNS = 6
MIXED = (8, 16, 32, 64)


class CaseSpec(NamedTuple):
    rows: int
    tasks: int
    mixed: bool = False

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(MIXED[i % 4] if self.mixed else 16 for i in range(self.tasks))

    def __str__(self) -> str:
        return f"{self.rows} rows, {self.tasks} tasks, {'ranks 8-64' if self.mixed else 'r=16'}"


CASES = (
    CaseSpec(3824, 8),
    CaseSpec(3824, 8, True),
    CaseSpec(2048, 8),
    CaseSpec(3824, 32),
    CaseSpec(8192, 8),
    CaseSpec(2048, 32),
    CaseSpec(8192, 32),
    CaseSpec(8192, 8, True),
)


class Linear:
    """One linear of a case with its inputs, adapters and places for gradients."""

    def __init__(self, name: str, spec: CaseSpec, device: str = "cuda") -> None:
        self.name, self.spec = name, spec
        self.width, self.widths = FAMILIES[name]
        generator = torch.Generator(device=device).manual_seed(len(name) + spec.rows)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, generator=generator)

        out, rank = sum(self.widths), sum(spec.ranks)
        self.x_TD = normal(spec.rows, self.width).bfloat16()
        self.dy_TO = normal(spec.rows, out).bfloat16()
        self.weight_OD = (normal(out, self.width) * self.width**-0.5).bfloat16()
        self.a_RD = normal(len(self.widths) * rank, self.width) * self.width**-0.5
        self.b_RO = normal(rank, out) * 0.25
        slots = slot_rows(ragged_spans(spec.rows, spec.tasks), spec.rows, spec.tasks, device)
        self.spans = slots.spans
        scale_S = torch.full((spec.tasks,), SCALE, device=device)
        assert slots.slot_bounds_S3 is not None
        self.rows = launch.RowTensors(slots.slot_of_row_T, slots.slot_bounds_S3, scale_S, None)
        self.adapters = launch.Adapters(spec.ranks, self.widths)
        self.layout = launch.layout_of(self.adapters, self.x_TD.device)
        keep_S = torch.zeros(spec.tasks, dtype=torch.int32, device=device)
        self.targets = launch.GradTargets(
            torch.empty_like(self.a_RD), torch.empty_like(self.b_RO), keep_S
        )
        self.h_TJ: Any = None

    def tuning(self, **changes: Any) -> Any:
        base = tuning_of(
            self.spec.rows, self.width, self.widths, self.spec.tasks, self.layout.rank_pad, 2, False
        )
        return base._replace(**changes)

    def reference(self) -> tuple[Tensor, ...]:
        """(y, dx, dA, dB) in float32 from bf16-rounded factors, a task at a time."""
        x, dy, weight = (t.float() for t in (self.x_TD, self.dy_TO, self.weight_OD))
        a, b = self.a_RD.bfloat16().float(), self.b_RO.bfloat16().float()
        y, dx = x @ weight.t(), dy @ weight
        da, db = torch.zeros_like(a), torch.zeros_like(b)
        total, first = sum(self.spec.ranks), 0
        edges = [sum(self.widths[:m]) for m in range(len(self.widths) + 1)]
        for slot, start, stop in self.spans:
            first = sum(self.spec.ranks[:slot])
            rows, ranks = slice(start, stop), slice(first, first + self.spec.ranks[slot])
            for m in range(len(self.widths)):
                out = slice(edges[m], edges[m + 1])
                of_a = slice(m * total + ranks.start, m * total + ranks.stop)
                h, dh = x[rows] @ a[of_a].t() * SCALE, dy[rows, out] @ b[ranks, out].t() * SCALE
                y[rows, out] += h @ b[ranks, out]
                dx[rows] += dh @ a[of_a]
                da[of_a], db[ranks, out] = dh.t() @ x[rows], h.t() @ dy[rows, out]
        return y, dx, da, db


class Form(NamedTuple):
    """forward, backward: of a list of linears in the order of a step. exact: has adapters."""

    forward: Callable[[list[Linear], "Streams"], list[Tensor]]
    backward: Callable[[list[Linear], "Streams"], list[Tensor]]
    exact: bool = True


class Streams(NamedTuple):
    """The second stream has the lower priority: the products come first."""

    main: torch.cuda.Stream
    side: torch.cuda.Stream
    flags: ReadyFlags

    def fork(self) -> None:
        self.side.wait_stream(self.main)

    def join(self) -> None:
        self.main.wait_stream(self.side)


def plain() -> Form:
    return Form(
        lambda linears, _: [lin.x_TD @ lin.weight_OD.t() for lin in linears],
        lambda linears, _: [lin.dy_TO @ lin.weight_OD for lin in linears[::-1]],
        False,
    )


def longer_product() -> Form:
    """What cuBLAS takes for the product alone when the slots of all tasks lie behind the weight's
    columns: [x, h] [W, B]^T and [dy, dh] [W; A]. Without the making of h and dh, and without
    gradients: a lower bound of that form. The operands are put together once, before the timing."""
    kept: dict[str, Any] = {}

    def operands(lin: Linear, backward: bool) -> tuple[Tensor, Tensor]:
        more = sum(lin.spec.ranks) * len(lin.widths)
        weight = lin.weight_OD
        if backward:
            dy_TO = lin.dy_TO
            return torch.cat([dy_TO, dy_TO[:, :more]], 1), torch.cat([weight, weight[:more]])
        longer_OK = torch.cat([weight, weight[:, :more]], 1)
        return torch.cat([lin.x_TD, lin.x_TD[:, :more]], 1), longer_OK.t()

    def run(linears: list[Linear], backward: bool) -> list[Tensor]:
        key = ([(lin.name, lin.spec) for lin in linears], backward)
        if kept.get("key") != key:
            kept.clear()
            kept["key"], kept["operands"] = key, [operands(lin, backward) for lin in linears]
        return [left @ right for left, right in kept["operands"]]

    return Form(lambda lins, _: run(lins, False), lambda lins, _: run(lins[::-1], True), False)


def with_adapters(own: bool, beside: bool, **changes: Any) -> Form:
    """own: the forward's product makes its own h. beside: gradients of A on the second stream,
    where they run beside what follows their product."""

    def forward(linears: list[Linear], streams: Streams) -> list[Tensor]:
        out = []
        for lin in linears:
            y_TO, lin.h_TJ = launch.lora_forward(
                lin.x_TD, lin.weight_OD, None, lin.a_RD, lin.b_RO.t(), lin.rows, lin.adapters,
                lin.tuning(**changes), streams.flags if own else None,
            )  # fmt: skip
            out.append(y_TO)
        return out

    def backward(linears: list[Linear], streams: Streams) -> list[Tensor]:
        out, held = [], []
        for lin in linears[::-1]:
            tuning = lin.tuning(**changes)
            dx_TD, dh_TJ = launch.lora_input_grad(
                lin.dy_TO, (lin.spec.rows, lin.width), lin.h_TJ, lin.weight_OD, lin.a_RD,
                lin.b_RO.t(), lin.rows, lin.adapters, tuning, lin.targets, True,
            )  # fmt: skip
            assert dx_TD is not None
            out.append(dx_TD)
            held.append(dh_TJ)
            if beside:
                streams.fork()
            with torch.cuda.stream(streams.side if beside else streams.main):
                launch.outer(dh_TJ, lin.x_TD, lin.a_RD, lin.rows, lin.adapters, lin.layout, tuning,
                             lin.targets)  # fmt: skip
        if beside:
            streams.join()
        return out

    return Form(forward, backward)


WAS = {"fused_backward": True}
FORMS: dict[str, Form] = {
    "plain": plain(),
    "as it was": with_adapters(False, True, **WAS),
    "now": with_adapters(True, True),
    "now, one stream": with_adapters(True, False),
    "own h": with_adapters(True, True, **WAS),
    "cuBLAS beta 1": with_adapters(False, True, fused=False),
    "cuBLAS longer K, product only": longer_product(),
}


def linears_of(spec: CaseSpec) -> dict[str, list[Linear]]:
    each = {name: [Linear(name, spec)] for name in FAMILIES}
    return {BLOCK: [lins[0] for lins in each.values()]} | each


def new_streams(spec: CaseSpec) -> Streams:
    flags = ReadyFlags(64 * (spec.rows // 64 + 1), "cuda")
    return Streams(torch.cuda.Stream(priority=-1), torch.cuda.Stream(priority=0), flags)


def check(form: Form, linears: list[Linear], streams: Streams, wanted: list[Any]) -> list[float]:
    """The largest relative errors of (y, dx, dA, dB); infinite where two runs differ in a bit."""
    kept: list[list[Tensor]] = []
    for _ in range(RUNS):
        for lin in linears:
            lin.targets.da_RD.fill_(float("nan"))
            lin.targets.db_RO.fill_(float("nan"))
        with torch.cuda.stream(streams.main):
            streams.flags.clear()
            y, dx = form.forward(linears, streams), form.backward(linears, streams)[::-1]
        torch.cuda.synchronize()
        found = [
            t
            for i, lin in enumerate(linears)
            for t in (y[i], dx[i], lin.targets.da_RD.clone(), lin.targets.db_RO.clone())
        ]
        if kept and not all(torch.equal(p, q) for p, q in zip(kept[0], found, strict=True)):
            return [float("inf")] * 4
        kept = kept or [found]
    pairs = zip(kept[0], wanted, strict=True)
    errors = [float((got.float() - want).norm() / want.norm()) for got, want in pairs]
    return [max(errors[i::4]) for i in range(4)]


def graphed(run: Callable[[], Any], streams: Streams, steps: int) -> Callable[[], None]:
    with torch.cuda.stream(streams.main):
        streams.flags.clear()
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=streams.main):
            streams.flags.clear()
            for _ in range(steps):
                run()
    return graph.replay


def measure(
    forms: dict[str, Form], linears: list[Linear], streams: Streams, phase: str, repeats: int
) -> dict[str, dict[str, float]]:
    """Microseconds of all linears together: median, least and greatest of the repeats, which take
    the forms in turn."""
    steps, runs = 3, {}
    for name, form in forms.items():
        call = getattr(form, phase)
        runs[name] = graphed(lambda call=call: call(linears, streams), streams, steps)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.stream(streams.main):
                start.record()
                run()
                stop.record()
            stop.synchronize()
            if repeat:
                times[name].append(1e3 * start.elapsed_time(stop) / steps)
    return {
        name: {"us": statistics.median(us), "least_us": min(us), "greatest_us": max(us)}
        for name, us in times.items()
    }


def run_case(spec: CaseSpec, repeats: int, apart: bool) -> dict[str, Any]:
    streams, groups = new_streams(spec), linears_of(spec)
    wanted = [tensor for lin in groups[BLOCK] for tensor in lin.reference()]
    forms, errors = {}, {}
    for name, form in FORMS.items():
        try:
            errors[name] = check(form, groups[BLOCK], streams, wanted) if form.exact else [0.0] * 4
        except Exception as error:
            errors[name] = [float("inf")] * 4
            print(f"{name} does not run: {error!r:.300}", flush=True)
        if max(errors[name]) < TOLERANCE:
            forms[name] = form
        else:
            print(f"{name} is off: {errors[name]}", flush=True)
    del wanted
    times: dict[str, Any] = {}
    print(f"== {spec}", flush=True)
    for group, linears in groups.items():
        for phase in ("forward", "backward"):
            if group != BLOCK and not apart:
                continue
            found = measure(forms, linears, streams, phase, repeats)
            times[f"{group} {phase}"] = found
            base = found["plain"]["us"]
            print(f"{group:8} {phase:8} plain {base:7.1f} us  " + "  ".join(
                f"{name} {t['us'] - base:+.1f} ({t['us'] / base:.3f})"
                for name, t in found.items() if name != "plain"), flush=True)  # fmt: skip
    return {"case": spec._asdict(), "errors": errors, "times": times}


def units(cases: int) -> Iterator[tuple[CaseSpec, str, str]]:
    """What there is to compile, apart."""
    for index, spec in enumerate(CASES[:cases]):
        for family in FAMILIES:
            for form in FORMS if index < 2 else ("as it was", "now"):
                yield spec, family, form


def warm(part: int, parts: int, cases: int) -> None:
    for spec, family, form in list(units(cases))[part::parts]:
        linears, streams = [Linear(family, spec)], new_streams(spec)
        with torch.cuda.stream(streams.main):
            FORMS[form].forward(linears, streams)
            FORMS[form].backward(linears, streams)
        torch.cuda.synchronize()
        del linears
        torch.cuda.empty_cache()


def compile_ahead(workers: int, limit_s: float, cases: int) -> None:
    command = [sys.executable, __file__, "--out", "/dev/null", "--cases", str(cases), "--warm"]
    started = [subprocess.Popen([*command, f"{i}/{workers}"]) for i in range(workers)]
    stop_s = time.monotonic() + limit_s
    for process in started:
        try:
            process.wait(max(0.1, stop_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600.0, help="starts no case after that")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--workers", type=int, default=14, help="processes that compile; 0: none")
    parser.add_argument("--cases", type=int, default=len(CASES), help="the first so many")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    if arguments.warm:
        part, parts = map(int, arguments.warm.split("/"))
        warm(part, parts, arguments.cases)
        return
    start_s = time.monotonic()
    if arguments.workers:
        compile_ahead(arguments.workers, arguments.seconds / 2, arguments.cases)
        print(f"compiled in {time.monotonic() - start_s:.0f} s", flush=True)
    if arguments.compile_only:
        return
    report: dict[str, Any] = {"environment": environment(), "cases": []}
    for index, spec in enumerate(CASES[: arguments.cases]):
        if time.monotonic() - start_s > arguments.seconds:
            print(f"left out for want of time: {spec}", flush=True)
            continue
        report["cases"].append(run_case(spec, arguments.repeats, index < 2))
        torch.cuda.empty_cache()
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
