"""The folder of one run: every file gets its final name only when it is whole.

A disk that is full or a folder that cannot be written is found before work starts, because the
configuration is saved first; when it happens later, what was being written is removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import muxtune
from muxtune.errors import OutputError

PACKAGES = [
    "torch",
    "transformers",
    "peft",
    "triton",
    "simpy",
    "numpy",
    "scipy",
    "pandas",
    "pyarrow",
    "hydra-core",
    "omegaconf",
]
SUMMARY = "summary.json"  # one flat row, with a status
OK, FAILED = "ok", "failed"
PARTIAL = ".partial"
PROBE_BYTES = 64 * 1024


class RunFolder:
    """Writes results below ``path``; as a context manager it removes its files on an error, and
    brings back what ``write_text`` had replaced, so that a start that failed changes nothing.

    Raises OutputError, at once, when the folder cannot be made or written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._written: list[Path] = []
        self._replaced: dict[Path, bytes] = {}
        self._existed = self.path.is_dir() and any(self.path.iterdir())
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._probe()

    def _probe(self) -> None:
        probe = self.path / f".probe{PARTIAL}"
        try:
            with probe.open("wb") as file:
                file.write(b"\0" * PROBE_BYTES)
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self.discard()

    def discard(self) -> None:
        """Remove what this object wrote, and the folder if nothing else is in it."""
        for file in self._written:
            file.unlink(missing_ok=True)
        for file, content in self._replaced.items():
            file.write_bytes(content)
        self.keep()
        if not self._existed:
            with contextlib.suppress(OSError):
                self.path.rmdir()

    def keep(self) -> None:
        """What is whole so far stays, whatever happens: work has begun that can be gone on with."""
        self._written.clear()
        self._replaced.clear()

    @contextlib.contextmanager
    def stream(self, name: str, mode: str = "w") -> Iterator[IO[Any]]:
        """A file to write piece by piece; it appears as ``name`` when the block ends well."""
        final = self.path / name
        partial = final.with_name(final.name + PARTIAL)
        with writing(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(final)
                self._written.append(final)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise

    def write_text(self, name: str, text: str) -> Path:
        final = self.path / name
        if final not in self._written and final.is_file():
            self._replaced.setdefault(final, final.read_bytes())
        with self.stream(name) as file:
            file.write(text)
        return final

    def write_json(self, name: str, value: object) -> Path:
        return self.write_text(name, json.dumps(value, indent=2, sort_keys=False) + "\n")


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turns an OSError of the block into an OutputError that names the path and the remedy."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise OutputError(
            f"output_dir: cannot write '{where}': {error.strerror or error}. "
            "Free space there or choose another folder with output_dir=PATH"
        ) from error


def write_whole(path: Path, content: str | bytes) -> None:
    """The file as it was, or all of the content. Raises OutputError."""
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    with writing(path):
        try:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def provenance(seed: int | None = None, overrides: list[str] | None = None) -> dict[str, Any]:
    """What a result depends on besides its configuration: versions, commit, machine, seed."""
    return {
        "muxtune": muxtune.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "num_cores": os.cpu_count(),
        "packages": _package_versions(),
        "git_commit": _git_commit(Path(muxtune.__file__).parent),
        "seed": seed,
        "overrides": list(overrides or []),
    }


def _package_versions() -> Mapping[str, str]:
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _git_commit(folder: Path) -> str | None:
    """The commit of the checkout that the package is run from, ``-dirty`` if it is changed."""
    git = shutil.which("git")
    if git is None or not (folder.parent / ".git").exists():
        return None
    command = [git, "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
