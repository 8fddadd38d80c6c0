"""What the ranks of one host exchange: sums over tensor-parallel ranks, transfers between stages.

Measured between ranks that do nothing else, by the links that ``muxtune train`` uses (NCCL and
copies on GPUs, gloo between processes on a CPU). The slowest rank of each repeat counts. The
operations are called ``all_reduce.tpN`` and ``p2p``, over the bytes of one message, as the cost
models ask for them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from muxtune.errors import ConfigError
from muxtune.profiling.bench import summarise
from muxtune.runtime.distributed.launch import RankInfo, connect, launch
from muxtune.runtime.distributed.layout import Layout
from muxtune.runtime.distributed.links import Links
from muxtune.types import ReplicaShape

SIZES_BYTES = (1 << 12, 1 << 16, 1 << 20, 1 << 22, 1 << 24, 1 << 26)
REPEATS = 7
LINK_TIMEOUT_S = 60.0
_CALLS = {"cuda": 10, "cpu": 1}  # of a sample, so that launches do not count on a GPU


def measure_exchanges(
    num_ranks: int, device: str, sizes_bytes: Sequence[int] = SIZES_BYTES
) -> dict[str, dict[str, Any]]:
    """The ``ops`` of a profile, measured by as many forked ranks as there may be GPUs.

    Call it before this process touches a GPU. Raises ConfigError where there are fewer GPUs, and
    DistributedError when a rank fails.
    """
    # Without touching them: see ``build.where_to_compute``.
    if device == "cuda" and torch.cuda.device_count() < num_ranks:
        problem = f"{num_ranks} ranks need a GPU each, torch sees {torch.cuda.device_count()}"
        raise ConfigError("cluster.num_gpus", problem, "Give fewer, or cluster=local_cpu")
    return launch(num_ranks, lambda: _measured_here(device, sizes_bytes))


def _measured_here(device: str, sizes_bytes: Sequence[int]) -> dict[str, dict[str, Any]]:
    info = RankInfo.from_environment()
    assert info is not None
    connect(info, LINK_TIMEOUT_S)
    target = torch.device("cpu") if device == "cpu" else torch.device("cuda", info.local_rank)
    if target.type == "cuda":
        torch.cuda.set_device(target)
    found = {}
    for size in _group_sizes(info.world_size):
        bench = _bench(ReplicaShape(size, 1), info, target)
        if bench is not None:
            found[f"all_reduce.tp{size}"] = bench.op(bench.add_up, sizes_bytes)
    bench = _bench(ReplicaShape(1, 2), info, target)
    if bench is not None:
        # There and back: one way alone would measure how fast sends are launched.
        found["p2p"] = bench.op(bench.transfer, sizes_bytes, ways=2)
    dist.barrier()
    return found


def _group_sizes(num_ranks: int) -> list[int]:
    """Powers of two up to the number of ranks, and that number."""
    powers = [1 << k for k in range(1, num_ranks.bit_length()) if 1 << k <= num_ranks]
    return sorted({*powers, num_ranks})


def _bench(shape: ReplicaShape, info: RankInfo, device: torch.device) -> _Bench | None:
    """Of the first ranks, as one replica; the others make groups of one with them."""
    rest = (ReplicaShape(),) * (info.world_size - shape.num_gpus)
    layout = Layout((shape, *rest))
    links = Links(layout, layout.places[info.rank], device)
    members = dist.new_group(list(range(shape.num_gpus)), backend="gloo")
    return _Bench(links, members, info.rank, device) if info.rank < shape.num_gpus else None


class _Bench:
    """Of one rank. ``members``: all of those that take part."""

    def __init__(self, links: Links, members: Any, rank: int, device: torch.device) -> None:
        self.links, self.members, self.rank, self.device = links, members, rank, device

    def add_up(self, tensor: torch.Tensor) -> None:
        dist.all_reduce(tensor, group=self.links.tp)

    def transfer(self, tensor: torch.Tensor) -> None:
        for sends in (self.rank == 0, self.rank != 0):
            if sends:
                self.links.send(tensor, 1 - self.rank)
            else:
                self.links.receive(tensor.shape, tensor.dtype, 1 - self.rank)

    def op(
        self, work: Callable[[torch.Tensor], None], sizes_bytes: Sequence[int], ways: int = 1
    ) -> dict[str, Any]:
        points = []
        for size in sizes_bytes:
            tensor = torch.zeros(size // 4, device=self.device)
            work(tensor)
            samples = [self._sample_s(work, tensor) / ways for _ in range(REPEATS)]
            points.append({"bytes": size, **summarise(samples)})
        return {"unit": "s", "axes": ["bytes"], "points": points}

    def _sample_s(self, work: Callable[[torch.Tensor], None], tensor: torch.Tensor) -> float:
        """Seconds of one call, on the slowest rank. Ranks begin together."""
        calls = _CALLS[tensor.device.type]
        self._settle()
        dist.barrier(group=self.members)
        start_s = time.perf_counter()
        for _ in range(calls):
            work(tensor)
        self._settle()
        seconds = torch.tensor((time.perf_counter() - start_s) / calls)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=self.members)
        return float(seconds)

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
