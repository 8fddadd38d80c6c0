"""Every published policy on one trace: runs the cells, then makes tables and figures.

    python -m experiments.bake_off.run --output validation/bake_off [--work outputs/bake_off]

``--work`` keeps one record a cell; a run that was stopped goes on where it stood, and nothing is
run twice. ``--report-only`` makes the tables and figures of what is there. See README.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from joblib import Parallel, delayed
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.bake_off.cells import Cell, run_cell, write_window
from experiments.bake_off.results import write_results
from experiments.bake_off.systems import SYSTEMS
from muxtune.report.tables import make_console

PLAIN_INTERVAL_S = 20.0
FIRST_LOADS = (1.0, 1.5, 0.5, 8.0)


def cells_of(given: argparse.Namespace) -> list[Cell]:
    """All systems at all their loads, one load after the other, seed by seed, so that a run which
    was stopped has whole comparisons."""
    cells = [
        Cell(system, load, seed, given.tasks, given.gpus, given.max_hours)
        for seed in range(given.seeds)
        for system in SYSTEMS
        for load in system.loads
        if (not given.systems or system.name in given.systems)
        and (not given.loads or load in given.loads)
    ]
    return sorted(cells, key=lambda cell: (place_of(cell.load), cell.seed))


def place_of(load: float) -> float:
    return FIRST_LOADS.index(load) if load in FIRST_LOADS else len(FIRST_LOADS)


def run_all(given: argparse.Namespace) -> None:
    windows, runs = given.work / "windows", given.work / "runs"
    for folder in (windows, runs):
        folder.mkdir(parents=True, exist_ok=True)
    check_settings(given)
    for seed in range(given.seeds):
        path = windows / f"seed{seed}.csv"
        if not path.exists():
            write_window(path, seed, given.seeds, given.tasks, given.max_hours)
    cells = cells_of(given)
    todo = [cell for cell in cells if not (runs / cell.file_name).exists()]
    made = Parallel(n_jobs=given.jobs, return_as="generator_unordered")(
        delayed(run_cell)(cell, windows, runs) for cell in todo
    )
    show(made, len(todo), len(cells) - len(todo))


def check_settings(given: argparse.Namespace) -> None:
    """Records of other windows must not be mixed up with these."""
    path = given.work / "settings.txt"
    names = ("tasks", "gpus", "seeds", "max_hours")
    settings = " ".join(f"{name}={getattr(given, name)}" for name in names)
    if path.exists() and path.read_text(encoding="utf-8") != settings:
        sys.exit(
            f"{given.work} holds runs of other settings ({path.read_text(encoding='utf-8')}); "
            "give another --work, or the same settings"
        )
    path.write_text(settings, encoding="utf-8")


def show(made: object, num_todo: int, num_kept: int) -> None:
    """A bar on a terminal, a line now and then elsewhere."""
    console = make_console(stderr=True)
    console.print(f"{num_kept} cells are there, {num_todo} to run")
    bar = Progress(
        TextColumn("bake-off"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip
    started_s = told_s = time.monotonic()
    with bar:
        task = bar.add_task("", total=num_todo)
        for number, path in enumerate(made, start=1):  # type: ignore[arg-type]
            bar.advance(task)
            now_s = time.monotonic()
            if not console.is_terminal and now_s - told_s > PLAIN_INTERVAL_S:
                told_s = now_s
                console.print(f"{number} of {num_todo}, {now_s - started_s:.0f} s: {path.stem}")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--output", type=Path, default=Path("validation/bake_off"))
    parser.add_argument("--work", type=Path, default=Path("outputs/bake_off"))
    parser.add_argument("--tasks", type=int, default=2500, help="of each window")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--gpus", type=int, default=128)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument(
        "--max-hours", type=float, default=24.0, help="leave out tasks that take longer alone"
    )
    parser.add_argument("--systems", nargs="*", default=[], help="only these")
    parser.add_argument("--loads", nargs="*", type=float, default=[], help="only these")
    parser.add_argument("--report-only", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parsed(arguments)
    if not given.report_only:
        run_all(given)
    write_results(given.work, given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
