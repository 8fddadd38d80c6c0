"""The captured steps of a plan, compiled on a machine without the GPU that they are for.

Pools, sizes and programs are made by the code that trains, with all blocks of the model, so every
kernel gets the arguments that it will get there; see ``muxtune_kernels.without_gpu``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from muxtune.cost.shapes import ModelShape
from muxtune.planning.step_builder import StepBuilder
from muxtune.profiling.captured_ops import MAX_POSITIONS, NUM_BLOCKS, CapturedOps
from muxtune.profiling.compiling import OpJob, StepJob
from muxtune.protocols import LengthSource
from muxtune.runtime.captured_runner import (
    Capacity,
    capacity_of,
    program_of,
    rows_ahead,
    sizes_left,
)
from muxtune.runtime.random_models import blank_model
from muxtune.runtime.runners import longest_tokens
from muxtune.runtime.static_step import CapturedSteps, StaticModel
from muxtune.runtime.static_step.inputs import StepInputs
from muxtune.runtime.static_step.pool import StaticPool
from muxtune.runtime.static_step.virtual import VIRTUAL
from muxtune.types import Cursor, HTask, Plan, TaskSpec
from muxtune_kernels.without_gpu import (
    Compiled,
    Target,
    Wanted,
    asking_for,
    compiling_for,
    on_host,
)

Report = Callable[[float, str], None]


def compile_plan(
    shape: ModelShape,
    plan: Plan,
    tasks: Mapping[str, TaskSpec],
    lengths: LengthSource | None,
    target: Target,
    deterministic: bool = False,
    report: Report = lambda _share, _text: None,
) -> Compiled:
    """Into Triton's cache, what ``launch_plan`` launches."""
    with compiling_for(target) as compiled:
        launch_plan(shape, plan, tasks, lengths, deterministic, report)
    return compiled


def compile_ops(
    shape: ModelShape,
    jobs: Sequence[OpJob],
    target: Target,
    deterministic: bool = True,
    report: Report = lambda _share, _text: None,
) -> Compiled:
    """The same of operations that a profile or a suite times by themselves."""
    with compiling_for(target) as compiled:
        launch_ops(shape, jobs, deterministic, report)
    return compiled


def asked_by(
    jobs: Iterable[OpJob | StepJob], target: Target, deterministic: bool = True
) -> set[Wanted]:
    """What is to be compiled for them: of a step the sizes of its shapes."""
    ops: dict[ModelShape, list[OpJob]] = {}
    with asking_for(target) as wanted:
        for job in jobs:
            if isinstance(job, OpJob):
                ops.setdefault(job.shape, []).append(job)
            else:
                launch_plan(job.shape, job.plan(), job.specs(), None, deterministic)
        for shape, members in ops.items():
            launch_ops(shape, members, deterministic)
    return wanted


def launch_plan(
    shape: ModelShape,
    plan: Plan,
    tasks: Mapping[str, TaskSpec],
    lengths: LengthSource | None,
    deterministic: bool = False,
    report: Report = lambda _share, _text: None,
    windows: bool = False,
) -> None:
    """Within ``compiling_for`` or ``asking_for``: what an instance with this plan launches when all
    its tasks begin: in the sizes of its shapes, and in those that its first rounds are best off
    with (``lengths``: their data; None: no more sizes).

    Raises ``static_step.Unsupported`` for what no step can be captured of.
    """
    with on_host():
        longest = longest_tokens(blank_model(shape._replace(num_layers=1), torch.bfloat16).config)
        sizes = _sizes(plan, tasks, lengths, longest, deterministic)
    done, total = 0, sum(len(item) for _, item in sizes)
    model = blank_static_model(shape)
    for htask, (capacity, row_counts) in zip(plan.htasks, sizes, strict=True):
        steps = _steps(model, htask, capacity, deterministic, windows)
        for num_rows in row_counts:
            steps.compute_few(num_rows)
            done += 1
            report(done / total, f"{num_rows} rows")


def launch_ops(
    shape: ModelShape,
    jobs: Sequence[OpJob],
    deterministic: bool,
    report: Report = lambda _share, _text: None,
) -> None:
    """Within ``compiling_for`` or ``asking_for``."""
    bench = BlankOps(shape, deterministic)
    for done, job in enumerate(jobs):
        report(done / len(jobs), job.method)
        getattr(bench, job.method)(*job.arguments)


class BlankOps(CapturedOps):
    """Within ``compiling_for``: calls everything once, on tensors without values."""

    def __init__(self, shape: ModelShape, deterministic: bool) -> None:
        cpu, dtype = torch.device("cpu"), torch.bfloat16
        small = shape._replace(num_layers=NUM_BLOCKS)
        super().__init__(
            shape, cpu, dtype, deterministic=deterministic, num_blocks=NUM_BLOCKS,
            compiles_only=True, model=blank_static_model(small, dtype, MAX_POSITIONS),
        )  # fmt: skip

    def _fill(self, pool: StaticPool, inputs: StepInputs, of_slot: Any) -> None:
        pass

    def _fresh(self, rows: int, features: int) -> torch.Tensor:
        return torch.empty((rows, features), dtype=self.model.dtype, device=self.device)


def blank_static_model(
    shape: ModelShape, dtype: torch.dtype = torch.bfloat16, max_positions: int = 0
) -> StaticModel:
    """Within ``compiling_for`` or ``asking_for``. ``max_positions``: 0: as in training."""
    with on_host():
        model = blank_model(shape, dtype)
    model = model.to_empty(device="cpu")
    return StaticModel.of(model, max_positions or longest_tokens(model.config))


def _steps(
    model: StaticModel, htask: HTask, capacity: Capacity, deterministic: bool, windows: bool = False
) -> CapturedSteps:
    pool = StaticPool(model, htask.shapes[0].slots, deterministic)
    program = program_of(model, pool, capacity.layout, deterministic, windows)
    with on_host():
        return CapturedSteps(program, capacity.blocks, recompute=capacity.blocks)


def _sizes(
    plan: Plan,
    tasks: Mapping[str, TaskSpec],
    lengths: LengthSource | None,
    longest: int,
    deterministic: bool,
) -> list[tuple[Capacity, list[int]]]:
    """Of each hTask, what ``CapturedRunner.prepare`` captures, the largest first."""
    capacities = [_capacity(htask, tasks, longest) for htask in plan.htasks]
    ahead: Mapping[int, Collection[int]] = {}
    if lengths is not None and not deterministic:
        cursors = {task_id: Cursor() for task_id in plan.task_ids}
        ahead = rows_ahead(plan, cursors, StepBuilder(), lengths)
    most = sizes_left([len(capacity.blocks) for capacity in capacities])
    return [
        (
            capacity,
            sorted(
                {
                    *capacity.blocks,
                    *capacity.close_sizes(ahead.get(index, ()), capacity.blocks, False, most),
                },
                reverse=True,
            ),
        )
        for index, capacity in enumerate(capacities)
    ]


def _capacity(htask: HTask, tasks: Mapping[str, TaskSpec], longest: int) -> Capacity:
    slots = htask.shapes[0].slots
    virtual = max((slot.rank for slot in slots if slot.method in VIRTUAL), default=0)
    return capacity_of(htask, [tasks[task_id] for task_id in htask.slot_of], longest - virtual)
