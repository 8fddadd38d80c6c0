"""Do layer times and a pipeline simulator predict measured steps? See README.md.

    python -m experiments.lobra_layer_times.run lobra_data=<folder> output=validation/lobra

writes layer_times.json and layer_times.png and prints the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.optimize import minimize_scalar

from experiments.lobra_reproduction.published import (
    NUM_LAYERS,
    Published,
    arguments,
    exit_on_error,
    read,
)
from muxtune.planning.lobra import (
    PARAMETERS,
    Communication,
    LayerTimes,
    ReplicaTimes,
    fit_communication,
    fit_layer_times,
    layer_fits,
    predicted_step_s,
)
from muxtune.report.plots import DOTS_PER_INCH, PALETTE
from muxtune.report.run_folder import RunFolder, provenance

DEFAULTS = {"lobra_data": "", "output": "outputs/lobra"}
CHOSEN = (PARAMETERS[0],)  # one fitted parameter: the transfer time per token
VARIANTS = {"none": (), "transfer": CHOSEN, "sync": PARAMETERS[1:], "transfer and sync": PARAMETERS}


class Errors(NamedTuple):
    """Relative, with sign, by row; positive: predicted too slow."""

    by_row: tuple[float, ...]
    mean: float
    worst: float


def errors(predicted_s: Sequence[float], measured_s: Sequence[float]) -> Errors:
    relative = np.array(predicted_s) / np.array(measured_s) - 1.0
    size = np.abs(relative)
    return Errors(tuple(map(float, relative)), float(size.mean()), float(size.max()))


def layers_only_s(published: Published) -> list[float]:
    """Measured layer time x layers / PP x (micro-batches + PP - 1)."""
    measured = {(s.tp, s.batch, s.length_tokens): s.seconds for s in published.layer_samples}
    return [
        measured[step.shape.tp, *step.micro_batch]
        * (NUM_LAYERS / step.shape.pp)
        * (step.num_micro_batches + step.shape.pp - 1)
        for step in published.steps
    ]


def fitted_times(
    published: Published, parameters: Sequence[str] = CHOSEN, system: str = "lobra"
) -> ReplicaTimes:
    """Layer times and communication from everything that was published."""
    layer_times = fit_layer_times(published.layer_samples)
    measured_s = published.measured_s[system]
    found = fit_communication(layer_times, NUM_LAYERS, published.steps, measured_s, parameters)
    return ReplicaTimes(layer_times, NUM_LAYERS, found)


def leave_one_out_s(
    layer_times: LayerTimes,
    published: Published,
    measured_s: Sequence[float],
    parameters: Sequence[str],
) -> list[float]:
    """Each row predicted with communication fitted to the others."""
    predicted = []
    for out, step in enumerate(published.steps):
        rows = [row for row in range(len(published.steps)) if row != out]
        steps = [published.steps[row] for row in rows]
        times_s = [measured_s[row] for row in rows]
        found = fit_communication(layer_times, NUM_LAYERS, steps, times_s, parameters)
        predicted.append(predicted_step_s(ReplicaTimes(layer_times, NUM_LAYERS, found), step))
    return predicted


def variant(published: Published, system: str, parameters: Sequence[str]) -> dict:
    times = fitted_times(published, parameters, system)
    measured_s = published.measured_s[system]
    seen_s = [predicted_step_s(times, step) for step in published.steps]
    unseen_s = leave_one_out_s(times.layer_times, published, measured_s, parameters)
    return {
        "communication": times.communication._asdict(),
        "fitted": errors(seen_s, measured_s)._asdict(),
        "leave_one_out": errors(unseen_s, measured_s)._asdict(),
    }


# ------------------------------------------------------------------------ another kind of row


def scaled(layer_times: LayerTimes, factor: float) -> LayerTimes:
    rows = layer_times.coefficients.items()
    return LayerTimes({tp: tuple(factor * value for value in row) for tp, row in rows})


def other_system(published: Published) -> dict:
    """NeMo runs other kernels: layer times scaled by one factor and one transfer time, both from
    its own rows, leave-one-out."""
    layer_times, measured_s = fit_layer_times(published.layer_samples), published.measured_s["nemo"]
    rows = range(len(published.steps))
    predicted, factors = [], []
    for out in rows:
        kept = [row for row in rows if row != out]
        factor, found = _fit_scaled(layer_times, published, measured_s, kept)
        times = ReplicaTimes(scaled(layer_times, factor), NUM_LAYERS, found)
        predicted.append(predicted_step_s(times, published.steps[out]))
        factors.append(factor)
    return {"factors": factors, "leave_one_out": errors(predicted, measured_s)._asdict()}


def _fit_scaled(
    layer_times: LayerTimes,
    published: Published,
    measured_s: Sequence[float],
    rows: Sequence[int],
) -> tuple[float, Communication]:
    steps, times_s = [published.steps[row] for row in rows], [measured_s[row] for row in rows]

    def at(factor: float) -> tuple[float, Communication]:
        layers = scaled(layer_times, factor)
        found = fit_communication(layers, NUM_LAYERS, steps, times_s, CHOSEN)
        times = ReplicaTimes(layers, NUM_LAYERS, found)
        predicted = [predicted_step_s(times, step) for step in steps]
        return float(np.square(errors(predicted, times_s).by_row).sum()), found

    best = minimize_scalar(lambda factor: at(factor)[0], bounds=(0.5, 1.5), method="bounded")
    factor = float(best.x)  # type: ignore[attr-defined]
    return factor, at(factor)[1]


# ---------------------------------------------------------------------------------- output


def row_names(published: Published) -> list[str]:
    return [
        f"<{step.shape.tp},{step.shape.pp}> x {step.replicas}\n{step.micro_batch.length_tokens}"
        for step in published.steps
    ]


def draw(path: Path, published: Published, alone: Errors, chosen: Errors) -> None:
    figure = Figure(figsize=(8.0, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    positions = np.arange(len(published.steps))
    bars = [
        ("layer times x (micro-batches + PP - 1)", alone, PALETTE[5], -0.2),
        ("simulated 1F1B, one parameter fitted to the other rows", chosen, PALETTE[0], 0.2),
    ]
    for label, found, colour, shift in bars:
        text = f"{label}: {found.mean:.1%} on average, {found.worst:.1%} at worst"
        height = 100 * np.array(found.by_row)
        axes.bar(positions + shift, height, 0.4, color=colour, label=text)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(positions, row_names(published))
    axes.set_xlabel("<TP, PP> x replicas, tokens of every sequence (Llama-2-7B, 16 A100-40GB)")
    axes.set_ylabel("error of step time (%)")
    axes.set_ylim(-16, 12)
    axes.legend(fontsize="small", loc="upper right")
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def report(published: Published) -> dict:
    measured_s = published.measured_s["lobra"]
    return {
        "layer_fits": [fit._asdict() for fit in layer_fits(published.layer_samples)],
        "layers_only": errors(layers_only_s(published), measured_s)._asdict(),
        "lobra": {name: variant(published, "lobra", names) for name, names in VARIANTS.items()},
        "nemo": {name: variant(published, "nemo", names) for name, names in VARIANTS.items()},
        "nemo_scaled": other_system(published),
        "rows": [name.replace("\n", ", ") for name in row_names(published)],
    }


def print_table(results: dict) -> None:
    print("layer time of one layer   samples   mean    worst   held out: mean   worst")
    for fit in results["layer_fits"]:
        print(f"  TP {fit['tp']:<22} {fit['num_samples']:>6} {fit['mean_error']:>7.1%}"
              f" {fit['worst_error']:>8.1%} {fit['held_out_mean_error']:>15.1%}"
              f" {fit['held_out_worst_error']:>7.1%}")  # fmt: skip
    print("step time                              leave-one-out: mean   worst")
    rows = [("LobRA, layer times alone", results["layers_only"])]
    for system in ("lobra", "nemo"):
        for name, found in results[system].items():
            rows.append((f"{system}, simulated, fitted: {name}", found["leave_one_out"]))
    rows.append(("nemo, simulated, layer times scaled", results["nemo_scaled"]["leave_one_out"]))
    for name, found in rows:
        print(f"  {name:<50} {found['mean']:>6.1%} {found['worst']:>7.1%}")


def main(given: Sequence[str]) -> None:
    chosen = arguments(given, DEFAULTS)
    published = read(chosen["lobra_data"])
    results = report(published)
    print_table(results)
    with RunFolder(chosen["output"]) as folder:
        folder.write_json("layer_times.json", {"provenance": provenance(), **results})
    best = Errors(**results["lobra"]["transfer"]["leave_one_out"])
    alone = Errors(**results["layers_only"])
    draw(Path(chosen["output"]) / "layer_times.png", published, alone, best)


if __name__ == "__main__":
    exit_on_error(main)
