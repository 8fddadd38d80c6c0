"""The best plan by looking at all of them: every partition of the tasks into hTasks, every chunk
length and every number of micro-batches a step, in the closed-form model of docs/architecture.md.

It shares the cost of one hTask with the planner and nothing of its search: no sorting, no
dynamic program, no tables, no levels, no small whole numbers of turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from muxtune.planners.base import GroupCost, GroupShape, Site, TaskClass, group_cost
from muxtune.planners.ladder import Fill
from muxtune.planners.muxtune import MuxTunePlanner
from muxtune.types import PackRule, ShapeKey


class Option(NamedTuple):
    """One way to run a set of tasks as one hTask: seconds of a step of all, and its latency."""

    time_s: float
    latency_s: float


class GroupOption(NamedTuple):
    """The same with what it is made of, for judges other than the closed form."""

    option: Option
    group: GroupShape
    cost: GroupCost


class Optimum(NamedTuple):
    round_s: float
    num_htasks: int


def best_plan(planner: MuxTunePlanner, site: Site, classes: Sequence[TaskClass]) -> Optimum | None:
    """The least time in which every task takes one step, or None where nothing fits."""
    options = {
        subset: group_options(planner, site, classes, subset) for subset in subsets(len(classes))
    }
    best = Optimum(float("inf"), 0)
    for partition in partitions(tuple(range(len(classes)))):
        round_s = best_round_s([options[group] for group in partition])
        if round_s < best.round_s:
            best = Optimum(round_s, len(partition))
    return best if best.num_htasks else None


def best_round_s(groups: Sequence[Sequence[Option]]) -> float:
    """min over choices of max(sum of times, longest latency): for every latency that bounds the
    round, each hTask takes its quickest option within it."""
    if not all(groups):
        return float("inf")
    least = sum(min(option.time_s for option in group) for group in groups)
    floor = max(min(option.latency_s for option in group) for group in groups)
    best = float("inf")
    for bound in sorted({option.latency_s for group in groups for option in group}):
        if bound < floor:
            continue
        total = sum(min(o.time_s for o in group if o.latency_s <= bound) for group in groups)
        best = min(best, max(total, bound))
        if bound >= total or best <= least:
            break
    return best


def group_options(
    planner: MuxTunePlanner, site: Site, classes: Sequence[TaskClass], members: tuple[int, ...]
) -> list[Option]:
    """Options that fit in memory and that no other beats in both numbers."""
    found = all_group_options(planner, site, classes, members)
    return _undominated([item.option for item in found])


def all_group_options(
    planner: MuxTunePlanner, site: Site, classes: Sequence[TaskClass], members: tuple[int, ...]
) -> list[GroupOption]:
    """Every chunk length and number of micro-batches a step that fits in memory."""
    limit = site.memory_limit_bytes * 100 // site.memory_percent
    limit -= planner.resident_bytes(site, classes)
    found = []
    for chunk in planner.chunk_lengths(classes):
        points = [planner.curve(classes[i], chunk).points for i in members]
        for most in sorted({load.micro_batches_per_step for p in points for _, load in p}):
            chosen = [
                next((x for x in p if x[1].micro_batches_per_step <= most), None) for p in points
            ]
            if None not in chosen:
                option = _option(planner, site, classes, members, chunk, chosen, limit)
                if option is not None:
                    found.append(option)
    return found


def _option(planner, site, classes, members, chunk, chosen, limit) -> GroupOption | None:
    quota, loads = zip(*chosen, strict=True)
    slots = tuple(classes[i].slot for i in members)
    model = planner.cost(site)
    if model.pass_bytes(ShapeKey(chunk, sum(quota), slots), site.replica) > limit:
        return None
    fill = Fill.of([load.chunk_shares for load in loads], sum(quota))
    sizes = fill.ladder(planner.num_shapes(site, slots[0]))
    shapes = tuple(ShapeKey(chunk, size, slots) for size in sizes)
    group = GroupShape(members, quota, shapes, PackRule.CHUNK)
    cost = group_cost(group, loads, model, site, fill.shares_of(sizes))
    passes = max(cost.passes_per_step)
    waits = site.replica.pp - 1
    option = Option(passes * cost.pass_time_s, (passes + waits) * cost.pass_time_s)
    return GroupOption(option, group, cost)


def _undominated(options: list[Option]) -> list[Option]:
    kept: list[Option] = []
    for option in sorted(options):
        if not kept or option.latency_s < kept[-1].latency_s:
            kept.append(option)
    return kept


def subsets(count: int) -> Iterator[tuple[int, ...]]:
    for mask in range(1, 1 << count):
        yield tuple(i for i in range(count) if mask >> i & 1)


def partitions(items: tuple[int, ...]) -> Iterator[list[tuple[int, ...]]]:
    """All set partitions; groups are sorted tuples."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for mask in range(1 << len(rest)):
        group = (first, *(x for i, x in enumerate(rest) if mask >> i & 1))
        left = tuple(x for i, x in enumerate(rest) if not mask >> i & 1)
        for others in partitions(left):
            yield [group, *others]
