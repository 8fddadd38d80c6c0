"""Mixes of drawn tasks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.errors import ConfigError
from muxtune.workload.mix import DEFAULT_MIX, MIX_FIELDS, task_mix


def drawn(content, name: str, num_tasks: int = 20_000, seed: int = 0) -> list:
    draws = task_mix(content, model="tiny").draw(num_tasks, seed)
    return [draws.values[name][index] for index in draws.index[name].tolist()]


def share(values: list, value: object) -> float:
    return sum(item == value for item in values) / len(values)


def test_shares_are_those_configured() -> None:
    content = [
        {"histogram": "sst2", "weight": 3, "rank": {8: 1, 16: 3}, "model": {"x": 1, "y": 1}},
        {"histogram": {"rte": 1, "gsm8k": 1}, "rank": 64, "targets": ["q", "v"]},
    ]
    assert share(drawn(content, "histogram"), "sst2") == pytest.approx(0.75, abs=0.02)
    assert share(drawn(content, "histogram"), "gsm8k") == pytest.approx(0.125, abs=0.02)
    ranks = drawn(content, "rank")
    assert share(ranks, 16) == pytest.approx(0.75 * 0.75, abs=0.02)
    assert share(ranks, 64) == pytest.approx(0.25, abs=0.02)
    assert share(drawn(content, "model"), "tiny") == pytest.approx(0.25, abs=0.02)
    assert set(drawn(content, "targets")) == {("all-linear",), ("q", "v")}


def test_fields_of_an_entry_stay_together() -> None:
    lengths = {entry["histogram"]: entry["max_length_tokens"] for entry in DEFAULT_MIX}
    names, limits = drawn(DEFAULT_MIX, "histogram"), drawn(DEFAULT_MIX, "max_length_tokens")
    assert all(lengths[name] == limit for name, limit in zip(names, limits, strict=True))


def test_one_field_does_not_move_the_others() -> None:
    plain = {"histogram": {"sst2": 1, "rte": 1}, "rank": {4: 1, 8: 1}}
    changed = {**plain, "batch_size": {1: 1, 2: 5}}
    assert drawn(plain, "rank") == drawn(changed, "rank")
    assert drawn(plain, "histogram") == drawn(changed, "histogram")
    ranks, names = drawn(plain, "rank"), drawn(plain, "histogram")
    together = sum(rank == 4 and name == "sst2" for rank, name in zip(ranks, names, strict=True))
    assert together / len(ranks) == pytest.approx(0.25, abs=0.02)  # drawn apart


def test_seed_decides() -> None:
    assert drawn(DEFAULT_MIX, "rank", seed=4) == drawn(DEFAULT_MIX, "rank", seed=4)
    assert drawn(DEFAULT_MIX, "rank", seed=4) != drawn(DEFAULT_MIX, "rank", seed=5)


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=8).filter(lambda w: sum(w) > 1e-6),
    st.integers(0, 9),
)
def test_any_weights_draw_values_that_exist_and_have_weight(
    weights: list[float], seed: int
) -> None:
    content = {"histogram": "sst2", "rank": {index + 1: w for index, w in enumerate(weights)}}
    mix = task_mix([content, {"histogram": "rte", "weight": 0}], model="tiny")
    draws = mix.draw(500, seed)
    assert set(draws.index) == set(MIX_FIELDS)
    ranks = np.array(draws.values["rank"])[draws.index["rank"]]
    assert all(weights[rank - 1] > 0 for rank in ranks.tolist())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "mix: holds no entry"),
        ("sst2", "mix: holds no entry"),
        ([3], "mix: entry 1: expected fields"),
        ({"histogram": "sst2", "rnak": 1}, "entry 1: rnak: .*Did you mean 'rank'"),
        ({"rank": 8}, "entry 1: histogram: is missing"),
        ({"histogram": "sst3"}, "entry 1: histogram: 'sst3' is not .*Choose one of: arc_challenge"),
        ({"histogram": "sst2", "rank": 0}, "entry 1: rank: 0 is out of range"),
        ({"histogram": "sst2", "rank": {8: -1}}, "entry 1: rank: 8: -1 is out of range"),
        ({"histogram": "sst2", "rank": {8: 0}}, "entry 1: rank: all weights are 0"),
        ({"histogram": "sst2", "rank": {}}, "entry 1: rank: all weights are 0"),
        ({"histogram": "sst2", "weight": 0}, "mix: all weights are 0"),
        ({"histogram": "sst2", "weight": float("nan")}, "entry 1: weight: nan is not a number"),
        ({"histogram": "sst2", "max_slowdown": 0.9}, "max_slowdown: 0.9 is out of range"),
        ({"histogram": "sst2", "tokenizer": "bert"}, "tokenizer: .*has no tokenizer 'bert'"),
        ({"histogram": "sst2", "method": "lorra"}, "method: 'lorra' is not a known method"),
        ({"histogram": "sst2", "model": ""}, "model: '' is not a base model's name"),
    ],
)
def test_bad_mixes(content: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        task_mix(content, model="tiny")
