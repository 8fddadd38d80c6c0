"""The benchmark of the step: its product path on the CPU, and what it makes of its figures."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from muxtune.cost.shapes import ModelShape

FOLDER = Path(__file__).parents[2] / "experiments" / "step_throughput"
TINY = ModelShape("tiny", 2, 64, 4, 2, 16, 128, 256, tied_embeddings=True)


@pytest.fixture(scope="module")
def run() -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    try:
        sys.modules.pop("run", None)
        return importlib.import_module("run")
    finally:
        sys.path.remove(str(FOLDER))


def test_the_product_path_is_measured_over_whole_rounds(run: ModuleType) -> None:
    """Every method in one pass, fresh data, through planner, engine and executor."""
    case = run.CASES["mixed_methods"]._replace(model="tiny", num_tasks=4, batch_size=2)
    done = run.product.run(case, run.product.store_of("tiny", TINY, "cpu"), "cpu", 4)
    row = done.row
    assert row["captured"] and not row["notices"]
    assert row["rounds"] == done.rounds == 4
    (replays,) = done.replays.values()
    assert sum(replays.values()) == 4
    assert row["rows"] == sum(size * count for size, count in replays.items())
    assert 0 < row["effective_tokens"] <= row["rows"]
    assert row["effective_tokens_per_s"] == row["effective_tokens"] / row["seconds"]
    assert len(row["first_losses"]) == 4
    assert row["first_losses"] != row["last_losses"]


def test_the_stopwatch_keeps_nothing_of_a_plan_that_another_replaces(run: ModuleType) -> None:
    """Its runners hold adapters, for which the next plan needs the memory."""
    few, all_of_them = (SimpleNamespace(task_ids=set(ids)) for ids in ("a", "ab"))
    watch = run.product.Stopwatch(2, {("i0", 0): few, ("i0", 1): all_of_them}, count=3)
    runners = [object()]
    watch.executor = SimpleNamespace(_instances={"i0": SimpleNamespace(_runners=runners)})
    watch.on_round(SimpleNamespace(instance_id="i0", epoch=0))
    assert watch.runners == []
    for _ in range(run.product.WARM_UP):
        assert watch.runners == []
        watch.on_round(SimpleNamespace(instance_id="i0", epoch=1))
    assert watch.runners == runners
    watch.begin_anew()
    assert watch.runners == [] and not watch.rounds


def figures(bound: float, hf_peft: float) -> dict:
    """A round of 1,000 effective tokens in 1,024 rows, 100 ms; the device takes 98 of them."""
    return {
        "check": {"passed": True},
        "lora_8": {
            "rounds": 2, "effective_tokens": 2000, "rows": 2048, "round_ms": 100.0,
            "effective_tokens_per_s": 10_000.0, "device_round_ms": 98.0,
            "optimizer_round_ms": 4.0, "device_ms": {0: {1024: 98.0}},
            "htasks": [{"replays": {1024: 2}}],
        },
        "bound": {"best_tokens_per_s": bound, "frozen": {"device_ms": {1024: 60.0}}},
        "hf_peft": {"effective_tokens_per_s": hf_peft},
    }  # fmt: skip


def test_a_round_is_accounted_for_to_the_last_millisecond(run: ModuleType) -> None:
    ledger = run.ledger(figures(20_000.0, 1_250.0))
    assert ledger["bound_ms"] == pytest.approx(50.0)
    assert ledger["filler_ms"] == pytest.approx(1.2)
    assert ledger["frozen_at_this_size_ms"] == pytest.approx(8.8)
    assert ledger["adapters_ms"] == pytest.approx(34.0)
    assert ledger["host_and_launch_ms"] == pytest.approx(2.0)
    parts = ("bound", "filler", "frozen_at_this_size", "adapters", "optimizer", "host_and_launch")
    assert sum(ledger[f"{part}_ms"] for part in parts) == pytest.approx(100.0)
    assert ledger["over_hf_peft"] == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("bound", "hf_peft", "reason"),
    [(21_000.0, 1_800.0, None), (19_000.0, 1_800.0, "bound"), (21_000.0, 1_700.0, "hf_peft")],
)
def test_weak_baselines_are_not_reported_against(
    run: ModuleType, bound: float, hf_peft: float, reason: str | None
) -> None:
    found = run.verdict(figures(bound, hf_peft))
    assert found["reportable"] == (reason is None)
    assert [text.split()[0] for text in found["reasons"]] == ([reason] if reason else [])
    red = figures(bound, hf_peft) | {"check": {"passed": False}}
    assert not run.verdict(red)["reportable"]


def test_a_baseline_of_fewer_than_fifty_steps_is_not_reported_against(run: ModuleType) -> None:
    whole = figures(21_000.0, 1_800.0)
    for name in ("hf_peft", "sl_peft"):
        for steps, reasons in ((9, [f"{name} has 9 steps of 50"]), (50, [])):
            row = {"effective_tokens_per_s": 2_000.0, "steps": steps}
            assert run.verdict(whole | {name: row})["reasons"] == reasons


def test_of_a_baseline_measured_twice_the_faster_one_counts(run: ModuleType) -> None:
    for again, reached in ((1_600.0, False), (2_000.0, True)):
        data = figures(21_000.0, 1_700.0) | {
            run.AGAIN: {"runs": [{"effective_tokens_per_s": rate} for rate in (again, 1_500.0)]}
        }
        assert run.verdict(data)["reportable"] == reached
        assert run.ledger(data)["over_hf_peft"] == pytest.approx(10_000 / max(again, 1_700.0))
    assert run.verdict(figures(21_000.0, 1_800.0) | {run.AGAIN: {"runs": []}})["reportable"]


def test_a_smaller_plan_ends_a_measurement(run: ModuleType) -> None:
    watch = run.product.Stopwatch(32, {}, 50)
    watch.on_notice("something else")
    with pytest.raises(RuntimeError, match="did not fit"):
        watch.on_notice(f"a plan did not fit; {run.product.SMALLER_PLAN} (out of memory)")


def test_what_does_not_end_in_time_is_left_out_and_told(run: ModuleType, tmp_path: Path) -> None:
    report = run.Report(tmp_path / "r.json", limit_s=100.0)
    report.part("long", 500, lambda: pytest.fail("must not run"))
    report.part("broken", 1, lambda: 1 / 0)
    report.part("short", 1, lambda: {"x": 1})
    assert set(report.data["skipped"]) == {"long"}
    assert "ZeroDivisionError" in report.data["errors"]["broken"]
    assert '"x": 1' in (tmp_path / "r.json").read_text()
