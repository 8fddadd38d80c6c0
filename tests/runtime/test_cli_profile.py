"""``muxtune profile`` through the command line: what it keeps, and what it tells."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muxtune.cli import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_TERMINATED, main
from muxtune.commands.profile import _left_out
from muxtune.commands.profile_parts import PARTS
from muxtune.cost.book import profiled_model
from muxtune.cost.schema import content_hash, load_profile
from muxtune.cost.shapes import ModelShape
from muxtune.profiling import measure, profile_machine
from muxtune.profiling.calibration_cases import calibration_cases
from muxtune.profiling.captured_cases import whole_cases
from muxtune.report.run_folder import SUMMARY
from muxtune.types import AdapterSlot, PassLoad, ReplicaShape, ShapeKey
from muxtune.validation.records import ENDED, Records, append_line, read_lines

SHAPE = ModelShape("tiny", 2, 64, 4, 2, 16, 128, 256, tied_embeddings=True)
GRID: dict[str, Any] = {"rows": (8, 32), "ranks": (2,), "lengths": (8, 16, 32), "max_rows": 64}


def words(folder: Path, *more: str) -> list[str]:
    return ["profile", "model=tiny", "budget_s=1", "max_rows=64", f"output_dir={folder}", *more]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    told = capsys.readouterr()
    return " ".join((told.out + told.err).split())


@pytest.fixture(scope="module")
def raw() -> dict[str, Any]:
    return profile_machine(SHAPE, 0.5, show_progress=False, **GRID)


@pytest.fixture
def quick(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations are measured already; joins and steps are not."""
    known = {name: op for name, op in raw["ops"].items() if name not in ("join", "move")}
    monkeypatch.setattr(measure, "_measure_eager", lambda *_: copy.deepcopy(known))


@pytest.fixture
def measured(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What ``profile_machine`` gives in turn, without measuring: the last one for good."""
    given = [raw]

    def profile_of(*_: Any, **__: Any) -> dict[str, Any]:
        found = given.pop(0) if len(given) > 1 else given[0]
        return {**found, "content_hash": content_hash(found)}

    monkeypatch.setattr(measure, "profile_machine", profile_of)
    return given


def test_a_profile_that_is_there_is_kept_under_its_hash(
    raw: dict[str, Any],
    measured: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured[:] = [{**raw, "created": f"2026-01-0{day}T00:00:00Z"} for day in (1, 2, 3)]
    path, hashes = tmp_path / "mine.json", []
    for _ in range(3):
        assert main(words(tmp_path, "file=mine.json")) == 0
        hashes.append(load_profile(path).content_hash)
    assert len(set(hashes)) == 3
    for known in hashes[:2]:
        kept = tmp_path / f"mine-{known[:8]}.json"
        assert load_profile(kept).content_hash == known
    assert f"kept the profile that was there as {tmp_path}/mine-{hashes[1][:8]}.json" in said(
        capsys
    )
    names = sorted(item.name for item in tmp_path.glob("*.json*"))
    others = ["run.json", "summary.json"]
    assert names == sorted(["mine.json", *(f"mine-{x[:8]}.json" for x in hashes[:2]), *others])


def test_what_cannot_be_read_as_a_profile_is_kept_under_a_number(
    measured: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2):
        (tmp_path / "profile.json").write_text(f"mine {number}")
        assert main(words(tmp_path)) == 0
        kept = tmp_path / f"profile-old-{number}.json"
        assert kept.read_text() == f"mine {number}"
        assert f"kept the profile that was there as {kept}" in said(capsys)


def test_a_new_folder_holds_one_profile(
    measured: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(tmp_path / "new")) == 0
    assert "kept" not in said(capsys)
    assert [item.name for item in (tmp_path / "new").glob("profile*")] == ["profile.json"]


def test_a_folder_of_the_profile_s_name_is_refused_before_anything_is_measured(
    measured: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured.clear()
    (tmp_path / "profile.json").mkdir()
    assert main(words(tmp_path)) == EXIT_ERROR
    assert "file: 'profile.json' is a folder in" in said(capsys)


def test_a_budget_that_was_overrun_is_told_with_what_for(
    raw: dict[str, Any],
    measured: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def told(seconds: float, **changes: Any) -> str:
        measured[:] = [{**raw, "quality": {**raw["quality"], "seconds": seconds}, **changes}]
        assert main(words(tmp_path, "budget_s=0.01")) == 0
        return said(capsys)

    assert "asked for" not in told(5.0)
    line = told(15.2)
    assert "took 15.2 s of the 10 ms asked for: however small budget_s is, three repeats" in line
    assert "and the first whole steps" in line
    assert "first whole steps" not in told(15.2, steps=[])
    captured = {**raw["program"], "style": "captured"}
    assert "the operations that every prediction needs" in told(15.2, program=captured)


# ------------------------------------------------------------------------------ stopped, and on


def stop_after(
    monkeypatch: pytest.MonkeyPatch, count: int, error: type[BaseException] = KeyboardInterrupt
) -> Callable[[], None]:
    """Stops a run when it has kept so many parts more, as soon as it begins the next one. Gives
    what lets it run."""
    add, begin, left = Records.add, Records.begin, [count]

    def stopping_begin(self: Records, row: Any) -> None:
        begin(self, row)
        if left[0] <= 0:
            left[0] = count
            raise error

    def counting_add(self: Records, row: Any) -> None:
        add(self, row)
        left[0] -= 1

    monkeypatch.setattr(Records, "add", counting_add)
    monkeypatch.setattr(Records, "begin", stopping_begin)
    return lambda: left.__setitem__(0, 1 << 30)


@pytest.mark.parametrize(("program", "count"), [("eager", 1), ("captured", 6)])
def test_a_profile_that_is_stopped_again_and_again_is_whole(
    program: str,
    count: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_after(monkeypatch, count)
    command, stops = words(tmp_path / "out", f"program={program}", "budget_s=2"), 0
    while (status := main(command)) == EXIT_INTERRUPTED:
        stops += 1
        assert stops < 60
        told = said(capsys)
        assert f"run the same command again with output_dir={tmp_path / 'out'}" in told
        assert ("goes on with" in told) == (stops > 1)
        assert {"config.yaml", "run.json", PARTS} == {x.name for x in (tmp_path / "out").iterdir()}
    assert status == 0 and stops >= 3, "its parts were kept one by one"
    names = {item.name for item in (tmp_path / "out").iterdir()}
    assert names == {"config.yaml", "run.json", "profile.json", "summary.json"}

    profile = load_profile(tmp_path / "out" / "profile.json")
    cases = {"eager": calibration_cases, "captured": whole_cases}[program](SHAPE, 64)
    failed = [case.name for case in cases if case.name not in {x.name for x in profile.steps}]
    told = " ".join(profile_of(tmp_path / "out")["quality"]["left_out"])
    assert ENDED not in told and all(name in told for name in failed)
    assert len({step.name for step in profile.steps}) == len(profile.steps) >= 3
    expected = {"eager": {"join", "move"}, "captured": {"takeover", "finish"}}[program]
    assert expected <= set(profile.ops)
    shape = ShapeKey(32, 2, (AdapterSlot("lora", 4, ("all-linear",)),))
    model = profiled_model(profile.model_shape, profile)
    times = model.pass_times_s([PassLoad(shape, 500.0, 40.0, (0,))], ReplicaShape())
    assert 0 < times.value[0] < 10


def profile_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "profile.json").read_text())


def test_what_was_measured_is_not_measured_again(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_on = stop_after(monkeypatch, 4)  # operations, two kinds of joins, a step
    assert main(words(tmp_path)) == EXIT_INTERRUPTED
    kept = {row["name"]: row for row in read_lines(tmp_path / PARTS)}
    (step,) = (row["step"] for row in kept.values() if "step" in row)
    run_on()
    monkeypatch.setattr(measure, "_measure_eager", lambda *_: pytest.fail("measured already"))
    assert main(words(tmp_path, "budget_s=0.5")) == 0, "with what time is left to it now"
    found = profile_of(tmp_path)
    assert found["steps"][0] == step
    assert {name: found["ops"][name] for name in kept["operations"]["ops"]} == (
        kept["operations"]["ops"]
    )


def test_a_profile_that_was_there_stays_until_the_new_one_is_whole(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """But for the summary, which with the new settings would tell of another profile."""
    assert main(words(tmp_path, "budget_s=0.3")) == 0
    before = (tmp_path / "profile.json").read_text()
    run_on = stop_after(monkeypatch, 1)
    assert main(words(tmp_path, "max_rows=32")) == EXIT_INTERRUPTED
    assert (tmp_path / "profile.json").read_text() == before
    assert "max_rows: 32" in (tmp_path / "config.yaml").read_text()
    assert not (tmp_path / SUMMARY).exists()
    run_on()
    assert main(words(tmp_path, "max_rows=32")) == 0
    told = said(capsys)
    (kept,) = (item for item in tmp_path.glob("profile-*.json"))
    assert kept.read_text() == before and f"kept the profile that was there as {kept}" in told


def test_parts_of_other_settings_are_put_aside_and_it_is_said(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_on = stop_after(monkeypatch, 2)
    assert main(words(tmp_path)) == EXIT_INTERRUPTED
    before = (tmp_path / PARTS).read_text()
    append_line(tmp_path / "profile.parts.running", {"name": "calibration mixed ranks"})
    said(capsys)
    for odd in (["program=foo"], ["budget_s=-1"], ["file=x"], ["max_rows=-1"]):
        assert main([*words(tmp_path), *odd]) == EXIT_ERROR
        assert (tmp_path / PARTS).read_text() == before, "nothing was asked for that could be done"
    said(capsys)
    run_on()
    assert main(words(tmp_path, "deterministic=false", "file=other.json", "budget_s=0.3")) == 0
    told = said(capsys)
    assert "of a profile with other settings (deterministic, file), so none is used" in told
    assert "kept as profile.parts-old-1.jsonl" in told and "goes on" not in told
    assert (tmp_path / "profile.parts-old-1.jsonl").read_text() == before
    left_out = json.loads((tmp_path / "other.json").read_text())["quality"]["left_out"]
    assert not any(ENDED in line for line in left_out)
    assert not (tmp_path / PARTS).exists()


@pytest.mark.parametrize(
    ("content", "is_told"),
    [
        ('{"name": "operations", "ops": {}, "left_out": []}\n', True),
        ("3\n[]\n", False),  # no parts at all
        ("\xff\xfe", False),
    ],
)
def test_parts_of_nobody_knows_what_are_not_used(
    quick: None, content: str, is_told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / PARTS).write_text(content, encoding="latin-1")
    assert main(words(tmp_path, "budget_s=0.3")) == 0
    assert ("other settings (unknown ones)" in said(capsys)) is is_told
    assert len(profile_of(tmp_path)["ops"]) > 10


def test_of_a_run_that_was_stopped_before_it_measured_anything_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "_measure_eager", stopped)
    monkeypatch.setattr(measure, "signs_at_start", lambda _: {"interrupted": 0.5})  # as of a GPU
    assert main(words(tmp_path / "out")) == EXIT_INTERRUPTED
    assert "run the same command again" not in said(capsys)
    assert not (tmp_path / "out").exists()


def test_what_was_measured_when_the_process_was_killed_is_left_out(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_on = stop_after(monkeypatch, 2)
    assert main(words(tmp_path)) == EXIT_INTERRUPTED
    append_line(tmp_path / "profile.parts.running", {"name": "calibration mixed ranks"})
    run_on()
    assert main(words(tmp_path)) == 0
    assert f"calibration mixed ranks: {ENDED}" in profile_of(tmp_path)["quality"]["left_out"]


def test_a_disk_that_is_full_at_the_end_loses_nothing(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = measure.write_profile

    def full(*_: Any) -> None:
        raise measure.OutputError("profile.json: the profile cannot be written (no space)")

    monkeypatch.setattr(measure, "write_profile", full)
    assert main(words(tmp_path, "budget_s=0.3")) == EXIT_ERROR
    told = said(capsys)
    assert "no space" in told and "run the same command again" in told
    monkeypatch.setattr(measure, "write_profile", written)
    monkeypatch.setattr(measure, "_measure_eager", lambda *_: pytest.fail("measured already"))
    assert main(words(tmp_path, "budget_s=0.3")) == 0


def test_a_real_process_goes_on_behind_a_termination(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "muxtune.cli", *words(out, "budget_s=6", "max_rows=256")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(measure.torch.get_num_threads())}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        end_s = time.monotonic() + 120.0
        while not (out / PARTS).exists() and time.monotonic() < end_s and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert process.returncode == EXIT_TERMINATED, told
    assert "run the same command again" in " ".join(told.split())
    assert main(words(out, "budget_s=0.5", "max_rows=256")) == 0
    assert "goes on with" in said(capsys)


def test_what_was_left_out_for_one_reason_is_one_line() -> None:
    lines = ["calibration long: no time", "takeovers: RuntimeError: lost", "calibration: no time"]
    assert _left_out(lines) == [
        "calibration long, calibration: no time",
        "takeovers: RuntimeError: lost",
    ]
