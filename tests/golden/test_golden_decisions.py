"""Golden decision logs: what was decided and when, nothing else. Rewrite with --update-golden."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from muxtune.planning.journal import JournalBatch
from muxtune.registry import CLUSTER_POLICIES
from muxtune.types import AdapterSpec, Drain, Place, Plan, Reject
from muxtune_sim import SimOptions
from tests.sim.fakes import FakePlanner, Run, instance, seconds, task

FOLDER = Path(__file__).parent


def scenario(policy: str) -> Run:
    """Ten tasks of three ranks, one withdrawn, one failing, one too big, on two GPUs."""
    ranks = [16, 32, 16, 64, 16, 32, 16, 16, 32, 16]
    tasks = [
        task(
            f"t{index}",
            steps=3 + 4 * index % 11,
            arrival_s=0.9 * index,
            batch_size=1 + index % 2,
            adapter=AdapterSpec(rank=rank),
            cancel_ns=seconds(12.3) if index == 6 else None,
        )
        for index, rank in enumerate(ranks)
    ]
    copies = 3 if policy == "fifo_colocated" else 1
    instances = [
        instance(f"g{gpu}-{copy}", 8, gpu_ids=(f"g{gpu}",))
        for gpu in range(2)
        for copy in range(copies)
    ]
    options = SimOptions(fail_task_at_ns={"t4": seconds(7.7)}, planning_per_task_s=0.01)
    chosen: Any = CLUSTER_POLICIES.get(policy)()
    planner = FakePlanner({64: 20, 32: 5})
    return Run(chosen, tasks, instances, planner, options, transition_s=0.2)


def decisions(batches: list[JournalBatch]) -> str:
    lines = []
    for batch in batches:
        words = [describe(action) for action in batch.actions]
        words += [f"plan {describe(plan)}" for plan in batch.plans]
        lines += [f"{batch.time_ns} {word}" for word in words if word]
    return "\n".join(lines) + "\n"


def describe(decision: Any) -> str:
    if isinstance(decision, Place):
        return f"place {decision.task_id} on {decision.instance_id}"
    if isinstance(decision, Reject):
        return f"reject {decision.task_id}: {decision.refusal.reason}"
    if isinstance(decision, Drain):
        return f"drain {decision.task_id}"
    if isinstance(decision, Plan):
        htasks = " | ".join(",".join(htask.quota) for htask in decision.htasks)
        return f"{decision.instance_id}#{decision.epoch}: {htasks or 'nothing'}"
    return ""


@pytest.mark.parametrize("policy", ["fifo_exclusive", "fifo_colocated", "fifo_shared"])
def test_decisions_are_the_golden_ones(policy: str, update_golden: bool):
    run = scenario(policy)
    run.run()
    made = decisions(run.journal.batches)
    path = FOLDER / f"{policy}.decisions.txt"
    if update_golden:
        path.write_text(made, encoding="utf-8")
    assert made == path.read_text(encoding="utf-8")
