"""Runs over time, from the times of their tasks: who waited, what was busy, who was done."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NUM_BINS = 120


def share_done(times_s: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distribution of times: sorted, and the share that took no longer."""
    ordered = np.sort(np.asarray(times_s, dtype=np.float64))
    return ordered, np.arange(1, len(ordered) + 1) / max(1, len(ordered))


def thinned(values: np.ndarray, most: int = 200) -> np.ndarray:
    """Indexes of at most ``most`` evenly spread points, both ends among them."""
    return np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).astype(np.int64))


def mean_count(
    starts_s: np.ndarray, ends_s: np.ndarray, until_s: float, num_bins: int = NUM_BINS
) -> tuple[np.ndarray, np.ndarray]:
    """Middles of equal bins from 0 to ``until_s``, and how many of the intervals are open in each,
    in the mean over the bin."""
    edges = np.linspace(0.0, until_s, num_bins + 1)
    open_s = _covered_until(edges, starts_s) - _covered_until(edges, ends_s)
    width_s = until_s / num_bins if until_s > 0 else 1.0
    return (edges[:-1] + edges[1:]) / 2, np.diff(open_s) / width_s


def _covered_until(edges: np.ndarray, since_s: np.ndarray) -> np.ndarray:
    """For each edge, the sum over all ``since`` of the time from it to the edge."""
    ordered = np.sort(since_s)
    count = np.searchsorted(ordered, edges, side="right")
    total = np.concatenate([[0.0], np.cumsum(ordered)])
    return edges * count - total[count]


def busy_spans(
    instances: Sequence[str], starts_s: np.ndarray, ends_s: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Times in which each instance had a task, as disjoint spans of each instance."""
    by_instance: dict[str, list[tuple[float, float]]] = {}
    for name, start_s, end_s in zip(instances, starts_s.tolist(), ends_s.tolist(), strict=True):
        by_instance.setdefault(name, []).append((start_s, end_s))
    spans: list[tuple[float, float]] = []
    for found in by_instance.values():
        spans += _union(found)
    both = np.array(spans, dtype=np.float64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start_s, end_s in sorted(spans):
        if merged and start_s <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end_s))
        else:
            merged.append((start_s, end_s))
    return merged
