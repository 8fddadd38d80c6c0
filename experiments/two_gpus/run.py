"""What interleaving tasks brings on two GPUs: see README.md.

python -m experiments.two_gpus.run --out two_gpus.json            # on two GPUs
python -m experiments.two_gpus.run --cpu --out /tmp/two.json      # tiny, gloo: does it work
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from experiments.step_throughput.workload import Workload
from experiments.two_gpus.layouts import Weights
from muxtune.cost.shapes import ModelShape, model_shape
from muxtune.planning.orchestration import (
    NVLINK_H200,
    SLOW_LINK_H200,
    TemplateOptions,
    bubble_account,
    one_f_one_b,
    periodic_template,
    play,
    play_contended,
    schedule_spans,
)
from muxtune.planning.orchestration.player import checked_sequences
from muxtune.planning.orchestration.problem import RoundGraph, RoundProblem
from muxtune.planning.orchestration.template import order_of
from muxtune.runtime.distributed.layout import Layout
from muxtune.runtime.distributed.links import Links
from muxtune.runtime.distributed.order_runner import COMPUTE, OrderRunner, TimedSpan
from muxtune.runtime.distributed.schedule import Action, Schedule, sequential_schedule
from muxtune.runtime.distributed.static_stage import VisitProgram
from muxtune.runtime.static_step import AdapterPools, Sequence, SlotInput, SlotSpec, StepLayout
from muxtune.runtime.static_step.inputs import HostBuffer, StepInputs
from muxtune.types import ReplicaShape

NUM_TASKS, RANK, KNOWN_ROUNDS, TRACED = 8, 16, 8, 8
TINY = ModelShape("tiny", 2, 64, 8, 4, 8, 128, 512)
SEARCH = TemplateOptions(evaluations=40, node_budget=400_000)
SOLO = ReplicaShape(1, 1)


class Config(NamedTuple):
    """``fused``: tasks in one hTask. ``parts``: micro-batches of a step. ``order``: interleaved,
    sequential (one micro-batch after another), or 1f1b (each hTask's step by itself)."""

    replica: ReplicaShape
    fused: int
    parts: int
    order: str

    @property
    def name(self) -> str:
        shape = f"tp{self.replica.tp} pp{self.replica.pp}"
        return f"{shape}, {self.fused} tasks fused, {self.parts} parts, {self.order}"


class Visits(NamedTuple):
    programs: list[VisitProgram]
    hosts: list[list[HostBuffer]]  # by round of the known ones, then by visit; empty ones last
    tokens: list[int]  # effective, by round


class Rank(NamedTuple):
    rank: int
    device: torch.device
    dtype: torch.dtype
    shape: ModelShape


# ------------------------------------------------------------------------------- the tasks


def known_rounds(config: Config, vocab: int, most: int) -> list[list[tuple[list[Sequence], dict]]]:
    """(sequences, slots) of each visit, for some rounds that repeat; ``most``: tokens of a
    sequence."""
    work = Workload(NUM_TASKS, (RANK,) * NUM_TASKS, vocab, fused=config.fused)
    rounds = work.rounds(0)
    return [
        [
            _part(micro_batch, htask * config.fused, part, config.parts, most)
            for htask, micro_batch in enumerate(next(rounds))
            for part in range(config.parts)
        ]
        for _ in range(KNOWN_ROUNDS)
    ]


def _part(
    micro_batch: Any, first_slot: int, part: int, parts: int, most: int
) -> tuple[list[Sequence], dict]:
    """Every ``parts``-th sequence, the longest first; slots counted from the hTask's first."""
    by_length = sorted(micro_batch.sequences, key=lambda s: (-len(s.tokens_n), s.slot, s.position))
    chosen = [
        Sequence(s.slot - first_slot, s.tokens_n[:most], s.is_target_n[:most], s.position)
        for s in by_length[part::parts]
    ]
    slots = {
        slot - first_slot: SlotInput(
            item.loss_tokens, keeps=part > 0, closes=part == parts - 1, scale=item.scale, lr=1e-4
        )
        for slot, item in micro_batch.slots.items()
    }
    return chosen, slots


def make_visits(config: Config, rank: Rank, weights: Weights, stage_part: Any) -> Visits:
    on_cuda = rank.device.type == "cuda"
    rounds = known_rounds(config, rank.shape.vocab, 512 if on_cuda else 6)
    num_htasks = NUM_TASKS // config.fused
    pools = []
    for htask in range(num_htasks):
        slots = (SlotSpec(RANK),) * config.fused
        pools.append(AdapterPools(stage_part.model, slots, deterministic=False))
        weights.fill_adapters(pools[-1], htask * config.fused)
    programs, hosts = [], [[] for _ in range(KNOWN_ROUNDS + 1)]
    for index in range(num_htasks * config.parts):
        sizes = [sum(len(s.tokens_n) for s in known[index][0]) for known in rounds]
        num_rows = -(-max(sizes) // 64) * 64
        bounds = max(len(known[index][0]) for known in rounds) + 4
        layout = StepLayout(num_rows, config.fused, bounds, 512)
        inputs = StepInputs(layout, rank.device)
        pool = pools[index // config.parts]
        programs.append(VisitProgram(stage_part, pool, inputs, num_rows))
        for at in range(KNOWN_ROUNDS + 1):
            host = HostBuffer(layout, on_cuda)
            sequences, slots = rounds[at][index] if at < KNOWN_ROUNDS else ([], {})
            host.fill(num_rows, sequences, slots)
            hosts[at].append(host)
    tokens = [sum(len(s.tokens_n) for seqs, _ in known for s in seqs) for known in rounds]
    return Visits(programs, hosts, tokens)


# ----------------------------------------------------------------------------- measurement


def run_config(
    config: Config, rank: Rank, weights: Weights, stage_part: Any, links: Any, rounds: int,
    slow: bool,
) -> dict[str, Any]:  # fmt: skip
    """One configuration on all ranks: measured and predicted."""
    visits = make_visits(config, rank, weights, stage_part)
    htasks = tuple(i // config.parts for i in range(len(visits.programs)))
    base = sequential_schedule(htasks, NUM_TASKS // config.fused, rank.shape, config.replica)
    runner = OrderRunner(
        base, weights.stage, visits.programs, links, _loader(visits), rank.device,
        separate=config.order == "interleaved" or config.replica.tp == 1,
    )  # fmt: skip
    began_s = time.perf_counter()
    runner.prepare()
    prepared_s = time.perf_counter() - began_s
    runner.run(2)
    durations = op_durations_ns(runner)
    problem = base.graph.problem._replace(durations_ns=by_htask(base, durations))
    runner.schedule, order = choose_order(problem, config, base)
    runner.run(3)
    seconds = statistics.median(runner.run(rounds, first_round=3) for _ in range(3))
    runner.run(TRACED, trace=True)
    mine = (seconds, runner.spans(), [p.metrics_2S.tolist() for p in visits.programs])
    runner.close()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    seconds = max(item[0] for item in every)
    tokens = sum(visits.tokens[(3 + at) % KNOWN_ROUNDS] for at in range(rounds))
    row = {
        "name": config.name, **config._asdict(), "rounds": rounds, "prepared_s": prepared_s,
        "round_ms": 1e3 * seconds / rounds, "effective_tokens_per_s": tokens / seconds,
        "rows_per_round": sum(p.num_rows for p in visits.programs),
        "losses": [metrics[0] for metrics in every[-1][2]],
        "peak_memory_gb": _peak_gb(rank.device),
    }  # fmt: skip
    row |= measured_shares([item[1] for item in every], config)
    row |= predicted(problem, order, config, rounds, slow)
    row["prediction_error"] = row["predicted_round_ms"] / row["round_ms"] - 1
    if config.order == "interleaved":
        row["spans"] = [[list(span) for span in item[1]] for item in every]
        row["htask_of_op"] = [base.graph.visits[v].htask for v in base.graph.visit_of]
        row["label_of_op"] = [item.label for item in base.graph.subgraphs]
        row["predicted_spans"] = [
            (s.stage, s.stream, s.htask, s.label, s.start_ns, s.duration_ns)
            for s in schedule_spans(play(order, problem, TRACED))
        ]
    return row


def _peak_gb(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def _loader(visits: Visits) -> Any:
    def load(at: int, visit: int) -> None:
        host = visits.hosts[at % KNOWN_ROUNDS if at >= 0 else KNOWN_ROUNDS][visit]
        inputs = visits.programs[visit].inputs
        inputs.buffer.copy_(host.buffer, non_blocking=True)
        inputs.spans = host.spans

    return load


# ---------------------------------------------------------------------------------- orders


def choose_order(problem: RoundProblem, config: Config, base: Schedule) -> tuple[Schedule, Any]:
    """(what the ranks run, the same for the player)."""
    graph = RoundGraph(problem)
    if config.order == "interleaved":
        order = periodic_template(problem, SEARCH).order
    elif config.order == "1f1b":
        order = one_f_one_b(_accumulating(problem, config))
    else:
        order = order_of(graph, base.sequences)
    sequences = tuple(checked_sequences(graph, order))
    deepest = max(offset for sequence in sequences for _, offset in sequence)
    return base._replace(sequences=sequences, deepest=deepest), order


def _accumulating(problem: RoundProblem, config: Config) -> RoundProblem:
    return problem._replace(micro_batches_per_step=(config.parts,) * len(problem.graphs))


def predicted(
    problem: RoundProblem, order: Any, config: Config, rounds: int, slow: bool
) -> dict[str, Any]:
    """By the player, from each operation's time alone; with the contention that was measured
    beforehand where communication and computing overlap."""
    if config.order == "1f1b":
        problem = _accumulating(problem, config)
    timeline = play(order, problem, rounds)
    account = bubble_account(timeline)
    out = {
        "predicted_round_ms": timeline.makespan_ns / rounds / 1e6,
        "predicted_period_ms": timeline.period_ns / 1e6,
        "predicted_steady_bubble": account.steady_bubble,
        "predicted_fill_drain": account.fill_drain,
        "predicted_imbalance": account.imbalance,
        "predicted_stalls": account.stalls,
    }
    if config.replica.tp > 1:
        contention = SLOW_LINK_H200 if slow else NVLINK_H200
        if config.order == "interleaved":
            graph = RoundGraph(problem)
            sequences = checked_sequences(graph, order)
            timeline = play_contended(graph, sequences, rounds, contention)
            out["predicted_round_ms"] = timeline.makespan_ns / rounds / 1e6
    return out


# ----------------------------------------------------------------------------- measurement


def op_durations_ns(runner: OrderRunner) -> dict[int, int]:
    """Every operation alone: computing by replaying it on a device that does nothing else,
    exchanges and transfers between ranks that do nothing else. The slowest rank counts."""
    graph, own = runner.schedule.graph, {}
    for op in runner._own_ops(COMPUTE):
        own[op] = _seconds(runner, runner._graphs[op], 2)
    known: dict[tuple[str, int], float] = {}
    for op in range(graph.num_ops):
        if graph.stream_of[op] % 2:
            visit = runner.visits[graph.visit_of[op]]
            action = runner.schedule.operation(op).action
            key = (action.name, visit.num_rows)
            if key not in known:
                known[key] = _transfer_seconds(runner, visit, action)
            own[op] = known[key]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return {
        op: round(1e9 * max(one[op] for one in every if op in one)) for op in range(graph.num_ops)
    }


def _seconds(runner: OrderRunner, work: Any, repeats: int) -> float:
    if not runner.on_cuda:
        return 1e-4  # the CPU shows that it works, not how fast
    stream = runner._streams[COMPUTE]
    with torch.cuda.stream(stream):
        work()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            work()
        stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3 / repeats


def _transfer_seconds(runner: OrderRunner, visit: VisitProgram, action: Action) -> float:
    if action is Action.REDUCE:
        buffer = torch.zeros_like(visit.sent_TD)
        return _seconds(runner, lambda: dist.all_reduce(buffer, group=visit.part.tp), 10)
    tensor = visit.norm_S if action is Action.SEND_NORM else torch.zeros_like(visit.sent_TD)
    assert runner.links is not None
    channel = (runner.links.sends if runner.stage == 0 else runner.links.receives)[1 - runner.stage]
    move = dist.send if runner.stage == 0 else dist.recv
    return _seconds(runner, lambda: move(tensor, channel.rank, group=channel.group), 10)


def by_htask(base: Schedule, durations: dict[int, int]) -> tuple[tuple[int, ...], ...]:
    """As the player takes them: one row an hTask, the mean of its micro-batches."""
    first, count = base.graph.first_op, len(base.operations)
    return tuple(
        tuple(
            round(statistics.mean(durations[first[visit] + i] for visit in visits))
            for i in range(count)
        )
        for visits in base.graph.visits_of
    )


def measured_shares(spans: list[list[TimedSpan]], config: Config) -> dict[str, Any]:
    """Of the traced rounds, by rank: idle share of computing in the steady middle, and overall."""
    steady, overall, periods = [], [], []
    for own in spans:
        compute = sorted((s for s in own if s.stream == COMPUTE), key=lambda s: s.start_s)
        first, last = TRACED // 2 - 1, TRACED - 2
        op = compute[0].op
        starts = {s.round: s.start_s for s in compute if s.op == op}
        begin, end = starts[first], starts[last]
        busy = sum(max(0.0, min(s.stop_s, end) - max(s.start_s, begin)) for s in compute)
        steady.append(1 - busy / (end - begin))
        periods.append(1e3 * (end - begin) / (last - first))
        length = compute[-1].stop_s - compute[0].start_s
        overall.append(1 - sum(s.stop_s - s.start_s for s in compute) / length)
    return {
        "steady_bubble_by_rank": steady, "steady_bubble": min(steady),
        "idle_by_rank": overall, "period_ms": max(periods),
    }  # fmt: skip


# ------------------------------------------------------------------------------------ ranks

ONE = [Config(SOLO, 8, 1, "sequential"), Config(SOLO, 1, 1, "sequential")]
PIPELINE, TENSOR = ReplicaShape(1, 2), ReplicaShape(2, 1)
PIPELINES = [
    Config(PIPELINE, 1, 1, "interleaved"), Config(PIPELINE, 1, 1, "sequential"),
    Config(PIPELINE, 1, 2, "1f1b"), Config(PIPELINE, 2, 1, "interleaved"),
    Config(PIPELINE, 4, 1, "interleaved"), Config(PIPELINE, 8, 4, "1f1b"),
    Config(PIPELINE, 8, 2, "1f1b"), Config(PIPELINE, 2, 2, "1f1b"),
]  # fmt: skip
TENSORS = [
    Config(TENSOR, 4, 1, "interleaved"), Config(TENSOR, 4, 1, "sequential"),
    Config(TENSOR, 8, 1, "sequential"), Config(TENSOR, 2, 1, "interleaved"),
    Config(TENSOR, 2, 1, "sequential"), Config(TENSOR, 1, 1, "interleaved"),
]  # fmt: skip


def layouts(only: str) -> list[list[Config]]:
    found = {"one": ONE, "pp": PIPELINES, "tp": TENSORS}
    if only == "few":
        return [[PIPELINES[i] for i in (4, 3, 0, 5)], [TENSORS[0], TENSORS[1]]]
    if only == "slow":
        return [PIPELINES[:2], TENSORS[:3]]
    return [found[name] for name in only.split(",")]


def rank_main(rank: int, args: Any, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = torch.device("cpu" if args.cpu else f"cuda:{rank}")
    if not args.cpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(1 if args.cpu else 8)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    dtype = torch.float32 if args.cpu else torch.bfloat16
    shape = TINY if args.cpu else model_shape(args.shape)
    me, rows = Rank(rank, device, dtype, shape), []
    code = 0
    try:
        for configs in layouts(args.only):
            rows += run_layout(configs, me, args, rows)
    except BaseException:
        traceback.print_exc()
        code = 1
    if rank == 0:
        write(args, rows)
    sys.stdout.flush()
    os._exit(code)


def run_layout(configs: list[Config], me: Rank, args: Any, before: list[dict]) -> list[dict]:
    replica = configs[0].replica
    layout = Layout((replica,))
    place = layout.places[me.rank if replica.num_gpus > 1 else 0]
    links = Links(layout, place, me.device) if replica.num_gpus > 1 else None
    weights = Weights(me.shape, replica, place.stage, place.part, me.device, me.dtype)
    groups = (None, None) if links is None else (links.tp, links.step)
    part = weights.stage_part(*groups)
    rows: list[dict] = []
    for config in configs:
        start_s = time.perf_counter()
        row = run_config(config, me, weights, part, links, args.rounds, args.slow)
        rows.append(row)
        if me.device.type == "cuda":
            torch.cuda.empty_cache()
        if me.rank == 0:
            hidden = ("spans", "losses", "htask_of_op", "label_of_op")
            shown = {k: v for k, v in row.items() if k not in hidden}
            print(f"[{time.perf_counter() - start_s:.1f} s] {shown}", flush=True)
            write(args, before + rows)
    return rows


def write(args: Any, rows: list[dict]) -> None:
    import platform

    facts = {
        "command": f"python -m experiments.two_gpus.run --only {args.only} --rounds {args.rounds}",
        "device": torch.cuda.get_device_name() if not args.cpu else platform.machine(),
        "torch": torch.__version__, "shape": "tiny" if args.cpu else args.shape,
        "nccl_p2p_disable": os.environ.get("NCCL_P2P_DISABLE", "0"),
        "date": time.strftime("%Y-%m-%d"), "tasks": NUM_TASKS, "rank": RANK,
    }  # fmt: skip
    text = json.dumps({"facts": facts, "rows": rows})
    Path(args.out).write_text(text, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="two_gpus.json")
    parser.add_argument("--shape", default="llama-2-13b")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", default="one,pp,tp", help="or slow: a few over a slow link")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--slow", action="store_true", help="NCCL_P2P_DISABLE=1 is set")
    args = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context: Any = multiprocessing.get_context("fork" if args.cpu else "spawn")
    ranks = [context.Process(target=rank_main, args=(rank, args, port)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))


if __name__ == "__main__":
    main()
