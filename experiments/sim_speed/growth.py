"""How the time and the memory of a simulation grow with tasks, instances and tasks an instance.

    python experiments/sim_speed/growth.py --output validation/sim_speed [--quick]

Every point is one `muxtune simulate` in a process of its own, on one core: start of the program,
drawing the tasks, planning and writing the results included. Arrivals are Poisson, tasks are the
three data sets of the MuxTune paper (as in workload=philly). Modules are compiled beforehand, as
they are once the program has run (a short run before the first point). For the planner `muxtune`
100 sampled plans are made again from scratch and compared. CPU seconds count beside wall seconds
because the machine may be shared; "reference" is a fixed loop, timed before each run, to tell how
fast the core was at the moment.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from philly import ONE_CORE, planned_again

COMPILED = Path(tempfile.gettempdir()) / "muxtune-sim-speed-compiled"
MIX = (
    "workload.mix=[{histogram:sst2,weight:3,max_length_tokens:64,batch_size:8,rank:16},"
    "{histogram:openbookqa,weight:3,max_length_tokens:128,batch_size:8,rank:16},"
    "{histogram:rte,weight:2,max_length_tokens:256,batch_size:8,rank:16}]"
)
LOADS = {"exclusive": 0.8, "muxtune": 16.0}
SHOWN = (
    *("num_tasks", "num_done", "num_gpus", "num_plans", "num_planner_calls", "mean_planning_us"),
    *("concurrent_tasks_per_instance", "utilisation", "offered_load", "times"),
)


class Point(NamedTuple):
    """``series``: the plot that it is for."""

    series: str
    planner: str
    tasks: int
    gpus: int
    cap: int = 10


POINTS = (
    Point("start", "exclusive", 100, 1_000),  # what is not the tasks'
    Point("tasks", "exclusive", 10_000, 1_000),
    Point("tasks", "exclusive", 30_000, 1_000),
    Point("tasks", "exclusive", 100_000, 1_000),
    Point("tasks", "exclusive", 1_000_000, 1_000),
    Point("tasks", "muxtune", 10_000, 1_000),
    Point("tasks", "muxtune", 30_000, 1_000),
    Point("tasks", "muxtune", 100_000, 1_000),
    Point("instances", "exclusive", 20_000, 30),
    Point("instances", "exclusive", 20_000, 100),
    Point("instances", "exclusive", 20_000, 300),
    Point("instances", "exclusive", 20_000, 3_000),
    Point("instances", "muxtune", 20_000, 30),
    Point("instances", "muxtune", 20_000, 100),
    Point("instances", "muxtune", 20_000, 300),
    Point("tasks_per_instance", "muxtune", 20_000, 100, 2),
    Point("tasks_per_instance", "muxtune", 20_000, 100, 5),
    Point("tasks_per_instance", "muxtune", 20_000, 100, 16),
)


def words_of(point: Point) -> list[str]:
    shared = [f"cluster_policy.max_tasks_per_instance={point.cap}"]
    return [
        "simulate",
        f"planner={point.planner}",
        "cluster=h100_x64",
        f"cluster.num_gpus={point.gpus}",
        "workload=poisson",
        f"workload.limit={point.tasks}",
        f"workload.load={LOADS[point.planner]}",
        MIX,
        "plan_samples=100",
        *(shared if point.planner == "muxtune" else []),
    ]


def measure(point: Point) -> dict[str, Any]:
    """One run in a process of its own."""
    reference_s = reference()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        words = words_of(point)
        command = [
            sys.executable,
            __file__,
            "--child",
            json.dumps([*words, f"output_dir={folder}"]),
        ]
        started_s = time.perf_counter()
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - started_s
        if status:
            raise SystemExit(f"muxtune {' '.join(words)} failed")
        summary = json.loads((folder / "summary.json").read_text())
        again = planned_again(folder) if point.planner == "muxtune" else (0, 0)
    cpu_s = usage.ru_utime + usage.ru_stime
    return {
        **point._asdict(),
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "reference_s": reference_s,
        "us_per_task": 1e6 * cpu_s / point.tasks,
        "peak_memory_mb": usage.ru_maxrss / 1024,
        "plans_made_again": again[0],
        "plans_that_are_the_same": again[1],
        **{name: summary[name] for name in SHOWN},
        "command": "muxtune " + " ".join(words),
    }


def environment() -> dict[str, str]:
    """One core, and compiled modules in a folder of their own, whatever the caller's settings."""
    given = {name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return given | ONE_CORE | {"PYTHONPYCACHEPREFIX": str(COMPILED)}


def reference() -> float:
    """Seconds of a fixed loop of dictionary work."""
    started_s, table = time.process_time(), {}
    for number in range(2_000_000):
        table[number % 1_000] = (number, str(number))
    return time.process_time() - started_s


def plot(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), constrained_layout=True)
    # The runs of the other panels at 20,000 tasks and 100 GPUs are points of all of them.
    panels = (
        (axes[0][0], "tasks", "tasks", "cpu_s", "CPU seconds"),
        (axes[0][1], "tasks", "tasks", "peak_memory_mb", "peak memory (MB)"),
        (axes[1][0], "instances", "gpus", "us_per_task", "CPU microseconds a task"),
        (axes[1][1], "tasks_per_instance", "concurrent_tasks_per_instance", "us_per_task",
         "CPU microseconds a task"),
    )  # fmt: skip
    labels = {
        "tasks": "tasks (1,000 GPUs)",
        "gpus": "instances (20,000 tasks)",
        "concurrent_tasks_per_instance": "tasks on a busy instance (100 instances, muxtune)",
    }
    for axis, series, x, y, label in panels:
        for planner in LOADS:
            points = sorted(
                (row[x], row[y])
                for row in results
                if row["planner"] == planner and (row["series"] == series or joins(row, series))
            )
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", label=planner)
        axis.set_xlabel(labels[x])
        axis.set_ylabel(label)
        if y != "cpu_s":
            axis.set_ylim(bottom=0)
        if x != "concurrent_tasks_per_instance":
            axis.set_xscale("log")
        if y == "cpu_s":
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


def joins(row: dict[str, Any], series: str) -> bool:
    return (
        series == "tasks_per_instance"
        and row["series"] == "instances"
        and row["gpus"] == 100
        and row["planner"] == "muxtune"
    )


def _names(point: Point) -> tuple[str, ...]:
    return ("", point.series, point.planner, f"{point.planner}:{point.tasks}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for growth.json and .png"
    )
    parser.add_argument("--quick", action="store_true", help="a twentieth of the tasks")
    parser.add_argument(
        "--only", default="", help="points of a series, a planner, or a planner and its tasks: "
        "exclusive:100000",
    )  # fmt: skip
    parser.add_argument(
        "--repeat", type=int, default=1, help="runs a point; the fastest is its row"
    )
    parser.add_argument("--plot-only", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    if "--child" in sys.argv:
        from muxtune.cli import main as run_command

        return run_command(json.loads(sys.argv[sys.argv.index("--child") + 1]))
    arguments = parser.parse_args()
    file = arguments.output / "growth.json"
    results = json.loads(file.read_text())["runs"] if file.exists() else []
    chosen = [p for p in POINTS if arguments.only in _names(p)]
    if chosen and not arguments.plot_only:
        measure(Point("", "muxtune", 100, 10))
    for point in [] if arguments.plot_only else chosen:
        if arguments.quick:
            point = point._replace(tasks=point.tasks // 20)
        key = list(point)
        results = [row for row in results if [row[name] for name in Point._fields] != key]
        runs = [measure(point) for _ in range(arguments.repeat)]
        row = min(runs, key=lambda run: run["wall_s"])
        shown = ("cpu_s", "wall_s", "reference_s")
        results.append(row | {"all": [{name: run[name] for name in shown} for run in runs]})
        print(f"{row['series']} {row['planner']} {row['tasks']:,} tasks {row['gpus']:,} GPUs: "
              f"{row['cpu_s']:.1f} s CPU, {row['wall_s']:.1f} s wall, "
              f"{row['concurrent_tasks_per_instance']:.1f} tasks an instance, "
              f"{row['peak_memory_mb']:.0f} MB, {row['plans_that_are_the_same']} plans the same, "
              f"reference {row['reference_s']:.2f} s", flush=True)  # fmt: skip
        arguments.output.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"runs": results}, indent=2) + "\n", encoding="utf-8")
    plot(results, arguments.output / "growth.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
