"""Packing of one task's batch: whole sequences, causal order, few micro-batches, suffix-stable."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.errors import ConfigError
from muxtune.planning import packing
from muxtune.planning.packing import StepPack, min_quota, pack_loads, pack_step
from muxtune.types import PackRule, Sample, SequenceSlice

RULES = st.sampled_from(list(PackRule))


def samples_of(lengths: list[int]) -> tuple[Sample, ...]:
    return tuple(Sample(at, tokens, max(0, tokens - 1)) for at, tokens in enumerate(lengths))


@st.composite
def packings(draw: st.DrawFn):
    """(samples, left, chunk_tokens, quota, rule) that fit."""
    lengths = draw(st.lists(st.integers(1, 120), min_size=1, max_size=24))
    rule = draw(RULES)
    chunk_tokens = max(lengths) if rule is PackRule.PAD else draw(st.integers(8, 130))
    least = max(min_quota(tokens, chunk_tokens, rule) for tokens in lengths)
    positions = st.sampled_from(range(len(lengths)))
    left = draw(st.none() | st.lists(positions, min_size=1, unique=True))
    return samples_of(lengths), left, chunk_tokens, least + draw(st.integers(0, 4)), rule


@settings(deadline=None)
@given(packings())
def test_every_sequence_appears_once_whole_and_in_causal_order(case) -> None:
    samples, left, chunk_tokens, quota, rule = case
    packs = pack_step(*case)
    seen: list[int] = []
    for pack in packs:
        assert 1 <= pack.num_chunks <= quota
        seen += check_pieces(pack, samples, chunk_tokens)
        if rule is PackRule.PAD:
            assert all(len(chunk) == 1 for chunk in pack.chunks)
    assert sorted(seen) == sorted(range(len(samples)) if left is None else left)


def check_pieces(pack: StepPack, samples: tuple[Sample, ...], chunk_tokens: int) -> list[int]:
    """Pieces of one micro-batch; returns the positions that it computes."""
    chunks_of: dict[int, list[int]] = {}
    stop_of: dict[int, int] = {}
    for index, chunk in enumerate(pack.chunks):
        assert chunk
        assert sum(piece.stop - piece.start for piece in chunk) <= chunk_tokens
        for piece in chunk:
            assert piece.start == stop_of.get(piece.position, 0)
            stop_of[piece.position] = piece.stop
            chunks_of.setdefault(piece.position, []).append(index)
    for position, stop in stop_of.items():
        assert stop == samples[position].tokens
        first = chunks_of[position][0]
        num_chunks = -(-samples[position].tokens // chunk_tokens)
        assert chunks_of[position] == list(range(first, first + num_chunks))
    assert pack.positions == tuple(sorted(stop_of))
    return list(stop_of)


@settings(deadline=None)
@given(packings())
def test_sums_are_those_of_the_sequences(case) -> None:
    samples = case[0]
    for pack in pack_step(*case):
        chosen = [samples[position] for position in pack.positions]
        assert pack.tokens == sum(sample.tokens for sample in chosen)
        assert pack.loss_rows == sum(sample.target_tokens for sample in chosen)
        assert pack.longest_tokens == max(sample.tokens for sample in chosen)
        pairs = sum(query + 1 for sample in chosen for query in range(sample.tokens))
        assert pack.attention_pairs == pairs


@settings(deadline=None)
@given(packings())
def test_loads_are_those_of_the_packs(case) -> None:
    loads = pack_loads(*case)
    packs = pack_step(*case)
    assert [load[1:] for load in loads] == [pack[1:] for pack in packs]
    assert [load.num_chunks for load in loads] == [pack.num_chunks for pack in packs]


@settings(deadline=None)
@given(packings())
def test_packing_the_rest_gives_the_rest_of_the_packing(case) -> None:
    samples, _, chunk_tokens, quota, rule = case
    packs = pack_step(*case)
    for done in range(1, len(packs)):
        left = [position for pack in packs[done:] for position in pack.positions]
        assert pack_step(samples, left, chunk_tokens, quota, rule) == packs[done:]


@settings(deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=7), st.integers(7, 12))
def test_as_few_micro_batches_as_possible(chunks_of_each: list[int], quota: int) -> None:
    """Sequences of whole chunks leave no room, so that micro-batches are bins of their sizes."""
    samples = samples_of([10 * num_chunks for num_chunks in chunks_of_each])
    packs = pack_step(samples, None, 10, quota, PackRule.CHUNK)
    assert len(packs) == fewest_bins(chunks_of_each, quota)


def fewest_bins(sizes: list[int], capacity: int) -> int:
    """By trying every set of items for the first bin, over all subsets of items."""
    num_subsets = 1 << len(sizes)
    fill = [sum(size for at, size in enumerate(sizes) if s >> at & 1) for s in range(num_subsets)]
    fewest = [0] + [len(sizes)] * (num_subsets - 1)
    for subset in range(1, num_subsets):
        part = subset
        while part:
            if fill[part] <= capacity:
                fewest[subset] = min(fewest[subset], 1 + fewest[subset ^ part])
            part = (part - 1) & subset
    return fewest[-1]


def test_where_best_fit_is_not_enough_a_better_packing_is_found() -> None:
    """Best fit takes 3+3, 2+2+2 and 2; 3+2+2 twice is better."""
    samples = samples_of([10 * num_chunks for num_chunks in (3, 3, 2, 2, 2, 2)])
    packs = pack_step(samples, None, 10, 7, PackRule.CHUNK)
    assert [pack.positions for pack in packs] == [(0, 2, 3), (1, 4, 5)]
    assert pack_step(samples, packs[1].positions, 10, 7, PackRule.CHUNK) == packs[1:]


def test_short_sequences_fill_the_last_chunk_of_long_ones() -> None:
    packs = pack_step(samples_of([70, 25, 30, 6]), None, 32, 3, PackRule.CHUNK)
    # 70 = 32 + 32 + 6 leaves 26 for the 25; 30 and 6 do not fit together.
    assert packs[0].chunks == (
        (SequenceSlice(0, 0, 32),),
        (SequenceSlice(0, 32, 64),),
        (SequenceSlice(0, 64, 70), SequenceSlice(1, 0, 25)),
    )
    assert packs[1].chunks == ((SequenceSlice(2, 0, 30),), (SequenceSlice(3, 0, 6),))


def test_equal_lengths_keep_the_order_of_positions() -> None:
    packs = pack_step(samples_of([16] * 4), None, 32, 1, PackRule.CHUNK)
    assert [pack.positions for pack in packs] == [(0, 1), (2, 3)]


def test_padded_rows_keep_the_order_of_the_batch() -> None:
    packs = pack_step(samples_of([9, 3, 7, 1, 5]), None, 9, 2, PackRule.PAD)
    assert [pack.positions for pack in packs] == [(0, 1), (2, 3), (4,)]
    assert packs[0].chunks == ((SequenceSlice(0, 0, 9),), (SequenceSlice(1, 0, 3),))


@pytest.mark.parametrize(("limit", "value"), [("_SEARCH_LIMIT", 3), ("_MAX_SEARCHED_UNITS", 8)])
def test_a_search_that_ends_early_is_still_valid_and_suffix_stable(
    monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    monkeypatch.setattr(packing, limit, value)
    rng = random.Random(3)
    for _ in range(200):
        samples = samples_of([10 * rng.randint(1, 9) for _ in range(rng.randint(3, 20))])
        packs = pack_step(samples, None, 10, 11, PackRule.CHUNK)
        assert sorted(p for pack in packs for p in pack.positions) == list(range(len(samples)))
        rest = [position for pack in packs[1:] for position in pack.positions]
        if rest:
            assert pack_step(samples, rest, 10, 11, PackRule.CHUNK) == packs[1:]


def test_a_batch_of_thousands_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[int] = []
    search = packing._better_split

    def counted(units: list[packing._Unit], *rest: int) -> tuple[list[packing._Unit] | None, bool]:
        searched.append(len(units))
        return search(units, *rest)

    monkeypatch.setattr(packing, "_better_split", counted)
    rng = random.Random(3)
    samples = samples_of([rng.randint(21, 90) for _ in range(3000)])
    packs = pack_step(samples, None, 10, 11, PackRule.CHUNK)
    assert sorted(p for pack in packs for p in pack.positions) == list(range(3000))
    assert searched and max(searched) <= packing._MAX_SEARCHED_UNITS
    rest = [position for pack in packs[400:] for position in pack.positions]
    assert pack_step(samples, rest, 10, 11, PackRule.CHUNK) == packs[400:]


def test_a_quota_below_the_longest_sequence_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"quota: .*100 tokens needs 4 chunks of 32.*quota is 3"):
        pack_step(samples_of([5, 100]), None, 32, 3, PackRule.CHUNK)
    with pytest.raises(ConfigError, match="raise the quota to 4"):
        pack_step(samples_of([5, 100]), None, 32, 3, PackRule.CHUNK)


def test_a_row_shorter_than_a_sequence_is_refused() -> None:
    with pytest.raises(ConfigError, match="chunk_tokens of at least 100"):
        pack_step(samples_of([5, 100]), None, 99, 8, PackRule.PAD)


@pytest.mark.parametrize(("chunk_tokens", "quota"), [(0, 1), (8, 0), (8, -1)])
def test_nonsense_sizes_are_refused(chunk_tokens: int, quota: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        pack_step(samples_of([5]), None, chunk_tokens, quota, PackRule.CHUNK)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match="holds no sequence"):
        pack_step((), None, 8, 1, PackRule.CHUNK)
