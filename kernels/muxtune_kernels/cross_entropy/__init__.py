"""Linear and cross-entropy in one, per task, without the full logits."""

from .op import multi_task_cross_entropy, multi_task_cross_entropy_grad, multi_task_nll
from .reference import multi_task_cross_entropy_reference

__all__ = [
    "multi_task_cross_entropy",
    "multi_task_cross_entropy_grad",
    "multi_task_cross_entropy_reference",
    "multi_task_nll",
]
