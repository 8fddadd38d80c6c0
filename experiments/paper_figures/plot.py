"""The pictures of ``results.json``: ratios, ablations, memory, sensitivity.

python -m experiments.paper_figures.plot --output FOLDER
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.paper_figures.systems import BASELINES, NAMES
from muxtune.report.plots import PALETTE, _figure, _save

PARTS = ("fusion", "orchestration", "alignment", "alignment, all")


def draw(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    draw_ratios(folder / "ratios.png", results)
    draw_ablations(folder / "ablations.png", results)
    draw_memory(folder / "memory.png", results)
    draw_sensitivity(folder / "sensitivity.png", results["sensitivity"])


def draw_ratios(path: Path, results: Mapping) -> None:
    """A panel a baseline, a row a case; published values as lines of their device's rows."""
    rows = results["throughput"]
    figure = _figure(12.0, 0.34 * len(rows) + 1.6)
    axes = figure.subplots(1, len(BASELINES), sharey=True)
    for panel, name in zip(axes, BASELINES, strict=True):
        for at, row in enumerate(rows):
            colour = PALETTE[0] if row["data"] == "mixed" else PALETTE[1]
            ratio = row["ratios"].get(name)
            if ratio is not None:
                panel.barh(at, ratio, color=colour, height=0.7)
                panel.text(ratio, at, f" {ratio:.2f}", va="center", fontsize=7)
            published = row["published"].get(name)
            if published is not None:
                panel.plot([published] * 2, [at - 0.45, at + 0.45], color="black", linewidth=2)
        panel.set_title(f"over {NAMES[name]}", fontsize=10)
        panel.set_xlabel("throughput ratio")
        panel.axvline(1.0, color="#bbbbbb", linewidth=0.8, zorder=0)
        panel.margins(x=0.16, y=0.01)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(
        range(len(rows)), [f"{r['label']}, {r['testbed']}, {r['data']}" for r in rows], fontsize=7
    )
    axes[0].invert_yaxis()
    figure.suptitle(
        "Ours over baselines, simulated (bars: orange uniform, blue mixed); black: published or "
        "second-hand",
        fontsize=11,
    )
    _save(figure, path)


def draw_ablations(path: Path, results: Mapping) -> None:
    rows, loads = results["ablations"], ("light", "heavy")
    figure = _figure(11.0, 4.2)
    axes = figure.subplots(1, 2, sharey=True)
    for panel, load in zip(axes, loads, strict=True):
        chosen = [row for row in rows if row["load"] == load]
        width = 0.8 / (len(chosen) + 1)
        for index, row in enumerate(chosen):
            lost = [100 * row["lost"].get(part, 0.0) for part in PARTS]
            places = [at + index * width for at in range(len(PARTS))]
            panel.bar(places, lost, width, label=f"{row['label']}, {row['testbed']}",
                      color=PALETTE[index % len(PALETTE)])  # fmt: skip
        known = [100 * results["published"]["ablations"][load].get(p, 0.0) for p in PARTS[:3]]
        places = [at + len(chosen) * width for at in range(3)]
        panel.bar(places, known, width, color="black", label="second-hand")
        panel.set_xticks([at + 0.3 for at in range(len(PARTS))], PARTS)
        panel.set_title(f"{load} load", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("throughput lost without it (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle("What each level is worth, mixed data", fontsize=11)
    _save(figure, path)


def draw_memory(path: Path, results: Mapping) -> None:
    rows = results["memory"]
    figure = _figure(11.0, 4.0)
    axes = figure.subplots(1, len(rows), squeeze=False)[0]
    for panel, row in zip(axes, rows, strict=True):
        for index, (name, sizes) in enumerate(row["bytes"].items()):
            counts = range(1, len(sizes) + 1)
            panel.plot(counts, [s / 1e9 for s in sizes], color=PALETTE[index], label=NAMES[name])
        panel.axhline(row["limit_bytes"] / 1e9, color="black", linewidth=1, linestyle="--")
        panel.set_ylim(0, 2.2 * row["limit_bytes"] / 1e9)
        panel.set_xlabel("tasks")
        panel.set_title(f"{row['label']}, {row['testbed']}", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("GB on the fullest GPU")
    axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle("Memory against tasks hosted at once (dashed: 90% of the device)", fontsize=11)
    _save(figure, path)


def draw_sensitivity(path: Path, cases: Sequence[Mapping]) -> None:
    """A row an assumption, sorted by what it moves; a panel a baseline, a colour a case."""
    names = list(dict.fromkeys(c["assumption"] for c in cases[0]["changes"]))
    swing = {
        name: max(_swing(case, name, b) for case in cases for b in BASELINES) for name in names
    }
    names.sort(key=lambda name: swing[name])
    figure = _figure(12.5, 0.4 * len(names) + 1.8)
    axes = figure.subplots(1, len(BASELINES), sharey=True)
    for panel, baseline in zip(axes, BASELINES, strict=True):
        for index, case in enumerate(cases):
            _tornado(panel, case, baseline, names, index, len(cases))
        panel.axvline(0.0, color="black", linewidth=0.8)
        panel.set_title(f"over {NAMES[baseline]}", fontsize=10)
        panel.set_xlabel("change of the ratio (%)")
        panel.margins(y=0.01)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle("How far each assumption moves our throughput ratio, mixed data", fontsize=11)
    _save(figure, path)


def _tornado(
    panel, case: Mapping, baseline: str, names: Sequence[str], index: int, num_cases: int
) -> None:
    height = 0.8 / num_cases
    label: str | None = case["case"]
    for at, name in enumerate(names):
        for change in case["changes"]:
            moved = _moved(case, change, baseline)
            if change["assumption"] == name and moved is not None:
                panel.barh(at + (index - num_cases / 2 + 0.5) * height, 100 * moved, height,
                           color=PALETTE[index], alpha=0.75, label=label)  # fmt: skip
                label = None


def _moved(case: Mapping, change: Mapping, baseline: str) -> float | None:
    if baseline not in change["ratios"] or baseline not in case["base"]:
        return None
    return change["ratios"][baseline] / case["base"][baseline] - 1


def _swing(case: Mapping, name: str, baseline: str) -> float:
    moves = [_moved(case, c, baseline) for c in case["changes"] if c["assumption"] == name]
    return max((abs(move) for move in moves if move is not None), default=0.0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/paper_figures"))
    draw(parser.parse_args().output)
