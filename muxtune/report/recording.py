"""Observers of a run: the planner's calls, the tasks' rows, the fleet's totals.

Everything streams: memory does not grow with the number of tasks.
"""

from __future__ import annotations

import csv
import io
import math
import random
import time
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

from muxtune import codec
from muxtune.engine import QuietObserver, TaskOutcome
from muxtune.protocols import InstancePlanner
from muxtune.types import (
    NS_PER_S,
    DriftData,
    Event,
    EventKind,
    InstanceView,
    Plan,
    Refusal,
    TaskState,
)

ROWS_AT_A_TIME = 256
DONE, TROUBLES = TaskState.DONE, (TaskState.FAILED, TaskState.REFUSED)
MOST_EXACT = 10**15  # whole numbers below have no more digits than a float keeps


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
    """Passes calls on; times them and keeps a seeded reservoir sample (Li's algorithm L, "Reservoir
    sampling algorithms of time complexity O(n(1 + log(N/n)))", 1994, which skips most calls).

    The wall clock never reaches a decision.
    """

    def __init__(self, planner: InstancePlanner, num_samples: int = 0, seed: int = 0) -> None:
        self.planner, self.num_samples = planner, num_samples
        self.num_calls, self.time_ns = 0, 0
        self._random = random.Random(seed)
        self._samples: list[tuple[int, PlanSample]] = []
        self._next_kept = 1 if num_samples else 0  # the call that will be kept
        self._threshold = 1.0

    def plan(self, instance: InstanceView, previous: Plan | None) -> Plan | Refusal:
        start_ns = time.perf_counter_ns()
        answer = self.planner.plan(instance, previous)
        self.time_ns += time.perf_counter_ns() - start_ns
        self.num_calls += 1
        if self.num_calls == self._next_kept:
            self._keep(PlanSample(instance, previous, answer))
        return answer

    def _keep(self, sample: PlanSample) -> None:
        """The first calls all; from then on each kept one takes the place of any other."""
        entry = (self.num_calls, sample)
        if len(self._samples) < self.num_samples:
            self._samples.append(entry)
        else:
            self._samples[self._random.randrange(self.num_samples)] = entry
        skipped = 0
        if len(self._samples) == self.num_samples:
            self._threshold *= (1 - self._random.random()) ** (1 / self.num_samples)
            skipped = self._num_skipped()
        self._next_kept += 1 + skipped

    def _num_skipped(self) -> int:
        if self._threshold >= 1:
            return 0
        return int(math.log(1 - self._random.random()) / math.log1p(-self._threshold))

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
    *("solo_time_s", "slowdown", "finish_time_ratio", "priority", "deadline_s", "met_deadline"),
    *("num_placements", "lost_steps", "final_loss", "perplexity_before", "perplexity_after"),
    *("output_path", "message", "predicted_start_s", "max_slowdown"),
)


def task_cells(outcome: TaskOutcome) -> list[str]:
    """The text of each of ``TASK_COLUMNS``; times in seconds, blank where something never
    happened."""
    # Taken apart at once: a million rows ask for each of the fields.
    (
        task_id, tenant, model, state, arrival_ns, _, placed_ns, first_start_ns, ended_ns,
        instance_id, steps, effective_tokens, solo_time_s, message, output_path, final_loss,
        perplexity_before, perplexity_after, priority, deadline_ns, num_placements, lost_steps,
        predicted_start_ns, max_slowdown,
    ) = outcome  # fmt: skip
    ratio = time_over_solo(state, arrival_ns, ended_ns, solo_time_s)
    arrival, ratio_text = seconds_text(arrival_ns), text_of(ratio)
    if placed_ns == arrival_ns and ratio:
        # Of a task that did not wait these are the same, and numbers are dear to write.
        placed, queueing, slow_text = arrival, "0.0", ratio_text
    else:
        placed = "" if placed_ns is None else seconds_text(placed_ns)
        queueing = seconds_text((ended_ns if placed_ns is None else placed_ns) - arrival_ns)
        slow_text = text_of(time_over_solo(state, placed_ns, ended_ns, solo_time_s) or None)
    return [
        task_id,
        tenant,
        model,
        str(state),
        arrival,
        placed,
        "" if first_start_ns is None else seconds_text(first_start_ns),
        seconds_text(ended_ns),
        seconds_text(ended_ns - arrival_ns),
        queueing,
        instance_id,
        str(steps),
        str(effective_tokens),
        text_of(solo_time_s),
        slow_text,
        ratio_text,
        str(priority),
        "" if deadline_ns is None else seconds_text(deadline_ns),
        text_of(met_deadline(outcome)) if deadline_ns is not None else "",
        str(num_placements),
        str(lost_steps),
        "" if final_loss is None else str(final_loss),
        "" if perplexity_before is None else str(perplexity_before),
        "" if perplexity_after is None else str(perplexity_after),
        output_path,
        message,
        "" if predicted_start_ns is None else seconds_text(predicted_start_ns),
        "" if max_slowdown is None else str(max_slowdown),
    ]


def text_of(value: object) -> str:
    return "" if value is None else str(value)


def seconds_text(time_ns: int) -> str:
    """``str(time_ns / NS_PER_S)``. No two numbers of up to 15 digits are one float, so that the
    shortest text of the float is these digits, and needs no search."""
    if not NS_PER_S <= time_ns < MOST_EXACT:
        return str(time_ns / NS_PER_S)
    digits = str(time_ns)
    text = f"{digits[:-9]}.{digits[-9:]}"
    return text if text[-1] != "0" else str(time_ns / NS_PER_S)


def time_over_solo(
    state: TaskState, since_ns: int | None, ended_ns: int, solo_time_s: float | None
) -> float | None:
    """Of a task that was done: its time since then over its predicted time alone."""
    if state is not DONE or not solo_time_s or since_ns is None:
        return None
    return (ended_ns - since_ns) / NS_PER_S / solo_time_s


def slowdown(outcome: TaskOutcome) -> float | None:
    """Of a task that was done: time since its first placement over its predicted time alone."""
    since_ns, solo_s = outcome.placed_ns, outcome.solo_time_s
    return time_over_solo(outcome.state, since_ns, outcome.ended_ns, solo_s) or None


class Promises(QuietObserver):
    """Observer that keeps the slowdown of every task that was done and was promised a bound."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, float | None]] = []

    def on_task_end(self, outcome: TaskOutcome) -> None:
        if outcome.max_slowdown is None:
            return
        value = slowdown(outcome)
        if value is not None:
            self.rows.append((outcome.task_id, value, outcome.max_slowdown))

    def summary(self) -> dict[str, Any]:
        """``worst_promise``: the largest slowdown over what was promised."""
        ratios = [value / bound for _, value, bound in self.rows if bound]
        return {
            "num_promises": len(ratios),
            "promises_kept_share": sum(r <= 1 for r in ratios) / len(ratios) if ratios else None,
            "worst_promise": max(ratios, default=None),
        }


def met_deadline(outcome: TaskOutcome) -> bool | None:
    """None for a task without a deadline."""
    if outcome.deadline_ns is None:
        return None
    return outcome.state is TaskState.DONE and outcome.ended_ns <= outcome.deadline_ns


class TaskRows(QuietObserver):
    """Writes one CSV row a task as tasks end, many at a time; a context manager, whose end writes
    the last ones."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._file.write(csv_line(TASK_COLUMNS))
        self._waiting: list[TaskOutcome] = []

    def on_task_end(self, outcome: TaskOutcome) -> None:
        self._waiting.append(outcome)
        if len(self._waiting) >= ROWS_AT_A_TIME:
            self._write()

    def __enter__(self) -> TaskRows:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is None:
            self._write()

    def _write(self) -> None:
        self._file.write("".join([csv_line(task_cells(outcome)) for outcome in self._waiting]))
        self._waiting.clear()


def csv_line(cells: Sequence[str]) -> str:
    """What the csv module writes. Rows that need no quotes, which are nearly all, are joined here:
    that module looks at every character of every cell."""
    line = ",".join(cells)
    if line.count(",") < len(cells) and '"' not in line and "\n" not in line and "\r" not in line:
        return line + "\n"
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


DRIFT_COLUMNS = (
    *("time_s", "instance", "plan", "rounds", "measured_s"),
    *("predicted_s", "predicted_low_s", "predicted_high_s", "time_percent"),
)


class DriftRows(QuietObserver):
    """Writes one CSV row each time that measured rounds corrected the predictions."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._file.write(csv_line(DRIFT_COLUMNS))

    def on_batch(self, time_ns: int, events: Sequence[Event]) -> None:
        for event in events:
            if event.kind is EventKind.DRIFT and isinstance(event.data, DriftData):
                rounds, measured_s, predicted, percent = event.data
                cells = (time_ns / NS_PER_S, event.instance_id, event.epoch, rounds, measured_s)
                self._file.write(csv_line([str(x) for x in (*cells, *predicted[:3], percent)]))
                self._file.flush()


class Troubles(QuietObserver):
    """Observer that keeps the first messages of tasks that failed or were refused."""

    def __init__(self, num_kept: int = 5) -> None:
        self.num_kept, self.num_tasks = num_kept, 0
        self.messages: list[str] = []

    def on_task_end(self, outcome: TaskOutcome) -> None:
        if outcome.state in TROUBLES:
            self.num_tasks += 1
            if len(self.messages) < self.num_kept:
                named = f"'{outcome.task_id}'" in outcome.message
                prefix = "" if named else f"task '{outcome.task_id}': "
                self.messages.append(f"{outcome.state}: {prefix}{outcome.message}")

    def error(self) -> str:
        """One text for all of them; empty when there was no trouble."""
        if not self.num_tasks:
            return ""
        left = self.num_tasks - len(self.messages)
        more = [f"and {left} more"] if left else []
        return f"{self.num_tasks} task(s) did not end well: " + "; ".join(self.messages + more)
