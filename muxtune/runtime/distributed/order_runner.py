"""Static visits replayed in a plan's order on one rank, launched ahead of the device.

The host decides nothing while the device works: what runs where, and what waits for what, is laid
out before the first round. Streams: computing, transfers, and one for what comes from either
neighbour; events between them where the plan's graph says so.
"""

# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from muxtune.runtime.distributed.links import Arrival, Channel, Lane, Links, Patience
from muxtune.runtime.distributed.peer_memory import PairSum, PeerMemory
from muxtune.runtime.distributed.schedule import TRANSFERS, Action, Schedule
from muxtune.runtime.distributed.static_stage import Captured, VisitProgram, capture
from muxtune.runtime.static_step.captured import no_collection

COMPUTE, COMM = "compute", "comm"
_ASIDE = "aside"  # for what follows a sum, so that the next one need not wait for it
# Of a visit: what neighbours write to.
_MESSAGES = ("received_TD", "gradient_TD", "squares_S", "norm_S")


_Message = tuple[int, tuple[Tensor, ...]]


class Launch(NamedTuple):
    """One operation of one round, in the order in which the host launches them. ``waits``: nodes
    whose event is waited for; ``messages``: nodes of other stages whose transfer is."""

    stream: str
    round: int
    op: int
    waits: tuple[int, ...]
    messages: tuple[int, ...]


class TimedSpan(NamedTuple):
    """On this rank's device, seconds since the first event."""

    stream: str
    round: int
    op: int
    start_s: float
    stop_s: float


def launches_of(schedule: Schedule, stage: int, rounds: int) -> list[Launch]:
    """All operations of a stage over some rounds, each after what it waits for on this stage."""
    graph = schedule.graph
    queues = {
        name: [
            (number - offset, op)
            for number in range(rounds + schedule.deepest)
            for op, offset in schedule.sequences[2 * stage + index]
            if 0 <= number - offset < rounds
        ]
        for index, name in enumerate((COMPUTE, COMM))
    }
    heads = dict.fromkeys(queues, 0)
    done: set[tuple[int, int]] = set()
    found: list[Launch] = []
    while any(heads[name] < len(queue) for name, queue in queues.items()):
        moved = False
        for name in (COMM, COMPUTE):
            if heads[name] == len(queues[name]):
                continue
            at, op = queues[name][heads[name]]
            first = graph.first_op[graph.visit_of[op]]
            before = [first + b for b in graph.subgraphs[op].depends_on]
            local = [b for b in before if graph.stage_of[b] == stage]
            if any((at, b) not in done for b in local):
                continue
            other = tuple(
                b for b in local if (graph.stream_of[b] % 2 == 0) is not (name == COMPUTE)
            )
            remote = tuple(b for b in before if graph.stage_of[b] != stage)
            found.append(Launch(name, at, op, other, remote))
            done.add((at, op))
            heads[name] += 1
            moved = True
            break
        if not moved:
            raise ValueError("the order waits for itself on this stage")
    return found


class OrderRunner:
    """``visits``: this stage's programs of each visit, one a size; ``choose(round, visit)``: which
    of them a round takes, the same on all ranks. ``load(round, visit, size)``: fills its inputs on
    the current stream. On CUDA ``prepare`` captures; on a CPU operations run as they are. Sizes of
    one visit share their graphs' memory: a visit's next round begins when its last one is over.

    ``early``: receives are posted a round ahead, so that no sender waits. A posted receive holds
    multiprocessors of a GPU until its message is there, so else it is posted when the computation
    before the one that needs it begins. Neither matters with ``memory``: who waits for a message
    in it holds nothing.
    """

    def __init__(
        self, schedule: Schedule, stage: int, visits: Sequence[Sequence[VisitProgram]],
        links: Links | None, load: Callable[[int, int, int], None], device: torch.device,
        separate: bool = True, early: bool = True,
        choose: Callable[[int, int], int] = lambda at, visit: 0,
        memory: PeerMemory | None = None,
    ) -> None:  # fmt: skip
        self.choose, self._first_round = choose, 0
        self.early = early
        self.schedule, self.stage, self.visits = schedule, stage, visits
        self.links, self.load, self.device = links, load, device
        self.on_cuda = device.type == "cuda"
        self._graphs: dict[tuple[int, int], Captured] = {}  # by operation and size, as all four
        self._reduced: dict[tuple[int, int], Any] = {}
        self._parting: dict[
            tuple[int, int], Captured
        ] = {}  # when the ranks of a stage have summed all
        self._packed: dict[
            tuple[int, int], Captured
        ] = {}  # of a stage of several ranks, before a transfer
        self._streams: dict[str, Any] = {}
        if self.on_cuda:
            names = (COMPUTE, COMM, "below", "above")
            self._streams = {
                name: torch.cuda.Stream(device, priority=-1 if name == COMPUTE else -2)
                for name in names
            }
            if separate:
                self._streams[_ASIDE] = torch.cuda.Stream(device, priority=-2)
            else:  # communication on the compute stream: nothing overlaps
                self._streams[COMM] = self._streams[COMPUTE]
        self._lanes = {} if self.on_cuda else {
            name: Lane(name, device) for name in (COMM, "below", "above")
        }  # fmt: skip
        self._patience = Patience(120.0)
        self.timed: list[tuple[str, int, int, Any, Any]] = []
        self.launched_s = 0.0
        self.memory = memory
        self.flags: dict[int, int] = {}  # by transfer
        self._sum: PairSum | None = None
        if memory is not None:
            self._share(memory)

    def _share(self, memory: PeerMemory) -> None:
        """What neighbours send comes to lie where they reach it; the same on all ranks."""
        programs = [program for sizes in self.visits for program in sizes]
        for program in programs:
            for name in _MESSAGES:
                like = getattr(program, name)
                setattr(program, name, memory.take(like.shape, like.dtype).zero_())
        for op in range(self.schedule.graph.num_ops):
            if self.schedule.operation(op).action in TRANSFERS:
                self.flags[op] = memory.flag()
        assert self.links is not None
        if self.links.peer is not None:
            most_bytes = max(
                sum(tensor.nbytes + PairSum.align_bytes for tensor in together)
                for p in programs for together in p.summed
            )  # fmt: skip
            self._sum = PairSum(memory, self.links.peer, most_bytes)

    # -- capturing

    def prepare(self) -> None:
        """Runs every visit once, one after another, then captures each of its computations."""
        self.prepare_alone()
        self.prepare_together()

    def prepare_alone(self) -> None:
        """What this rank needs no other for."""
        if self.on_cuda:
            torch.cuda.synchronize()  # what was made on other streams is there
        self._each_visit(self._run_plain)
        if self.on_cuda:
            with _no_garbage():
                self._each_visit(self._capture)

    def prepare_together(self) -> None:
        """What the ranks of a stage do at once."""
        self._with_stream(self._acquaint)
        if self.on_cuda:
            torch.cuda.synchronize()

    def _acquaint(self) -> None:
        """The stage's ranks do once what no graph holds, so that all kernels are loaded when
        streams begin to wait for each other. What they sum is written anew before it is read."""
        for program in (program for sizes in self.visits for program in sizes):
            if program.part.tp is not None:
                self.add_up([program.sent_TD, program.own_S])

    def _each_visit(self, work: Callable[[int, int], None]) -> None:
        """``work(operation, size)``, on inputs without any row: nothing is trained."""
        for index, programs in enumerate(self.visits):
            first = self.schedule.graph.first_op[index]
            for size in range(len(programs)):
                self._with_stream(lambda index=index, size=size: self.load(-1, index, size))
                for op in range(first, first + len(self.schedule.operations)):
                    if self.schedule.graph.stage_of[op] == self.stage:
                        work(op, size)

    def _with_stream(self, work: Callable[[], None]) -> None:
        if not self.on_cuda:
            work()
            return
        with torch.cuda.stream(self._streams[COMPUTE]):
            work()

    def program(self, op: int, size: int) -> VisitProgram:
        return self.visits[self.schedule.graph.visit_of[op]][size]

    def _size(self, at: int, op: int) -> int:
        """In a round of this run."""
        return self.choose(self._first_round + at, self.schedule.graph.visit_of[op])

    def graph(self, op: int, size: int) -> Captured:
        """What an operation computes, captured where there is a GPU."""
        return self._graphs.get((op, size)) or self._plain(op, size)

    def _plain(self, op: int, size: int) -> Captured:
        program, operation = self.program(op, size), self.schedule.operation(op)
        return lambda: program.run(operation)

    def _run_plain(self, op: int, size: int) -> None:
        """Without neighbours: sums over the ranks are skipped."""
        if self.schedule.graph.stream_of[op] % 2 == 0:
            self._with_stream(self._plain(op, size))

    def _capture(self, op: int, size: int) -> None:
        program, key = self.program(op, size), (op, size)
        operation = self.schedule.operation(op)
        if program.memory is None:
            handle = torch.cuda.graph_pool_handle()
            for each in self.visits[self.schedule.graph.visit_of[op]]:
                each.memory = handle
        stream = self._streams[COMPUTE]
        if self.schedule.graph.stream_of[op] % 2 == 0:
            self._graphs[key] = capture(self._plain(op, size), program.memory, stream)
        elif operation.action is Action.REDUCE:
            self._reduced[key] = program.exchanged(operation.backward)
            if self.parts(op):
                self._parting[key] = capture(program.part_again, program.memory, stream)
        else:
            pack = program.packing(operation)
            if pack is not None:
                self._packed[key] = capture(pack, program.memory, stream)

    def parts(self, op: int) -> bool:
        """Whether the stage's ranks have summed all gradients with this exchange."""
        if self.program(op, 0).part.step is None:
            return False
        first = self.schedule.graph.first_op[self.schedule.graph.visit_of[op]]
        before = [self.schedule.operation(first + b)
                  for b in self.schedule.graph.subgraphs[op].depends_on]  # fmt: skip
        return any(item.action is Action.BACKWARD and item.is_last for item in before)

    def summing(self, op: int, size: int) -> Callable[[], Any]:
        """What the stage's ranks do in an exchange; see ``add_up``."""
        visit, backward = self.program(op, size), self.schedule.operation(op).backward
        known, is_final = self._reduced.get((op, size)), self.parts(op)
        part_again = self._parting.get((op, size), visit.part_again)

        def exchange() -> Any:
            return self.add_up(known or visit.exchanged(backward), part_again if is_final else None)

        return exchange

    # -- running

    def run(self, rounds: int, first_round: int = 0, trace: bool = False) -> float:
        """All rounds, filling and draining the pipeline once. Seconds on this rank's clock, of
        which ``launched_s`` until all was launched. No garbage is collected meanwhile: looking
        through all objects takes longer than the device's queues last."""
        self._first_round = first_round
        plan = launches_of(self.schedule, self.stage, rounds)
        receives = self._receives(rounds)
        self.timed = []
        tokens: dict[tuple[int, int], Any] = {}
        if self.on_cuda:
            torch.cuda.synchronize()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.barrier()
        start_s = time.perf_counter()
        marks = self._mark()
        pending = {stream: list(reversed(ops)) for stream, ops in receives.items()}
        computed: list[Any] = []
        with no_collection():
            for item in plan:
                self._post(pending, item, tokens, computed[-2:-1])
                self._launch(item, tokens, trace)
                if item.stream == COMPUTE:
                    computed.append(tokens[item.round, item.op])
            self.launched_s = time.perf_counter() - start_s
            self._finish(tokens)
        seconds = time.perf_counter() - start_s
        self._origin = marks
        return seconds

    def _post(
        self, pending: Mapping[str, list[tuple[int, int]]], item: Launch, tokens: dict[Any, Any],
        gate: Sequence[Any],
    ) -> None:  # fmt: skip
        """Receives of this round and the next in the sender's order: early enough that nothing
        waits for the host, and no more than the device's queues hold. If not ``early``, those that
        ``item`` needs, after ``gate``."""
        for stream, ops in pending.items():
            wanted = {(item.round, message) for message in item.messages} & set(ops)
            while ops and (wanted or (self.early and ops[-1][0] <= item.round + 1)):
                node = ops.pop()
                wanted.discard(node)
                tokens[node] = self._receive(stream, node, () if self.early else gate)

    def _receives(self, rounds: int) -> dict[str, list[tuple[int, int]]]:
        """What neighbours send here by NCCL, each in its order."""
        found: dict[str, list[tuple[int, int]]] = {}
        if self.memory is not None:
            return found
        for name, neighbour in (("below", self.stage - 1), ("above", self.stage + 1)):
            if not 0 <= neighbour < self.schedule.graph.num_stages:
                continue
            found[name] = [
                (number - offset, op)
                for number in range(rounds + self.schedule.deepest)
                for op, offset in self.schedule.sequences[2 * neighbour + 1]
                if 0 <= number - offset < rounds
                and self.schedule.operation(op).action in TRANSFERS
                and self.schedule.operation(op).to_stage == self.stage
            ]
        return found

    def _receive(self, stream: str, node: tuple[int, int], gate: Sequence[Any]) -> Any:
        at, op = node
        targets = self.targets(op, self._size(at, op))
        channel = self.links.receives[self.stage + (1 if stream == "above" else -1)]

        def work() -> None:
            for target in targets:
                dist.recv(target, channel.rank, group=channel.group)

        return self._on_stream(stream, work, gate)

    def targets(self, op: int, size: int) -> tuple[Tensor, ...]:
        """Where a transfer's message comes to lie at the receiver."""
        visit = self.program(op, size)
        return {
            Action.SEND_ACTIVATIONS: (visit.received_TD,),
            Action.SEND_GRADIENTS: (visit.gradient_TD, visit.squares_S),
            Action.SEND_NORM: (visit.norm_S,),
        }[self.schedule.operation(op).action]

    def _launch(self, item: Launch, tokens: dict[Any, Any], trace: bool) -> None:
        visit_index, size = self.schedule.graph.visit_of[item.op], self._size(item.round, item.op)
        visit, operation = self.program(item.op, size), self.schedule.operation(item.op)
        waits = [tokens[item.round, node] for node in (*item.waits, *item.messages)
                 if (item.round, node) in tokens]  # fmt: skip
        if item.stream == COMPUTE:
            enters = operation.action is Action.FORWARD and visit._starts(operation.parts[0])
            compute, at = self.graph(item.op, size), self._first_round + item.round

            def work() -> None:
                if enters:
                    self.load(at, visit_index, size)
                compute()
        else:
            work = self._communication(item.op, size)
        # Of two that wait for one message, the later one waits for the first.
        heeds = [op for op in item.messages
                 if op in self.flags and (item.round, op) not in tokens]  # fmt: skip
        tokens[item.round, item.op] = self._on_stream(
            item.stream,
            work,
            waits,
            (item.round, item.op) if trace else None,
            [(self.flags[op], self.targets(op, size)) for op in heeds],
        )
        tokens.update(
            dict.fromkeys(((item.round, op) for op in heeds), tokens[item.round, item.op])
        )

    def _communication(self, op: int, size: int) -> Callable[[], Any]:
        visit, operation = self.program(op, size), self.schedule.operation(op)
        if operation.action is Action.REDUCE:
            return self.summing(op, size)
        channel = self.links.sends[operation.to_stage]
        sources = {
            Action.SEND_ACTIVATIONS: lambda: (visit.sent_TD,),
            Action.SEND_GRADIENTS: lambda: (visit.sent_gradient_TD, visit.total_S),
            Action.SEND_NORM: lambda: (visit.total_S if visit.part.is_first else visit.norm_S,),
        }[operation.action]

        pack = self._packed.get((op, size), visit.packing(operation))
        targets = self.targets(op, size)

        def send() -> None:
            if visit.part.tp is not None:
                self.join()
            if pack is not None:
                pack()
            self.move(sources(), targets, channel, self.flags.get(op))

        return send

    def add_up(self, tensors: Sequence[Tensor], after: Callable[[], None] | None = None) -> Any:
        """The stage's ranks sum tensors in place, then do ``after``. What begins on the current
        stream may be over on another, which is returned then."""
        ended_on = None
        if self._sum is not None:
            ended_on = self._sum(tensors)
        else:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self.links.tp)
        return ended_on if after is None else self._follow(ended_on, after)

    def _follow(self, stream: Any, work: Callable[[], None]) -> Any:
        """``work`` after what ``stream``, or the current one, has to do; where it ends."""
        if not self.on_cuda:
            work()
            return None
        before = stream or torch.cuda.current_stream()
        aside = self._streams.get(_ASIDE, before)
        if aside is not before:
            aside.wait_stream(before)
        with torch.cuda.stream(aside):
            work()
        return aside

    def join(self) -> None:
        """The current stream waits for all sums, and for what follows them."""
        if self._sum is not None:
            self._sum.join()
        if _ASIDE in self._streams:
            torch.cuda.current_stream().wait_stream(self._streams[_ASIDE])

    def move(
        self, sources: Sequence[Tensor], targets: Sequence[Tensor], channel: Channel,
        flag: int | None,
    ) -> None:  # fmt: skip
        """To a neighbour, which has ``targets`` in the place of these; on the current stream."""
        for source, target in zip(sources, targets, strict=True):
            if flag is None:
                dist.send(source, channel.rank, group=channel.group)
            else:
                self.memory.put(source, target, channel.rank)
        if flag is not None:
            self.memory.announce(flag, channel.rank)

    # -- streams

    def _on_stream(
        self, name: str, work: Callable[[], Any], waits: Sequence[Any],
        traced: tuple[int, int] | None = None, flags: Sequence[_Message] = (),
    ) -> Any:  # fmt: skip
        """``flags``: of messages in shared memory that are waited for, and where they come to."""
        if not self.on_cuda:
            return self._on_thread(name, work, waits, traced, flags)
        stream = self._streams[name]
        with torch.cuda.stream(stream):
            for event in waits:
                stream.wait_event(event)
            for flag, targets in flags:
                self.memory.heed(flag, *targets)
            start = self._event(traced)
            ended_on = work() or stream
            event = torch.cuda.Event(enable_timing=traced is not None)
            event.record(ended_on)
        if traced is not None:
            self.timed.append((name, *traced, start, event))
        return event

    def _event(self, traced: Any) -> Any:
        if traced is None:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _on_thread(
        self, name: str, work: Callable[[], None], waits: Sequence[Any], traced: Any,
        flags: Sequence[_Message],
    ) -> Any:  # fmt: skip
        def timed() -> None:
            if name != COMPUTE:
                self._wait(waits)
            for flag, targets in flags:
                self.memory.heed(flag, *targets)
            start_s = time.perf_counter()
            work()
            if traced is not None:
                self.timed.append((name, *traced, start_s, time.perf_counter()))

        if name != COMPUTE:
            return self._lanes[name].put(timed)
        self._wait(waits)
        timed()
        return None

    def _wait(self, waits: Sequence[Any]) -> None:
        for token in waits:
            if isinstance(token, Future):
                self._patience.wait(token, "a transfer")

    def _mark(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._streams[COMPUTE])
        return event

    def _finish(self, tokens: Mapping[Any, Any]) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()
            return
        self._wait([token for token in tokens.values() if isinstance(token, Future)])

    def spans(self) -> list[TimedSpan]:
        """Of the last traced run."""
        if not self.on_cuda:
            origin = self._origin
            return [TimedSpan(n, r, o, a - origin, b - origin) for n, r, o, a, b in self.timed]
        return [
            TimedSpan(
                n, r, o, self._origin.elapsed_time(a) / 1e3, self._origin.elapsed_time(b) / 1e3
            )
            for n, r, o, a, b in self.timed
        ]

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.close()


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """Nothing is freed while graphs are captured: that may be no part of one."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    with no_collection():
        yield
    torch.cuda.synchronize()


__all__ = ["Arrival", "Launch", "OrderRunner", "TimedSpan", "launches_of"]
