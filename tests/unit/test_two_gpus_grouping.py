"""HTasks of two stages by the tiles of their products."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.two_gpus.cases import MODEL, PIPELINE, groups_of, tokens_by_round
from experiments.two_gpus.grouping import (
    ROUNDS,
    Products,
    partitions,
    round_units,
    rows_taken,
    shipped_tiling,
    tiled_groups,
)
from muxtune.cost.shapes import model_shape


def products() -> Products:
    return Products(model_shape(MODEL), shipped_tiling())


def test_partitions_are_all_of_them_once() -> None:
    found = [frozenset(map(frozenset, groups)) for groups in partitions((0, 1, 2, 3, 4), 3)]
    assert len(found) == len(set(found)) == 1 + 15 + 25  # Stirling numbers of the second kind
    assert all(sorted(i for group in groups for i in group) == [*range(5)] for groups in found)


def test_sizes_hold_what_rounds_need() -> None:
    sizes, taken = rows_taken([65, 700, 64, 1000, 300])
    assert sizes == [128, 704, 1024]
    assert [sizes[i] for i in taken] == [128, 704, 128, 1024, 704]


def test_units_go_by_waves() -> None:
    """132 multiprocessors: 5,120 features are 20 tiles of columns."""
    forward = {rows: products().units(rows)[0] for rows in (960, 1024, 1280, 1536, 1600)}
    a_row = {rows: units / rows for rows, units in forward.items()}
    assert forward[960] == forward[1024]  # tiles that are not full cost as much
    assert a_row[1536] < a_row[1280]  # waves that were begun are filled
    assert a_row[1600] > a_row[1536]  # one more row of tiles is begun


def test_two_equal_htasks_keep_two_stages_busy() -> None:
    tokens_RK = np.full((2, 2), 640)
    forward, backward = products().units(640)
    whole = ROUNDS * round_units(((0,), (1,)), tokens_RK, products())
    # The second stage begins when the first hTask is there; the last gradient goes back.
    assert whole == pytest.approx(2 * ROUNDS * (forward + backward) + forward + backward)
    alone = ROUNDS * round_units(((0, 1),), tokens_RK, products())
    assert alone == pytest.approx(2 * ROUNDS * sum(products().units(1280)))


def test_the_best_is_no_worse_than_any_and_better_than_the_planners() -> None:
    tokens_RK = tokens_by_round()
    best = tiled_groups(tokens_RK, model_shape(MODEL))
    least = round_units(best, tokens_RK, products())
    assert least < 0.97 * round_units(groups_of(PIPELINE, "planned"), tokens_RK, products())
    some = list(partitions(tuple(range(8)), 3))[7::50]
    assert all(least <= round_units(groups, tokens_RK, products()) for groups in some)
