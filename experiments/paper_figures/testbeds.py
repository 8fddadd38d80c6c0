"""What the paper measured on: testbeds, models with their parallelism, data; and our assumptions.

Known: the machines, the models and their parallelism, the data sets and the lengths to which they
are padded. Not known, so assumed and varied: batch size, number of tasks, adapters, which layout
ran on which machine, the nodes' network. Every assumption is a field of ``Assumptions``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from muxtune.cost import CostBook
from muxtune.cost.analytic import AnalyticOptions
from muxtune.types import AdapterSlot, InstanceView, LengthSummary, ReplicaShape, TaskView
from muxtune.workload.lengths import summarise
from muxtune.workload.synthetic import histogram

DATA = {"sst2": 64, "openbookqa": 128, "rte": 256}  # padded to tokens
MIXED = "mixed"
INFINIBAND_BYTES_PER_S = 12.5e9  # one direction of a 100 Gbit/s port


class Testbed(NamedTuple):
    """``stage_link_bytes_per_s``: between pipeline stages on different nodes; 0: one node."""

    name: str
    device: str
    num_gpus: int
    stage_link_bytes_per_s: float = 0.0


A40 = Testbed("4 x A40, NVLink", "A40", 4)
A40_NODES = Testbed("8 nodes x 2 A40, InfiniBand", "A40", 16, INFINIBAND_BYTES_PER_S)
H100 = Testbed("8 x H100, NVLink", "H100-SXM", 8)


class Case(NamedTuple):
    """A model on a testbed, cut as the paper says."""

    testbed: Testbed
    model: str
    replica: ReplicaShape

    @property
    def label(self) -> str:
        cut = f"TP{self.replica.tp}" if self.replica.tp > 1 else ""
        cut += f"PP{self.replica.pp}" if self.replica.pp > 1 else ""
        return f"{self.model} {cut}"


CASES = (
    Case(A40, "gpt-2.7b", ReplicaShape(2, 1)),
    Case(A40, "llama-2-7b", ReplicaShape(1, 4)),
    Case(A40_NODES, "llama-2-13b", ReplicaShape(1, 8)),
    Case(A40_NODES, "opt-30b", ReplicaShape(2, 8)),
    Case(H100, "llama-2-7b", ReplicaShape(1, 4)),
    Case(H100, "llama-2-13b", ReplicaShape(1, 8)),
)


class Assumptions(NamedTuple):
    """``tasks``: on each instance of the testbed. ``batch``: sequences of a task's optimizer step.
    ``true_lengths``: padding inside a task is left out by systems that pack. ``launched``: fast
    kernels are launched by the host one by one, not captured."""

    tasks: int = 8
    batch: int = 8
    rank: int = 16
    targets: str = "all-linear"
    true_lengths: bool = False
    launched: bool = False
    memory_share: float = 0.9
    analytic: tuple[tuple[str, float], ...] = ()  # changes of AnalyticOptions
    contention: tuple[float, float] | None = None

    def options(self, case: Case, *, eager: bool = False) -> AnalyticOptions:
        """The cost model's constants for a system: HF PEFT is eager, all others alike."""
        made = AnalyticOptions.eager() if eager else AnalyticOptions()
        if self.launched and not eager:
            made = AnalyticOptions.eager(eager_host_s=10e-6, eager_traffic=1.0)
        made = made._replace(stage_link_bytes_per_s=case.testbed.stage_link_bytes_per_s)
        known = {name: value for name, value in self.analytic if eager or "eager" not in name}
        if self.contention is not None:
            made = made._replace(
                fast_link_contention=self.contention, slow_link_contention=self.contention
            )
        return made._replace(**known)  # type: ignore[arg-type]


def books(case: Case, assumed: Assumptions) -> tuple[CostBook, CostBook]:
    """(of the systems with fast kernels, of HF PEFT)."""
    fast, eager = assumed.options(case), assumed.options(case, eager=True)
    return CostBook(options=fast), CostBook(options=eager)


def view(case: Case, data: str, assumed: Assumptions, costs: CostBook) -> InstanceView:
    """One instance with its tasks; ``data``: a data set, or "mixed" for all three in turn."""
    chosen = list(DATA) if data == MIXED else [data]
    tasks = tuple(
        _task(case, f"task-{i:02d}", chosen[i % len(chosen)], assumed) for i in range(assumed.tasks)
    )
    device = costs.figures(case.testbed.device)
    limit = int(device.memory_bytes * assumed.memory_share)
    return InstanceView(
        "i", 0, tasks, None, limit, model=case.model, device=case.testbed.device,
        replicas=(case.replica,),
    )  # fmt: skip


def _task(case: Case, name: str, dataset: str, assumed: Assumptions) -> TaskView:
    slot = AdapterSlot("lora", assumed.rank, tuple(assumed.targets.split(",")))
    lengths = _lengths(dataset, assumed.true_lengths)
    length = DATA[dataset]
    return TaskView(name, "t", case.model, slot, assumed.batch, length, lengths, 1_000, 0, 0)


def _lengths(dataset: str, true_lengths: bool) -> LengthSummary:
    """Every sequence as long as it is padded to, or as long as it is."""
    length = DATA[dataset]
    if not true_lengths:
        tokens = np.full(100, length)
        return summarise(tokens, tokens - 1, f"{dataset}-padded")
    found = histogram(dataset)
    tokens = np.minimum(np.repeat(found.lengths_tokens, found.counts), length)
    return summarise(tokens, np.maximum(tokens - 1, 1), f"{dataset}-true")


def padded(where: InstanceView) -> InstanceView:
    """The same tasks as systems see them that pad each sequence to its data set's length."""
    return where._replace(
        tasks=tuple(
            task._replace(lengths=_lengths(task.lengths.content_hash.split("-")[0], False))
            for task in where.tasks
        )
    )


def workloads() -> Iterator[str]:
    yield from DATA
    yield MIXED
