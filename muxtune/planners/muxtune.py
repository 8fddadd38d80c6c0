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
from muxtune.planners.curves import LEVELS, ClassTable, Curve
from muxtune.planners.grouping import Part, Rules, split_tasks
from muxtune.planners.ladder import Fill, normal_gap
from muxtune.planners.rounds import round_of
from muxtune.planners.tables import PassTables
from muxtune.planning.expected import ExpectedLoad
from muxtune.protocols import CostBook
from muxtune.registry import PLANNERS
from muxtune.types import AdapterSlot, PackRule, Refusal, ReplicaShape, ShapeKey

FUSION = ("planned", "all_spatial", "all_temporal")
FREE_SHAPES = 16  # of a ladder where preparing a shape costs nothing
COSTLY_SHAPES = 4  # where it is a graph capture
SPARE_MEMORY = 0.97  # what is searched for again, where interpolated bytes were too few


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
        self._class_tables: dict[tuple[TaskClass, tuple[int, ...]], ClassTable] = {}
        self._tables: dict[tuple[str, str, ReplicaShape, tuple[int, ...]], PassTables] = {}
        self._num_shapes: dict[tuple[str, str, ReplicaShape], int] = {}

    def arrange(self, site: Site, classes: tuple[TaskClass, ...]) -> CostedArrangement | Refusal:
        resident = self.resident_bytes(site, classes)
        limit = site.memory_limit_bytes * 100 // site.memory_percent - resident
        chunks = self.chunk_lengths(classes)
        groups = self._search(site, classes, chunks, limit)
        if groups is None:
            groups = self._smallest(site, classes, chunks)
        needed = max(group.need_bytes for group in groups)
        if needed > limit:
            needed = (resident + needed) * site.memory_percent // 100
            return self.refuse_memory(site, classes, needed)
        return self._costed(site, groups, resident)

    # -- candidates

    def _search(
        self, site: Site, classes: tuple[TaskClass, ...], chunks: tuple[int, ...], limit: float
    ) -> list[Group] | None:
        """The dynamic program's groups; again with less memory where exact bytes exceed it."""
        tables = [self._class_table(task, chunks) for task in classes]
        slots = [task.slot for task in classes]
        num_shapes = self.num_shapes(site, slots[0])
        gap = None if num_shapes == 1 else normal_gap(num_shapes)
        for allowed in (limit, limit * SPARE_MEMORY, limit * SPARE_MEMORY**2):
            rules = Rules(allowed, gap, self.fusion, site.replica.pp)
            parts = split_tasks(tables, slots, self._pass_tables(site, chunks), rules)
            if parts is None:
                return None
            groups = [self._group(site, classes, chunks, part) for part in parts]
            if all(group.need_bytes <= limit for group in groups):
                return groups
        return None

    def _class_table(self, task: TaskClass, chunks: tuple[int, ...]) -> ClassTable:
        key = (task, chunks)
        found = self._class_tables.get(key)
        if found is None:
            curves = tuple(self.curve(task, chunk) for chunk in chunks)
            found = self._class_tables[key] = ClassTable.of(curves)
        return found

    def _pass_tables(self, site: Site, chunks: tuple[int, ...]) -> PassTables:
        key = (site.model, site.device, site.replica, chunks)
        if key not in self._tables:
            self._tables[key] = PassTables(self.cost(site), site.replica, chunks)
        return self._tables[key]

    def num_shapes(self, site: Site, slot: AdapterSlot) -> int:
        """Shapes of an hTask's ladder, at most."""
        if self.max_shapes:
            return self.max_shapes
        key = (site.model, site.device, site.replica)
        if key not in self._num_shapes:
            probe = ShapeKey(self.tile_tokens, 1, (slot,))
            costly = self.cost(site).capture_s(probe, site.replica).value > 0
            self._num_shapes[key] = COSTLY_SHAPES if costly else FREE_SHAPES
        return self._num_shapes[key]

    def chunk_lengths(self, classes: Sequence[TaskClass]) -> tuple[int, ...]:
        """Candidates: the row tile, doubled until the longest sequence fits in one chunk."""
        if self.chunk_tokens:
            return (self.chunk_tokens,)
        longest = max(self.longest_tokens(task) for task in classes)
        doublings = max(0, (-(-longest // self.tile_tokens) - 1).bit_length())
        return tuple(self.tile_tokens << i for i in range(doublings + 1))

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
        self, site: Site, classes: Sequence[TaskClass], chunks: tuple[int, ...], part: Part
    ) -> Group:
        chunk = chunks[part.chunk]
        points = [self.curve(classes[i], chunk).at_level(part.level) for i in part.members]
        quota, loads = zip(*points, strict=True)
        slots = tuple([classes[i].slot for i in part.members])
        fill = Fill.of([load.chunk_shares for load in loads], sum(quota))
        sizes = fill.ladder(self.num_shapes(site, slots[0]))
        shapes = tuple(ShapeKey(chunk, size, slots) for size in sizes)
        shape = GroupShape(part.members, quota, shapes, PackRule.CHUNK)
        model = self.cost(site)
        cost = group_cost(shape, loads, model, site, fill.shares_of(sizes))
        need = model.pass_bytes(shapes[-1], site.replica)
        return Group(shape, cost, max(cost.passes_per_step), need)

    def _smallest(
        self, site: Site, classes: tuple[TaskClass, ...], chunks: tuple[int, ...]
    ) -> list[Group]:
        """Every task by itself in its smallest micro-batches: fits if anything fits."""
        level, answers = len(LEVELS) - 1, []
        for chunk in range(len(chunks)):
            parts = [Part((member,), chunk, level) for member in range(len(classes))]
            answers.append([self._group(site, classes, chunks, part) for part in parts])
        return min(answers, key=lambda groups: max(group.need_bytes for group in groups))

    def _costed(self, site: Site, groups: list[Group], resident: int) -> CostedArrangement:
        turns = round_of(
            [group.passes for group in groups],
            [group.cost.pass_time_s for group in groups],
            site.replica.pp,
        )
        peak = resident + max(group.need_bytes for group in groups)
        sizes = " + ".join(str(len(group.shape.members)) for group in groups)
        lengths = sorted({group.shape.shapes[0].chunk_tokens for group in groups})
        chunks = " and ".join(map(str, lengths))
        reason = f"{len(groups)} hTask(s) of {sizes} task(s), chunks of {chunks} tokens"
        return CostedArrangement(
            Arrangement(tuple(group.shape for group in groups), turns.counts, reason),
            tuple(group.cost for group in groups),
            turns.passes,
            turns.round_time_s,
            peak * site.memory_percent // 100,
        )
