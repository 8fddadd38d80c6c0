"""Summaries of sequence lengths: what a planner may know of a task's data."""

from __future__ import annotations

import numpy as np

from muxtune.types import LengthSummary

NUM_QUANTILES = 33


def summarise(tokens: np.ndarray, target_tokens: np.ndarray, content_hash: str) -> LengthSummary:
    """Moments and evenly spaced quantiles of one task's sequences, at least one.

    ``tokens`` and ``target_tokens``: [num_sequences] integers.
    """
    quantiles = np.quantile(tokens, np.linspace(0.0, 1.0, NUM_QUANTILES), method="nearest")
    exact = tokens.astype(np.float64)
    return LengthSummary(
        num_sequences=len(tokens),
        mean_tokens=float(exact.mean()),
        mean_target_tokens=float(target_tokens.mean(dtype=np.float64)),
        mean_square_tokens=float((exact * exact).mean()),
        max_tokens=int(tokens.max()),
        quantiles_tokens=tuple(int(quantile) for quantile in quantiles),
        content_hash=content_hash,
    )
