"""Many tasks an instance: FIFO onto the least-loaded instance of the task's base model."""

from __future__ import annotations

from muxtune.cluster_policies.base import FifoPolicy
from muxtune.registry import CLUSTER_POLICIES


@CLUSTER_POLICIES.register("fifo_shared")
class FifoShared(FifoPolicy):
    """FIFO with head-of-line waiting; the planner decides what fits together."""

    def __init__(self, max_tasks_per_instance: int = 16, discipline: str = "fifo") -> None:
        super().__init__(max_tasks_per_instance, discipline)
