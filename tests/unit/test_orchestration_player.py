"""The player of an order: exact times of small cases, and what it refuses."""

from __future__ import annotations

import time

import pytest

from muxtune import codec
from muxtune.errors import ConfigError
from muxtune.planning.orchestration import (
    Contention,
    RoundGraph,
    RoundProblem,
    bubble_account,
    checked_sequences,
    lorapp,
    one_f_one_b,
    play,
    play_contended,
    round_problem,
)
from muxtune.types import (
    DispatchRule,
    HTaskTurn,
    Plan,
    Prediction,
    RankStream,
    ReplicaShape,
    Subgraph,
    SubgraphKind,
    SubgraphRef,
    SubgraphTimes,
)

FORWARD, BACKWARD = False, True


def pass_graph(num_stages: int) -> tuple[Subgraph, ...]:
    """Forward 0..S-1, then backward S-1..0, then an optimizer a stage; no transfers."""
    graph: list[Subgraph] = []
    for stage in [*range(num_stages), *reversed(range(num_stages))]:
        index = len(graph)
        graph.append(
            Subgraph(
                index, stage, SubgraphKind.COMPUTE, index >= num_stages,
                (index - 1,) if index else (), f"pass {index}",
            )
        )  # fmt: skip
    for stage in range(num_stages):
        index, ends = len(graph), 2 * num_stages - 1
        graph.append(
            Subgraph(index, stage, SubgraphKind.OPTIMIZER, True, (ends,), f"optimizer {stage}")
        )
    return tuple(graph)


def equal_problem(
    num_stages: int, counts: list[int], ns: int = 10, steps: tuple[int, ...] = ()
) -> RoundProblem:
    graph = pass_graph(num_stages)
    durations = (ns,) * (2 * num_stages) + (0,) * num_stages
    return RoundProblem(
        (graph,) * len(counts),
        (durations,) * len(counts),
        tuple(HTaskTurn(index, count) for index, count in enumerate(counts)),
        num_stages,
        micro_batches_per_step=steps,
    )


def order_for(rows: dict[int, list[tuple[int, int, int]]]) -> dict:
    """Stage -> (turn, subgraph, round_offset) on the compute stream."""
    return {
        RankStream(0, stage, 0, "compute"): tuple(
            SubgraphRef(turn, 0, subgraph, offset) for turn, subgraph, offset in row
        )
        for stage, row in rows.items()
    }


# Two stages, two hTasks A (turn 0) and B (turn 1); subgraphs: 0, 1 forward on stages 0, 1;
# 2, 3 backward on stages 1, 0; 4, 5 optimizers of stages 0, 1.
FLUSHED = {
    0: [(0, 0, 0), (1, 0, 0), (0, 3, 0), (0, 4, 0), (1, 3, 0), (1, 4, 0)],
    1: [(0, 1, 0), (0, 2, 0), (1, 1, 0), (1, 2, 0), (0, 5, 0), (1, 5, 0)],
}
OVERLAPPED = {
    0: [(0, 0, 0), (1, 3, 1), (1, 4, 1), (1, 0, 0), (0, 3, 0), (0, 4, 0)],
    1: [(0, 1, 0), (0, 2, 0), (1, 5, 1), (1, 1, 0), (1, 2, 0), (0, 5, 0)],
}


def test_two_stages_two_htasks_with_a_flush():
    played = play(order_for(FLUSHED), equal_problem(2, [1, 1]), rounds=2)
    # Ops of A are 0..5, of B 6..11.
    assert played.start_ns[0, [0, 1, 2, 3]].tolist() == [0, 10, 20, 30]
    assert played.start_ns[0, [6, 7, 8, 9]].tolist() == [10, 30, 40, 50]
    assert played.start_ns[1, 0] == 60
    assert played.makespan_ns == 120
    assert played.period_ns == 60


def test_round_offset_removes_the_flush():
    played = play(order_for(OVERLAPPED), equal_problem(2, [1, 1]), rounds=2)
    assert played.start_ns[0, [0, 1, 2, 3]].tolist() == [0, 10, 20, 30]
    assert played.start_ns[0, [6, 7, 8, 9]].tolist() == [10, 30, 40, 50]
    assert played.start_ns[1, [0, 1, 2, 3]].tolist() == [40, 50, 60, 70]
    assert played.start_ns[1, [6, 7, 8, 9]].tolist() == [60, 70, 80, 90]
    assert played.makespan_ns == 100
    assert play(order_for(OVERLAPPED), equal_problem(2, [1, 1]), rounds=9).period_ns == 40


def test_one_stage_one_htask():
    order = order_for({0: [(0, 0, 0), (0, 1, 0), (0, 2, 0)]})
    played = play(order, equal_problem(1, [1]), rounds=3)
    assert played.start_ns[:, 0].tolist() == [0, 20, 40]
    assert played.makespan_ns == 60


def test_the_next_micro_batch_waits_for_the_optimizer():
    problem = equal_problem(1, [1])._replace(durations_ns=((10, 10, 7),))
    order = order_for({0: [(0, 2, 1), (0, 0, 0), (0, 1, 0)]})
    assert play(order, problem, rounds=3).start_ns[:, 0].tolist() == [0, 27, 54]


@pytest.mark.parametrize("num_stages", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_one_f_one_b_has_the_known_bubble(num_stages: int, count: int):
    problem = equal_problem(num_stages, [count], steps=(count,))
    played = play(one_f_one_b(problem), problem, rounds=1)
    assert played.makespan_ns == 20 * (count + num_stages - 1)
    idle = 1 - 20 * count / played.makespan_ns
    assert idle == pytest.approx((num_stages - 1) / (count + num_stages - 1))


def test_one_f_one_b_runs_tasks_one_at_a_time():
    problem = equal_problem(4, [2, 3], steps=(2, 3))
    assert play(one_f_one_b(problem), problem, 5).makespan_ns == 5 * 20 * (5 + 6)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 6])
def test_lorapp_is_idle_for_the_missing_tasks_only(num_tasks: int):
    played = lorapp(equal_problem(4, [1] * num_tasks), rounds=12)
    expected = max(0.0, 1 - num_tasks / 4)
    assert bubble_account(played).steady_bubble == pytest.approx(expected, abs=1e-9)


def test_accumulating_micro_batches_do_not_wait_for_each_other():
    order = {
        RankStream(0, 0, 0, "compute"): tuple(
            SubgraphRef(0, occurrence, subgraph, 0)
            for occurrence, subgraph in [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (1, 2)]
        )
    }
    assert play(order, equal_problem(1, [2], steps=(2,)), 1).makespan_ns == 40
    with pytest.raises(ConfigError, match="deadlocks"):
        play(order, equal_problem(1, [2]), 1)


def changed(stage: int, position: int, ref: tuple[int, int, int]) -> dict:
    rows = {key: list(row) for key, row in OVERLAPPED.items()}
    rows[stage][position] = ref
    return order_for(rows)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (order_for({0: OVERLAPPED[0]}), "run 0 times"),
        (changed(0, 0, (0, 3, 0)), "run 0 times"),
        (changed(0, 0, (0, 1, 0)), "another stream"),
        (changed(0, 0, (0, 0, -1)), "negative round_offset"),
        (changed(0, 0, (7, 0, 0)), "names no subgraph"),
        (changed(0, 0, (0, 99, 0)), "names no subgraph"),
        (order_for({**OVERLAPPED, 2: [(0, 0, 0)]}), "no stream of the replica"),
        (
            order_for({0: FLUSHED[0], 1: [FLUSHED[1][1], FLUSHED[1][0], *FLUSHED[1][2:]]}),
            "deadlock",
        ),
        (order_for({0: [(0, 0, 1), *OVERLAPPED[0][1:]], 1: OVERLAPPED[1]}), "deadlock"),
    ],
)
def test_invalid_orders_are_refused(order: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        play(order, equal_problem(2, [1, 1]), rounds=4)


def test_an_order_over_the_memory_is_refused():
    problem = equal_problem(2, [1, 1])
    assert play(order_for(OVERLAPPED), problem.with_in_flight_limit([2, 1]), 3)
    with pytest.raises(ConfigError, match="holds 2 units of activations"):
        play(order_for(OVERLAPPED), problem.with_in_flight_limit([1, 1]), 3)
    with pytest.raises(ConfigError, match="holds 1 there, the stage has 0"):
        play(order_for(OVERLAPPED), problem.with_in_flight_limit([0, 1]), 3)


def test_ranks_of_a_stage_must_agree():
    problem = equal_problem(2, [1, 1])._replace(num_tp_ranks=2)
    order = order_for(OVERLAPPED)
    both = order | {key._replace(tp_rank=1): row for key, row in order.items()}
    assert play(both, problem, 3).makespan_ns == 140
    rank = RankStream(0, 1, 1, "compute")
    with pytest.raises(ConfigError, match="tensor-parallel rank 0"):
        play(both | {rank: both[rank][::-1]}, problem, 3)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_times_that_are_none_are_refused(seconds: float):
    times = SubgraphTimes((pass_graph(1),), ((seconds, 0.0, 0.0),), False)
    with pytest.raises(ConfigError, match=r"times_s\[0\]\[0\]"):
        round_problem(a_plan(()), times)


def test_uncounted_turns_have_no_order():
    problem = equal_problem(1, [1])._replace(turns=(HTaskTurn(0, None),))
    with pytest.raises(ConfigError, match="counted turns"):
        play({}, problem, 1)


def a_plan(order) -> Plan:
    prediction = Prediction(None, 0, 0, None, {}, {}, {}, 0)  # type: ignore[arg-type]
    return Plan(
        instance_id="i", epoch=0, drains=frozenset(), replicas=(ReplicaShape(1, 2),), htasks=(),
        round=(HTaskTurn(0, 1), HTaskTurn(1, 1)), dispatch=DispatchRule.SINGLE,
        predicted=prediction, order=order,
    )  # fmt: skip


def test_an_order_survives_the_journal():
    plan = a_plan(order_for(OVERLAPPED))
    back = codec.loads(codec.dumps(plan))
    assert back.order == plan.order
    assert play(back.order, equal_problem(2, [1, 1]), 2).makespan_ns == 100


def beside(comm_ns: int) -> RoundProblem:
    """One stage: compute of 100 and an all-reduce that nothing waits for but the optimizer."""
    graph = (
        Subgraph(0, 0, SubgraphKind.COMPUTE, False, (), "first"),
        Subgraph(1, 0, SubgraphKind.COLLECTIVE, False, (0,), "all-reduce"),
        Subgraph(2, 0, SubgraphKind.COMPUTE, True, (0,), "second"),
        Subgraph(3, 0, SubgraphKind.OPTIMIZER, True, (1, 2), "optimizer"),
    )
    return RoundProblem((graph,), ((50, comm_ns, 100, 0),), (HTaskTurn(0, 1),), 1)


def contended_makespan(comm_ns: int, contention: Contention) -> int:
    graph = RoundGraph(beside(comm_ns))
    compute = [SubgraphRef(0, 0, index, 0) for index in (0, 2, 3)]
    order = {
        RankStream(0, 0, 0, "compute"): tuple(compute),
        RankStream(0, 0, 0, "comm"): (SubgraphRef(0, 0, 1, 0),),
    }
    return play_contended(graph, checked_sequences(graph, order), 1, contention).makespan_ns


def test_contention_slows_both_sides_while_both_run():
    assert contended_makespan(40, Contention()) == 150
    # The all-reduce takes 40 * 1.5 = 60, in which compute does 60 / 2 = 30 of its 100.
    assert contended_makespan(40, Contention(2.0, 1.5)) == 50 + 60 + 70
    # Compute takes 100 * 2 = 200, in which the all-reduce does 200 / 1.25 = 160 of its 300.
    assert contended_makespan(300, Contention(2.0, 1.25)) == 50 + 200 + 140


def test_contention_makes_nothing_faster():
    with pytest.raises(ConfigError, match="factors >= 1"):
        contended_makespan(40, Contention(0.5, 1.0))


@pytest.mark.slow
def test_the_player_is_fast():
    problem = equal_problem(4, [1] * 8)
    order = one_f_one_b(problem)
    seconds = []
    for _ in range(3):
        begin = time.process_time()  # others may use the machine
        played = play(order, problem, rounds=400)
        seconds.append(time.process_time() - begin)
    assert played.start_ns.size / min(seconds) > 1e5
