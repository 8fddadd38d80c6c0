"""`exclusive`: one task an instance, padded to its longest sequence, as HF PEFT is run."""

from __future__ import annotations

from muxtune.planners.padded import PaddedPlanner
from muxtune.registry import PLANNERS


@PLANNERS.register("exclusive")
class ExclusivePlanner(PaddedPlanner):
    """Refuses a second task; everything else is padding as one-instance-per-task services do."""

    takes_one_task = True
