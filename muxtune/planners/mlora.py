"""`mlora`: BatchLoRA and LoRAPP (Ye et al., "mLoRA: Fine-Tuning LoRA Adapters via Highly-Efficient
Pipeline Parallelism in Multiple GPUs", VLDB 2025, arXiv 2312.02515).

LoRAPP: in a pipeline of D stages the micro-batches of different adapters follow each other, in
turns; an adapter's next one waits for its optimizer. With L equal adapters a round takes
max(L, D) passes, so a share max((D - L) / D, 0) of it is a bubble. BatchLoRA: when tasks exceed
GPUs, several adapters share one padded batch; on an instance without a pipeline that is all of
them, in a pipeline D batches, which fill it.

Assumptions. First come, first served is the cluster policy's (``fifo_shared`` puts tasks on idle
GPUs before it doubles them up). Which adapters share a batch is not published as an optimisation;
they are dealt out in turn. Rows are padded to the longest of the batch, as its code does. Its
adapters launch kernels of their own and eagerly (49,419 kernels in a measured step of 8): that is
the cost's ``style=eager``, ``adapters=separate``, not this file's.
"""

from __future__ import annotations

from muxtune.planners.base import Arrangement, CostedArrangement, Site, TaskClass
from muxtune.planners.padded import PaddedPlanner
from muxtune.planners.rounds import round_of
from muxtune.registry import PLANNERS
from muxtune.types import Refusal


@PLANNERS.register("mlora")
class MLoraPlanner(PaddedPlanner):
    """One padded hTask without a pipeline; else at most one hTask a stage, taking turns."""

    def arrange(self, site: Site, classes: tuple[TaskClass, ...]) -> CostedArrangement | Refusal:
        num_stages = site.replica.pp
        if num_stages == 1:
            return super().arrange(site, classes)
        resident = self.resident_bytes(site, classes)
        num_groups = min(len(classes), num_stages)
        members = [range(first, len(classes), num_groups) for first in range(num_groups)]
        groups = [self.padded_group(site, classes, each, resident) for each in members]
        peak = max(group.peak_bytes for group in groups)
        if not all(group.fits for group in groups):
            return self.refuse_memory(site, classes, peak)
        costs = tuple(group.cost for group in groups)
        passes = tuple(max(cost.passes_per_step) for cost in costs)
        turns = round_of(passes, tuple(cost.pass_time_s for cost in costs), num_stages)
        reason = (
            f"{len(classes)} task(s) in {num_groups} batches taking turns on {num_stages} stages"
        )
        return CostedArrangement(
            Arrangement(tuple(group.shape for group in groups), turns.counts, reason),
            costs,
            turns.passes,
            turns.round_time_s,
            peak,
        )
