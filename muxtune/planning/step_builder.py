"""StepBuilder: a plan and cursors to micro-batches, and to what many rounds will take.

It is the only packer; simulator, runtime and planners all call it. ``next_round`` walks;
``advance``, ``forecast`` and ``rounds_until`` answer for many rounds at once and give the very
integers that walking gives (see ``tracks``), falling back to walking where no table is possible.

Durations are made of exact integers (passes, attention pairs and loss rows by shape, closed steps
by slot), counted from the cursors on and turned into nanoseconds once, so that it does not matter
in how many questions one asks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from math import fsum
from operator import mul
from typing import NamedTuple, Protocol

from muxtune.errors import ConfigError
from muxtune.planning.dealt import DealtCourse
from muxtune.planning.facts import (
    Cursors,
    HTaskFacts,
    PlanFacts,
    cursor_of,
    padded_pairs,
    plan_facts,
)
from muxtune.planning.tables import BoundedMemo, StepTable, TableBook
from muxtune.planning.tracks import HTaskTrack, JointTrack, Overlay, SeparableTrack, place_of
from muxtune.planning.walking import Counts, Walker, build_micro_batch
from muxtune.protocols import CostModel, LengthSource
from muxtune.types import (
    NS_PER_S,
    Cursor,
    Forecast,
    MicroBatch,
    PackRule,
    PassLayout,
    PassLoad,
    Plan,
    ShapeKey,
)

_MAX_TABLES = 8_192
_MAX_REMAINDERS = 16_384
_MAX_OVERLAYS = 2_048
_MAX_PLANS = 512
_MAX_SOURCES = 4
_MAX_INTERPOLATIONS = 8


class ShapeTotals(NamedTuple):
    """Passes of one shape of one hTask over some rounds."""

    htask: int
    shape: ShapeKey
    micro_batches: int
    attention_pairs: int
    loss_rows: int


class RoundTotals(NamedTuple):
    """What some rounds compute. ``closes``: optimizer steps closed, by task.
    ``effective_tokens``: tokens that tasks need; ``padded_tokens``: token rows computed."""

    shapes: tuple[ShapeTotals, ...]
    closes: Mapping[str, int]
    effective_tokens: int
    padded_tokens: int


def pass_load(micro_batch: MicroBatch, lengths: LengthSource) -> PassLoad:
    """What the time of a micro-batch depends on.

    A padded pass (``PackRule.PAD``) pays attention for all rows of its shape in full, filler rows
    included; a packed one for its sequences only, n(n+1)/2 pairs each, and has a layout.
    """
    pairs = loss_rows = 0
    slot_rows, sequences = [0] * len(micro_batch.shape.slots), Counter[tuple[str, int]]()
    for chunk in micro_batch.chunks:
        samples = lengths.batch(chunk.task_id, micro_batch.steps[chunk.task_id])
        for piece in chunk.pieces:
            pairs += _pairs_before(piece.stop) - _pairs_before(piece.start)
            slot_rows[chunk.slot] += piece.stop - piece.start
            sequences[chunk.task_id, piece.position] += piece.stop - piece.start
            if piece.start == 0:
                loss_rows += samples[piece.position].target_tokens
    layout: PassLayout | None = PassLayout(tuple(slot_rows), tuple(sequences.values()))
    if micro_batch.packing is PackRule.PAD:
        pairs, layout = padded_pairs(micro_batch.shape), None
    closing = {c.slot for c in micro_batch.chunks if c.task_id in micro_batch.closes_step}
    slots = tuple(sorted(closing))
    return PassLoad(micro_batch.shape, float(pairs), float(loss_rows), slots, layout)


def _pairs_before(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


class PlanCourse(Protocol):
    """How a plan goes on from given cursors: the answers of ``StepBuilder`` for whoever asks
    several times."""

    def forecast(self) -> Forecast: ...

    def advance(self, rounds: int) -> dict[str, Cursor]: ...

    def rounds_until(self, elapsed_ns: int) -> tuple[int, int]: ...

    def round_tokens(self, rounds: int) -> tuple[int, int]: ...

    def padded_tokens(self, rounds: int) -> int: ...


class StepBuilder:
    """Pure: equal arguments give equal answers; it only remembers tables.

    ``cursors`` must hold each task of the plan and may hold others, which come back unchanged;
    pass an instance's cursors, not a fleet's, because they are copied. ``max_walked``:
    micro-batches that a forecast walks, where it has no table, before it extrapolates.
    """

    def __init__(self, max_walked: int = 20_000) -> None:
        self._max_walked = max_walked
        self._books: dict[int, TableBook] = {}
        self._plans: BoundedMemo[_KnownPlan] = BoundedMemo(_MAX_PLANS)
        self._overlays: BoundedMemo[Overlay] = BoundedMemo(_MAX_OVERLAYS)

    def course(
        self, plan: Plan, cursors: Cursors, lengths: LengthSource, cost: CostModel
    ) -> PlanCourse:
        """From these cursors on, which must not change while it is asked."""
        return _AskedCourse(self, plan, cursors, lengths, cost)

    def next_round(
        self, plan: Plan, cursors: Cursors, lengths: LengthSource
    ) -> tuple[list[MicroBatch], dict[str, Cursor]]:
        """One round in order, and the cursors after it.

        A task that has finished, or drains and stands at a step boundary, contributes nothing; a
        micro-batch that no task contributes to is left out. Raises ConfigError for a plan that
        cannot be carried out: a sequence beyond its quota, a micro-batch that no shape holds.
        """
        walker = Walker(self._plan_facts(plan, lengths), cursors)
        micro_batches: list[MicroBatch] = []
        walker.play_round(
            lambda htask, parts: micro_batches.append(build_micro_batch(htask, parts))
        )
        return micro_batches, {**cursors, **walker.cursors}

    def advance(
        self, plan: Plan, cursors: Cursors, lengths: LengthSource, rounds: int
    ) -> dict[str, Cursor]:
        """The cursors after ``rounds`` rounds."""
        return {**cursors, **self._course(plan, cursors, lengths).cursors(rounds)}

    def forecast(
        self, plan: Plan, cursors: Cursors, lengths: LengthSource, cost: CostModel
    ) -> Forecast:
        """Rounds and time to the end of the round in which a task first finishes or is released.

        Tasks that have ended already (see ``ended``) are not counted; when none is left the
        answer is no rounds and no task. Raises ConfigError when no round visits those left.
        """
        return self._course(plan, cursors, lengths).forecast(cost, self._max_walked)

    def rounds_until(
        self,
        plan: Plan,
        cursors: Cursors,
        lengths: LengthSource,
        cost: CostModel,
        elapsed_ns: int,
    ) -> tuple[int, int]:
        """The fewest rounds that take at least ``elapsed_ns``, and what they take. Where all
        tasks end before, the rounds to the last end and what those take."""
        return self._course(plan, cursors, lengths).rounds_until(cost, elapsed_ns)

    def duration_ns(
        self, plan: Plan, cursors: Cursors, lengths: LengthSource, cost: CostModel, rounds: int
    ) -> int:
        return self._course(plan, cursors, lengths).duration_ns(cost, rounds)

    def round_totals(
        self, plan: Plan, cursors: Cursors, lengths: LengthSource, rounds: int
    ) -> RoundTotals:
        """Exact counts of what ``rounds`` rounds from the cursors on compute."""
        return _totals(
            self._plan_facts(plan, lengths), self._course(plan, cursors, lengths).counts(rounds)
        )

    def round_tokens(
        self, plan: Plan, cursors: Cursors, lengths: LengthSource, rounds: int
    ) -> tuple[int, int]:
        """(effective, padded) tokens of ``rounds`` rounds from the cursors on."""
        totals = self.round_totals(plan, cursors, lengths, rounds)
        return totals.effective_tokens, totals.padded_tokens

    def padded_tokens(
        self, plan: Plan, cursors: Cursors, lengths: LengthSource, rounds: int
    ) -> int:
        """The second of ``round_tokens``."""
        return self.round_tokens(plan, cursors, lengths, rounds)[1]

    def ended(self, plan: Plan, cursors: Cursors, lengths: LengthSource) -> frozenset[str]:
        """Tasks of the plan that contribute no more: finished, or released from draining."""
        return frozenset(
            task.task_id
            for htask in self._plan_facts(plan, lengths).htasks
            for task in htask.tasks
            if task.has_ended(cursor_of(cursors, task.task_id))
        )

    def _plan_facts(self, plan: Plan, lengths: LengthSource) -> PlanFacts:
        return self._known(plan, lengths).facts

    def _known(self, plan: Plan, lengths: LengthSource) -> _KnownPlan:
        key = (id(plan), id(lengths))  # what is known keeps both alive, so the ids stay theirs
        return self._plans.get(key) or self._plans.put(key, _KnownPlan(plan_facts(plan, lengths)))

    def _course(self, plan: Plan, cursors: Cursors, lengths: LengthSource) -> _Course | DealtCourse:
        """The course from these cursors on; the last one of each plan is remembered."""
        known = self._known(plan, lengths)
        try:
            start = tuple([cursors[task_id] for task_id in known.facts.task_ids])
        except KeyError:
            start = tuple(cursor_of(cursors, task_id) for task_id in known.facts.task_ids)
        if known.course is None or known.course.start != start:
            known.course = self._new_course(known, start)
        return known.course

    def _new_course(self, known: _KnownPlan, start: tuple[Cursor, ...]) -> _Course | DealtCourse:
        if len(known.facts.plan.replicas) > 1:
            lengths = known.facts.lengths
            return DealtCourse(known.facts, start, lambda each: pass_load(each, lengths))
        book = self._book(known.facts.lengths)
        if known.tables is None:
            known.tables = [
                None if htask.mixed else book.tables(htask) for htask in known.facts.htasks
            ]
        tracks: list[HTaskTrack] = []
        first = 0
        for htask, tables in zip(known.facts.htasks, known.tables, strict=True):
            if tables is None:
                return _WalkedCourse(known, start)
            last = first + len(tables)
            tracks.append(self._track(htask, tables, start[first:last], book))
            first = last
        return _TabledCourse(known, start, tracks)

    def _track(
        self,
        htask: HTaskFacts,
        tables: Sequence[StepTable],
        start: Sequence[Cursor],
        book: TableBook,
    ) -> HTaskTrack:
        places = [
            place_of(task, table, cursor, htask, book)
            for task, table, cursor in zip(htask.tasks, tables, start, strict=True)
        ]
        if htask.is_separable:
            return SeparableTrack(htask, places)
        return JointTrack(htask, places, book, self._overlays)

    def _book(self, lengths: LengthSource) -> TableBook:
        book = self._books.get(id(lengths))
        if book is None:
            if len(self._books) >= _MAX_SOURCES:
                del self._books[next(iter(self._books))]
            book = TableBook(lengths, _MAX_TABLES, _MAX_REMAINDERS)
            self._books[id(lengths)] = book
        return book


# ------------------------------------------------------------------------------------ courses


class _AskedCourse:
    """Asks a step builder again, which remembers each plan's last course."""

    def __init__(
        self,
        builder: StepBuilder,
        plan: Plan,
        cursors: Cursors,
        lengths: LengthSource,
        cost: CostModel,
    ) -> None:
        self._builder, self._start, self._cost = builder, (plan, cursors, lengths), cost

    def forecast(self) -> Forecast:
        return self._builder.forecast(*self._start, self._cost)

    def advance(self, rounds: int) -> dict[str, Cursor]:
        return self._builder.advance(*self._start, rounds)

    def rounds_until(self, elapsed_ns: int) -> tuple[int, int]:
        return self._builder.rounds_until(*self._start, self._cost, elapsed_ns)

    def round_tokens(self, rounds: int) -> tuple[int, int]:
        return self._builder.round_tokens(*self._start, rounds)

    def padded_tokens(self, rounds: int) -> int:
        return self._builder.padded_tokens(*self._start, rounds)


class _KnownPlan:
    """What is remembered of a plan: its facts and, once needed, tables by hTask (None where a
    track is not possible), the seconds of each of ``Counts.values``, and its last course."""

    def __init__(self, facts: PlanFacts) -> None:
        self.facts = facts
        self.tables: list[list[StepTable] | None] | None = None
        self.course: _Course | DealtCourse | None = None
        self._cost: CostModel | None = None
        self._seconds: list[list[float]] = []

    def seconds(self, cost: CostModel) -> list[list[float]]:
        if self._cost is not cost:
            self._seconds = [_seconds_of(htask, cost, self.facts) for htask in self.facts.htasks]
            self._cost = cost
        return self._seconds


class _Course:
    """How a plan goes on from given cursors. Subclasses answer ``counts``, ``cursors``,
    ``first_end`` and ``last_end`` (rounds)."""

    def __init__(self, known: _KnownPlan, start: tuple[Cursor, ...]) -> None:
        self.facts, self.start = known.facts, start
        self._known = known

    def counts(self, rounds: int) -> list[list[int]]:
        """``Counts.values`` of each hTask after ``rounds`` rounds."""
        raise NotImplementedError

    def cursors(self, rounds: int) -> dict[str, Cursor]:
        raise NotImplementedError

    def forecast(self, cost: CostModel, max_walked: int) -> Forecast:
        raise NotImplementedError

    def rounds_until(self, cost: CostModel, elapsed_ns: int) -> tuple[int, int]:
        raise NotImplementedError

    def time_counts(self, rounds: int) -> Sequence[Sequence[int]]:
        """Like ``counts``; may lack the tokens at the end."""
        return self.counts(rounds)

    def duration_ns(self, cost: CostModel, rounds: int) -> int:
        terms: list[float] = []
        for values, seconds in zip(
            self.time_counts(rounds), self._known.seconds(cost), strict=True
        ):
            terms.extend(map(mul, values, seconds))
        return round(fsum(terms) * NS_PER_S)


def _seconds_of(htask: HTaskFacts, cost: CostModel, facts: PlanFacts) -> list[float]:
    """Seconds of each entry of ``Counts.values`` but the tokens. The optimizer's time of a slot
    is the same in all shapes of an hTask, since they have the same slots."""
    of_shape = [cost.pass_coefficients(shape, facts.replica) for shape in htask.shapes]
    optimizer_s = of_shape[0].optimizer_s
    if len(optimizer_s) != htask.num_slots:
        raise ConfigError(
            "cost.optimizer_s",
            f"the cost model gives {len(optimizer_s)} optimizer times for {htask.num_slots} slots",
            "let it give one a slot",
        )
    return [
        *(each.base_s for each in of_shape),
        *(each.per_pair_s for each in of_shape),
        *(each.per_loss_row_s for each in of_shape),
        *optimizer_s,
    ]


class _TabledCourse(_Course):
    """Every hTask has a track; any number of rounds costs the same."""

    def __init__(
        self, known: _KnownPlan, start: tuple[Cursor, ...], tracks: Sequence[HTaskTrack]
    ) -> None:
        super().__init__(known, start)
        self._tracks = [(track, track.htask.units_per_round) for track in tracks]
        self._ends: dict[str, int] = {}
        self._is_idle = True
        for track, per_round in self._tracks:
            for task_id, units in track.ends.items():
                self._is_idle = False
                if per_round:
                    self._ends[task_id] = -(-units // per_round)
        # The last answer, to guess others from: cost model, rounds and their nanoseconds.
        self._seen: tuple[CostModel | None, int, int] = (None, 0, 0)

    def time_counts(self, rounds: int) -> list[list[int]]:
        return [track.counts(rounds * per_round) for track, per_round in self._tracks]

    def counts(self, rounds: int) -> list[list[int]]:
        return [
            [*track.counts(rounds * per_round), track.tokens(rounds * per_round)]
            for track, per_round in self._tracks
        ]

    def cursors(self, rounds: int) -> dict[str, Cursor]:
        cursors: dict[str, Cursor] = {}
        for track, per_round in self._tracks:
            cursors.update(track.cursors(rounds * per_round))
        return cursors

    def forecast(self, cost: CostModel, max_walked: int) -> Forecast:
        if self._is_idle:
            return Forecast(0, 0, (), True)
        if not self._ends:
            raise _never_visited()
        rounds = min(self._ends.values())
        task_ids = sorted(task_id for task_id, end in self._ends.items() if end == rounds)
        return Forecast(rounds, self.duration_ns(cost, rounds), tuple(task_ids), True)

    def duration_ns(self, cost: CostModel, rounds: int) -> int:
        duration_ns = super().duration_ns(cost, rounds)
        self._seen = (cost, rounds, duration_ns)
        return duration_ns

    def rounds_until(self, cost: CostModel, elapsed_ns: int) -> tuple[int, int]:
        if elapsed_ns <= 0 or self._is_idle:
            return 0, 0
        if not self._ends:
            raise _never_visited()
        seen_cost, high, high_ns = self._seen
        if seen_cost is not cost or high_ns < elapsed_ns:
            high = max(self._ends.values())
            high_ns = self.duration_ns(cost, high)
        if high_ns < elapsed_ns:
            return high, high_ns
        return self._narrow(cost, elapsed_ns, high, high_ns)

    def _narrow(self, cost: CostModel, elapsed_ns: int, high: int, high_ns: int) -> tuple[int, int]:
        """Durations grow with rounds and nearly in proportion: interpolation closes in within
        few looks; bisection takes over where it does not."""
        low, low_ns, looks = 0, 0, 0
        while high - low > 1:
            looks += 1
            if looks <= _MAX_INTERPOLATIONS:
                ahead = -(-(elapsed_ns - low_ns) * (high - low) // (high_ns - low_ns))
                guess = min(low + ahead, high - 1)
            else:
                guess = (low + high) // 2
            guess_ns = self.duration_ns(cost, guess)
            if guess_ns >= elapsed_ns:
                high, high_ns = guess, guess_ns
            else:
                low, low_ns = guess, guess_ns
        return high, high_ns


class _WalkedCourse(_Course):
    """For plans with an hTask that no track can describe: rounds are walked when asked for."""

    def __init__(self, known: _KnownPlan, start: tuple[Cursor, ...]) -> None:
        super().__init__(known, start)
        facts = known.facts
        self._walker = Walker(facts, dict(zip(facts.task_ids, start, strict=True)))
        self._running = [Counts(htask) for htask in facts.htasks]
        self._counts: list[list[list[int]]] = []
        self._cursors: list[dict[str, Cursor]] = []
        self._ended: list[frozenset[str]] = []
        self._record()

    def counts(self, rounds: int) -> list[list[int]]:
        return self._counts[self._walk_to(rounds)]

    def cursors(self, rounds: int) -> dict[str, Cursor]:
        return self._cursors[self._walk_to(rounds)]

    def forecast(self, cost: CostModel, max_walked: int) -> Forecast:
        if len(self._ended[0]) == len(self.facts.task_ids):
            return Forecast(0, 0, (), True)
        rounds = 0
        while self._ended[self._walk_to(rounds)] == self._ended[0]:
            if self._num_micro_batches(rounds) > max_walked:
                return self._extrapolate(cost, rounds)
            rounds += 1
        task_ids = sorted(self._ended[rounds] - self._ended[0])
        return Forecast(rounds, self.duration_ns(cost, rounds), tuple(task_ids), True)

    def rounds_until(self, cost: CostModel, elapsed_ns: int) -> tuple[int, int]:
        while self.duration_ns(cost, len(self._counts) - 1) < elapsed_ns and not self._all_ended():
            self._play_round()
        rounds = bisect_left(
            range(len(self._counts) - 1), elapsed_ns, key=lambda at: self.duration_ns(cost, at)
        )
        return rounds, self.duration_ns(cost, rounds)

    def _walk_to(self, rounds: int) -> int:
        """Walks as far; the index of the record, the last one where all tasks end before."""
        while len(self._counts) <= rounds and not self._all_ended():
            self._play_round()
        return min(rounds, len(self._counts) - 1)

    def _play_round(self) -> None:
        before = self._counts[-1]
        self._walker.play_round(lambda htask, parts: self._running[htask.index].take(htask, parts))
        self._record()
        if self._counts[-1] == before:
            raise _never_visited()

    def _record(self) -> None:
        self._counts.append([list(counts.values) for counts in self._running])
        self._cursors.append(self._walker.cursors)
        self._ended.append(self._walker.ended())

    def _all_ended(self) -> bool:
        return len(self._ended[-1]) == len(self.facts.task_ids)

    def _num_micro_batches(self, rounds: int) -> int:
        return sum(
            sum(values[: len(htask.shapes)])
            for htask, values in zip(self.facts.htasks, self._counts[rounds], strict=True)
        )

    def _extrapolate(self, cost: CostModel, rounds: int) -> Forecast:
        """Each task goes on closing steps as fast as it did over the rounds walked."""
        ends: dict[str, int] = {}
        for htask in self.facts.htasks:
            for task in htask.tasks:
                first, last = (self._cursors[at][task.task_id] for at in (0, rounds))
                if not task.has_ended(first):
                    num_steps = first.step + 1 if task.draining else task.num_steps
                    closed = max(1, last.step - first.step)
                    ends[task.task_id] = -(-rounds * (num_steps - first.step) // closed)
        end = max(rounds + 1, min(ends.values()))
        task_ids = sorted(task_id for task_id, at in ends.items() if at <= end)
        duration_ns = round(self.duration_ns(cost, rounds) * end / rounds)
        return Forecast(end, duration_ns, tuple(task_ids), False)


def _never_visited() -> ConfigError:
    return ConfigError(
        "plan.round",
        "no turn serves a task that has not ended",
        "give each hTask with unfinished tasks a turn",
    )


def _totals(facts: PlanFacts, counts: Sequence[Sequence[int]]) -> RoundTotals:
    shapes: list[ShapeTotals] = []
    closes: dict[str, int] = {}
    for htask, values in zip(facts.htasks, counts, strict=True):
        num_shapes = len(htask.shapes)
        for at, shape in enumerate(htask.shapes):
            of_shape = values[at : 3 * num_shapes : num_shapes]
            shapes.append(ShapeTotals(htask.index, shape, *of_shape))
        for task in htask.tasks:
            closes[task.task_id] = values[3 * num_shapes + task.slot]
    return RoundTotals(
        shapes=tuple(shapes),
        closes=closes,
        effective_tokens=sum(values[-1] for values in counts),
        padded_tokens=sum(each.micro_batches * each.shape.padded_tokens for each in shapes),
    )
