"""Gradients of A by programs, steps and waves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from muxtune.cost.captured import CapturedCostModel
from muxtune.cost.curves import Leaf
from muxtune.cost.factor_gradients import (
    COLUMNS,
    Alike,
    FactorGradient,
    Program,
    even_slots,
)
from muxtune.cost.fused_sites import fused_sites
from muxtune.cost.low_rank import Point, Products, Sizes, even_rows
from muxtune.cost.ops import BACKBONE, Op
from muxtune.cost.schema import SCHEMA_VERSION, content_hash
from muxtune.cost.shapes import ModelShape, model_shape
from muxtune.profiling.captured_ops import tiling_here, uneven_lengths
from muxtune_kernels.multi_lora import tuning

SMS = 132
LLAMA_7B, LLAMA_8B = model_shape("llama-2-7b"), model_shape("llama-3.1-8b")
O_PROJ = Sizes(4096, (4096,))


@pytest.mark.parametrize("shape", [LLAMA_7B, LLAMA_8B, model_shape("llama-2-13b")])
def test_programs_are_those_that_the_kernels_choose(shape: ModelShape) -> None:
    with tuning.counting_on(SMS):
        for site in fused_sites(shape):
            for rank in (16, 32, 64):
                for slots, rows in ((1, 128), (5, 640), (32, 4096), (48, 8192)):
                    chosen = tuning.tuning_of(
                        rows, site.in_features, site.out_features, slots, rank, 2, True
                    )
                    program = Program.of(rank * len(site.out_features))
                    assert (chosen.da_t, chosen.da_n, chosen.da_splits) == (
                        program.step_rows, COLUMNS, 1,
                    )  # fmt: skip


@pytest.mark.parametrize(("slots", "rows"), [(1, 96), (4, 1024), (7, 1344), (32, 130)])
def test_slots_have_the_rows_of_a_profile_s_points(slots: int, rows: int) -> None:
    measured = [sum(lengths) for lengths in uneven_lengths(rows, slots)]
    assert list(even_rows(slots, rows)) == measured
    most_first = [alike.rows for alike in even_slots(slots, rows) for _ in range(alike.slots)]
    assert most_first == sorted(measured, reverse=True)


@pytest.mark.parametrize("rank", [16, 32, 64])
@pytest.mark.parametrize(
    "of_slots", [[Alike(1, 4096)], [Alike(2, 533), Alike(2, 491)], [Alike(3, 300), Alike(20, 40)]]
)
def test_waves_are_as_long_as_their_first_programs(of_slots: list[Alike], rank: int) -> None:
    program, blocks = Program.of(rank), 4096 // COLUMNS
    steps = [
        -(-alike.rows // program.step_rows) for alike in of_slots for _ in range(alike.slots)
    ]  # of every slot
    in_turn = [count for count in steps for _ in range(blocks)]  # of every program
    first = in_turn[:: program.sharing * SMS]
    terms = FactorGradient(SMS, [])._terms(O_PROJ, of_slots, rank)
    assert terms[1] == len(first)
    assert terms[6] == pytest.approx(program.numbers * sum(first))
    assert terms[4] == pytest.approx(program.numbers * sum(in_turn) / SMS)


def test_a_slot_more_costs_a_wave_where_programs_no_longer_fit() -> None:
    """Of 128 programs a slot four share each multiprocessor, of which one more is left over."""
    usual = FactorGradient(SMS, [])

    def seconds(slots: int) -> float:
        rows = 64 * slots
        return usual.seconds(O_PROJ, slots, 64, rows, rows)

    more = [seconds(slots + 1) - seconds(slots) for slots in (2, 3, 4, 5)]
    assert more[2] > 1.3 * max(more[0], more[1], more[3])


def test_inputs_that_the_cache_does_not_hold_take_longer() -> None:
    """Of 25 MB: 3051 rows of 4096 numbers."""
    usual, down = FactorGradient(SMS, []), Sizes(11008, (4096,))
    of_none = usual._terms(O_PROJ, [Alike(1, 3051)], 16)
    assert (of_none[-1], usual._terms(down, [Alike(2, 500)], 16)[-1]) == (0.0, 0.0)
    assert usual._terms(down, [Alike(2, 1024)], 16)[-1] == pytest.approx(2048 * 22016e-6 - 25)


def test_speeds_are_told_from_points_and_hold_between_them() -> None:
    known = FactorGradient(SMS, [])
    factors = 1.5, 0.7, 1.3, 0.8, 1.2, 0.9, 1.1, 0.6
    known.speeds = [factor * s for factor, s in zip(factors, known.speeds, strict=True)]
    points = [
        Point(O_PROJ, slots, rank, rows, Leaf(known.seconds(O_PROJ, slots, rank, rows, rows), 0.0))
        for slots in (1, 4, 12, 32) for rank in (16, 32, 64) for rows in (128, 640, 1024, 4096)
    ]  # fmt: skip
    products = Products("x", FactorGradient(SMS, points), {"4096x4096": points}, 0.5)
    for slots, rank, rows in ((2, 32, 2464), (21, 32, 2144), (5, 64, 2912), (16, 16, 128)):
        wanted_s = known.seconds(O_PROJ, slots, rank, rows, rows)
        found = products.at("4096x4096", O_PROJ, (slots, rank, rows))
        assert found.value_s == pytest.approx(wanted_s, rel=0.02) and not found.extrapolated
    assert products.at("4096x4096", O_PROJ, (48, 16, 320)).extrapolated


def test_between_two_padded_ranks_it_lies_between_their_times() -> None:
    usual = FactorGradient(SMS, [])
    low, middle, high = (usual.seconds(O_PROJ, 8, rank, 1024, 1024) for rank in (16, 24, 32))
    assert middle == pytest.approx((low + high) / 2)


def test_half_of_what_a_point_is_off_by_is_kept() -> None:
    usual = FactorGradient(SMS, [])
    of_usual = {
        (slots, rows): usual.seconds(O_PROJ, slots, 16, rows, rows)
        for slots in (1, 4, 12) for rows in (128, 512, 1024)
    }  # fmt: skip
    points = [
        Point(O_PROJ, *(slots, 16, rows), Leaf(s * (1.21 if (slots, rows) == (4, 512) else 1), 0))
        for (slots, rows), s in of_usual.items()
    ]
    counted = FactorGradient(SMS, points)
    products = Products("x", counted, {"4096x4096": points}, 0.5)
    own_s = counted.seconds(O_PROJ, 4, 16, 512, 512)
    found_s = products.at("4096x4096", O_PROJ, (4, 16, 512)).value_s
    assert found_s**2 == pytest.approx(own_s * 1.21 * of_usual[4, 512])


def _time_of(shape: ModelShape, deterministic: bool) -> Callable[..., tuple[float, bool]]:
    """By a profile of Llama-2-7B on a device of usual speeds."""
    usual, ops = FactorGradient(SMS, []), {}
    for site in fused_sites(LLAMA_7B):
        sizes = Sizes(site.in_features, site.out_features)
        points: list[dict[str, Any]] = []
        for slots in (1, 4, 12):
            for rows in (128, 1024, 4096):
                s = usual.seconds(sizes, slots, 16, rows, rows)
                timed = dict.fromkeys(("median_s", "p05_s", "p95_s"), s)
                points.append({"slots": slots, "rank": 16, "rows": rows, **timed})
        axes = ["slots", "rank", "rows"]
        ops[f"site_factor.{site.size}"] = {"unit": "s", "axes": axes, "points": points}
    with tuning.counting_on(SMS):
        tiles = tiling_here()
    raw: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION, "device": {"name": "H100-SXM", "kind": "gpu"},
        "software": {}, "model": LLAMA_7B._asdict(), "ops": ops,
        "program": {"style": "captured", "deterministic": deterministic, "tiles": tiles},
    }  # fmt: skip
    model = CapturedCostModel(shape, {**raw, "content_hash": content_hash(raw)})

    def time_of(size: str, *sizes: float) -> tuple[float, bool]:
        op = Op(f"site_factor.{size}", BACKBONE, False, 1, sizes, 0.0, 0.0, 0.0, 1)
        time = model.op_time(op)
        return time.value_s, time.extrapolated

    return time_of


def test_another_model_s_are_counted_by_its_own_inputs_and_members() -> None:
    """Widths of outputs do not matter: three members' ranks lie beside each other."""
    own, other = _time_of(LLAMA_7B, True), _time_of(LLAMA_8B, True)
    sizes = 7.0, 16.0, 1344.0
    usual = FactorGradient(SMS, [])
    for like, site in zip(fused_sites(LLAMA_7B), fused_sites(LLAMA_8B), strict=True):
        wanted_s = usual.seconds(Sizes(site.in_features, site.out_features), 7, 16, 1344, 1344)
        found_s, extrapolated = other(site.size, *sizes)
        assert extrapolated == (site.size != like.size)
        assert found_s == pytest.approx(wanted_s, rel=0.02)
        if site.in_features == like.in_features:
            assert found_s == pytest.approx(own(like.size, *sizes)[0])


def test_the_form_that_cuts_rows_up_is_taken_as_measured() -> None:
    """Between 4 and 12 slots it is a line, on which no wave begins."""
    counted, measured = _time_of(LLAMA_7B, True), _time_of(LLAMA_7B, False)
    size = "4096x4096"
    low, middle, high = (measured(size, slots, 16.0, 1024.0)[0] for slots in (4.0, 8.0, 12.0))
    assert middle == pytest.approx((low + high) / 2)
    seven = size, 7.0, 16.0, 1344.0
    assert counted(*seven)[0] != pytest.approx(measured(*seven)[0])
