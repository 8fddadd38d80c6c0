"""The fleet's metrics, against numbers worked out by hand."""

from __future__ import annotations

import csv
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from muxtune.engine import TaskOutcome
from muxtune.report.metrics import (
    PowerDraw,
    TaskMetrics,
    energy_kwh,
    fairness_index,
    fleet_summary,
)
from muxtune.report.recording import (
    MOST_EXACT,
    TASK_COLUMNS,
    RecordingPlanner,
    csv_line,
    seconds_text,
    task_cells,
)
from muxtune.types import NS_PER_S, InstanceSpec, TaskState
from muxtune_sim.options import InstanceTotals

S = 10**9
HOUR = 3_600 * S


def outcome(task_id: str = "t", **changes: Any) -> TaskOutcome:
    values: dict[str, Any] = {
        "task_id": task_id,
        "tenant": "a",
        "model": "m",
        "state": TaskState.DONE,
        "arrival_ns": 10 * S,
        "ready_ns": 10 * S,
        "placed_ns": 20 * S,
        "ended_ns": 50 * S,
        "first_start_ns": None,
        "instance_id": "i0",
        "steps": 5,
        "effective_tokens": 100,
        "solo_time_s": 20.0,
        "message": "",
        "num_placements": 1,
    }
    return TaskOutcome(**(values | changes))


def totals(name: str, **values: int) -> InstanceTotals:
    return InstanceTotals(name, **(dict.fromkeys(InstanceTotals._fields[1:], 0) | values))


def metrics(*outcomes: TaskOutcome) -> TaskMetrics:
    found = TaskMetrics()
    for item in outcomes:
        found.on_task_end(item)
    return found


def test_a_row_has_a_value_for_each_column():
    row = dict(zip(TASK_COLUMNS, task_cells(outcome(deadline_ns=49 * S)), strict=True))
    assert (row["completion_time_s"], row["queueing_s"]) == ("40.0", "10.0")
    assert (row["slowdown"], row["finish_time_ratio"]) == ("1.5", "2.0")
    assert (row["deadline_s"], row["met_deadline"]) == ("49.0", "False")


def test_a_row_of_a_task_that_did_not_wait_and_of_one_that_failed():
    at_once = dict(zip(TASK_COLUMNS, task_cells(outcome(placed_ns=10 * S)), strict=True))
    assert (at_once["slowdown"], at_once["finish_time_ratio"]) == ("2.0", "2.0")
    failed = outcome(state=TaskState.FAILED, placed_ns=None)
    cells = dict(zip(TASK_COLUMNS, task_cells(failed), strict=True))
    assert cells["placed_s"] == cells["slowdown"] == cells["finish_time_ratio"] == ""


@given(st.one_of(st.integers(0, 2**62), st.integers(0, 10**6).map(lambda n: n * 10**8)))
@example(NS_PER_S)
@example(MOST_EXACT - 1)
@example(MOST_EXACT)
def test_seconds_are_written_as_the_float_is(time_ns: int):
    assert seconds_text(time_ns) == str(time_ns / NS_PER_S)


def test_tasks_that_were_not_done_count_in_no_mean():
    failed = outcome("f", state=TaskState.FAILED, deadline_ns=99 * S, lost_steps=3)
    summary = metrics(outcome(deadline_ns=50 * S), failed).summary()
    assert summary["mean_completion_time_s"] == 40.0
    assert summary["deadlines_met_share"] == 0.5 and summary["num_lost_steps"] == 3
    assert summary["done_effective_tokens"] == 100


def test_means_over_all_tenants_and_rows_of_each():
    found = metrics(outcome(), outcome("u", tenant="b", ended_ns=90 * S))
    assert found.summary()["mean_finish_time_ratio"] == 3.0
    text = io.StringIO()
    found.write_tenants(text)
    rows = {row["tenant"]: row for row in csv.DictReader(io.StringIO(text.getvalue()))}
    assert [float(rows[name]["mean_finish_time_ratio"]) for name in "ab"] == [2.0, 4.0]


def test_fairness_is_one_for_equals_and_one_nth_when_one_has_all():
    assert fairness_index(np.array([3.0, 3.0, 3.0])) == pytest.approx(1.0)
    assert fairness_index(np.array([1.0, 0.0, 0.0, 0.0])) == pytest.approx(0.25)
    assert fairness_index(np.empty(0)) is None


def test_hours_add_up_and_shared_gpus_count_once():
    specs = [InstanceSpec(n, "m", "d", 100, gpu_ids=g) for n, g in (("a", ("0",)), ("b", ("0",)),
             ("c", ("1",)))]  # fmt: skip
    parts = [
        totals("a", busy_ns=HOUR // 2, effective_tokens=30, padded_tokens=50),
        totals("b", busy_ns=HOUR // 4, effective_tokens=30, padded_tokens=50, lost_tokens=10,
               peak_predicted_memory_bytes=75),
    ]  # fmt: skip
    summary = fleet_summary(specs, parts, HOUR, PowerDraw({"d": 1_000.0}, 0.1), {"1": HOUR // 2})
    hours = [summary[f"{kind}_gpu_hours"] for kind in ("busy", "idle", "failed")]
    assert hours == [0.75, 0.75, 0.5] and summary["gpu_hours"] == sum(hours)
    assert summary["effective_share"] == 0.5 and summary["utilisation"] == 0.375
    assert summary["effective_utilisation"] == 0.1875
    assert summary["min_memory_headroom"] == 0.25
    assert summary["energy_kwh"] == pytest.approx(0.75 + 0.1 * 0.75)


def test_energy_is_not_guessed_for_a_device_without_a_known_power():
    assert energy_kwh({"0": "d"}, {"0": HOUR}, {}, HOUR, PowerDraw({"d": 0.0})) is None


@pytest.mark.parametrize("text", ["plain", "", "a,b", 'say "no"', "two\nlines", "r\r", "é", " x "])
def test_lines_are_what_the_csv_module_writes(text: str):
    cells = ("id", text, "", "0.1", "7", "True")
    expected = io.StringIO()
    csv.writer(expected, lineterminator="\n").writerow(cells)
    assert csv_line(cells) == expected.getvalue()


class Numbered:
    """A planner whose answer to its n-th question is n."""

    def __init__(self) -> None:
        self.asked = 0

    def plan(self, instance: Any, previous: Any) -> Any:
        self.asked += 1
        return self.asked


def test_sampled_plans_are_any_of_those_made_each_as_likely():
    times_kept = dict.fromkeys(range(1, 31), 0)
    for seed in range(1_500):
        planner = RecordingPlanner(Numbered(), 5, seed)
        for _ in range(30):
            planner.plan(None, None)  # type: ignore[arg-type]
        kept = [sample.plan for sample in planner.samples]
        assert len(set(kept)) == 5 and kept == sorted(kept)  # type: ignore[type-var]
        for number in kept:
            times_kept[number] += 1  # type: ignore[index]
    # A number is kept 250 times on average; 65 is 4.5 standard deviations.
    assert all(abs(times - 250) < 65 for times in times_kept.values())
