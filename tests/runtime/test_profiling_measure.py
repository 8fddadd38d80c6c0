"""Measuring this machine: what a profile holds, and that the cost model can live on it."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from muxtune.cost import ProfiledCostModel, load_profile, nominal_load, ops
from muxtune.cost.schema import content_hash
from muxtune.cost.shapes import ModelShape, model_shape
from muxtune.errors import ConfigError, OutputError, ProfileError
from muxtune.profiling import measure, profile_machine, profile_warnings_here, write_profile
from muxtune.profiling.bench import Bench, Case, copies_of, quiet_sweeps, sample, summarise
from muxtune.profiling.captured_ops import steadiest
from muxtune.profiling.captured_profile import op_jobs
from muxtune.profiling.exchanges import measure_exchanges
from muxtune.runtime.memory import quick_collections
from muxtune.types import AdapterSlot, ReplicaShape, ShapeKey
from muxtune.validation.records import Records

TINY = ModelShape("tiny", 2, 32, 4, 2, 8, 64, 96)
SMALL_GRID: dict[str, Any] = {
    "rows": (8, 32),
    "ranks": (2, 4),
    "lengths": (8, 16, 32),
    "max_rows": 64,
}
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def raw() -> dict[str, Any]:
    return profile_machine(TINY, 0.5, show_progress=False, **SMALL_GRID)


def test_profile_holds_every_operation_that_the_cost_model_asks_for(raw) -> None:
    model = ProfiledCostModel(TINY, raw)
    slots = (AdapterSlot("lora", 2, ALL), AdapterSlot("lora", 4, ALL, dropout=True))
    load = nominal_load(ShapeKey(16, 2, slots))
    times = model.pass_times_s([load], ReplicaShape())
    assert 0 <= times.low[0] <= times.value[0] <= times.high[0] < 10
    assert times.value[0] > 0
    assert set(model.breakdown_s(load)) == set(ops.CATEGORIES) - {"communication", "recompute"}
    assert model.adapter_load_s(slots[0]).value > 0


def test_exchanges_between_ranks_make_a_profile_one_of_several_gpus(raw) -> None:
    exchanges = measure_exchanges(2, "cpu", (1 << 12, 1 << 16))
    assert set(exchanges) == {"all_reduce.tp2", "p2p"}
    replica = ReplicaShape(1, 2)
    load = nominal_load(ShapeKey(16, 2, (AdapterSlot("lora", 2, ALL),)))
    with pytest.raises(ProfileError, match="muxtune profile"):
        ProfiledCostModel(TINY, raw).pass_times_s([load], replica)
    changed = {**raw, "ops": {**raw["ops"], **exchanges}}
    changed["content_hash"] = content_hash(changed)
    model = ProfiledCostModel(TINY, changed)
    assert model.pass_times_s([load], replica).value[0] > 0
    assert model.breakdown_s(load, replica)["communication"] > 0


def test_a_captured_profile_that_goes_on_has_the_axes_of_one_that_was_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"program": "captured", "show_progress": False, "steps": False}
    options |= {"rows": (32, 64), "slots": (1, 2), "ranks": (16,), "max_rows": 64}
    whole = profile_machine(TINY, 0.5, **options)
    monkeypatch.setattr(measure, "_adapter_loads", lambda _: 1 / 0)  # ends the first process
    with pytest.raises(ZeroDivisionError):
        profile_machine(TINY, 0.5, kept=Records(tmp_path / "parts.jsonl"), **options)
    monkeypatch.undo()
    found = profile_machine(TINY, 0.5, kept=Records(tmp_path / "parts.jsonl"), **options)
    axes, others = ({name: op["axes"] for name, op in raw["ops"].items()} for raw in (found, whole))
    assert axes["site_forward.32x32"] == ["slots", "rank", "rows"]
    assert axes["attention_forward.4x2x8"] == ["rows", "pairs"]
    both = set(axes) & set(others)  # what a budget is too short for may differ
    assert len(both) > 30 and {name: axes[name] for name in both} == {n: others[n] for n in both}


def test_ranks_need_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="torch sees 1"):
        measure_exchanges(2, "cuda")


def test_profile_describes_device_software_and_model(raw) -> None:
    assert raw["schema_version"] == 1
    assert raw["device"]["threads"] == torch.get_num_threads()
    assert raw["device"]["memory_bytes"] > 0
    # A package's own version may leave the build out, which torch tells: 2.13.0+cu130.
    assert torch.__version__.partition("+")[0] == raw["software"]["torch"].partition("+")[0]
    assert ModelShape(**raw["model"]) == TINY
    assert all(p["repeats"] >= 3 for op in raw["ops"].values() for p in op["points"])


def test_operations_are_never_a_block_or_a_step(raw) -> None:
    known = {op.name for op in ops.block_ops(TINY, 8, 4) + ops.edge_ops(TINY, 8, 4)}
    known |= {work.name for work in ops.attention_work(TINY, 4)}
    known |= {op.name for op in ops.loss_ops(TINY, 8, 4)}
    slot = AdapterSlot("lora", 2, ALL, dropout=True)
    known |= {op.name for op in ops.adapter_ops(TINY, slot, 8, 4)}
    assert set(raw["ops"]) <= known | {"adamw", "adapter_load", "join", "move"}
    assert raw["steps"], "apart from these, which no validation draws"
    assert all(step["name"].startswith("calibration ") for step in raw["steps"])


def test_written_profile_loads_again_and_an_altered_one_does_not(raw, tmp_path: Path) -> None:
    path = write_profile(raw, tmp_path / "new" / "cpu.json")
    assert load_profile(path).content_hash == raw["content_hash"]
    assert [entry.name for entry in path.parent.iterdir()] == ["cpu.json"]
    altered = json.loads(path.read_text())
    altered["device"]["threads"] += 1
    path.write_text(json.dumps(altered))
    with pytest.raises(ProfileError, match="altered"):
        load_profile(path)


def test_unwritable_output_is_named_and_leaves_nothing(raw, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        write_profile(raw, blocked / "cpu.json")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_no_warning_for_the_machine_itself(raw, tmp_path: Path) -> None:
    profile = load_profile(write_profile(raw, tmp_path / "cpu.json"))
    assert [x for x in profile_warnings_here(profile) if "busy" not in x] == []
    other = profile._replace(device={**profile.device, "processor": "another one"})
    assert "processor was 'another one'" in profile_warnings_here(other)[0]


@pytest.mark.parametrize("budget_s", [0.0, -1.0, float("nan"), float("inf")])
def test_odd_budget_is_refused(budget_s: float) -> None:
    with pytest.raises(ConfigError, match=r"^budget_s: is"):
        profile_machine(TINY, budget_s, show_progress=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.device"):
        profile_machine(TINY, 1.0, device="cuda", show_progress=False)


def test_slow_sweeps_are_dropped_whole_and_at_least_half_stay() -> None:
    rng = np.random.default_rng(0)
    times = rng.uniform(1.0, 1.02, (8, 5)) * np.array([1e-3, 1e-4, 1e-5, 1.0, 5.0])
    times[[2, 5]] *= 1.6
    assert quiet_sweeps(times).tolist() == [i not in (2, 5) for i in range(8)]
    times[:6] *= np.arange(2, 8)[:, None]
    assert quiet_sweeps(times).sum() == 4


def test_summary_is_ordered_and_counts() -> None:
    summary = summarise([3.0, 1.0, 2.0])
    assert summary["p05_s"] <= summary["median_s"] == 2.0 <= summary["p95_s"]
    assert summary["repeats"] == 3


def test_samples_run_forward_of_all_copies_before_their_backward_in_reverse() -> None:
    bench, calls = Bench(torch.device("cpu"), torch.float32), []

    def body(bench: Bench):
        mine = len(calls)
        bench.time("forward", lambda: calls.append(("f", mine)))
        yield
        bench.time("backward", lambda: calls.append(("b", mine)))

    times = sample(bench, Case({}, body, 1.0), 3)
    assert calls == [("f", 0), ("f", 1), ("f", 2), ("b", 2), ("b", 1), ("b", 0)]
    assert set(times) == {"forward", "backward"}


def test_pool_hands_out_other_memory_each_time() -> None:
    bench = Bench(torch.device("cpu"), torch.float32)
    first, second = bench.cold(64, 64), bench.cold(64, 64)
    assert first.data_ptr() != second.data_ptr()
    assert bench.fresh(8, 8).data_ptr() not in {first.data_ptr(), second.data_ptr()}
    assert copies_of(bench, Case({}, _nothing, 1e12)) == 2


def _nothing(bench: Bench):
    bench.time("nothing", lambda: None)
    yield


def test_a_point_whose_repeats_lie_apart_is_measured_again() -> None:
    disturbed, quiet, better = [20.2, 17.5, 21.9], [2.31, 2.3, 2.29], [1.0, 1.2, 1.0]
    told = iter([disturbed, quiet])
    assert steadiest(lambda: next(told)) == quiet
    told = iter([quiet, disturbed])
    assert steadiest(lambda: next(told)) == quiet and next(told) == disturbed, "once is enough"
    told = iter([disturbed, better, disturbed, quiet])
    assert steadiest(lambda: next(told)) == better and next(told) == quiet, "three times at most"


def test_collections_stay_quick_behind_inner_ones() -> None:
    class Ring:
        def __init__(self) -> None:
            self.me = self

    with quick_collections():
        with quick_collections():
            known = weakref.ref(Ring())  # garbage that only a collection finds
        assert gc.get_freeze_count() > 0, "a look through all imports takes half a second"
        assert known() is None, "what the inner one froze may be garbage by its end"
    assert gc.get_freeze_count() == 0


def test_products_with_adapters_are_measured_between_powers_of_two_too() -> None:
    jobs = op_jobs(model_shape("llama-2-7b"))
    rows = {job.arguments[2] for job in jobs if job.method == "sites"}
    assert {512, 640, 1024, 1536, 2048, 3072, 4096} <= rows
    tiny = op_jobs(model_shape("llama-2-7b"), rows=(32, 64))
    assert {job.arguments[2] for job in tiny if job.method == "sites"} == {32, 64}
