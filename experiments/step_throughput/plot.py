"""Plot of ``step_throughput.json``: throughput beside the baselines, and the ledger of a round.

python3 experiments/step_throughput/plot.py step_throughput.json step_throughput.png
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    data = json.loads(args.source.read_text("utf-8"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    _throughput(left, data)
    _ledger(right, data.get("ledger") or {})
    verdict = data.get("verdict") or {"reportable": False}
    note = "" if verdict["reportable"] else " (NOT reportable: see verdict)"
    environment = data["environment"]
    figure.suptitle(
        f"Llama-2-7B shape, 8 LoRA tasks r=16, {environment['device']}, {environment['date']}{note}"
    )
    figure.savefig(args.target, dpi=130)


def _throughput(axes, data: dict) -> None:
    bars = {"bound": data.get("bound_tokens_per_s") or 0.0}
    for key, label in (("ours", "MuxTune"), ("sl_peft", "SL-PEFT"), ("hf_peft", "HF PEFT")):
        bars[label] = (data.get(key) or {}).get("effective_tokens_per_s", 0.0)
    drawn = axes.bar(list(bars), list(bars.values()))
    axes.bar_label(drawn, fmt="%.0f")
    axes.set_ylabel("effective tokens/s")


def _ledger(axes, ledger: dict) -> None:
    start = 0.0
    for key, label in LEDGER.items():
        value = ledger.get(key, 0.0)
        axes.barh(0, value, left=start, label=f"{label}: {value:.1f} ms")
        start += value
    axes.set_yticks([])
    axes.set_xlabel("ms a round")
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


if __name__ == "__main__":
    main()
