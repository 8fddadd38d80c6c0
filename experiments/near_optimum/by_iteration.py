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
from itertools import pairwise
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
from muxtune.cost import CostBook, nominal_load  # noqa: E402
from muxtune.deciding import EMPTY_PREDICTION  # noqa: E402
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
from muxtune.planners.rounds import turn_counts  # noqa: E402
from muxtune.planning.orchestration import (  # noqa: E402
    RoundProblem,
    periodic_template,
    pipeline_limits,
)
from muxtune.types import (  # noqa: E402
    NS_PER_S,
    DispatchRule,
    HTask,
    HTaskTurn,
    InstanceView,
    Plan,
    Subgraph,
    SubgraphTimes,
)
from muxtune_sim.iteration import IterationOptions, simulate_iteration  # noqa: E402

OUTPUT = HERE.parent.parent / "validation" / "near_optimum_iteration.json"
MOST_TASKS, MOST_PLAYED, ROUNDS = 5, 40, 24


class Piece(NamedTuple):
    """One hTask as the simulator sees it: an average micro-batch, cut into subgraphs.

    ``work_s[stage]`` and ``chain_s``: of one micro-batch. ``passes``: micro-batches of its
    slowest task's step. ``held_bytes[stage]``: by a micro-batch in flight.
    """

    graph: tuple[Subgraph, ...]
    times_s: tuple[float, ...]
    passes: float
    work_s: tuple[float, ...]
    chain_s: float
    held_bytes: tuple[int, ...]

    @property
    def step_work_s(self) -> float:
        return self.passes * max(self.work_s)

    def least_s(self) -> float:
        """No step is shorter: its micro-batches follow each other over the last stage, which the
        first one must reach and the last one leave."""
        return self.chain_s + (self.passes - 1) * self.work_s[-1]


class Judge:
    """Plays plans of one instance; remembers the pieces that they share."""

    def __init__(self, planner: MuxTunePlanner, view: InstanceView) -> None:
        self.planner, self.view, self.site = planner, view, site_of(view)
        self.model = planner.cost(self.site)
        self.num_stages = view.replicas[0].pp

    def piece(self, htask: HTask, cost: GroupCost) -> Piece:
        plan = plan_of(self.view, (htask,))
        times = self.model.subgraph_times_s(plan)
        nominal = self.model.pass_times_s([nominal_load(htask.shapes[-1])], self.site.replica)
        scale = cost.pass_time_s / float(nominal.value[0])
        seconds = tuple(scale * s for s in times.times_s[0])
        graph = times.subgraphs[0]
        work = [0.0] * self.num_stages
        for item, s in zip(graph, seconds, strict=True):
            if item.kind.value not in ("p2p", "collective"):
                work[item.stage] += s
        ledgers = self.model.memory_ledger_bytes(plan).ledgers
        held = [
            ledger.items["activations"] // (self.num_stages - ledger.stage) for ledger in ledgers
        ]
        passes = max(cost.passes_per_step)
        return Piece(graph, seconds, passes, tuple(work), sum(seconds), tuple(held))

    def bound_s(self, pieces: Sequence[Piece]) -> float:
        """No schedule of these steps is shorter."""
        busiest = max(
            sum(piece.passes * piece.work_s[stage] for piece in pieces)
            for stage in range(self.num_stages)
        )
        return max(busiest, *(piece.least_s() for piece in pieces))

    def whole_step_s(self, pieces: Sequence[Piece]) -> float:
        """A round is one step of every task. Where steps take a fractional number of micro-batches
        on average, rounds with the whole numbers below and above it are played, each for its
        share."""
        whole = [math.floor(piece.passes + 1e-9) for piece in pieces]
        rest = [max(0.0, piece.passes - n) for piece, n in zip(pieces, whole, strict=True)]
        levels = [0.0, *sorted({share for share in rest if share > 1e-9}), 1.0]
        total_s = 0.0
        for low, high in pairwise(levels):
            counts = tuple(n + (share > low) for n, share in zip(whole, rest, strict=True))
            total_s += (high - low) * self._played_s(self._problem(pieces, counts, counts))
        return total_s

    def counted_s(self, pieces: Sequence[Piece], counts: Sequence[int]) -> float:
        """Counted turns; every micro-batch may close a step."""
        round_s = self._played_s(self._problem(pieces, counts, ()))
        return round_s * max(p.passes / n for p, n in zip(pieces, counts, strict=True))

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
        options = IterationOptions(ROUNDS, activation_units=limits.activation_units,
                                   capacity_units=limits.capacity_units)  # fmt: skip
        report = simulate_iteration(plan, times, options)
        slowest = max(p.passes / (n or 1) for p, n in zip(pieces, counts, strict=True))
        return report.round_time_s * slowest

    def _problem(
        self, pieces: Sequence[Piece], counts: Sequence[int], per_step: tuple[int, ...]
    ) -> RoundProblem:
        durations = tuple(tuple(round(s * NS_PER_S) for s in p.times_s) for p in pieces)
        turns = tuple(HTaskTurn(at, n) for at, n in enumerate(counts))
        limits = pipeline_limits([piece.held_bytes for piece in pieces], self.num_stages)
        graphs = tuple(piece.graph for piece in pieces)
        return RoundProblem(graphs, durations, turns, self.num_stages, 1, *limits, per_step)

    def _played_s(self, problem: RoundProblem) -> float:
        return periodic_template(problem, ORDER_SEARCH).period_ns / NS_PER_S


def plan_of(view: InstanceView, htasks: tuple[HTask, ...]) -> Plan:
    """Enough of a plan to ask a cost model about its hTasks."""
    turns = tuple(HTaskTurn(at, 1) for at in range(len(htasks)))
    return Plan("", 0, frozenset(), view.replicas, htasks, turns, DispatchRule.SINGLE,
                EMPTY_PREDICTION)  # fmt: skip


class Choice(NamedTuple):
    """One way to run a set of tasks, and what is compared of it."""

    key: tuple[float, float, float]  # step work, latency, chain of a micro-batch
    piece: Piece


def choices(judge: Judge, classes: Sequence[TaskClass], members: tuple[int, ...]) -> list[Choice]:
    """Those that no other beats in all of work, latency and length of a micro-batch."""
    found = []
    for item in all_group_options(judge.planner, judge.site, classes, members):
        htask = HTask(item.group.shapes, {}, {}, item.group.packing)
        piece = judge.piece(htask, item.cost)
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
    pieces = [judge.piece(htask, cost_of(planner, judge.site, classes, htask))
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
