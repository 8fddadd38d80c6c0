"""A GPU that another process uses is found out by launches that waited, or by memory it holds."""

from __future__ import annotations

import math
import random

import pytest

from muxtune.cost.calibration import WholeStep
from muxtune.cost.schema import Profile, profile_warnings
from muxtune.cost.sharing import (
    MOST_INTERRUPTED,
    MOST_TAKEN_BYTES,
    interrupted_share,
    sharing_warnings,
    worst,
)

LAUNCH_S, SLICE_S = 80e-6, 2e-3


def alone(count: int = 1200, slower: float = 1.3) -> list[float]:
    """Launches of a clock that falls until they take ``slower`` times as long, with the noise of a
    timer."""
    noise = random.Random(0)
    return [
        LAUNCH_S * (1.0 + (slower - 1.0) * at / count) * (1.0 + noise.uniform(-0.03, 0.03))
        for at in range(count)
    ]


def beside(times: list[float], own_s: float = SLICE_S, other_s: float = SLICE_S) -> list[float]:
    """The same where every ``own_s`` another process has the device for ``other_s``."""
    found, left_s = [], own_s
    for time_s in times:
        slices = math.ceil(max(0.0, time_s - left_s) / own_s)
        left_s += slices * own_s - time_s
        found.append(time_s + slices * other_s)
    return found


def test_a_gpu_of_one_s_own_interrupts_nothing_though_its_clock_falls() -> None:
    assert interrupted_share(alone()) == 0.0
    assert interrupted_share(alone(slower=2.0)) == 0.0, "followed, block by block"
    stepped = alone(600, 1.0) + [1.4 * time_s for time_s in alone(600, 1.0)]
    assert interrupted_share(stepped) == 0.0, "a clock that changes within a block"
    hiccup = [*alone(600), 1e-3, *alone(600)]
    assert 0.0 < interrupted_share(hiccup) < MOST_INTERRUPTED


@pytest.mark.parametrize("launch_s", [40e-6, 80e-6, 200e-6])
@pytest.mark.parametrize(
    ("own_s", "other_s"), [(2e-3, 2e-3), (1e-3, 2e-3), (10e-3, 2e-3), (20e-3, 20e-3)]
)
def test_slices_of_another_process_are_told_by_their_share(
    launch_s: float, own_s: float, other_s: float
) -> None:
    times = [launch_s / LAUNCH_S * time_s for time_s in alone(round(0.5 / launch_s))]
    share = interrupted_share(beside(times, own_s, other_s))
    assert share == pytest.approx(other_s / (own_s + other_s), abs=0.03)
    assert share > 2 * MOST_INTERRUPTED


def test_launches_half_as_long_as_slices_are_no_measure_of_themselves() -> None:
    """More than half of them wait: a median would take the waiting for their time."""
    times = [9e-4 / LAUNCH_S * time_s for time_s in alone(slower=1.0)]
    waiting = beside(times)
    assert sum(after > 2 * before for before, after in zip(times, waiting, strict=True)) > 500
    assert interrupted_share(waiting) == pytest.approx(0.5, abs=0.03)


def test_no_launches_and_few_are_no_sign() -> None:
    assert interrupted_share([]) == 0.0
    assert interrupted_share([LAUNCH_S]) == 0.0


def test_of_several_looks_the_strongest_counts() -> None:
    looks = [{"taken_bytes": 5.0, "interrupted": 0.0}, {"interrupted": 0.4}, {}]
    assert worst(looks) == {"taken_bytes": 5.0, "interrupted": 0.4}
    assert worst([{}]) == {}


def test_what_is_said_names_the_sign_its_limit_and_the_remedy() -> None:
    (line,) = sharing_warnings("validation", {"interrupted": 0.48, "taken_bytes": 6e8})
    for part in ("validation of a shared GPU", "interrupted", "48.0%", "5.0%", "muxtune validate`"):
        assert part in line
    (line,) = sharing_warnings("profile", {"interrupted": 0.0, "taken_bytes": 5 * 2**30})
    for part in (
        "profile of a shared GPU",
        "taken_bytes",
        "5.0 GiB",
        "1.5 GiB",
        "muxtune profile`",
    ):
        assert part in line
    at_limit = {"interrupted": MOST_INTERRUPTED, "taken_bytes": MOST_TAKEN_BYTES}
    assert sharing_warnings("profile", at_limit) == []


def test_a_profile_of_a_shared_gpu_is_named_though_its_repeats_agree() -> None:
    """By the figures of an H100 beside a process that multiplies matrices: a spread of 1.8%."""
    steps = (WholeStep("x", (), (1.0,), 0),) * 3
    program = {"style": "captured"}
    profile = Profile({"kind": "gpu"}, {}, {}, "", {}, "", program, steps, {"spread": 0.018})
    assert profile_warnings(profile) == [], "of an older one nothing is known"
    signs = {"interrupted": 0.5, "taken_bytes": 2**34}
    shared = profile._replace(quality={"spread": 0.018, **signs})
    assert profile_warnings(shared) == sharing_warnings("profile", signs)
    assert len(sharing_warnings("profile", signs)) == 2
