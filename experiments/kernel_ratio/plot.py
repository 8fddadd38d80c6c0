"""Plots run.py's JSON: ratio to the plain frozen linear against the number of tasks.

python3 experiments/kernel_ratio/plot.py kernel_ratio.json kernel_ratio.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS = {
    "muxtune_fp32_adapters": ("MuxTune, fused products", "C0", "o-"),
    "muxtune_windows": ("MuxTune, windows of ranks", "C3", "d-."),
    # As earlier runs in validation/kernel_ratio name them.
    "muxtune_with_room": ("MuxTune, buffers with room", "C3", "d-."),
    "without room": ("MuxTune", "C0", "o-"),
    "distant": ("windows, gradients in turn", "C4", "v--"),
    "distant 2 stream3": ("windows, gradients beside", "C3", "d-."),
    "concatenated": ("concatenated, masked (cuBLAS)", "C1", "s--"),
    "grouped_mm": ("torch._grouped_mm", "C2", "^:"),
}


def draw(axis, rows: list[dict], title: str, top: float) -> None:
    rows = sorted(rows, key=lambda row: row["tasks"])
    tasks = [row["tasks"] for row in rows]
    for name, (label, color, style) in METHODS.items():
        having = [row for row in rows if name in row["methods"]]
        if not having:
            continue
        found, at = [row["methods"][name] for row in having], [row["tasks"] for row in having]
        ratio = [m["ratio"] for m in found]
        axis.plot(at, ratio, style, color=color, label=label, markersize=4)
        lows, highs = ([m[key] for m in found] for key in ("ratio_min", "ratio_max"))
        axis.fill_between(at, lows, highs, color=color, alpha=0.15)
    axis.axhline(1.0, color="0.5", linewidth=0.8)
    axis.set(title=title, xscale="log", xticks=tasks, ylim=(0.95, top))
    axis.set_xticklabels(tasks)
    axis.minorticks_off()


def main(source: Path, target: Path) -> None:
    report = json.loads(source.read_text())
    keys = sorted({(r["mode"], r["in"], r["out"], r["tokens"]) for r in report["results"]})
    columns = len({key[3] for key in keys})
    figure, axes = plt.subplots(
        len(keys) // columns, columns, figsize=(3.4 * columns, 2.5 * len(keys) // columns),
        sharex=True, squeeze=False,
    )  # fmt: skip
    for axis, (mode, width, out, tokens) in zip(axes.flat, keys, strict=True):
        rows = [
            r for r in report["results"]
            if (r["mode"], r["in"], r["out"], r["tokens"]) == (mode, width, out, tokens)
        ]  # fmt: skip
        # Eager steps of few tokens are bound by the host and need a scale of their own.
        top = 6.0 if mode == "eager" and tokens == min(key[3] for key in keys) else 2.6
        if not any("grouped_mm" in row["methods"] for row in rows):
            top = 1.5
        draw(axis, rows, f"{width}x{out}, {tokens} tokens, {mode}", top)
    axes[0, 0].legend(fontsize=7)
    environment = report["environment"]
    figure.supxlabel("tasks (rank 16 each)")
    figure.supylabel("time / plain frozen linear, forward + backward")
    figure.suptitle(f"{environment['device']}, torch {environment['torch']}, {environment['date']}")
    figure.tight_layout()
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
