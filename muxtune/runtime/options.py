"""How the real executor is to run."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from muxtune.errors import ConfigError

STEPS = ("auto", "captured", "eager")
LORA_PRODUCTS = ("fused", "windows")
_ABOVE_0 = ("progress_interval_s", "rank_timeout_s")


class TorchOptions(NamedTuple):
    """``evaluate_tokens``: held-out tokens scored before and after training, 0 for none.
    ``checkpoint_steps``: optimizer steps of a task between its checkpoints, 0 for none.
    ``resume``: tasks go on from the checkpoints that are there. ``skip_idle``: when nothing can
    run, move the clock to the next arrival instead of waiting for it. ``memory_pressure_share``:
    share of its memory limit above which an instance asks for a smaller plan, 0 for never.
    ``rank_timeout_s``: on several ranks, how long one may not answer before the run ends.

    ``device``: cpu, cuda, or auto: CUDA for a fleet of GPUs where torch sees one. ``dtype`` of the
    base model: float32, bfloat16, or auto: bfloat16 on CUDA. ``step``: captured (forward to
    optimizer as one program, on CUDA a graph), eager (autograd), or auto: captured on CUDA.
    What the program does not know runs eagerly, and the run says so. ``lora_products`` of captured
    steps on CUDA: fused, or windows (``muxtune_kernels.multi_lora.window``; not deterministic; for
    slots of LoRA alone without dropout, the others stay fused)."""

    output_dir: Path
    deterministic: bool = True
    evaluate_tokens: int = 2048
    progress_interval_s: float = 10.0
    checkpoint_steps: int = 50
    resume: bool = False
    skip_idle: bool = False
    memory_pressure_share: float = 0.97
    device: str = "auto"
    dtype: str = "auto"
    step: str = "auto"
    lora_products: str = "fused"
    rank_timeout_s: float = 30.0

    def check(self, field: str = "backend") -> None:
        """Raises ConfigError for a value that no run could mean."""
        if self.step not in STEPS:
            problem = f"'{self.step}' is no way to compute a step"
            raise ConfigError(f"{field}.step", problem, f"Choose one of: {', '.join(STEPS)}")
        if self.lora_products not in LORA_PRODUCTS:
            remedy = f"Choose one of: {', '.join(LORA_PRODUCTS)}"
            raise ConfigError(f"{field}.lora_products", f"is '{self.lora_products}'", remedy)
        if self.lora_products == "windows" and self.deterministic:
            problem = "with windows a task's bits may depend on its neighbours"
            remedy = f"Give {field}.deterministic=false too"
            raise ConfigError(f"{field}.lora_products", problem, remedy)
        for name in ("evaluate_tokens", "checkpoint_steps", "memory_pressure_share", *_ABOVE_0):
            value = getattr(self, name)
            if value < 0 or (value == 0 and name in _ABOVE_0):
                remedy = "Give a number above 0" if name in _ABOVE_0 else "Give at least 0"
                raise ConfigError(f"{field}.{name}", f"is {value}", remedy)
        if self.memory_pressure_share > 1:
            problem = f"is {self.memory_pressure_share}, more than all of the memory"
            raise ConfigError(
                f"{field}.memory_pressure_share", problem, "Give a share of at most 1"
            )

    def adapter_folder(self, task_id: str) -> Path:
        return Path(self.output_dir) / "adapters" / task_id

    def checkpoint_folder(self, task_id: str) -> Path:
        return Path(self.output_dir) / "checkpoints" / task_id
