"""How long the muxtune planner thinks, and how that grows. Writes validation/planner_speed.json.

    OMP_NUM_THREADS=1 python experiments/planner_speed/measure.py

CPU seconds of one process (time.process_time), so that neighbours on the machine count little.
Before each part the classes of tasks are known: a class's load curve is built once, when its
first task comes, and its cost is told apart ("new_class_s").
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from muxtune.cost import CostBook
from muxtune.fleet import task_view
from muxtune.planners.muxtune import MuxTunePlanner
from muxtune.types import AdapterSpec, DataSpec, InstanceView, Plan, TaskSpec, TaskView
from muxtune.workload.synthetic import SyntheticLibrary

OUTPUT = Path(__file__).parent.parent.parent / "validation" / "planner_speed.json"
MODEL, DEVICE = "llama-2-7b", "H100-SXM"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LENGTHS = (("sst2", 64), ("openbookqa", 128), ("rte", 256))
RANKS, BATCHES = (8, 16), (4, 8, 16)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)
LIMIT_BYTES = 10**13  # 1,000 adapters must fit, so that there is something to plan
FLEET_TASKS, FLEET_EVENTS, FEWER_EVENTS = 16, 20_000, 3_000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    output = parser.parse_args().output
    library, costs = SyntheticLibrary(0), CostBook()
    pool = [a_task(library, index) for index in range(1000)]
    planner = MuxTunePlanner(costs)
    content = {
        "clock": "time.process_time, one core, OMP_NUM_THREADS=1",
        "new_class_s": new_classes(planner, pool),
        "scratch": [scratch(planner, pool, size) for size in SIZES],
        "arrival_at_64": arrivals(planner, pool),
        "fleet": fleet(costs, library),
        "hysteresis": [
            {"steps": steps, "hysteresis": keeps}
            | fleet(costs, library, FEWER_EVENTS, steps, hysteresis=keeps)
            for steps in (500, 5_000, 100_000)
            for keeps in (False, True)
        ],
    }
    output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content, indent=1))


def a_task(library: SyntheticLibrary, index: int) -> TaskView:
    rng = random.Random(index)
    histogram, longest = rng.choice(LENGTHS)
    spec = TaskSpec(
        f"task-{index:04d}",
        MODEL,
        adapter=AdapterSpec(rank=rng.choice(RANKS), targets=TARGETS),
        data=DataSpec(histogram=histogram, max_length_tokens=longest),
        batch_size=rng.choice(BATCHES),
        num_steps=10_000,
    )
    return task_view(spec, library.add(spec))


def instance_of(tasks: list[TaskView]) -> InstanceView:
    return InstanceView("i", 0, tuple(tasks), None, LIMIT_BYTES, model=MODEL, device=DEVICE)


def timed(work: Callable[[], object]) -> float:
    began_s = time.process_time()
    work()
    return time.process_time() - began_s


def new_classes(planner: MuxTunePlanner, pool: list[TaskView]) -> float:
    """Mean over the classes of this benchmark, tables of the cost model included."""
    total_s = timed(lambda: planner.plan(instance_of(pool), None))
    return total_s / (len(LENGTHS) * len(RANKS) * len(BATCHES))


def spread(times_s: list[float]) -> dict[str, float]:
    ordered = sorted(times_s)
    return {
        "mean_s": statistics.fmean(ordered),
        "p95_s": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        "plans": len(ordered),
    }


def scratch(planner: MuxTunePlanner, pool: list[TaskView], size: int) -> dict[str, float]:
    """Random sets of tasks, each planned with nothing remembered of any set."""
    rng = random.Random(size)
    times_s = []
    for _ in range(40 if size <= 128 else 8):
        view = instance_of(rng.sample(pool, size))
        planner.forget_plans()
        times_s.append(timed(lambda view=view: planner.plan(view, None)))
    return {"tasks": size} | spread(times_s)


def arrivals(planner: MuxTunePlanner, pool: list[TaskView]) -> dict[str, float]:
    """One more task beside 63; the plan before is running."""
    rng = random.Random(1)
    times_s = []
    for _ in range(60):
        tasks = rng.sample(pool, 64)
        before = planner.plan(instance_of(tasks[:-1]), None)
        assert isinstance(before, Plan)
        after = instance_of(tasks)
        times_s.append(timed(lambda after=after, before=before: planner.plan(after, before)))
    return spread(times_s)


def fleet(
    costs: CostBook,
    library: SyntheticLibrary,
    events: int = FLEET_EVENTS,
    steps: int = 100_000,
    **options: Any,
) -> dict[str, object]:
    """Arrivals and departures on one instance of up to 16 tasks of three classes, as in the
    default fleet; and whether the answers equal those of a planner without memory."""
    rng, planner = random.Random(2), MuxTunePlanner(costs, **options)
    specs = [
        TaskSpec(f"f-{i:05d}", MODEL, adapter=AdapterSpec(rank=16, targets=TARGETS),
                 data=DataSpec(histogram=name, max_length_tokens=longest), num_steps=steps)
        for i in range(events) for name, longest in [rng.choice(LENGTHS)]
    ]  # fmt: skip
    waiting = [task_view(spec, library.add(spec)) for spec in specs]
    tasks: list[TaskView] = []
    plan: Plan | None = None
    total_s, same, checked = 0.0, 0, 0
    for event in range(events):
        if tasks and (len(tasks) == FLEET_TASKS or rng.random() < 0.5):
            tasks.pop(rng.randrange(len(tasks)))
        else:
            tasks.append(waiting[event])
        if not tasks:
            plan = None
            continue
        view, previous = instance_of(tasks), plan
        began_s = time.process_time()
        answer = planner.plan(view, previous)
        total_s += time.process_time() - began_s
        assert isinstance(answer, Plan)
        if event % 1000 == 999:
            checked += 1
            same += MuxTunePlanner(costs, **options).plan(view, previous) == answer
        plan = answer
    return {
        "events": events,
        "mean_s": total_s / events,
        "checked_from_scratch": checked,
        "same_from_scratch": same,
    }


if __name__ == "__main__":
    main()
