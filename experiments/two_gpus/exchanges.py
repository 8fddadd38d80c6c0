"""What ranks exchange, by itself and beside a computation: NCCL's ways and copies, on two GPUs.

python -m experiments.two_gpus.exchanges --out exchanges.json

Of every size the time of a sum of two ranks, of a transfer to the other, and of a linear of
Llama-2-13B's shape, cut in two, alone and with sums beside it that go on all the while.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from experiments.two_gpus.ranks import start_ranks
from muxtune.runtime.distributed.layout import Layout
from muxtune.runtime.distributed.links import Links
from muxtune.runtime.distributed.peer_memory import PairSum, PeerMemory, Unavailable
from muxtune.types import ReplicaShape

WIDTH, OUT_FEATURES = 5120, 6912
ROWS = (256, 1024, 4096, 16384)
REPEATS = 10
Work = Callable[[], object]


class Exchanges:
    """Of one rank; all ranks call the same in the same order."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self.rank, self.other, self.device = rank, 1 - rank, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        layout = Layout((ReplicaShape(2, 1),))
        self.group = Links(layout, layout.places[rank], device, streams_wait=True).tp
        self.most = (ROWS[-1] if device.type == "cuda" else ROWS[0]) * WIDTH
        self.memory, self.why = self._memory()
        self.streams = (
            [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else []
        )

    def _memory(self) -> tuple[PeerMemory | None, str]:
        if os.environ.get("NCCL_P2P_DISABLE") == "1":
            return None, "the slow link is asked for"
        try:
            needed = 4 * self.most * self.dtype.itemsize + (1 << 20)
            return PeerMemory(self.rank, range(2), self.device, needed), ""
        except Unavailable as reason:
            return None, str(reason)

    def ways(self, rows: int) -> dict[str, Work]:
        tensor = torch.zeros(rows, WIDTH, dtype=self.dtype, device=self.device)
        found: dict[str, Work] = {
            "sum by NCCL": lambda: dist.all_reduce(tensor, group=self.group),
            "transfer by NCCL": lambda: self._transfer(tensor),
        }
        if self.memory is not None:
            memory = self.memory
            memory.give_back()
            target, flag = memory.take(tensor.shape, tensor.dtype), memory.flag()
            pair = PairSum(memory, self.other, tensor.nbytes)
            found["sum by copies"] = lambda: pair([tensor])

            def transfer() -> None:
                if self.rank:
                    memory.heed(flag)
                else:
                    memory.put(tensor, target, self.other)
                    memory.announce(flag, self.other)

            found["transfer by copies"] = transfer
        return found

    def _transfer(self, tensor: torch.Tensor) -> None:
        move = dist.recv if self.rank else dist.send
        move(tensor, self.other, group=self.group)

    def check(self, rows: int) -> None:
        """What copies bring is what NCCL brings. Raises AssertionError."""
        if self.memory is None:
            return
        self.memory.give_back()
        pair = PairSum(self.memory, self.other, rows * WIDTH * self.dtype.itemsize)
        generator = torch.Generator(self.device).manual_seed(self.rank)
        for _ in range(20):
            mine = torch.randn(rows, WIDTH, generator=generator, device=self.device).to(self.dtype)
            theirs = mine.clone()
            pair([mine])
            pair.join()
            dist.all_reduce(theirs, group=self.group)
            assert torch.equal(mine, theirs)

    def row(self, rows: int) -> dict[str, Any]:
        ways = self.ways(rows)
        row: dict[str, Any] = {"rows": rows, "bytes": rows * WIDTH * self.dtype.itemsize}
        row |= {name: self.alone_s(work) for name, work in ways.items()}
        x = torch.randn(rows, WIDTH, device=self.device).to(self.dtype)
        weight = torch.randn(OUT_FEATURES, WIDTH, device=self.device).to(self.dtype)
        linear = lambda: functional.linear(x, weight)  # noqa: E731
        row["linear"] = self.alone_s(linear)
        for name, work in ways.items():
            if name.startswith("sum"):
                row[f"linear beside {name}"] = self.beside_s(linear, work, row["linear"], row[name])
        return row

    def alone_s(self, work: Work) -> float:
        dist.barrier()
        if not self.streams:
            work()
            return 0.0
        with torch.cuda.stream(self.streams[0]):
            work()
            seconds = _timed_s(work, REPEATS)
        dist.barrier()
        return _highest(seconds)

    def beside_s(self, linear: Work, work: Work, linear_s: float, work_s: float) -> float:
        """Of the linear, while the other stream is busy all the time."""
        dist.barrier()
        if not self.streams:
            work()
            return 0.0
        count = max(4, round(2 * REPEATS * linear_s / work_s))
        torch.cuda.synchronize()
        with torch.cuda.stream(self.streams[1]):
            for _ in range(count):
                work()
        with torch.cuda.stream(self.streams[0]):
            seconds = _timed_s(linear, REPEATS)
        torch.cuda.synchronize()
        return _highest(seconds)


def _timed_s(work: Work, repeats: int) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        work()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3 / repeats


def _highest(value: float) -> float:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return max(every)


def measure(rank: int, device: torch.device, args: argparse.Namespace) -> None:
    exchanges = Exchanges(rank, device)
    exchanges.check(ROWS[0])
    rows = [exchanges.row(rows) for rows in (ROWS if device.type == "cuda" else ROWS[:1])]
    if rank == 0:
        settings = {key: value for key, value in os.environ.items() if key.startswith("NCCL_")}
        found = {"nccl": settings, "no copies, because": exchanges.why, "rows": rows}
        with Path(args.out).open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        for row in rows:
            times = ", ".join(
                f"{key} {1e3 * value:.3f} ms" for key, value in row.items()
                if isinstance(value, float)
            )  # fmt: skip
            print(f"{row['rows']} rows: {times}", flush=True)
        print(f"copies: {exchanges.why or 'yes'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="exchanges.jsonl")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--limit-s", type=float, default=60.0)
    args = parser.parse_args()
    start_ranks(measure, args, args.limit_s)


if __name__ == "__main__":
    main()
