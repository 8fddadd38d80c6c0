"""The kernels of the stages, compiled without a GPU: see ``muxtune_kernels.without_gpu``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from experiments.two_gpus.cases import MODEL, Config
from experiments.two_gpus.grouping import ROW_STEP
from experiments.two_gpus.layouts import Weights
from experiments.two_gpus.run import known_rounds, make_programs, spare, visit_layouts
from muxtune import build
from muxtune.commands.ranks import planner_options
from muxtune.config import conf_dir, register_schemas
from muxtune.cost.shapes import ModelShape, model_shape
from muxtune.fleet import instance_view, task_view
from muxtune.planning.step_builder import StepBuilder
from muxtune.profiling.ahead import launch_plan
from muxtune.runtime.captured_runner import capacity_of, rows_ahead
from muxtune.runtime.distributed.schedule import operations_of
from muxtune.runtime.distributed.static_runner import Sizes
from muxtune.runtime.distributed.static_stage import StagePart, VisitProgram
from muxtune.runtime.random_models import MAX_LENGTH_TOKENS
from muxtune.runtime.static_step.inputs import StepInputs
from muxtune.runtime.static_step.pool import StaticPool
from muxtune.types import Cursor, HTask, Plan, ReplicaShape, TaskSpec
from muxtune.workload.random_texts import RandomTexts
from muxtune_kernels.without_gpu import Compiled, Target, compiling_for, on_host

STAGE_PHASES = "0,1,2"  # of ``lease``


def compile_stages(
    config: Config, spared: int, target: Target, shape: ModelShape | None = None
) -> Compiled:
    """Into Triton's cache, what ``launch_stages`` launches."""
    with compiling_for(target) as compiled:
        launch_stages(config, spared, shape)
    return compiled


def launch_stages(config: Config, spared: int, shape: ModelShape | None = None) -> None:
    """Within ``compiling_for`` or ``asking_for``: all that the ranks of a configuration launch, in
    all sizes."""
    shape, replica = shape or model_shape(MODEL), config.replica
    with on_host():
        layouts, _ = visit_layouts(config, known_rounds(config, shape.vocab, 512), ROW_STEP)
    spare(spared)
    try:
        for stage in range(replica.pp):
            weights = Weights(shape, replica, stage, 0, torch.device("cpu"), torch.bfloat16)
            programs = make_programs(config, layouts, weights.stage_part())
            operations = [o for o in operations_of(shape, replica) if o.stage == stage]
            for program in (program for sizes in programs for program in sizes):
                for operation in operations:
                    program.run(operation)
    finally:
        spare(0)


class Planned(NamedTuple):
    """The first plan of a ``muxtune train`` whose tasks are all there from the start. ``sizes``: of
    each hTask's programs on ranks."""

    shape: ModelShape
    plan: Plan
    tasks: dict[str, TaskSpec]
    lengths: RandomTexts
    deterministic: bool
    sizes: list[Sizes]


def planned(words: Sequence[str]) -> Planned:
    """``words``: of its command line."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    register_schemas()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config: Any = OmegaConf.to_object(compose("train", overrides=[*words, "output_dir=unused"]))
    costs = build.cost_book(config)
    tasks = list(build.tasks(config, costs))
    shape = build.shape_of(config.model)
    lengths = RandomTexts(shape.vocab, config.seed)
    views = [task_view(task, lengths.add(task)) for task in tasks]
    instance = instance_view(build.instances(config, costs, tasks)[0], views)
    plan = build.planner(planner_options(config), costs).plan(instance, None)
    if not isinstance(plan, Plan):
        raise RuntimeError(f"no plan for all tasks: {plan.reason}")
    deterministic = bool(config.backend.get("deterministic", True))
    by_id = {task.task_id: task for task in tasks}
    cursors = {task_id: Cursor() for task_id in plan.task_ids}
    ahead = {} if deterministic else rows_ahead(plan, cursors, StepBuilder(), lengths)
    sizes = []
    for index, htask in enumerate(plan.htasks):
        capacity = capacity_of(htask, [by_id[name] for name in htask.slot_of], MAX_LENGTH_TOKENS)
        sizes.append(Sizes.of(capacity, ahead.get(index, ()), deterministic))
    return Planned(shape, plan, by_id, lengths, deterministic, sizes)


def launch_command(words: Sequence[str]) -> None:
    """Within ``compiling_for`` or ``asking_for``: all that the ranks of this ``muxtune train``
    launch under its first plan."""
    with on_host():
        found = planned(words)
    replica = found.plan.replicas[0]
    if replica.num_gpus == 1:
        launch_plan(found.shape, found.plan, found.tasks, found.lengths, found.deterministic)
        return
    for stage in range(replica.pp):
        weights = Weights(found.shape, replica, stage, 0, torch.device("cpu"), torch.bfloat16)
        part = weights.stage_part()
        for htask, sizes in zip(found.plan.htasks, found.sizes, strict=True):
            _launch_htask(part, htask, sizes, found, stage, replica)


def _launch_htask(
    part: StagePart, htask: HTask, sizes: Sizes, found: Planned, stage: int, replica: ReplicaShape
) -> None:
    """As ``HTaskPrograms`` makes and runs it."""
    pool = StaticPool(part.model, htask.shapes[0].slots, found.deterministic)
    operations = [o for o in operations_of(found.shape, replica) if o.stage == stage]
    for num_rows in sizes.rows:
        layout = sizes.capacity.layout._replace(max_rows=num_rows)
        inputs = StepInputs(layout, part.model.device)
        program = VisitProgram(
            part, pool.adapters, inputs, num_rows, found.deterministic, accumulates=True
        )
        for operation in operations:
            program.run(operation)
