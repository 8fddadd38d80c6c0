"""Plans of a pipeline played subgraph by subgraph, to choose between those that come close.

The closed form (``rounds``) knows the work of the busiest stage and the latency of an hTask's step,
not how well different micro-batches fill each other's gaps. ``Player`` gives a set of hTasks an
order and plays it; ``refine`` begins with what the closed form found and changes one hTask's
micro-batches at a time, as long as the played step gets shorter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from muxtune.cost import nominal_load
from muxtune.planning.orchestration import (
    NO_CONTENTION,
    Contention,
    DispatchOptions,
    RoundGraph,
    RoundProblem,
    TemplateOptions,
    Timeline,
    checked_sequences,
    dispatch,
    periodic_template,
    pipeline_limits,
    play_contended,
)
from muxtune.protocols import CostModel
from muxtune.types import (
    NS_PER_S,
    DispatchRule,
    Estimate,
    HTask,
    HTaskTurn,
    Plan,
    Prediction,
    ReplicaShape,
    Subgraph,
    SubgraphKind,
)

_NOTHING = Estimate(0.0, 0.0, 0.0)
_NO_PREDICTION = Prediction(_NOTHING, 0.0, 0.0, _NOTHING, {}, {}, {}, 0.0)
_WORTHWHILE = 1 - 1e-3
_ROUNDS = 4  # of which the later ones are steady
_COMPUTES = (SubgraphKind.COMPUTE, SubgraphKind.ADAPTER, SubgraphKind.OPTIMIZER)


class Piece(NamedTuple):
    """One hTask as it is played: an average micro-batch, cut into subgraphs.

    ``work_s[stage]`` and ``chain_s``: of one micro-batch. ``passes``: micro-batches of its
    slowest task's step. ``held_bytes[stage]``: by a micro-batch in flight.
    """

    graph: tuple[Subgraph, ...]
    times_s: tuple[float, ...]
    passes: float
    work_s: tuple[float, ...]
    chain_s: float
    held_bytes: tuple[int, ...]

    @property
    def step_work_s(self) -> float:
        return self.passes * max(self.work_s)

    def least_s(self) -> float:
        """No step is shorter: its micro-batches follow each other over the last stage, which the
        first one must reach and the last one leave."""
        return self.chain_s + (self.passes - 1) * self.work_s[-1]


def chain_s(graph: Sequence[Subgraph], times_s: Sequence[float]) -> float:
    """The longest path: a micro-batch goes through the stages and back, while the optimizers of
    different stages do not wait for each other."""
    ends_s: dict[int, float] = {}
    for item, seconds in zip(graph, times_s, strict=True):
        ends_s[item.index] = seconds + max((ends_s[i] for i in item.depends_on), default=0.0)
    return max(ends_s.values())


class Player:
    """Plays sets of hTasks on one replica. ``search``: how hard to look for an order.
    ``rounds_overlap``: whether one begins before the last is over where no order names them."""

    def __init__(
        self,
        model: CostModel,
        replica: ReplicaShape,
        search: TemplateOptions,
        contention: Contention = NO_CONTENTION,
        rounds_overlap: bool = True,
    ) -> None:
        self.model, self.replica, self.search = model, replica, search
        self.rounds_overlap = rounds_overlap
        self.num_stages, self.contention = replica.pp, contention

    def piece(self, htask: HTask, pass_time_s: float, passes: float) -> Piece:
        """Subgraph times are those of the largest shape, scaled to the average micro-batch."""
        plan = plan_of(self.replica, (htask,))
        times = self.model.subgraph_times_s(plan)
        nominal = self.model.pass_times_s([nominal_load(htask.shapes[-1])], self.replica)
        scale = pass_time_s / float(nominal.value[0])
        seconds = tuple([scale * s for s in times.times_s[0]])
        graph, work = times.subgraphs[0], [0.0] * self.num_stages
        for item, s in zip(graph, seconds, strict=True):
            work[item.stage] += s if item.kind in _COMPUTES else 0.0
        held = held_bytes(self.model, plan)[0]
        return Piece(graph, seconds, passes, tuple(work), chain_s(graph, seconds), held)

    def bound_s(self, pieces: Sequence[Piece]) -> float:
        """No schedule of these steps is shorter."""
        busiest = max(
            sum(piece.passes * piece.work_s[stage] for piece in pieces)
            for stage in range(self.num_stages)
        )
        return max(busiest, *(piece.least_s() for piece in pieces))

    def whole_step_s(self, pieces: Sequence[Piece]) -> float:
        """A round is one step of every task. Where steps take a fractional number of micro-batches
        on average, rounds with the whole numbers below and above it are played, each for its
        share."""
        whole = [math.floor(piece.passes + 1e-9) for piece in pieces]
        rest = [max(0.0, piece.passes - n) for piece, n in zip(pieces, whole, strict=True)]
        levels = [0.0, *sorted({share for share in rest if share > 1e-9}), 1.0]
        total_s = 0.0
        for low, high in pairwise(levels):
            counts = tuple([n + (share > low) for n, share in zip(whole, rest, strict=True)])
            played = self._played_s(pieces, counts, counts) if self.rounds_overlap else 0.0
            total_s += (high - low) * (played or self._apart_s(pieces, counts))
        return total_s

    def _apart_s(self, pieces: Sequence[Piece], counts: tuple[int, ...]) -> float:
        """As the ranks run rounds that no order names: micro-batches enter as soon as they may, but
        on each stage a round begins when the one before has left it."""
        graph = RoundGraph(self.problem(pieces, counts, counts))
        visits = DispatchOptions(tuple(range(len(graph.visits))))
        start_ns = dispatch(graph, visits, 1).start_ns[0]
        sequences: list[list[tuple[int, int]]] = [[] for _ in range(graph.num_streams)]
        for op in sorted(range(graph.num_ops), key=lambda op: (start_ns[op], op)):
            sequences[graph.stream_of[op]].append((op, 0))
        timeline = play_contended(graph, sequences, _ROUNDS, self.contention)
        return timeline.period_ns / NS_PER_S

    def counted_s(self, pieces: Sequence[Piece], counts: Sequence[int]) -> float:
        """Counted turns; every micro-batch may close a step."""
        round_s = self._played_s(pieces, counts, ())
        return round_s * max(p.passes / n for p, n in zip(pieces, counts, strict=True))

    def step_s(self, pieces: Sequence[Piece]) -> tuple[float, bool]:
        """The shorter of both, one turn each where counted, and whether it is counted."""
        whole_s, ones = self.whole_step_s(pieces), (1,) * len(pieces)
        slowest = max(piece.passes for piece in pieces)
        if slowest * max(piece.chain_s for piece in pieces) < whole_s:
            counted_s = self.counted_s(pieces, ones)
            if counted_s <= whole_s:
                return counted_s, True
        return whole_s, False

    def _played_s(
        self, pieces: Sequence[Piece], counts: Sequence[int], per_step: tuple[int, ...]
    ) -> float:
        problem = self.problem(pieces, counts, per_step)
        return periodic_template(problem, self.search, self.contention).period_ns / NS_PER_S

    def problem(
        self, pieces: Sequence[Piece], counts: Sequence[int], per_step: tuple[int, ...]
    ) -> RoundProblem:
        """A round of ``counts`` micro-batches of each; ``per_step``: see ``RoundProblem``."""
        limits = pipeline_limits([piece.held_bytes for piece in pieces], self.num_stages)
        return RoundProblem(
            tuple(piece.graph for piece in pieces),
            tuple(
                _durations_ns(piece, closing)
                for piece, closing in zip(pieces, per_step or (1,) * len(pieces), strict=True)
            ),
            tuple(HTaskTurn(at, n) for at, n in enumerate(counts) if n),
            self.num_stages,
            1,
            *limits,
            per_step,
        )

    def timeline(
        self,
        pieces: Sequence[Piece],
        counts: Sequence[int],
        per_step: tuple[int, ...],
        rounds: int,
    ) -> Timeline:
        """Rounds from a cold start."""
        problem = self.problem(pieces, counts, per_step)
        order = periodic_template(problem, self.search, self.contention).order
        graph = RoundGraph(problem)
        return play_contended(graph, checked_sequences(graph, order), rounds, self.contention)


def _durations_ns(piece: Piece, closing: int) -> tuple[int, ...]:
    """``closing``: micro-batches a step; the optimizer, spread over all of them in the piece, then
    runs in the last one only."""
    pairs = zip(piece.graph, piece.times_s, strict=True)
    return tuple(
        [
            round(s * NS_PER_S * (closing if item.kind is SubgraphKind.OPTIMIZER else 1))
            for item, s in pairs
        ]
    )


def plan_of(replica: ReplicaShape, htasks: tuple[HTask, ...]) -> Plan:
    """Enough of a plan to ask a cost model about its hTasks."""
    turns = tuple(HTaskTurn(at, 1) for at in range(len(htasks)))
    return Plan("", 0, frozenset(), (replica,), htasks, turns, DispatchRule.SINGLE,
                _NO_PREDICTION)  # fmt: skip


def held_bytes(model: CostModel, plan: Plan) -> list[tuple[int, ...]]:
    """Of each hTask on each stage: what one micro-batch in flight holds."""
    num_stages = plan.replicas[0].pp
    of_htask = (model.memory_ledger_bytes(plan._replace(htasks=(h,))).ledgers for h in plan.htasks)
    return [
        tuple(ledger.items["activations"] // (num_stages - ledger.stage) for ledger in ledgers)
        for ledgers in of_htask
    ]


class Candidate(NamedTuple):
    """``groups``: whatever the caller makes hTasks of; ``pieces``: the same to be played."""

    groups: tuple[object, ...]
    pieces: tuple[Piece, ...]


class Chosen(NamedTuple):
    groups: tuple[object, ...]
    counted: bool
    step_s: float


def refine(
    player: Player,
    starts: Sequence[Candidate],
    variants: Callable[[Candidate], Iterator[Candidate]],
    most_plays: int,
) -> Chosen:
    """The best of the starts, then the best that ``variants`` makes of it, and so on,
    until nothing is better or ``most_plays`` are played. What its bound rules out is not played."""
    best, seen = Chosen((), False, math.inf), set()

    def best_of(candidates: Iterable[Candidate]) -> Candidate | None:
        nonlocal best
        better = None
        for candidate in candidates:
            if len(seen) >= most_plays:
                break
            if candidate.pieces in seen or player.bound_s(candidate.pieces) >= best.step_s:
                continue
            seen.add(candidate.pieces)
            step_s, counted = player.step_s(candidate.pieces)
            if step_s < _WORTHWHILE * best.step_s:
                best, better = Chosen(candidate.groups, counted, step_s), candidate
        return better

    found = best_of(starts)
    while found is not None:
        found = best_of(variants(found))
    return best
