"""Messages between stages that threads wait for, and memory that ranks share."""

from __future__ import annotations

import os
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from muxtune.runtime.distributed import peer_memory
from muxtune.runtime.distributed.links import (
    Arrival,
    Channel,
    CopiedWire,
    HostWire,
    Patience,
)
from muxtune.runtime.distributed.peer_memory import PairSum, PeerMemory, Unavailable
from tests.runtime.distributed_helpers import run_world

CPU = torch.device("cpu")
STAGE_BYTES, ROUNDS = 1000, 30


def drawn(sender: int, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * sender + number)
    dtype = torch.float64 if number % 3 == 0 else torch.bfloat16
    numbers = torch.randn(1 + 37 * number, generator=generator).to(dtype)
    return numbers.repeat_interleave(2)[::2] if number % 2 else numbers  # a column, not a row


def exchange(rank: int, folder: Path) -> None:
    """Of sizes below and above a stage, to and fro."""
    other = 1 - rank
    memory = PeerMemory(rank, range(2), CPU, 8 * STAGE_BYTES)
    stages = [memory.take((STAGE_BYTES,), torch.uint8) for _ in range(2)]
    groups = [dist.new_group([0, 1], backend="gloo") for _ in range(2)]
    channels = [Channel(other, group) for group in groups]
    out = CopiedWire(channels[rank], CPU, memory, stages[rank])
    back = CopiedWire(channels[other], CPU, memory, stages[other])
    host = [HostWire(channel, CPU) for channel in channels]
    for number in range(ROUNDS):
        mine, theirs = drawn(rank, number), drawn(other, number)
        for sends in (rank == 0, rank != 0):
            if sends:
                out.send(mine)
                host[rank].send(mine)
            else:
                shape, dtype = tuple(theirs.shape), theirs.dtype
                assert torch.equal(back.receive(shape, dtype), theirs)
                assert torch.equal(host[other].receive(shape, dtype), theirs)
    add_up(rank, memory)
    add_up(rank, PeerMemory(rank, range(2), CPU, 1 << 16, through_host=True))
    with pytest.raises(Unavailable, match="are not left"):
        memory.take((STAGE_BYTES * 100,), torch.uint8)
    assert not list(Path("/dev/shm").glob(f"muxtune-{os.getpid()}-*")), "it is left behind"
    (folder / str(rank)).touch()


def add_up(rank: int, memory: PeerMemory) -> None:
    """Ranks that are late in turn: none may write over what the other has not read."""
    peer_memory._PIECE_BYTES = 64  # of a process that ends with this
    pair = PairSum(memory, 1 - rank, 2 * PairSum.align_bytes)
    for number in range(ROUNDS):
        tensors = [
            torch.full((64,), float(number + rank)),
            torch.full((3,), number, dtype=torch.int64),
        ]
        if number % 2 == rank:
            time.sleep(0.001)
        assert pair(tensors) is None
        assert torch.equal(tensors[0], torch.full((64,), 2.0 * number + 1))
        assert tensors[1].tolist() == [2 * number] * 3
    pair.join()


def test_copies_bring_what_was_sent(tmp_path: Path) -> None:
    run_world(2, exchange, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_ranks_own_lack_of_memory_is_not_laid_on_another() -> None:
    future: Future[Arrival] = Future()
    future.set_exception(torch.OutOfMemoryError("no room for the message"))
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        Patience(1.0).wait(future, "the gradients")


def unreachable(rank: int, folder: Path) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no way there")

    if rank:
        peer_memory._FileReach.open = refuse  # type: ignore[method-assign]
    with pytest.raises(Unavailable, match="no way there"):
        PeerMemory(rank, range(2), CPU, STAGE_BYTES)
    assert not list(Path("/dev/shm").glob(f"muxtune-{os.getpid()}-*")), "it is left behind"
    (folder / str(rank)).touch()


def test_where_one_rank_reaches_nobody_all_ranks_know(tmp_path: Path) -> None:
    run_world(2, unreachable, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
