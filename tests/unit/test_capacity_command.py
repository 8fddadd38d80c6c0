"""``muxtune capacity`` from a command to a report that a browser draws without a network."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pa_parquet
import pytest

from muxtune.capacity.prices import prices_of
from muxtune.cli import main
from muxtune.errors import ConfigError
from muxtune.report.capacity_figures import pareto_front
from muxtune.report.capacity_page import shown

MIX = "workload.mix=[{histogram: sst2, max_length_tokens: 64}]"
SMALL = (
    *("workload=poisson", "workload.limit=40", "workload.load=2", "cluster=h100_x8", MIX),
    *("num_seeds=2", "workers=1", "sensitivity.num_seeds=1", "policies=[muxtune]"),
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NUMBER = re.compile(r"(?<![\w.-])\$?\d[\d,.]*")


def capacity(folder: Path, *words: str) -> int:
    return main(["capacity", *SMALL, f"output_dir={folder}", *words])


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("capacity")
    assert capacity(folder) == 0
    return folder


def rows_of(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------- the answer


def test_the_answer_is_the_smallest_fleet_of_those_looked_at(answer: Path):
    for row in rows_of(answer, "answers.csv"):
        fleets = [
            fleet
            for fleet in rows_of(answer, "fleets.csv")
            if fleet["policy"] == row["policy"] and fleet["device"] == row["device"]
        ]
        shares: dict[int, list[tuple[float, float, float]]] = {}
        for fleet in fleets:
            counted = float(fleet["num_counted"])
            triple = (counted, counted * float(fleet["served_share"]), float(fleet["busy_share"]))
            shares.setdefault(int(fleet["num_gpus"]), []).append(triple)
        meets = {
            size: sum(item[1] for item in found) / sum(item[0] for item in found) >= 0.95
            and sum(item[2] for item in found) / len(found) <= 1.0
            for size, found in shares.items()
        }
        size = int(row["num_gpus"])
        assert meets[size] and row["feasible"] == "True"
        assert not any(good for other, good in meets.items() if other < size)
        assert size == 1 or size - 1 in meets


def test_money_and_savings_add_up(answer: Path):
    rows = {row["policy"]: row for row in rows_of(answer, "answers.csv")}
    assert set(rows) == {"exclusive", "muxtune"}  # the baseline comes by itself
    ours = rows["muxtune"]
    price = float(ours["usd_per_gpu_hour"])
    assert price == 3.99  # H100-SXM, typical, of the device table
    month = int(ours["num_gpus"]) * price * 730
    assert float(ours["usd_per_month"]) == pytest.approx(month)
    per_token = month / (730 * 3600) / float(ours["effective_tokens_per_s"])
    assert float(ours["usd_per_million_tokens"]) == pytest.approx(per_token * 1e6)
    seeds = rows_of(answer, "seeds.csv")
    of = {
        policy: [int(row["num_gpus"]) for row in seeds if row["policy"] == policy]
        for policy in rows
    }
    saving = 1 - sum(of["muxtune"]) / sum(of["exclusive"])
    assert float(ours["saving_same_device"]) == pytest.approx(saving)
    assert float(ours["saving_same_device"]) > 0.5
    low, high = float(ours["saving_same_device_low"]), float(ours["saving_same_device_high"])
    assert low <= saving <= high
    assert float(rows["exclusive"]["saving_same_device"]) == 0.0


def test_all_draws_are_the_same_tasks_for_every_policy(answer: Path):
    fleets = rows_of(answer, "fleets.csv")
    by_seed = {(row["seed"], row["horizon_s"], row["effective_tokens"]) for row in fleets}
    assert len(by_seed) == 2


def test_sensitivity_and_limits_are_local_to_the_answer(answer: Path):
    moved = rows_of(answer, "sensitivity.csv")
    assert {row["assumption"] for row in moved} == {"price", "load", "lengths", "times"}
    gpus = {(row["assumption"], row["side"]): float(row["num_gpus"]) for row in moved}
    for name in ("load", "lengths", "times"):
        assert gpus[name, "low"] <= gpus[name, "high"]
    low, high = (r for r in moved if r["assumption"] == "price")
    assert float(low["moved_to"]) == pytest.approx(1.99 / 3.99)
    assert float(high["change"]) == pytest.approx(5.0 / 3.99 - 1)
    limits = rows_of(answer, "limits.csv")
    relaxed = {row["relaxed"] for row in limits}
    assert relaxed == {"as it is", "memory", "compute", "arrivals"}
    for policy in {row["policy"] for row in limits}:
        assert sum(r["limits"] == "True" for r in limits if r["policy"] == policy) <= 1


def test_every_table_is_csv_and_parquet_alike(answer: Path):
    names = {path.stem for path in answer.glob("*.csv")}
    assert names == {path.stem for path in answer.glob("*.parquet")}
    assert {"answers", "fleets", "seeds", "tasks", "figures", "question", "workload"} <= names
    for name in names:
        rows = rows_of(answer, f"{name}.csv")
        table = pa_parquet.read_table(answer / f"{name}.parquet")
        assert table.num_rows == len(rows) and table.column_names == list(rows[0])
        assert [int(row["row"]) for row in rows] == list(range(len(rows)))


def test_the_same_question_gives_the_same_answer(answer: Path, tmp_path: Path):
    assert capacity(tmp_path, "workers=2") == 0
    for name in ("answers.csv", "fleets.csv", "sensitivity.csv", "tasks.csv"):
        assert (tmp_path / name).read_bytes() == (answer / name).read_bytes()


def test_base_models_have_fleets_of_their_own(tmp_path: Path):
    models = "workload.models={llama-2-7b: 2, mistral-7b: 1}"
    assert capacity(tmp_path, models, "workload.limit=14", "num_seeds=1") == 0
    rows = [row for row in rows_of(tmp_path, "base_models.csv") if row["policy"] == "muxtune"]
    assert {row["model"] for row in rows} == {"llama-2-7b", "mistral-7b"}
    (whole,) = [row for row in rows_of(tmp_path, "answers.csv") if row["policy"] == "muxtune"]
    assert sum(int(row["num_gpus"]) for row in rows) == int(whole["num_gpus"])
    assert sum(float(row["usd_per_month"]) for row in rows) == float(whole["usd_per_month"])
    assert "By base model" in (tmp_path / "report.html").read_text()


# --------------------------------------------------------------------------------------- the report


class Page(HTMLParser):
    """Traced figures of a page, and its other text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.traced: list[tuple[dict[str, str], str]] = []
        self.other: list[str] = []
        self._inside: dict[str, str] | None = None
        self._skip = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skip += tag == "style"
        if tag == "data":
            self._inside = {name: value or "" for name, value in attrs}

    def handle_endtag(self, tag: str) -> None:
        self._skip -= tag == "style"
        if tag == "data":
            self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside is not None:
            self.traced.append((self._inside, data))
        elif not self._skip:
            self.other.append(data)


def test_every_number_in_the_report_is_a_cell_of_a_csv(answer: Path):
    page = Page((answer / "report.html").read_text(encoding="utf-8"))
    assert len(page.traced) > 100
    for where, text in page.traced:
        row = rows_of(answer, where["data-csv"])[int(where["data-row"])]
        assert row["row"] == where["data-row"]
        value = row[where["data-column"]]
        number = float(value) if any(mark in value for mark in ".e") else int(value)
        assert shown(where["data-column"], number) == text
        if text.startswith("$"):  # not only by our own formatting
            assert float(text[1:].replace(",", "")) == pytest.approx(number, rel=1e-3)
        if text.endswith("%"):
            assert float(text[:-1]) == pytest.approx(number * 100, abs=0.051)
    untraced = [text for text in page.other if NUMBER.search(text)]
    allowed = {row["text"] for row in rows_of(answer, "question.csv")}  # dates and sources
    assert [text for text in untraced if text not in allowed] == []


def test_the_report_marks_analytic_figures_and_needs_no_network(answer: Path):
    text = (answer / "report.html").read_text(encoding="utf-8")
    assert "ANALYTIC" in text and ">analytic<" in text
    assert not re.search(r'(src|href)=(?!"data:)', text)
    assert text.index("<img") < text.index("<table")


def test_a_browser_draws_every_figure(answer: Path, tmp_path: Path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    report = (answer / "report.html").read_text(encoding="utf-8")
    # The page tells in its own DOM which images came out, and whether they hold more than one
    # colour.
    script = """<script>addEventListener('load', () => {
      document.body.dataset.drawn = [...document.images].map(image => {
        const canvas = document.createElement('canvas');
        canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
        if (!canvas.width) return 'empty';
        const context = canvas.getContext('2d');
        context.drawImage(image, 0, 0);
        const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
        const colours = new Set();
        for (let i = 0; i < data.length; i += 4)
          colours.add(data[i] << 16 | data[i + 1] << 8 | data[i + 2]);
        return colours.size > 8 ? 'drawn' : 'blank';
      }).join(' ');
    });</script></body>"""
    page = tmp_path / "page.html"
    page.write_text(report.replace("</body>", script), encoding="utf-8")
    flags = (
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9"),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", "--dump-dom"),
    )
    done = subprocess.run(
        [browser, *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = re.search(r'data-drawn="([^"]*)"', done.stdout)
    assert found is not None, done.stderr[-2_000:]
    figures = {row["figure"] for row in rows_of(answer, "figures.csv")}
    assert len(figures) == 6
    assert found[1].split() == ["drawn"] * len(figures)


# ---------------------------------------------------------------------------------------- bad input


def test_prices_are_asked_for_and_not_assumed(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert capacity(tmp_path / "a", "cluster=local_cpu") == 2
    told = capsys.readouterr().err
    assert "prices.local" in told and "prices.local=USD" in told
    assert capacity(tmp_path / "b", "prices.A40=1.0") == 2
    assert "prices.A40: is of a device that is not asked about" in capsys.readouterr().err


def test_a_price_of_the_user_wins_over_the_table():
    price = prices_of(["H100-SXM"], {"H100-SXM": 2.0}, None)["H100-SXM"]
    assert (price.usd_per_gpu_hour, price.low, price.high) == (2.0, 1.6, 2.4)
    table = prices_of(["H100-SXM"], {}, None)["H100-SXM"]
    assert table.date and table.source and table.low < table.usd_per_gpu_hour < table.high
    with pytest.raises(ConfigError, match=r"prices\.H100-SXM"):
        prices_of(["H100-SXM"], {"H100-SXM": -1.0}, None)


def test_a_level_that_no_fleet_meets_says_why_and_what_is_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["service_level.max_slowdown=0.001", "workload.limit=12", "num_seeds=1"]
    assert capacity(tmp_path, *words) == 0
    told = capsys.readouterr().out
    assert "100.0% of the tasks on llama-2-7b break the promise even with an idle H100-SXM" in told
    assert "best that can be had is 0.0%" in told
    rows = rows_of(tmp_path, "answers.csv")
    assert {row["feasible"] for row in rows} == {"False"}
    assert {row["recommended"] for row in rows} == {"False"}
    assert "No fleet asked about will do" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "summary.json").read_text())["num_feasible"] == 0


def test_too_small_a_largest_fleet_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["max_gpus=12", "policies=exclusive", "num_seeds=1"]
    assert capacity(tmp_path, *words) == 0
    assert "max_gpus=12 of H100-SXM are too few" in capsys.readouterr().out
    share = float(rows_of(tmp_path, "answers.csv")[0]["served_share"])
    assert 0.0 < share < 0.95


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["policies=[mutune]"], "policies: 'mutune'"),
        (["policies=mutune"], "policies: 'mutune'"),
        (["devices=H1000"], "H1000"),
        (["devices=5"], "devices: are [5]"),
        (["policies=null"], "policies: are none"),
        (["num_seeds=0"], "num_seeds: is 0"),
        (["service_level.share=2"], "service_level.share"),
        (["warmup_share=1"], "warmup_share"),
        (["workload=example"], "all tasks arrive at once"),
        (["devices=[H100-SXM,H100-SXM]"], "devices: names a device twice"),
    ],
)
def test_questions_that_make_no_sense_are_refused(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    small = [
        word for word in SMALL if not word.startswith("workload") or words[0][:8] != "workload"
    ]
    assert main(["capacity", *small, f"output_dir={tmp_path}", *words]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("arrival_s,duration_s\n10,60\n5,60\n", "trace.csv:3"),
        ("arrival_s,duration_s\n0,60\n5,-60\n", "trace.csv:3"),
        ("id,arrival_s,duration_s\na,0,60\nb,1,60\na,5,60\n", "trace.csv:4"),
    ],
)
def test_bad_traces_are_refused_with_the_line(
    lines: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    trace = tmp_path / "trace.csv"
    trace.write_text(lines)
    words = ["workload=trace", f"workload.trace={trace}", "workers=1"]
    assert main(["capacity", *words, f"output_dir={tmp_path / 'out'}"]) == 2
    assert told in capsys.readouterr().err


def test_nothing_betters_the_front_in_both():
    points = [(1.0, 9.0), (2.0, 9.0), (2.0, 5.0), (3.0, 6.0), (4.0, 1.0)]
    assert pareto_front(points) == [(1.0, 9.0), (2.0, 5.0), (4.0, 1.0)]
