"""Is a GPU that another process uses found out by the spread of a profile's repeats?

    PYTHONPATH=.:sim:kernels python3 experiments/gpu_validation/shared.py --out OUT

The same products of the captured step are timed with the device to themselves and beside a process
that multiplies matrices without a pause. ``shared.json``: the spread by which a profile is judged,
and what is said of it. Seconds. ``--device cpu`` tries the script.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from muxtune.cost.schema import CAPTURED, Profile, profile_warnings
from muxtune.cost.shapes import model_shape
from muxtune.profiling.bench import summarise
from muxtune.profiling.captured_ops import CapturedOps
from muxtune.profiling.measure import checked_device, device_description, typical_spread

MODEL = {"cuda": "llama-2-7b", "cpu": "smollm2-135m"}
ROWS = {"cuda": (256, 512, 1024, 2048, 4096), "cpu": (32, 64)}
OTHER = """
import torch, time
device, size = {device!r}, {size}
x_NN = torch.randn(size, size, device=device)
x_NN @ x_NN
print("begun", flush=True)
while True:
    y_NN = x_NN @ x_NN
    if device == "cuda":
        torch.cuda.synchronize()
"""


def spread_now(device: torch.device) -> tuple[float, list[str]]:
    """(the spread of a profile of these products, what is said of such a profile)."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bench = CapturedOps(model_shape(MODEL[device.type]), device, dtype)
    for rows in ROWS[device.type]:
        bench.products(rows)
    points: dict[str, Any] = {
        f"{index}": {"points": [summarise(point.seconds)]}
        for index, point in enumerate(bench.points)
    }
    spread = typical_spread(points)
    description = device_description(device)
    profile = Profile(description, {}, {}, "", {}, "", {"style": CAPTURED})
    return spread, profile_warnings(profile._replace(quality={"spread": spread}))


def beside_another(device: torch.device) -> tuple[float, list[str]]:
    code = OTHER.format(device=device.type, size=4096 if device.type == "cuda" else 512)
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        return spread_now(device)
    finally:
        other.kill()
        other.wait()


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args(given)
    device, found = checked_device(args.device), {}
    for name, measure in (("alone", spread_now), ("beside another process", beside_another)):
        begun_s = time.perf_counter()
        spread, said = measure(device)
        found[name] = {"spread": spread, "said": said, "seconds": time.perf_counter() - begun_s}
        print(f"{name}: spread {spread:.1%}, {'warned' if said else 'nothing said'}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"device": device_description(device), **found}
    (args.out / "shared.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
