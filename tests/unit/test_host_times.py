"""A host's captures in a profile beside those in its runs."""

from typing import Any

import pytest

from experiments.gpu_validation.host_times import in_profile, in_runs
from muxtune.errors import ConfigError


def test_captures_are_added_up_by_htask() -> None:
    points = [(1, 0.2), (0, 0.1), (0, 0.1), (1, 0.3), (0, 0.3)]
    profile = {
        "ops": {"capture": {"points": [{"first": f, "median_s": s} for f, s in points]}}
    }  # fmt: skip
    assert in_profile(profile) == pytest.approx((0.5, 0.4, 0.6))


def test_plans_of_several_htasks_are_left_out_of_runs() -> None:
    log: dict[str, Any] = {
        "lines": ["place a on gpu0", "plan gpu0: ax4", "plan gpu0: ax4 | bx4", "plan gpu0: bx4"],
        "rounds": [[0, 1.0, 0.1], [0, 1.1, 0.1], [1, 2.0, 0.1], [2, 3.0, 0.1], [2, 3.1, 0.1]],
        "spans": [
            ["capture", 0.5, 0.4], ["load", 1.3, 9.0], ["capture", 1.5, 9.0], ["capture", 2.5, 0.6],
        ],
    }  # fmt: skip
    assert in_runs([{"measured": log}]) == pytest.approx((0.5, 0.4, 0.6))


def test_folders_without_captures_are_told_what_they_lack() -> None:
    with pytest.raises(ConfigError, match=r"profile\.json lacks ops\.capture.*Profile a GPU"):
        in_profile({"ops": {}})
    with pytest.raises(ConfigError, match=r"dynamic\.jsonl lacks a plan.*Validate on a GPU"):
        in_runs([])
