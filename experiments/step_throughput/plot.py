"""Plot of ``step_throughput.json``: throughput of every case beside bound and baselines, and the
ledger of a round.

    python3 experiments/step_throughput/plot.py step_throughput.json step_throughput.png \\
        [--more more.json ...]

``--more``: cases that were measured on the same machine by the processes that followed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LEDGER = {
    "bound_ms": "bound for the effective tokens",
    "filler_ms": "filler rows",
    "frozen_at_this_size_ms": "frozen products at this size",
    "adapters_ms": "adapters",
    "optimizer_ms": "optimizer",
    "host_and_launch_ms": "host and launch",
}
LABELS = {
    "lora_8": "8 LoRA", "lora_8_windows": "8 LoRA, windows of ranks",
    "lora_8_planned": "8 LoRA, as planned", "lora_1": "1 LoRA",
    "lora_4": "4 LoRA", "lora_16": "16 LoRA", "lora_32": "32 LoRA",
    "mixed_ranks": "8 of ranks 8-64", "mixed_methods": "8 of four methods",
    "all_methods": "8 of six methods", "lora_8_padded": "8 LoRA, padded (SL-PEFT here)",
    "llama_3_1_8b": "8 LoRA, Llama-3.1-8B", "sl_peft": "SL-PEFT on HF PEFT", "hf_peft": "HF PEFT",
    "hf_peft_again": "HF PEFT, again",
}  # fmt: skip
BASELINES = ("sl_peft", "hf_peft", "hf_peft_again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--more", type=Path, nargs="*", default=[])
    args = parser.parse_args()
    data = json.loads(args.source.read_text("utf-8"))
    more = [json.loads(path.read_text("utf-8")) for path in args.more]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.5), constrained_layout=True, width_ratios=(3, 2)
    )
    _throughput(left, data, more)
    _ledger(right, data.get("ledger") or {})
    verdict, environment = data["verdict"], data["environment"]
    note = "" if verdict["reportable"] else " (NOT reportable: see verdict)"
    figure.suptitle(
        f"muxtune train, Llama-2-7B shape, {environment['device']}, {environment['date']}{note}"
    )
    figure.savefig(args.target, dpi=130)


def _throughput(axes, data: dict, more: list[dict]) -> None:
    bars = {}
    for name, label in LABELS.items():
        found = [(_tokens_per_s(each.get(name) or {}), each is data) for each in (data, *more)]
        rate, is_here = max(found)
        if rate:
            colour = "tab:grey" if name in BASELINES else "tab:blue" if is_here else "tab:cyan"
            bars[label] = rate, colour
    rates, colours = zip(*bars.values(), strict=True)
    drawn = axes.barh(list(bars), rates, color=colours)
    axes.bar_label(drawn, fmt="%.0f", padding=2)
    axes.invert_yaxis()
    best = data.get("bound", {}).get("best_tokens_per_s")
    if best:
        axes.axvline(best, color="black", linestyle="--")
        after = "; light: measured in a process of its own" if "tab:cyan" in colours else ""
        axes.set_title(f"dashed: bound of the frozen backbone, {best:.0f}{after}", fontsize=9)
    axes.set_xlabel("effective tokens/s")
    axes.margins(x=0.12)


def _tokens_per_s(row: dict) -> float:
    """Of what was measured several times, the fastest."""
    return max((run["effective_tokens_per_s"] for run in row.get("runs", [])),
               default=row.get("effective_tokens_per_s", 0.0))  # fmt: skip


def _ledger(axes, ledger: dict) -> None:
    start = 0.0
    for key, label in LEDGER.items():
        value = ledger.get(key, 0.0)
        axes.barh(0, value, left=start, label=f"{label}: {value:.1f} ms")
        start += value
    axes.set_yticks([])
    axes.set_xlabel("ms a round of the 8 LoRA tasks")
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


if __name__ == "__main__":
    main()
