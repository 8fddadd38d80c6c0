"""Packed attention by its sequences."""

from __future__ import annotations

from typing import Any

import pytest

from muxtune.cost.attention import (
    MOST_TILES,
    SEQUENCES,
    TILE_ROWS,
    Device,
    PackedAttention,
    Point,
    sequence_counts,
)
from muxtune.cost.captured import CapturedCostModel
from muxtune.cost.schema import SCHEMA_VERSION, content_hash
from muxtune.cost.shapes import model_shape
from muxtune.profiling import captured_ops
from muxtune.profiling.captured_ops import CapturedOps, heating_s, mixed_lengths
from muxtune.profiling.captured_profile import MIXES
from muxtune.validation import single_ops
from muxtune_kernels.packed_attention import op as packed_op
from muxtune_kernels.packed_attention import tiles as packed_tiles

LLAMA_7B = model_shape("llama-2-7b")
DEVICE = Device(32, 32, 132)
FORWARD_S = (2e-6, 1.4e-6, 1.1e-6, 0.8e-6, 1.2e-6)
BACKWARD_S = (8e-6, 10e-6, 2.5e-6, 4.5e-6, 4e-6, 6e-6, 15e-6)


def _counts(lengths: list[int]) -> tuple[float, ...]:
    return tuple(sequence_counts(lengths).values())


def test_tiles_are_those_of_the_kernels() -> None:
    assert TILE_ROWS == packed_tiles.TILE_ROWS
    assert MOST_TILES * TILE_ROWS == packed_op.MAX_SEQLEN == captured_ops.MAX_SEQLEN
    counts = sequence_counts([1, 64, 65, 128, 129, 1024])
    expected = dict.fromkeys(SEQUENCES, 0.0) | {
        "sequences_1": 2.0, "sequences_2": 2.0, "sequences_3": 1.0, "sequences_16": 1.0,
    }  # fmt: skip
    assert counts == expected
    for length in (0, 1025):
        with pytest.raises(ValueError, match=f"of {length} rows"):
            sequence_counts([length])


def test_forward_counts_programs_and_what_they_look_at() -> None:
    # 4 + 3 tiles of 32 heads; the first look at themselves, the others at 1, 2 and 3 tiles.
    lengths = [16, 16, 16, 16, 128 + 16]
    one, programs, looks, rows, longest = DEVICE.forward_terms(208.0, _counts(lengths))
    per = 32 / 132
    assert (one, longest) == (1.0, 2.25), "two full tiles, and a quarter"
    assert (programs, looks, rows) == pytest.approx((7 * per, 10 * per, 208 / 64 * per))


def test_few_programs_take_as_long_as_one_and_full_tiles_longer() -> None:
    """32 to 96 programs on 132 multiprocessors."""
    few = [DEVICE.forward_terms(128.0, _counts(lengths)) for lengths in ([128], [40, 88])]
    assert [terms[1] for terms in few] == [1.0, 1.0]
    assert [terms[4] for terms in few] == [2.0, 1.5]
    assert DEVICE.backward_terms(90.0, _counts([30, 30, 30]))[4] == 1.0
    assert DEVICE.backward_terms(240.0, _counts([30] * 8))[4] == pytest.approx(8 * 32 / 132)


def test_backward_takes_whole_waves_of_large_programs_and_shares_of_small_ones() -> None:
    # Four wide programs of 32 heads are 128, and one wave of 132; five of them are two.
    for count, waves in ((1, 1), (4, 1), (5, 2), (8, 2), (9, 3)):
        _, wide, programs, looks, short, _, _ = DEVICE.backward_terms(
            100.0 * count, _counts([100] * count)
        )
        assert (wide, programs, looks, short) == (waves, 0, 0, 0)
    # Three tiles: three programs a head, each with four looks; a short sequence is apart.
    terms = DEVICE.backward_terms(192.0, _counts([152, 40]))
    assert terms == pytest.approx((1.0, 0.0, 1.0, 4.0, 1.0, 32 / 132 * 3, 0.0))


def test_a_wave_is_as_long_as_its_first_program() -> None:
    # 160 programs of five tiles, then 96 of three, then 96 wide ones: the second wave begins with
    # six looks, too, and the third with a wide one.
    lengths = [300, 160, 100, 100, 96]
    _, wide, programs, looks, *_ = DEVICE.backward_terms(756.0, _counts(lengths))
    assert (wide, programs, looks) == (1.0, 2.0, 12.0)
    # As wide ones alone, two sequences are half a wave; behind 96 longer programs they are none.
    assert DEVICE.backward_terms(260.0, _counts([160, 100]))[1:4] == [0.0, 1.0, 4.0]


def test_heads_that_share_keys_have_no_wide_programs() -> None:
    grouped = Device(32, 8, 132)
    _, wide, programs, looks, short, rows, more = grouped.backward_terms(168.0, _counts([128, 40]))
    assert wide == 0.0, "two tiles of eight heads: one wave"
    assert programs == 2.5, "keys of one head, then queries of four, over keys and queries of one"
    assert looks == 4 * 3, "of four members each"
    assert short == 4.0
    assert rows == pytest.approx(32 / 132 * 168 / 64)
    assert more == 3.0, "heads but one that the short one's program goes through"
    assert grouped.backward_terms(128.0, _counts([128]))[-1] == 0.0, "none is short"


@pytest.mark.parametrize("backward", [False, True])
def test_other_mixes_are_predicted_from_the_profile_s(backward: bool) -> None:
    speeds = BACKWARD_S if backward else FORWARD_S
    terms = DEVICE.backward_terms if backward else DEVICE.forward_terms

    def seconds(rows: int, lengths: list[int]) -> float:
        return sum(s * t for s, t in zip(speeds, terms(rows, _counts(lengths)), strict=True))

    points = [
        Point(rows, _counts(lengths), seconds(rows, lengths))
        for rows in (128, 512, 1024, 2048, 4096)
        for lengths in (mixed_lengths(mix, rows) for mix in MIXES)
    ]
    model = PackedAttention(DEVICE, backward, points)
    for seed, mix in enumerate(("gsm8k+sst2", "arc_challenge+rte", "openbookqa")):
        for rows in (160, 800, 3136):
            lengths = mixed_lengths(mix, rows, seed)
            found = model.seconds(rows, _counts(lengths))
            assert found == pytest.approx(seconds(rows, lengths), rel=0.03)


def _profile(with_sequences: bool) -> dict[str, Any]:
    def point(rows: int, lengths: list[int], terms: Any, speeds: Any) -> dict[str, float]:
        seconds = sum(s * t for s, t in zip(speeds, terms(rows, _counts(lengths)), strict=True))
        pairs = sum(n * (n + 1) / 2 for n in lengths)
        told = sequence_counts(lengths) if with_sequences else {}
        times = dict.fromkeys(("median_s", "p05_s", "p95_s"), seconds)
        return {"rows": float(rows), "pairs": pairs, **told, **times}

    ops = {
        f"attention_{side}.32x32x128": {
            "unit": "s", "axes": ["rows", "pairs"],
            "points": [
                point(rows, mixed_lengths(mix, rows), terms, speeds)
                for rows in (128, 1024, 4096)
                for mix in MIXES
            ],
        }
        for side, terms, speeds in (
            ("forward", DEVICE.forward_terms, FORWARD_S),
            ("backward", DEVICE.backward_terms, BACKWARD_S),
        )
    }  # fmt: skip
    tiles = {"num_multiprocessors": 132, "half_cost": 0.57, "tiles": [[128, 256, 1.0, True]]}
    raw = {
        "schema_version": SCHEMA_VERSION, "device": {"name": "H100-SXM", "kind": "gpu"},
        "software": {}, "model": LLAMA_7B._asdict(), "ops": ops,
        "program": {"style": "captured", "tiles": tiles},
    }  # fmt: skip
    return {**raw, "content_hash": content_hash(raw)}


def test_a_call_is_counted_where_profile_and_call_tell_their_sequences() -> None:
    told, older = (CapturedCostModel(LLAMA_7B, _profile(known)) for known in (True, False))
    name, lengths = "attention_backward.32x32x128", [90] * 9
    pairs, rows = 9 * 90 * 91 / 2, 810.0
    expected = sum(
        s * t
        for s, t in zip(BACKWARD_S, DEVICE.backward_terms(rows, _counts(lengths)), strict=True)
    )
    counted = told.attention_time(name, rows, pairs, *_counts(lengths))
    assert counted.value_s == pytest.approx(expected, rel=0.03) and not counted.extrapolated
    by_pairs = told.attention_time(name, rows, pairs)
    assert by_pairs == older.attention_time(name, rows, pairs, *_counts(lengths))
    assert by_pairs.half_width_s / by_pairs.value_s > counted.half_width_s / counted.value_s
    assert told.attention_time(name, 8192.0, pairs, *_counts([128] * 64)).extrapolated


def test_older_profiles_and_records_are_predicted_by_the_sequences_they_were_drawn_with() -> None:
    lengths = mixed_lengths("gsm8k+rte", 800, 7)
    name, pairs = "attention_forward.32x32x128", sum(n * (n + 1) / 2 for n in lengths)
    op = {"op": name, "size": [800.0, pairs], "repeats_s": [1e-5], "predicted_s": 1.0}
    rows = [{"name": "attention of 800 rows, gsm8k+rte, 7", "ops": [op]}]
    older = CapturedCostModel(LLAMA_7B, _profile(False)).profile
    of = lambda profile: CapturedCostModel(LLAMA_7B, profile)  # noqa: E731
    (found,) = single_ops.again(rows, older, of)
    told = CapturedCostModel(LLAMA_7B, _profile(True))
    expected = told.attention_time(name, 800.0, pairs, *_counts(lengths))
    assert found["ops"][0]["predicted_s"] == expected.value_s
    (same,) = single_ops.again([found], told.profile, of)
    assert same["ops"] == found["ops"], "a record that tells them is taken at its word"
    older.ops[name]["points"][0]["pairs"] += 1
    with pytest.raises(ValueError, match="no mix of 128 rows"):
        single_ops.again(rows, older, of)


def test_a_profile_s_points_tell_their_sequences_beside_their_sizes() -> None:
    ops = CapturedOps.__new__(CapturedOps)
    sizes = {"rows": 128.0, "pairs": 4160.0, **sequence_counts([64, 64])}
    ops.points = [captured_ops.Point("attention_forward.2x2x16", sizes, [1e-5])]
    (op,) = ops.ops().values()
    assert op["axes"] == ["rows", "pairs"] and op["points"][0]["sequences_1"] == 2.0


@pytest.mark.parametrize(
    ("name", "rows", "heats"),
    [
        ("attention_forward.32x32x128", 1024, True), ("attention_backward.32x32x128", 960, False),
        ("frozen_forward.4096x4096", 512, True), ("full_loss.4096x32000", 480, False),
        ("site_forward.4096x4096", 1024, True), ("site_factor.4096x4096", 4096, False),
    ],
)  # fmt: skip
def test_what_takes_much_power_or_follows_it_runs_before_it_is_timed(
    name: str, rows: int, heats: bool
) -> None:
    assert (heating_s(name, {"rows": rows}) > 0) == heats
    assert heating_s("adamw_idle", {"elements": 1e6}) == 0.0
