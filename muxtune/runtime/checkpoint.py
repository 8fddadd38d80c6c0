"""What a task has done, on disk: written at the task's own step boundary, whole or not at all.

There is no random state to keep: order, dropout and start values are functions of the task's
seed and step. So (weights, moments, step) is all, and a resumed task goes on bit by bit the same.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from muxtune import codec
from muxtune.errors import DataError
from muxtune.runtime.bank import TaskState, TaskTensors
from muxtune.runtime.folders import find_folder, whole_folder
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


def save_checkpoint(folder: Path, state: TaskState, print_of: str, extra: dict[str, Any]) -> None:
    """``extra``: JSON values that come back. Raises OutputError when it cannot be written, and
    ValueError in the middle of a step."""
    if state.step_loss:
        raise ValueError("a checkpoint is taken at a step boundary")
    tensors = {
        f"{site_name}/{name}/{kind}": getattr(values, kind).detach().cpu().contiguous()
        for (site_name, name), values in state.tensors.items()
        for kind in ("param", "exp_avg", "exp_avg_sq")
    }
    meta = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": print_of,
        "step": state.step,
        "extra": extra,
    }
    with whole_folder(folder) as partial:
        try:
            save_file(tensors, partial / _TENSORS)
        except OSError:
            raise
        except Exception as error:  # safetensors has errors of its own
            raise OSError(None, str(error), str(folder)) from error
        (partial / _META).write_text(json.dumps(meta, sort_keys=True), "utf-8")


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
            tensors[f"{site_name}/{name}/{kind}"].to(old.param.device)
            for kind in ("param", "exp_avg", "exp_avg_sq")
        )
        state.tensors[site_name, name] = TaskTensors(
            param, torch.zeros_like(old.grad), exp_avg, exp_avg_sq
        )
    state.step = meta["step"]
    return meta["extra"]
