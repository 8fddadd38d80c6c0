"""The smallest fleet: found, checked, and told when a larger one serves worse."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.capacity.search import smallest_fleet
from muxtune.capacity.service import ServiceLevel, Times, served_share, service_row, window_row
from muxtune.errors import ConfigError


@given(
    answer=st.integers(1, 300),
    first=st.integers(1, 400),
    jump=st.integers(1, 200),
    step=st.sampled_from([1, 2, 4]),
)
def test_the_least_size_of_a_monotone_share_is_found(answer: int, first: int, jump: int, step: int):
    asked: list[int] = []

    def share_at(size: int) -> float:
        asked.append(size)
        return 1.0 if size >= answer else size / answer * 0.9

    found = smallest_fleet(share_at, 0.95, first, 400, step, jump)
    assert found.num_gpus == math.ceil(answer / step) * step
    assert found.monotone and len(asked) == len(set(asked))
    assert all(size % step == 0 and size <= 400 for size in asked)


def test_few_sizes_are_looked_at():
    found = smallest_fleet(lambda size: float(size >= 700), 0.95, 1_000, 10_000, jump=500)
    assert found.num_gpus == 700 and len(found.shares) <= 15


def test_a_larger_fleet_that_serves_worse_is_seen():
    found = smallest_fleet(lambda size: float(size >= 5 and size != 6), 0.95, 5, 64)
    assert not found.monotone
    assert found.num_gpus == 7  # 5 would do, and 6 would not


def test_no_fleet_at_all():
    found = smallest_fleet(lambda size: min(0.8, size / 10), 0.95, 4, 40)
    assert found.num_gpus is None
    assert found.best[1] == 0.8 and 40 in found.shares


def test_a_fleet_of_no_gpu_is_no_fleet():
    with pytest.raises(ValueError):
        smallest_fleet(lambda size: 1.0, 0.95, 1, 3, step=4)


def times(start_delay_s: list[float], completion_s: list[float], tenants: str = "ab") -> Times:
    num = len(completion_s)
    return Times(
        arrival_s=np.zeros(num),
        start_delay_s=np.array(start_delay_s),
        completion_s=np.array(completion_s),
        reference_s=np.full(num, 100.0),
        deadline_met=np.array([1.0, 0.0, math.nan, math.nan][:num]),
        tenants=tuple((tenants * num)[:num]),
    )


def test_a_promise_has_two_parts():
    level = ServiceLevel(0.95, 600.0, 3.0)
    found = times([0.0, 601.0, 0.0, 600.0], [300.0, 700.0, 301.0, 900.0])
    assert served_share(found, level) == 0.5
    assert served_share(found, level._replace(slowdown_from="arrival")) == 0.25


def test_a_task_that_never_ended_is_not_served():
    found = times([math.inf, 0.0], [math.inf, 50.0])
    row = service_row(found, ServiceLevel())
    assert row["served_share"] == 0.5 and row["num_not_ended"] == 1
    assert row["mean_completion_time_s"] == 50.0
    assert row["deadlines_met_share"] == 0.5


def test_tasks_that_are_cut_off_are_known_to_take_longer():
    found = times([0.0] * 4, [10.0, 20.0, 500.0, 700.0])
    row = window_row(found, until_s=100.0)
    assert row["num_censored"] == 2 and row["window_p50_completion_time_s"] == 20.0
    assert window_row(found, until_s=15.0)["window_p50_completion_time_s"] is None


def test_fairness_is_that_of_tenants():
    row = service_row(times([0.0, 0.0], [100.0, 300.0]), ServiceLevel())
    assert row["fairness_index"] == pytest.approx(16 / (2 * 10))


@pytest.mark.parametrize(
    "change", [{"share": 1.5}, {"max_slowdown": 0.0}, {"slowdown_from": "when"}]
)
def test_a_service_level_that_makes_no_sense_is_refused(change: dict[str, object]):
    with pytest.raises(ConfigError, match="service_level"):
        ServiceLevel()._replace(**change).checked()  # type: ignore[arg-type]
