"""A whole captured step of LoRA tasks with each form of the low-rank linear, by device time.

    PYTHONPATH=.:sim:kernels python3 experiments/kernel_ratio/step_forms.py --out step_forms.json

Llama-2-7B shape, random bf16 weights, a round of the measured workload cut to `--rows`. All forms
do the same step from the same state: their losses and gradients are compared with the first one's,
and those of a form with themselves over several replays, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "step_throughput"))

from frozen import (  # pyright: ignore[reportMissingImports]
    cut,
    profile_kernels,
    program_without_adapters,
    replay_seconds,
)
from workload import Workload  # pyright: ignore[reportMissingImports]

from muxtune.cost.shapes import model_shape
from muxtune.runtime.random_models import random_model
from muxtune.runtime.static_step import (
    AdapterPools,
    CapturedSteps,
    SlotSpec,
    StaticModel,
    StepLayout,
    StepProgram,
)
from muxtune.runtime.static_step.adapters import LoraState
from muxtune.runtime.static_step.inputs import StepInputs
from muxtune_kernels.multi_lora import tuning

REPLAYS = 3


class Form(NamedTuple):
    """own_shrink, overlap: of the program. tuning: changes."""

    own_shrink: bool
    overlap: bool
    tuning: dict[str, Any] = {}


WAS = {"fused_backward": True}
FORMS = {
    "as it was": Form(False, True, tuning=WAS),
    "now": Form(True, True),
    "now, one stream": Form(True, False),
    "own h forward": Form(True, True, tuning=WAS),
    "cuBLAS backward": Form(False, True),
}


@contextlib.contextmanager
def as_told(form: Form) -> Iterator[None]:
    tuning_of = tuning.tuning_of
    tuning.tuning_of = lambda *key: tuning_of(*key)._replace(**form.tuning)
    try:
        yield
    finally:
        tuning.tuning_of = tuning_of


def program_of(static: StaticModel, ranks: tuple[int, ...], rows: int, form: Form) -> StepProgram:
    pools = AdapterPools(static, tuple(SlotSpec(rank) for rank in ranks), False)
    generator = torch.Generator(device="cuda").manual_seed(0)
    for slot in range(len(ranks)):
        states = {}
        for name, a, b in pools.views(slot):
            a_rD = torch.randn(a[0].shape, device="cuda", generator=generator)
            b_rO = torch.randn(b[0].shape, device="cuda", generator=generator)
            states[name] = LoraState((a_rD * a_rD.shape[1] ** -0.5,), (b_rO * 0.02,))
        pools.load(slot, states, 0)
    inputs = StepInputs(StepLayout(rows, len(ranks), 96, 512), static.device)
    return StepProgram(static, pools, inputs, own_shrink=form.own_shrink, overlap=form.overlap)


def gradients(program: StepProgram) -> list[torch.Tensor]:
    return [part[1].clone() for layer in program.pools.layers for p in layer for part in (p.a, p.b)]


def run_form(
    static: StaticModel, ranks: tuple[int, ...], rows: int, form: Form, kernels: bool
) -> dict[str, Any]:
    work = Workload(len(ranks), ranks, model_shape("llama-2-7b").vocab)
    program = program_of(static, ranks, rows, form)
    program.optimizes = False
    steps = CapturedSteps(program, [rows])
    start_s = time.perf_counter()
    steps.capture()
    capture_s = time.perf_counter() - start_s
    round_ = cut(next(work.rounds(7)), rows)
    slots = {slot: item for part in next(work.rounds(7)) for slot, item in part.slots.items()}
    losses, kept, repeats = [], [], True
    for _ in range(REPLAYS):
        losses.append(steps.step(round_, slots, num_rows=rows).result().losses)
        torch.cuda.synchronize()
        found = gradients(program)
        repeats &= not kept or all(torch.equal(p, q) for p, q in zip(kept, found, strict=True))
        kept = kept or found
    gradients_only_ms = 1e3 * replay_seconds(steps, rows)
    return {
        "ms_without_optimizer": gradients_only_ms, "capture_s": capture_s, "losses": losses[0],
        "replays_bit_identical": repeats and all(item == losses[0] for item in losses),
        "gradients": kept, "kernels": profile_kernels(steps, rows, 20) if kernels else [],
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=3824)
    parser.add_argument("--ranks", type=int, nargs="*", default=(16,) * 8)
    parser.add_argument("--layers", type=int, default=32, help="1 compiles everything")
    parser.add_argument("--forms", nargs="*", default=list(FORMS))
    parser.add_argument("--kernels", action="store_true", help="list the kernels of each form")
    args = parser.parse_args()
    shape = model_shape("llama-2-7b")._replace(num_layers=args.layers)
    model, _ = random_model(shape, 0, torch.device("cuda"), torch.bfloat16)
    model.requires_grad_(False)
    static, report = StaticModel.of(model, 4096), {}
    before: list[torch.Tensor] = []
    for name in args.forms:
        torch.cuda.reset_peak_memory_stats()
        with as_told(FORMS[name]):
            found = run_form(static, tuple(args.ranks), args.rows, FORMS[name], args.kernels)
        after = found.pop("gradients")
        if before:
            pairs = zip(before, after, strict=True)
            found["gradients_apart"] = max(float((p - q).norm() / p.norm()) for p, q in pairs)
        before = before or after
        report[name] = found
        torch.cuda.empty_cache()
        print(name, json.dumps({k: v for k, v in found.items() if k != "kernels"}), flush=True)
        for row in found["kernels"]:
            print(f"  {row['ms']:8.2f} ms {row['calls']:5d} x {row['kernel'][:70]}", flush=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    before.clear()
    program = program_without_adapters(static, len(args.ranks), args.rows)
    frozen = CapturedSteps(program, [args.rows])
    frozen.capture()
    work = Workload(len(args.ranks), tuple(args.ranks), model_shape("llama-2-7b").vocab)
    slots = {slot: item for part in next(work.rounds(7)) for slot, item in part.slots.items()}
    frozen.step(cut(next(work.rounds(7)), args.rows), slots, num_rows=args.rows).result()
    report["frozen"] = {"ms_without_optimizer": 1e3 * replay_seconds(frozen, args.rows)}
    print("frozen", report["frozen"])
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
