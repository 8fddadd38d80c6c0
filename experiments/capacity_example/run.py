"""Runs the shipped capacity question of ``conf/experiment/capacity_example.yaml``.

    python experiments/capacity_example/run.py --output outputs/capacity_example [KEY=VALUE ...]

Writes report.html, its pictures, and CSV and Parquet of every number in it.
"""

from __future__ import annotations

import argparse
import sys

from muxtune.cli import main


def run(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The smallest fleet for the example's tasks")
    parser.add_argument("--output", default="outputs/capacity_example", help="folder of results")
    parser.add_argument("overrides", nargs="*", help="further settings of `muxtune capacity`")
    given = parser.parse_args(arguments)
    words = ["experiment=capacity_example", f"output_dir={given.output}", *given.overrides]
    return main(["capacity", *words])


if __name__ == "__main__":
    sys.exit(run())
