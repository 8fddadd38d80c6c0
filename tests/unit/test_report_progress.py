"""What a training run tells of its tasks while it works."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from muxtune.report import progress
from muxtune.report.progress import TaskProgress
from muxtune.report.recording import DriftRows
from muxtune.types import NS_PER_S, DriftData, Estimate, Event, EventKind


class Clock:
    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock.monotonic)
    return clock


@pytest.mark.parametrize("first", [1, 451])
def test_the_time_left_is_that_of_the_steps_seen(clock: Clock, first: int) -> None:
    """A resumed task does not begin at its first step."""
    said = io.StringIO()
    display = TaskProgress(Console(file=said, width=200), plain_interval_s=1e9)
    for step in range(first, first + 5):
        display.on_step("a", step, first + 104, 2.5, 10)
        clock.now_s += 2.0
    display.flush()
    step = f"step {first + 4}/{first + 104}"
    assert said.getvalue() == f"a: {step} loss 2.5000 5 tok/s ETA 3.33 min\n"


def test_a_drift_is_told_with_what_was_predicted_and_the_correction() -> None:
    said, rows = io.StringIO(), io.StringIO()
    data = DriftData(2, 1.5, Estimate(1.0, 0.9, 1.1), 150)
    event = Event(NS_PER_S, EventKind.DRIFT, "", "instance-0", 1, data)
    TaskProgress(Console(file=said, width=200)).on_batch(NS_PER_S, [event])
    DriftRows(rows).on_batch(NS_PER_S, [event])
    assert said.getvalue() == (
        "instance-0: drift: a round of plan 1 takes 1.5 s where 1 s (900 ms to 1.1 s) was"
        " predicted; planned with 150% of the cost model's times from now on\n"
    )
    _, row = rows.getvalue().splitlines()
    assert row == "1.0,instance-0,1,2,1.5,1.0,0.9,1.1,150"
