"""What the figures of a validation show, read from the figures themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from muxtune.validation import plots


def timed(predicted_s: float, measured_s: float, **more: Any) -> dict[str, Any]:
    low, high = 0.9 * predicted_s, 1.1 * predicted_s
    row = {"predicted_s": predicted_s, "measured_s": measured_s, "low_s": low, "high_s": high}
    return row | more


def step(predicted_s: float, measured_s: float) -> dict[str, Any]:
    case = {"shape": {"name": "tiny"}}
    memory = {f"{key}_bytes": 1e9 for key in ("measured", "predicted", "low", "high")}
    return timed(predicted_s, measured_s, case=case, repeats_s=[measured_s] * 3, **memory)


def run(name: str, *ends_s: tuple[float, float]) -> dict[str, Any]:
    done = {"predicted_state": "done", "measured_state": "done"}
    return {"name": name, "tasks": [timed(*pair, **done) for pair in ends_s]}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Kept in place of files, in the order in which they are drawn."""
    kept: list[Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: kept.append(figure))
    return kept


def test_runs_have_markers_of_their_own_on_linear_axes(figures: list[Figure], tmp_path: Path):
    runs = [run("arrivals", (9.0, 10.0)), run("queue", (5.0, 5.0), (7.0, 6.0))]
    steps = [step(0.01, 0.01), step(1.0, 1.0)]
    plots.draw_all(tmp_path, "H100-SXM", steps, [], runs)
    times, _, ends = figures[0].axes
    assert (times.get_xscale(), ends.get_xscale()) == ("log", "linear"), "a decade, or less"
    legend = ends.get_legend()
    assert legend is not None and [x.get_text() for x in legend.get_texts()] == [
        "arrivals",
        "queue",
    ]
    assert len({str(line.get_marker()) for line in ends.lines[:2]}) == 2
    assert all("H100-SXM" in figure.get_suptitle() for figure in figures)


@pytest.mark.parametrize("error", [0.38, -0.45, 3.0])
def test_every_error_lies_between_labelled_ticks(
    figures: list[Figure], tmp_path: Path, error: float
):
    plots.draw_all(tmp_path, "cpu", [step(1.0 + error, 1.0)], [], [])
    axes = figures[1].axes[-1]
    low, high = axes.get_xlim()
    seen = [tick for tick in axes.get_xticks() if low <= tick <= high]
    drawn = [
        x for panel in figures[1].axes for line in panel.lines for x in np.asarray(line.get_xdata())
    ]
    assert pytest.approx(100 * error) in drawn
    assert min(seen) <= min(drawn) and max(drawn) <= max(seen)


def test_groups_are_named_as_a_reader_says_them(figures: list[Figure], tmp_path: Path):
    names = ("attention_forward.32x32x128", "site_factor.64x64", "adapter_lora_backward.8x8")
    ops = [{"ops": [timed(1.0, 1.0, op=name) for name in names]}]
    plots.draw_all(tmp_path, "cpu", [], ops, [])
    labels = [[x.get_text() for x in panel.get_yticklabels()] for panel in figures[0].axes]
    kinds = [
        "attention, forward (1)",
        "gradient of adapters' A (1)",
        "LoRA's products, backward (1)",
    ]
    assert labels == [["single operations (3)"], kinds]


def test_goals_are_bands_with_what_was_reached(figures: list[Figure], tmp_path: Path):
    plots.draw_all(tmp_path, "cpu", [step(1.02, 1.0), step(0.94, 1.0)], [], [])
    goals = figures[1].axes[0]
    bands = [(bar.get_x(), bar.get_width()) for bar in goals.patches if isinstance(bar, Rectangle)]
    assert bands[:2] == [pytest.approx(x) for x in ((-6.0, 12.0), (-3.0, 6.0))]
    marks = [np.asarray(line.get_xdata())[0] for line in goals.lines if line.get_marker() == "D"]
    assert marks[:2] == pytest.approx([5.8, 4.0]), "of 2% and 6%: 95th percentile and mean"
