"""Rounds of a plan as static visits on one rank: CUDA graphs on a GPU, plain calls on a CPU.

Programs and graphs of an hTask live as long as its pool and its sizes hold: plans come and go,
tasks join and leave its slots. An order must hold if every micro-batch closes a step, so of one
hTask a stage has one micro-batch under way at a time, and its visits share all that is captured.
Without an order a pipeline of S stages has up to S of them under way (see ``overlapped_schedule``):
then there are so many of everything, which a round's visits take in turn.

The host runs ahead of the device: it lays a round's inputs out, launches what the order says and
goes on; a thread of its own waits for what there is to report. While a device may wait for another
nothing is allocated on it, no memory is pinned and no kernel is launched for the first time, for
the driver may wait for the whole device then (see ``links``).

Shape suffixes: S slots.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from muxtune.runtime.bank import AdapterPool, TaskState
from muxtune.runtime.captured_runner import Capacity
from muxtune.runtime.distributed.links import (
    FOREVER,
    DistributedError,
    Lane,
    Links,
    Patience,
    order_waits_for_itself,
)
from muxtune.runtime.distributed.order_runner import COMM, COMPUTE, Launch, OrderRunner
from muxtune.runtime.distributed.peer_memory import PeerMemory, Unavailable
from muxtune.runtime.distributed.runner import (
    Losses,
    Node,
    Norms,
    Snapshots,
    nodes_of,
)
from muxtune.runtime.distributed.schedule import (
    STEP_ONLY,
    TRANSFERS,
    Action,
    Schedule,
    sequential_schedule,
)
from muxtune.runtime.distributed.sharding import Share, StageBackbone, WholeTensors, shares_of
from muxtune.runtime.distributed.static_part import stage_part
from muxtune.runtime.distributed.static_stage import StagePart, VisitProgram
from muxtune.runtime.distributed.tracing import SpanLog
from muxtune.runtime.memory import give_back_cached, reserved_bytes
from muxtune.runtime.static_step.inputs import HostBuffer, SlotInput, StepInputs
from muxtune.runtime.static_step.inputs import Sequence as Rows
from muxtune.runtime.static_step.model import Unsupported
from muxtune.runtime.static_step.pool import StaticPool
from muxtune.types import AdapterSlot
from muxtune_kernels.adamw import adamw_tables

CLOSE_SIZES = 2  # of an hTask, besides its shapes': each takes all of a stage's graphs once more
_LEAST_SHARED_BYTES = 64 << 20  # on a GPU; then it is an allocation of its own
_ROOM = 1.25  # of what ranks share, for hTasks that change later
_ALIGN_BYTES, _SUM_BUFFERS = 512, 4
_MOST_PLAYERS = 64
_ROOM_FOR_VISITS = 2  # of an hTask in a round that has no order; more take their memory later


class Sizes(NamedTuple):
    """Of an hTask's programs: what they are made for, and their numbers of rows, the largest
    first: the others find its memory."""

    capacity: Capacity
    rows: tuple[int, ...]

    @classmethod
    def of(cls, capacity: Capacity, tokens: Collection[int], deterministic: bool) -> Sizes:
        """``tokens``: of micro-batches to come. Where rows need not be those of a shape, the
        largest of them holds what a few that are close to the micro-batches do not."""
        blocks = capacity.blocks
        if deterministic:
            return cls(capacity, tuple(sorted(blocks, reverse=True)))
        largest = max(blocks)
        close = capacity.close_sizes(tokens, {largest}, False, CLOSE_SIZES)
        return cls(capacity, tuple(sorted({largest, *close}, reverse=True)))


class StaticVisit(NamedTuple):
    """One micro-batch. ``num_rows``: that it needs. ``slots``: of all tasks that have rows in it
    or close a step with it. ``snapshots``: tasks whose state is wanted after that step."""

    htask: int
    rows: tuple[Rows, ...]
    num_rows: int
    slots: Mapping[int, SlotInput]
    snapshots: tuple[str, ...] = ()

    @property
    def closing(self) -> tuple[int, ...]:
        return tuple(slot for slot, item in self.slots.items() if item.closes)


class StaticRound(NamedTuple):
    """``visits``: None where nobody contributes."""

    number: int
    visits: tuple[StaticVisit | None, ...]


class HTaskPrograms:
    """A micro-batch of one hTask on one rank: a program a size, with their graphs. ``runner`` holds
    these by the number of a subgraph."""

    def __init__(
        self, part: StagePart, pool: StaticPool, sizes: Sizes, backbone: StageBackbone,
        links: Links, memory: PeerMemory | None, deterministic: bool,
    ) -> None:  # fmt: skip
        self.capacity, self.pool = sizes.capacity, pool
        self.on_cuda = backbone.device.type == "cuda"
        layouts = [sizes.capacity.layout._replace(max_rows=rows) for rows in sizes.rows]
        self.programs = [
            VisitProgram(
                part, pool.adapters, StepInputs(layout, backbone.device), layout.max_rows,
                deterministic, accumulates=True,
            )
            for layout in layouts
        ]  # fmt: skip
        self.pad_id = backbone.pad_id
        empty = [self.host_of(size) for size in range(len(layouts))]
        for host, layout in zip(empty, layouts, strict=True):
            host.fill(layout.max_rows, (), {}, self.pad_id)
        schedule = sequential_schedule((0,), 1, backbone.shape, backbone.replica)
        self.runner = OrderRunner(
            schedule, backbone.place.stage, [self.programs], links,
            lambda at, visit, size: load(self.programs[size], empty[size]), backbone.device,
            memory=memory,
        )  # fmt: skip
        self.kept: Any = None

    def prepare_alone(self) -> None:
        self.runner.prepare_alone()
        if self.on_cuda:  # graphs point to these
            self.kept = adamw_tables(self.pool.adapters.optimizer_pools)

    def prepare_together(self) -> None:
        self.runner.prepare_together()
        for program in self.programs:
            if program.kept_share is not None:
                program.kept_share.fill_(1 / dist.get_world_size(program.part.step))

    def size_for(self, num_rows: int) -> int:
        """The smallest that holds them; the rows of a shape fit."""
        fitting = [i for i, program in enumerate(self.programs) if program.num_rows >= num_rows]
        return max(fitting)

    def host_of(self, size: int) -> HostBuffer:
        return HostBuffer(self.programs[size].inputs.layout, self.on_cuda)

    def close(self) -> None:
        self.runner.close()


def load(program: VisitProgram, host: HostBuffer) -> None:
    """On the current stream."""
    program.inputs.buffer.copy_(host.buffer, non_blocking=True)
    program.inputs.spans = host.spans


class _Wanted(NamedTuple):
    pool: StaticPool
    sizes: Sizes
    in_flight: int


class StaticPrograms:
    """Makes and keeps a rank's pools and programs; all ranks do the same at once.

    ``shares``: messages go by memory that ranks share, as they must on GPUs.
    """

    def __init__(
        self, backbone: StageBackbone, links: Links, deterministic: bool, shares: bool
    ) -> None:
        self.backbone, self.links, self.deterministic = backbone, links, deterministic
        self.is_on = False
        self.prepared = False  # whether the last plan had to capture anything
        self.memory: PeerMemory | None = None
        self._shares = shares
        self._known: dict[tuple[int, int], HTaskPrograms] = {}  # by the pool's id, and which
        self._part: StagePart | None = None
        ranks = list(range(backbone.layout.world_size))
        self._group: Any = dist.new_group(ranks, timeout=FOREVER, backend="gloo")
        self._streams: dict[str, Any] = {}

    # -- for the bank

    def other_pool(
        self, slots: tuple[AdapterSlot, ...], members: Mapping[int, TaskState]
    ) -> AdapterPool | None:
        if not self.is_on:
            return None
        assert self._part is not None
        return StaticPool(self._part.model, slots, self.deterministic)

    def keep(self, pools: Sequence[AdapterPool]) -> int:
        device, ids = self.backbone.device, {id(pool) for pool in pools}
        before_bytes = reserved_bytes(device)
        for key in [key for key in self._known if key[0] not in ids]:
            self._known.pop(key).close()
        give_back_cached(device, graphs=True)
        return before_bytes - reserved_bytes(device)

    def give_back(self) -> None:
        give_back_cached(self.backbone.device)

    # -- plans

    def begin(self) -> str:
        """Pools are static from here on; else why they cannot be."""
        problem = self._agreed(self._make_part)
        self.is_on = not problem
        return problem

    def end(self) -> None:
        """Nothing of it is held any more. No round is under way."""
        self.is_on = False
        self.keep(())
        self._drop_memory()

    def prepare(
        self, pools: Sequence[AdapterPool], sizes: Sequence[Sizes], in_flight: int
    ) -> tuple[list[list[HTaskPrograms]], str]:
        """The programs of each hTask, ``in_flight`` of them, or why there are none: the same on
        all ranks."""
        static = [pool for pool in pools if isinstance(pool, StaticPool)]
        wanted = [_Wanted(*pair, in_flight) for pair in zip(static, sizes, strict=True)]
        fresh: list[HTaskPrograms] = []
        had_memory = self.memory is not None
        problem = self._agreed(lambda: self._make(wanted, fresh))
        if problem and had_memory:
            # What they share is full of what was let go: anew, all of them.
            fresh.clear()
            self.keep(())
            self._drop_memory()
            problem = self._agreed(lambda: self._make(wanted, fresh))
        if problem:
            fresh.clear()
            return [], problem
        for programs in fresh:
            programs.prepare_together()
        self.prepared = bool(fresh)
        numbers = range(in_flight)
        return [[self._known[id(pool), number] for number in numbers] for pool in static], ""

    def _make(self, every: Sequence[_Wanted], fresh: list[HTaskPrograms]) -> None:
        if self._shares and self.memory is None and self.backbone.layout.world_size > 1:
            self.memory = self._shared_memory(every)
        for wanted in every:
            for number in range(wanted.in_flight):
                self._make_one((id(wanted.pool), number), wanted, fresh)

    def _make_one(self, key: tuple[int, int], wanted: _Wanted, fresh: list[HTaskPrograms]) -> None:
        known = self._known.get(key)
        if known is not None and known.capacity.holds(wanted.sizes.capacity):
            return
        if known is not None:
            self._known.pop(key).close()
        del known
        assert self._part is not None
        programs = HTaskPrograms(
            self._part, wanted.pool, wanted.sizes, self.backbone, self.links, self.memory,
            self.deterministic,
        )  # fmt: skip
        self._streams = self._streams or programs.runner._streams
        programs.runner._streams = self._streams
        self._known[key] = programs
        fresh.append(programs)
        programs.prepare_alone()

    @property
    def streams(self) -> dict[str, Any]:
        """Empty on a CPU."""
        return self._streams

    def _make_part(self) -> None:
        if self._part is None:
            self._part = stage_part(self.backbone, self.links)

    def _agreed(self, work: Callable[[], None]) -> str:
        """Does it; the first rank's problem, if any has one."""
        problem = ""
        try:
            work()
        except (Unsupported, Unavailable) as error:
            problem = str(error)
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            problem = f"it could not be captured ({type(error).__name__}: {text})"
        problems: list[Any] = [None] * self.backbone.layout.world_size
        dist.all_gather_object(problems, problem, group=self._group)
        return next((item for item in problems if item), "")

    # -- memory that ranks share

    def _shared_memory(self, every: Sequence[_Wanted]) -> PeerMemory:
        """Raises Unavailable on all ranks alike."""
        on_cuda = self.backbone.device.type == "cuda"
        wanted = sum(item.in_flight * self._message_bytes(*item[:2]) for item in every)
        num_bytes = max(int(_ROOM * wanted), _LEAST_SHARED_BYTES if on_cuda else 1)
        num_bytes = -(-num_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
        ranks = range(self.backbone.layout.world_size)
        self.give_back()
        for through_host in (False, True):
            try:
                return PeerMemory(
                    self.backbone.place.rank, ranks, self.backbone.device, num_bytes, self._group,
                    through_host,
                )  # fmt: skip
            except Unavailable as reason:
                problem = str(reason)
        raise Unavailable(f"ranks do not reach each other's memory ({problem})")

    def _message_bytes(self, pool: StaticPool, sizes: Sizes) -> int:
        """Of an hTask's programs, each of which has two messages of all rows and two of all slots;
        and what two ranks of a stage sum at once, as often as ``PairSum`` keeps it."""
        width = self.backbone.shape.hidden
        row_bytes = width * self.backbone.dtype.itemsize
        small = 4 * len(pool.slots) + _ALIGN_BYTES
        messages = sum(2 * (rows * row_bytes + _ALIGN_BYTES) + 2 * small for rows in sizes.rows)
        # With a half's input or output go gradients of A of three linears at most, and of one B.
        factor_bytes = 4 * width * 4 * sum(slot.rank for slot in pool.slots)
        summed = sizes.rows[0] * row_bytes + factor_bytes + small + 4 * _ALIGN_BYTES
        return messages + _SUM_BUFFERS * summed * (self.links.peer is not None)

    def _drop_memory(self) -> None:
        memory, self.memory = self.memory, None
        if memory is None:
            return
        self._meet()  # nobody reads or writes there any more
        memory.close()
        self._meet()

    def _meet(self) -> None:
        dist.barrier(group=self._group)


# ------------------------------------------------------------------------------------ rounds


class _Player(OrderRunner):
    """An order over the programs of its visits, ``units``."""

    def __init__(
        self, schedule: Schedule, units: Sequence[HTaskPrograms], programs: StaticPrograms,
        load: Callable[[int, int, int], None], choose: Callable[[int, int], int],
        patience: Patience, lanes: dict[str, Lane], log: SpanLog | None,
    ) -> None:  # fmt: skip
        backbone = programs.backbone
        super().__init__(
            schedule, backbone.place.stage, [unit.programs for unit in units], programs.links,
            load, backbone.device, choose=choose,
        )  # fmt: skip
        self.memory, self._patience, self.units = programs.memory, patience, units
        self._streams, self._lanes, self._log = programs.streams, lanes, log
        graph = schedule.graph
        for op in range(graph.num_ops):
            flag = self._unit(op).flags.get(graph.subgraphs[op].index)
            if flag is not None:
                self.flags[op] = flag

    def _unit(self, op: int) -> OrderRunner:
        return self.units[self.schedule.graph.visit_of[op]].runner

    def _on_stream(
        self, name: str, work: Callable[[], Any], waits: Sequence[Any],
        traced: tuple[int, int] | None = None, flags: Sequence[Any] = (),
    ) -> Any:  # fmt: skip
        log = self._log
        if traced is None or log is None:
            return super()._on_stream(name, work, waits, None, flags)
        if not self.on_cuda:
            work = log.timed(work, self.schedule, *traced)
            return super()._on_stream(name, work, waits, None, flags)
        token = super()._on_stream(
            name, work, waits, traced if log.takes_another() else None, flags
        )
        for _, number, op, start, stop in self.timed:
            log.note_events(self.schedule, number, op, start, stop)
        self.timed.clear()
        return token

    def graph(self, op: int, size: int) -> Callable[[], None]:
        return self._unit(op).graph(self.schedule.graph.subgraphs[op].index, size)

    def _communication(self, op: int, size: int) -> Callable[[], None]:
        return self._unit(op)._communication(self.schedule.graph.subgraphs[op].index, size)


@dataclass
class _Desk:
    """What a micro-batch in flight has on the host."""

    host: HostBuffer
    metrics_2S: Tensor


@dataclass
class _Round:
    """``sizes``: by visit. ``last``: of each stream, what was launched last."""

    input: StaticRound
    player: _Player
    sizes: dict[int, int]
    desks: dict[int, _Desk]
    remaining: int
    launched: set[int] = field(default_factory=set)
    last: dict[str, Any] = field(default_factory=dict)
    reports: list[Future[None]] = field(default_factory=list)


class StaticRunner:
    """Feeds on rounds, as ``StageRunner`` does, of StaticVisits. ``states``: of this rank's tasks.

    Raises DistributedError when another rank does not answer.
    """

    def __init__(
        self, programs: StaticPrograms, patience: Patience, report: Callable[[Any], None],
        states: dict[str, TaskState], log: SpanLog | None = None,
    ) -> None:  # fmt: skip
        self.programs, self.patience, self.report = programs, patience, report
        self.backbone, self.states = programs.backbone, states
        self.on_cuda = self.backbone.device.type == "cuda"
        self._log = log
        use_own = partial(torch.cuda.set_device, self.backbone.device) if self.on_cuda else None
        self._reporter = ThreadPoolExecutor(1, thread_name_prefix="reports", initializer=use_own)
        names = () if self.on_cuda else (COMM, "below", "above")
        self._lanes = {name: Lane(name, self.backbone.device) for name in names}
        self._players: dict[int, _Player] = {}  # by the schedule's id
        self._rounds: dict[int, _Round] = {}

    def begin_plan(
        self, schedule: Schedule | None, units: Sequence[Sequence[HTaskPrograms]],
        task_ids: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Nothing may be in flight. Rounds are counted from 0. ``schedule``: None where every round
        brings its own. ``units``: of each hTask. ``task_ids``: whose snapshots will be wanted."""
        self.end_plan()
        self.units = [list(item) for item in units]
        ahead = () if schedule is None else schedule.ahead
        self._ahead = ahead[self.backbone.place.stage] if ahead else 0
        self._deepest = 0 if schedule is None else schedule.deepest
        self.depth = self._deepest + max(ahead, default=0) + 2
        self._queues: dict[str, deque[tuple[int, Node]]] = {COMPUTE: deque(), COMM: deque()}
        self._tokens: dict[Node, Any] = {}
        self._first = self._num_fed = 0
        self._fed = False  # since the last flush
        visits = list(range(len(units))) * _ROOM_FOR_VISITS
        if schedule is not None:
            visits = [visit.htask for visit in schedule.graph.visits]
        self._desks = self._new_desks(visits)
        self._copies = {name: [self._try_copy(name)] for name in task_ids} if self.on_cuda else {}
        if self.on_cuda:
            torch.cuda.synchronize()  # adapters have been laid out on other streams
            self._begin_trace()

    def _begin_trace(self) -> None:
        if self._log is None:
            return
        origin = torch.cuda.Event(enable_timing=True)
        origin.record(self.programs.streams[COMPUTE])
        origin.synchronize()
        self._log.begin_device(origin, time.monotonic_ns())

    def end_plan(self) -> None:
        self._rounds, self._players = {}, {}
        self.units: list[list[HTaskPrograms]] = []
        self._desks: dict[tuple[int, int], list[_Desk]] = {}

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.close()
        self._reporter.shutdown(wait=False, cancel_futures=True)

    def _player_of(self, schedule: Schedule) -> _Player:
        if id(schedule) not in self._players:
            if len(self._players) >= _MOST_PLAYERS:
                used = {id(item.player.schedule) for item in self._rounds.values()}
                self._players = {k: v for k, v in self._players.items() if k in used}
            units = [
                item[visit.ordinal % len(item)]
                for visit in schedule.graph.visits
                for item in (self.units[visit.htask],)
            ]
            self._players[id(schedule)] = _Player(
                schedule, units, self.programs, self._load, self._size, self.patience, self._lanes,
                self._log,
            )  # fmt: skip
        return self._players[id(schedule)]

    # -- feeding

    def feed(self, round_input: StaticRound, schedule: Schedule) -> None:
        number = round_input.number
        if number != self._num_fed:
            raise DistributedError(f"round {number} came when {self._num_fed} was expected")
        self._forget_up_to(number - self.depth)
        self._rounds[number] = self._laid_out(round_input, self._player_of(schedule))
        self._num_fed, self._fed = number + 1, True
        self._enqueue(number, number)

    def run(self) -> None:
        """All that may be launched before the next round is known."""
        self._work(self._num_fed - 1 - self._ahead)

    def flush(self) -> None:
        """Everything that is left. Raises DistributedError for an order that waits for itself."""
        if self._fed:
            for later in range(self._num_fed, self._num_fed + self._deepest):
                self._enqueue(later, self._num_fed - 1)
            self._work(self._num_fed + self._deepest)
            self._forget_up_to(self._num_fed - 1)
            if self._queues[COMPUTE] or self._queues[COMM]:
                raise order_waits_for_itself()
            self._first, self._fed = self._num_fed, False
        if self.on_cuda:
            torch.cuda.synchronize()

    def _laid_out(self, round_input: StaticRound, player: _Player) -> _Round:
        sizes, desks = {}, {}
        for index, visit in enumerate(round_input.visits):
            if visit is None:
                continue
            unit = player.units[index]
            size = sizes[index] = unit.size_for(visit.num_rows)
            desk = desks[index] = self._take_desk(unit, size, round_input.number)
            desk.host.fill(unit.programs[size].num_rows, visit.rows, visit.slots, unit.pad_id)
            self._count(unit.pool, visit)
        round_ = _Round(round_input, player, sizes, desks, 0)
        graph, stage = player.schedule.graph, self.backbone.place.stage
        here = (op for op in range(graph.num_ops) if graph.stage_of[op] == stage)
        round_.remaining = sum(self._is_run(round_, op) for op in here)
        return round_

    def _take_desk(self, unit: HTaskPrograms, size: int, number: int) -> _Desk:
        desks = self._desks.setdefault((id(unit), size), [])
        if not desks:  # of a round of its own kind: when nothing runs any more, memory may be had
            self._forget_up_to(number - 1)
        return desks.pop() if desks else self._new_desk(unit, size)

    def _count(self, pool: StaticPool, visit: StaticVisit) -> None:
        """Steps that are taken for sure: of a task that fails instead nobody asks any more. The
        controller's own count waits for results."""
        for slot, item in visit.slots.items():
            state = pool.occupants[slot]
            if state is not None:
                state.is_open = not item.closes
                state.step += item.closes and self.backbone.place.rank != 0

    def _new_desks(self, htasks: Sequence[int]) -> dict[tuple[int, int], list[_Desk]]:
        desks: dict[tuple[int, int], list[_Desk]] = {}
        for unit in (unit for htask in htasks for unit in self.units[htask]):
            for size in range(len(unit.programs)):
                own = desks.setdefault((id(unit), size), [])
                own.extend(self._new_desk(unit, size) for _ in range(self.depth + 1))
        return desks

    def _new_desk(self, unit: HTaskPrograms, size: int) -> _Desk:
        like_2S = unit.programs[size].metrics_2S
        return _Desk(unit.host_of(size), torch.zeros(like_2S.shape, pin_memory=self.on_cuda))

    def _enqueue(self, number: int, last_round: int) -> None:
        """What the streams run in their pass ``number``."""
        stage, rounds = self.backbone.place.stage, range(self._first, last_round + 1)
        player = self._rounds[min(number, last_round)].player  # an order is that of all its rounds
        schedule = player.schedule
        for index, name in enumerate((COMPUTE, COMM)):
            nodes = nodes_of(schedule.sequences[2 * stage + index], number, rounds)
            self._queues[name].extend((number, node) for node in nodes if self._runs(node))
        if player.memory is not None:  # who waits for a message there posts nothing
            return
        for stream, neighbour in (("below", stage - 1), ("above", stage + 1)):
            if 0 <= neighbour < schedule.graph.num_stages:
                for node in nodes_of(schedule.sequences[2 * neighbour + 1], number, rounds):
                    operation = schedule.operation(node[1])
                    is_here = operation.action in TRANSFERS and operation.to_stage == stage
                    if is_here and self._runs(node):
                        self._tokens[node] = player._receive(stream, node, ())

    def _runs(self, node: Node) -> bool:
        return self._is_run(self._rounds[node[0]], node[1])

    def _is_run(self, round_: _Round, op: int) -> bool:
        """Not where nobody contributes to its visit, on any rank. Of a visit that closes no step
        what only steps need is left out too, unless the next one waits for its ranks to meet."""
        schedule = round_.player.schedule
        index = schedule.graph.visit_of[op]
        visit = round_.input.visits[index]
        if visit is None:
            return False
        is_step_only = schedule.operation(op).action in STEP_ONLY
        return bool(visit.closing) or not is_step_only or self.backbone.replica.tp > 1

    # -- launching

    def _work(self, last_pass: int) -> None:
        moved = True
        while moved:
            moved = self._launch_next(COMM, None) or self._launch_next(COMPUTE, last_pass)

    def _launch_next(self, name: str, last_pass: int | None) -> bool:
        queue = self._queues[name]
        if not queue or (last_pass is not None and queue[0][0] > last_pass):
            return False
        at, op = queue[0][1]
        round_, stage = self._rounds[at], self.backbone.place.stage
        graph = round_.player.schedule.graph
        first = graph.first_op[graph.visit_of[op]]
        before = [first + other for other in graph.subgraphs[op].depends_on]
        local = [other for other in before if graph.stage_of[other] == stage]
        if not round_.launched.issuperset(local):
            return False
        queue.popleft()
        is_compute = name == COMPUTE
        other = tuple(b for b in local if (graph.stream_of[b] % 2 == 0) is not is_compute)
        remote = tuple(b for b in before if graph.stage_of[b] != stage)
        launch = Launch(name, at, op, other, remote)
        round_.player._launch(launch, self._tokens, self._log is not None)
        if is_compute:
            self._tell(round_, op)
        round_.last[name] = self._tokens[at, op]
        round_.launched.add(op)
        round_.remaining -= 1
        return True

    def _load(self, at: int, visit: int, size: int) -> None:
        round_ = self._rounds[at]
        load(round_.player.units[visit].programs[size], round_.desks[visit].host)

    def _size(self, at: int, visit: int) -> int:
        return self._rounds[at].sizes[visit]

    # -- what is over

    def _forget_up_to(self, number: int) -> None:
        """Waits for these rounds, and frees what they hold."""
        for at in sorted(at for at in self._rounds if at <= number):
            round_ = self._rounds[at]
            if round_.remaining:
                raise order_waits_for_itself()
            for token in round_.last.values():
                self._wait(token, f"the end of round {at}")
            for report in round_.reports:
                self._wait(report, f"a report of round {at}")
            del self._rounds[at]
            for index, desk in round_.desks.items():
                key = id(round_.player.units[index]), round_.sizes[index]
                self._desks[key].append(desk)
            for node in [node for node in self._tokens if node[0] == at]:
                del self._tokens[node]

    def _wait(self, token: Any, what: str) -> None:
        if isinstance(token, Future):
            self.patience.wait(token, what)
        elif token is not None:
            self.patience.until(token.query, what)

    # -- telling

    def _tell(self, round_: _Round, op: int) -> None:
        """What a computation that was just launched makes known."""
        schedule, place = round_.player.schedule, self.backbone.place
        index, action = schedule.graph.visit_of[op], schedule.operation(op).action
        visit = round_.input.visits[index]
        assert visit is not None
        number, metrics_2S = round_.input.number, round_.desks[index].metrics_2S
        if action is Action.LOSS and place.part == 0:
            self._report_metrics(
                round_, index, 0, lambda: Losses(number, index, metrics_2S[0].tolist())
            )
        if action is not Action.OPTIMIZE or not visit.closing:
            return
        if place.rank == 0:
            self._report_metrics(
                round_, index, 1,
                lambda: Norms(number, index, {s: float(metrics_2S[1][s]) for s in visit.closing}),
            )  # fmt: skip
        if visit.snapshots:
            self._report_snapshots(round_, index, visit)

    def _report_metrics(
        self, round_: _Round, index: int, row: int, made: Callable[[], Any]
    ) -> None:
        unit = round_.player.units[index]
        source_2S = unit.programs[round_.sizes[index]].metrics_2S
        target_2S = round_.desks[index].metrics_2S

        def copy() -> None:
            target_2S[row].copy_(source_2S[row], non_blocking=True)

        self._report_after(round_, copy, made)

    def _report_snapshots(self, round_: _Round, index: int, visit: StaticVisit) -> None:
        number, place = round_.input.number, self.backbone.place
        states = {name: self.states[name] for name in visit.snapshots if name in self.states}
        if not self.on_cuda:
            shares = {name: shares_of(state, self.backbone) for name, state in states.items()}
            self._report_after(
                round_, lambda: None, lambda: Snapshots(number, index, place.rank, shares)
            )
            return
        held = {name: self._take_copy(name, state) for name, state in states.items()}

        def copy() -> None:
            for name, state in states.items():
                _fill_copy(held[name], state)

        def made() -> Snapshots:
            found = {name: _own_memory(shares) for name, shares in held.items()}
            for name, shares in held.items():
                self._copies.setdefault(name, []).append(shares)
            return Snapshots(number, index, place.rank, found)

        self._report_after(round_, copy, made)

    def _report_after(
        self, round_: _Round, copy: Callable[[], None], made: Callable[[], Any]
    ) -> None:
        """``copy`` to the host behind what computes; ``made`` of it, when it is there."""
        event = None
        if self.on_cuda:
            with torch.cuda.stream(self.programs.streams[COMPUTE]):
                copy()
                event = torch.cuda.Event()
                event.record()
        else:
            copy()

        def tell() -> None:
            if event is not None:
                event.synchronize()
            self.report(made())

        round_.reports.append(self._reporter.submit(tell))

    # -- snapshots on a GPU: into memory that was pinned before

    def _try_copy(self, task_id: str) -> dict[Any, Share]:
        """Once before any round: memory is pinned and found, and kernels are loaded."""
        state = self.states[task_id]
        shares = _pinned_copy(state, self.backbone)
        with torch.cuda.stream(self.programs.streams[COMPUTE]):
            _fill_copy(shares, state)
        return shares

    def _take_copy(self, task_id: str, state: TaskState) -> dict[Any, Share]:
        free = self._copies.get(task_id)
        return free.pop() if free else _pinned_copy(state, self.backbone)


def _pinned_copy(state: TaskState, backbone: StageBackbone) -> dict[Any, Share]:
    """Memory for what ``shares_of`` gives."""
    shares = {}
    for (site_name, name), values in state.tensors.items():
        columns = backbone.cuts[site_name].of_parameter(name)
        if columns is None and backbone.place.part:
            continue
        like = values.param
        copies = (torch.empty(like.shape, dtype=like.dtype, pin_memory=True) for _ in range(3))
        bounds = None if columns is None else (columns.start, columns.stop)
        shares[site_name, name] = Share(bounds, WholeTensors(*copies))
    return shares


def _fill_copy(shares: Mapping[Any, Share], state: TaskState) -> None:
    for key, share in shares.items():
        values = state.tensors.get(key)
        if values is not None:  # else it has failed meanwhile
            for host, tensor in zip(share.tensors, (values.param, *values[2:]), strict=True):
                host.copy_(tensor, non_blocking=True)


def _own_memory(shares: Mapping[Any, Share]) -> dict[Any, Share]:
    return {
        key: share._replace(tensors=WholeTensors(*(tensor.clone() for tensor in share.tensors)))
        for key, share in shares.items()
    }


__all__ = ["CLOSE_SIZES", "Sizes", "StaticPrograms", "StaticRound", "StaticRunner", "StaticVisit"]
