"""Starting the ranks of a run, checking that they belong together, and watching them.

``torchrun`` starts ranks on one host or several and tells each its place by the environment;
``launch`` does the same on one host without it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from muxtune.errors import ConfigError, MuxTuneError
from muxtune.runtime.distributed.links import DistributedError

EXIT_LOST = 3
_BEAT_S = 0.5
_GRACE_S = 3.0
_IDLE, _AT_WORK, _GONE = "idle", "at work", "gone"


class RankInfo(NamedTuple):
    """A rank's place, as torchrun tells it."""

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> RankInfo | None:
        """None outside of torchrun and ``launch``. Raises ConfigError for what is no number."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        values = [os.environ.get(name) for name in names]
        if values[0] is None or values[1] is None:
            return None
        try:
            return cls(int(values[0]), int(values[1]), int(values[2] or 0))
        except ValueError:
            raise ConfigError(
                "RANK", f"the environment says {dict(zip(names, values, strict=True))}",
                "Start the ranks with torchrun",
            ) from None  # fmt: skip


def connect(info: RankInfo, timeout_s: float) -> None:
    """Meets the other ranks. Raises ConfigError when they do not come within ``timeout_s``."""
    address = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    try:
        dist.init_process_group(
            "gloo", rank=info.rank, world_size=info.world_size,
            timeout=timedelta(seconds=timeout_s),
        )  # fmt: skip
    except (RuntimeError, ValueError, OSError) as error:
        detail = str(error).splitlines()[0][:200]
        raise ConfigError(
            "MASTER_ADDR",
            f"rank {info.rank} of {info.world_size} did not meet the others at '{address}' within "
            f"{timeout_s:g} s ({detail})",
            "Start all ranks with the same address, one that every host reaches",
        ) from None


def agree(info: RankInfo, facts: Mapping[str, str], group: Any = None) -> None:
    """Raises the same ConfigError on every rank where one differs from rank 0. ``group``: of all
    ranks, whose limit of time holds."""
    every: list[Any] = [None] * info.world_size
    try:
        dist.all_gather_object(every, dict(facts), group=group)
    except RuntimeError as error:
        detail = str(error).splitlines()[0][:200]
        raise DistributedError(
            f"a rank left before the run began ({detail}). Look at its last lines"
        ) from None
    for name in sorted({name for one in every for name in one}):
        values = [one.get(name) for one in every]
        others = [rank for rank, value in enumerate(values) if value != values[0]]
        if others:
            raise ConfigError(
                name,
                f"rank {others[0]} has {values[others[0]]!r}, but rank 0 has {values[0]!r}",
                "Give all ranks the same versions, profile, settings and model",
            )


class Watch:
    """Tells of ranks that stop beating, from a thread that ends this process with the news: what
    the other threads wait for may never come.

    ``excuse``: what rank 0 says of itself while it does something that the others wait for.
    """

    def __init__(self, info: RankInfo, timeout_s: float) -> None:
        self.info, self.timeout_s = info, timeout_s
        self._where = _AT_WORK
        self._seen = {
            rank: ("", time.monotonic()) for rank in range(info.world_size) if rank != info.rank
        }
        self._is_over = threading.Event()
        default: Any = dist.distributed_c10d._get_default_store()
        # A client of its own: a blocking call of another thread must not hold the beat up.
        while hasattr(default, "underlying_store"):
            default = default.underlying_store
        self._store = default.clone()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def is_controller_idle(self) -> bool:
        return self.info.rank != 0 and self._seen[0][0].endswith(_IDLE)

    def idle(self, is_idle: bool) -> None:
        """Said by rank 0: whether the others need not expect anything of it."""
        self._where = _IDLE if is_idle else _AT_WORK

    def close(self) -> None:
        self._is_over.set()
        self._thread.join(2 * _BEAT_S)
        self._tell(_GONE)

    def _run(self) -> None:
        count = 0
        while not self._is_over.wait(_BEAT_S):
            count += 1
            try:
                self._tell(f"{count} {self._where}")
                self._look()
            except RuntimeError as error:
                if not self._is_over.is_set() and self._seen.get(0, ("",))[0] != _GONE:
                    lose(f"the rendezvous of the run has gone ({str(error).splitlines()[0][:120]})")
                return

    def _tell(self, state: str) -> None:
        try:
            self._store.set(f"muxtune/beat/{self.info.rank}", state)
        except RuntimeError:
            if not self._is_over.is_set():
                raise

    def _look(self) -> None:
        now = time.monotonic()
        for rank, (last, since) in self._seen.items():
            key = f"muxtune/beat/{rank}"
            state = self._store.get(key).decode() if self._store.check([key]) else ""
            if state != last:
                self._seen[rank] = (state, now)
            elif last != _GONE and now - since > self.timeout_s:
                lose(f"rank {rank} has not been heard of for {self.timeout_s:g} s")


def lose(problem: str) -> None:
    """End this process: another rank is lost."""
    remedy = "Look at its last lines, then resume from the last checkpoint"
    print(f"error: {problem}. {remedy}", file=sys.stderr, flush=True)
    os._exit(EXIT_LOST)


# ------------------------------------------------------------------------------------ launching


def launch(world_size: int, work: Callable[[], Any]) -> Any:
    """``work`` in ``world_size`` forked ranks of this host; what rank 0 returns.

    Raises DistributedError when a rank fails; the others are ended then. What rank 0 raised for the
    user is raised here.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    port = _free_port()
    ranks = []
    for rank in range(world_size):
        # Not spawned: the command's state is inherited, and no rank has touched a GPU yet.
        info = RankInfo(rank, world_size, rank)
        process = context.Process(target=_rank_main, args=(info, port, work, sender))
        process.start()
        ranks.append(process)
    sender.close()
    try:
        result = _receive(receiver, ranks)
    finally:
        _end(ranks)
    if isinstance(result, MuxTuneError):
        raise result
    return result


def _receive(receiver: Any, ranks: list[Any]) -> Any:
    """Rank 0's result once all ranks have ended well."""
    result: Any = None
    while any(process.is_alive() for process in ranks):
        if result is None and receiver.poll(0.1):
            result = _received(receiver)
            if isinstance(result, MuxTuneError):
                return result
        bad = [r for r, process in enumerate(ranks) if process.exitcode not in (None, 0)]
        if bad:
            # The rank that fell first may have more to say, and so may those that noticed.
            _join(ranks, _GRACE_S)
            return _failure(bad[0], ranks[bad[0]].exitcode)
    if result is None:
        result = _received(receiver)
    bad = [rank for rank, process in enumerate(ranks) if process.exitcode]
    return _failure(bad[0], ranks[bad[0]].exitcode) if bad else result


def _received(receiver: Any) -> Any:
    try:
        return receiver.recv()
    except EOFError:  # rank 0 has closed without a word
        time.sleep(0.1)
        return None


def _failure(rank: int, code: int | None) -> DistributedError:
    how = (
        f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with {code}"
    )
    return DistributedError(
        f"rank {rank} {how}, and the run with it. Its reason stands above, where it could give "
        "one; go on from the last checkpoints with `muxtune train resume=FOLDER`"
    )


def _rank_main(info: RankInfo, port: int, work: Callable[[], Any], sender: Any) -> None:
    os.environ.update(
        RANK=str(info.rank), WORLD_SIZE=str(info.world_size), LOCAL_RANK=str(info.local_rank),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        result = work()
        if info.rank == 0:
            sender.send(result)
        code = 0
    except MuxTuneError as error:
        if info.rank == 0:
            sender.send(MuxTuneError(str(error)))
        else:
            print(f"error: rank {info.rank}: {error}", file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        leave(code)


def leave(code: int) -> None:
    """Threads may still wait for ranks that are gone, so nobody waits for the threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _join(ranks: list[Any], seconds: float) -> None:
    deadline_s = time.monotonic() + seconds
    for process in ranks:
        process.join(max(0.0, deadline_s - time.monotonic()))


def _end(ranks: list[Any]) -> None:
    for stop in (lambda p: None, lambda p: p.terminate(), lambda p: p.kill()):
        for process in ranks:
            if process.is_alive():
                stop(process)
        _join(ranks, 1.0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
