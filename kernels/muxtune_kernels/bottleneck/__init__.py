"""Many tasks' serial bottleneck adapters behind one frozen linear."""

from .explicit import (
    BottleneckGrads,
    BottleneckPool,
    bottleneck_backward,
    bottleneck_forward,
)
from .op import multi_task_bottleneck
from .reference import multi_task_bottleneck_reference

__all__ = [
    "BottleneckGrads",
    "BottleneckPool",
    "bottleneck_backward",
    "bottleneck_forward",
    "multi_task_bottleneck",
    "multi_task_bottleneck_reference",
]
