"""Runs the sweep of ``conf/experiment/sweep_load.yaml``: planners against offered load.

    python experiments/sweep_load/run.py --output outputs/sweep_load [KEY=VALUE ...]

Writes one folder a run (its summary.json is one row), summary.csv, sweep.png and report.html.
"""

from __future__ import annotations

import argparse
import sys

from muxtune.cli import main


def run(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Planners against offered load")
    parser.add_argument("--output", default="outputs/sweep_load", help="folder of the results")
    parser.add_argument("overrides", nargs="*", help="further settings of `muxtune simulate`")
    given = parser.parse_args(arguments)
    words = ["-m", "experiment=sweep_load", f"output_dir={given.output}", *given.overrides]
    return main(["simulate", *words])


if __name__ == "__main__":
    sys.exit(run())
