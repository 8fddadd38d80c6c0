"""Where looks at a GPU for signs of others end up: in profiles and in validations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.gpu_validation.shared import waiting
from muxtune.commands.validate import show
from muxtune.cost.schema import load_profile, profile_warnings
from muxtune.cost.shapes import ModelShape
from muxtune.profiling import measure, profile_machine, sharing, write_profile
from muxtune.validation import running
from muxtune.validation.records import Records
from muxtune.validation.running import ValidationOptions, validate

TINY = ModelShape("tiny", 2, 32, 4, 2, 8, 64, 96)
GRID: dict[str, Any] = {"rows": (32, 64), "slots": (1, 2), "ranks": (16,), "max_rows": 64}
START = {"taken_bytes": 6e8, "interrupted": 0.0}
BUSY = {"interrupted": 0.4}


def see(monkeypatch: pytest.MonkeyPatch, start: dict[str, float], end: dict[str, float]) -> None:
    """As if the CPU were a GPU with these signs."""
    for module in (measure, running):
        monkeypatch.setattr(module, "signs_at_start", lambda _: start)
        monkeypatch.setattr(module, "signs_now", lambda _: end)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = profile_machine(TINY, 0.5, program="captured", show_progress=False, **GRID)
    assert not {"interrupted", "taken_bytes"} & set(raw["quality"]), "a CPU has no such signs"
    return write_profile(raw, tmp_path_factory.mktemp("profile") / "tiny.json")


def test_a_profile_holds_the_strongest_signs_also_of_processes_that_were_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    see(monkeypatch, START | BUSY, {"interrupted": 0.0})
    monkeypatch.setattr(measure, "_adapter_loads", lambda _: 1 / 0)  # ends the first process
    kept = tmp_path / "parts.jsonl"
    options: dict[str, Any] = {"program": "captured", "show_progress": False, "steps": False}
    with pytest.raises(ZeroDivisionError):
        profile_machine(TINY, 0.5, kept=Records(kept), **options, **GRID)
    monkeypatch.undo()
    see(monkeypatch, START, {"interrupted": 0.01})
    raw = profile_machine(TINY, 0.5, kept=Records(kept), **options, **GRID)
    assert {name: raw["quality"][name] for name in START} == START | BUSY
    profile = load_profile(write_profile(raw, tmp_path / "profile.json"))
    (line,) = [line for line in profile_warnings(profile) if "interrupted" in line]
    assert "40.0%" in line and "muxtune profile" in line


def test_a_validation_says_so_and_keeps_it(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    see(monkeypatch, START, BUSY)
    monkeypatch.setattr(running, "_run", lambda *_: {"steps": 3})
    options = ValidationOptions(1.0, 3, (), 64, 2, 0.0)
    first = validate(tmp_path, plain, options)
    (line,) = [line for line in first["warnings"] if line.startswith("validation of")]
    assert "40.0%" in line and "muxtune validate" in line
    see(monkeypatch, START, {"interrupted": 0.0})
    validate(tmp_path, plain, options)
    scored = validate(tmp_path, plain, options._replace(budget_s=0.0))
    assert scored["warnings"] == first["warnings"], "what was said stays, of a busy host, too"
    assert json.loads((tmp_path / "report.json").read_text())["warnings"] == first["warnings"]
    assert [row["signs"] for row in scored["attempts"]] == [START | BUSY, START]
    show(scored, tmp_path)
    assert "validation of a shared GPU" in " ".join(capsys.readouterr().out.split())


def test_a_validation_of_another_profile_is_not_blamed(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    see(monkeypatch, START | BUSY, BUSY)
    monkeypatch.setattr(running, "_run", lambda *_: {})
    options = ValidationOptions(1.0, 3, (), 64, 2, 0.0)
    told: list[str] = []
    validate(tmp_path, plain, options, lambda _what, _share, text: told.append(text))
    assert "interrupted is 40.0%" in told[0], "before the time is spent, too"
    raw = profile_machine(TINY, 0.5, program="captured", show_progress=False, **GRID)
    raw["quality"] = {name: value for name, value in raw["quality"].items() if name not in START}
    raw["content_hash"] = measure.content_hash(raw)
    other = write_profile(raw, tmp_path / "other.json")
    scored = validate(tmp_path, other, options._replace(budget_s=0.0))
    assert scored["warnings"] == []


def test_what_launches_waited_is_told_one_by_one() -> None:
    found = waiting([8e-5, 8.1e-5, 2.08e-3, 7.9e-5, 8e-5])
    assert found == {"launches": 5, "launch_us": 80.0, "waits_ms": [2.0]}


@pytest.mark.parametrize("slower", [0.5, 1.0, 10.0])
def test_launches_stay_short_and_a_look_too_on_slower_gpus(
    monkeypatch: pytest.MonkeyPatch, slower: float
) -> None:
    """Of a device that takes 80 us, or others, for ``LAUNCH_BYTES``."""
    ran: list[tuple[float, int, int]] = []

    def run_s(numbers: torch.Tensor, lead: int, count: int) -> list[float]:
        launch_s = slower * 80e-6 * numbers.nbytes / sharing.LAUNCH_BYTES
        ran.append((launch_s, lead, count))
        return [launch_s] * count

    monkeypatch.setattr(sharing, "_run_s", run_s)
    assert sharing.launches_s(torch.device("cpu")) == [ran[-1][0]] * ran[-1][2]
    launch_s, lead, count = ran[-1]
    assert launch_s <= sharing.LAUNCH_S
    assert launch_s * (lead + count) == pytest.approx(sharing.LEAD_S + sharing.RUN_S, rel=0.25)
