"""The periodic template: valid for any problem, near the bound, and what its times mean."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muxtune.cost.shapes import model_shape
from muxtune.cost.subgraphs import StageSeconds, SubgraphOptions, pass_subgraphs
from muxtune.errors import ConfigError
from muxtune.planning.orchestration import (
    NO_CONTENTION,
    Contention,
    DispatchOptions,
    RoundGraph,
    RoundProblem,
    TemplateOptions,
    Timeline,
    bound_ratio,
    bubble_account,
    checked_sequences,
    contended_bound_ns,
    dispatch,
    lorapp,
    one_f_one_b,
    ordered,
    periodic_template,
    pipeline_limits,
    play,
    play_contended,
    round_bounds,
    schedule_spans,
)
from muxtune.planning.orchestration.dispatch import RULES
from muxtune.types import (
    DispatchRule,
    HTaskTurn,
    Plan,
    Prediction,
    RankStream,
    ReplicaShape,
    ShapeKey,
    SubgraphKind,
    SubgraphTimes,
)

MODEL = model_shape("smollm2-135m")  # 30 layers; divides by tp 1 and 3
QUICK = TemplateOptions(evaluations=8)
# Two H200 over 18 NVLinks: a 4096 x 5120 x 6912 linear, an all-reduce of 4096 x 5120 bf16, both at
# once: 0.377, 0.180 and 0.520 ms, of which communication is assumed to be slowed down by 1.25.
NVLINK_H200 = Contention(2.744, 1.25)


class Table:
    """Costs in whole microseconds for one hTask."""

    def __init__(
        self, compute_us: int, optimizer_us: int = 0, p2p_us: int = 0, all_reduce_us: int = 0
    ) -> None:
        self.compute_us, self.optimizer_us = compute_us, optimizer_us
        self.p2p_us, self.all_reduce_us = p2p_us, all_reduce_us

    def stage_seconds(self, shape, replica, stage, backward) -> StageSeconds:
        compute_s, exchange_s = self.compute_us * 1e-6, self.all_reduce_us * 1e-6
        return StageSeconds(compute_s, 0.0, exchange_s, 0.0, self.p2p_us * 1e-6)

    def optimizer_s(self, shape, replica, stage) -> float:
        return self.optimizer_us * 1e-6

    def message_s(self, num_bytes: int) -> float:
        return 0.5e-6 * self.p2p_us


def problem_of(
    tables: list[Table], counts: list[int], replica: ReplicaShape, groups: int = 2
) -> RoundProblem:
    shape = ShapeKey(64, 1, ())
    options = SubgraphOptions(groups_per_stage=groups)
    rows = [pass_subgraphs(MODEL, shape, replica, table, options) for table in tables]
    return RoundProblem(
        tuple(graph for graph, _ in rows),
        tuple(tuple(round(seconds * 1e9) for seconds in times) for _, times in rows),
        tuple(HTaskTurn(index, count) for index, count in enumerate(counts)),
        replica.pp,
        replica.tp,
    )


@st.composite
def problems(draw) -> RoundProblem:
    replica = ReplicaShape(draw(st.sampled_from([1, 1, 3])), draw(st.integers(1, 4)))
    num_htasks = draw(st.integers(1, 5))
    small = st.integers(0, 30)
    tables = [
        Table(draw(st.integers(0, 200)), draw(small), draw(small), draw(small))
        for _ in range(num_htasks)
    ]
    counts = [draw(st.integers(1, 3)) for _ in range(num_htasks)]
    problem = problem_of(tables, counts, replica, groups=draw(st.integers(1, 2)))
    if draw(st.booleans()):
        units = tuple((draw(st.integers(1, 4)),) * replica.pp for _ in range(num_htasks))
        most = max(row[0] for row in units)
        capacity = tuple(most + draw(st.integers(0, 6)) for _ in range(replica.pp))
        problem = problem._replace(activation_units=units, capacity_units=capacity)
    return problem


def assert_valid(timeline: Timeline, *, contended: bool = False) -> None:
    """Checked from the times alone, without the player's own edges."""
    graph, start, end = timeline.graph, timeline.start_ns, timeline.end_ns
    if not contended:
        assert (end - start == np.array(graph.duration_ns)).all()
    for op, item in enumerate(graph.subgraphs):
        first = graph.first_op[graph.visit_of[op]]
        for before in item.depends_on:
            assert (end[:, first + before] <= start[:, op]).all()
    assert_streams_do_one_thing(timeline)
    assert_steps_close(timeline)
    assert_memory(timeline)


def assert_streams_do_one_thing(timeline: Timeline) -> None:
    streams = np.array(timeline.graph.stream_of)
    for stream in range(timeline.graph.num_streams):
        starts = timeline.start_ns[:, streams == stream].ravel()
        ends = timeline.end_ns[:, streams == stream].ravel()
        order = np.lexsort((ends, starts))
        assert (ends[order][:-1] <= starts[order][1:]).all()


def assert_steps_close(timeline: Timeline) -> None:
    """Every micro-batch closes a step, so the next enters a stage after the optimizer there."""
    graph = timeline.graph
    for visits in graph.visits_of:
        for stage in range(graph.num_stages):
            ended = -1
            for at in range(timeline.rounds):
                for visit in visits:
                    ops = [
                        op for op in range(graph.num_ops)
                        if graph.visit_of[op] == visit and graph.stage_of[op] == stage
                        and graph.subgraphs[op].kind is not SubgraphKind.P2P
                    ]  # fmt: skip
                    assert timeline.start_ns[at, ops].min() >= ended
                    ended = timeline.end_ns[at, ops].max()


def assert_memory(timeline: Timeline) -> None:
    graph = timeline.graph
    kinds = (SubgraphKind.COMPUTE, SubgraphKind.ADAPTER)
    for stage, capacity in enumerate(graph.problem.capacity_units):
        changes: Counter[tuple[int, int]] = Counter()
        for visit in range(len(graph.visits)):
            ops = [
                op for op in range(graph.num_ops) if graph.visit_of[op] == visit
                and graph.stage_of[op] == stage and graph.subgraphs[op].kind in kinds
            ]  # fmt: skip
            for at in range(timeline.rounds):
                begin = int(timeline.start_ns[at, ops].min())
                until = int(timeline.end_ns[at, ops].max())
                if until > begin:
                    changes[until, 0] -= graph.units(visit, stage)
                    changes[begin, 1] += graph.units(visit, stage)
        held = 0
        for key in sorted(changes):
            held += changes[key]
            assert held <= capacity


@settings(max_examples=60, deadline=None)
@given(problems())
def test_every_template_is_valid(problem: RoundProblem):
    template = periodic_template(problem, QUICK)
    rounds, graph = 5, RoundGraph(problem)
    rank_0 = [row for key, row in template.order.items() if key.tp_rank == 0]
    refs = Counter(ref[:3] for row in rank_0 for ref in row)
    assert len(refs) == graph.num_ops
    assert set(refs.values()) == {1}
    played = play(template.order, problem, rounds)
    assert_valid(played)
    bounds = round_bounds(played.graph)
    assert template.period_ns >= bounds.trivial_ns - 1
    assert played.makespan_ns >= rounds * bounds.busiest_stream_ns


@settings(max_examples=40, deadline=None)
@given(problems(), st.data())
def test_an_order_outlives_its_predicted_times(problem: RoundProblem, data):
    order = periodic_template(problem, QUICK).order
    factors = st.integers(0, 5)
    other = tuple(
        tuple(duration * data.draw(factors) for duration in row) for row in problem.durations_ns
    )
    assert_valid(play(order, problem._replace(durations_ns=other), 4))


@settings(max_examples=40, deadline=None)
@given(problems())
def test_contended_player_equals_player_without_contention(problem: RoundProblem):
    order = periodic_template(problem, QUICK).order
    played = play(order, problem, 4)
    graph = RoundGraph(problem)
    sequences = checked_sequences(graph, order)
    contended = play_contended(graph, sequences, 4, NO_CONTENTION)
    assert (contended.start_ns == played.start_ns).all()
    assert (contended.end_ns == played.end_ns).all()
    slower = play_contended(graph, sequences, 4, NVLINK_H200)
    assert_valid(slower, contended=True)
    assert (slower.end_ns - slower.start_ns >= np.array(graph.duration_ns)).all()


@settings(max_examples=40, deadline=None)
@given(problems(), st.booleans(), st.sampled_from(RULES))
def test_every_dispatch_is_valid(problem: RoundProblem, strict: bool, rule: str):
    graph = RoundGraph(problem)
    last_first = reversed(graph.visits_of)
    injection = tuple(visit for visits in last_first for visit in visits)
    assert_valid(dispatch(graph, DispatchOptions(injection, rule, strict), 3))


def test_equal_tasks_meet_the_bound_with_the_memory_of_1f1b():
    problem = problem_of([Table(100)] * 8, [1] * 8, ReplicaShape(1, 4))
    problem = problem.with_in_flight_limit([4, 3, 2, 1])
    template = periodic_template(problem)
    assert template.period_ns == 8 * 200_000
    played = play(template.order, problem, 50)
    account = bubble_account(played)
    assert account.steady_bubble == 0
    assert account.stalls == 0
    assert account.busy + account.idle == pytest.approx(1)
    # Fill and drain: 3 forward and 3 backward passes, once.
    assert played.makespan_ns == 50 * 1_600_000 + 6 * 100_000


def test_one_htask_on_four_stages_waits_for_itself():
    problem = problem_of([Table(100)], [1], ReplicaShape(1, 4))
    template = periodic_template(problem)
    assert template.period_ns == 800_000 == template.bounds.critical_path_ns
    assert bubble_account(play(template.order, problem, 10)).steady_bubble == pytest.approx(0.75)


def test_one_htask_on_one_stage():
    problem = problem_of([Table(100, optimizer_us=7)], [2], ReplicaShape())
    template = periodic_template(problem)
    assert template.period_ns == 2 * 207_000
    assert template.ratio == 1


def test_unequal_tasks_beat_both_baselines():
    sizes = [200, 30, 40, 100, 70, 50, 150, 60]
    tables = [Table(size, optimizer_us=1, p2p_us=2) for size in sizes]
    problem = problem_of(tables, [1] * 8, ReplicaShape(1, 4))
    units = tuple((size,) * 4 for size in sizes)
    limited = problem._replace(activation_units=units, capacity_units=(900, 700, 500, 300))
    template = periodic_template(limited)
    assert bound_ratio(play(template.order, limited, 50)) < 1.05
    assert bound_ratio(lorapp(problem, 50, concurrency=4)) > 1.2
    assert bound_ratio(play(one_f_one_b(problem), problem, 50)) > 3


def test_one_all_reduce_hides_behind_another_tasks_compute():
    tables = [Table(300, all_reduce_us=120), Table(300, all_reduce_us=120)]
    problem = problem_of(tables, [1, 1], ReplicaShape(3, 1), groups=10)
    alone = periodic_template(problem.with_in_flight_limit([1]))
    together = periodic_template(problem)
    # 600 compute, 240 all-reduces; the last one of 6 needs no activations, so it may overlap.
    assert alone.period_ns == 2 * (840_000 - 6_000)
    assert together.ratio < 1.02


def test_every_htask_begins_in_the_first_pass():
    """Two of three keep the link busy, so list scheduling lets the third wait for five rounds."""
    problem = problem_of([Table(300, all_reduce_us=400)] * 3, [1] * 3, ReplicaShape(3, 1))
    template = periodic_template(problem, QUICK)
    refs = [ref for row in template.order.values() for ref in row]
    assert template.period_ns == 2_400_000  # of all-reduces
    for turn in range(3):
        assert min(ref.round_offset for ref in refs if ref.turn == turn) == 0
    assert max(ref.round_offset for ref in refs) <= 1


def test_contention_is_weighed_by_the_search():
    tables = [Table(300, all_reduce_us=120), Table(300, all_reduce_us=120)]
    problem = problem_of(tables, [1, 1], ReplicaShape(3, 1), groups=10)
    template = periodic_template(problem, QUICK, NVLINK_H200)
    bound = contended_bound_ns(RoundGraph(problem), NVLINK_H200)
    assert bound <= template.period_ns + 1
    assert template.period_ns <= 1.03 * bound
    assert bound > 1.2 * template.bounds.trivial_ns


def test_all_ranks_get_one_order():
    order = periodic_template(problem_of([Table(10)] * 2, [1, 1], ReplicaShape(3, 2)), QUICK).order
    assert len(order) == 2 * 3 * 2
    first = order[RankStream(0, 1, 0, "comm")]
    assert order[RankStream(0, 1, 2, "comm")] is first
    assert min(ref.round_offset for ref in first) == 0


def test_the_same_seed_gives_the_same_order():
    problem = problem_of([Table(n) for n in (10, 70, 35)], [2, 1, 1], ReplicaShape(1, 3))
    problem = problem.with_in_flight_limit([3, 2, 1])
    assert periodic_template(problem).order == periodic_template(problem).order


def test_bad_options_and_problems_are_refused():
    problem = problem_of([Table(10)], [1], ReplicaShape(1, 2))
    with pytest.raises(ConfigError, match="rounds"):
        play(periodic_template(problem).order, problem, 0)
    with pytest.raises(ConfigError, match="injection"):
        dispatch(RoundGraph(problem), DispatchOptions((0, 0)), 2)
    two = RoundGraph(problem._replace(turns=(HTaskTurn(0, 2),)))
    with pytest.raises(ConfigError, match="overtakes"):
        dispatch(two, DispatchOptions((1, 0)), 2)
    with pytest.raises(ConfigError, match="rule"):
        dispatch(RoundGraph(problem), DispatchOptions((0,), "random"), 2)
    with pytest.raises(ConfigError, match="one per stage"):
        periodic_template(problem._replace(activation_units=((1, 1),), capacity_units=(1,)))


def test_spans_tell_where_each_subgraph_ran():
    problem = problem_of([Table(10, 1, 1)] * 2, [1, 2], ReplicaShape(1, 2))
    played = play(periodic_template(problem).order, problem, 3)
    spans = list(schedule_spans(played, ["a", "b"]))
    assert sum(span.duration_ns for span in spans) == 3 * sum(played.graph.duration_ns)
    assert {span.htask_name for span in spans} == {"a", "b"}
    assert {(span.stage, span.stream) for span in spans} == {
        (0, "compute"), (0, "comm"), (1, "compute"), (1, "comm"),
    }  # fmt: skip
    assert [span.start_ns for span in spans] == sorted(span.start_ns for span in spans)


def test_a_plan_gets_an_order_for_every_replica():
    replicas = (ReplicaShape(1, 2), ReplicaShape(3, 1))
    tables = [Table(50, 1, 1, 10), Table(20, 1, 1, 10), Table(30, 1, 1, 10)]
    problems_of = [problem_of(tables, [1, 2, 1], replica) for replica in replicas]
    plan = Plan(
        "i", 0, frozenset(), replicas, (), problems_of[0].turns, DispatchRule.BALANCED,
        Prediction(None, 0, 0, None, {}, {}, {}, 0), {},  # type: ignore[arg-type]
    )  # fmt: skip
    times = [
        SubgraphTimes(
            problem.graphs,
            tuple(tuple(n / 1e9 for n in row) for row in problem.durations_ns),
            False,
        )
        for problem in problems_of
    ]
    limits = [pipeline_limits([[50] * r.pp, [20] * r.pp, [30] * r.pp], r.pp, 1) for r in replicas]
    assert limits[0].capacity_units == (150, 100)
    done, templates = ordered(plan, times, limits, QUICK)
    assert {key.replica for key in done.order} == {0, 1}
    for index, problem in enumerate(problems_of):
        limited = problem._replace(**limits[index]._asdict())
        assert play(done.order, limited, 6, index).period_ns == templates[index].period_ns
    with pytest.raises(ConfigError, match="one per replica"):
        ordered(plan, times[:1])


def test_eight_random_tasks_on_four_stages_are_near_the_bound():
    chooser = random.Random(3)
    ratios, bubbles = [], []
    for _ in range(6):
        sizes = [chooser.choice([40, 60, 90, 130, 200]) for _ in range(8)]
        problem = problem_of([Table(n, 2, 2) for n in sizes], [1] * 8, ReplicaShape(1, 4))
        limits = pipeline_limits([[size] * 4 for size in sizes], 4, 0.5)
        problem = problem._replace(**limits._asdict())
        played = play(periodic_template(problem).order, problem, 50)
        ratios.append(bound_ratio(played))
        bubbles.append(bubble_account(played).steady_bubble)
    assert sum(ratios) / len(ratios) <= 1.05
    assert sum(bubbles) / len(bubbles) <= 0.05
