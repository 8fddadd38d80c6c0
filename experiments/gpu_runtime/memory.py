"""Peak memory against the number of tasks, to the first refusal, beside separate instances.

Tasks are of rank 16 on all linears, lengths of the mix of the step measurement; each number is
planned by ``muxtune``'s planner under the GPU's limit and trained for a few passes by the
executor, in deterministic mode with one shape an hTask, which captures what the peak needs and no
more; adapters start at zero, which takes no time to draw. HF PEFT instances have a copy of the base
model each and run one step with all their activations held, as separate processes would hold them,
until the next one does not fit.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator
from typing import Any

import torch
from bench import ENDS, INSTANCE, MODEL, Bench, store_of

from experiments.step_throughput import baselines
from experiments.step_throughput.product import MIX
from muxtune import build
from muxtune.alone import SOLO_PLANNER
from muxtune.config import conf_dir, register_schemas
from muxtune.cost.analytic import AnalyticOptions
from muxtune.cost.book import CostBook
from muxtune.cost.memory import memory_options
from muxtune.cost.shapes import ModelShape
from muxtune.fleet import instance_view, task_view
from muxtune.planners.muxtune import MuxTunePlanner
from muxtune.profiling.steps import blank_state
from muxtune.registry import PLANNERS
from muxtune.runtime.bank import drop
from muxtune.runtime.captured_runner import CapturedRunner
from muxtune.runtime.random_models import random_model
from muxtune.types import (
    AdapterSpec,
    DataSpec,
    InstanceSpec,
    Plan,
    Refusal,
    TaskSpec,
)
from muxtune.workload.synthetic import SyntheticLibrary

NUMBERS = (32, 1, 8, 64, 16, 4, 2, 48)  # what the time may not suffice for last
ONLY: tuple[int, ...] = ()  # these numbers, where there are any
PASSES = 1  # of each hTask
MOST_INSTANCES = 99  # of HF PEFT; 0: they are left out
LIMIT_S = 3600.0  # no further number is begun after these
LAYERS = 0  # of the model that runs, where it is not the one that is planned for, to rehearse
DEVICE = "H100-SXM"


def run(shape: ModelShape, device: str) -> Iterator[dict[str, Any]]:
    """What is known so far, after each instance of HF PEFT and each number of tasks."""
    start_s = time.perf_counter()
    planner, limit_bytes = planner_of(shape)
    largest = _largest(planner, shape, limit_bytes)
    out: dict[str, Any] = {
        "limit_bytes": limit_bytes, "largest_that_is_planned": largest, "curve": [], "hf_peft": [],
        "refusal": _plan(planner, tasks_of(largest + 1), limit_bytes)._asdict(),
        "colocated": _colocated(shape, limit_bytes),
    }  # fmt: skip
    if LAYERS:
        out["rehearsal"], shape = True, shape._replace(num_layers=LAYERS)
    for row in hf_instances(shape, device, most=min(MOST_INSTANCES, 1 if LAYERS else 99)):
        out["hf_peft"].append(row)
        print(row, flush=True)
        yield out
    _free()
    store = store_of(shape, device)
    for number in by_value(largest):
        plan = _plan(planner, tasks_of(number), limit_bytes)
        assert isinstance(plan, Plan)
        if time.perf_counter() - start_s > LIMIT_S:
            out.setdefault("left_out_for_want_of_time", []).append(number)
            continue
        try:
            row = _measured(store, shape, tasks_of(number), plan)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            out.setdefault("errors", {})[number] = str(error)[-2000:]
            print(f"{number} tasks: {error}", flush=True)
        else:
            out["curve"].append(row)
            out["curve"].sort(key=lambda row: row["tasks"])
            print(json.dumps(row), flush=True)
        _free()
        yield out | {"marginal_bytes_a_task": _marginal(out["curve"])}


def plans(shape: ModelShape) -> Iterator[tuple[Plan, list[TaskSpec]]]:
    """Of all numbers of tasks that are measured."""
    planner, limit_bytes = planner_of(shape)
    for number in by_value(_largest(planner, shape, limit_bytes)):
        tasks = tasks_of(number)
        plan = _plan(planner, tasks, limit_bytes)
        assert isinstance(plan, Plan)
        yield plan, tasks


def by_value(largest: int) -> list[int]:
    """Numbers of tasks, what the time may not suffice for last; the largest one, which says how
    far it goes, after the first three."""
    if ONLY:
        return [number for number in ONLY if number <= largest]
    numbers = [number for number in NUMBERS if number < largest]
    return [*numbers[:3], largest, *numbers[3:]]


def planner_of(shape: ModelShape) -> tuple[MuxTunePlanner, int]:
    """The planner and the limit of ``cluster=h100_x1``."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    register_schemas()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config: Any = OmegaConf.to_object(
            compose("train", overrides=["cluster=h100_x1", "model=llama-2-7b"])
        )
    costs = CostBook(models={MODEL: shape})
    return MuxTunePlanner(costs=costs, max_shapes=1), build.gpu_memory_limit_bytes(config.cluster)


def tasks_of(number: int) -> list[TaskSpec]:
    adapter = AdapterSpec(rank=16, alpha=32.0, targets=("all-linear",))
    return [
        TaskSpec(
            f"t{i:03d}", MODEL, adapter=adapter, batch_size=8, num_steps=1000, seed=i,
            data=DataSpec(histogram=MIX[i % len(MIX)], max_length_tokens=512),
        )
        for i in range(number)
    ]  # fmt: skip


def _plan(planner: Any, tasks: list[TaskSpec], limit_bytes: int) -> Plan | Refusal:
    library = SyntheticLibrary(0)
    spec = InstanceSpec(INSTANCE, MODEL, DEVICE, limit_bytes)
    return planner.plan(instance_view(spec, [task_view(t, library.add(t)) for t in tasks]), None)


def _largest(planner: MuxTunePlanner, shape: ModelShape, limit_bytes: int) -> int:
    """The largest number of tasks for which a plan exists, found by halving."""
    low, high = 1, 2
    while isinstance(_plan(planner, tasks_of(high), limit_bytes), Plan):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = isinstance(_plan(planner, tasks_of(middle), limit_bytes), Plan)
        low, high = (middle, high) if fits else (low, middle)
    return low


def _measured(store: Any, shape: ModelShape, tasks: list[TaskSpec], plan: Plan) -> dict[str, Any]:
    """A few passes of each hTask; the ledger's prediction beside, without the context, which the
    allocator does not know. Raises RuntimeError when a task ends."""
    start_s = time.perf_counter()
    bench = Bench(store, shape.vocab, deterministic=True)
    (instance,) = bench.executor._instances.values()
    instance.create_state = lambda task, num_steps: blank_state(instance.bank, task, num_steps)
    try:
        bench.prepare(tasks)
        bench.executor.apply(plan)
        bench.until(lambda: bool(_ended(bench)) or least_passes(bench) >= PASSES)
        if text := _ended(bench):
            raise RuntimeError(f"{text}; {bench.recorder.notices}")
        return _row(bench, shape, len(tasks), plan) | {"seconds": time.perf_counter() - start_s}
    finally:
        for task in bench.executor.tasks.values():
            if task.state is not None:
                drop(task.state)  # nobody wants it back on the host
        bench.close()


def _ended(bench: Bench) -> str:
    """Why a task has ended, before anybody asked for it."""
    return "; ".join(str(event.data) for event in bench.events if event.kind in ENDS)[:2000]


def _row(bench: Bench, shape: ModelShape, num_tasks: int, plan: Plan) -> dict[str, Any]:
    peak = bench.executor.memory.peak_bytes()
    context = memory_options(shape, "gpu").framework_bytes
    predicted = plan.predicted.peak_memory_bytes.value - context
    row = {
        "tasks": num_tasks, "peak_bytes": peak, "predicted_bytes": predicted,
        "prediction_error": predicted / peak - 1,
        "idle_bytes": bench.executor._idle_bytes(),
        "htasks": [
            {"tasks": len(htask.slot_of), "rows": htask.shapes[-1].padded_tokens}
            for htask in plan.htasks
        ],
        "notices": bench.recorder.notices,
    }  # fmt: skip
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        row |= {"reserved_bytes": torch.cuda.max_memory_reserved(), "taken_bytes": total - free}
    return row


def least_passes(bench: Bench) -> int:
    """Of any hTask; without captured ones, rounds count."""
    (instance,) = bench.executor._instances.values()
    counts = [
        sum(item.steps.replays.values())
        for item in instance._runners
        if isinstance(item, CapturedRunner)
    ]
    return min(counts) if counts else len(bench.recorder.rounds)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _marginal(curve: list[dict[str, Any]]) -> float | None:
    """Of one more task, least squares over the curve: its own state and what its rows need."""
    if len(curve) < 2:
        return None
    x = torch.tensor([row["tasks"] for row in curve], dtype=torch.float64)
    y = torch.tensor([row["peak_bytes"] for row in curve], dtype=torch.float64)
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def _colocated(shape: ModelShape, limit_bytes: int) -> dict[str, Any]:
    """How many separate instances of one task the simulator takes a GPU to hold."""
    costs = CostBook(models={MODEL: shape}).with_options(AnalyticOptions.eager())
    exclusive = PLANNERS.get(SOLO_PLANNER)(costs=costs)
    plans = [_plan(exclusive, [task], limit_bytes) for task in tasks_of(len(MIX))]
    each = [p.predicted.peak_memory_bytes.value for p in plans if isinstance(p, Plan)]
    return {"predicted_bytes_each": each, "instances": int(limit_bytes // max(each))}


def hf_instances(shape: ModelShape, device: str, most: int) -> Iterator[dict[str, Any]]:
    """One more instance each time, until one does not fit; the longest batch of its task."""
    held: list[Any] = []
    where = torch.device(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    library = SyntheticLibrary(0)
    for number in range(1, most + 1):
        task = tasks_of(number)[-1]
        library.add(task)
        try:
            held.append(_one_instance(shape, where, dtype, library, task))
        except torch.OutOfMemoryError:
            yield {"instances": number, "fits": False}
            return
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        yield {"instances": number, "fits": True, "peak_bytes": peak}


def _one_instance(
    shape: ModelShape, where: torch.device, dtype: torch.dtype, library: Any, task: TaskSpec
) -> Any:
    """A model of its own with one adapter and its optimizer, after a step, and with what the next
    step's backward needs still held."""
    model, _ = random_model(shape, 0, where, dtype)
    model.requires_grad_(False).to(where, dtype)
    wrapped, optimizer = baselines.peft_model(model, task.adapter.rank)
    tokens = max(
        (sum(s.tokens for s in library.batch(task.task_id, step)), step) for step in range(64)
    )
    lengths = [sample.tokens for sample in library.batch(task.task_id, tokens[1])]
    ids = torch.randint(1, shape.vocab, (len(lengths), max(lengths)), device=where)
    mask = torch.arange(max(lengths), device=where) < torch.tensor(lengths, device=where)[:, None]
    batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": ids}
    wrapped(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, wrapped, optimizer, wrapped(**batch).loss
