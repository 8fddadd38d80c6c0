"""Which replica trains which sequences of a step.

Balanced dispatch is a mixed-integer program. Groups i of p_i equal replicas, buckets j of B_j
sequences; of each bucket group i takes m_ij full micro-batches of b_ij sequences and at most one
of the remaining r_ij < b_ij:

    minimise T   subject to
    sum_i d_ij = B_j,   d_ij <= b_ij m_ij + r_ij                  every sequence has a place
    r_ij <= (b_ij - 1) y_ij,   m_ij <= B_j z_ij                   y, z: such micro-batches exist
    w_i >= time of each kind of micro-batch that exists           the longest
    sum_j [m_ij t_ij(b_ij) + f_ij y_ij + g_ij r_ij] / p_i + (PP_i - 1) w_i <= T
    PP_i w_i <= T

A micro-batch takes f_ij + g_ij times its sequences, so remainders are exact, not rounded. The
replicas of a group share its micro-batches as if these could be divided, so that the optimum is a
lower bound of every dispatch; ``fill`` then deals whole sequences out to single replicas, and
what it reaches is what is reported. Solved by HiGHS through ``scipy.optimize.milp``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from muxtune.errors import ConfigError
from muxtune.planning.lobra.buckets import Buckets
from muxtune.planning.lobra.replica_times import Configuration, ReplicaTimes, SequenceBatch


class ReplicaGroup(NamedTuple):
    """``count`` replicas of one configuration."""

    configuration: Configuration
    count: int

    @property
    def num_gpus(self) -> int:
        return self.configuration.num_gpus * self.count


class SolverOptions(NamedTuple):
    """Limits that do not depend on the speed of the machine, so that results repeat.

    ``relative_gap``: how far from the proven bound the program may stop. ``node_limit``: of its
    branch and bound; what it has found by then is used.
    """

    relative_gap: float = 0.005
    node_limit: int = 500


class Dispatch(NamedTuple):
    """``loads[group][bucket]``: whole sequences. ``slowest_s``: the time that they mean in the
    program, groups divisible. ``bound_s``: what the solver proved no loads can beat; 0 where
    nothing was optimised."""

    loads: tuple[tuple[int, ...], ...]
    slowest_s: float
    bound_s: float


class ReplicaLoad(NamedTuple):
    """What one replica trains in a step, in the order in which it does."""

    configuration: Configuration
    batches: tuple[SequenceBatch, ...]


class CostTables(NamedTuple):
    """Arrays [groups, buckets]: sequences of a full micro-batch (0: too long for the group), and
    fixed and per-sequence seconds of a micro-batch."""

    batch: np.ndarray
    fixed_s: np.ndarray
    per_sequence_s: np.ndarray

    @property
    def full_s(self) -> np.ndarray:
        return np.where(self.batch > 0, self.fixed_s + self.batch * self.per_sequence_s, np.inf)


def cost_tables(
    times: ReplicaTimes, configurations: Sequence[Configuration], lengths_tokens: Sequence[int]
) -> CostTables:
    shape = (len(configurations), len(lengths_tokens))
    batch, fixed_s, per_sequence_s = np.zeros(shape, int), np.zeros(shape), np.zeros(shape)
    for i, configuration in enumerate(configurations):
        for j, length in enumerate(lengths_tokens):
            batch[i, j] = configuration.batch_of(length)
            affine = times.affine_pass_s(configuration.shape, length)
            fixed_s[i, j], per_sequence_s[i, j] = affine
    return CostTables(batch, fixed_s, per_sequence_s)


# ----------------------------------------------------------------------------------- dispatch

_DEFAULTS = SolverOptions()


def dispatch_by_length(
    times: ReplicaTimes, groups: Sequence[ReplicaGroup], buckets: Buckets
) -> Dispatch:
    """Each bucket to the group with the least memory that holds it: its sequences are cheapest
    there, but nothing balances the groups. Raises ConfigError as ``dispatch_balanced`` does."""
    tables = cost_tables(times, [g.configuration for g in groups], buckets.lengths_tokens)
    _check_holds(groups, buckets, tables)
    memory = np.array([group.configuration.max_tokens for group in groups], float)
    per_gpu_s = tables.full_s / np.maximum(tables.batch, 1)
    per_gpu_s = per_gpu_s * np.array([[g.configuration.num_gpus] for g in groups])
    order = np.lexsort((per_gpu_s, np.where(tables.batch > 0, memory[:, None], np.inf)), axis=0)
    loads = np.zeros(tables.batch.shape, int)
    loads[order[0], np.arange(len(buckets.counts))] = buckets.counts
    return Dispatch(tuple(map(_row, loads)), shared_s(groups, tables, loads), 0.0)


def dispatch_balanced(
    times: ReplicaTimes,
    groups: Sequence[ReplicaGroup],
    buckets: Buckets,
    options: SolverOptions = _DEFAULTS,
) -> Dispatch:
    """The program of the module's docstring.

    Raises ConfigError when a bucket is longer than every group holds, naming both.
    """
    if len(groups) == 1:  # nothing to choose
        return dispatch_by_length(times, groups, buckets)
    found = dispatch_within(times, groups, buckets, np.inf, options)
    # No solution before the node limit: dispatch by length is sound, only not balanced.
    return found or dispatch_by_length(times, groups, buckets)


def dispatch_within(
    times: ReplicaTimes,
    groups: Sequence[ReplicaGroup],
    buckets: Buckets,
    most_s: float,
    options: SolverOptions = _DEFAULTS,
) -> Dispatch | None:
    """The same, or None when no dispatch takes at most ``most_s`` (or none was found)."""
    tables = cost_tables(times, [g.configuration for g in groups], buckets.lengths_tokens)
    _check_holds(groups, buckets, tables)
    program = _Program(groups, buckets, tables)
    found = milp(
        program.objective,
        constraints=program.constraints(),
        bounds=program.bounds(most_s),
        integrality=program.integrality(),
        options={"mip_rel_gap": options.relative_gap, "node_limit": options.node_limit},
    )
    if found.x is None:
        return None
    loads = np.rint(program.loads(found.x)).astype(int)
    bound_s = float(found.mip_dual_bound)
    return Dispatch(tuple(map(_row, loads)), shared_s(groups, tables, loads), bound_s)


def _row(values: np.ndarray) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def shared_s(groups: Sequence[ReplicaGroup], tables: CostTables, loads: np.ndarray) -> float:
    """Slowest group, its replicas sharing its micro-batches as if these could be divided."""
    return max(_group_s(group, tables, i, loads[i]) for i, group in enumerate(groups))


def _group_s(group: ReplicaGroup, tables: CostTables, row: int, loads: np.ndarray) -> float:
    used = loads > 0
    if not used.any():
        return 0.0
    batch, fixed, slope = (table[row, used] for table in tables)
    full, rest = np.divmod(loads[used], batch)
    full_s, rest_s = fixed + batch * slope, np.where(rest > 0, fixed + rest * slope, 0.0)
    longest_s = max(np.where(full > 0, full_s, 0.0).max(), rest_s.max())
    stages = group.configuration.shape.pp
    shared_s = (full * full_s + rest_s).sum() / group.count + (stages - 1) * longest_s
    return float(max(shared_s, stages * longest_s))


def _check_holds(groups: Sequence[ReplicaGroup], buckets: Buckets, tables: CostTables) -> None:
    if not groups or not buckets.lengths_tokens:
        raise ConfigError("dispatch", "no replicas or no sequences", "give at least one of each")
    held = (tables.batch > 0).any(axis=0)
    if not held.all():
        length = buckets.lengths_tokens[int(np.flatnonzero(~held)[-1])]
        most = max(group.configuration.max_tokens for group in groups)
        raise ConfigError(
            "lengths",
            f"a sequence of {length} tokens does not fit: the largest replica holds {most} tokens "
            "a micro-batch",
            "add a replica with more GPUs or cap the lengths",
        )


class _Program:
    """Columns: d, m, r, y, z of each (group, bucket), then w of each group, then T."""

    NUM_KINDS = 5

    def __init__(
        self, groups: Sequence[ReplicaGroup], buckets: Buckets, tables: CostTables
    ) -> None:
        self.groups, self.tables = groups, tables
        self.counts = np.array(buckets.counts)
        self.num_groups, self.num_buckets = tables.batch.shape
        self.cells = self.num_groups * self.num_buckets
        self.num_columns = self.NUM_KINDS * self.cells + self.num_groups + 1
        self.objective = np.zeros(self.num_columns)
        self.objective[-1] = 1.0
        self._entries: list[tuple[int, int, float]] = []
        self._low: list[float] = []

    def _column(self, kind: int, group: int, bucket: int) -> int:
        return kind * self.cells + group * self.num_buckets + bucket

    def loads(self, solution: np.ndarray) -> np.ndarray:
        return solution[: self.cells].reshape(self.num_groups, self.num_buckets)

    def integrality(self) -> np.ndarray:
        whole = np.ones(self.num_columns)
        whole[self.NUM_KINDS * self.cells :] = 0
        return whole

    def bounds(self, most_s: float) -> Bounds:
        batch, counts = self.tables.batch, np.broadcast_to(self.counts, self.tables.batch.shape)
        held = batch > 0
        most_full = np.where(held, -(-counts // np.maximum(batch, 1)), 0)
        rest = np.where(held, np.minimum(batch - 1, counts), 0)
        kinds = [np.where(held, counts, 0), most_full, rest, rest > 0, most_full > 0]
        high = np.full(self.num_columns, np.inf)
        high[: self.NUM_KINDS * self.cells] = np.concatenate([kind.ravel() for kind in kinds])
        high[-1] = most_s
        return Bounds(np.zeros_like(high), high)  # type: ignore[arg-type]

    def constraints(self) -> list[LinearConstraint]:
        self._entries, self._low = [], []
        for group in range(self.num_groups):
            for bucket in range(self.num_buckets):
                if self.tables.batch[group, bucket]:
                    self._add_cell(group, bucket)
            self._add_time(group)
        low = np.array(self._low)
        rest = _between(self._matrix(self._entries, len(low)), low, np.full(len(low), np.inf))
        return [self._all_dispatched(), rest]

    def _all_dispatched(self) -> LinearConstraint:
        entries = [
            (bucket, self._column(0, group, bucket), 1.0)
            for group in range(self.num_groups)
            for bucket in range(self.num_buckets)
        ]
        return _between(self._matrix(entries, self.num_buckets), self.counts, self.counts)

    def _matrix(self, entries: Sequence[tuple[int, int, float]], rows: int) -> csr_array:
        row, column, value = zip(*entries, strict=True)
        return csr_array((value, (row, column)), shape=(rows, self.num_columns))

    def _at_least(self, terms: Sequence[tuple[int, float]], low: float = 0.0) -> None:
        row = len(self._low)
        self._entries += [(row, column, value) for column, value in terms if value]
        self._low.append(low)

    def _add_cell(self, group: int, bucket: int) -> None:
        d, m, r, y, z = (self._column(kind, group, bucket) for kind in range(self.NUM_KINDS))
        batch = int(self.tables.batch[group, bucket])
        self._at_least([(m, batch), (r, 1.0), (d, -1.0)])
        self._at_least([(y, batch - 1.0), (r, -1.0)])
        if self.groups[group].num_gpus > self.groups[group].configuration.shape.tp:
            fixed, slope = self._affine(group, bucket)
            w = self.NUM_KINDS * self.cells + group
            most = float(-(-self.counts[bucket] // batch))
            self._at_least([(z, most), (m, -1.0)])
            self._at_least([(w, 1.0), (z, -(fixed + batch * slope))])
            self._at_least([(w, 1.0), (y, -fixed), (r, -slope)])

    def _add_time(self, group: int) -> None:
        count, stages = self.groups[group].count, self.groups[group].configuration.shape.pp
        longest = self.NUM_KINDS * self.cells + group
        terms = [(self.num_columns - 1, 1.0), (longest, 1.0 - stages)]
        for bucket in range(self.num_buckets):
            batch = int(self.tables.batch[group, bucket])
            if batch:
                fixed, slope = (value / count for value in self._affine(group, bucket))
                _, m, r, y, _ = (self._column(k, group, bucket) for k in range(self.NUM_KINDS))
                terms += [(m, -(fixed + batch * slope)), (r, -slope), (y, -fixed)]
        self._at_least(terms)
        self._at_least([(self.num_columns - 1, 1.0), (longest, -float(stages))])

    def _affine(self, group: int, bucket: int) -> tuple[float, float]:
        return (
            float(self.tables.fixed_s[group, bucket]),
            float(self.tables.per_sequence_s[group, bucket]),
        )


def _between(matrix: csr_array, low: np.ndarray, high: np.ndarray) -> LinearConstraint:
    return LinearConstraint(matrix, low, high)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------- fill


def fill(
    times: ReplicaTimes, groups: Sequence[ReplicaGroup], buckets: Buckets, dispatch: Dispatch
) -> list[ReplicaLoad]:
    """Deals each group's sequences out to its replicas, longest first, to the replica that then
    ends first: by single sequences, by full micro-batches, and evenly; the best of the three."""
    filled: list[ReplicaLoad] = []
    for group, loads in zip(groups, dispatch.loads, strict=True):
        dealer = _Dealer(times, group, buckets, loads)
        rules = (_whole,) if group.count == 1 else (_one, _full, _even)
        filled += min((dealer.deal(rule) for rule in rules), key=dealer.slowest_s)
    return filled


def dispatch_step(
    times: ReplicaTimes,
    groups: Sequence[ReplicaGroup],
    buckets: Buckets,
    options: SolverOptions = _DEFAULTS,
) -> list[ReplicaLoad]:
    """A step's loads: balanced, unless dealing whole sequences makes dispatch by length faster."""
    found = [
        fill(times, groups, buckets, dispatch)
        for dispatch in (
            dispatch_balanced(times, groups, buckets, options),
            dispatch_by_length(times, groups, buckets),
        )
    ]
    return min(found, key=lambda loads: slowest_s(times, loads))


Rule = Callable[[int, int, int], list[int]]  # (sequences, of a full micro-batch, replicas)


def _whole(count: int, batch: int, replicas: int) -> list[int]:
    return [count]


def _one(count: int, batch: int, replicas: int) -> list[int]:
    return [1] * count


def _full(count: int, batch: int, replicas: int) -> list[int]:
    return [batch] * (count // batch) + ([count % batch] if count % batch else [])


def _even(count: int, batch: int, replicas: int) -> list[int]:
    return _full(count, -(-count // replicas), replicas)


class _Dealer:
    """One group's sequences, dealt out to its replicas by a rule that says in which portions."""

    def __init__(
        self, times: ReplicaTimes, group: ReplicaGroup, buckets: Buckets, loads: Sequence[int]
    ) -> None:
        self.times, self.group = times, group
        rows = zip(buckets.lengths_tokens, loads, strict=True)
        self.loads = [(length, load) for length, load in reversed(list(rows)) if load]

    def deal(self, rule: Rule) -> list[ReplicaLoad]:
        group, busy_s = self.group, [0.0] * self.group.count
        rows: list[list[SequenceBatch]] = [[] for _ in busy_s]
        for length, load in self.loads:
            portions = rule(load, group.configuration.batch_of(length), group.count)
            held, busy_s = self._deal_bucket(length, portions, busy_s)
            for row, sequences in zip(rows, held, strict=True):
                row += _micro_batches(sequences, group.configuration.batch_of(length), length)
        return [ReplicaLoad(group.configuration, tuple(self._in_order(row))) for row in rows]

    def _deal_bucket(
        self, length: int, portions: Sequence[int], busy_s: Sequence[float]
    ) -> tuple[list[int], list[float]]:
        """Sequences that each replica gets, and how long it is then busy."""
        configuration = self.group.configuration
        batch = configuration.batch_of(length)
        fixed_s, slope_s = self.times.affine_pass_s(configuration.shape, length)
        held, ends_s = [0] * len(busy_s), list(busy_s)

        def end_s(replica: int, sequences: int) -> float:
            return busy_s[replica] - (-sequences // batch) * fixed_s + sequences * slope_s

        for portion in portions:
            after = [end_s(replica, sequences + portion) for replica, sequences in enumerate(held)]
            chosen = after.index(min(after))
            held[chosen] += portion
            ends_s[chosen] = after[chosen]
        return held, ends_s

    def _in_order(self, batches: Sequence[SequenceBatch]) -> list[SequenceBatch]:
        """Similar micro-batches after one another: a pipeline idles where they differ."""
        shape = self.group.configuration.shape
        return sorted(batches, key=lambda batch: (self.times.pass_s(shape, batch), batch))

    def slowest_s(self, loads: Sequence[ReplicaLoad]) -> float:
        return max(self.times.step_s(load.configuration.shape, load.batches) for load in loads)


def _micro_batches(sequences: int, batch: int, length: int) -> list[SequenceBatch]:
    full, rest = divmod(sequences, batch)
    batches = [SequenceBatch(batch, length)] * full
    return [*batches, SequenceBatch(rest, length)] if rest else batches


def slowest_s(times: ReplicaTimes, loads: Sequence[ReplicaLoad], played: bool = False) -> float:
    """Step time of a deployment: its slowest replica and the synchronisation of gradients.
    ``played``: by the pipeline player instead of in closed form."""
    seconds = times.played_s if played else times.step_s
    compute_s = max(seconds(load.configuration.shape, load.batches) for load in loads)
    return compute_s + times.sync_s([load.configuration.shape for load in loads])
