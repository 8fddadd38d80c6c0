"""Draws validation/planner_speed.png from planner_speed.json."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent.parent.parent / "validation"


def main() -> None:
    content = json.loads((FOLDER / "planner_speed.json").read_text(encoding="utf-8"))
    rows = content["scratch"]
    sizes = [row["tasks"] for row in rows]
    figure, axes = plt.subplots(figsize=(7, 4.5))
    axes.plot(sizes, [row["p95_s"] * 1e3 for row in rows], "o-", label="from scratch, p95")
    axes.plot(sizes, [row["mean_s"] * 1e3 for row in rows], "s--", label="from scratch, mean")
    arrival = content["arrival_at_64"]["p95_s"] * 1e3
    axes.plot([64], [arrival], "^", markersize=9, label="arrival at 64 tasks, p95")
    fleet_ms = content["fleet"]["mean_s"] * 1e3
    axes.axhline(fleet_ms, color="grey", label=f"fleet mode, mean ({fleet_ms * 1e3:.0f} us)")
    axes.plot([64, 1000], [50, 1000], "rx", markersize=9, label="limits: 50 ms, 1 s")
    axes.set(xscale="log", yscale="log", xlabel="tasks on one instance", ylabel="CPU ms a plan")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(FOLDER / "planner_speed.png", dpi=130)


if __name__ == "__main__":
    main()
