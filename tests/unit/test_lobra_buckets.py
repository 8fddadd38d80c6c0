"""Bucketing: the dynamic program against all subsets; every sequence has a bucket."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.errors import ConfigError
from muxtune.planning.lobra import fill_buckets, least_padding

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=25)


def brute_force(lengths: list[int], most: int, interval: int) -> int:
    """Fewest padded tokens with any multiples of the interval as bucket lengths."""
    top = -(-max(lengths) // interval)
    multiples = [interval * k for k in range(1, top)]
    best = None
    for size in range(min(most, top)):
        for chosen in combinations(multiples, size):
            edges = [*chosen, interval * top]
            padded = sum(min(edge for edge in edges if edge >= n) for n in lengths)
            best = padded if best is None else min(best, padded)
    assert best is not None
    return best


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 5), st.sampled_from([9, 16, 30]))
def test_no_choice_of_lengths_pads_less(lengths, most, interval):
    chosen = least_padding(lengths, most, interval)
    assert len(chosen) <= most
    assert all(length % interval == 0 for length in chosen)
    buckets = fill_buckets(lengths, chosen)
    assert sum(buckets.counts) == len(lengths)
    assert buckets.padded_tokens == brute_force(lengths, most, interval)


@given(LENGTHS)
def test_enough_buckets_pad_nothing_but_the_interval(lengths):
    buckets = fill_buckets(lengths, least_padding(lengths, 100, 1))
    assert buckets.padding_share == 0.0


def test_a_sequence_longer_than_every_bucket_is_named():
    with pytest.raises(ConfigError, match="77 tokens"):
        fill_buckets([5, 77], [16, 32])


@pytest.mark.parametrize(
    "arguments", [([], 2, 8), ([0], 2, 8), ([3], 0, 8), ([3], 2, 0), (np.array([-4]), 2, 8)]
)
def test_bad_input(arguments):
    with pytest.raises(ConfigError):
        least_padding(*arguments)
