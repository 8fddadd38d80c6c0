"""The demo: the whole main job on this machine's CPU, with a real model and real text.

    python -m experiments.demo.run --output demo_output

1. writes five tasks' texts, which ship inside PyPI packages;
2. measures this machine (``muxtune profile``);
3. fine-tunes the five tasks together under `muxtune` (``muxtune train``): PEFT adapters come out;
4. runs each planner for a few measured steps on the loaded backbone and simulates the same
   (``muxtune compare``);
5. prints one table and writes report.html, its pictures and a Perfetto trace.

Every step is a command of its own; this script only strings them together and writes the report.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.demo.texts import write_demo_data
from muxtune import build
from muxtune.commands import compare, profile, train
from muxtune.config import conf_dir, register_schemas
from muxtune.errors import MuxTuneError
from muxtune.report.html import HtmlTable, Image, Section, write_report
from muxtune.report.plots import loss_curves, perplexity_before_after
from muxtune.report.run_folder import RunFolder, provenance
from muxtune.report.tables import format_bytes, make_console, make_table

HERE = Path(__file__).parent
PLANNERS = ("muxtune", "batched", "exclusive")
COMPARED_STEPS = 4
TASK_COLUMNS = ("task", "steps", "tokens", "perplexity before", "after", "change", "adapter")
PLANNER_COLUMNS = (
    *("planner", "step predicted s", "measured s", "error", "effective tok/s", "padded tok/s"),
    *("peak predicted", "peak measured"),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="results folder")
    parser.add_argument("--profile-budget-s", type=float, default=40.0)
    arguments = parser.parse_args()
    try:
        run_demo(arguments.output, arguments.profile_budget_s)
    except MuxTuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run_demo(output: Path, profile_budget_s: float) -> None:
    console, started = make_console(), time.monotonic()
    root = RunFolder(output)
    console.rule("1/4  measuring this machine")
    write_demo_data(HERE / "data")
    measured = in_folder(
        output / "profile", "profile", profile.run, [f"budget_s={profile_budget_s}"]
    )
    common = [
        "cost=profile",
        f"cost.path={measured['path']}",
        f"workload.tasks_file={HERE / 'tasks.yaml'}",
    ]
    store = build.backbone_store(typed("train", common))

    console.rule("2/4  fine-tuning five tasks on one backbone")
    trained = in_folder(output / "train", "train", train.run, common, store)
    console.rule("3/4  every planner for a few steps, simulated and measured")
    compared_options = [
        *common,
        f"planners=[{','.join(PLANNERS)}]",
        f"steps={COMPARED_STEPS}",
    ]
    compared = in_folder(output / "compare", "compare", compare.run, compared_options, store)

    console.rule("4/4  report")
    tasks = read_tasks(output / "train" / train.TASKS_FILE)
    planners = json.loads((output / "compare" / "compare.json").read_text())
    report = write_demo_report(root, tasks, planners, trained, measured)
    console.print(
        make_table("Tasks, trained together under 'muxtune'", TASK_COLUMNS, task_rows(tasks))
    )
    console.print(make_table("Planners, same tasks", PLANNER_COLUMNS, planner_rows(planners)))
    console.print(f"report: {report}", soft_wrap=True)
    console.print(
        f"trace for ui.perfetto.dev: {output / 'train' / train.TRACE_FILE}", soft_wrap=True
    )
    duration_s = time.monotonic() - started
    console.print(f"the demo took {duration_s:.0f} s")
    summary = {"train": trained, "compare": compared, "profile": measured}
    root.write_json("summary.json", {"duration_s": duration_s, **summary, "run": provenance(0)})


def typed(command: str, overrides: list[str]) -> Any:
    """The configuration that ``muxtune COMMAND OVERRIDES`` would run."""
    return OmegaConf.to_object(composed(command, overrides))


def composed(command: str, overrides: list[str]) -> Any:
    register_schemas()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return compose(config_name=command, overrides=[*overrides, "output_dir=unused"])


def in_folder(
    path: Path, command: str, run: Callable[..., dict[str, Any]], overrides: list[str], *more: Any
) -> dict[str, Any]:
    """One command in a folder of its own; raises MuxTuneError when a task did not end well."""
    with RunFolder(path) as folder:
        config = composed(command, overrides)
        folder.write_text("config.yaml", OmegaConf.to_yaml(config))
        summary = run(OmegaConf.to_object(config), folder, *more)
        if summary.get("error"):
            raise MuxTuneError(summary["error"])
        folder.write_json("summary.json", summary)
    return summary


def read_tasks(path: Path) -> list[dict[str, Any]]:
    rows = pd.read_csv(path).sort_values("task_id").to_dict("records")
    return [{str(key): value for key, value in row.items()} for row in rows]


def task_rows(tasks: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    return [
        (
            task["task_id"],
            int(task["steps"]),
            int(task["effective_tokens"]),
            task["perplexity_before"],
            task["perplexity_after"],
            f"{task['perplexity_after'] / task['perplexity_before'] - 1:+.0%}",
            task["output_path"],
        )
        for task in tasks
    ]


def planner_rows(planners: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    return [
        (
            row["planner"],
            row["step"]["predicted_s"],
            row["step"]["measured_s"],
            f"{row['relative_error']:+.1%}",
            row["effective_tokens_per_s"],
            row["padded_tokens_per_s"],
            format_bytes(row["predicted_peak_bytes"]),
            format_bytes(row["measured_peak_bytes"]),
        )
        for row in planners
    ]


def write_demo_report(
    root: RunFolder,
    tasks: list[dict[str, Any]],
    planners: list[dict[str, Any]],
    trained: dict[str, Any],
    measured: dict[str, Any],
) -> Path:
    output = root.path
    perplexity = perplexity_before_after(
        output / "perplexity.png",
        [(t["task_id"], t["perplexity_before"], t["perplexity_after"]) for t in tasks],
    )
    losses = loss_curves(output / "loss.png", read_losses(output / "train" / "metrics.jsonl"))
    compared = output / "compare"
    sections = [
        Section(
            "Five tenants, one backbone",
            "All tasks share every pass of one frozen SmolLM2-135M. Perplexity is on held-out "
            "documents, before and after.",
            [HtmlTable(TASK_COLUMNS, task_rows(tasks))],
            [Image(perplexity, "Held-out perplexity, lower is better."),
             Image(losses, "Training loss of each task.")],
        ),
        Section(
            "Planners compared, predicted beside measured",
            "Step time: the time in which every task takes one optimizer step. Predictions come "
            f"from the profile {measured['content_hash'][:12]} of this machine, which measures "
            f"operations, never whole steps. Measured over {COMPARED_STEPS - 1} rounds or more.",
            [HtmlTable(PLANNER_COLUMNS, planner_rows(planners))],
            [Image(compared / "step_time.png", "Predicted (with its 90% interval) and measured."),
             Image(compared / "throughput.png", "Effective tokens are those that tasks need; "
                   "padded ones include filler.")],
        ),
        Section("The run", tables=[HtmlTable(("figure", "value"), list(trained.items()))]),
    ]  # fmt: skip
    lead = "Measured on this machine's CPU; adapters in train/adapters, trace in train/trace.json."
    return write_report(output, "MuxTune demo", sections, lead)


def read_losses(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    steps = pd.read_json(path, lines=True)
    return {
        str(task_id): (rows["step"].tolist(), rows["loss"].tolist())
        for task_id, rows in steps.sort_values("step").groupby("task_id")
    }


if __name__ == "__main__":
    sys.exit(main())
