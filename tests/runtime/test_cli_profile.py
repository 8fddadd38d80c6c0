"""``muxtune profile`` through the command line: what it keeps, and what it tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from muxtune.cli import EXIT_ERROR, main
from muxtune.cost.schema import content_hash, load_profile
from muxtune.cost.shapes import ModelShape
from muxtune.profiling import measure, profile_machine

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
