"""By what the time of a captured pass is told apart: categories of ``muxtune.cost.ops``, and causes
within them that add up to steps in ways of their own (``muxtune.cost.residuals``)."""

from __future__ import annotations

from collections.abc import Mapping

from muxtune.cost import ops
from muxtune.cost.composition import Tally

EXTRA_METHODS = ("ia3", "bottleneck", "prefix")
# What products take more with adapters, A's gradients beside them, and such products alone.
SITE, FACTOR, ADAPTED = "site", "factor", "adapted"
LEAST = "least of "  # before a method: what it takes for the fewest rows
MANY_ROWS_LOSS = "loss of many rows"  # which power limits where it is measured by itself
_CATEGORY_OF: Mapping[str, str] = {
    **dict.fromkeys((SITE, FACTOR, *EXTRA_METHODS), ops.ADAPTERS), ADAPTED: ops.BACKBONE,
    **{LEAST + method: ops.ADAPTERS for method in EXTRA_METHODS}, MANY_ROWS_LOSS: ops.LOSS,
}  # fmt: skip


def category_of(cause: str) -> str:
    """Of ``ops.CATEGORIES``."""
    return _CATEGORY_OF.get(cause, cause)


def by_cause(*tallies: Tally) -> dict[str, float]:
    """Seconds of both directions."""
    seconds: dict[str, float] = {}
    for tally in tallies:
        for side in (tally.forward_s, tally.backward_s):
            for cause, value in side.items():
                seconds[cause] = seconds.get(cause, 0.0) + value
    return seconds
