"""LobRA's 16-GPU experiment with our planner. See README.md.

    python -m experiments.lobra_reproduction.run lobra_data=<folder> output=validation/lobra

writes reproduction.json, reproduction.png and prints the tables.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.lobra_layer_times.run import fitted_times
from experiments.lobra_reproduction import lengths as length_fits
from experiments.lobra_reproduction.drawing import draw
from experiments.lobra_reproduction.published import Published, arguments, exit_on_error, read
from muxtune.planning.lobra import (
    Buckets,
    Deployment,
    ReplicaGroup,
    ReplicaTimes,
    dispatch_balanced,
    dispatch_by_length,
    fill,
    fill_buckets,
    homogeneous,
    least_padding,
    plan_deployment,
    slowest_s,
)
from muxtune.report.run_folder import RunFolder, provenance

DEFAULTS = {
    "lobra_data": "",
    "output": "outputs/lobra",
    "steps": "24",
    "seed": "0",
    "gpus": "16",
    "buckets": "16",
}
INTERVAL_TOKENS = 256
PLANNING_STEPS = 100
PLANNING_SEED = 1_000_000  # planning must not see the steps that are scored
BUCKET_COUNTS = (1, 2, 4, 8, 16, 32)
BUCKET_STEPS = 12
PLANNED_GPUS = (16, 32, 64, 128, 256)
SENSITIVITY_STEPS = 8
RESAMPLES = 2000


class Setting(NamedTuple):
    published: Published
    times: ReplicaTimes
    num_gpus: int
    num_buckets: int
    seed: int
    family: str = length_fits.FAMILIES[0]

    @property
    def fits(self) -> tuple[length_fits.LengthFit, ...]:
        return tuple(length_fits.fit_lengths(d, self.family) for d in self.published.datasets)

    def drawn(self, step: int) -> list[np.ndarray]:
        return length_fits.draw_step(self.fits, self.seed, step)


class Planned(NamedTuple):
    """What is decided before the first step, for some of the tasks together."""

    fixed_lengths: tuple[int, ...]
    expected: Buckets
    several: Deployment  # replicas of different shapes
    equal: Deployment


def expected_buckets(drawn: Sequence[np.ndarray], cap_tokens: int, num_buckets: int) -> Buckets:
    """Mean sequences per bucket of the drawn steps, at least 1; the last bucket is the cap."""
    every = np.concatenate([*drawn, [cap_tokens]])
    lengths = least_padding(every, num_buckets, INTERVAL_TOKENS)
    filled = fill_buckets(every, lengths)
    counts = tuple(max(1, round(count / len(drawn))) for count in filled.counts)
    return filled._replace(counts=counts)


def planned(setting: Setting, tasks: Sequence[int]) -> Planned:
    fits = [setting.fits[task] for task in tasks]
    steps = [
        np.concatenate(length_fits.draw_step(tuple(fits), setting.seed + PLANNING_SEED, step))
        for step in range(PLANNING_STEPS)
    ]
    cap_tokens = max(fit.dataset.cap_tokens for fit in fits)
    expected = expected_buckets(steps, cap_tokens, setting.num_buckets)
    given = setting.times, setting.published.configurations, setting.num_gpus, expected
    return Planned(expected.lengths_tokens, expected, plan_deployment(*given), homogeneous(*given))


# ------------------------------------------------------------------------------------- steps


def step_s(
    times: ReplicaTimes,
    groups: Sequence[ReplicaGroup],
    lengths: np.ndarray,
    bucket_lengths: Sequence[int],
    dispatch: Callable = dispatch_balanced,
) -> float:
    """Simulated seconds of one step, by the pipeline player."""
    buckets = fill_buckets(lengths, bucket_lengths)
    loads = fill(times, groups, buckets, dispatch(times, groups, buckets))
    return slowest_s(times, loads, played=True)


def dynamic(lengths: np.ndarray, num_buckets: int) -> tuple[int, ...]:
    return least_padding(lengths, num_buckets, INTERVAL_TOKENS)


def schemes_s(
    setting: Setting, fused: Planned, alone: Sequence[Planned], step: int
) -> dict[str, float]:
    """Seconds of one step of every task, by scheme, all with the same lengths."""
    times, drawn = setting.times, setting.drawn(step)
    merged = np.concatenate(drawn)
    fixed, moving = fused.fixed_lengths, dynamic(merged, setting.num_buckets)
    equal, several = fused.equal.groups, fused.several.groups
    return {
        "task-sequential, equal replicas": sum(
            step_s(times, plan.equal.groups, own, plan.fixed_lengths)
            for plan, own in zip(alone, drawn, strict=True)
        ),
        "task-sequential, several shapes, balanced, dynamic": sum(
            step_s(times, plan.several.groups, own, dynamic(own, setting.num_buckets))
            for plan, own in zip(alone, drawn, strict=True)
        ),
        "task-fused, all padded to the longest": step_s(times, equal, merged, fixed[-1:]),
        "task-fused": step_s(times, equal, merged, fixed),
        "task-fused, dynamic": step_s(times, equal, merged, moving),
        "by length": step_s(times, several, merged, fixed, dispatch_by_length),
        "by length, dynamic": step_s(times, several, merged, moving, dispatch_by_length),
        "balanced": step_s(times, several, merged, fixed),
        "balanced, dynamic": step_s(times, several, merged, moving),
    }


def interval(values: np.ndarray, statistic: Callable, seed: int) -> tuple[float, float]:
    """90% bootstrap interval over the steps. ``values``: [steps, ...]."""
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile([statistic(values[chosen]) for chosen in rows], [0.05, 0.95])
    return float(low), float(high)


def summary(setting: Setting, rows: Sequence[dict[str, float]], baseline: str) -> list[dict]:
    """GPU-seconds a step, and the reduction against the baseline in the same steps."""
    table = []
    base_s = np.array([row[baseline] for row in rows])
    for name in rows[0]:
        pairs = np.stack([np.array([row[name] for row in rows]), base_s], axis=1)
        gpu_s = pairs[:, :1] * setting.num_gpus

        def reduction(chosen: np.ndarray) -> float:
            return float(1.0 - chosen[:, 0].sum() / chosen[:, 1].sum())

        table.append(
            {
                "scheme": name,
                "gpu_seconds": float(gpu_s.mean()),
                "gpu_seconds_90": interval(gpu_s, np.mean, setting.seed),
                "reduction": reduction(pairs),
                "reduction_90": interval(pairs, reduction, setting.seed),
            }
        )
    return table


# ------------------------------------------------------------------------------- more questions


def bucket_effect(setting: Setting, fused: Planned, num_steps: int) -> list[dict]:
    rows = []
    for count in BUCKET_COUNTS:
        seconds, padding = [], []
        for step in range(num_steps):
            merged = np.concatenate(setting.drawn(step))
            lengths = dynamic(merged, count)
            seconds.append(step_s(setting.times, fused.several.groups, merged, lengths))
            padding.append(fill_buckets(merged, lengths).padding_share)
        gpu_s = np.array(seconds) * setting.num_gpus
        rows.append(
            {
                "buckets": count,
                "gpu_seconds": float(gpu_s.mean()),
                "gpu_seconds_90": interval(gpu_s, np.mean, setting.seed),
                "padding_share": float(np.mean(padding)),
            }
        )
    return rows


def planning_time(setting: Setting, expected: Buckets) -> list[dict]:
    """The same batch on more GPUs, and a batch that grows with them. Processor seconds of one
    core, because the machine may be shared."""
    rows = []
    for num_gpus in PLANNED_GPUS:
        for growth in sorted({1, num_gpus // PLANNED_GPUS[0]}):
            batch = expected._replace(counts=tuple(growth * count for count in expected.counts))
            begin = time.process_time()
            found = plan_deployment(
                setting.times, setting.published.configurations, num_gpus, batch
            )
            seconds = time.process_time() - begin
            row = {"gpus": num_gpus, "batch_growth": growth, "seconds": seconds}
            rows.append(row | describe(found))
            print(f"planned {num_gpus} GPUs, batch x {growth}: {seconds:.1f} s", flush=True)
    return rows


def sensitivity(setting: Setting, num_steps: int) -> list[dict]:
    """The answer with other distributions of the same moments, and without pipelines."""
    published = setting.published
    flat = tuple(c for c in published.configurations if c.shape.pp == 1)
    variants = {family: setting._replace(family=family) for family in length_fits.FAMILIES}
    without = setting._replace(published=published._replace(configurations=flat))
    variants["lognormal, no pipelines"] = without
    return [_answer(name, one, num_steps) for name, one in variants.items()]


def _answer(name: str, setting: Setting, num_steps: int) -> dict:
    fused = planned(setting, range(len(setting.published.datasets)))
    rows = []
    for step in range(num_steps):
        merged = np.concatenate(setting.drawn(step))
        lengths = dynamic(merged, setting.num_buckets)
        base_s = step_s(setting.times, fused.equal.groups, merged, fused.fixed_lengths)
        rows.append((step_s(setting.times, fused.several.groups, merged, lengths), base_s))
    ours_s, base_s = np.array(rows).mean(axis=0)
    return {
        "variant": name,
        "deployment": str(fused.several),
        "task_fused": str(fused.equal),
        "gpu_seconds": float(ours_s * setting.num_gpus),
        "reduction": float(1.0 - ours_s / base_s),
    }


def describe(deployment: Deployment) -> dict:
    return {
        "deployment": str(deployment),
        "predicted_step_s": deployment.step_s,
        "bound_s": deployment.bound_s,
        "configurations": [str(each) for each in deployment.configurations],
        "plans": deployment.num_plans,
        "survivors": deployment.num_survivors,
        "solved": deployment.num_solved,
    }


# ---------------------------------------------------------------------------------- output


def length_table(setting: Setting) -> list[dict]:
    sample = [
        np.concatenate(rows)
        for rows in zip(*(setting.drawn(PLANNING_SEED + i) for i in range(50)), strict=True)
    ]
    return [
        {
            "dataset": fit.dataset.name,
            "sigma": fit.sigma,
            "skewness_fit_over_published": fit.skewness / fit.dataset.skewness,
            "kurtosis_fit_over_published": fit.excess_kurtosis / fit.dataset.excess_kurtosis,
            "drawn_mean_over_published": float(drawn.mean() / fit.dataset.mean_tokens),
            "share_at_cap": float((drawn == fit.dataset.cap_tokens).mean()),
        }
        for fit, drawn in zip(setting.fits, sample, strict=True)
    ]


def report(setting: Setting, num_steps: int) -> dict:
    num_tasks = len(setting.published.datasets)
    fused = planned(setting, range(num_tasks))
    alone = [planned(setting, [task]) for task in range(num_tasks)]
    begin = time.process_time()
    rows = [schemes_s(setting, fused, alone, step) for step in range(num_steps)]
    print(f"{num_steps} steps: {time.process_time() - begin:.1f} s of processor time", flush=True)
    return {
        "deployment": describe(fused.several),
        "task_fused": describe(fused.equal),
        "task_sequential": [
            {"dataset": fit.dataset.name, "equal": str(plan.equal), "several": str(plan.several)}
            for fit, plan in zip(setting.fits, alone, strict=True)
        ],
        "lengths": length_table(setting),
        "schemes": summary(setting, rows, "task-fused"),
        "steps_s": rows,
        "buckets": bucket_effect(setting, fused, min(num_steps, BUCKET_STEPS)),
        "sensitivity": sensitivity(setting, min(num_steps, SENSITIVITY_STEPS)),
        "planning": planning_time(setting, fused.expected),
        "communication": setting.times.communication._asdict(),
    }


def print_report(results: dict) -> None:
    print("deployment:", results["deployment"]["deployment"],
          " task-fused:", results["task_fused"]["deployment"])  # fmt: skip
    for row in results["schemes"]:
        low, high = row["reduction_90"]
        print(f"  {row['scheme']:<52} {row['gpu_seconds']:>7.1f} GPU-s"
              f" {row['reduction']:>7.1%} [{low:.1%}, {high:.1%}]")  # fmt: skip
    for row in results["buckets"]:
        print(f"  {row['buckets']:>3} buckets {row['gpu_seconds']:>7.1f} GPU-s,"
              f" padding {row['padding_share']:.1%}")  # fmt: skip
    for row in results["sensitivity"]:
        print(f"  {row['variant']:<26} {row['reduction']:>6.1%}  {row['deployment']}")
    for row in results["planning"]:
        print(f"  {row['gpus']:>4} GPUs, batch x {row['batch_growth']:<3} {row['seconds']:>6.1f} s,"
              f" {row['plans']} plans, {row['survivors']} survive, {row['solved']} solved:"
              f" {row['deployment']}")  # fmt: skip


def main(given: Sequence[str]) -> None:
    chosen = arguments(given, DEFAULTS)
    published = read(chosen["lobra_data"])
    num_gpus, num_buckets, seed = (int(chosen[name]) for name in ("gpus", "buckets", "seed"))
    setting = Setting(published, fitted_times(published), num_gpus, num_buckets, seed)
    with RunFolder(chosen["output"]) as folder:
        results = report(setting, int(chosen["steps"]))
        print_report(results)
        folder.write_json("reproduction.json", {"provenance": provenance(seed), **results})
    draw(Path(chosen["output"]) / "reproduction.png", results)


if __name__ == "__main__":
    exit_on_error(main)
