"""The frozen backbone alone, as a bound: our own program without adapters, and compiled blocks,
both as CUDA graphs; and how long a captured size takes on the device.

Shape suffixes: T rows, D model features, S slots.
"""

from __future__ import annotations

import statistics
from typing import Any

import baselines
import numpy as np
import torch
from workload import Workload

from muxtune.runtime.static_step import (
    AdapterPools,
    CapturedSteps,
    SlotSpec,
    StaticModel,
    StepLayout,
    StepProgram,
)
from muxtune.runtime.static_step.inputs import StepInputs

MAX_SEQLEN, MAX_BOUNDS = 512, 96
STEADY_REPLAYS = 15  # of some 0.17 s each


def program_without_adapters(static: StaticModel, num_slots: int, most_rows: int) -> StepProgram:
    """With slots that adapt nothing: products by the library, no optimizer."""
    pools = AdapterPools(static, (SlotSpec(0),) * num_slots, False)
    inputs = StepInputs(StepLayout(most_rows, num_slots, MAX_BOUNDS, MAX_SEQLEN), static.device)
    return StepProgram(static, pools, inputs)


def replay_seconds(steps: CapturedSteps, num_rows: int, repeats: int = 7) -> float:
    """Device time of one size on what its buffers hold."""
    graph, stream = steps._graphs[num_rows], steps.stream
    assert stream is not None
    with torch.cuda.stream(stream):
        return statistics.median(baselines.gpu_seconds(graph.replay, repeats))


def slots_of(work: Workload) -> dict:
    return {slot: item for part in next(work.rounds(7)) for slot, item in part.slots.items()}


def cut(micro_batches: list, num_rows: int) -> list:
    """Sequences of the round that fit; the last one is cut, the first ones repeat if need be."""
    source = [item for part in micro_batches for item in part.sequences]
    left, out, i = num_rows, [], 0
    while left > 1:
        item = source[i % len(source)]
        tokens_n = item.tokens_n[:left]
        out.append(item._replace(tokens_n=tokens_n, is_target_n=item.is_target_n[: len(tokens_n)]))
        left, i = left - len(tokens_n), i + 1
    return out


def profile_kernels(steps: CapturedSteps, num_rows: int, top: int = 45) -> list[dict[str, Any]]:
    """One replay of a size: calls and milliseconds of each kernel, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    graph = steps._graphs[num_rows]
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        graph.replay()
        torch.cuda.synchronize()
    totals: dict[str, list[float]] = {}
    for event in traced.events() or ():
        entry = totals.setdefault(event.name[:90], [0, 0.0])
        entry[0] += 1
        entry[1] += event.device_time_total
    rows = sorted(totals.items(), key=lambda item: -item[1][1])[:top]
    return [{"kernel": name, "calls": calls, "ms": us / 1e3} for name, (calls, us) in rows]


def frozen(static: StaticModel, work: Workload, sizes: list[int]) -> dict[str, Any]:
    """Milliseconds of each size, rows filled by a round of the workload cut to fit."""
    steps = CapturedSteps(program_without_adapters(static, len(work.ranks), max(sizes)), sizes)
    steps.capture()
    ms = {}
    for num_rows in sizes:
        rows = cut(next(work.rounds(7)), num_rows)
        steps.step(rows, slots_of(work), num_rows=num_rows).result()
        ms[num_rows] = 1e3 * replay_seconds(steps, num_rows, STEADY_REPLAYS)
    return {"device_ms": ms, "tokens_per_s": {n: 1e3 * n / t for n, t in ms.items()}}


def compiled_bound(static: StaticModel, work: Workload, sizes: list[int]) -> dict[str, Any]:
    ms = {}
    for num_rows in sizes:
        bounds = np.cumsum([0, *(len(s.tokens_n) for s in cut(next(work.rounds(7)), num_rows))])
        bounds[-1] = num_rows
        backbone = baselines.CompiledBackbone(static, bounds.tolist(), MAX_SEQLEN)
        times = baselines.gpu_seconds(backbone.graph.replay, STEADY_REPLAYS)
        ms[num_rows] = 1e3 * statistics.median(times)
        del backbone
        torch.cuda.empty_cache()
    return {"device_ms": ms, "tokens_per_s": {n: 1e3 * n / t for n, t in ms.items()}}
