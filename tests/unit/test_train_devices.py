"""What a training run says of the devices that it was planned for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from muxtune import build
from muxtune.commands.real_runs import device_notice
from muxtune.config import ClusterConfig


@pytest.mark.parametrize(
    ("device", "computes_on", "has_gpu", "expected"),
    [
        ("local", "cuda", True, "Say which GPU it is, such as cluster.device=H100-SXM"),
        ("local", "cpu", True, "a GPU, which cluster=local_cpu leaves idle"),
        ("local", "cpu", False, ""),
        ("H100-SXM", "cuda", True, ""),
        ("H100-SXM", "cpu", False, "is planned for, but this run computes on the CPU"),
    ],
)
def test_devices_that_do_not_fit_what_is_planned_for_are_told(
    device: str, computes_on: str, has_gpu: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "torch_sees_cuda", lambda: has_gpu)
    config: Any = SimpleNamespace(cluster=ClusterConfig(device=device))
    said = device_notice(config, computes_on)
    assert expected in said and bool(said) is bool(expected)
