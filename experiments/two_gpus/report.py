"""The table, the verdicts on the goals and the traces of what ``run`` has measured.

python -m experiments.two_gpus.report rows.jsonl --output FOLDER
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from muxtune.report.perfetto import Span, write_trace
from muxtune.report.run_folder import RunFolder, provenance

TRACED_ROUNDS = 8
HIDDEN = ("spans", "htask_of_op", "label_of_op", "predicted_spans", "losses", "replica")
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
    for what, order in (("one task at a time, 1F1B", "1 fused, 2 parts, 1f1b"),
                        ("all-spatial", "8 fused, 4 parts, 1f1b")):  # fmt: skip
        other = best(rows, "tp1 pp2", order, "NVLink")
        if piped and other:
            said.append(_speedup(f"PP2 against {what}", piped, other))
    if piped:
        by_rank = ", ".join(f"{share:.1%}" for share in piped["steady_bubble_by_rank"])
        said.append(
            f"PP2 steady bubble by stage (goal 5%): {by_rank}; of it imbalance "
            f"{piped['imbalance']:.1%}; filling and draining over {TRACED_ROUNDS} rounds "
            f"{piped['fill_drain']:.1%} (predicted {piped['predicted_fill_drain']:.1%} over "
            f"{piped['rounds']})"
        )
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


def _exposed(rows: Sequence[Row], label: str) -> list[str]:
    """Exposed communication of TP2 with and without overlap, for each grouping of one link."""
    found = []
    own = [row for row in rows if row["label"] == label and row["name"].startswith("tp2")]
    for row in own:
        pairs = [
            other for other in own
            if other["groups"] == row["groups"] and other["order"] == "sequential"
        ]  # fmt: skip
        if row["order"] == "interleaved" and pairs:
            with_ms, without_ms = (r["steady_bubble"] * r["round_ms"] for r in (row, pairs[0]))
            found.append(
                f"{label}: {row['name']}: exposed {with_ms:.1f} ms (predicted "
                f"{row['predicted_exposed_ms']:.1f}), {without_ms:.1f} without overlap "
                f"(predicted {pairs[0]['predicted_exposed_ms']:.1f}; goal 70% of it), "
                f"round {row['round_ms']:.1f} and {pairs[0]['round_ms']:.1f} ms; "
                f"compute alone {row['compute_alone_ms']:.1f}, "
                f"communication alone {row['comm_alone_ms']:.1f} ms (goal on the slow link: "
                "round within 10% of the larger)"
            )
    return found


def measured_trace(row: Row) -> Iterator[Span]:
    for rank, spans in enumerate(row["spans"]):
        for stream, at, op, start_s, stop_s in spans:
            yield Span(
                f"rank {rank}", stream, f"hTask {row['htask_of_op'][op]}: {row['label_of_op'][op]}",
                round(1e9 * start_s), round(1e9 * (stop_s - start_s)), {"round": at},
            )  # fmt: skip


def predicted_trace(row: Row) -> Iterator[Span]:
    for stage, stream, htask, label, start_ns, duration_ns in row["predicted_spans"]:
        yield Span(f"stage {stage}", stream, f"hTask {htask}: {label}", start_ns, duration_ns)


def loss_gaps(rows: Sequence[Row]) -> dict[str, float]:
    """Rows whose micro-batches are the same train the same: each against the first such row."""
    first: dict[str, list[float]] = {}
    gaps = {}
    for row in rows:
        losses = [loss for visit in row["losses"] for loss in visit]
        known = first.setdefault(str((row["groups"], row["parts"], row["rounds"])), losses)
        if known is not losses:
            pairs = zip(losses, known, strict=True)
            gaps[f"{row['name']}, {row['label']}"] = max(abs(a - b) / b for a, b in pairs)
    return gaps


def traced(rows: Sequence[Row]) -> dict[str, Row]:
    """The fastest interleaved row of each layout and label, by file name."""
    found = {}
    for row in sorted(rows, key=tokens_per_s):
        if row.get("spans"):
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
        write_trace(args.output / f"trace-{name}-measured.json", measured_trace(row))
        write_trace(args.output / f"trace-{name}-predicted.json", predicted_trace(row))


if __name__ == "__main__":
    main()
