"""Step time of one replica: its micro-batches through its pipeline, and what is communicated.

Two magnifications of the same model. ``ReplicaTimes.step_s`` is closed form and what plans are
made with: sum of the passes, plus PP - 1 times the longest to fill and drain. ``played_s`` plays
the micro-batches in 1F1B by the core's player (``muxtune.planning.orchestration``), as the
iteration-level simulator does. For equal micro-batches they agree: exactly without transfers,
else to within the transfers of one micro-batch. Unequal ones stall each other, which only playing
shows; so plans are made in closed form and compared as played.

In 1F1B stage 0 has at most S micro-batches in flight, and each of them crosses S - 1 boundaries
twice; so of a transfer time x, 2 x (S - 1) / S are exposed per micro-batch, however far
communication overlaps with other micro-batches' compute. ``pass_s`` contains that.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from muxtune.errors import ConfigError
from muxtune.planning.lobra.layer_times import LayerTimes
from muxtune.planning.orchestration import RoundGraph, RoundProblem
from muxtune.planning.orchestration.baselines import with_comm_order
from muxtune.planning.orchestration.player import StreamSequence, play_sequences
from muxtune.types import NS_PER_S, HTaskTurn, ReplicaShape, Subgraph, SubgraphKind

# With a frozen backbone, backward computes input gradients only: as much work as forward.
FORWARD_SHARE = 0.5


class Configuration(NamedTuple):
    """A replica's shape and the most tokens of a micro-batch that fit into its memory."""

    shape: ReplicaShape
    max_tokens: int

    @property
    def num_gpus(self) -> int:
        return self.shape.num_gpus

    def batch_of(self, length_tokens: int) -> int:
        """Sequences of this length in a full micro-batch; 0: not even one fits."""
        return self.max_tokens // length_tokens

    def __str__(self) -> str:
        return f"<{self.shape.tp},{self.shape.pp}>"


class SequenceBatch(NamedTuple):
    """A micro-batch of ``batch`` sequences, each padded to ``length_tokens``."""

    batch: int
    length_tokens: int

    @property
    def tokens(self) -> int:
        return self.batch * self.length_tokens


class Communication(NamedTuple):
    """What the layer times do not contain.

    ``transfer_s_per_token``: one activation or gradient over one stage boundary.
    ``sync_s``: all-reduce of every adapter gradient of a replica of one GPU; GPUs of a replica
    share that work.
    """

    transfer_s_per_token: float = 0.0
    sync_s: float = 0.0


class ReplicaTimes(NamedTuple):
    """Times of passes and steps of any configuration of one model on one kind of GPU."""

    layer_times: LayerTimes
    num_layers: int
    communication: Communication = Communication()

    def affine_pass_s(self, shape: ReplicaShape, length_tokens: float) -> tuple[float, float]:
        """(fixed, per sequence) seconds that a micro-batch adds to a step."""
        fixed_s, per_sequence_s = self.layer_times.affine_s(shape.tp, length_tokens)
        layers = self.num_layers / shape.pp
        exposed_s = 2.0 * self.transfer_s(length_tokens) * (shape.pp - 1) / shape.pp
        return fixed_s * layers, per_sequence_s * layers + exposed_s

    def pass_s(self, shape: ReplicaShape, batch: SequenceBatch) -> float:
        fixed_s, per_sequence_s = self.affine_pass_s(shape, batch.length_tokens)
        return fixed_s + per_sequence_s * batch.batch if batch.batch else 0.0

    def stage_s(self, shape: ReplicaShape, batch: SequenceBatch) -> float:
        """Forward and backward of one stage, without transfers."""
        layer_s = self.layer_times.seconds(shape.tp, batch.batch, batch.length_tokens)
        return layer_s * self.num_layers / shape.pp

    def transfer_s(self, tokens: float) -> float:
        return self.communication.transfer_s_per_token * tokens

    def step_s(self, shape: ReplicaShape, batches: Sequence[SequenceBatch]) -> float:
        """Closed form; without synchronisation of gradients."""
        passes = [self.pass_s(shape, batch) for batch in batches]
        return sum(passes) + (shape.pp - 1) * max(passes, default=0.0)

    def played_s(self, shape: ReplicaShape, batches: Sequence[SequenceBatch]) -> float:
        """1F1B in the given order, played; without synchronisation of gradients."""
        if not batches:
            return 0.0
        if shape.pp == 1:
            return self.step_s(shape, batches)
        graph = RoundGraph(self._problem(shape, batches))
        sequences = _one_f_one_b(graph)
        return play_sequences(graph, sequences, 1).makespan_ns / NS_PER_S

    def sync_s(self, replicas: Sequence[ReplicaShape]) -> float:
        """Ring all-reduce over all replicas. The replica with the fewest GPUs has most to send."""
        if not replicas:
            raise ConfigError("replicas", "there are none", "give at least one")
        share = (len(replicas) - 1) / len(replicas)
        return self.communication.sync_s * share / min(shape.num_gpus for shape in replicas)

    def _problem(self, shape: ReplicaShape, batches: Sequence[SequenceBatch]) -> RoundProblem:
        """Each distinct micro-batch is a graph; neighbours that are equal share a turn."""
        kinds = list(dict.fromkeys(batches))
        turns = tuple(
            HTaskTurn(kinds.index(batch), len(list(same))) for batch, same in groupby(batches)
        )
        counts = tuple(list(batches).count(kind) for kind in kinds)
        return RoundProblem(
            tuple(_graph(shape.pp) for _ in kinds),
            tuple(self._durations_ns(shape, kind) for kind in kinds),
            turns,
            shape.pp,
            shape.tp,
            micro_batches_per_step=counts,
        )

    def _durations_ns(self, shape: ReplicaShape, batch: SequenceBatch) -> tuple[int, ...]:
        stage_s, transfer_s = self.stage_s(shape, batch), self.transfer_s(batch.tokens)
        seconds = {
            (SubgraphKind.COMPUTE, False): stage_s * FORWARD_SHARE,
            (SubgraphKind.COMPUTE, True): stage_s * (1.0 - FORWARD_SHARE),
        }
        return tuple(
            round(seconds.get((item.kind, item.backward), transfer_s) * NS_PER_S)
            for item in _graph(shape.pp)
        )


def _graph(num_stages: int) -> tuple[Subgraph, ...]:
    """Forward from stage to stage, then backward; each subgraph waits for the one before."""
    steps: list[tuple[int, SubgraphKind, bool, str]] = []
    for backward in (False, True):
        stages = range(num_stages) if not backward else range(num_stages - 1, -1, -1)
        for position, stage in enumerate(stages):
            steps.append((stage, SubgraphKind.COMPUTE, backward, "layers"))
            if position < num_stages - 1:
                steps.append((stage, SubgraphKind.P2P, backward, "send"))
    return tuple(
        Subgraph(index, stage, kind, backward, (index - 1,) if index else (), label)
        for index, (stage, kind, backward, label) in enumerate(steps)
    )


def _one_f_one_b(graph: RoundGraph) -> list[StreamSequence]:
    """One flush at the end of the step, micro-batches of any sizes in the order of the round."""
    sequences: list[StreamSequence] = []
    for stage in range(graph.num_stages):
        sequences += [[(op, 0) for op in _stage_ops(graph, stage)], []]
    return with_comm_order(graph, sequences)


def _stage_ops(graph: RoundGraph, stage: int) -> list[int]:
    passes = {False: [], True: []}
    for op, item in enumerate(graph.subgraphs):
        if item.stage == stage and item.kind is SubgraphKind.COMPUTE:
            passes[item.backward].append(op)
    ahead = min(len(passes[False]), graph.num_stages - stage)
    ops = passes[False][:ahead]
    for done, backward in enumerate(passes[True]):
        ops.append(backward)
        ops.extend(passes[False][ahead + done : ahead + done + 1])
    return ops
