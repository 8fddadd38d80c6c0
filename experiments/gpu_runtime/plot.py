"""Plots of ``gpu_runtime.json``: peak memory against the number of tasks, and joins and leaves.

python3 experiments/gpu_runtime/plot.py gpu_runtime.json gpu_runtime.png [--hf-peft OTHER.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CHANGES = {
    "join_same_shape": "join, free slot", "leave_same_shape": "leave, same shape",
    "join_new_shape": "join, new shape", "leave_new_shape": "leave, new shape",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--hf-peft", type=Path, help="results with HF PEFT's instances, if apart")
    args = parser.parse_args()
    data = json.loads(args.source.read_text("utf-8"))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.5), constrained_layout=True, width_ratios=(3, 2)
    )
    memory, joins = data.get("memory") or {}, data.get("joins") or {}
    apart = json.loads(args.hf_peft.read_text("utf-8"))["memory"] if args.hf_peft else memory
    _memory(left, memory, apart.get("hf_peft", []))
    _joins(right, joins)
    about = (memory or joins)["environment"]
    figure.suptitle(f"muxtune train, Llama-2-7B shape, {about['device']}, {about['date']}")
    figure.savefig(args.target, dpi=130)


def _memory(axes: Any, memory: dict[str, Any], hf_peft: list[dict[str, Any]]) -> None:
    curve = memory.get("curve", [])
    tasks = [row["tasks"] for row in curve]
    for key, label, style in (
        ("peak_bytes", "measured, one backbone", "o-"),
        ("predicted_bytes", "predicted by the ledger", "x--"),
    ):
        axes.plot(tasks, [row[key] / 2**30 for row in curve], style, label=label)
    fits = [row for row in hf_peft if row["fits"]]
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
    if any(stall > 0 for stall in stalls):
        axes.set_xscale("log")
    axes.margins(x=0.2)


if __name__ == "__main__":
    main()
