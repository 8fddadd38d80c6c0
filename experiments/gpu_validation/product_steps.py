"""A profile's predictions beside the replays of captured steps that were timed while tasks trained.

    python -m experiments.gpu_validation.product_steps validation/h100_DATE

The measurements are those of ``validation/step_throughput`` (other runs, in fast mode, kernels of
the same day), of which no profile knows anything; rows that are no filler are taken as all. What is
predicted is the replay of each size by itself, with the optimizer. Writes ``product_steps.json``
and its plot.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from muxtune.cost.schema import load_profile
from muxtune.cost.shapes import model_shape
from muxtune.report.plots import DOTS_PER_INCH, MARKERS, PALETTE
from muxtune.types import AdapterSlot, PassLoad, ReplicaShape, ShapeKey
from muxtune.validation.models import Models

RESULTS = Path("validation/step_throughput")
MIXED = (8, 16, 32, 64)
# Ranks of the tasks in turn, and the base model.
CASES = {
    "lora_1": ((16,), "llama-2-7b"),
    "lora_4": ((16,), "llama-2-7b"),
    "lora_8": ((16,), "llama-2-7b"),
    "lora_16": ((16,), "llama-2-7b"),
    "lora_32": ((16,), "llama-2-7b"),
    "mixed_ranks": (MIXED, "llama-2-7b"),
    "llama_3_1_8b": ((16,), "llama-3.1-8b"),
}
PAIRS_PER_ROW = 45.0  # of the mix: query-key pairs of a row, mean
CHUNK_TOKENS = 16


def replays() -> Iterator[tuple[str, str, int, int, float]]:
    """(file, case, tasks of the hTask, rows, milliseconds)."""
    for path in sorted(RESULTS.glob("*.json")):
        found = json.loads(path.read_text())
        for case in CASES:
            of_case = found.get(case) or {}
            for htask, sizes in of_case.get("device_ms", {}).items():
                tasks = of_case["htasks"][int(htask)]["tasks"]
                for rows, milliseconds in sizes.items():
                    yield path.name, case, tasks, int(rows), float(milliseconds)


def compare(folder: Path) -> dict[str, Any]:
    profile = load_profile(folder / "profile.json")
    by = {"composed": Models(profile), "sums": Models(profile._replace(steps=()))}
    rows = []
    for file, case, tasks, count, milliseconds in replays():
        ranks, name = CASES[case]
        slots = tuple(
            AdapterSlot("lora", ranks[index % len(ranks)], ("all-linear",))
            for index in range(tasks)
        )
        shape = ShapeKey(CHUNK_TOKENS, count // CHUNK_TOKENS, slots)
        load = PassLoad(shape, PAIRS_PER_ROW * count, float(count), tuple(range(tasks)))
        row = {
            "file": file,
            "case": case,
            "tasks": tasks,
            "rows": count,
            "measured_ms": milliseconds,
        }
        for how, models in by.items():
            found = models(model_shape(name)).pass_times_s([load], ReplicaShape())
            row[f"{how}_ms"] = 1e3 * float(found.value[0])
        rows.append(row)
    return {"profile": profile.content_hash, "errors": _errors(rows), "replays": rows}


def _errors(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for case in ("all", *sorted({row["case"] for row in rows})):
        chosen = [row for row in rows if case in ("all", row["case"])]
        found[case] = {"count": len(chosen)}
        for how in ("composed", "sums"):
            errors = np.array([row[f"{how}_ms"] / row["measured_ms"] - 1.0 for row in chosen])
            found[case][how] = {
                "mean": float(np.abs(errors).mean()),
                "p95": float(np.quantile(np.abs(errors), 0.95)),
                "bias": float(errors.mean()),
            }
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    figure = Figure((6.4, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for index, case in enumerate(sorted({row["case"] for row in rows})):
        chosen = [row for row in rows if row["case"] == case]
        axes.plot(
            [row["rows"] for row in chosen],
            [100 * (row["composed_ms"] / row["measured_ms"] - 1) for row in chosen],
            MARKERS[index % len(MARKERS)], color=PALETTE[index % len(PALETTE)], label=case,
        )  # fmt: skip
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set(xlabel="rows of the captured step", ylabel="error of its predicted time (%)")
    axes.legend(fontsize=8)
    axes.grid(True, alpha=0.3)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of a validation")
    folder = parser.parse_args().folder
    found = compare(folder)
    (folder / "product_steps.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found["replays"], folder / "product_steps.png")
    for case, errors in found["errors"].items():
        told = {
            how: f"{errors[how]['mean']:.1%} ({errors[how]['bias']:+.1%})"
            for how in ("composed", "sums")
        }
        print(f"{case:14} {errors['count']:3}", told)


if __name__ == "__main__":
    main()
