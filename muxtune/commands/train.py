"""``muxtune train``: fine-tune real tasks on this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from muxtune import build
from muxtune.commands import ranks
from muxtune.commands.real_runs import Outcomes, device_notice, real_tasks, warn_of_costs
from muxtune.commands.resuming import (
    JOURNAL_FILE,
    check_same_run,
    close_chapter,
    earlier_chapters,
    ended_summary,
    has_journal,
    has_other_layout,
    is_unfinished,
    run_origin,
    saved_overrides,
    tasks_that_ended,
)
from muxtune.config import TrainConfig
from muxtune.engine import Engine, RunTotals, TaskOutcome
from muxtune.errors import ConfigError
from muxtune.planning.journal import Journal, JournalBatch, read_journal
from muxtune.planning.orchestration import played, schedule_spans
from muxtune.planning.orchestration.spans import ScheduleSpan
from muxtune.protocols import CostModel
from muxtune.report.gantt import schedule_trace
from muxtune.report.perfetto import Span, TraceWriter
from muxtune.report.plots import slowdowns
from muxtune.report.progress import TaskProgress
from muxtune.report.recording import DriftRows, RecordingPlanner, TaskRows, Troubles, slowdown
from muxtune.report.run_folder import SUMMARY, RunFolder, provenance
from muxtune.report.tables import format_bytes, format_seconds, make_console, make_table
from muxtune.types import NS_PER_S, Plan, TaskSpec

TASKS_FILE, TRACE_FILE, DRIFTS_FILE = "tasks.csv", "trace.json", "drifts.csv"
PLAN_TRACE_FILE, PREDICTED_ROUNDS = "plan_trace.json", 12
SLOWDOWN_PLOT = "slowdown.png"
METRICS_FILE, CHECKPOINTS = "metrics.jsonl", "checkpoints"


class TorchListener:
    """What the real executor tells while it works: to the progress display, the trace and sums.

    The methods are those of ``muxtune.runtime.records.StepListener``.
    """

    def __init__(self, display: TaskProgress | None = None, trace: TraceWriter | None = None):
        self.display, self.trace = display, trace
        self.effective_tokens = self.padded_tokens = self.busy_ns = 0
        self.notices: list[str] = []

    def on_step(self, record: Any) -> None:
        if self.display is not None:
            self.display.on_step(
                record.task_id, record.step, record.num_steps, record.loss, record.tokens
            )

    def on_round(self, record: Any) -> None:
        self.effective_tokens += record.effective_tokens
        self.padded_tokens += record.padded_tokens
        self.busy_ns += record.duration_ns

    def on_notice(self, text: str) -> None:
        self.notices.append(text)
        if self.display is not None:
            self.display.line(text)

    def on_span(self, record: Any) -> None:
        if self.trace is not None:
            self.trace.span(as_span(record))


def as_span(record: Any) -> Span:
    """A ``SpanRecord`` of the runtime on the track of its hTask; an operation of one of several
    ranks as in the trace of a plan's order: a process a rank, a thread a stream."""
    process = record.instance_id or "host"
    thread = f"hTask {record.htask}" if record.htask >= 0 else "between passes"
    args: dict[str, Any] = {"tasks": ", ".join(record.task_ids)}
    name, place = record.name, record.place
    if place is not None:
        process = f"{process}: rank {place.rank}, stage {place.stage}"
        name, thread = f"{thread}: {name}", place.stream
        args |= {"round": place.round, "micro_batch": place.micro_batch}
        args |= {"direction": place.direction, "kind": place.kind}
    return Span(process, thread, name, record.start_ns, record.duration_ns, args)


def run(
    config: TrainConfig, folder: RunFolder, loaded: build.BackboneStore | None = None
) -> dict[str, Any]:
    """Writes adapters, metrics.jsonl, journal.jsonl, tasks.csv, drifts.csv and trace.json; of
    several GPUs' order also plan_trace.json, what was predicted of it.

    ``loaded``: backbones that a caller has in memory already. With ``config.resume`` the run in
    the folder goes on, and all but trace.json, which begins anew, are continued.
    """
    build.need_torch()
    info = ranks.rank_info(config)
    if info is None and ranks.num_ranks(config) > 1:
        return _launch(config, folder)
    costs = build.cost_book(config)
    tasks = real_tasks(config, costs)
    check_folder(config, folder.path, tasks)
    if config.resume and (ended := ended_summary(folder.path)) is not None:
        make_console().print(f"{folder.path}: the run has ended already", soft_wrap=True)
        return ended
    planner = RecordingPlanner(
        build.planner(ranks.planner_options(config), costs), seed=config.seed
    )
    policy, options = build.cluster_policy(config.cluster_policy), build.engine_options(config)
    instances = build.instances(config, costs, tasks)
    warn_of_costs(costs, instances)
    outcomes, troubles = Outcomes(), Troubles()
    chapters = _turn_page(config, folder.path)
    from muxtune.runtime.memory import quick_collections

    ended_before = tasks_that_ended(chapters)
    with ExitStack() as stack:
        store, make_instance = loaded or build.backbone_store(config), None
        backend: Mapping[str, Any] = config.backend
        if info is not None and info.world_size > 1:
            crew = ranks.crew_of(config, info)
            store, make_instance = crew.store, crew.make_instance
            backend = ranks.controller_options(backend)
            stack.push(lambda kind, error, trace: crew.close() if kind is None else None)
        display = stack.enter_context(TaskProgress())
        trace = TraceWriter(stack.enter_context(folder.stream(TRACE_FILE)))
        stack.callback(trace.end)
        file = stack.enter_context(folder.stream(TASKS_FILE))
        rows = stack.enter_context(TaskRows(file))
        drifts = DriftRows(stack.enter_context(folder.stream(DRIFTS_FILE)))
        listener = TorchListener(display, trace)
        if notice := device_notice(config, store.device.type):
            listener.on_notice(notice)
        stack.enter_context(quick_collections())  # before the executor's clock begins
        executor = build.torch_executor(
            backend, folder.path, store, build.text_library(config, store), (listener,),
            make_instance=make_instance,
        )  # fmt: skip
        stack.callback(executor.close)
        if not config.resume:  # only now, when nothing in the settings can be refused any more
            _clear(folder.path)
        journal, past = _journal(config, folder.path, tasks)
        folder.keep()
        stack.push(lambda kind, error, trace: kind and _tell_how_to_go_on(folder.path))
        stack.enter_context(journal)
        engine = Engine(
            policy,
            planner,
            executor,
            [task for task in tasks if task.task_id not in ended_before],
            instances,
            journal,
            (rows, drifts, outcomes, troubles),
            options,
        )
        if past is not None:
            engine.resume(past)
        elif chapters:
            executor.restore([(record, ()) for chapter in chapters for record in chapter])
        engine.observers += (display,)  # it shows what happens, not what has happened
        totals = engine.run()
    summary = _summary(config, totals, listener, planner, executor.accounted_peak_bytes())
    if predicted := _ordered(outcomes.plans.values()):
        spec = next(item for item in instances if item.instance_id == predicted.instance_id)
        write_plan_trace(folder.path / PLAN_TRACE_FILE, predicted, costs(spec.model, spec.device))
    summary["figures"] = build.origin_of_times(costs, instances)
    _show(folder, summary, outcomes)
    summary["error"] = troubles.error()
    return summary


def _ordered(plans: Iterable[Plan]) -> Plan | None:
    """The first of most tasks that has an order."""
    found = [plan for plan in plans if plan.order]
    return max(found, key=lambda plan: len(plan.task_ids), default=None)


def write_plan_trace(path: Path, plan: Plan, cost: CostModel) -> None:
    """The plan's first rounds as they are predicted, in the form in which a trace shows ranks. They
    are played with the largest micro-batches, then all alike shortened to a round's mean."""
    timeline = played(plan, cost.subgraph_times_s(plan), PREDICTED_ROUNDS)
    shorter = NS_PER_S * plan.predicted.round_time_s.value / timeline.period_ns
    names = [f"hTask {number}" for number in range(len(plan.htasks))]
    process = f"predicted {plan.instance_id}, plan {plan.epoch}: stage"
    spans = (_shortened(span, shorter) for span in schedule_spans(timeline, names))
    schedule_trace(path, spans, process)


def _shortened(span: ScheduleSpan, share: float) -> ScheduleSpan:
    """What ends where another begins still does."""
    start_ns = round(share * span.start_ns)
    end_ns = round(share * (span.start_ns + span.duration_ns))
    return span._replace(start_ns=start_ns, duration_ns=end_ns - start_ns)


def _tell_how_to_go_on(path: Path) -> None:
    text = f"{path}: stopped before its end; go on with it: muxtune train resume={path}"
    make_console(stderr=True).print(text, soft_wrap=True)


def _launch(config: TrainConfig, folder: RunFolder) -> dict[str, Any]:
    """The same in one process a rank on this host; rank 0's summary."""
    from muxtune.runtime.distributed.launch import launch

    ranks.check(config, ranks.num_ranks(config))
    ranks.timeout_s(config)
    main_process = os.getpid()

    def work() -> dict[str, Any] | None:
        assert os.getpid() != main_process
        return ranks.follow(config) if ranks.is_follower() else run(config, folder)

    try:
        return launch(ranks.num_ranks(config), work)
    except BaseException as error:
        if has_journal(folder.path):  # rank 0 began the run, and this process wrote its settings
            folder.keep()
            if isinstance(error, SystemExit):  # of anything else rank 0 tells
                _tell_how_to_go_on(folder.path)
        raise


def check_folder(config: TrainConfig, path: Path, tasks: Sequence[TaskSpec] | None = None) -> None:
    """Raises ConfigError when a new run would destroy one that was killed, when the run to resume
    is not there or has other settings, or for what only simulated fleets do. Changes nothing."""
    if "resume" in config.backend:
        raise ConfigError("backend.resume", "is not for runs", "Use resume=true")
    if not config.resume:  # a run of before may have been started so, and ignored it
        build.check_fleet_stays(config.cluster)
    if config.resume:
        if tasks is None:
            tasks = real_tasks(config, build.cost_book(config))
        check_same_run(path, run_origin(config, tasks))
    elif is_unfinished(path):
        raise ConfigError(
            "output_dir",
            f"'{path}' holds a run that has not ended, and starting anew would destroy it",
            f"Go on with it: muxtune train resume={path}; else remove the folder, or choose "
            "another with output_dir=PATH",
        )


def _turn_page(config: TrainConfig, path: Path) -> list[Sequence[JournalBatch]]:
    """The records of the chapters before: a run that goes on with other GPUs begins a new one,
    because what its journal holds was decided for the old ones. Tasks go on from their
    checkpoints all the same."""
    if not config.resume:
        return []
    if has_other_layout(path, config):
        close_chapter(path)
    return [read_journal(chapter).batches for chapter in earlier_chapters(path)]


def _clear(path: Path) -> None:
    """What a run that has ended left and this one would take for its own. The journal goes before
    what it speaks of, so that a kill in between leaves nothing that looks like a run."""
    for chapter in earlier_chapters(path):
        chapter.unlink()
    for name in (SUMMARY, JOURNAL_FILE, METRICS_FILE):  # metrics are appended to
        (path / name).unlink(missing_ok=True)
    shutil.rmtree(path / CHECKPOINTS, ignore_errors=True)


def _journal(
    config: TrainConfig, path: Path, tasks: Sequence[TaskSpec]
) -> tuple[Journal, Sequence[JournalBatch] | None]:
    """The journal to write, and what it holds already if the run is resumed."""
    if config.resume and has_journal(path):
        journal, record = Journal.resume(path / JOURNAL_FILE)
        return journal, record.batches
    origin = run_origin(config, tasks) | {"overrides": saved_overrides(path)}
    return Journal(path / JOURNAL_FILE, origin, dict(provenance(config.seed)["packages"])), None


def _summary(
    config: TrainConfig,
    totals: RunTotals,
    listener: TorchListener,
    planner: RecordingPlanner,
    peak_bytes: int,
) -> dict[str, Any]:
    busy_s = listener.busy_ns / NS_PER_S
    return {
        "planner": config.planner["name"],
        "cluster_policy": config.cluster_policy["name"],
        "model": config.model.name,
        "num_tasks": totals.num_tasks,
        "num_done": totals.num_done,
        "num_failed": totals.num_failed,
        "num_refused": totals.num_refused,
        "num_cancelled": totals.num_cancelled,
        "makespan_s": totals.end_ns / NS_PER_S,
        "training_s": busy_s,
        "effective_tokens_per_s": listener.effective_tokens / busy_s if busy_s else None,
        "padded_tokens_per_s": listener.padded_tokens / busy_s if busy_s else None,
        "peak_memory_bytes": peak_bytes,
        "num_plans": totals.num_plans,
        "num_drifts": totals.num_drifts,
        "mean_planning_us": planner.mean_us,
        "seed": config.seed,
        "notices": "; ".join(listener.notices),
    }


TASK_COLUMNS = (
    *("task", "state", "steps", "tokens", "loss", "perplexity before", "after", "slowdown"),
    *("promised", "adapter"),
)


def task_table(tasks: Sequence[TaskOutcome], figures: str) -> Any:
    """``figures``: measured, extrapolated or analytic."""
    rows = [
        (
            *(item.task_id, str(item.state), item.steps, item.effective_tokens, item.final_loss),
            *(item.perplexity_before, item.perplexity_after, slowdown(item), item.max_slowdown),
            item.output_path or None,
        )
        for item in sorted(tasks, key=lambda item: item.task_id)
    ]
    title = f"Tasks (slowdown: over the time alone that {figures} figures predict)"
    return make_table(title, TASK_COLUMNS, rows)


def _show(folder: RunFolder, summary: dict[str, Any], outcomes: Outcomes) -> None:
    console = make_console()
    console.print(task_table(outcomes.tasks, summary["figures"]))
    rows = [(item.task_id, slowdown(item), item.max_slowdown) for item in outcomes.tasks]
    if known := sorted((name, value, bound) for name, value, bound in rows if value):
        slowdowns(folder.path / SLOWDOWN_PLOT, known, summary["figures"])
    rows = [
        ("run", format_seconds(summary["makespan_s"])),
        ("of it training", format_seconds(summary["training_s"])),
        ("effective tokens/s", summary["effective_tokens_per_s"]),
        ("padded tokens/s", summary["padded_tokens_per_s"]),
        ("peak memory", format_bytes(summary["peak_memory_bytes"])),
        ("plans", summary["num_plans"]),
        ("drifts", summary["num_drifts"]),
    ]
    console.print(make_table(f"Run under '{summary['planner']}'", ("measured", "value"), rows))
    console.print(f"wrote {folder.path}", soft_wrap=True)
