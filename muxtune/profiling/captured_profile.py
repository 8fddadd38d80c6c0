"""Which points of the captured step's operations are measured, within a budget of seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch

from muxtune.cost.memory import STATIC_LOSS_ROWS
from muxtune.cost.shapes import ModelShape
from muxtune.profiling.captured_ops import CapturedOps, Point
from muxtune.profiling.compiling import Compilers, OpJob, StepJob
from muxtune.profiling.steps import is_lost

ROWS = (128, 256, 512, 1024, 2048, 3072, 4096, 8192)
SLOTS = (1, 4, 12, 32)
RANKS = (16, 32, 64)  # kernels pad the largest of a linear to one of these
# Besides, of products with adapters: five tiles of rows leave two of five multiprocessors idle; and
# between 1,024 and 2,048 lie those of many micro-batches.
SITE_ROWS = (640, 1536)
MAX_BENT_ROWS = 3
COMPILING_SHARE = 0.7  # of the operations' budget at most
REFINE_ERROR = 0.04
# Of what runs without adapters: (up to so many rows, in steps of so many). A library chooses other
# tiles every few rows where they are few.
PRODUCT_STEPS = ((512, 32), (1024, 64), (2048, 128), (1 << 20, 256))
# A chunk of the loss is computed whole: also just beyond those.
BEYOND_CHUNK = 32
# From the shortest sequences to long ones; packed attention's time depends on how they fill tiles.
MIXES = ("sst2", "sst2+openbookqa", "openbookqa", "rte+arc_easy", "gsm8k", "code_alpaca_2k+gsm8k")
METHOD_RANKS = {"ia3": (1,), "bottleneck": (8, 64), "prefix": (8, 64)}
Report = Callable[[float, str], None]


class Kept(Protocol):
    """Named parts of a profile, on disk; see ``muxtune.validation.records.Records``."""

    rows: list[dict[str, Any]]

    def has(self, name: str) -> bool: ...

    def begin(self, row: Mapping[str, Any]) -> None: ...

    def add(self, row: Mapping[str, Any]) -> None: ...


class Work(NamedTuple):
    """A method of ``CapturedOps``. ``needed``: no prediction can do without."""

    needed: bool
    name: str
    method: str
    arguments: tuple[Any, ...]


def rows_up_to(most: int) -> tuple[int, ...]:
    """Row counts to measure where micro-batches have at most so many."""
    return tuple(sorted({min(rows, most) for rows in ROWS}))


def measure_captured(
    shape: ModelShape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    budget_s: float,
    deterministic: bool,
    compilers: Compilers,
    rows: Sequence[int] = ROWS,
    slots: Sequence[int] = SLOTS,
    ranks: Sequence[int] = RANKS,
    steps: Sequence[StepJob] = (),
    clock: Callable[[], float] = time.perf_counter,
    report: Report,
    kept: Kept | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """(the profile's ``ops``, what was left out and why). The points that every prediction needs
    come first; later ones refine, and are left out when the budget is used up. ``steps``: whose
    kernels are compiled along with those of the operations. ``kept``: where points are put as they
    come; what ended the process before is left out."""
    end_s, left_out = time.perf_counter() + budget_s, []
    works = list(_works(sorted(rows), sorted(slots), sorted(ranks)))
    if device.type == "cuda":  # where it takes a second
        works += _large_losses(sorted(rows))
    jobs = [*_jobs(shape, works), *steps]
    if kept is None or not any(kept.has(_name(work)) for work in works):
        left_out += compilers.compile(jobs, report, COMPILING_SHARE * budget_s)
    bench = CapturedOps(shape, device, dtype, deterministic=deterministic, clock=clock)

    def measure(work: Work) -> None:
        left_s, name = end_s - time.perf_counter(), _name(work)
        if kept is not None and kept.has(name):
            row = next(row for row in kept.rows if row["name"] == name)
            bench.points += [Point(op, dict(sizes), s) for op, sizes, s in row.get("points", ())]
            left_out.extend([f"{work.name}: {row['error']}"] if row.get("error") else ())
            return
        if left_s <= 0 and not work.needed:
            left_out.append(f"{work.name}: the budget was used up")
            return
        report(1.0 - max(left_s, 0.0) / budget_s, work.name)
        first = len(bench.points)
        if kept is not None:
            kept.begin({"name": name})
        try:
            getattr(bench, work.method)(*work.arguments)
        except Exception as error:
            if work.needed or is_lost(device):
                raise
            text = " ".join(str(error).split())[:200]
            left_out.append(f"{work.name}: {type(error).__name__}: {text}")
        if kept is not None:
            # Sizes as pairs: their order is that of an operation's axes, and JSON may sort names.
            points = [(op, list(sizes.items()), s) for op, sizes, s in bench.points[first:]]
            kept.add({"name": name, "points": points})

    for work in works:
        measure(work)
    # Of what runs without adapters; the rest follows the waves of its tiles (``cost.tiles``).
    for count in bent_rows(bench):
        measure(Work(False, f"products of {count} rows", "products", (count,)))
    return bench.ops(), left_out


def _name(work: Work) -> str:
    return f"point {work.method}{work.arguments}"


def op_jobs(
    shape: ModelShape,
    rows: Sequence[int] = ROWS,
    slots: Sequence[int] = SLOTS,
    ranks: Sequence[int] = RANKS,
) -> list[OpJob]:
    """What a profile of these sizes has compiled."""
    return _jobs(shape, list(_works(sorted(rows), sorted(slots), sorted(ranks))))


def _jobs(shape: ModelShape, works: Sequence[Work]) -> list[OpJob]:
    """Products without adapters are a library's, and the loss has one kernel."""
    of_kernels = (work for work in works if work.method not in ("products", "large_loss"))
    return [OpJob(shape, work.method, work.arguments) for work in of_kernels]


def _works(rows: Sequence[int], slots: Sequence[int], ranks: Sequence[int]) -> Iterator[Work]:
    for count in rows:
        yield Work(True, f"{count} rows", "rows", (count,))
    for count in rows:
        for mix in MIXES:
            yield Work(True, f"attention of {count} rows, {mix}", "attention", (count, mix))
    for num_slots, rank in ((1, 1), (slots[0], ranks[-1]), (slots[-1], ranks[-1])):
        yield Work(True, "optimizer", "optimizer", (num_slots, rank))
    yield from _sites((rows[0], rows[-1]), slots, ranks, True)
    middle, many = slots[len(slots) // 2], rows[len(rows) // 2]
    if middle > 1 and len(ranks) > 1:
        name = f"{middle} adapters of mixed ranks"
        yield Work(False, name, "mixed_sites", (middle, ranks[-1], many))
    for rank in ranks:
        name = f"{slots[min(1, len(slots) - 1)]} adapters of rank {rank}, half of the rows filler"
        yield Work(False, name, "part_sites", (slots[min(1, len(slots) - 1)], rank, rows[-1]))
    yield from _sites((many,), slots, ranks, False)
    for method, sizes in METHOD_RANKS.items():
        for rank in sizes:
            for count in (rows[1], many, rows[-1]) if len(rows) > 3 else rows:
                name = f"{method} of rank {rank}, {count} rows"
                yield Work(False, name, "extra", (method, 2, rank, count))
            name, arguments = f"{method} of rank {rank}, half filler", (method, 2, rank, rows[-1])
            yield Work(False, name, "extra", (*arguments, rows[-1] // 2))
    besides = [count for count in SITE_ROWS if rows[0] < count < rows[-1]]
    between = [x for x in rows[1:-1] if x not in (many, *besides)]
    yield from _sites([*besides, *between[::-1]], slots, ranks, False)
    # Of what runs without adapters: another library's tiles, whose waves nobody tells.
    halfway = {(low + high) // 2 for low, high in pairwise(rows)}
    for count in product_rows(rows):
        method = "rows" if count in halfway else "products"
        yield Work(False, f"{method} of {count} rows", method, (count,))


def _large_losses(rows: Sequence[int]) -> Iterator[Work]:
    for count in sorted({*rows, *_beyond_chunks(rows[-1])}):
        name = f"loss of a large vocabulary, {count} rows"
        yield Work(False, name, "large_loss", (count,))


def _beyond_chunks(most: int) -> range:
    return range(STATIC_LOSS_ROWS + BEYOND_CHUNK, most, STATIC_LOSS_ROWS)


def product_rows(rows: Sequence[int]) -> list[int]:
    """Between those that are measured anyway."""
    found = set(_beyond_chunks(rows[-1]))
    for low, high in pairwise(rows):
        step = next(step for most, step in PRODUCT_STEPS if high <= most)
        found |= set(range(low + step, high, step))
    return sorted(found)


def _sites(
    counts: Sequence[int], slots: Sequence[int], ranks: Sequence[int], needed: bool
) -> Iterator[Work]:
    for count in counts:
        for num_slots in slots:
            for rank in ranks:
                name = f"{num_slots} adapters of rank {rank}, {count} rows"
                yield Work(needed, name, "sites", (num_slots, rank, count))


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
