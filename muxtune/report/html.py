"""A report in one HTML file: sections of text, tables and images, with nothing to load."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from muxtune.report.run_folder import RunFolder

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: #0072b2; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; margin-bottom: 0.2rem; } h2 { margin-top: 2.5rem; }
.lead { color: GrayText; margin-top: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
caption { text-align: left; color: GrayText; padding-bottom: 0.3rem; }
th, td { padding: 0.3rem 0.8rem; border-bottom: 1px solid var(--line); text-align: right; }
th { border-bottom: 2px solid var(--accent); background: var(--soft); }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.2rem 0; } figcaption { color: GrayText; font-size: 0.9rem; }
img { max-width: 100%; background: white; border: 1px solid var(--line); border-radius: 4px; }
pre { background: var(--soft); padding: 0.8rem; overflow-x: auto; border-radius: 4px; }
"""


class Traced(NamedTuple):
    """A figure as shown, and the cell of a CSV file that it comes from; ``row`` is the value of
    that file's first column."""

    text: str
    file: str
    row: int
    column: str


class HtmlTable(NamedTuple):
    """Rows of cells; a cell that is not a string is shown with four significant digits."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""


class Image(NamedTuple):
    """A PNG or SVG file that is inlined; ``caption`` says what to see in it."""

    path: Path
    caption: str = ""


class Section(NamedTuple):
    """One part of a report; ``text`` holds paragraphs parted by empty lines; ``stories`` are
    paragraphs in pieces, of which some may be traced figures."""

    title: str
    text: str = ""
    tables: Sequence[HtmlTable] = ()
    images: Sequence[Image] = ()
    code: str = ""
    stories: Sequence[Sequence[str | Traced]] = ()


def write_report(
    folder: Path | str,
    title: str,
    sections: Iterable[Section],
    lead: str = "",
    name: str = "report.html",
) -> Path:
    """Writes ``folder/name``, self-contained. Raises OutputError when it cannot be written."""
    body = "\n".join(_section(section) for section in sections)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n{body}\n</body></html>\n'
    )
    return RunFolder(folder).write_text(name, page)


def format_cell(value: object) -> str:
    """Four significant digits for floats, thousands separators for integers, a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return str(value)


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    parts += [f"<p>{escape(text)}</p>" for text in section.text.split("\n\n") if text.strip()]
    parts += [f"<p>{''.join(map(_piece, story))}</p>" for story in section.stories]
    parts += [_table(table) for table in section.tables]
    parts += [_image(image) for image in section.images]
    if section.code:
        parts.append(f"<pre>{escape(section.code)}</pre>")
    return "\n".join(parts)


def _piece(cell: object) -> str:
    if not isinstance(cell, Traced):
        return escape(format_cell(cell))
    where = f'data-csv="{escape(cell.file)}" data-row="{cell.row}"'
    return f'<data {where} data-column="{escape(cell.column)}">{escape(cell.text)}</data>'


def _table(table: HtmlTable) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{_piece(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    return (
        f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _image(image: Image) -> str:
    kind = "svg+xml" if image.path.suffix == ".svg" else "png"
    data = base64.b64encode(image.path.read_bytes()).decode("ascii")
    alt = escape(image.caption, quote=True)
    return (
        f'<figure><img alt="{alt}" src="data:image/{kind};base64,{data}">'
        f"<figcaption>{escape(image.caption)}</figcaption></figure>"
    )
