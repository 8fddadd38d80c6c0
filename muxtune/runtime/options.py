"""How the real executor is to run."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class TorchOptions(NamedTuple):
    """``evaluate_tokens``: held-out tokens scored before and after training, 0 for none.
    ``checkpoint_steps``: optimizer steps between checkpoints, 0 for none. ``skip_idle``: when
    nothing can run, move the clock to the next arrival instead of waiting for it."""

    output_dir: Path
    deterministic: bool = True
    evaluate_tokens: int = 2048
    progress_interval_s: float = 10.0
    checkpoint_steps: int = 0
    resume: bool = False
    skip_idle: bool = False

    def adapter_folder(self, task_id: str) -> Path:
        return Path(self.output_dir) / "adapters" / task_id

    def checkpoint_folder(self, task_id: str) -> Path:
        return Path(self.output_dir) / "checkpoints" / task_id
