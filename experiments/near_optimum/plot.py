"""Draws validation/near_optimum.png from near_optimum.json."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent.parent.parent / "validation"


def main() -> None:
    content = json.loads((FOLDER / "near_optimum.json").read_text(encoding="utf-8"))
    rows = [row for row in content["instances"] if row["planned_s"] and row["optimum_s"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for stages in sorted({row["stages"] for row in rows}):
        ratios = sorted(r["planned_s"] / r["optimum_s"] for r in rows if r["stages"] == stages)
        shares = [100 * (i + 1) / len(ratios) for i in range(len(ratios))]
        left.step([100 * (r - 1) for r in ratios], shares, where="post", label=f"{stages} stage(s)")
    left.axvline(10, color="red", linestyle=":", label="worst allowed")
    left.set(xlabel="slower than the best of all plans, %", ylabel="% of instances")
    left.legend(loc="lower right")
    names = ("all_spatial_s", "all_temporal_s", "exclusive_s")
    gains = [[row[name] / row["planned_s"] for row in rows if row[name]] for name in names]
    right.boxplot(gains, tick_labels=["all spatial", "all temporal", "exclusive (eager)"])
    right.axhline(1, color="red", linestyle=":")
    right.set(yscale="log", ylabel="time over the planned time")
    for axes in (left, right):
        axes.grid(True, alpha=0.3)
    figure.tight_layout()
    figure.savefig(FOLDER / "near_optimum.png", dpi=130)


if __name__ == "__main__":
    main()
