"""The suite of a validation: step configurations drawn by the hash of the profile.

The seed is the content hash of the frozen profile, so what is asked is unknown until the profile
is fixed, and everybody who has the profile can draw the same suite. Half of the cases lie off the
profile's grid (row counts and ranks that were not measured); some are of base models that were not
profiled. What is predicted not to fit is drawn again: the planner would refuse it. A few cases at
the end are drawn to nearly fill the memory, where a prediction that is too low shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from muxtune.cost.shapes import ModelShape
from muxtune.errors import ConfigError
from muxtune.planning.step_builder import StepBuilder, pass_load
from muxtune.profiling.step_cases import TARGETS, StepCase, StepTask, mean_tokens
from muxtune.profiling.steps import whole_rounds
from muxtune.workload.synthetic import SyntheticLibrary

PLANS_PER_WORKLOAD = 15  # as far as there are so many that run differently
NUM_WORKLOADS = 3
NUM_SWEEPS = 2
MAX_LENGTH_TOKENS = 1024  # longer ones take another form of attention, which profiles do not hold
_MAX_DRAWS = 200
_HISTOGRAMS = ("sst2", "openbookqa", "rte", "gsm8k", "arc_easy", "arc_challenge", "code_alpaca_2k")
_GRID_RANKS, _OTHER_RANKS = (16, 64), (8, 12, 24, 32, 40, 48)
_FILLED = 0.4, 1.1  # of a task's share of a micro-batch, by the sequences of a step
_TASKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_NEAR_LIMIT_RANKS, _MOST_NEAR_LIMIT, _LEAST_FULL = (32, 48, 64), 64, 0.85
Fits = Callable[[StepCase], bool]


class SuiteOptions(NamedTuple):
    """``shapes``: the profiled one first. ``grid_rows``: row counts that were measured, the
    largest is the limit. ``methods``: those besides LoRA that the program knows. ``min_rows``: of
    a micro-batch. ``own_every``: every so many single cases are of the profiled base model, which
    may have many more blocks than the others; 0: two of three, and all workloads."""

    num_cases: int
    shapes: tuple[ModelShape, ...]
    grid_rows: tuple[int, ...]
    max_tasks: int = 32
    methods: tuple[str, ...] = ("ia3", "bottleneck", "prefix")
    min_rows: int = 0
    own_every: int = 0

    def is_own(self, number: int) -> bool:
        if len(self.shapes) == 1:
            return True
        return number % self.own_every == 0 if self.own_every else number % 3 != 2

    @property
    def rows(self) -> tuple[int, ...]:
        fitting = tuple(rows for rows in self.grid_rows[1:] if rows >= self.min_rows)
        return fitting or self.grid_rows[-1:]

    def workload_shape(self, workload: int) -> ModelShape:
        others = self.shapes[1:]
        return others[workload % len(others)] if others and self.own_every else self.shapes[0]


def seed_of(content_hash: str) -> int:
    return int(content_hash[:15], 16)


def draw_suite(content_hash: str, options: SuiteOptions, fits: Fits) -> list[StepCase]:
    """``NUM_WORKLOADS`` workloads of ``PLANS_PER_WORKLOAD`` plans each, and single cases (fewer of
    both in a small suite). Cases of one shape come one after the other, in ``NUM_SWEEPS`` sweeps:
    a suite whose time ends early has something of everything."""
    random = np.random.default_rng(seed_of(content_hash))
    num_plans = min(NUM_WORKLOADS, options.num_cases // (2 * PLANS_PER_WORKLOAD))
    cases: list[StepCase] = []
    for workload in range(num_plans):
        cases += _plans(random, options, fits, workload)
    number = 0
    while len(cases) < options.num_cases:
        cases.append(_fitting(fits, lambda n=number: _single(random, options, n)))
        number += 1
    order = {shape.name: place for place, shape in enumerate(options.shapes)}

    def place(numbered: tuple[int, StepCase]) -> tuple[int, int]:
        number, case = numbered
        sweep = 0 if "workload" in case.labels else number * NUM_SWEEPS // options.num_cases
        # Sweeps run to and fro: one shape's model stays for the next sweep.
        return sweep, order[case.shape.name] * (-1 if sweep % 2 else 1)

    return [case for _, case in sorted(enumerate(cases), key=place)]


def draw_near_limit(
    content_hash: str,
    options: SuiteOptions,
    bytes_of: Callable[[StepCase], float],
    limit_bytes: float,
    num_cases: int,
) -> list[StepCase]:
    """Steps of the profiled base model with as many large LoRA tasks as ``bytes_of`` says to fit
    into ``limit_bytes``; fewer than ``num_cases`` where ``_MOST_NEAR_LIMIT`` do not fill it."""
    random, found = np.random.default_rng(seed_of(content_hash) + 3), []
    for number in range(num_cases):
        case = _filling(random, options, lambda case: bytes_of(case) <= limit_bytes, number)
        if case is not None and bytes_of(case) >= _LEAST_FULL * limit_bytes:
            found.append(case)
    return found


def _filling(
    random: np.random.Generator, options: SuiteOptions, fits: Fits, number: int
) -> StepCase | None:
    """With the most tasks that fit; None where not even one does."""
    rows, chunk = int(_pick(random, options.grid_rows[-3:])), 32
    groups, last = int(_pick(random, (1, 1, 2))), None
    labels = {"grid": False, "mixed": False, "profiled_shape": True, "near_limit": True}
    tasks: list[StepTask] = []
    while len(tasks) < min(_MOST_NEAR_LIMIT, rows // chunk):
        rank, name = int(_pick(random, _NEAR_LIMIT_RANKS)), str(_pick(random, _HISTOGRAMS))
        tasks.append(StepTask("lora", rank, name, chunk, int(_pick(random, (1, 2, 4)))))
        case = StepCase(
            f"near the limit {number}", options.shapes[0], tuple(tasks),
            _split(len(tasks), min(groups, len(tasks))), chunk, rows, "chunk", labels,
        )  # fmt: skip
        if not fits(case):
            return last
        last = case
    return last


def _fitting(fits: Fits, draw: Callable[[], StepCase]) -> StepCase:
    for _ in range(_MAX_DRAWS):
        case = draw()
        if fits(case):
            return case
    raise ConfigError(
        "max_rows",
        f"{_MAX_DRAWS} drawn cases did not fit the device's memory",
        "Lower max_rows or max_tasks, or give smaller models",
    )


def _pick(random: np.random.Generator, values: Sequence[Any]) -> Any:
    return values[int(random.integers(len(values)))]


def _single(random: np.random.Generator, options: SuiteOptions, number: int) -> StepCase:
    """Every other one off the grid; some of other base models than the profiled."""
    off_grid = number % 2 == 1
    shape = options.shapes[0] if options.is_own(number) else _pick(random, options.shapes[1:])
    max_rows = options.grid_rows[-1]
    rows = _pick(random, options.rows)
    if off_grid:
        least = min(max(options.grid_rows[0], 128, options.min_rows), max_rows // 2)
        rows = int(np.exp(random.uniform(np.log(least), np.log(max_rows))))
    chunk = _pick(random, (32, 64, 128))
    most = max(1, min(options.max_tasks, rows // chunk))
    count = _pick(random, [n for n in _TASKS if n <= most])
    mixed = number % 8 in (3, 6)  # once on the grid, once off it
    groups = min(count, _pick(random, (1, 1, 1, 2, 3, 4)))
    share = rows // (chunk * -(-count // groups)) * chunk
    tasks = tuple(
        _task(
            random,
            max(chunk, min(MAX_LENGTH_TOKENS, share)),
            options.methods if mixed else (),
            off_grid,
            share,
        )
        for _ in range(count)
    )
    case = StepCase(
        f"case {number:03d}", shape, tasks, _split(count, groups), chunk, rows, "chunk", {}
    )
    measured = all(x.shapes[0].padded_tokens in options.grid_rows for x in case.plan().htasks)
    own = shape == options.shapes[0]
    labels = {"grid": measured and not off_grid, "mixed": mixed, "profiled_shape": own}
    return case._replace(labels=labels)


def _task(
    random: np.random.Generator,
    longest: int,
    methods: Sequence[str],
    off_grid: bool,
    share_rows: int,
) -> StepTask:
    method = _pick(random, ("lora", *methods)) if methods else "lora"
    rank = int(_pick(random, _OTHER_RANKS if off_grid else _GRID_RANKS))
    targets = TARGETS[method]
    if method == "lora":
        targets = _pick(random, (targets, targets, ("q_proj", "v_proj"), ("q_proj", "o_proj")))
    name, most = str(_pick(random, _HISTOGRAMS)), longest
    if random.random() >= 0.5:
        most = max(32, longest // 2)
    filled = random.uniform(*_FILLED) * share_rows / mean_tokens(name, most)
    return StepTask(method, rank, name, int(most), max(1, round(filled)), 0.0, targets)


def _split(count: int, groups: int) -> tuple[tuple[int, ...], ...]:
    ends = [count * group // groups for group in range(groups + 1)]
    return tuple(tuple(range(low, high)) for low, high in pairwise(ends) if high > low)


def _plans(
    random: np.random.Generator, options: SuiteOptions, fits: Fits, workload: int
) -> list[StepCase]:
    """The same tasks, run by plans that differ in grouping, chunk length and micro-batch, and so in
    their passes."""
    count = min(options.max_tasks, (4, 6, 8)[workload % 3])
    shape, rows = options.workload_shape(workload), options.grid_rows[-1]
    longest = max(32, min(256, rows // count))
    tasks = tuple(_task(random, longest, (), False, rows // count) for _ in range(count))
    found: list[StepCase] = []
    known: set[object] = set()
    variants = [
        (groups, chunk, part)
        for part in (1, 2, 4, 8)
        for groups in (1, 2, count)
        for chunk in (32, 64, 128)
    ]
    for place in random.permutation(len(variants)):
        groups, chunk, part = variants[int(place)]
        own = shape == options.shapes[0]
        labels = {"workload": workload, "profiled_shape": own, "grid": False, "mixed": False}
        case = StepCase(
            f"workload {workload} plan {len(found):02d}", shape, tasks,
            _split(count, groups), chunk, rows // part, "chunk", labels,
        )  # fmt: skip
        passes = _passes(case)
        if fits(case) and passes not in known:
            found.append(case)
            known.add(passes)
        if len(found) == PLANS_PER_WORKLOAD:
            break
    return found


def _passes(case: StepCase) -> object:
    """What the device is to do: plans that differ in words only, as in a quota that their steps do
    not fill, are one."""
    plan, library = case.plan(), SyntheticLibrary(0)
    for spec in case.specs().values():
        library.add(spec)
    _, batches = whole_rounds(plan, library, StepBuilder())
    loads = (pass_load(batch, library) for batch in batches)
    return frozenset(
        Counter(
            (x.shape.padded_tokens, x.shape.slots, x.layout, x.optimizer_slots) for x in loads
        ).items()
    )
