"""What LobRA's deployment planner needs to know of replicas, taken from a cost model.

LobRA measures layers and fits t(b, s); here the whole pass of a replica without a pipeline, as the
cost model gives it, stands for its layers together, and a pipeline divides it by its stages.
"""

from __future__ import annotations

from collections.abc import Sequence

from muxtune.planning.lobra.layer_times import LayerSample, fit_layer_times
from muxtune.planning.lobra.replica_times import Configuration, ReplicaTimes
from muxtune.protocols import CostModel
from muxtune.types import AdapterSlot, PassLoad, ReplicaShape, ShapeKey

BATCHES = (1, 2, 4, 8, 16, 32)
TOKEN_QUANTUM = 64


def replica_times(
    cost: CostModel,
    slots: tuple[AdapterSlot, ...],
    replicas: Sequence[ReplicaShape],
    lengths_tokens: Sequence[int],
) -> ReplicaTimes:
    """Fitted over these lengths and ``BATCHES``, with one loss row a token."""
    samples = [
        LayerSample(tp, batch, length, _pass_s(cost, slots, tp, batch, length))
        for tp in sorted({replica.tp for replica in replicas})
        for length in lengths_tokens
        for batch in BATCHES
    ]
    return ReplicaTimes(fit_layer_times(samples), num_layers=1)


def _pass_s(
    cost: CostModel, slots: tuple[AdapterSlot, ...], tp: int, batch: int, length: int
) -> float:
    pairs = batch * length * (length + 1) / 2
    load = PassLoad(ShapeKey(length, batch, slots), pairs, float(batch * length))
    return float(cost.pass_times_s([load], ReplicaShape(tp, 1)).value[0])


def configurations(
    cost: CostModel,
    slots: tuple[AdapterSlot, ...],
    replicas: Sequence[ReplicaShape],
    memory_limit_bytes: int,
) -> tuple[Configuration, ...]:
    """With the most tokens of a micro-batch that fit; replicas that hold none are left out."""
    made = (
        Configuration(replica, _most_tokens(cost, slots, replica, memory_limit_bytes))
        for replica in replicas
    )
    return tuple(each for each in made if each.max_tokens)


def _most_tokens(
    cost: CostModel, slots: tuple[AdapterSlot, ...], replica: ReplicaShape, limit_bytes: int
) -> int:
    free = limit_bytes - cost.resident_bytes(slots, replica)

    def fits(quanta: int) -> bool:
        return cost.pass_bytes(ShapeKey(TOKEN_QUANTUM, quanta, slots), replica) <= free

    if not fits(1):
        return 0
    high = 2
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * TOKEN_QUANTUM
