"""Worlds of forked ranks for the tests of several GPUs, on the CPU with gloo."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import random
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from muxtune.cost.shapes import ModelShape
from muxtune.planning.orchestration.problem import RoundGraph, RoundProblem
from muxtune.planning.orchestration.template import order_of
from muxtune.runtime.backbone import BackboneStore, random_weights
from muxtune.runtime.distributed.instance import DistributedInstance, distributed_factory
from muxtune.runtime.distributed.layout import Layout
from muxtune.runtime.distributed.links import Patience
from muxtune.runtime.distributed.schedule import subgraphs_of
from muxtune.runtime.distributed.sharding import StageBackbone
from muxtune.runtime.distributed.team import Stop, Team
from muxtune.runtime.distributed.worker import Worker
from muxtune.types import HTask, Plan, ReplicaShape, TaskSpec
from tests.runtime.runtime_helpers import INSTANCE, Bench, make_plan, make_task

SHAPE = ModelShape("tiny", 2, 64, 8, 4, 8, 128, 128)
DEADLINE_S = 400.0
Weights = dict[tuple[str, str], torch.Tensor]


def five_tasks(steps: int, **changes: Any) -> list[TaskSpec]:
    """Ranks, targets, batch sizes, lengths, accumulation differ; dropout is on."""
    common = {"num_steps": steps, "dropout": 0.1, **changes}
    return [
        make_task("a", **common),
        make_task("b", **common, rank=8, targets=("q_proj", "o_proj", "down_proj"), batch_size=5),
        make_task("c", **common, rank=2, targets=("all-linear",), accumulation=2),
        make_task("d", **common, rank=1, max_length_tokens=9, batch_size=7, weight_decay=0.1),
        make_task("e", **common, rank=16, targets=("up_proj",), batch_size=1, accumulation=3),
    ]


def other_methods(steps: int) -> list[TaskSpec]:
    """What pipelines take beside LoRA, and rsLoRA."""
    common = {"num_steps": steps, "dropout": 0.1}
    halves = {"targets": ("o_proj", "down_proj"), "method": "bottleneck"}
    return [
        make_task("rslora", **common, rank=8, options={"use_rslora": True}),
        make_task("ia3", num_steps=steps, method="ia3", rank=0, targets=("k_proj", "down_proj")),
        make_task("bottleneck", **common, **halves, batch_size=2, accumulation=2),
        make_task("ia3 too", num_steps=steps, method="ia3", rank=0, targets=("v_proj", "up_proj")),
    ]


def run_world(size: int, work: Callable[..., None], *arguments: Any) -> None:
    """``work(rank, *arguments)`` in forked processes that have a process group."""
    context = multiprocessing.get_context("fork")
    port = free_port()
    ranks = [
        context.Process(target=_rank_main, args=(rank, size, port, work, arguments))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    end_s = time.monotonic() + DEADLINE_S
    while any(process.is_alive() for process in ranks) and time.monotonic() < end_s:
        multiprocessing.connection.wait([p.sentinel for p in ranks if p.is_alive()], 1.0)
        if any(process.exitcode for process in ranks):  # the others may wait for it for ever
            break
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0] * size, f"exit codes of the ranks: {codes}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank_main(rank: int, size: int, port: int, work: Callable[..., None], arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    code = 1
    try:
        dist.init_process_group("gloo", rank=rank, world_size=size)
        work(rank, *arguments)
        dist.barrier()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class Ranks:
    """One layout on this process group. On rank 0 ``bench`` makes executors that drive it."""

    def __init__(
        self, rank: int, replicas: Sequence[ReplicaShape], shape: ModelShape = SHAPE,
        **options: Any,
    ) -> None:  # fmt: skip
        self.rank, self.replicas = rank, tuple(replicas)
        self.layout = Layout(self.replicas)
        loaded = random_weights(shape, 0)()
        place = self.layout.places[rank]
        self.team = Team(rank, self.layout.world_size)
        self.backbone = StageBackbone("tiny", loaded.model, loaded.tokenizer, self.layout, place)
        self.patience = Patience(60.0)
        self.worker = Worker(self.backbone, self.team, self.patience, **options)

    def bench(self, folder: Path, **options: Any) -> Bench:
        store = BackboneStore({})
        store._loaded["tiny"] = self.backbone
        factory = distributed_factory(self.team, self.worker, self.patience)
        return Bench(folder, store, replicas=self.replicas, make_instance=factory, **options)

    def serve(self) -> None:
        if self.rank:
            self.worker.serve()

    def stop(self) -> None:
        self.team.tell(Stop())


def whole_weights(bench: Bench, task: TaskSpec, kind: str = "param") -> Weights:
    instance = bench.executor._instances[INSTANCE]
    if isinstance(instance, DistributedInstance):
        state = instance._gathered([task.task_id])[task.task_id]
    else:
        state = bench.state(task)
    return {key: getattr(values, kind).clone() for key, values in state.tensors.items()}


def spread(plan: Plan, replicas: Sequence[ReplicaShape], **changes: Any) -> Plan:
    return plan._replace(replicas=tuple(replicas), **changes)


def random_order(plan: Plan, seed: int) -> Plan:
    """A valid order drawn at random, with rounds that overlap: every subgraph gets a random time
    after what it waits for, each hTask a phase, and the round's time is long enough for what waits
    over rounds."""
    graph = round_graph(plan)
    chance = random.Random(seed)
    time = [0.0] * graph.num_ops
    ends: dict[tuple[int, int], float] = {}
    phases = [20 * chance.random() for _ in plan.htasks]
    period = 1.0
    for visit, item in enumerate(graph.visits):
        first = graph.first_op[visit]
        structure = graph.structures[item.htask]
        entries = {op for stage in structure.entries for op in stage}
        for index, subgraph in enumerate(graph.problem.graphs[item.htask]):
            begin = max((time[first + before] for before in subgraph.depends_on), default=0.0)
            if index in entries:
                begin = max(begin, ends.get((item.htask, subgraph.stage), phases[item.htask]))
            time[first + index] = begin + chance.random() ** 3 + 1e-6
        for stage, indexes in enumerate(structure.step_ends):
            ends[item.htask, stage] = max(time[first + i] for i in indexes)
    for htask, visits in enumerate(graph.visits_of):
        for stage, entries in enumerate(graph.structures[htask].entries):
            for op in (graph.first_op[visits[0]] + i for i in entries):
                period = max(period, ends[htask, stage] - time[op] + 1e-6)
    period *= 1 + chance.random()
    sequences: list[list[tuple[int, int]]] = [[] for _ in range(graph.num_streams)]
    for op in sorted(range(graph.num_ops), key=lambda op: time[op] % period):
        sequences[graph.stream_of[op]].append((op, int(time[op] // period)))
    return plan._replace(order=order_of(graph, sequences))


def round_graph(plan: Plan) -> RoundGraph:
    shape = plan.replicas[0]
    graph = subgraphs_of(SHAPE._replace(name="tiny"), shape)
    ones = (1,) * len(graph)
    num = len(plan.htasks)
    return RoundGraph(RoundProblem((graph,) * num, (ones,) * num, plan.round, shape.pp, shape.tp))


def counted_plan(htasks: Sequence[HTask], replicas: Sequence[ReplicaShape]) -> Plan:
    """Each hTask twice a round, so that the order has something to interleave."""
    return spread(make_plan(htasks, counts=[2] * len(htasks)), replicas)
