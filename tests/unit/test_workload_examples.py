"""Data files to examples: every format, and every way a file can be wrong."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muxtune.errors import ConfigError, DataError
from muxtune.workload.datasets import (
    ChatExample,
    CompletionExample,
    Message,
    TextExample,
    read_examples,
)
from muxtune.workload.examples import PLAIN_DOCUMENT_CHARACTERS

ASKED = {"role": "user", "content": "?"}
ANSWERED = {"role": "assistant", "content": "!"}


def write(folder: Path, content: str | bytes, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text_lines(tmp_path: Path) -> None:
    path = write(tmp_path, '{"text": "one", "source": 1}\n\n  \n{"text": "zwei\\u2028ß"}\n')
    expected = [TextExample(1, "one"), TextExample(4, "zwei\u2028ß")]
    assert read_examples(path) == expected
    assert read_examples(path, "text") == expected


def test_unescaped_line_separator_does_not_end_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, '{"text": "one\u2028two\x85three"}\r\n{"text": "four"}')
    assert [example.line for example in read_examples(path)] == [1, 2]


def test_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    assert read_examples(write(tmp_path, b'\xef\xbb\xbf{"text": "a"}')) == [TextExample(1, "a")]


def test_completions(tmp_path: Path) -> None:
    path = write(tmp_path, '{"prompt": "", "completion": "a"}\n{"prompt": "b", "completion": "c"}')
    assert read_examples(path) == [CompletionExample(1, "", "a"), CompletionExample(2, "b", "c")]


def test_messages(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps({"messages": [ASKED, ANSWERED]}))
    messages = (Message("user", "?"), Message("assistant", "!"))
    assert read_examples(path) == [ChatExample(1, messages)]


def test_plain_text_merges_paragraphs_to_a_size(tmp_path: Path) -> None:
    long = "x" * PLAIN_DOCUMENT_CHARACTERS
    path = write(tmp_path, f"\n\none\ntwo\n \n\n{long}\r\n\r\nlast\n", "data.txt")
    assert read_examples(path) == [TextExample(3, f"one\ntwo\n\n{long}"), TextExample(9, "last")]


@given(st.lists(st.text("ab\n ", min_size=1, max_size=300), min_size=1, max_size=40))
def test_plain_text_loses_no_line(tmp_path_factory, blocks: list[str]) -> None:
    text = "\n\n".join(blocks * 3)
    path = write(tmp_path_factory.mktemp("plain"), text + "\nend", "data.txt")
    lines = [line for line in (text + "\nend").split("\n") if line.strip()]
    documents = [str(example[1]) for example in read_examples(path)]
    assert [line for text in documents for line in text.split("\n") if line.strip()] == lines


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        ('{"text": "a"}\n{"text": "b"', 2, "not JSON"),
        ('{"text": "a"}\nb', 2, "not JSON"),
        ("[" * 100_000, 1, "not JSON"),
        ('["a"]', 1, "is a list, not an object"),
        ('{"text": "a"}\n{"txt": "b"}', 2, "key 'text' is missing; the line has ['txt']"),
        ('{"text": 3}', 1, "'text' is a int, not text"),
        ('{"text": null}', 1, "'text' is a NoneType, not text"),
        ('{"text": " "}', 1, "'text' is empty"),
        ('{"text": "\\ud800"}', 1, "surrogate"),
        ('{"prompt": "a", "completion": ""}', 1, "'completion' is empty"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}', 2, "key 'completion' is missing"),
        ('{"messages": []}', 1, "nothing is learnt"),
        ('{"messages": "hi"}', 1, "not a list of objects"),
        ('{"messages": [3]}', 1, "not a list of objects"),
        ('{"messages": [{"role": "user", "content": "a"}]}', 1, "nothing is learnt"),
        ('{"messages": [{"role": "assistant"}]}', 1, "message 1 has no 'content'"),
        ('{"messages": [{"role": "assistant", "content": [1]}]}', 1, "message 1 content"),
        ('{"messages": [{"role": "assistant", "content": ""}]}', 1, "is empty"),
        ('{"prompt": "a"}', 1, "fit no format"),
        ('{"text": "a", "messages": []}', 1, "fit text and messages"),
        (b'{"text": "a"}\n{"text": "caf\xe9"}', 2, "not UTF-8"),
        ("", None, "the file is empty"),
        (" \n\n", None, "the file is empty"),
    ],
)
def test_bad_files_name_file_line_and_remedy(
    tmp_path: Path, content: str | bytes, line: int | None, words: str
) -> None:
    path = write(tmp_path, content)
    with pytest.raises(DataError) as caught:
        read_examples(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: " if line is None else f"{path}:{line}: ")
    assert words in message and caught.value.line == line
    assert message.partition(". ")[2]


def test_unknown_suffix_format_and_missing_file(tmp_path: Path) -> None:
    path = write(tmp_path, "a", "data.csv")
    with pytest.raises(DataError, match=r"'\.csv' file is not known\. Set the task's format"):
        read_examples(path)
    assert read_examples(path, "plain") == [TextExample(1, "a")]
    with pytest.raises(ConfigError, match="'csv' does not exist"):
        read_examples(path, "csv")
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read \(No such file"):
        read_examples(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_examples(tmp_path)
