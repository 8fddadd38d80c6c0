"""Products of other base models beside a profile's predictions (experiments/gpu_validation)."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.gpu_validation.other_products import errors
from muxtune.cost import ops
from muxtune.cost.captured import CapturedCostModel
from muxtune.cost.schema import load_profile
from muxtune.cost.shapes import model_shape
from muxtune.cost.shipped import profile_path

PROFILE: Path = profile_path("h100-sxm_llama-2-7b", shipped_only=True)


def test_errors_are_those_of_a_blocks_linears_together():
    model = CapturedCostModel(model_shape("llama-2-13b"), load_profile(PROFILE))
    names = ("site_forward.5120x15360", "site_forward.5120x5120")
    sizes = {"slots": 8.0, "rank": 64.0, "rows": 1536.0}
    first_s, second_s = (
        model.op_time(ops.Op(n, ops.BACKBONE, False, 1, (8.0, 64.0, 1536.0), 0, 0, 0, 1)).value_s
        for n in names
    )
    points = [
        {"name": names[0], "sizes": sizes, "seconds": [first_s]},
        {"name": names[1], "sizes": sizes, "seconds": [9.0, 2.0 * second_s, 0.0]},
    ]
    (row,) = errors({"points": {"llama-2-13b": points}}, PROFILE)
    assert (row["model"], row["kind"], row["size"]) == (
        "llama-2-13b", "site_forward", (8.0, 64.0, 1536.0),
    )  # fmt: skip
    together = (first_s + second_s) / (first_s + 2.0 * second_s) - 1.0
    assert row["error"] == pytest.approx(together) and row["worst"] == pytest.approx(-0.5)
