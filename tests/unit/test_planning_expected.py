"""expected_load against packing drawn batches."""

from __future__ import annotations

import random
import statistics

import pytest

from muxtune.errors import ConfigError
from muxtune.planning.expected import expected_load, representative_batches
from muxtune.planning.packing import pack_loads
from muxtune.types import LengthSummary, PackRule, Sample


def drawn_lengths(seed: int, num_sequences: int = 4_000) -> list[int]:
    """A skewed distribution, as texts have."""
    rng = random.Random(seed)
    return [min(300, max(4, round(rng.lognormvariate(4.0, 0.6)))) for _ in range(num_sequences)]


def summary_of(lengths: list[int]) -> LengthSummary:
    lengths = sorted(lengths)
    quantiles = [lengths[round(share / 20 * (len(lengths) - 1))] for share in range(21)]
    mean = statistics.fmean(lengths)
    mean_square = statistics.fmean([n * n for n in lengths])
    return LengthSummary(
        len(lengths), mean, mean - 1, mean_square, lengths[-1], tuple(quantiles), "hash"
    )


def samples_of(lengths: list[int]) -> tuple[Sample, ...]:
    return tuple(Sample(at, tokens, tokens - 1) for at, tokens in enumerate(lengths))


CASES = [
    (8, 64, 6, PackRule.CHUNK),
    (8, 128, 3, PackRule.CHUNK),
    (16, 256, 2, PackRule.CHUNK),
    (3, 512, 1, PackRule.CHUNK),
    (8, 300, 4, PackRule.PAD),
    (16, 300, 16, PackRule.PAD),
    (1, 128, 3, PackRule.CHUNK),
]


@pytest.mark.parametrize(("sequences", "chunk_tokens", "quota", "rule"), CASES)
def test_close_to_packing_real_draws(
    sequences: int, chunk_tokens: int, quota: int, rule: PackRule
) -> None:
    lengths = drawn_lengths(seed=1)
    expected = expected_load(summary_of(lengths), sequences, chunk_tokens, quota, rule)
    starts = range(0, len(lengths) - sequences + 1, sequences)
    steps = [
        pack_loads(samples_of(lengths[at : at + sequences]), None, chunk_tokens, quota, rule)
        for at in starts
    ]
    loads = [load for step in steps for load in step]

    def per_step(total: float) -> float:
        return total / len(steps)

    assert expected.micro_batches_per_step == pytest.approx(per_step(len(loads)), rel=0.08)
    chunks = per_step(sum(load.num_chunks for load in loads))
    assert expected.chunks_per_step == pytest.approx(chunks, rel=0.05)
    tokens = per_step(sum(load.tokens for load in loads))
    assert expected.effective_tokens_per_step == pytest.approx(tokens, rel=0.01)
    rows = per_step(sum(load.loss_rows for load in loads))
    assert expected.loss_rows_per_step == pytest.approx(rows, rel=0.01)
    if rule is PackRule.PAD:
        longest = statistics.fmean(load.longest_tokens for load in loads)
        assert expected.longest_row_tokens == pytest.approx(longest, rel=0.08)
    assert expected.padded_tokens_per_step == (
        expected.micro_batches_per_step * quota * chunk_tokens
    )
    if rule is PackRule.CHUNK:
        pairs = per_step(sum(load.attention_pairs for load in loads))
        assert expected.attention_pairs_per_step == pytest.approx(pairs, rel=0.01)


def test_padded_rows_are_paid_for_in_full() -> None:
    summary = summary_of(drawn_lengths(seed=2))
    expected = expected_load(summary, 10, 300, 4, PackRule.PAD)
    assert expected.micro_batches_per_step == 3  # 4 + 4 + 2 rows
    assert expected.attention_pairs_per_step == 3 * 4 * 300 * 301 / 2


def test_equal_lengths_are_exact() -> None:
    summary = LengthSummary(10, 50.0, 49.0, 2500.0, 50, (50, 50, 50), "hash")
    expected = expected_load(summary, 8, 128, 2, PackRule.CHUNK)
    shares = (0.0, 0.0, 1.0)  # every micro-batch fills both chunks
    assert expected == (2.0, 4.0, 400.0, 512.0, 8 * 50 * 51 / 2, 392.0, 1, 0.0, shares)


def test_representative_batches_keep_the_distribution_and_never_change() -> None:
    summary = summary_of(drawn_lengths(seed=3))
    batches = representative_batches(summary, 8)
    representative_batches.cache_clear()
    assert batches == representative_batches(summary, 8)
    assert {len(batch) for batch in batches} == {8}
    tokens = [sample.tokens for batch in batches for sample in batch]
    assert statistics.fmean(tokens) == pytest.approx(summary.mean_tokens, rel=0.05)
    assert max(tokens) <= summary.max_tokens
    means = [statistics.fmean(sample.tokens for sample in batch) for batch in batches]
    drawn_at_random = statistics.pstdev(tokens) / len(batches[0]) ** 0.5
    assert statistics.pstdev(means) == pytest.approx(drawn_at_random, rel=0.3)  # not sorted


@pytest.mark.parametrize("sequences", [1, 7, 64, 513, 2_000])
def test_any_batch_size(sequences: int) -> None:
    summary = summary_of(drawn_lengths(seed=4))
    expected = expected_load(summary, sequences, 64, 8, PackRule.CHUNK)
    least = summary.mean_tokens * sequences / (64 * 8)
    assert expected.micro_batches_per_step >= 0.9 * least
    assert expected.min_quota == 5


@pytest.mark.parametrize(
    ("sequences", "chunk_tokens", "quota", "rule", "message"),
    [
        (8, 64, 4, PackRule.CHUNK, "give 5 chunks"),
        (8, 200, 4, PackRule.PAD, "sequence of 300 tokens"),
        (0, 64, 5, PackRule.CHUNK, "0 sequences a step"),
        (8, 0, 5, PackRule.CHUNK, "chunks of 0 tokens"),
    ],
)
def test_what_cannot_be_is_refused(sequences, chunk_tokens, quota, rule, message) -> None:
    lengths = [*drawn_lengths(seed=5), 300]
    with pytest.raises(ConfigError, match=message):
        expected_load(summary_of(lengths), sequences, chunk_tokens, quota, rule)
