"""What plans take, told apart out of whole takeovers; and captures: the first takes more."""

from typing import Any

import numpy as np
import pytest

from muxtune.cost.takeovers import CAPTURE, TAKEOVER, CaptureTimes, TakeoverTimes
from muxtune.errors import ProfileError

JOIN, MOVE, REBUILD_S, PLAN_S = (0.1, 2e-9), (0.05, 1e-9), 0.2, 0.08
SIZES = {"a": 4e7, "b": 1.6e8, "c": 8e7}
PLANS = [("a", ""), ("b", ""), ("", "ab"), ("c", "b"), ("a", "bc"), ("", "c"), ("", ""), ("b", "c")]


def point(axes: tuple[str, ...], sizes: tuple[float, ...], seconds: float) -> dict[str, Any]:
    times = {"median_s": seconds, "p05_s": seconds, "p95_s": seconds, "repeats": 1}
    return {**dict(zip(axes, sizes, strict=True)), **times}


def takeovers(noise: float = 0.0) -> dict[str, Any]:
    random = np.random.default_rng(0)
    points = []
    for joined, moved in 2 * PLANS:
        join, move = (sum(SIZES[name] for name in names) for names in (joined, moved))
        seconds = PLAN_S + JOIN[0] * len(joined) + JOIN[1] * join
        seconds += MOVE[0] * len(moved) + MOVE[1] * move
        seconds += REBUILD_S * bool(moved)
        sizes = float(len(joined)), join, float(len(moved)), move, float(bool(moved))
        points.append(point(TAKEOVER, sizes, seconds + noise * random.standard_normal()))
    return {"unit": "s", "axes": list(TAKEOVER), "points": points}


def test_terms_are_told_apart() -> None:
    times = TakeoverTimes(takeovers())
    assert times.plan().value == pytest.approx(PLAN_S)
    assert times.rebuild().value == pytest.approx(REBUILD_S)
    for size in SIZES.values():
        assert times.join(size).value == pytest.approx(JOIN[0] + JOIN[1] * size)
        assert times.move(size).value == pytest.approx(MOVE[0] + MOVE[1] * size)
    assert times.join(1.7e8).extrapolated and not times.join(1.5e8).extrapolated


def test_noise_makes_no_term_negative_and_the_interval_wider() -> None:
    exact, noisy = TakeoverTimes(takeovers()), TakeoverTimes(takeovers(noise=0.2))
    for estimate in (
        noisy.plan(),
        noisy.rebuild(),
        noisy.join(0.0),
        noisy.move(0.0),
        noisy.join(1e8),
    ):
        assert 0.0 <= estimate.low <= estimate.value <= estimate.high
    width = noisy.join(1e8).high - noisy.join(1e8).low
    assert width > 10 * (exact.join(1e8).high - exact.join(1e8).low)


def test_plans_that_only_join_tell_nothing_of_moves() -> None:
    """Then moving is free, not negative and no error."""
    op = takeovers()
    op["points"] = [p for p in op["points"] if not p["moves"]]
    times = TakeoverTimes(op)
    assert times.move(1e8).value == 0.0
    assert times.join(4e7).value + times.plan().value == pytest.approx(
        PLAN_S + JOIN[0] + JOIN[1] * 4e7
    )


def captures(with_first: bool) -> dict[str, Any]:
    axes = CAPTURE if with_first else ("rows",)
    points = []
    for rows in (256.0, 512.0, 1024.0, 2560.0):
        points.append(point(axes, (rows, 0.0)[: len(axes)], 0.05 + 1e-5 * rows))
        if with_first:
            points.append(point(axes, (rows, 1.0), 0.15 + 6e-5 * rows))
    return {"unit": "s", "axes": list(axes), "points": points}


def test_the_first_capture_takes_more() -> None:
    times = CaptureTimes(captures(with_first=True))
    assert times.each(1000.0).value == pytest.approx(0.06)
    assert times.first_more(1000.0).value == pytest.approx(0.15)


def test_captures_add_up_to_what_was_measured_though_some_take_twice_as_long() -> None:
    """A host is now and then busy with others; who fits ratios makes the sum too small."""
    op = captures(with_first=True)
    for place, busy in enumerate(op["points"]):
        op["points"][place] = busy | {"median_s": busy["median_s"] * (2.0 if place % 3 else 1.0)}
    times = CaptureTimes(op)
    told = sum(
        times.each(p["rows"]).value + p["first"] * times.first_more(p["rows"]).value
        for p in op["points"]
    )
    assert told == pytest.approx(sum(p["median_s"] for p in op["points"]), rel=1e-6)


def test_older_profiles_know_of_no_first_capture() -> None:
    times = CaptureTimes(captures(with_first=False))
    assert times.each(1000.0).value == pytest.approx(0.06)
    assert times.first_more(1000.0).value == 0.0


def test_an_axis_that_is_missing_is_named() -> None:
    op = takeovers()
    op["axes"].remove("rebuilds")
    with pytest.raises(ProfileError, match="rebuilds"):
        TakeoverTimes(op)
