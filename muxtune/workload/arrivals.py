"""Arrivals that come in bursts, and who asks: tenants of unequal size, deadlines.

No public trace tells any of this of fine-tuning services: every figure is a choice of the
configuration. Skewed sizes follow Zipf's law, the usual model of popularity.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from muxtune.errors import ConfigError


class Bursts(NamedTuple):
    """A Poisson process whose rate switches between two values (a Markov-modulated one).

    ``peak_factor``: rate in a burst over the mean rate. ``burst_share``: share of the time that
    is burst. ``tasks_per_burst``: tasks of a burst in the mean, so that stretching all arrival
    times to a load keeps the shape.
    """

    peak_factor: float = 5.0
    burst_share: float = 0.1
    tasks_per_burst: float = 20.0

    def checked(self) -> Bursts:
        """Raises ConfigError for figures out of range, or that leave less than nothing between
        the bursts."""
        for name, value, good in (
            ("peak_factor", self.peak_factor, self.peak_factor >= 1),
            ("burst_share", self.burst_share, 0 < self.burst_share < 1),
            ("tasks_per_burst", self.tasks_per_burst, self.tasks_per_burst > 0),
        ):
            if not (math.isfinite(value) and good):
                remedy = "Give a factor from 1, a share in (0, 1) and a positive number of tasks"
                raise ConfigError(f"workload.{name}", f"{value} is out of range", remedy)
        if self.peak_factor * self.burst_share > 1:
            problem = f"{self.peak_factor} times a share of {self.burst_share} is above 1"
            remedy = "Bursts cannot hold more than all tasks: lower one of the two"
            raise ConfigError("workload.peak_factor, workload.burst_share", problem, remedy)
        return self


def bursty_arrivals_s(
    random: np.random.Generator, num_tasks: int, mean_gap_s: float, bursts: Bursts
) -> np.ndarray:
    """[num_tasks] sorted, the first at 0; mean rate 1 / ``mean_gap_s``."""
    bursts = bursts.checked()
    share, peak_rate = bursts.burst_share, bursts.peak_factor / mean_gap_s
    quiet_rate = (1 - share * bursts.peak_factor) / (1 - share) / mean_gap_s
    burst_s = bursts.tasks_per_burst / peak_rate
    mean_s, rate = (
        {True: burst_s, False: burst_s * (1 - share) / share},
        {
            True: peak_rate,
            False: quiet_rate,
        },
    )
    now_s, in_burst = 0.0, bool(random.random() < share)
    pieces: list[np.ndarray] = []
    while sum(map(len, pieces)) < num_tasks:
        stay_s = float(random.exponential(mean_s[in_burst]))
        found = random.poisson(rate[in_burst] * stay_s)
        pieces.append(now_s + np.sort(random.uniform(0.0, stay_s, found)))
        now_s, in_burst = now_s + stay_s, not in_burst
    arrival_s = np.concatenate(pieces)[:num_tasks]
    return arrival_s - arrival_s[0]


class People(NamedTuple):
    """``num_tenants`` with popularity 1 / rank ** ``tenant_skew``. ``deadline_share`` of the tasks
    have a deadline, ``deadline_factor`` times their duration alone after their arrival."""

    num_tenants: int = 1
    tenant_skew: float = 1.0
    deadline_share: float = 0.0
    deadline_factor: float = 3.0

    def checked(self) -> People:
        """Raises ConfigError that names the field."""
        for name, good, remedy in (
            ("num_tenants", self.num_tenants >= 1, "Give at least 1"),
            ("tenant_skew", 0 <= self.tenant_skew < 100, "Give 0 (all alike) or more"),
            ("deadline_share", 0 <= self.deadline_share <= 1, "Give a number in [0, 1]"),
            ("deadline_factor", self.deadline_factor > 0, "Give a number above 0"),
        ):
            if not good:
                problem = f"{getattr(self, name)} is out of range"
                raise ConfigError(f"workload.{name}", problem, remedy)
        return self

    def draw(self, duration_s: np.ndarray, seed: int) -> tuple[list[str] | None, np.ndarray]:
        """Tenants, and [num_tasks] seconds from arrival to deadline, NaN where there is none. Each
        has a random stream of its own, apart from those of arrivals and durations."""
        people = self.checked()
        streams = np.random.SeedSequence([seed, 2]).spawn(2)
        whose, dated = (np.random.default_rng(stream).random(len(duration_s)) for stream in streams)
        slack_s = np.where(
            dated < people.deadline_share, people.deadline_factor * duration_s, np.nan
        )
        if people.num_tenants == 1:
            return None, slack_s
        weights = 1.0 / np.arange(1, people.num_tenants + 1) ** people.tenant_skew
        ends = np.cumsum(weights) / weights.sum()
        index = np.minimum(np.searchsorted(ends, whose, side="right"), people.num_tenants - 1)
        width = len(str(people.num_tenants - 1))
        return [f"tenant-{number:0{width}d}" for number in index.tolist()], slack_s


ONE_TENANT = People()
