"""The graph of a pass: its shape, and that its seconds are the cost model's."""

from __future__ import annotations

from collections import Counter

import pytest

from muxtune.cost import AnalyticCostModel, device_figures, model_shape, nominal_load
from muxtune.cost.subgraphs import (
    ComposedSubgraphCosts,
    StageSeconds,
    SubgraphOptions,
    pass_subgraphs,
    subgraph_times,
)
from muxtune.errors import ConfigError
from muxtune.types import (
    AdapterSlot,
    DispatchRule,
    HTask,
    HTaskTurn,
    Plan,
    Prediction,
    ReplicaShape,
    ShapeKey,
    SubgraphKind,
)

MODEL = model_shape("llama-2-7b")  # 32 layers
COST = AnalyticCostModel(MODEL, device_figures("H100-SXM"))
SLOTS = (AdapterSlot("lora", 16, ("all-linear",)), AdapterSlot("lora", 8, ("q_proj",)))
SHAPE = ShapeKey(256, 4, SLOTS)
TABLE = ComposedSubgraphCosts(COST, nominal_load)


class Fixed:
    """Seconds that a test can add up by hand."""

    def __init__(self, compute_s: float = 1.0) -> None:
        self.compute_s = compute_s

    def stage_seconds(self, shape, replica, stage, backward) -> StageSeconds:
        last = stage == replica.pp - 1
        return StageSeconds(self.compute_s, 0.5, 0.25, 0.125 if last else 0.0, 0.0625, 0.4)

    def optimizer_s(self, shape, replica, stage) -> float:
        return 2.0

    def message_s(self, num_bytes: int) -> float:
        return 0.001 * num_bytes


def seconds_by_kind(graph, times) -> Counter:
    total: Counter = Counter()
    for item, seconds in zip(graph, times, strict=True):
        total[item.kind] += seconds
    return total


def test_on_one_gpu_the_subgraphs_sum_to_the_pass():
    for options in (SubgraphOptions(), SubgraphOptions(5), SubgraphOptions(separate_adapters=True)):
        _, times = pass_subgraphs(MODEL, SHAPE, ReplicaShape(), TABLE, options)
        expected = COST.pass_times_s([nominal_load(SHAPE)], ReplicaShape()).value[0]
        assert sum(times) == pytest.approx(expected, rel=1e-12)


def test_stages_share_the_pass_of_one_gpu():
    """Four stages together compute what one GPU computes, but for each edge's own overhead."""
    graph, times = pass_subgraphs(MODEL, SHAPE, ReplicaShape(1, 4), TABLE)
    _, alone = pass_subgraphs(MODEL, SHAPE, ReplicaShape(), TABLE)
    on_stages = seconds_by_kind(graph, times)
    assert on_stages[SubgraphKind.COMPUTE] == pytest.approx(sum(alone), rel=0.05)
    assert on_stages[SubgraphKind.P2P] > 0
    assert on_stages[SubgraphKind.COLLECTIVE] == 0


def test_a_pipeline_plan_has_two_groups_a_stage_and_direction():
    graph, _ = pass_subgraphs(MODEL, SHAPE, ReplicaShape(1, 4), Fixed())
    groups = Counter(
        (item.stage, item.backward) for item in graph
        if item.kind is SubgraphKind.COMPUTE and item.label != "loss"
    )  # fmt: skip
    assert set(groups.values()) == {2}
    assert len(groups) == 8
    assert [item.label for item in graph if item.stage == 1][:2] == ["layers 8-11", "layers 12-15"]
    transfers = Counter(i.label for i in graph if i.kind is SubgraphKind.P2P)
    assert transfers == {"send activations": 3, "send gradients": 3, "norm": 3}


def test_tensor_parallel_cuts_every_layer_at_its_all_reduces():
    graph, times = pass_subgraphs(MODEL, SHAPE, ReplicaShape(2, 2), Fixed())
    collectives = [item for item in graph if item.kind is SubgraphKind.COLLECTIVE]
    assert len(collectives) == 4 * MODEL.num_layers
    forward = [item.label for item in graph if item.stage == 0 and not item.backward][:4]
    assert forward == ["attention layer 0", "all-reduce", "mlp layer 0", "all-reduce"]
    backward = [item.label for item in graph if item.stage == 1 and item.backward][:5]
    assert backward == ["loss", "mlp layer 31", "all-reduce", "attention layer 31", "all-reduce"]
    total = seconds_by_kind(graph, times)
    assert total[SubgraphKind.COMPUTE] == pytest.approx(4 * 1.5 + 2 * 0.125)
    assert total[SubgraphKind.COLLECTIVE] == pytest.approx(4 * 0.25)


def test_the_analytic_collectives_are_those_of_the_pass():
    replica = ReplicaShape(2, 1)
    graph, times = pass_subgraphs(MODEL, SHAPE, replica, TABLE)
    load = nominal_load(SHAPE)
    exchange = COST.breakdown_s(load, replica)["communication"]
    assert seconds_by_kind(graph, times)[SubgraphKind.COLLECTIVE] == pytest.approx(exchange)
    assert sum(times) == pytest.approx(COST.pass_times_s([load], replica).value[0])


def test_adapters_can_stand_apart():
    options = SubgraphOptions(separate_adapters=True)
    graph, times = pass_subgraphs(MODEL, SHAPE, ReplicaShape(), Fixed(), options)
    assert seconds_by_kind(graph, times)[SubgraphKind.ADAPTER] == pytest.approx(2 * 0.5)


def test_no_stage_steps_before_it_knows_the_norm_over_all_stages():
    graph, times = pass_subgraphs(MODEL, SHAPE, ReplicaShape(1, 3), Fixed())
    reached: list[set[int]] = []
    for item in graph:
        reached.append({item.index}.union(*(reached[before] for before in item.depends_on)))
    last_backward = {
        stage: max(i.index for i in graph if i.stage == stage and i.backward
                   and i.kind is SubgraphKind.COMPUTE)
        for stage in range(3)
    }  # fmt: skip
    optimizers = [item for item in graph if item.kind is SubgraphKind.OPTIMIZER]
    assert [item.stage for item in optimizers] == [0, 1, 2]
    for item in optimizers:
        assert set(last_backward.values()) <= reached[item.index]
        assert times[item.index] == 2.0
    norms = [times[i.index] for i in graph if i.label == "norm"]
    assert norms == [0.001 * 4 * len(SLOTS)] * 2


def test_dependencies_point_backwards():
    graph, _ = pass_subgraphs(MODEL, SHAPE, ReplicaShape(2, 4), Fixed())
    assert all(before < item.index for item in graph for before in item.depends_on)


def test_times_of_a_plan():
    htasks = tuple(HTask((shape,), {}, {}) for shape in (SHAPE, ShapeKey(64, 1, SLOTS)))
    plan = Plan(
        "i", 0, frozenset(), (ReplicaShape(1, 2),), htasks, (HTaskTurn(0, 1), HTaskTurn(1, 1)),
        DispatchRule.SINGLE, Prediction(None, 0, 0, None, {}, {}, {}, 0), {},  # type: ignore[arg-type]
    )  # fmt: skip
    times = subgraph_times(plan, MODEL, TABLE)
    assert len(times.subgraphs) == 2
    assert sum(times.times_s[0]) > sum(times.times_s[1]) > 0


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_costs_that_are_no_times_are_refused(seconds: float):
    with pytest.raises(ConfigError, match="finite times"):
        pass_subgraphs(MODEL, SHAPE, ReplicaShape(), Fixed(seconds))


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ConfigError, match="stages are more than the 32 layers"):
        pass_subgraphs(MODEL, SHAPE, ReplicaShape(1, 33), Fixed())
    with pytest.raises(ConfigError, match="does not divide"):
        pass_subgraphs(MODEL, SHAPE, ReplicaShape(3, 1), Fixed())
    with pytest.raises(ConfigError, match="groups_per_stage"):
        pass_subgraphs(MODEL, SHAPE, ReplicaShape(), Fixed(), SubgraphOptions(-1))
