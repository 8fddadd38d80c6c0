"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from muxtune.errors import OutputError

PARTIAL = ".partial"
REPLACED = ".replaced"


@contextlib.contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A folder to fill; it gets its name when the block ends well and is removed otherwise.

    A folder of that name is replaced; a kill between two renames leaves the old one under
    ``.replaced``, which ``find_folder`` still finds. Raises OutputError when the disk is full or
    cannot be written.
    """
    partial = final.with_name(final.name + PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        _swap(partial, final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OutputError(
            f"output_dir: cannot write '{error.filename or final}': {error.strerror or error}. "
            "Free space there or choose another folder with output_dir=PATH"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def find_folder(final: Path) -> Path | None:
    """The whole folder of this name, also after a kill in the middle of a replacement."""
    replaced = final.with_name(final.name + REPLACED)
    return final if final.is_dir() else replaced if replaced.is_dir() else None


def _swap(partial: Path, final: Path) -> None:
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
