"""A profile out of the parts that a process left whose time was up before it wrote the profile.

    python -m experiments.gpu_validation.finish OUT/profile.parts.jsonl --like PROFILE --out FILE

Device and software are those of ``--like``, a profile of the same kind of machine (compare the
driver in the run's log); operations that were not reached are taken from it too, and named in
``quality.left_out``. Needs no device.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from muxtune.cost.schema import CAPTURED, SCHEMA_VERSION, content_hash
from muxtune.cost.shapes import ModelShape
from muxtune.profiling.calibration_cases import SHALLOW_LAYERS
from muxtune.profiling.measure import _capture_op, typical_spread, write_profile
from muxtune.validation.records import read_lines


def finished(parts: list[dict[str, Any]], like: dict[str, Any], seconds: float) -> dict[str, Any]:
    by_name = {row["name"]: row for row in parts}
    ops, left_out = dict(by_name["operations"]["ops"]), list(by_name["operations"]["left_out"])
    ops |= by_name.get("takeovers", {}).get("ops", {})
    for name in ("takeover", "join", "move", "finish", "leave"):
        if name not in ops and name in like["ops"]:
            ops[name] = like["ops"][name]
            left_out.append(f"{name}: not reached; of profile {like['content_hash'][:16]}")
    shape, steps, captures = ModelShape(**like["model"]), [], []
    for row in parts:
        if "step" in row:
            few = row["name"].endswith(f", {SHALLOW_LAYERS} blocks")
            steps.append({**row["step"], "num_layers": SHALLOW_LAYERS if few else 0})
            captures += [] if few else row["captures"]
    if "takeovers" not in by_name:
        ops["capture"] = _capture_op(shape, captures)
    raw = {
        "schema_version": SCHEMA_VERSION,
        "device": like["device"],
        "software": like["software"],
        "model": shape._asdict(),
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "program": {**like["program"], "style": CAPTURED},
        "ops": ops,
        "steps": steps,
        "clocks": {"samples": []},
        "quality": {"spread": typical_spread(ops), "left_out": left_out, "seconds": seconds},
    }
    return {**raw, "content_hash": content_hash(raw)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", type=Path)
    parser.add_argument("--like", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="that it ran")
    args = parser.parse_args()
    like = json.loads(args.like.read_text(encoding="utf-8"))
    made = finished(read_lines(args.parts), like, args.seconds)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_profile(made, args.out)
    print(made["content_hash"], made["quality"])


if __name__ == "__main__":
    main()
