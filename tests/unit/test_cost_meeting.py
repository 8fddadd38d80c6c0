"""How slots meet in tiles, against the loops that the kernels go through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.cost.meeting import ALONE, ALONE_STEP, HELD_UP, meet

FILLER, RANK_STEP = -1, 16
GROUP_T = 8  # of muxtune_kernels.multi_lora.gemm, as its launches have it
RANKS = (0, 16, 32, 64)


class Looped(NamedTuple):
    reads: float
    steps: float


def loops_of_tile(slot_T: Sequence[int], ranks: Sequence[int]) -> Looped:
    """Reads of the rows and low-rank steps of one tile, as ``_shrink_tile`` and ``_linear_tile`` go
    through its slots."""
    first = min((slot for slot in slot_T if slot != FILLER), default=0)
    after = max(slot_T) + 1
    if slot_T[0] != FILLER and all(slot == slot_T[0] for slot in slot_T):
        rank = ranks[slot_T[0]]
        return Looped(ALONE if rank else 0.0, ALONE_STEP * rank / RANK_STEP)
    reads = steps = 0
    most = max((ranks[slot] for slot in slot_T if slot != FILLER), default=0)
    for slot in range(first, after, 2):
        reads += any(each in (slot, slot + 1) and ranks[each] > 0 for each in slot_T)
    for _ in range(most // RANK_STEP):
        for _ in range(first, after, 2):
            steps += 1
    return Looped(reads, steps)


def looped(
    slot_rows: Sequence[int], ranks: Sequence[int], num_rows: int, tile_rows: int
) -> list[Looped]:
    slot_of_row = [slot for slot, rows in enumerate(slot_rows) for _ in range(rows)]
    slot_of_row += [FILLER] * (num_rows - len(slot_of_row))
    starts = range(0, num_rows, tile_rows)
    return [loops_of_tile(slot_of_row[start : start + tile_rows], ranks) for start in starts]


def check_against_loops(
    slot_rows: Sequence[int], ranks: Sequence[int], num_rows: int, tile_rows: int
) -> None:
    found = meet(tuple(slot_rows), tuple(ranks), num_rows, tile_rows)
    tiles = looped(slot_rows, ranks, num_rows, tile_rows)
    assert found.most_pairs == max(tile.reads for tile in tiles)
    assert found.steps_N.tolist() == pytest.approx([tile.steps for tile in tiles])
    assert found.used == sum(tile.steps > 0 for tile in tiles)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Sequence[int], Sequence[int], int, int]:
    """Slots of which some have no rows, some no rank; rows that are no whole tiles."""
    count = draw(st.integers(1, 20))
    rows = st.one_of(st.just(0), st.integers(1, 40), st.sampled_from([64, 128, 300]))
    slot_rows = draw(st.lists(rows, min_size=count, max_size=count))
    ranks = draw(st.lists(st.sampled_from(RANKS), min_size=count, max_size=count))
    filler = draw(st.sampled_from([0, 1, 31, 64, 200]))
    return slot_rows, ranks, max(1, sum(slot_rows) + filler), draw(st.sampled_from([64, 128]))


@settings(max_examples=400, deadline=None)
@given(layouts())
def test_slots_meet_as_the_kernels_loops_go(
    layout: tuple[Sequence[int], Sequence[int], int, int],
) -> None:
    check_against_loops(*layout)


@pytest.mark.parametrize(
    ("slot_rows", "ranks", "num_rows"),
    [
        ([0, 0, 0], [16, 16, 16], 256),  # filler only
        ([256], [16], 256),  # one slot that has all tiles
        ([130], [64], 256),  # one slot that ends in a tile
        ([0, 70, 0, 0, 70, 0], [16, 0, 64, 16, 32, 64], 192),  # slots without rows between
        ([20] * 12, [0] * 12, 256),  # nobody adapts the linear
    ],
)
def test_layouts_that_are_easily_got_wrong(
    slot_rows: list[int], ranks: list[int], num_rows: int
) -> None:
    for tile_rows in (64, 128):
        check_against_loops(slot_rows, ranks, num_rows, tile_rows)


def test_slots_by_hand() -> None:
    # Tiles of 128: [0, 0, 1, 2] of which 1 has no rank, then 2 alone, then 2 and filler.
    found = meet((80, 20, 200), (16, 0, 32), 384, 128)
    assert found.steps_N.tolist() == pytest.approx([2 * 2.0, 0.4 * 2.0, 1 * 2.0])
    assert (found.most_pairs, found.used) == (2, 3)
    # A pair is gone through though its slots have no rows in the tile, but its rows are not read.
    skipped = meet((10, 0, 0, 0, 10), (16,) * 5, 128, 128)
    assert skipped.steps_N.tolist() == [3.0] and skipped.most_pairs == 2


def most_by_plain_loop(
    steps_N: Sequence[float], across: int, num_programs: int
) -> tuple[float, float]:
    """(of the program with most, of the slowest tile of every wave). Each program's tiles in the
    kernel's own order, of which it computes every ``num_programs``-th."""
    down, most, slowest = len(steps_N), 0.0, [0.0] * (len(steps_N) * across)
    for program in range(num_programs):
        own = 0.0
        for wave, tile in enumerate(range(program, down * across, num_programs)):
            group = tile // (GROUP_T * across)
            size = min(down - group * GROUP_T, GROUP_T)
            steps = steps_N[group * GROUP_T + (tile % (GROUP_T * across)) % size]
            own, slowest[wave] = own + steps, max(slowest[wave], steps)
        most = max(most, own)
    return most, sum(slowest)


@settings(max_examples=150, deadline=None)
@given(layouts(), st.integers(1, 48), st.sampled_from([1, 2, 7, 108, 132]))
def test_most_steps_lie_between_the_kernels_program_with_most_and_its_slowest_tiles(
    layout: tuple[Sequence[int], Sequence[int], int, int], across: int, num_multiprocessors: int
) -> None:
    slot_rows, ranks, num_rows, tile_rows = layout
    found = meet(tuple(slot_rows), tuple(ranks), num_rows, tile_rows)
    most, slowest = most_by_plain_loop(found.steps_N.tolist(), across, num_multiprocessors)
    expected = most + HELD_UP * (slowest - most)
    assert found.most_steps(across, num_multiprocessors) == pytest.approx(expected)


def test_groups_of_tiles_put_a_full_tile_s_columns_side_by_side() -> None:
    """Of 9 tiles of rows one has steps. In a group of 8, its columns come to every eighth program;
    the ninth is a group of its own, whose columns come to one program after the other."""
    first = meet((128,) + (0,) * 2, (16, 16, 16), 9 * 128, 128)
    assert first.most_steps(4, 8) == pytest.approx(4 * ALONE_STEP), "program 0 has all four"
    last = meet((8 * 128, 128), (0, 16), 9 * 128, 128)
    assert np.flatnonzero(last.steps_N).tolist() == [8]
    assert last.most_steps(4, 8) == pytest.approx(ALONE_STEP), "four programs have one each"
