"""Intervals over seeds cover what they promise; censored times are not left out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from muxtune.report.statistics import (
    bootstrap_interval,
    kaplan_meier,
    paired_interval,
    paired_saving,
)


def test_the_same_observations_give_the_same_interval():
    values = [3.0, 4.0, 8.0, 1.0]
    assert bootstrap_interval(values) == bootstrap_interval(values)
    interval = bootstrap_interval(values)
    assert interval.value == 4.0 and interval.num_observations == 4
    assert interval.low < 4.0 < interval.high


def test_an_interval_of_ten_seeds_covers_the_mean_as_often_as_it_says():
    random = np.random.default_rng(7)
    covered = 0
    for trial in range(1_500):
        values = random.normal(5.0, 2.0, 10).tolist()
        found = bootstrap_interval(values, num_resamples=400, seed=trial)
        covered += found.low <= 5.0 <= found.high
    # 0.95 within three standard errors; the plain percentile interval covers about 0.90.
    assert covered / 1_500 == pytest.approx(0.95, abs=0.017)


def test_one_seed_has_no_interval():
    interval = bootstrap_interval([2.0])
    assert interval.value == 2.0 and math.isnan(interval.low) and math.isnan(interval.high)


def test_pairs_are_kept_together():
    """Seeds differ by far more than policies do: only pairing finds the saving."""
    baseline = np.array([10.0, 100.0, 1_000.0, 40.0, 300.0])
    interval = paired_saving(baseline, baseline * 0.8)
    assert interval.value == pytest.approx(0.2)
    assert interval.low == pytest.approx(0.2) and interval.high == pytest.approx(0.2)
    shuffled = paired_saving(baseline, baseline[::-1] * 0.8)
    assert shuffled.half_width > 0.2


def test_a_saving_can_be_a_loss():
    assert paired_saving([1.0, 1.0], [2.0, 2.0]).value == pytest.approx(-1.0)


@pytest.mark.parametrize("columns", [[], [[]], [[1.0], []]])
def test_columns_without_observations_are_refused(columns: list[list[float]]):
    with pytest.raises(ValueError):
        paired_interval(columns, lambda *values: values[0].mean(axis=-1))


def test_without_censoring_the_estimate_is_the_data():
    times = [4.0, 1.0, 3.0, 2.0, 2.0]
    survival = kaplan_meier(times, [True] * 5)
    assert survival.restricted_mean_s() == pytest.approx(np.mean(times))
    assert survival.quantile(0.2) == 1.0 and survival.quantile(0.6) == 2.0
    assert survival.quantile(1.0) == 4.0


def test_the_textbook_estimate():
    # Events at 1 and 3, cut off at 2: S = 2/3 after 1, then one of one at risk.
    survival = kaplan_meier([1.0, 2.0, 3.0], [True, False, True])
    assert survival.share_longer.tolist() == pytest.approx([2 / 3, 0.0])
    assert survival.num_ended == 2 and survival.num_censored == 1
    # A task cut off when another ends is still at risk there.
    assert kaplan_meier([1.0, 1.0], [True, False]).share_longer.tolist() == [0.5]


def test_leaving_censored_tasks_out_would_be_biased():
    random = np.random.default_rng(3)
    times = random.exponential(10.0, 20_000)
    cut = random.uniform(0.0, 30.0, 20_000)
    seen, ended = np.minimum(times, cut), times <= cut
    median_s = 10.0 * math.log(2)
    assert kaplan_meier(seen, ended).quantile(0.5) == pytest.approx(median_s, rel=0.03)
    assert np.median(seen[ended]) < 0.8 * median_s


def test_a_quantile_that_was_not_seen_is_infinite():
    survival = kaplan_meier([1.0, 5.0, 5.0], [True, False, False])
    assert survival.quantile(0.3) == 1.0 and survival.quantile(0.9) == math.inf
    assert survival.restricted_mean_s() == pytest.approx(1.0 + 4.0 * 2 / 3)
    none = kaplan_meier([2.0], [False])
    assert none.quantile(0.5) == math.inf and none.restricted_mean_s() == 2.0
