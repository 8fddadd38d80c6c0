"""When a task that has to wait will start: told to its tenant, and journalled.

Past saturation tasks queue. The k-th waiting task of a base model is predicted to start when the
k-th of the tasks that now run on its instances has ended, as the plans predict it; where more wait
than run, the running tasks stand for those that follow them. A forecast, not a decision: policies
may prefer others, plans change, and tasks arrive.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from muxtune.fleet import Fleet, InstanceRecord, TaskRecord
from muxtune.types import NS_PER_S, Refusal

NOBODY = np.zeros(0, dtype=np.int64)


def must_wait(fleet: Fleet, newcomers: Sequence[str]) -> Iterator[Refusal]:
    """Of the tasks that became ready now, why those that wait do not start, and from when on they
    are predicted to run."""
    waiting = [fleet.tasks[name] for name in newcomers if name in fleet.queue]
    behind = Counter(task.spec.model for task in waiting)
    for task in waiting:
        model = task.spec.model
        behind[model] -= 1
        ahead = fleet.queue.num_waiting(model) - behind[model] - 1
        task.predicted_start_ns = predicted_start_ns(fleet, model, ahead + 1)
        yield Refusal(
            f"the instances of {model} take no further task now, and {ahead} wait before it",
            (task.spec.task_id,),
            remedy="wait, or add an instance",
            predicted_start_ns=task.predicted_start_ns,
        )


def predicted_start_ns(fleet: Fleet, model: str, position: int) -> int | None:
    """When the ``position``-th waiting task (from 1) of a base model starts; None while nothing
    runs whose end is known."""
    running = [
        _ends_ns(record)
        for record in fleet.records.values()
        if record.plan is not None and record.spec.model == model
    ]
    ends_ns = np.concatenate([NOBODY, *running])
    if not ends_ns.size:
        return None
    ends_ns = np.maximum(ends_ns, fleet.now_ns)
    generations, at = divmod(position - 1, ends_ns.size)
    end_ns = int(np.partition(ends_ns, at)[at])
    return end_ns + generations * (int(ends_ns.max()) - fleet.now_ns)


def _ends_ns(record: InstanceRecord) -> np.ndarray:
    """Predicted ends of the tasks of a running plan; worked out once a plan.

    Tasks share the instance in the plan's proportions, and those that stay share what those that
    end leave, up to the speed that each has alone: with r the time to a task's end at its present
    speed and s that speed over its speed alone, the time between two ends is the difference of
    their r, times the share of the sum of s that is still there.
    """
    plan = record.plan
    assert plan is not None
    if record.ends is None or record.ends[0] is not plan:
        steps_s, solo_s = plan.predicted.step_time_s, plan.predicted.solo_step_time_s
        running = [
            (_steps_left(task) * steps_s[name], solo_s[name] / steps_s[name], task.steps_ns)
            for name, task in record.tasks.items()
            if steps_s.get(name)
        ]
        record.ends = plan, _shared_ends_ns(sorted(running))
    return record.ends[1]


def _shared_ends_ns(running: Sequence[tuple[float, float, int]]) -> np.ndarray:
    """``running``: (seconds to the end at the present speed, that speed over the speed alone, as
    of when), soonest first."""
    if not running:
        return NOBODY
    left_s, speeds, known_ns = (np.array(column) for column in zip(*running, strict=True))
    staying = np.cumsum(speeds[::-1])[::-1]
    fastest = np.maximum.accumulate(speeds[::-1])[::-1]
    slower = np.minimum(1.0, np.maximum(staying / staying[0], fastest))
    ends_s = np.cumsum(np.diff(left_s, prepend=0.0) * slower)
    return known_ns.astype(np.int64) + np.round(ends_s * NS_PER_S).astype(np.int64)


def _steps_left(task: TaskRecord) -> int:
    return task.ready_view.num_steps - task.ready_view.steps_done
