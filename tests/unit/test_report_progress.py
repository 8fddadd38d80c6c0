"""What a training run tells of its tasks while it works."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from muxtune.report import progress
from muxtune.report.progress import TaskProgress
from muxtune.types import Event, EventKind, ProgressData


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


def test_a_drift_of_a_plan_from_before_names_no_prediction() -> None:
    said = io.StringIO()
    data = ProgressData(2, 3_000_000_000, 10, 10, {})
    event = Event(0, EventKind.DRIFT, "", "instance-0", 1, data)
    TaskProgress(Console(file=said, width=200)).on_batch(0, [event])
    expected = "instance-0: drift: a round of plan 1 takes 1.5 s; times are corrected from now on\n"
    assert said.getvalue() == expected
