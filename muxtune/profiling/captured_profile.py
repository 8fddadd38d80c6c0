"""Which points of the captured step's operations are measured, within a budget of seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

from muxtune.cost.shapes import ModelShape
from muxtune.profiling.captured_ops import CapturedOps

ROWS = (128, 512, 2048, 8192)
SLOTS = (1, 8, 32)
RANKS = (16, 64)
MAX_BENT_ROWS = 4
REFINE_ERROR = 0.04
Report = Callable[[float, str], None]


def measure_captured(
    shape: ModelShape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    budget_s: float,
    deterministic: bool,
    rows: Sequence[int] = ROWS,
    slots: Sequence[int] = SLOTS,
    ranks: Sequence[int] = RANKS,
    clock: Callable[[], float] = time.perf_counter,
    report: Report,
) -> tuple[dict[str, Any], list[str]]:
    """(the profile's ``ops``, what was left out and why). The points that every prediction needs
    come first; later ones refine, and are left out when the budget is used up."""
    bench = CapturedOps(shape, device, dtype, deterministic=deterministic, clock=clock)
    end_s, left_out = time.perf_counter() + budget_s, []
    for needed, name, work in _works(bench, sorted(rows), sorted(slots), sorted(ranks)):
        left_s = end_s - time.perf_counter()
        if left_s <= 0 and not needed:
            left_out.append(f"{name}: the budget was used up")
            continue
        report(1.0 - max(left_s, 0.0) / budget_s, name)
        try:
            work()
        except Exception as error:
            if needed:
                raise
            left_out.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return bench.ops(), left_out


def _works(
    bench: CapturedOps, rows: Sequence[int], slots: Sequence[int], ranks: Sequence[int]
) -> Iterator[tuple[bool, str, Callable[[], None]]]:
    for count in rows:
        yield True, f"{count} rows", lambda count=count: bench.rows(count)
    for num_rows, length in _attention_points(rows):
        yield (
            True,
            f"attention of {num_rows} rows, {length} tokens each",
            lambda a=num_rows, b=length: bench.attention(a, b),
        )
    for num_slots, rank in ((1, 1), (slots[0], ranks[-1]), (slots[-1], ranks[-1])):
        yield True, "optimizer", lambda n=num_slots, r=rank: bench.optimizer(n, r)
    for count in (rows[0], rows[-1], *rows[1:-1]):
        for num_slots in slots:
            for rank in ranks:
                yield _site_work(bench, num_slots, rank, count, count in (rows[0], rows[-1]))
    for method in ("ia3", "bottleneck", "prefix"):
        for rank in (8, 64) if method != "ia3" else (1,):
            for count in (rows[1], rows[-1]) if len(rows) > 2 else rows:
                yield (
                    False,
                    f"{method}, {count} rows",
                    lambda m=method, r=rank, c=count: bench.extra(m, 2, r, c),
                )
    bent = bent_rows(bench)
    for count in bent:
        yield False, f"{count} rows", lambda count=count: bench.rows(count)
    for count in bent:
        for num_slots in slots:
            for rank in ranks:
                yield _site_work(bench, num_slots, rank, count, False)


def _site_work(
    bench: CapturedOps, num_slots: int, rank: int, rows: int, needed: bool
) -> tuple[bool, str, Callable[[], None]]:
    name = f"{num_slots} adapters of rank {rank}, {rows} rows"
    return needed, name, lambda: bench.sites(num_slots, rank, rows)


def _attention_points(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    for num_rows in (rows[0], rows[len(rows) // 2], rows[-1]):
        for length in (32, 128, 512, 1024):
            if length <= num_rows:
                yield num_rows, length


def bent_rows(bench: CapturedOps) -> list[int]:
    """Midpoints to add: of the neighbouring rows between which the cost of a row changes most. A
    time that is a straight line through zero has the same cost everywhere."""
    frozen = [op for name, op in bench.ops().items() if name.startswith("frozen_")]
    totals: dict[float, float] = {}
    for op in frozen:
        for point in op["points"]:
            totals[point["rows"]] = totals.get(point["rows"], 0.0) + point["median_s"]
    steps = list(pairwise(sorted(totals)))
    slopes = [(totals[b] - totals[a]) / (b - a) for a, b in steps]
    bends = []
    for index, (low, high) in enumerate(steps):
        near = [slopes[i] for i in (index - 1, index + 1) if 0 <= i < len(slopes)]
        change = max((abs(slopes[index] - other) for other in near), default=0.0)
        # How far a line could be off in the middle, over the time there.
        off = change * (high - low) / 4 / ((totals[low] + totals[high]) / 2)
        bends.append((off, int(128 * round((low * high) ** 0.5 / 128)) or int((low + high) / 2)))
    chosen = [middle for off, middle in sorted(bends, reverse=True) if off > REFINE_ERROR]
    return sorted(set(chosen[:MAX_BENT_ROWS]) - {int(count) for count in totals})
