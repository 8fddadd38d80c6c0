"""What a training run says of the devices that it was planned for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from muxtune.commands.train import device_warning
from muxtune.config import ClusterConfig


@pytest.mark.parametrize(
    ("device", "computes_on", "warns"),
    [("local", "cuda", True), ("local", "cpu", False), ("H100-SXM", "cuda", False)],
)
def test_a_gpu_that_is_planned_for_as_a_cpu_is_told(
    device: str, computes_on: str, warns: bool
) -> None:
    config: Any = SimpleNamespace(cluster=ClusterConfig(device=device))
    said = device_warning(config, SimpleNamespace(type=computes_on))
    assert bool(said) is warns and ("cluster.device=H100-SXM" in said) is warns
