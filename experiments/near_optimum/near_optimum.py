"""How far the planner's plans are from the best of all plans. Writes validation/near_optimum.json.

python experiments/near_optimum/near_optimum.py [--instances 300]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from experiments.near_optimum.brute_force import best_plan  # noqa: E402
from experiments.near_optimum.instances import random_instance  # noqa: E402
from muxtune.cost import AnalyticOptions, CostBook  # noqa: E402
from muxtune.planners.base import site_of  # noqa: E402
from muxtune.planners.exclusive import ExclusivePlanner  # noqa: E402
from muxtune.planners.muxtune import MuxTunePlanner  # noqa: E402
from muxtune.planners.rounds import round_of  # noqa: E402
from muxtune.types import InstanceView, Plan  # noqa: E402

OUTPUT = HERE.parent.parent / "validation" / "near_optimum.json"


def step_s(planner, view: InstanceView) -> float | None:
    """The closed form of what the planner plans, whatever a player predicts of its order: the
    optimum that it is compared with knows the closed form only."""
    answer = planner.plan(view, None)
    if not isinstance(answer, Plan):
        return None
    site, keys = site_of(view), sorted(map(planner._key_of, view.tasks))
    costed = planner.arrange(site, tuple(planner._classes[key] for key in keys))
    groups, costs = costed.arrangement.groups, costed.group_costs
    planned = [sorted(htask.quota.values()) for htask in answer.htasks]
    assert sorted(planned) == sorted(sorted(group.quota) for group in groups)
    passes = tuple(max(cost.passes_per_step) for cost in costs)
    times_s = tuple(cost.pass_time_s for cost in costs)
    counted = None not in costed.arrangement.counts
    return round_of(passes, times_s, site.replica.pp, counted=counted).step_time_s


def exclusive_s(costs: CostBook, view: InstanceView) -> float | None:
    """One task after the other as HF PEFT runs them: padded, eager, alone on the instance."""
    planner = ExclusivePlanner(costs.with_options(AnalyticOptions.eager()))
    alone = [step_s(planner, view._replace(tasks=(task,))) for task in view.tasks]
    known = [seconds for seconds in alone if seconds is not None]
    return sum(known) if len(known) == len(alone) else None


def examine(seed: int, costs: CostBook, most_tasks: int = 8) -> dict:
    view = random_instance(seed, costs, most_tasks)
    # By the closed form here; by_iteration.py judges what is chosen by playing.
    planner = MuxTunePlanner(costs, plays=0)
    planned = step_s(planner, view)
    classes = tuple(planner._classes[key] for key in sorted(map(planner._key_of, view.tasks)))
    best = best_plan(planner, site_of(view), classes)
    return {
        "seed": seed,
        "tasks": len(view.tasks),
        "stages": view.replicas[0].pp,
        "device": view.device,
        "tight": view.memory_limit_bytes < 1 << 40,
        "planned_s": planned,
        "optimum_s": best and best.round_s,
        "optimum_htasks": best and best.num_htasks,
        "all_spatial_s": step_s(MuxTunePlanner(costs, fusion="all_spatial", plays=0), view),
        "all_temporal_s": step_s(MuxTunePlanner(costs, fusion="all_temporal", plays=0), view),
        "exclusive_s": exclusive_s(costs, view),
    }


def summary(rows: list[dict]) -> dict:
    solved = [row for row in rows if row["planned_s"] and row["optimum_s"]]
    ratios = [row["planned_s"] / row["optimum_s"] for row in solved]
    others = ("all_spatial_s", "all_temporal_s", "exclusive_s")
    worse = {
        name: max((row["planned_s"] / row[name] for row in solved if row[name]), default=0.0)
        for name in others
    }
    return {
        "instances": len(rows),
        "solved": len(solved),
        "infeasible": sum(row["optimum_s"] is None for row in rows),
        "refused_though_feasible": sum(
            row["planned_s"] is None and row["optimum_s"] is not None for row in rows
        ),
        "mean_ratio": statistics.fmean(ratios),
        "worst_ratio": max(ratios),
        "worst_over_other": worse,
        "several_htasks_best": sum(row["optimum_htasks"] > 1 for row in solved),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=300)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    costs, rows, began_s = CostBook(), [], time.process_time()
    for seed in range(arguments.instances):
        rows.append(examine(seed, costs))
    content = {
        "model": "closed form of docs/architecture.md, analytic costs of llama-2-7b",
        "summary": summary(rows),
        "process_time_s": time.process_time() - began_s,
        "instances": rows,
    }
    arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content["summary"], indent=1))


if __name__ == "__main__":
    main()
