"""Several ranks give what one process gives: tensor and pipeline parallel, replicas, any order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from muxtune.commands.train import as_span
from muxtune.errors import ConfigError
from muxtune.planning.orchestration.player import play_sequences
from muxtune.report.perfetto import write_trace
from muxtune.runtime.backbone import BackboneStore, random_weights
from muxtune.runtime.distributed import tracing
from muxtune.runtime.distributed.layout import Layout
from muxtune.runtime.distributed.runner import Node, Norms, StageRunner
from muxtune.runtime.distributed.schedule import (
    Action,
    Unordered,
    operations_of,
    overlapped_schedule,
    plan_schedule,
    sequential_schedule,
)
from muxtune.runtime.distributed.tracing import HostClock, SpanLog, clock_ahead_ns
from muxtune.types import Plan, RankStream, ReplicaShape, TaskSpec
from tests.runtime.distributed_helpers import (
    SHAPE,
    Ranks,
    Weights,
    counted_plan,
    five_tasks,
    other_methods,
    random_order,
    run_world,
    spread,
    whole_weights,
)
from tests.runtime.runtime_helpers import Bench, make_htask, make_plan, worst_gap

torch.set_num_threads(1)

STEPS, FEW_STEPS, ORDER_STEPS, NUM_ORDERS = 20, 2, 2, 20
PIPELINE, TENSOR = (ReplicaShape(1, 2),), (ReplicaShape(2, 1),)
BOTH, UNEQUAL = (ReplicaShape(2, 2),), (ReplicaShape(1, 2), ReplicaShape(1, 1))
LAYOUTS = {"pipeline": PIPELINE, "tensor": TENSOR, "both": BOTH, "unequal": UNEQUAL}


def two_htasks(tasks: list[TaskSpec], replicas: Any, order_seed: int | None = None) -> Plan:
    # Room for most of a step: some steps take one micro-batch, others two.
    htasks = [make_htask(tasks[:2], quota=4), make_htask(tasks[:1:-1], quota=4)]
    if order_seed is None:
        return spread(make_plan(htasks), replicas)
    plan = random_order(counted_plan(htasks, replicas), order_seed)
    assert any(ref.round_offset for refs in plan.order.values() for ref in refs)
    return plan


class Outcome:
    """What a run left: weights and losses by task; the first gradient times 1 - beta1."""

    def __init__(self, weights: Mapping[str, Weights], losses: Mapping[str, list[float]]) -> None:
        self.weights, self.losses = dict(weights), dict(losses)


def train(bench: Bench, plan: Plan, tasks: list[TaskSpec], kind: str = "param") -> Outcome:
    bench.run(plan, *tasks)
    return Outcome(
        {task.task_id: whole_weights(bench, task, kind) for task in tasks},
        {task.task_id: bench.recorder.losses(task.task_id) for task in tasks},
    )


def on_one_process(folder: Path, tasks: list[TaskSpec], kind: str = "param") -> Outcome:
    store = BackboneStore({"tiny": random_weights(SHAPE, 0)})
    return train(Bench(folder, store), two_htasks(tasks, (ReplicaShape(),)), tasks, kind)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("one")
    first = five_tasks(1, max_grad_norm=0.0)
    return {
        "whole": on_one_process(folder / "whole", five_tasks(STEPS)),
        "first": on_one_process(folder / "first", first, "exp_avg"),
        "unclipped": on_one_process(
            folder / "unclipped", five_tasks(ORDER_STEPS, max_grad_norm=0.0)
        ),
        "orders": on_one_process(folder / "orders", five_tasks(ORDER_STEPS)),
        "methods": on_one_process(folder / "methods", other_methods(FEW_STEPS)),
    }


# ------------------------------------------------------------------------- what the ranks do


def same_run(ranks: Ranks, folder: Path, name: str) -> None:
    """All that is compared with one process, and with each task alone on this layout."""
    if ranks.rank:
        ranks.serve()
        return
    runs = {
        "whole": (five_tasks(STEPS), "param"),
        "first": (five_tasks(1, max_grad_norm=0.0), "exp_avg"),
        "few": (five_tasks(FEW_STEPS), "param"),
    }
    if all(shape.tp == 1 for shape in ranks.replicas):
        runs["methods"] = (other_methods(FEW_STEPS), "param")
    out = {
        kind: train(
            ranks.bench(folder / name / kind), two_htasks(tasks, ranks.replicas), tasks, what
        )
        for kind, (tasks, what) in runs.items()
    }
    for task in five_tasks(FEW_STEPS):
        for how, quota in (("alone", 2), ("other sizes", 3)):
            bench = ranks.bench(folder / name / f"{task.task_id}-{quota}")
            plan = spread(make_plan([make_htask([task], quota=quota)]), ranks.replicas)
            out[f"{task.task_id} {how}"] = train(bench, plan, [task])
    torch.save(out, folder / f"{name}.pt")
    ranks.stop()


def any_order(ranks: Ranks, folder: Path) -> None:
    if ranks.rank:
        ranks.serve()
        return
    found = []
    for seed in range(NUM_ORDERS):
        tasks = five_tasks(ORDER_STEPS)
        bench = ranks.bench(folder / f"order-{seed}")
        found.append(train(bench, two_htasks(tasks, ranks.replicas, seed), tasks))
    # And without an order, where a turn's second micro-batch needs the first one's step.
    tasks = five_tasks(ORDER_STEPS)
    plan = two_htasks(tasks, ranks.replicas, 0)._replace(order={})
    found.append(train(ranks.bench(folder / "no-order"), plan, tasks))
    torch.save(found, folder / "orders.pt")
    ranks.stop()


class StepsTooSoon(StageRunner):
    """The error of pipelines that step when a stage has seen off a step's last forward pass: its
    optimizer runs before the gradients of the last micro-batch are there."""

    def _run_compute(self, node: Node) -> None:
        round_ = self._rounds[node[0]]
        operation = round_.schedule.operation(node[1])
        visit = self._visit_input(round_, node[1])
        is_early = self.backbone.place.stage == 0 and visit is not None and bool(visit.closing)
        if is_early and operation.action is Action.BACKWARD and operation.is_last:
            assert visit is not None
            zeros_S = torch.zeros(len(self.pools[visit.htask].slots), dtype=torch.float64)
            self.optimizer.step(self.pools[visit.htask], visit.closing, zeros_S)
        super()._run_compute(node)

    def _optimize(self, visit: Any, squares_S: torch.Tensor, number: int, index: int) -> None:
        if self.backbone.place.stage:
            super()._optimize(visit, squares_S, number, index)
        else:
            norms = {slot: float(squares_S[slot]) ** 0.5 for slot in visit.input.closing}
            self.report(Norms(number, index, norms))


def too_soon(rank: int, folder: Path) -> None:
    ranks = Ranks(rank, PIPELINE)
    ranks.worker.runner.__class__ = StepsTooSoon
    if rank:
        ranks.serve()
        return
    tasks = five_tasks(ORDER_STEPS, max_grad_norm=0.0)  # nothing but the moment is wrong
    bench = ranks.bench(folder / "soon")
    torch.save(train(bench, two_htasks(tasks, PIPELINE, 0), tasks), folder / "soon.pt")
    ranks.stop()


def traced(rank: int, folder: Path) -> None:
    ranks = Ranks(rank, PIPELINE, traces=True)
    if rank:
        ranks.serve()
        return
    tasks = five_tasks(8)
    bench = ranks.bench(folder / "traced")
    train(bench, two_htasks(tasks, PIPELINE, 3), tasks)
    ranks.stop()
    write_trace(folder / "trace.json", map(as_span, bench.recorder.spans))


def two_ranks(rank: int, folder: Path) -> None:
    for name in ("pipeline", "tensor"):
        same_run(Ranks(rank, LAYOUTS[name]), folder, name)
    any_order(Ranks(rank, PIPELINE), folder)
    too_soon(rank, folder)
    traced(rank, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all worlds have left."""
    path = tmp_path_factory.mktemp("ranks")
    run_world(2, two_ranks, path)
    for name in ("both", "unequal"):
        size = sum(shape.num_gpus for shape in LAYOUTS[name])
        run_world(size, lambda rank, name=name: same_run(Ranks(rank, LAYOUTS[name]), path, name))
    return path


# ------------------------------------------------------------------------------------ checks


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_ranks_train_what_one_process_trains(
    folder: Path, reference: dict[str, Outcome], name: str
) -> None:
    found = torch.load(folder / f"{name}.pt", weights_only=False)
    for task_id, weights in reference["first"].weights.items():
        assert worst_gap(found["first"].weights[task_id], weights) <= 1e-5, task_id
    whole = found["whole"]
    for task_id, weights in reference["whole"].weights.items():
        assert worst_gap(whole.weights[task_id], weights) <= 1e-3, task_id
        assert whole.losses[task_id] == pytest.approx(
            reference["whole"].losses[task_id], rel=1e-4
        ), task_id
        assert len(whole.losses[task_id]) == STEPS


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_a_task_cannot_tell_its_neighbours_on_ranks_either(folder: Path, name: str) -> None:
    """But for rounding, which depends on the processor: no more than other sizes of its own
    micro-batches make of it where it is alone."""
    found = torch.load(folder / f"{name}.pt", weights_only=False)
    for task_id, together in found["few"].weights.items():
        alone, other = (
            found[f"{task_id} {how}"].weights[task_id] for how in ("alone", "other sizes")
        )
        assert worst_gap(together, alone) <= max(1e-6, worst_gap(other, alone)) < 1e-5, task_id


@pytest.mark.parametrize("name", ["pipeline", "unequal"])
def test_stages_train_other_methods_together(
    folder: Path, reference: dict[str, Outcome], name: str
) -> None:
    found = torch.load(folder / f"{name}.pt", weights_only=False)["methods"]
    assert trains_the_same(found, reference["methods"])


def test_any_valid_order_trains_the_same(folder: Path, reference: dict[str, Outcome]) -> None:
    orders = torch.load(folder / "orders.pt", weights_only=False)
    assert len(orders) == NUM_ORDERS + 1
    assert all(trains_the_same(found, reference["orders"]) for found in orders)


def trains_the_same(found: Outcome, reference: Outcome) -> bool:
    return all(
        worst_gap(found.weights[task_id], weights) <= 1e-4
        and found.losses[task_id] == pytest.approx(reference.losses[task_id], rel=1e-4)
        for task_id, weights in reference.weights.items()
    )


def test_an_early_stage_that_steps_too_soon_is_found_out(
    folder: Path, reference: dict[str, Outcome]
) -> None:
    found = torch.load(folder / "soon.pt", weights_only=False)
    assert not trains_the_same(found, reference["unclipped"])


def test_an_order_that_goes_on_before_a_stage_has_stepped_is_refused() -> None:
    plan = two_htasks(five_tasks(1), PIPELINE, 0)
    operations = operations_of(SHAPE, PIPELINE[0])
    stream = RankStream(0, 0, 0, "compute")
    steps = [r for r in plan.order[stream] if operations[r.subgraph].action is Action.OPTIMIZE]
    late = steps[0]._replace(round_offset=steps[0].round_offset + 2)
    refs = tuple(late if ref == steps[0] else ref for ref in plan.order[stream])
    assert plan_schedule(plan, SHAPE, 0) is not None
    with pytest.raises(ConfigError, match="order"):
        plan_schedule(plan._replace(order={**plan.order, stream: refs}), SHAPE, 0)


@pytest.mark.parametrize(
    ("round_", "most"),
    [
        (Unordered((0, 0, 0, 0), (4,), True), 0.65),  # 1F1B: 5 micro-batch times in place of 8
        (Unordered((0, 1, 0, 1), (1, 1), True), 0.7),
        (Unordered((0, 0, 0, 0), (1,), True), 1.0),  # each waits for the optimizer of the last
        (Unordered((0, 1), (1, 1), False), 1.0),
        (Unordered((0, 0, 1, 1), (2, 2), False), 0.8),
    ],
)
def test_without_an_order_stages_overlap_as_far_as_steps_let_them(
    round_: Unordered, most: float
) -> None:
    shape = ReplicaShape(1, 2)
    schedule = overlapped_schedule(round_, SHAPE, shape)
    in_turn = sequential_schedule(round_.htasks, len(round_.per_step), SHAPE, shape)
    graph = schedule.graph
    spans_ns = [play_sequences(graph, s.sequences, 1).makespan_ns for s in (schedule, in_turn)]
    assert spans_ns[0] <= most * spans_ns[1]
    if most == 1.0:
        assert spans_ns[0] == spans_ns[1]
    play_sequences(graph, schedule.sequences, 3)  # rounds follow without a deadlock


def test_the_trace_shows_two_stages_busy_with_different_htasks_at_once(folder: Path) -> None:
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    rows = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    streams = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found = [e for e in events if e["ph"] == "X" and "kind" in e["args"]]
    first, second = (
        [e for e in found if rows[e["pid"]].endswith(f"rank {rank}, stage {rank}")
         and streams[e["tid"]] == "compute"]
        for rank in (0, 1)
    )  # fmt: skip
    assert {streams[e["tid"]] for e in found} == {"compute", "comm"}
    for own in (first, second):
        assert {e["args"]["direction"] for e in own} == {"forward", "backward"}
        # A rank computes one operation after another.
        own.sort(key=lambda e: e["ts"])
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-3 for a, b in pairwise(own))
    together = sum(
        max(0, min(a["ts"] + a["dur"], b["ts"] + b["dur"]) - max(a["ts"], b["ts"]))
        for a in first
        for b in second
        if a["args"]["tasks"] != b["args"]["tasks"]
    )
    assert together > 0
    # On one clock: what a stage receives was sent before.
    assert min(e["ts"] for e in first) < min(e["ts"] for e in second)


def test_clocks_are_compared_between_hosts_only() -> None:
    readings = [HostClock("one", 1_000), HostClock("one", 1_700), HostClock("other", 90_000)]
    assert [clock_ahead_ns(readings, rank) for rank in range(3)] == [0, 0, 89_000]


def test_a_rank_tells_as_many_operations_of_a_plan_as_a_trace_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracing, "MOST_SPANS", 3)
    plan = two_htasks(five_tasks(1), PIPELINE, 3)
    schedule = plan_schedule(plan, SHAPE, 0)
    assert schedule is not None
    log = SpanLog(Layout(PIPELINE).places[0], 0)
    for _ in range(2):
        log.begin_plan(plan)
        for number in range(2):
            for op in range(2):
                log.timed(lambda: None, schedule, number, op)()
            found = log.taken(is_last=False)
            assert (len(found.spans), found.is_cut) == ((2, False), (1, True))[number]


class _Event:
    """An event, at ``at_ms`` of its device."""

    def __init__(self, at_ms: float, is_over: bool = True) -> None:
        self.at_ms, self.is_over = at_ms, is_over

    def query(self) -> bool:
        return self.is_over

    def elapsed_time(self, later: _Event) -> float:
        return later.at_ms - self.at_ms


def test_operations_of_a_gpu_are_told_when_its_events_are_over() -> None:
    plan = two_htasks(five_tasks(1), PIPELINE, 3)
    schedule = plan_schedule(plan, SHAPE, 0)
    assert schedule is not None
    log = SpanLog(Layout(PIPELINE).places[0], ahead_ns=500)
    log.begin_plan(plan)
    log.begin_device(_Event(2.0), at_ns=1_000_500)
    under_way = _Event(5.5, is_over=False)
    log.note_events(schedule, 0, 0, _Event(3.0), _Event(5.0))
    log.note_events(schedule, 0, 1, _Event(5.0), under_way)
    found = log.taken(is_last=False)
    assert [(item.start_ns, item.stop_ns) for item in found.spans] == [(2_000_000, 4_000_000)]
    under_way.is_over = True
    found = log.taken(is_last=True)
    assert [(item.start_ns, item.stop_ns) for item in found.spans] == [(4_000_000, 4_500_000)]
