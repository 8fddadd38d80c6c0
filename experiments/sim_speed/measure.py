r"""How fast a fleet is simulated, and where the time goes.

    python experiments/sim_speed/measure.py --tasks 10000 --output experiments/sim_speed/speed.json
    python experiments/sim_speed/measure.py --planner exclusive --times mean --gap-s 20 \
        --tasks 2500 --instructions

Tasks arrive at random on a fleet of H100 instances of Llama-2-7B. Every part is timed by wrapping
its methods, in CPU seconds without the parts inside it; what is left is the engine's loop. The
planner "fixed" does not think, so that the rest of the simulation is measured alone.

``--instructions`` counts the processor's instructions a task with valgrind's cachegrind, by the
difference of two runs: a figure that a busy machine does not change, within about 1%.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from muxtune.cost.book import CostBook
from muxtune.deciding import EMPTY_PREDICTION
from muxtune.engine import Engine, EngineOptions
from muxtune.registry import CLUSTER_POLICIES, PLANNERS
from muxtune.types import (
    NS_PER_S,
    AdapterSpec,
    DataSpec,
    DispatchRule,
    HTask,
    HTaskTurn,
    InstanceSpec,
    InstanceView,
    Plan,
    ShapeKey,
    TaskSpec,
)
from muxtune.workload.synthetic import SyntheticLibrary, histogram_names
from muxtune_sim import SimExecutor, SimOptions
from muxtune_sim.options import make_builder

MODEL, DEVICE = "llama-2-7b", "h100-sxm"
MEMORY_BYTES = 80 * 10**9
CHUNK_TOKENS = 512
BUILDER_PARTS = ("forecast", "advance", "rounds_until", "round_totals")


class Stopwatch:
    """CPU seconds and calls of named parts, each without the parts inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._inner_s = [0.0]

    def wrap(self, target: Any, method: str, part: str) -> None:
        inner = getattr(target, method)
        setattr(target, method, self._timed(inner, part))

    def _timed(self, inner: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            self._inner_s.append(0.0)
            started_s = time.process_time()
            try:
                return inner(*args)
            finally:
                passed_s = time.process_time() - started_s
                own_s = passed_s - self._inner_s.pop()
                self._inner_s[-1] += passed_s
                self.seconds[part] = self.seconds.get(part, 0.0) + own_s
                self.calls[part] = self.calls.get(part, 0) + 1

        return timed


class FixedPlanner:
    """All tasks in one hTask, one chunk each: nothing to decide, so its time is that of a Plan."""

    def plan(self, instance: InstanceView, previous: Plan | None) -> Plan:
        names = [task.task_id for task in instance.tasks]
        slots = tuple(task.slot for task in instance.tasks)
        shape = ShapeKey(CHUNK_TOKENS, len(names), slots)
        quota = dict.fromkeys(names, 1)
        htask = HTask((shape,), {name: slot for slot, name in enumerate(names)}, quota)
        epoch = 0 if previous is None else previous.epoch + 1
        return Plan(
            instance.instance_id,
            epoch,
            instance.draining,
            instance.replicas,
            (htask,),
            (HTaskTurn(0, 1),),
            DispatchRule.SINGLE,
            EMPTY_PREDICTION,
        )


def make_planner(name: str, costs: CostBook) -> Any:
    return FixedPlanner() if name == "fixed" else PLANNERS.get(name)(costs=costs)


def draw_tasks(count: int, gap_s: float, seed: int) -> Iterator[TaskSpec]:
    draw = random.Random(seed)
    histograms = histogram_names()[:3]
    now_s = 0.0
    for index in range(count):
        now_s += draw.expovariate(1.0 / gap_s)
        yield TaskSpec(
            f"t{index:06}",
            MODEL,
            adapter=AdapterSpec(rank=draw.choice((8, 16, 32))),
            data=DataSpec(histogram=draw.choice(histograms), max_length_tokens=512),
            batch_size=draw.choice((4, 8, 16)),
            num_steps=max(1, round(draw.lognormvariate(6.0, 1.5))),
            arrival_ns=round(now_s * NS_PER_S),
        )


def fleet(count: int) -> list[InstanceSpec]:
    return [
        InstanceSpec(f"i{index:03}", MODEL, DEVICE, MEMORY_BYTES, gpu_ids=(f"g{index:03}",))
        for index in range(count)
    ]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    costs = CostBook()
    options = SimOptions(emit_plan_applied=False, emit_progress=False, times=arguments.times)
    builder, library = make_builder(options), SyntheticLibrary(seed=arguments.seed)
    executor = SimExecutor(builder, costs, library, options)
    planner = make_planner(arguments.planner, costs)
    shared = arguments.planner != "exclusive"
    policy = CLUSTER_POLICIES.get("fifo_shared" if shared else "fifo_exclusive")()
    tasks = draw_tasks(arguments.tasks, arguments.gap_s, arguments.seed)
    rules = EngineOptions(tell_waits=False)  # as in every large fleet
    specs = fleet(arguments.instances)
    engine = Engine(policy, planner, executor, tasks, specs, options=rules)
    watch = Stopwatch()
    if not arguments.plain:
        wrap_parts(watch, engine, policy, planner, executor, builder, library)
        watch.wrap(costs(MODEL, DEVICE), "transition_s", "cost.transition")
    started_s = time.process_time()
    totals = engine.run()
    cpu_s = time.process_time() - started_s
    return summary(arguments, watch, totals, executor, cpu_s)


def wrap_parts(
    watch: Stopwatch,
    engine: Any,
    policy: Any,
    planner: Any,
    executor: Any,
    builder: Any,
    library: Any,
) -> None:
    watch.wrap(policy, "on_event", "policy")
    watch.wrap(planner, "plan", "planner")
    watch.wrap(library, "add", "library")
    for part in BUILDER_PARTS:
        watch.wrap(builder, part, f"builder.{part}")
    for verb in ("wait", "apply", "prepare"):
        watch.wrap(executor, verb, f"simulator.{verb}")
    watch.wrap(engine._decider, "decide", "engine.decide")


def summary(
    arguments: argparse.Namespace, watch: Stopwatch, totals: Any, executor: Any, cpu_s: float
) -> dict[str, Any]:
    batches = totals.num_batches
    parts = {
        part: {
            "us_per_batch": 1e6 * seconds / batches,
            "us_per_call": 1e6 * seconds / watch.calls[part],
            "calls": watch.calls[part],
        }
        for part, seconds in sorted(watch.seconds.items(), key=lambda item: -item[1])
    }
    instances = executor.instance_totals()
    busy_ns = sum(item.busy_ns for item in instances)
    return {
        "planner": arguments.planner,
        "tasks": totals.num_tasks,
        "done": totals.num_done,
        "instances": arguments.instances,
        "cpu_s": cpu_s,
        "batches": batches,
        "plans": totals.num_plans,
        "refusals": totals.num_placements_refused,
        "us_per_batch": 1e6 * cpu_s / batches,
        "loop_us_per_batch": 1e6 * (cpu_s - sum(watch.seconds.values())) / batches,
        "mean_tasks_per_busy_instance": sum(item.task_ns for item in instances) / busy_ns,
        "parts": parts,
    }


def instructions_a_task(arguments: argparse.Namespace) -> dict[str, Any]:
    """From two runs of this script under cachegrind. Start-up and the memos' first fills are in
    both."""
    sizes = (arguments.tasks // 5, arguments.tasks)
    counts = [_instructions(arguments, size) for size in sizes]
    return {
        "planner": arguments.planner,
        "times": arguments.times,
        "tasks": sizes,
        "instructions": counts,
        "instructions_a_task": (counts[1] - counts[0]) / (sizes[1] - sizes[0]),
    }


def _instructions(arguments: argparse.Namespace, num_tasks: int) -> int:
    command = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
    command += [sys.executable, __file__, "--plain", "--tasks", str(num_tasks)]
    for name in ("planner", "times", "instances", "gap_s", "seed"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    (line,) = (line for line in done.stderr.splitlines() if "I refs:" in " ".join(line.split()))
    return int(line.split()[-1].replace(",", ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--instances", type=int, default=64)
    parser.add_argument("--gap-s", type=float, default=1.0)
    parser.add_argument("--planner", default="fixed", help="fixed, or a registered planner")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--times", default="exact", help="exact or mean: backend.times")
    parser.add_argument("--instructions", action="store_true", help="needs valgrind")
    parser.add_argument("--plain", action="store_true", help="time the whole only")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found = instructions_a_task(arguments) if arguments.instructions else measure(arguments)
    text = json.dumps(found, indent=2)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
