"""The report of a capacity answer: one HTML file, pictures first, tables after.

Every figure in the text and in the tables is a ``Traced`` cell of one of the CSV files beside it;
nothing is computed here.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pa_parquet

from muxtune.cost.book import ANALYTIC, EXTRAPOLATED
from muxtune.report.capacity_figures import ASSUMPTIONS, Drawing
from muxtune.report.html import HtmlTable, Section, Traced, format_cell, write_report
from muxtune.report.run_folder import RunFolder
from muxtune.report.tables import format_seconds

Row = dict[str, Any]
Tables = Mapping[str, Sequence[Row]]
Piece = str | Traced
NOTHING = "–"


# ------------------------------------------------------------------------------------------- files


def write_tables(folder: RunFolder, tables: Tables) -> list[Path]:
    """Each table as NAME.csv and NAME.parquet; an empty one leaves no file."""
    paths = []
    for name, rows in tables.items():
        if rows:
            paths.append(folder.write_text(f"{name}.csv", csv_text(rows)))
            paths.append(_write_parquet(folder, f"{name}.parquet", rows))
    return paths


def csv_text(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write_parquet(folder: RunFolder, name: str, rows: Sequence[Row]) -> Path:
    with folder.stream(name, "wb") as file:
        pa_parquet.write_table(pa.Table.from_pylist(list(rows)), file)
    return folder.path / name


# --------------------------------------------------------------------------------------- formatting


def shown(column: str, value: Any) -> str:
    """A value in the unit that its column's name tells."""
    if value is None:
        return NOTHING
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return format_cell(value)
    if "usd_per_" in column:
        return f"${value:,.0f}" if abs(value) >= 1_000 else f"${value:.4g}"
    if column.endswith("_share") or "share" in column or column.startswith(_PERCENTS):
        return f"{value:.1%}"
    if column.endswith("_s"):
        return format_seconds(value)
    return format_cell(value)


_PERCENTS = ("saving", "change", "gain", "effective_utilisation")


def cell(file: str, row: Row, column: str) -> Piece:
    """A number with where it comes from; text as it is."""
    value = row[column]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Traced(shown(column, value), f"{file}.csv", row["row"], column)
    return shown(column, value)


def table_of(
    file: str, rows: Sequence[Row], columns: Sequence[tuple[str, str]], caption: str = ""
) -> HtmlTable:
    """``columns``: (name in the file, heading)."""
    body = [[cell(file, row, name) for name, _ in columns] for row in rows]
    note = f"{caption} {file}.csv, {file}.parquet".strip()
    return HtmlTable([heading for _, heading in columns], body, note)


# ------------------------------------------------------------------------------------------ content

OPTION = (("policy", "policy"), ("device", "device"))
MONEY = (
    *OPTION,
    *(("feasible", "keeps the level"), ("num_gpus", "GPUs"), ("figures", "device figures")),
    *(("usd_per_gpu_hour", "USD per GPU and hour"), ("break_even_usd_per_gpu_hour", "break-even")),
    *(("gpu_hours_per_month", "GPU hours a month"), ("usd_per_month", "cost a month")),
    ("usd_per_million_tokens", "per million effective tokens"),
    ("saving_same_device", "saving, same device"),
    *(("saving_same_device_low", "from"), ("saving_same_device_high", "to")),
    ("saving_best_baseline", "saving, baseline's best device"),
    *(("saving_best_baseline_low", "from"), ("saving_best_baseline_high", "to")),
)
TIMES = (
    *OPTION,
    ("served_share", "served as promised"),
    *(("mean_start_delay_s", "queue, mean"), ("p50_start_delay_s", "p50")),
    *(("p95_start_delay_s", "p95"), ("p99_start_delay_s", "p99")),
    *(("mean_completion_time_s", "completion, mean"), ("p50_completion_time_s", "p50")),
    *(("p95_completion_time_s", "p95"), ("p99_completion_time_s", "p99")),
)
BY_MODEL = (
    *(*OPTION, ("model", "base model"), ("num_gpus", "GPUs"), ("usd_per_month", "cost a month")),
    ("usd_per_million_tokens", "per million effective tokens"),
    ("served_share", "served as promised"),
)
FARE = (
    *OPTION,
    *(("mean_slowdown", "slowdown, mean"), ("p95_slowdown", "p95"), ("p99_slowdown", "p99")),
    *(("mean_finish_time_ratio", "finish-time ratio, mean"), ("p99_finish_time_ratio", "p99")),
    *(("fairness_index", "fairness (Jain)"), ("deadlines_met_share", "deadlines met")),
)
USE = (
    *OPTION,
    *(("busy_share", "GPUs busy"), ("effective_share", "effective of padded tokens")),
    *(("effective_utilisation", "effective utilisation"), ("memory_headroom_share", "memory free")),
    *(("mean_tasks_per_busy_instance", "tasks a busy instance"),),
    ("energy_kwh_per_month", "energy, kWh a month"),
)
LIMITS = (
    *(*OPTION, ("model", "base model"), ("num_gpus", "GPUs (too few)"), ("relaxed", "relaxed")),
    *(("served_share", "served as promised"), ("busy_share", "GPUs busy")),
    *(("gain", "gain"), ("limits", "limits most")),
)
SENSITIVITY = (
    *(("assumption", "assumption"), ("side", "moved"), ("moved_to", "times")),
    *(("num_gpus", "GPUs, mean of draws"), ("usd_per_month", "cost a month"), ("change", "change")),
    ("served_share_of_answer", "served by the answer's fleet"),
)
SEEDS = (
    *(*OPTION, ("model", "base model"), ("seed", "draw"), ("num_gpus", "GPUs")),
    ("monotone", "larger never worse"),
)
QUESTION = (("name", "what"), ("value", "value"), ("text", "text, or source and date"))
WORKLOAD = (
    *(("model", "base model"), ("num_tasks", "tasks"), ("horizon_s", "arrive within")),
    ("busy_gpus_alone", "reference GPUs busy, one task each"),
)
FAST = "exclusive_fast"  # one instance a task, with fast kernels
QUESTIONS = {
    "share": "service level: share of tasks",
    "start": "starts within (s)",
    "slowdown": "ends within times its time alone",
}
RELAXED = {
    "memory": "twice the memory",
    "compute": "everything a fifth faster",
    "arrivals": "even arrivals",
    "as it is": "nothing relaxed",
}
DEFINITIONS = (
    "Every policy serves the same tasks: a draw has one seed, and all fleets and policies see it. "
    "The reference of a promise is the task alone, padded and eager as under HF PEFT, on the "
    "reference device, whatever policy and device serve it.",
    "Costs of a month are those of GPUs that are held all the time, for arrivals that go on as in "
    "the trace; the GPUs alone, without disks, network, power or staff. Break-even is the price at "
    "which an option costs as much as the answer. The savings compare the "
    "smallest fleets of each draw in pairs; their intervals are bootstrapped over the draws. "
    "GPUs of one base model serve no other. A fleet that gets more work than it has time for is "
    "too small, whatever its trace shows before it ends.",
    "Slowdown counts from a task's start, the finish-time ratio from its arrival, both over the "
    "reference. Fairness is Jain's index over the tenants' mean finish-time ratios. Effective "
    "utilisation is the share of GPU time held that goes into tokens a task needs. Energy is that "
    "of the GPU boards at their rated power.",
    "What limits is found by relaxing one thing at a time for a fleet that is one step too small: "
    "memory doubled, everything a fifth faster, or the same tasks arriving evenly.",
)
OF_ANALYTIC = (
    "ANALYTIC: times come from a roofline over published figures of the devices. Nothing was "
    "measured on them; the error of the cost model below is what it says of itself. Measure with "
    "`muxtune profile` and give cost=profile cost.path=FILE."
)

OF_EXTRAPOLATED = (
    "EXTRAPOLATED: times come from a profile of the device that was measured with another base "
    "model. Measure this one with `muxtune profile` and give cost=profile cost.path=FILE."
)


def write_page(
    folder: Path, tables: Tables, drawings: Sequence[Drawing], notes: Sequence[str]
) -> Path:
    """Writes report.html into the folder of the tables. Raises OutputError."""
    sections = [
        Section("Answer", stories=[*_answer(tables), *([note] for note in notes)]),
        Section("Pictures", images=[drawing.image for drawing in drawings]),
        *_table_sections(tables),
    ]
    lead = "The smallest fleet that keeps a service level, policy by policy"
    return write_report(folder, "Capacity", sections, lead)


def _answer(tables: Tables) -> list[list[Piece]]:
    answers = tables["answers"]
    best = next((row for row in answers if row["recommended"]), None)
    stories: list[list[Piece]] = [_asked(tables)]
    stories.append(_best(best) if best else ["No fleet asked about will do."])
    for row in answers:
        if not row["feasible"]:
            stories.append(_infeasible(row))
    if best:
        stories += [story for story in (_kernels(best, answers), _prices(best, answers)) if story]
        stories += [_limit(row, tables) for row in tables["limits"] if _is_limit(row, best)]
        if tables["sensitivity"]:
            stories.append(_hangs_on(tables["sensitivity"]))
    for origin, text in ((ANALYTIC, OF_ANALYTIC), (EXTRAPOLATED, OF_EXTRAPOLATED)):
        if any(row["figures"] == origin for row in answers):
            stories.append([text])
    return stories


def _asked(tables: Tables) -> list[Piece]:
    """The question, and what of the world it is asked about."""
    question = {row["name"]: row for row in tables["question"]}

    def at(name: str) -> Piece:
        return cell("question", question[name], "value")

    since = question["time alone counted from"]["text"]
    story: list[Piece] = ["Asked: "]
    for row in tables["workload"]:
        story += [cell("workload", row, "num_tasks"), f" tasks on {row['model']} that arrive in "]
        story += [cell("workload", row, "horizon_s"), ", "]
    story += ["and a month that goes on like that, all day. Promised: ", at(QUESTIONS["share"])]
    story += [" of the tasks start within ", at(QUESTIONS["start"]), " s and end within "]
    story += [at(QUESTIONS["slowdown"]), " times their time alone under HF PEFT, counted "]
    return [*story, f"from their {since}."]


def _is_limit(row: Row, best: Row) -> bool:
    return _is_of(row, best) and row["limits"]


def _is_of(row: Row, answer: Row) -> bool:
    return (row["policy"], row["device"]) == (answer["policy"], answer["device"])


def _best(row: Row) -> list[Piece]:
    def at(column: str) -> Piece:
        return cell("answers", row, column)

    story: list[Piece] = [at("num_gpus"), f" GPUs of kind {row['device']} under the policy "]
    story += [f"{row['policy']} keep the service level for ", at("usd_per_month"), " a month ("]
    story += [at("usd_per_million_tokens"), " per million effective tokens), at "]
    story += [at("usd_per_gpu_hour"), " per GPU and hour (date and source of the price: "]
    story += ["under 'Question and prices')."]
    if row["saving_best_baseline"] is not None:
        story += [" That saves ", at("saving_best_baseline"), " against one instance a task"]
        if row["saving_best_baseline_low"] is not None:
            low, high = at("saving_best_baseline_low"), at("saving_best_baseline_high")
            story += [" (confidence interval over the draws of the tasks: ", low, " to ", high, ")"]
        story += [", on the device where that costs least."]
    return story


def _kernels(best: Row, answers: Sequence[Row]) -> list[Piece]:
    """How much of a saving is that of fast kernels, which sharing has no part in."""
    fast = [row for row in answers if row["policy"] == FAST and row["feasible"]]
    if not fast or best["policy"] == FAST:
        return []
    cheapest = min(fast, key=lambda row: row["usd_per_month"])
    story: list[Piece] = ["Not all of that is sharing: one instance a task with fast kernels ("]
    story += [f"{FAST}) would cost ", cell("answers", cheapest, "usd_per_month"), " a month, with "]
    return [*story, cell("answers", cheapest, "num_gpus"), f" GPUs of kind {cheapest['device']}."]


def _prices(best: Row, answers: Sequence[Row]) -> list[Piece]:
    """What the other kinds would have to cost for the answer to be another."""
    others = dict.fromkeys(row["device"] for row in answers if row["device"] != best["device"])
    story: list[Piece] = []
    for device in others:
        found = [row for row in answers if row["device"] == device and row["feasible"]]
        if found:
            least = max(found, key=lambda row: row["break_even_usd_per_gpu_hour"])
            story += [f"{device} is the cheaper kind below "]
            story += [cell("answers", least, "break_even_usd_per_gpu_hour"), " per GPU and hour ("]
            story += [f"under {least['policy']}; counted here: "]
            story += [cell("answers", least, "usd_per_gpu_hour"), "). "]
    return story


def _infeasible(row: Row) -> list[Piece]:
    story: list[Piece] = [f"No fleet of {row['device']} under {row['policy']} keeps the level: "]
    story += [f"{row['reason']}. The best that can be had: "]
    story += [cell("answers", row, "served_share"), " of the tasks, with "]
    return [*story, cell("answers", row, "num_gpus"), " GPUs."]


def _limit(row: Row, tables: Tables) -> list[Piece]:
    same = [
        item for item in tables["limits"] if _is_of(item, row) and item["model"] == row["model"]
    ]
    as_it_is = next(item for item in same if item["relaxed"] == "as it is")
    return [
        f"What limits {row['model']}: {row['relaxed']}. With ",
        cell("limits", row, "num_gpus"),
        " GPUs, one step too few, ",
        cell("limits", as_it_is, "served_share"),
        " of these tasks are served as promised, with work for ",
        cell("limits", as_it_is, "busy_share"),
        " of the GPUs' time (above 100% the queue grows for ever); with "
        f"{RELAXED[row['relaxed']]} it would be ",
        cell("limits", row, "served_share"),
        " and ",
        cell("limits", row, "busy_share"),
        ".",
    ]


def _hangs_on(rows: Sequence[Row]) -> list[Piece]:
    story: list[Piece] = ["What the answer hangs on, each assumption by itself: "]
    for name in dict.fromkeys(row["assumption"] for row in rows):
        story += [f"{ASSUMPTIONS[name]} "]
        for row in (item for item in rows if item["assumption"] == name):
            story += ["x ", cell("sensitivity", row, "moved_to"), ": "]
            if row["change"] is None:
                story += ["no fleet asked about will do; "]
            else:
                story += [cell("sensitivity", row, "usd_per_month"), " a month; "]
    return [*story, "base: ", cell("sensitivity", rows[0], "base_usd_per_month"), "."]


def _table_sections(tables: Tables) -> list[Section]:
    answers = tables["answers"]
    made = [
        Section("Cost and savings", tables=[table_of("answers", answers, MONEY)]),
        Section("Queue and completion", tables=[table_of("answers", answers, TIMES)]),
        Section("Slowdown and fairness", tables=[table_of("answers", answers, FARE)]),
        Section("Use of the GPUs", tables=[table_of("answers", answers, USE)]),
    ]
    if len(tables["workload"]) > 1:
        table = table_of("base_models", tables["base_models"], BY_MODEL)
        made.append(Section("By base model", tables=[table]))
    if tables["limits"]:
        made.append(Section("What limits", tables=[table_of("limits", tables["limits"], LIMITS)]))
    if tables["sensitivity"]:
        table = table_of("sensitivity", tables["sensitivity"], SENSITIVITY)
        made.append(Section("What the answer hangs on", tables=[table]))
    made += [
        Section("Smallest fleet of each draw", tables=[table_of("seeds", tables["seeds"], SEEDS)]),
        Section("Workload", tables=[table_of("workload", tables["workload"], WORKLOAD)]),
        Section("Question and prices", tables=[table_of("question", tables["question"], QUESTION)]),
        Section("How to read it", text="\n\n".join(DEFINITIONS)),
    ]
    return made
