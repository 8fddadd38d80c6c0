"""`muxtune`: packed, chunk-aligned, fused under the memory limit, split into hTasks where it wins.

For each chunk length the tasks are sorted by chunks per step; a dynamic program over contiguous
groups, F(i) = min over j < i of F(j) + time of tasks j+1..i as one hTask, chooses the hTasks, and
for each group the number of micro-batches per optimizer step. The objective is the time in which
every task takes one optimizer step. All candidates of one chunk length are costed at once from
tables that sample the cost model (``muxtune.planners.tables``); what they choose is then costed,
and checked against the memory limit, by the cost model itself. (DESIGN: of the paper's task level
only "dynamic programming over latency and memory models" is known; this recurrence is our own.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from muxtune.errors import ConfigError
from muxtune.planners.base import (
    Arrangement,
    CostedArrangement,
    GroupCost,
    GroupShape,
    PlannerBase,
    Site,
    TaskClass,
    group_cost,
)
from muxtune.planners.tables import PASSES_PER_STEP, Curve, PassTables, Split, split_tasks
from muxtune.planning.expected import ExpectedLoad
from muxtune.protocols import CostBook
from muxtune.registry import PLANNERS
from muxtune.types import AdapterSlot, PackRule, Refusal, ReplicaShape, ShapeKey

FUSION = ("planned", "all_spatial", "all_temporal")
LADDER_SHAPES = 64
MAX_ROUND_TURNS = 12
NEAR_BEST = 1.03  # chunk lengths within this factor of the best are costed exactly


class Group(NamedTuple):
    """A candidate hTask with its exact cost in one step of all its tasks."""

    shape: GroupShape
    cost: GroupCost
    passes: float
    need_bytes: int

    @property
    def time_s(self) -> float:
        return self.passes * self.cost.pass_time_s


@PLANNERS.register("muxtune")
class MuxTunePlanner(PlannerBase):
    """See the module's docstring.

    ``chunk_tokens``: 0 lets the planner choose, else fixed. ``tile_tokens``: chunk lengths are
    multiples of it (the kernels' row tile). ``max_shapes``: a partly filled micro-batch may take
    a smaller one of this many shapes; 1 keeps the pass static; 0 lets the planner choose: as many
    as are useful where preparing a shape costs nothing, else 1. ``fusion`` switches the task
    level for ablations.
    """

    def __init__(
        self,
        costs: CostBook,
        chunk_tokens: int = 0,
        tile_tokens: int = 16,
        fusion: str = "planned",
        max_shapes: int = 0,
    ) -> None:
        super().__init__(costs)
        if fusion not in FUSION:
            raise ConfigError(
                "planner.fusion", f"unknown '{fusion}'", f"choose one of: {', '.join(FUSION)}"
            )
        if max_shapes < 0:
            raise ConfigError("planner.max_shapes", f"is {max_shapes}", "give 0 (choose) or more")
        if tile_tokens < 1 or chunk_tokens < 0 or chunk_tokens % tile_tokens:
            raise ConfigError(
                "planner.chunk_tokens",
                f"{chunk_tokens} does not fit row tiles of {tile_tokens} tokens",
                "give a multiple of planner.tile_tokens, or 0 to let the planner choose",
            )
        self.chunk_tokens, self.tile_tokens = chunk_tokens, tile_tokens
        self.fusion, self.max_shapes = fusion, max_shapes
        self._curves: dict[tuple[TaskClass, int], Curve] = {}
        self._tables: dict[tuple[str, str, ReplicaShape, int], PassTables] = {}
        self._num_shapes: dict[tuple[str, str, ReplicaShape], int] = {}

    def arrange(self, site: Site, classes: tuple[TaskClass, ...]) -> CostedArrangement | Refusal:
        resident = self.resident_bytes(site, classes)
        limit = site.memory_limit_bytes * 100 // site.memory_percent
        splits = {
            chunk: self._split(site, classes, chunk, limit - resident)
            for chunk in self._chunk_lengths(classes)
        }
        found = {chunk: split for chunk, split in splits.items() if split is not None}
        least_s = min((split.time_s for split in found.values()), default=0.0)
        best: tuple[float, int, list[Group]] | int | None = None
        best_s = math.inf
        for chunk, split in found.items():
            if split.time_s <= NEAR_BEST * least_s:
                groups = [self._group(site, classes, chunk, *part) for part in split.groups]
                time_s = sum(group.time_s for group in groups)
                fits = all(resident + group.need_bytes <= limit for group in groups)
                if fits and time_s < best_s:
                    best, best_s = (time_s, chunk, groups), time_s
        if best is None:
            best = self._smallest(site, classes, limit - resident)
        if isinstance(best, int):
            needed = (resident + best) * site.memory_percent // 100
            return self.refuse_memory(site, classes, needed)
        return self._costed(site, best[1], best[2], resident)

    # -- candidates

    def _split(
        self, site: Site, classes: tuple[TaskClass, ...], chunk: int, pass_limit_bytes: int
    ) -> Split | None:
        curves = [self.curve(task, chunk) for task in classes]
        slots = [task.slot for task in classes]
        static = self.num_shapes(site, slots[0]) == 1
        tables = self._pass_tables(site, chunk)
        return split_tasks(curves, slots, tables, pass_limit_bytes, self.fusion, static)

    def _pass_tables(self, site: Site, chunk: int) -> PassTables:
        key = (site.model, site.device, site.replica, chunk)
        if key not in self._tables:
            self._tables[key] = PassTables(self.cost(site), site.replica, chunk)
        return self._tables[key]

    def num_shapes(self, site: Site, slot: AdapterSlot) -> int:
        """Shapes of an hTask's ladder, at most."""
        if self.max_shapes:
            return self.max_shapes
        key = (site.model, site.device, site.replica)
        if key not in self._num_shapes:
            probe = ShapeKey(self.tile_tokens, 1, (slot,))
            costly = self.cost(site).capture_s(probe, site.replica).value > 0
            self._num_shapes[key] = 1 if costly else LADDER_SHAPES
        return self._num_shapes[key]

    def _chunk_lengths(self, classes: Sequence[TaskClass]) -> list[int]:
        if self.chunk_tokens:
            return [self.chunk_tokens]
        longest = max(self.longest_tokens(task) for task in classes)
        doublings = math.ceil(math.log2(max(1.0, longest / self.tile_tokens)))
        return [self.tile_tokens << i for i in range(doublings + 1)]

    def curve(self, task: TaskClass, chunk: int) -> Curve:
        """A class's load by quota, from the smallest that holds its longest sequence to the one
        that takes a whole step in one micro-batch, thinned geometrically."""
        found = self._curves.get((task, chunk))
        if found is None:
            found = self._curves[task, chunk] = Curve.of(tuple(self._points(task, chunk)))
        return found

    def _points(self, task: TaskClass, chunk: int) -> Iterator[tuple[int, ExpectedLoad]]:
        quota = math.ceil(self.longest_tokens(task) / chunk)
        while True:
            load = self.load(task, chunk, quota, PackRule.CHUNK)
            yield quota, load
            if load.micro_batches_per_step <= 1.0:
                return
            quota += max(1, quota // 8)

    # -- exact cost of what was chosen

    def _group(
        self,
        site: Site,
        classes: Sequence[TaskClass],
        chunk: int,
        members: tuple[int, ...],
        level: int,
    ) -> Group:
        points = [self.curve(classes[member], chunk).at_level(level) for member in members]
        quota = tuple(point[0] for point in points)
        slots = tuple(classes[member].slot for member in members)
        sizes = _ladder(sum(quota), self.num_shapes(site, slots[0]))
        shapes = tuple(ShapeKey(chunk, size, slots) for size in sizes)
        shape = GroupShape(members, quota, shapes, PackRule.CHUNK)
        model = self.cost(site)
        cost = group_cost(shape, [point[1] for point in points], model, site)
        need = model.pass_bytes(shapes[-1], site.replica)
        return Group(shape, cost, max(cost.passes_per_step), need)

    def _smallest(
        self, site: Site, classes: tuple[TaskClass, ...], pass_limit_bytes: int
    ) -> tuple[float, int, list[Group]] | int:
        """Every task by itself in its smallest micro-batches: fits if anything fits. Else the
        bytes that the neediest task's pass takes."""
        needs = []
        for chunk in self._chunk_lengths(classes):
            level = len(PASSES_PER_STEP) - 1
            groups = [
                self._group(site, classes, chunk, (member,), level)
                for member in range(len(classes))
            ]
            needs.append(max(group.need_bytes for group in groups))
            if needs[-1] <= pass_limit_bytes:
                return sum(group.time_s for group in groups), chunk, groups
        return min(needs)

    def _costed(
        self, site: Site, chunk: int, groups: list[Group], resident: int
    ) -> CostedArrangement:
        counts = turn_counts([group.passes for group in groups])
        round_s = sum(n * group.cost.pass_time_s for n, group in zip(counts, groups, strict=True))
        peak = resident + max(group.need_bytes for group in groups)
        sizes = " + ".join(str(len(group.shape.members)) for group in groups)
        reason = f"{len(groups)} hTask(s) of {sizes} task(s), chunks of {chunk} tokens"
        return CostedArrangement(
            Arrangement(tuple(group.shape for group in groups), counts, reason),
            tuple(group.cost for group in groups),
            tuple(float(n) for n in counts),
            round_s,
            peak * site.memory_percent // 100,
        )


def _ladder(total_chunks: int, num_shapes: int) -> list[int]:
    """At most ``num_shapes`` sizes up to ``total_chunks``, evenly spaced."""
    num_shapes = min(num_shapes, total_chunks)
    return sorted({math.ceil(total_chunks * i / num_shapes) for i in range(1, num_shapes + 1)})


def turn_counts(passes: Sequence[float]) -> tuple[int, ...]:
    """Small whole numbers of micro-batches a round in the proportions of ``passes``."""
    if len(passes) == 1:
        return (1,)

    def error(scale: float) -> tuple[float, float]:
        counts = [max(1, round(n * scale)) for n in passes]
        rates = [count / n for count, n in zip(counts, passes, strict=True)]
        return (round(max(rates) / min(rates), 3), scale)

    least = 1.0 / min(passes)
    scales = [least * factor for factor in itertools.chain((1.0,), (1.5, 2.0, 3.0))]
    fitting = [s for s in scales if sum(n * s for n in passes) <= MAX_ROUND_TURNS] or [least]
    scale = min(fitting, key=error)
    return tuple(max(1, round(n * scale)) for n in passes)
