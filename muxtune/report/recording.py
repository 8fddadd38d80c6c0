"""Observers of a run: the planner's calls, the tasks' rows, the fleet's totals.

Everything streams: memory does not grow with the number of tasks, but for two floats a task that
the quantiles need.
"""

from __future__ import annotations

import csv
import random
import time
from array import array
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from muxtune import codec
from muxtune.engine import TaskOutcome
from muxtune.protocols import InstancePlanner
from muxtune.types import (
    NS_PER_S,
    Event,
    InstanceView,
    Plan,
    Refusal,
    TaskState,
)


class PlanSample(NamedTuple):
    """A planner's question and its answer, to be asked again from scratch."""

    view: InstanceView
    previous: Plan | None
    plan: Plan | Refusal

    def dumps(self) -> str:
        """One line of JSON; ``muxtune plan state=FILE`` reads it."""
        return codec.dumps(self._asdict())

    @classmethod
    def loads(cls, line: str) -> PlanSample:
        """Raises KeyError, TypeError or ValueError for a line that is no sample."""
        content = codec.loads(line)
        return cls(content["view"], content["previous"], content["plan"])


class RecordingPlanner:
    """Passes calls on; times them and keeps a seeded reservoir sample (Vitter's algorithm R).

    The wall clock never reaches a decision.
    """

    def __init__(self, planner: InstancePlanner, num_samples: int = 0, seed: int = 0) -> None:
        self.planner, self.num_samples = planner, num_samples
        self.num_calls, self.time_ns = 0, 0
        self._random = random.Random(seed)
        self._samples: list[tuple[int, PlanSample]] = []

    def plan(self, instance: InstanceView, previous: Plan | None) -> Plan | Refusal:
        start_ns = time.perf_counter_ns()
        answer = self.planner.plan(instance, previous)
        self.time_ns += time.perf_counter_ns() - start_ns
        self._sample(instance, previous, answer)
        return answer

    def _sample(self, view: InstanceView, previous: Plan | None, answer: Plan | Refusal) -> None:
        self.num_calls += 1
        if len(self._samples) < self.num_samples:
            self._samples.append((self.num_calls, PlanSample(view, previous, answer)))
        elif self.num_samples:
            slot = self._random.randrange(self.num_calls)
            if slot < self.num_samples:
                self._samples[slot] = (self.num_calls, PlanSample(view, previous, answer))

    @property
    def samples(self) -> list[PlanSample]:
        """In the order in which they were asked."""
        return [sample for _, sample in sorted(self._samples, key=lambda pair: pair[0])]

    @property
    def mean_us(self) -> float:
        return self.time_ns / 1_000 / max(1, self.num_calls)


TASK_COLUMNS = (
    *("task_id", "tenant", "model", "state", "arrival_s", "placed_s", "first_start_s", "ended_s"),
    *("completion_time_s", "queueing_s", "instance_id", "steps", "effective_tokens"),
    *("solo_time_s", "slowdown", "final_loss", "perplexity_before", "perplexity_after"),
    *("output_path", "message"),
)


def task_row(outcome: TaskOutcome) -> dict[str, Any]:
    """One flat row; times in seconds, None where something never happened."""
    completion_s = (outcome.ended_ns - outcome.arrival_ns) / NS_PER_S
    started_ns = outcome.placed_ns
    queueing_ns = (outcome.ended_ns if started_ns is None else started_ns) - outcome.arrival_ns
    run_s = None if started_ns is None else (outcome.ended_ns - started_ns) / NS_PER_S
    done = outcome.state is TaskState.DONE
    slowdown = run_s / outcome.solo_time_s if done and run_s and outcome.solo_time_s else None
    row = outcome._asdict() | {
        "state": str(outcome.state),
        "arrival_s": outcome.arrival_ns / NS_PER_S,
        "placed_s": _seconds(outcome.placed_ns),
        "first_start_s": _seconds(outcome.first_start_ns),
        "ended_s": outcome.ended_ns / NS_PER_S,
        "completion_time_s": completion_s,
        "queueing_s": queueing_ns / NS_PER_S,
        "slowdown": slowdown,
    }
    return {name: row[name] for name in TASK_COLUMNS}


def _seconds(time_ns: int | None) -> float | None:
    return None if time_ns is None else time_ns / NS_PER_S


class TaskRows:
    """Writes one CSV row a task as tasks end."""

    def __init__(self, file: IO[str]) -> None:
        self._writer = csv.writer(file, lineterminator="\n")
        self._writer.writerow(TASK_COLUMNS)

    def on_plan(self, plan: Plan) -> None:
        pass

    def on_task_end(self, outcome: TaskOutcome) -> None:
        self._writer.writerow(task_row(outcome).values())

    def on_batch(self, time_ns: int, events: Sequence[Event]) -> None:
        pass


class CompletionTimes:
    """Observer that keeps when tasks that were done were started and ended."""

    def __init__(self) -> None:
        self.completion_s, self.queueing_s = array("d"), array("d")

    def on_plan(self, plan: Plan) -> None:
        pass

    def on_task_end(self, outcome: TaskOutcome) -> None:
        if outcome.state is TaskState.DONE:
            placed_ns = outcome.ended_ns if outcome.placed_ns is None else outcome.placed_ns
            self.completion_s.append((outcome.ended_ns - outcome.arrival_ns) / NS_PER_S)
            self.queueing_s.append((placed_ns - outcome.arrival_ns) / NS_PER_S)

    def on_batch(self, time_ns: int, events: Sequence[Event]) -> None:
        pass

    def summary(self) -> dict[str, float | None]:
        return {
            **quantiles("completion_time_s", self.completion_s),
            **quantiles("queueing_s", self.queueing_s),
        }


class Troubles:
    """Observer that keeps the first messages of tasks that failed or were refused."""

    def __init__(self, num_kept: int = 5) -> None:
        self.num_kept, self.num_tasks = num_kept, 0
        self.messages: list[str] = []

    def on_plan(self, plan: Plan) -> None:
        pass

    def on_task_end(self, outcome: TaskOutcome) -> None:
        if outcome.state in {TaskState.FAILED, TaskState.REFUSED}:
            self.num_tasks += 1
            if len(self.messages) < self.num_kept:
                named = f"'{outcome.task_id}'" in outcome.message
                prefix = "" if named else f"task '{outcome.task_id}': "
                self.messages.append(f"{outcome.state}: {prefix}{outcome.message}")

    def on_batch(self, time_ns: int, events: Sequence[Event]) -> None:
        pass

    def error(self) -> str:
        """One text for all of them; empty when there was no trouble."""
        if not self.num_tasks:
            return ""
        left = self.num_tasks - len(self.messages)
        more = [f"and {left} more"] if left else []
        return f"{self.num_tasks} task(s) did not end well: " + "; ".join(self.messages + more)


def quantiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """mean, p50, p95 and p99 under ``mean_NAME`` and so on; None for no values."""
    if not len(values):
        return dict.fromkeys(f"{label}_{name}" for label in ("mean", "p50", "p95", "p99"))
    data = np.asarray(values, dtype=np.float64)
    p50, p95, p99 = (float(value) for value in np.quantile(data, (0.5, 0.95, 0.99)))
    return {
        f"mean_{name}": float(data.mean()),
        f"p50_{name}": p50,
        f"p95_{name}": p95,
        f"p99_{name}": p99,
    }
