"""Files of a run: whole or not there; reports, figures and traces that open elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image as Picture

from muxtune.errors import OutputError
from muxtune.report import plots, run_folder
from muxtune.report.html import HtmlTable, Image, Section, format_cell, write_report
from muxtune.report.perfetto import Counter, Span, write_trace
from muxtune.report.run_folder import RunFolder
from muxtune.report.tables import format_bytes, format_seconds, make_table

# ------------------------------------------------------------------------------------- run folder


def test_a_stream_appears_only_when_it_is_whole(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    with folder.stream("rows.csv") as file:
        file.write("a,b\n")
        file.flush()
        assert not (folder.path / "rows.csv").exists()
    assert (folder.path / "rows.csv").read_text() == "a,b\n"
    assert [path.name for path in folder.path.iterdir()] == ["rows.csv"]


def test_an_error_leaves_nothing_half_written(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path / "run") as folder:
        folder.write_text("config.yaml", "x: 1\n")
        with folder.stream("rows.csv") as file:
            file.write("a,b\n")
            raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_files_that_were_there_before_survive_an_error(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path) as folder:
        folder.write_text("summary.json", "{}")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_an_earlier_run_left_is_as_it_was_after_an_error(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("x: 1\n")
    (tmp_path / "rows.csv").write_text("a,b\n")
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path) as folder:
        folder.write_text("config.yaml", "x: 2\n")
        folder.write_text("config.yaml", "x: 3\n")
        with folder.stream("rows.csv") as file:
            file.write("c,d\n")
            raise ZeroDivisionError
    left = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert left == {"config.yaml": "x: 1\n", "rows.csv": "a,b\n"}


def test_what_is_kept_survives_an_error(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path) as folder:
        folder.write_text("config.yaml", "x: 1\n")
        folder.keep()
        folder.write_text("summary.json", "{}")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_an_unwritable_folder_is_told_at_once(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"output_dir: cannot write .*file.*output_dir=PATH"):
        RunFolder(tmp_path / "file" / "run")


def test_a_full_disk_is_told_before_work_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        RunFolder(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_provenance_tells_versions_and_seed():
    told = run_folder.provenance(7, ["a=1"])
    assert told["seed"] == 7 and told["overrides"] == ["a=1"]
    assert re.match(r"\d+\.", told["packages"]["numpy"])
    assert json.loads(json.dumps(told)) == told


# ------------------------------------------------------------------------------------------ html


def test_the_report_loads_nothing_and_escapes_what_it_shows(tmp_path: Path):
    picture = plots.loss_curves(tmp_path / "loss.png", {"a": ([1, 2], [3.0, 2.0])})
    path = write_report(
        tmp_path,
        "Demo <1>",
        [
            Section(
                "Tasks & plans",
                text="One.\n\nTwo.",
                tables=[HtmlTable(("task", "loss"), [("<script>", 1.23456)], "caption")],
                images=[Image(picture, "curve")],
                code="a < b",
            )
        ],
    )
    page = path.read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "Demo &lt;1&gt;" in page and "<p>Two.</p>" in page and ">1.235<" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "data:image/png;base64," in page
    assert page.count("<table>") == page.count("</table>") == 1


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (True, "yes"), (82247, "82,247"), (0.12345, "0.1235"), (123456.7, "123,457")],
)
def test_cells(value: object, shown: str):
    assert format_cell(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (2e-6, "2 µs"),
        (0.25, "250 ms"),
        (3, "3 s"),
        (600, "10 min"),
        (7200, "2 h"),
        (864000, "10 d"),
    ],
)
def test_seconds(seconds: float, shown: str):
    assert format_seconds(seconds) == shown


def test_bytes_and_tables():
    assert format_bytes(3 * 1024**3) == "3 GiB" and format_bytes(5 * 1024**2) == "5 MiB"
    assert format_bytes(1020 * 1024**2) == "1020 MiB"
    table = make_table("t", ("name", "value"), [("a", 1.5), ("b", None)])
    assert table.row_count == 2 and len(table.columns) == 2


# --------------------------------------------------------------------------------------- perfetto


def test_the_trace_names_its_tracks_and_has_microseconds(tmp_path: Path):
    spans = [
        Span("instance-0", "hTask 0", "forward", 1_000, 2_000_000, {"tasks": "a, b"}),
        Span("instance-0", "hTask 1", "forward", 2_001_000, 500),
        Span("instance-1", "hTask 0", "backward", 0, 1_000),
    ]
    counters = [Counter("instance-0", "tokens", 5_000, {"effective": 3.0})]
    content = json.loads(write_trace(tmp_path / "trace.json", spans, counters).read_text())
    events = content["traceEvents"]
    names = {
        (event["name"], event["args"]["name"]): (event["pid"], event["tid"])
        for event in events
        if event["ph"] == "M"
    }
    complete = [event for event in events if event["ph"] == "X"]
    assert [(event["ts"], event["dur"]) for event in complete] == [
        (1.0, 2000.0),
        (2001.0, 0.5),
        (0.0, 1.0),
    ]
    assert complete[0]["pid"] == names["process_name", "instance-0"][0]
    assert complete[2]["pid"] == names["process_name", "instance-1"][0]
    assert complete[0]["tid"] != complete[1]["tid"]
    assert [event["args"] for event in events if event["ph"] == "C"] == [{"effective": 3.0}]


def test_an_empty_trace_is_valid(tmp_path: Path):
    assert json.loads(write_trace(tmp_path / "t.json", []).read_text())["traceEvents"] == []


# ------------------------------------------------------------------------------------------ plots


def drawings(folder: Path) -> list[Path]:
    pairs = plots.PredictedMeasured("a", 1.0, 1.1, 0.9, 1.2), plots.PredictedMeasured("b", 2.0, 1.9)
    line = plots.Series("x", [1, 2], [3.0, 4.0], [0.1, 0.2])
    return [
        plots.predicted_vs_measured(folder / "1.png", pairs),
        plots.perplexity_before_after(folder / "2.png", [("a", 67.3, 31.5)]),
        plots.throughput_by_planner(folder / "3.png", [("muxtune", 200.0, 250.0)]),
        plots.loss_curves(folder / "4.png", {"a": ([1, 2], [3.0, 2.0])}),
        plots.line_panels(folder / "5.png", [("y (s)", [line]), ("z", [line])], "x", "title"),
    ]


def test_figures_are_pictures_of_some_size(tmp_path: Path):
    for path in drawings(tmp_path):
        with Picture.open(path) as picture:
            assert picture.format == "PNG"
            assert picture.width > 500 and picture.height > 400
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 10


def test_the_same_figures_have_the_same_bytes(tmp_path: Path):
    first, second = drawings(tmp_path / "1"), drawings(tmp_path / "2")
    assert [a.read_bytes() for a in first] == [b.read_bytes() for b in second]


def test_no_axis_lacks_a_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    drawings(tmp_path)
    for figure in figures:
        for axes in figure.axes:
            assert axes.get_ylabel()
            assert axes.get_xlabel() or [label.get_text() for label in axes.get_xticklabels()]


def test_the_relative_error_is_of_the_prediction():
    assert plots.PredictedMeasured("a", 1.2, 1.0).relative_error == pytest.approx(0.2)
