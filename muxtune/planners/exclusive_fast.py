"""`exclusive_fast`: one task an instance with fast kernels, as NeMo and its like run adapters:
packed sequences and, by the cost's ``style=graph``, captured passes. The strong one of the two
exclusive baselines of the MuxTune paper (NSDI'26); the plain one is `exclusive`.

Assumptions. NeMo's own throughput is not known to us. It is given the planner `muxtune` with a
single task, so that what `muxtune` gains over it is sharing and nothing else. Its parallelism over
several GPUs is the instance's (``cluster.tp``, ``cluster.pp``).
"""

from __future__ import annotations

from muxtune.planners.muxtune import MuxTunePlanner
from muxtune.protocols import CostBook
from muxtune.registry import PLANNERS


@PLANNERS.register("exclusive_fast")
class ExclusiveFastPlanner(MuxTunePlanner):
    """Refuses a second task. ``max_shapes`` as of the planner `muxtune`."""

    def __init__(self, costs: CostBook, max_shapes: int = 0) -> None:
        super().__init__(costs, fusion="off", max_shapes=max_shapes)
