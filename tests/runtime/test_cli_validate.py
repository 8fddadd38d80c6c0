"""What `muxtune profile` and `muxtune validate` refuse before they measure anything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from muxtune.cli import EXIT_ERROR, main
from muxtune.profiling import measure

SHIPPED = "profile=h100-sxm_llama-2-7b"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["profile", "model=tiny", "max_rows=-5"], "max_rows: is -5"),
        (["profile", "model=tiny", "program=foo"], "program: is 'foo'"),
        (["profile", "model=tiny", "file="], "file: is empty. Give a name such as profile.json"),
        (["profile", "model=tiny", "file=a/b.json"], "file: 'a/b.json' is a path, not a name"),
        (["profile", "model=tiny", "file=tiny"], "file: 'tiny' does not end in .json"),
        (["profile", "model=tiny", "file=.json"], "file: '.json' does not end in .json"),
        (["profile", "model=tiny", "file=summary.json"], "file: 'summary.json' is what every"),
        (["profile", "model=tiny", f"file={'a' * 300}.json"], "file: is longer than 200 bytes"),
        (["validate"], "profile: is not given"),
        (["validate", "profile=nowhere.json"], "nowhere.json: there is no such file"),
        (["validate", SHIPPED, "max_rows=-3"], "max_rows: is -3"),
        (["validate", SHIPPED, "max_rows=1"], "max_rows: is 1. give 0 (as profiled), or 64"),
        (["validate", SHIPPED, "models=[llama-2-7b:99]"], "models: 'llama-2-7b:99'"),
        (["validate", SHIPPED], "of a H100-SXM, and there is no GPU here"),
    ],
)
def test_it_is_refused_with_the_field(
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "_measure_eager", lambda *_: pytest.fail("it measures"))
    assert main([*words, f"output_dir={tmp_path / 'out'}"]) == EXIT_ERROR
    assert message in " ".join(capsys.readouterr().err.split())


def test_another_machine_is_told_before_the_time_is_spent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["validate", SHIPPED, f"output_dir={tmp_path / 'out'}", "budget_s=0.001", "dynamic_s=0"])
    said = capsys.readouterr()
    assert "profile of another" in said.out, said.err
