"""Roofline cost model from a device's and a model's published figures.

Everything it says is extrapolated: nothing was measured on the device in question. Its efficiency
constants come from early measurements on one H100 SXM (bf16, the shape of Llama-2-7B) and are
carried over to other devices by ratios of their figures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from muxtune.cost import ops
from muxtune.cost.composition import ComposedCostModel, Rates
from muxtune.cost.curves import Time
from muxtune.cost.devices import DeviceFigures, checked_figures
from muxtune.cost.memory import MemoryModel, MemoryOptions, memory_options
from muxtune.cost.ops import Op
from muxtune.cost.shapes import ModelShape, checked_shape
from muxtune.errors import ConfigError
from muxtune.types import AdapterSlot, Estimate, ReplicaShape, ShapeKey

# Where the saturation curve was measured; other devices are scaled by their ridge point.
_H100_RIDGE = 989e12 / 3350e9
GRAPH, EAGER = "graph", "eager"


class AnalyticOptions(NamedTuple):
    """Constants of the roofline, each with its source.

    ``matmul_efficiency`` / ``half_rows`` / ``efficiency_ceiling``: share of peak =
    min(e T / (T + h), ceiling). Through the measured 459, 575, 682, 734 TFLOP/s of a 4096 x 14336
    linear at 256..2048 rows of 989 peak; the last is the ceiling, because longer runs hit the
    power limit; h scales with the device's ridge point.
    ``memory_efficiency``: copy bandwidth 3.0 of 3.35 TB/s.
    ``attention_efficiency``: share of peak of a variable-length flash kernel, judged.
    ``style``: ``graph`` (captured or compiled: fused elementwise kernels, ``gap_s`` between
    kernels) or ``eager`` (the host launches every kernel, HF PEFT style).
    ``eager_host_s``: host time per kernel, autograd and module calls included, such that HF PEFT's
    floor of 0.2 s at 4 x 64 tokens comes out; a bare launch is 10 microseconds.
    ``eager_traffic``: memory traffic of unfused elementwise and adapter kernels over fused ones,
    such that HF PEFT's 16 x 256 tokens come out. ``grouped_adapters``: all slots of a linear share
    their kernels (S-LoRA, LoRAFusion, tLoRA); else every adapter launches its own (HF PEFT,
    mLoRA), which costs most where the host launches. ``link_efficiency``, ``collective_latency_s``:
    through the measured all-reduces of two H200. ``stage_link_bytes_per_s``: one direction
    between pipeline stages, where they lie on different hosts; 0: the device's own link.
    ``fast_link_contention``, ``slow_link_contention``: by which factors compute, and
    communication, take longer while they overlap, over links of at least
    ``fast_link_bytes_per_s`` and below: from the same linear with an all-reduce beside it, by
    NVLink and without peer access (``orchestration.contention``).
    ``relative_error``: half-width of the interval.
    """

    style: str = GRAPH
    matmul_efficiency: float = 0.81
    half_rows: float = 192.0
    efficiency_ceiling: float = 0.742
    memory_efficiency: float = 0.9
    attention_efficiency: float = 0.45
    gap_s: float = 1.5e-6
    pass_overhead_s: float = 300e-6
    eager_host_s: float = 32e-6
    eager_traffic: float = 7.0
    grouped_adapters: bool = True
    link_efficiency: float = 0.62
    collective_latency_s: float = 37e-6
    stage_link_bytes_per_s: float = 0.0
    fast_link_bytes_per_s: float = 150e9
    fast_link_contention: tuple[float, float] = (2.744, 1.25)
    slow_link_contention: tuple[float, float] = (1.448, 1.05)
    adapter_load_latency_s: float = 0.05
    capture_s: float = 0.5
    capture_passes: float = 4.0
    relative_error: float = 0.35

    @classmethod
    def eager(cls, **changes: float | bool) -> AnalyticOptions:
        """Options of one eager instance, as HF PEFT runs: every adapter launches by itself."""
        return cls(style=EAGER, grouped_adapters=False)._replace(**changes)  # type: ignore[arg-type]


class AnalyticCostModel(ComposedCostModel):
    """``CostModel`` of a model on a device by roofline: per operation
    max(flops / (peak * efficiency(rows)), bytes / bandwidth) + gap. Always extrapolated."""

    def __init__(
        self,
        model: ModelShape,
        device: DeviceFigures,
        options: AnalyticOptions | None = None,
        memory: MemoryOptions | None = None,
    ) -> None:
        self.device, self.options = checked_figures(device), _checked(options or AnalyticOptions())
        eager = self.options.style == EAGER
        sizes = memory or memory_options(model, device.kind, eager=eager)
        super().__init__(checked_shape(model), MemoryModel(model, sizes), sizes.dtype_bytes)
        self._half_rows = self.options.half_rows * device.ridge_flops_per_byte / _H100_RIDGE
        self._bandwidth = device.memory_bytes_per_s * self.options.memory_efficiency
        self._eager = eager

    def _seconds(self, flops: float, moved: float, rows: float) -> float:
        if not rows:
            return moved / self._bandwidth
        efficiency = self.options.matmul_efficiency * rows / (rows + self._half_rows)
        efficiency = min(efficiency, self.options.efficiency_ceiling)
        return max(flops / (self.device.peak_flops * efficiency), moved / self._bandwidth)

    def _gap(self, kernels: int) -> float:
        # Eager launches are the host's, counted against the whole pass.
        return 0.0 if self._eager else self.options.gap_s * min(kernels, 2)

    def op_time(self, op: Op) -> Time:
        category = op.category
        if category == ops.COMMUNICATION:
            return self._estimate(self._exchange_s(op))
        if category == ops.OVERHEAD:
            fixed = self.options.pass_overhead_s if op.name == "pass_overhead" else 0.0
            return self._estimate(fixed)
        moved = op.bytes
        if self._eager and category in (ops.ELEMENTWISE, ops.ADAPTERS):
            moved *= self.options.eager_traffic
        # Grouped adapter kernels are counted per shape, a fused optimizer is one kernel for all.
        merged = category in (ops.ADAPTERS, ops.OPTIMIZER)
        gap = 0.0 if merged else self._gap(op.kernels)
        return self._estimate(self._seconds(op.flops, moved, op.rows) + gap)

    def _exchange_s(self, op: Op) -> float:
        """Ring all-reduce: 2 (n-1)/n of the bytes over each link; a transfer: all of them."""
        share, speed = 1.0, self.device.link_bytes_per_s
        if op.name.startswith("all_reduce.tp"):
            ranks = int(op.name.removeprefix("all_reduce.tp"))
            share = 2 * (ranks - 1) / ranks
        elif self.options.stage_link_bytes_per_s:
            speed = self.options.stage_link_bytes_per_s
        speed *= self.options.link_efficiency
        return self.options.collective_latency_s + share * op.bytes / speed

    def _estimate(self, seconds: float) -> Time:
        return Time(seconds, seconds * self.options.relative_error, True)

    def attention_rates(self, tp: int) -> tuple[Rates, Rates]:
        """Pairs and rows add up (no overlap of compute and traffic), which is on the safe side."""
        speed = self.device.peak_flops * self.options.attention_efficiency
        forward, backward = (
            Rates(
                self._gap(work.kernels) if not self._eager else 0.0,
                work.bytes_per_row / self._bandwidth,
                work.flops_per_pair / speed,
                self.options.relative_error,
                0.0,
            )
            for work in ops.attention_work(self.model, self.dtype_bytes, tp)
        )
        return forward, backward

    def loss_rates(self) -> tuple[Rates, Rates]:
        """Per row at full efficiency; reading the head's matrix is the fixed part."""
        forward, backward = (
            Rates(
                self.dtype_bytes * self.model.hidden * self.model.vocab / self._bandwidth,
                0.0,
                self._seconds(op.flops, 0.0, 1e9) / _UNIT + 6.0 * self.model.vocab
                / self._bandwidth,
                self.options.relative_error,
                0.0,
            )
            for op in ops.loss_ops(self.model, _UNIT, self.dtype_bytes)
        )  # fmt: skip
        return forward, backward

    def slot_overhead_s(self, slots: tuple[AdapterSlot, ...], layers: int) -> float:
        """Gaps between adapter kernels: grouped kernels run once a linear for all slots."""
        if self._eager or not slots:
            return 0.0
        kinds = Counter(slots)
        launched = [_sites(self.model, slot) for slot in kinds]
        if self.options.grouped_adapters:
            count = len(set().union(*launched))
        else:
            count = sum(
                len(names) * times for names, times in zip(launched, kinds.values(), strict=True)
            )
        # Two kernels forward (shrink, expand) and four backward.
        return 6 * count * layers * self.options.gap_s

    def adapter_kernels(self, separate: Sequence[float]) -> float:
        """Grouped kernels are launched once for all slots: as many as the most of one slot."""
        if not self.options.grouped_adapters:
            return sum(separate)
        return max(separate, default=0.0)

    def exposed_host_s(self, kernels: float, device_s: float) -> float:
        if not self._eager:
            return 0.0
        return max(0.0, kernels * self.options.eager_host_s - device_s)

    def contention(self) -> tuple[float, float]:
        fast = self.device.link_bytes_per_s >= self.options.fast_link_bytes_per_s
        return self.options.fast_link_contention if fast else self.options.slow_link_contention

    def adapter_load_s(self, slot: AdapterSlot) -> Estimate:
        """Weights, gradients and optimizer state over the host link, plus a latency."""
        size = self.memory.task_bytes(slot)
        seconds = self.options.adapter_load_latency_s + size / self.device.host_link_bytes_per_s
        return Estimate(seconds, seconds / 2, seconds * 2, True)

    def capture_s(self, shape: ShapeKey, replica: ReplicaShape) -> Estimate:
        """Warm-up passes and instantiation of a graph; nothing in eager style or on a CPU."""
        if self._eager or self.device.kind == "cpu":
            return Estimate(0.0, 0.0, 0.0, True)
        warm_up = self.options.capture_passes * self.pass_coefficients(shape, replica).base_s
        seconds = self.options.capture_s + warm_up
        return Estimate(seconds, seconds / 3, seconds * 3, True)

    def _most_loss_rows(self) -> float:
        return -1.0  # not even none


_UNIT = 1024.0


def _checked(options: AnalyticOptions) -> AnalyticOptions:
    """The options themselves; ConfigError names the one that is no sensible number."""
    if options.style not in (GRAPH, EAGER):
        raise ConfigError("cost.style", f"'{options.style}'", f"choose {GRAPH} or {EAGER}")
    for name, value in options._asdict().items():
        if isinstance(value, float) and not 0 <= value < float("inf"):
            raise ConfigError(f"cost.{name}", f"is {value}", "give a finite number, 0 or more")
    for name in (
        "matmul_efficiency",
        "efficiency_ceiling",
        "memory_efficiency",
        "attention_efficiency",
    ):
        if not 0 < getattr(options, name) <= 1:
            raise ConfigError(f"cost.{name}", f"is {getattr(options, name)}", "give 0 < x <= 1")
    return options


def _sites(model: ModelShape, slot: AdapterSlot) -> set[str]:
    """Where a block runs kernels of the slot's method; those of prefixes and prompts are one."""
    if ops.is_prepended(slot):
        return {"attention"}
    return {linear.name for linear in ops.target_linears(model, slot)}
