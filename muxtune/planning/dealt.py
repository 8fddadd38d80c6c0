"""Rounds of an instance with several replicas, which may have different shapes.

Each micro-batch is dealt out to all replicas (``muxtune.planning.replica_dispatch``), and takes as
long as the slowest of them. That is not separable (docs/architecture.md, rule 2): how much each
replica gets depends on all lengths of the micro-batch together. So rounds are of whole steps, which
makes their number exact, and what one takes is the mean over some rounds that are packed and
dealt: ``Forecast.exact`` is False. Not contained: the exchange of the adapters' gradients between
replicas, which the cost model does not tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from muxtune.errors import ConfigError
from muxtune.planning.facts import PlanFacts
from muxtune.planning.replica_dispatch import deal
from muxtune.planning.walking import Counts, Walker, build_micro_batch
from muxtune.protocols import CostModel
from muxtune.types import NS_PER_S, Cursor, Forecast, MicroBatch, PassLoad

SAMPLED_ROUNDS = 4


class DealtCourse:
    """How a plan over several replicas goes on from given cursors.

    ``load_of``: what a micro-batch's time depends on. Raises ConfigError for counted turns.
    """

    def __init__(
        self,
        facts: PlanFacts,
        start: tuple[Cursor, ...],
        load_of: Callable[[MicroBatch], PassLoad],
    ) -> None:
        if any(turn.count is not None for turn in facts.plan.round):
            raise ConfigError(
                "plan.round",
                f"has counted turns, but {len(facts.plan.replicas)} replicas close steps together",
                "let each turn last until its tasks have closed a step (planner=lobra)",
            )
        self.facts, self.start, self._load_of = facts, start, load_of
        self._left = self._rounds_left()
        self._cost: CostModel | None = None
        self._round_s = 0.0
        self._sampled: tuple[list[list[MicroBatch]], list[list[int]]] | None = None

    def forecast(self, cost: CostModel, max_walked: int) -> Forecast:
        if not self._left:
            return Forecast(0, 0, (), True)
        rounds = min(self._left.values())
        task_ids = tuple(sorted(name for name, left in self._left.items() if left == rounds))
        return Forecast(rounds, self.duration_ns(cost, rounds), task_ids, False)

    def duration_ns(self, cost: CostModel, rounds: int) -> int:
        return round(self._mean_round_s(cost) * rounds * NS_PER_S) if self._left else 0

    def rounds_until(self, cost: CostModel, elapsed_ns: int) -> tuple[int, int]:
        if elapsed_ns <= 0 or not self._left:
            return 0, 0
        rounds = int(elapsed_ns / (self._mean_round_s(cost) * NS_PER_S))
        while self.duration_ns(cost, rounds) < elapsed_ns:
            rounds += 1
        rounds = min(rounds, max(self._left.values()))
        return rounds, self.duration_ns(cost, rounds)

    def cursors(self, rounds: int) -> dict[str, Cursor]:
        after = dict(zip(self.facts.task_ids, self.start, strict=True))
        if rounds:
            for name, left in self._left.items():
                after[name] = Cursor(after[name].step + min(rounds, left), None)
        return after

    def counts(self, rounds: int) -> list[list[int]]:
        """``Counts.values`` of each hTask, in proportion to the rounds that were sampled."""
        rows = self._samples()[1]
        return [[value * rounds // SAMPLED_ROUNDS for value in row] for row in rows]

    # -- inside

    def _rounds_left(self) -> dict[str, int]:
        tasks = [task for htask in self.facts.htasks for task in htask.tasks]
        return {
            task.task_id: 1 if task.draining else task.num_steps - cursor.step
            for task, cursor in zip(tasks, self.start, strict=True)
            if not task.has_ended(cursor)
        }

    def _samples(self) -> tuple[list[list[MicroBatch]], list[list[int]]]:
        """Rounds of micro-batches as all tasks go on, and their counts by hTask."""
        if self._sampled is None:
            walker = Walker(self.facts, dict(zip(self.facts.task_ids, self.start, strict=True)))
            counts = [Counts(htask) for htask in self.facts.htasks]
            rounds: list[list[MicroBatch]] = []
            for _ in range(SAMPLED_ROUNDS):
                rounds.append([])

                def take(htask, parts, into=rounds[-1]):
                    into.append(build_micro_batch(htask, parts))
                    counts[htask.index].take(htask, parts)

                walker.play_round(take)
            self._sampled = rounds, [each.values for each in counts]
        return self._sampled

    def _mean_round_s(self, cost: CostModel) -> float:
        if self._cost is not cost:
            rounds = [each for each in self._samples()[0] if each]
            self._round_s = fmean(self._round_time_s(cost, each) for each in rounds)
            self._cost = cost
        return self._round_s

    def _round_time_s(self, cost: CostModel, micro_batches: Sequence[MicroBatch]) -> float:
        return sum(self._slowest_s(cost, micro_batch) for micro_batch in micro_batches)

    def _slowest_s(self, cost: CostModel, micro_batch: MicroBatch) -> float:
        replicas = self.facts.plan.replicas
        parts = zip(deal(micro_batch, replicas), replicas, strict=True)
        times = [
            float(cost.pass_times_s([self._load_of(part)], replica).value[0])
            for part, replica in parts
            if part.chunks
        ]
        return max(times)
