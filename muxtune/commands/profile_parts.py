"""Parts of a profile in its folder until it is whole, so that a run that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from muxtune.errors import ProfileError
from muxtune.report.run_folder import SUMMARY, RunFolder, writing
from muxtune.report.tables import make_console
from muxtune.validation.records import Records, read_lines

PARTS = "profile.parts.jsonl"
_SETTINGS = "settings"  # the stamp of each part


class Parts:
    """``settings``: what a part depends on, as plain data; those of other settings are put aside,
    which is said. ``starts``: names of parts in which nothing was measured yet. Raises OutputError.
    """

    def __init__(
        self, folder: RunFolder, settings: Mapping[str, Any], starts: tuple[str, ...] = ()
    ) -> None:
        self._folder, self._starts = folder, starts
        self._path = folder.path / PARTS
        stamp = json.loads(json.dumps(dict(settings)))
        found = read_lines(self._path)
        if others := _differences(found, stamp):
            self._put_aside(others)
        elif not found:
            self._forget_running()  # nobody knows of what settings it was
        self.records = Records(self._path, {_SETTINGS: stamp})
        if count := self._num_measured:
            text = f"{self._path}: goes on with {_parts(count)} that were measured before"
            make_console().print(text, soft_wrap=True)

    @contextmanager
    def until_written(self, is_lost: Callable[[], bool]) -> Iterator[Records]:
        """Of a block that measures and writes the profile: then the parts go. If it is stopped they
        stay, with the folder's settings, and how to go on is told. ``is_lost``: whether the device
        refuses all further work: then what was being measured is to blame, and is left out."""
        try:
            yield self.records
        except BaseException as error:
            # Parts that make no profile would make none the next time.
            if self._num_measured and not isinstance(error, ProfileError):
                self._folder.keep()
                (self._folder.path / SUMMARY).unlink(missing_ok=True)  # of another profile
                self._tell_how_to_go_on()
                if not is_lost():
                    self._forget_running()
            else:
                self._remove()
            raise
        self._remove()

    @property
    def _num_measured(self) -> int:
        return sum(row["name"] not in self._starts for row in self.records.rows)

    def _tell_how_to_go_on(self) -> None:
        path = self._folder.path
        text = (
            f"{path}: stopped before its end; to go on run the same command again with"
            f" output_dir={path}: what was measured ({_parts(self._num_measured)}) is in {PARTS}"
        )
        make_console(stderr=True).print(text, soft_wrap=True)

    def _put_aside(self, others: list[str]) -> None:
        aside = numbered(self._path)
        with writing(aside):
            self._path.rename(aside)
        self._forget_running()
        text = (
            f"{self._path}: its parts are of a profile with other settings ({', '.join(others)}),"
            f" so none is used; they are kept as {aside.name}"
        )
        make_console().print(text, soft_wrap=True)

    def _remove(self) -> None:
        self._forget_running()
        self._path.unlink(missing_ok=True)

    def _forget_running(self) -> None:
        """See ``Records``: what was being measured is measured anew."""
        self._path.with_suffix(".running").unlink(missing_ok=True)


def _parts(count: int) -> str:
    return f"{count} part{'' if count == 1 else 's'}"


def numbered(path: Path) -> Path:
    """The first name beside it, of those for what is old, that is free."""
    number = 1
    while (aside := path.with_name(f"{path.stem}-old-{number}{path.suffix}")).exists():
        number += 1
    return aside


def _differences(rows: list[dict[str, Any]], stamp: Mapping[str, Any]) -> list[str]:
    """Names of the settings that are others in some part."""
    found: dict[str, None] = {}
    for row in rows:
        told = row.get(_SETTINGS) if "name" in row else None
        if not isinstance(told, dict):
            return ["unknown ones"]
        names = [*stamp, *(name for name in told if name not in stamp)]
        found |= {name: None for name in names if told.get(name) != stamp.get(name)}
    return list(found)
