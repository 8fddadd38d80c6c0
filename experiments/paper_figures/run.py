"""The paper's figures, simulated: our ratios beside the published ones. See README.md.

python -m experiments.paper_figures.run --output validation/paper_figures
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from experiments.paper_figures import published
from experiments.paper_figures.plot import PARTS, draw
from experiments.paper_figures.sensitivity import CASES as SENSITIVITY_CASES
from experiments.paper_figures.sensitivity import sensitivity
from experiments.paper_figures.systems import (
    BASELINES,
    NAMES,
    ablation,
    memory_bytes,
    ratios,
    step_times_s,
)
from experiments.paper_figures.testbeds import (
    A40,
    CASES,
    MIXED,
    Assumptions,
    Case,
    books,
    view,
    workloads,
)
from muxtune.report.run_folder import RunFolder, provenance
from muxtune.types import ReplicaShape

LOADS = {"light": Assumptions(tasks=4, batch=4), "heavy": Assumptions(tasks=16, batch=32)}
MEMORY_CASES = (
    Case(A40, "gpt-2.7b", ReplicaShape(2, 1)),
    Case(A40, "llama-2-7b", ReplicaShape(1, 4)),
)
MEMORY_TASKS = 32


def throughput() -> Iterable[dict]:
    for case in CASES:
        for data in workloads():
            times = step_times_s(case, data, Assumptions())
            kind = data if data == MIXED else "uniform"
            row = {
                "testbed": case.testbed.name,
                "device": case.testbed.device,
                "label": case.label,
                "data": data,
                "step_s": times,
                "ratios": ratios(times),
                "published": published.RATIOS.get((case.testbed.device, kind), {}),
            }
            print_throughput(row)
            yield row


def print_throughput(row: dict) -> None:
    cells = []
    for name in BASELINES:
        ours, theirs = row["ratios"].get(name), row["published"].get(name)
        cells.append(f"{_number(ours):>6} ({_number(theirs)})")
    where = f"{row['testbed']}, {row['label']}, {row['data']}"
    print(f"{where:<62}" + " ".join(f"{cell:>16}" for cell in cells), flush=True)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def ablations() -> Iterable[dict]:
    for load, assumed in LOADS.items():
        known = published.ABLATIONS[load]
        print(f"\nablation, {load} load ({assumed.tasks} tasks of batch {assumed.batch}, mixed): "
              f"throughput lost without; second-hand: {_losses(known)}")  # fmt: skip
        for case in CASES:
            lost = ablation(case, MIXED, assumed)
            print(f"  {case.testbed.name + ', ' + case.label:<50} {_losses(lost)}", flush=True)
            yield {"load": load, "testbed": case.testbed.name, "label": case.label, "lost": lost}


def _losses(lost: dict[str, float]) -> str:
    return ", ".join(f"{part} {-lost[part]:.0%}" for part in PARTS if part in lost)


def memory() -> Iterable[dict]:
    assumed = Assumptions(tasks=MEMORY_TASKS)
    for case in MEMORY_CASES:
        sizes = memory_bytes(case, MIXED, assumed)
        limit = view(case, MIXED, assumed, books(case, assumed)[0]).memory_limit_bytes
        fit = {name: sum(size <= limit for size in row) for name, row in sizes.items()}
        saved = {name: sizes[name][-1] / sizes["muxtune"][-1] for name in BASELINES}
        counts = ", ".join(f"{NAMES[name]} {count}" for name, count in fit.items())
        print(f"\nmemory, {case.testbed.name}, {case.label}: of {MEMORY_TASKS} tasks fit {counts}")
        over = ", ".join(f"{NAMES[name]} {ratio:.2f}" for name, ratio in saved.items())
        print(f"  baselines' memory over ours with {MEMORY_TASKS} tasks: {over}")
        yield {
            "testbed": case.testbed.name,
            "label": case.label,
            "limit_bytes": limit,
            "bytes": sizes,
            "tasks_that_fit": fit,
            "ratio_at_most_tasks": saved,
        }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/paper_figures"))
    given = parser.parse_args(arguments)
    with RunFolder(given.output) as folder:
        print("throughput of ours over each baseline; in brackets: published or second-hand")
        print(f"{'':<62}" + " ".join(f"{NAMES[name]:>16}" for name in BASELINES))
        results = {
            "provenance": provenance(),
            "command": "python -m experiments.paper_figures.run",
            "assumptions": Assumptions()._asdict(),
            "published": {"abstract": published.ABSTRACT, "ablations": published.ABLATIONS,
                          "memory_tasks": published.MEMORY_TASKS},
            "throughput": list(throughput()),
            "ablations": list(ablations()),
            "memory": list(memory()),
            "sensitivity": [sensitivity(case) for case in SENSITIVITY_CASES],
        }  # fmt: skip
        folder.write_json("results.json", results)
    draw(given.output)


if __name__ == "__main__":
    main()
