"""``muxtune train`` on two GPUs: NCCL ranks, started by the command or by torchrun, against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.runtime.test_distributed_command import WORDS, words

DEVICE = os.environ.get("MUXTUNE_TEST_DEVICE", "cuda")  # cpu: to try the test itself
DTYPE = "bfloat16" if DEVICE == "cuda" else "float32"
NUM_DEVICES = torch.cuda.device_count() if DEVICE == "cuda" else 2
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_DEVICES < 2, reason="needs two CUDA devices"),
]

STEPS, TIMEOUT_S = 20, 300.0
LAYOUTS = {
    "pipeline": ["cluster.pp=2", "cluster.num_gpus=2"],
    "tensor": ["cluster.tp=2", "cluster.num_gpus=2"],
    "replicas": ["cluster.replicas=[{},{}]", "cluster.num_gpus=2", "planner=lobra"],
}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def train(folder: Path, name: str, *more: str, starter: list[str] | None = None) -> Path:
    """In processes of their own: none of this one's has touched a GPU before the ranks fork."""
    data = folder / "data.jsonl"
    texts = [" ".join(WORDS[: 2 + number % 10]) for number in range(60)]
    data.write_text("\n".join(json.dumps({"text": f"{n} {t}"}) for n, t in enumerate(texts)))
    arguments = words(data, folder / name, STEPS, *more)
    device = [f"backend.device={DEVICE}", "backend.step=eager", f"backend.dtype={DTYPE}"]
    command = [sys.executable, *(starter or []), "-m", "muxtune.cli", *arguments, *device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / name


def losses(run: Path) -> dict[tuple[str, int], float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(row["task_id"], row["step"]): row["loss"] for row in rows}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[tuple[str, int], float]:
    return losses(train(folder, "one"))


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_two_gpus_train_what_one_trains(
    folder: Path, one: dict[tuple[str, int], float], name: str
) -> None:
    found = losses(train(folder, name, *LAYOUTS[name]))
    assert found.keys() == one.keys() and len(found) == 2 * STEPS
    # bfloat16 keeps 8 bits, and tensor parallel ranks round their sums once more.
    assert found == pytest.approx(one, rel=1e-2)


def test_torchrun_starts_ranks_on_gpus(folder: Path, one: dict[tuple[str, int], float]) -> None:
    run = train(folder, "torchrun", *LAYOUTS["pipeline"], starter=TORCHRUN)
    assert losses(run) == pytest.approx(one, rel=1e-2)
