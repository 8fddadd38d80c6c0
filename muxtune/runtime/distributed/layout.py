"""Which rank holds what: replicas, stages and tensor-parallel parts of an instance.

Ranks are numbered replica by replica, in a replica stage by stage, in a stage by part. Rank 0
controls: it holds the engine and the tasks' data, and computes like the others.
"""

from __future__ import annotations

from typing import NamedTuple

from muxtune.cost.memory import stage_layers
from muxtune.cost.ops import check_replica
from muxtune.cost.shapes import ModelShape
from muxtune.errors import ConfigError
from muxtune.types import ReplicaShape

# Linears whose output features are cut over the ranks of a stage, and those whose input is, after
# Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053).
COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW_PARALLEL = ("o_proj", "down_proj")


class Place(NamedTuple):
    """Where a rank stands."""

    rank: int
    replica: int
    stage: int
    part: int  # of the stage's linears


class Layout(NamedTuple):
    """The replicas of one instance, one GPU or process a rank."""

    replicas: tuple[ReplicaShape, ...]

    @property
    def world_size(self) -> int:
        return sum(replica.num_gpus for replica in self.replicas)

    def first_rank(self, replica: int) -> int:
        return sum(shape.num_gpus for shape in self.replicas[:replica])

    def rank_of(self, replica: int, stage: int, part: int) -> int:
        return self.first_rank(replica) + stage * self.replicas[replica].tp + part

    @property
    def places(self) -> tuple[Place, ...]:
        """In the order of ranks."""
        return tuple(
            Place(self.rank_of(index, stage, part), index, stage, part)
            for index, shape in enumerate(self.replicas)
            for stage in range(shape.pp)
            for part in range(shape.tp)
        )

    def check(self, model: ModelShape, world_size: int) -> None:
        """Raises ConfigError when the model cannot be cut so, or the processes do not match."""
        for shape in self.replicas:
            check_replica(model, shape)
        if self.world_size != world_size:
            shapes = " + ".join(f"tp={shape.tp} x pp={shape.pp}" for shape in self.replicas)
            raise ConfigError(
                "cluster.num_gpus",
                f"the layout {shapes} needs {self.world_size} processes, but {world_size} run",
                f"Start {self.world_size} processes (torchrun --nproc-per-node), or change "
                "cluster.tp and cluster.pp",
            )


class Cut(NamedTuple):
    """The part [start, stop) of one linear's features that a rank holds. ``axis``: ``out`` for a
    column-parallel linear, ``in`` for a row-parallel one, empty for a whole one."""

    axis: str
    start: int
    stop: int

    def of_parameter(self, name: str) -> slice | None:
        """The columns of an adapter parameter in pool form that are held; None: it is whole here
        and its gradient a part of the sum over the stage's ranks."""
        cut = (self.axis == "out" and name == "lora_B") or (self.axis == "in" and name == "lora_A")
        return slice(self.start, self.stop) if cut else None


def cut_of(site_name: str, in_features: int, out_features: int, part: int, tp: int) -> Cut:
    """Of a linear of the whole model."""
    last = site_name.rsplit(".", 1)[-1]
    if tp > 1 and last in COLUMN_PARALLEL:
        width = out_features // tp
        return Cut("out", part * width, (part + 1) * width)
    if tp > 1 and last in ROW_PARALLEL:
        width = in_features // tp
        return Cut("in", part * width, (part + 1) * width)
    return Cut("", 0, 0)


def layers_of(model: ModelShape, pp: int, stage: int) -> range:
    """Layers of one stage."""
    counts = stage_layers(model, pp)
    start = sum(counts[:stage])
    return range(start, start + counts[stage])
