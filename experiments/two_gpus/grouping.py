"""hTasks for two stages whose products fill whole waves of tiles (see ``muxtune.cost.tiles``).

python -m experiments.two_gpus.grouping     # the best and what the planner takes, by this measure

Of few rows, one tile more or less decides: a fifth more than 1,280 take an eighth longer, 1,024 as
long as 960. Only what is known before a round is used: the tiles of the kernels and the tokens of
the rounds to come.

Shape suffixes: R rounds, K tasks.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from muxtune.cost.schema import load_profile
from muxtune.cost.shapes import ModelShape
from muxtune.cost.shipped import profile_path, shipped_profiles
from muxtune.cost.tiles import Tiling

Groups = tuple[tuple[int, ...], ...]
SIZES, ROW_STEP, MOST_HTASKS, ROUNDS = 3, 64, 3, 24


def size_ladder(needed: Sequence[int]) -> list[int]:
    """At most SIZES numbers of rows: the largest that is needed, and others evenly among them."""
    ordered = sorted(needed)
    last = len(ordered) - 1
    return sorted({ordered[round(last * (i + 1) / SIZES)] for i in range(SIZES)})


def rows_taken(tokens: Sequence[int], step: int = ROW_STEP) -> tuple[list[int], list[int]]:
    """(sizes, which of them each round takes)."""
    needed = [-(-int(count) // step) * step for count in tokens]
    sizes = size_ladder(needed)
    return sizes, [next(i for i, rows in enumerate(sizes) if rows >= n) for n in needed]


class Products:
    """Units (see ``Tiling``) of one layer's forward and backward products."""

    def __init__(self, shape: ModelShape, tiling: Tiling) -> None:
        self.tiling = tiling
        sizes = {i.name.rsplit(".", 1)[-1]: (i.in_features, i.out_features)
                 for i in shape.block_linears}  # fmt: skip
        fused = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"),
                 ("down_proj",))  # fmt: skip
        self.linears = [(sizes[names[0]][0], [sizes[name][1] for name in names]) for names in fused]

    @lru_cache(maxsize=256)  # noqa: B019 - one object a program
    def units(self, rows: int) -> tuple[float, float]:
        forward = sum(self.tiling.units(rows, outs, inner) for inner, outs in self.linears)
        backward = sum(self.tiling.units(rows, [inner], sum(outs)) for inner, outs in self.linears)
        return forward, backward


def round_units(groups: Groups, tokens_RK: np.ndarray, products: Products) -> float:
    """A round of two stages, in the mean of ROUNDS that follow one another without a flush: an
    hTask's gradients come back to the first stage, which sends its next round at once."""
    works = []
    for group in groups:
        sizes, taken = rows_taken(tokens_RK[:, list(group)].sum(1))
        works.append([products.units(sizes[size]) for size in taken])
    sent = list(itertools.accumulate(work[0][0] for work in works))  # when it leaves the first
    first, second = sent[-1], 0.0
    for at in range(ROUNDS):
        for index, work in enumerate(works):
            forward, backward = work[at % len(work)]
            second = max(second, sent[index]) + forward + backward
            first = max(first, second) + backward
            if at + 1 < ROUNDS:
                first += work[(at + 1) % len(work)][0]
            sent[index] = first
    return max(first, second) / ROUNDS


def tiled_groups(tokens_RK: np.ndarray, shape: ModelShape, most: int = MOST_HTASKS) -> Groups:
    """Of all groupings into at most ``most`` hTasks the one whose rounds are shortest."""
    products, tasks = Products(shape, shipped_tiling()), range(tokens_RK.shape[1])
    found = (groups for groups in partitions(tuple(tasks), most) if len(groups) > 1)
    return min(found, key=lambda groups: (round_units(groups, tokens_RK, products), groups))


def partitions(items: tuple[int, ...], most: int) -> Iterator[Groups]:
    if not items:
        yield ()
        return
    first, rest = items[:1], items[1:]
    for found in partitions(rest, most):
        for i, group in enumerate(found):
            yield (*found[:i], (*first, *group), *found[i + 1 :])
        if len(found) < most:
            yield (first, *found)


def shipped_tiling() -> Tiling:
    """Of the kernels, on a GPU with an H100's multiprocessors, as an H200 has them too."""
    name = next(name for name in shipped_profiles() if name.startswith("h100"))
    return Tiling.of_json(load_profile(profile_path(name)).program["tiles"])


def main() -> None:
    from experiments.two_gpus.cases import MODEL, PIPELINE, groups_of, tokens_by_round
    from muxtune.cost.shapes import model_shape

    argparse.ArgumentParser(description=__doc__).parse_args()
    tokens_RK, products = tokens_by_round(), Products(model_shape(MODEL), shipped_tiling())
    planned = round_units(groups_of(PIPELINE, "planned"), tokens_RK, products)
    print("| hTasks | tasks | rows | round, of the planner's |\n| --- | --- | --- | --- |")
    for name in ("planned", "planned, measured costs", "tiles", "2", "3", "4"):
        groups = groups_of(PIPELINE, name)
        rows = [rows_taken(tokens_RK[:, list(group)].sum(1)) for group in groups]
        means = ", ".join(f"{np.mean([s[i] for i in taken]):.0f}" for s, taken in rows)
        share = round_units(groups, tokens_RK, products) / planned
        print(f"| {name} | {groups} | {means} | {share:.3f} |")


if __name__ == "__main__":
    main()
