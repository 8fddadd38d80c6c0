"""The suite that a profile's hash draws, and how records become figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from muxtune.cost.shapes import ModelShape
from muxtune.errors import ConfigError
from muxtune.profiling.step_cases import StepCase, case_from_json, case_to_json
from muxtune.validation.records import Records
from muxtune.validation.scoring import (
    rankings,
    relative_error,
    summarise,
    with_second_ends,
    with_second_runs,
)
from muxtune.validation.suite import (
    PLANS_PER_WORKLOAD,
    SuiteOptions,
    _passes,
    draw_near_limit,
    draw_suite,
)

SHAPE = ModelShape("tiny", 2, 64, 4, 2, 16, 128, 256)
OPTIONS = SuiteOptions(201, (SHAPE, SHAPE._replace(name="other")), (128, 512, 2048))
HASH = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def suite():
    return draw_suite(HASH, OPTIONS, lambda case: True)


def test_the_hash_alone_decides(suite):
    assert draw_suite(HASH, OPTIONS, lambda case: True) == suite
    assert draw_suite("f" + HASH[1:], OPTIONS, lambda case: True) != suite


def test_the_suite_is_as_wide_as_it_claims(suite):
    assert len(suite) == 201 and len({case.name for case in suite}) == 201
    single = [case for case in suite if "workload" not in case.labels]
    off = [case for case in single if not case.labels["grid"]]
    assert len(off) >= len(single) // 2
    assert {case.shape.name for case in suite} == {"tiny", "other"}
    assert max(len(case.tasks) for case in suite) >= 24
    assert min(len(case.tasks) for case in suite) == 1
    assert {len(case.htasks) > 1 for case in single} == {True, False}
    assert {t.method for case in suite for t in case.tasks} > {"lora", "ia3"}
    assert all(8 <= t.rank <= 64 for case in suite for t in case.tasks)
    for case in suite:
        for htask in case.plan().htasks:
            longest = max(case.tasks[int(name[1:])].max_length_tokens for name in htask.quota)
            assert min(htask.quota.values()) * case.chunk_tokens >= longest
            assert htask.shapes[0].padded_tokens <= 2048 + case.chunk_tokens * len(htask.quota)


def test_a_workload_has_different_plans_of_the_same_tasks(suite):
    plans = [case for case in suite if case.labels.get("workload") == 0]
    assert len(plans) == PLANS_PER_WORKLOAD
    assert len({case.tasks for case in plans}) == 1
    assert len({_passes(case) for case in plans}) == PLANS_PER_WORKLOAD
    plan = plans[0]._replace(micro_batch_tokens=1)  # longer sequences ask for more
    assert _passes(plan) == _passes(plan._replace(micro_batch_tokens=2))
    assert _passes(plan) != _passes(plan._replace(htasks=((0,), (1, 2, 3))))


def test_what_does_not_fit_is_drawn_again():
    small = draw_suite(HASH, OPTIONS, lambda case: len(case.tasks) <= 8)
    assert max(len(case.tasks) for case in small) <= 8
    with pytest.raises(ConfigError, match=r"max_rows: .*memory.*Lower max_rows"):
        draw_suite(HASH, OPTIONS, lambda case: False)


def test_a_few_cases_nearly_fill_the_memory():
    def bytes_of(case: StepCase) -> float:
        return 10.0 + sum(task.rank for task in case.tasks)

    cases = draw_near_limit(HASH, OPTIONS, bytes_of, 800.0, 4)
    assert len(cases) == len({case.name for case in cases}) == 4
    assert all(0.85 * 800.0 <= bytes_of(case) <= 800.0 for case in cases)
    assert all(case.labels["near_limit"] and case.shape == OPTIONS.shapes[0] for case in cases)
    assert len({case.tasks for case in cases}) == 4
    assert draw_near_limit(HASH, OPTIONS, bytes_of, 800.0, 4) == cases
    assert draw_near_limit(HASH, OPTIONS, bytes_of, 1e9, 4) == [], "too much to be filled"
    assert draw_near_limit(HASH, OPTIONS, bytes_of, 1.0, 4) == [], "not one task fits"


def test_a_case_survives_its_json(suite):
    for case in suite[::17]:
        assert case_from_json(json.loads(json.dumps(case_to_json(case)))) == case


def row(name: str, predicted: float, measured: float, workload: int | None = None) -> Any:
    labels = {"grid": True, "mixed": False, "profiled_shape": True}
    labels |= {} if workload is None else {"workload": workload}
    return {
        "name": name, "error": "", "predicted_s": predicted, "measured_s": measured,
        "low_s": 0.9 * predicted, "high_s": 1.1 * predicted, "effective_tokens": 100,
        "repeats_s": [0.999 * measured, measured, 1.001 * measured], "extrapolated": False,
        "case": {"labels": labels, "htasks": [[0]], "shape": {"name": "tiny"}},
    }  # fmt: skip


def test_errors_coverage_and_failures_are_told():
    rows = [row("a", 1.05, 1.0), row("b", 0.8, 1.0)]
    failed = row("c", 1.0, 1.0) | {
        "error": "out of memory", "out_of_memory": True, "predicted_bytes": 1,
    }  # fmt: skip
    found = summarise([*rows, failed], [], [])
    assert found["step"]["mean"] == pytest.approx(0.125)
    assert found["step"]["coverage"] == 0.5 and found["step"]["count"] == 2
    assert found["step"]["bias"] == pytest.approx(-0.075) and not found["step"]["met"]
    assert found["predicted_to_fit_but_failed"] == 1
    assert found["failed_steps"][0]["name"] == "c"
    assert relative_error(rows[0]) == pytest.approx(0.05)
    assert found["step_of_shapes"] == {}
    of_shapes = [{**item, "of_shapes": {"predicted_s": 1.2}} for item in rows]
    by_shape = summarise(of_shapes, [], [])
    assert by_shape["step_of_shapes"]["mean"] == pytest.approx(0.2)
    assert by_shape["step"] == found["step"]


def test_ranking_leaves_out_what_the_repeats_do_not_tell_apart():
    rows = [row("a", 1.0, 1.0, 0), row("b", 2.0, 2.0, 0), row("c", 3.0, 2.0005, 0)]
    (found,) = rankings(rows)
    assert (found.pairs, found.excluded, found.tau) == (2, 1, 1.0)
    (wrong,) = rankings([row("a", 2.0, 1.0, 0), row("b", 1.0, 2.0, 0)])
    assert wrong.tau == -1.0


def test_a_second_run_is_part_of_the_measurement_and_of_its_spread():
    rows = [row("a", 1.0, 1.0, 0), row("b", 1.05, 1.03, 0), row("c", 2.0, 2.0, 0)]
    later = [row("a", 0.0, 1.04), row("b", 0.0, 1.01), row("c", 0.0, 2.0) | {"error": "lost"}]
    both = with_second_runs(rows, later)
    assert [item["measured_s"] for item in both] == pytest.approx([1.02, 1.02, 2.0])
    assert both[0]["predicted_s"] == 1.0 and len(both[0]["repeats_s"]) == 6
    assert "runs_s" not in both[2] and "runs_s" not in rows[0]
    found = summarise(both, [], [])
    assert found["run_to_run"]["count"] == 2
    assert found["run_to_run"]["mean"] == pytest.approx((0.04 + 0.02) / 1.02 / 2)
    # What the first runs' repeats alone seemed to tell apart, and all pairs beside.
    assert rankings(rows)[0].excluded == 0
    (ranking,) = rankings(both)
    assert (ranking.pairs, ranking.excluded, ranking.tau) == (2, 1, 1.0)
    assert ranking.tau_of_all == pytest.approx(2 / 3)
    assert summarise(rows, [], [])["run_to_run"] == {}


def test_a_second_dynamic_run_is_part_of_completion_times_and_of_their_spread():
    def log(ends: dict[str, tuple[float, str]], lines: list[str]) -> dict:
        ended = {name: {"ended_ns": int(s * 1e9), "state": how} for name, (s, how) in ends.items()}
        return {"ended": ended, "lines": lines}

    def task(name: str, measured_s: float, state: str) -> dict:
        return {
            "task_id": name, "arrival_s": 1.0, "predicted_s": 10.0, "measured_s": measured_s,
            "predicted_state": "done", "measured_state": state, "low_s": 9.0, "high_s": 11.0,
        }  # fmt: skip

    first = log({"a": (11.0, "done"), "b": (7.0, "cancelled")}, ["place a"])
    run = {
        "name": "queue", "error": "", "measured": first, "same_completion_order": True,
        "first_difference": None, "drifts": {},
        "tasks": [task("a", 10.0, "done"), task("b", 6.0, "cancelled")],
    }  # fmt: skip
    later = log({"a": (13.0, "done"), "b": (8.0, "cancelled")}, ["place a"])
    again = [{"name": "queue", "measured": later, "error": ""}]
    (both,) = with_second_ends([run], again)
    assert [item["measured_s"] for item in both["tasks"]] == pytest.approx([11.0, 6.0])
    assert both["tasks"][0]["repeats_s"] == pytest.approx([10.0, 12.0])
    assert with_second_ends([both], again) == [both], "a folder is scored as often as one likes"
    found = summarise([], [], [both])
    assert found["completion"]["mean"] == pytest.approx(1 / 11)
    assert found["completion"]["spread"] == pytest.approx(0.9 / 11)
    assert found["dynamic"][0]["decides_the_same_again"]
    assert [item["task_id"] for item in found["ended_otherwise"]] == ["b"]
    exact = {**run, "tasks": [task("a", 10.0, "done"), task("b", 6.0, "cancelled")]}
    assert not summarise([], [], [exact])["completion"]["met"], "one was to be done and was not"
    exact["tasks"] = exact["tasks"][:1]
    assert summarise([], [], [exact])["completion"]["met"]
    other = [{**again[0], "measured": {**later, "lines": ["place b"]}}]
    assert not with_second_ends([run], other)[0]["decides_the_same_again"]
    lost = [{"name": "queue", "error": "lost"}]
    assert with_second_ends([run], lost) == [run]
    assert "decides_the_same_again" not in summarise([], [], [run])["dynamic"][0]


def test_a_run_that_was_cut_off_keeps_its_whole_lines(tmp_path: Path):
    records = Records(tmp_path / "steps.jsonl")
    records.add({"name": "a", "x": 1})
    with records.path.open("a") as file:
        file.write('{"name": "b", "x"')
    again = Records(records.path)
    assert again.has("a") and not again.has("b")
    again.add({"name": "c"})
    assert [row["name"] for row in Records(records.path).rows] == ["a", "c"]
