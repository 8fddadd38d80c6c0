"""`batched`: SL-PEFT, S-LoRA style: all tasks of an instance in one padded batch, one adapter a
row, zero-padded to the longest (a baseline of the MuxTune paper, NSDI'26)."""

from __future__ import annotations

from muxtune.planners.padded import PaddedPlanner
from muxtune.registry import PLANNERS


@PLANNERS.register("batched")
class BatchedPlanner(PaddedPlanner):
    """Every round is one optimizer step of every task."""
