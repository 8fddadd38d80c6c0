"""A pool of adapters laid out for the static step; see ``muxtune.runtime.bank.AdapterPool``.

Tasks' tensors are views of the step's own storage: a join or a leave copies one task's rows and
touches nobody else's. The gradient of a closed step is not cleared, because the first micro-batch
of the next one overwrites it (``SlotInput.keeps``); ``TaskState.is_open`` tells the two apart.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from muxtune.runtime.adapters.low_rank import A, B
from muxtune.runtime.bank import ParameterKey, TaskState, TaskTensors
from muxtune.runtime.static_step.adapters import AdapterPools, SlotSpec
from muxtune.runtime.static_step.extras import ExtraPools
from muxtune.runtime.static_step.model import StaticModel
from muxtune.types import AdapterSlot

LOW_RANK = ("lora", "dora")


class StaticPool:
    """Raises Unsupported for a method that the static step does not know."""

    def __init__(
        self, model: StaticModel, slots: tuple[AdapterSlot, ...], deterministic: bool
    ) -> None:
        self.slots = slots
        self.occupants: list[TaskState | None] = [None] * len(slots)
        specs = tuple(
            SlotSpec(slot.rank, slot.targets) if slot.method in LOW_RANK else SlotSpec(0, ())
            for slot in slots
        )
        self.adapters = AdapterPools(model, specs, deterministic)
        is_mixed = any(slot.method != "lora" for slot in slots)
        self.extras = ExtraPools(model, slots, deterministic, self.adapters) if is_mixed else None

    def put(self, state: TaskState, slot: int) -> None:
        places = dict(self._tensors(slot))
        with torch.no_grad():
            for rows in places.values():
                for tensor in rows:
                    tensor.zero_()
            for key, old in state.tensors.items():
                count = old.param.shape[0]
                new = TaskTensors(*(tensor[:count] for tensor in places[key]))
                old.copy_to_zeros(new)
                state.tensors[key] = new
        self.adapters.settings.step_S[slot] = state.step
        if self.extras is not None:
            rows_of = {key: values.param.shape[0] for key, values in state.tensors.items()}
            self.extras.take(slot, rows_of)

    def vacate(self, slot: int) -> None:
        """An idle slot's rows do nothing; whoever comes next clears them."""

    def has_room(self, state: TaskState, slot: int) -> bool:
        """False for IA3 on the input of one of several linears that are one here."""
        if self.slots[slot].method != "ia3":
            return True
        return state.tensors.keys() <= {key for key, _ in self._tensors(slot)}

    def _tensors(self, slot: int) -> Iterator[tuple[ParameterKey, TaskTensors]]:
        for site_name, a, b in self.adapters.views(slot):
            yield (site_name, A), TaskTensors(*a)
            yield (site_name, B), TaskTensors(*b)
        for key, four in () if self.extras is None else self.extras.views(slot):
            yield key, TaskTensors(*four)
