"""What must hold of captured training on a GPU: isolation, kill and resume, joins and leaves.

    PYTHONPATH=.:sim:kernels python3 experiments/gpu_runtime/run.py --out OUT_FOLDER

Needs one CUDA device; ``joins`` (Llama-2-7B shape, random bf16 weights) one of 80 GB, the others
use few layers. One JSON a part.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import isolation
import joins
import kill

from muxtune.cost.shapes import model_shape

PARTS = {"isolation": isolation.run, "kill": kill.run, "joins": joins.run}
LAYERS = {"isolation": 2}


def environment() -> dict[str, Any]:
    import transformers
    import triton

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "device": name, "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
        "triton": triton.__version__, "transformers": transformers.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.parts.split(","):
        start_s = time.perf_counter()
        shape = model_shape(args.shape)
        shape = shape._replace(num_layers=LAYERS.get(name, shape.num_layers))
        result: dict[str, Any] = {"environment": environment(), "shape": args.shape}
        try:
            result |= PARTS[name](shape, args.device)
        except Exception as error:
            result["error"] = "".join(traceback.format_exception(error))[-4000:]
            failed.append(name)
        result["seconds"] = time.perf_counter() - start_s
        (args.out / f"{name}.json").write_text(json.dumps(result, indent=1, default=str) + "\n")
        print(name, json.dumps(result, default=str)[:1500], flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
