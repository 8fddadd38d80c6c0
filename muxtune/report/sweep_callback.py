"""What tells the command line where a sweep's runs are.

In a module of its own: Hydra builds callbacks for every run, and what reports a sweep imports
plots and statistics, which a short run would wait for longer than for itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class SweepCallback(Callback):
    """Hydra calls it in the process that started the sweep; the command line reads ``folders``."""

    folders: list[Path] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.folders.append(Path(config.hydra.sweep.dir))
