"""The decision log: what is written comes back; crashes, damage and full disks are named."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from muxtune.errors import DataError, OutputError
from muxtune.planning.journal import SCHEMA_VERSION, Journal, read_journal
from muxtune.types import (
    Event,
    EventKind,
    Place,
    Plan,
    ProgressData,
    Refusal,
    TaskSpec,
    WakeAt,
)
from tests.unit.planning_helpers import make_plan, one_htask

PLAN: Plan = make_plan([one_htask({"b": 1, "a": 2}, 32)], [(0, None)], drains=["a"])
ARRIVED = Event(5, EventKind.TASK_ARRIVED, "a", data=TaskSpec("a", "model"))
PROGRESS = Event(9, EventKind.PROGRESS, "", "i0", 3, ProgressData(4, 10, 20, 30, {"a": 2}))
REFUSAL = Refusal("too large", ("a",), 100, 50)


def write_three(path: Path) -> list:
    with Journal(path, config={"planner": "muxtune"}, versions={"muxtune": "0.1.0"}) as journal:
        return [
            journal.write(5, [ARRIVED], [Place("a", "i0"), WakeAt(17)]),
            journal.write(9, [PROGRESS], plans=[PLAN]),
            journal.write(12, [], refusals=[REFUSAL]),
        ]


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    batches = write_three(path)
    record = read_journal(path)
    assert record.config == {"planner": "muxtune"}
    assert record.versions == {"muxtune": "0.1.0"}
    assert list(record.batches) == batches
    assert [batch.index for batch in record.batches] == [0, 1, 2]
    assert record.batches[1].plans == (PLAN,)
    assert record.torn_line == ""
    assert record.intact_bytes == path.stat().st_size


def test_equal_decisions_give_equal_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_three(first)
    write_three(second)
    assert first.read_bytes() == second.read_bytes()


def test_a_new_log_replaces_an_old_one(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    write_three(path)
    Journal(path, fsync=False).close()
    assert read_journal(path).batches == ()


@pytest.mark.parametrize("cut", [1, 2, 40])
def test_a_torn_last_line_is_reported_and_cut_off_on_resume(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "decisions.jsonl"
    batches = write_three(path)
    path.write_bytes(path.read_bytes()[:-cut])
    record = read_journal(path)
    assert list(record.batches) == batches[:2]
    assert record.torn_line.startswith('{"actions"')
    journal, resumed = Journal.resume(path)
    assert resumed == record
    with journal:
        again = journal.write(13, [])
    assert again.index == 2
    assert list(read_journal(path).batches) == [*batches[:2], again]


def test_a_last_line_with_its_end_but_not_its_middle_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    batches = write_three(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + b"\0" * 20 + lines[-1][20:])
    record = read_journal(path)
    assert list(record.batches) == batches[:2]
    assert record.torn_line


def test_resume_of_an_intact_log_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    batches = write_three(path)
    journal, _ = Journal.resume(path, fsync=False)
    with journal:
        batches.append(journal.write(20, [], [WakeAt(30)]))
    assert list(read_journal(path).batches) == batches


def damage(path: Path, line: int, content: bytes) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line - 1] = content
    path.write_bytes(b"".join(lines))


@pytest.mark.parametrize(
    ("line", "content", "message"),
    [
        (2, b'{"half\n', r"decisions\.jsonl:2: this line is not a batch"),
        (3, b"[1, 2]\n", r":3: this line is not a batch"),
        (3, b'{"index": 1, "unknown": 2}\n', r":3: this line is not a batch"),
        (2, b"", r":2: batch 1 stands where 0 is due"),
        (1, b"{}\n", r":1: does not begin with a header"),
        (1, b"no json\n", r":1: does not begin with a header"),
        (
            1,
            b'{"schema": 99}\n',
            rf":1: has schema version 99, this program reads {SCHEMA_VERSION}",
        ),
    ],
)
def test_damage_before_the_last_line_is_named(
    tmp_path: Path, line: int, content: bytes, message: str
) -> None:
    path = tmp_path / "decisions.jsonl"
    write_three(path)
    damage(path, line, content)
    with pytest.raises(DataError, match=message):
        read_journal(path)


def test_a_log_that_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: cannot be read"):
        read_journal(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty\.jsonl: holds no header"):
        read_journal(tmp_path / "empty.jsonl")


def test_an_unwritable_path_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"no_such_folder.*choose an output folder"):
        Journal(tmp_path / "no_such_folder" / "decisions.jsonl")


def test_a_full_disk_leaves_the_log_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes 25 bytes of a line and then no more."""
    path = tmp_path / "decisions.jsonl"
    journal = Journal(path, fsync=False)
    written = journal.write(1, [])
    taken: list[int] = []

    def write_to_full_disk(line: memoryview) -> None:
        if not taken:
            taken.append(journal._file.write(line[:25]))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal, "_write_all", write_to_full_disk)
    with pytest.raises(OutputError, match=r"decisions\.jsonl.*No space left on device.*Free disk"):
        journal.write(2, [ARRIVED])
    monkeypatch.undo()
    record = read_journal(path)
    assert taken == [25]
    assert record.torn_line == ""
    assert record.batches == (written,)
    assert journal.write(3, []).index == 1  # space was freed
    journal.close()
    assert len(read_journal(path).batches) == 2


def test_a_device_that_is_full_raises_at_once() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OutputError, match="No space left on device"):
        Journal(full, fsync=False)


def test_what_is_not_plain_data_is_not_journalled(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    with Journal(path, fsync=False) as journal:
        with pytest.raises(TypeError, match="cannot journal"):
            journal.write(1, [Event(1, EventKind.WAKE, data=object())])
        assert journal.next_index == 0
    assert read_journal(path).batches == ()
