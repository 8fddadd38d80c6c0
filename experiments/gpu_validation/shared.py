"""Is a GPU that another process uses found out by a profile?

    PYTHONPATH=.:sim:kernels python3 experiments/gpu_validation/shared.py --out OUT

The signs by which a profile is judged, and products of the captured step, are measured with the
device to themselves and beside a process that multiplies matrices without a pause. ``shared.json``:
both signs, the waiting of single launches, the spread of the products' repeats, what is said of a
profile with them, and how many times as long the products took beside the other process. Seconds.
``--device cpu`` tries the script; a CPU has no signs but the spread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from muxtune.cost.schema import CAPTURED, Profile, profile_warnings
from muxtune.cost.shapes import model_shape
from muxtune.cost.sharing import LONG
from muxtune.profiling.bench import summarise
from muxtune.profiling.captured_ops import CapturedOps
from muxtune.profiling.measure import checked_device, device_description, typical_spread
from muxtune.profiling.sharing import launches_s, signs_at_start

MODEL = {"cuda": "llama-2-7b", "cpu": "smollm2-135m"}
ROWS = {"cuda": (512, 2048), "cpu": (32, 64)}
ALONE, BESIDE = "alone", "beside another process"
# It is on the device from the first line that it reads on, and at work from the line that it
# writes then.
OTHER = """
import sys
import torch
device, size = {device!r}, {size}
print("imported", flush=True)
sys.stdin.readline()
x_NN = torch.randn(size, size, device=device)
x_NN @ x_NN
print("begun", flush=True)
while True:
    y_NN = x_NN @ x_NN
    if device == "cuda":
        torch.cuda.synchronize()
"""


class Look(NamedTuple):
    """``found``: as shared.json has it; ``medians_s``: of each product."""

    found: dict[str, Any]
    medians_s: list[float]


class Other:
    """The other process, which is not on the device before ``begin``."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def imported(self) -> None:
        """Returns when it waits for ``begin`` and disturbs nobody."""
        self._heard()

    def begin(self) -> None:
        """Returns when it computes."""
        assert self._process.stdin is not None
        self._process.stdin.write("begin\n")
        self._process.stdin.flush()
        self._heard()

    def _heard(self) -> None:
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError("the other process ended before it had begun")


@contextmanager
def other_process(device: str) -> Iterator[Other]:
    """It imports first, and ends with the context."""
    code = OTHER.format(device=device, size=4096 if device == "cuda" else 512)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], **pipes)
    try:
        yield Other(process)
    finally:
        process.kill()
        process.wait()


def look(bench: CapturedOps, device: torch.device) -> Look:
    """The signs here, and what is said of a profile of these products with them."""
    begun_s = time.perf_counter()
    signs = signs_at_start(device)
    bench.points.clear()
    for rows in ROWS[device.type]:
        bench.products(rows)
    op = {"points": [summarise(point.seconds) for point in bench.points]}
    signs["spread"] = typical_spread({"products": op})
    profile = Profile(device_description(device), {}, {}, "", {}, "", {"style": CAPTURED})
    said = profile_warnings(profile._replace(quality=signs))
    medians_s = [point["median_s"] for point in op["points"]]
    waits = waiting(launches_s(device)) if device.type == "cuda" else {}
    found = {**signs, **waits, "said": said, "seconds": time.perf_counter() - begun_s}
    return Look(found, medians_s)


def waiting(times_s: Sequence[float]) -> dict[str, Any]:
    """Of one run of launches: how many, the typical one, and what the long ones waited."""
    typical_s = median(times_s)
    waits_ms = [round(1e3 * (t - typical_s), 3) for t in times_s if t > LONG * typical_s]
    return {"launches": len(times_s), "launch_us": round(1e6 * typical_s, 1), "waits_ms": waits_ms}


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args(given)
    device = checked_device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with other_process(device.type) as other:
        bench = CapturedOps(model_shape(MODEL[device.type]), device, dtype)
        other.imported()
        alone = look(bench, device)
        other.begin()
        beside = look(bench, device)
    looks = {ALONE: alone.found, BESIDE: beside.found}
    for name, found in looks.items():
        told = f", interrupted {found['interrupted']:.1%}" if "interrupted" in found else ""
        said = "warned" if found["said"] else "nothing said"
        print(f"{name}: spread {found['spread']:.1%}{told}, {said}", flush=True)
    ratios = [b / a for a, b in zip(alone.medians_s, beside.medians_s, strict=True)]
    looks[BESIDE]["times_as_long"] = median(ratios)
    print(f"products took {median(ratios):.2f} times as long beside the other", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"device": device_description(device), **looks}
    (args.out / "shared.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
