"""The memory ledger against hand counts and against measured peaks."""

from __future__ import annotations

import pytest

from muxtune.cost import AnalyticCostModel, AnalyticOptions, device_figures, model_shape
from muxtune.cost.memory import MIB, MemoryModel, MemoryOptions, memory_options, stage_layers
from muxtune.types import (
    AdapterSlot,
    DispatchRule,
    Estimate,
    HTask,
    Plan,
    Prediction,
    ReplicaShape,
    ShapeKey,
)

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SLOT = AdapterSlot("lora", 16, ALL)
LLAMA = model_shape("llama-2-7b")


def plan_of(shapes: list[ShapeKey], replica: ReplicaShape | None = None) -> Plan:
    zero = Estimate(0.0, 0.0, 0.0)
    htasks = tuple(
        HTask((shape,), {f"t{h}.{s}": s for s in range(len(shape.slots))}, {})
        for h, shape in enumerate(shapes)
    )
    return Plan(
        "i0", 0, frozenset(), (replica or ReplicaShape(),), htasks, (), DispatchRule.SINGLE,
        Prediction(zero, 0.0, 0.0, zero, {}, {}, {}, 0.0),
    )  # fmt: skip


def memory(**options) -> MemoryModel:
    return MemoryModel(LLAMA, MemoryOptions(**options))


def test_backbone_and_task_bytes_by_hand() -> None:
    assert memory().backbone_bytes() == 2 * 6_738_415_616
    assert memory().task_bytes(SLOT) == 16 * 39_976_960
    assert memory(gradient_bytes=8).task_bytes(SLOT) == 20 * 39_976_960


def test_saved_numbers_by_hand() -> None:
    d, f, heads = 4096, 11008, 32
    frozen = 2 * (d + 1) + 4 * d + heads + 3 * f
    assert memory().saved_numbers_per_row(()) == frozen
    # Inputs: normed hidden twice, attention output, MLP product; one low-rank row each linear.
    adapted = frozen + 3 * d + f + 7 * 16
    assert memory().saved_numbers_per_row((SLOT,)) == adapted
    query_only = AdapterSlot("lora", 8, ("q_proj", "k_proj"))
    assert memory().saved_numbers_per_row((query_only,)) == frozen + d + 2 * 8


def test_activations_by_hand() -> None:
    shape = ShapeKey(128, 8, ())
    kept = memory().saved_numbers_per_row(())
    working = 2 * 11008 + 2 * 4096
    expected = 2 * 1024 * (32 * kept + working + 4096)
    activations, loss = memory().pass_parts_bytes(shape, ReplicaShape(), 0)
    assert activations == expected
    assert loss == 12 * 1024 * 32000
    assert memory(loss_rows_max=256).pass_parts_bytes(shape, ReplicaShape(), 0)[1] == loss // 4


def test_staged_gradients_count_where_they_exceed_the_activations() -> None:
    many = ShapeKey(1, 1, (SLOT,) * 8)
    activations, _ = memory(gradient_bytes=8).pass_parts_bytes(many, ReplicaShape(), 0)
    assert activations == 8 * 8 * 39_976_960


def test_ledger_is_resident_plus_the_largest_pass() -> None:
    model = memory()
    shapes = [ShapeKey(128, 2, (SLOT,)), ShapeKey(128, 8, (SLOT, SLOT)), ShapeKey(64, 4, (SLOT,))]
    answer = model.ledgers(plan_of(shapes))
    slots = [slot for shape in shapes for slot in shape.slots]
    expected = model.resident_bytes(slots) + max(model.pass_bytes(shape) for shape in shapes)
    assert answer.ledgers[0].total_bytes == expected
    assert answer.peak.value == expected
    assert answer.peak.low < expected < answer.peak.high
    assert answer.peak.extrapolated


def test_memory_grows_with_tasks_rows_and_ranks_and_falls_with_recomputation() -> None:
    def peak(*shapes: ShapeKey) -> float:
        return memory().ledgers(plan_of(list(shapes))).peak.value

    by_tasks = [peak(ShapeKey(128, 8, (SLOT,) * n)) for n in (1, 2, 4, 8)]
    assert by_tasks == sorted(set(by_tasks))
    by_rows = [peak(ShapeKey(128, n, (SLOT,))) for n in (1, 2, 4, 8)]
    assert by_rows == sorted(set(by_rows))
    by_rank = [peak(ShapeKey(128, 4, (SLOT._replace(rank=r),))) for r in (4, 8, 64)]
    assert by_rank == sorted(set(by_rank))
    recomputed = [peak(ShapeKey(128, 64, (SLOT,), n)) for n in (0, 8, 16, 31)]
    assert recomputed == sorted(set(recomputed), reverse=True)
    static = memory(static_step=True)
    passes = [static.pass_bytes(ShapeKey(128, 64, (SLOT,), n)) for n in (0, 8, 16, 32)]
    assert passes == sorted(set(passes), reverse=True)
    assert passes[1] - passes[2] == pytest.approx((passes[2] - passes[3]) / 2, rel=1e-6)


def test_stages_hold_their_share_and_early_ones_more_passes_in_flight() -> None:
    replica = ReplicaShape(tp=2, pp=4)
    ledgers = memory().ledgers(plan_of([ShapeKey(128, 4, (SLOT,))], replica)).ledgers
    assert [ledger.stage for ledger in ledgers] == [0, 1, 2, 3]
    activations = [ledger.items["activations"] for ledger in ledgers]
    assert activations == sorted(activations, reverse=True)
    assert [ledger.items["loss"] > 0 for ledger in ledgers] == [False, False, False, True]
    linears = sum(i * o for i, o in LLAMA.linears.values())
    blocks = sum(ledger.items["backbone"] for ledger in ledgers)
    assert blocks >= 2 * 32 * linears // 2


def test_layers_are_spread_evenly_over_stages() -> None:
    assert stage_layers(LLAMA, 4) == (8, 8, 8, 8)
    assert stage_layers(LLAMA, 5) == (7, 7, 6, 6, 6)


def test_the_last_stage_has_fewer_layers_where_its_head_is_worth_some() -> None:
    llama3 = model_shape("llama-3.1-8b")  # the head weighs as much as 2.4 layers
    assert stage_layers(llama3, 2) == (17, 15)
    assert stage_layers(llama3, 4) == (9, 9, 8, 6)
    assert stage_layers(llama3, llama3.num_layers) == (1,) * llama3.num_layers
    assert stage_layers(model_shape("llama-2-13b"), 2) == (
        20,
        20,
    )  # half a layer: no split is better


def test_eager_ledger_agrees_with_measured_hf_peft_peaks() -> None:
    """H100, LoRA rank 16 on seven linears: 16.6, 18.9, 23.7, 33.0, 51.8 GB. The slope between the
    last two set the eager factor; the level and the first three are predictions."""
    model = AnalyticCostModel(LLAMA, device_figures("H100"), AnalyticOptions.eager())
    measured = {(4, 64): 16.6, (8, 64): 18.9, (8, 128): 23.7, (8, 256): 33.0, (16, 256): 51.8}
    for (batch, length), gigabytes in measured.items():
        shape = ShapeKey(length, batch, (SLOT,))
        total = model.backbone_bytes() + model.memory.task_bytes(SLOT) + model.pass_bytes(shape)
        assert total / 1e9 == pytest.approx(gigabytes, rel=0.05)


def test_cpu_runtime_counts_fp32_and_float64_gradient_sums() -> None:
    model = AnalyticCostModel(model_shape("smollm2-135m"), device_figures("cpu"))
    assert model.backbone_bytes() == 4 * 134_515_008
    assert model.memory.options.trained_bytes == 20
    assert model.resident_bytes(()) == 4 * 134_515_008 + 600 * MIB


@pytest.mark.parametrize(("name", "measured_gib"), [("llama-2-7b", 40.91), ("llama-3.1-8b", 44.82)])
def test_the_captured_step_is_counted_as_measured(name: str, measured_gib: float) -> None:
    """Peaks of `muxtune train` with 8 tasks on one H100 (validation/gpu_runtime)."""
    model = AnalyticCostModel(model_shape(name), device_figures("H100-SXM"))
    plan = plan_of([ShapeKey(16, 362, (SLOT,) * 8)])
    (ledger,) = model.memory_ledger_bytes(plan).ledgers
    predicted = ledger.total_bytes - ledger.items["framework"]
    assert predicted / 2**30 == pytest.approx(measured_gib, rel=0.05)


def test_the_captured_step_has_room_in_every_linear_that_reads_the_same_input() -> None:
    queries = AdapterSlot("lora", 16, ("q_proj",))
    fused = AdapterSlot("lora", 16, ("q_proj", "k_proj", "v_proj"))
    captured, eager = memory(static_step=True), memory()
    assert captured.task_bytes(queries) == captured.task_bytes(fused) == eager.task_bytes(fused)
    assert eager.task_bytes(queries) < eager.task_bytes(fused)
    other = AdapterSlot("dora", 8, ("q_proj",), True)
    shape = ShapeKey(64, 32, (queries, other))
    assert captured.pass_bytes(shape) == eager.pass_bytes(shape), "such a pass runs eagerly"


def test_the_captured_step_of_mixed_methods_is_near_what_was_measured() -> None:
    """One H100, Llama-2-7B, two tasks of each method (validation/step_throughput). When it was
    measured, IA3 on k and on v each kept a copy of q, k and v; since then they share one."""
    model = AnalyticCostModel(LLAMA, device_figures("H100"))
    lora = AdapterSlot("lora", 16, ("all-linear",))
    ia3 = AdapterSlot("ia3", 1, ("k_proj", "v_proj", "down_proj"))
    bottleneck = AdapterSlot("bottleneck", 16, ("o_proj", "down_proj"))
    prefix = AdapterSlot("prefix", 16, ())
    rows = 5792
    shape = ShapeKey(16, rows // 16, (lora, ia3, bottleneck, prefix) * 2)
    (ledger,) = model.memory_ledger_bytes(plan_of([shape])).ledgers
    predicted = ledger.total_bytes - ledger.items["framework"]
    second_copy = rows * LLAMA.num_layers * 3 * 4096 * 2
    assert (predicted + second_copy) / 2**30 == pytest.approx(54.79, rel=0.05)


def test_the_captured_loss_holds_one_tensor_of_logits() -> None:
    """2 bytes a logit, in whose place its gradient comes; they count where a block takes less."""
    llama, wide = model_shape("llama-2-7b"), model_shape("llama-2-7b")._replace(vocab=128_256)
    shape = ShapeKey(64, 16, (AdapterSlot("lora", 16, ("q_proj",)),))
    small, large = (
        MemoryModel(model, memory_options(model, "gpu")).pass_bytes(shape)
        for model in (llama, wide)
    )
    assert 0 <= large - small <= 2 * 1024 * 128_256
