"""Bucket lengths that minimise padding, by dynamic programming.

Every sequence is padded to the least bucket length that holds it. Candidates for a bucket's length
are the multiples of ``interval_tokens`` that some sequence rounds up to: the best set of lengths
is among them, because lowering a length to the longest sequence below it never adds padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from muxtune.errors import ConfigError


class Buckets(NamedTuple):
    """``lengths_tokens`` rise; ``counts`` sequences in each, of ``tokens`` real tokens in all."""

    lengths_tokens: tuple[int, ...]
    counts: tuple[int, ...]
    tokens: int

    @property
    def padded_tokens(self) -> int:
        pairs = zip(self.lengths_tokens, self.counts, strict=True)
        return sum(length * count for length, count in pairs)

    @property
    def padding_share(self) -> float:
        return 1.0 - self.tokens / self.padded_tokens


def least_padding(
    lengths_tokens: Sequence[int] | np.ndarray, most_buckets: int, interval_tokens: int
) -> tuple[int, ...]:
    """At most ``most_buckets`` lengths, rising, with the least padding of these sequences.

    F(r, i) = min over k < i of F(r - 1, k) + u_i * (sequences of candidates k+1..i): the padded
    tokens of the i shortest candidates in r buckets. Raises ConfigError.
    """
    lengths = _checked(lengths_tokens)
    _check_positive("most_buckets", most_buckets)
    _check_positive("interval_tokens", interval_tokens)
    rounded = -(-lengths // interval_tokens) * interval_tokens
    candidates, counts = np.unique(rounded, return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    # cost[k, i]: padded tokens when candidates k..i-1 share the bucket of candidate i-1.
    ends = np.concatenate([[0], candidates])
    cost = (before[None, :] - before[:, None]) * ends[None, :].astype(np.float64)
    cost[np.tril_indices(len(ends))] = np.inf
    return _trace(cost, candidates, min(most_buckets, len(candidates)))


def _trace(cost: np.ndarray, candidates: np.ndarray, most: int) -> tuple[int, ...]:
    best = np.full(len(cost), np.inf)
    best[0] = 0.0
    choices: list[np.ndarray] = []
    for _ in range(most):
        options = best[:, None] + cost
        choices.append(options.argmin(axis=0))
        best = options.min(axis=0)
    at, lengths = len(candidates), []
    for choice in reversed(choices):
        lengths.append(int(candidates[at - 1]))
        at = int(choice[at])
    return tuple(reversed(lengths))


def fill_buckets(
    lengths_tokens: Sequence[int] | np.ndarray, bucket_lengths: Sequence[int]
) -> Buckets:
    """Sequences by bucket, empty buckets left out. A sequence longer than every bucket, possible
    with buckets fixed for another batch, is an error: raises ConfigError."""
    lengths = _checked(lengths_tokens)
    edges = np.array(sorted(set(bucket_lengths)))
    if not len(edges) or lengths.max() > edges[-1]:
        raise ConfigError(
            "bucket_lengths",
            f"a sequence of {lengths.max()} tokens is longer than every bucket",
            "add a bucket that holds the longest sequence",
        )
    counts = np.bincount(np.searchsorted(edges, lengths), minlength=len(edges))
    used = counts > 0
    return Buckets(
        tuple(int(edge) for edge in edges[used]),
        tuple(int(count) for count in counts[used]),
        int(lengths.sum()),
    )


def _checked(lengths_tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    lengths = np.asarray(lengths_tokens, dtype=np.int64)
    if not len(lengths) or lengths.min() < 1:
        raise ConfigError("lengths_tokens", "need at least one, all positive", "correct the batch")
    return lengths


def _check_positive(field: str, value: int) -> None:
    if value < 1:
        raise ConfigError(field, f"is {value}", "give at least 1")
