"""Walking a plan micro-batch by micro-batch: the definition that every fast path must equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from muxtune.planning.facts import Cursors, HTaskFacts, PlanFacts, TaskFacts, cursor_of
from muxtune.planning.packing import StepPack, pack_step
from muxtune.protocols import LengthSource
from muxtune.types import Chunk, Cursor, MicroBatch

# Dispatch over several replicas comes later; it will choose the replica where this is used.
_ONLY_REPLICA = 0


class Contribution(NamedTuple):
    """One task's part of one micro-batch."""

    task: TaskFacts
    pack: StepPack
    step: int
    loss_tokens: int
    closes_step: bool


class TaskFeed:
    """Hands out one task's contributions, in order, from its cursor on."""

    def __init__(
        self, task: TaskFacts, htask: HTaskFacts, cursor: Cursor, lengths: LengthSource
    ) -> None:
        self.task, self.cursor = task, cursor
        self._htask, self._lengths = htask, lengths
        self._packs: tuple[StepPack, ...] = ()
        self._next = 0
        self._loss_tokens = 0

    @property
    def has_ended(self) -> bool:
        return self.task.has_ended(self.cursor)

    def take(self) -> Contribution:
        """The next contribution; moves the cursor past it."""
        if self._next == len(self._packs):
            self._pack_step()
        pack, step = self._packs[self._next], self.cursor.step
        self._next += 1
        closes_step = self._next == len(self._packs)
        if closes_step:
            self.cursor = Cursor(step + 1, None)
        else:
            self.cursor = Cursor(step, _positions_of(self._packs[self._next :]))
        return Contribution(self.task, pack, step, self._loss_tokens, closes_step)

    def _pack_step(self) -> None:
        samples = self._lengths.batch(self.task.task_id, self.cursor.step)
        self._loss_tokens = sum(sample.target_tokens for sample in samples)
        self._packs = pack_step(
            samples, self.cursor.left, self._htask.chunk_tokens, self.task.quota, self._htask.rule
        )
        self._next = 0


Sink = Callable[[HTaskFacts, list[Contribution]], None]


class Walker:
    """Plays rounds of a plan from given cursors."""

    def __init__(self, facts: PlanFacts, cursors: Cursors) -> None:
        self._facts = facts
        self._feeds = tuple(
            tuple(
                TaskFeed(task, htask, cursor_of(cursors, task.task_id), facts.lengths)
                for task in htask.tasks
            )
            for htask in facts.htasks
        )

    @property
    def cursors(self) -> dict[str, Cursor]:
        return {feed.task.task_id: feed.cursor for feeds in self._feeds for feed in feeds}

    def ended(self) -> frozenset[str]:
        return frozenset(
            feed.task.task_id for feeds in self._feeds for feed in feeds if feed.has_ended
        )

    def play_round(self, sink: Sink) -> None:
        """Gives each micro-batch of one round to ``sink``; those of no task are left out."""
        for turn in self._facts.plan.round:
            htask, feeds = self._facts.htasks[turn.htask], self._feeds[turn.htask]
            if turn.count is None:
                play_step(htask, feeds, sink)
            else:
                play_micro_batches(htask, feeds, turn.count, sink)


def play_step(htask: HTaskFacts, feeds: Iterable[TaskFeed], sink: Sink) -> None:
    """Until each task has closed one step; those that are through wait for the others."""
    active = [feed for feed in feeds if not feed.has_ended]
    while active:
        contributions = [feed.take() for feed in active]
        sink(htask, contributions)
        active = [
            feed
            for feed, contribution in zip(active, contributions, strict=True)
            if not contribution.closes_step
        ]


def play_micro_batches(
    htask: HTaskFacts, feeds: Iterable[TaskFeed], count: int, sink: Sink
) -> None:
    active = list(feeds)
    for _ in range(count):
        active = [feed for feed in active if not feed.has_ended]
        if not active:
            return
        sink(htask, [feed.take() for feed in active])


def build_micro_batch(htask: HTaskFacts, contributions: list[Contribution]) -> MicroBatch:
    """The micro-batch of these contributions, in slot order, in the smallest shape for it."""
    chunks = tuple(
        Chunk(part.task.task_id, part.task.slot, pieces)
        for part in contributions
        for pieces in part.pack.chunks
    )
    longest_tokens = max(part.pack.longest_tokens for part in contributions)
    return MicroBatch(
        htask=htask.index,
        replica=_ONLY_REPLICA,
        shape=htask.shapes[htask.shape_index(len(chunks), longest_tokens)],
        chunks=chunks,
        loss_tokens={part.task.task_id: part.loss_tokens for part in contributions},
        closes_step=frozenset(part.task.task_id for part in contributions if part.closes_step),
        steps={part.task.task_id: part.step for part in contributions},
        packing=htask.rule,
    )


def _positions_of(packs: Iterable[StepPack]) -> tuple[int, ...]:
    return tuple(sorted(position for pack in packs for position in pack.positions))


class Counts:
    """Exact integers that a duration is made of, of one hTask.

    ``values`` is one flat list: micro-batches a shape, attention pairs a shape, loss rows a
    shape, closed steps a slot, effective tokens.
    """

    __slots__ = ("htask", "values")

    def __init__(self, htask: HTaskFacts) -> None:
        self.htask = htask
        self.values = [0] * (3 * len(htask.shapes) + htask.num_slots + 1)

    def take(self, htask: HTaskFacts, contributions: list[Contribution]) -> None:
        """A ``Sink``."""
        values = self.values
        num_shapes = len(htask.shapes)
        shape_index = htask.shape_index(
            sum(part.pack.num_chunks for part in contributions),
            max(part.pack.longest_tokens for part in contributions),
        )
        packed_pairs = sum(part.pack.attention_pairs for part in contributions)
        values[shape_index] += 1
        values[num_shapes + shape_index] += htask.pass_pairs(shape_index, packed_pairs)
        values[2 * num_shapes + shape_index] += sum(part.pack.loss_rows for part in contributions)
        for part in contributions:
            values[3 * num_shapes + part.task.slot] += part.closes_step
        values[-1] += sum(part.pack.tokens for part in contributions)
