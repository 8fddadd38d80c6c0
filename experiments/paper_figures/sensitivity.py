"""Which assumptions matter: each one moved by itself, down and up, all else as assumed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from experiments.paper_figures.systems import ratios, step_times_s
from experiments.paper_figures.testbeds import A40, H100, MIXED, Assumptions, Case
from muxtune.cost.analytic import AnalyticOptions
from muxtune.types import ReplicaShape

CASES = (
    Case(A40, "llama-2-7b", ReplicaShape(1, 4)),
    Case(A40, "gpt-2.7b", ReplicaShape(2, 1)),
    Case(H100, "llama-2-7b", ReplicaShape(1, 4)),
)
BASE = Assumptions()


class Change(NamedTuple):
    """One assumption at another value."""

    assumption: str
    value: str
    assumed: Assumptions


def _constant(what: str, name: str, *factors: float, eager: bool = False) -> list[Change]:
    """A constant of the cost model, of HF PEFT's eager style or of all systems."""
    usual = getattr(AnalyticOptions.eager() if eager else AnalyticOptions(), name)
    return [
        Change(what, f"x {factor:g}", BASE._replace(analytic=((name, factor * usual),)))
        for factor in factors
    ]


def changes() -> Iterator[Change]:
    for batch in (4, 16, 32):
        yield Change("batch of a task", str(batch), BASE._replace(batch=batch))
    for tasks in (4, 16):
        yield Change("tasks an instance", str(tasks), BASE._replace(tasks=tasks))
    for rank in (8, 64):
        yield Change("adapter rank", str(rank), BASE._replace(rank=rank))
    yield Change("adapters on", "q, v only", BASE._replace(targets="q_proj,v_proj"))
    yield Change("true lengths for packers", "yes", BASE._replace(true_lengths=True))
    yield Change("host launches fast kernels", "yes", BASE._replace(launched=True))
    yield Change("contention of overlap", "none", BASE._replace(contention=(1.0, 1.0)))
    yield Change("memory share", "0.5", BASE._replace(memory_share=0.5))
    yield from _constant("eager: host time a kernel", "eager_host_s", 0.5, 2.0, eager=True)
    yield from _constant("eager: memory traffic", "eager_traffic", 0.5, 2.0, eager=True)
    yield from _constant("rows at half efficiency", "half_rows", 0.5, 2.0)
    yield from _constant("gap between kernels", "gap_s", 0.5, 4.0)
    yield from _constant("link efficiency", "link_efficiency", 0.5, 1.5)
    yield from _constant("collective latency", "collective_latency_s", 0.25, 4.0)
    yield from _constant("attention efficiency", "attention_efficiency", 0.5, 1.5)
    yield from _constant("overhead of a pass", "pass_overhead_s", 0.0, 10.0)


def sensitivity(case: Case) -> dict:
    """Ratios as assumed, and under every change."""
    return {
        "case": f"{case.label}, {case.testbed.name}",
        "base": ratios(step_times_s(case, MIXED, BASE)),
        "changes": [
            {
                "assumption": change.assumption,
                "value": change.value,
                "ratios": ratios(step_times_s(case, MIXED, change.assumed)),
            }
            for change in changes()
        ],
    }
