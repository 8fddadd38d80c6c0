"""How ranks reach each other: process groups, and the streams that run transfers.

Each direction between two stages is a group of its own, so that no transfer waits behind one that
goes the other way. What waits (a transfer, an exchange, a receive) runs on a thread of its own,
one a stream, so that computing goes on; on CUDA an exchange's thread only launches it, and events
order the streams.

Who runs operation by operation must not have the device wait for a message. The driver loads a
kernel at its first launch, and may wait for all that the device does meanwhile; a receive that
waits for what this launch leads to would then wait for ever ("Lazy Loading" in the CUDA C++
Programming Guide; a pipeline did hang so on two GPUs). So there threads wait for messages
(``Wire``), which copy engines move, or the host where these cannot reach the other GPU. NCCL's
channels are for those who have loaded all of their kernels before (``order_runner``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from muxtune.errors import MuxTuneError
from muxtune.runtime.distributed.layout import Layout, Place
from muxtune.runtime.distributed.peer_memory import PeerMemory, Unavailable

# Waiting is bounded by this package, which can tell a peer that is idle from one that hangs.
FOREVER = timedelta(days=7)
NCCL_LIMIT = timedelta(minutes=5)  # then its watchdog ends the process
COMPILING_S = 180.0  # at most, after a plan: kernels of new shapes
_POLL_S = 0.2
_LOOK_S = 2e-4  # between looks at a GPU, whose rounds take 100 times as long


class DistributedError(MuxTuneError):
    """The ranks of a run cannot go on together: says which rank, why, and the remedy."""


def lost(who: str, error: Exception) -> DistributedError:
    """What a broken connection means."""
    detail = (str(error) or type(error).__name__).splitlines()[0][:160]
    return DistributedError(
        f"{who} has died ({detail}). Look at its last lines, then resume from the last checkpoint"
    )


class Channel(NamedTuple):
    """One direction to or from a neighbouring stage. ``group`` has the two ranks as members."""

    rank: int
    group: Any


class Wire(Protocol):
    """Messages of one direction, each of which its thread waits for: what ``receive`` gives is
    there, and what ``send`` was given is free again."""

    def send(self, tensor: Tensor) -> None: ...
    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...


class HostWire:
    """By gloo, through the memory of the host."""

    def __init__(self, channel: Channel, device: torch.device) -> None:
        self._channel, self._device = channel, device

    def send(self, tensor: Tensor) -> None:
        host = tensor.to("cpu").contiguous()
        dist.send(host, self._channel.rank, group=self._channel.group)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        dist.recv(tensor, self._channel.rank, group=self._channel.group)
        return tensor.to(self._device)


STAGE_BYTES = 32 << 20


class CopiedWire:
    """Piece by piece into ``stage``, memory of the receiver's that the sender reaches: the
    receiver says when it is free, and the sender when a piece is there."""

    def __init__(
        self, channel: Channel, device: torch.device, memory: PeerMemory, stage: Tensor
    ) -> None:
        self._channel, self._device, self._memory, self._stage = channel, device, memory, stage

    def send(self, tensor: Tensor) -> None:
        for piece in self._pieces(tensor.contiguous().view(-1).view(torch.uint8)):
            self._hear()
            self._memory.put(piece, self._stage[: piece.numel()], self._channel.rank)
            self._settle()
            self._say()

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        for piece in self._pieces(tensor.view(-1).view(torch.uint8)):
            self._say()
            self._hear()
            piece.copy_(self._stage[: piece.numel()])
            self._settle()
        return tensor

    def _pieces(self, data: Tensor) -> Sequence[Tensor]:
        return data.split(self._stage.numel())

    def _say(self) -> None:
        dist.send(torch.zeros(1), self._channel.rank, group=self._channel.group)

    def _hear(self) -> None:
        dist.recv(torch.zeros(1), self._channel.rank, group=self._channel.group)

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


class Links:
    """This rank's groups. Made by all ranks together, in the same order.

    ``tp``: the stage's ranks, for exchanges that the plan orders; ``step``: the same ranks, for
    what an optimizer step sums; ``sends`` and ``receives``: by neighbouring stage; ``all``: every
    rank of the instance, for gradients over replicas. ``peer``: the stage's other rank, where it
    has two. ``streams_wait``: the channels are NCCL's, see above.
    """

    def __init__(
        self, layout: Layout, place: Place, device: torch.device, streams_wait: bool = False
    ) -> None:
        self.layout, self.place, self.device = layout, place, device
        self.backend = "nccl" if device.type == "cuda" else "gloo"
        self.tp = self.step = None
        self.peer: int | None = None
        self.streams_wait = streams_wait and device.type == "cuda"
        self.sends: dict[int, Channel] = {}
        self.receives: dict[int, Channel] = {}
        for replica, shape in enumerate(layout.replicas):
            self._make_stage_groups(replica, shape.tp, shape.pp)
            self._make_channels(replica, shape.tp, shape.pp)
        self.all = self._group(range(layout.world_size)) if len(layout.replicas) > 1 else None
        self.lanes = {name: Lane(name, device) for name in ("comm", "from below", "from above")}
        self._out: dict[int, Wire] = {}
        self._in: dict[int, Wire] = {}
        if not self.streams_wait and any(shape.pp > 1 for shape in layout.replicas):
            self._make_wires()

    def _make_wires(self) -> None:
        stages: Sequence[Tensor] = ()
        memory = self._shared_memory() if self.device.type == "cuda" else None
        if memory is not None:  # one for what each rank sends here
            sizes = [STAGE_BYTES] * self.layout.world_size
            stages = [memory.take((size,), torch.uint8) for size in sizes]

        def wire(channel: Channel, sender: int) -> Wire:
            if memory is None:
                return HostWire(channel, self.device)
            return CopiedWire(channel, self.device, memory, stages[sender])

        self._out = {stage: wire(item, self.place.rank) for stage, item in self.sends.items()}
        self._in = {stage: wire(item, item.rank) for stage, item in self.receives.items()}

    def _shared_memory(self) -> PeerMemory | None:
        world_size = self.layout.world_size
        try:
            return PeerMemory(
                self.place.rank, range(world_size), self.device, world_size * STAGE_BYTES
            )
        except Unavailable:  # other hosts, or GPUs that do not reach each other
            return None

    def close(self) -> None:
        for lane in self.lanes.values():
            lane.close()

    def send(self, tensor: Tensor, stage: int) -> None:
        self._out[stage].send(tensor)

    def receive(self, shape: Sequence[int], dtype: torch.dtype, stage: int) -> Tensor:
        return self._in[stage].receive(tuple(shape), dtype)

    def lane_from(self, stage: int) -> Lane:
        return self.lanes["from below" if stage < self.place.stage else "from above"]

    def _group(self, ranks: Sequence[int] | range) -> Any:
        limit = NCCL_LIMIT if self.backend == "nccl" else FOREVER
        group = dist.new_group(list(ranks), timeout=limit, backend=self.backend)
        if self.backend == "nccl" and self.place.rank in ranks:
            # NCCL connects at first use, and blocks the host until the peers do: here all come.
            dist.all_reduce(torch.zeros(1, device=self.device), group=group)
        return group

    def _make_stage_groups(self, replica: int, tp: int, pp: int) -> None:
        for stage in range(pp if tp > 1 else 0):
            ranks = [self.layout.rank_of(replica, stage, part) for part in range(tp)]
            groups = [self._group(ranks) for _ in range(2)]
            if self.place.rank in ranks:
                self.tp, self.step = groups
                others = [rank for rank in ranks if rank != self.place.rank]
                self.peer = others[0] if len(others) == 1 else None

    def _make_channels(self, replica: int, tp: int, pp: int) -> None:
        for stage in range(pp - 1):
            for part in range(tp):
                below, above = (self.layout.rank_of(replica, s, part) for s in (stage, stage + 1))
                up, down = (self._direction((below, above)) for _ in range(2))
                if self.place.rank == below:
                    self.sends[stage + 1] = Channel(above, up)
                    self.receives[stage + 1] = Channel(above, down)
                    self._try(self.sends[stage + 1], self.receives[stage + 1])
                if self.place.rank == above:
                    self.sends[stage] = Channel(below, down)
                    self.receives[stage] = Channel(below, up)
                    self._try(self.sends[stage], self.receives[stage], receives_first=True)

    def _direction(self, ranks: Sequence[int]) -> Any:
        if self.streams_wait:
            return self._group(ranks)
        return dist.new_group(list(ranks), timeout=FOREVER, backend="gloo")

    def _try(self, out: Channel, back: Channel, receives_first: bool = False) -> None:
        """One message each way, so that both directions are connected."""
        if not self.streams_wait:
            return
        tensor = torch.zeros(1, device=self.device)
        for sends in (not receives_first, receives_first):
            channel, move = (out, dist.send) if sends else (back, dist.recv)
            move(tensor, channel.rank, group=channel.group)


def used_here(*tensors: Tensor | None) -> None:
    """Told where a CUDA tensor is used on another stream than the one that it was made on: its
    memory is then not given away before the current stream is through with it."""
    for tensor in tensors:
        if tensor is not None and tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


class Arrival(NamedTuple):
    """What a piece of a lane's work came to, and on CUDA the event after which it is there."""

    value: Any
    event: Any

    def come(self) -> None:
        """The current stream waits for it."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)


class Lane:
    """A stream that runs pieces of work in the order in which they are given."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.device = device
        self._threads = ThreadPoolExecutor(1, thread_name_prefix=name)
        # Transfers are short and others wait for them.
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def put(self, work: Callable[[], Any], after: Sequence[Any] = ()) -> Future[Arrival]:
        """``after``: CUDA events that the work's stream waits for."""
        return self._threads.submit(self._run, work, after)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _run(self, work: Callable[[], Any], after: Sequence[Any]) -> Arrival:
        if self._stream is None:
            return Arrival(work(), None)
        torch.cuda.set_device(self.device)
        with torch.cuda.stream(self._stream):
            for event in after:
                self._stream.wait_event(event)
            value = work()
            event = torch.cuda.Event()
            event.record(self._stream)
        return Arrival(value, event)


class Patience:
    """How long to wait for others. ``is_excused``: whether the others have a reason to be late,
    as the controller has while it reads data."""

    def __init__(self, timeout_s: float, is_excused: Callable[[], bool] = lambda: False) -> None:
        self.timeout_s, self.is_excused = timeout_s, is_excused
        self._lenient_until_s = 0.0

    def expect_compiling(self) -> None:
        """From now on ranks may be busy compiling kernels, which others see nothing of."""
        self._lenient_until_s = time.monotonic() + COMPILING_S

    @property
    def limit_s(self) -> float:
        """Of a wait that begins now."""
        return max(self.timeout_s, self._lenient_until_s - time.monotonic())

    def wait(self, future: Future[Arrival], what: str) -> Arrival:
        """Raises DistributedError when it does not come in time or cannot come any more."""
        limit_s = self.limit_s
        deadline_s = time.monotonic() + limit_s
        while True:
            try:
                return future.result(timeout=_POLL_S)
            except FutureTimeout:
                if self.is_excused():
                    deadline_s = time.monotonic() + limit_s
                elif time.monotonic() > deadline_s:
                    raise _overdue(what, limit_s) from None
            except torch.OutOfMemoryError:
                raise  # this rank's own
            except RuntimeError as error:
                raise lost(f"another rank, which owes {what},", error) from None

    def until(self, is_there: Callable[[], bool], what: str) -> None:
        """Looks again and again. Raises DistributedError when it does not come in time."""
        limit_s = self.limit_s
        deadline_s = time.monotonic() + limit_s
        while not is_there():
            time.sleep(_LOOK_S)
            if self.is_excused():
                deadline_s = time.monotonic() + limit_s
            elif time.monotonic() > deadline_s:
                raise _overdue(what, limit_s)


def _overdue(what: str, limit_s: float) -> DistributedError:
    return DistributedError(
        f"{what} did not come within {limit_s:.0f} s: another rank hangs or has died. "
        "Look at its last lines, then resume from the last checkpoint"
    )


def order_waits_for_itself() -> DistributedError:
    return DistributedError(
        "the plan's order waits for itself on this rank. Resume with planner.orchestration=false, "
        "which needs no order, and report the plan"
    )
