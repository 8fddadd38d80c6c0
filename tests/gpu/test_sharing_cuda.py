"""A GPU beside another process that computes on it: found out by launches that wait."""

from __future__ import annotations

import time

import pytest
import torch

from experiments.gpu_validation.shared import other_process
from muxtune.cost.sharing import MOST_INTERRUPTED, MOST_TAKEN_BYTES, sharing_warnings
from muxtune.profiling.sharing import signs_at_start, signs_now

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")


def test_another_process_that_computes_is_told_from_none() -> None:
    with other_process("cuda") as other:
        other.imported()
        assert signs_now(CUDA)["interrupted"] <= MOST_INTERRUPTED
        other.begin()
        looks = [signs_now(CUDA) for _ in range(3)]
    assert min(look["interrupted"] for look in looks) > 2 * MOST_INTERRUPTED
    assert "interrupted" in sharing_warnings("profile", looks[0])[0]
    assert signs_now(CUDA)["interrupted"] <= MOST_INTERRUPTED, "it has ended"


def test_memory_is_ours_as_long_as_we_reserved_it() -> None:
    before = signs_at_start(CUDA)["taken_bytes"]
    held = torch.empty(2 * MOST_TAKEN_BYTES, dtype=torch.uint8, device=CUDA)
    assert abs(signs_at_start(CUDA)["taken_bytes"] - before) < MOST_TAKEN_BYTES // 8
    assert held.numel() == 2 * MOST_TAKEN_BYTES


def test_a_look_is_short() -> None:
    """A profile takes two, and the time on a device is dear."""
    signs_now(CUDA)
    begun_s = time.perf_counter()
    signs_now(CUDA)
    assert time.perf_counter() - begun_s < 0.15
