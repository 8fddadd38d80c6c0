"""Draws validation/near_optimum.png, and near_optimum_iteration.png where that was run, from the
JSON files beside them.

    python experiments/near_optimum/plot.py [--folder validation]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent.parent.parent / "validation"
ALL_PLANS = {"near_optimum": "all plans, by the closed form",
             "near_optimum_iteration": "all plans, played subgraph by subgraph"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    for name, against in ALL_PLANS.items():
        file = folder / f"{name}.json"
        if file.exists():
            draw(json.loads(file.read_text(encoding="utf-8"))["instances"], against)
            plt.savefig(folder / f"{name}.png", dpi=130)


def draw(instances: list[dict[str, Any]], against: str) -> None:
    rows = [row for row in instances if row["planned_s"] and row["optimum_s"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for stages in sorted({row["stages"] for row in rows}):
        ratios = sorted(r["planned_s"] / r["optimum_s"] for r in rows if r["stages"] == stages)
        shares = [100 * (i + 1) / len(ratios) for i in range(len(ratios))]
        label = f"{stages} stage(s), {len(ratios)} instances"
        left.step([100 * (r - 1) for r in ratios], shares, where="post", label=label)
    left.axvline(10, color="red", linestyle=":", label="worst allowed")
    left.set(xlabel="slower than the best plan, %", ylabel="% of instances")
    left.set_title(f"against {against}", fontsize=9)
    left.legend(loc="lower right")
    names = ("all_spatial_s", "all_temporal_s", "exclusive_s")
    gains = [[row[name] / row["planned_s"] for row in rows if row[name]] for name in names]
    right.boxplot(gains, tick_labels=["all spatial", "all temporal", "exclusive (eager)"])
    right.axhline(1, color="red", linestyle=":")
    right.set(yscale="log", ylabel="time over the planned time")
    for axes in (left, right):
        axes.grid(True, alpha=0.3)
    figure.tight_layout()


if __name__ == "__main__":
    main()
