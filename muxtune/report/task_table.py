"""The rows of tasks as Parquet, made from the CSV file that a run has streamed.

A block of rows at a time, so that memory does not grow with the number of tasks.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

from muxtune.report.recording import TASK_COLUMNS

TEXTS = ("task_id", "tenant", "model", "state", "instance_id", "output_path", "message")
COUNTS = ("steps", "effective_tokens", "priority", "num_placements", "lost_steps")
FLAGS = ("met_deadline",)
REPEATED = ("tenant", "model", "state", "instance_id")  # few different texts
BLOCK_BYTES = 1 << 20


def write_parquet(source: Path, target: IO[bytes]) -> bool:
    """Copies ``tasks.csv`` into Parquet; every other column holds numbers. Blank cells of numbers
    become nulls. False, and nothing is written, where pyarrow is not installed."""
    try:
        import pyarrow as pa  # a quarter of a second, for the end of a run
        from pyarrow import csv, parquet
    except ImportError:
        return False
    kinds = (
        dict.fromkeys(TASK_COLUMNS, pa.float64())
        | dict.fromkeys(TEXTS, pa.string())
        | dict.fromkeys(COUNTS, pa.int64())
        | dict.fromkeys(FLAGS, pa.bool_())
    )
    options: Any = {"use_dictionary": list(REPEATED)}  # typed as a bool there
    blocks = csv.open_csv(
        source,
        csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
        csv.ParseOptions(newlines_in_values=True),  # a message may hold some
        csv.ConvertOptions(column_types=kinds),
    )
    with (
        blocks,
        parquet.ParquetWriter(target, pa.schema(kinds), **options) as writer,
    ):
        for block in blocks:
            writer.write_batch(block)
    return True
