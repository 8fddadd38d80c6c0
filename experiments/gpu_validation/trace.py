"""What a captured pass of a few blocks is made of: every kernel with its stream, start and end.

    PYTHONPATH=.:sim:kernels python3 experiments/gpu_validation/trace.py --out FOLDER

For a cost model that is off: shows which operation takes longer in a pass than alone, and what
waits. Each case also runs with the factor gradients on the products' own stream. Needs a CUDA
device; writes ``trace.json`` as it comes. Takes about 20 s.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from muxtune.cost.shapes import model_shape
from muxtune.profiling.captured_cases import few_block_cases
from muxtune.profiling.step_cases import StepCase
from muxtune.profiling.steps import StepBench
from muxtune.runtime import captured_runner
from muxtune.runtime.static_step import StepProgram

MAX_ROWS, LAYERS = 4096, 4
# By the beginning of a calibration case's name.
TRACED = (
    "1 of 128 rows, 64", "1 of 512 rows, 16", "4 of 256 rows, 64", "4 of 1024 rows, 16,",
    "12 of 1536 rows, 16+64", "4 of 4096 rows, 16,",
)  # fmt: skip


class TracedBench(StepBench):
    """Traces the passes once more after they were timed."""

    kernels: list[list[Any]]

    def _repeated(self, runners: Any, works: Any, *limits: Any) -> Any:
        found = super()._repeated(runners, works, *limits)
        with profile(activities=[ProfilerActivity.CUDA]) as traced:
            super()._repeated(runners, works[:1], 0.0, 1)
        self.kernels = _kernels_of(traced)
        return found


def _kernels_of(traced: Any) -> list[list[Any]]:
    """(name, stream, start, seconds), in microseconds, of all kernels."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        traced.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found = [
        [event["name"][:60], event["args"].get("stream"), event["ts"], event["dur"]]
        for event in events
        if event.get("cat") in ("kernel", "gpu_memset", "gpu_memcpy")
    ]
    first = min((item[2] for item in found), default=0.0)
    return sorted(
        ([name, stream, round(at - first, 1), dur] for name, stream, at, dur in found),
        key=lambda item: item[2],
    )


def one_stream(model: Any, pool: Any, layout: Any, deterministic: bool) -> StepProgram:
    inputs = captured_runner.StepInputs(layout, model.device)
    return StepProgram(
        model, pool.adapters, inputs, deterministic=deterministic, overlap=False,
        extras=pool.extras,
    )  # fmt: skip


def trace(cases: Sequence[StepCase], bench: TracedBench, path: Path, until_s: float) -> None:
    usual, rows = captured_runner.program_of, []
    for case in cases:
        for name, made in (("two streams", usual), ("one stream", one_stream)):
            if time.monotonic() > until_s:
                return
            captured_runner.program_of = made
            try:
                found = bench.run(case, 0.2)
            finally:
                captured_runner.program_of = usual
            middle_s = sorted(found.repeats_s)[len(found.repeats_s) // 2]
            rows.append(
                {
                    "case": case.name,
                    "streams": name,
                    "pass_ms": 1e3 * middle_s / len(found.loads),
                    "kernels": bench.kernels,
                }
            )
            path.write_text(json.dumps(rows) + "\n", encoding="utf-8")
            print(f"{case.name:45} {name:12} {rows[-1]['pass_ms']:8.3f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=25.0, help="seconds")
    args = parser.parse_args()
    until_s = time.monotonic() + args.budget
    shape = model_shape("llama-2-7b")._replace(num_layers=LAYERS)
    known = few_block_cases(shape, MAX_ROWS)
    cases = [
        next(case for case in known if case.name.startswith(f"calibration {begin}"))
        for begin in TRACED
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    bench = TracedBench(shape, torch.device("cuda"), torch.bfloat16, step="captured")
    trace(cases, bench, args.out / "trace.json", until_s)


if __name__ == "__main__":
    main()
