"""`lorafusion`: adapters paired head with tail, micro-batches packed to a token capacity, dependent
batches kept apart (Zhu et al., "LoRAFusion: Efficient LoRA Fine-Tuning for LLMs", EuroSys 2026,
arXiv 2510.00206).

1. Adapters are sorted by mean sequence length and grouped head with tail, so that groups are
alike; in a pipeline that pairs leave too empty, each adapter is a group of its own. 2. Each
group's step is packed into the fewest micro-batches that hold at most ``capacity_tokens``.
3. Groups take turns, a step each, so that between the last micro-batch of an adapter's batch and
the first of its next one lie the other groups' micro-batches; in a pipeline of S stages at least
S - 1 are needed, and where there are fewer the pipeline idles for the missing ones. 4. A merge
pass joins groups where that saves a micro-batch and the distance allows it.

Assumptions. The published packing solves a small integer program over single sequences at run
time; here a task's share of a micro-batch is a fixed quota of chunks (packing is separable,
docs/architecture.md), the smallest that needs no more micro-batches. Chunks of ``tile_tokens``
stand for its padding to the kernels' blocks. The capacity is not published as a number but
profiled: 0 takes the power of two of least predicted time by the cost model, within memory. Its
adapters' kernels are grouped and fused; the host still launches: the cost's ``style=eager``,
``adapters=grouped``.
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
from muxtune.planners.ladder import Fill
from muxtune.planning.expected import ExpectedLoad
from muxtune.protocols import CostBook
from muxtune.registry import PLANNERS
from muxtune.types import AdapterSlot, PackRule, Refusal, ShapeKey

Members = tuple[int, ...]
FREE_SHAPES, COSTLY_SHAPES = 8, 4  # sizes of micro-batches; the latter where each is captured


class Packed(NamedTuple):
    """One group's hTask, its cost, the micro-batches of its step, and the bytes of a pass."""

    shape: GroupShape
    cost: GroupCost
    passes: float
    need_bytes: int


class FusionRound(NamedTuple):
    """All groups under one capacity: a step of each. ``idle_passes``: missing between dependent
    batches, in each round."""

    groups: tuple[Packed, ...]
    capacity_tokens: int
    round_time_s: float
    idle_passes: float


@PLANNERS.register("lorafusion")
class LoraFusionPlanner(PlannerBase):
    """See the module's docstring. ``capacity_tokens``: of a micro-batch; 0: by predicted time."""

    def __init__(self, costs: CostBook, capacity_tokens: int = 0, tile_tokens: int = 64) -> None:
        super().__init__(costs)
        if tile_tokens < 1:
            raise ConfigError("planner.tile_tokens", f"is {tile_tokens}", "give at least 1")
        if capacity_tokens < 0:
            remedy = "give 0 (choose) or more"
            raise ConfigError("planner.capacity_tokens", f"is {capacity_tokens}", remedy)
        self.capacity_tokens, self.tile_tokens = capacity_tokens, tile_tokens

    def arrange(self, site: Site, classes: tuple[TaskClass, ...]) -> CostedArrangement | Refusal:
        resident = self.resident_bytes(site, classes)
        limit = site.free_bytes(resident)
        pairs = head_with_tail([self.lengths[c.lengths_hash].mean_tokens for c in classes])
        singles = [(i,) for i in range(len(classes))]
        partitions = [pairs] if site.replica.pp == 1 else [pairs, singles]
        rounds = [
            self._round(site, classes, members, capacity)
            for capacity in self._capacities(classes)
            for members in partitions
        ]
        fitting = [r for r in rounds if max(g.need_bytes for g in r.groups) <= limit]
        if not fitting:
            least = min(max(g.need_bytes for g in r.groups) for r in rounds)
            needed = site.corrected_bytes(resident + least)
            return self.refuse_memory(site, classes, needed)
        best = min(fitting, key=lambda each: each.round_time_s)
        peak = resident + max(group.need_bytes for group in best.groups)
        reason = f"{len(best.groups)} group(s) of at most {best.capacity_tokens} tokens"
        if best.idle_passes:
            reason += f", {best.idle_passes:.3g} passes idle between dependent batches"
        return CostedArrangement(
            Arrangement(tuple(g.shape for g in best.groups), (None,) * len(best.groups), reason),
            tuple(g.cost for g in best.groups),
            tuple(g.passes for g in best.groups),
            best.round_time_s,
            site.corrected_bytes(peak),
        )

    # -- inside

    def _capacities(self, classes: Sequence[TaskClass]) -> Iterator[int]:
        """Powers of two times the tile: from the longest sequence to all tasks' steps together."""
        longest = max(self._chunks(self.longest_tokens(task)) for task in classes)
        if self.capacity_tokens:
            yield max(self.capacity_tokens, longest * self.tile_tokens)
            return
        whole = sum(self._whole_step(task).chunks_per_step for task in classes)
        chunks = 1 << (longest - 1).bit_length()
        while True:
            yield chunks * self.tile_tokens
            if chunks >= whole:
                return
            chunks *= 2

    def _round(
        self, site: Site, classes: tuple[TaskClass, ...], members: list[Members], capacity: int
    ) -> FusionRound:
        groups: list[Packed] = []
        for each in members:
            pair = self._pack(site, classes, each, capacity)
            fits = pair.shape.shapes[-1].padded_tokens <= capacity
            groups += [pair] if fits else [self._pack(site, classes, (i,), capacity) for i in each]
        groups = self._merged(site, classes, groups, capacity)
        num_stages = site.replica.pp
        idle = [
            max(0.0, num_stages - 1 - sum(g.passes for k, g in enumerate(groups) if k != i))
            for i in range(len(groups))
        ]
        busy_s = sum(g.passes * g.cost.pass_time_s for g in groups)
        # The adapter that waits longest sets the pace; a missing micro-batch is one of its own.
        waits_s = max(n * g.cost.pass_time_s for n, g in zip(idle, groups, strict=True))
        return FusionRound(tuple(groups), capacity, busy_s + waits_s, max(idle))

    def _merged(
        self, site: Site, classes: tuple[TaskClass, ...], groups: list[Packed], capacity: int
    ) -> list[Packed]:
        """Joins neighbours while that needs fewer micro-batches and none comes too close."""
        merged = groups[:1]
        for index, group in enumerate(groups[1:], start=1):
            joint = self._pack(
                site, classes, (*merged[-1].shape.members, *group.shape.members), capacity
            )
            others = sum(g.passes for g in (*merged[:-1], *groups[index + 1 :]))
            saves = joint.passes < merged[-1].passes + group.passes - 1e-9
            saves = saves and joint.shape.shapes[-1].padded_tokens <= capacity
            if saves and others >= site.replica.pp - 1:
                merged[-1] = joint
            else:
                merged.append(group)
        return merged

    def _pack(
        self, site: Site, classes: Sequence[TaskClass], members: Members, capacity: int
    ) -> Packed:
        """The fewest micro-batches a step whose quotas stay within the capacity."""
        chosen = [classes[i] for i in members]
        most = capacity // self.tile_tokens
        num_passes = 1
        while True:
            loads = [self._spread(task, num_passes) for task in chosen]
            quota = tuple(n for n, _ in loads)
            smallest = all(n == self._least(task) for n, task in zip(quota, chosen, strict=True))
            if sum(quota) <= most or smallest:
                return self._packed(site, chosen, members, quota, [load for _, load in loads])
            num_passes += 1

    def _packed(
        self,
        site: Site,
        chosen: Sequence[TaskClass],
        members: Members,
        quota: tuple[int, ...],
        loads: Sequence[ExpectedLoad],
    ) -> Packed:
        slots = tuple(task.slot for task in chosen)
        fill = Fill.of([load.chunk_shares for load in loads], sum(quota))
        sizes = fill.ladder(self._num_shapes(site, slots))
        shapes = tuple(ShapeKey(self.tile_tokens, size, slots) for size in sizes)
        shape = GroupShape(tuple(range(len(chosen))), quota, shapes, PackRule.CHUNK)
        model = self.cost(site)
        cost = group_cost(shape, loads, model, site, fill.shares_of(sizes))
        need = model.pass_bytes(shapes[-1], site.replica)
        return Packed(shape._replace(members=members), cost, max(cost.passes_per_step), need)

    def _num_shapes(self, site: Site, slots: tuple[AdapterSlot, ...]) -> int:
        probe = ShapeKey(self.tile_tokens, 1, slots)
        costly = self.cost(site).capture_s(probe, site.replica).value > 0
        return COSTLY_SHAPES if costly else FREE_SHAPES

    def _spread(self, task: TaskClass, num_passes: int) -> tuple[int, ExpectedLoad]:
        """The smallest quota that a step needs no more than ``num_passes`` micro-batches with."""
        low, high = self._least(task), self._most(task)
        while low < high:
            middle = (low + high) // 2
            load = self.load(task, self.tile_tokens, middle, PackRule.CHUNK)
            if load.micro_batches_per_step <= num_passes + 1e-9:
                high = middle
            else:
                low = middle + 1
        return low, self.load(task, self.tile_tokens, low, PackRule.CHUNK)

    def _least(self, task: TaskClass) -> int:
        return self._chunks(self.longest_tokens(task))

    def _most(self, task: TaskClass) -> int:
        return self._least(task) * task.sequences_per_step

    def _whole_step(self, task: TaskClass) -> ExpectedLoad:
        return self.load(task, self.tile_tokens, self._most(task), PackRule.CHUNK)

    def _chunks(self, tokens: int) -> int:
        return math.ceil(tokens / self.tile_tokens)


def head_with_tail(mean_tokens: Sequence[float]) -> list[Members]:
    """Indexes in pairs: the shortest with the longest, and so on inwards; the middle one alone."""
    order = sorted(range(len(mean_tokens)), key=lambda i: (mean_tokens[i], i))
    half = len(order) // 2
    pairs: list[Members] = [(order[i], order[-1 - i]) for i in range(half)]
    return pairs + [(order[half],)] * (len(order) % 2)
