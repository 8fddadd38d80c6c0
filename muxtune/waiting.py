"""When a task that has to wait will start: told to its tenant, and journalled.

Past saturation tasks queue. The first waiting task of a base model is predicted to start when the
first of the tasks that now run on its instances ends, as the plans predict it; it then runs at
the mean speed of the running ones, by tokens, and its end makes room, too, for one of those
behind it. A forecast, not a decision: policies may prefer others, plans change, and tasks arrive.

A newcomer's start is found by playing the line before it. Only the first ``MOST_FORECAST`` tasks of
a line are played; those behind are told that as many wait before them, and no time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heapify, heapreplace
from itertools import islice

import numpy as np

from muxtune.fleet import Fleet, InstanceRecord, PlanEnds, TaskRecord
from muxtune.types import NS_PER_S, Discipline, Refusal, TaskView

MOST_FORECAST = 1_000  # of a line: a newcomer costs about a microsecond for each
NOBODY = np.zeros(0, dtype=np.int64)


def must_wait(fleet: Fleet, newcomers: Sequence[str]) -> Iterator[Refusal]:
    """Of the tasks that became ready now, why those that wait do not start, and from when on they
    are predicted to run."""
    waiting = {name for name in newcomers if name in fleet.queue}
    for model in sorted({fleet.tasks[name].spec.model for name in waiting}):
        line = fleet.queue.of_model(model, Discipline.FIFO)
        first = list(islice(line, MOST_FORECAST))
        starts = _starts_ns(fleet, model, first)
        for ahead, (view, start_ns) in enumerate(zip(first, starts, strict=True)):
            if view.task_id in waiting:
                waiting.discard(view.task_id)
                fleet.tasks[view.task_id].predicted_start_ns = start_ns
                yield _refusal(model, view.task_id, str(ahead), start_ns)
    for name in newcomers:
        if name in waiting:
            model = fleet.tasks[name].spec.model
            yield _refusal(model, name, f"{MOST_FORECAST} or more", None)


def _refusal(model: str, task_id: str, ahead: str, start_ns: int | None) -> Refusal:
    return Refusal(
        f"the instances of {model} take no further task now, and {ahead} wait before it",
        (task_id,),
        remedy="wait, or add an instance",
        predicted_start_ns=start_ns,
    )


def _starts_ns(fleet: Fleet, model: str, line: Sequence[TaskView]) -> Iterator[int | None]:
    """Of each task in line; None while nothing runs whose end is known."""
    running = [
        _ends_of(record)
        for record in fleet.records.values()
        if record.plan is not None and record.spec.model == model
    ]
    ends_ns = np.concatenate([NOBODY, *[ends.ends_ns for ends in running]])
    if not ends_ns.size:
        yield from [None] * len(line)
        return
    tokens_per_s = sum(ends.tokens_per_s for ends in running)
    ns_per_token = NS_PER_S * ends_ns.size / max(1e-9, tokens_per_s)
    slots = np.maximum(ends_ns, fleet.now_ns).tolist()
    heapify(slots)
    for view in line:
        start_ns = slots[0]
        yield start_ns
        num_steps = view.num_steps - view.steps_done
        heapreplace(slots, start_ns + round(num_steps * _step_tokens(view) * ns_per_token))


def _step_tokens(view: TaskView) -> float:
    return view.sequences_per_step * view.lengths.mean_tokens


def _ends_of(record: InstanceRecord) -> PlanEnds:
    """Predicted ends of the tasks of a running plan; worked out once a plan.

    Tasks share the instance in the plan's proportions, and those that stay share what those that
    end leave, up to the speed that each has alone: with r the time to a task's end at its present
    speed and s that speed over its speed alone, the time between two ends is the difference of
    their r, times the share of the sum of s that is still there.
    """
    plan = record.plan
    assert plan is not None
    if record.ends is None or record.ends.plan is not plan:
        steps_s, solo_s = plan.predicted.step_time_s, plan.predicted.solo_step_time_s
        tasks = {name: task for name, task in record.tasks.items() if steps_s.get(name)}
        running = [
            (_steps_left(task) * steps_s[name], solo_s[name] / steps_s[name], task.steps_ns)
            for name, task in tasks.items()
        ]
        record.ends = PlanEnds(
            plan,
            _shared_ends_ns(sorted(running)),
            sum(_step_tokens(task.ready_view) / steps_s[name] for name, task in tasks.items()),
        )
    return record.ends


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
