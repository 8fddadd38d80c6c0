"""What is measured: configurations, how tasks are grouped in them, and how long each may take."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from experiments.step_throughput.workload import BATCH_SIZE, MAX_LENGTH_TOKENS, MIX, Workload
from experiments.two_gpus.grouping import Groups, tiled_groups
from muxtune.cost.analytic import AnalyticCostModel
from muxtune.cost.book import CostBook, profiled_model
from muxtune.cost.composition import ComposedCostModel
from muxtune.cost.schema import load_profile
from muxtune.cost.shapes import model_shape
from muxtune.cost.shipped import profile_path
from muxtune.planners.muxtune import MuxTunePlanner
from muxtune.types import AdapterSlot, InstanceView, Plan, ReplicaShape, TaskView
from muxtune.workload.lengths import summarise
from muxtune.workload.synthetic import histogram

NUM_TASKS, RANK = 8, 16
MODEL, DEVICE, PROFILE = "llama-2-13b", "H200-SXM", "h200-sxm_llama-2-7b"
SOLO, PIPELINE, TENSOR = ReplicaShape(1, 1), ReplicaShape(1, 2), ReplicaShape(2, 1)
KNOWN_ROUNDS = 8

# Seconds on two H200, after the runs of 2026-11-22: loading a layout; a configuration beside its
# rounds, of any model and of 40 layers; of those a round, and one of a pipeline that drains.
FIRST_S, EACH_S, LAYERS_S, ROUND_S, DRAINED_ROUND_S, LAYERS = 5.0, 1.0, 6.0, 0.25, 0.5, 40
OTHER_ROUNDS = 10  # that are not measured, or are traced
# What is not flushed between rounds fills and drains once, however many there are.
UNFLUSHED_ROUNDS = 3


class Config(NamedTuple):
    """``grouping``: into how many hTasks of about equal size tasks are fused; or ``planned``: as
    the planner does. ``parts``: micro-batches of a step. ``order``:
    interleaved, sequential (one micro-batch after another), or 1f1b (each hTask's step by itself).
    ``early``: see ``OrderRunner``. ``by_nccl``: messages go by NCCL where others are copied."""

    replica: ReplicaShape
    grouping: str
    parts: int
    order: str
    early: bool = True
    by_nccl: bool = False

    @property
    def name(self) -> str:
        shape = f"tp{self.replica.tp} pp{self.replica.pp}"
        several = "hTask" if self.grouping == "1" else "hTasks"
        tasks = f"{self.grouping} {several}" if self.grouping.isdigit() else self.grouping
        late = "" if self.early else ", late receives"
        way = ", by NCCL" if self.by_nccl else ""
        return f"{shape}, {tasks}, {self.parts} parts, {self.order}{late}{way}"

    @property
    def groups(self) -> Groups:
        return groups_of(self.replica, self.grouping)

    def rounds(self, least: int) -> int:
        """To be measured."""
        return least * (UNFLUSHED_ROUNDS if self.order == "interleaved" else 1)

    def expected_s(self, rounds: int, is_first: bool, layers: int = 0) -> float:
        """Of a run on two H200: a measured one, warm-ups and a traced one."""
        drains = self.replica.pp > 1 and self.order != "interleaved"
        round_s = DRAINED_ROUND_S if drains else ROUND_S
        layers_s = LAYERS_S + round_s * (self.rounds(rounds) + OTHER_ROUNDS)
        return FIRST_S * is_first + EACH_S + layers_s * (layers or LAYERS) / LAYERS


class MeasuredCosts(CostBook):
    """As the captured step was measured on this device with another model; transfers, which one
    GPU's profile has none of, are analytic."""

    def _build(self, model: str, device: str) -> ComposedCostModel:
        shape, profile = self.shape(model), load_profile(profile_path(PROFILE))
        analytic = AnalyticCostModel(shape, self.figures(device), self.options, self.memory)
        measured = profiled_model(shape, profile, self.memory)
        known = measured.op_time
        measured.op_time = lambda op: (analytic.op_time if op.name == "p2p" else known)(op)
        return measured


@lru_cache(maxsize=64)
def groups_of(replica: ReplicaShape, grouping: str) -> Groups:
    if grouping == "planned":
        return planned_groups(replica)
    if grouping == "planned, measured costs":
        return planned_groups(replica, MeasuredCosts())
    if grouping == "tiles":
        return tiled_groups(tokens_by_round(), model_shape(MODEL))
    return balanced_groups(int(grouping))


@lru_cache(maxsize=1)
def tokens_by_round() -> np.ndarray:
    """Of each task [rounds, tasks]."""
    tokens = np.zeros((KNOWN_ROUNDS, NUM_TASKS), dtype=int)
    rounds = Workload(NUM_TASKS, (RANK,) * NUM_TASKS, 1 << 10, NUM_TASKS).rounds(0)
    for at, (micro_batch,) in zip(range(KNOWN_ROUNDS), rounds, strict=False):
        for sequence in micro_batch.sequences:
            tokens[at, sequence.slot] += len(sequence.tokens_n)
    return tokens


def _lengths_tokens(dataset: str) -> np.ndarray:
    found = histogram(dataset)
    return np.minimum(np.repeat(found.lengths_tokens, found.counts), MAX_LENGTH_TOKENS)


def balanced_groups(count: int) -> Groups:
    """The longest task first, to the group of fewest tokens."""
    means = [float(_lengths_tokens(MIX[i % len(MIX)]).mean()) for i in range(NUM_TASKS)]
    groups: list[list[int]] = [[] for _ in range(count)]
    for task in sorted(range(NUM_TASKS), key=lambda i: -means[i]):
        min(groups, key=lambda group: sum(means[i] for i in group)).append(task)
    return tuple(tuple(sorted(group)) for group in groups)


def planned_groups(replica: ReplicaShape, costs: CostBook | None = None) -> Groups:
    """The hTasks of the planner's plan, by the analytic costs of this device if no others are
    given."""
    costs = costs or CostBook()
    limit = int(0.9 * costs.figures(DEVICE).memory_bytes)
    tasks = tuple(_task(index) for index in range(NUM_TASKS))
    view = InstanceView("i", 0, tasks, None, limit, model=MODEL, device=DEVICE, replicas=(replica,))
    plan = MuxTunePlanner(costs).plan(view, None)
    assert isinstance(plan, Plan), plan
    return tuple(tuple(sorted(int(name) for name in htask.quota)) for htask in plan.htasks)


def _task(index: int) -> TaskView:
    dataset = MIX[index % len(MIX)]
    tokens = _lengths_tokens(dataset)
    lengths = summarise(tokens, np.maximum(tokens - 1, 1), dataset)
    slot = AdapterSlot("lora", RANK, ("all-linear",))
    return TaskView(
        str(index), "t", MODEL, slot, BATCH_SIZE, MAX_LENGTH_TOKENS, lengths, 1_000, 0, 0
    )


def _pipeline(grouping: str, order: str = "interleaved", parts: int = 1, early: bool = True):
    return Config(PIPELINE, grouping, parts, order, early)


def _tensor(grouping: str, order: str) -> Config:
    return Config(TENSOR, grouping, 1, order)


# Of one layout each. What matters most comes first: a run that is cut off has it.
SETS: dict[str, Sequence[Config]] = {
    "one": [Config(SOLO, "1", 1, "sequential")],
    "pp": [
        _pipeline("tiles"), _pipeline("planned"), _pipeline("1", "1f1b", 4),
        _pipeline("8", "1f1b", 2),
    ],
    "tp": [
        _tensor("2", "interleaved"), _tensor("2", "sequential"), _tensor("1", "sequential"),
        _tensor("2", "interleaved")._replace(by_nccl=True),
    ],
    "pp-slow": [_pipeline("tiles"), _pipeline("8", "1f1b", 2)],
    "tp-slow": [_tensor("3", "interleaved"), _tensor("3", "sequential")],
    "pp-tiles": [_pipeline("tiles")],
    "tp-one": [_tensor("3", "interleaved")],
    "tp-four": [_tensor("4", "interleaved")],
    "pp-one": [_pipeline("8", "1f1b", 2)],
    "tp-three": [_tensor("3", "interleaved"), _tensor("3", "sequential")],
    "tp-two": [_tensor("2", "interleaved"), _tensor("2", "sequential")],
    "pp-late": [_pipeline("planned", early=False)],
    "pp-more": [_pipeline("4"), _pipeline("planned", "sequential")],
    "tp-rehearsal": [_tensor("2", "interleaved"), _tensor("1", "sequential")],
    "pp-rehearsal": [
        _pipeline("1", "1f1b", 4), _pipeline("planned"), _pipeline("planned", early=False),
    ],
}  # fmt: skip
