"""The README's planner, as another package would add it by an entry point."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from muxtune.cli import main

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that holds the README's example."""
    match = re.search(r"planner-example:begin -->\n```python\n(.*?)```", README.read_text(), re.S)
    assert match is not None
    (tmp_path / "readme_package.py").write_text(match[1])
    info = tmp_path / "readme_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: readme-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[muxtune.planners]\nat_most = readme_package:AtMost\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("most", [1, 3])
def test_the_example_planner_runs_and_keeps_its_promise(most: int, tmp_path: Path):
    words = ["workload=poisson", "workload.limit=40", "workload.load=8", "cluster.num_gpus=2"]
    out = tmp_path / "out"
    more = ["planner=at_most", f"+planner.most={most}", f"output_dir={out}"]
    assert main(["simulate", *words, *more]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["num_done"] == 40
    assert most_at_once(out / "tasks.csv", num_instances=2) == most


def most_at_once(path: Path, num_instances: int) -> int:
    """Tasks placed on one instance at one time, at most."""
    most = 0
    rows = list(csv.DictReader(path.open()))
    assert len({row["instance_id"] for row in rows}) == num_instances
    for row in rows:
        at_s = float(row["placed_s"])
        beside = [
            other
            for other in rows
            if other["instance_id"] == row["instance_id"]
            and float(other["placed_s"]) <= at_s < float(other["ended_s"])
        ]
        most = max(most, len(beside))
    return most
