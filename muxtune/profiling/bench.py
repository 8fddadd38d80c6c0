"""Timing of short operations, robust on a shared machine.

- Weights and saved activations come out of a pool larger than the last-level cache, one copy per
  layer in turn, because in a real pass every layer's weights come from memory. What a previous
  operation has just produced is fresh, so it is copied right before (outside of the clock).
- A sample runs the forward of all copies and then their backward in reverse order.
- Repeats of all operations are interleaved in sweeps over the whole time budget, so that a burst
  of somebody else's work spoils some repeats of every operation, not all repeats of one. Sweeps
  that were slow as a whole are dropped (``quiet_sweeps``), and the median of the rest counts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

POOL_BYTES = 96 << 20
SAMPLE_S = 0.025  # a longer sample, making its tensors included, adds nothing but time
MAX_COPIES = 24
_Value = TypeVar("_Value")


class _Clock(Protocol):
    def time(self, name: str, work: Callable[[], Any]) -> Any: ...

    def totals_s(self) -> dict[str, float]: ...


class HostClock:
    """Time of each piece of work on the CPU, by ``now`` in seconds."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._totals: dict[str, float] = {}
        self._now = now

    def time(self, name: str, work: Callable[[], _Value]) -> _Value:
        start = self._now()
        result = work()
        spent = self._now() - start
        self._totals[name] = self._totals.get(name, 0.0) + spent
        return result

    def totals_s(self) -> dict[str, float]:
        totals, self._totals = self._totals, {}
        return totals


class CudaClock:
    """Device time between events, launches included where the host is the slower side."""

    def __init__(self) -> None:
        self._events: list[tuple[str, Any, Any]] = []

    def time(self, name: str, work: Callable[[], _Value]) -> _Value:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = work()
        stop.record()
        self._events.append((name, start, stop))
        return result

    def totals_s(self) -> dict[str, float]:
        torch.cuda.synchronize()
        totals: dict[str, float] = {}
        for name, start, stop in self._events:
            totals[name] = totals.get(name, 0.0) + start.elapsed_time(stop) / 1e3
        self._events.clear()
        return totals


class Bench:
    """Where operations take their tensors from and where their time goes."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.device, self.dtype = device, dtype
        self.clock: _Clock = CudaClock() if device.type == "cuda" else HostClock(now)
        numbers = POOL_BYTES // dtype.itemsize
        generator = torch.Generator().manual_seed(0)
        self._pool = torch.randn(numbers, generator=generator).to(device, dtype)
        self._at = 0

    def cold(self, *sizes: int) -> Tensor:
        """A tensor that was not touched lately: the next stretch of the pool."""
        count = math.prod(sizes)
        if count > self._pool.numel():
            return torch.randn(sizes, device=self.device, dtype=self.dtype)
        if self._at + count > self._pool.numel():
            self._at = 0
        # 64-byte steps keep the alignment that real tensors have.
        start, step = self._at, 64 // self.dtype.itemsize
        self._at += -(-count // step) * step
        return self._pool[start : start + count].view(sizes)

    def fresh(self, *sizes: int) -> Tensor:
        """A tensor that has just been written."""
        return self.cold(*sizes).clone()

    def time(self, name: str, work: Callable[[], _Value]) -> _Value:
        return self.clock.time(name, work)


# Runs the forward up to its yield, then the backward; times both with ``bench.time(name, ...)``.
Body = Callable[[Bench], Generator[None, None, None]]


class Case(NamedTuple):
    """One point of one or more operations: its sizes by axis, the work, and the bytes that one
    copy touches (which decides how many copies rotate)."""

    sizes: Mapping[str, float]
    body: Body
    bytes: float


class CaseKey(NamedTuple):
    name: str
    sizes: tuple[tuple[str, float], ...]


def sample(bench: Bench, case: Case, copies: int) -> dict[str, float]:
    """Mean seconds of each timed name over ``copies`` rotating copies."""
    bodies = [case.body(bench) for _ in range(copies)]
    for body in bodies:
        next(body)
    while bodies:
        next(bodies.pop(), None)
    return {name: total / copies for name, total in bench.clock.totals_s().items()}


def copies_of(bench: Bench, case: Case) -> int:
    """Enough copies to leave the cache, few enough to end in ``SAMPLE_S``."""
    wanted = min(MAX_COPIES, max(2, math.ceil(0.75 * POOL_BYTES / max(case.bytes, 1.0))))
    sample(bench, case, 1)
    start = time.perf_counter()
    sample(bench, case, 1)
    once = time.perf_counter() - start
    return max(1, min(wanted, int(SAMPLE_S / max(once, 1e-7))))


def quiet_sweeps(times: np.ndarray) -> np.ndarray:
    """Which sweeps to keep, of ``times`` [sweeps, series].

    A sweep's slowness is the median over all series of its time over the series' least time.
    Kept: sweeps at most 15% slower than the fastest sweep, and at least half of them (or three).
    """
    slowness = np.median(times / times.min(axis=0), axis=1)
    order = np.argsort(slowness, kind="stable")
    least = min(len(order), max(3, (len(order) + 1) // 2))
    keep = slowness <= 1.15 * slowness.min()
    keep[order[:least]] = True
    return keep


def summarise(samples: Sequence[float]) -> dict[str, float]:
    """Median, 5% and 95% quantiles and count, as a profile's point holds them."""
    low, middle, high = (float(np.quantile(samples, q)) for q in (0.05, 0.5, 0.95))
    return {"median_s": middle, "p05_s": low, "p95_s": high, "repeats": len(samples)}


class Sweeper:
    """Holds the cases, repeats them in sweeps, and turns the samples into a profile's ops."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._cases: list[tuple[Case, int]] = []
        self._sweeps: list[dict[CaseKey, float]] = []

    def add(self, cases: Sequence[Case]) -> None:
        """Warm the cases up, and have them take part in the sweeps."""
        self._cases += [(case, copies_of(self.bench, case)) for case in cases]

    def rough_s(self, case: Case) -> float:
        """A quick time of a case, all of its names together, without taking it in."""
        copies = copies_of(self.bench, case)
        return min(sum(sample(self.bench, case, copies).values()) for _ in range(2))

    def sweep(self) -> None:
        """One repeat of every case. Alternate sweeps run backwards, against slow drifts."""
        result: dict[CaseKey, float] = {}
        order = self._cases if len(self._sweeps) % 2 == 0 else self._cases[::-1]
        for case, copies in order:
            for name, seconds in sample(self.bench, case, copies).items():
                result[_key(name, case)] = seconds
        self._sweeps.append(result)

    @property
    def num_sweeps(self) -> int:
        return len(self._sweeps)

    def ops(self) -> dict[str, dict[str, Any]]:
        """The profile's ``ops`` section."""
        keys = list(self._sweeps[0])
        times = np.array([[sweep[key] for key in keys] for sweep in self._sweeps])
        kept = times[quiet_sweeps(times)]
        ops: dict[str, dict[str, Any]] = {}
        for column, key in enumerate(keys):
            axes = [axis for axis, _ in key.sizes]
            op = ops.setdefault(key.name, {"unit": "s", "axes": axes, "points": []})
            op["points"].append({**dict(key.sizes), **summarise(kept[:, column].tolist())})
        for op in ops.values():
            op["points"].sort(key=lambda point: [point[axis] for axis in op["axes"]])
        return dict(sorted(ops.items()))


def _key(name: str, case: Case) -> CaseKey:
    return CaseKey(name, tuple(case.sizes.items()))
