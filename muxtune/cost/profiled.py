"""Cost model that interpolates measured times of single operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from muxtune.cost import ops
from muxtune.cost.calibration import (
    EXTRAPOLATED_WIDENING,
    Composition,
    WholeStep,
    fit_composition,
    fit_memory,
    step_features,
)
from muxtune.cost.composition import ComposedCostModel, PassParts, Rates
from muxtune.cost.curves import AffineFit, Leaf, Table, Time, fit_affine
from muxtune.cost.memory import MemoryModel, MemoryOptions, memory_options
from muxtune.cost.op_sizes import check_ops
from muxtune.cost.ops import Op
from muxtune.cost.schema import Profile, parse_profile
from muxtune.cost.shapes import ModelShape, checked_shape
from muxtune.cost.takeovers import TakeoverTimes, estimate
from muxtune.errors import ProfileError
from muxtune.types import AdapterSlot, Estimate, PassLoad, ReplicaShape, ShapeKey

# Overheads that a device may do without (a captured graph has no layer overhead).
_OPTIONAL = {"layer_overhead_forward", "layer_overhead_backward", "pass_overhead"}
Timing = Callable[[tuple[float, ...]], Time]
TimeOf = Callable[[str, tuple[float, ...]], Time]  # of an operation by its name and sizes
Measured = Callable[[str], tuple[str, float, bool]]  # see ``ProfiledCostModel._measured``
NOTHING_MEASURED = -1.0  # the largest size of an operation that is taken from another


class ProfiledCostModel(ComposedCostModel):
    """``CostModel`` from a profile. Between measured sizes times are piecewise linear; outside
    they go on and are flagged. Attention and loss are fitted by affine functions of their load,
    as the protocol demands; what the fit misses is part of the interval.

    Where the profile has whole steps, they tell how operations add up to one and how far off
    that is (``muxtune.cost.calibration``). Else the interval is the measured 5%..95% spread of each
    operation, added up as if all operations were slow together.

    An operation of a size that was not measured (another base model) is taken from the nearest
    measured one of its kind, by the ratio of their work (``WorkRatio``), and is extrapolated.
    """

    def __init__(
        self, model: ModelShape, profile: Profile | dict[str, Any],
        memory: MemoryOptions | None = None,
    ) -> None:  # fmt: skip
        self.profile = profile if isinstance(profile, Profile) else parse_profile(profile)
        check_ops(self.profile)
        kind = self.profile.device.get("kind", "gpu")
        sizes = memory or memory_options(model, str(kind))
        super().__init__(checked_shape(model), MemoryModel(model, sizes), sizes.dtype_bytes)
        self._tables: dict[str, Table] = {}
        self._timings: dict[str, Timing] = {}
        self._rates: dict[tuple[str, int], tuple[Rates, Rates]] = {}
        self._kinds: dict[str, WorkRatio] = {}
        self._parameter_fits: dict[str, AffineFit] = {}
        self.composition = Composition()
        self._calibrate(memory is None)

    _apart = ops.ADAPTERS  # the category with a factor of its own

    @property
    def _is_of_profile(self) -> bool:
        return self.model == checked_shape(self.profile.model_shape)

    def _calibrate(self, fits_memory: bool) -> None:
        steps = self.profile.steps
        if not steps:
            return
        if self._is_of_profile:
            self.composition = self._fitted_composition(steps)
            options = self._fitted_memory([step for step in steps if not step.num_layers])
        else:  # steps are of the profile's own model
            of_profile = type(self)(self.profile.model_shape, self.profile)
            self._compose_as(of_profile)
            fitted = of_profile.memory.options
            options = self.memory.options._replace(
                pass_factor=fitted.pass_factor,
                fixed_bytes=fitted.fixed_bytes,
                relative_error=fitted.relative_error,
            )
        if fits_memory:
            self.memory = MemoryModel(self.model, options)
        self._forget_passes()

    def _fitted_composition(self, steps: Sequence[WholeStep]) -> Composition:
        return fit_composition(steps, lambda step: self._of_depth(step)._features(step.loads))

    def _features(self, loads: Sequence[PassLoad]) -> tuple[float, float, float]:
        return step_features(loads, self.breakdown_s)

    def _of_depth(self, step: WholeStep) -> ProfiledCostModel:
        """The model without a composition that the step ran on."""
        if not step.num_layers:
            return self
        shape = self.model._replace(num_layers=step.num_layers)
        found = type(self)(shape, self.profile._replace(steps=()))
        found._tables = self._tables  # operations are the same
        return found

    def _compose_as(self, other: ProfiledCostModel) -> None:
        self.composition = other.composition
        self._forget_passes()

    def _fitted_memory(self, steps: Sequence[WholeStep]) -> MemoryOptions:
        """A step's shapes hold all of its slots; those of hTasks that are alike are told by their
        number."""
        options = self.memory.options

        def resident(step: WholeStep) -> int:
            hosted = {load.shape.slots: None for load in step.loads}
            slots = [slot for each in hosted for slot in each]
            slots *= max(1, step.num_slots // max(1, len(slots)))
            return self.memory.resident_bytes(slots) - options.framework_bytes

        fit = fit_memory(
            steps, resident, lambda step: max(self.memory.pass_bytes(x.shape) for x in step.loads)
        )
        return options._replace(
            pass_factor=fit.pass_factor,
            fixed_bytes=fit.fixed_bytes,
            relative_error=fit.relative_error,
        )

    def _stage_parts(
        self, shape: ShapeKey, replica: ReplicaShape, layers: int, first: bool, last: bool
    ) -> PassParts:
        return self.composed(super()._stage_parts(shape, replica, layers, first, last))

    def composed(self, parts: PassParts) -> PassParts:
        """A stage as the profile's whole steps say that its operations add up."""
        how = self.composition
        if not how.num_steps:
            return parts
        error = how.relative_error * (EXTRAPOLATED_WIDENING if parts.extrapolated else 1.0)
        forward_s, backward_s = (
            {
                category: seconds * (how.adapters if category == self._apart else how.work)
                for category, seconds in side.items()
            }
            for side in (parts.forward_s, parts.backward_s)
        )
        forward_s[ops.OVERHEAD] = forward_s.get(ops.OVERHEAD, 0.0) + how.pass_s
        parts = parts._replace(
            forward_s=forward_s,
            backward_s=backward_s,
            per_pair_s=tuple(seconds * how.work for seconds in parts.per_pair_s),
            per_loss_row_s=tuple(seconds * how.work for seconds in parts.per_loss_row_s),
            optimizer_s=tuple(seconds * how.work for seconds in parts.optimizer_s),
            pair_error=error,
            loss_error=error,
        )
        return parts._replace(half_width_s=error * parts.base_s)

    def _op(self, name: str) -> dict[str, Any]:
        if name not in self.profile.ops:
            raise ProfileError(
                f"the profile of {self.profile.device_name or 'this device'} has no op '{name}'"
                f" of {self.model.name}. Measure it with `muxtune profile model={self.model.name}`"
            )
        return self.profile.ops[name]  # type: ignore[return-value]

    def _table(self, name: str) -> Table:
        if name not in self._tables:
            op = self._op(name)
            leaves = {
                tuple(float(point[axis]) for axis in op["axes"]): leaf_of(point)
                for point in op["points"]
            }
            self._tables[name] = Table.build(name, list(leaves.items()))
        return self._tables[name]

    def op_time(self, op: Op) -> Time:
        return self._time(op.name, op.size)

    def _time(self, name: str, sizes: tuple[float, ...]) -> Time:
        timing = self._timings.get(name)
        if timing is None:
            timing = self._timings[name] = self._timing(name)
        return timing(sizes)

    def _timing(self, name: str) -> Timing:
        """What tells the operation's time by its sizes."""
        if name in self.profile.ops:
            return self._table(name).at
        if name in _OPTIONAL:
            return _free
        measured, ratio, _ = self._measured(name)
        return partial(of_another, self._table(measured).at, ratio)

    def attention_rates(self, tp: int) -> tuple[Rates, Rates]:
        key = ("attention", tp)
        if key not in self._rates:
            forward, backward = ops.attention_work(self.model, self.dtype_bytes, tp)
            self._rates[key] = (self._attention(forward.name), self._attention(backward.name))
        return self._rates[key]

    def _attention(self, name: str) -> Rates:
        name, ratio, extrapolated = self._measured(name)
        fit = self._fit(name, "length", lambda n: (1.0, n, n * (n + 1) / 2))
        per_call, per_row, per_pair = (ratio * number for number in fit.coefficients)
        most = NOTHING_MEASURED if extrapolated else fit.max_size
        return Rates(per_call, per_row, per_pair, fit.relative_error, most)

    def _measured(self, name: str) -> tuple[str, float, bool]:
        """(the operation itself, or the nearest of its kind, the ratio of their work, whether it
        is another); see ``WorkRatio``. Raises ProfileError where there is none of the kind."""
        if name in self.profile.ops:
            return name, 1.0, False
        kind = name.partition(".")[0]
        if kind not in self._kinds:
            self._kinds[kind] = WorkRatio.of(kind, self.profile.ops)
        nearest = self._kinds[kind].nearest(name)
        if nearest is None or self._is_of_profile:
            self._op(name)  # says what is missing
            raise AssertionError
        return nearest.name, nearest.ratio, True

    def loss_rates(self) -> tuple[Rates, Rates]:
        key = ("loss", 1)
        if key not in self._rates:
            forward, backward = ops.loss_ops(self.model, 1.0, self.dtype_bytes)
            self._rates[key] = (self._loss(forward.name), self._loss(backward.name))
        return self._rates[key]

    def _loss(self, name: str) -> Rates:
        name, ratio, extrapolated = self._measured(name)
        fit = self._fit(name, "rows", lambda n: (1.0, n))
        per_pass, per_row = (ratio * number for number in fit.coefficients)
        most = NOTHING_MEASURED if extrapolated else fit.max_size
        return Rates(per_pass, 0.0, per_row, fit.relative_error, most)

    def _fit(self, name: str, axis: str, features: Any) -> AffineFit:
        points = self._op(name)["points"]
        sizes = [float(point[axis]) for point in points]
        rows = np.array([features(size) for size in sizes])
        return fit_affine(rows, [leaf_of(point) for point in points], max(sizes))

    def adapter_load_s(self, slot: AdapterSlot) -> Estimate:
        """Measured: making a task and putting it in its place, by trained numbers; where a
        profile has no steps, its tensors and optimizer state only."""
        if self._takeovers is not None:
            return self._takeovers.join(self._parameters(slot))
        return self._by_parameters("join" if "join" in self.profile.ops else "adapter_load", slot)

    @property
    def charges_moves(self) -> bool:
        return "move" in self.profile.ops or self._takeovers is not None

    def move_s(self, slot: AdapterSlot) -> Estimate:
        if self._takeovers is not None:
            return self._takeovers.move(self._parameters(slot))
        return self._by_parameters("move", slot)

    @cached_property
    def _takeovers(self) -> TakeoverTimes | None:
        """None in profiles that measured a few parts of takeovers alone."""
        op = self.profile.ops.get("takeover")
        return None if op is None else TakeoverTimes(op)

    def _parameters(self, slot: AdapterSlot) -> float:
        return float(ops.adapter_parameters(self.model, slot))

    @property
    def charges_ends(self) -> bool:
        return "finish" in self.profile.ops

    def finish_s(self, slot: AdapterSlot) -> Estimate:
        """Measured where the profile has it: its adapter is written to the disk."""
        if "finish" not in self.profile.ops:
            return super().finish_s(slot)
        return self._by_parameters("finish", slot)

    def rebuild_s(self) -> Estimate:
        return super().rebuild_s() if self._takeovers is None else self._takeovers.rebuild()

    def leave_s(self) -> Estimate:
        if self._takeovers is not None:
            return self._takeovers.plan()
        if "leave" not in self.profile.ops:
            return super().leave_s()
        value, width, outside = self._table("leave").at((float(self.model.num_layers),))
        return Estimate(value, max(value - width, 0.0), value + width, outside)

    def _by_parameters(self, name: str, slot: AdapterSlot) -> Estimate:
        """A constant and a share of the bytes: few sizes are measured, each a few times, and
        adapters are smaller than those, too."""
        if name not in self._parameter_fits:
            self._parameter_fits[name] = self._fit(name, "parameters", lambda n: (1.0, n))
        (once_s, each_s), error, most = self._parameter_fits[name]
        size = self._parameters(slot)
        return estimate(once_s + each_s * size, error, size > most)

    def capture_s(self, shape: ShapeKey, replica: ReplicaShape) -> Estimate:
        """Measured where the device captures graphs; nothing where the profile has no such op."""
        if "capture" not in self.profile.ops:
            return Estimate(0.0, 0.0, 0.0, False)
        value, width, outside = self._table("capture").at((float(shape.padded_tokens),))
        return Estimate(value, max(value - width, 0.0), value + width, outside)


def _free(_sizes: tuple[float, ...]) -> Time:
    return Time(0.0, 0.0, False)


def of_another(timing: Timing, ratio: float, sizes: tuple[float, ...]) -> Time:
    """As long as ``ratio`` times another operation, and so extrapolated."""
    value, width, _ = timing(sizes)
    return Time(value * ratio, width * ratio, True)


class Nearest(NamedTuple):
    name: str
    ratio: float


class WorkRatio(NamedTuple):
    """Measured sizes of one kind of operation, as ``kind.AxBxC`` names them. The work of one of
    these kinds at equal rows is proportional to the product of its sizes, so an unmeasured size
    takes the time of the measured one with the nearest product, times the ratio."""

    sizes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, kind: str, names: Iterable[str]) -> WorkRatio:
        found = [(name, _sizes(name)) for name in names if name.partition(".")[0] == kind]
        return cls(tuple((name, sizes) for name, sizes in found if sizes))

    def nearest(self, name: str) -> Nearest | None:
        wanted = _sizes(name)
        same = [(other, sizes) for other, sizes in self.sizes if len(sizes) == len(wanted)]
        if not wanted or not same:
            return None
        work = _work(name, wanted)
        # Of equal work, the one whose sides are most alike.
        other, sizes = min(
            same,
            key=lambda item: (
                abs(math.log(_work(*item) / work)),
                sum(abs(math.log(a / b)) for a, b in zip(item[1], wanted, strict=True)),
            ),
        )
        return Nearest(other, work / _work(other, sizes))


def _sizes(name: str) -> tuple[int, ...]:
    parts = name.partition(".")[2].split("x")
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else ()


_SUMMED = ("rotary", "adapter_lora", "site_factor", "part_")  # work grows with the sum of the sides


def _work(name: str, sizes: tuple[int, ...]) -> float:
    """Of attention (heads x key heads x head size): key heads hardly count."""
    if name.startswith("attention"):
        return float(sizes[0] * sizes[-1])
    return float(sum(sizes)) if name.startswith(_SUMMED) else float(math.prod(sizes))


def leaf_of(point: dict[str, Any]) -> Leaf:
    return Leaf(float(point["median_s"]), (point["p95_s"] - point["p05_s"]) / 2)
