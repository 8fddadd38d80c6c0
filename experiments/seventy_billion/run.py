"""A 70B backbone on 8 GPUs: what fits, which layout, how many tasks. See README.md.

python -m experiments.seventy_billion.run --output validation/seventy_billion
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.seventy_billion.meta import check_shards
from muxtune.cost import CostBook, model_shape
from muxtune.cost.ops import check_replica
from muxtune.errors import ConfigError
from muxtune.planners.muxtune import MuxTunePlanner
from muxtune.report.run_folder import RunFolder, provenance
from muxtune.report.tables import format_bytes
from muxtune.types import AdapterSlot, InstanceView, Plan, Refusal, ReplicaShape, TaskView
from muxtune.workload.lengths import summarise
from muxtune.workload.synthetic import histogram

MODEL = "llama-3-70b"
DEVICES, NUM_GPUS = ("H100-SXM", "H200-SXM"), 8
MEMORY_SHARE = 0.9
DATASETS = {"sst2": 64, "openbookqa": 128, "rte": 256, "gsm8k": 512}
RANK, BATCH = 16, 8
COMPARED_TASKS, MOST_TASKS = 8, 256
HEADER = (
    f"{'layout':<18} {'weights a GPU':>14} {'least memory':>13} {'most tasks':>11} "
    f"{'step of all':>12} {'effective tok/s':>16} {'bubbles':>8} {'comm.':>6}"
)


class Layout(NamedTuple):
    """``replicas`` instances of ``replica`` side by side on the 8 GPUs."""

    replica: ReplicaShape
    replicas: int

    @property
    def label(self) -> str:
        return f"{self.replicas} x (TP{self.replica.tp} PP{self.replica.pp})"


def layouts() -> list[Layout]:
    """Every way to cut the model into equal instances that fill the GPUs."""
    found = []
    for tp in (1, 2, 4, 8):
        for pp in (1, 2, 4, 8):
            replica = ReplicaShape(tp, pp)
            if NUM_GPUS % replica.num_gpus == 0:
                found.append(Layout(replica, NUM_GPUS // replica.num_gpus))
    return sorted(found, key=lambda each: (each.replica.num_gpus, each.replica.tp))


def task(index: int) -> TaskView:
    dataset, longest = list(DATASETS.items())[index % len(DATASETS)]
    found = histogram(dataset)
    tokens = np.minimum(np.repeat(found.lengths_tokens, found.counts), longest)
    lengths = summarise(tokens, np.maximum(tokens - 1, 1), dataset)
    slot = AdapterSlot("lora", RANK, ("all-linear",))
    return TaskView(f"task-{index:03d}", "t", MODEL, slot, BATCH, longest, lengths, 1_000, 0, 0)


def view(device: str, replica: ReplicaShape, num_tasks: int, costs: CostBook) -> InstanceView:
    limit = int(costs.figures(device).memory_bytes * MEMORY_SHARE)
    tasks = tuple(task(index) for index in range(num_tasks))
    return InstanceView("i", 0, tasks, None, limit, model=MODEL, device=device, replicas=(replica,))


def least_bytes(device: str, replica: ReplicaShape, num_tasks: int, costs: CostBook) -> int:
    """Of the fullest GPU, in the smallest micro-batches."""
    tight = view(device, replica, num_tasks, costs)._replace(memory_limit_bytes=1)
    refusal = MuxTunePlanner(costs).plan(tight, None)
    assert isinstance(refusal, Refusal), refusal
    return refusal.needed_bytes


def most_tasks(device: str, replica: ReplicaShape, costs: CostBook) -> int:
    """On one instance, by bisection; at most ``MOST_TASKS``."""
    limit = view(device, replica, 1, costs).memory_limit_bytes
    low, high = 0, MOST_TASKS
    while low < high:
        middle = (low + high + 1) // 2
        if least_bytes(device, replica, middle, costs) <= limit:
            low = middle
        else:
            high = middle - 1
    return low


def rows(costs: CostBook) -> Iterable[dict]:
    for device in DEVICES:
        print(f"\n{NUM_GPUS} x {device}, {MODEL}: {COMPARED_TASKS} tasks in all, batch {BATCH}")
        print(HEADER)
        for layout in layouts():
            yield _row(device, layout, costs)


def _row(device: str, layout: Layout, costs: CostBook) -> dict:
    replica = layout.replica
    row: dict = {"device": device, "layout": layout.label, "replica": replica._asdict()}
    try:
        check_replica(model_shape(MODEL), replica)
    except ConfigError as error:
        row["refused"] = str(error)
        print(f"{layout.label:<18} refused: {error}")
        return row
    weights = costs(MODEL, device).backbone_bytes(replica)
    least, most = least_bytes(device, replica, 1, costs), most_tasks(device, replica, costs)
    row |= {"weights_bytes": weights, "least_bytes_one_task": least, "most_tasks": most}
    text = f"{layout.label:<18} {format_bytes(weights):>14} {format_bytes(least):>13} {most:>11}"
    mine = -(-COMPARED_TASKS // layout.replicas)
    where = view(device, replica, mine, costs)
    plan = MuxTunePlanner(costs).plan(where, None)
    if not isinstance(plan, Plan):
        row["refused"] = f"{plan.reason}: needs {plan.needed_bytes} of {plan.available_bytes} bytes"
        print(f"{text}  does not fit: {format_bytes(plan.available_bytes)} a GPU", flush=True)
        return row
    row |= _planned(plan, where, layout, costs)
    text += f" {row['step_s']:>10.3f} s {row['effective_tokens_per_s']:>16,.0f}"
    text += f" {row['bubble_share']:>8.1%} {row['communication_share']:>6.1%}"
    print(text, flush=True)
    return row


def _planned(plan: Plan, where: InstanceView, layout: Layout, costs: CostBook) -> dict:
    predicted = plan.predicted
    tokens = sum(task.lengths.mean_tokens * task.sequences_per_step for task in where.tasks)
    spent, round_s = predicted.breakdown_s, predicted.round_time_s.value
    ledgers = costs(MODEL, where.device).memory_ledger_bytes(plan).ledgers
    return {
        "tasks_an_instance": len(where.tasks),
        "step_s": predicted.tasks_step_time_s,
        "effective_tokens_per_s": layout.replicas * tokens / predicted.tasks_step_time_s,
        "bubble_share": spent.get("bubbles", 0.0) / round_s,
        "communication_share": spent.get("exposed_communication", 0.0) / round_s,
        "breakdown_s": dict(spent),
        "reason": plan.reason,
        "memory_limit_bytes": where.memory_limit_bytes,
        "ledgers_bytes": [dict(ledger.items) | {"stage": ledger.stage} for ledger in ledgers],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/seventy_billion"))
    given = parser.parse_args(arguments)
    with RunFolder(given.output) as folder:
        shapes = sorted({layout.replica for layout in layouts()})
        proof = check_shards(MODEL, shapes)
        told = f"{MODEL} on the meta device: {proof['parameters']:,} parameters"
        print(f"{told}; {len(proof['shards'])} shards have the bytes that the memory model says")
        folder.write_json("results.json", {
            "provenance": provenance(),
            "command": "python -m experiments.seventy_billion.run",
            "meta_device": proof,
            "layouts": list(rows(CostBook())),
        })  # fmt: skip


if __name__ == "__main__":
    main()
