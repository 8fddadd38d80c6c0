"""`lobra`: joint training on the replicas of one instance, sequences in length buckets, every
micro-batch dealt out to all replicas in balance (LobRA, VLDB 2025, arXiv 2509.01193).

On an instance of several replicas, of equal or different shapes, all tasks take a step together.
Tasks of similar lengths share a padded bucket; bucket bounds minimise the predicted time of a step
by a dynamic program over the tasks in order of their longest sequence, at most ``max_buckets`` of
them. Each micro-batch is dealt out to the replicas by ``muxtune.planning.replica_dispatch``, which
is what executors do with ``DispatchRule.BALANCED``.

What the contract does not hold, and is only in ``muxtune.planning.lobra`` (and measured in
``experiments/lobra_reproduction``): buckets by sequence, not by task; dispatch by LobRA's integer
program, once a step; replicas that only take short sequences. Here every replica must hold the
longest. Which replicas to start is planned once, offline, by ``plan_deployment``; it needs times
of the replicas, which ``muxtune.planning.lobra.from_costs`` takes from the cost model.

Assumptions. LobRA runs on Hetu, whose executor is compiled: the cost's ``style=graph``. Exchange of
gradients between replicas is not costed, which favours it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from muxtune.errors import ConfigError
from muxtune.planners.base import Arrangement, CostedArrangement, GroupCost, Site, TaskClass
from muxtune.planners.padded import PaddedGroup, PaddedPlanner
from muxtune.protocols import CostBook
from muxtune.registry import PLANNERS
from muxtune.types import Refusal, ReplicaShape


@PLANNERS.register("lobra")
class LobraPlanner(PaddedPlanner):
    """See the module's docstring. ``pad_multiple``, ``recompute`` as of the padded planners."""

    deals_replicas = True

    def __init__(
        self,
        costs: CostBook,
        max_buckets: int = 16,
        pad_multiple: int = 8,
        recompute: bool = False,
    ) -> None:
        super().__init__(costs, pad_multiple=pad_multiple, recompute=recompute)
        if max_buckets < 1:
            raise ConfigError("planner.max_buckets", f"is {max_buckets}", "give at least 1")
        self.max_buckets = max_buckets

    def arrange(self, site: Site, classes: tuple[TaskClass, ...]) -> CostedArrangement | Refusal:
        whole = self._bucket(site, classes, range(len(classes)))
        groups = self._buckets(site, classes)
        if groups is None:
            return self.refuse_memory(site, classes, whole.peak_bytes)
        passes = tuple(max(group.cost.passes_per_step) for group in groups)
        seconds = sum(group.step_time_s() for group in groups)
        replicas = 1 + len(site.others)
        reason = f"{len(classes)} task(s) in {len(groups)} bucket(s) over {replicas} replica(s)"
        return CostedArrangement(
            Arrangement(tuple(group.shape for group in groups), (None,) * len(groups), reason),
            tuple(group.cost for group in groups),
            passes,
            seconds,
            max(group.peak_bytes for group in groups),
        )

    # -- inside

    def _buckets(self, site: Site, classes: Sequence[TaskClass]) -> list[PaddedGroup] | None:
        """F(r, i) = min over j < i of F(r - 1, j) + step time of tasks j+1..i in one bucket."""
        order = sorted(range(len(classes)), key=lambda i: (self.longest_tokens(classes[i]), i))
        lengths = [self.longest_tokens(classes[i]) for i in order]
        # Tasks of equal length gain nothing by being apart.
        ends = [i + 1 for i in range(len(order)) if lengths[i : i + 1] != lengths[i + 1 : i + 2]]
        best: dict[int, tuple[float, list[PaddedGroup]]] = {0: (0.0, [])}
        found: tuple[float, list[PaddedGroup]] | None = None
        buckets: dict[tuple[int, int], PaddedGroup] = {}
        for _ in range(min(self.max_buckets, len(ends))):
            longer: dict[int, tuple[float, list[PaddedGroup]]] = {}
            for end in ends:
                for start, (before_s, groups) in best.items():
                    if start >= end:
                        continue
                    if (start, end) not in buckets:
                        members = sorted(order[start:end])
                        buckets[start, end] = self._bucket(site, classes, members)
                    bucket = buckets[start, end]
                    total_s = before_s + bucket.step_time_s()
                    if bucket.fits and total_s < longer.get(end, (math.inf,))[0]:
                        longer[end] = (total_s, [*groups, bucket])
            best = longer
            whole = best.get(len(order))
            if whole is not None and (found is None or whole[0] < found[0]):
                found = whole
        return None if found is None else found[1]

    def _bucket(
        self, site: Site, classes: Sequence[TaskClass], members: Sequence[int]
    ) -> PaddedGroup:
        """One bucket on the replica that takes longest over its part. All adapters are on every
        replica, whatever bucket they are in."""
        replicas = (site.replica, *site.others)
        parts = [self._part(site, classes, members, each, replicas) for each in set(replicas)]
        slowest = max(parts, key=PaddedGroup.step_time_s)
        peak = max(part.peak_bytes for part in parts)
        return slowest._replace(peak_bytes=peak, fits=all(part.fits for part in parts))

    def _part(
        self,
        site: Site,
        classes: Sequence[TaskClass],
        members: Sequence[int],
        replica: ReplicaShape,
        replicas: Sequence[ReplicaShape],
    ) -> PaddedGroup:
        own = site._replace(replica=replica)
        resident = self.resident_bytes(own, classes)
        if len(replicas) == 1:
            return self.padded_group(own, classes, members, resident)
        share = replica.num_gpus / sum(each.num_gpus for each in replicas)
        return self._shared(own, classes, members, resident, share)

    def _shared(
        self,
        site: Site,
        classes: Sequence[TaskClass],
        members: Sequence[int],
        resident: int,
        share: float,
    ) -> PaddedGroup:
        """A whole step in one micro-batch, of which the replica takes its share of the rows."""
        chosen = [classes[i] for i in members]
        longest = max(self._padded(self.longest_tokens(task)) for task in chosen)
        quota = tuple(task.sequences_per_step for task in chosen)
        shape = self._group(chosen, quota, longest, 0)
        rows = min(sum(quota), math.ceil(share * sum(quota)) + 1)  # dealing is whole rows
        dealt = tuple(each._replace(num_chunks=rows) for each in shape.shapes)
        cost = self._cost_of(site, chosen, shape._replace(shapes=dealt), share)
        need = self.cost(site).pass_bytes(dealt[-1], site.replica)
        peak = site.corrected_bytes(resident + need)
        fits = peak <= site.memory_limit_bytes
        return PaddedGroup(
            shape._replace(members=tuple(members)), whole_step(cost, share), peak, fits
        )


def whole_step(cost: GroupCost, share: float) -> GroupCost:
    """Tokens of all replicas; the time stays that of the one which was costed."""
    return cost._replace(
        effective_tokens=cost.effective_tokens / share, padded_tokens=cost.padded_tokens / share
    )
