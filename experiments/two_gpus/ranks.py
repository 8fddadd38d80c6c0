"""Two ranks of this host, each with a GPU, that end when their time is over."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

WORLD_SIZE = 2
GRACE_S = 5.0  # before the end, in which ranks that hang tell where they are


def start_ranks(
    work: Callable[..., None], args: Any, limit_s: float, gate: str = "",
    ahead: Callable[[Any], Any] = lambda args: None,
) -> None:  # fmt: skip
    """``work(rank, device, args)`` in each; ends this process with the worst of their statuses.
    ``gate``: a file that they wait for, when they have done ``ahead(args)``; it says at which time
    they end, in the place of ``limit_s``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A GPU that the parent has touched is of no use to a fork of it.
    context: Any = multiprocessing.get_context("fork" if args.device == "cpu" else "spawn")
    opening = Opening(gate, time.time() + limit_s)
    ranks = [
        context.Process(target=_rank_main, args=(rank, work, args, port, opening, ahead))
        for rank in range(WORLD_SIZE)
    ]
    for process in ranks:
        process.start()
    deadline_s = opening.deadline_s()
    codes = [_ended(process, deadline_s) for process in ranks]
    sys.exit(max(codes))


class Opening(NamedTuple):
    """Of the gate; without one, at once."""

    gate: str
    without_s: float

    def deadline_s(self) -> float:
        """In Unix time, once it is open."""
        while self.gate and not Path(self.gate).exists():
            time.sleep(0.02)
        return float(Path(self.gate).read_text()) if self.gate else self.without_s


def _ended(process: Any, deadline_s: float) -> int:
    process.join(max(0.0, deadline_s - time.time()))
    if process.is_alive():
        print(f"rank {process.name} is ended, because its time is over", flush=True)
        process.kill()
        process.join()
    return abs(process.exitcode or 0)


def _rank_main(
    rank: int, work: Callable[..., None], args: Any, port: int, opening: Opening,
    ahead: Callable[[Any], Any],
) -> None:  # fmt: skip
    ahead(args)
    deadline_s = args.deadline = opening.deadline_s()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    # Streams share no queue of the device: one that waits holds no other up.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    device = torch.device("cpu" if args.device == "cpu" else f"cuda:{rank}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1 if device.type == "cpu" else 8)
    faulthandler.dump_traceback_later(max(1.0, deadline_s - time.time() - GRACE_S))
    code = 1
    try:
        dist.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE)
        work(rank, device, args)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
