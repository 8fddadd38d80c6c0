"""AdamW over all tasks' adapters at once, each task with its own settings and step count."""

from .op import AdamWPool, AdamWResult, AdamWSlots, adamw_tables, multi_task_adamw_

__all__ = ["AdamWPool", "AdamWResult", "AdamWSlots", "adamw_tables", "multi_task_adamw_"]
