"""Products by the waves of their tiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from muxtune.cost.analytic import AnalyticCostModel, AnalyticOptions
from muxtune.cost.book import CostBook
from muxtune.cost.captured import CapturedCostModel
from muxtune.cost.curves import Grid, Leaf, smoothed
from muxtune.cost.fused_sites import fused_sites
from muxtune.cost.low_rank import Backward, Counts, Forward, Met, Point, Products, Sizes, Use
from muxtune.cost.meeting import HELD_UP
from muxtune.cost.ops import BACKBONE, Op
from muxtune.cost.schema import SCHEMA_VERSION, content_hash, load_profile, parse_profile
from muxtune.cost.shapes import ModelShape, model_shape
from muxtune.cost.shipped import profile_path
from muxtune.cost.tiles import HALF_WAVE, Tiling, library_waste
from muxtune.errors import ProfileError
from muxtune.profiling.captured_ops import tiling_here
from muxtune.profiling.step_cases import StepCase, StepTask, plan_of
from muxtune.types import ReplicaShape
from muxtune_kernels.multi_lora import tuning

LLAMA_7B, LLAMA_8B = model_shape("llama-2-7b"), model_shape("llama-3.1-8b")


@pytest.fixture
def tiling(monkeypatch: pytest.MonkeyPatch) -> Tiling:
    monkeypatch.setattr(tuning, "num_sms", lambda: 132)
    return Tiling.of_json(tiling_here())


def test_tiles_are_those_that_the_kernels_choose(tiling: Tiling) -> None:
    for shape in (LLAMA_7B, LLAMA_8B, model_shape("llama-2-13b")):
        for site in fused_sites(shape):
            for widths in (site.out_features, (site.in_features,)):
                for rows in range(64, 9000, 96):
                    chosen = tuning.gemm_blocks(rows, widths)
                    best = tiling.best(rows, widths)
                    assert chosen is not None and (chosen.t, chosen.n) == best[:2]


def test_a_wave_more_takes_longer_and_a_row_more_mostly_not(tiling: Tiling) -> None:
    # 16 columns of tiles: 8 rows of them are 128 tiles, and one wave of 132.
    assert tiling.units(1024, (4096,), 1) == tiling.units(1000, (4096,), 1)
    assert tiling.units(1056, (4096,), 1) > 1.3 * tiling.units(1024, (4096,), 1)


def test_waves_with_idle_multiprocessors_are_faster_the_only_one_most(tiling: Tiling) -> None:
    full, five_eighths = (tiling.units(rows, (4096,), 1) for rows in (1024, 640))
    assert tiling.best(640, (4096,)) == tiling.best(1024, (4096,)), "the same tiles, fewer of them"
    assert 0.6 * full <= five_eighths < 0.75 * full
    # 8.5 tiles of rows: a wave of 132, and one of 12 that is computed in halves.
    waves = tiling._cost(tiling.best(1088, (4096,)), 1088, 4096)
    assert full < 0.8 * waves < tiling.units(1088, (4096,), 1) < 0.95 * waves


def test_slots_that_meet_in_a_tile_are_counted() -> None:
    # Of 33 rows and 53 in turn: 128 rows hold parts of five at most, read three times.
    assert Met.of(12, 516, [516], 128).most_pairs == 3
    assert Met.of(1, 512, [512], 128) == (0.6, 0, 1), "a slot that has every tile to itself"
    # With filler behind it, its last tile is no longer its own, and the others are nobody's.
    assert Met.of(1, 512, [200], 128) == (1, 0.25, 0.25)
    assert (
        Met.of(32, 512, [512], 128).most_pairs == 4 and Met.of(32, 512, [512], 64).most_pairs == 2
    )
    assert Met.of(12, 1024, [1023], 128).most_pairs < Met.typical(12, 1024, 128).most_pairs


def _met_row_by_row(slots: int, rows: int, used: int, tile_rows: int) -> Met:
    share = max(used, slots) // slots
    uneven = min(21, share // 4)
    sizes = [share + (uneven if slot % 2 else -uneven) for slot in range(slots)]
    if slots % 2:
        sizes[-1] = share
    of_row = [slot for slot, size in enumerate(sizes) for _ in range(size)][:rows]
    of_row += [slots] * (rows - len(of_row))  # filler
    pairs, alone, starts = [], 0, range(0, rows, tile_rows)
    for tile in (of_row[start : start + tile_rows] for start in starts):
        if tile[0] == tile[-1] < slots:
            alone += 1
        elif tile[0] < slots:
            pairs.append((min(tile[-1], slots - 1) - tile[0]) // 2 + 1)
    tiles = len(starts)
    return Met(max([0.6, *map(float, pairs)]), sum(pairs) / tiles, alone / tiles)


@pytest.mark.parametrize("tile_rows", [64, 128])
def test_slots_meet_as_their_rows_say(tile_rows: int) -> None:
    for slots in (1, 2, 3, 7, 12, 33, 200):
        for rows in (1, 63, 128, 130, 516, 1024, 3000):
            for used in (1, rows // 3, rows - 1, rows):
                counted = Met.of(slots, rows, [used], tile_rows)
                assert counted == _met_row_by_row(slots, rows, used, tile_rows), (slots, rows, used)


def test_who_makes_h_is_waited_for_where_nobody_is_free(tiling: Tiling) -> None:
    # 1,024 rows are 128 tiles: four of 132 are free. Eight tiles of rows need eight to make h.
    site, usual = Sizes(4096, (4096,)), Forward(Counts(tiling), [])
    full, half = (usual.counts.forward(site, 2, 16, 1024, used) for used in (1024, 500))
    assert (full.in_turn, half.in_turn) == (1, 0)
    made_s, tile_s = usual._parts(full, 16)
    ends_s = usual.seconds(site, 2, 16, 1024, 1024) - made_s - tile_s
    assert 0 < ends_s < 0.5 * tile_s
    assert usual.seconds(site, 2, 16, 1024, 500) < max(made_s, tile_s) + 1.1 * ends_s


def test_a_launch_tells_waves_and_who_is_free(tiling: Tiling) -> None:
    half_tail, one, full = (tiling.launch(rows, (4096,)) for rows in (1088, 640, 1024))
    assert (half_tail.count, half_tail.free) == (144, 132 - 24)
    assert half_tail.waves == pytest.approx(1 + HALF_WAVE)
    assert (one.waves, one.free, one.busy) == (1, 52, pytest.approx(80 / 132))
    assert (full.waves, full.free) == (1, 4)


def test_speeds_are_told_from_points_and_hold_between_them(tiling: Tiling) -> None:
    """Of a device of known speeds: what is measured at a few sizes tells the others."""
    site, counts = Sizes(4096, (4096,)), Counts(tiling)
    known = Forward(counts, [])
    known.speeds = [1.4 * speed for speed in known.speeds]
    points = [
        Point(site, slots, rank, rows, Leaf(known.seconds(site, slots, rank, rows, rows), 0.0))
        for slots in (1, 4, 12, 32) for rank in (16, 32, 64) for rows in (128, 512, 1024, 4096)
    ]  # fmt: skip
    products = Products("x", Forward(counts, points), {"4096x4096": points})
    for slots, rank, rows in ((28, 16, 320), (17, 32, 544), (9, 64, 992), (2, 16, 704)):
        found = products.at("4096x4096", site, (slots, rank, rows))
        wanted_s = known.seconds(site, slots, rank, rows, rows)
        assert found.value_s == pytest.approx(wanted_s, rel=0.05) and not found.extrapolated
    assert products.at("4096x4096", site, (48, 16, 320)).extrapolated
    # 28 slots of 11 rows: a tile of 128 rows, of which there are three, holds twelve of them.
    few, many = (products.at("4096x4096", site, (slots, 16, 320)).value_s for slots in (2, 28))
    assert many > 3 * few


def test_ratios_of_many_rows_are_means_of_those_around(tiling: Tiling) -> None:
    """One point of 48 was measured at a lower clock: of few rows it is believed."""
    site, counts = Sizes(4096, (4096,)), Counts(tiling)
    known = Forward(counts, [])

    def off_by(slow_rows: int) -> float:
        points = []
        for slots in (1, 4, 12, 32):
            for rank in (16, 32, 64):
                for rows in (256, 512, 2048, 3072):
                    seconds = known.seconds(site, slots, rank, rows, rows)
                    slow = (slots, rank, rows) == (4, 32, slow_rows)
                    leaf = Leaf(seconds * (1.06 if slow else 1.0), 0.0)
                    points.append(Point(site, slots, rank, rows, leaf))
        products = Products("x", Forward(counts, points), {"4096x4096": points})
        found_s = products.at("4096x4096", site, (4, 32, slow_rows)).value_s
        return found_s / known.seconds(site, 4, 32, slow_rows, slow_rows) - 1.0

    assert off_by(512) == pytest.approx(0.06)
    assert 0.01 < off_by(2048) < 0.03


def _profile(tiling: Tiling) -> dict[str, Any]:
    """Of a device whose products are what is usual."""
    counts = Counts(tiling)
    usual = Forward(counts, []), Backward(counts, [])

    def points(of_site: Any, backward: bool) -> list[dict[str, float]]:
        found = []
        for rows in (128, 512, 2048, 8192):
            sizes = Sizes(of_site.in_features, of_site.out_features)
            seconds = usual[backward].seconds(sizes, 1, 16, rows, rows)
            found.append(
                {
                    "slots": 1,
                    "rank": 16,
                    "rows": rows,
                    **dict.fromkeys(("median_s", "p05_s", "p95_s"), seconds),
                }
            )
        return found

    ops = {
        f"site_{side}.{site.size}": {
            "unit": "s", "axes": ["slots", "rank", "rows"],
            "points": points(site, side == "backward"),
        }
        for site in fused_sites(LLAMA_7B)
        for side in ("forward", "backward")
    }  # fmt: skip
    raw = {
        "schema_version": SCHEMA_VERSION, "device": {"name": "H100-SXM", "kind": "gpu"},
        "software": {}, "model": LLAMA_7B._asdict(), "ops": ops,
        "program": {"style": "captured", "tiles": _raw(tiling)},
    }  # fmt: skip
    return {**raw, "content_hash": content_hash(raw)}


def _raw(tiling: Tiling) -> dict[str, Any]:
    return tiling._asdict() | {"tiles": [list(tile) for tile in tiling.tiles]}


@pytest.mark.parametrize("shape", [LLAMA_7B, LLAMA_8B], ids=lambda shape: shape.name)
def test_products_of_any_rows_and_width_come_out(tiling: Tiling, shape: ModelShape) -> None:
    model = CapturedCostModel(shape, _profile(tiling))
    for site in fused_sites(shape):
        for rows in (160, 1056, 2080, 3104, 4128):
            op = Op(f"site_forward.{site.size}", BACKBONE, False, 1, (1, 16, rows), 0, 0, 0, 1)
            sizes = Sizes(site.in_features, site.out_features)
            usual_s = Forward(Counts(tiling), []).seconds(sizes, 1, 16, rows, rows)
            assert model.op_time(op).value_s == pytest.approx(usual_s, rel=0.02)


def test_a_grid_is_linear_between_its_points_and_says_where_it_ends() -> None:
    def plane(a: float, b: float) -> float:
        return 7.0 - 2.0 * a + 3.0 * b + a * b

    found = {(a, b): Leaf(plane(a, b), 0.5) for a in (1.0, 4.0) for b in (16.0, 32.0, 64.0)}
    grid = Grid.of("x", found)
    assert grid.at((2.0, 40.0)) == pytest.approx((plane(2.0, 40.0), 0.5, False))
    assert grid.at((6.0, 64.0)) == pytest.approx((plane(6.0, 64.0), 0.5 * (5 + 2) / 3, True))
    assert grid.at((0.5, 16.0)) == pytest.approx((plane(1.0, 16.0), 0.5, True))
    with pytest.raises(ProfileError, match="full grid"):
        Grid.of("x", {(1.0, 1.0): Leaf(1, 0), (2.0, 2.0): Leaf(1, 0)})


def test_a_wider_model_takes_its_own_waves_and_the_ratio_of_its_part(tiling: Tiling) -> None:
    raw = _profile(tiling)
    like, site = fused_sites(LLAMA_7B)[3], fused_sites(LLAMA_8B)[3]
    for point in raw["ops"][f"site_forward.{like.size}"]["points"]:
        for name in ("median_s", "p05_s", "p95_s"):
            point[name] *= 1.1  # of one of eight: no speed explains it
    model = CapturedCostModel(LLAMA_8B, {**raw, "content_hash": content_hash(raw)})
    op = Op(f"site_forward.{site.size}", BACKBONE, False, 1, (1, 16, 2048), 0, 0, 0, 1)
    sizes = Sizes(site.in_features, site.out_features)
    usual_s = Forward(Counts(tiling), []).seconds(sizes, 1, 16, 2048, 2048)
    found = model.op_time(op)
    assert found.extrapolated and found.value_s == pytest.approx(1.1 * usual_s, rel=0.03)


def test_slots_of_mixed_ranks_pay_between_their_mean_and_their_largest(tiling: Tiling) -> None:
    raw = _profile(tiling)
    size = fused_sites(LLAMA_7B)[0].size

    def point(slots: int, rank: int, rows: int, seconds: float) -> dict[str, float]:
        times = dict.fromkeys(("median_s", "p05_s", "p95_s"), seconds * 1e-3)
        return {"slots": slots, "rank": rank, "rows": rows, **times}

    grid = [point(s, k, t, k) for s in (1, 8) for k in (16, 32, 64) for t in (128, 2048)]
    axes = {"unit": "s", "axes": ["slots", "rank", "rows"]}
    raw["ops"] |= {f"site_forward.{size}": {**axes, "points": grid}}
    plain = CapturedCostModel(LLAMA_7B, {**raw, "content_hash": content_hash(raw)})
    assert plain._slots.rank_paid(f"forward.{size}", (16, 32, 64, 64)) == 64, (
        "nothing is known of it"
    )
    # Half of 16, half of 64: a quarter of the way from the mean, 40, to 64.
    mean_s, most_s = (plain._time(f"site_forward.{size}", (8, k, 2048)).value_s for k in (40, 64))
    quarter = point(8, 64, 2048, 1e3 * (mean_s + (most_s - mean_s) / 4))
    raw["ops"] |= {f"mixed_forward.{size}": {**axes, "points": [quarter]}}
    model = CapturedCostModel(LLAMA_7B, {**raw, "content_hash": content_hash(raw)})
    assert model._slots.rank_paid(f"forward.{size}", (16, 32, 64, 64)) == pytest.approx(44 + 20 / 4)
    assert model._slots.rank_paid(f"forward.{size}", (32, 32)) == 32


def test_rows_of_filler_spare_what_was_measured_of_them(tiling: Tiling) -> None:
    raw = _profile(tiling)
    site = fused_sites(LLAMA_7B)[0]
    name = f"forward.{site.size}"
    whole = CapturedCostModel(LLAMA_7B, {**raw, "content_hash": content_hash(raw)})
    assert whole._slots.row_s(name, 16) == 0, "nothing is known of it"
    seconds = raw["ops"][f"site_{name}"]["points"][2]["median_s"]
    half = {"slots": 1, "rank": 16, "rows": 2048}
    half |= dict.fromkeys(("median_s", "p05_s", "p95_s"), 0.9 * seconds)
    axes = ["slots", "rank", "rows"]
    raw["ops"] |= {f"part_{name}": {"unit": "s", "axes": axes, "points": [half]}}
    model = CapturedCostModel(LLAMA_7B, {**raw, "content_hash": content_hash(raw)})
    assert model._slots.row_s(name, 16) == pytest.approx(0.1 * seconds / 1024)
    wider = CapturedCostModel(LLAMA_8B, {**raw, "content_hash": content_hash(raw)})
    other = fused_sites(LLAMA_8B)[0]
    op = Op(f"site_forward.{other.size}", BACKBONE, False, 1, (1, 16, 2048), 0, 0, 0, 1)
    own_s = wider.op_time(op).value_s
    assert own_s != pytest.approx(seconds)
    spared_s = wider._slots.row_s(f"forward.{other.size}", 16)
    assert spared_s == pytest.approx(0.1 * own_s / 1024), "the same share of its own time"


def test_eager_baselines_are_not_those_of_captured_steps(tiling: Tiling) -> None:
    raw = _profile(tiling)
    profile = parse_profile({**raw, "content_hash": content_hash(raw)})
    book = CostBook(profiles=[profile])
    assert isinstance(book("llama-2-7b", "H100-SXM"), CapturedCostModel)
    eager = book.with_options(AnalyticOptions.eager())
    assert isinstance(eager("llama-2-7b", "H100-SXM"), AnalyticCostModel)
    assert isinstance(
        book.with_options(AnalyticOptions())("llama-2-7b", "H100-SXM"), CapturedCostModel
    )


def _timed(**seconds_of: float) -> dict[str, Any]:
    return {**dict.fromkeys(("median_s", "p05_s", "p95_s"), seconds_of.pop("s")), **seconds_of}


def test_attention_alone_follows_how_far_rows_look_back(tiling: Tiling) -> None:
    """Short sequences and long ones both take longer than those between."""
    raw, name = _profile(tiling), "attention_forward.32x32x128"
    points = [
        _timed(s=rows * per_row * 1e-9, rows=rows, pairs=rows * back)
        for rows in (512, 4096)
        for back, per_row in ((8, 40), (32, 20), (128, 30))
    ]
    raw["ops"] |= {name: {"unit": "s", "axes": ["rows", "pairs"], "points": points}}
    model = CapturedCostModel(LLAMA_7B, {**raw, "content_hash": content_hash(raw)})
    for back, per_row in ((8, 40), (16, 30), (32, 20), (64, 25), (128, 30), (500, 30)):
        found = model.attention_time(name, 1000, 1000 * back)
        assert found.value_s == pytest.approx(1000 * per_row * 1e-9) and not found.extrapolated
    assert model.attention_time(name, 8192, 8192 * 32).extrapolated


def _seconds_of(raw: dict[str, Any], shape: ModelShape = LLAMA_7B) -> Callable[..., float]:
    model = CapturedCostModel(shape, {**raw, "content_hash": content_hash(raw)})
    return lambda name, *size: (
        1e9 * model.op_time(Op(name, BACKBONE, False, 1, size, 0.0, 0.0, 0.0, 1)).value_s
    )


def test_logits_take_at_least_what_was_measured_of_their_last_chunk(tiling: Tiling) -> None:
    raw, name = _profile(tiling), "full_loss.4096x32000"
    points = [_timed(s=rows * 1e-9, rows=rows) for rows in (128, 1056, 2048, 4096)]
    raw["ops"] |= {name: {"unit": "s", "axes": ["rows"], "points": points}}
    seconds = _seconds_of(raw)
    assert seconds(name, 700.0) == pytest.approx(700)
    assert seconds(name, 1030.0) == pytest.approx(1056)  # between two chunks there is a step
    assert seconds(name, 1500.0) == pytest.approx(1500)
    assert seconds(name, 2049.0) == pytest.approx(3072)  # of a chunk that was not measured: whole


def test_a_large_vocabulary_takes_what_was_measured_of_one(tiling: Tiling) -> None:
    raw = _profile(tiling)
    for vocabulary, per_row in ((32000, 1e-9), (128000, 6e-9)):
        points = [_timed(s=rows * per_row, rows=rows) for rows in (128, 1024)]
        op = {"unit": "s", "axes": ["rows"], "points": points}
        raw["ops"] |= {f"full_loss.4096x{vocabulary}": op}
    assert _seconds_of(raw)("full_loss.4096x32000", 512.0) == pytest.approx(512)
    large = _seconds_of(raw, LLAMA_8B)("full_loss.4096x128256", 512.0)
    assert large == pytest.approx(512 * 6 * 128256 / 128000)


def _with_extras(raw: dict[str, Any], half_s: float = 0.0) -> dict[str, Any]:
    """IA3 takes 100 ns of launches, and as many more as rows beyond 256."""
    name = "ia3_forward.4096"
    points = [_timed(s=(100 + rows - 256) * 1e-9, size=12288, rows=rows) for rows in (256, 1024)]
    ops = {f"extra_{name}": {"unit": "s", "axes": ["size", "rows"], "points": points}}
    if half_s:
        half = [_timed(s=half_s, size=12288, rows=1024)]
        ops[f"half_{name}"] = {"unit": "s", "axes": ["size", "rows"], "points": half}
    return {**raw, "ops": raw["ops"] | ops}


def test_launches_of_other_methods_do_not_grow_with_the_width(tiling: Tiling) -> None:
    raw, wide = _with_extras(_profile(tiling)), LLAMA_7B._replace(hidden=5120)
    seconds, wider = _seconds_of(raw), _seconds_of(raw, wide)
    assert seconds("extra_ia3_forward.4096", 12288.0, 1024.0) == pytest.approx(868)
    assert seconds("extra_ia3_forward.4096", 24576.0, 1024.0) == pytest.approx(100 + 2 * 768)
    assert wider("extra_ia3_forward.5120", 24576.0, 1024.0) == pytest.approx(100 + 2 * 768)
    assert wider("extra_ia3_forward.5120", 24576.0, 128.0) == pytest.approx(100)


@pytest.mark.parametrize(("half_s", "spared_ns"), [(0.0, 1.0), (868e-9, 0.0), (612e-9, 0.5)])
def test_rows_of_others_spare_what_was_measured_where_half_were(
    tiling: Tiling, half_s: float, spared_ns: float
) -> None:
    raw = _with_extras(_profile(tiling), half_s)
    model = CapturedCostModel(LLAMA_7B, {**raw, "content_hash": content_hash(raw)})
    found_s = model._extras.row_s("extra_ia3_forward.4096", 12288.0)
    assert 1e9 * found_s == pytest.approx(spared_ns, abs=1e-6)


def test_a_larger_pass_has_all_captured_anew(tiling: Tiling) -> None:
    model = CapturedCostModel(LLAMA_7B, _profile(tiling))
    small, same, large = (
        plan_of([StepCase("", LLAMA_7B, (StepTask(),), ((0,),), 64, rows)._htask([0])])
        for rows in (512, 512, 1024)
    )
    assert model.captures_anew(small, large)
    assert not model.captures_anew(large, small) and not model.captures_anew(small, same)
    both = plan_of([*small.htasks, *large.htasks])
    one_s = model.capture_s(small.htasks[0].shapes[0], ReplicaShape()).value
    known = model.transition_s(both, small).value
    assert model.transition_s(small, both).value - known >= 2 * one_s > 0


def test_what_was_measured_of_a_linear_may_fall_with_rows_but_not_of_another(
    tiling: Tiling,
) -> None:
    raw, name = _profile(tiling), "frozen_forward.4096x4096"
    points = [_timed(s=s * 1e-9, rows=rows) for rows, s in ((128, 100), (256, 400), (384, 300))]
    raw["ops"] |= {name: {"unit": "s", "axes": ["rows"], "points": points}}
    seconds = _seconds_of(raw)
    assert [seconds(name, rows) for rows in (192.0, 256.0, 320.0, 384.0)] == pytest.approx(
        [250, 400, 350, 300]
    )
    # Monotone but for its own waves: the mean of the last two, of a quarter of the work.
    narrow = _seconds_of(raw, LLAMA_7B._replace(hidden=2048, num_heads=16, num_kv_heads=16))
    for rows in (256, 320):
        own, like = (
            library_waste(rows, columns, tiling.num_multiprocessors) for columns in (2048, 4096)
        )
        found = narrow("frozen_forward.2048x2048", float(rows))
        assert found == pytest.approx(350 / 4 * own / like)


def test_products_of_many_rows_are_drawn_to_their_neighbours(tiling: Tiling) -> None:
    raw, name = _profile(tiling), "frozen_forward.4096x4096"

    def predicted(odd: float) -> float:
        points = [
            _timed(s=rows * 1e-9 * (odd if rows == 2048 else 1.0), rows=rows)
            for rows in (256, 512, 1024, 1536, 1792, 2048, 2304, 2560, 3072, 4096)
        ]
        raw["ops"] |= {name: {"unit": "s", "axes": ["rows"], "points": points}}
        return _seconds_of(raw)(name, 2048.0) / 2048

    assert predicted(1.0) == pytest.approx(1.0), "what follows a line stays"
    assert 1.02 < predicted(1.1) < 1.06


def test_products_of_few_rows_stay_as_they_were_measured() -> None:
    found = {
        rows: Leaf(rows * (1.2 if rows == 256.0 else 1.0), 0.5) for rows in (128.0, 256.0, 384.0)
    }
    assert smoothed(found, 512.0, 0.15) == found


def test_factors_gradients_may_fall_with_the_rank_and_grow_beyond_what_was_measured(
    tiling: Tiling,
) -> None:
    """Kernels of another padded rank are others."""
    raw, name = _profile(tiling), "site_factor.4096x4096"
    of_rank = {16: 30.0, 32: 42.0, 64: 36.0}
    points = [
        _timed(s=(time + rows / 100 + slots) * 1e-9, slots=slots, rank=rank, rows=rows)
        for slots in (1, 4)
        for rank, time in of_rank.items()
        for rows in (128, 1024)
    ]
    raw["ops"] |= {name: {"unit": "s", "axes": ["slots", "rank", "rows"], "points": points}}
    seconds = _seconds_of(raw)
    assert seconds(name, 2.0, 32.0, 576.0) == pytest.approx(42 + 5.76 + 2)
    assert seconds(name, 2.0, 64.0, 576.0) == pytest.approx(36 + 5.76 + 2)
    assert seconds(name, 4.0, 128.0, 1024.0) >= seconds(name, 4.0, 64.0, 1024.0)
    assert seconds(name, 4.0, 64.0, 2048.0) > 1.1 * seconds(name, 4.0, 64.0, 1024.0)


def test_a_tile_without_evidence_is_as_fast_as_the_kernels_count_on(tiling: Tiling) -> None:
    for fitted in (Forward(Counts(tiling), []), Backward(Counts(tiling), [])):
        speeds_s = fitted.speeds[: len(tiling.tiles)]
        of_full = [s * tile.efficiency for s, tile in zip(speeds_s, tiling.tiles, strict=True)]
        assert of_full == pytest.approx([of_full[0]] * len(of_full))
        assert speeds_s[2] > 1.4 * speeds_s[0], "64 x 128 over 128 x 256, for the same work"


def test_tiles_of_waves_with_idle_multiprocessors_take_less(tiling: Tiling) -> None:
    counts, down = Counts(tiling), Sizes(4096, (4096,))
    # Of 128 x 256 tiles: one wave of 80, one of 128, 12 more than a wave, 124 more than one.
    idle, full, begun, two = (
        counts.backward(down, 1, 16, rows, rows) for rows in (640, 1024, 1088, 2048)
    )
    assert {item.tiles.kind for item in (idle, full, begun, two)} == {0}
    of_all = 128 * 256 * 4096 / 1e9
    assert idle.tiles.work < 0.86 * of_all < 0.95 * of_all < full.tiles.work
    assert 0.85 * of_all < begun.tiles.work < 0.95 * of_all < 0.98 * of_all < two.tiles.work


def test_measured_products_end_with_the_multiprocessor_that_has_most_steps(tiling: Tiling) -> None:
    # Four slots of 491, 533, 491 and 533 rows: of 16 tiles of rows, which are two waves, two hold
    # two slots, and no multiprocessor has both. One slot's tile takes 0.4 of such a one's steps,
    # and is held up by the others in part.
    site, counts = Sizes(4096, (4096,)), Counts(tiling)
    most, slowest = 4 * (1 + 0.4) / 2, 4.0
    wanted = most + HELD_UP * (slowest - most)
    assert counts.forward(site, 4, 64, 2048, 2048).steps == pytest.approx(wanted)
    assert counts.forward(site, 1, 64, 2048, 2048).steps == pytest.approx(4 * 0.4)
    assert counts.forward(site, 32, 64, 2048, 2048).steps == pytest.approx(4.0), "all hold two"


def test_a_single_wave_waits_for_its_fullest_tile() -> None:
    # 288 rows of 15 slots: two tiles of 128 rows hold seven or eight of them, a third the rest.
    met = Met.of(15, 288, (288,), 128)
    assert met.steps(1.0) == met.most_pairs > 1.2 * met.mean_pairs
    assert met.steps(2.0) == met.mean_pairs
    # A slot that has all tiles to itself takes a part of what two take.
    alone = Met.of(1, 256, (256,), 128)
    assert alone.steps(1.0) == alone.steps(3.0) < 0.5


def test_narrower_members_leave_fewer_parts_of_their_gradients(tiling: Tiling) -> None:
    """Keys and values that heads share: 8 blocks of outputs each, beside 32 of the queries."""
    counts, equal, shared = (
        Counts(tiling), Sizes(4096, (4096, 4096, 4096)), Sizes(4096, (4096, 1024, 1024)),
    )  # fmt: skip
    use = Use((512, 512), (16, 16))
    for wide, narrow in (
        (counts.backward(equal, 2, 16.0, 1024, 0), counts.backward(shared, 2, 16.0, 1024, 0)),
        (counts.backward_of(equal, use, 1024), counts.backward_of(shared, use, 1024)),
    ):
        for name in ("programs", "ranked", "parts"):
            assert getattr(narrow, name) == pytest.approx(getattr(wide, name) / 2), name


def test_a_library_s_product_takes_whole_waves_of_the_tiles_that_finish_first() -> None:
    # 8 x 16 tiles of 128 x 256 are nearly a wave of 132; 10 x 20 leave half of the second idle.
    assert library_waste(1024, 4096, 132) == pytest.approx(132 / 128)
    assert 1.15 < library_waste(1280, 5120, 132) < 2 * 132 / 200, "others finish first"
    assert 0.97 < library_waste(65536, 5120, 132) < 1.02
    # 3 x 16 and 3 x 20 of 128 x 256 leave most of a wave idle: the narrower one more of it.
    assert library_waste(384, 4096, 132) > 1.2 * library_waste(384, 5120, 132) > 1.2


def test_other_linears_products_are_scaled_by_what_their_waves_waste() -> None:
    profile = load_profile(profile_path("h100-sxm_llama-2-7b", shipped_only=True))
    wider = CapturedCostModel(model_shape("llama-2-13b"), profile)
    own = CapturedCostModel(LLAMA_7B, profile)
    work = (5120 / 4096) ** 2
    for kind in ("frozen_forward", "frozen_backward"):
        for rows in (512.0, 1280.0):
            found = wider._time(f"{kind}.5120x5120", (rows,))
            like = own._table(f"{kind}.4096x4096").at((rows,))
            waste = [library_waste(int(rows), columns, 132) for columns in (5120, 4096)]
            assert found.value_s / like.value_s == pytest.approx(work * waste[0] / waste[1])
            assert found.extrapolated
