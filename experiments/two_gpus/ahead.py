"""The kernels of the stages, compiled without a GPU: see ``muxtune_kernels.without_gpu``."""

from __future__ import annotations

import torch

from experiments.two_gpus.cases import MODEL, Config
from experiments.two_gpus.grouping import ROW_STEP
from experiments.two_gpus.layouts import Weights
from experiments.two_gpus.run import known_rounds, make_programs, spare, visit_layouts
from muxtune.cost.shapes import ModelShape, model_shape
from muxtune.runtime.distributed.schedule import operations_of
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
