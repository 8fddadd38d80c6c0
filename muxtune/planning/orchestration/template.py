"""The periodic pipeline template: an order that repeats round after round without a flush.

Method. (1) List-schedule several rounds with the micro-batches injected in some cyclic sequence
(``dispatch``). (2) Take one round from the middle and fold its start times modulo the round time,
as modulo scheduling folds a loop body (Rau 1994): position in the cycle is the order on a stream,
the number of whole round times is the ``round_offset``. (3) Play the folded order (``player``),
which tells its steady round time. (4) Search injection sequences, rules and swaps for the
shortest, until the trivial bound is met to ``tolerance`` or ``evaluations`` are spent.

Why a folded order cannot deadlock: give each op of round r the virtual time t + r * P. If every
dependency runs forward in virtual time, then so does every stream's sequence, so virtual time
is a common linear extension, whatever the real durations are. Within a round that holds
because t comes from a schedule; between rounds P is raised until it holds. Memory depends on a
stage's own sequence only and is checked there. So an order stays valid when every micro-batch
closes a step, and when times differ from the predicted ones.

Relation to the known templates. GPipe and 1F1B with flush (PipeDream-Flush) idle for (S-1) of
M+S-1 micro-batch times a step, because a step waits for all of its micro-batches. PipeDream
removes the flush by stale weights; here no weight is stale, because what fills the pipeline are
micro-batches of OTHER hTasks (as in mLoRA's LoRAPP). Zero-bubble schedules split off the weight
gradient to fill gaps; a frozen backbone has none. With the memory of 1F1B (S - s micro-batches
on stage s) and equal micro-batches the outcome is 1F1B's steady state; with unequal ones the
injection sequence matters, which is what is searched.

With tensor parallelism the same list scheduling interleaves micro-batches at every collective, so
that one's all-reduce runs beside another's compute; under contention (``contention``) orders
are judged by the contended player, and an order without overlap competes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from muxtune.errors import ConfigError
from muxtune.planning.orchestration.accounting import RoundBounds, contended_bound_ns, round_bounds
from muxtune.planning.orchestration.contention import NO_CONTENTION, Contention, play_contended
from muxtune.planning.orchestration.dispatch import (
    BACKWARD_FIRST,
    LONGEST_FIRST,
    OLDEST_FIRST,
    RULES,
    TIGHTEST_FIRST,
    DispatchOptions,
    dispatch,
)
from muxtune.planning.orchestration.player import (
    StreamSequence,
    Timeline,
    check_memory,
    play_sequences,
)
from muxtune.planning.orchestration.problem import RoundGraph, RoundProblem, rank_streams
from muxtune.types import RankStream, SubgraphRef

_ACCEPTED_LOSS = 0.01
_CAPACITY_SHARES = (0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
_STRETCH = (1.0, 1.02, 1.05, 1.1, 1.2, 1.35, 1.6, 2.0, 3.0, 5.0, 9.0)


class TemplateOptions(NamedTuple):
    """How hard to search. ``evaluations``: orders to try at most, and ``node_budget``: subgraphs
    to list-schedule at most (about 6 microseconds each). ``tolerance``: stop when the round is
    this close to a bound. ``rounds``: list-scheduled before folding. ``seed``: of the swaps; the
    same seed gives the same order."""

    evaluations: int = 60
    node_budget: int = 150_000
    tolerance: float = 0.002
    rounds: int = 6
    seed: int = 0


class Template(NamedTuple):
    """``order``: for ``Plan.order``, of one replica. ``period_ns``: steady round time, played.
    ``evaluations``: orders that were tried."""

    order: dict[RankStream, tuple[SubgraphRef, ...]]
    period_ns: float
    bounds: RoundBounds
    evaluations: int

    @property
    def ratio(self) -> float:
        """Steady round time over the trivial bound."""
        return self.period_ns / max(self.bounds.trivial_ns, 1)


_DEFAULTS = TemplateOptions()


def periodic_template(
    problem: RoundProblem,
    options: TemplateOptions = _DEFAULTS,
    contention: Contention = NO_CONTENTION,
    replica: int = 0,
) -> Template:
    """The best order found. Raises ConfigError when not even one micro-batch fits in memory."""
    graph = RoundGraph(problem)
    search = _Search(graph, options, contention)
    period, sequences = search.run()
    return Template(
        order_of(graph, sequences, replica), period, search.bounds, search.num_evaluated
    )


def order_of(
    graph: RoundGraph, sequences: Sequence[StreamSequence], replica: int = 0
) -> dict[RankStream, tuple[SubgraphRef, ...]]:
    """An order as plan data; ranks of a stage share one tuple."""
    order: dict[RankStream, tuple[SubgraphRef, ...]] = {}
    for stream, sequence in enumerate(sequences):
        refs = tuple(graph.ref(op, offset) for op, offset in sequence)
        for rank in rank_streams(graph.problem, stream, replica):
            if refs:
                order[rank] = refs
    return order


# ----------------------------------------------------------------------------------- folding


def fold(graph: RoundGraph, timeline: Timeline) -> list[StreamSequence] | None:
    """The periodic order of a schedule's middle round; None when it does not fit in memory.

    Raises the virtual round time until consecutive rounds respect each other.
    """
    middle = timeline.rounds // 2
    start, end = timeline.start_ns[middle], timeline.end_ns[middle]
    period = max(_recurrence_ns(timeline, middle), 1)
    step_gap = _step_gap_ns(graph, start, end)
    for stretch in _STRETCH:
        virtual = max(round(period * stretch), step_gap)
        sequences = _folded(graph, start, virtual)
        try:
            check_memory(graph, sequences)
        except ConfigError:
            continue
        return sequences
    return None


def _recurrence_ns(timeline: Timeline, middle: int) -> int:
    """Round time around the middle of a schedule that may not be quite periodic."""
    last = min(timeline.rounds - 1, middle + max(1, timeline.rounds // 4))
    first = max(0, 2 * middle - last)
    grown = timeline.start_ns[last] - timeline.start_ns[first]
    return int(np.median(grown)) // max(1, last - first)


def _step_gap_ns(graph: RoundGraph, start: np.ndarray, end: np.ndarray) -> int:
    """The least round time at which an hTask's first micro-batch follows its last one."""
    gap = 1
    for htask, visits in enumerate(graph.visits_of):
        parts = graph.structures[htask]
        if not visits:
            continue
        for stage in range(graph.num_stages):
            ends = graph.ops(visits[-1], parts.step_ends[stage])
            entries = graph.ops(visits[0], parts.entries[stage])
            if ends and entries:
                gap = max(gap, int(end[ends].max() - start[entries].min()))
    return gap


def _folded(graph: RoundGraph, start: np.ndarray, period: int) -> list[StreamSequence]:
    rows: list[list[tuple[int, bool, int, int, int]]] = [[] for _ in range(graph.num_streams)]
    origins = _origins(graph, start)
    for op, stream in enumerate(graph.stream_of):
        item = graph.subgraphs[op]
        offset, position = divmod(int(start[op]) - origins[stream], period)
        ranks = graph.structures[graph.visits[graph.visit_of[op]].htask].ranks
        # Of one instant: what ends a step before what the next step enters by.
        rows[stream].append((position, not item.backward, ranks[item.index], op, offset))
    return _from_first_pass(
        graph, [[(row[3], row[4]) for row in sorted(stream_rows)] for stream_rows in rows]
    )


def _from_first_pass(
    graph: RoundGraph, sequences: Sequence[StreamSequence]
) -> list[StreamSequence]:
    """Each hTask begins in the first pass. List scheduling may let one wait for rounds while
    others keep what is scarcest busy; but no hTask waits for another's results, so it may run all
    it does so many rounds earlier: the steady round is the same, and less of it fills and drains.
    """
    htask_of = [graph.visits[visit].htask for visit in graph.visit_of]
    least: dict[int, int] = {}
    for op, offset in (item for sequence in sequences for item in sequence):
        least[htask_of[op]] = min(offset, least.get(htask_of[op], offset))
    return [[(op, offset - least[htask_of[op]]) for op, offset in row] for row in sequences]


def _origins(graph: RoundGraph, start: np.ndarray) -> list[int]:
    """Each stream's cycle begins with its own first op, so that its least offset is 0."""
    origins = [-1] * graph.num_streams
    for op, stream in enumerate(graph.stream_of):
        at = int(start[op])
        origins[stream] = at if origins[stream] < 0 else min(origins[stream], at)
    return origins


# ------------------------------------------------------------------------------------ search


class _Search:
    """Steps (1) to (4) of the module's docstring."""

    def __init__(self, graph: RoundGraph, options: TemplateOptions, contention: Contention) -> None:
        self.graph, self.options, self.contention = graph, options, contention
        self.strict_graph = RoundGraph(_strictly_positive(graph.problem))
        self.bounds = round_bounds(graph)
        # No order beats these, so the search stops there.
        self.target_ns = max(
            self.bounds.trivial_ns, self.bounds.memory_ns, contended_bound_ns(graph, contention)
        )
        nodes = graph.num_ops * options.rounds
        self.max_evaluations = max(1, min(options.evaluations, options.node_budget // nodes))
        self.num_evaluated = 0
        self.best_ns = float("inf")
        self.best: Sequence[StreamSequence] | None = None
        self.best_options: DispatchOptions | None = None

    def run(self) -> tuple[float, Sequence[StreamSequence]]:
        for candidate in self._first_candidates():
            self._evaluate(candidate)
            if self._done():
                break
        if not self._done() and self.best_options is not None:
            self._improve()
        if self.best is None:
            raise ConfigError(
                "capacity_units", "no order fits in memory", "give the stages more memory"
            )
        return self.best_ns, self.best

    def _done(self) -> bool:
        met = self.best_ns <= self.target_ns * (1.0 + self.options.tolerance)
        spent = self.num_evaluated >= self.max_evaluations and self.best is not None
        return met or spent

    def _first_candidates(self) -> Iterator[DispatchOptions]:
        for injection in dict.fromkeys(_injections(self.graph)):
            for strict in (False, True):
                yield DispatchOptions(injection, BACKWARD_FIRST, strict)
            yield DispatchOptions(injection, LONGEST_FIRST)
            yield DispatchOptions(injection, TIGHTEST_FIRST)
            yield DispatchOptions(injection, OLDEST_FIRST, capacity_share=_CAPACITY_SHARES[4])
        yield DispatchOptions(_injections(self.graph)[0], flush=True)

    def _evaluate(self, options: DispatchOptions) -> float:
        """The round time that these options lead to; kept if it is the best so far."""
        self.num_evaluated += 1
        sequences = fold(self.graph, dispatch(self.strict_graph, options, self.options.rounds))
        if sequences is None:
            return float("inf")
        period = self._period_ns(sequences)
        if period < self.best_ns:
            self.best_ns, self.best, self.best_options = period, sequences, options
        return period

    def _period_ns(self, sequences: Sequence[StreamSequence]) -> float:
        deepest = max((offset for row in sequences for _, offset in row), default=0)
        rounds = 2 * (deepest + 3)
        try:
            if self.contention == NO_CONTENTION:
                return play_sequences(self.graph, sequences, rounds).period_ns
            return play_contended(self.graph, sequences, rounds, self.contention).period_ns
        except ConfigError:
            return float("inf")

    def _improve(self) -> None:
        """A walk from the best options by random changes; one that makes the round a little longer
        is taken too (threshold accepting, Dueck and Scheuer 1990), to leave local optima."""
        chooser = random.Random(self.options.seed)
        current, current_ns = self.best_options, self.best_ns
        while not self._done() and current is not None:
            changed = self._changed(current, chooser)
            period = self._evaluate(changed)
            if period <= current_ns * (1.0 + _ACCEPTED_LOSS):
                current, current_ns = changed, period

    def _changed(self, options: DispatchOptions, chooser: random.Random) -> DispatchOptions:
        kind = chooser.random()
        if kind < 0.15:
            return options._replace(rule=chooser.choice(RULES))
        if kind < 0.25:
            return options._replace(strict=not options.strict)
        if kind < 0.4 or len(options.injection) < 2:
            return options._replace(capacity_share=chooser.choice(_CAPACITY_SHARES))
        changed = list(options.injection)
        first, second = chooser.sample(range(len(changed)), 2)
        if kind < 0.7:
            changed[first], changed[second] = changed[second], changed[first]
        else:
            changed.insert(second, changed.pop(first))
        return options._replace(injection=_in_turn(self.graph, changed))


def _strictly_positive(problem: RoundProblem) -> RoundProblem:
    """Nothing without duration, so that what comes after also starts after: folding needs it."""
    durations = tuple(tuple(max(1, ns) for ns in row) for row in problem.durations_ns)
    return problem._replace(durations_ns=durations)


def _in_turn(graph: RoundGraph, injection: Sequence[int]) -> tuple[int, ...]:
    """The same hTasks in the same places, each hTask's micro-batches in their own order."""
    rest = [iter(visits) for visits in graph.visits_of]
    return tuple(next(rest[graph.visits[visit].htask]) for visit in injection)


def _injections(graph: RoundGraph) -> list[tuple[int, ...]]:
    """Cyclic sequences to begin with; each spreads an hTask's micro-batches over the round."""
    by_size = sorted(range(len(graph.visits_of)), key=lambda htask: -_work(graph, htask))
    mountain = by_size[::-2][::-1] + by_size[-2::-2] if len(by_size) > 1 else by_size
    zigzag = [by_size[i // 2 if i % 2 == 0 else -1 - i // 2] for i in range(len(by_size))]
    sequences: list[Callable[[int], float]] = [
        lambda htask: htask,
        lambda htask: by_size.index(htask),
        lambda htask: mountain.index(htask),
        lambda htask: zigzag.index(htask),
    ]
    return [_spread(graph, key) for key in sequences]


def _work(graph: RoundGraph, htask: int) -> int:
    return sum(graph.problem.durations_ns[htask])


def _spread(graph: RoundGraph, key: Callable[[int], float]) -> tuple[int, ...]:
    """Visits at even distances: the n-th of C goes to (n + 1/2) / C of the round."""

    def place(index: int) -> tuple[float, float]:
        visit = graph.visits[index]
        return (visit.ordinal + 0.5) / len(graph.visits_of[visit.htask]), key(visit.htask)

    return tuple(sorted(range(len(graph.visits)), key=place))
