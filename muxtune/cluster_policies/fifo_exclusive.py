"""One task an instance, and every instance has GPUs of its own: the usual service."""

from __future__ import annotations

from muxtune.cluster_policies.base import FifoPolicy
from muxtune.registry import CLUSTER_POLICIES


@CLUSTER_POLICIES.register("fifo_exclusive")
class FifoExclusive(FifoPolicy):
    """FIFO onto idle instances, lowest id first."""

    def __init__(self, discipline: str = "fifo") -> None:
        super().__init__(1, discipline)
