"""The table, the verdicts on the goals and the traces of what ``run`` has measured.

python -m experiments.two_gpus.report rows.jsonl --output FOLDER
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from muxtune.planning.orchestration.spans import ScheduleSpan
from muxtune.report.gantt import gantt_panels, schedule_trace
from muxtune.report.run_folder import RunFolder, provenance
from muxtune.types import SubgraphKind

HIDDEN = ("spans", "htask_of_op", "label_of_op", "kind_of_op", "backward_of_op", "predicted_spans",
          "losses", "replica")  # fmt: skip
DRAWN_ROUNDS = 3
Row = dict[str, Any]


def read(files: Sequence[Path]) -> tuple[list[Row], list[Row]]:
    """(rows, facts of the runs); a line that was cut off is left out."""
    rows, facts = [], []
    for file in files:
        for line in file.read_text("utf-8").splitlines():
            try:
                content = json.loads(line)
            except ValueError:
                print(f"{file}: a line was cut off")
                continue
            (facts if "facts" in content else rows).append(content)
    return rows, facts


def table(rows: Sequence[Row]) -> list[str]:
    names = ("configuration", "link", "effective tok/s", "against one GPU", "round ms", "predicted")
    names += ("steady bubble", "predicted")
    lines = [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
    one = best(rows, "tp1 pp1")
    for row in rows:
        speedup = "" if one is None else f"{tokens_per_s(row) / tokens_per_s(one):.2f}"
        lines.append(
            f"| {row['name']} | {row['label']} | {tokens_per_s(row):,.0f} | {speedup} | "
            f"{row['round_ms']:.1f} | {row['prediction_error']:+.1%} | "
            f"{row['steady_bubble']:.1%} | {row['predicted_steady_bubble']:.1%} |"
        )
    return lines


def tokens_per_s(row: Row) -> float:
    return row["effective_tokens_per_s"]


def best(rows: Sequence[Row], start: str, contains: str = "", label: str = "") -> Row | None:
    """The fastest row of a kind."""
    found = [
        row for row in rows
        if row["name"].startswith(start) and contains in row["name"]
        and row["label"].startswith(label)
    ]  # fmt: skip
    return max(found, key=tokens_per_s, default=None)


def goals(rows: Sequence[Row]) -> list[str]:
    """What can be said of each goal from the rows that are there."""
    said = []
    one, piped = best(rows, "tp1 pp1"), best(rows, "tp1 pp2", "interleaved", "NVLink")
    if one and piped:
        said.append(_speedup("PP2 against one GPU (goal 1.7 to 1.85)", piped, one))
    for what, order in (("one task at a time, 1F1B", "8 hTasks, 2 parts, 1f1b"),
                        ("all-spatial", "1 hTask, 4 parts, 1f1b")):  # fmt: skip
        other = best(rows, "tp1 pp2", order, "NVLink")
        if piped and other:
            said.append(_speedup(f"PP2 against {what}", piped, other))
    if piped:
        said.append(_bubbles(piped))
    for label in sorted({row["label"] for row in rows}):
        said += _exposed(rows, label)
    errors = [abs(row["prediction_error"]) for row in rows]
    if errors:
        mean = statistics.mean(errors)
        said.append(f"mean error of {len(rows)} predictions (goal 5% over 12): {mean:.1%}")
    return said


def _speedup(what: str, row: Row, other: Row) -> str:
    ratio = tokens_per_s(row) / tokens_per_s(other)
    return f"{what}: {ratio:.2f} ({row['name']}, {row['label']})"


def _bubbles(row: Row) -> str:
    by_rank = ", ".join(f"{share:.1%}" for share in row["steady_bubble_by_rank"])
    kinds = ", ".join(
        f"{what} {row[name]:.1%} ({row[f'predicted_{name}']:.1%})"
        for what, name in (("filling and draining", "fill_drain"), ("imbalance", "imbalance"),
                           ("stalls", "stalls"))
    )  # fmt: skip
    return (
        f"PP2 steady bubble by stage (goal 5%): {by_rank} (predicted, of the busier one: "
        f"{row['predicted_steady_bubble']:.1%}); of {row['traced_rounds']} rounds, measured "
        f"(predicted): {kinds}"
    )


def _exposed(rows: Sequence[Row], label: str) -> list[str]:
    """TP2 with and without overlap, for each grouping of one link."""
    found = []
    own = [row for row in rows if row["label"] == label and row["name"].startswith("tp2")]
    for row in own:
        pairs = [
            other for other in own
            if other["groups"] == row["groups"] and other["order"] == "sequential"
        ]  # fmt: skip
        if row["order"] == "interleaved" and pairs:
            found.append(f"{label}: {row['name']}: {_overlap(row, pairs[0])}")
    return found


def _overlap(row: Row, without: Row) -> str:
    """``beyond``: what a round takes beyond its computing alone, so that what overlapping costs the
    computing counts as exposed too."""
    compute_ms = row["compute_alone_ms"]
    beyond_ms, without_ms = (r["round_ms"] - r["compute_alone_ms"] for r in (row, without))
    larger_ms = max(compute_ms, row["comm_alone_ms"])
    return (
        f"round {row['round_ms']:.1f} ms, {without['round_ms']:.1f} without overlap; compute alone "
        f"{compute_ms:.1f}, communication alone {row['comm_alone_ms']:.1f}: round "
        f"{row['round_ms'] / larger_ms - 1:+.1%} over the larger (goal on the slow link 10%)"
        f"{_steadily(row, larger_ms)}; "
        f"exposed beyond computing {beyond_ms:.1f} and {without_ms:.1f} ms: "
        f"{beyond_ms / without_ms:.0%} (goal on NVLink 70%); nothing computed meanwhile "
        f"{row['exposed_ms']:.1f} and {without['exposed_ms']:.1f} ms (predicted "
        f"{row['predicted_exposed_ms']:.1f} and {without['predicted_exposed_ms']:.1f}); contention "
        f"{', '.join(f'{factor:.2f}' for factor in row['contention'])}"
    )


def _steadily(row: Row, larger_ms: float) -> str:
    """Without filling and draining, by the difference of two runs."""
    steady_ms = row.get("steady_round_ms")
    if steady_ms is None:
        return ""
    return f", {steady_ms:.1f} ms one more round: {steady_ms / larger_ms - 1:+.1%}"


def measured_spans(row: Row) -> list[ScheduleSpan]:
    """Ranks in the place of stages."""
    return [
        ScheduleSpan(
            rank, stream, row["htask_of_op"][op], f"hTask {row['htask_of_op'][op]}",
            row["label_of_op"][op], SubgraphKind[row["kind_of_op"][op]], row["backward_of_op"][op],
            at, 0, round(1e9 * start_s), round(1e9 * (stop_s - start_s)),
        )
        for rank, spans in enumerate(row["spans"])
        for stream, at, op, start_s, stop_s in spans
        if at < DRAWN_ROUNDS
    ]  # fmt: skip


def predicted_spans(row: Row) -> list[ScheduleSpan]:
    found = (ScheduleSpan(*fields) for fields in row["predicted_spans"])
    return [
        span._replace(kind=SubgraphKind[str(span.kind)]) for span in found
        if span.round < DRAWN_ROUNDS
    ]  # fmt: skip


def draw(path: Path, row: Row) -> None:
    """The first rounds as they were, above the same as they were predicted."""
    window = (0, round(1e6 * DRAWN_ROUNDS * row["round_ms"]))
    panels = [
        (f"measured, {row['round_ms']:.0f} ms a round", measured_spans(row), window),
        (f"predicted, {row['predicted_round_ms']:.0f} ms", predicted_spans(row), window),
    ]
    gantt_panels(path, panels, f"{row['name']}, {row['label']}")


def loss_gaps(rows: Sequence[Row]) -> dict[str, float]:
    """Rows whose micro-batches are the same train the same: each against the first such row."""
    first: dict[str, list[float]] = {}
    gaps = {}
    for row in rows:
        losses = [loss for visit in row["losses"] for loss in visit]
        rounds = row.get("compared_rounds", row["rounds"])
        known = first.setdefault(str((row["groups"], row["parts"], rounds)), losses)
        if known is not losses:
            pairs = zip(losses, known, strict=True)
            gaps[f"{row['name']}, {row['label']}"] = max(abs(a - b) / b for a, b in pairs)
    return gaps


def traced(rows: Sequence[Row]) -> dict[str, Row]:
    """The fastest interleaved row of each layout and label that was traced, by file name."""
    found = {}
    for row in sorted(rows, key=tokens_per_s):
        if row.get("kind_of_op"):
            words = f"{row['name'].split(',')[0]} {row['label']}".lower().replace(",", "")
            found["-".join(words.split())] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    rows, facts = read(args.files)
    lines, said = table(rows), goals(rows)
    print("\n".join([*lines, "", *said]))
    with RunFolder(args.output) as folder:
        folder.write_json("results.json", {
            "provenance": provenance(), "runs": facts, "goals": said,
            "largest_relative_gap_of_losses": loss_gaps(rows),
            "rows": [{k: v for k, v in row.items() if k not in HIDDEN} for row in rows],
        })  # fmt: skip
        folder.write_text("table.md", "\n".join([*lines, "", *(f"- {s}" for s in said)]) + "\n")
    for name, row in traced(rows).items():
        schedule_trace(args.output / f"trace-{name}-measured.json", measured_spans(row), "rank")
        schedule_trace(args.output / f"trace-{name}-predicted.json", predicted_spans(row))
        draw(args.output / f"trace-{name}.png", row)


if __name__ == "__main__":
    main()
