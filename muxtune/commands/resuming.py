"""Going on with a run that was killed: is there one, is it this one, what were its settings.

The first line of the journal says how a run was started, and is never written again; whatever else
is in the folder may be gone or torn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from muxtune import codec
from muxtune.commands import RUN_FILE
from muxtune.config import CommonConfig
from muxtune.errors import ConfigError
from muxtune.planning.journal import JournalBatch, read_journal
from muxtune.report.run_folder import SUMMARY
from muxtune.types import EventKind, Reject, TaskSpec

JOURNAL_FILE = "journal.jsonl"
FLAGS = {"true", "false", "yes", "no", "on", "off", "1", "0"}
# Options of the backend that change how a run goes on but not what comes out.
FREE_OPTIONS = {"checkpoint_steps", "progress_interval_s", "skip_idle", "memory_pressure_share"}
# A run may go on with other GPUs; see ``close_chapter``.
LAYOUT_FIELDS = ("num_gpus", "tp", "pp", "replicas")
REMEDY = "Resume with the settings of that run (`muxtune train resume=FOLDER` brings them along)"


def run_origin(config: CommonConfig, tasks: Iterable[TaskSpec]) -> dict[str, Any]:
    """All that the decisions and the adapters of a run depend on."""
    backend = getattr(config, "backend", {})
    return {
        "planner": dict(config.planner),
        "cluster_policy": dict(config.cluster_policy),
        "model": asdict(config.model),
        "cluster": asdict(config.cluster),
        "cost": asdict(config.cost),
        "backend": {name: item for name, item in backend.items() if name not in FREE_OPTIONS},
        "seed": config.seed,
        "tasks": {task.task_id: _digest(task) for task in tasks},
    }


def check_same_run(path: Path, origin: Mapping[str, Any]) -> None:
    """Raises ConfigError when the folder holds no run, or one of another origin."""
    if not has_journal(path):
        raise ConfigError(
            "resume",
            f"'{path}' holds no {JOURNAL_FILE}, so no run was started there",
            "Name the folder of a killed run, or leave resume out to start anew",
        )
    recorded = read_journal(path / JOURNAL_FILE).config
    mine = codec.decode(json.loads(json.dumps(codec.encode(dict(origin)))))
    for name in mine:
        if name == "tasks":
            _check_tasks(path, recorded.get(name, {}), mine[name])
        elif (
            changed := _difference(name, _kept(name, recorded.get(name)), _kept(name, mine[name]))
        ) is not None:
            field, old, new = changed
            raise ConfigError(field, f"is {new!r}, but the run in '{path}' has {old!r}", REMEDY)


def has_other_layout(path: Path, config: CommonConfig) -> bool:
    """Whether the journal there is of other numbers of GPUs."""
    if not has_journal(path):
        return False
    recorded = read_journal(path / JOURNAL_FILE).config
    cluster = recorded.get("cluster", {}) if isinstance(recorded, dict) else {}
    mine = asdict(config.cluster)
    return any(_text(cluster.get(name)) != _text(mine[name]) for name in LAYOUT_FIELDS)


def _text(value: Any) -> str:
    """For comparing; a journal from before ``replicas`` existed has none of them."""
    return json.dumps(value or [], sort_keys=True)


def _kept(name: str, section: Any) -> Any:
    """A section of the settings without what may change."""
    if name != "cluster" or not isinstance(section, dict):
        return section
    return {key: value for key, value in section.items() if key not in LAYOUT_FIELDS}


def close_chapter(path: Path) -> None:
    """The journal becomes the last of the earlier chapters."""
    number = len(earlier_chapters(path))
    (path / JOURNAL_FILE).rename(path / f"journal.{number}.jsonl")


def earlier_chapters(path: Path) -> list[Path]:
    """Journals of the same run from before it went on with other GPUs, oldest first."""
    found = path.glob("journal.*.jsonl")
    return sorted(found, key=lambda file: int(file.name.split(".")[1]))


def tasks_that_ended(chapters: Iterable[Sequence[JournalBatch]]) -> set[str]:
    ends = {EventKind.TASK_DONE, EventKind.TASK_FAILED, EventKind.TASK_CANCELLED}
    ended: set[str] = set()
    for chapter in chapters:
        for record in chapter:
            ended.update(event.task_id for event in record.events if event.kind in ends)
            ended.update(a.task_id for a in record.actions if isinstance(a, Reject))
    return ended


def is_unfinished(path: Path) -> bool:
    return has_journal(path) and ended_summary(path) is None


def has_journal(path: Path) -> bool:
    """False also for one that was killed before its first line was whole: nothing had begun."""
    journal = path / JOURNAL_FILE
    if not journal.is_file():
        return False
    with journal.open("rb") as file:
        return file.readline().endswith(b"\n")


def ended_summary(path: Path) -> dict[str, Any] | None:
    """What a run that has ended told of itself."""
    try:
        summary = json.loads((path / SUMMARY).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    own = ("status", "command", "overrides")  # added for every command
    return {key: item for key, item in summary.items() if key not in own} or None


def saved_overrides(path: Path) -> list[str]:
    """The words that the run was started with; none when it was not from the command line."""
    try:
        return list(json.loads((path / RUN_FILE).read_text("utf-8"))["overrides"])
    except (OSError, ValueError, KeyError):
        return []


def resumed_words(words: Sequence[str]) -> list[str]:
    """``resume=FOLDER`` becomes the words that the run there was started with, and those beside.

    Raises ConfigError when there is no such run.
    """
    chosen = [word.partition("=")[2] for word in words if word.startswith("resume=")]
    if not chosen or chosen[-1].lower() in FLAGS:
        return list(words)
    path = Path(chosen[-1])
    if not has_journal(path):
        raise ConfigError(
            "resume",
            f"'{path}' holds no {JOURNAL_FILE}, so no run was started there",
            "Name the folder of a killed run",
        )
    config = read_journal(path / JOURNAL_FILE).config
    saved = config.get("overrides", []) if isinstance(config, dict) else []
    beside = [word for word in words if not word.startswith(("resume=", "output_dir="))]
    replaced = {_key(word) for word in beside} | {"resume", "output_dir"}
    kept = [word for word in saved if _key(word) not in replaced]
    folder = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return [*kept, *beside, "resume=true", f"output_dir='{folder}'"]


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def _digest(task: TaskSpec) -> str:
    return hashlib.sha256(codec.dumps(task).encode()).hexdigest()[:16]


def _check_tasks(path: Path, recorded: Mapping[str, str], mine: Mapping[str, str]) -> None:
    names = sorted(recorded.keys() | mine.keys())
    changed = [name for name in names if recorded.get(name) != mine.get(name)]
    if not changed:
        return
    what = "is new" if changed[0] not in recorded else "is missing"
    if changed[0] in recorded and changed[0] in mine:
        what = "has other settings"
    raise ConfigError(
        "workload", f"task '{changed[0]}' {what}, compared with the run in '{path}'", REMEDY
    )


def _difference(field: str, old: Any, new: Any) -> tuple[str, Any, Any] | None:
    """The first field that differs, by its dotted name, and both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            found = _difference(f"{field}.{name}", old.get(name), new.get(name))
            if found is not None:
                return found
        return None
    return None if old == new else (field, old, new)
