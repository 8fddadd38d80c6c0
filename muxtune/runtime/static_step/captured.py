"""The step program of each row count as a CUDA graph, and what surrounds its replays.

The host fills one pinned buffer while the device works on another; results come back the same
way, so nothing waits for the device but the reader of a result.

Shape suffixes as in the package.
"""

from __future__ import annotations

import contextlib
import gc
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muxtune.runtime.static_step.inputs import HostBuffer, Sequence, SlotInput
from muxtune.runtime.static_step.program import StepProgram
from muxtune_kernels.adamw import adamw_tables

_DEPTH = 3
NOTHING: Mapping[int, int] = MappingProxyType({})


class HostResult(NamedTuple):
    """Per slot; see ``StepResult``."""

    losses: list[float]
    grad_norms: list[float]
    skipped: list[bool]


class CaptureMemory(NamedTuple):
    """What programs that never run at the same time share: a stream, and the memory that one
    uses only while it runs. ``keeper``: an empty graph, for a pool lives as long as a graph of
    it does."""

    stream: torch.cuda.Stream
    pool: Any  # what torch.cuda.graph_pool_handle gives
    keeper: torch.cuda.CUDAGraph

    @classmethod
    def on_current_stream(cls) -> CaptureMemory:
        """The current stream must not be the default one, which cannot be captured."""
        return cls._on(torch.cuda.current_stream())

    @classmethod
    def of_its_own(cls, device: torch.device) -> CaptureMemory:
        return cls._on(torch.cuda.Stream(device, priority=-1))

    @classmethod
    def _on(cls, stream: torch.cuda.Stream) -> CaptureMemory:
        pool, keeper = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
        with warnings.catch_warnings(), cls._capture(keeper, pool, stream):
            warnings.simplefilter("ignore")  # that it is empty
        return cls(stream, pool, keeper)

    @staticmethod
    def _capture(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> Any:
        # Checkpoints are written by a thread of their own meanwhile.
        mode = "thread_local"
        return torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode)

    def capturing(self, graph: torch.cuda.CUDAGraph) -> Any:
        """Context: what runs is captured into ``graph``."""
        return self._capture(graph, self.pool, self.stream)

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """What this thread allocates lies where graphs have theirs: a trial of a pass then needs
        no memory beside that of its graph, nor beside that of other passes. No graph of the pool
        may be replayed meanwhile. (As the CUDA graph trees of torch's inductor do.)"""
        device = self.stream.device.index
        torch._C._cuda_beginAllocateCurrentThreadToPool(device, self.pool)
        try:
            yield
        finally:
            torch._C._cuda_endAllocateToPool(device, self.pool)
            torch._C._cuda_releasePool(device, self.pool)

    def idle_bytes(self) -> int:
        """Reserved for graphs, beyond what the allocator counts as allocated: a pass that is
        replayed computes in it, and nobody else can have it."""
        segments = torch.cuda.memory_snapshot()
        mine = [item for item in segments if tuple(item["segment_pool_id"]) == tuple(self.pool)]
        return sum(item["total_size"] - item["allocated_size"] for item in mine)


class Pending:
    """The result of a step that may still run. Read it before ``_DEPTH`` more are started."""

    def __init__(self, host_3S: Tensor, event: torch.cuda.Event | None) -> None:
        self._host_3S, self._event = host_3S, event

    def result(self) -> HostResult:
        if self._event is not None:
            self._event.synchronize()
        losses, norms, skipped = self._host_3S.tolist()
        return HostResult(losses, norms, [bool(value) for value in skipped])


class CapturedSteps:
    """``row_counts``: the sizes that exist; a micro-batch takes the smallest that holds it.

    On a CPU the program runs as it is. ``capture_s``: seconds spent on preparing each size;
    ``replays``: how often each size has run. ``recompute``: as in ``StepProgram.run``; a size
    that is left out takes that of the next larger one, or 0.
    """

    def __init__(
        self,
        program: StepProgram,
        row_counts: Iterable[int],
        pad_id: int = 0,
        memory: CaptureMemory | None = None,
        recompute: Mapping[int, int] = NOTHING,
    ) -> None:
        self.program, self.pad_id, self.recompute = program, pad_id, recompute
        self.row_counts = sorted(row_counts)
        layout, device = program.inputs.layout, program.model.device
        if not self.row_counts or self.row_counts[-1] > layout.max_rows:
            raise ValueError(f"row counts {self.row_counts}, at most {layout.max_rows}")
        self._on_cuda = device.type == "cuda"
        self._hosts = [HostBuffer(layout, self._on_cuda) for _ in range(_DEPTH)]
        shape = (3, layout.num_slots)
        self._metrics = [torch.zeros(shape, pin_memory=self._on_cuda) for _ in range(_DEPTH + 1)]
        self._copied: list[torch.cuda.Event | None] = [None] * _DEPTH
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        if memory is None and self._on_cuda:
            memory = CaptureMemory.of_its_own(device)
        self._memory = memory
        self.stream = None if memory is None else memory.stream
        self._kept: list[object] = []  # what graphs point to and caches might let go
        self._num_steps = 0
        self.capture_s: dict[int, float] = {}
        self.replays: dict[int, int] = {}

    def capture(self, row_counts: Iterable[int] | None = None) -> float:
        """Prepare these sizes (default: every one), new ones too, largest first, so that the
        smaller ones find its memory. State is left as it was: the trial step has filler rows
        only. Returns the seconds of all that was prepared so far."""
        wanted = self.row_counts if row_counts is None else list(row_counts)
        for num_rows in sorted(wanted, reverse=True):
            if not self.is_ready(num_rows):
                with no_collection():
                    self._prepare(num_rows)
            self.row_counts = sorted({*self.row_counts, num_rows})
        return sum(self.capture_s.values())

    def is_ready(self, num_rows: int) -> bool:
        return not self._on_cuda or num_rows in self._graphs

    def size_for(self, num_tokens: int) -> int:
        for num_rows in self.row_counts:
            if num_rows >= num_tokens:
                return num_rows
        raise ValueError(f"{num_tokens} tokens, the largest size holds {self.row_counts[-1]}")

    def ready_size_for(self, num_tokens: int) -> int:
        """The smallest size that is prepared and holds them. Raises ValueError without one."""
        for num_rows in self.row_counts:
            if num_rows >= num_tokens and self.is_ready(num_rows):
                return num_rows
        raise ValueError(f"{num_tokens} tokens, and no size that is prepared holds them")

    def step(
        self,
        sequences: Iterable[Sequence],
        slots: Mapping[int, SlotInput],
        first_rows: Mapping[int, int] | None = None,
        num_rows: int | None = None,
    ) -> Pending:
        """Start one step; arguments as ``HostBuffer.fill``. Never waits for the device unless
        the host is ``_DEPTH`` steps ahead."""
        sequences = list(sequences)
        if num_rows is None:
            num_rows = self.size_for(sum(len(sequence.tokens_n) for sequence in sequences))
        turn = self._num_steps % _DEPTH
        event = self._copied[turn]
        if event is not None:
            event.synchronize()
        host = self._hosts[turn]
        host.fill(num_rows, sequences, slots, self.pad_id, first_rows)
        metrics_3S = self._metrics[self._num_steps % len(self._metrics)]
        self._num_steps += 1
        self.replays[num_rows] = self.replays.get(num_rows, 0) + 1
        if not self._on_cuda:
            self._load(host)
            self.compute(num_rows)
            metrics_3S.copy_(self.program.metrics)
            return Pending(metrics_3S.clone(), None)
        if not self.is_ready(num_rows):
            with no_collection():
                self._prepare(num_rows)
        with torch.cuda.stream(self.stream):
            self._load(host)
            self._copied[turn] = _recorded()
            self._graphs[num_rows].replay()
            metrics_3S.copy_(self.program.metrics, non_blocking=True)
            return Pending(metrics_3S, _recorded())

    def compute(self, num_rows: int) -> None:
        """The program itself, as it is captured."""
        self.program.run(num_rows, self._recomputed(num_rows))

    def _recomputed(self, num_rows: int) -> int:
        larger = [size for size in self.recompute if size >= num_rows]
        return self.recompute[min(larger)] if larger else 0

    def compute_few(self, num_rows: int) -> None:
        """Every kernel and library call of ``compute``; see ``StepProgram.run_few``."""
        self.program.run_few(num_rows, self._recomputed(num_rows))

    def _load(self, host: HostBuffer) -> None:
        self.program.inputs.buffer.copy_(host.buffer, non_blocking=True)
        self.program.inputs.spans = host.spans

    def _prepare(self, num_rows: int) -> None:
        assert self._memory is not None
        start_s = time.perf_counter()
        host = HostBuffer(self.program.inputs.layout, False)
        host.fill(num_rows, (), {}, self.pad_id)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the allocator does not free what it keeps while it captures
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            self._load(host)
            with self._memory.lent():
                # Kernels are compiled and tables uploaded before a capture. Tables are the pool's,
                # the same for every size; and the first size tries out the memory of all.
                trial = self.compute_few if self._graphs else self.compute
                trial(num_rows)
            self._memory.stream.synchronize()
            with self._memory.capturing(graph):
                self.compute(num_rows)
        self._memory.stream.synchronize()
        self._kept.append(adamw_tables(self.program.pools.optimizer_pools))
        self._graphs[num_rows] = graph
        self.capture_s[num_rows] = time.perf_counter() - start_s


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Nothing is collected: to destroy an older graph is not permitted while one is captured."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event
