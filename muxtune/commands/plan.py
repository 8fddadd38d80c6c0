"""``muxtune plan``: what the planner decides for a set of tasks on one instance, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from muxtune import build, codec
from muxtune.config import PlanConfig
from muxtune.cost.book import CostBook
from muxtune.errors import ConfigError, MuxTuneError
from muxtune.fleet import instance_view, task_view
from muxtune.planners.explanation import (
    Alternative,
    Fusion,
    Padding,
    alternatives,
    fusions,
    layouts,
    padding,
    remedies,
    saturation_tokens,
    unpromised,
)
from muxtune.planners.representative import Representative, representative
from muxtune.planning.orchestration import (
    ONE_GPU,
    Pace,
    pace_of,
    played,
    schedule_spans,
    utilisation,
)
from muxtune.planning.step_builder import StepBuilder, pass_load
from muxtune.protocols import CostModel, InstancePlanner, LengthSource, TaskLibrary
from muxtune.report.gantt import gantt, schedule_trace
from muxtune.report.recording import PlanSample
from muxtune.report.run_folder import RunFolder
from muxtune.report.tables import format_bytes, format_seconds, make_console, make_table
from muxtune.report.why import Why, why_lines
from muxtune.types import (
    NS_PER_S,
    Cursor,
    InstanceSpec,
    InstanceView,
    MicroBatch,
    Plan,
    Refusal,
    StageLedgers,
    TaskView,
)

FORMATS = ("table", "json")
PLAN_FILE, TRACE_FILE = "plan.json", "trace.json"
GANTT_FILE, ZOOM_FILE = "gantt.png", "gantt_zoom.png"
ZOOM = 24
DRAWN_ROUNDS = 2.5
MIN_HELP = 0.005
SAMPLED_ROUNDS = 16  # of which the breakdown is the mean


class Refused(NamedTuple):
    """A task that the planner did not take beside those before it."""

    task_id: str
    refusal: Refusal


class RoundSample(NamedTuple):
    """Means over sampled rounds of real batches. ``breakdown_s``: seconds of a round by cause, as
    its passes take them one after the other; ``time_s``: of the round, in which the passes of
    several GPUs overlap or wait for each other, as ``pace`` says. ``passes``, ``pass_times_s``: of
    each hTask."""

    breakdown_s: dict[str, float]
    time_s: float
    pace: Pace
    passes: tuple[float, ...]
    pass_times_s: tuple[float, ...]
    effective_tokens: float
    padded_tokens: float
    micro_batches: float
    padding: Padding


class Explanation(NamedTuple):
    fusions: list[Fusion]
    alternatives: list[Alternative]
    remedies: list[Alternative]
    unpromised: Alternative | None


NOT_EXPLAINED = Explanation([], [], [], None)


def run(config: PlanConfig, folder: RunFolder) -> dict[str, Any]:
    """Prints the plan, writes plan.json; raises MuxTuneError when no task at all is taken."""
    if config.format not in FORMATS:
        raise ConfigError("format", f"'{config.format}' does not exist", f"Choose of {FORMATS}")
    costs = build.cost_book(config)
    if config.state:
        return _plan_state(config, costs, folder)
    tasks = list(build.tasks(config, costs))
    spec = build.instances(config, costs, tasks)[0]
    library = build.library(config)
    views = [task_view(task, library.add(task)) for task in tasks]
    plan, taken, refused = _plan_all(config, costs, spec, views)
    for item in refused:
        library.discard(item.task_id)
    if plan is None:
        _print_refused(refused)
        raise MuxTuneError(f"plan: no task fits: {refused[0].refusal.reason}")
    return _present(config, costs, folder, spec, plan, taken, refused, library)


# -------------------------------------------------------------------------------------- planning


def _plan_all(
    config: PlanConfig, costs: CostBook, spec: InstanceSpec, views: list[TaskView]
) -> tuple[Plan | None, list[TaskView], list[Refused]]:
    """All tasks at once; if that is refused, one by one in order, leaving out who is refused."""
    planner = build.planner(config.planner, costs)
    answer = planner.plan(instance_view(spec, views), None)
    if isinstance(answer, Plan):
        return answer, views, []
    taken: list[TaskView] = []
    refused: list[Refused] = []
    plan: Plan | None = None
    for view in views:
        answer = planner.plan(instance_view(spec, [*taken, view]), None)
        if isinstance(answer, Plan):
            plan = answer
            taken.append(view)
        else:
            refused.append(Refused(view.task_id, answer))
    return plan, taken, refused


def _plan_state(config: PlanConfig, costs: CostBook, folder: RunFolder) -> dict[str, Any]:
    """A saved question asked again of a fresh planner; says whether the answer is the same."""
    sample = read_sample(Path(config.state), config.index)
    answer = build.planner(config.planner, costs).plan(sample.view, sample.previous)
    same = codec.dumps(answer) == codec.dumps(sample.plan)
    folder.write_text(PLAN_FILE, codec.dumps(answer) + "\n")
    if config.format == "json":
        print(json.dumps({"same": same, "plan": codec.encode(answer)}, indent=2))
    else:
        console = make_console()
        if isinstance(answer, Plan):
            console.print(_htask_table(answer))
        console.print(f"reason: {answer.reason}", soft_wrap=True)
        verdict = "equals the plan of the run" if same else "DIFFERS from the plan of the run"
        console.print(f"planned from scratch, it {verdict}")
    return {"state": config.state, "index": config.index, "same": same}


def read_sample(path: Path, index: int) -> PlanSample:
    """Line ``index`` (from 0) of a plan_samples.jsonl. Raises ConfigError."""
    remedy = "Give the plan_samples.jsonl of a `muxtune simulate` run"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("state", f"'{path}' cannot be read ({error})", remedy) from None
    if not 0 <= index < len(lines):
        problem = f"{index} is not in '{path}'"
        raise ConfigError("index", problem, f"Give a number from 0 to {len(lines) - 1}")
    try:
        return PlanSample.loads(lines[index])
    except (KeyError, TypeError, ValueError) as error:
        problem = f"line {index + 1} of '{path}' is no saved state ({error!r})"
        raise ConfigError("state", problem, remedy) from None


class Late(NamedTuple):
    """A task that this plan ends after its deadline. Seconds from now; ``alone_s``: by itself."""

    task_id: str
    deadline_s: float
    end_s: float
    alone_s: float


def late_tasks(plan: Plan, views: list[TaskView]) -> list[Late]:
    """Tasks whose deadline, counted from now, this plan misses, were it to hold until they end."""
    predicted, found = plan.predicted, []
    for view in views:
        if view.deadline_ns is None:
            continue
        steps, left_s = view.num_steps - view.steps_done, view.deadline_ns / NS_PER_S
        end_s = steps * predicted.step_time_s[view.task_id]
        if end_s > left_s:
            alone_s = steps * predicted.solo_step_time_s.get(view.task_id, 0.0)
            found.append(Late(view.task_id, left_s, end_s, alone_s))
    return found


def sample_rounds(
    plan: Plan, lengths: LengthSource, cost: CostModel, rounds: int = SAMPLED_ROUNDS
) -> RoundSample:
    """Packs the plan's first rounds and takes the mean of what they cost."""
    builder, cursors = StepBuilder(), {task_id: Cursor() for task_id in plan.task_ids}
    rounds = max(1, min(rounds, *(lengths.num_steps(task_id) for task_id in plan.task_ids)))
    batches: list[MicroBatch] = []
    for _ in range(rounds):
        made, cursors = builder.next_round(plan, cursors, lengths)
        batches += made
    breakdown: dict[str, float] = {}
    replica = plan.replicas[0]
    passes, spent_s = [0.0] * len(plan.htasks), [0.0] * len(plan.htasks)
    for batch in batches:
        parts = cost.breakdown_s(pass_load(batch, lengths), replica)
        passes[batch.htask] += 1 / rounds
        spent_s[batch.htask] += sum(parts.values()) / rounds
        for name, seconds in parts.items():
            breakdown[name] = breakdown.get(name, 0.0) + seconds / rounds
    times_s = [seconds / n if n else 0.0 for seconds, n in zip(spent_s, passes, strict=True)]
    pace = pace_of(plan, cost, passes, times_s)
    effective = sum(
        piece.stop - piece.start
        for batch in batches
        for chunk in batch.chunks
        for piece in chunk.pieces
    )
    return RoundSample(
        breakdown,
        pace.factor * sum(breakdown.values()),
        pace,
        tuple(passes),
        tuple(times_s),
        effective / rounds,
        sum(batch.shape.padded_tokens for batch in batches) / rounds,
        len(batches) / rounds,
        padding(batches),
    )


def explain(config: PlanConfig, costs: CostBook, instance: InstanceView, plan: Plan) -> Explanation:
    """Plans the same tasks again under other options."""

    def make(options: Mapping[str, object]) -> InstancePlanner:
        return build.planner({**config.planner, **options}, costs)

    helpful = remedies(instance, plan, make)
    helpful += layouts(instance, plan, make, costs.shape(instance.model))
    return Explanation(
        fusions(instance, plan, make({})),
        alternatives(instance, plan, make),
        sorted(helpful, key=lambda item: item.slower),
        unpromised(instance, plan, make),
    )


# ------------------------------------------------------------------------------------- presenting


def _present(
    config: PlanConfig,
    costs: CostBook,
    folder: RunFolder,
    spec: InstanceSpec,
    plan: Plan,
    taken: list[TaskView],
    refused: list[Refused],
    library: TaskLibrary,
) -> dict[str, Any]:
    cost = costs(spec.model, spec.device)
    asked = instance_view(spec, taken)
    explanation = explain(config, costs, asked, plan) if config.explain else NOT_EXPLAINED
    sample = sample_rounds(plan, library, cost)
    ledgers = cost.memory_ledger_bytes(plan)
    why = why_lines(_why(cost, spec, plan, taken, explanation))
    late = late_tasks(plan, taken)
    content = {
        "plan": codec.encode(plan),
        "why": why,
        "late": [item._asdict() for item in late],
        "refused": [codec.encode(item.refusal) | {"task_id": item.task_id} for item in refused],
        "sampled_round": sample._asdict()
        | {"padding": sample.padding._asdict(), "pace": sample.pace._asdict()},
        "fusions": [item._asdict() for item in explanation.fusions if item.step_time_s],
        "alternatives": [item._asdict() for item in explanation.alternatives],
        "remedies": [item._asdict() for item in explanation.remedies],
        "memory_bytes": [dict(ledger.items) for ledger in ledgers.ledgers],
        "memory_limit_bytes": spec.memory_limit_bytes,
        "figures": costs.origin(spec.model, spec.device),
    }
    several = plan.replicas[0].num_gpus > 1
    drawn = draw_order(folder.path, spec, plan, cost, sample) if several else Drawn({}, [])
    content["stream_utilisation"] = drawn.utilisation
    folder.write_json(PLAN_FILE, content)
    if config.format == "json":
        print(json.dumps(content, indent=2))
    else:
        notes = build.notes_on_costs(costs, [spec]) + build.notes_on_profiles(costs)
        _print_plan(spec, plan, taken, late, refused, sample, ledgers, why, notes)
        if config.explain:
            _print_explanation(explanation)
        if drawn.utilisation:
            shares = [f"{stream} {share:.0%}" for stream, share in drawn.utilisation.items()]
            make_console().print(f"busy, as drawn: {', '.join(shares)}", soft_wrap=True)
        for name in (PLAN_FILE, *drawn.files):
            make_console().print(f"wrote {folder.path / name}", soft_wrap=True)
    predicted = plan.predicted
    return {
        "planner": config.planner["name"],
        "num_tasks": len(taken),
        "num_refused": len(refused),
        "num_htasks": len(plan.htasks),
        "round_time_s": predicted.round_time_s.value,
        "tasks_step_time_s": predicted.tasks_step_time_s,
        "effective_tokens_per_s": sample.effective_tokens / predicted.round_time_s.value,
        "padded_tokens_per_s": sample.padded_tokens / predicted.round_time_s.value,
        "peak_memory_bytes": ledgers.peak.value,
    }


def _why(
    cost: CostModel,
    spec: InstanceSpec,
    plan: Plan,
    taken: list[TaskView],
    explanation: Explanation,
) -> Why:
    largest = tuple([htask.shapes[-1] for htask in plan.htasks])
    return Why(
        plan,
        sum(view.lengths.mean_tokens * view.sequences_per_step for view in taken),
        saturation_tokens(cost, plan.replicas[0], min(shape.chunk_tokens for shape in largest)),
        tuple([shape.padded_tokens for shape in largest]),
        spec.memory_limit_bytes,
        explanation.fusions,
        explanation.alternatives,
        explanation.unpromised,
    )


class Drawn(NamedTuple):
    """``utilisation``: occupied share of each stream, fill and drain included, by "stage 0
    compute"; ``files``: names."""

    utilisation: dict[str, float]
    files: list[str]


def draw_order(
    folder: Path, spec: InstanceSpec, plan: Plan, cost: CostModel, sample: RoundSample
) -> Drawn:
    """The plan's rounds on every stage's streams: a Gantt chart from the cold start on, and a
    Perfetto trace."""
    names = [", ".join(sorted(htask.quota)) for htask in plan.htasks]
    if plan.order:
        timeline = played(plan, cost.subgraph_times_s(plan))
        spans, period_ns = list(schedule_spans(timeline, names)), timeline.period_ns
        busy = utilisation(timeline)
        caption = f"from a cold start; a steady round takes {period_ns / 1e6:.1f} ms"
    else:
        found = representative(plan, cost, sample.passes, sample.pass_times_s)
        spans, period_ns = list(found.spans(names)), found.period_ns
        busy = found.utilisation()
        caption = _representative_caption(found, sample)
    until_ns = int(DRAWN_ROUNDS * period_ns)
    replica = plan.replicas[0]
    title = f"{spec.model} on {spec.device}, TP {replica.tp} x PP {replica.pp}"
    files = [GANTT_FILE]
    gantt(folder / GANTT_FILE, spans, title, (0, until_ns), caption)
    if replica.tp > 1:  # whose collectives are too many to be seen in a whole round
        window = (until_ns // 2, until_ns // 2 + int(period_ns / ZOOM))
        gantt(folder / ZOOM_FILE, spans, title, window, f"1/{ZOOM} of a round")
        files.append(ZOOM_FILE)
    schedule_trace(folder / TRACE_FILE, (span for span in spans if span.start_ns < until_ns))
    return Drawn(busy, [*files, TRACE_FILE])


def _representative_caption(found: Representative, sample: RoundSample) -> str:
    drawn = " + ".join(map(str, found.counts))
    mean = " + ".join(f"{n:.3g}" for n in sample.passes)
    return (
        f"representative rounds of {drawn} micro-batches (on average {mean}), from a cold start; "
        f"such a one takes {found.period_ns / 1e6:.1f} ms, the mean one "
        f"{sample.time_s * 1e3:.1f} ms"
    )


def _print_plan(
    spec: InstanceSpec,
    plan: Plan,
    taken: list[TaskView],
    late: list[Late],
    refused: list[Refused],
    sample: RoundSample,
    ledgers: StageLedgers,
    why: list[str],
    notes: Sequence[str],
) -> None:
    console = make_console()
    console.print(_htask_table(plan))
    console.print(_task_table(plan, taken))
    console.print(_time_table(plan, sample))
    console.print(_memory_table(ledgers, spec.memory_limit_bytes))
    for line in (f"why: {why[0]}", *(f"  {line}" for line in why[1:])):
        console.print(line, soft_wrap=True)
    if not notes and plan.predicted.round_time_s.extrapolated:
        notes = ["these times are extrapolated beyond what was measured"]
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True)
    for item in late:
        console.print(_late_line(item), style="yellow", soft_wrap=True)
    _print_refused(refused)


def _late_line(item: Late) -> str:
    told = f"late: {item.task_id}: would end after {format_seconds(item.end_s)}, its deadline is at"
    told += f" {format_seconds(item.deadline_s)}; alone it takes {format_seconds(item.alone_s)}"
    if item.alone_s > item.deadline_s:
        return told + ", so no plan keeps it. Give a later deadline, fewer steps or a faster device"
    return told + ". Give it an instance with fewer tasks"


def _htask_table(plan: Plan) -> Any:
    counts = {turn.htask: turn.count for turn in plan.round}
    rows = []
    for index, htask in enumerate(plan.htasks):
        count = counts.get(index)
        rows.append(
            (
                ", ".join(f"{task_id} x{n}" for task_id, n in sorted(htask.quota.items())),
                htask.packing.value,
                ", ".join(f"{s.num_chunks} x {s.chunk_tokens}" for s in htask.shapes),
                "until each task's step closes" if count is None else str(count),
            )
        )
    columns = ("hTask: task x chunks a micro-batch", "packing", "chunks x tokens", "turns a round")
    title = f"Plan of {plan.instance_id}, epoch {plan.epoch}: {len(plan.htasks)} hTask(s)"
    return make_table(title, columns, rows)


def _task_table(plan: Plan, views: list[TaskView]) -> Any:
    predicted = plan.predicted
    rows = []
    for view in sorted(views, key=lambda view: view.task_id):
        step_s = predicted.step_time_s[view.task_id]
        alone_s = predicted.solo_step_time_s.get(view.task_id, 0.0)
        tokens = view.lengths.mean_tokens * view.sequences_per_step
        rows.append(
            (
                view.task_id,
                f"{view.slot.method} r={view.slot.rank}",
                view.sequences_per_step,
                round(tokens),
                format_seconds(step_s),
                format_seconds(alone_s),
                f"{step_s / alone_s:.2f}" if alone_s else None,
                format_seconds(step_s * view.num_steps),
            )
        )
    columns = ("task", "adapter", "sequences", "tokens", "step", "alone", "slowdown", "all steps")
    return make_table("Tasks: one optimizer step each (predicted)", columns, rows)


def _time_table(plan: Plan, sample: RoundSample) -> Any:
    round_s = plan.predicted.round_time_s
    rows: list[tuple[object, ...]] = [
        ("one round, predicted", format_seconds(round_s.value), None),
        (
            "  90% interval",
            f"{format_seconds(round_s.low)} .. {format_seconds(round_s.high)}",
            None,
        ),
        ("one round, packed and costed", format_seconds(sample.time_s), "100%"),
        *_round_rows(sample),
        ("a step of every task", format_seconds(plan.predicted.tasks_step_time_s), None),
        ("effective tokens a round", round(sample.effective_tokens), None),
        (
            "padded tokens a round",
            round(sample.padded_tokens),
            f"{sample.effective_tokens / sample.padded_tokens:.1%} effective",
        ),
        *(
            (f"  {name.replace('_', ' ')}", None, f"{tokens / sum(sample.padding):.1%}")
            for name, tokens in sample.padding._asdict().items()
        ),
        ("effective tokens/s", sample.effective_tokens / sample.time_s, None),
        ("padded tokens/s", sample.padded_tokens / sample.time_s, None),
    ]
    return make_table("Where the time goes", ("of a round", "value", "share"), rows)


def _round_rows(sample: RoundSample) -> list[tuple[object, ...]]:
    """A round by cause. On several GPUs: what a GPU computes, as a mean over the stages, and why
    it does not compute in the rest."""
    spent = dict(sample.breakdown_s)
    pace = sample.pace
    if pace != ONE_GPU:
        spent.pop("communication", None)
        scale = pace.computing * sample.time_s / sum(spent.values())
        spent = {name: scale * seconds for name, seconds in spent.items()}
        spent |= {
            "communication not hidden": pace.exposed_communication * sample.time_s,
            "bubbles: stage imbalance": pace.imbalance * sample.time_s,
            "bubbles: fill and drain": pace.fill_drain * sample.time_s,
            "bubbles: stalls": pace.stalls * sample.time_s,
        }
    rows: list[tuple[object, ...]] = [
        (f"  {name}", format_seconds(seconds), f"{seconds / sample.time_s:.1%}")
        for name, seconds in sorted(spent.items(), key=lambda pair: -pair[1])
        if seconds > 0
    ]
    if pace.once:
        once = format_seconds(pace.once * sample.time_s)
        rows.append(("fill and drain, once a plan", once, None))
    return rows


def _memory_table(ledgers: StageLedgers, limit_bytes: int) -> Any:
    rows: list[tuple[object, ...]] = []
    for ledger in ledgers.ledgers:
        prefix = f"stage {ledger.stage}: " if len(ledgers.ledgers) > 1 else ""
        items = sorted(ledger.items.items(), key=lambda pair: -pair[1])
        rows += [(prefix + name, format_bytes(size)) for name, size in items if size]
        rows.append((prefix + "total", format_bytes(ledger.total_bytes)))
    rows.append(("limit of a GPU", format_bytes(limit_bytes)))
    return make_table("Memory of a GPU (predicted peak)", ("item", "size"), rows)


def _print_explanation(explanation: Explanation) -> None:
    console = make_console()
    rows = [
        (item.name, format_seconds(item.step_time_s), f"{item.slower:+.1%}")
        for item in explanation.alternatives[:4]
    ]
    if rows:
        title = "Next best plans: a step of every task (predicted)"
        console.print(make_table(title, ("plan", "time", "against this one"), rows))
    helpful = [item for item in explanation.remedies if item.slower < -MIN_HELP]
    for item in helpful:
        console.print(f"would help: {item.name}: {item.slower:+.1%} time", soft_wrap=True)
    if not helpful:
        console.print("would help: neither more memory nor finer shapes; only a faster device")


def _print_refused(refused: list[Refused]) -> None:
    console = make_console()
    for task_id, refusal in refused:
        sizes = ""
        if refusal.needed_bytes:
            needed, available = refusal.needed_bytes, refusal.available_bytes
            sizes = f" (needs {format_bytes(needed)}, {format_bytes(available)} available)"
        text = f"refused: {task_id}: {refusal.reason}{sizes}. {refusal.remedy}"
        console.print(text, style="yellow", soft_wrap=True)
