"""What is read off a traced run is what the player accounts for in the same schedule."""

from __future__ import annotations

import pytest

from experiments.two_gpus.cases import PIPELINE, TENSOR, Config
from experiments.two_gpus.command import steady
from experiments.two_gpus.run import (
    COMM,
    COMPUTE,
    TINY,
    TRACED,
    choose_order,
    exposed_ms,
    measured_shares,
)
from muxtune.planning.orchestration import bubble_account, communication_shares, play
from muxtune.planning.orchestration.player import Timeline
from muxtune.runtime.distributed.order_runner import TimedSpan
from muxtune.runtime.distributed.schedule import sequential_schedule
from muxtune.types import SubgraphKind

TIMES_NS = {SubgraphKind.COMPUTE: 900, SubgraphKind.P2P: 50, SubgraphKind.COLLECTIVE: 400,
            SubgraphKind.OPTIMIZER: 100}  # fmt: skip


def played(config: Config, weights: tuple[int, ...]) -> Timeline:
    """``weights``: of the hTasks; later stages are a little faster."""
    count = len(weights)
    base = sequential_schedule(tuple(range(count)), count, TINY, config.replica)
    items = base.graph.subgraphs[: len(base.operations)]
    durations = tuple(
        tuple(weight * TIMES_NS[item.kind] * (20 - item.stage) for item in items)
        for weight in weights
    )
    problem = base.graph.problem._replace(durations_ns=durations)
    return play(choose_order(problem, config, base)[1], problem, TRACED)


def as_traced(timeline: Timeline, stage: int) -> list[TimedSpan]:
    graph = timeline.graph
    return [
        TimedSpan(
            COMM if graph.stream_of[op] % 2 else COMPUTE, at, op,
            timeline.start_ns[at, op] / 1e9, timeline.end_ns[at, op] / 1e9,
        )
        for at in range(TRACED)
        for op in range(graph.num_ops)
        if graph.stage_of[op] == stage
    ]  # fmt: skip


@pytest.mark.parametrize("order", ["interleaved", "sequential"])
def test_bubbles_are_split_as_the_player_splits_them(order: str) -> None:
    timeline = played(Config(PIPELINE, "3", 1, order), (4, 3, 4))
    found = measured_shares([as_traced(timeline, stage) for stage in range(2)])
    account = bubble_account(timeline)
    assert found["fill_drain"] == pytest.approx(account.fill_drain, abs=1e-6)
    assert found["imbalance"] == pytest.approx(account.imbalance, abs=1e-6)
    assert found["stalls"] == pytest.approx(account.stalls, abs=1e-6)
    assert found["steady_bubble"] == pytest.approx(account.steady_bubble, abs=1e-6)
    assert account.stalls > 0.3 or order == "interleaved"


@pytest.mark.parametrize("order", ["interleaved", "sequential"])
def test_exposed_communication_is_the_players(order: str) -> None:
    timeline = played(Config(TENSOR, "2", 1, order), (3, 4))
    exposed = communication_shares(timeline)[0] * timeline.makespan_ns / TRACED / 1e6
    assert exposed_ms(as_traced(timeline, 0), TRACED) == pytest.approx(exposed, rel=1e-6)
    assert exposed > 0 or order == "interleaved"


def test_a_commands_steady_rounds_are_those_between_warm_up_and_end() -> None:
    """Two tasks; a round takes 100 ms, the first and the last three longer."""
    ends_ns = [int(1e6 * (500 + 100 * min(n, 17) + 900 * max(0, n - 17))) for n in range(20)]
    steps = [
        {"step": number + 1, "time_ns": end_ns - late, "tokens": tokens}
        for number, end_ns in enumerate(ends_ns)
        for late, tokens in ((0, 300), (7, 50))
    ]
    found = steady(steps)
    assert found["steady_round_ms"] == pytest.approx(100.0)
    assert found["tokens_per_round"] == 350 and not steady(steps[:10])
    assert found["steady_tokens_per_s"] == pytest.approx(3_500.0)
