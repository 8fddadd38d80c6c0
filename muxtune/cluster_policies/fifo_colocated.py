"""One task an instance, several instances a GPU: contending for it, sharing nothing."""

from __future__ import annotations

from muxtune.cluster_policies.base import Candidate, FifoPolicy
from muxtune.protocols import FleetView
from muxtune.registry import CLUSTER_POLICIES
from muxtune.types import Action, Event


@CLUSTER_POLICIES.register("fifo_colocated")
class FifoColocated(FifoPolicy):
    """FIFO onto the idle instance whose GPU has the fewest busy ones, so that GPUs fill evenly."""

    def __init__(self, discipline: str = "fifo") -> None:
        super().__init__(1, discipline)
        self._idle: dict[str, tuple[str, tuple[str, ...]]] = {}  # model and GPUs of an instance
        self._busy: dict[str, tuple[str, ...]] = {}
        self._num_busy: dict[str, int] = {}  # by GPU

    def on_event(self, event: Event, fleet: FleetView) -> list[Action]:
        for instance_id in fleet.changed:
            self._update(instance_id, fleet)
        return super().on_event(event, fleet)

    def candidates(self, model: str, fleet: FleetView) -> list[Candidate]:
        return self._by_crowding(model)

    def taken(self, chosen: Candidate, candidates: list[Candidate]) -> None:
        """The instances beside the chosen one become less attractive within the same event."""
        model, gpu_ids = self._idle[chosen[1]]
        self._set_busy(chosen[1], gpu_ids)
        candidates[:] = self._by_crowding(model)

    def _by_crowding(self, model: str) -> list[Candidate]:
        idle = self._idle.items()
        return sorted(
            (max((self._num_busy.get(gpu, 0) for gpu in gpu_ids), default=0), name)
            for name, (idle_model, gpu_ids) in idle
            if idle_model == model
        )

    def _update(self, instance_id: str, fleet: FleetView) -> None:
        self._forget(instance_id)
        instance = fleet.instances.get(instance_id)
        if instance is None:
            return
        if instance.tasks:
            self._set_busy(instance_id, instance.gpu_ids)
        else:
            self._idle[instance_id] = (instance.model, instance.gpu_ids)

    def _set_busy(self, instance_id: str, gpu_ids: tuple[str, ...]) -> None:
        self._idle.pop(instance_id, None)
        self._busy[instance_id] = gpu_ids
        for gpu in gpu_ids:
            self._num_busy[gpu] = self._num_busy.get(gpu, 0) + 1

    def _forget(self, instance_id: str) -> None:
        self._idle.pop(instance_id, None)
        for gpu in self._busy.pop(instance_id, ()):
            self._num_busy[gpu] -= 1
