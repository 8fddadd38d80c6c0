"""The library of real data sets: splits, order of batches, epochs, hashes, caching."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.errors import ConfigError, DataError
from muxtune.types import DataSpec, TaskSpec
from muxtune.workload.datasets import DatasetLibrary, split_documents


class Characters:
    bos_id, eos_id, max_length_tokens = None, 2, 64

    def __init__(self) -> None:
        self.encoded = 0

    def encode(self, text: str) -> list[int]:
        self.encoded += 1
        return [ord(character) for character in text]

    def render_chat(self, messages, add_generation_prompt: bool) -> str:
        raise NotImplementedError


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def texts(count: int) -> list[str]:
    return [f"{number}" * (1 + number % 5) for number in range(100, 100 + count)]


def task(path: Path, task_id: str = "a", **changes) -> TaskSpec:
    data = {
        "path": str(path),
        "max_length_tokens": changes.pop("max_length_tokens", 64),
        "validation_share": changes.pop("validation_share", 0.2),
    }
    changes = {"batch_size": 4, "num_steps": 3, "seed": 1, **changes}
    return TaskSpec(task_id, "tiny", data=DataSpec(**data), **changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "data.jsonl", texts(23))


@pytest.fixture
def library() -> DatasetLibrary:
    tokenizer = Characters()
    return DatasetLibrary(lambda model: tokenizer)


def spelt(sequence) -> str:
    return "".join(map(chr, sequence.tokens[:-1]))


def stream(library: DatasetLibrary, task_id: str, steps: int) -> list[int]:
    return [sample.index for step in range(steps) for sample in library.batch(task_id, step)]


def test_samples_are_the_sequences(library: DatasetLibrary, path: Path) -> None:
    ready = library.add(task(path))
    for step in range(9):
        for index, tokens, target_tokens in library.batch("a", step):
            sequence = library.sequence("a", index)
            assert tokens == len(sequence.tokens) and sequence.tokens.dtype == np.int32
            assert target_tokens == sequence.target_mask.sum() == tokens - 1
    held = library.validation("a")
    assert ready.lengths.num_sequences == 18 and len(held) == 5
    training = [spelt(library.sequence("a", index)) for index in range(18)]
    assert sorted(training + [spelt(sequence) for sequence in held]) == sorted(texts(23))


def test_summary_tells_the_lengths(library: DatasetLibrary, path: Path) -> None:
    summary = library.add(task(path)).lengths
    tokens = np.array([len(library.sequence("a", index).tokens) for index in range(18)])
    assert summary.mean_tokens == pytest.approx(tokens.mean())
    assert summary.mean_target_tokens == pytest.approx(tokens.mean() - 1)
    assert summary.mean_square_tokens == pytest.approx((tokens**2).mean())
    assert len(summary.quantiles_tokens) == 33
    assert list(summary.quantiles_tokens) == sorted(summary.quantiles_tokens)
    ends = (summary.quantiles_tokens[0], summary.quantiles_tokens[-1])
    assert ends == (tokens.min(), tokens.max()) and summary.max_tokens == tokens.max()


def test_every_epoch_is_a_new_order_of_all_sequences(library: DatasetLibrary, path: Path) -> None:
    library.add(task(path))
    indexes = stream(library, "a", 9)  # 36 sequences: two epochs, the fifth batch spans both
    first, second = indexes[:18], indexes[18:]
    assert sorted(first) == sorted(second) == list(range(18)) and first != second
    assert library.period_steps("a") is None


def test_batches_larger_than_the_data(library: DatasetLibrary, path: Path) -> None:
    library.add(task(path, batch_size=40, accumulation=2))
    assert len(library.batch("a", 0)) == 80
    assert sorted(stream(library, "a", 9)) == sorted(list(range(18)) * 40)


def test_order_depends_on_the_seed_only(library: DatasetLibrary, path: Path) -> None:
    for task_id, seed in (("a", 1), ("b", 1), ("c", 2)):
        library.add(task(path, task_id, seed=seed))
    backwards = [library.batch("b", step) for step in reversed(range(30))][::-1]
    assert [library.batch("a", step) for step in range(30)] == backwards
    assert stream(library, "a", 4) != stream(library, "c", 4)
    assert library.lengths_key("a") == library.lengths_key("b") != library.lengths_key("c")
    other = DatasetLibrary(lambda model: Characters())
    other.add(task(path))
    assert stream(other, "a", 9) == stream(library, "a", 9)
    assert other.lengths_key("a") == library.lengths_key("a")


def test_keys_differ_when_batches_do(library: DatasetLibrary, path: Path) -> None:
    library.add(task(path))
    library.add(task(path, "b", batch_size=2))
    library.add(task(path, "c", batch_size=2, accumulation=2))
    assert library.lengths_key("a") == library.lengths_key("c") != library.lengths_key("b")


def test_hash_follows_the_content(library: DatasetLibrary, path: Path, tmp_path: Path) -> None:
    original = library.add(task(path, validation_share=0.0)).lengths
    copy = write(tmp_path / "copy.jsonl", texts(23))
    assert library.add(task(copy, "b", validation_share=0.0)).lengths == original
    changed = write(tmp_path / "other.jsonl", ["x" + text[1:] for text in texts(23)])
    other = library.add(task(changed, "c", validation_share=0.0)).lengths
    assert other.content_hash != original.content_hash
    assert other.quantiles_tokens == original.quantiles_tokens


def test_same_tokens_with_other_targets_have_another_hash(tmp_path: Path) -> None:
    library = DatasetLibrary(lambda model: Characters())
    hashes = set()
    for number, (prompt, completion) in enumerate((("ab", "cd"), ("abc", "d"))):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps({"prompt": prompt, "completion": completion}), "utf-8")
        added = library.add(task(path, f"t{number}", validation_share=0.0))
        hashes.add(added.lengths.content_hash)
    assert len(hashes) == 2


@pytest.mark.parametrize(("epochs", "steps"), [(1, 5), (2, 9), (0.5, 3), (0.01, 1)])
def test_epochs_become_steps_rounded_up(
    library: DatasetLibrary, path: Path, epochs: float, steps: int
) -> None:
    ready = library.add(task(path, num_steps=None, epochs=epochs))  # 18 sequences, 4 a step
    assert ready.num_steps == library.num_steps("a") == steps


def test_no_held_out_share(library: DatasetLibrary, path: Path) -> None:
    assert library.add(task(path, validation_share=0.0)).lengths.num_sequences == 23
    assert library.validation("a") == ()


def test_pieces_of_a_document_stay_on_one_side(library: DatasetLibrary, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [letter * 30 for letter in "abcdefghij"])
    library.add(task(path, max_length_tokens=8, validation_share=0.3))
    size = library.add(task(path, max_length_tokens=8, validation_share=0.3)).lengths.num_sequences
    training = {chr(library.sequence("a", index).tokens[0]) for index in range(size)}
    held = {chr(sequence.tokens[0]) for sequence in library.validation("a")}
    assert len(held) == 3 and len(training) == 7 and not held & training


@given(
    st.lists(st.sampled_from("abcdef"), min_size=2, max_size=40).filter(lambda k: len(set(k)) > 1),
    st.floats(0.001, 0.9),
    st.integers(0, 5),
)
def test_split_never_leaks(keys: list[str], share: float, seed: int) -> None:
    training, held = split_documents(keys, share, seed)
    training_keys, held_keys = ({keys[index] for index in side} for side in (training, held))
    assert training_keys and held_keys and not training_keys & held_keys
    assert training_keys | held_keys == set(keys) and len(held) == len(held_keys)
    assert len(training) == sum(key in training_keys for key in keys)
    assert abs(len(held) - share * len(set(keys))) <= 1
    assert (training, held) == split_documents(keys, share, seed)


def test_one_distinct_document_cannot_be_split(library: DatasetLibrary, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", ["same", "same"])
    with pytest.raises(DataError, match=r"d\.jsonl: fewer than two .* set validation_share to 0"):
        library.add(task(path))
    assert library.add(task(path, validation_share=0.0)).lengths.num_sequences == 2


def test_a_length_beyond_the_model(library: DatasetLibrary, path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        library.add(task(path, max_length_tokens=65))
    message = str(caught.value)
    assert "task 'a': max_length: 65 tokens is a longer sequence than model 'tiny'" in message
    assert "Give at most 64" in message


def test_bad_data_names_the_file(library: DatasetLibrary, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "fine"}\n{"text": ', "utf-8")
    with pytest.raises(DataError, match=r"d\.jsonl:2: the line is not JSON"):
        library.add(task(path))
    path.write_text("", "utf-8")
    with pytest.raises(DataError, match=r"d\.jsonl: the file is empty"):
        library.add(task(path))
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read"):
        library.add(task(tmp_path / "none.jsonl"))


def test_tasks_without_what_they_need(library: DatasetLibrary, path: Path) -> None:
    with pytest.raises(ConfigError, match="task 'a': data: is not set"):
        library.add(TaskSpec("a", "tiny", data=DataSpec(histogram="sst2"), num_steps=1))
    with pytest.raises(ConfigError, match="steps, epochs: neither"):
        library.add(task(path, num_steps=None))


def test_cut_examples_are_noted(
    library: DatasetLibrary, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "d.jsonl"
    rows = [{"prompt": "ab", "completion": "c" * length} for length in (3, 40, 50)]
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    library.add(task(path, max_length_tokens=16))
    assert library.notes("a")[0].startswith("2 of 3 examples are longer than max_length 16")
    assert "task 'a': 2 of 3 examples" in caplog.text


def test_files_are_encoded_once_until_they_change(path: Path) -> None:
    tokenizer = Characters()
    library = DatasetLibrary(lambda model: tokenizer)
    for task_id in "abc":
        library.add(task(path, task_id, seed=ord(task_id)))
    assert tokenizer.encoded == 23
    library.add(task(path, "d", max_length_tokens=32))
    assert tokenizer.encoded == 46
    before = library.add(task(path, "e")).lengths
    write(path, texts(30))
    os.utime(path, ns=(1, 1))
    assert library.add(task(path, "e")).lengths.num_sequences > before.num_sequences


def test_discard(library: DatasetLibrary, path: Path) -> None:
    library.add(task(path))
    library.discard("a")
    library.discard("a")
    with pytest.raises(KeyError):
        library.batch("a", 0)
