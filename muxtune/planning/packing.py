"""Packing of one task's optimizer batch into micro-batches: separable, deterministic, pure.

What a task contributes depends on its own sequences, the chunk length and its quota only; no
function of this module sees a second task. Two properties bind whoever improves the inside:

* **whole**: each sequence lies in one micro-batch, its pieces in causal order in consecutive
  chunks;
* **suffix-stable**: packing what is left after the first micro-batch gives the other
  micro-batches, unchanged. A cursor remembers positions and no packing, so this is what makes
  stepping through a batch, resuming in its middle and looking it up in a table agree.

Best-fit-decreasing is suffix-stable by itself: an item prefers the tightest bin that it fits, and
taking away a whole bin with its items removes an option that no other item had chosen.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from muxtune.errors import ConfigError
from muxtune.types import PackRule, Sample, SequenceSlice

# Bins tried before an exact search for fewer micro-batches gives up and keeps best fit.
_SEARCH_LIMIT = 2_000
# More units than these keep best fit: the search's time grows with their square, to seconds at 400,
# and a planner asks for hundreds of packings.
_MAX_SEARCHED_UNITS = 96


class StepPack(NamedTuple):
    """What one task contributes to one micro-batch.

    ``chunks``: each a tuple of pieces. ``positions``: the batch positions that it computes,
    ascending. ``attention_pairs``: sum over its sequences of n(n+1)/2, as packed attention pays.
    """

    chunks: tuple[tuple[SequenceSlice, ...], ...]
    positions: tuple[int, ...]
    tokens: int
    attention_pairs: int
    loss_rows: int
    longest_tokens: int

    @property
    def num_chunks(self) -> int:
        return len(self.chunks)


class PackLoad(NamedTuple):
    """A StepPack without its pieces: what tables and forecasts need to know of it."""

    num_chunks: int
    positions: tuple[int, ...]
    tokens: int
    attention_pairs: int
    loss_rows: int
    longest_tokens: int


class _Unit(NamedTuple):
    """Chunks that stay together: one, or all those of a long sequence, whose last one also holds
    the short sequences."""

    num_chunks: int
    long_position: int  # -1: none of the sequences is longer than a chunk
    short_positions: list[int]


def min_quota(tokens: int, chunk_tokens: int, rule: PackRule) -> int:
    """Chunks (rows) that a micro-batch must offer to hold a sequence of ``tokens`` tokens."""
    return 1 if rule is PackRule.PAD else max(1, -(-tokens // chunk_tokens))


def pack_step(
    samples: Sequence[Sample],
    left: Sequence[int] | None,
    chunk_tokens: int,
    quota: int,
    rule: PackRule,
) -> tuple[StepPack, ...]:
    """The ordered micro-batch contributions of the rest of one optimizer batch.

    ``samples``: the task's whole batch. ``left``: positions not yet computed; None: all.
    ``quota``: chunks (rows) of this task per micro-batch. Raises ConfigError where the longest
    sequence does not fit, or the batch is empty.
    """
    return tuple(
        _lay_out(samples, units, chunk_tokens)
        for units in _assign(samples, left, chunk_tokens, quota, rule)
    )


def pack_loads(
    samples: Sequence[Sample],
    left: Sequence[int] | None,
    chunk_tokens: int,
    quota: int,
    rule: PackRule,
) -> list[PackLoad]:
    """The loads of what ``pack_step`` would return, without building the pieces."""
    return [_load(samples, units) for units in _assign(samples, left, chunk_tokens, quota, rule)]


class ChunkedBatch:
    """One whole optimizer batch cut into chunks, to ask what different quotas make of it."""

    def __init__(self, samples: Sequence[Sample], chunk_tokens: int) -> None:
        self._units = _make_units(samples, range(len(samples)), chunk_tokens)

    def num_chunks(self, quota: int) -> list[int]:
        """Chunks that each micro-batch fills; the quota must hold the longest sequence."""
        filled = _fill_micro_batches(self._units, quota)
        return [sum([unit.num_chunks for unit in units]) for units in filled]


# ------------------------------------------------------------------------------ assignment


def _assign(
    samples: Sequence[Sample],
    left: Sequence[int] | None,
    chunk_tokens: int,
    quota: int,
    rule: PackRule,
) -> list[list[_Unit]]:
    positions = range(len(samples)) if left is None else sorted(left)
    if not positions:
        raise ConfigError(
            "batch", "an optimizer batch holds no sequence", "give each step at least one sequence"
        )
    _check_fit(max(samples[p].tokens for p in positions), chunk_tokens, quota, rule)
    if rule is PackRule.PAD:
        rows = [_Unit(1, -1, [position]) for position in positions]
        return [rows[at : at + quota] for at in range(0, len(rows), quota)]
    return _fill_micro_batches(_make_units(samples, positions, chunk_tokens), quota)


def _check_fit(longest: int, chunk_tokens: int, quota: int, rule: PackRule) -> None:
    if chunk_tokens < 1 or quota < 1:
        raise ConfigError(
            "quota", f"chunk length {chunk_tokens} and quota {quota} must be at least 1", "raise it"
        )
    if rule is PackRule.PAD and longest > chunk_tokens:
        raise ConfigError(
            "chunk_tokens",
            f"a sequence of {longest} tokens is longer than a padded row of {chunk_tokens}",
            f"add a shape with chunk_tokens of at least {longest}, or lower max_length_tokens",
        )
    needed = min_quota(longest, chunk_tokens, rule)
    if needed > quota:
        raise ConfigError(
            "quota",
            f"a sequence of {longest} tokens needs {needed} chunks of {chunk_tokens} tokens in one "
            f"micro-batch, but the quota is {quota}",
            f"raise the quota to {needed}, lengthen the chunks, or lower max_length_tokens",
        )


def _make_units(
    samples: Sequence[Sample], positions: Iterable[int], chunk_tokens: int
) -> list[_Unit]:
    """Long sequences take whole chunks and leave room in their last one; short ones go, longest
    first, into the tightest room that is left (ties: the older chunk)."""
    units: list[_Unit] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, index of the unit), sorted
    for negative_tokens, position in sorted((-samples[p].tokens, p) for p in positions):
        tokens = -negative_tokens
        if tokens > chunk_tokens:
            num_chunks = -(-tokens // chunk_tokens)
            insort(rooms, (num_chunks * chunk_tokens - tokens, len(units)))
            units.append(_Unit(num_chunks, position, []))
            continue
        at = bisect_left(rooms, (tokens, -1))
        if at < len(rooms):
            free, index = rooms.pop(at)
            units[index].short_positions.append(position)
            insort(rooms, (free - tokens, index))
        else:
            insort(rooms, (chunk_tokens - tokens, len(units)))
            units.append(_Unit(1, -1, [position]))
    return units


def _fill_micro_batches(units: list[_Unit], quota: int) -> list[list[_Unit]]:
    """Units to micro-batches of at most ``quota`` chunks, as few as can be.

    Best fit is kept where it provably needs the fewest. Elsewhere one micro-batch of a better
    solution is split off and the rest is solved afresh, which keeps the result suffix-stable.
    """
    micro_batches: list[list[_Unit]] = []
    rest = sorted(units, key=lambda unit: -unit.num_chunks)  # stable: ties keep their order
    best_fit = _best_fit(rest, quota)
    while rest:
        fewest = -(-sum(unit.num_chunks for unit in rest) // quota)
        if len(best_fit) == fewest:
            return micro_batches + best_fit
        split, proven = None, False
        if len(rest) <= _MAX_SEARCHED_UNITS:
            split, proven = _better_split(rest, quota, fewest, len(best_fit) - 1)
        if split is None and proven:
            return micro_batches + best_fit
        first = best_fit[0] if split is None else split
        micro_batches.append(first)
        taken = {id(unit) for unit in first}
        rest = [unit for unit in rest if id(unit) not in taken]
        # Without its first micro-batch, best fit is best fit of the rest.
        best_fit = best_fit[1:] if split is None else _best_fit(rest, quota)
    return micro_batches


def _best_fit(units: list[_Unit], quota: int) -> list[list[_Unit]]:
    micro_batches: list[list[_Unit]] = []
    rooms: list[tuple[int, int]] = []
    for unit in units:
        at = bisect_left(rooms, (unit.num_chunks, -1))
        if at < len(rooms):
            free, index = rooms.pop(at)
            micro_batches[index].append(unit)
        else:
            free, index = quota, len(micro_batches)
            micro_batches.append([unit])
        insort(rooms, (free - unit.num_chunks, index))
    return micro_batches


def _better_split(
    units: list[_Unit], quota: int, fewest: int, most: int
) -> tuple[list[_Unit] | None, bool]:
    """The first micro-batch of a solution with at most ``most`` micro-batches, or None, and
    whether the search was complete."""
    sizes = sorted((unit.num_chunks for unit in units), reverse=True)
    search = _BinSearch(quota)
    for num_bins in range(fewest, most + 1):
        first = search.first_bin(tuple(sizes), num_bins)
        if first is not None:
            return _units_of_sizes(units, first), True
        if search.exhausted:
            return None, False
    return None, True


def _units_of_sizes(units: list[_Unit], sizes: Sequence[int]) -> list[_Unit]:
    wanted = list(sizes)
    chosen = []
    for unit in units:
        if unit.num_chunks in wanted:
            wanted.remove(unit.num_chunks)
            chosen.append(unit)
    return chosen


class _BinSearch:
    """Exact bin-packing of a few sizes by completing the bin of the largest one, depth first."""

    def __init__(self, quota: int) -> None:
        self.quota = quota
        self.exhausted = False
        self._tried = 0
        self._known: dict[tuple[tuple[int, ...], int], tuple[int, ...] | None] = {}

    def first_bin(self, sizes: tuple[int, ...], num_bins: int) -> tuple[int, ...] | None:
        """Sizes of the bin that holds the largest item in a packing into ``num_bins`` bins;
        None: there is none, or the search was exhausted. ``sizes`` descend."""
        if sum(sizes) > num_bins * self.quota:
            return None
        key = (sizes, num_bins)
        if key not in self._known:
            self._known[key] = self._search(sizes, num_bins)
        return self._known[key]

    def _search(self, sizes: tuple[int, ...], num_bins: int) -> tuple[int, ...] | None:
        for bin_sizes in self._fillings(sizes[1:], self.quota - sizes[0], (sizes[0],)):
            self._tried += 1
            if self._tried > _SEARCH_LIMIT:
                self.exhausted = True
                return None
            rest = _without(sizes, bin_sizes)
            if not rest or (num_bins > 1 and self.first_bin(rest, num_bins - 1) is not None):
                return bin_sizes
        return None

    def _fillings(
        self, sizes: tuple[int, ...], room: int, chosen: tuple[int, ...]
    ) -> Iterable[tuple[int, ...]]:
        """Maximal fillings of ``room``, larger items first, equal ones once."""
        seen = 0
        extended = False
        for at, size in enumerate(sizes):
            if size > room or size == seen:
                continue
            seen = size
            extended = True
            yield from self._fillings(sizes[at + 1 :], room - size, (*chosen, size))
        if not extended:
            yield chosen


def _without(sizes: tuple[int, ...], taken: Iterable[int]) -> tuple[int, ...]:
    rest = list(sizes)
    for size in taken:
        rest.remove(size)
    return tuple(rest)


# ---------------------------------------------------------------------------------- layout


def _positions_of(units: Iterable[_Unit]) -> tuple[int, ...]:
    positions = [p for unit in units for p in unit.short_positions]
    positions += [unit.long_position for unit in units if unit.long_position >= 0]
    positions.sort()
    return tuple(positions)


def _load(samples: Sequence[Sample], units: list[_Unit]) -> PackLoad:
    positions = _positions_of(units)
    lengths = [samples[p].tokens for p in positions]
    return PackLoad(
        num_chunks=sum(unit.num_chunks for unit in units),
        positions=positions,
        tokens=sum(lengths),
        attention_pairs=sum(n * (n + 1) // 2 for n in lengths),
        loss_rows=sum(samples[p].target_tokens for p in positions),
        longest_tokens=max(lengths),
    )


def _lay_out(samples: Sequence[Sample], units: list[_Unit], chunk_tokens: int) -> StepPack:
    load = _load(samples, units)
    chunks = tuple(chunk for unit in units for chunk in _chunks_of(samples, unit, chunk_tokens))
    return StepPack(chunks, *load[1:])


def _chunks_of(
    samples: Sequence[Sample], unit: _Unit, chunk_tokens: int
) -> list[tuple[SequenceSlice, ...]]:
    shorts = tuple(SequenceSlice(p, 0, samples[p].tokens) for p in unit.short_positions)
    if unit.long_position < 0:
        return [shorts]
    tokens = samples[unit.long_position].tokens
    starts = range(0, tokens, chunk_tokens)
    parts = [SequenceSlice(unit.long_position, at, min(at + chunk_tokens, tokens)) for at in starts]
    return [*((part,) for part in parts[:-1]), (parts[-1], *shorts)]
