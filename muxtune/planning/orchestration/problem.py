"""One round of a pipeline as a scheduling problem, laid out once for quick use.

A *visit* is one micro-batch of a round: an occurrence of a turn. A *subgraph instance* (here
shortly an op) is one subgraph of one visit, numbered ``first_op[visit] + subgraph.index``; the
same op of round r is a *node*, numbered ``r * num_ops + op``.

Dependencies between micro-batches of one hTask: the forward pass of a micro-batch may enter a
stage only after the optimizer of the last closed step has run there. A plan must hold when every
micro-batch closes a step (docs/architecture.md, rule 7), so that is the default; a larger
``micro_batches_per_step`` describes baselines that accumulate.

Both ranks of a tensor-parallel group run the same subgraphs at the same time, so one rank stands
for its stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from muxtune.errors import ConfigError
from muxtune.types import (
    NS_PER_S,
    HTaskTurn,
    Plan,
    RankStream,
    Subgraph,
    SubgraphKind,
    SubgraphRef,
    SubgraphTimes,
)

COMPUTE_STREAM, COMM_STREAM = "compute", "comm"
STREAM_NAMES = (COMPUTE_STREAM, COMM_STREAM)
_COMM_KINDS = frozenset({SubgraphKind.COLLECTIVE, SubgraphKind.P2P})


class Visit(NamedTuple):
    """One micro-batch of a round; ``ordinal`` counts the visits of the same hTask."""

    turn: int
    occurrence: int
    htask: int
    ordinal: int


class RoundProblem(NamedTuple):
    """What there is to order.

    ``graphs`` and ``durations_ns``: per hTask, its subgraphs and their times. ``turns``: counted.
    ``activation_units[htask][stage]``: what one micro-batch in flight holds on a stage (bytes, or
    1); ``capacity_units[stage]``: what a stage has; both empty: unlimited.
    ``micro_batches_per_step``: per hTask; empty: every micro-batch closes a step.
    """

    graphs: tuple[tuple[Subgraph, ...], ...]
    durations_ns: tuple[tuple[int, ...], ...]
    turns: tuple[HTaskTurn, ...]
    num_stages: int
    num_tp_ranks: int = 1
    activation_units: tuple[tuple[int, ...], ...] = ()
    capacity_units: tuple[int, ...] = ()
    micro_batches_per_step: tuple[int, ...] = ()

    def with_in_flight_limit(self, per_stage: Sequence[int]) -> RoundProblem:
        """The same, with at most ``per_stage[stage]`` micro-batches in flight on each stage."""
        units = tuple((1,) * self.num_stages for _ in self.graphs)
        return self._replace(activation_units=units, capacity_units=tuple(per_stage))


def round_problem(plan: Plan, times: SubgraphTimes, replica: int = 0) -> RoundProblem:
    """The problem that ``plan.order`` answers on one replica.

    ``times`` are of that replica's shape. Raises ConfigError for a round with uncounted turns,
    unknown hTasks, or times that are negative or not finite.
    """
    shape = plan.replicas[replica]
    durations = tuple(
        tuple(_nanoseconds(seconds, htask, index) for index, seconds in enumerate(row))
        for htask, row in enumerate(times.times_s)
    )
    return RoundProblem(tuple(times.subgraphs), durations, plan.round, shape.pp, shape.tp)


def _nanoseconds(seconds: float, htask: int, index: int) -> int:
    if not 0.0 <= seconds < float("inf"):
        raise ConfigError(
            f"times_s[{htask}][{index}]", f"is {seconds}", "give a finite time, 0 or more"
        )
    return round(seconds * NS_PER_S)


def stream_index(subgraph: Subgraph) -> int:
    """Streams are numbered 2 * stage for compute and 2 * stage + 1 for communication."""
    return 2 * subgraph.stage + (subgraph.kind in _COMM_KINDS)


def rank_streams(problem: RoundProblem, stream: int, replica: int) -> list[RankStream]:
    """The streams of all tensor-parallel ranks that run the order of one stream."""
    stage, kind = divmod(stream, 2)
    ranks = range(problem.num_tp_ranks)
    return [RankStream(replica, stage, rank, STREAM_NAMES[kind]) for rank in ranks]


class Structure(NamedTuple):
    """One hTask's graph by role. ``entries[stage]``: forward subgraphs by which a micro-batch
    enters a stage. ``step_ends[stage]``: after which the next step may enter. ``step_only``:
    subgraphs with nothing to do in a micro-batch that closes no step. ``holds[stage]``: from
    which subgraph to which the stage holds activations, both on its compute stream."""

    successors: tuple[tuple[int, ...], ...]
    entries: tuple[tuple[int, ...], ...]
    step_ends: tuple[tuple[int, ...], ...]
    holds: tuple[tuple[int, int] | None, ...]
    step_only: frozenset[int]
    ranks: tuple[int, ...]  # topological


def structure(graph: Sequence[Subgraph], num_stages: int) -> Structure:
    """Raises ConfigError for a graph that is not one: wrong indexes, stages or a cycle."""
    _check_graph(graph, num_stages)
    successors: list[list[int]] = [[] for _ in graph]
    for item in graph:
        for before in item.depends_on:
            successors[before].append(item.index)
    order = _topological(graph, successors)
    ranks = [0] * len(graph)
    for rank, index in enumerate(order):
        ranks[index] = rank
    entries, ends, holds = [], [], []
    for stage in range(num_stages):
        here = [item for item in graph if item.stage == stage]
        entries.append(_without_neighbours(here, graph, [i.depends_on for i in graph], False))
        holds.append(_hold(here, ranks))
        optimizers = tuple(i.index for i in here if i.kind is SubgraphKind.OPTIMIZER)
        ends.append(optimizers or _without_neighbours(here, graph, successors, True))
    return Structure(
        tuple(map(tuple, successors)),
        tuple(entries),
        tuple(ends),
        tuple(holds),
        _step_only(graph, successors, order),
        tuple(ranks),
    )


def _check_graph(graph: Sequence[Subgraph], num_stages: int) -> None:
    for position, item in enumerate(graph):
        if item.index != position or not 0 <= item.stage < num_stages:
            raise ConfigError(
                "subgraphs",
                f"subgraph {item.index} at position {position} is on stage {item.stage} of "
                f"{num_stages}",
                "number subgraphs by position and stages from 0",
            )
        if any(not 0 <= before < len(graph) for before in item.depends_on):
            raise ConfigError(
                "subgraphs", f"subgraph {position} depends on an unknown one", "name existing ones"
            )


def _topological(graph: Sequence[Subgraph], successors: Sequence[Sequence[int]]) -> list[int]:
    waiting = [len(item.depends_on) for item in graph]
    order = [item.index for item in graph if not item.depends_on]
    for index in order:  # grows while it is read
        for after in successors[index]:
            waiting[after] -= 1
            if not waiting[after]:
                order.append(after)
    if len(order) < len(graph):
        raise ConfigError("subgraphs", "dependencies form a cycle", "give an acyclic graph")
    return order


def _works(item: Subgraph, backward: bool) -> bool:
    computes = item.kind in (SubgraphKind.COMPUTE, SubgraphKind.ADAPTER, SubgraphKind.COLLECTIVE)
    return computes and item.backward is backward


def _without_neighbours(
    here: Iterable[Subgraph],
    graph: Sequence[Subgraph],
    neighbours: Sequence[Sequence[int]],
    backward: bool,
) -> tuple[int, ...]:
    """Working subgraphs of one direction with no such neighbour on the same stage."""
    return tuple(
        item.index
        for item in here
        if _works(item, backward)
        and not any(
            graph[other].stage == item.stage and _works(graph[other], backward)
            for other in neighbours[item.index]
        )
    )


def _hold(here: Iterable[Subgraph], ranks: Sequence[int]) -> tuple[int, int] | None:
    computes = [i for i in here if i.kind in (SubgraphKind.COMPUTE, SubgraphKind.ADAPTER)]
    forward = [item.index for item in computes if not item.backward]
    backward = [item.index for item in computes if item.backward]
    if not forward or not backward:
        return None
    return min(forward, key=ranks.__getitem__), max(backward, key=ranks.__getitem__)


def _step_only(
    graph: Sequence[Subgraph], successors: Sequence[Sequence[int]], order: Sequence[int]
) -> frozenset[int]:
    """Optimizers, and messages that nothing but optimizers wait for (the gradient norm)."""
    found: set[int] = set()
    for index in reversed(order):
        message = graph[index].kind is SubgraphKind.P2P and bool(successors[index])
        if graph[index].kind is SubgraphKind.OPTIMIZER or (
            message and all(after in found for after in successors[index])
        ):
            found.add(index)
    return frozenset(found)


class RoundGraph:
    """A problem laid out in flat lists, indexed by op. See the module's docstring."""

    def __init__(self, problem: RoundProblem) -> None:
        _check_problem(problem)
        self.problem = problem
        self.num_stages = problem.num_stages
        self.num_streams = 2 * problem.num_stages
        self.structures = [structure(graph, problem.num_stages) for graph in problem.graphs]
        self.visits = _visits(problem)
        self.visits_of = _by_htask(self.visits, len(problem.graphs))
        self.first_op: list[int] = []
        self.subgraphs: list[Subgraph] = []
        self.visit_of: list[int] = []
        self.duration_ns: list[int] = []
        self.successors: list[list[int]] = []
        self.num_before: list[int] = []
        for index, visit in enumerate(self.visits):
            self._add(index, visit)
        self.num_ops = len(self.subgraphs)
        self.stream_of = [stream_index(item) for item in self.subgraphs]
        self.stage_of = [item.stage for item in self.subgraphs]
        self.steps = problem.micro_batches_per_step or (1,) * len(problem.graphs)

    def _add(self, index: int, visit: Visit) -> None:
        graph = self.problem.graphs[visit.htask]
        first = len(self.subgraphs)
        self.first_op.append(first)
        self.subgraphs.extend(graph)
        self.visit_of.extend([index] * len(graph))
        self.duration_ns.extend(self.problem.durations_ns[visit.htask])
        self.num_before.extend(len(item.depends_on) for item in graph)
        self.successors.extend(
            [first + after for after in row] for row in self.structures[visit.htask].successors
        )

    def units(self, visit: int, stage: int) -> int:
        """Activation units that a visit holds on a stage; 0 when memory is unlimited."""
        table = self.problem.activation_units
        return table[self.visits[visit].htask][stage] if table else 0

    def ref(self, op: int, round_offset: int) -> SubgraphRef:
        visit = self.visits[self.visit_of[op]]
        return SubgraphRef(visit.turn, visit.occurrence, self.subgraphs[op].index, round_offset)

    def ops(self, visit: int, indexes: Iterable[int]) -> list[int]:
        first = self.first_op[visit]
        return [first + index for index in indexes]

    def closes(self, htask: int, number: int) -> bool:
        """Whether the hTask's micro-batch of that number (over all rounds) closes a step."""
        return (number + 1) % self.steps[htask] == 0

    def step_edges(self, rounds: int) -> list[tuple[int, int]]:
        """Edges between nodes: from the end of each step to the entries that wait for it."""
        edges: list[tuple[int, int]] = []
        for htask, visits in enumerate(self.visits_of):
            ends, entries = self.structures[htask].step_ends, self.structures[htask].entries
            pairs = [(end, entry) for stage in range(self.num_stages)
                     for end in ends[stage] for entry in entries[stage]]  # fmt: skip
            every = self.steps[htask]
            for number in range(every, rounds * len(visits)):
                before = self._first_node(visits, number // every * every - 1)
                after = self._first_node(visits, number)
                edges.extend((before + end, after + entry) for end, entry in pairs)
        return edges

    def _first_node(self, visits: Sequence[int], number: int) -> int:
        at_round, at = divmod(number, len(visits))
        return at_round * self.num_ops + self.first_op[visits[at]]

    def node_durations_ns(self, rounds: int) -> list[int]:
        """By node; what only closing a step needs costs nothing in other micro-batches."""
        durations = self.duration_ns * rounds
        for htask, visits in enumerate(self.visits_of):
            if self.steps[htask] == 1:
                continue
            for number in range(rounds * len(visits)):
                if not self.closes(htask, number):
                    first = self._first_node(visits, number)
                    for index in self.structures[htask].step_only:
                        durations[first + index] = 0
        return durations


def _check_problem(problem: RoundProblem) -> None:
    num = len(problem.graphs)
    if [len(row) for row in problem.graphs] != [len(row) for row in problem.durations_ns]:
        raise ConfigError("durations_ns", "do not match the subgraphs", "give one per subgraph")
    if not problem.turns:
        raise ConfigError("plan.round", "has no turn", "an order needs counted turns")
    for turn in problem.turns:
        if turn.count is None or turn.count < 1 or not 0 <= turn.htask < num:
            raise ConfigError(
                "plan.round",
                f"turn {tuple(turn)} has no count or names no hTask of {num}",
                "an order needs counted turns of known hTasks",
            )
    if problem.micro_batches_per_step and min(problem.micro_batches_per_step) < 1:
        raise ConfigError("micro_batches_per_step", "is below 1", "give at least 1")
    _check_capacity(problem)


def _check_capacity(problem: RoundProblem) -> None:
    if not problem.activation_units:
        return
    if len(problem.capacity_units) != problem.num_stages:
        raise ConfigError("capacity_units", "does not name every stage", "give one per stage")
    for stage, capacity in enumerate(problem.capacity_units):
        need = max(row[stage] for row in problem.activation_units)
        if need > capacity:
            raise ConfigError(
                f"capacity_units[{stage}]",
                f"a micro-batch holds {need} there, the stage has {capacity}",
                "give the stage more memory or the hTask smaller micro-batches",
            )


def _visits(problem: RoundProblem) -> tuple[Visit, ...]:
    seen = [0] * len(problem.graphs)
    visits: list[Visit] = []
    for turn, (htask, count) in enumerate(problem.turns):
        for occurrence in range(count or 0):
            visits.append(Visit(turn, occurrence, htask, seen[htask]))
            seen[htask] += 1
    return tuple(visits)


def _by_htask(visits: Sequence[Visit], num_htasks: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(num_htasks)]
    for index, visit in enumerate(visits):
        rows[visit.htask].append(index)
    return rows
