"""How long calibrating a profile and asking it 1,000 times takes on one CPU core.

    python -m experiments.calibration_speed.measure PROFILE.json

Processor seconds of: reading and checking the file, fitting the curves and the composition, and
1,000 predictions of steps that were not asked before (each another shape).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from muxtune.cost.book import profiled_model
from muxtune.cost.schema import load_profile
from muxtune.types import AdapterSlot, PassLoad, ReplicaShape, ShapeKey

NUM_PREDICTIONS = 1000


def loads(count: int) -> list[PassLoad]:
    """1 to 32 tasks of ranks 8 to 64, 128 to 8,192 rows."""
    found = []
    for index in range(count):
        slots = tuple(
            AdapterSlot("lora", 8 << ((index + slot) % 4), ("all-linear",))
            for slot in range(1 + index % 32)
        )
        shape = ShapeKey(64, 2 + (index * 37) % 127, slots)
        rows = shape.padded_tokens
        found.append(PassLoad(shape, 32.0 * rows, float(rows), (0,)))
    return found


def main(path: Path) -> dict[str, float]:
    asked = loads(NUM_PREDICTIONS)
    start_s = time.process_time()
    profile = load_profile(path)
    read_s = time.process_time()
    model = profiled_model(profile.model_shape, profile)
    model.pass_times_s(asked[:1], ReplicaShape())  # curves are fitted when first asked
    fitted_s = time.process_time()
    model.pass_times_s(asked, ReplicaShape())
    end_s = time.process_time()
    return {
        "read_s": read_s - start_s,
        "calibrate_s": fitted_s - read_s,
        "predict_s": end_s - fitted_s,
        "total_s": end_s - start_s,
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1])), indent=1))
