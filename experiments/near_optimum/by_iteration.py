"""How far the planner's plans are from the best of all plans, each judged by the iteration-level
simulation of its subgraphs. Writes validation/near_optimum_iteration.json.

    OMP_NUM_THREADS=1 python experiments/near_optimum/by_iteration.py [--instances 100]

All partitions of up to 5 tasks into hTasks, with every chunk length and number of micro-batches a
step, counted turns and rounds of a whole step. Best first by a bound that no schedule beats (the
busiest stage's work, the longest chain), each is given an order and played; the search ends when
the bound of what is left exceeds the best played, or after ``MOST_PLAYED``. Then the optimum is the
best of those played, and the bound of what is left is told beside it.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

from experiments.near_optimum.brute_force import (  # noqa: E402
    all_group_options,
    partitions,
    subsets,
)
from experiments.near_optimum.instances import random_instance  # noqa: E402
from experiments.near_optimum.near_optimum import exclusive_s, summary  # noqa: E402
from muxtune.cost import CostBook  # noqa: E402
from muxtune.planners.base import (  # noqa: E402
    GroupCost,
    GroupShape,
    Site,
    TaskClass,
    group_cost,
    site_of,
)
from muxtune.planners.ladder import Fill  # noqa: E402
from muxtune.planners.muxtune import ORDER_SEARCH, MuxTunePlanner  # noqa: E402
from muxtune.planners.played import Piece, Player  # noqa: E402
from muxtune.planners.rounds import turn_counts  # noqa: E402
from muxtune.planning.orchestration import (  # noqa: E402
    pipeline_limits,
)
from muxtune.types import (  # noqa: E402
    HTask,
    InstanceView,
    Plan,
    SubgraphTimes,
)
from muxtune_sim.iteration import IterationOptions, simulate_iteration  # noqa: E402

OUTPUT = HERE.parent.parent / "validation" / "near_optimum_iteration.json"
MOST_TASKS, MOST_PLAYED, ROUNDS = 5, 40, 24


class Judge(Player):
    """Plays plans of one instance."""

    def __init__(self, planner: MuxTunePlanner, view: InstanceView) -> None:
        site = site_of(view)
        super().__init__(planner.cost(site), site.replica, ORDER_SEARCH)
        self.planner, self.view, self.site = planner, view, site

    def plan_s(self, plan: Plan, pieces: Sequence[Piece]) -> float:
        """Of a planner's plan: with its own order where it has one."""
        counts = [turn.count for turn in plan.round]
        if None in counts:
            return self.whole_step_s(pieces)
        if not plan.order:
            return self.counted_s(pieces, [n or 1 for n in counts])
        limits = pipeline_limits([piece.held_bytes for piece in pieces], self.num_stages)
        times = SubgraphTimes(
            tuple(piece.graph for piece in pieces), tuple(p.times_s for p in pieces), True
        )
        report = simulate_iteration(
            plan, times, IterationOptions(ROUNDS)._replace(**limits._asdict())
        )
        slowest = max(p.passes / (n or 1) for p, n in zip(pieces, counts, strict=True))
        return report.round_time_s * slowest


def piece_of(judge: Judge, htask: HTask, cost: GroupCost) -> Piece:
    return judge.piece(htask, cost.pass_time_s, max(cost.passes_per_step))


class Choice(NamedTuple):
    """One way to run a set of tasks, and what is compared of it."""

    key: tuple[float, float, float]  # step work, latency, chain of a micro-batch
    piece: Piece


def choices(judge: Judge, classes: Sequence[TaskClass], members: tuple[int, ...]) -> list[Choice]:
    """Those that no other beats in all of work, latency and length of a micro-batch."""
    found = []
    for item in all_group_options(judge.planner, judge.site, classes, members):
        htask = HTask(item.group.shapes, {}, {}, item.group.packing)
        piece = piece_of(judge, htask, item.cost)
        found.append(Choice((piece.step_work_s, piece.least_s(), piece.chain_s), piece))
    found.sort(key=lambda choice: choice.key)
    kept: list[Choice] = []
    for choice in found:
        if not any(all(map(float.__le__, k.key, choice.key)) for k in kept):
            kept.append(choice)
    return kept


class Optimum(NamedTuple):
    """``step_s``: of the best plan played. ``bound_s``: nothing unplayed is shorter; the same where
    the search was finished, so that the optimum is known."""

    step_s: float
    bound_s: float
    num_htasks: int
    num_played: int


def best_played(
    judge: Judge, classes: Sequence[TaskClass], known_s: float, known_htasks: int
) -> Optimum | None:
    """Of all plans; ``known_s`` and ``known_htasks``: of one that is known to be possible."""
    of_subset = {part: choices(judge, classes, part) for part in subsets(len(classes))}
    best_s, num_htasks, played = known_s, known_htasks, 0
    for bound_s, pieces in _by_bound(judge, of_subset, len(classes), known_s):
        if bound_s >= best_s:
            break
        if played == MOST_PLAYED:
            return Optimum(best_s, bound_s, num_htasks, played)
        step_s = _step_s(judge, pieces, best_s)
        played += 1
        if step_s < best_s:
            best_s, num_htasks = step_s, len(pieces)
    return None if best_s == math.inf else Optimum(best_s, best_s, num_htasks, played)


def _step_s(judge: Judge, pieces: Sequence[Piece], best_s: float) -> float:
    if judge.num_stages == 1:  # nothing to overlap: turns need not even be whole numbers
        return judge.bound_s(pieces)
    step_s = judge.whole_step_s(pieces)
    passes = [piece.passes for piece in pieces]
    for counts in {(1,) * len(pieces), turn_counts(passes, [max(p.work_s) for p in pieces])}:
        slowest = max(n / count for n, count in zip(passes, counts, strict=True))
        rounds_s = [count * p.chain_s for p, count in zip(pieces, counts, strict=True)]
        if slowest * max(rounds_s) < min(step_s, best_s) and sum(counts) <= 4 * len(counts):
            step_s = min(step_s, judge.counted_s(pieces, counts))
    return step_s


def _by_bound(
    judge: Judge,
    of_subset: dict[tuple[int, ...], list[Choice]],
    num_tasks: int,
    below_s: float,
) -> Iterator[tuple[float, list[Piece]]]:
    """All plans whose bound is below, lowest bound first."""
    found: list[tuple[float, int, list[Piece]]] = []
    for partition in partitions(tuple(range(num_tasks))):
        groups = [of_subset[part] for part in partition]
        if all(groups):
            for pieces in _combinations(groups, [], 0.0, below_s):
                bound_s = judge.bound_s(pieces)
                if bound_s < below_s:
                    heapq.heappush(found, (bound_s, len(found), pieces))
    while found:
        bound_s, _, pieces = heapq.heappop(found)
        yield bound_s, pieces


def _combinations(
    groups: Sequence[Sequence[Choice]], chosen: list[Piece], work_s: float, below_s: float
) -> Iterator[list[Piece]]:
    """One choice of each group; cut off where one stage has too much work for certain."""
    if not groups:
        yield list(chosen)
        return
    rest_s = sum(_stage_zero_s(group[0]) for group in groups[1:])
    for choice in groups[0]:
        done_s = work_s + _stage_zero_s(choice)
        if done_s + rest_s < below_s and choice.key[1] < below_s:
            yield from _combinations(groups[1:], [*chosen, choice.piece], done_s, below_s)


def _stage_zero_s(choice: Choice) -> float:
    return choice.piece.passes * choice.piece.work_s[0]


def step_s(judge: Judge, planner: MuxTunePlanner) -> tuple[float, int] | tuple[None, int]:
    """What a planner's plan takes when it is played, and its number of hTasks."""
    plan = planner.plan(judge.view, None)
    if not isinstance(plan, Plan):
        return None, 0
    classes = {task.task_id: planner.class_of_view(task) for task in judge.view.tasks}
    pieces = [piece_of(judge, htask, cost_of(planner, judge.site, classes, htask))
              for htask in plan.htasks]  # fmt: skip
    return judge.plan_s(plan, pieces), len(pieces)


def cost_of(
    planner: MuxTunePlanner, site: Site, classes: dict[str, TaskClass], htask: HTask
) -> GroupCost:
    members = sorted(htask.quota, key=htask.slot_of.__getitem__)
    quota = tuple(htask.quota[name] for name in members)
    chunk = htask.shapes[0].chunk_tokens
    loads = [planner.load(classes[name], chunk, n, htask.packing)
             for name, n in zip(members, quota, strict=True)]  # fmt: skip
    fill = Fill.of([load.chunk_shares for load in loads], sum(quota))
    group = GroupShape(tuple(range(len(quota))), quota, htask.shapes, htask.packing)
    shares = fill.shares_of([shape.num_chunks for shape in htask.shapes])
    return group_cost(group, loads, planner.cost(site), site, shares)


def examine(seed: int, costs: CostBook) -> dict:
    view = random_instance(seed, costs, MOST_TASKS)
    planner = MuxTunePlanner(costs)
    judge = Judge(planner, view)
    planned, num_htasks = step_s(judge, planner)
    classes = tuple(planner.class_of_view(task) for task in view.tasks)
    best = best_played(judge, classes, planned or math.inf, num_htasks)
    return {
        "seed": seed,
        "tasks": len(view.tasks),
        "stages": view.replicas[0].pp,
        "device": view.device,
        "tight": view.memory_limit_bytes < 1 << 40,
        "planned_s": planned,
        "optimum_s": best and best.step_s,
        "optimum_htasks": best and best.num_htasks,
        "plans_played": best and best.num_played,
        "bound_s": best and best.bound_s,
        "all_spatial_s": step_s(judge, MuxTunePlanner(costs, fusion="all_spatial"))[0],
        "all_temporal_s": step_s(judge, MuxTunePlanner(costs, fusion="all_temporal"))[0],
        "exclusive_s": exclusive_s(costs, view),
    }


def proof(rows: list[dict]) -> dict:
    """Of how many the optimum is known, and the ratios if bounds stand in for the rest."""
    solved = [row for row in rows if row["planned_s"] and row["optimum_s"]]
    safe = [row["planned_s"] / row["bound_s"] for row in solved]
    return {
        "optimum_proven": sum(row["bound_s"] == row["optimum_s"] for row in solved),
        "mean_ratio_to_bound": statistics.fmean(safe),
        "worst_ratio_to_bound": max(safe),
        "plans_played": sum(row["plans_played"] for row in solved),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=100)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    costs, rows, began_s = CostBook(), [], time.process_time()
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.instances):
        rows.append(examine(seed, costs))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    content = {
        "model": "iteration-level simulation of every plan, analytic costs of llama-2-7b",
        "summary": summary(rows) | proof(rows),
        "process_time_s": time.process_time() - began_s,
        "instances": rows,
    }
    arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content["summary"], indent=1))


if __name__ == "__main__":
    main()
