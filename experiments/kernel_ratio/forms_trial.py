"""Forms of the low-rank linear whose ranks are a few more reduced features, side by side.

    PYTHONPATH=kernels python3 experiments/kernel_ratio/forms_trial.py --out forms.json --seconds 50

First every form is compared with float32 (even and ragged spans, filler, an empty slot; a slot of
NaN), then timed under a CUDA graph beside the plain linear. `--ahead FOLDER` compiles all of it on
a machine without a GPU.

Shape suffixes: T rows, D input features, O output features, R the sum of the ranks.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from run import (
    RANK,
    SIZES,
    TASKS,
    TOKENS,
    Case,
    Step,
    all_shapes,
    environment,
    even_spans,
    measure,
    ours,
    plain,
    ragged_spans,
    reference,
)
from torch import Tensor

from muxtune_kernels import slot_rows
from muxtune_kernels.multi_lora import launch, wide, window
from muxtune_kernels.multi_lora.tuning import tuning_of
from muxtune_kernels.multi_lora.window import How

Shape = tuple[int, int, int, int]
CHECKED: tuple[Shape, ...] = ((2048, 4096, 4096, 8), (2048, 4096, 4096, 32))
FORWARD = How()
FORMS: dict[str, tuple[str, How, How]] = {
    "room": ("window", FORWARD, How()),
    "room inside": ("window", FORWARD, How(outer="inside")),
    "room 1 stream3": ("window", FORWARD, How(outer="stream", stages=3)),
    "room 2 after": ("window", FORWARD, How(two_reads=True)),
    "room 2 stream3": ("window", FORWARD, How(True, "stream", 3)),
    "room 2 stream4": ("window", FORWARD, How(True, "stream", 4)),
    "room 2 stream4 quarters": ("window", How(parts=4), How(True, "stream", 4, 4)),
    "distant": ("distant", FORWARD, How()),
    "distant 2 stream3": ("distant", FORWARD, How(True, "stream", 3)),
    "distant 2 stream4 quarters": ("distant", How(parts=4), How(True, "stream", 4, 4)),
    "library": ("library", FORWARD, How()),
    "library 1 stream": ("library", FORWARD, How(outer="stream")),
    "library 2 stream": ("library", FORWARD, How(True, "stream")),
}
MOST_LIBRARY_RANKS = 128
# The sizes whose goal is open get all forms, the others these.
OPEN = ((8192, 1), (8192, 4), (2048, 32), (8192, 8), (2048, 8), (8192, 32))
ELSEWHERE = (
    "room", "room 2 stream3", "room 2 stream4 quarters", "distant", "distant 2 stream3",
    "distant 2 stream4 quarters", "library",
)  # fmt: skip


class Forms:
    """The buffers of one case in the forms that are wanted; tensors for each rotating set."""

    def __init__(self, case: Case) -> None:
        self.case = case
        bounds_S3 = case.rows.slot_bounds_S3
        assert bounds_S3 is not None
        self.rows = launch.RowTensors(case.rows.slot_of_row_T, bounds_S3, case.scale_S, None)
        self.window = window.window_of(self.rows, case.adapters)
        self.a_RD, self.b_RO = case.a_RD.detach(), case.b_RO.detach()
        num_rows, width, num_out, num_tasks = case.shape
        key = num_rows, width, (num_out,), num_tasks, RANK, 2
        self.tuning = window.window_tuning(*key)
        self.wide_tuning = tuning_of(*key, False)
        self.kept: dict[tuple[str, int], Any] = {}
        self.index_of = {id(inputs): index for index, inputs in enumerate(case.sets)}

    def buffers(self, kind: str, index: int) -> Any:
        key = kind, index
        if key not in self.kept:
            self.kept[key] = getattr(self, f"_{kind}")(index)
        return self.kept[key]

    def refresh(self, kind: str, index: int) -> None:
        weight = self.buffers(kind, index)[0]
        refresh = {
            "window": window.widen_weight, "library": wide.widen_weight,
            "distant": window.refresh_distant,
        }[kind]  # fmt: skip
        refresh(weight, self.a_RD, self.b_RO, self.case.adapters)

    def _window(self, index: int) -> Any:
        weight = window.wide_weight(self.case.sets[index].weight_OD, self.case.adapters)
        window.widen_weight(weight, self.a_RD, self.b_RO, self.case.adapters)
        return weight, *self._wide(index, self.window.room)

    def _library(self, index: int) -> Any:
        weight = wide.wide_weight(self.case.sets[index].weight_OD, self.case.adapters)
        wide.widen_weight(weight, self.a_RD, self.b_RO, self.case.adapters)
        return weight, *self._wide(index, weight.columns)

    def _wide(self, index: int, behind: int) -> tuple[Tensor, Tensor]:
        inputs, (num_rows, width, num_out, _) = self.case.sets[index], self.case.shape
        like = inputs.weight_OD
        x_TW = wide.wide_buffer(num_rows, width, behind, like)
        dy_TW = wide.wide_buffer(num_rows, num_out, behind, like)
        x_TW[:, :width], dy_TW[:, :num_out] = inputs.x_TD.detach(), inputs.dy_TO
        return x_TW, dy_TW

    def _distant(self, index: int) -> Any:
        inputs = self.case.sets[index]
        weight = window.distant_weight(inputs.weight_OD, self.case.adapters)
        window.refresh_distant(weight, self.a_RD, self.b_RO, self.case.adapters)
        behind_x, behind_dy = (torch.zeros_like(t) for t in (inputs.x_TD.detach(), inputs.dy_TO))
        return weight, inputs.x_TD.detach(), inputs.dy_TO, behind_x, behind_dy

    def step(self, name: str) -> Step:
        kind, forward, backward = FORMS[name]
        run = getattr(self, f"_run_{kind}")
        return lambda inputs: run(self.index_of[id(inputs)], forward, backward)

    def _run_window(self, index: int, forward: How, backward: How) -> tuple[Tensor, ...]:
        weight, x_TW, dy_TW = self.buffers("window", index)
        rest = self.rows, self.window, self.case.adapters, self.tuning
        y_TO, h_TJ = window.window_forward(x_TW, weight, *rest, forward)
        return y_TO, *window.window_backward(
            dy_TW, x_TW, h_TJ, weight, self.a_RD, self.b_RO, *rest, backward
        )

    def _run_library(self, index: int, _: How, backward: How) -> tuple[Tensor, ...]:
        weight, x_TW, dy_TW = self.buffers("library", index)
        rest = self.rows, self.case.adapters, self.wide_tuning
        y_TO, h_TJ = wide.wide_forward(x_TW, weight, *rest)
        return y_TO, *wide.wide_backward(
            dy_TW, x_TW, h_TJ, weight, self.a_RD, self.b_RO, *rest, backward
        )

    def _run_distant(self, index: int, forward: How, backward: How) -> tuple[Tensor, ...]:
        weight, x_TD, dy_TO, behind_x, behind_dy = self.buffers("distant", index)
        rest = self.rows, self.window, self.case.adapters, self.tuning
        y_TO, h_TJ = window.distant_forward(x_TD, behind_x, weight, *rest, forward)
        return y_TO, *window.distant_backward(
            dy_TO, x_TD, h_TJ, behind_dy, weight, self.a_RD, self.b_RO, *rest, backward
        )


def names_for(shape: Shape) -> list[str]:
    num_rows, _, num_out, num_tasks = shape
    fits = num_tasks * RANK <= MOST_LIBRARY_RANKS
    wanted = FORMS if (num_rows, num_tasks) in OPEN and num_out == 4096 else ELSEWHERE
    return [name for name in wanted if fits or FORMS[name][0] != "library"]


def checks(shape: Shape, device: str) -> Iterator[tuple[str, str, bool]]:
    """(form, what, whether it is right)."""
    num_rows, _, _, num_tasks = shape
    ragged = [span for span in ragged_spans(num_rows, num_tasks) if span[0] != 2]
    for label, spans in (("even", even_spans(num_rows, num_tasks)), ("ragged", ragged)):
        case = Case(*shape, device=device)
        case.rows = slot_rows(spans, num_rows, num_tasks, device)
        forms = Forms(case)
        for name in names_for(shape):
            step = forms.step(name)
            try:
                got = step(case.sets[0])
            except Exception as error:
                yield name, f"{label}: {type(error).__name__}: {error}"[:300], False
                continue
            if device == "cpu":
                continue
            pairs = list(zip(got, reference(case, case.sets[0]), strict=True))
            errors = [float((g.float() - w).norm() / w.norm()) for g, w in pairs]
            again = step(case.sets[0])
            same = all(torch.equal(p, q) for p, q in zip(got, again, strict=True))
            told = " ".join(f"{e:.4f}" for e in errors)
            yield name, f"{label} {told} again {same}", max(errors) < 1.2e-2 and same
            yield name, f"{label} NaN of a slot", _keeps_nan(forms, name, step, got)


def _keeps_nan(forms: Forms, name: str, step: Step, clean: tuple[Tensor, ...]) -> bool:
    """A row and a factor of slot 1 that are not finite: all others' are the same bits."""
    case, kind = forms.case, FORMS[name][0]
    start, stop = next(span[1:] for span in case.rows.spans if span[0] == 1)
    x = forms.buffers(kind, 0)[1]
    kept, before = x[start].clone(), forms.a_RD[RANK, 3].clone()
    own_T = case.rows.slot_of_row_T != 1
    own_R = torch.arange(forms.a_RD.shape[0], device=x.device) // RANK != 1
    x[start], forms.a_RD[RANK, 3] = float("nan"), float("inf")
    forms.refresh(kind, 0)
    got = step(case.sets[0])
    kinds = (own_T, own_T, own_R, own_R)
    same = all(torch.equal(p[k], q[k]) for p, q, k in zip(got, clean, kinds, strict=True))
    poisoned = not bool(got[0][start:stop].isfinite().all())
    x[start], forms.a_RD[RANK, 3] = kept, before
    forms.refresh(kind, 0)
    return same and poisoned


def ahead(folder: Path, part: int, parts: int) -> None:
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    from muxtune_kernels.without_gpu import TARGETS, compiling_for

    for shape in in_order()[part::parts]:
        start_s = time.monotonic()
        with compiling_for(TARGETS["h100"]) as compiled:
            if shape in CHECKED:
                print(*[told for told in checks(shape, "cpu") if not told[2]], flush=True)
            case = Case(*shape, device="cpu")
            forms = Forms(case)
            for step in (ours(case, torch.float32), *map(forms.step, names_for(shape))):
                step(case.sets[0])
        print(shape, compiled.count, f"{time.monotonic() - start_s:.0f} s", flush=True)


def in_order() -> list[Shape]:
    """The sizes whose goal is open first."""
    shapes = all_shapes(SIZES, TOKENS, TASKS)
    place = {(rows, 4096, 4096, tasks): i for i, (rows, tasks) in enumerate(OPEN)}
    return sorted(shapes, key=lambda shape: (place.get(shape, len(OPEN)), shape[2], shape[0]))


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
    wrong: set[str] = set()
    for shape in CHECKED:
        for name, text, is_right in checks(shape, "cuda"):
            print("ok   " if is_right else "WRONG", shape, name, text, flush=True)
            wrong |= set() if is_right else {name}
    print(f"checked after {time.monotonic() - start_s:.1f} s", flush=True)
    results: list[dict[str, Any]] = []
    for shape in in_order():
        if time.monotonic() - start_s > arguments.seconds:
            print(f"left out for want of time: {shape}", flush=True)
            continue
        results.append(timed(shape, wrong))
        torch.cuda.empty_cache()
        if arguments.out:
            report = {"environment": environment(), "rank": RANK, "results": results}
            arguments.out.write_text(json.dumps(report, indent=1))


def timed(shape: Shape, wrong: set[str]) -> dict[str, Any]:
    case = Case(*shape)
    forms = Forms(case)
    steps = {"plain": plain(case), "without room": ours(case, torch.float32)}
    steps |= {name: forms.step(name) for name in names_for(shape) if name not in wrong}
    measured = measure(case, steps, True, 3, 3)
    line = "  ".join(f"{name} {m['ratio']:.3f}" for name, m in measured.items())
    print(f"{shape} graph {measured['plain']['step_us']:8.1f} us  {line}", flush=True)
    row = dict(zip(("tokens", "in", "out", "tasks"), shape, strict=True))
    return row | {"mode": "graph", "methods": measured}


if __name__ == "__main__":
    main()
