"""Whether somebody else used the GPU that was measured: signs of it, and what is said then. Pure.

Two processes share a GPU by time slices of milliseconds. Repeats of an operation may each fit into
one, or hold as many of them, and spread no more than on a GPU of one's own (1.8% both on an H100).
Of short launches that follow each other for longer some wait for whole slices, which shows at once.
A process that only holds memory is found by the memory; one that computes beside us in the same
slices (MPS) by neither.

    {"interrupted": share of the time of short launches, 0 to 1,
     "taken_bytes": of the GPU's memory, before anything of our own but a context was there}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

SIGNS = ("interrupted", "taken_bytes")
# Half of the time where two processes compute without a pause; on a GPU of one's own nothing but
# a hiccup.
MOST_INTERRUPTED = 0.05
MOST_TAKEN_BYTES = 3 << 29  # a context of our own is about a third of it
BLOCK = 32  # launches, over which a clock hardly changes
LONG = 1.5  # times as long as others of its block: it did not just run slower


def interrupted_share(launches_s: Sequence[float]) -> float:
    """Share of the time of a run, 0 to 1, in which launches waited. ``launches_s``: of equal
    launches one behind another, each until the next begins.

    What a launch takes is the lower quartile of its block: of launches nearly as long as a slice
    more than half wait. Only those ``LONG`` times as long count, so noise and clocks that fall do
    not. 0 of no launches.
    """
    times = np.asarray(launches_s, dtype=float)
    if not times.size:
        return 0.0
    blocks = np.array_split(times, -(-times.size // BLOCK))
    usual = np.concatenate([np.full(block.size, np.quantile(block, 0.25)) for block in blocks])
    return float((times - usual)[times > LONG * usual].sum() / times.sum())


def worst(looks: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Of several looks at one GPU the strongest of each sign."""
    found: dict[str, float] = {}
    for look in looks:
        for name, value in look.items():
            found[name] = max(value, found.get(name, value))
    return found


def sharing_warnings(what: str, signs: Mapping[str, Any]) -> list[str]:
    """One line for each sign over its limit, of ``what``: a profile (whose ``quality`` holds them)
    or a validation. A sign that is missing says nothing."""
    interrupted, taken_bytes = (float(signs.get(name, 0.0)) for name in SIGNS)
    command = {"validation": "validate"}.get(what, what)
    again = f"and run `muxtune {command}` again"
    lines = []
    if interrupted > MOST_INTERRUPTED:
        lines.append(
            f"{what} of a shared GPU: interrupted is {interrupted:.1%} of the time of short"
            f" launches (at most {MOST_INTERRUPTED:.1%} on a GPU of one's own), so another process"
            f" computed in between; stop it {again}"
        )
    if taken_bytes > MOST_TAKEN_BYTES:
        lines.append(
            f"{what} of a shared GPU: taken_bytes was {taken_bytes / 2**30:.1f} GiB before anything"
            f" of our own but a context was there (at most {MOST_TAKEN_BYTES / 2**30:.1f} GiB);"
            f" stop who holds it {again}"
        )
    return lines
