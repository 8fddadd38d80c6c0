"""What interleaving tasks brings on two GPUs: see README.md.

python -m experiments.two_gpus.run --out rows.jsonl                    # on two GPUs
python -m experiments.two_gpus.run --device cpu --out /tmp/rows.jsonl  # tiny, gloo: does it work
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from experiments.step_throughput.workload import Workload
from experiments.two_gpus.cases import KNOWN_ROUNDS, NUM_TASKS, RANK, SETS, Config
from experiments.two_gpus.grouping import ROW_STEP, rows_taken
from experiments.two_gpus.layouts import Weights
from experiments.two_gpus.ranks import start_ranks
from muxtune.cost.shapes import ModelShape, model_shape
from muxtune.planning.orchestration import (
    Contention,
    TemplateOptions,
    bubble_account,
    communication_shares,
    one_f_one_b,
    periodic_template,
    play,
    play_contended,
    schedule_spans,
)
from muxtune.planning.orchestration.player import checked_sequences
from muxtune.planning.orchestration.problem import RoundGraph, RoundProblem
from muxtune.planning.orchestration.template import order_of
from muxtune.runtime.distributed import static_stage
from muxtune.runtime.distributed.layout import Layout
from muxtune.runtime.distributed.links import Links
from muxtune.runtime.distributed.order_runner import COMM, COMPUTE, OrderRunner, TimedSpan
from muxtune.runtime.distributed.peer_memory import PeerMemory, Unavailable
from muxtune.runtime.distributed.schedule import TRANSFERS, Action, Schedule, sequential_schedule
from muxtune.runtime.distributed.static_stage import VisitProgram
from muxtune.runtime.static_step import AdapterPools, Sequence, SlotInput, SlotSpec, StepLayout
from muxtune.runtime.static_step.inputs import HostBuffer, StepInputs
from muxtune.types import ReplicaShape

TRACED = 6
# For messages in memory, on each rank; what lies in the host's must be found there first.
SHARED_BYTES = {"cuda": 3 << 30, "cpu": 1 << 24}
HOST_BYTES = {"cuda": 640 << 20, "cpu": 1 << 24}
# For a configuration after it is captured, which took 10 to 25 s, and before.
HUNG_S, COMPILING_S = {"cuda": 30.0, "cpu": 600.0}, 90.0
_CPU_S = 1e-4  # of everything: the CPU shows that it works, not how fast
# The device waits so long for each exchange that it is timed for: as in a round, the host is ahead.
_CYCLES_AHEAD, _SUMS_IN_A_ROW = 2_000_000, 8
TINY = ModelShape("tiny", 2, 64, 8, 4, 8, 128, 512)
SEARCH = TemplateOptions(evaluations=40, node_budget=400_000)


class Visits(NamedTuple):
    """``programs``: of each visit, by size; ``sizes`` and ``hosts``: of the known rounds, by visit:
    which size they take, and their inputs; ``empty``: by visit and size. ``tokens``: effective, by
    round."""

    programs: list[list[VisitProgram]]
    sizes: list[list[int]]
    hosts: list[list[HostBuffer]]
    empty: list[list[HostBuffer]]
    tokens: list[int]

    def rows(self) -> float:
        """Of a round, in the mean."""
        return statistics.mean(
            sum(self.programs[visit][size].num_rows for visit, size in enumerate(sizes))
            for sizes in self.sizes
        )


class Rank(NamedTuple):
    """``memory``: None where NCCL moves all messages."""

    rank: int
    device: torch.device
    dtype: torch.dtype
    shape: ModelShape
    memory: PeerMemory | None = None


# ------------------------------------------------------------------------------- the tasks


def known_rounds(config: Config, vocab: int, most: int) -> list[list[tuple[list[Sequence], dict]]]:
    """(sequences, slots) of each visit, for some rounds that repeat; ``most``: tokens of a
    sequence."""
    work = Workload(NUM_TASKS, (RANK,) * NUM_TASKS, vocab, groups=config.groups)
    rounds = work.rounds(0)
    return [
        [
            _part(micro_batch, group, part, config.parts, most)
            for group, micro_batch in zip(config.groups, next(rounds), strict=True)
            for part in range(config.parts)
        ]
        for _ in range(KNOWN_ROUNDS)
    ]


def _part(
    micro_batch: Any, group: tuple[int, ...], part: int, parts: int, most: int
) -> tuple[list[Sequence], dict]:
    """Every ``parts``-th sequence, the longest first; a task's slot is its place in the group."""
    by_length = sorted(micro_batch.sequences, key=lambda s: (-len(s.tokens_n), s.slot, s.position))
    chosen = [
        Sequence(group.index(s.slot), s.tokens_n[:most], s.is_target_n[:most], s.position)
        for s in by_length[part::parts]
    ]
    slots = {
        group.index(slot): SlotInput(
            item.loss_tokens, keeps=part > 0, closes=part == parts - 1, scale=item.scale, lr=1e-4
        )
        for slot, item in micro_batch.slots.items()
    }
    return chosen, slots


def make_visits(config: Config, rank: Rank, weights: Weights, stage_part: Any) -> Visits:
    on_cuda = rank.device.type == "cuda"
    rounds = known_rounds(config, rank.shape.vocab, 512 if on_cuda else 10)
    layouts, sizes = visit_layouts(config, rounds, ROW_STEP if on_cuda else 4)
    programs = make_programs(config, layouts, stage_part)
    for index, group in enumerate(config.groups):
        weights.fill_adapters(programs[index * config.parts][0].pools, group)
    found = Visits(programs, sizes, [[] for _ in rounds], [], [])
    for index, own in enumerate(layouts):
        found.empty.append([_filled(layout, on_cuda, [], {}) for layout in own])
        for at, known in enumerate(rounds):
            found.hosts[at].append(_filled(own[sizes[at][index]], on_cuda, *known[index]))
    found.tokens.extend(sum(len(s.tokens_n) for seqs, _ in known for s in seqs) for known in rounds)
    return found


def visit_layouts(
    config: Config, rounds: list[Any], step: int
) -> tuple[list[list[StepLayout]], list[list[int]]]:
    """(of each visit, by size; which of the sizes each round takes, by visit)."""
    layouts, taken = [], []
    for index in range(len(config.groups) * config.parts):
        tokens = [sum(len(s.tokens_n) for s in known[index][0]) for known in rounds]
        sizes, own = rows_taken(tokens, step)
        num_slots = len(config.groups[index // config.parts])
        bounds = max(len(known[index][0]) for known in rounds) + 4
        layouts.append([StepLayout(num_rows, num_slots, bounds, 512) for num_rows in sizes])
        taken.append(own)
    return layouts, [list(of_round) for of_round in zip(*taken, strict=True)]


def make_programs(
    config: Config, layouts: list[list[StepLayout]], stage_part: Any
) -> list[list[VisitProgram]]:
    if config.replica.tp > 1 and config.parts > 1:
        raise ValueError("ranks of a stage meet after every micro-batch: give one part")
    model = stage_part.model
    pools = [
        AdapterPools(model, (SlotSpec(RANK),) * len(group), deterministic=False)
        for group in config.groups
    ]
    return [
        [
            VisitProgram(
                stage_part, pools[index // config.parts], StepInputs(layout, model.device),
                layout.max_rows,
            )
            for layout in own
        ]
        for index, own in enumerate(layouts)
    ]  # fmt: skip


def _filled(layout: StepLayout, pinned: bool, sequences: list[Sequence], slots: dict) -> HostBuffer:
    host = HostBuffer(layout, pinned)
    host.fill(layout.max_rows, sequences, slots)
    return host


# ----------------------------------------------------------------------------- measurement


def run_config(
    config: Config, rank: Rank, weights: Weights, stage_part: Any, links: Any, rounds: int
) -> dict[str, Any]:
    """One configuration on all ranks: measured and predicted."""
    visits = make_visits(config, rank, weights, stage_part)
    htasks = tuple(i // config.parts for i in range(len(visits.programs)))
    base = sequential_schedule(htasks, len(config.groups), rank.shape, config.replica)
    runner = OrderRunner(
        base, weights.stage, visits.programs, links, _loader(visits), rank.device,
        separate=config.order == "interleaved" or config.replica.tp == 1, early=config.early,
        choose=chooser(visits), memory=None if links is None else rank.memory,
    )  # fmt: skip
    began_s = time.perf_counter()
    runner.prepare()
    prepared_s = time.perf_counter() - began_s
    faulthandler.dump_traceback_later(HUNG_S[rank.device.type], exit=True)
    began_s = time.perf_counter()
    profile = profiled(runner, config, visits)
    profiled_s = time.perf_counter() - began_s
    begin_anew(config, visits, weights)
    problem = base.graph.problem._replace(durations_ns=by_htask(base, profile))
    runner.schedule, order = choose_order(problem, config, base)
    is_interleaved, compared, rounds = config.order == "interleaved", rounds, config.rounds(rounds)
    runner.run(1)
    fewer_s = seconds = runner.run(compared, trace=not is_interleaved)
    metrics, launched_s = last_metrics(visits, compared - 1), runner.launched_s
    if is_interleaved:
        seconds, launched_s = runner.run(rounds), runner.launched_s
        runner.run(TRACED, trace=True)
    mine = (seconds, runner.spans(), metrics, fewer_s, launched_s)
    runner.close()
    if rank.memory is not None:
        dist.barrier()
        rank.memory.give_back()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    seconds, fewer_s, launched_s = (max(item[at] for item in every) for at in (0, 3, 4))
    tokens = sum(visits.tokens[at % KNOWN_ROUNDS] for at in range(rounds))
    row = {
        "name": config.name, **config._asdict(), "groups": config.groups, "rounds": rounds,
        "compared_rounds": compared,
        "messages": _way(rank.memory) if links is not None else "none",
        "prepared_s": prepared_s, "profiled_s": profiled_s,
        "round_ms": 1e3 * seconds / rounds,
        "compared_round_ms": 1e3 * fewer_s / compared,
        "steady_round_ms": _steady_ms((seconds, rounds), (fewer_s, compared)),
        "launched_ms": 1e3 * launched_s / rounds, "effective_tokens_per_s": tokens / seconds,
        "rows_per_round": visits.rows(),
        "losses": [metrics[0] for metrics in every[-1][2]],
        "peak_memory_gb": _peak_gb(rank.device),
        "waiting_slowdown": profile.waiting, "contention": list(profile.contention),
    }  # fmt: skip
    row["compute_alone_ms"] = busiest_ms(base, profile, 0)
    row["comm_alone_ms"], row["comm_one_by_one_ms"] = (
        profile.comm_alone_ms,
        busiest_ms(base, profile, 1),
    )
    row |= measured_shares([item[1] for item in every])
    row["traced_rounds"] = TRACED if is_interleaved else rounds
    row |= predicted(problem, order, config, rounds, profile, row["traced_rounds"])
    row["prediction_error"] = row["predicted_round_ms"] / row["round_ms"] - 1
    if is_interleaved:
        row["spans"] = [[list(span) for span in item[1]] for item in every]
        row["htask_of_op"] = [base.graph.visits[v].htask for v in base.graph.visit_of]
        row["label_of_op"] = [item.label for item in base.graph.subgraphs]
        row["kind_of_op"] = [item.kind.name for item in base.graph.subgraphs]
        row["backward_of_op"] = [item.backward for item in base.graph.subgraphs]
        row["predicted_spans"] = [
            (*s._replace(kind=s.kind.name),) for s in schedule_spans(play(order, problem, TRACED))
        ]
    return row


@torch.no_grad()
def begin_anew(config: Config, visits: Visits, weights: Weights) -> None:
    """Untrained: what was timed by itself took steps on whatever gradients were there."""
    for index, group in enumerate(config.groups):
        pools = visits.programs[index * config.parts][0].pools
        for _, a, b in (item for slot in range(len(group)) for item in pools.views(slot)):
            for tensor in (*a[1:], *b[1:]):
                tensor.zero_()
        pools.settings.step_S.zero_()
        weights.fill_adapters(pools, group)


def _way(memory: PeerMemory | None) -> str:
    if memory is None:
        return "nccl"
    return "copies by way of the host" if memory.through_host else "copies"


def _steady_ms(longer: tuple[float, int], shorter: tuple[float, int]) -> float:
    """What one more round takes, by two runs (seconds, rounds): both fill and drain once."""
    if longer[1] == shorter[1]:
        return 1e3 * longer[0] / longer[1]
    return 1e3 * (longer[0] - shorter[0]) / (longer[1] - shorter[1])


def _peak_gb(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def _loader(visits: Visits) -> Any:
    def load(at: int, visit: int, size: int) -> None:
        host = visits.empty[visit][size] if at < 0 else visits.hosts[at % KNOWN_ROUNDS][visit]
        inputs = visits.programs[visit][size].inputs
        inputs.buffer.copy_(host.buffer, non_blocking=True)
        inputs.spans = host.spans

    return load


def chooser(visits: Visits) -> Any:
    return lambda at, visit: visits.sizes[at % KNOWN_ROUNDS][visit]


def last_metrics(visits: Visits, at: int) -> list[Any]:
    """Losses and norms of the programs that round ``at`` took, by visit."""
    sizes = visits.sizes[at % KNOWN_ROUNDS]
    return [p[size].metrics_2S.tolist() for p, size in zip(visits.programs, sizes, strict=True)]


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
    problem: RoundProblem, order: Any, config: Config, rounds: int, profile: Profile, traced: int
) -> dict[str, Any]:
    """By the player, from what was profiled before the order ran."""
    if config.order == "1f1b":
        problem = _accumulating(problem, config)
    timeline = play(order, problem, rounds)
    # Filling and draining weigh the more, the fewer rounds there are: those of the traced run.
    account = bubble_account(play(order, problem, traced))
    longer_ns = play(order, problem, 3 * rounds).makespan_ns
    out = {
        "predicted_round_ms": timeline.makespan_ns / rounds / 1e6,
        "predicted_period_ms": (longer_ns - timeline.makespan_ns) / (2 * rounds) / 1e6,
        "predicted_steady_bubble": account.steady_bubble,
        "predicted_fill_drain": account.fill_drain,
        "predicted_imbalance": account.imbalance,
        "predicted_stalls": account.stalls,
    }
    if config.replica.tp > 1 and config.order == "interleaved":
        graph = RoundGraph(problem)
        sequences = checked_sequences(graph, order)
        timeline = play_contended(graph, sequences, rounds, profile.contention)
        out["predicted_round_ms"] = timeline.makespan_ns / rounds / 1e6
    exposed = communication_shares(timeline)[0]
    return {**out, "predicted_exposed_ms": exposed * out["predicted_round_ms"]}


# ------------------------------------------------------------------------------- profiling


class Profile(NamedTuple):
    """What was timed before an order ran. ``durations_ns``: of every operation alone, by the
    slowest rank; on a pipeline's stages beside a receive that waits, as it does there.
    ``waiting``: what such a receive costs a computation, as a factor. ``contention``: between a
    computation and an exchange. ``comm_alone_ms``: all of a round's exchanges in a row, of which
    one may begin while those before it are under way."""

    durations_ns: dict[int, int]
    waiting: float
    contention: Contention
    comm_alone_ms: float


def profiled(runner: OrderRunner, config: Config, visits: Visits) -> Profile:
    durations, in_a_row = op_durations_s(runner, visits)
    graph = runner.schedule.graph
    own = [
        op for op in range(graph.num_ops)
        if graph.stage_of[op] == runner.stage
        and runner.schedule.operation(op).action in (Action.FORWARD, Action.BACKWARD)
    ]  # fmt: skip
    heaviest = max(own, key=lambda op: durations[op])
    waiting, contention = 1.0, Contention()
    if config.replica.pp > 1:
        waiting = _slowdown(waiting_slowdown(runner, heaviest))
    if config.replica.tp > 1:
        mine = exchange_contention(runner, heaviest)
        contention = Contention(*(_slowdown(value) for value in mine))
    factors = [1.0 if graph.stream_of[op] % 2 else waiting for op in range(graph.num_ops)]
    by_stage = [
        sum(seconds for op, seconds in in_a_row.items() if graph.stage_of[op] == stage)
        for stage in range(graph.num_stages)
    ]
    return Profile(
        {op: round(1e9 * durations[op] * factors[op]) for op in durations}, waiting, contention,
        1e3 * max(by_stage),
    )  # fmt: skip


def _slowdown(value: float) -> float:
    """The highest of the ranks' values; no kernel is faster for company."""
    return max(1.0, _highest(value))


def op_durations_s(
    runner: OrderRunner, visits: Visits
) -> tuple[dict[int, float], dict[int, float]]:
    """(every operation, those of communication in a row), in the mean over the known rounds; the
    slowest rank counts. Computing as ``computed_s`` has it, exchanges and transfers between ranks
    that do nothing else."""
    graph, known = runner.schedule.graph, {}
    for at in covering(visits.sizes):
        runner.run(1, first_round=at)
    own, in_a_row = computed_s(runner, visits), {}
    for op in (op for op in range(graph.num_ops) if graph.stream_of[op] % 2):
        taken = [sizes[graph.visit_of[op]] for sizes in visits.sizes]
        by_size = {size: _moved_s(runner, op, size, known) for size in sorted(set(taken))}
        own[op], in_a_row[op] = (statistics.mean(by_size[t][i] for t in taken) for i in (0, 1))
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (own, in_a_row))
    slowest = [
        {op: max(one[kind][op] for one in every if op in one[kind]) for op in range(graph.num_ops)
         if any(op in one[kind] for one in every)}
        for kind in (0, 1)
    ]  # fmt: skip
    return slowest[0], slowest[1]


def covering(sizes: list[list[int]]) -> list[int]:
    """Rounds in which every visit takes each of its sizes."""
    seen: set[tuple[int, int]] = set()
    found = []
    for at, of_visits in enumerate(sizes):
        if not seen.issuperset(enumerate(of_visits)):
            seen.update(enumerate(of_visits))
            found.append(at)
    return found


def computed_s(runner: OrderRunner, visits: Visits) -> dict[int, float]:
    """This rank's computations, one after another without a pause, on all ranks at once: a GPU
    that pauses runs at higher clocks, and so does one that computes on zeros. So inputs are rows of
    tasks and what neighbours have sent before, and all known rounds pass once before those that
    are timed. Each takes the time from the end of the one before."""
    graph = runner.schedule.graph
    own = [op for op in range(graph.num_ops)
           if graph.stage_of[op] == runner.stage and graph.stream_of[op] % 2 == 0]  # fmt: skip
    if not runner.on_cuda:
        return dict.fromkeys(own, _CPU_S)
    dist.barrier()
    with torch.cuda.stream(runner._streams[COMPUTE]):
        marks = [_passed(runner, visits, own, at % KNOWN_ROUNDS) for at in range(2 * KNOWN_ROUNDS)]
    torch.cuda.synchronize()
    timed = marks[KNOWN_ROUNDS:]
    return {
        op: statistics.mean(of[place].elapsed_time(of[place + 1]) / 1e3 for of in timed)
        for place, op in enumerate(own)
    }


def _passed(runner: OrderRunner, visits: Visits, ops: list[int], at: int) -> list[Any]:
    """A round's computations on the current stream; an event before them and after each."""
    marks = [torch.cuda.Event(enable_timing=True)]
    marks[0].record()
    for op in ops:
        visit, operation = runner.schedule.graph.visit_of[op], runner.schedule.operation(op)
        size = visits.sizes[at][visit]
        if operation.action is Action.FORWARD and runner.program(op, size)._starts(
            operation.parts[0]
        ):
            runner.load(at, visit, size)
        runner.graph(op, size)()
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
    return marks


def _moved_s(
    runner: OrderRunner, op: int, size: int, known: dict[Any, tuple[float, float]]
) -> tuple[float, float]:
    """(by itself, in a row). Transfers of one kind and size take the same."""
    program, operation = runner.program(op, size), runner.schedule.operation(op)
    summed = runner._reduced.get((op, size), ())
    key = (operation.action, program.num_rows, *[tensor.nbytes for tensor in summed])
    if key not in known:
        known[key] = _transfer_seconds(runner, op, size)
    return known[key]


def waiting_slowdown(runner: OrderRunner, op: int) -> float:
    """A computation's time beside a receive that has been posted and waits, over its time alone.
    The stages take turns."""
    assert runner.links is not None
    other, slowdown = 1 - runner.stage, 1.0
    for turn in range(2):
        wire = _wire_to(runner, turn)
        dist.barrier()
        if runner.stage != turn:
            dist.barrier()
            runner._on_stream(COMM, wire.send, ())
            continue
        alone_s = _replayed_s(runner, op, 4)
        name = "below" if other < turn else "above"
        runner._on_stream(name, wire.receive, ())
        time.sleep(0.02)  # by then it waits
        slowdown = _replayed_s(runner, op, 4) / alone_s
        dist.barrier()
    if runner.on_cuda:
        torch.cuda.synchronize()
    dist.barrier()
    return slowdown


class Wire(NamedTuple):
    """A message from one stage of two to the other."""

    send: Any
    receive: Any


def _wire_to(runner: OrderRunner, stage: int) -> Wire:
    """The first visit's activations or gradients."""
    assert runner.links is not None
    action = Action.SEND_ACTIVATIONS if stage else Action.SEND_GRADIENTS
    op = _transfer_op(runner, action, 0)
    return wire_of(runner, op, 0, runner.stage != stage)


def _transfer_op(runner: OrderRunner, action: Action, visit: int) -> int:
    first = runner.schedule.graph.first_op[visit]
    actions = [operation.action for operation in runner.schedule.operations]
    return first + actions.index(action)


def wire_of(runner: OrderRunner, op: int, size: int, sends: bool) -> Wire:
    """One transfer of a plan, by itself. Its buffers hold nothing that is needed."""
    assert runner.links is not None
    targets, flag = runner.targets(op, size), runner.flags.get(op)
    channels = runner.links.sends if sends else runner.links.receives
    channel = channels[1 - runner.stage]
    sources = [torch.zeros_like(target) for target in targets] if sends else []

    def receive() -> None:
        if flag is not None:
            assert runner.memory is not None
            runner.memory.heed(flag, *targets)
            return
        for target in targets:
            dist.recv(target, channel.rank, group=channel.group)

    return Wire(lambda: runner.move(sources, targets, channel, flag), receive)


def exchange_contention(runner: OrderRunner, op: int) -> tuple[float, float]:
    """(computing's, exchanging's) time beside the other, over the time alone."""
    visit = runner.program(op, 0)
    buffer = torch.zeros_like(visit.sent_TD)

    def exchange() -> None:
        runner.add_up([buffer])

    compute_s = _highest(_replayed_s(runner, op, 8))
    comm_s = _highest(summed_s(runner, exchange)[1])
    found = []
    # Each is watched while the other is busy all the time.
    for watched, share in ((COMPUTE, 0.5), (COMM, 2.0)):
        counts = {COMPUTE: 16, COMM: max(2, round(16 * compute_s / comm_s / share))}
        dist.barrier()
        together = _together(runner, {COMPUTE: runner.graph(op, 0), COMM: exchange}, counts)
        alone_s = counts[watched] * (compute_s if watched == COMPUTE else comm_s)
        found.append(together[watched] / alone_s)
    return found[0], found[1]


def _highest(value: float) -> float:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return max(every)


def _together(runner: OrderRunner, works: dict[str, Any], counts: dict[str, int]) -> dict[str, Any]:
    """Seconds that each stream is busy."""
    if not runner.on_cuda:
        works[COMM]()
        return {name: _CPU_S * counts[name] for name in works}
    marks = {}
    with torch.cuda.stream(runner._streams[COMPUTE]):
        torch.cuda._sleep(max(counts.values()) * _CYCLES_AHEAD)
        begun = torch.cuda.current_stream().record_event()
    for name, work in works.items():
        with torch.cuda.stream(runner._streams[name]):
            runner._streams[name].wait_event(begun)
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(counts[name]):
                work()
            if name == COMM:
                runner.join()
            stop.record()
        marks[name] = (start, stop)
    torch.cuda.synchronize()
    return {name: start.elapsed_time(stop) / 1e3 for name, (start, stop) in marks.items()}


def _seconds(runner: OrderRunner, work: Any, repeats: int, stream_name: str = COMPUTE) -> float:
    if not runner.on_cuda:
        work()
        return _CPU_S
    stream = runner._streams[stream_name]
    with torch.cuda.stream(stream):
        work()
        runner.join()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            work()
        runner.join()
        stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3 / repeats


def _replayed_s(runner: OrderRunner, op: int, repeats: int, size: int = 0) -> float:
    """Only a graph can run again and again; on a CPU an operation consumes what it needs."""
    return _seconds(runner, runner.graph(op, size), repeats) if runner.on_cuda else _CPU_S


def _transfer_seconds(runner: OrderRunner, op: int, size: int) -> tuple[float, float]:
    action = runner.schedule.operation(op).action
    if action is Action.REDUCE:
        return summed_s(runner, runner.summing(op, size))
    assert action in TRANSFERS
    sends = runner.schedule.graph.stage_of[op] == runner.stage
    wire = wire_of(runner, op, size, sends)
    seconds = _seconds(runner, wire.send if sends else wire.receive, 5)
    return seconds, seconds


def summed_s(runner: OrderRunner, work: Any) -> tuple[float, float]:
    """Of an exchange between ranks that do nothing else: (each begins when the one before has
    ended, all in a row). Launched ahead: what the host takes is nothing that a link does."""
    if not runner.on_cuda:
        work()
        return _CPU_S, _CPU_S
    return _launched_ahead_s(runner, work, True), _launched_ahead_s(runner, work, False)


def _launched_ahead_s(runner: OrderRunner, work: Any, by_itself: bool) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(runner._streams[COMM]):
        torch.cuda._sleep((1 + _SUMS_IN_A_ROW) * _CYCLES_AHEAD)
        work()
        runner.join()
        start.record()
        for _ in range(_SUMS_IN_A_ROW):
            work()
            if by_itself:
                runner.join()
        runner.join()
        stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3 / _SUMS_IN_A_ROW


def busiest_ms(base: Schedule, profile: Profile, kind: int) -> float:
    """Of a round, by the profile: the most that one stage computes, or that it communicates if
    ``kind`` is 1 and each operation waits for the one before."""
    sums = [0] * base.graph.num_streams
    for op, duration_ns in profile.durations_ns.items():
        sums[base.graph.stream_of[op]] += duration_ns
    return max(sums[kind::2]) / 1e6


def by_htask(base: Schedule, profile: Profile) -> tuple[tuple[int, ...], ...]:
    """As the player takes them: one row an hTask, the mean of its micro-batches."""
    durations = profile.durations_ns
    first, count = base.graph.first_op, len(base.operations)
    return tuple(
        tuple(
            round(statistics.mean(durations[first[visit] + i] for visit in visits))
            for i in range(count)
        )
        for visits in base.graph.visits_of
    )


def measured_shares(spans: list[list[TimedSpan]]) -> dict[str, Any]:
    """Of the traced rounds: the idle share of each rank's computing in the steady middle, and the
    three kinds of idle time as ``bubble_account`` has them, ranks in the place of stages."""
    steady, works, periods = [], [], []
    traced = rounds_of(spans)
    for own in spans:
        compute = sorted((s for s in own if s.stream == COMPUTE), key=lambda s: s.start_s)
        first, last = traced // 2 - 1, traced - 2
        op = compute[0].op
        starts = {s.round: s.start_s for s in compute if s.op == op}
        begin, end = starts[first], starts[last]
        busy = sum(max(0.0, min(s.stop_s, end) - max(s.start_s, begin)) for s in compute)
        steady.append(1 - busy / (end - begin))
        periods.append((end - begin) / (last - first))
        works.append(sum(s.stop_s - s.start_s for s in compute))
    total, period = max(s.stop_s for own in spans for s in own), max(periods)
    mean = statistics.mean(works)
    return {
        "steady_bubble_by_rank": steady, "steady_bubble": min(steady), "period_ms": 1e3 * period,
        "fill_drain": 1 - traced * period / total,
        "imbalance": (max(works) - mean) / total,
        "stalls": (traced * period - max(works)) / total,
        "exposed_ms": max(exposed_ms(own, traced) for own in spans),
    }  # fmt: skip


def rounds_of(spans: list[list[TimedSpan]]) -> int:
    return 1 + max(span.round for own in spans for span in own)


def exposed_ms(spans: list[TimedSpan], rounds: int) -> float:
    """Of a traced round, on one rank: communicating, while nothing is computed."""
    edges = []
    for span in spans:
        kind = 0 if span.stream == COMPUTE else 1
        edges += [(span.start_s, kind, 1), (span.stop_s, kind, -1)]
    counts, exposed_s, before_s = [0, 0], 0.0, 0.0
    for at_s, kind, change in sorted(edges):
        exposed_s += (at_s - before_s) * (counts[1] > 0 and not counts[0])
        counts[kind] += change
        before_s = at_s
    return 1e3 * exposed_s / rounds


# ------------------------------------------------------------------------------------ ranks


def rank_main(rank: int, device: torch.device, args: Any) -> None:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if device.type == "cuda":
        spare(args.spared)
    if args.plain:
        static_stage.OWN_SHRINK = static_stage.OVERLAP = False
    me = Rank(rank, device, dtype, shape_of(args), shared_memory(rank, device, args))
    for configs in args.layouts:
        run_layout(configs, me, args)


def plan_ahead(args: Any) -> None:
    """What takes seconds and needs no GPU."""
    for config in (config for configs in args.layouts for config in configs):
        assert config.groups


def spare(count: int) -> None:
    """Multiprocessors, see ``spare_sms``."""
    from muxtune_kernels.multi_lora.tuning import spare_sms  # triton is on GPU machines only

    spare_sms(count)


def shape_of(args: Any) -> ModelShape:
    shape = TINY if args.device == "cpu" else model_shape(args.shape)
    return shape._replace(num_layers=args.layers) if args.layers else shape


def shared_memory(rank: int, device: torch.device, args: Any) -> PeerMemory | None:
    """None where NCCL is asked for, or where ranks cannot reach each other's memory."""
    if args.messages == "nccl":
        return None
    try:
        if args.messages == "host":
            num_bytes = HOST_BYTES[device.type]
            return PeerMemory(rank, range(2), device, num_bytes, through_host=True)
        return PeerMemory(rank, range(2), device, SHARED_BYTES[device.type])
    except Unavailable as reason:
        print(f"rank {rank}: messages go by NCCL, because {reason}", flush=True)
        return None


def run_layout(configs: list[Config], me: Rank, args: Any) -> None:
    replica, held = configs[0].replica, None
    for config in configs:
        if not affordable(config, args, held is None):
            continue
        start_s = time.perf_counter()
        # Ranks that hang end here, not with the budget: what comes after has its time.
        patience_s = HUNG_S[args.device]
        faulthandler.dump_traceback_later(COMPILING_S + patience_s, exit=True)
        held = held or hold(replica, me)
        rank = me._replace(memory=None) if config.by_nccl else me
        row = run_config(config, rank, *held, args.rounds)
        if me.device.type == "cuda":
            torch.cuda.empty_cache()
        if me.rank == 0:
            spent_s = time.perf_counter() - start_s
            label = args.label.replace("copies", "NCCL") if config.by_nccl else args.label
            tell(args, {**row, "label": label, "spared": args.spared, "seconds": spent_s})
            print(
                f"[{spent_s:.1f} s] {label}: {config.name}: {row['round_ms']:.1f} ms a round "
                f"({row['prediction_error']:+.1%} predicted), "
                f"{row['effective_tokens_per_s']:,.0f} tok/s, bubble {row['steady_bubble']:.1%}",
                flush=True,
            )


def hold(replica: ReplicaShape, me: Rank) -> tuple[Weights, Any, Links | None]:
    """What a rank holds of a layout: its weights, as a part of the model, and its links."""
    layout = Layout((replica,))
    place = layout.places[me.rank if replica.num_gpus > 1 else 0]
    links = Links(layout, place, me.device, streams_wait=True) if replica.num_gpus > 1 else None
    weights = Weights(me.shape, replica, place.stage, place.part, me.device, me.dtype)
    groups = (None, None) if links is None else (links.tp, links.step)
    return weights, weights.stage_part(*groups), links


def affordable(config: Config, args: Any, is_first: bool) -> bool:
    """Whether it ends before the deadline, as rank 0 sees it."""
    expected_s = (
        config.expected_s(args.rounds, is_first, args.layers) if args.device == "cuda" else 0.0
    )
    left_s = args.deadline - time.time()
    box = [expected_s <= left_s]
    dist.broadcast_object_list(box, src=0)
    if dist.get_rank() == 0:
        what = "begins" if box[0] else "is left out"
        print(f"{config.name} {what}: {expected_s:.0f} s expected, {left_s:.0f} s left", flush=True)
    return box[0]


def tell(args: Any, row: dict[str, Any]) -> None:
    """One line a row, at once: a run that is cut off has told what it knew."""
    with Path(args.out).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def facts(args: Any) -> dict[str, Any]:
    import platform

    on_cuda = args.device == "cuda"
    return {
        "command": f"python -m experiments.two_gpus.run --only {args.only} --rounds {args.rounds}",
        "device": gpu_name() if on_cuda else platform.machine(),
        "torch": torch.__version__, "shape": args.shape if on_cuda else "tiny",
        "nccl": {name: value for name, value in os.environ.items() if name.startswith("NCCL_")},
        "date": time.strftime("%Y-%m-%d"), "tasks": NUM_TASKS, "rank": RANK,
    }  # fmt: skip


def gpu_name() -> str:
    """Without touching it."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="two_gpus.jsonl")
    parser.add_argument("--shape", default="llama-2-13b")
    parser.add_argument("--layers", type=int, default=0, help="of the model, 0: all of them")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--only", default="one,pp,tp", help=f"of {', '.join(SETS)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--messages",
        choices=("copies", "host", "nccl"),
        default="copies",
        help="how ranks' messages go",
    )
    parser.add_argument(
        "--spared", type=int, default=0, help="multiprocessors that products leave to NCCL"
    )
    parser.add_argument(
        "--plain", action="store_true", help="stages without what their products do by themselves"
    )
    parser.add_argument("--label", default="", help="of the rows: which link, which limits")
    parser.add_argument("--budget", type=float, default=1e6, help="seconds for all of it")
    parser.add_argument("--gate", default="", help="see ``ranks.start_ranks``")
    args = parser.parse_args()
    args.layouts = [list(SETS[name]) for name in args.only.split(",")]
    tell(args, {"facts": facts(args), "label": args.label})
    start_ranks(rank_main, args, args.budget, args.gate, plan_ahead)


if __name__ == "__main__":
    main()
