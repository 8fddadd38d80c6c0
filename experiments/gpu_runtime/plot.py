"""Plots of ``gpu_runtime.json``: peak memory against the number of tasks, and joins and leaves.

    python3 experiments/gpu_runtime/plot.py gpu_runtime.json gpu_runtime.png \\
        [--runs step_throughput.json ...] [--before older.json ...]

``--runs``: results of ``experiments/step_throughput``, whose LoRA tasks of rank 16 are points of
the curve too; they are printed. ``--before``: where HF PEFT's instances, joins and other numbers of
tasks come from, if the files before have none.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from muxtune.cost.memory import MIB

CONTEXT = 1024 * MIB  # of CUDA, in the ledger; the allocator does not know it
CHANGES = {
    "join_same_shape": "join, free slot", "leave_same_shape": "leave, same shape",
    "join_new_shape": "join, new shape", "leave_new_shape": "leave, new shape",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--runs", type=Path, nargs="*", default=[])
    parser.add_argument("--before", type=Path, nargs="*", default=[])
    args = parser.parse_args()
    data = json.loads(args.source.read_text("utf-8"))
    for path in args.before:
        complete(data, json.loads(path.read_text("utf-8")))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.5), constrained_layout=True, width_ratios=(3, 2)
    )
    memory, joins = data.get("memory") or {}, data.get("joins") or {}
    _memory(left, memory, whole_runs(args.runs))
    _joins(right, joins)
    about = (memory or joins)["environment"]
    figure.suptitle(f"muxtune train, Llama-2-7B shape, {about['device']}, {about['date']}")
    figure.savefig(args.target, dpi=130)


def complete(data: dict[str, Any], before: dict[str, Any]) -> None:
    data.setdefault("joins", before.get("joins"))
    memory, older = data.setdefault("memory", {}), before.get("memory") or {}
    memory["hf_peft"] = memory.get("hf_peft") or older.get("hf_peft", [])
    known = {row["tasks"] for row in memory.setdefault("curve", [])}
    memory["curve"] += [row for row in older.get("curve", []) if row["tasks"] not in known]


def whole_runs(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Rows of the curve; of one number of tasks the first one that is found."""
    found: dict[int, dict[str, Any]] = {}
    for path in paths:
        for name, result in json.loads(path.read_text("utf-8")).items():
            if not re.fullmatch(r"lora_\d+", name) or result["num_tasks"] in found:
                continue
            peak, predicted = result["peak_memory_bytes"], result["predicted_peak_bytes"] - CONTEXT
            row = {
                "tasks": result["num_tasks"], "peak_bytes": peak, "predicted_bytes": predicted,
                "prediction_error": predicted / peak - 1,
            }  # fmt: skip
            found[row["tasks"]] = row
            print(path.name, json.dumps(row))
    return [found[number] for number in sorted(found)]


def _memory(axes: Any, memory: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    curve = sorted([*memory.get("curve", []), *runs], key=lambda row: row["tasks"])
    tasks = [row["tasks"] for row in curve]
    for key, label, style in (
        ("peak_bytes", "measured, one backbone", "o-"),
        ("predicted_bytes", "predicted by the ledger", "x--"),
    ):
        axes.plot(tasks, [row[key] / 2**30 for row in curve], style, label=label)
    fits = [row for row in memory.get("hf_peft", []) if row["fits"]]
    count, gib = ([row[key] for row in fits] for key in ("instances", "peak_bytes"))
    axes.plot(count, [value / 2**30 for value in gib], "s-", label="HF PEFT instances")
    if memory:
        axes.axhline(memory["limit_bytes"] / 2**30, color="black", linestyle=":", label="limit")
        largest = memory["largest_that_is_planned"]
        axes.axvline(largest, color="tab:red", linestyle=":", label=f"last not refused: {largest}")
    axes.set(xlabel="tasks (LoRA, rank 16)", ylabel="peak memory, GiB", ylim=(0, None))
    axes.legend(fontsize=8)


def _joins(axes: Any, joins: dict[str, Any]) -> None:
    names = [name for name in CHANGES if name in joins]
    stalls = [joins[name]["stall_of_others_ms"] for name in names]
    bars = axes.barh([CHANGES[name] for name in names], stalls)
    axes.bar_label(bars, fmt="%.0f", padding=2)
    axes.invert_yaxis()
    axes.set(xlabel="stall of the other tasks, ms")
    axes.margins(x=0.2)


if __name__ == "__main__":
    main()
