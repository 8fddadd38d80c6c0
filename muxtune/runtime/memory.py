"""Measured memory: of the process on a CPU, of the allocator on a GPU; and when it runs short."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from muxtune.types import NO_EPOCH, PressureData

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # what clear_refs takes to reset VmHWM, see proc(5)


def give_back_freed() -> None:
    """What the C library keeps of freed memory, to the system: it counts as the process's own."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def reserved_bytes(device: torch.device) -> int:
    """What the allocator holds of a GPU; 0 on a CPU."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def give_back_cached(device: torch.device, graphs: bool = False) -> None:
    """What the allocator holds and nobody uses, to the GPU. ``graphs``: let go of may be graphs,
    which are in cycles: none may hold its memory until some later collection."""
    if device.type != "cuda":
        return
    if graphs:
        gc.collect()
    torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """That nobody holds of a GPU, the allocator neither; 0 on a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


@contextlib.contextmanager
def quick_collections() -> Iterator[None]:
    """Within, garbage is looked for in what is new only: a look through all that was imported
    would stop training for half a second. Where one is within another, that holds behind it,
    too."""
    is_inner = gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if is_inner:
            gc.collect()
            gc.freeze()


class MemoryMeter:
    """Peak bytes since ``reset``. On a CPU that is the process's resident set, the base model and
    the interpreter included; where Linux does not let it be reset, the peak since the start."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        self._highest_bytes = 0
        self._can_restart = self._restart()

    def mark(self) -> None:
        """From here on counts for ``recent_peak_bytes``; ``peak_bytes`` does not forget."""
        self._highest_bytes = max(self._highest_bytes, self._counter_bytes())
        self._restart()

    def peak_bytes(self) -> int:
        return max(self._highest_bytes, self._counter_bytes())

    def recent_peak_bytes(self) -> int:
        """Since ``mark``; where the system's counter cannot be restarted, what is held now."""
        return self._counter_bytes() if self._can_restart else self.current_bytes()

    def num_retries(self) -> int:
        """How often the GPU's allocator had to give cached memory back to satisfy a request: it
        was about to fail."""
        if self.device.type != "cuda":
            return 0
        return int(torch.cuda.memory_stats(self.device).get("num_alloc_retries", 0))

    def _restart(self) -> bool:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        give_back_freed()
        try:
            _CLEAR.write_text(_RESET_PEAK)
        except OSError:
            return False
        return True

    def _counter_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _status_bytes("VmHWM") or _rusage_bytes()

    def current_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return _status_bytes("VmRSS") or _rusage_bytes()


class MemoryMonitor:
    """Tells, once per plan epoch of an instance, that more is used than ``share`` of the limit.

    Instances of one process share its memory, so their use is held against the sum of their
    limits. Only what a plan can change counts: not what the process held besides the weights when
    the first instance started (on a CPU the interpreter and its libraries, on a GPU what else has
    computed there), nor a GPU's context. The limit should leave room for these.
    """

    def __init__(self, meter: MemoryMeter, share: float) -> None:
        self.meter, self.share = meter, share
        self._others_bytes: int | None = None
        self._retries = 0
        self._idle_bytes = 0
        self._watched: dict[str, int] = {}  # instance id -> the epoch that its peak is taken of
        self._told: dict[str, int] = {}  # instance id -> the last epoch that was told of

    def begin(self, weight_bytes: int) -> None:
        """An instance stands ready with its weights in memory; the first one counts."""
        if self._others_bytes is None:
            self._others_bytes = max(0, self.meter.current_bytes() - weight_bytes)
            self._retries = self.meter.num_retries()

    def check(
        self,
        instance_id: str,
        epoch: int,
        limit_bytes: int,
        idle_bytes: Callable[[], int] = int,
    ) -> PressureData | None:
        """Called between rounds. ``limit_bytes``: of all instances together. ``idle_bytes``: what
        captured passes hold without the allocator's telling."""
        if not self.share or epoch == NO_EPOCH:
            return None
        if self._watched.get(instance_id) != epoch:  # a plan took over; it has not run yet
            self._watched[instance_id] = epoch
            self.meter.mark()
            self._idle_bytes = idle_bytes()  # graphs are captured when a plan takes over
            return None
        if self._told.get(instance_id) == epoch:
            return None
        allowed_bytes = int(limit_bytes * self.share)
        used_bytes = self._used_bytes(allowed_bytes)
        if used_bytes <= allowed_bytes:
            return None
        self._told[instance_id] = epoch
        return PressureData(used_bytes, allowed_bytes)

    def _used_bytes(self, allowed_bytes: int) -> int:
        used_bytes = self.meter.recent_peak_bytes() - (self._others_bytes or 0) + self._idle_bytes
        retries, self._retries = self._retries, self.meter.num_retries()
        return max(used_bytes, allowed_bytes + 1) if self._retries > retries else used_bytes


def _status_bytes(field: str) -> int:
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0


def _rusage_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
