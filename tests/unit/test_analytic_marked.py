"""What was measured of one program says nothing of another, and what was not measured says so."""

from __future__ import annotations

import pytest

from muxtune import build
from muxtune.config import ClusterConfig, CommonConfig, CostConfig, ModelConfig

PROFILE = "h100-sxm_llama-2-7b"


def config(style: str, model: str = "llama-2-7b") -> CommonConfig:
    return CommonConfig(
        model=ModelConfig(name=model),
        cluster=ClusterConfig(device="H100"),
        cost=CostConfig(kind="profile", path=PROFILE, style=style),
    )


@pytest.mark.parametrize(
    ("style", "model", "measured"),
    [("graph", "llama-2-7b", True), ("eager", "llama-2-7b", False), ("graph", "opt-30b", False)],
)
def test_a_captured_profile_is_of_captured_steps(style: str, model: str, measured: bool) -> None:
    """It made HF PEFT, which launches every kernel, six times as fast as it is."""
    book = build.published_costs(config(style, model))
    assert book.is_measured(model, "H100-SXM") is measured
    assert ("analytic" in book.note(model, "H100-SXM")) is not measured
