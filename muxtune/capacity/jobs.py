"""Pieces of a study that can run beside each other, each in whatever process."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np

from muxtune.capacity.choices import PolicyChoice
from muxtune.capacity.laboratory import AS_ASKED, Case, Laboratory, Pool, Run, Variant
from muxtune.capacity.search import Found, smallest_fleet
from muxtune.config import CapacityConfig


class Search(NamedTuple):
    """Job: the smallest fleet of one draw. ``guess``: None where nothing is known yet."""

    case: Case
    guess: int | None

    def __call__(self, laboratory: Laboratory) -> Found:
        case, config = self.case, laboratory.config
        demand = laboratory.demand(case)
        guess = self.guess or max(1, round(demand.busy_gpus))
        step = laboratory.smallest(case.pool)
        return smallest_fleet(
            lambda num_gpus: laboratory.served_share(case, num_gpus),
            laboratory.level.share,
            first=guess,
            largest=largest_fleet(config, step),
            step=step,
            jump=1 if self.guess else max(1, guess // 2 // step),
        )


class Settled(NamedTuple):
    """The fleet of one pool over all draws: ``runs[num_gpus][seed]``; the answer, or None."""

    pool: Pool
    num_gpus: int | None
    runs: dict[int, tuple[Run, ...]]


class Settle(NamedTuple):
    """Job: the smallest fleet that serves the tasks of all draws together well enough, between
    the smallest and the largest of the single draws; then the next smaller one and, for what the
    curve looks like, a larger one."""

    pool: Pool
    seeds: tuple[int, ...]
    low: int
    high: int

    def __call__(self, laboratory: Laboratory) -> Settled:
        step, runs = laboratory.smallest(self.pool), {}
        largest = largest_fleet(laboratory.config, step)

        def share_at(num_gpus: int) -> float:
            if num_gpus not in runs:
                cases = [Case(self.pool, seed) for seed in self.seeds]
                runs[num_gpus] = tuple(laboratory.run(case, num_gpus) for case in cases)
            return sustained_share(runs[num_gpus], laboratory.level.share)

        middle = (self.low + self.high) // 2 // step * step
        found = smallest_fleet(share_at, laboratory.level.share, max(step, middle), largest, step)
        if found.num_gpus is not None and found.num_gpus > step:
            share_at(found.num_gpus - step)
        return Settled(self.pool, found.num_gpus, runs)


class Best(NamedTuple):
    """Job: where no fleet will do, the most that one can do, and the smallest that does it."""

    pool: Pool
    seeds: tuple[int, ...]

    def __call__(self, laboratory: Laboratory) -> tuple[float, Settled]:
        case, step = Case(self.pool, self.seeds[0]), laboratory.smallest(self.pool)
        demand = laboratory.demand(case)
        largest = largest_fleet(laboratory.config, step)
        most = min(largest, max(step, len(demand.tasks) * step, round(demand.busy_gpus)))
        top = laboratory.run(case, most).row["served_share"]
        found = smallest_fleet(
            lambda num_gpus: laboratory.run(case, num_gpus).row["served_share"],
            top,
            first=min(most, max(step, round(demand.busy_gpus) // step * step)),
            largest=most,
            step=step,
            jump=max(1, round(demand.busy_gpus) // 2),
        )
        num_gpus = found.num_gpus or most
        runs = tuple(laboratory.run(Case(self.pool, seed), num_gpus) for seed in self.seeds)
        return laboratory.alone_share(case), Settled(self.pool, num_gpus, {num_gpus: runs})


class Alternative(NamedTuple):
    """Job: how many tasks a given fleet serves well under other assumptions, seed by seed."""

    pool: Pool
    seeds: tuple[int, ...]
    num_gpus: int
    variant: Variant

    def __call__(self, laboratory: Laboratory) -> tuple[Run, ...]:
        cases = [Case(self.pool, seed, self.variant) for seed in self.seeds]
        return tuple(laboratory.run(case, self.num_gpus) for case in cases)


class RelativeError(NamedTuple):
    """Job: how far the cost model itself says that it may be off."""

    case: Case

    def __call__(self, laboratory: Laboratory) -> float:
        return laboratory.relative_error(self.case)


class BaseModels(NamedTuple):
    """Job: the base models that tasks ask for, and the draw's first and last figures."""

    seed: int

    def __call__(self, laboratory: Laboratory) -> dict[str, Any]:
        demands = laboratory.demands(self.seed)
        return {
            model: {
                "model": model,
                "num_tasks": len(demand.tasks),
                "horizon_s": demand.horizon_s,
                "busy_gpus_alone": demand.busy_gpus,
            }
            for model, demand in demands.items()
        }


def pooled_share(runs: Sequence[Run]) -> float:
    """Over the tasks of all draws."""
    counts = np.array([run.row["num_counted"] for run in runs], dtype=np.float64)
    shares = np.array([run.row["served_share"] for run in runs])
    return float((counts * shares).sum() / counts.sum()) if counts.sum() else 1.0


def sustained_share(runs: Sequence[Run], target: float) -> float:
    """Below the target where the fleets, all draws together, get more work than they have time."""
    share = pooled_share(runs)
    busy_share = sum(run.row["busy_share"] for run in runs) / len(runs)
    return share if busy_share <= 1.0 else min(share, math.nextafter(target, 0.0))


def largest_fleet(config: CapacityConfig, step: int) -> int:
    return max(step, config.max_gpus // step * step)


# ------------------------------------------------------------------------------------- processes

_LABORATORY: list[Laboratory] = []  # of a worker process, made once
Job = Callable[[Laboratory], Any]


def _open_laboratory(config: CapacityConfig, choices: Sequence[PolicyChoice]) -> None:
    logging.getLogger("muxtune.workload").setLevel(logging.ERROR)  # warnings were told before
    _LABORATORY[:] = [Laboratory(config, choices)]


def _work(job: Job) -> Any:
    return job(_LABORATORY[0])


class Crew:
    """``do`` runs jobs and returns their answers in order, telling ``told`` after each."""

    def __init__(self, run_all: Callable[[Sequence[Job]], Iterator[tuple[int, Any]]]) -> None:
        self._run_all = run_all
        self.told: Callable[[str, int, int], None] = lambda title, done, total: None

    def do(self, title: str, jobs: Sequence[Job]) -> list[Any]:
        answers: list[Any] = [None] * len(jobs)
        self.told(title, 0, len(jobs))
        for done, (index, answer) in enumerate(self._run_all(jobs), start=1):
            answers[index] = answer
            self.told(title, done, len(jobs))
        return answers


@contextmanager
def crew(config: CapacityConfig, choices: Sequence[PolicyChoice]) -> Iterator[Crew]:
    """``config.workers`` processes, each with a laboratory of its own; one works right here."""
    workers = config.workers or num_cores()
    if workers == 1:
        laboratory = Laboratory(config, choices)
        yield Crew(lambda jobs: ((index, job(laboratory)) for index, job in enumerate(jobs)))
        return
    # Forked processes would inherit the threads of a progress display half-alive.
    with ProcessPoolExecutor(
        workers, get_context("spawn"), _open_laboratory, (config, choices)
    ) as pool:

        def run_all(jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
            index_of = {pool.submit(_work, job): index for index, job in enumerate(jobs)}
            try:
                for future in as_completed(index_of):
                    yield index_of[future], future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # what is left would be for nothing
                raise

        yield Crew(run_all)


def num_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def as_asked(pool: Pool, seed: int) -> Case:
    return Case(pool, seed, AS_ASKED)


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
