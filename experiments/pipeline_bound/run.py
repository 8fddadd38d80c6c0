"""How far are pipeline schedules from the trivial bound? See README.md.

    python -m experiments.pipeline_bound.run --output validation/pipeline_bound

writes results.json, gantt.png, trace.json and prints the table.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from muxtune.cost import AnalyticCostModel, device_figures, model_shape, nominal_load
from muxtune.cost.subgraphs import ComposedSubgraphCosts, pass_subgraphs
from muxtune.planning.orchestration import (
    RoundGraph,
    RoundProblem,
    TemplateOptions,
    Timeline,
    bubble_account,
    lorapp,
    one_f_one_b,
    periodic_template,
    play,
    round_bounds,
    schedule_spans,
)
from muxtune.report.gantt import gantt_panels, schedule_trace
from muxtune.report.run_folder import RunFolder, provenance
from muxtune.types import NS_PER_S, AdapterSlot, HTaskTurn, ReplicaShape, ShapeKey
from muxtune.workload.synthetic import histogram

MODEL, DEVICES, STAGES = "llama-2-7b", ("A40", "H100-SXM"), 4
DATASETS = ("sst2", "openbookqa", "rte")
CHUNK_TOKENS = 64
BATCHES, RANKS, BUDGETS_TOKENS = (8, 16, 32), (8, 16, 32, 64), (512, 1024, 2048)
NUM_TASKS, ROUNDS, NUM_PLANS = 8, 50, 40
SPLITS = (1, 2, 3, 4, 6, 8, 12)
TEMPLATE = "periodic template"
SEARCH = TemplateOptions(evaluations=60, node_budget=10**9)


class Task(NamedTuple):
    """One tenant: what an optimizer step computes."""

    dataset: str
    rank: int
    step_tokens: int


class Setting(NamedTuple):
    """One 4-stage plan with 8 tasks, each its own hTask: a round is one micro-batch of each, of at
    most ``budget_tokens``. A task whose step is larger takes several rounds a step."""

    device: str
    budget_tokens: int
    tasks: tuple[Task, ...]

    def rounds_per_step(self, task: Task) -> int:
        return -(-task.step_tokens // self.budget_tokens)


class Part(NamedTuple):
    """A played schedule that counts ``rounds`` rounds of the plan."""

    timeline: Timeline
    rounds: int


class Outcome(NamedTuple):
    """Of one schedule of one plan. ``ratio``: time of a round, fill included, over the trivial
    bound of the plan's round; ``steady_bubble``: idle share of the busiest stage in a steady
    round."""

    schedule: str
    ratio: float
    steady_bubble: float
    idle: float
    fill_drain: float
    imbalance: float
    stalls: float


def draw_settings(num_plans: int, seed: int) -> list[Setting]:
    """Random tasks; sequence lengths of one step are drawn from the shipped histograms."""
    chooser = random.Random(seed)
    return [_draw(chooser, DEVICES[index % len(DEVICES)]) for index in range(num_plans)]


def _draw(chooser: random.Random, device: str) -> Setting:
    tasks = tuple(_draw_task(chooser) for _ in range(NUM_TASKS))
    return Setting(device, chooser.choice(BUDGETS_TOKENS), tasks)


def _draw_task(chooser: random.Random) -> Task:
    dataset = chooser.choice(DATASETS)
    lengths = histogram(dataset)
    generator = np.random.default_rng(chooser.randrange(2**32))
    shares = lengths.counts / lengths.counts.sum()
    drawn = generator.choice(lengths.lengths_tokens, size=chooser.choice(BATCHES), p=shares)
    return Task(dataset, chooser.choice(RANKS), int(drawn.sum()))


class Pipeline:
    """Problems of one device, all costed by the same analytic model."""

    def __init__(self, device: str) -> None:
        self.model = model_shape(MODEL)
        self.cost = AnalyticCostModel(self.model, device_figures(device))
        self.replica = ReplicaShape(1, STAGES)
        self.table = ComposedSubgraphCosts(self.cost, nominal_load)

    def problem(self, passes: Sequence[tuple[ShapeKey, int]], accumulate: bool) -> RoundProblem:
        """(shape, micro-batches a round) of each hTask. ``accumulate``: a step a round, as the
        1F1B baselines train; else every micro-batch may close one."""
        rows = [pass_subgraphs(self.model, shape, self.replica, self.table) for shape, _ in passes]
        counts = tuple(count for _, count in passes)
        return RoundProblem(
            tuple(graph for graph, _ in rows),
            tuple(tuple(round(s * NS_PER_S) for s in times) for _, times in rows),
            tuple(HTaskTurn(index, count) for index, count in enumerate(counts)),
            STAGES,
            micro_batches_per_step=counts if accumulate else (),
        )

    def with_memory(
        self, problem: RoundProblem, passes: Sequence[tuple[ShapeKey, int]], spare: float
    ) -> RoundProblem:
        """Stage s holds S - s + ``spare`` of the largest micro-batch, in bytes."""
        units = tuple(
            tuple(
                self.cost.memory.pass_bytes(shape, self.replica, stage) for stage in range(STAGES)
            )
            for shape, _ in passes
        )
        largest = [max(row[stage] for row in units) for stage in range(STAGES)]
        capacity = tuple(int((STAGES - s + spare) * largest[s]) for s in range(STAGES))
        return problem._replace(activation_units=units, capacity_units=capacity)


def passes_of(setting: Setting) -> list[tuple[ShapeKey, int]]:
    """Each task's step in equal micro-batches of at most the budget."""
    return [
        (split([task], task.step_tokens, setting.rounds_per_step(task))[0], 1)
        for task in setting.tasks
    ]


def split(tasks: Sequence[Task], tokens: int, count: int) -> tuple[ShapeKey, int]:
    """Tokens of the tasks together in ``count`` equal micro-batches."""
    chunks = max(len(tasks), -(-tokens // (count * CHUNK_TOKENS)))
    slots = tuple(AdapterSlot("lora", task.rank, ("all-linear",)) for task in tasks)
    return ShapeKey(CHUNK_TOKENS, chunks, slots), count


# ------------------------------------------------------------------------------- schedules


def schedules(setting: Setting) -> Iterator[tuple[str, int, list[Part]]]:
    """(name, bound of a round in ns, parts that follow one another) of each schedule."""
    pipeline, passes = Pipeline(setting.device), passes_of(setting)
    problem = pipeline.problem(passes, accumulate=False)
    bound = round_bounds(RoundGraph(problem)).trivial_ns
    for name, spare in (("S - s", 0.0), ("S - s + 1/2", 0.5), ("S - s + 1", 1.0)):
        limited = pipeline.with_memory(problem, passes, spare)
        order = periodic_template(limited, SEARCH).order
        yield f"{TEMPLATE}, memory {name}", bound, [Part(play(order, limited, ROUNDS), ROUNDS)]
    for name, in_flight in (("4", STAGES), ("5", STAGES + 1), ("all", 0)):
        timeline = lorapp(problem, ROUNDS, in_flight)
        yield f"mLoRA's interleaving, {name} in flight", bound, [Part(timeline, ROUNDS)]
    yield "1F1B, one task at a time", bound, [one_task(pipeline, setting, t) for t in setting.tasks]
    yield "1F1B, all tasks in each micro-batch", bound, [all_spatial(pipeline, setting)]


def one_task(pipeline: Pipeline, setting: Setting, task: Task) -> Part:
    timeline = best_one_f_one_b(pipeline, [task], task.step_tokens)
    return Part(timeline, timeline.rounds * setting.rounds_per_step(task))


def all_spatial(pipeline: Pipeline, setting: Setting) -> Part:
    """A flush whenever the first task closes its step; micro-batches hold all tasks."""
    rounds = min(setting.rounds_per_step(task) for task in setting.tasks)
    tokens = sum(t.step_tokens * rounds / setting.rounds_per_step(t) for t in setting.tasks)
    timeline = best_one_f_one_b(pipeline, setting.tasks, round(tokens))
    return Part(timeline, timeline.rounds * rounds)


def best_one_f_one_b(pipeline: Pipeline, tasks: Sequence[Task], tokens: int) -> Timeline:
    """Steps with the number of micro-batches that is fastest for these tasks."""
    candidates = []
    for count in SPLITS:
        problem = pipeline.problem([split(tasks, tokens, count)], accumulate=True)
        candidates.append((play(one_f_one_b(problem), problem, 2).period_ns, problem))
    problem = min(candidates, key=lambda candidate: candidate[0])[1]
    return play(one_f_one_b(problem), problem, ROUNDS)


def outcome_of(schedule: str, bound_ns: int, parts: Sequence[Part]) -> Outcome:
    accounts = [bubble_account(part.timeline) for part in parts]
    # Time of one round of the plan that each part takes.
    spent = [a.makespan_ns / part.rounds for a, part in zip(accounts, parts, strict=True)]
    total = sum(spent)

    def share(name: str) -> float:
        return sum(getattr(a, name) * ns for a, ns in zip(accounts, spent, strict=True)) / total

    return Outcome(
        schedule,
        total / bound_ns,
        share("steady_bubble"),
        share("idle"),
        share("fill_drain"),
        share("imbalance"),
        share("stalls"),
    )


# ---------------------------------------------------------------------------------- output


def table(outcomes: Sequence[Outcome]) -> list[dict[str, float | str]]:
    rows: list[dict[str, float | str]] = []
    for name in dict.fromkeys(outcome.schedule for outcome in outcomes):
        chosen = [outcome for outcome in outcomes if outcome.schedule == name]
        row: dict[str, float | str] = {"schedule": name}
        for field in Outcome._fields[1:]:
            values = [getattr(outcome, field) for outcome in chosen]
            row[f"mean_{field}"] = statistics.mean(values)
            row[f"worst_{field}"] = max(values)
        rows.append(row)
    return rows


def print_table(rows: Sequence[dict]) -> None:
    print(f"{'schedule':<38} {'ratio to bound':>15} {'worst':>6} {'steady bubble':>14} {'worst':>6}"
          f" {'idle':>6} = {'fill':>5} + {'imbal.':>6} + {'stalls':>6}")  # fmt: skip
    for row in rows:
        print(
            f"{row['schedule']:<38} {row['mean_ratio']:>15.3f} {row['worst_ratio']:>6.3f}"
            f" {row['mean_steady_bubble']:>14.1%} {row['worst_steady_bubble']:>6.1%}"
            f" {row['mean_idle']:>6.1%} = {row['mean_fill_drain']:>5.1%}"
            f" + {row['mean_imbalance']:>6.1%} + {row['mean_stalls']:>6.1%}"
        )


def draw_example(folder: Path, setting: Setting) -> None:
    """The first rounds of one plan under three schedules, on one time scale."""
    wanted = {
        f"{TEMPLATE}, memory S - s + 1/2": "ours: periodic template",
        "mLoRA's interleaving, 4 in flight": "mLoRA's interleaving, 4 tasks in flight",
        "1F1B, one task at a time": "1F1B, one task at a time",
    }
    names = [f"{task.dataset} r={task.rank}, {task.step_tokens} tokens" for task in setting.tasks]
    panels, window = [], None
    for schedule, _, parts in schedules(setting):
        if schedule not in wanted:
            continue
        timelines = [part.timeline for part in parts]
        window = window or (0, int(2.5 * timelines[0].period_ns))
        spans = list(schedule_spans(timelines[0], names))
        if len(timelines) > 1:
            spans = _first_steps(timelines, names)
        elif not panels:
            schedule_trace(folder / "trace.json", _early(spans, 2 * window[1]))
        panels.append((wanted[schedule], spans, window))
    title = f"{NUM_TASKS} tasks on {STAGES} stages ({MODEL}, {setting.device}), from a cold start"
    gantt_panels(folder / "gantt.png", panels, title)


def _early(spans: Sequence, until_ns: int) -> Iterator:
    return (span for span in spans if span.start_ns < until_ns)


def _first_steps(timelines: Sequence[Timeline], names: Sequence[str]) -> list:
    """One step of each task, one task after another."""
    spans, begin = [], 0
    for htask, timeline in enumerate(timelines):
        ends_ns = int(timeline.end_ns[0].max())
        for span in schedule_spans(timeline):
            if span.round == 0:
                spans.append(span._replace(
                    htask=htask, htask_name=names[htask], start_ns=span.start_ns + begin
                ))  # fmt: skip
        begin += ends_ns
    return spans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/pipeline_bound"))
    parser.add_argument("--plans", type=int, default=NUM_PLANS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    settings = draw_settings(arguments.plans, arguments.seed)
    with RunFolder(arguments.output) as folder:
        outcomes = [[outcome_of(*entry) for entry in schedules(setting)] for setting in settings]
        rows = table([outcome for plan in outcomes for outcome in plan])
        print_table(rows)
        folder.write_json("results.json", {
            "provenance": provenance(arguments.seed),
            "command": f"python -m experiments.pipeline_bound.run --plans {arguments.plans}",
            "rounds": ROUNDS,
            "table": rows,
            "plans": [
                {"setting": _plain(setting), "outcomes": [o._asdict() for o in plan]}
                for setting, plan in zip(settings, outcomes, strict=True)
            ],
        })  # fmt: skip
    draw_example(arguments.output, settings[0])


def _plain(setting: Setting) -> dict:
    return {**setting._asdict(), "tasks": [task._asdict() for task in setting.tasks]}


if __name__ == "__main__":
    main()
