"""`muxtune`: packed, chunk-aligned, fused under the memory limit, split into hTasks where it wins.

For each chunk length the tasks are sorted by chunks per step; a dynamic program over contiguous
groups, F(i) = min over j < i of F(j) + time of tasks j+1..i as one hTask, chooses the hTasks, and
for each group the number of micro-batches per optimizer step. The objective is the time in which
every task takes one optimizer step. All candidates of one chunk length are costed at once from
tables that sample the cost model (``muxtune.planners.tables``); what they choose is then costed,
and checked against the memory limit, by the cost model itself. (Of the paper's task level only
"dynamic programming over latency and memory models" is known; this recurrence is our own.)
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from muxtune.errors import ConfigError
from muxtune.planners.base import (
    Answer,
    Arrangement,
    CostedArrangement,
    GroupCost,
    GroupShape,
    PlannerBase,
    Site,
    TaskClass,
    answer_of,
    bind,
    group_cost,
    nameless,
    of_each,
    planned_slowdown,
    refuse_slow,
    site_of,
)
from muxtune.planners.batched import BatchedPlanner
from muxtune.planners.curves import LEVELS, ClassTable, Curve
from muxtune.planners.grouping import Memo as GroupTimes
from muxtune.planners.grouping import Part, Rules, cut_tasks, split_tasks
from muxtune.planners.hysteresis import Choice, carried_htasks, forgone_s, horizons_s, reason, weigh
from muxtune.planners.ladder import Fill
from muxtune.planners.pacing import Demand, paced_turns
from muxtune.planners.played import Candidate, Piece, Player, held_bytes, plan_of, refine
from muxtune.planners.rounds import Turns, round_of
from muxtune.planners.tables import PassTables
from muxtune.planning.expected import ExpectedLoad
from muxtune.planning.orchestration import (
    Contention,
    InFlightLimits,
    TemplateOptions,
    ordered,
    pipeline_limits,
)
from muxtune.protocols import CostBook, CostModel
from muxtune.registry import PLANNERS
from muxtune.types import (
    AdapterSlot,
    Estimate,
    HTask,
    InstanceView,
    PackRule,
    Plan,
    Refusal,
    ReplicaShape,
    ShapeKey,
)

FUSION = ("planned", "all_spatial", "all_temporal", "off")
ALIGNMENT = ("chunk", "pack", "pad")
FREE_SHAPES = 16  # of a ladder where preparing a shape costs nothing
COSTLY_SHAPES = 4  # where it is a graph capture
PLAY_SEARCH = TemplateOptions(evaluations=5, node_budget=15_000)
NEAR_BEST = 1.06  # of the closed form's best, what is played
MOST_FINER, MOST_VARIANTS = 2.2, 6
PLAYS_ALONE = 6  # of one task, which is asked for besides every set that it is in
ORDER_SEARCH = TemplateOptions(evaluations=8, node_budget=15_000)
MEMO_GROUPS = 20_000
BUCKETS = (2, 4)  # tried on several GPUs
SPARE_MEMORY = 0.97  # what is searched for again, where interpolated bytes were too few


class Group(NamedTuple):
    """A candidate hTask with its exact cost in one step of all its tasks."""

    shape: GroupShape
    cost: GroupCost
    passes: float
    need_bytes: int

    @property
    def time_s(self) -> float:
        return self.passes * self.cost.pass_time_s

    def over(self, members: Sequence[int]) -> Group:
        """The same over indexes into a larger list of tasks."""
        chosen = tuple(members[i] for i in self.shape.members)
        return self._replace(shape=self.shape._replace(members=chosen))


@PLANNERS.register("muxtune")
class MuxTunePlanner(PlannerBase):
    """See the module's docstring.

    ``fusion``, the task level: "planned", "all_spatial" (one hTask), "all_temporal" (an hTask
    each) or "off" (one task an instance). ``alignment``, the data level: "chunk" (packed into
    equal chunks), "pack" (packed, the chunk as long as the longest sequence) or "pad" (one
    sequence a row, as the ``batched`` planner does). ``orchestration``, the operator level: order
    subgraphs where a replica has several GPUs.

    ``chunk_tokens``: 0 lets the planner choose, else fixed. ``tile_tokens``: chunk lengths are
    multiples of it (the kernels' row tile). ``max_shapes``: a partly filled micro-batch may take a
    smaller one of this many shapes; 1 keeps the pass static; 0 lets the planner choose by whether
    preparing a shape costs anything. ``hysteresis``: keep the running plan where a better one
    gains less than its transition costs (``muxtune.planners.hysteresis``); the plan's reason says
    so. ``promise_margin``: predictions err, so a ``max_slowdown`` is planned for with this share
    of it in hand. ``plays``: in a pipeline, how many plans near the best of the closed form are
    played subgraph by subgraph to choose among them and to predict the one chosen; 0 (closed form
    only) for fleets that plan often. ``rounds_overlap``: whether rounds of a pipeline that no
    order names begin before the last is over, as a simulated executor's do and a real one's not.
    """

    def __init__(
        self,
        costs: CostBook,
        chunk_tokens: int = 0,
        tile_tokens: int = 16,
        fusion: str = "planned",
        alignment: str = "chunk",
        max_shapes: int = 0,
        hysteresis: bool = True,
        orchestration: bool = True,
        promise_margin: float = 0.05,
        plays: int = 40,
        rounds_overlap: bool = True,
    ) -> None:
        super().__init__(costs)
        one_of("planner.fusion", fusion, FUSION)
        one_of("planner.alignment", alignment, ALIGNMENT)
        if max_shapes < 0:
            raise ConfigError("planner.max_shapes", f"is {max_shapes}", "give 0 (choose) or more")
        if tile_tokens < 1:
            raise ConfigError(
                "planner.tile_tokens", f"is {tile_tokens}", "give the kernels' row tile: 1 or more"
            )
        if chunk_tokens < 0 or chunk_tokens % tile_tokens:
            raise ConfigError(
                "planner.chunk_tokens",
                f"{chunk_tokens} does not fit row tiles of {tile_tokens} tokens",
                "give a multiple of planner.tile_tokens, or 0 to let the planner choose",
            )
        if plays < 0:
            raise ConfigError("planner.plays", f"is {plays}", "give 0 (closed form) or more")
        self.plays, self.rounds_overlap = plays, rounds_overlap
        if not 0 <= promise_margin < 10:
            raise ConfigError(
                "planner.promise_margin", f"is {promise_margin}", "give a share, such as 0.05"
            )
        self.promise_margin = promise_margin
        self.chunk_tokens, self.tile_tokens = chunk_tokens, tile_tokens
        self.fusion, self.max_shapes = fusion, max_shapes
        self.alignment, self.takes_one_task = alignment, fusion == "off"
        self._padded = BatchedPlanner(costs)
        self._padded.lengths = self.lengths
        self.hysteresis, self.orchestration = hysteresis, orchestration
        self._groups: dict[tuple[Hashable, ...], Group] = {}
        self._searched: dict[tuple[Hashable, ...], list[Group] | None] = {}
        self._carried_groups: dict[tuple[Hashable, ...], tuple[tuple[ShapeKey, ...], Group]] = {}
        # By the id of a tuple of shapes, which the entry keeps alive.
        self._made: dict[tuple[int, int], tuple[tuple[ShapeKey, ...], Group]] = {}
        self._captures: dict[int, tuple[Answer, float]] = {}
        self._choices: dict[Hashable, tuple[Answer, object, Choice | None]] = {}
        self._curves: dict[tuple[TaskClass, int], Curve] = {}
        self._class_tables: dict[tuple[TaskClass, tuple[int, ...], int], ClassTable] = {}
        self._tables: dict[tuple[str, str, ReplicaShape, tuple[int, ...]], PassTables] = {}
        self._num_shapes: dict[tuple[str, str, ReplicaShape], int] = {}
        self._group_times: GroupTimes = {}

    def arrange(self, site: Site, classes: tuple[TaskClass, ...]) -> CostedArrangement | Refusal:
        if self.alignment == "pad":
            return self._padded.arrange(site, classes)
        resident = self.resident_bytes(site, classes)
        limit = site.free_bytes(resident)
        chunks = self.chunk_lengths(classes)
        groups = self._search(site, classes, chunks, limit)
        if groups is None:
            groups = self._smallest(site, classes, chunks)
        needed = max(group.need_bytes for group in groups)
        if needed > limit:
            needed = site.corrected_bytes(resident + needed)
            return self.refuse_memory(site, classes, needed)
        chooses = self.fusion == "planned" and site.replica.num_gpus > 1
        several = chooses and len(classes) > 1
        others = self._other_groups(site, classes, chunks, limit) if several else []
        if several and site.replica.pp == 1 and self.orchestration:
            others += self._overlapping(site, classes, chunks, limit)
        if site.replica.pp > 1 and self.plays and self.orchestration:
            plays = self.plays if several else min(self.plays, PLAYS_ALONE if chooses else 1)
            starts = [groups, *others]
            found, turns, ratio = self._refined(site, classes, chunks, limit, starts, plays)
            return self._costed(site, found, turns, resident)._replace(played_ratio=ratio)
        costed = self._costed(site, groups, _turns(groups, site, self.orchestration), resident)
        different = {tuple(found): found for found in others if found != groups}
        candidates = [costed] + [
            self._costed(site, found, _turns(found, site, self.orchestration), resident)
            for found in different.values()
        ]
        return min(candidates, key=lambda each: self._played_step_s(site, each, len(classes)))

    def _other_groups(
        self, site: Site, classes: tuple[TaskClass, ...], chunks: tuple[int, ...], limit: float
    ) -> list[list[Group]]:
        """Plain partitions that compete by their played time, because the dynamic program does
        not know how much communication an order hides: all tasks in one hTask, an hTask each, and
        2 or 4 equal buckets."""
        everyone = range(len(classes))
        partitions = [[list(everyone)], [[i] for i in everyone]]
        if self.orchestration:
            partitions += [self._buckets(classes, n) for n in BUCKETS if n < len(classes)]
        found = [self._cut(site, classes, chunks, limit, each) for each in partitions]
        return [groups for groups in found if groups is not None]

    def _overlapping(
        self, site: Site, classes: tuple[TaskClass, ...], chunks: tuple[int, ...], limit: float
    ) -> list[list[Group]]:
        """The same in micro-batches of half the memory: collectives hide behind another
        micro-batch only where there is memory for it."""
        found = self._search(site, classes, chunks, limit / 2)
        halves = self._other_groups(site, classes, chunks, limit / 2)
        return halves if found is None else [found, *halves]

    def _buckets(self, classes: Sequence[TaskClass], count: int) -> list[list[int]]:
        """Longest processing time first, by tokens a step."""
        tokens = [
            task.sequences_per_step * self.lengths[task.lengths_hash].mean_tokens
            for task in classes
        ]
        buckets: list[list[int]] = [[] for _ in range(count)]
        totals = [0.0] * count
        for index in sorted(range(len(classes)), key=lambda i: (-tokens[i], i)):
            least = totals.index(min(totals))
            buckets[least].append(index)
            totals[least] += tokens[index]
        return buckets

    @property
    def chooses_htasks(self) -> bool:
        return self.alignment != "pad" and self.fusion != "off"

    def partition_step_s(
        self, instance: InstanceView, partition: Sequence[Sequence[str]]
    ) -> float | None:
        """Seconds until every task has taken a step, were these sets of task ids the hTasks; None
        where that does not fit in memory, or where the planner does not choose hTasks."""
        if not self.chooses_htasks:
            return None
        site, at = site_of(instance), {task.task_id: i for i, task in enumerate(instance.tasks)}
        classes = tuple([self._classes[self._key_of(task)] for task in instance.tasks])
        resident = self.resident_bytes(site, classes)
        limit = site.free_bytes(resident)
        cut = [[at[name] for name in names] for names in partition]
        groups = self._cut(site, classes, self.chunk_lengths(classes), limit, cut)
        if groups is None:
            return None
        costed = self._costed(site, groups, _turns(groups, site, self.orchestration), resident)
        return self._played_step_s(site, costed, len(classes))

    def _cut(
        self,
        site: Site,
        classes: tuple[TaskClass, ...],
        chunks: tuple[int, ...],
        limit: float,
        partition: Sequence[Sequence[int]],
    ) -> list[Group] | None:
        """This partition as hTasks, each at its best; None where it does not fit."""
        slots = [task.slot for task in classes]
        num_shapes = self.num_shapes(site, slots[0])
        tables = of_each(classes, lambda task: self._class_table(task, chunks, num_shapes))
        rules = Rules(limit * SPARE_MEMORY, num_shapes, self.fusion, site.replica.pp)
        parts = cut_tasks(tables, slots, self._pass_tables(site, chunks), rules, partition)
        groups = [self._group(site, classes, chunks, part) for part in parts]
        fits = groups and all(group.need_bytes <= limit for group in groups)
        return groups if fits else None

    def _played_step_s(self, site: Site, costed: CostedArrangement, num_tasks: int) -> float:
        answer = self._finished(site, costed, (0.0,) * num_tasks)
        return answer.prediction.tasks_step_time_s

    def _refined(
        self,
        site: Site,
        classes: tuple[TaskClass, ...],
        chunks: tuple[int, ...],
        limit: float,
        starts: Sequence[list[Group]],
        plays: int,
    ) -> tuple[list[Group], Turns, float]:
        """In a pipeline: of plans near the best of the closed form, the one that plays best, and
        its played time over the closed form's where it gets no order."""
        overlap = self.rounds_overlap
        player = Player(self.cost(site), site.replica, PLAY_SEARCH, rounds_overlap=overlap)
        most_s = NEAR_BEST * min(_turns(groups, site).step_time_s for groups in starts)
        pieces: dict[Group, Piece] = {}

        def candidate(some: Sequence[Group], is_start: bool = False) -> Candidate | None:
            is_far = not is_start and _turns(some, site).step_time_s > most_s
            if is_far or any(group.need_bytes > limit for group in some):
                return None
            for group in some:
                if group not in pieces:
                    htask = HTask(group.shape.shapes, {}, {}, group.shape.packing)
                    pieces[group] = player.piece(htask, group.cost.pass_time_s, group.passes)
            return Candidate(tuple(some), tuple([pieces[group] for group in some]))

        def variants(now: Candidate) -> Iterator[Candidate]:
            """One hTask in other micro-batches, the longest first, those like it first; then two
            as one."""
            order = sorted(range(len(now.groups)), key=lambda i: -now.pieces[i].chain_s)
            for i in order:
                group = now.groups[i]
                assert isinstance(group, Group)
                others = self._other_levels(site, classes, chunks, group)
                for other in others:
                    changed = [*now.groups[:i], other, *now.groups[i + 1 :]]
                    found = candidate(changed)  # type: ignore[arg-type]
                    if found is not None:
                        yield found
            for joined in self._joined(site, classes, chunks, limit, now.groups):
                found = candidate(joined)
                if found is not None:
                    yield found

        # The plain plans are played however far off the closed form thinks they are.
        known = [c for groups in starts if (c := candidate(groups, is_start=True)) is not None]
        chosen = refine(player, known, variants, plays)
        best: list[Group] = list(chosen.groups)  # type: ignore[arg-type]
        turns = _turns(best, site, counted=chosen.counted)
        if chosen.counted:
            return best, turns, 1.0
        played_s = chosen.step_s
        if site.replica.tp > 1:  # collectives beside compute slow both, which the search leaves out
            player.contention = _contention(self.cost(site), site)
            played_s = player.whole_step_s([pieces[group] for group in best])
        return best, turns, played_s / turns.step_time_s

    def _joined(
        self,
        site: Site,
        classes: Sequence[TaskClass],
        chunks: tuple[int, ...],
        limit: float,
        groups: Sequence[object],
    ) -> Iterator[list[Group]]:
        """Any two of the hTasks as one."""
        some: list[Group] = list(groups)  # type: ignore[arg-type]
        for i, j in combinations(range(len(some)), 2):
            members = sorted((*some[i].shape.members, *some[j].shape.members))
            chosen = tuple([classes[k] for k in members])
            found = self._search(site, chosen, chunks, limit, "all_spatial")
            if found is not None:
                rest = [group for at, group in enumerate(some) if at not in (i, j)]
                yield [*rest, *(group.over(members) for group in found)]

    def _other_levels(
        self, site: Site, classes: Sequence[TaskClass], chunks: tuple[int, ...], group: Group
    ) -> list[Group]:
        """The same hTask in other numbers of micro-batches a step, in the same chunks."""
        chunk = chunks.index(group.shape.shapes[0].chunk_tokens)
        members = group.shape.members
        found: dict[tuple[int, ...], Group] = {}
        for level in range(len(LEVELS) - 1):
            if LEVELS[level] <= MOST_FINER * group.passes + 1:
                other = self._group(site, classes, chunks, Part(members, chunk, level))
                found.setdefault(other.shape.quota, other)
        found.pop(group.shape.quota, None)
        few = sorted(found.values(), key=lambda other: abs(math.log(other.passes / group.passes)))
        finer = [other for other in few if other.passes > group.passes]
        coarser = [other for other in few if other.passes <= group.passes]
        return finer[:MOST_VARIANTS:2] + coarser[:1] + finer[1:MOST_VARIANTS:2]

    def arrange_paced(
        self, site: Site, classes: tuple[TaskClass, ...], solo_s: Sequence[float]
    ) -> CostedArrangement | None:
        """Promised tasks in hTasks of their own, together or each by itself."""
        if self.fusion != "planned" or site.replica.pp > 1:
            return None
        promised = [i for i, task in enumerate(classes) if task.max_slowdown]
        free = [i for i, task in enumerate(classes) if not task.max_slowdown]
        least_s = self._least_s(classes, solo_s)
        resident = self.resident_bytes(site, classes)
        best: tuple[list[Group], Turns] | None = None
        for split in ([promised], [[i] for i in promised]):
            subsets = [subset for subset in (*split, free) if subset]
            groups = self._groups_of(site, classes, subsets, resident) or []
            turns = paced_turns([_demand(group, least_s) for group in groups])
            if turns is not None and (best is None or turns.step_time_s < best[1].step_time_s):
                best = groups, turns
        return None if best is None else self._costed(site, *best, resident)

    def _groups_of(
        self,
        site: Site,
        classes: tuple[TaskClass, ...],
        subsets: Sequence[Sequence[int]],
        resident: int,
    ) -> list[Group] | None:
        """Each subset of the tasks arranged by itself; None where one does not fit."""
        limit = site.free_bytes(resident)
        groups = []
        for subset in subsets:
            chosen = tuple([unpromised(classes[i]) for i in subset])
            found = self._searched_for(site, chosen, math.inf)
            if found is None or max(group.need_bytes for group in found) > limit:
                found = self._searched_for(site, chosen, limit)
            if found is None:
                return None
            groups += [group.over(subset) for group in found]
        return groups

    def _searched_for(
        self, site: Site, classes: tuple[TaskClass, ...], limit: float
    ) -> list[Group] | None:
        key = (site, limit, classes)
        if key not in self._searched:
            if len(self._searched) >= MEMO_GROUPS:
                self._searched.clear()
            chunks = self.chunk_lengths(classes)
            self._searched[key] = self._search(site, classes, chunks, limit)
        return self._searched[key]

    def forget_plans(self) -> None:
        super().forget_plans()
        memos = (
            self._groups,
            self._searched,
            self._carried_groups,
            self._made,
            self._group_times,
            self._choices,
        )
        for memo in memos:
            memo.clear()

    def orchestrate(self, site: Site, answer: Answer) -> Answer:
        """An order of subgraphs, where a replica has several GPUs and all turns are counted."""
        if not self.orchestration:
            return answer._replace(interleaves=False)
        counts = answer.costed.arrangement.counts
        if site.replica.num_gpus == 1 or None in counts:
            return answer
        plan = bind(nameless(site), answer.names, answer, None)
        model = self.cost(site)
        limits, answer = _in_flight(model, site, plan, answer)
        if limits is None:
            return answer
        times = model.subgraph_times_s(plan)
        contention = Contention(*times.contention)
        found, _ = ordered(plan, [times], [limits], ORDER_SEARCH, contention)
        return answer._replace(order=found.order)

    def settle(
        self, instance: InstanceView, plan: Plan, answer: Answer, previous: Plan | None
    ) -> Plan:
        """Keeps the running plan where the gain does not pay for the transition."""
        if previous is None or not self.hysteresis or not previous.htasks:
            return plan
        if not self._capture_s(site_of(instance), answer):
            return plan
        choice, kept = self._choice(instance, plan, answer, previous)
        if choice is None:
            return plan
        verdict = weigh(
            choice, horizons_s(instance, plan), forgone_s(previous.predicted, instance.now_ns)
        )
        if not verdict.keeps:
            return plan
        kept = kept or self._kept(instance, previous, plan.epoch)
        if kept is None:
            return plan
        predicted = kept.predicted._replace(
            forgone_s=verdict.forgone_s, forgone_share=choice.gain_share, kept_ns=instance.now_ns
        )
        return kept._replace(reason=reason(verdict, plan.reason), predicted=predicted)

    def _choice(
        self, instance: InstanceView, plan: Plan, answer: Answer, previous: Plan
    ) -> tuple[Choice | None, Plan | None]:
        """What keeping would mean; None where there is nothing to keep. It depends on the classes
        of tasks in each running hTask and on what would replace them, so it is remembered. Then the
        kept plan, where it was made on the way."""
        keys = {task.task_id: self._key_of(task) for task in instance.tasks}
        held = [
            (id(htask.shapes), tuple(sorted([(keys[name], quota)
             for name, quota in htask.quota.items() if name in keys])))
            for htask in previous.htasks
        ]  # fmt: skip
        key = (id(answer), site_of(instance), tuple(held))
        known = self._choices.get(key)
        if known is None:
            if len(self._choices) >= MEMO_GROUPS:
                self._choices.clear()
            # The entry keeps alive what it is known by.
            running = tuple([htask.shapes for htask in previous.htasks])
            kept = self._kept(instance, previous, plan.epoch)
            choice = None if kept is None else self._choice_of(instance, plan, previous, kept)
            self._choices[key] = answer, running, choice
            return choice, kept
        return known[2], None

    def _choice_of(self, instance: InstanceView, plan: Plan, previous: Plan, kept: Plan) -> Choice:
        model = self.cost(site_of(instance))
        cost_s = model.transition_s(previous, plan).value
        cost_s -= model.transition_s(previous, kept).value
        steps_s = (kept.predicted.tasks_step_time_s, plan.predicted.tasks_step_time_s)
        return Choice(*steps_s, cost_s)

    def plan_kept(self, instance: InstanceView, previous: Plan | None) -> Plan | None:
        if previous is None or not previous.htasks:
            return None
        kept = self._kept(instance, previous, previous.epoch + 1)
        return kept and kept._replace(reason="kept, so that every promise is: " + kept.reason)

    def _capture_s(self, site: Site, answer: Answer) -> float:
        """Preparing all shapes of an answer; 0 spares looking any further."""
        known = self._captures.get(id(answer))
        if known is None or known[0] is not answer:
            groups = answer.costed.arrangement.groups
            shapes = dict.fromkeys(shape for group in groups for shape in group.shapes)
            model = self.cost(site)
            total_s = sum(model.capture_s(shape, site.replica).value for shape in shapes)
            known = self._captures[id(answer)] = (answer, total_s)
        return known[1]

    def _kept(self, instance: InstanceView, previous: Plan, epoch: int) -> Plan | None:
        """The running hTasks without those who left, and one more for those who came."""
        site = site_of(instance)
        if site.replica.pp == 1 and any(turn.count is None for turn in previous.round):
            return None
        views = sorted(instance.tasks, key=lambda task: task.task_id)
        ids = [task.task_id for task in views]
        classes = tuple([self.class_of_view(task) for task in views])
        htasks = carried_htasks(instance, previous)
        groups = [self._carried(site, classes, ids, htask) for htask in htasks]
        came = [i for i, name in enumerate(ids) if name not in previous.predicted.step_time_s]
        resident = self.resident_bytes(site, classes)
        added = self._groups_of(site, classes, [came], resident) if came else []
        if added is None or not htasks:
            return None
        groups += added
        answer = self._kept_answer(site, classes, groups, resident)
        if answer is None:
            return None
        plan = bind(instance, tuple(ids), answer, None)
        return plan._replace(epoch=epoch, htasks=(*htasks, *plan.htasks[len(htasks) :]))

    def _kept_answer(
        self, site: Site, classes: tuple[TaskClass, ...], groups: list[Group], resident: int
    ) -> Answer | None:
        """These hTasks in turns that keep every promise; None where they do not fit."""
        solo = tuple(of_each(classes, lambda task: self.solo_step_time_s(site, task)))
        turns: Turns | None = _turns(groups, site)
        for paced in (False, True):
            if paced:
                least_s = self._least_s(classes, solo)
                turns = paced_turns([_demand(group, least_s) for group in groups])
            if turns is None:
                return None
            costed = self._costed(site, groups, turns, resident)
            if costed.peak_bytes > site.memory_limit_bytes:
                return None
            several = site.replica.num_gpus > 1
            answer = self._finished(site, costed, solo) if several else answer_of(costed, solo)
            if not refuse_slow(classes, answer.step_times_s, solo, self.promise_margin):
                return answer
        return None

    def _least_s(self, classes: Sequence[TaskClass], solo_s: Sequence[float]) -> list[float]:
        """The longest step that is planned for each task, 0 where nothing was promised."""
        return [
            planned_slowdown(task, self.promise_margin) * alone
            for task, alone in zip(classes, solo_s, strict=True)
        ]

    def _carried(
        self, site: Site, classes: Sequence[TaskClass], ids: Sequence[str], htask: HTask
    ) -> Group:
        """A running hTask, some of whose slots may be empty. Its cost is that of the classes and
        quotas in it; which slots they have makes no difference."""
        at = {name: i for i, name in enumerate(ids)}
        if len(htask.quota) == len(htask.shapes[-1].slots):
            return self._intact(site, classes, at, htask)
        members = sorted((self._keys[classes[at[n]]], q, at[n]) for n, q in htask.quota.items())
        key = (id(htask.shapes), site, tuple([(kind, quota) for kind, quota, _ in members]))
        known = self._carried_groups.get(key)
        if known is None:
            if len(self._carried_groups) >= MEMO_GROUPS:
                self._carried_groups.clear()
            chosen = [(classes[i], quota) for _, quota, i in members]
            slots = [htask.slot_of[ids[i]] for _, _, i in members]
            # The entry keeps the shapes alive, so that their id stays theirs.
            known = htask.shapes, self._carried_group(site, htask.shapes, chosen, slots)
            self._carried_groups[key] = known
        return known[1].over([i for _, _, i in members])

    def _intact(
        self, site: Site, classes: Sequence[TaskClass], at: Mapping[str, int], htask: HTask
    ) -> Group:
        """A running hTask that nobody left, known by the shapes that it was made with."""
        names = sorted(htask.quota, key=htask.slot_of.__getitem__)
        members = [at[name] for name in names]
        key = (id(htask.shapes), site.time_percent)
        known = self._made.get(key)
        if known is None:
            chosen = [
                (classes[i], htask.quota[name]) for name, i in zip(names, members, strict=True)
            ]
            group = self._carried_group(site, htask.shapes, chosen, range(len(chosen)))
            known = self._remember_made(site, htask.shapes, group)
        return known[1].over(members)

    def _remember_made(
        self, site: Site, shapes: tuple[ShapeKey, ...], group: Group
    ) -> tuple[tuple[ShapeKey, ...], Group]:
        if len(self._made) >= MEMO_GROUPS:
            self._made.clear()
        made = self._made[id(shapes), site.time_percent] = shapes, group
        return made

    def _carried_group(
        self,
        site: Site,
        shapes: tuple[ShapeKey, ...],
        chosen: Sequence[tuple[TaskClass, int]],
        slots: Sequence[int],
    ) -> Group:
        chunk, quota = shapes[0].chunk_tokens, tuple(n for _, n in chosen)
        loads = [self.load(task, chunk, n, PackRule.CHUNK) for task, n in chosen]
        fill = Fill.of([load.chunk_shares for load in loads], sum(quota))
        shares = fill.shares_of([shape.num_chunks for shape in shapes])
        shape = GroupShape(tuple(range(len(chosen))), quota, shapes, PackRule.CHUNK)
        cost = group_cost(shape, loads, self.cost(site), site, shares, slots)
        need = self.cost(site).pass_bytes(shapes[-1], site.replica)
        return Group(shape, cost, max(cost.passes_per_step), need)

    # -- candidates

    def _search(
        self,
        site: Site,
        classes: tuple[TaskClass, ...],
        chunks: tuple[int, ...],
        limit: float,
        fusion: str = "",
    ) -> list[Group] | None:
        """The dynamic program's groups; again with less memory where exact bytes exceed it."""
        slots = [task.slot for task in classes]
        num_shapes = self.num_shapes(site, slots[0])
        tables = of_each(classes, lambda task: self._class_table(task, chunks, num_shapes))
        for allowed in (limit, limit * SPARE_MEMORY, limit * SPARE_MEMORY**2):
            rules = Rules(allowed, num_shapes, fusion or self.fusion, site.replica.pp)
            found = split_tasks(
                tables, slots, self._pass_tables(site, chunks), rules, self._group_times
            )
            partitions = [
                [self._group(site, classes, chunks, part) for part in parts] for parts in found
            ]
            fitting = [p for p in partitions if all(group.need_bytes <= limit for group in p)]
            if fitting:
                return min(
                    fitting, key=lambda groups: _turns(groups, site, self.orchestration).step_time_s
                )
            if not found:
                return None
        return None

    def _class_table(self, task: TaskClass, chunks: tuple[int, ...], num_shapes: int) -> ClassTable:
        key = (task, chunks, num_shapes)
        found = self._class_tables.get(key)
        if found is None:
            curves = tuple(self.curve(task, chunk) for chunk in chunks)
            found = self._class_tables[key] = ClassTable.of(curves, num_shapes)
        return found

    def _pass_tables(self, site: Site, chunks: tuple[int, ...]) -> PassTables:
        key = (site.model, site.device, site.replica, chunks)
        if key not in self._tables:
            self._tables[key] = PassTables(self.cost(site), site.replica, chunks)
        return self._tables[key]

    def num_shapes(self, site: Site, slot: AdapterSlot) -> int:
        """Shapes of an hTask's ladder, at most."""
        if self.max_shapes:
            return self.max_shapes
        key = (site.model, site.device, site.replica)
        if key not in self._num_shapes:
            probe = ShapeKey(self.tile_tokens, 1, (slot,))
            costly = self.cost(site).capture_s(probe, site.replica).value > 0
            self._num_shapes[key] = COSTLY_SHAPES if costly else FREE_SHAPES
        return self._num_shapes[key]

    def chunk_lengths(self, classes: Sequence[TaskClass]) -> tuple[int, ...]:
        """Candidates: the row tile, doubled until the longest sequence fits in one chunk."""
        if self.chunk_tokens:
            return (self.chunk_tokens,)
        longest = max(self.longest_tokens(task) for task in classes)
        doublings = max(0, (-(-longest // self.tile_tokens) - 1).bit_length())
        if self.alignment == "pack":
            return (self.tile_tokens << doublings,)
        return tuple(self.tile_tokens << i for i in range(doublings + 1))

    def curve(self, task: TaskClass, chunk: int) -> Curve:
        """A class's load by quota, from the smallest that holds its longest sequence to the one
        that takes a whole step in one micro-batch, thinned geometrically."""
        found = self._curves.get((task, chunk))
        if found is None:
            found = self._curves[task, chunk] = Curve.of(tuple(self._points(task, chunk)))
        return found

    def _points(self, task: TaskClass, chunk: int) -> Iterator[tuple[int, ExpectedLoad]]:
        quota = math.ceil(self.longest_tokens(task) / chunk)
        while True:
            load = self.load(task, chunk, quota, PackRule.CHUNK)
            yield quota, load
            if load.micro_batches_per_step <= 1.0:
                return
            quota += max(1, quota // 8)

    # -- exact cost of what was chosen

    def _group(
        self, site: Site, classes: Sequence[TaskClass], chunks: tuple[int, ...], part: Part
    ) -> Group:
        chosen = tuple([classes[i] for i in part.members])
        key = (site.model, site.device, site.replica, site.time_percent, chunks[part.chunk],
               part.level, chosen)  # fmt: skip
        found = self._groups.get(key)
        if found is None:
            if len(self._groups) >= MEMO_GROUPS:
                self._groups.clear()
            found = self._groups[key] = self._new_group(site, chosen, chunks[part.chunk], part)
        return found.over(part.members)

    def _new_group(
        self, site: Site, classes: tuple[TaskClass, ...], chunk: int, part: Part
    ) -> Group:
        points = [self.curve(task, chunk).at_level(part.level) for task in classes]
        quota, loads = zip(*points, strict=True)
        slots = tuple([task.slot for task in classes])
        fill = Fill.of([load.chunk_shares for load in loads], sum(quota))
        sizes = fill.ladder(self.num_shapes(site, slots[0]))
        shapes = tuple(ShapeKey(chunk, size, slots) for size in sizes)
        shape = GroupShape(tuple(range(len(classes))), quota, shapes, PackRule.CHUNK)
        model = self.cost(site)
        cost = group_cost(shape, loads, model, site, fill.shares_of(sizes))
        need = model.pass_bytes(shapes[-1], site.replica)
        group = Group(shape, cost, max(cost.passes_per_step), need)
        self._remember_made(site, shapes, group)
        return group

    def _smallest(
        self, site: Site, classes: tuple[TaskClass, ...], chunks: tuple[int, ...]
    ) -> list[Group]:
        """Every task by itself in its smallest micro-batches: fits if anything fits."""
        level, answers = len(LEVELS) - 1, []
        for chunk in range(len(chunks)):
            parts = [Part((member,), chunk, level) for member in range(len(classes))]
            answers.append([self._group(site, classes, chunks, part) for part in parts])
        return min(answers, key=lambda groups: max(group.need_bytes for group in groups))

    def _costed(
        self, site: Site, groups: list[Group], turns: Turns, resident: int
    ) -> CostedArrangement:
        peak = resident + max(group.need_bytes for group in groups)
        sizes = " + ".join(str(len(group.shape.members)) for group in groups)
        lengths = sorted({group.shape.shapes[0].chunk_tokens for group in groups})
        chunks = " and ".join(map(str, lengths))
        reason = f"{len(groups)} hTask(s) of {sizes} task(s), chunks of {chunks} tokens"
        return CostedArrangement(
            Arrangement(tuple(group.shape for group in groups), turns.counts, reason),
            tuple(group.cost for group in groups),
            turns.passes,
            turns.round_time_s,
            site.corrected_bytes(peak),
        )


def unpromised(task: TaskClass) -> TaskClass:
    return task._replace(max_slowdown=0.0) if task.max_slowdown else task


def _in_flight(
    model: CostModel, site: Site, plan: Plan, answer: Answer
) -> tuple[InFlightLimits | None, Answer]:
    """What an order may hold on each stage: the micro-batches that ``pass_bytes`` counts. Without
    stages tensor parallelism overlaps two of them, where the memory for a second one is there; the
    answer's peak then says so. None where it is not, so that nothing can overlap."""
    held = held_bytes(model, plan)
    if site.replica.pp > 1:
        return pipeline_limits(held, site.replica.pp), answer
    costed = answer.costed
    peak = costed.peak_bytes + site.corrected_bytes(max(row[0] for row in held))
    if peak > site.memory_limit_bytes:
        return None, answer
    estimate = Estimate(float(peak), float(peak), float(peak))
    prediction = answer.prediction._replace(peak_memory_bytes=estimate)
    answer = answer._replace(costed=costed._replace(peak_bytes=peak), prediction=prediction)
    return pipeline_limits(held, 1, spare=1.0), answer


def _contention(model: CostModel, site: Site) -> Contention:
    return Contention(*model.subgraph_times_s(plan_of(site.replica, ())).contention)


def _turns(
    groups: Sequence[Group], site: Site, interleaves: bool = True, counted: bool | None = None
) -> Turns:
    """``counted``: in a pipeline, one micro-batch of each a round or not; None: as seems best."""
    passes = tuple([group.passes for group in groups])
    pass_times_s = tuple([group.cost.pass_time_s for group in groups])
    return round_of(passes, pass_times_s, site.replica.pp, interleaves, counted)


def _demand(group: Group, least_s: Sequence[float]) -> Demand:
    """``least_s``: the longest step that each task was promised, 0 where none was."""
    pairs = zip(group.cost.passes_per_step, group.shape.members, strict=True)
    rates = [n / least_s[i] for n, i in pairs if least_s[i]]
    return Demand(group.cost.pass_time_s, group.passes, max(rates, default=0.0))


def one_of(field: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(field, f"unknown '{value}'", f"choose one of: {', '.join(known)}")
