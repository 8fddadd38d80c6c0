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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import isolation
import joins
import kill
import memory

from muxtune.cost.shapes import model_shape

PARTS = {
    "isolation_mixed": isolation.mixed,
    "isolation_fast": isolation.fast,
    "isolation_lora": isolation.lora,
    "isolation_faults": isolation.faults,
    "kill": kill.run,
    "memory": memory.run,
    "joins": joins.run,
}
LAYERS = dict.fromkeys((name for name in PARTS if name.startswith("isolation")), 2)


def environment() -> dict[str, Any]:
    import transformers
    import triton

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "device": name, "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
        "triton": triton.__version__, "transformers": transformers.__version__,
    }  # fmt: skip


def _as_it_comes(found: Any) -> Iterator[dict[str, Any]]:
    """A part gives its result whole, or what it knows so far again and again."""
    yield from [found] if isinstance(found, dict) else found


def _write(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=1, default=str) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=0, help="fewer than the shape's, to try")
    parser.add_argument("--memory-seconds", type=float, default=3600.0)
    parser.add_argument("--memory-tasks", default="", help="these numbers only, in this order")
    parser.add_argument("--hf-instances", type=int, default=memory.MOST_INSTANCES)
    parser.add_argument("--rehearse", action="store_true", help="the memory's plans, two layers")
    args = parser.parse_args()
    memory.LIMIT_S, memory.LAYERS = args.memory_seconds, 2 if args.rehearse else 0
    memory.MOST_INSTANCES = args.hf_instances
    memory.ONLY = tuple(int(number) for number in args.memory_tasks.split(",") if number)
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.parts.split(","):
        start_s = time.perf_counter()
        shape = model_shape(args.shape)
        shape = shape._replace(num_layers=LAYERS.get(name, args.layers or shape.num_layers))
        about: dict[str, Any] = {"environment": environment(), "shape": args.shape,
                                 "layers": shape.num_layers}  # fmt: skip
        result = dict(about)
        try:
            for found in _as_it_comes(PARTS[name](shape, args.device)):
                result = about | found
                _write(args.out / f"{name}.json", result)
        except Exception as error:
            result["error"] = "".join(traceback.format_exception(error))[-4000:]
        if "error" in result or result.get("passed") is False:
            failed.append(name)
        result["seconds"] = time.perf_counter() - start_s
        _write(args.out / f"{name}.json", result)
        print(name, json.dumps(result, default=str)[:1500], flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
