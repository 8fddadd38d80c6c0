"""Which runner computes which hTask of an instance.

An hTask runs as a captured step where the program knows the backbone and every slot's method; else
eagerly, and a notice says why. One hTask of an instance may be captured and another not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from muxtune.runtime.backbone import Backbone
from muxtune.runtime.bank import AdapterPool, SlotPool, TaskState
from muxtune.runtime.captured_runner import CapturedRunner, capacity_of
from muxtune.runtime.options import TorchOptions
from muxtune.runtime.pass_runner import EagerRunner, PassRunner
from muxtune.runtime.static_step import StaticModel, Unsupported
from muxtune.runtime.static_step.captured import CaptureMemory
from muxtune.runtime.static_step.pool import StaticPool
from muxtune.types import AdapterSlot, HTask

_MAX_POSITIONS = 16384
_HALF = (torch.bfloat16, torch.float16)


class Runners:
    """Makes pools and runners of both kinds, and keeps the captured ones while their pool lives.

    ``prepared``: whether the last ``arrange`` had to capture anything.
    """

    def __init__(
        self, backbone: Backbone, options: TorchOptions, notice: Callable[[str], None]
    ) -> None:
        self.backbone, self.options, self._notice = backbone, options, notice
        self.prepared = False
        self._model: StaticModel | None = None
        self._memory: CaptureMemory | None = None
        self._captured: dict[int, CapturedRunner] = {}  # by the pool's id

    def other_pool(self, slots: tuple[AdapterSlot, ...]) -> AdapterPool | None:
        if self.options.step == "eager":
            return None
        if self.options.step == "auto" and self.backbone.device.type != "cuda":
            return None
        try:
            return StaticPool(self._static_model(), slots, self.options.deterministic)
        except Unsupported as reason:
            self._notice(f"{self.backbone.name}: runs eagerly, because {reason}")
            return None

    def keep(self, pools: Sequence[AdapterPool]) -> None:
        ids = {id(pool) for pool in pools}
        self._captured = {key: item for key, item in self._captured.items() if key in ids}

    def arrange(self, htasks: Sequence[HTask], pools: Sequence[AdapterPool]) -> list[PassRunner]:
        """A runner for each hTask and its pool. Sizes that are new are captured, the largest
        first."""
        runners = [self._runner(htask, pool) for htask, pool in zip(htasks, pools, strict=True)]
        captured = [runner for runner in runners if isinstance(runner, CapturedRunner)]
        captured.sort(key=lambda runner: -runner.capacity.layout.max_rows)
        self.prepared = sum(runner.prepare() for runner in captured) > 0
        return runners

    def _runner(self, htask: HTask, pool: AdapterPool) -> PassRunner:
        if isinstance(pool, SlotPool):
            return EagerRunner(self.backbone, pool, self.options.deterministic)
        assert isinstance(pool, StaticPool)
        states: list[TaskState] = [state for state in pool.occupants if state is not None]
        virtual_tokens = 0 if pool.extras is None else pool.extras.max_virtual_tokens
        longest = _longest(self.backbone.model.config) - virtual_tokens
        wanted = capacity_of(htask, states, self.options.deterministic, longest)
        known = self._captured.get(id(pool))
        if known is not None and known.capacity.holds(wanted):
            return known
        if self._memory is None and self.backbone.device.type == "cuda":
            self._memory = CaptureMemory.on_current_stream()
        self._captured.pop(id(pool), None)
        runner = self._captured[id(pool)] = CapturedRunner(
            self._static_model(),
            pool,
            wanted,
            self.options.deterministic,
            self.backbone.pad_id,
            self._memory,
        )
        return runner

    def _static_model(self) -> StaticModel:
        """Raises Unsupported."""
        if self._model is None:
            backbone = self.backbone
            if backbone.device.type == "cuda" and backbone.dtype not in _HALF:
                raise Unsupported(f"the static step computes no {backbone.dtype} on CUDA")
            self._model = StaticModel.of(backbone.model, _longest(backbone.model.config))
        return self._model


def _longest(config: Any) -> int:
    """Tokens of a sequence beyond which positions or a sliding window would come out wrong."""
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window"))
    return min(_MAX_POSITIONS, *(int(limit) for limit in limits if limit))
