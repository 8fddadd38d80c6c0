"""Data files to examples: what one document of a tenant's data set is.

Formats:
``text``               JSON Lines with ``text``; everything is learnt
``prompt_completion``  JSON Lines with ``prompt`` and ``completion``; the completion is learnt
``messages``           JSON Lines with chat ``messages`` (role, content); assistant turns are learnt
``plain``              a text file; paragraphs (separated by blank lines) are merged in order until
                       a document has ``PLAIN_DOCUMENT_CHARACTERS``; everything is learnt
``auto``               .txt, .text and .md are plain; .jsonl, .ndjson and .json by the keys of the
                       first line
Other keys of a line are ignored. Files are UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from muxtune.errors import ConfigError, DataError

PLAIN_DOCUMENT_CHARACTERS = 2000
PLAIN_SUFFIXES = (".txt", ".text", ".md")
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")
_KEYS = {
    "text": ("text",),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
}
_SHAPES = "lines with 'text', with 'prompt' and 'completion', or with 'messages'"


class Message(NamedTuple):
    role: str
    content: str


class TextExample(NamedTuple):
    """``line``: where in the file the document starts, from 1."""

    line: int
    text: str


class CompletionExample(NamedTuple):
    line: int
    prompt: str
    completion: str


class ChatExample(NamedTuple):
    line: int
    messages: tuple[Message, ...]


Example = TextExample | CompletionExample | ChatExample


def read_examples(path: str | Path, format: str = "auto") -> list[Example]:
    """All documents of a file, in order.

    Raises DataError, naming the file and where there is one the line, for a file that is missing,
    empty or not UTF-8, a line that is not JSON, and missing, empty or wrongly typed values.
    """
    text = _read_text(str(path))
    if not text.strip():
        raise DataError(str(path), "the file is empty", "Give a file with at least one document")
    if format == "auto":
        format = _detect(Path(path), text)
    if format == "plain":
        return list(_documents(text))
    if format not in _KEYS:
        remedy = f"Choose one of: auto, {', '.join(_KEYS)}, plain"
        raise ConfigError("format", f"'{format}' does not exist", remedy)
    return [_example(str(path), line, row, format) for line, row in _json_lines(str(path), text)]


def _read_text(path: str) -> str:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        remedy = "Give the path of a readable file; relative paths start at the task file's folder"
        raise DataError(path, f"cannot be read ({error.strerror})", remedy) from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(path, "is not UTF-8 text", "Save the file as UTF-8", line) from None


def _detect(path: Path, text: str) -> str:
    suffix = path.suffix.lower()
    if suffix in PLAIN_SUFFIXES:
        return "plain"
    if suffix not in JSON_LINES_SUFFIXES:
        known = ", ".join(JSON_LINES_SUFFIXES + PLAIN_SUFFIXES)
        remedy = f"Set the task's format, or name the file with one of: {known}"
        raise DataError(str(path), f"the format of a '{suffix}' file is not known", remedy)
    line, row = next(_json_lines(str(path), text))
    found = [format for format, keys in _KEYS.items() if all(key in row for key in keys)]
    if len(found) != 1:
        problem = f"the keys {sorted(row)} fit {' and '.join(found) or 'no format'}"
        raise DataError(str(path), problem, f"Set the task's format, or write {_SHAPES}", line)
    return found[0]


def _json_lines(path: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # Split at newlines only: str.splitlines would also cut at U+2028, which JSON allows in text.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _object(path, number, line)


def _object(path: str, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        detail = f" ({error})" if isinstance(error, ValueError) else ""
        remedy = "Write one JSON object a line"
        raise DataError(path, f"the line is not JSON{detail}", remedy, number) from None
    if not isinstance(row, dict):
        problem = f"the line is a {type(row).__name__}, not an object"
        raise DataError(path, problem, "Write one JSON object a line", number)
    return row


def _example(path: str, line: int, row: dict[str, Any], format: str) -> Example:
    for key in _KEYS[format]:
        if key not in row:
            problem = f"key '{key}' is missing; the line has {sorted(row)}"
            raise DataError(path, problem, f"Format {format} needs it on every line", line)
    if format == "messages":
        return ChatExample(line, _messages(path, line, row["messages"]))
    if format == "prompt_completion":
        prompt = _string(path, line, "prompt", row["prompt"], empty_is_fine=True)
        return CompletionExample(line, prompt, _string(path, line, "completion", row["completion"]))
    return TextExample(line, _string(path, line, "text", row["text"]))


def _messages(path: str, line: int, turns: Any) -> tuple[Message, ...]:
    remedy = "Write a list of {'role': ..., 'content': ...}, with at least one assistant turn"
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(path, "'messages' is not a list of objects", remedy, line)
    messages = []
    for number, turn in enumerate(turns, start=1):
        for key in ("role", "content"):
            if key not in turn:
                raise DataError(path, f"message {number} has no '{key}'", remedy, line)
        role = _string(path, line, f"message {number} role", turn["role"])
        empty_is_fine = role != "assistant"
        name = f"message {number} content"
        content = _string(path, line, name, turn["content"], empty_is_fine=empty_is_fine)
        messages.append(Message(role, content))
    if not any(message.role == "assistant" for message in messages):
        raise DataError(path, "no message is the assistant's, so nothing is learnt", remedy, line)
    return tuple(messages)


def _string(path: str, line: int, name: str, value: Any, *, empty_is_fine: bool = False) -> str:
    if not isinstance(value, str):
        problem = f"'{name}' is a {type(value).__name__}, not text"
        raise DataError(path, problem, "Write it as a JSON string", line)
    if not value.strip() and not empty_is_fine:
        raise DataError(path, f"'{name}' is empty", "Fill it in, or remove the line", line)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        problem = f"'{name}' holds half of a surrogate pair, which is no character"
        raise DataError(path, problem, "Remove the lone \\ud800...\\udfff escape", line) from None
    return value


def _documents(text: str) -> Iterator[TextExample]:
    merged: list[str] = []
    start = 0
    for line, paragraph in _paragraphs(text):
        if not merged:
            start = line
        merged.append(paragraph)
        if sum(map(len, merged)) >= PLAIN_DOCUMENT_CHARACTERS:
            yield TextExample(start, "\n\n".join(merged))
            merged = []
    if merged:
        yield TextExample(start, "\n\n".join(merged))


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    lines: list[str] = []
    for number, line in enumerate([*text.replace("\r\n", "\n").split("\n"), ""], start=1):
        if line.strip():
            lines.append(line)
        elif lines:
            yield number - len(lines), "\n".join(lines)
            lines = []
