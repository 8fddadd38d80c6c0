"""Messages between ranks of one host that no multiprocessor works on.

A receive of NCCL spins on multiprocessors until its message is there. Kernels that fill the device
take a wave longer meanwhile, and in a pipeline some receive waits nearly all the time. Here the
sender's copy engine writes into the receiver's memory and then raises a flag there; the receiver's
stream waits for the flag in the hardware's front end (``cuStreamWaitValue32`` of the CUDA driver
API), so that nothing runs until it is up.

Ranks take memory in the same order, so that what one takes lies at the same place on all of them.
On a CPU the memory is shared through a file, and a waiting thread looks again and again.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

_FLAG_BYTES = 1 << 16
_ALIGN_BYTES = 512
_POLL_S = 5e-5
_TRIAL_S = 10.0
_PIECES, _PIECE_BYTES = 4, 1 << 20  # of a message by way of the host: at most, at least
_AHEAD = 2  # see PairSum
_Twins = tuple[Tensor, Tensor]  # a tensor, and where the other rank's comes to lie


class Unavailable(Exception):
    """The ranks cannot reach each other's memory; says why."""


class _Reach(Protocol):
    """How one kind of device reaches memory. ``own``: uint8, this rank's; addresses are bytes
    from its start, on any rank."""

    own: Tensor

    def export(self) -> Any: ...
    def open(self, rank: int, exported: Any) -> None: ...
    def settle(self) -> None: ...
    def copy(self, source: Tensor, rank: int, address: int) -> None: ...
    def write(self, rank: int, address: int, value: int) -> None: ...
    def wait(self, address: int, value: int, limit_s: float = 0.0) -> None: ...
    def fetch(self, own: Tensor) -> None: ...
    def close(self) -> None: ...


class PeerMemory:
    """``num_bytes`` on each of ``ranks``, which all make it together.

    Work is put on the current stream, or done at once on a CPU. ``through_host``: by way of the
    host's memory, where GPUs do not reach each other's. Raises Unavailable on every rank where one
    cannot reach another.
    """

    def __init__(
        self, rank: int, ranks: Sequence[int], device: torch.device, num_bytes: int,
        group: Any = None, through_host: bool = False,
    ) -> None:  # fmt: skip
        size = num_bytes + _FLAG_BYTES

        def make() -> _Reach:
            if through_host:
                return _HostReach(device, size)
            return _CudaReach(device, size) if device.type == "cuda" else _FileReach(size)

        self.through_host = through_host
        self.rank, self._num_flags, self._next = rank, 0, _FLAG_BYTES
        self._counts: dict[tuple[int, bool], int] = {}
        self._reach: Any = None  # a _Reach, once it is made
        self._reach = self._agreed(make, group)
        exported = _gathered(self._agreed(self._reach.export, group), group)
        others = {r: item for r, item in zip(ranks, exported, strict=True) if r != rank}
        self._agreed(lambda: [self._reach.open(*item) for item in others.items()], group)
        self._reach.settle()
        self._agreed(lambda: self._try_out(sorted(ranks)), group)
        self.give_back()

    def _agreed(self, work: Callable[[], Any], group: Any) -> Any:
        """What comes of it, where it works on all ranks."""
        value, problem = None, ""
        try:
            value = work()
        except (Unavailable, OSError, RuntimeError, AttributeError) as error:
            problem = (str(error) or type(error).__name__).splitlines()[0][:200]
        problems = [item for item in _gathered(problem, group) if item]
        if problems:
            if self._reach is not None:
                self._reach.close()
            raise Unavailable(problems[0])
        return value

    def _try_out(self, ranks: Sequence[int]) -> None:
        """One message to and from every other rank, with an end to waiting."""
        flags = {rank: self.flag() for rank in ranks}  # by sender
        inbox_R = self.take((len(ranks),), torch.int32)
        outbox_R = torch.full_like(inbox_R, self.rank + 1)
        own = ranks.index(self.rank)
        for rank in ranks:
            if rank != self.rank:
                self.put(outbox_R[own : own + 1], inbox_R[own : own + 1], rank)
                self.announce(flags[self.rank], rank)
        for rank in ranks:
            if rank != self.rank:
                self._reach.wait(4 * flags[rank], 1, _TRIAL_S)
                place = ranks.index(rank)
                self._reach.fetch(inbox_R[place : place + 1])
        found = [value for place, value in enumerate(inbox_R.tolist()) if place != own]
        if found != [rank + 1 for rank in ranks if rank != self.rank]:
            raise Unavailable(f"a message came as {found}")

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What other ranks may write to, from now on: so it is not cleared. Raises Unavailable
        where nothing is left."""
        num_bytes = math.prod(shape) * dtype.itemsize
        start, own = self._next, self._reach.own
        if start + num_bytes > own.numel():
            raise Unavailable(f"{num_bytes:,} of {own.numel():,} shared bytes are not left")
        self._next = start + -(-num_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
        return own[start : start + num_bytes].view(dtype).view(tuple(shape))

    def give_back(self) -> None:
        """All that was taken; flags are never used again. No rank may be at work."""
        self._next = _FLAG_BYTES

    def flag(self) -> int:
        """A new one, down everywhere. It counts the messages that it announces."""
        number, self._num_flags = self._num_flags, self._num_flags + 1
        if 4 * self._num_flags > _FLAG_BYTES:
            raise Unavailable("no flag is left")
        return number

    def put(self, source: Tensor, twin: Tensor, rank: int) -> None:
        """Copy ``source`` to where ``rank`` has what is ``twin`` here."""
        if source.shape != twin.shape or source.dtype != twin.dtype:
            raise ValueError(f"{source.shape} does not fit {twin.shape}")
        address = twin.data_ptr() - self._reach.own.data_ptr()
        self._reach.copy(source.contiguous(), rank, address)

    def announce(self, flag: int, rank: int) -> None:
        """Tell ``rank``, after all that was put before on this stream."""
        self._reach.write(rank, 4 * flag, self._count(flag, True))

    def heed(self, flag: int, *twins: Tensor) -> None:
        """Wait until the other rank has announced once more that it has put something into
        ``twins``."""
        self._reach.wait(4 * flag, self._count(flag, False))
        for twin in twins:
            self._reach.fetch(twin)

    def close(self) -> None:
        """No rank may be at work, nor use what it took any more."""
        self._reach.close()

    def _count(self, flag: int, tells: bool) -> int:
        count = self._counts[flag, tells] = self._counts.get((flag, tells), 0) + 1
        return count


class PairSum:
    """Sums of two ranks' tensors, for which each writes its own to the other: of two, no way moves
    fewer bytes. Both call it for the same tensors in the same order. ``most_bytes``: of all tensors
    of a call, each rounded up to whole ``PairSum.align_bytes``.

    A message goes into one of some buffers in turn, when what came with the message ``_AHEAD``
    before it has been fetched: the other had sent that one when it had fetched the one ``_AHEAD``
    before, so the buffer is free. By way of the host a message goes in pieces and is fetched on a
    stream of its own, so that both directions are used at once.
    """

    align_bytes = _ALIGN_BYTES

    def __init__(self, memory: PeerMemory, other: int, most_bytes: int) -> None:
        self._memory, self._other = memory, other
        self._flag = memory.flag()
        self.fetching: Any = None  # the stream, if it is not the caller's
        num_buffers = 2 * _AHEAD if memory.through_host else 2
        self._buffers = [memory.take((most_bytes,), torch.uint8) for _ in range(num_buffers)]
        device = self._buffers[0].device
        if memory.through_host and device.type == "cuda":
            self.fetching = torch.cuda.Stream(device, priority=-2)
        self._fetched: list[Any] = []  # events of the last messages, if so

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        """In place. The stream on which it is done, if not the current one."""
        self._buffers.append(self._buffers.pop(0))
        chunks = list(self._chunks(tensors, self._buffers[-1]))
        if self.fetching is None:
            self._send(chunks)
            self._fetch(chunks)
            self._add(tensors, self._buffers[-1])
            return None
        current = torch.cuda.current_stream()
        if len(self._fetched) == _AHEAD:
            current.wait_event(self._fetched.pop(0))
        self._send(chunks)
        sent = current.record_event()
        with torch.cuda.stream(self.fetching):
            self._fetch(chunks)
            self.fetching.wait_event(sent)  # until then tensors are read
            self._add(tensors, self._buffers[-1])
            self._fetched.append(self.fetching.record_event())
        return self.fetching

    def join(self) -> None:
        """The current stream waits for what has been called."""
        if self.fetching is not None:
            torch.cuda.current_stream().wait_stream(self.fetching)

    def _send(self, chunks: Sequence[Sequence[_Twins]]) -> None:
        for chunk in chunks:
            for own, twin in chunk:
                self._memory.put(own, twin, self._other)
            self._memory.announce(self._flag, self._other)

    def _fetch(self, chunks: Sequence[Sequence[_Twins]]) -> None:
        for chunk in chunks:
            self._memory.heed(self._flag, *(twin for _, twin in chunk))

    def _add(self, tensors: Sequence[Tensor], buffer: Tensor) -> None:
        for tensor, theirs in self._places(tensors, buffer):
            tensor.add_(theirs)

    def _places(self, tensors: Sequence[Tensor], buffer: Tensor) -> Iterator[_Twins]:
        start = 0
        for tensor in tensors:
            part = buffer[start : start + tensor.nbytes]
            yield tensor, part.view(tensor.dtype).view(tensor.shape)
            start += -(-tensor.nbytes // _ALIGN_BYTES) * _ALIGN_BYTES

    def _chunks(self, tensors: Sequence[Tensor], buffer: Tensor) -> Iterator[list[_Twins]]:
        """What is announced at once: all, or pieces of the first tensor and the rest."""
        (first, twin), *rest = self._places(tensors, buffer)
        if not self._memory.through_host:
            yield [(first, twin), *rest]
            return
        count = max(1, min(_PIECES, first.nbytes // _PIECE_BYTES))
        length = max(1, -(-first.numel() // count))
        pieces = first.flatten().split(length), twin.view(-1).split(length)
        for piece in zip(*pieces, strict=True):
            yield [piece]
        if rest:
            yield rest


def _gathered(value: Any, group: Any) -> list[Any]:
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, value, group=group)
    return every


# ------------------------------------------------------------------------------------- CUDA


class _Handle(ctypes.Structure):
    """CUipcMemHandle: memory that another process may open."""

    _fields_ = (("reserved", ctypes.c_byte * 64),)


class _Driver:
    """The few functions of the CUDA driver API that torch has no name for."""

    _POINTER, _SIZE, _U32 = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_uint32
    _FUNCTIONS = {
        "cuMemGetAddressRange_v2": (
            ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_size_t), _POINTER
        ),
        "cuIpcGetMemHandle": (ctypes.POINTER(_Handle), _POINTER),
        "cuIpcOpenMemHandle_v2": (ctypes.POINTER(ctypes.c_uint64), _Handle, _U32),
        "cuIpcCloseMemHandle": (_POINTER,),
        "cuMemHostGetDevicePointer_v2": (
            ctypes.POINTER(ctypes.c_uint64), ctypes.c_void_p, ctypes.c_uint
        ),
        "cuMemcpyAsync": (_POINTER, _POINTER, _SIZE, ctypes.c_void_p),
        "cuStreamWriteValue32_v2": (ctypes.c_void_p, _POINTER, _U32, _U32),
        "cuStreamWaitValue32_v2": (ctypes.c_void_p, _POINTER, _U32, _U32),
    }  # fmt: skip

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        for name, arguments in self._FUNCTIONS.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int

    def __call__(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            raise Unavailable(f"{name}: {(text.value or b'').decode()} ({code})")


class _CudaReach:
    _LAZY_PEER_ACCESS, _AT_LEAST = 1, 0

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self.own = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        torch.cuda.synchronize(device)
        self._call = _Driver()
        self._bases: dict[int, int] = {}
        self._opened: list[int] = []

    def export(self) -> tuple[bytes, int]:
        """(handle of the allocation, where in it the memory begins)."""
        base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
        start = self.own.data_ptr()
        self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), start)
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), base.value)
        return bytes(handle), start - base.value

    def open(self, rank: int, exported: tuple[bytes, int]) -> None:
        raw, offset = exported
        base = ctypes.c_uint64()
        handle = _Handle.from_buffer_copy(raw)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(base), handle, self._LAZY_PEER_ACCESS)
        self._opened.append(base.value)
        self._bases[rank] = base.value + offset

    def settle(self) -> None:
        """Everybody has opened what it needs."""

    def copy(self, source: Tensor, rank: int, address: int) -> None:
        num_bytes = source.numel() * source.element_size()
        target = self._bases[rank] + address
        self._call("cuMemcpyAsync", target, source.data_ptr(), num_bytes, self._stream())

    def write(self, rank: int, address: int, value: int) -> None:
        target = self._bases[rank] + address
        self._call("cuStreamWriteValue32_v2", self._stream(), target, value, 0)

    def wait(self, address: int, value: int, limit_s: float = 0.0) -> None:
        own = self.own.data_ptr() + address
        self._call("cuStreamWaitValue32_v2", self._stream(), own, value, self._AT_LEAST)
        if limit_s:
            self._expect(address, value, limit_s)

    def _expect(self, address: int, value: int, limit_s: float) -> None:
        event, end_s = torch.cuda.Event(), time.monotonic() + limit_s
        event.record()
        while not event.query():
            if time.monotonic() > end_s:
                with torch.cuda.stream(torch.cuda.Stream(self.own.device)):  # lets the other go on
                    self.own[address : address + 4].view(torch.int32).fill_(value)
                raise Unavailable("a message that was announced did not come")
            time.sleep(_POLL_S)

    def fetch(self, own: Tensor) -> None:
        """It lies there already."""

    def close(self) -> None:
        while self._opened:
            self._call("cuIpcCloseMemHandle", self._opened.pop())

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.own.device).cuda_stream


# -------------------------------------------------------------------------------------- CPU


def _reserved_file(num_bytes: int) -> str:
    """In memory where there is room, for who writes to a page that there is no room for is killed.
    Raises OSError."""
    folders = [folder for folder in ("/dev/shm", tempfile.gettempdir()) if Path(folder).is_dir()]
    for number, folder in enumerate(folders, 1):
        descriptor, path = tempfile.mkstemp(prefix=f"muxtune-{os.getpid()}-", dir=folder)
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)
            return path
        except OSError:
            Path(path).unlink()
            if number == len(folders):
                raise
        finally:
            os.close(descriptor)
    raise OSError("there is no folder for what ranks share")


def _await_flag(flag: Tensor, value: int, limit_s: float) -> None:
    """The host looks again and again. 0: for ever."""
    end_s = time.monotonic() + limit_s
    while int(flag) < value:
        if limit_s and time.monotonic() > end_s:
            raise Unavailable("a message that was announced did not come")
        time.sleep(_POLL_S)


class _FileReach:
    def __init__(self, num_bytes: int) -> None:
        self._path = _reserved_file(num_bytes)
        self.own = self._mapped(self._path)
        self._others: dict[int, Tensor] = {}

    @staticmethod
    def _mapped(path: str) -> Tensor:
        with Path(path).open("r+b") as file:
            return torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)

    def export(self) -> str:
        return self._path

    def open(self, rank: int, exported: str) -> None:
        self._others[rank] = self._mapped(exported)

    def copy(self, source: Tensor, rank: int, address: int) -> None:
        num_bytes = source.numel() * source.element_size()
        target = self._others[rank][address : address + num_bytes]
        target.copy_(source.flatten().view(torch.uint8))

    def write(self, rank: int, address: int, value: int) -> None:
        self._others[rank][address : address + 4].view(torch.int32).fill_(value)

    def wait(self, address: int, value: int, limit_s: float = 0.0) -> None:
        _await_flag(self.own[address : address + 4].view(torch.int32), value, limit_s)

    def fetch(self, own: Tensor) -> None:
        """It lies there already."""

    def settle(self) -> None:
        Path(self._path).unlink(missing_ok=True)  # it is mapped, and goes with the last process

    def close(self) -> None:
        self.settle()


# ------------------------------------------------------------------- by way of the host's memory


class _HostReach(_FileReach):
    """What is sent lies in a file's memory, which both have mapped, until the receiver fetches it.
    Copy engines do both ways, where there is a GPU."""

    _PORTABLE_MAPPED = 3

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self._stage, self._device = self.own.zero_(), device
        self.own = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._call = _Driver() if device.type == "cuda" else None
        self._registered: list[Tensor] = []
        self._own_address = self._reached(self._stage)
        self._addresses: dict[int, int] = {}

    def _reached(self, stage: Tensor) -> int:
        """Where the device finds it."""
        if self._call is None:
            return 0
        runtime: Any = torch.cuda.cudart()
        code = int(runtime.cudaHostRegister(stage.data_ptr(), stage.numel(), self._PORTABLE_MAPPED))
        if code:
            raise Unavailable(f"cudaHostRegister: {code}")
        self._registered.append(stage)
        address = ctypes.c_uint64()
        self._call("cuMemHostGetDevicePointer_v2", ctypes.byref(address), stage.data_ptr(), 0)
        return address.value

    def open(self, rank: int, exported: str) -> None:
        super().open(rank, exported)
        self._addresses[rank] = self._reached(self._others[rank])

    def copy(self, source: Tensor, rank: int, address: int) -> None:
        data = source.flatten().view(torch.uint8)
        target = self._others[rank][address : address + data.numel()]
        target.copy_(data, non_blocking=True)

    def fetch(self, own: Tensor) -> None:
        address = own.data_ptr() - self.own.data_ptr()
        part = slice(address, address + own.nbytes)
        self.own[part].copy_(self._stage[part], non_blocking=True)

    def write(self, rank: int, address: int, value: int) -> None:
        if self._call is None:
            super().write(rank, address, value)
            return
        target = self._addresses[rank] + address
        self._call("cuStreamWriteValue32_v2", self._stream(), target, value, 0)

    def wait(self, address: int, value: int, limit_s: float = 0.0) -> None:
        flag = self._stage[address : address + 4].view(torch.int32)
        if self._call is None or limit_s:
            _await_flag(flag, value, limit_s)
            return
        own = self._own_address + address
        self._call("cuStreamWaitValue32_v2", self._stream(), own, value, _CudaReach._AT_LEAST)

    def close(self) -> None:
        while self._registered:
            runtime: Any = torch.cuda.cudart()
            runtime.cudaHostUnregister(self._registered.pop().data_ptr())
        super().close()

    def _stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream
