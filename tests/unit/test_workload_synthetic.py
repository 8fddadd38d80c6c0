"""Histograms and the library of drawn lengths."""

import csv
from importlib import resources

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.errors import ConfigError
from muxtune.types import DataSpec, TaskSpec
from muxtune.workload.synthetic import SyntheticLibrary, histogram, histogram_names, tokenizer_of


def task(task_id: str = "a", name: str = "sst2", **changes) -> TaskSpec:
    data = DataSpec(
        histogram=name,
        tokenizer=changes.pop("tokenizer", ""),
        max_length_tokens=changes.pop("max_length_tokens", 64),
    )
    return TaskSpec(task_id, "tiny", data=data, **{"num_steps": 5, **changes})


def test_histograms_have_the_published_moments() -> None:
    file = resources.files("muxtune.workload") / "data" / "seqlen" / "summary.csv"
    with file.open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 24
    for row in rows:
        table = histogram(row["dataset"], row["tokenizer"])
        assert table.num_sequences == int(row["n"])
        assert table.mean_tokens(10**9) == pytest.approx(float(row["mean"]), abs=0.051)
        assert table.lengths_tokens[-1] == int(row["max"])


def test_mean_with_a_maximum() -> None:
    table = histogram("rte")
    lengths = np.repeat(table.lengths_tokens, table.counts)
    assert table.mean_tokens(80) == pytest.approx(np.minimum(lengths, 80).mean())


def test_default_tokenizer() -> None:
    assert tokenizer_of("sst2") == "llama2-32k"
    assert tokenizer_of("azure_llm_conv_2023") == "as-logged"


def test_unknown_histogram_lists_those_that_exist() -> None:
    with pytest.raises(ConfigError) as caught:
        SyntheticLibrary().add(task("t7", "sst-2"))
    message = str(caught.value)
    assert "task 't7': histogram: histogram 'sst-2' does not exist. Did you mean 'sst2'?" in message
    assert all(name in message for name in histogram_names())
    with pytest.raises(ConfigError, match=r"no tokenizer 'bert'.*gpt2-bpe-50k, llama2-32k"):
        SyntheticLibrary().add(task(tokenizer="bert"))
    with pytest.raises(ConfigError, match="is not set, so lengths cannot be drawn"):
        SyntheticLibrary().add(task(name=""))


def test_period_repeats_and_is_within_the_maximum() -> None:
    library = SyntheticLibrary(seed=3, period_steps=4)
    summary = library.add(task(name="rte", max_length_tokens=100, accumulation=2)).lengths
    batches = [library.batch("a", step) for step in range(8)]
    assert batches[:4] == batches[4:] and library.period_steps("a") == 4
    samples = [sample for batch in batches[:4] for sample in batch]
    assert [len(batch) for batch in batches] == [16] * 8
    assert [sample.index for sample in samples] == list(range(64))
    tokens = np.array([sample.tokens for sample in samples])
    assert tokens.min() >= 2 and tokens.max() == 100 == summary.max_tokens
    assert all(sample.target_tokens == sample.tokens - 1 for sample in samples)
    assert (summary.num_sequences, summary.mean_tokens) == (64, tokens.mean())


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(histogram_names()), st.integers(1, 64), st.integers(0, 3))
def test_a_period_has_nearly_the_histograms_mean(name: str, batch_size: int, seed: int) -> None:
    library = SyntheticLibrary(seed=seed)
    summary = library.add(task("a", name, batch_size=batch_size, max_length_tokens=512)).lengths
    expected = histogram(name).mean_tokens(512)
    # One draw from each of n equal slices: the error is at most the range over n.
    assert abs(summary.mean_tokens - expected) <= 512 / (16 * batch_size)


def test_tasks_of_a_class_share_everything() -> None:
    library = SyntheticLibrary()
    first, second = library.add(task("a", seed=1)), library.add(task("b", seed=2, num_steps=9))
    assert first.lengths is second.lengths
    assert library.batch("a", 3) is library.batch("b", 3 + 16)
    assert library.lengths_key("a") == library.lengths_key("b")
    assert (library.num_steps("a"), library.num_steps("b")) == (5, 9)


def test_classes_differ_in_key_and_draws() -> None:
    library = SyntheticLibrary(num_variants=2)
    variants = {
        "a": task("a"),
        "b": task("b", seed=1),
        "c": task("c", batch_size=4),
        "d": task("d", max_length_tokens=32),
        "e": task("e", "rte"),
        "f": task("f", tokenizer="llama3-128k"),
    }
    for spec in variants.values():
        library.add(spec)
    assert len({library.lengths_key(task_id) for task_id in variants}) == 6
    assert library.batch("a", 0) != library.batch("b", 0)
    library.add(task("g", seed=2))
    assert library.lengths_key("g") == library.lengths_key("a")


def test_draws_depend_on_the_seed_not_on_the_order() -> None:
    specs = [task("a"), task("b", "rte"), task("c", batch_size=2)]
    forwards, backwards, other = (SyntheticLibrary(seed=seed) for seed in (5, 5, 6))
    for spec in specs:
        forwards.add(spec)
        other.add(spec)
    for spec in reversed(specs):
        backwards.add(spec)
    for spec in specs:
        assert forwards.batch(spec.task_id, 1) == backwards.batch(spec.task_id, 1)
        assert forwards.lengths_key(spec.task_id) == backwards.lengths_key(spec.task_id)
    assert forwards.lengths_key("a") != other.lengths_key("a")


def test_epochs_count_the_original_data_set() -> None:
    ready = SyntheticLibrary().add(task(name="rte", num_steps=None, epochs=2))
    assert ready.num_steps == -(-2 * 2489 // 8)
    with pytest.raises(ConfigError, match="steps, epochs: neither"):
        SyntheticLibrary().add(task(num_steps=None))


def test_constructor_and_discard() -> None:
    with pytest.raises(ConfigError, match="period_steps: 0 is out of range"):
        SyntheticLibrary(period_steps=0)
    library = SyntheticLibrary()
    library.add(task())
    library.discard("a")
    library.discard("a")
    with pytest.raises(KeyError):
        library.num_steps("a")
