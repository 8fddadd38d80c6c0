"""How long calibrating a profile and asking it 1,000 times takes on one CPU core.

    python -m experiments.calibration_speed.measure PROFILE.json

Processor seconds of: reading and checking the file, fitting the curves and the composition, and
1,000 predictions of steps that were not asked before: each another shape, of 127 numbers of rows
and 32 sets of slots, as the shapes that a planner asks for share them. ``predict_unshared_s``: of
1,000 others of which no two have the same rows, by a model that was asked nothing yet. The totals
are of reading, calibrating and these or those predictions.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from muxtune.cost.book import profiled_model
from muxtune.cost.schema import load_profile
from muxtune.types import AdapterSlot, PassLoad, ReplicaShape, ShapeKey

NUM_PREDICTIONS = 1000


def loads(count: int) -> list[PassLoad]:
    """1 to 32 tasks of ranks 8 to 64, 128 to 8,192 rows."""
    return [
        _load(64, 2 + (index * 37) % 127, [8 << ((index + n) % 4) for n in range(1 + index % 32)])
        for index in range(count)
    ]


def unshared_loads(count: int) -> list[PassLoad]:
    """As many tasks and ranks, in other orders; 128 to ``8 * (count + 15)`` rows, each once."""
    return [
        _load(8, 16 + index, [8 << ((index >> n) % 4) for n in range(1 + index % 32)])
        for index in range(count)
    ]


def _load(chunk_tokens: int, num_chunks: int, ranks: Sequence[int]) -> PassLoad:
    slots = tuple(AdapterSlot("lora", rank, ("all-linear",)) for rank in ranks)
    shape = ShapeKey(chunk_tokens, num_chunks, slots)
    rows = shape.padded_tokens
    return PassLoad(shape, 32.0 * rows, float(rows), (0,))


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
    fresh = profiled_model(profile.model_shape, profile)
    fresh.pass_times_s(asked[:1], ReplicaShape())
    unshared, fresh_s = unshared_loads(NUM_PREDICTIONS), time.process_time()
    fresh.pass_times_s(unshared, ReplicaShape())
    unshared_s = time.process_time() - fresh_s
    return {
        "read_s": read_s - start_s,
        "calibrate_s": fitted_s - read_s,
        "predict_s": end_s - fitted_s,
        "total_s": end_s - start_s,
        "predict_unshared_s": unshared_s,
        "total_unshared_s": fitted_s - start_s + unshared_s,
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1])), indent=1))
