"""Tensors that outlive the step in which they are first asked for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")

# Within what tables are built; see ``without_gpu``.
around: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext


def lasting(build: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
    """Decorates a cached builder of device tensors: they never lie in memory of captured graphs.

    A step is tried before it is captured, and what its thread allocates meanwhile may come from
    the memory that other graphs compute in. A table that outlives the trial would be overwritten
    by their next replay. So it is made by another thread, which allocates as usual.
    """

    @functools.wraps(build)
    def made(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Made:
        if not torch.cuda.is_initialized():
            with around():
                return build(*args, **kwargs)
        device = torch.cuda.current_device()  # a thread's own
        with ThreadPoolExecutor(1, initializer=lambda: torch.cuda.set_device(device)) as thread:
            return thread.submit(build, *args, **kwargs).result()

    return made
