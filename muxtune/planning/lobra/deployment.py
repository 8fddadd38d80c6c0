"""Which replicas to deploy on N GPUs for a distribution of lengths.

As published: keep the best configuration per (GPUs, max tokens); enumerate the partitions of N
into them; bound each from below by the GPU-seconds of its cheapest dispatch over N; drop those
15% above the least bound; solve the dispatch program of each survivor.

Added here, both without effect on the result but by the solver's gap: a configuration is dropped
when another one, whose GPUs divide its own, holds as much at fewer GPU-seconds in every bucket;
and survivors are solved in the order of a tighter bound (sequences that only larger replicas hold
cannot use the others' GPUs) until it reaches the best solution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from muxtune.errors import ConfigError
from muxtune.planning.lobra.buckets import Buckets
from muxtune.planning.lobra.dispatch import (
    Dispatch,
    ReplicaGroup,
    SolverOptions,
    cost_tables,
    dispatch_balanced,
    dispatch_by_length,
    dispatch_within,
    fill,
    slowest_s,
)
from muxtune.planning.lobra.replica_times import Configuration, ReplicaTimes


class DeploymentOptions(NamedTuple):
    """``prune_share``: a plan whose bound is this much above the least bound is dropped; None:
    none is, and the result is optimal within the solver's gap. ``most_programs``: solved at most;
    ``tolerance``: stop when the next bound is within this share of the best solution."""

    prune_share: float | None = 0.15
    most_programs: int = 64
    tolerance: float = 0.005
    solver: SolverOptions = SolverOptions(relative_gap=0.01, node_limit=100)


class Deployment(NamedTuple):
    """``groups``: replicas to start, all GPUs used. ``step_s``: predicted for the
    expected batch, by the pipeline player. ``bound_s``: least closed-form bound of the plans that
    were not solved. Of ``num_plans`` partitions into ``configurations``, ``num_survivors`` were not
    dropped and ``num_solved`` solved."""

    groups: tuple[ReplicaGroup, ...]
    step_s: float
    bound_s: float
    dispatch: Dispatch
    configurations: tuple[Configuration, ...]
    num_plans: int
    num_survivors: int
    num_solved: int

    def __str__(self) -> str:
        return ", ".join(f"{group.configuration} x {group.count}" for group in self.groups)


_DEFAULTS = DeploymentOptions()


def plan_deployment(
    times: ReplicaTimes,
    configurations: Sequence[Configuration],
    num_gpus: int,
    expected: Buckets,
    options: DeploymentOptions = _DEFAULTS,
) -> Deployment:
    """``expected``: sequences by bucket of a typical step.

    Raises ConfigError when no configuration on ``num_gpus`` GPUs holds the longest bucket, or
    when the GPUs cannot all be used.
    """
    _check(configurations, num_gpus, expected)
    kept = kept_configurations(times, configurations, num_gpus, expected)
    plans = _plans(kept, num_gpus)
    loose_s, tight_s = lower_bounds_s(times, kept, plans, expected)
    possible = np.flatnonzero(np.isfinite(tight_s))
    if not len(possible):
        raise ConfigError(
            "num_gpus", f"{num_gpus} GPUs do not divide into replicas", "give another number"
        )
    survivors = _survivors(possible, loose_s, options.prune_share)
    order = survivors[np.argsort(tight_s[survivors], kind="stable")]
    search = _search(times, kept, plans, tight_s, order, expected, options)
    counts = len(plans), len(survivors), search.num_solved
    return Deployment(search.groups, search.step_s, search.bound_s, search.dispatch, kept, *counts)


class _Search(NamedTuple):
    groups: tuple[ReplicaGroup, ...]
    dispatch: Dispatch
    step_s: float
    bound_s: float
    num_solved: int


def _search(
    times: ReplicaTimes,
    kept: Sequence[Configuration],
    plans: np.ndarray,
    tight_s: np.ndarray,
    order: np.ndarray,
    expected: Buckets,
    options: DeploymentOptions,
) -> _Search:
    """Solves plans in this order, until the next one's bound reaches the best solution."""
    best: _Search | None = None
    for solved, plan in enumerate(order):
        stop_s = best.step_s * (1.0 - options.tolerance) if best else np.inf
        if solved >= options.most_programs or tight_s[plan] >= stop_s:
            break
        groups = groups_of(kept, plans[plan])
        dispatch = (
            dispatch_within(times, groups, expected, stop_s, options.solver)
            if best
            else dispatch_balanced(times, groups, expected, options.solver)
        )
        if dispatch is not None:
            found = _filled(times, groups, expected, dispatch)
            best = found if best is None or found.step_s < best.step_s else best
        assert best is not None  # the first plan has a dispatch
        best = best._replace(num_solved=solved + 1)
    assert best is not None  # the first survivor is always solved
    left = order[best.num_solved :]
    bound_s = min([best.step_s, *tight_s[left[:1]]])
    return best._replace(bound_s=float(bound_s))


def _filled(
    times: ReplicaTimes,
    groups: tuple[ReplicaGroup, ...],
    expected: Buckets,
    dispatch: Dispatch,
) -> _Search:
    """Loads dealt out to replicas, and the step that results."""
    step_s = slowest_s(times, fill(times, groups, expected, dispatch), played=True)
    return _Search(groups, dispatch, step_s, dispatch.bound_s, 1)


def _survivors(possible: np.ndarray, loose_s: np.ndarray, share: float | None) -> np.ndarray:
    if share is None:
        return possible
    return possible[loose_s[possible] <= loose_s[possible].min() * (1.0 + share)]


def homogeneous(
    times: ReplicaTimes,
    configurations: Sequence[Configuration],
    num_gpus: int,
    expected: Buckets,
) -> Deployment:
    """The best deployment of equal replicas, each of which holds the longest bucket."""
    _check(configurations, num_gpus, expected)
    longest = expected.lengths_tokens[-1]
    able = [c for c in configurations if c.batch_of(longest) and num_gpus % c.num_gpus == 0]
    if not able:
        raise ConfigError("num_gpus", "no layout divides it", "give another number of GPUs")
    plans = [(ReplicaGroup(c, num_gpus // c.num_gpus),) for c in able]
    # One group has nothing to choose: dispatch by length is the only one.
    found = [
        _filled(times, plan, expected, dispatch_by_length(times, plan, expected)) for plan in plans
    ]
    best = min(found, key=lambda each: each.step_s)
    counts = (len(plans),) * 3
    return Deployment(best.groups, best.step_s, best.step_s, best.dispatch, tuple(able), *counts)


def groups_of(
    configurations: Sequence[Configuration], counts: Sequence[int] | np.ndarray
) -> tuple[ReplicaGroup, ...]:
    pairs = zip(configurations, counts, strict=True)
    return tuple(ReplicaGroup(configuration, int(count)) for configuration, count in pairs if count)


def _check(configurations: Sequence[Configuration], num_gpus: int, expected: Buckets) -> None:
    if num_gpus < 1 or not expected.lengths_tokens:
        raise ConfigError("num_gpus", "no GPUs or no sequences", "give at least one of each")
    longest = expected.lengths_tokens[-1]
    usable = [c for c in configurations if c.num_gpus <= num_gpus]
    most = max((c.max_tokens for c in usable), default=0)
    if most < longest:
        raise ConfigError(
            "lengths",
            f"the longest sequence has {longest} tokens; on {num_gpus} GPUs no configuration "
            f"holds more than {most}",
            "cap the lengths, or add GPUs or a configuration with more memory",
        )


# ----------------------------------------------------------------------------- configurations


def kept_configurations(
    times: ReplicaTimes,
    configurations: Sequence[Configuration],
    num_gpus: int,
    expected: Buckets,
) -> tuple[Configuration, ...]:
    """Sorted by GPUs, then memory."""
    usable = [c for c in dict.fromkeys(configurations) if c.num_gpus <= num_gpus]
    cost = gpu_seconds(times, usable, expected)
    best: dict[tuple[int, int], int] = {}
    for index, configuration in enumerate(usable):
        key = (configuration.num_gpus, configuration.max_tokens)
        if key not in best or _work(cost, index, expected) < _work(cost, best[key], expected):
            best[key] = index
    chosen = sorted(best.values(), key=lambda i: (usable[i].num_gpus, usable[i].max_tokens))
    return tuple(
        usable[i]
        for i in chosen
        if not any(_dominates(usable, cost, k, i) for k in chosen if k != i)
    )


def gpu_seconds(
    times: ReplicaTimes, configurations: Sequence[Configuration], expected: Buckets
) -> np.ndarray:
    """[configurations, buckets]: of one sequence in a full micro-batch; inf: does not fit."""
    tables = cost_tables(times, configurations, expected.lengths_tokens)
    gpus = np.array([[configuration.num_gpus] for configuration in configurations])
    return tables.full_s * gpus / np.maximum(tables.batch, 1)


def _work(cost: np.ndarray, index: int, expected: Buckets) -> float:
    held = np.isfinite(cost[index])
    return float(cost[index][held] @ np.array(expected.counts)[held])


def _dominates(usable: Sequence[Configuration], cost: np.ndarray, k: int, i: int) -> bool:
    smaller = usable[k].num_gpus < usable[i].num_gpus
    return (
        smaller
        and usable[i].num_gpus % usable[k].num_gpus == 0
        and usable[k].max_tokens >= usable[i].max_tokens
        and usable[k].shape.pp <= usable[i].shape.pp  # no longer to fill
        and bool((cost[k] <= cost[i]).all())
    )


# --------------------------------------------------------------------------------------- plans


def _plans(kept: Sequence[Configuration], num_gpus: int) -> np.ndarray:
    """Largest replicas first while enumerating: far fewer partial plans."""
    return partitions([c.num_gpus for c in reversed(kept)], num_gpus)[:, ::-1]


def partitions(sizes: Sequence[int], total: int) -> np.ndarray:
    """[plans, sizes]: counts with ``counts @ sizes == total``, none for no sizes."""
    if not sizes:
        return np.zeros((0, 0), np.int64)
    rows, left = np.zeros((1, 0), np.int64), np.array([total])
    for size in sizes[:-1]:
        repeats = left // size + 1
        first = np.repeat(np.cumsum(repeats) - repeats, repeats)
        counts = np.arange(repeats.sum()) - first
        rows = np.column_stack([np.repeat(rows, repeats, axis=0), counts])
        left = np.repeat(left, repeats) - counts * size
    whole = left % sizes[-1] == 0
    return np.column_stack([rows[whole], left[whole] // sizes[-1]])


def lower_bounds_s(
    times: ReplicaTimes,
    configurations: Sequence[Configuration],
    plans: np.ndarray,
    expected: Buckets,
) -> tuple[np.ndarray, np.ndarray]:
    """(published, tighter) bound of each plan's step; inf where the longest bucket fits nowhere.

    Published: every sequence where it costs the fewest GPU-seconds, all GPUs busy. Tighter: for
    every amount of memory M, the sequences that need more than M on the GPUs that have more.
    """
    cost = gpu_seconds(times, configurations, expected)
    memory = np.array([configuration.max_tokens for configuration in configurations])
    gpus = np.array([configuration.num_gpus for configuration in configurations])
    lengths, counts = np.array(expected.lengths_tokens), np.array(expected.counts)
    loose, tight = np.full(len(plans), np.inf), np.full(len(plans), np.inf)
    present, group_of = np.unique(plans > 0, axis=0, return_inverse=True)
    for number, mask in enumerate(present):
        rows = np.flatnonzero(group_of.ravel() == number)
        if not mask.any() or not np.isfinite(cost[mask][:, -1]).any():
            continue
        work = cost[mask].min(axis=0) * counts  # GPU-seconds by bucket
        bounds = [
            work[lengths > floor].sum() / (plans[rows] @ np.where(mask & (memory > floor), gpus, 0))
            for floor in [0, *sorted({int(m) for m in memory[mask]})[:-1]]
        ]
        loose[rows], tight[rows] = bounds[0], np.max(bounds, axis=0)
    return loose, tight
