"""The table, the plot and the traces of what ``run`` has measured.

python -m experiments.two_gpus.report pp.json tp.json one.json slow.json --output FOLDER
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

HIDDEN = ("spans", "htask_of_op", "label_of_op", "predicted_spans", "losses", "replica")


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    names = ("configuration", "link", "effective tok/s", "round ms", "predicted")
    names += ("steady bubble", "predicted")
    lines = [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['link']} | {row['effective_tokens_per_s']:,.0f} | "
            f"{row['round_ms']:.1f} | {row['prediction_error']:+.1%} | "
            f"{row['steady_bubble']:.1%} | {row['predicted_steady_bubble']:.1%} |"
        )
    return lines


def measured_trace(row: dict[str, Any]) -> Iterator[Span]:
    for rank, spans in enumerate(row["spans"]):
        for stream, at, op, start_s, stop_s in spans:
            yield Span(
                f"rank {rank}", stream, f"hTask {row['htask_of_op'][op]}: {row['label_of_op'][op]}",
                round(1e9 * start_s), round(1e9 * (stop_s - start_s)), {"round": at},
            )  # fmt: skip


def predicted_trace(row: dict[str, Any]) -> Iterator[Span]:
    for stage, stream, htask, label, start_ns, duration_ns in row["predicted_spans"]:
        yield Span(f"stage {stage}", stream, f"hTask {htask}: {label}", start_ns, duration_ns)


def loss_gaps(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Rows whose micro-batches are the same train the same: each against the first such row."""
    first: dict[tuple[int, int, int], list[float]] = {}
    gaps = {}
    for row in rows:
        losses = [loss for visit in row["losses"] for loss in visit]
        known = first.setdefault((row["fused"], row["parts"], row["rounds"]), losses)
        if known is not losses:
            pairs = zip(losses, known, strict=True)
            gaps[f"{row['name']}, {row['link']}"] = max(abs(a - b) / b for a, b in pairs)
    return gaps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    facts = []
    for file in args.files:
        content = json.loads(file.read_text("utf-8"))
        facts.append(content["facts"])
        link = "slow" if content["facts"]["nccl_p2p_disable"] == "1" else "NVLink"
        rows += [{**row, "link": link} for row in content["rows"]]
    gaps = loss_gaps(rows)
    errors = [abs(row["prediction_error"]) for row in rows]
    lines = table(rows)
    print("\n".join(lines))
    print(f"mean error of the prediction over {len(rows)}: {statistics.mean(errors):.1%}")
    with RunFolder(args.output) as folder:
        folder.write_json("results.json", {
            "provenance": provenance(), "runs": facts,
            "mean_prediction_error": statistics.mean(errors),
            "largest_relative_gap_of_losses": gaps,
            "rows": [{k: v for k, v in row.items() if k not in HIDDEN} for row in rows],
        })  # fmt: skip
        folder.write_text("table.md", "\n".join(lines) + "\n")
    for row in rows:
        if row.get("spans") and row["fused"] == min(
            r["fused"] for r in rows if r.get("spans") and r["name"][:3] == row["name"][:3]
        ):
            name = row["name"].split(",")[0].replace(" ", "") + f"-{row['link'].lower()}"
            write_trace(args.output / f"trace-{name}-measured.json", measured_trace(row))
            write_trace(args.output / f"trace-{name}-predicted.json", predicted_trace(row))


if __name__ == "__main__":
    main()
