"""The controller's commands to all ranks, and the ranks' reports to it."""

from __future__ import annotations

import pickle
import queue
import threading
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from muxtune.runtime.bank import TaskState
from muxtune.runtime.batch import PassTensors
from muxtune.runtime.distributed.links import FOREVER, DistributedError, lost
from muxtune.runtime.distributed.runner import RoundInput
from muxtune.runtime.distributed.static_runner import Sizes, StaticRound
from muxtune.types import Plan, TaskSpec


class Adopt(NamedTuple):
    """Take a task on: a fresh one, or ``whole``, which a checkpoint held."""

    task: TaskSpec
    num_steps: int
    whole: TaskState | None


class Arrange(NamedTuple):
    """Lay these tasks' adapters out as the plan says. Nothing is in flight. ``sizes``: of each
    hTask's programs, where its rounds are to run as static visits. ``copies``: whether tasks'
    states will be wanted while rounds go on. ``open_ids``: tasks in the middle of a step."""

    plan: Plan
    task_ids: tuple[str, ...]
    sizes: tuple[Sizes, ...] = ()
    copies: bool = False
    open_ids: frozenset[str] = frozenset()


class Round(NamedTuple):
    """``htasks``: of the micro-batches in turn where the plan has no order, else None.
    ``inputs``: one a replica; static ones where the ranks run static visits."""

    htasks: tuple[int, ...] | None
    inputs: tuple[RoundInput | StaticRound, ...]


class Flush(NamedTuple):
    """Finish all rounds that are known."""


class Gather(NamedTuple):
    """Report your shares of these tasks. Nothing is in flight."""

    task_ids: tuple[str, ...]
    weights_only: bool = False


class Score(NamedTuple):
    """Report losses without training, of an hTask's adapters, or of one task's, as the only
    slot. Nothing is in flight."""

    htask: int
    tensors: PassTensors
    task_id: str = ""


class Drop(NamedTuple):
    """These tasks have ended."""

    task_ids: tuple[str, ...]


class Stop(NamedTuple):
    """The run is over."""


class Scores(NamedTuple):
    """By slot: sums of negative log-likelihoods, and numbers of targets."""

    nll: list[float]
    targets: list[int]


class Gathered(NamedTuple):
    rank: int
    shares: dict[str, Any]


def _group(ranks: Iterable[int]) -> Any:
    return dist.new_group(list(ranks), timeout=FOREVER, backend="gloo")


class Team:
    """All ranks' channels to and from rank 0. Made by all ranks together."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.control: Any = dist.new_group(list(range(world_size)), timeout=FOREVER, backend="gloo")
        self._pairs: dict[int, Any] = {
            other: dist.new_group([0, other], timeout=FOREVER, backend="gloo")
            for other in range(1, world_size)
        }
        self.reports: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._one_at_a_time = threading.Lock()  # threads report too
        if rank == 0:
            for other in self._pairs:
                threading.Thread(target=self._listen, args=(other,), daemon=True).start()

    def tell(self, command: Any) -> None:
        """From the controller to everybody else."""
        try:
            dist.broadcast_object_list([command], src=0, group=self.control)
        except RuntimeError as error:
            raise lost("a rank", error) from None

    def heed(self) -> Any:
        """The controller's next command. Raises DistributedError when there is none any more."""
        box: list[Any] = [None]
        try:
            dist.broadcast_object_list(box, src=0, group=self.control)
        except RuntimeError as error:
            raise lost("rank 0, which controls the run,", error) from None
        return box[0]

    def report(self, message: Any) -> None:
        """To the controller, from any rank and any thread."""
        if self.rank == 0:
            self.reports.put(message)
            return
        data = torch.frombuffer(bytearray(pickle.dumps(message)), dtype=torch.uint8)
        group = self._pairs[self.rank]
        with self._one_at_a_time:
            dist.send(torch.tensor([data.numel()]), 0, group=group)
            dist.send(data, 0, group=group)

    def take(self, timeout_s: float) -> Any:
        """The next report. Raises DistributedError when none comes or a rank has died."""
        deadline_s = time.monotonic() + timeout_s
        try:
            message = self.reports.get(timeout=max(0.0, deadline_s - time.monotonic()))
        except queue.Empty:
            raise DistributedError(
                f"no rank reported anything within {timeout_s:g} s: one hangs. "
                "Look at the ranks' last lines, then resume from the last checkpoint"
            ) from None
        return self._checked(message)

    def taken(self) -> list[Any]:
        """All reports that are there."""
        found = []
        while True:
            try:
                found.append(self._checked(self.reports.get_nowait()))
            except queue.Empty:
                return found

    def _checked(self, message: Any) -> Any:
        if isinstance(message, DistributedError):
            raise message
        return message

    def _listen(self, other: int) -> None:
        group = self._pairs[other]
        try:
            while True:
                size = torch.zeros(1, dtype=torch.int64)
                dist.recv(size, other, group=group)
                data = torch.empty(int(size), dtype=torch.uint8)
                dist.recv(data, other, group=group)
                self.reports.put(pickle.loads(data.numpy().tobytes()))
        except Exception as error:
            self.reports.put(lost(f"rank {other}", error))
