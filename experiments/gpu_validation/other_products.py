"""Single products of base models that a profile does not have, beside what it predicts of them.

    PYTHONPATH=.:sim:kernels python3 experiments/gpu_validation/other_products.py --measure OUT.json
    python -m experiments.gpu_validation.other_products OUT.json validation/h100_DATE/profile.json

A suite's steps of other base models say how far off their products are together; this says which.
Measuring needs one CUDA device and a minute, predicting none.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from muxtune.cost import ops
from muxtune.cost.captured import CapturedCostModel
from muxtune.cost.schema import load_profile
from muxtune.cost.shapes import model_shape
from muxtune.profiling.captured_ops import CapturedOps

# (slots, rank, rows) of products with adapters.
SITES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "llama-2-13b": (
        (8, 64, 1536), (8, 16, 1536), (8, 64, 2048), (16, 64, 2048), (3, 64, 2048), (1, 64, 2048),
        (16, 64, 3072), (8, 64, 3072), (16, 16, 2048), (8, 16, 3072), (3, 16, 2048), (3, 64, 1536),
        (8, 64, 1024), (16, 64, 1536), (3, 16, 3072), (8, 64, 4096), (1, 16, 1536), (16, 64, 1024),
    ),
    "llama-3.1-8b": ((8, 64, 3072), (2, 64, 3072), (8, 16, 3072), (8, 64, 2048), (1, 64, 1536)),
    "llama-2-7b": ((8, 64, 1536), (3, 64, 2560), (8, 64, 2048), (2, 16, 3072)),
}  # fmt: skip
ROWS = {
    "llama-2-13b": (512, 1024, 1536, 2048, 3072, 4096),
    "llama-3.1-8b": (1024, 2048, 3072, 4096),
    "llama-2-7b": (1536, 2560, 3072),
}


def measure(path: Path) -> None:
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    found["points"] = points = {}
    for name, sites in SITES.items():
        bench = CapturedOps(model_shape(name), torch.device("cuda"), torch.bfloat16)
        for rows in ROWS[name]:
            bench.rows(rows)
        for slots, rank, rows in sites:
            bench.sites(slots, rank, rows)
        points[name] = [point._asdict() for point in bench.points]
        path.write_text(json.dumps(found) + "\n", encoding="utf-8")
        del bench
        torch.cuda.empty_cache()


def errors(measured: dict[str, Any], profile: Path) -> list[dict[str, Any]]:
    """Of every kind and size, of all of a block's linears together: relative, predicted over
    measured."""
    rows = []
    for name, points in measured["points"].items():
        model = CapturedCostModel(model_shape(name), load_profile(profile))
        groups: dict[tuple[str, tuple[float, ...]], list[tuple[float, float]]] = {}
        for point in points:
            kind, size = point["name"].partition(".")[0], tuple(point["sizes"].values())
            op = ops.Op(point["name"], ops.BACKBONE, False, 1, size, 0.0, 0.0, 0.0, 1)
            pair = model.op_time(op).value_s, float(np.median(point["seconds"]))
            groups.setdefault((kind, size), []).append(pair)
        for (kind, size), pairs in sorted(groups.items()):
            predicted_s, measured_s = (sum(side) for side in zip(*pairs, strict=True))
            rows.append(
                {
                    "model": name,
                    "kind": kind,
                    "size": size,
                    "error": predicted_s / measured_s - 1.0,
                    "worst": max((p / m - 1.0 for p, m in pairs), key=abs),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("measured", type=Path)
    parser.add_argument("profile", type=Path, nargs="?")
    parser.add_argument("--measure", action="store_true")
    args = parser.parse_args()
    if args.measure:
        measure(args.measured)
    if args.profile is not None:
        for row in errors(json.loads(args.measured.read_text(encoding="utf-8")), args.profile):
            sizes = " ".join(f"{number:g}" for number in row["size"])
            told = f"{row['error']:+7.1%}   worst {row['worst']:+7.1%}"
            print(f"{row['model']:14} {row['kind']:16} {sizes:14} {told}")


if __name__ == "__main__":
    main()
