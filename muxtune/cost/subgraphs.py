"""The graph of one micro-batch's pass: what a scheduler may order, on which stage, and its time.

Forward, stage by stage: groups of layers, then a transfer to the next stage. With tensor
parallelism each group is cut where its ranks meet (Megatron-LM, Shoeybi et al. 2019): attention
part, all-reduce, MLP part, all-reduce; mirrored in backward, where the all-reduce sums the input
gradients. The last stage computes the loss and its gradient. The backbone is frozen, so a
backward group yields the input gradient and the adapters' gradients, and nothing can be put off
as zero-bubble schedules put off weight gradients.

Then the optimizer, on every stage. Clipping needs the norm over ALL stages: partial sums of
squares travel with the backward transfers, so stage 0 knows the whole when its backward ends;
small messages ("norm") carry it up again, and no stage steps before it has it.

Seconds come from a table of functions (``SubgraphCosts``), so that figures, profiles or a test
can fill it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from muxtune.cost import ops
from muxtune.cost.curves import Time
from muxtune.cost.memory import stage_layers
from muxtune.cost.ops import Op
from muxtune.cost.shapes import ModelShape
from muxtune.errors import ConfigError
from muxtune.types import (
    PassLoad,
    Plan,
    ReplicaShape,
    ShapeKey,
    Subgraph,
    SubgraphKind,
    SubgraphTimes,
)

GROUPS_PER_STAGE = 2  # where nothing has to be cut: enough to show progress inside a stage
NORM_BYTES = 4  # one fp32 sum of squares a slot


class StageSeconds(NamedTuple):
    """One direction of one pass on one stage.

    ``compute_s``: everything on the compute stream but adapters and loss. ``collectives_s``: all
    of its all-reduces. ``loss_s``: on the last stage, else 0. ``p2p_s``: one transfer to the
    next stage in this direction. ``attention_share``: of ``compute_s``, up to the first
    all-reduce of each layer.
    """

    compute_s: float
    adapters_s: float = 0.0
    collectives_s: float = 0.0
    loss_s: float = 0.0
    p2p_s: float = 0.0
    attention_share: float = 1 / 3


class SubgraphCosts(Protocol):
    """The table of functions that fills a graph with seconds."""

    def stage_seconds(
        self, shape: ShapeKey, replica: ReplicaShape, stage: int, backward: bool
    ) -> StageSeconds: ...

    def optimizer_s(self, shape: ShapeKey, replica: ReplicaShape, stage: int) -> float:
        """All slots of the shape close a step."""
        ...

    def message_s(self, num_bytes: int) -> float:
        """A small transfer between neighbouring stages."""
        ...


class SubgraphOptions(NamedTuple):
    """Granularity. ``groups_per_stage``: 0 takes 2 where tp is 1, and every layer by itself
    where tp is more, because only then each all-reduce can be scheduled; fewer groups with tp > 1
    lump the all-reduces of a group, which is for quick estimates and cannot be executed.
    ``separate_adapters``: adapter compute as subgraphs of its own."""

    groups_per_stage: int = 0
    separate_adapters: bool = False


_DEFAULTS = SubgraphOptions()


def pass_subgraphs(
    model: ModelShape,
    shape: ShapeKey,
    replica: ReplicaShape,
    costs: SubgraphCosts,
    options: SubgraphOptions = _DEFAULTS,
) -> tuple[tuple[Subgraph, ...], tuple[float, ...]]:
    """Subgraphs of one pass and their seconds, in topological order.

    Raises ConfigError for more stages than layers, a negative number of groups, or costs that are
    negative or not finite.
    """
    _check(model, replica, options)
    builder = _Builder(model, shape, replica, costs, options)
    stages = range(replica.pp)
    for stage in stages:
        builder.forward(stage)
    for stage in reversed(stages):
        builder.backward(stage)
    builder.optimizers()
    return tuple(builder.graph), tuple(builder.times_s)


def subgraph_times(
    plan: Plan,
    model: ModelShape,
    costs: SubgraphCosts,
    options: SubgraphOptions = _DEFAULTS,
    replica: int = 0,
    extrapolated: bool = True,
) -> SubgraphTimes:
    """Of each hTask's largest shape, on one replica of the plan."""
    rows = [
        pass_subgraphs(model, htask.shapes[-1], plan.replicas[replica], costs, options)
        for htask in plan.htasks
    ]
    return SubgraphTimes(
        tuple(graph for graph, _ in rows), tuple(times for _, times in rows), extrapolated
    )


def _check(model: ModelShape, replica: ReplicaShape, options: SubgraphOptions) -> None:
    ops.check_replica(model, replica)
    if options.groups_per_stage < 0:
        raise ConfigError(
            "subgraphs.groups_per_stage", f"is {options.groups_per_stage}", "give 0 or more"
        )


class _Builder:
    """Appends subgraphs in running order; each waits for the one before unless said otherwise."""

    def __init__(
        self,
        model: ModelShape,
        shape: ShapeKey,
        replica: ReplicaShape,
        costs: SubgraphCosts,
        options: SubgraphOptions,
    ) -> None:
        self.shape, self.replica, self.costs, self.options = shape, replica, costs, options
        self.layers = stage_layers(model, replica.pp)
        self.graph: list[Subgraph] = []
        self.times_s: list[float] = []
        self.backward_ends: dict[int, int] = {}

    def forward(self, stage: int) -> None:
        seconds = self._seconds(stage, False)
        self._groups(stage, seconds, False)
        if stage < self.replica.pp - 1:
            self._append(stage, SubgraphKind.P2P, False, "send activations", seconds.p2p_s)

    def backward(self, stage: int) -> None:
        seconds = self._seconds(stage, True)
        loss_s = seconds.loss_s + self._seconds(stage, False).loss_s
        if stage == self.replica.pp - 1 and loss_s:
            self._append(stage, SubgraphKind.COMPUTE, True, "loss", loss_s)
        self._groups(stage, seconds, True)
        self.backward_ends[stage] = len(self.graph) - 1
        if stage:
            self._append(stage, SubgraphKind.P2P, True, "send gradients", seconds.p2p_s)

    def optimizers(self) -> None:
        last, message_s = self.replica.pp - 1, 0.0
        if last:
            message_s = self.costs.message_s(NORM_BYTES * len(self.shape.slots))
        knows = self.backward_ends[0]  # after which the stage has the norm over all stages
        for stage in range(last + 1):
            before = tuple(sorted({knows, self.backward_ends[stage]}))
            if stage < last:
                self._append(stage, SubgraphKind.P2P, True, "norm", message_s, (knows,))
                knows = len(self.graph) - 1
            optimizer_s = self.costs.optimizer_s(self.shape, self.replica, stage)
            kind = SubgraphKind.OPTIMIZER
            self._append(stage, kind, True, "optimizer", optimizer_s, before)

    def _seconds(self, stage: int, backward: bool) -> StageSeconds:
        return self.costs.stage_seconds(self.shape, self.replica, stage, backward)

    def _groups(self, stage: int, seconds: StageSeconds, backward: bool) -> None:
        layers, parallel = self.layers[stage], self.replica.tp > 1
        wanted = self.options.groups_per_stage or (layers if parallel else GROUPS_PER_STAGE)
        count = min(wanted, layers)
        first_layer = sum(self.layers[:stage])
        for group in reversed(range(count)) if backward else range(count):
            start, stop = (first_layer + layers * (group + i) // count for i in range(2))
            share = (stop - start) / layers
            name = f"layer {start}" if stop - start == 1 else f"layers {start}-{stop - 1}"
            if parallel:
                self._cut_group(stage, seconds, share, backward, name)
            else:
                self._part(stage, seconds, share, backward, name)

    def _cut_group(
        self, stage: int, seconds: StageSeconds, share: float, backward: bool, name: str
    ) -> None:
        attention = seconds.attention_share
        parts = [(f"attention {name}", attention), (f"mlp {name}", 1.0 - attention)]
        for label, part in reversed(parts) if backward else parts:
            self._part(stage, seconds, share * part, backward, label)
            exchange_s = share * seconds.collectives_s / 2
            self._append(stage, SubgraphKind.COLLECTIVE, backward, "all-reduce", exchange_s)

    def _part(
        self, stage: int, seconds: StageSeconds, share: float, backward: bool, label: str
    ) -> None:
        compute_s, adapters_s = share * seconds.compute_s, share * seconds.adapters_s
        if not self.options.separate_adapters:
            self._append(stage, SubgraphKind.COMPUTE, backward, label, compute_s + adapters_s)
            return
        self._append(stage, SubgraphKind.COMPUTE, backward, label, compute_s)
        self._append(stage, SubgraphKind.ADAPTER, backward, f"adapters {label}", adapters_s)

    def _append(
        self,
        stage: int,
        kind: SubgraphKind,
        backward: bool,
        label: str,
        seconds: float,
        depends_on: tuple[int, ...] | None = None,
    ) -> None:
        index = len(self.graph)
        if not 0.0 <= seconds < float("inf"):
            raise ConfigError(
                f"subgraph '{label}' of stage {stage}",
                f"takes {seconds} s",
                "give the cost table finite times, 0 or more",
            )
        if depends_on is None:
            depends_on = (index - 1,) if index else ()
        self.graph.append(Subgraph(index, stage, kind, backward, depends_on, label))
        self.times_s.append(seconds)


# ------------------------------------------------------------------------ from a cost model


class _StageModel(Protocol):
    """What is needed of ``composition.ComposedCostModel``."""

    model: ModelShape
    dtype_bytes: int

    def op_time(self, op: Op) -> Time: ...

    def _stage_parts(
        self, shape: ShapeKey, replica: ReplicaShape, layers: int, first: bool, last: bool
    ) -> Any: ...


class ComposedSubgraphCosts:
    """``SubgraphCosts`` of a composed cost model, for the loads that ``load_of`` names.

    On one GPU all subgraphs of a pass sum up to ``pass_times_s`` of that load; with several, the
    compute of every stage, its loss, collectives and transfers do.
    """

    def __init__(self, model: _StageModel, load_of: Callable[[ShapeKey], PassLoad]) -> None:
        self.model, self.load_of = model, load_of

    def stage_seconds(
        self, shape: ShapeKey, replica: ReplicaShape, stage: int, backward: bool
    ) -> StageSeconds:
        parts, load = self._parts(shape, replica, stage), self.load_of(shape)
        side = parts.backward_s if backward else parts.forward_s
        pairs_s = load.attention_pairs * parts.per_pair_s[backward]
        loss_s = side.get(ops.LOSS, 0.0) + load.loss_rows * parts.per_loss_row_s[backward]
        apart = (ops.LOSS, ops.COMMUNICATION, ops.ADAPTERS)
        compute_s = pairs_s + sum(s for category, s in side.items() if category not in apart)
        p2p_s = self._p2p_s(shape.padded_tokens * self.model.model.hidden, replica)
        at_edge = stage in (0, replica.pp - 1)  # whose parts hold the transfer
        collectives_s = side.get(ops.COMMUNICATION, 0.0) - (p2p_s if at_edge else 0.0)
        return StageSeconds(
            compute_s,
            side.get(ops.ADAPTERS, 0.0),
            max(collectives_s, 0.0),
            loss_s if stage == replica.pp - 1 else 0.0,
            p2p_s,
            self._attention_share(side, pairs_s, compute_s),
        )

    def optimizer_s(self, shape: ShapeKey, replica: ReplicaShape, stage: int) -> float:
        parts = self._parts(shape, replica, stage)
        return sum(parts.optimizer_s[slot] for slot in self.load_of(shape).optimizer_slots)

    def message_s(self, num_bytes: int) -> float:
        return self._transfer_s(num_bytes)

    def _parts(self, shape: ShapeKey, replica: ReplicaShape, stage: int) -> Any:
        layers = stage_layers(self.model.model, replica.pp)[stage]
        last = stage == replica.pp - 1
        return self.model._stage_parts(shape, replica, layers, stage == 0, last)

    def _p2p_s(self, numbers: float, replica: ReplicaShape) -> float:
        return self._transfer_s(numbers * self.model.dtype_bytes) if replica.pp > 1 else 0.0

    def _transfer_s(self, moved: float) -> float:
        op = Op("p2p", ops.COMMUNICATION, False, 1, (moved,), 0.0, moved, 0.0, 1)
        return self.model.op_time(op)[0]

    def _attention_share(self, side: Mapping[str, float], pairs_s: float, total_s: float) -> float:
        """Linears by their parameters, the attention itself wholly."""
        linears = self.model.model.block_linears
        attention = sum(item.num_parameters for item in linears if item.name.startswith("self_"))
        share = attention / sum(item.num_parameters for item in linears)
        kernel_s = pairs_s + side.get(ops.ATTENTION, 0.0)
        return (kernel_s + share * (total_s - kernel_s)) / total_s if total_s else share
