"""The same eight tasks by ``muxtune train`` itself: planned, captured, checkpoints left out.

    python -m experiments.two_gpus.command --out FOLDER --layouts pp,one      # on two GPUs
    python -m experiments.two_gpus.command --out /tmp/runs --device cpu       # tiny: does it work
    python -m experiments.two_gpus.command --out FOLDER --draw pp        # a picture of its traces

One process a layout, each with an end to its time. What is told: effective tokens a second of all
rounds, the first and the last included, and of the steady ones between.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.two_gpus.cases import MODEL
from muxtune.planning.orchestration.spans import ScheduleSpan
from muxtune.report.gantt import gantt_panels
from muxtune.report.run_folder import provenance
from muxtune.types import SubgraphKind

TASKS = os.path.relpath(Path(__file__).resolve().parent / "tasks.yaml")
WORDS = (
    "model.random=true", "cluster=h100_x1", "cluster.device=H200-SXM",
    f"workload.tasks_file={TASKS}", "backend.checkpoint_steps=0",
    "+backend.evaluate_tokens=0", "+backend.deterministic=false", "backend.rank_timeout_s=60",
)  # fmt: skip
LAYOUTS = {
    "pp": ("cluster.pp=2", "cluster.num_gpus=2"),
    "tp": ("cluster.tp=2", "cluster.num_gpus=2"),
    "one": (),
    "one-fused": ("planner.fusion=all_spatial",),
}
COMPILED = ("pp", "one", "tp")  # by experiments/gpu_runtime/compile_ahead.py
TINY = ("model=tiny", f"model.name={MODEL}", "backend.device=cpu", "backend.step=captured")
WARM_UP, COOL_DOWN = 5, 3  # rounds that are not steady
DRAWN = (5, 8)


def words(layout: str, device: str = "cuda") -> list[str]:
    """Of the command line, without the folder."""
    return [*(TINY if device == "cpu" else (f"model={MODEL}",)), *WORDS, *LAYOUTS[layout]]


def run(layout: str, folder: Path, device: str, limit_s: float) -> dict[str, Any]:
    """A row of the table; ``status``: the command's exit code, or ``cut off``."""
    folder.mkdir(parents=True, exist_ok=True)
    start_s, log = time.monotonic(), folder / "train.log"
    command = [sys.executable, "-m", "muxtune.cli", "train", *words(layout, device)]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, f"output_dir={folder}"], stdout=file, stderr=file, start_new_session=True,
            env={**os.environ, "PYTHONFAULTHANDLER": "1", "COLUMNS": "160"},
        )  # fmt: skip
        try:
            status: Any = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = "cut off"
            os.killpg(process.pid, signal.SIGABRT)  # all of them tell where they are
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(3.0)
            with contextlib.suppress(ProcessLookupError):  # none of them is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    row = {"layout": layout, "status": status, "seconds": time.monotonic() - start_s}
    return {**row, **measured(folder)}


def measured(folder: Path) -> dict[str, Any]:
    """Of a run's folder, as far as it has come."""
    path = folder / "metrics.jsonl"
    steps = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = {"rounds": len({step["step"] for step in steps}), **steady(steps), **traced(folder)}
    if (folder / "summary.json").exists():
        summary = json.loads((folder / "summary.json").read_text())
        names = (
            "effective_tokens_per_s",
            "training_s",
            "num_plans",
            "peak_memory_bytes",
            "notices",
        )
        rows |= {name: summary[name] for name in names}
    return rows


def steady(steps: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of rounds in the middle, by when their steps were told."""
    ends_ns, tokens = {}, {}
    for step in steps:
        number = step["step"]
        ends_ns[number] = max(ends_ns.get(number, 0), step["time_ns"])
        tokens[number] = tokens.get(number, 0) + step["tokens"]
    first, last = WARM_UP, len(tokens) - COOL_DOWN
    if last <= first:
        return {}
    seconds = (ends_ns[last] - ends_ns[first]) / 1e9
    middle = sum(tokens[number] for number in range(first + 1, last + 1))
    return {
        "steady_tokens_per_s": middle / seconds,
        "steady_round_ms": 1e3 * seconds / (last - first),
        "tokens_per_round": middle / (last - first),
    }


def traced(folder: Path) -> dict[str, Any]:
    """Of each rank's compute stream in the trace: how long a steady round took, and the share of
    it in which nothing was computed."""
    path = folder / "trace.json"
    if not path.exists():
        return {}
    text = path.read_text().rstrip().rstrip(",")
    events = json.loads(text if text.endswith("]}") else text + "]}")["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    own: dict[int, list[Any]] = {}
    for event in events:
        if event["ph"] == "X" and names[event["tid"]] == "compute":
            own.setdefault(event["pid"], []).append(event)
    found = [_steady_of(rank) for _, rank in sorted(own.items())]
    return {"traced_ranks": [item for item in found if item]}


def _steady_of(events: Iterable[Any]) -> dict[str, float]:
    """From the end of one round's last operation to that of another."""
    ends: dict[int, float] = {}
    for event in events:
        at = event["args"]["round"]
        ends[at] = max(ends.get(at, 0.0), event["ts"] + event["dur"])
    first, last = WARM_UP, max(ends) - COOL_DOWN
    if first >= last:
        return {}
    start, stop = ends[first], ends[last]
    inside = [e for e in events if start <= e["ts"] and e["ts"] + e["dur"] <= stop]
    busy = sum(event["dur"] for event in inside)
    return {"round_ms": (stop - start) / (last - first) / 1e3, "idle": 1 - busy / (stop - start)}


def draw(folder: Path, title: str) -> None:
    """Rounds in the middle as they were, above the same as the plan has them."""
    panels = []
    for name, what in (("trace.json", "measured"), ("plan_trace.json", "predicted")):
        spans = spans_of(folder / name)
        ends_ns: dict[int, int] = {}
        for span in spans:
            end_ns = span.start_ns + span.duration_ns
            ends_ns[span.round] = max(ends_ns.get(span.round, 0), end_ns)
        first, last = DRAWN
        round_ms = (ends_ns[last] - ends_ns[first]) / (last - first) / 1e6
        window = ends_ns[first], ends_ns[first] + round(1.05 * (ends_ns[last] - ends_ns[first]))
        panels.append((f"{what}, {round_ms:.0f} ms a round", spans, window))
    gantt_panels(folder / "trace.png", panels, title)


def spans_of(path: Path) -> list[ScheduleSpan]:
    """Operations of stages in a trace of Chromium's form."""
    events = json.loads(path.read_text())["traceEvents"]
    rows = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    streams = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    return [
        ScheduleSpan(
            int(rows[e["pid"]].rpartition("stage ")[2]), streams[e["tid"]],
            int(name.removeprefix("hTask ")), name, label, SubgraphKind(e["args"]["kind"]),
            e["args"]["direction"] == "backward", e["args"]["round"], e["args"]["micro_batch"],
            round(1e3 * e["ts"]), round(1e3 * e["dur"]),
        )
        for e in events if e["ph"] == "X" and "kind" in e["args"]
        for name, _, label in (e["name"].partition(": "),)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layouts", default="pp,one", help=f"of {', '.join(LAYOUTS)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--limit-s", default="70", help="seconds, one number or one a layout")
    parser.add_argument("--draw", metavar="LAYOUT", help="only draw the traces of a run")
    args = parser.parse_args()
    if args.draw:
        draw(args.out / args.draw, f"muxtune train, {args.draw}: {MODEL}, 8 tasks")
        return
    layouts, limits = args.layouts.split(","), args.limit_s.split(",")
    limits = limits * len(layouts) if len(limits) == 1 else limits
    content = {**provenance(0), "words": {name: words(name, args.device) for name in layouts}}
    rows: list[dict[str, Any]] = []
    for layout, limit_s in zip(layouts, limits, strict=True):
        rows.append(run(layout, args.out / layout, args.device, float(limit_s)))
        path = args.out / "command.json"
        path.write_text(json.dumps({**content, "rows": rows}, indent=1) + "\n")
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
