"""What tenants are given for all their tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from muxtune.types import NS_PER_S, TaskSpec


class TenantDefaults(Protocol):
    """``deadline_s``: seconds after a task's arrival; None: none."""

    priority: int
    deadline_s: float | None


class TenantTasks:
    """Tasks with their tenants' priorities and deadlines, where they have none of their own. Looks
    like what it was made of: a list, or a stream with its notes and its load."""

    def __init__(self, tasks: Any, tenants: Mapping[str, TenantDefaults]) -> None:
        self._tasks, self._tenants = tasks, tenants

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[TaskSpec]:
        for task in self._tasks:
            yield self._completed(task)

    @property
    def unwrapped(self) -> Any:
        return self._tasks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tasks, name)

    def _completed(self, task: TaskSpec) -> TaskSpec:
        tenant = self._tenants.get(task.tenant)
        if tenant is None:
            return task
        deadline_ns = task.deadline_ns
        if deadline_ns is None and tenant.deadline_s is not None:
            deadline_ns = task.arrival_ns + round(tenant.deadline_s * NS_PER_S)
        return task._replace(priority=task.priority or tenant.priority, deadline_ns=deadline_ns)
