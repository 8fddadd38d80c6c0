"""Passes of one certain micro-batch, by a shipped profile with layouts and without."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from muxtune import codec
from muxtune.commands.plan import sample_rounds
from muxtune.cost import ops
from muxtune.cost.attention import SEQUENCES
from muxtune.cost.calibration import WholeStep
from muxtune.cost.captured import CapturedCostModel
from muxtune.cost.causes import ADAPTED, FACTOR, MANY_ROWS_LOSS, SITE
from muxtune.cost.composition import pass_time_s
from muxtune.cost.residuals import PassSums
from muxtune.cost.schema import Profile, load_profile
from muxtune.cost.shapes import ModelShape, model_shape
from muxtune.cost.shipped import profile_path
from muxtune.planning.step_builder import StepBuilder, pass_load
from muxtune.types import AdapterSlot, PassLayout, PassLoad, ReplicaShape, ShapeKey
from muxtune.validation import single_ops
from tests.unit.planning_helpers import TableLengths, fresh, make_plan, one_htask

SOLO = ReplicaShape()
LLAMA_8B = model_shape("llama-3.1-8b")
SEQUENCE_ROWS = 50


def laid_out(load: PassLoad) -> PassLoad:
    """With rows that have a loss in sequences of ``SEQUENCE_ROWS``, dealt to the slots."""
    used, slots = min(int(load.loss_rows), load.shape.padded_tokens), len(load.shape.slots)
    slot_rows = tuple(used // slots + (slot < used % slots) for slot in range(slots))
    sequences = [SEQUENCE_ROWS] * (used // SEQUENCE_ROWS)
    sequences += [used % SEQUENCE_ROWS] if used % SEQUENCE_ROWS else []
    return load._replace(layout=PassLayout(slot_rows, tuple(sequences)))


def bare(load: PassLoad) -> PassLoad:
    return load._replace(layout=None)


def loads_of(profile: Profile) -> list[PassLoad]:
    return [load for step in profile.steps for load in step.loads]


def of_steps(profile: Profile, change: Callable[[PassLoad], PassLoad]) -> Profile:
    steps = [s._replace(loads=tuple(change(load) for load in s.loads)) for s in profile.steps]
    return profile._replace(steps=tuple(steps))


@pytest.fixture(scope="module")
def with_layouts() -> Profile:
    path = profile_path("h100-sxm_llama-2-7b", shipped_only=True)
    return of_steps(single_ops.with_sequences(load_profile(path)), laid_out)


@pytest.fixture(scope="module")
def knowing(with_layouts: Profile) -> CapturedCostModel:
    return CapturedCostModel(with_layouts.model_shape, with_layouts)


@pytest.fixture(scope="module")
def unknowing(with_layouts: Profile) -> CapturedCostModel:
    return CapturedCostModel(with_layouts.model_shape, of_steps(with_layouts, bare))


def lora(rank: int = 16) -> AdapterSlot:
    return AdapterSlot("lora", rank, ("all-linear",))


def load_of(slots: list[AdapterSlot], rows: int, layout: PassLayout) -> PassLoad:
    pairs = sum(n * (n + 1) / 2 for n in layout.sequence_rows)
    shape = ShapeKey(64, rows // 64, tuple(slots))
    return PassLoad(shape, pairs, float(sum(layout.slot_rows)), (), layout)


def time_s(model: CapturedCostModel, load: PassLoad, replica: ReplicaShape = SOLO) -> float:
    return float(model.pass_times_s([load], replica).value[0])


def affine_s(model: CapturedCostModel, load: PassLoad, replica: ReplicaShape = SOLO) -> float:
    return pass_time_s(model.pass_coefficients(load.shape, replica), load)


def test_loads_or_profiles_without_layouts_give_the_affine_time(
    with_layouts: Profile, knowing: CapturedCostModel, unknowing: CapturedCostModel
) -> None:
    for load in loads_of(with_layouts):
        affine = affine_s(unknowing, load)
        assert time_s(unknowing, load) == time_s(unknowing, bare(load)) == affine
        assert time_s(knowing, bare(load)) == affine, "layouts change nothing of other loads"
        assert time_s(knowing, load) != pytest.approx(affine, rel=1e-6)


def test_a_profile_whose_steps_lack_a_layout_knows_none(with_layouts: Profile) -> None:
    first, *others = with_layouts.steps
    steps = (first._replace(loads=tuple(map(bare, first.loads))), *others)
    model = CapturedCostModel(with_layouts.model_shape, with_layouts._replace(steps=steps))
    load = others[0].loads[0]
    assert time_s(model, load) == affine_s(model, load)


def test_several_gpus_recompute_and_prompts_are_affine(knowing: CapturedCostModel) -> None:
    load = laid_out(load_of([lora()] * 4, 1024, PassLayout((200,) * 4, (50,) * 16)))
    for replica in (ReplicaShape(tp=2), ReplicaShape(pp=2)):
        assert knowing._adding_of(load, replica) is None
    again = load._replace(shape=load.shape._replace(recompute=4))
    assert time_s(knowing, again) == affine_s(knowing, again)
    prompts = (*load.shape.slots[1:], AdapterSlot("prompt", 8, ()))
    prompted = load._replace(shape=load.shape._replace(slots=prompts))
    assert time_s(knowing, prompted) == affine_s(knowing, prompted)
    assert time_s(knowing, load) != affine_s(knowing, load), "nothing else keeps it from its layout"


def test_few_active_slots_cost_less_than_many(knowing: CapturedCostModel) -> None:
    sequences = (64,) * 32
    few = PassLayout((1024, 1024) + (0,) * 30, sequences)
    many = PassLayout((64,) * 32, sequences)
    few_s, many_s = (time_s(knowing, load_of([lora()] * 32, 2048, each)) for each in (few, many))
    assert few_s < 0.97 * many_s


def test_a_slot_s_rank_is_paid_by_its_own_rows(knowing: CapturedCostModel) -> None:
    slots, sequences = [lora(16), lora(64)], (64,) * 32
    low, high = (PassLayout(rows, sequences) for rows in ((1920, 128), (128, 1920)))
    assert time_s(knowing, load_of(slots, 2048, low)) < time_s(knowing, load_of(slots, 2048, high))


def test_real_rows_of_other_methods_are_charged_and_others_are_not(
    knowing: CapturedCostModel,
) -> None:
    slots = [AdapterSlot("ia3", 1, ("k_proj", "v_proj", "down_proj")), lora()]
    much, little = (PassLayout(rows, (64,) * 16) for rows in ((896, 128), (128, 896)))
    extras = [knowing._laid_out_sums(load_of(slots, 1024, each))[0] for each in (much, little)]
    assert extras[0].seconds["ia3"] > 1.2 * extras[1].seconds["ia3"]


@pytest.mark.parametrize("rows", [128, 256, 512])
def test_heads_that_share_keys_take_longer_in_passes_of_few_rows(
    with_layouts: Profile, rows: int
) -> None:
    """Fewer programs, each of which looks at as many tiles for each of its heads."""
    own_keys = LLAMA_8B._replace(num_kv_heads=LLAMA_8B.num_heads)
    layout = PassLayout((rows,), (128,) * (rows // 128))
    load = load_of([lora()], rows, layout)

    def attention_s(shape: ModelShape, each: PassLoad) -> float:
        return CapturedCostModel(shape, with_layouts).breakdown_s(each)[ops.ATTENTION]

    assert attention_s(LLAMA_8B, load) > 1.3 * attention_s(own_keys, load)
    # The planner's form, of any passes with so many rows and pairs, too.
    assert attention_s(LLAMA_8B, bare(load)) > 1.1 * attention_s(own_keys, bare(load))


def test_prefixes_attention_takes_no_longer_where_heads_share_keys(with_layouts: Profile) -> None:
    own_keys = LLAMA_8B._replace(num_kv_heads=LLAMA_8B.num_heads)
    slots, layout = (AdapterSlot("prefix", 16, ()),), PassLayout((512,), (64,) * 8)
    shared, own = (CapturedCostModel(shape, with_layouts) for shape in (LLAMA_8B, own_keys))
    prefixed_s = shared._blocks.attention_s(slots, 512.0, layout)
    assert prefixed_s == own._blocks.attention_s(slots, 512.0, layout)
    assert prefixed_s < shared._blocks.attention_s((lora(),), 512.0, layout)  # type: ignore


def test_ranks_are_paid_in_the_steps_that_they_fill(knowing: CapturedCostModel) -> None:
    """48 and 64 are padded alike, but have three and four steps."""
    layout = PassLayout((240,) * 4, (60,) * 16)

    def site_s(rank: int) -> float:
        return knowing._laid_out_sums(load_of([lora(rank)] * 4, 1024, layout))[0].seconds[SITE]

    assert site_s(32) < 0.95 * site_s(48) < 0.95 * 0.97 * site_s(64)
    assert site_s(40) == site_s(48)


def test_slots_without_rows_make_no_gradients(knowing: CapturedCostModel) -> None:
    def factor_s(*slot_rows: int) -> float:
        layout, slots = PassLayout(slot_rows, (50,) * 12), [lora()] * len(slot_rows)
        return knowing._laid_out_sums(load_of(slots, 1024, layout))[0].seconds[FACTOR]

    assert factor_s(300, 300, *[0] * 10) == pytest.approx(factor_s(300, 300), rel=1e-9)
    assert factor_s(300, 300, *[0] * 10) < 0.7 * factor_s(*[50] * 12)


def test_filler_spares_of_products_and_the_loss_until_clocks_are_highest(
    knowing: CapturedCostModel,
) -> None:
    def sums(rows: int) -> PassSums:
        layout = PassLayout((rows // 2,) * 2, (64,) * (rows // 64))
        return knowing._laid_out_sums(load_of([lora()] * 2, 3072, layout))[0]

    full, half, third, tenth = (sums(rows) for rows in (3072, 1536, 1024, 320))
    seconds = knowing.pass_sums(load_of([lora()] * 2, 3072, PassLayout((), ()))).seconds
    causes = (ops.BACKBONE, ADAPTED, ops.LOSS, MANY_ROWS_LOSS)
    limited_s = sum(seconds.get(cause, 0.0) for cause in causes)
    assert full.filler_s == 0.0
    assert half.filler_s == pytest.approx(0.5 * limited_s)
    assert tenth.filler_s == pytest.approx(third.filler_s) == pytest.approx(2 / 3 * limited_s)


def test_a_wide_vocabulary_s_loss_of_many_rows_has_the_profiled_one_s_clock(
    with_layouts: Profile,
) -> None:
    wide = CapturedCostModel(LLAMA_8B, with_layouts)
    own = CapturedCostModel(with_layouts.model_shape, with_layouts)
    load = load_of([lora()], 2048, PassLayout((2048,), (64,) * 32))
    times = [m._laid_out_sums(load)[0].seconds[MANY_ROWS_LOSS] for m in (wide, own)]
    assert times[0] / times[1] == pytest.approx(LLAMA_8B.vocab / own.model.vocab)


def test_measured_heads_keep_their_measured_rates(with_layouts: Profile) -> None:
    def untold(op: Mapping[str, Any]) -> dict[str, Any]:
        points = [{k: v for k, v in p.items() if k not in SEQUENCES} for p in op["points"]]
        return {**op, "points": points}

    older = with_layouts._replace(ops={name: untold(op) for name, op in with_layouts.ops.items()})
    own, own_older = (CapturedCostModel(p.model_shape, p) for p in (with_layouts, older))
    assert own.attention_rates(1) == own_older.attention_rates(1)
    other, other_older = (CapturedCostModel(LLAMA_8B, p) for p in (with_layouts, older))
    assert other.attention_rates(1) != other_older.attention_rates(1)


def test_the_breakdown_sums_to_the_pass(
    with_layouts: Profile, knowing: CapturedCostModel, unknowing: CapturedCostModel
) -> None:
    wider = CapturedCostModel(LLAMA_8B, with_layouts)
    for model in (knowing, unknowing, wider):
        for load in loads_of(with_layouts):
            for each in (load, bare(load)):
                parts = model.breakdown_s(each)
                assert sum(parts.values()) == pytest.approx(time_s(model, each), rel=1e-12)
                assert set(parts) <= set(ops.CATEGORIES)
                assert parts[ops.OVERHEAD] >= 0.0, "filler spares products, not overhead"
                assert parts[ops.BACKBONE] > parts.get(ops.LOSS, 0.0) > 0.0


def test_a_sampled_round_s_causes_add_up_to_its_passes(knowing: CapturedCostModel) -> None:
    lengths = TableLengths()
    lengths.add("a", [[90, 30], [64]], num_steps=4)
    lengths.add("b", [[100, 50, 20]], num_steps=4)
    plan = make_plan([one_htask({"a": 2, "b": 3}, 64)], [(0, None)])
    sample = sample_rounds(plan, lengths, knowing, 2)
    builder, cursors, total_s = StepBuilder(), fresh(plan), 0.0
    for _ in range(2):
        batches, cursors = builder.next_round(plan, cursors, lengths)
        total_s += sum(time_s(knowing, pass_load(batch, lengths)) for batch in batches)
    assert sample.time_s == pytest.approx(total_s / 2)
    assert sum(sample.breakdown_s.values()) == pytest.approx(total_s / 2)
    assert min(sample.breakdown_s.values()) > 0.0, "or shares of a round are not shares"


def test_more_real_rows_are_charged_to_adapters_and_products(knowing: CapturedCostModel) -> None:
    few, many = (
        knowing.breakdown_s(load_of([lora()] * 4, 2048, PassLayout((rows,) * 4, (64,) * 32)))
        for rows in (128, 512)
    )
    assert many[ops.ADAPTERS] > few[ops.ADAPTERS]
    assert many[ops.LOSS] == few[ops.LOSS], "the loss is of every row"
    assert many[ops.ATTENTION] == pytest.approx(few[ops.ATTENTION], rel=0.02)


def test_filler_alone_and_slots_without_the_linear(knowing: CapturedCostModel) -> None:
    empty = load_of([lora()] * 3, 512, PassLayout((0, 0, 0), ()))
    full = load_of([lora()] * 3, 512, PassLayout((170, 170, 172), (64,) * 8))
    assert 0.0 < time_s(knowing, empty) < time_s(knowing, full)
    queries = AdapterSlot("lora", 16, ("q_proj",))
    one = load_of([queries] * 3, 512, PassLayout((170, 170, 172), (64,) * 8))
    assert time_s(knowing, one) < time_s(knowing, full)


def test_sequences_beyond_the_packed_kernels_take_the_affine_attention(
    knowing: CapturedCostModel,
) -> None:
    short, long = (PassLayout((2048,), rows) for rows in ((1024, 1024), (1023, 1025)))
    assert knowing._blocks.attention_s((lora(),), 2048.0, short) is not None
    assert knowing._blocks.attention_s((lora(),), 2048.0, long) is None
    load = load_of([lora()], 2048, long)
    sums, _ = knowing._laid_out_sums(load)
    affine = knowing.pass_sums(load)
    assert sums.seconds[ops.ATTENTION] == pytest.approx(affine.seconds[ops.ATTENTION])


def test_steps_with_layouts_survive_json(with_layouts: Profile) -> None:
    for step in with_layouts.steps:
        text = json.dumps(step.to_json())
        assert WholeStep.of_json(json.loads(text)) == step
    load = with_layouts.steps[0].loads[0]
    assert "layout" not in codec.dumps(bare(load)), "older files stay as they are"
    assert codec.loads(codec.dumps(bare(load))).layout is None
