"""Rich tables, and the console that prints them at full width when it is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from muxtune.report.html import format_cell

PIPE_WIDTH = 160  # columns when the output is a file or a pipe, so that no cell is cut
GIB = 1024**3


def make_console(stderr: bool = False) -> Console:
    """A console for results (stdout) or for progress and errors (stderr)."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else PIPE_WIDTH, highlight=False)


def make_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table whose first column is text and whose others are right-aligned figures."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(format_cell(cell) for cell in row))
    return table


def format_seconds(seconds: float) -> str:
    """The unit that reads best: µs, ms, s, min, h or d."""
    for limit, divisor, unit in (
        (1e-3, 1e-6, "µs"),
        (1.0, 1e-3, "ms"),
        (120.0, 1.0, "s"),
        (7_200.0, 60.0, "min"),
        (172_800.0, 3_600.0, "h"),
    ):
        if abs(seconds) < limit:
            return f"{seconds / divisor:.3g} {unit}"
    return f"{seconds / 86_400:.3g} d"


def format_bytes(num_bytes: float) -> str:
    """KiB, MiB or GiB, to four digits: up to 1,023 of a unit come before the next."""
    for limit, divisor, unit in ((1024**2, 1024, "KiB"), (GIB, 1024**2, "MiB")):
        if abs(num_bytes) < limit:
            return f"{num_bytes / divisor:.4g} {unit}"
    return f"{num_bytes / GIB:.4g} GiB"
