"""The whole Philly trace on 64 instances under each planner: how long the simulation takes.

    python experiments/sim_speed/philly.py --output validation/sim_speed

Runs `muxtune simulate` as anybody would, one process a planner, on one core; then asks the planner
again for every sampled plan, as `muxtune plan` does. With `--parts` the run's methods are timed
(CPU seconds without the parts inside), which by itself takes some seconds.

Loads differ by planner, because load is offered work over what the GPUs could do one task at a
time under HF PEFT: a slower planner fills its instances at a lower one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LOADS = {"exclusive": 0.8, "batched": 4.0, "muxtune": 12.0}
# Capped so that a busy instance has 8 to 10 tasks, whatever the backlog.
SHARED = ("cluster_policy.max_tasks_per_instance=10",)
SHOWN = (
    *("num_tasks", "num_done", "num_refused", "num_instances", "offered_load", "times"),
    *("concurrent_tasks_per_instance", "utilisation", "makespan_s", "mean_completion_time_s"),
    *("p95_completion_time_s", "mean_queueing_s", "effective_tokens_per_s"),
    *("num_plans", "num_planner_calls", "mean_planning_us"),
)
ONE_CORE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def words_of(planner: str, arguments: argparse.Namespace) -> list[str]:
    words = [
        "simulate",
        f"planner={planner}",
        "cluster=h100_x64",
        "workload=philly",
        f"workload.load={arguments.load.get(planner, LOADS[planner])}",
        "plan_samples=100",
        *(SHARED if planner != "exclusive" else ()),
        # Weighing every change against its transition takes 40% more; see the README.
        *(("planner.hysteresis=false",) if planner == "muxtune" else ()),
        *arguments.override,
    ]
    return [*words, f"workload.limit={arguments.tasks}"] if arguments.tasks else words


def measure(planner: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        words = [*words_of(planner, arguments), f"output_dir={folder}"]
        parts_file = Path(name) / "parts.json"
        child = [sys.executable, __file__, "--child", json.dumps(words)]
        if arguments.parts:
            child += ["--parts-file", str(parts_file)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started_s = time.perf_counter()
        subprocess.run(child, check=True, env=os.environ | ONE_CORE, stdout=subprocess.DEVNULL)
        wall_s = time.perf_counter() - started_s
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        summary = json.loads((folder / "summary.json").read_text())
        same = planned_again(folder)
        parts = json.loads(parts_file.read_text()) if arguments.parts else None
    return {
        "planner": planner,
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "tasks_per_cpu_s": summary["num_tasks"] / cpu_s,
        "peak_memory_mb": after.ru_maxrss / 1024,
        "plans_made_again": same[0],
        "plans_that_are_the_same": same[1],
        "command": "muxtune " + " ".join(words[:-1]),
        **{name: summary[name] for name in SHOWN},
        **({"parts": parts} if parts else {}),
    }


def planned_again(folder: Path) -> tuple[int, int]:
    """Samples of a run, and how many of them a fresh planner with the run's own options answers
    with the same plan."""
    from omegaconf import OmegaConf

    from muxtune import build, codec
    from muxtune.cost.analytic import AnalyticOptions
    from muxtune.cost.book import CostBook
    from muxtune.report.recording import PlanSample

    config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    book = CostBook()
    if config["cost"]["style"] == "eager":
        book = book.with_options(AnalyticOptions.eager())
    lines = (folder / "plan_samples.jsonl").read_text().splitlines()
    made = [PlanSample.loads(line) for line in lines]
    same = 0
    for sample in made:
        again = build.planner(config["planner"], book).plan(sample.view, sample.previous)
        same += codec.dumps(again) == codec.dumps(sample.plan)
    return len(made), same


def run_child(words: list[str], parts_file: Path | None) -> int:
    from muxtune.cli import main as run_command

    if parts_file is None:
        return run_command(words)
    watch = timed_parts()
    started_s = time.process_time()
    status = run_command(words)
    whole_s = time.process_time() - started_s
    rest_s = whole_s - sum(watch.seconds.values())
    parts = {
        part: {"cpu_s": seconds, "calls": watch.calls[part]}
        for part, seconds in sorted(watch.seconds.items(), key=lambda item: -item[1])
    }
    content = {"whole_cpu_s": whole_s, "start_and_rest_cpu_s": rest_s, **parts}
    parts_file.write_text(json.dumps(content), encoding="utf-8")
    return status


def timed_parts() -> Any:
    """Wraps the methods of the run's classes."""
    sys.path.insert(0, str(Path(__file__).parent))
    from measure import Stopwatch

    from muxtune import build
    from muxtune.cluster_policies.base import FifoPolicy
    from muxtune.cost.composition import ComposedCostModel
    from muxtune.deciding import Decider
    from muxtune.engine import Engine
    from muxtune.planners.base import PlannerBase
    from muxtune.planning.rates import MeanStepBuilder
    from muxtune.report.recording import TaskRows
    from muxtune.workload.synthetic import SyntheticLibrary
    from muxtune_sim import SimExecutor

    watch = Stopwatch()
    watch.wrap(FifoPolicy, "on_event", "policy")
    watch.wrap(PlannerBase, "plan", "planner")
    watch.wrap(SyntheticLibrary, "add", "library")
    watch.wrap(ComposedCostModel, "transition_s", "cost.transition")
    watch.wrap(MeanStepBuilder, "course", "builder.course")
    for verb in ("wait", "apply", "prepare"):
        watch.wrap(SimExecutor, verb, f"simulator.{verb}")
    watch.wrap(Decider, "decide", "engine.decide")
    watch.wrap(Engine, "run", "engine.loop")
    watch.wrap(TaskRows, "on_task_end", "result rows")
    watch.wrap(build, "tasks", "reading the trace")
    return watch


def load_of(text: str) -> tuple[str, float]:
    planner, _, load = text.partition("=")
    return planner, float(load)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, help="the first tasks only")
    parser.add_argument("--planners", default=",".join(LOADS))
    parser.add_argument("--load", type=load_of, action="append", default=[], metavar="PLANNER=LOAD")
    parser.add_argument("--override", action="append", default=[], help="e.g. backend.times=exact")
    parser.add_argument("--parts", action="store_true", help="also where the time goes")
    parser.add_argument("--output", type=Path, help="folder for results.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--parts-file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return run_child(json.loads(arguments.child), arguments.parts_file)
    arguments.load = dict(arguments.load)
    results = []
    for planner in arguments.planners.split(","):
        results.append(measure(planner, arguments))
        print(json.dumps(results[-1], indent=2), flush=True)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        name = "parts.json" if arguments.parts else "results.json"
        text = json.dumps({"runs": results}, indent=2) + "\n"
        (arguments.output / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
