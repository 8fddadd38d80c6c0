"""One file a command. A command module has ``run(config, folder) -> summary``: it prints its
result, writes it into the run's folder, and returns one flat row."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from muxtune.commands.ranks import follow, is_follower
from muxtune.errors import ConfigError, MuxTuneError
from muxtune.report.run_folder import FAILED, OK, SUMMARY, RunFolder, provenance

CONFIG_FILE, RUN_FILE = "config.yaml", "run.json"


def run_job(config: Any) -> MuxTuneError | None:
    """Runs one composed configuration in its own folder.

    Returns an error that the user can act on; in a sweep it also stands in the run's summary, so
    that the other runs go on and their table tells which one failed.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    overrides = [str(item) for item in hydra.overrides.task]
    path = Path(hydra.runtime.output_dir)
    if hydra.mode != RunMode.MULTIRUN:
        return _run_alone(path, config, overrides)
    if finished_before(path, config):
        print(f"run {hydra.job.num}: finished before", flush=True)
        return None
    with contextlib.redirect_stdout(io.StringIO()):  # the sweep's own table will tell
        error = _run_alone(path, config, overrides)
    if error is not None and not (path / SUMMARY).exists():
        failed = {"status": FAILED, "error": str(error), "overrides": as_choices(overrides)}
        RunFolder(path).write_json(SUMMARY, failed)
    print(f"run {hydra.job.num}: {FAILED if error else OK}", flush=True)
    return error


def finished_before(path: Path, config: Any) -> bool:
    """Whether a sweep that was stopped and is started again has this run's results already.

    Raises MuxTuneError when the folder holds the results of a run with other settings: then this
    is another sweep, which would write over them. Where results go is not such a setting: Hydra's
    own ``hydra.sweep.dir`` chooses the folder as well, and leaves ``output_dir`` a time of day.
    """
    import yaml
    from omegaconf import OmegaConf

    try:
        finished = json.loads((path / SUMMARY).read_text("utf-8")).get("status") == OK
        saved = OmegaConf.to_container(OmegaConf.load(path / CONFIG_FILE))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    asked = OmegaConf.to_container(config, resolve=True)
    if finished and _without_folder(saved) != _without_folder(asked):
        raise MuxTuneError(
            f"output_dir: '{path}' holds a finished run of another sweep. Choose another folder "
            "with output_dir=PATH, or remove that one"
        )
    return finished


def _without_folder(settings: Any) -> dict[str, Any]:
    return {name: value for name, value in dict(settings).items() if name != "output_dir"}


def _run_alone(path: Path, config: Any, overrides: list[str]) -> MuxTuneError | None:
    try:
        with RunFolder(path) as folder:
            return _run_in(folder, config, overrides)
    except MuxTuneError as error:
        return error


def _run_in(folder: RunFolder, config: Any, overrides: list[str]) -> MuxTuneError | None:
    """A summary with an ``error`` keeps its results: some tasks ended, some did not."""
    from omegaconf import OmegaConf

    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(missing[0], "is not given", f"Give it with {missing[0]}=VALUE")
    typed: Any = OmegaConf.to_object(config)
    _check_names(typed, "")
    command = importlib.import_module(f"muxtune.commands.{typed.command}")
    if typed.command == "train" and is_follower():
        follow(typed)
    if hasattr(command, "check_folder"):  # before anything there is written over
        command.check_folder(typed, folder.path)
    folder.write_text(CONFIG_FILE, OmegaConf.to_yaml(config, resolve=True))
    folder.write_json(RUN_FILE, provenance(config.seed, overrides))
    summary = command.run(typed, folder)
    error = summary.get("error")
    status = {"status": FAILED if error else OK, "command": typed.command}
    folder.write_json(SUMMARY, status | summary | {"overrides": as_choices(overrides)})
    return MuxTuneError(error) if error else None


def _check_names(settings: Any, prefix: str) -> None:
    """Hydra's + adds names that a schema does not have, which nobody would read."""
    known = [field.name for field in fields(settings)]
    for name, value in vars(settings).items():
        if name not in known:
            remedy = f"Choose among: {', '.join(known)}"
            raise ConfigError(prefix + name, "does not exist", remedy)
        if is_dataclass(value):
            _check_names(value, f"{prefix}{name}.")


def as_choices(overrides: list[str]) -> dict[str, str]:
    """``["a.b=1", "+c=2"]`` to ``{"a.b": "1", "c": "2"}``."""
    pairs = (item.lstrip("+~").partition("=") for item in overrides)
    return {key: value for key, _, value in pairs}
