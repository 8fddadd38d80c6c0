"""Analytic and profiled cost models: composition, protocol, intervals, bad input."""

from __future__ import annotations

import copy
import json
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muxtune.cost import (
    AnalyticCostModel,
    AnalyticOptions,
    CostBook,
    ProfiledCostModel,
    device_figures,
    load_profile,
    model_shape,
    nominal_load,
    ops,
    parse_profile,
    profile_warnings,
)
from muxtune.cost.calibration import WholeStep
from muxtune.cost.composition import ComposedCostModel
from muxtune.cost.curves import Leaf, Table, fit_affine, interpolated, isotonic
from muxtune.cost.schema import content_hash
from muxtune.cost.shapes import ModelShape
from muxtune.errors import ConfigError, ProfileError
from muxtune.types import (
    AdapterSlot,
    DispatchRule,
    Estimate,
    HTask,
    HTaskTurn,
    PassLayout,
    PassLoad,
    Plan,
    Prediction,
    ReplicaShape,
    ShapeKey,
)

SOLO = ReplicaShape()
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TINY = ModelShape("tiny", 2, 32, 4, 2, 8, 64, 100)
GRID = (16.0, 64.0, 256.0)


def slot(rank: int = 8, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> AdapterSlot:
    return AdapterSlot("lora", rank, targets)


def seal(raw: dict[str, Any]) -> dict[str, Any]:
    return {**raw, "content_hash": content_hash(raw)}


def point(seconds: float, **sizes: float) -> dict[str, float]:
    return {
        **sizes, "median_s": seconds, "p05_s": 0.9 * seconds, "p95_s": 1.1 * seconds, "repeats": 5,
    }  # fmt: skip


def tiny_profile() -> dict[str, Any]:
    """Every op that TINY needs, with times that grow with sizes; made up, not measured."""
    found: dict[str, dict[str, Any]] = {}

    def add(name: str, axes: list[str], points: list[dict[str, float]]) -> None:
        found[name] = {"unit": "s", "axes": axes, "points": points}

    for op in (*ops.block_ops(TINY, 1.0, 4), *ops.edge_ops(TINY, 1.0, 4)):
        if op.category == ops.OVERHEAD:
            add(op.name, [], [point(1e-5)])
        else:
            add(op.name, ["rows"], [point(1e-5 + 1e-7 * (1 + op.flops) * n, rows=n) for n in GRID])
    for work in ops.attention_work(TINY, 4):
        lengths = (16, 64, 256)
        add(
            work.name, ["length"], [point(1e-5 + 1e-8 * n * (n + 1) / 2, length=n) for n in lengths]
        )
    for op in ops.loss_ops(TINY, 1.0, 4):
        add(op.name, ["rows"], [point(2e-5 + 3e-6 * n, rows=n) for n in GRID])
    for width in (32, 64):
        for op in ops.dropout_ops(width, 1.0, 4):
            add(op.name, ["rows"], [point(1e-6 * n, rows=n) for n in GRID])
    for op in ops.adapter_ops(TINY, slot(8, ALL), 1.0, 4):
        grid = [(rank, rows) for rank in (4.0, 16.0) for rows in GRID]
        add(op.name, ["rank", "rows"], [
            point(1e-6 + 1e-8 * rank * rows, rank=rank, rows=rows) for rank, rows in grid
        ])  # fmt: skip
    add("adamw", ["elements"], [point(1e-5 + 1e-9 * n, elements=n) for n in (64.0, 4096.0)])
    add("adapter_load", ["parameters"], [point(1e-3 + 1e-8 * n, parameters=n) for n in (1e2, 1e5)])
    return seal({
        "schema_version": 1,
        "device": {"name": "cpu", "kind": "cpu", "processor": "test", "threads": 2},
        "software": {"torch": "2.13.0"},
        "model": TINY._asdict(),
        "created": "2026-01-01T00:00:00Z",
        "ops": found,
    })  # fmt: skip


def analytic(**options: Any) -> AnalyticCostModel:
    chosen = AnalyticOptions(**options)
    return AnalyticCostModel(model_shape("llama-2-7b"), device_figures("H100"), chosen)


def profiled() -> ProfiledCostModel:
    return ProfiledCostModel(TINY, tiny_profile())


MODELS = [
    pytest.param(analytic, id="analytic"),
    pytest.param(lambda: analytic(style="eager", grouped_adapters=False), id="eager"),
    pytest.param(profiled, id="profiled"),
]


def plan_of(*htasks: HTask, replica: ReplicaShape = SOLO) -> Plan:
    nothing = Estimate(0.0, 0.0, 0.0)
    predicted = Prediction(nothing, 0.0, 0.0, nothing, {}, {}, {}, 0.0)
    return Plan(
        "i0", 0, frozenset(), (replica,), htasks,
        tuple(HTaskTurn(index, 1) for index in range(len(htasks))), DispatchRule.SINGLE, predicted,
    )  # fmt: skip


def htask(shape: ShapeKey, *ids: str) -> HTask:
    return HTask((shape,), {name: index for index, name in enumerate(ids)}, dict.fromkeys(ids, 1))


# ------------------------------------------------------------------------ the protocol's promises


@pytest.mark.parametrize("make", MODELS)
def test_pass_times_are_the_affine_form_of_the_coefficients(make) -> None:
    model = make()
    shape = ShapeKey(64, 4, (slot(), slot(16, ALL)))
    loads = [
        PassLoad(shape, 1000.0, 200.0, (0, 1)),
        PassLoad(shape, 0.0, 0.0),
        PassLoad(shape._replace(num_chunks=2), 500.0, 10.0, (1,)),
    ]
    times = model.pass_times_s(loads, SOLO)
    for index, load in enumerate(loads):
        c = model.pass_coefficients(load.shape, SOLO)
        expected = c.base_s + load.attention_pairs * c.per_pair_s
        expected += load.loss_rows * c.per_loss_row_s
        for closing in load.optimizer_slots:
            expected += c.optimizer_s[closing]
        assert times.value[index] == expected
        assert times.low[index] <= times.value[index] <= times.high[index]
        half_width = times.high[index] - times.value[index]
        assert half_width == pytest.approx(c.relative_error * expected)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_breakdown_sums_to_the_pass(make, recompute: int) -> None:
    model = make()
    load = PassLoad(ShapeKey(64, 4, (slot(), slot(16, ALL)), recompute), 1000.0, 200.0, (1,))
    breakdown = model.breakdown_s(load, SOLO)
    total = model.pass_times_s([load], SOLO).value[0]
    assert sum(breakdown.values()) == pytest.approx(total, rel=1e-12)
    assert set(breakdown) <= set(ops.CATEGORIES)
    assert min(breakdown.values()) > 0
    assert ("recompute" in breakdown) == (recompute > 0)


@pytest.mark.parametrize("make", MODELS)
def test_subgraphs_sum_to_the_pass_and_form_a_chain(make) -> None:
    model = make()
    shapes = [ShapeKey(64, 2, (slot(),)), ShapeKey(32, 4, (slot(), slot(16)))]
    plan = plan_of(htask(shapes[0], "a"), htask(shapes[1], "b", "c"))
    result = model.subgraph_times_s(plan)
    for shape, graph, times in zip(shapes, result.subgraphs, result.times_s, strict=True):
        whole = model.pass_times_s([nominal_load(shape)], SOLO).value[0]
        assert sum(times) == pytest.approx(whole, rel=1e-12)
        assert [node.index for node in graph] == list(range(len(graph)))
        assert all(node.depends_on == (node.index - 1,) for node in graph[1:])
        backward = [node.backward for node in graph]
        assert backward == sorted(backward)


def test_subgraphs_of_a_pipeline_visit_the_stages_there_and_back() -> None:
    model = analytic()
    graph = model.subgraph_times_s(
        plan_of(htask(ShapeKey(512, 2, (slot(),)), "a"), replica=ReplicaShape(tp=2, pp=2))
    ).subgraphs[0]
    compute = [(node.stage, node.backward) for node in graph if node.kind.value == "compute"]
    order = list(dict.fromkeys(compute))
    assert order == [(0, False), (1, False), (1, True), (0, True)]
    assert {node.kind.value for node in graph} == {"compute", "collective", "p2p", "optimizer"}


@pytest.mark.parametrize("make", MODELS)
def test_time_grows_with_rows_ranks_slots_and_targets(make) -> None:
    model = make()

    def base(shape: ShapeKey) -> float:
        return model.pass_coefficients(shape, SOLO).base_s

    by_rows = [base(ShapeKey(16, n, (slot(),))) for n in (1, 2, 4, 8, 16)]
    # Where launches hide all, the same numbers are added up in another order.
    assert all(few <= many * (1 + 1e-12) for few, many in pairwise(by_rows))
    if isinstance(model, AnalyticCostModel) and model.options.style == "eager":
        return  # launches hide the adapters' own work
    by_rank = [base(ShapeKey(64, 4, (slot(rank),))) for rank in (4, 8, 16)]
    assert by_rank == sorted(by_rank)
    assert by_rank[0] < by_rank[-1]
    assert base(ShapeKey(64, 4, (slot(8, ALL),))) > base(ShapeKey(64, 4, (slot(8),)))
    assert base(ShapeKey(64, 4, (slot(),))) > base(ShapeKey(64, 4, ()))


@pytest.mark.parametrize("make", MODELS)
def test_dropout_costs_time_and_memory(make) -> None:
    model = make()
    plain = nominal_load(ShapeKey(64, 4, (slot(8, ALL),)))
    dropped = nominal_load(ShapeKey(64, 4, (slot(8, ALL)._replace(dropout=True),)))
    times = [model.breakdown_s(load, SOLO)["adapters"] for load in (plain, dropped)]
    assert times[0] < times[1]
    # Of so many rows that the logits of some of them are not the peak.
    large = [load.shape._replace(num_chunks=256) for load in (plain, dropped)]
    assert model.pass_bytes(large[0]) < model.pass_bytes(large[1])


def test_analytic_is_always_extrapolated_and_the_memo_answers_the_same_object() -> None:
    model = analytic()
    shape = ShapeKey(64, 4, (slot(),))
    coefficients = model.pass_coefficients(shape, SOLO)
    assert coefficients.extrapolated
    assert model.pass_coefficients(ShapeKey(64, 4, (slot(),)), SOLO) is coefficients
    assert model.pass_times_s([nominal_load(shape)], SOLO).extrapolated.all()


def test_tensor_and_pipeline_parallel_passes_cost_communication_and_are_shorter() -> None:
    model, load = analytic(), nominal_load(ShapeKey(1024, 8, (slot(16, ALL),)))
    alone = model.pass_times_s([load], SOLO).value[0]
    for replica in (ReplicaShape(tp=2), ReplicaShape(pp=2), ReplicaShape(tp=2, pp=2)):
        assert model.pass_times_s([load], replica).value[0] < alone
        assert model.breakdown_s(load, replica)["communication"] > 0


def test_impossible_replicas_are_refused() -> None:
    shape = ShapeKey(64, 1, ())
    for replica, field in ((ReplicaShape(tp=3), "replica.tp"), (ReplicaShape(pp=33), "replica.pp")):
        with pytest.raises(ConfigError) as caught:
            analytic().pass_coefficients(shape, replica)
        assert caught.value.field == field


@pytest.mark.parametrize("make", MODELS)
def test_unknown_method_target_and_rank_are_refused(make) -> None:
    for wrong, field in (
        (AdapterSlot("magic", 8, ("q_proj",)), "adapter.method"),
        (AdapterSlot("lora", 0, ("q_proj",)), "adapter.rank"),
        (AdapterSlot("lora", 8, ("z_proj",)), "adapter.targets"),
    ):
        with pytest.raises(ConfigError) as caught:
            make().pass_coefficients(ShapeKey(64, 1, (wrong,)), SOLO)
        assert caught.value.field == field


@pytest.mark.parametrize("make", MODELS)
def test_transition_costs_new_adapters_and_shapes_only(make) -> None:
    model = make()
    shape = ShapeKey(64, 2, (slot(), slot(16)))
    first = plan_of(htask(shape, "a"))
    joined = plan_of(htask(shape, "a", "b"))
    assert model.transition_s(None, first).value > 0
    assert model.transition_s(first, first._replace(epoch=1)).value == 0
    join = model.transition_s(first, joined)
    assert join.value == pytest.approx(model.adapter_load_s(slot(16)).value)
    assert join.low <= join.value <= join.high
    assert model.transition_s(joined, first).value == 0


def test_an_adapter_smaller_than_those_measured_is_written_sooner() -> None:
    raw = tiny_profile()
    sizes = {rank: float(ops.adapter_parameters(TINY, slot(rank))) for rank in (8, 16, 32, 128)}
    points = [point(0.1 + 1e-3 * sizes[rank], parameters=sizes[rank]) for rank in (16, 32)]
    raw["ops"]["finish"] = {"unit": "s", "axes": ["parameters"], "points": points}
    model = ProfiledCostModel(TINY, parse_profile(seal(raw)))
    small, large = model.finish_s(slot(8)), model.finish_s(slot(128))
    assert small.value == pytest.approx(0.1 + 1e-3 * sizes[8]) and not small.extrapolated
    assert small.low <= small.value <= small.high
    assert large.value == pytest.approx(0.1 + 1e-3 * sizes[128]) and large.extrapolated


@pytest.mark.parametrize("make", MODELS)
def test_cost_models_survive_pickling(make) -> None:
    model, shape = make(), ShapeKey(64, 2, (slot(),))
    expected = model.pass_coefficients(shape, SOLO)
    assert pickle.loads(pickle.dumps(model)).pass_coefficients(shape, SOLO) == expected


# ------------------------------------------------------------------- formulas, by hand


def test_lora_operations_and_parameters_by_hand() -> None:
    linear = model_shape("llama-2-7b").block_linears[0]
    forward, backward = ops.lora_ops(linear, 16, 1000.0, 2)
    assert forward.flops == 2 * 1000 * 16 * (4096 + 4096)
    assert backward.flops == 2 * forward.flops
    assert ops.adapter_parameters(model_shape("llama-2-7b"), slot(16, ALL)) == 39_976_960


def test_backbone_operations_are_two_per_parameter_and_row_each_way() -> None:
    model = model_shape("llama-2-7b")
    linears = [op for op in ops.block_ops(model, 10.0, 2) if op.name.startswith("linear")]
    total = sum(op.count * op.flops for op in linears) * model.num_layers
    in_blocks = model.num_layers * sum(i * o for i, o in model.linears.values())
    assert total == 2 * 2 * 10 * in_blocks


def test_optimizer_covers_every_trained_number() -> None:
    model = model_shape("llama-2-7b")
    total = sum(op.count * op.size[0] for op in ops.optimizer_ops(model, slot(16, ALL), 32))
    assert total == ops.adapter_parameters(model, slot(16, ALL))


# --------------------------------------------------- against early measurements on one H100


def test_analytic_h100_agrees_with_the_measured_bound() -> None:
    """Frozen packed Llama-2-7B, forward and input gradient under a CUDA graph, tokens/s."""
    measured = {512: 19_987, 2048: 21_329, 8192: 21_373, 16384: 21_400}
    for tokens, rate in measured.items():
        load = nominal_load(ShapeKey(512, tokens // 512, ()))
        predicted = tokens / analytic().pass_times_s([load], SOLO).value[0]
        assert predicted == pytest.approx(rate, rel=0.15)


def test_analytic_eager_h100_agrees_with_measured_hf_peft() -> None:
    """LoRA rank 16 on seven linears, batch x length. The first and the last row set the eager
    constants; the three between them are predictions."""
    model = AnalyticCostModel(
        model_shape("llama-2-7b"), device_figures("H100"), AnalyticOptions.eager()
    )
    rates = {(8, 64): 2569, (8, 128): 4796, (8, 256): 8088}
    for (batch, length), rate in rates.items():
        load = nominal_load(ShapeKey(length, batch, (slot(16, ALL),)))
        predicted = batch * length / model.pass_times_s([load], SOLO).value[0]
        assert predicted == pytest.approx(rate, rel=0.1)


def test_eager_is_bound_by_launches_when_small() -> None:
    eager = analytic(style="eager", grouped_adapters=False)
    times = [
        eager.pass_times_s([nominal_load(ShapeKey(64, n, (slot(16, ALL),)))], SOLO).value[0]
        for n in (1, 4)
    ]
    assert times[1] < 1.1 * times[0]
    small = nominal_load(ShapeKey(64, 4, (slot(16, ALL),)))
    assert times[1] > 4 * analytic().pass_times_s([small], SOLO).value[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"gap_s": -1.0}, {"gap_s": float("nan")}, {"matmul_efficiency": 0.0},
        {"attention_efficiency": 1.5}, {"style": "magic"},
    ],
)  # fmt: skip
def test_analytic_refuses_negative_and_odd_constants(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        analytic(**wrong)


# -------------------------------------------------------------------------------- profiled


def test_profiled_reproduces_its_own_points() -> None:
    model = profiled()
    for name, op in model.profile.ops.items():
        for entry in op["points"]:
            size = tuple(float(entry[axis]) for axis in op["axes"])
            time = model.op_time(ops.Op(name, "x", False, 1, size, 0.0, 0.0, 0.0, 1))
            assert time.value_s == pytest.approx(entry["median_s"], rel=1e-12)
            assert not time.extrapolated


def test_profiled_affine_loads_are_recovered_exactly() -> None:
    """The made-up attention and loss are affine, so that the fit must find their coefficients."""
    forward, backward = profiled().attention_rates(1)
    for rates in (forward, backward):
        assert rates.per_call_s == pytest.approx(1e-5, rel=1e-6)
        assert rates.per_row_s == pytest.approx(0.0, abs=1e-12)
        assert rates.per_unit_s == pytest.approx(1e-8, rel=1e-6)
    assert profiled().loss_rates()[0].per_unit_s == pytest.approx(3e-6, rel=1e-6)


def test_profiled_pass_is_the_sum_of_its_operations() -> None:
    """Composition by hand from the profile's own numbers, at grid points."""
    model, rows = profiled(), 256
    breakdown = model.breakdown_s(PassLoad(ShapeKey(64, 4, (slot(4),)), 0.0, 0.0, (0,)), SOLO)
    adapters = 2 * 2 * 2 * (1e-6 + 1e-8 * 4 * rows)  # two layers, two targets, both directions
    assert breakdown["adapters"] == pytest.approx(adapters)
    tensors = [4 * 32, 4 * 32, 4 * 32, 4 * 16]
    assert breakdown["optimizer"] == pytest.approx(2 * sum(1e-5 + 1e-9 * n for n in tensors))
    linears = [(32, 32, 2), (32, 16, 2), (32, 64, 2), (64, 32, 1)]
    per_layer = sum(2 * n * (1e-5 + 1e-7 * (1 + 2 * i * o) * rows) for i, o, n in linears)
    embedding = 1e-5 + 1e-7 * rows
    assert breakdown["backbone"] == pytest.approx(2 * per_layer + embedding)


def test_profiled_flags_what_lies_outside_of_the_hull() -> None:
    model = profiled()
    inside = ShapeKey(64, 4, (slot(8),))
    assert not model.pass_coefficients(inside, SOLO).extrapolated
    for outside in (
        ShapeKey(64, 5, (slot(8),)),  # rows
        ShapeKey(512, 1, ()),  # rows and length
        ShapeKey(64, 4, (slot(32),)),  # rank
        ShapeKey(4, 2, ()),  # too few rows
    ):
        assert model.pass_coefficients(outside, SOLO).extrapolated
    flags = model.pass_times_s(
        [PassLoad(inside, 0.0, 100.0), PassLoad(inside, 0.0, 300.0)], SOLO
    ).extrapolated
    assert flags.tolist() == [False, True]


def test_profiled_interval_is_the_measured_spread() -> None:
    error = profiled().pass_coefficients(ShapeKey(64, 4, (slot(8),)), SOLO).relative_error
    assert error == pytest.approx(0.1, rel=0.05)


def test_missing_operation_names_it_and_the_command() -> None:
    raw = tiny_profile()
    del raw["ops"]["linear_backward.32x64"]
    model = ProfiledCostModel(TINY, seal({k: v for k, v in raw.items() if k != "content_hash"}))
    with pytest.raises(ProfileError, match=r"linear_backward\.32x64.*muxtune profile"):
        model.pass_coefficients(ShapeKey(64, 1, ()), SOLO)


# ---------------------------------------------------------------------------------- schema


def changed(path: tuple[Any, ...], value: object) -> dict[str, Any]:
    raw = copy.deepcopy(tiny_profile())
    target = raw
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    del raw["content_hash"]
    return seal(raw)


def with_steps(**changes: Any) -> dict[str, Any]:
    """One step with its load on one pass of two slots, changed."""
    layout = PassLayout((40, 20), (40, 20))
    load = nominal_load(ShapeKey(64, 1, (slot(), slot(16))))._replace(layout=layout)
    step = WholeStep("one", (load,), (0.1, 0.1, 0.1), 1000, 2).to_json()
    return changed(("steps",), [{**step, **changes}])


def with_load(**changes: Any) -> dict[str, Any]:
    (load,) = with_steps()["steps"][0]["loads"]
    return with_steps(loads=[{**load, **changes}])


POINT = ("ops", "adamw", "points", 0)
HUGE = 10**400  # JSON has such integers, floats do not


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (changed(("schema_version",), 2), "schema_version is 2"),
        (changed(("ops",), None), "section 'ops' is missing"),
        (changed((*POINT, "median_s"), -1.0), "negative or out of order"),
        (changed((*POINT, "median_s"), 0.0), "negative or out of order"),
        (changed((*POINT, "p05_s"), 1e9), "negative or out of order"),
        (changed((*POINT, "median_s"), float("nan")), "missing or odd number"),
        (changed((*POINT, "elements"), None), "missing or odd number"),
        (changed(("ops", "adamw", "unit"), "ms"), "no unit 's'"),
        (changed(("ops", "adamw", "points"), []), "no points"),
        (changed(POINT, [1.0, 2.0]), "missing or odd number"),
        (changed((*POINT, "elements"), True), "missing or odd number"),
        (changed((*POINT, "elements"), -4), "negative size"),
        (changed(("qualitty",), {"spread": 0.4}), "section 'qualitty' is not known"),
        (changed(("quality",), [0.4]), "section 'quality' is not a dict"),
        (changed(("quality",), {"spread": "wide"}), "quality.spread is 'wide'"),
        (changed(("quality",), {"interrupted": "much"}), "quality.interrupted is 'much'"),
        (changed(("quality",), {"taken_bytes": None}), "quality.taken_bytes is None"),
        (changed(("program",), {"style": "quantum"}), "program.style is 'quantum'"),
        (changed(("device", "name"), ""), "device.name is missing"),
        (changed(("device", "memory_bytes"), "80 GB"), "device.memory_bytes is '80 GB'"),
        (changed(("model", "hidden"), "64"), "profile.model"),
        (changed(("model", "hidden"), 0), "profile.model: model.hidden"),
        (changed(("model", "colour"), "red"), "profile.model.*colour"),
        (changed(("ops", "adamw", "axes"), [["elements"]]), "op 'adamw' has axes"),
        (changed(("ops", "adamw", "axes"), ["elements", "elements"]), "op 'adamw' has axes"),
        (changed(("ops", "adamw", "axes"), ["elements", "p05_s"]), "op 'adamw' has axes"),
        (changed((*POINT, "elements"), HUGE), "op 'adamw' point 0 has a missing or odd number"),
        (changed((*POINT, "p95_s"), HUGE), "op 'adamw' point 0 has a missing or odd number"),
        (changed((*POINT, "p95_s"), 1e300), "op 'adamw' point 0 has a time or size too large"),
        (changed((*POINT, "elements"), 1e300), "op 'adamw' point 0 has a time or size too large"),
        (changed((*POINT, "elements"), 4096), "op 'adamw' point 1 has the sizes of point 0"),
        (changed(("device", "kind"), "tpu"), "device.kind is 'tpu'"),
        (changed(("device", "kind"), ["gpu"]), "device.kind"),
        (changed(("device", "name"), ["cpu"]), "device.name"),
        (changed(("device", "memory_bytes"), 0), "device.memory_bytes is 0"),
        (changed(("device", "memory_bytes"), HUGE), "device.memory_bytes"),
        (changed(("model", "num_layers"), 10**9), "model.num_layers is 1000000000"),
        (changed(("model", "vocab"), HUGE), "model.vocab is too large"),
        (changed(("model", "vocab"), 0), "model.vocab is 0"),
        (changed(("model", "hidden"), 32.5), "model.hidden is 32.5"),
        (changed(("model", "name"), ["tiny"]), "model.name is .*tiny"),
        (changed(("steps",), ["one"]), "step 0 cannot be read"),
        (with_steps(colour="red"), "step 0 cannot be read.*colour"),
        (with_steps(name=None), "step 0 has no name"),
        (with_steps(repeats_s=[]), "step 0 'one' has no times"),
        (with_steps(repeats_s=[1e300]), "step 0 'one' has no times"),
        (with_steps(repeats_s=0.1), "step 0 cannot be read"),
        (with_steps(peak_bytes=None), "step 0 'one' has peak_bytes None"),
        (with_steps(peak_bytes="1 GB"), "step 0 'one' has peak_bytes '1 GB'"),
        (with_steps(num_slots=None), "step 0 'one' has num_slots None"),
        (with_steps(num_slots=1.5), "step 0 'one' has num_slots 1.5"),
        (with_steps(num_layers=-1), "step 0 'one' has num_layers -1"),
        (with_steps(loads={}), "step 0 'one' has no list of loads"),
        (with_steps(loads=[]), "step 0 'one' has no list of loads"),
        (with_steps(loads=[3]), "step 0 'one' has a load 0"),
        (with_steps(loads=[{"_": "NoSuchType"}]), "step 0 cannot be read.*NoSuchType"),
        (with_load(colour="red"), "step 0 cannot be read.*colour"),
        (with_load(attention_pairs=None), "step 0 'one' has a load 0"),
        (with_load(shape=None), "step 0 'one' has a load 0"),
        (with_load(optimizer_slots=[2]), "step 0 'one' has a load 0"),
        (with_load(shape={"_": "ShapeKey", "chunk_tokens": 0, "num_chunks": 1, "slots": []}),
         "step 0 'one' has a load 0"),
        (with_load(layout={"_": "PassLayout", "slot_rows": [1], "sequence_rows": [1]}),
         "step 0 'one' has a load 0"),
    ],
)  # fmt: skip
def test_wrong_profiles_are_refused_with_the_reason(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ProfileError, match=message) as caught:
        parse_profile(raw)
    assert "muxtune profile" in str(caught.value)


def test_what_a_profile_may_hold_is_read() -> None:
    """Two plans, captures or calls may be of one size; of a step whose memory hid in what had been
    freed before, the peak is less than nothing."""
    twice = {"unit": "s", "axes": ["rows"], "points": [point(1.0, rows=64.0)] * 2}
    for name in ("capture", "takeover", "attention_forward.4x2x8"):
        assert parse_profile(changed(("ops", name), twice)).ops[name] == twice
    hidden = parse_profile(with_steps(peak_bytes=-4096))
    assert hidden.steps[0].peak_bytes == -4096


def test_memory_that_is_not_told_is_named_where_it_is_needed() -> None:
    with pytest.raises(ProfileError, match=r"device\.memory_bytes.*muxtune profile"):
        _ = parse_profile(tiny_profile()).memory_bytes
    assert parse_profile(changed(("device", "memory_bytes"), 8e9)).memory_bytes == 8e9


@pytest.mark.parametrize("raw", [None, 3, [], {"schema_version": 1, "ops": {3: 4}}])
def test_anything_else_is_no_profile(raw: Any) -> None:
    with pytest.raises(ProfileError, match="muxtune profile"):
        parse_profile(raw)


def test_every_profile_of_the_repository_is_read() -> None:
    root = Path(__file__).resolve().parents[2]
    paths = [*root.glob("muxtune/cost/data/profiles/*.json")]
    paths += root.glob("validation/**/profile.json")
    assert len(paths) > 3
    for path in paths:
        assert load_profile(path).memory_bytes > 0


def test_altered_profile_is_refused() -> None:
    raw = tiny_profile()
    raw["ops"]["adamw"]["points"][0]["median_s"] *= 1.001
    with pytest.raises(ProfileError, match="altered"):
        parse_profile(raw)


def test_profile_with_a_hole_in_its_grid_is_refused() -> None:
    name = "adapter_lora_forward.32x32"
    points = tiny_profile()["ops"][name]["points"][:-1]
    model = ProfiledCostModel(TINY, changed(("ops", name, "points"), points))
    with pytest.raises(ProfileError, match="full grid"):
        model.pass_coefficients(ShapeKey(64, 1, (slot(),)), SOLO)


def test_profile_of_one_gpu_refuses_subgraphs_of_several() -> None:
    """Transfers were not measured: their lack is named, with what measures them."""
    model = ProfiledCostModel(TINY, parse_profile(tiny_profile()))
    plan = plan_of(htask(ShapeKey(64, 1, (slot(),)), "a"), replica=ReplicaShape(pp=2))
    with pytest.raises(ProfileError, match=r"has no op 'p2p'.*muxtune profile"):
        model.subgraph_times_s(plan)


def test_stages_on_other_hosts_transfer_at_their_link_s_speed() -> None:
    load, replica = nominal_load(ShapeKey(1024, 8, (slot(),))), ReplicaShape(pp=2)
    near, far = (
        AnalyticCostModel(
            model_shape("llama-2-7b"),
            device_figures("H100-SXM"),
            AnalyticOptions(stage_link_bytes_per_s=speed),
        ).breakdown_s(load, replica)["communication"]
        for speed in (0.0, 12.5e9)
    )
    assert far > 5 * near


def test_files_that_are_missing_cut_or_odd_are_named(tmp_path: Path) -> None:
    whole = json.dumps(tiny_profile())
    good = tmp_path / "good.json"
    good.write_text(whole)
    assert load_profile(good).model_shape == TINY
    cut, odd = tmp_path / "cut.json", tmp_path / "odd.json"
    long, deep = tmp_path / "long.json", tmp_path / "deep.json"
    cut.write_text(whole[: len(whole) // 2])
    odd.write_text("[1]")
    long.write_text(f'{{"schema_version": {"1" * 5000}}}')
    deep.write_text("[" * 100_000)
    for path, message in (
        (cut, "cut or not JSON"),
        (long, "cut or not JSON"),
        (deep, "cut or not JSON"),
        (odd, "not a profile"),
        (tmp_path / "no", "no such"),
    ):
        with pytest.raises(ProfileError, match=message) as caught:
            load_profile(path)
        assert str(path) in str(caught.value)


def test_another_machine_or_software_is_told() -> None:
    profile = parse_profile(tiny_profile())
    assert profile_warnings(profile, profile.device, profile.software) == []
    lines = profile_warnings(profile, {**profile.device, "processor": "other"}, {"torch": "2.11.0"})
    assert len(lines) == 2
    assert "processor was 'test', is 'other'" in lines[0]
    assert "torch was '2.13.0', is '2.11.0'" in lines[1]


# ---------------------------------------------------------------------------------- curves


def test_isotonic_keeps_what_is_monotone_and_pools_what_is_not() -> None:
    assert isotonic([1.0, 2.0, 2.0, 5.0]) == [1.0, 2.0, 2.0, 5.0]
    assert isotonic([1.0, 4.0, 2.0, 5.0]) == [1.0, 3.0, 3.0, 5.0]
    assert isotonic([3.0, 2.0, 1.0]) == [2.0, 2.0, 2.0]


def test_noisy_tables_are_monotone_along_every_axis() -> None:
    rng = np.random.default_rng(0)
    points = [
        ((rank, rows), Leaf(float(rank * rows * rng.uniform(0.5, 2.0)), 0.1))
        for rank in (1.0, 2.0, 4.0)
        for rows in (1.0, 2.0, 3.0, 4.0)
    ]
    table = Table.build("noisy", points)
    for rank in (1.0, 1.5, 2.0, 4.0, 8.0):
        along = [table.at((rank, rows)).value_s for rows in np.linspace(0.5, 6.0, 23)]
        assert along == sorted(along)
    for rows in (0.5, 1.0, 2.5, 4.0):
        along = [table.at((rank, rows)).value_s for rank in np.linspace(0.5, 6.0, 23)]
        assert along == sorted(along)


def test_table_is_linear_between_and_goes_on_outside() -> None:
    table = Table.build("op", [((1.0,), Leaf(1.0, 0.1)), ((3.0,), Leaf(2.0, 0.2))])
    assert table.at((2.0,)) == pytest.approx((1.5, 0.15, False))
    assert table.at((5.0,)) == pytest.approx((3.0, 0.3, True))
    assert table.at((0.5,)) == pytest.approx((1.0, 0.1, True))


def test_few_points_are_interpolated_as_numpy_does() -> None:
    xs, ys = [16.0, 32.0, 48.0, 64.0], [3.0, 1.0, 1.0, 4.0]
    for x in (0.0, 16.0, 17.0, 31.9, 32.0, 40.0, 63.0, 64.0, 90.0):
        assert interpolated(x, xs, ys) == pytest.approx(float(np.interp(x, xs, ys)), rel=1e-15)
    assert interpolated(5.0, [16.0], [3.0]) == 3.0


def test_affine_fit_never_answers_a_negative_coefficient() -> None:
    sizes = np.array([1.0, 2.0, 4.0])
    leaves = [Leaf(3.0, 0.0), Leaf(2.0, 0.0), Leaf(1.0, 0.0)]  # falls: only a constant is left
    fit = fit_affine(np.stack([np.ones(3), sizes], axis=1), leaves, 4.0)
    assert min(fit.coefficients) >= 0
    assert fit.relative_error > 0.3


# ------------------------------------------------------------------------------------ book


def test_book_prefers_a_profile_and_keeps_what_it_answered() -> None:
    wide = TINY._replace(name="wide", hidden=4 * TINY.hidden)
    models = {"other": TINY._replace(name="other"), "wide": wide}
    models["plain"] = TINY._replace(name="plain", gated_mlp=not TINY.gated_mlp)
    profiles = [parse_profile(tiny_profile())]
    strict = CostBook(profiles=profiles, models=models)
    assert isinstance(strict("other", "cpu"), AnalyticCostModel), "unless it is asked for"
    book = CostBook(profiles=profiles, models=models, similar_models=True)
    assert isinstance(book("plain", "cpu"), AnalyticCostModel), "it has other operations"
    assert isinstance(book("tiny", "cpu"), ProfiledCostModel)
    assert book("tiny", "cpu") is book("tiny", "cpu")
    assert isinstance(book("other", "cpu"), ProfiledCostModel), "extrapolated, and says so"
    assert "extrapolated from the profile of tiny" in book.note("other", "cpu")
    assert isinstance(book("wide", "cpu"), AnalyticCostModel)
    assert isinstance(book("llama-2-7b", "H100"), AnalyticCostModel)


def test_book_names_what_it_does_not_know() -> None:
    with pytest.raises(ConfigError, match="llama-2-7b"):
        CostBook()("nobody-1b", "H100")
    with pytest.raises(ConfigError, match="H100-SXM"):
        CostBook()("llama-2-7b", "abacus")


def test_book_with_eager_options_answers_slower_models() -> None:
    book = CostBook()
    shape = ShapeKey(64, 4, (slot(16, ALL),))
    eager: ComposedCostModel = book.with_options(AnalyticOptions.eager())("llama-2-7b", "H100")
    fast = book("llama-2-7b", "H100")
    assert eager.pass_coefficients(shape, SOLO).base_s > fast.pass_coefficients(shape, SOLO).base_s


def test_virtual_tokens_cost_pairs_rows_and_memory_but_no_effective_token() -> None:
    """A prefix adds pairs with every row; a prompt its rows too; neither adapts a linear."""
    model = model_shape("llama-2-7b")
    cost = AnalyticCostModel(model, device_figures("H100-SXM"))
    prefix, prompt = AdapterSlot("prefix", 20, ()), AdapterSlot("prompt", 20, ())
    bare = cost.pass_coefficients(ShapeKey(256, 8, ()))
    assert ops.prepended_pairs((prefix,), 2048) == 20 * 2048
    assert ops.prepended_pairs((prompt, prefix), 2048) == 40 * 1024 + 20 * 21 / 2
    for slot in (prefix, prompt):
        found = cost.pass_coefficients(ShapeKey(256, 8, (slot,)))
        pairs_s = ops.prepended_pairs((slot,), 2048) * bare.per_pair_s
        assert found.base_s > bare.base_s + pairs_s
        assert found.per_pair_s == bare.per_pair_s and found.per_loss_row_s == bare.per_loss_row_s
    rows = cost.pass_coefficients(ShapeKey(2068, 1, ())).base_s
    assert cost.pass_coefficients(ShapeKey(2048, 1, (prompt,))).base_s > rows
    trained = {slot: cost.memory.task_bytes(slot) for slot in (prefix, prompt)}
    assert trained == {prefix: 16 * 32 * 2 * 20 * 4096, prompt: 16 * 20 * 4096}
    assert ops.adapter_parameters(model, prefix) == 32 * 2 * 20 * 4096
    assert ops.adapter_parameters(model, prompt) == 20 * 4096
    # Logits lie where activations do in the backward, so that only these grow with the rows.
    plain, more = (
        cost.memory.pass_parts_bytes(ShapeKey(2048, 1, slots), ReplicaShape(), 0)[0]
        for slots in ((), (prompt,))
    )
    assert more == pytest.approx(plain * 2068 / 2048, rel=1e-6)
    assert cost.pass_bytes(ShapeKey(2048, 1, (prompt,))) > cost.pass_bytes(ShapeKey(2048, 1, ()))
