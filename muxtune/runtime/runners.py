"""Which runner computes which hTask of an instance.

An hTask runs as a captured step where the program knows the backbone and every slot's method; else
eagerly, and a notice says why. One hTask of an instance may be captured and another not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from muxtune.runtime.backbone import Backbone
from muxtune.runtime.bank import AdapterPool, SlotPool, TaskState
from muxtune.runtime.captured_runner import CapturedRunner, capacity_of, sizes_left
from muxtune.runtime.memory import give_back_cached, reserved_bytes
from muxtune.runtime.options import TorchOptions
from muxtune.runtime.pass_runner import EagerRunner, PassRunner
from muxtune.runtime.static_step import StaticModel, Unsupported
from muxtune.runtime.static_step.captured import CaptureMemory
from muxtune.runtime.static_step.pool import StaticPool
from muxtune.types import AdapterSlot, HTask

_MAX_POSITIONS = 16384
HALF = (torch.bfloat16, torch.float16)


class Runners:
    """Makes pools and runners of both kinds, and keeps the captured ones while their pool lives.

    ``prepared``: whether the last ``arrange`` had to capture anything.
    """

    class Refused(Exception):
        """Slots whose step could not be captured; from now on they get a ``SlotPool``."""

    def __init__(
        self, backbone: Backbone, options: TorchOptions, notice: Callable[[str], None]
    ) -> None:
        self.backbone, self.options, self._notice = backbone, options, notice
        self.prepared = False
        self._model: StaticModel | None = None
        self._memory: CaptureMemory | None = None
        self._memory_rows = 0  # of the largest pass that was captured in it
        self._captured: dict[int, CapturedRunner] = {}  # by the pool's id
        self._refused: set[tuple[AdapterSlot, ...]] = set()

    @property
    def idle_bytes(self) -> int:
        """Memory that captured passes hold while none of them runs; see ``CaptureMemory``."""
        return 0 if self._memory is None else self._memory.idle_bytes()

    def other_pool(
        self, slots: tuple[AdapterSlot, ...], members: Mapping[int, TaskState]
    ) -> AdapterPool | None:
        if self.options.step == "eager":
            return None
        if self.options.step == "auto" and self.backbone.device.type != "cuda":
            return None
        if slots in self._refused:
            return None
        try:
            pool = StaticPool(self._static_model(), slots, self.options.deterministic)
        except Unsupported as reason:
            self._notice(f"{self.backbone.name}: runs eagerly, because {reason}")
            return None
        for slot, state in members.items():
            if not pool.has_room(state, slot):
                self._notice(
                    f"{self.backbone.name}: runs eagerly, because task '{state.task.task_id}' "
                    "scales the input of a linear that the static step has fused with others"
                )
                return None
        return pool

    def keep(self, pools: Sequence[AdapterPool]) -> int:
        device, ids = self.backbone.device, {id(pool) for pool in pools}
        before_bytes = reserved_bytes(device)
        self._captured = {key: item for key, item in self._captured.items() if key in ids}
        if not self._captured:
            self._memory, self._memory_rows = None, 0
        give_back_cached(device, graphs=True)
        return before_bytes - reserved_bytes(device)

    def give_back(self) -> None:
        give_back_cached(self.backbone.device)

    def arrange(
        self,
        htasks: Sequence[HTask],
        pools: Sequence[AdapterPool],
        rows_ahead: Callable[[], Mapping[int, Collection[int]]] = dict,
    ) -> list[PassRunner]:
        """A runner for each hTask and its pool; sizes that are new are captured, the largest first.

        ``rows_ahead``: tokens of the micro-batches to come, by hTask. Raises Refused where a
        capture fails, the pools must then be made anew; and OutOfMemoryError.
        """
        runners = self._runners_of(htasks, pools)
        if 0 < self._memory_rows < _largest_new(runners):
            # The memory of all graphs is as large as the largest of them only if that one came
            # first: a larger pass does not fit where the tensors of smaller ones have been.
            del runners
            self.keep(())
            runners = self._runners_of(htasks, pools)
        self._memory_rows = max(self._memory_rows, _largest_new(runners))
        captured = [(i, item) for i, item in enumerate(runners) if isinstance(item, CapturedRunner)]
        captured.sort(key=lambda pair: -pair[1].max_rows)
        ahead = rows_ahead() if captured and not self.options.deterministic else {}
        most = sizes_left([len(item.capacity.blocks) for _, item in captured])
        done = [self._prepare(runner, ahead.get(index, ()), most) for index, runner in captured]
        self.prepared = any(done)
        return runners

    def _runners_of(
        self, htasks: Sequence[HTask], pools: Sequence[AdapterPool]
    ) -> list[PassRunner]:
        return [self._runner(htask, pool) for htask, pool in zip(htasks, pools, strict=True)]

    def _prepare(self, runner: CapturedRunner, rows_ahead: Collection[int], most: int) -> bool:
        try:
            return runner.prepare(rows_ahead, most)
        except torch.OutOfMemoryError:
            self._captured.pop(id(runner.pool), None)
            raise  # an eager pass needs no less
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            self._notice(
                f"{self.backbone.name}: runs eagerly, because the step of {len(runner.pool.slots)} "
                f"slots could not be captured ({type(error).__name__}: {text})"
            )
            self._refused.add(runner.pool.slots)
            self._captured.pop(id(runner.pool), None)
            raise Runners.Refused from None

    def _runner(self, htask: HTask, pool: AdapterPool) -> PassRunner:
        if isinstance(pool, SlotPool):
            if any(shape.recompute for shape in htask.shapes):
                self._notice(f"{self.backbone.name}: runs eagerly, which recomputes nothing")
            return EagerRunner(self.backbone, pool, self.options.deterministic)
        assert isinstance(pool, StaticPool)
        tasks = [state.task for state in pool.occupants if state is not None]
        virtual_tokens = 0 if pool.extras is None else pool.extras.max_virtual_tokens
        longest = longest_tokens(self.backbone.model.config) - virtual_tokens
        wanted = capacity_of(htask, tasks, longest)
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
            self.options.lora_products == "windows",
        )
        return runner

    def _static_model(self) -> StaticModel:
        """Raises Unsupported."""
        if self._model is None:
            backbone = self.backbone
            if backbone.device.type == "cuda" and backbone.dtype not in HALF:
                raise Unsupported(f"the static step computes no {backbone.dtype} on CUDA")
            self._model = StaticModel.of(backbone.model, longest_tokens(backbone.model.config))
        return self._model


def _largest_new(runners: Sequence[PassRunner]) -> int:
    """Rows of the largest pass that is to be captured yet."""
    captured = (item for item in runners if isinstance(item, CapturedRunner))
    return max((item.max_rows for item in captured if not item.is_prepared), default=0)


def longest_tokens(config: Any) -> int:
    """Tokens of a sequence beyond which positions or a sliding window would come out wrong."""
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window"))
    return min(_MAX_POSITIONS, *(int(limit) for limit in limits if limit))
