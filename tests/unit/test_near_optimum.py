"""A few of the random questions of experiments/near_optimum, against all plans."""

from __future__ import annotations

import pytest

from experiments.near_optimum.brute_force import Option, best_round_s, partitions
from experiments.near_optimum.near_optimum import examine, summary
from muxtune.cost import CostBook

COSTS = CostBook()


def test_partitions_are_all_set_partitions():
    assert [len(list(partitions(tuple(range(n))))) for n in range(1, 7)] == [1, 2, 5, 15, 52, 203]


def test_the_best_round_weighs_time_against_latency():
    quick, early = Option(1.0, 4.0), Option(1.5, 2.0)
    assert best_round_s([[quick, early], [Option(1.0, 1.0)]]) == 2.5
    assert best_round_s([[quick]]) == 4.0
    assert best_round_s([[]]) == float("inf")


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [examine(seed, COSTS, most_tasks=4) for seed in range(14)]


def test_plans_are_near_the_optimum(rows):
    found = summary(rows)
    assert found["solved"] >= 7 and found["several_htasks_best"] >= 3
    assert found["mean_ratio"] <= 1.02
    assert found["worst_ratio"] <= 1.10


def test_nothing_feasible_is_refused_and_no_plain_plan_is_better(rows):
    found = summary(rows)
    assert found["refused_though_feasible"] == 0
    assert max(found["worst_over_other"].values()) <= 1.005
