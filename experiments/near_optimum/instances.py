"""Random questions for a planner: up to 8 tasks with mixed lengths, ranks and batch sizes on 1 to
4 stages, with memory from barely enough for the neediest task alone to plenty."""

# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import random

from muxtune.cost import CostBook
from muxtune.planners.muxtune import MuxTunePlanner
from muxtune.types import AdapterSlot, InstanceView, LengthSummary, Refusal, ReplicaShape, TaskView

MODEL = "llama-2-7b"
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PLENTY_BYTES = 1 << 40


def random_instance(seed: int, costs: CostBook, most_tasks: int = 8) -> InstanceView:
    rng = random.Random(seed)
    tasks = tuple(_task(rng, f"task-{i}") for i in range(rng.randint(1, most_tasks)))
    replica = ReplicaShape(1, rng.randint(1, 4))
    view = InstanceView(
        "instance",
        0,
        tasks,
        None,
        PLENTY_BYTES,
        model=MODEL,
        device=rng.choice(("H100-SXM", "A40")),
        replicas=(replica,),
    )
    return view._replace(memory_limit_bytes=_limit(rng, view, costs))


def _task(rng: random.Random, name: str) -> TaskView:
    longest = rng.choice((64, 128, 256, 512))
    lengths = sorted(min(longest, 4 + int(rng.lognormvariate(4, 0.7))) for _ in range(400))
    summary = LengthSummary(
        len(lengths),
        sum(lengths) / len(lengths),
        sum(lengths) / len(lengths) - 1,
        sum(n * n for n in lengths) / len(lengths),
        lengths[-1],
        tuple(lengths[round(i / 32 * (len(lengths) - 1))] for i in range(33)),
        f"{name}-{rng.random()}",
    )
    slot = AdapterSlot("lora", rng.choice((4, 8, 16, 64)), rng.choice((ALL_LINEAR, ALL_LINEAR[:2])))
    return TaskView(
        name, "t", MODEL, slot, rng.choice((1, 2, 4, 8, 16)), longest, summary, 100, 0, 0
    )


def _limit(rng: random.Random, view: InstanceView, costs: CostBook) -> int:
    """Tight: between what is resident with one task's smallest pass and what all want at once."""
    if rng.random() < 0.4:
        return PLENTY_BYTES
    planner = MuxTunePlanner(costs)
    refusal = planner.plan(view._replace(memory_limit_bytes=1), None)
    assert isinstance(refusal, Refusal)
    wanted = planner.plan(view, None).predicted.peak_memory_bytes.value
    share = rng.random() ** 2
    return int(refusal.needed_bytes * 0.98 + share * max(0.0, wanted - refusal.needed_bytes))
