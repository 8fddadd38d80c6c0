"""A cost model small enough to reason about by hand, and tasks to plan on it."""

# The hand-made cost model has only what planners ask for.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOptionalOperand=false, reportOperatorIssue=false

from __future__ import annotations

from muxtune.planners.muxtune import MuxTunePlanner
from muxtune.types import (
    AdapterSlot,
    Estimate,
    InstanceView,
    LengthSummary,
    PassCoefficients,
    Plan,
    Subgraph,
    SubgraphKind,
    SubgraphTimes,
    TaskView,
)


class HandCost:
    """A pass costs a launch, then time a row, but never less than a full machine takes; memory a
    row. All constants are arguments, so that each test says which machine it means."""

    def __init__(self, launch_s=0.0, row_s=1e-4, knee_rows=0, rank_row_s=0.0, row_bytes=1):
        self.launch_s, self.row_s, self.knee_rows = launch_s, row_s, knee_rows
        self.rank_row_s, self.row_bytes = rank_row_s, row_bytes

    def pass_coefficients(self, shape, replica):
        rows = shape.padded_tokens
        ranks = sum(slot.rank for slot in shape.slots)
        base = self.launch_s + self.row_s * max(rows, self.knee_rows)
        base += self.rank_row_s * ranks * rows
        return PassCoefficients(base, 0.0, 0.0, (0.0,) * len(shape.slots), 0.1)

    def breakdown_s(self, load, replica):
        return {"backbone": self.pass_coefficients(load.shape, replica).base_s}

    def subgraph_times_s(self, plan):
        """On each stage a pass of its own, a third forward; no communication."""
        stages = plan.replicas[0].pp
        visits = [(s, False) for s in range(stages)] + [(s, True) for s in reversed(range(stages))]
        graph = tuple(
            Subgraph(i, stage, SubgraphKind.COMPUTE, back, (i - 1,) if i else (), "")
            for i, (stage, back) in enumerate(visits)
        )
        bases = [self.pass_coefficients(h.shapes[-1], None).base_s for h in plan.htasks]
        times = tuple(tuple(base * (1 + back) / 3 for _, back in visits) for base in bases)
        return SubgraphTimes((graph,) * len(bases), times, False)

    def capture_s(self, shape, replica):
        return Estimate(1.0, 1.0, 1.0)

    def transition_s(self, previous, new):
        """A second for every shape that is new."""
        old = {shape for htask in previous.htasks for shape in htask.shapes}
        seconds = len({shape for htask in new.htasks for shape in htask.shapes} - old)
        return Estimate(seconds, seconds, seconds)

    def resident_bytes(self, slots, replica):
        return 1000 + 10 * len(slots)

    def pass_bytes(self, shape, replica):
        return shape.padded_tokens * self.row_bytes


def summary(length: int, name: str = "") -> LengthSummary:
    quantiles = (length,) * 33
    return LengthSummary(
        100, length, length - 1, length**2, length, quantiles, name or f"all-{length}"
    )


def task(name: str, length: int = 64, batch: int = 4, rank: int = 8, **fields) -> TaskView:
    slot = AdapterSlot("lora", rank, ("q_proj",))
    view = TaskView(name, "t", "m", slot, batch, length, summary(length), 10, 0, 0)
    return view._replace(**fields)


def view(*tasks: TaskView, limit: int = 10**9) -> InstanceView:
    return InstanceView("i0", 0, tasks, None, limit, model="m", device="d")


def planned(cost: HandCost, *tasks: TaskView, limit: int = 10**9, **options) -> Plan:
    plan = MuxTunePlanner(lambda model, device: cost, **options).plan(
        view(*tasks, limit=limit), None
    )
    assert isinstance(plan, Plan), plan
    return plan
