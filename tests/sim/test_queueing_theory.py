"""The simulator against queueing theory: M/M/c and M/G/1.

A pass takes one second, so a task of n steps is served in n seconds; service times of a thousand
seconds in the mean make the rounding to whole steps not matter. Means of independent replications
give the interval; its level is 99%, the seeds are fixed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import pytest
from scipy.stats import t as student

from muxtune.engine import Engine, QuietObserver, TaskOutcome
from muxtune.planning.step_builder import StepBuilder
from muxtune.registry import CLUSTER_POLICIES
from muxtune.types import TaskSpec
from muxtune_sim import SimExecutor, SimOptions
from tests.sim.fakes import FakeLibrary, FakePlanner, fake_book, instance, task

MEAN_S = 1_000.0
REPLICATIONS, TASKS, WARM_UP = 10, 1_200, 200
QUIET = SimOptions(emit_plan_applied=False, emit_progress=False)
Service = Callable[[random.Random], float]


class Waits(QuietObserver):
    """Queueing times in order of arrival, after the warm-up."""

    def __init__(self) -> None:
        self.by_id: dict[str, float] = {}

    def on_task_end(self, outcome: TaskOutcome) -> None:
        assert outcome.placed_ns is not None
        self.by_id[outcome.task_id] = (outcome.placed_ns - outcome.arrival_ns) / 1e9

    def mean_s(self) -> float:
        waits = [self.by_id[name] for name in sorted(self.by_id)][WARM_UP:]
        return sum(waits) / len(waits)


def arrivals(rate_per_s: float, service: Service, seed: int) -> Iterator[TaskSpec]:
    draw, now_s = random.Random(seed), 0.0
    for number in range(TASKS):
        now_s += draw.expovariate(rate_per_s)
        yield task(f"t{number:05}", max(1, round(service(draw))), now_s)


def mean_wait_s(num_servers: int, rate_per_s: float, service: Service, seed: int) -> float:
    executor = SimExecutor(StepBuilder(), fake_book(), FakeLibrary(), QUIET)
    waits = Waits()
    engine = Engine(
        CLUSTER_POLICIES.get("fifo_exclusive")(),
        FakePlanner(),
        executor,
        arrivals(rate_per_s, service, seed),
        [instance(f"i{number}") for number in range(num_servers)],
        observers=(waits,),
    )
    assert engine.run().num_done == TASKS
    return waits.mean_s()


def interval(values: list[float], level: float = 0.99) -> tuple[float, float]:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = float(student.ppf((1 + level) / 2, len(values) - 1)) * math.sqrt(variance / len(values))
    return mean - half, mean + half


def erlang_c_wait_s(num_servers: int, rate_per_s: float, mean_s: float) -> float:
    """Mean wait of M/M/c: C(c, a) / (c / s - lambda) with a = lambda s (Erlang's C formula)."""
    offered = rate_per_s * mean_s
    terms = [offered**k / math.factorial(k) for k in range(num_servers)]
    last = offered**num_servers / math.factorial(num_servers) / (1 - offered / num_servers)
    return last / (sum(terms) + last) / (num_servers / mean_s - rate_per_s)


def pollaczek_khinchine_wait_s(rate_per_s: float, mean_s: float, mean_square_s2: float) -> float:
    """Mean wait of M/G/1: lambda E[S^2] / (2 (1 - rho))."""
    return rate_per_s * mean_square_s2 / (2 * (1 - rate_per_s * mean_s))


def exponential(draw: random.Random) -> float:
    return draw.expovariate(1 / MEAN_S)


def two_sizes(draw: random.Random) -> float:
    """Nine of ten tasks are short: E[S] = 1000, E[S^2] = 3,250,000."""
    return 500.0 if draw.random() < 0.9 else 5_500.0


@pytest.mark.parametrize(("num_servers", "load"), [(3, 0.7), (8, 0.8)])
def test_waits_of_mmc_are_as_erlang_says(num_servers: int, load: float):
    rate_per_s = load * num_servers / MEAN_S
    waits = [mean_wait_s(num_servers, rate_per_s, exponential, s) for s in range(REPLICATIONS)]
    low, high = interval(waits)
    expected_s = erlang_c_wait_s(num_servers, rate_per_s, MEAN_S)
    assert low <= expected_s <= high
    assert high - low < expected_s  # an interval that wide would show nothing


def test_waits_of_mg1_are_as_pollaczek_and_khinchine_say():
    rate_per_s, mean_square_s2 = 0.5 / MEAN_S, 0.9 * 500**2 + 0.1 * 5_500**2
    waits = [mean_wait_s(1, rate_per_s, two_sizes, seed) for seed in range(REPLICATIONS)]
    low, high = interval(waits)
    expected_s = pollaczek_khinchine_wait_s(rate_per_s, MEAN_S, mean_square_s2)
    assert low <= expected_s <= high
    assert high - low < expected_s
