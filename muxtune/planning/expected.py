"""What a task's optimizer steps will look like, from a summary of its lengths alone.

Planners compare chunk lengths and quotas without the data. Sums over sequences (tokens, pairs,
loss rows) have exact expectations in the summary's moments; how many micro-batches and chunks a
step takes depends on packing, so representative batches are packed by the packer itself.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from muxtune.errors import ConfigError
from muxtune.planning.packing import ChunkedBatch, PackLoad, min_quota, pack_loads
from muxtune.types import LengthSummary, PackRule, Sample

_MIN_BATCHES = 48
_MIN_SEQUENCES = 192
_MAX_SEQUENCES = 512
_LEAST_TAIL_SHARE = 0.05
_MASK_64 = (1 << 64) - 1


class ExpectedLoad(NamedTuple):
    """Means over optimizer steps of one task.

    ``padded_tokens_per_step``: token rows that the quota reserves, ``micro_batches * quota *
    chunk_tokens``. ``attention_pairs_per_step``: n(n+1)/2 a sequence when packed; all reserved
    rows in full when padded. ``min_quota``: chunks that the longest sequence needs.
    ``longest_row_tokens``: of a micro-batch when padded, else 0. ``chunk_shares[n]``: of the
    task's micro-batches, the share that fills n chunks.
    """

    micro_batches_per_step: float
    chunks_per_step: float
    effective_tokens_per_step: float
    padded_tokens_per_step: float
    attention_pairs_per_step: float
    loss_rows_per_step: float
    min_quota: int
    longest_row_tokens: float
    chunk_shares: tuple[float, ...]


@lru_cache(maxsize=32_768)
def expected_load(
    summary: LengthSummary,
    sequences_per_step: int,
    chunk_tokens: int,
    quota: int,
    rule: PackRule,
) -> ExpectedLoad:
    """Deterministic. Raises ConfigError when ``quota`` chunks do not hold the longest sequence;
    ``packing.min_quota`` tells beforehand."""
    needed = _check(summary, sequences_per_step, chunk_tokens, quota, rule)
    longest = 0.0
    if rule is PackRule.PAD:
        batches = representative_batches(summary, sequences_per_step)
        packed = [pack_loads(batch, None, chunk_tokens, quota, rule) for batch in batches]
        longest = _mean_longest([load for step in packed for load in step])
        filled = [[load.num_chunks for load in step] for step in packed]
    else:
        cut = _chunked_batches(summary, sequences_per_step, chunk_tokens)
        filled = [batch.num_chunks(quota) for batch in cut]
    micro_batches = sum(map(len, filled)) / len(filled)
    return ExpectedLoad(
        micro_batches_per_step=micro_batches,
        chunks_per_step=sum(map(sum, filled)) / len(filled),
        effective_tokens_per_step=sequences_per_step * summary.mean_tokens,
        padded_tokens_per_step=micro_batches * quota * chunk_tokens,
        attention_pairs_per_step=_pairs(
            summary, sequences_per_step, micro_batches * quota, chunk_tokens, rule
        ),
        loss_rows_per_step=sequences_per_step * summary.mean_target_tokens,
        min_quota=needed,
        longest_row_tokens=longest,
        chunk_shares=_chunk_shares(filled),
    )


@lru_cache(maxsize=4_096)
def _chunked_batches(
    summary: LengthSummary, sequences_per_step: int, chunk_tokens: int
) -> tuple[ChunkedBatch, ...]:
    batches = representative_batches(summary, sequences_per_step)
    return tuple(ChunkedBatch(batch, chunk_tokens) for batch in batches)


@lru_cache(maxsize=4_096)
def representative_batches(
    summary: LengthSummary, sequences_per_step: int
) -> tuple[tuple[Sample, ...], ...]:
    """Batches that together hold one sequence from each of equally likely strata of lengths, in
    a scattered order that is always the same."""
    num_batches = max(_MIN_BATCHES, -(-_MIN_SEQUENCES // sequences_per_step))
    num_batches = max(1, min(num_batches, _MAX_SEQUENCES // sequences_per_step))
    total = num_batches * sequences_per_step
    order = sorted(range(total), key=_scatter)
    bend = _tail_bend(summary)
    tokens = [_quantile(summary.quantiles_tokens, bend, (at + 0.5) / total) for at in order]
    samples = [Sample(index, length, length) for index, length in enumerate(tokens)]
    starts = range(0, total, sequences_per_step)
    return tuple(tuple(samples[at : at + sequences_per_step]) for at in starts)


def _check(
    summary: LengthSummary,
    sequences_per_step: int,
    chunk_tokens: int,
    quota: int,
    rule: PackRule,
) -> int:
    if sequences_per_step < 1 or chunk_tokens < 1 or not summary.quantiles_tokens:
        raise ConfigError(
            "expected_load",
            f"{sequences_per_step} sequences a step, chunks of {chunk_tokens} tokens and "
            f"{len(summary.quantiles_tokens)} quantiles do not describe a task",
            "give at least one of each",
        )
    needed = min_quota(summary.max_tokens, chunk_tokens, rule)
    if quota < needed or (rule is PackRule.PAD and summary.max_tokens > chunk_tokens):
        raise ConfigError(
            "quota",
            f"{quota} chunks of {chunk_tokens} tokens do not hold a sequence of "
            f"{summary.max_tokens} tokens",
            f"give {needed} chunks, or longer ones (padded rows as long as the longest sequence)",
        )
    return needed


def _pairs(
    summary: LengthSummary,
    sequences_per_step: int,
    reserved_rows: float,
    chunk_tokens: int,
    rule: PackRule,
) -> float:
    if rule is PackRule.PAD:
        return reserved_rows * chunk_tokens * (chunk_tokens + 1) / 2
    return sequences_per_step * (summary.mean_square_tokens + summary.mean_tokens) / 2


def _mean_longest(loads: list[PackLoad]) -> float:
    return sum(load.longest_tokens for load in loads) / len(loads)


def _chunk_shares(filled: list[list[int]]) -> tuple[float, ...]:
    counts = Counter(num_chunks for step in filled for num_chunks in step)
    return tuple(counts[n] / counts.total() for n in range(max(counts) + 1))


def _tail_bend(summary: LengthSummary) -> float:
    """Exponent of the quantile function between its last two points, where lengths have their
    long tail: the one that gives the summary's mean. 1 is a straight line."""
    quantiles = summary.quantiles_tokens
    intervals = len(quantiles) - 1
    if intervals < 1 or quantiles[-1] == quantiles[-2]:
        return 1.0
    body = sum(low + high for low, high in pairwise(quantiles[:-1])) / 2
    tail_mean = summary.mean_tokens * intervals - body
    rise = quantiles[-1] - quantiles[-2]
    share = (tail_mean - quantiles[-2]) / rise  # a power p has the mean share 1 / (p + 1)
    return 1 / min(max(share, _LEAST_TAIL_SHARE), 1 - _LEAST_TAIL_SHARE) - 1


def _quantile(quantiles_tokens: tuple[int, ...], tail_bend: float, share: float) -> int:
    """Between evenly spaced quantiles: straight, and bent in the last interval."""
    at = share * (len(quantiles_tokens) - 1)
    below = int(at)
    above = min(below + 1, len(quantiles_tokens) - 1)
    low, high = quantiles_tokens[below], quantiles_tokens[above]
    bend = tail_bend if above == len(quantiles_tokens) - 1 else 1.0
    return max(1, round(low + (high - low) * (at - below) ** bend))


def _scatter(index: int) -> int:
    """The mixing function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    mixed = (index + 1) * 0x9E3779B97F4A7C15 & _MASK_64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _MASK_64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _MASK_64
    return mixed ^ mixed >> 31
