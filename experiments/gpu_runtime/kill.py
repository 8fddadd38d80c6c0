"""kill -9 at random moments of ``muxtune train`` on the GPU; the resumed run must end with the
adapters of the unkilled one, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file

from muxtune import build
from muxtune.config import conf_dir, register_schemas
from muxtune.cost.shapes import ModelShape
from muxtune.fleet import instance_view, task_view
from muxtune.types import Plan, TaskSpec
from muxtune.workload.synthetic import SyntheticLibrary

KILLS, SEED = 3, 11
MODEL = [
    "model=tiny", "model.shape.num_layers=2", "model.shape.hidden=1024", "model.shape.num_heads=8",
    "model.shape.num_kv_heads=8", "model.shape.head_dim=128", "model.shape.intermediate=2816",
]  # fmt: skip
TASKS = """
defaults: {model: tiny, max_length: 256, batch_size: 8, targets: all-linear}
tasks:
  - {id: a, histogram: sst2, steps: 60, rank: 16, seed: 0, dropout: 0.1}
  - {id: b, histogram: openbookqa, steps: 40, rank: 16, seed: 1, dropout: 0.1, accumulation: 2}
  - {id: c, histogram: rte, steps: 50, rank: 16, seed: 2, dropout: 0.1, schedule: cosine}
"""


def command(folder: Path, tasks: Path, device: str) -> list[str]:
    return [
        sys.executable, "-m", "muxtune.cli", "train", *MODEL, "cluster=h100_x1",
        f"workload.tasks_file={tasks}", "planner.chunk_tokens=64",
        "planner.max_shapes=1", "planner.fusion=all_spatial", "backend.checkpoint_steps=10",
        f"backend.device={device}", "backend.step=captured", "+backend.evaluate_tokens=0",
        f"output_dir={folder}",
    ]  # fmt: skip


def plans() -> Iterator[tuple[ModelShape, Plan, list[TaskSpec]]]:
    """Those that may come while tasks end, without a GPU."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "tasks.yaml"
        file.write_text(TASKS)
        words = command(Path(place), file, "cuda")
        register_schemas()
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            overrides = words[words.index("train") + 1 :]
            config: Any = OmegaConf.to_object(compose("train", overrides=overrides))
        costs = build.cost_book(config)
        tasks = list(build.tasks(config, costs))
    shape = costs.shape(tasks[0].model)
    instance, library = build.instances(config, costs, tasks)[0], SyntheticLibrary(config.seed)
    planner = build.planner(config.planner, costs)
    for count in range(1, len(tasks) + 1):
        for chosen in combinations(tasks, count):
            views = [task_view(task, library.add(task)) for task in chosen]
            plan = planner.plan(instance_view(instance, views), None)
            assert isinstance(plan, Plan)
            yield shape, plan, list(chosen)


def run(_: Any, device: str) -> dict[str, Any]:
    """The whole run, and beside it those that are killed and resumed."""
    place = Path(tempfile.mkdtemp())
    tasks = place / "tasks.yaml"
    tasks.write_text(TASKS)
    steps = sum(task["steps"] for task in yaml.safe_load(TASKS)["tasks"])
    moments, whole = random.Random(SEED), place / "whole"
    killed = [
        (place / f"killed-{number}", moments.randrange(steps // 10, steps * 9 // 10))
        for number in range(KILLS)
    ]
    with ThreadPoolExecutor(KILLS + 1) as threads:
        unkilled = threads.submit(_trained, command(whole, tasks, device))
        begun = [
            threads.submit(_killed_and_resumed, command(folder, tasks, device), folder, after)
            for folder, after in killed
        ]
        kills = [future.result() for future in begun]
        assert unkilled.result().returncode == 0, unkilled.result().stderr[-3000:]
    for (folder, _), row in zip(killed, kills, strict=True):
        row["bit_identical"] = _same(folder, whole)
        print(row, flush=True)
    assert _lines(whole) == steps
    shutil.rmtree(place)
    passed = all(k["was_running"] and k["resumed"] and k["bit_identical"] for k in kills)
    return {"steps": steps, "kills": kills, "passed": passed}


def _killed_and_resumed(words: list[str], folder: Path, after: int) -> dict[str, Any]:
    row = _killed(words, folder, after)
    print(f"{folder.name}: {row}", flush=True)
    done = _trained([sys.executable, "-m", "muxtune.cli", "train", f"resume={folder}"])
    print(f"{folder.name}: resumed, exit {done.returncode}", flush=True)
    error = done.stderr[-600:] if done.returncode else ""
    return row | {"resumed": done.returncode == 0, "error": error}


def _trained(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True)


def _killed(words: list[str], folder: Path, after: int) -> dict[str, Any]:
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while _lines(folder) < after and process.poll() is None:
        time.sleep(0.002)
    was_running = process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return {"was_running": was_running, "steps_told": _lines(folder)}


def _lines(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def _same(folder: Path, whole: Path) -> bool:
    for name in ("a", "b", "c"):
        file = f"adapters/{name}/adapter_model.safetensors"
        if (
            not (folder / file).exists()
            or (folder / file).read_bytes() != (whole / file).read_bytes()
        ):
            return False
        assert all(t.isfinite().all() for t in load_file(whole / file).values())
    return _steps(folder) == _steps(whole)


def _steps(folder: Path) -> dict[tuple[str, int], tuple[float, float]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {(row["task_id"], row["step"]): (row["loss"], row["grad_norm"]) for row in rows}
