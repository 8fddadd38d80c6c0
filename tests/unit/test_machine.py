"""A profile carried to another machine of its kind."""

from __future__ import annotations

import pytest

from muxtune.cost.calibration import WholeStep
from muxtune.cost.machine import Speed, carried
from muxtune.cost.schema import Profile
from muxtune.errors import ProfileError
from muxtune.types import PassLoad, ShapeKey


def point(rows: float) -> dict[str, float]:
    return {"rows": rows, "median_s": 1.0, "p05_s": 0.9, "p95_s": 1.1, "repeats": 5}


def profile() -> Profile:
    op = {"unit": "s", "axes": ["rows"], "points": [point(128.0), point(4096.0)]}
    steps = tuple(
        WholeStep(f"{rows}", (PassLoad(ShapeKey(64, rows // 64, ()), 0.0, 0.0, ()),), (1.0,), 0)
        for rows in (128, 4096)
    )
    ops = {"frozen_forward.8x8": op, "add_norm_forward.8": op, "join": op}
    return Profile({}, {}, {}, "", ops, "abc", steps=steps)


def check(**changes: object) -> dict[str, object]:
    many = [[rows, 1.0, 0.95 if rows > 128 else 1.0] for rows in (128, 1024, 2048, 4096)]
    return {"profile": "abc", "products": many, "steps": many, "ops": {}, **changes}


def test_a_faster_machine_is_faster_where_power_limits_it() -> None:
    found = carried(profile(), check())
    few, many = (item["median_s"] for item in found.ops["frozen_forward.8x8"]["points"])
    assert few == pytest.approx(1.0, abs=0.005) and many == pytest.approx(0.95, abs=0.005)
    assert [step.median_s for step in found.steps] == pytest.approx([few, many], abs=1e-9)
    assert found.ops["add_norm_forward.8"] == profile().ops["add_norm_forward.8"]
    assert found.content_hash == "abc"


def test_takeovers_are_those_of_the_machine() -> None:
    here = {"unit": "s", "axes": ["rows"], "points": [point(1.0)]}
    assert carried(profile(), check(ops={"join": here})).ops["join"] is here


def test_one_odd_product_does_not_decide() -> None:
    ratios = [(2048.0, 1.0)] * 9 + [(2048.0, 2.0)]
    assert Speed.of(ratios).at(2048.0) == pytest.approx(1.0, abs=0.01)
    assert Speed.of([]).at(64.0) == 1.0


def test_a_check_of_another_profile_is_refused() -> None:
    with pytest.raises(ProfileError, match="Check it again"):
        carried(profile(), check(profile="other"))
