"""A look at a GPU for signs that somebody else uses it (``muxtune.cost.sharing``)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from muxtune.cost.sharing import interrupted_share

LAUNCH_BYTES = 128 << 20  # negated in place: by their bandwidth 60 to 80 us of an H200 or H100
LAUNCH_S = 1e-4  # at most, far below a slice: on slower GPUs less is negated
RUN_S, LEAD_S = 0.1, 0.01  # on a GPU of one's own
MIN_LAUNCHES, MAX_LAUNCHES, WARM_UP = 256, 2048, 8


def signs_at_start(device: torch.device) -> dict[str, float]:
    """All signs, before this process has put anything on the device; none of a CPU. Takes about
    ``RUN_S``."""
    if device.type != "cuda":
        return {}
    return {"taken_bytes": _taken_bytes(device), **signs_now(device)}


def signs_now(device: torch.device) -> dict[str, float]:
    """The same without the memory, which by now is our own."""
    if device.type != "cuda":
        return {}
    return {"interrupted": round(interrupted_share(launches_s(device)), 5)}


def launches_s(device: torch.device) -> list[float]:
    """Seconds of each of some equal launches on a GPU, about ``RUN_S`` of them."""
    numbers = torch.zeros(LAUNCH_BYTES // 4, device=device)
    _run_s(numbers, 0, WARM_UP)  # the kernel is loaded
    whole_s = min(_run_s(numbers, 0, WARM_UP))
    numbers = numbers[: int(numbers.numel() * min(1.0, LAUNCH_S / whole_s))]
    launch_s = min(whole_s, LAUNCH_S)
    count = min(MAX_LAUNCHES, max(MIN_LAUNCHES, int(RUN_S / launch_s)))
    return _run_s(numbers, int(LEAD_S / launch_s), count)


def _run_s(numbers: Tensor, lead: int, count: int) -> list[float]:
    """``lead``: launches before, which keep the device busy until the host is ahead of it."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    for _ in range(lead):
        numbers.neg_()
    marks[0].record()
    for mark in marks[1:]:
        numbers.neg_()
        mark.record()
    torch.cuda.synchronize(numbers.device)
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]


def _taken_bytes(device: torch.device) -> int:
    """Of the device's memory, beside what this process has reserved; with its own context."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return total_bytes - free_bytes - torch.cuda.memory_reserved(device)


__all__ = ["launches_s", "signs_at_start", "signs_now"]
