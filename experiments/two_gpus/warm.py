"""Compile the kernels that ``run`` needs, in one process for each kind of configuration.

python -m experiments.two_gpus.warm     # on a machine with GPUs

One layer is enough: kernels depend on widths, rows and slots.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
import traceback
from typing import Any

import torch

from experiments.two_gpus.cases import SETS, Config
from experiments.two_gpus.layouts import Weights
from experiments.two_gpus.lease import chosen
from experiments.two_gpus.run import (
    TINY,
    Rank,
    Visits,
    _loader,
    chooser,
    last_metrics,
    make_visits,
    spare,
)
from muxtune.cost.shapes import model_shape
from muxtune.runtime.distributed import static_stage
from muxtune.runtime.distributed.order_runner import OrderRunner
from muxtune.runtime.distributed.schedule import sequential_schedule
from muxtune.runtime.static_step.program import OVERLAP, OWN_SHRINK
from muxtune.types import ReplicaShape

MOST_GAP = 0.02  # of losses and gradient norms in bfloat16


def kinds(phases: str = "") -> list[tuple[int, Config]]:
    """Configurations that differ in their kernels, whose orders do not matter; before each, how
    many multiprocessors it spares."""
    found: dict[Any, tuple[int, Config]] = {}
    for phase in chosen(phases):
        for config in (config for name in phase.sets.split(",") for config in SETS[name]):
            key = (phase.spared, config.replica.tp, config.groups, config.parts)
            found.setdefault(key, (phase.spared, config))
    return list(found.values())


def compile_kind(number: int, spared: int, config: Config, args: argparse.Namespace) -> None:
    """Every operation once, by itself; the first kind's rounds too, in both forms of a stage."""
    begin_s, on_cuda = time.perf_counter(), args.device == "cuda"
    device = torch.device(f"cuda:{number % torch.cuda.device_count()}" if on_cuda else "cpu")
    if on_cuda:
        torch.cuda.set_device(device)
        spare(spared)
    shape = (model_shape(args.shape) if on_cuda else TINY)._replace(num_layers=1)
    replica = ReplicaShape(config.replica.tp, 1)
    me = Rank(0, device, torch.bfloat16 if on_cuda else torch.float32, shape)
    weights = Weights(shape, replica, 0, 0, device, me.dtype)
    if number == 0:
        check(config, me, weights)
    runner, _ = runner_of(config, me, weights)
    runner._each_visit(runner._run_plain)
    if on_cuda:
        torch.cuda.synchronize()
    spent_s = time.perf_counter() - begin_s
    print(f"[{spent_s:.1f} s] compiled {config.name}, {spared} spared", flush=True)


def runner_of(config: Config, me: Rank, weights: Weights) -> tuple[OrderRunner, Visits]:
    visits = make_visits(config, me, weights, weights.stage_part())
    htasks = tuple(i // config.parts for i in range(len(visits.programs)))
    base = sequential_schedule(htasks, len(config.groups), me.shape, ReplicaShape(1, 1))
    load, choose = _loader(visits), chooser(visits)
    runner = OrderRunner(base, 0, visits.programs, None, load, me.device, choose=choose)
    return runner, visits


def check(config: Config, me: Rank, weights: Weights) -> None:
    """Captured stages train alike in both forms. Raises RuntimeError where they do not."""
    found = []
    for own in (True, False):
        static_stage.OWN_SHRINK = static_stage.OVERLAP = own
        runner, visits = runner_of(config, me, weights)
        runner.prepare()
        runner.run(1)
        found.append(last_metrics(visits, 0))
    static_stage.OWN_SHRINK, static_stage.OVERLAP = OWN_SHRINK, OVERLAP
    mine, plain = (torch.tensor(metrics) for metrics in found)
    gap = float(((mine - plain) / plain).abs().max())
    print(f"losses and norms of both forms of a stage differ by {gap:.2g}", flush=True)
    if not gap < MOST_GAP:
        raise RuntimeError(f"stages differ by {gap}")


def _main(number: int, spared: int, config: Config, args: argparse.Namespace) -> None:
    code = 1
    try:
        compile_kind(number, spared, config, args)
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-2-13b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--phases", default="", help="of ``lease``")
    parser.add_argument("--limit-s", type=float, default=90.0)
    args = parser.parse_args()
    end_s = time.monotonic() + args.limit_s
    context = multiprocessing.get_context("spawn")
    at_work = [
        context.Process(target=_main, args=(number, *kind, args))
        for number, kind in enumerate(kinds(args.phases))
    ]
    for process in at_work:
        process.start()
    for process in at_work:
        process.join(max(0.0, end_s - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    raise SystemExit(max(abs(process.exitcode or 0) for process in at_work))


if __name__ == "__main__":
    main()
