"""Where the host's time goes when sizes are captured: a profile of each size's preparation.

PYTHONPATH=.:sim:kernels python3 experiments/gpu_runtime/capture_profile.py --layers 8
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from bench import Bench, htask_of, lora_task, store_of

from muxtune.cost.shapes import model_shape
from muxtune.runtime.static_step import CapturedSteps

prepare = CapturedSteps._prepare


def profiled(self: CapturedSteps, num_rows: int) -> None:
    with cProfile.Profile() as profile:
        prepare(self, num_rows)
    print(f"==== {num_rows} rows, {self.capture_s.get(num_rows)} s", flush=True)
    stats = pstats.Stats(profile)
    for order in ("tottime", "cumulative"):
        stats.sort_stats(order).print_stats(25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    shape = model_shape(args.shape)._replace(num_layers=args.layers)
    CapturedSteps._prepare = profiled
    tasks = [lora_task(f"t{i}", ("sst2", "openbookqa", "rte")[i % 3], 8) for i in range(8)]
    bench = Bench(store_of(shape, args.device), shape.vocab, deterministic=False)
    bench.run(tasks, htask_of(tasks, 8))
    print({event.kind.name for event in bench.events}, bench.recorder.notices)
    bench.close()


if __name__ == "__main__":
    main()
