"""Progress of long work: live bars on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from muxtune.engine import QuietObserver, TaskOutcome
from muxtune.report.tables import format_seconds, make_console
from muxtune.types import NS_PER_S, DriftData, Event, EventKind, Plan

LIVE_INTERVAL_S = 0.2
PLAIN_INTERVAL_S = 10.0
BATCHES_A_LOOK = 16  # of a simulated run, between two looks at the clock


class Ticker:
    """True from ``due`` at most once every ``interval_s`` seconds of wall-clock time."""

    def __init__(self, interval_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.interval_s, self._clock = interval_s, clock
        self._last_s = clock()

    def due(self) -> bool:
        now_s = self._clock()
        if now_s - self._last_s < self.interval_s:
            return False
        self._last_s = now_s
        return True


class _Display:
    """What both displays share: one rich Progress on a terminal, lines elsewhere."""

    def __init__(self, console: Console | None, plain_interval_s: float, fields: str) -> None:
        self.console = console or make_console(stderr=True)
        self.live = self.console.is_terminal
        self.ticker = Ticker(LIVE_INTERVAL_S if self.live else plain_interval_s)
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn(fields),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
        )

    def line(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self.bars.stop()


class FleetProgress(_Display, QuietObserver):
    """Observer of a simulated run: tasks ended, simulated time, real time."""

    def __init__(
        self,
        num_tasks: int | None,
        console: Console | None = None,
        plain_interval_s: float = PLAIN_INTERVAL_S,
    ) -> None:
        super().__init__(console, plain_interval_s, "{task.fields[state]}")
        self.num_tasks, self.num_ended, self.now_ns = num_tasks, 0, 0
        self._num_batches = 0
        self._bar = self.bars.add_task("simulate", total=num_tasks, state="")

    def __enter__(self) -> FleetProgress:
        self.bars.start()
        return self

    def on_task_end(self, outcome: TaskOutcome) -> None:
        self.num_ended += 1

    def on_batch(self, time_ns: int, events: Sequence[Event]) -> None:
        self.now_ns = time_ns
        if self._num_batches % BATCHES_A_LOOK == 0 and self.ticker.due():
            self._show()
        self._num_batches += 1

    def _show(self) -> None:
        of = f"/{self.num_tasks:,}" if self.num_tasks is not None else ""
        state = f"{self.num_ended:,}{of} tasks, at {format_seconds(self.now_ns / NS_PER_S)}"
        if self.live:
            self.bars.update(self._bar, completed=self.num_ended, state=state)
        else:
            self.line(f"simulate: {state}")


class TaskProgress(_Display, QuietObserver):
    """Per task: step, loss, tokens/s and the time left."""

    def __init__(
        self, console: Console | None = None, plain_interval_s: float = PLAIN_INTERVAL_S
    ) -> None:
        fields = "{task.fields[state]}"
        super().__init__(console, plain_interval_s, fields)
        self._task_bars: dict[str, Any] = {}
        self._states: dict[str, str] = {}
        self._changed: set[str] = set()
        # When a task was first heard of, and with which step: a resumed one does not begin at 1.
        self._started: dict[str, tuple[float, int]] = {}
        self._tokens: dict[str, int] = {}

    def __enter__(self) -> TaskProgress:
        self.bars.start()
        return self

    def on_step(
        self, task_id: str, step: int, num_steps: int, loss: float | None, tokens: int
    ) -> None:
        """``step`` optimizer steps of ``num_steps`` are done; ``tokens`` of this one."""
        now_s = time.monotonic()
        started_s, first_step = self._started.setdefault(task_id, (now_s, step))
        total = self._tokens[task_id] = self._tokens.get(task_id, 0) + tokens
        rate = (total - tokens) / (now_s - started_s) if now_s > started_s else 0.0
        left_s = 0.0
        if step > first_step:
            left_s = (now_s - started_s) / (step - first_step) * (num_steps - step)
        self._states[task_id] = self._state(step, num_steps, loss, rate, left_s)
        self._changed.add(task_id)
        if self.live:
            self._bar(task_id, step, num_steps)
        elif self.ticker.due():
            self.flush()

    def _state(
        self, step: int, num_steps: int, loss: float | None, rate: float, left_s: float
    ) -> str:
        loss_text = "" if loss is None else f" loss {loss:.4f}"
        rate_text = f" {rate:,.0f} tok/s" if rate else ""
        eta = f" ETA {format_seconds(left_s)}" if left_s and not self.live else ""
        return f"step {step}/{num_steps}{loss_text}{rate_text}{eta}"

    def _bar(self, task_id: str, step: int, num_steps: int) -> None:
        bar = self._task_bars.get(task_id)
        if bar is None:
            bar = self.bars.add_task(task_id, total=num_steps, state="")
            self._task_bars[task_id] = bar
        self.bars.update(bar, completed=step, state=self._states[task_id])

    def flush(self) -> None:
        """One line for each task that moved since the last time; nothing on a terminal."""
        for task_id in sorted(self._changed) if not self.live else ():
            self.line(f"{task_id}: {self._states[task_id]}")
        self._changed.clear()

    def on_plan(self, plan: Plan) -> None:
        if plan.htasks:
            groups = " | ".join("+".join(sorted(htask.quota)) for htask in plan.htasks)
            self.line(f"{plan.instance_id}: plan {plan.epoch}: {groups}")

    def on_batch(self, time_ns: int, events: Sequence[Event]) -> None:
        """Says when the run corrects what was predicted."""
        for event in events:
            if event.kind is EventKind.DRIFT and isinstance(event.data, DriftData):
                _, measured_s, predicted, percent = event.data
                value, low, high = map(format_seconds, predicted[:3])
                self.line(
                    f"{event.instance_id}: drift: a round of plan {event.epoch} takes"
                    f" {format_seconds(measured_s)} where {value} ({low} to {high}) was predicted;"
                    f" planned with {percent}% of the cost model's times from now on"
                )

    def on_task_end(self, outcome: TaskOutcome) -> None:
        self.flush()
        note = outcome.message or outcome.output_path
        self.line(f"{outcome.task_id}: {outcome.state}, {outcome.steps} steps. {note}".rstrip())


class StageProgress(_Display):
    """Work in stages of known numbers of jobs: which stage, how far, what is left."""

    def __init__(
        self, console: Console | None = None, plain_interval_s: float = PLAIN_INTERVAL_S
    ) -> None:
        super().__init__(console, plain_interval_s, "{task.completed}/{task.total}")
        self._bar_of: dict[str, Any] = {}

    def __enter__(self) -> StageProgress:
        self.bars.start()
        return self

    def on_progress(self, stage: str, done: int, total: int) -> None:
        if self.live:
            if stage not in self._bar_of:
                self._bar_of[stage] = self.bars.add_task(stage, total=total)
            self.bars.update(self._bar_of[stage], completed=done)
        elif self.ticker.due():
            self.line(f"{stage}: {done}/{total}")
