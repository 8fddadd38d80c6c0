"""What a task has done, on disk: written at the task's own step boundary, whole or not at all.

There is no random state to keep: order, dropout and start values are functions of the task's
seed and step. So (weights, moments, step) is all, and a resumed task goes on bit by bit the same.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from muxtune import codec
from muxtune.errors import DataError
from muxtune.runtime.bank import TaskState, TaskTensors, no_gradient
from muxtune.runtime.folders import PARTIAL, REPLACED, find_folder, whole_folder
from muxtune.types import TaskSpec

SCHEMA_VERSION = 1
_TENSORS, _META = "state.safetensors", "state.json"
# What may differ between the run that wrote a checkpoint and the one that resumes it.
_FREE_FIELDS = {
    "tenant": "",
    "arrival_ns": 0,
    "priority": 0,
    "deadline_ns": None,
    "max_slowdown": None,
    "cancel_ns": None,
}


def fingerprint(task: TaskSpec, content_hash: str) -> str:
    """Equal for tasks whose training is the same: settings, seed, and data by content."""
    training = task._replace(data=task.data._replace(path=""), **_FREE_FIELDS)
    return hashlib.sha256(f"{codec.dumps(training)}{content_hash}".encode()).hexdigest()


class HostCopy(NamedTuple):
    """A task's weights and moments in host memory of their own. ``copied``: on a GPU, the event
    after which they are there."""

    tensors: dict[str, torch.Tensor]
    copied: torch.cuda.Event | None = None


class Snapshot(NamedTuple):
    """A task at a step boundary."""

    copy: HostCopy
    meta: dict[str, Any]


def copy_to_host(state: TaskState) -> HostCopy:
    """As the task is when the work that was given to the device so far is done; on a GPU it costs
    the launch of a copy."""
    tensors = {
        f"{site_name}/{name}/{kind}": _host_copy(getattr(values, kind))
        for (site_name, name), values in state.tensors.items()
        for kind in ("param", "exp_avg", "exp_avg_sq")
    }
    return HostCopy(tensors, _copied_event(state))


def make_snapshot(copy: HostCopy, step: int, print_of: str, extra: dict[str, Any]) -> Snapshot:
    """``copy``: as optimizer step ``step`` left the task. ``extra``: JSON values that come back."""
    meta = {"schema_version": SCHEMA_VERSION, "fingerprint": print_of, "step": step, "extra": extra}
    return Snapshot(copy, meta)


def write_snapshot(folder: Path, snapshot: Snapshot) -> None:
    """In place of the folder's last one, whole or not at all. Raises OutputError."""
    if snapshot.copy.copied is not None:
        snapshot.copy.copied.synchronize()
    with whole_folder(folder) as partial:
        try:
            save_file(snapshot.copy.tensors, partial / _TENSORS)
        except OSError:
            raise
        except Exception as error:  # safetensors has errors of its own
            raise OSError(None, str(error), str(folder)) from error
        (partial / _META).write_text(json.dumps(snapshot.meta, sort_keys=True), "utf-8")


def remove_checkpoint(folder: Path) -> None:
    """It loses its name before its content, so that no part of one is ever found."""
    shutil.rmtree(folder.with_name(folder.name + REPLACED), ignore_errors=True)
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    if folder.is_dir():
        folder.rename(partial)
        shutil.rmtree(partial, ignore_errors=True)


class CheckpointWriter:
    """Writes and removes checkpoints in a thread of its own, one after another.

    A snapshot that still waits is replaced by a later one of its folder, so a slow disk makes
    checkpoints rarer and neither stalls the training nor fills the memory. What fails is raised
    by the next ``check``, ``drain`` or ``close``.
    """

    def __init__(self) -> None:
        self._waiting: dict[Path, Snapshot | None] = {}  # None: to be removed
        self._is_busy = self._is_closed = False
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(self, folder: Path, snapshot: Snapshot) -> None:
        self._put(folder, snapshot)

    def remove(self, folder: Path) -> None:
        self._put(folder, None)

    def check(self) -> None:
        """Raises what failed since the last call."""
        with self._changed:
            error, self._error = self._error, None
        if error is not None:
            raise error

    def drain(self) -> None:
        """Until everything is on disk. Raises OutputError."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._is_busy)
        self.check()

    def close(self) -> None:
        """Drains and ends the thread. Raises OutputError."""
        try:
            self.drain()
        finally:
            with self._changed:
                self._is_closed = True
                self._changed.notify_all()
            if self._thread is not None:
                self._thread.join()
                self._thread = None

    def _put(self, folder: Path, snapshot: Snapshot | None) -> None:
        with self._changed:
            self._waiting[folder] = snapshot
            self._is_closed = False
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while (item := self._next()) is not None:
            try:
                _carry_out(*item)
            except Exception as error:
                with self._changed:
                    self._error = self._error or error
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()

    def _next(self) -> tuple[Path, Snapshot | None] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            if not self._waiting:
                return None
            folder = next(iter(self._waiting))
            self._is_busy = True
            return folder, self._waiting.pop(folder)


def _carry_out(folder: Path, snapshot: Snapshot | None) -> None:
    if snapshot is None:
        remove_checkpoint(folder)
    else:
        write_snapshot(folder, snapshot)


def checkpointed_steps(folder: Path) -> int:
    """Optimizer steps that a checkpoint holds; 0 without one that can be read."""
    found = find_folder(folder)
    try:
        return 0 if found is None else int(json.loads((found / _META).read_text("utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def load_checkpoint(folder: Path, state: TaskState, print_of: str) -> dict[str, Any] | None:
    """Puts a checkpoint into a fresh, unplaced state; its extra values, or None without one.

    Raises DataError when it was written by a task with other settings or cannot be read.
    """
    found = find_folder(folder)
    if found is None:
        return None
    remedy = "Remove it, or resume with the settings that wrote it"
    try:
        meta = json.loads((found / _META).read_text("utf-8"))
        tensors = load_file(found / _TENSORS)
    except Exception as error:
        raise DataError(str(found), f"the checkpoint cannot be read ({error})", remedy) from None
    if (meta["schema_version"], meta["fingerprint"]) != (SCHEMA_VERSION, print_of):
        raise DataError(str(found), "the checkpoint is of a task with other settings", remedy)
    for (site_name, name), old in state.tensors.items():
        param, exp_avg, exp_avg_sq = (
            tensors[f"{site_name}/{name}/{kind}"] for kind in ("param", "exp_avg", "exp_avg_sq")
        )
        state.tensors[site_name, name] = TaskTensors(
            param, no_gradient(old.grad), exp_avg, exp_avg_sq
        )
    state.step = meta["step"]
    return meta["extra"]


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A GPU's copy goes into pinned memory, behind what its stream has to do anyway."""
    source = tensor.detach()
    if source.device.type != "cuda":
        return source.cpu().clone(memory_format=torch.contiguous_format)
    host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
    return host.copy_(source, non_blocking=True)


def _copied_event(state: TaskState) -> torch.cuda.Event | None:
    device = next((values.param.device for values in state.tensors.values()), None)
    if device is None or device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
