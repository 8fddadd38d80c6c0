"""A captured profile of a tiny model and its validation, on the CPU, from end to end."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from experiments.gpu_validation.rescore import rescore, rescore_by
from muxtune.commands.validate import show
from muxtune.cost.book import profiled_model
from muxtune.cost.captured import CapturedCostModel
from muxtune.cost.schema import content_hash, load_profile
from muxtune.cost.shapes import ModelShape
from muxtune.cost.shipped import profile_path as profile_path_of
from muxtune.cost.takeovers import TAKEOVER
from muxtune.errors import OutputError, ProfileError
from muxtune.planning.step_builder import StepBuilder, pass_load
from muxtune.profiling import profile_machine, write_profile
from muxtune.profiling.captured_ops import full_grid
from muxtune.profiling.step_cases import StepCase, plan_of
from muxtune.profiling.steps import StepBench, whole_rounds
from muxtune.types import AdapterSlot, HTask, PassLoad, ReplicaShape, ShapeKey
from muxtune.validation import dynamic, suite
from muxtune.validation.dynamic import NUM_DYNAMIC, PLANNED_SHARE, Log, first_difference
from muxtune.validation.models import Models
from muxtune.validation.records import ENDED, Records, read_lines
from muxtune.validation.running import (
    ValidationOptions,
    _dynamic_cases,
    only_one,
    suite_of,
    validate,
)
from muxtune.validation.steps import predict
from muxtune.workload.synthetic import SyntheticLibrary

TINY = ModelShape("tiny", 2, 32, 4, 2, 8, 64, 96)
ALL = ("all-linear",)
GRID: dict[str, Any] = {"rows": (32, 64), "slots": (1, 2), "ranks": (16,), "max_rows": 64}


@pytest.fixture(scope="module")
def profile_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = profile_machine(TINY, 1.0, program="captured", show_progress=False, **GRID)
    return write_profile(raw, tmp_path_factory.mktemp("profile") / "tiny.json")


@pytest.fixture(scope="module")
def report(profile_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("validation")
    options = ValidationOptions(9.0, 3, (), 64, 2, 0.0, dynamic_s=0.3, checks_machine=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "PLANS_PER_WORKLOAD", 1)
        for _ in range(10):  # a busy host takes more than one call, each goes on
            first = validate(folder, profile_path, options)
            if not any(first["left"].values()):
                break
    again = validate(folder, profile_path, options._replace(budget_s=0.0))
    assert {**again, "attempt": 0} == {**first, "attempt": 0}
    return first | {"folder": folder}


def test_the_model_reads_what_was_measured(profile_path: Path) -> None:
    profile = load_profile(profile_path)
    assert profile.style == "captured" and profile.steps
    model = profiled_model(TINY, profile)
    assert isinstance(model, CapturedCostModel)

    def seconds(rows: int, slots: int, closes: tuple[int, ...] = ()) -> float:
        shape = ShapeKey(rows, 1, (AdapterSlot("lora", 8, ALL),) * slots)
        return model.pass_times_s([PassLoad(shape, 0.0, 0.0, closes)], ReplicaShape()).value[0]

    assert seconds(64, 1) > seconds(32, 1) > 0
    assert seconds(32, 2, (0, 1)) > seconds(32, 2, (0,)) > seconds(32, 2)
    inside = ShapeKey(48, 1, (AdapterSlot("lora", 16, ALL),))
    assert model.pass_coefficients(inside._replace(chunk_tokens=4096)).extrapolated
    narrow = TINY._replace(name="other", hidden=64)
    assert profiled_model(narrow, profile).pass_coefficients(inside).extrapolated


def test_tasks_that_change_pools_are_charged_for_it(profile_path: Path) -> None:
    profile = load_profile(profile_path)
    slot = AdapterSlot("lora", 8, ALL)

    def htask(*names: str) -> HTask:
        shape = ShapeKey(32, len(names), (slot,) * len(names))
        return HTask((shape,), {n: i for i, n in enumerate(names)}, dict.fromkeys(names, 1))

    apart, together = plan_of([htask("a"), htask("b")]), plan_of([htask("a", "b")], 1)
    measured = CapturedCostModel(TINY, profile)
    found = [measured.adapter_load_s(slot), measured.move_s(slot), measured.leave_s()]
    assert all(item.value >= 0 for item in found) and sum(item.value for item in found) > 0
    points = [
        {**dict(zip(TAKEOVER, sizes, strict=True)), "median_s": s, "p05_s": s, "p95_s": s}
        for sizes, s in (
            ((0, 0, 0, 0, 0), 0.1), ((1, 8, 0, 0, 0), 0.4), ((0, 0, 2, 9, 0), 0.5),
            ((0, 0, 0, 0, 1), 0.3),
        )
    ]  # fmt: skip
    op = {"unit": "s", "axes": list(TAKEOVER), "points": points}
    model = CapturedCostModel(TINY, profile._replace(ops={**profile.ops, "takeover": op}))
    leave_s, move_s = model.leave_s().value, model.move_s(slot).value
    assert leave_s == pytest.approx(0.1) and move_s > 0
    more_s = model.transition_s(apart, together).value
    assert more_s == pytest.approx(leave_s + 0.2 + 2 * move_s)
    assert model.transition_s(apart, apart._replace(epoch=2)).value == 0
    small, large = (model.finish_s(AdapterSlot("lora", rank, ALL)).value for rank in (16, 64))
    assert 0 < small <= large, "each is written to the disk"
    one_less_s = model.transition_s(apart, plan_of([htask("a")], 3)).value
    assert one_less_s == pytest.approx(leave_s + 0.2)
    stays = [together.htasks[0]._replace(slot_of={"b": 1}, quota={"b": 1})]
    assert model.transition_s(together, plan_of(stays, 3)).value == pytest.approx(leave_s)
    alone_s = model.transition_s(None, plan_of([htask("a")])).value
    assert alone_s == pytest.approx(leave_s + 0.2 + model.adapter_load_s(slot).value)


def test_captures_are_charged_by_their_rows(profile_path: Path) -> None:
    profile = load_profile(profile_path)
    points = [{"rows": n, **dict.fromkeys(("median_s", "p05_s", "p95_s"), s), "repeats": 1}
              for n, s in ((256.0, 0.2), (1280.0, 0.3))]  # fmt: skip
    ops = {**profile.ops, "capture": {"unit": "s", "axes": ["rows"], "points": points}}
    deep = TINY._replace(num_layers=2 * TINY.num_layers)
    found = [
        CapturedCostModel(shape, profile._replace(ops=ops)).capture_s(
            ShapeKey(64, rows // 64, ()), ReplicaShape()
        ).value
        for shape, rows in ((TINY, 256), (TINY, 2304), (deep, 256))
    ]  # fmt: skip
    assert found == pytest.approx([0.2, 0.4, 0.4])


def test_a_validation_writes_what_it_measured(
    report: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert report["step"]["count"] >= 1 and report["failed_steps"] == []
    assert report["op"]["count"] > 0 and report["failed_ops"] == []
    assert report["step_of_shapes"]["count"] == report["step"]["count"]
    runs = ["arrivals and departures", "with a queue", "with a shorter queue"]
    assert [run["name"] for run in report["dynamic"]] == runs
    assert all("decides_the_same_again" in run for run in report["dynamic"])
    assert report["completion"]["count"] >= 15, "all but the task that was withdrawn"
    names = {path.name for path in report["folder"].iterdir()}
    check = json.loads((report["folder"] / "machine.json").read_text())
    assert report["checked_machine"] and check["failed"] == [] and "finish" in check["ops"]
    assert check["profile"] == report["profile"]
    assert {"report.json", "steps.jsonl", "predicted_measured.png", "errors.png"} <= names
    assert len(names) <= 11
    assert report["run_to_run"]["count"] == 1, "the plan of the only workload, once more"
    attempts = (report["folder"] / "attempts.jsonl").read_text().splitlines()
    numbers = [json.loads(line)["attempt"] for line in attempts]
    assert numbers == list(range(1, len(numbers) + 1)) and numbers
    first = json.loads(attempts[0])
    assert first["options"]["num_cases"] == 3 and "commit" in first
    assert report["step"]["spread"] > 0 and report["memory"].get("spread", 0) == 0
    show(report, report["folder"])
    said = " ".join(capsys.readouterr().out.split())
    assert "0 cases failed that were to fit in memory" in said
    assert "3%, p95 6%: m" in said, "met or missed"


def test_what_was_predicted_of_a_run_stays(
    report: dict[str, Any], profile_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def later_code(*_: object) -> None:
        raise AssertionError("predicted when the measurements were known")

    monkeypatch.setattr(dynamic, "predicted_run", later_code)
    again = validate(report["folder"], profile_path, ValidationOptions(0.0))
    assert again["completion"] == report["completion"] and again["dynamic"] == report["dynamic"]
    assert again["left"] == report["left"] and again["warnings"] == report["warnings"]


def test_what_was_measured_of_a_run_is_read_from_its_record(
    report: dict[str, Any], profile_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(report["folder"], tmp_path / "copy")
    (tmp_path / "copy" / "runs_again.jsonl").unlink()
    path = tmp_path / "copy" / "dynamic.jsonl"
    usual = validate(path.parent, profile_path, ValidationOptions(0.0))["completion"]
    rows = read_lines(path)
    for row in rows:
        for end in row["measured"]["ended"].values():
            end["ended_ns"] *= 3
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    later = validate(path.parent, profile_path, ValidationOptions(0.0))["completion"]
    assert later["bias"] < usual["bias"] - 0.3, "all ended later than predicted"


def test_a_folder_that_somebody_touched_is_scored_all_the_same(
    report: dict[str, Any], profile_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(report["folder"], tmp_path / "copy")
    (tmp_path / "copy" / "report.json").write_text('{"profile": ')
    (tmp_path / "copy" / "attempt-1-old").mkdir()
    with (tmp_path / "copy" / "steps.jsonl").open("a") as file:
        file.write("[1]\n")
    again = validate(tmp_path / "copy", profile_path, ValidationOptions(0.0))
    assert again["step"] == report["step"] and again["op"] == report["op"]


def test_two_processes_do_not_validate_into_one_folder(profile_path: Path, tmp_path: Path) -> None:
    with only_one(tmp_path), pytest.raises(OutputError, match="another process validates"):
        validate(tmp_path, profile_path, ValidationOptions(0.0))
    validate(tmp_path, profile_path, ValidationOptions(0.0))


def test_a_case_that_was_stopped_on_purpose_is_no_failure(
    profile_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(StepBench, "run", stopped)
    options = ValidationOptions(30.0, num_cases=2, max_rows=64, max_tasks=2)
    with pytest.raises(KeyboardInterrupt):
        validate(tmp_path, profile_path, options)
    assert validate(tmp_path, profile_path, ValidationOptions(0.0))["failed_steps"] == []


def test_what_ran_under_another_profile_stays_with_it(profile_path: Path, tmp_path: Path) -> None:
    validate(tmp_path, profile_path, ValidationOptions(0.0))
    first = load_profile(profile_path).content_hash
    running = {"name": "case 000", "profile": first, "case": {}, "predicted_bytes": 1.0}
    (tmp_path / "steps.running").write_text(json.dumps(running) + "\n")
    raw = json.loads(profile_path.read_text())
    raw["created"] = "later"
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**raw, "content_hash": content_hash(raw)}))
    assert validate(tmp_path, other, ValidationOptions(0.0))["failed_steps"] == []
    kept = read_lines(tmp_path / "attempt-1" / "steps.jsonl")
    assert [row["error"] for row in kept] == [ENDED]


def test_a_run_that_failed_is_neither_run_again_nor_drawn_for_ever(profile_path: Path) -> None:
    good, failed = {"error": ""}, {"error": "lost"}
    options = ValidationOptions(1.0, dynamic_s=1.0)

    def drawn(dynamic: list[dict[str, str]], again: list[dict[str, str]]) -> int:
        rows, profile = {"dynamic": dynamic, "runs_again": again}, load_profile(profile_path)
        records = {name: SimpleNamespace(rows=own) for name, own in rows.items()}
        attempt: Any = SimpleNamespace(profile=profile, models=Models(profile), records=records)
        return len(_dynamic_cases(attempt, options))

    assert drawn([good, good, failed], [good, good]) == 0
    assert drawn([good, good, good], [good, good]) == drawn([good, good], []) == NUM_DYNAMIC


def test_another_profile_is_another_attempt(profile_path: Path, tmp_path: Path) -> None:
    options = ValidationOptions(0.0)
    validate(tmp_path, profile_path, options)
    raw = json.loads(profile_path.read_text())
    raw["created"] = "later"
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**raw, "content_hash": content_hash(raw)}))
    first = load_profile(profile_path).content_hash
    row = {"name": "case 000", "profile": first, "error": "the process was ended", "case": {}}
    (tmp_path / "steps.jsonl").write_text(json.dumps(row) + "\n")
    attempts = validate(tmp_path, other, options)["attempts"]
    cut_off = {"steps": 1, "again": 0, "ops": 0, "dynamic": 0, "runs_again": 0}
    assert attempts == [{"attempt": 1, "profile": first, "cut_off": cut_off}], "kept and told"
    kept = load_profile(tmp_path / "attempt-1" / "profile.json")
    assert kept.content_hash == first
    assert load_profile(tmp_path / "profile.json").created == "later"


@pytest.mark.parametrize("cut", ["truncated", "tampered", "no operations"])
def test_a_profile_that_is_not_whole_is_refused(
    profile_path: Path, tmp_path: Path, cut: str
) -> None:
    text, bad = profile_path.read_text(), tmp_path / "bad.json"
    raw = json.loads(text)
    if cut == "no operations":
        raw["ops"] = {}
        text = json.dumps({**raw, "content_hash": content_hash(raw)})
    elif cut == "tampered":
        raw["steps"][0]["repeats_s"][0] *= 2
        text = json.dumps(raw)
    bad.write_text(text[:-100] if cut == "truncated" else text)
    with pytest.raises(ProfileError, match="muxtune profile"):
        validate(tmp_path / "v", bad, ValidationOptions(1.0))


def test_points_that_a_budget_left_without_their_row_are_dropped() -> None:
    points = [{"slots": s, "rows": r, "x": 0} for s in (1, 8) for r in (64, 128)]
    assert full_grid(["slots", "rows"], [*points, {"slots": 1, "rows": 96, "x": 0}]) == points
    assert full_grid(["rows"], [{"rows": 2}, {"rows": 1}]) == [{"rows": 1}, {"rows": 2}]


def test_the_first_different_decision_is_shown_with_its_cause() -> None:
    left, right = Log(), Log()
    left.lines, right.lines = ["place a", "plan a"], ["place a", "plan a,b"]
    left.told, right.told = ["", "TASK_DONE b"], ["", "TASK_DONE a"]
    found = first_difference(left, right)
    assert found is not None and found["decision"] == 1
    assert (found["predicted"], found["measured"]) == ("plan a", "plan a,b")
    assert "order" in found["why"]
    assert first_difference(left, left) is None


def test_the_captured_pass_counts_what_the_step_launches(profile_path: Path) -> None:
    """Logits in whole chunks, and a product less in the first block, however many there are."""
    profile = load_profile(profile_path)
    points = [
        {"rows": rows, "median_s": rows, "p05_s": rows, "p95_s": rows} for rows in (32.0, 64.0)
    ]
    loss = {"full_loss.32x96": {"unit": "s", "axes": ["rows"], "points": points}}
    profile = profile._replace(steps=(), ops={**profile.ops, **loss})
    short, deep = (CapturedCostModel(TINY._replace(num_layers=n), profile) for n in (2, 4))

    def seconds(model: CapturedCostModel, category: str, rows: int) -> float:
        shape = ShapeKey(rows, 1, (AdapterSlot("lora", 8, ALL),))
        return model.breakdown_s(PassLoad(shape, 0.0, 0.0))[category]

    rows = (1056, 2048, 1024, 64)
    assert [round(seconds(short, "loss", n)) for n in rows] == [2048, 2048, 1024, 64]
    product, embedding = (
        short._time(name, (64.0,)).value_s for name in ("frozen_backward.32x64", "embedding.32")
    )
    two, four = (seconds(model, "backbone", 64) - embedding for model in (short, deep))
    assert four - 2 * two == pytest.approx(product)


def test_what_ran_when_the_process_ended_is_recorded_as_failed(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    records = Records(path, {"profile": "x"})
    records.begin({"name": "a", "case": 1})
    records.add({"name": "a", "error": ""})
    records.begin({"name": "b", "case": 2})
    after = Records(path, {"profile": "x"})
    assert [(row["name"], bool(row["error"]), row["profile"]) for row in after.rows] == [
        ("a", False, "x"),
        ("b", True, "x"),
    ]
    assert after.rows[1]["case"] == 2 and Records(path).rows == after.rows
    assert [item.name for item in tmp_path.iterdir()] == ["steps.jsonl"]


def test_the_steps_that_were_measured_first_are_scored_by_themselves(report: dict[str, Any]):
    first, every = (rescore(report["folder"], first=count) for count in (1, None))
    assert first["step"]["count"] == first["as_recorded"]["step"]["count"] == 1
    assert every["as_recorded"]["step"] == report["step"]
    assert every["step"]["mean"] == pytest.approx(report["step"]["mean"])  # the code is the same
    assert first["op"] == every["op"]


def test_steps_are_scored_by_another_profile_apart_from_the_machine_s_speed(
    report: dict[str, Any], tmp_path: Path
):
    folder = report["folder"]
    raw = json.loads((folder / "profile.json").read_text(encoding="utf-8"))
    own, slower = rescore_by(folder, folder), copy.deepcopy(raw)
    for step in slower["steps"]:  # a busy host's repeats lie apart, and say little to a fit
        step["repeats_s"] = [2.0 * float(np.median(step["repeats_s"]))] * len(step["repeats_s"])
    (tmp_path / "profile.json").write_text(
        json.dumps({**slower, "content_hash": content_hash(slower)}), encoding="utf-8"
    )
    other = rescore_by(folder, tmp_path)
    assert other["by"] != own["by"] == raw["content_hash"]
    assert other["speed"] > 1.2 * own["speed"], "its steps took twice as long"
    for found in (own, other):
        assert found["step"]["count"] == report["step"]["count"]
        assert abs(found["step"]["bias"]) < 0.3, "the median is taken out"


@pytest.fixture(scope="module")
def shipped() -> tuple[Models, list[StepCase]]:
    """A measured profile's cost models, and a small suite of it."""
    models = Models(load_profile(profile_path_of("h100-sxm_llama-2-7b", shipped_only=True)))
    return models, suite_of(models, ValidationOptions(0.0, num_cases=4, max_rows=2048))


def test_by_shapes_alone_nothing_is_known_of_a_layout(
    shipped: tuple[Models, list[StepCase]],
) -> None:
    """Whoever asks with sums only, as planners do, is told what ``of_shapes`` scores."""
    models, cases = shipped
    differ = 0
    for case in cases:
        library, model = SyntheticLibrary(0), models(case.shape)
        for spec in case.specs().values():
            library.add(spec)
        _, batches = whole_rounds(case.plan(), library, StepBuilder())
        loads = [pass_load(batch, library)._replace(layout=None) for batch in batches]
        found = predict(case, model)
        seconds = float(model.pass_times_s(loads, ReplicaShape()).value.sum())
        assert found["of_shapes"]["predicted_s"] == pytest.approx(seconds)
        differ += abs(found["predicted_s"] / seconds - 1.0) > 1e-3
    assert differ > len(cases) / 2


def test_cases_near_the_limit_are_plans_that_would_be_made(
    shipped: tuple[Models, list[StepCase]],
) -> None:
    """The whole ledger counts, what the framework takes included, as where plans are made."""
    models, cases = shipped
    near = [case for case in cases if case.labels.get("near_limit")]
    assert len(near) == ValidationOptions(0.0).near_limit
    for case in near:
        peak = models(case.shape).memory_ledger_bytes(case.plan()).peak.value
        assert 0.85 <= peak / (PLANNED_SHARE * models.profile.memory_bytes) <= 1.0
