"""From times of single operations to the time of a pass: shared by every cost model.

A pass is affine in its load: base(shape) + attention pairs * a + loss rows * l + the optimizer
steps of the slots that close. Adapters: rows are taken as spread evenly over the slots of the
shape, because a ShapeKey fixes the slots and not who fills the chunks.

With pp > 1 the time of a pass is the time that it occupies the busiest stage (the steady state of
a pipeline that stays fed); fill and drain are the planner's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from muxtune.cost import ops
from muxtune.cost.curves import Time
from muxtune.cost.memory import MemoryModel, stage_layers
from muxtune.cost.ops import Op
from muxtune.cost.shapes import ModelShape
from muxtune.cost.subgraphs import ComposedSubgraphCosts, pass_subgraphs
from muxtune.types import (
    AdapterSlot,
    Estimate,
    Estimates,
    HTask,
    PassCoefficients,
    PassLoad,
    Plan,
    ReplicaShape,
    ShapeKey,
    StageLedgers,
    Subgraph,
    SubgraphTimes,
)

_SOLO = ReplicaShape()
_MEMO_SIZE = 1 << 16
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


STARTUP_LATENCY_S = 15.0
STORAGE_BYTES_PER_S = 2e9


class Rates(NamedTuple):
    """Seconds of one direction of an operation that is affine in its load.

    Attention (one layer): ``per_call_s`` a sequence, ``per_row_s`` a token row, ``per_unit_s`` a
    query-key pair. Loss: ``per_call_s`` a pass, ``per_unit_s`` a row with a label.
    ``max_size``: longest sequence, or most rows, that was measured.
    """

    per_call_s: float
    per_row_s: float
    per_unit_s: float
    relative_error: float
    max_size: float


class PassParts(NamedTuple):
    """A pass on one stage by cause and direction; what coefficients and breakdowns are made of."""

    forward_s: Mapping[str, float]
    backward_s: Mapping[str, float]
    per_pair_s: tuple[float, float]  # forward, backward
    per_loss_row_s: tuple[float, float]
    optimizer_s: tuple[float, ...]
    half_width_s: float
    pair_error: float
    loss_error: float
    extrapolated: bool

    @property
    def base_s(self) -> float:
        return sum(self.forward_s.values()) + sum(self.backward_s.values())


class SlotCosts(NamedTuple):
    """Of a shape's slots, whatever else the shape is. ``optimizer_s``: of each slot."""

    kinds: Counter[AdapterSlot]
    overhead_s: float
    optimizer_s: tuple[float, ...]
    extrapolated: bool


class Tally:
    """Adds up operations by category and direction."""

    def __init__(self) -> None:
        self.forward_s: dict[str, float] = {}
        self.backward_s: dict[str, float] = {}
        self.half_width_s, self.extrapolated, self.kernels = 0.0, False, 0.0

    def add(self, op: Op, time: Time) -> None:
        self.charge(op.category, op.backward, time, op.count)
        self.kernels += op.count * op.kernels

    def charge(self, category: str, backward: bool, time: Time, count: int = 1) -> None:
        self.put(category, backward, count * time[0])
        self.widen(count * time[1], time[2])

    def widen(self, half_width_s: float, extrapolated: bool) -> None:
        self.half_width_s += half_width_s
        self.extrapolated |= extrapolated

    def put(self, category: str, backward: bool, seconds: float) -> None:
        side = self.backward_s if backward else self.forward_s
        side[category] = side.get(category, 0.0) + seconds

    def merge(self, other: Tally, times: float) -> None:
        for category, seconds in other.forward_s.items():
            self.put(category, False, times * seconds)
        for category, seconds in other.backward_s.items():
            self.put(category, True, times * seconds)
        self.half_width_s += times * other.half_width_s
        self.extrapolated |= other.extrapolated
        self.kernels += times * other.kernels

    @property
    def total_s(self) -> float:
        return sum(self.forward_s.values()) + sum(self.backward_s.values())


def kept(memo: dict[_Key, _Value], key: _Key, value: _Value) -> _Value:
    if len(memo) >= _MEMO_SIZE:
        memo.clear()
    memo[key] = value
    return value


def _pools(plan: Plan) -> Counter[tuple[AdapterSlot, ...]]:
    return Counter(htask.shapes[-1].slots for htask in plan.htasks)


def _sum_of(costs: Sequence[Estimate]) -> Estimate:
    value = low = high = 0.0
    extrapolated = False
    for cost in costs:
        value, low, high = value + cost[0], low + cost[1], high + cost[2]
        extrapolated |= cost[3]
    return Estimate(value, low, high, extrapolated)


def _take_like(
    held: list[dict[int, Estimate]], wanted: Mapping[int, Estimate]
) -> Mapping[int, Estimate] | None:
    """Takes out what an hTask has prepared, of one that can run the shapes that are wanted: each
    has graphs of its own, which read the pool of its slots, so that none serves two hTasks."""
    like = [item for item in held if item is wanted or not item.keys().isdisjoint(wanted)]
    if not like:
        return None
    found = max(like, key=lambda item: len(item.keys() & wanted.keys()))
    held.remove(found)
    return found


def nominal_load(shape: ShapeKey) -> PassLoad:
    """The load that stands for a shape when lengths are not known: every chunk one full sequence,
    a loss on every row, and every slot closing its step."""
    length = shape.chunk_tokens
    pairs = shape.num_chunks * length * (length + 1) / 2
    return PassLoad(shape, pairs, float(shape.padded_tokens), tuple(range(len(shape.slots))))


class ComposedCostModel(ABC):
    """A CostModel made of single operations' times. Stateless but for memos."""

    def __init__(self, model: ModelShape, memory: MemoryModel, dtype_bytes: int) -> None:
        self.model, self.memory, self.dtype_bytes = model, memory, dtype_bytes
        self._coefficients: dict[Hashable, PassCoefficients] = {}
        self._memo: dict[Hashable, object] = {}  # of operations, however they add up
        self._parts: dict[Hashable, PassParts] = {}
        self._graphs: dict[Hashable, tuple[tuple[Subgraph, ...], tuple[float, ...]]] = {}
        # Shapes of many slots hash slowly, and those of a ladder share their slots: memos know
        # slots by numbers, which are never given again.
        self._slot_numbers: dict[tuple[AdapterSlot, ...], int] = {}
        self._last_slots: tuple[tuple[AdapterSlot, ...], int] | None = None
        self._next_number = 0
        self._adapter_loads: dict[AdapterSlot, Estimate] = {}
        self._first_transitions: dict[
            tuple[int, ReplicaShape, tuple[int, ...]], tuple[tuple[ShapeKey, ...], Estimate]
        ] = {}
        self._shape_ids: dict[ShapeKey, int] = {}
        # By id of a tuple of shapes, which the entry keeps alive.
        self._capture_sets: dict[
            int, tuple[tuple[ShapeKey, ...], ReplicaShape, dict[int, Estimate], Estimate]
        ] = {}

    # ------------------------------------------------------------- what a cost model provides

    @abstractmethod
    def op_time(self, op: Op) -> Time:
        """Seconds of ONE execution of ``op``."""

    @abstractmethod
    def attention_rates(self, tp: int) -> tuple[Rates, Rates]:
        """One layer's attention, forward and backward."""

    @abstractmethod
    def loss_rates(self) -> tuple[Rates, Rates]:
        """The loss head, forward and backward; whole on every rank of the last stage."""

    @abstractmethod
    def adapter_load_s(self, slot: AdapterSlot) -> Estimate:
        """Making one adapter and its optimizer state ready on an instance."""

    @property
    def charges_moves(self) -> bool:
        return False

    def move_s(self, slot: AdapterSlot) -> Estimate:
        """Moving a task from one pool of slots to another; see ``charges_moves``."""
        return Estimate(0.0, 0.0, 0.0)

    def captures_anew(self, previous: Plan, new: Plan) -> bool:
        """Whether shapes that the instance has run must be prepared again."""
        return False

    @abstractmethod
    def capture_s(self, shape: ShapeKey, replica: ReplicaShape) -> Estimate:
        """Preparing one shape that has not run before (graph capture, compilation)."""

    def first_capture_s(self, largest: ShapeKey, replica: ReplicaShape) -> Estimate:
        """What the first of an hTask's shapes, which is its largest, takes more than others."""
        return Estimate(0.0, 0.0, 0.0)

    def contention(self) -> tuple[float, float]:
        """Factors by which a compute kernel, and a communication kernel, take longer while the
        other stream of their GPU is busy."""
        return 1.0, 1.0

    def startup_s(self, replica: ReplicaShape = _SOLO) -> Estimate:
        """Process, device context and imports, then the weights of the fullest stage from local
        storage, which is slower than the host link. Judged, not measured; capturing shapes is
        charged with the first plan (``transition_s``)."""
        seconds = STARTUP_LATENCY_S + self.backbone_bytes(replica) / STORAGE_BYTES_PER_S
        return Estimate(seconds, seconds / 3, seconds * 3, True)

    def checkpoint_s(self, slot: AdapterSlot) -> Estimate:
        """As long as loading takes: the same bytes over the same link, the other way."""
        return self._adapter_load_s(slot)

    @property
    def charges_ends(self) -> bool:
        """Whether ``finish_s`` is anything at all."""
        return False

    def finish_s(self, slot: AdapterSlot) -> Estimate:
        """Nothing, where it was not measured."""
        return Estimate(0.0, 0.0, 0.0)

    def leave_s(self) -> Estimate:
        """Taking a plan over, besides what it has to make; nothing, where it was not measured."""
        return Estimate(0.0, 0.0, 0.0)

    def rebuild_s(self) -> Estimate:
        """Letting pools of slots go and making others, whoever is in them; see ``leave_s``."""
        return Estimate(0.0, 0.0, 0.0)

    def slot_overhead_s(self, slots: tuple[AdapterSlot, ...], layers: int) -> float:
        """Time of a pass that the presence of slots adds besides their operations."""
        return 0.0

    def adapter_kernels(self, separate: Sequence[float]) -> float:
        """Launches of one layer's adapters; ``separate``: of each slot by itself."""
        return sum(separate)

    def exposed_host_s(self, kernels: float, device_s: float) -> float:
        """Host time that the device's work does not hide."""
        return 0.0

    # -------------------------------------------------------------------------- the protocol

    def pass_coefficients(self, shape: ShapeKey, replica: ReplicaShape = _SOLO) -> PassCoefficients:
        """The affine time of a pass. Raises ConfigError for a replica that the model does not
        divide by or an adapter that it cannot take, ProfileError for an op not measured."""
        key = (*shape[:2], self._slots_number(shape.slots), shape.recompute, replica)
        known = self._coefficients.get(key)
        if known is None:
            known = kept(self._coefficients, key, self._coefficients_of(shape, replica))
        return known

    def _slots_number(self, slots: tuple[AdapterSlot, ...]) -> int:
        last = self._last_slots
        if last is not None and last[0] is slots:
            return last[1]
        number = self._slot_numbers.get(slots)
        if number is None:
            if len(self._slot_numbers) >= _MEMO_SIZE:
                self._slot_numbers.clear()
            number = self._slot_numbers[slots] = self._next_number
            self._next_number += 1
        self._last_slots = slots, number
        return number

    def pass_times_s(self, loads: Sequence[PassLoad], replica: ReplicaShape = _SOLO) -> Estimates:
        """Seconds of each pass, exactly the affine form of ``pass_coefficients``."""
        values = np.empty(len(loads))
        errors, outside = np.empty(len(loads)), np.empty(len(loads), dtype=bool)
        most_rows = self._most_loss_rows() if loads else 0.0
        for index, load in enumerate(loads):
            coefficients = self.pass_coefficients(load.shape, replica)
            values[index] = pass_time_s(coefficients, load)
            errors[index] = coefficients.relative_error
            outside[index] = coefficients.extrapolated or load.loss_rows > most_rows
        low = values * np.maximum(1 - errors, 0.0)
        return Estimates(values, low, values * (1 + errors), outside)

    def breakdown_s(self, load: PassLoad, replica: ReplicaShape = _SOLO) -> dict[str, float]:
        """The same pass by category (``ops.CATEGORIES``); sums to ``pass_times_s``."""
        parts = self._busiest_stage(load.shape, replica)
        result: dict[str, float] = dict.fromkeys(ops.CATEGORIES, 0.0)
        for side in (parts.forward_s, parts.backward_s):
            for category, seconds in side.items():
                result[category] += seconds
        result[ops.ATTENTION] += load.attention_pairs * sum(parts.per_pair_s)
        result[ops.LOSS] += load.loss_rows * sum(parts.per_loss_row_s)
        result[ops.OPTIMIZER] += sum(parts.optimizer_s[slot] for slot in load.optimizer_slots)
        return {category: seconds for category, seconds in result.items() if seconds}

    def subgraph_times_s(self, plan: Plan) -> SubgraphTimes:
        """See ``muxtune.cost.subgraphs``: of each hTask's largest shape under ``nominal_load``, on
        the plan's first replica. For one GPU they sum to ``pass_times_s`` of that load."""
        replica = plan.replicas[0]
        rows = [self._subgraphs(htask.shapes[-1], replica) for htask in plan.htasks]
        return SubgraphTimes(
            tuple(graph for graph, _ in rows),
            tuple(times for _, times in rows),
            any(self.pass_coefficients(h.shapes[-1], replica).extrapolated for h in plan.htasks),
            self.contention(),
        )

    def _subgraphs(
        self, shape: ShapeKey, replica: ReplicaShape
    ) -> tuple[tuple[Subgraph, ...], tuple[float, ...]]:
        key = (shape, replica)
        if key not in self._graphs:
            costs = ComposedSubgraphCosts(self, nominal_load)
            kept(self._graphs, key, pass_subgraphs(self.model, shape, replica, costs))
        return self._graphs[key]

    def transition_s(self, previous: Plan | None, new: Plan) -> Estimate:
        """Loading the adapters of tasks that are new to the instance, and preparing shapes that
        none of its hTasks has run for each hTask; 0 when neither changes."""
        if len(new.htasks) == 1 and (previous is None or not previous.htasks):
            return self._from_nothing_s(new.htasks[0], new.replicas[0])
        old_tasks: set[str] = set()
        held: list[dict[int, Estimate]] = []  # prepared shapes of each hTask that runs
        costs: list[Estimate] = []
        if previous is None or previous.htasks != new.htasks:
            costs.append(self.leave_s())
            rebuild = self.rebuild_s()
            if rebuild.value and (previous is None or _pools(previous) != _pools(new)):
                costs.append(rebuild)
        if previous:
            old_tasks.update(*[htask.slot_of for htask in previous.htasks])
            if not self.captures_anew(previous, new):
                shapes = [htask.shapes for htask in previous.htasks]
                held = [self._captures(item, new.replicas[0])[0] for item in shapes]
        for htask in new.htasks:
            if not htask.slot_of.keys() <= old_tasks:
                slots = htask.shapes[-1].slots
                costs += [
                    self._adapter_load_s(slots[slot])
                    for task_id, slot in htask.slot_of.items()
                    if task_id not in old_tasks
                ]
        if self.charges_moves and previous:
            costs += self._moves_s(previous, new)
        for htask in new.htasks:
            captures, together = self._captures(htask.shapes, new.replicas[0])
            known = _take_like(held, captures)
            if known is None:
                costs.append(together)
            else:
                costs += [cost for shape_id, cost in captures.items() if shape_id not in known]
        return _sum_of(costs)

    def _moves_s(self, previous: Plan, new: Plan) -> list[Estimate]:
        """Of tasks whose hTask has other slots now, so another pool."""
        old = {task_id: h.shapes[-1].slots for h in previous.htasks for task_id in h.slot_of}
        return [
            self.move_s(htask.shapes[-1].slots[slot])
            for htask in new.htasks
            for task_id, slot in htask.slot_of.items()
            if old.get(task_id, htask.shapes[-1].slots) != htask.shapes[-1].slots
        ]

    def _from_nothing_s(self, htask: HTask, replica: ReplicaShape) -> Estimate:
        """``transition_s`` of an instance that held no task. Remembered by the identity of the
        shapes, as in ``_captures``."""
        key = (id(htask.shapes), replica, tuple(htask.slot_of.values()))
        found = self._first_transitions.get(key)
        if found is None:
            if len(self._first_transitions) >= _MEMO_SIZE:
                self._first_transitions.clear()
            slots = htask.shapes[-1].slots
            costs = [self._adapter_load_s(slots[slot]) for slot in htask.slot_of.values()]
            costs += [self.leave_s(), self.rebuild_s()]
            total = _sum_of([*costs, self._captures(htask.shapes, replica)[1]])
            found = self._first_transitions[key] = (htask.shapes, total)
        return found[1]

    def _adapter_load_s(self, slot: AdapterSlot) -> Estimate:
        found = self._adapter_loads.get(slot)
        if found is None:
            found = self._adapter_loads[slot] = self.adapter_load_s(slot)
        return found

    def _captures(
        self, shapes: tuple[ShapeKey, ...], replica: ReplicaShape
    ) -> tuple[dict[int, Estimate], Estimate]:
        """``capture_s`` of each shape by a number that equal shapes share, and of all, the first
        of which takes more. Remembered by the identity of the tuple, which plans of one
        arrangement share, because ShapeKeys are deep and hash slowly."""
        found = self._capture_sets.get(id(shapes))
        if found is not None and found[1] == replica:
            return found[2:]
        if len(self._capture_sets) >= _MEMO_SIZE:
            self._capture_sets.clear()
            self._shape_ids.clear()
        captures: dict[int, Estimate] = {}
        for shape in shapes:
            shape_id = self._shape_ids.setdefault(shape, len(self._shape_ids))
            captures[shape_id] = self.capture_s(shape, replica)
        first = [self.first_capture_s(shapes[-1], replica)] if shapes else []
        together = _sum_of([*captures.values(), *first])
        self._capture_sets[id(shapes)] = (shapes, replica, captures, together)
        return captures, together

    def memory_ledger_bytes(self, plan: Plan) -> StageLedgers:
        """See ``muxtune.cost.memory``; always flagged as extrapolated: arithmetic, not measured."""
        return self.memory.ledgers(plan)

    def pass_bytes(self, shape: ShapeKey, replica: ReplicaShape = _SOLO) -> int:
        """Bytes of one pass in flight, loss included, on a single stage or on the first and last
        stage together (an upper bound)."""
        first = self.memory.pass_bytes(shape, replica, 0) * replica.pp
        if replica.pp == 1:
            return first
        return max(first, self.memory.pass_bytes(shape, replica, replica.pp - 1))

    def resident_bytes(self, slots: Sequence[AdapterSlot], replica: ReplicaShape = _SOLO) -> int:
        """Bytes held all the time on the fullest stage: backbone, these slots, framework."""
        return self.memory.resident_bytes(slots, replica)

    def backbone_bytes(self, replica: ReplicaShape = _SOLO) -> int:
        """Weights of the fullest stage."""
        return max(self.memory.backbone_bytes(replica, stage) for stage in range(replica.pp))

    # ----------------------------------------------------------------------------- composing

    def _coefficients_of(self, shape: ShapeKey, replica: ReplicaShape) -> PassCoefficients:
        parts = self._busiest_stage(shape, replica)
        base, load = parts.base_s, nominal_load(shape)
        pairs_s = load.attention_pairs * sum(parts.per_pair_s)
        loss_s = load.loss_rows * sum(parts.per_loss_row_s)
        half_width = parts.half_width_s + pairs_s * parts.pair_error + loss_s * parts.loss_error
        return PassCoefficients(
            base_s=base,
            per_pair_s=sum(parts.per_pair_s),
            per_loss_row_s=sum(parts.per_loss_row_s),
            optimizer_s=parts.optimizer_s,
            relative_error=half_width / (base + pairs_s + loss_s),
            extrapolated=parts.extrapolated,
        )

    def _busiest_stage(self, shape: ShapeKey, replica: ReplicaShape) -> PassParts:
        number = self._slots_number(shape.slots)
        key = (*shape[:2], number, shape.recompute, replica)
        known = self._parts.get(key)
        if known is None:
            ops.check_replica(self.model, replica)
            layers = stage_layers(self.model, replica.pp)[0]
            # An upper bound where layers do not divide: the longest stage and the loss head.
            parts = self._stage_parts(shape, replica, layers, True, True)
            known = kept(self._parts, key, parts)
        return known

    def _stage_parts(
        self, shape: ShapeKey, replica: ReplicaShape, layers: int, first: bool, last: bool
    ) -> PassParts:
        rows = shape.padded_tokens + ops.prompt_rows(shape.slots)
        tally = Tally()
        tally.merge(self._block(rows, replica.tp), layers)
        own_rows = shape.padded_tokens / max(1, len(shape.slots))
        separate = []
        slots = self._of_slots(shape.slots, layers, replica.tp)
        for slot, count in slots.kinds.items():
            adapter = self._slot(slot, own_rows, replica.tp)
            tally.merge(adapter, layers * count)
            separate += [adapter.kernels] * count
        tally.kernels += layers * (self.adapter_kernels(separate) - sum(separate))
        if first or last:
            tally.merge(self._edges(rows, replica.pp), 1)
        pairs = 0.0
        if any(ops.is_prepended(slot) for slot in slots.kinds):
            pairs = ops.prepended_pairs(shape.slots, shape.padded_tokens)
        pair_rates = self._add_attention(tally, shape, layers, replica.tp, rows, pairs)
        loss_rates = self._add_loss(tally) if last else (_NOTHING, _NOTHING)
        tally.put(ops.OVERHEAD, False, slots.overhead_s)
        tally.put(ops.OVERHEAD, False, self.exposed_host_s(tally.kernels, tally.total_s))
        share = self._add_recompute(tally, shape)
        forward, backward = (layers * rates.per_unit_s for rates in pair_rates)
        return PassParts(
            tally.forward_s, tally.backward_s, (forward, backward + share * forward),
            (loss_rates[0].per_unit_s, loss_rates[1].per_unit_s),
            slots.optimizer_s, tally.half_width_s,
            max(rates.relative_error for rates in pair_rates),
            max(rates.relative_error for rates in loss_rates),
            tally.extrapolated or slots.extrapolated,
        )  # fmt: skip

    def _of_slots(self, slots: tuple[AdapterSlot, ...], layers: int, tp: int) -> SlotCosts:
        """How often each slot occurs, their overhead and optimizers."""
        key = ("slots", self._slots_number(slots), layers, tp)
        if key not in self._memo:
            kinds = Counter(slots)
            of_kind = {slot: self._optimizer(slot, layers, tp) for slot in kinds}
            found = SlotCosts(
                kinds,
                self.slot_overhead_s(slots, layers),
                tuple([of_kind[slot].value_s for slot in slots]),
                any(time.extrapolated for time in of_kind.values()),
            )
            self._remember(key, found)
        return self._memo[key]  # type: ignore[return-value]

    def _add_attention(
        self, tally: Tally, shape: ShapeKey, layers: int, tp: int, rows: int, pairs: float
    ) -> tuple[Rates, Rates]:
        # The number of sequences is not part of a load; one a chunk is the usual case. What
        # virtual tokens add does not depend on the load either.
        rates = self._known_rates(self.attention_rates, tp)
        for rate, backward in zip(rates, (False, True), strict=True):
            fixed = shape.num_chunks * rate.per_call_s + rows * rate.per_row_s
            fixed += pairs * rate.per_unit_s
            tally.put(ops.ATTENTION, backward, layers * fixed)
            tally.half_width_s += layers * fixed * rate.relative_error
            tally.extrapolated |= shape.chunk_tokens > rate.max_size
        return rates

    def _add_loss(self, tally: Tally) -> tuple[Rates, Rates]:
        rates = self._known_rates(self.loss_rates)
        for rate, backward in zip(rates, (False, True), strict=True):
            tally.put(ops.LOSS, backward, rate.per_call_s)
            tally.half_width_s += rate.per_call_s * rate.relative_error
        return rates

    def _known_rates(
        self, rates: Callable[..., tuple[Rates, Rates]], *arguments: int
    ) -> tuple[Rates, Rates]:
        key = (rates.__name__, *arguments)
        if key not in self._memo:
            self._remember(key, rates(*arguments))
        return self._memo[key]  # type: ignore[return-value]

    def _add_recompute(self, tally: Tally, shape: ShapeKey) -> float:
        share = min(1.0, shape.recompute / self.model.num_layers)
        if share:
            again = (ops.BACKBONE, ops.ATTENTION, ops.ELEMENTWISE, ops.ADAPTERS, ops.COMMUNICATION)
            seconds = sum(tally.forward_s.get(category, 0.0) for category in again)
            tally.put(ops.RECOMPUTE, True, share * seconds)
        return share

    def _block(self, rows: int, tp: int) -> Tally:
        key = ("block", rows, tp)
        if key not in self._memo:
            tally = Tally()
            for op in ops.block_ops(self.model, rows, self.dtype_bytes, tp):
                tally.add(op, self.op_time(op))
            self._remember(key, tally)
        return self._memo[key]  # type: ignore[return-value]

    def _edges(self, rows: int, pp: int) -> Tally:
        key = ("edges", rows, pp)
        if key not in self._memo:
            tally = Tally()
            for op in ops.edge_ops(self.model, rows, self.dtype_bytes, pp):
                tally.add(op, self.op_time(op))
            self._remember(key, tally)
        return self._memo[key]  # type: ignore[return-value]

    def _slot(self, slot: AdapterSlot, rows: float, tp: int) -> Tally:
        key = ("slot", slot, rows, tp)
        if key not in self._memo:
            tally = Tally()
            for op in ops.adapter_ops(self.model, slot, rows, self.dtype_bytes, tp):
                tally.add(op, self.op_time(op))
            self._remember(key, tally)
        return self._memo[key]  # type: ignore[return-value]

    def _optimizer(self, slot: AdapterSlot, layers: int, tp: int) -> Time:
        key = ("optimizer", slot, layers, tp)
        if key not in self._memo:
            tally = Tally()
            for op in ops.optimizer_ops(self.model, slot, layers, tp):
                tally.add(op, self.op_time(op))
            total = Time(tally.total_s, tally.half_width_s, tally.extrapolated)
            self._remember(key, total)
        return self._memo[key]  # type: ignore[return-value]

    def _remember(self, key: Hashable, value: object) -> None:
        kept(self._memo, key, value)

    def _forget_passes(self) -> None:
        """Where operations add up in another way from now on."""
        for memo in (self._coefficients, self._parts, self._graphs):
            memo.clear()

    def _most_loss_rows(self) -> float:
        """That were measured: a load with more is extrapolated."""
        return min(rate.max_size for rate in self.loss_rates())


_NOTHING = Rates(0.0, 0.0, 0.0, 0.0, float("inf"))


def pass_time_s(coefficients: PassCoefficients, load: PassLoad) -> float:
    """The affine form: one load's seconds."""
    seconds = coefficients.base_s + load.attention_pairs * coefficients.per_pair_s
    seconds += load.loss_rows * coefficients.per_loss_row_s
    for slot in load.optimizer_slots:
        seconds += coefficients.optimizer_s[slot]
    return seconds
