"""Dynamic runs: the same tasks arrive, share, wait and leave in the simulator and on the device.

Both backends have the same engine, policy, planner and cost model; only time differs. The decision
logs are compared line by line, without their times.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from muxtune import codec
from muxtune.cluster_policies.fifo_shared import FifoShared
from muxtune.cost.book import CostBook
from muxtune.cost.scaled import ScaledCostBook
from muxtune.cost.schema import CAPTURED, Profile
from muxtune.deciding import TaskOutcome
from muxtune.engine import Engine, QuietObserver
from muxtune.planners.muxtune import MuxTunePlanner
from muxtune.planning.step_builder import StepBuilder
from muxtune.profiling.step_cases import StepCase, StepTask
from muxtune.runtime.backbone import BackboneStore, random_weights
from muxtune.runtime.captured_runner import DEPTH
from muxtune.runtime.executor import TorchExecutor
from muxtune.runtime.memory import quick_collections
from muxtune.runtime.options import TorchOptions
from muxtune.runtime.records import Recorder
from muxtune.types import (
    NS_PER_S,
    Drain,
    DriftData,
    Event,
    EventKind,
    InstanceSpec,
    InstanceView,
    Place,
    Plan,
    Refusal,
    Reject,
    TaskSpec,
)
from muxtune.validation.models import Models
from muxtune.validation.steps import predict
from muxtune.validation.suite import seed_of
from muxtune.workload.random_texts import RandomTexts
from muxtune.workload.synthetic import SyntheticLibrary

INSTANCE = "gpu0"
NUM_DYNAMIC = 3
PLANNED_SHARE = 0.9  # of the device's memory, up to which plans are made


class DynamicCase(NamedTuple):
    """``max_tasks``: at a time on the instance; the others wait."""

    name: str
    tasks: tuple[TaskSpec, ...]
    max_tasks: int


class Assumed(NamedTuple):
    """Of a simulated run: factors of the profile's times of steps, and of those of takeovers and
    tasks' ends; what a plan takes to make."""

    steps: float = 1.0
    takeovers: float = 1.0
    planning_s: float = 0.0


# How fast a host plans is not known when runs are drawn.
NOMINAL = Assumed(planning_s=0.05)


def nearby(steps: float, takeovers: float, planning_s: float) -> tuple[Assumed, ...]:
    """Steps shorter and longer by a share, each with takeovers and planning shorter and longer."""
    less, more = NOMINAL.planning_s - planning_s, NOMINAL.planning_s + planning_s
    return tuple(
        Assumed(1.0 + sign * steps, 1.0 + other * takeovers, planning)
        for sign in (-1, 1)
        for other, planning in ((-1, less), (1, more))
    )


# A draw whose decisions these change is a tie. Takeovers are predicted less well than steps.
NEAR, NEARER = nearby(0.05, 0.2, 0.03), nearby(0.03, 0.1, 0.02)
MOST_DRAWS = 60
_SCALINGS = 3  # of a draw's steps, to the time that it is to take


def draw_dynamic(
    models: Models, duration_s: float, max_rows: int, most_draws: int = MOST_DRAWS
) -> list[DynamicCase]:
    """Runs of about ``duration_s`` each: one in which all share and one task is withdrawn, and two
    in which at most two, and at most three, run and the others wait.

    Of each, the first of ``most_draws`` whose simulated decisions stay the same when all times are
    a little others (``NEAR``; where there is none, ``NEARER``): where tasks come or end at nearly
    the same time, a run tells which of them was first, and little of the times that were predicted.
    Of what was measured only the profile takes part. Without a simulator, the first draws.
    """
    random = np.random.default_rng(seed_of(models.profile.content_hash) + 2)
    kinds = (
        ("arrivals and departures", 5, 16),
        ("with a queue", 5, 2),
        ("with a shorter queue", 6, 3),
    )
    rehearsal = Rehearsal(models.profile) if find_spec("simpy") else None
    cases = []
    for name, count, max_tasks in kinds:
        draw = partial(_draw, name, models, random, count, max_tasks, duration_s, max_rows)
        cases.append(_steadiest(draw, rehearsal, duration_s, most_draws) if rehearsal else draw())
    return cases


def as_trained(style: str, planning_s: float) -> Any:
    """``SimOptions`` by which the simulator does what the real executor does on one device; users
    have them as ``backend=as_trained``."""
    from muxtune_sim.options import LAYOUTS, SimOptions

    return SimOptions(
        planning_base_s=planning_s,
        one_thread=True,
        times=LAYOUTS,
        passes_ahead=DEPTH if style == CAPTURED else 0,
    )


class Rehearsal:
    """Simulated runs of one profile. What its planner knows by one it knows in the next, which
    saves most of the time and changes no decision."""

    def __init__(self, profile: Profile) -> None:
        self.profile, self.book = profile, _book(profile)
        self.planner = TimedPlanner(self.book)

    def run(self, case: DynamicCase, assumed: Assumed) -> Log:
        """The planner plans with the profile's times, whatever is assumed."""
        from muxtune_sim.executor import SimExecutor  # a machine with a GPU may lack simpy
        from muxtune_sim.options import make_builder

        factors = (assumed.steps, assumed.takeovers)
        times = self.book if factors == (1.0, 1.0) else ScaledCostBook(self.book, *factors)
        options = as_trained(self.profile.style, assumed.planning_s)
        executor = SimExecutor(make_builder(options), times, SyntheticLibrary(0), options)
        return _run(case, self.profile, self.planner, executor)

    def is_tie(self, case: DynamicCase, others: Sequence[Assumed]) -> bool:
        """Whether one of them leads to other decisions, or to another order of ends."""
        usual = self.run(case, NOMINAL)
        logs = (self.run(case, assumed) for assumed in others)
        return any(log.lines != usual.lines or log.order != usual.order for log in logs)


def _steadiest(
    draw: Callable[[], DynamicCase], rehearsal: Rehearsal, duration_s: float, most_draws: int
) -> DynamicCase:
    first = steadier = None
    for _ in range(most_draws):
        case = _as_long_as(draw(), rehearsal, duration_s)
        first = first or case
        if not rehearsal.is_tie(case, NEARER):
            steadier = steadier or case
            if not rehearsal.is_tie(case, NEAR):
                return case
    assert first is not None
    return steadier or first


def _draw(
    name: str,
    models: Models,
    random: np.random.Generator,
    count: int,
    max_tasks: int,
    duration_s: float,
    max_rows: int,
) -> DynamicCase:
    shape = models.profile.model_shape
    longest = max(32, min(256, max_rows // 8))
    kinds = [
        StepTask(
            rank=int(random.choice((8, 16, 32, 64))),
            histogram=str(random.choice(("sst2", "openbookqa", "rte", "gsm8k"))),
            max_length_tokens=longest,
            batch_size=int(random.choice((2, 4, 8))),
        )
        for _ in range(count)
    ]
    side_by_side = min(count, max_tasks)
    members = tuple(kinds[:side_by_side])
    case = StepCase("", shape, members, (tuple(range(side_by_side)),), 32, max_rows)
    predicted = predict(case, models(shape))
    step_s = predicted["predicted_s"] / predicted["rounds"]
    # What waits takes as long again.
    share_s = duration_s * side_by_side / count
    tasks = []
    levels = random.permutation(count)  # so that tasks do not all end together
    for index, kind in enumerate(kinds):
        spec = kind.spec(f"t{index}", shape.name, index)
        share = (levels[index] + random.uniform(0.25, 0.75)) / count
        steps = max(3, int((0.5 + 0.5 * share) * share_s / step_s))
        # One at a time: what arrives together is read one by one by the real executor only. Soon
        # enough for the first task not to end just as the second comes, which would be a tie.
        arrival_s = (0.05 * index + random.uniform(0.0, 0.01)) * duration_s if index else 0.0
        tasks.append(spec._replace(num_steps=steps, arrival_ns=int(arrival_s * NS_PER_S)))
    if max_tasks >= count:
        cancel_ns = int(0.45 * duration_s * NS_PER_S)
        tasks[1] = tasks[1]._replace(num_steps=10 * (tasks[1].num_steps or 1), cancel_ns=cancel_ns)
    return DynamicCase(name, tuple(sorted(tasks, key=lambda task: task.arrival_ns)), max_tasks)


def _as_long_as(case: DynamicCase, rehearsal: Rehearsal, duration_s: float) -> DynamicCase:
    """With more or fewer steps, by what the planner makes of it; takeovers stay what they are, so
    that once is not enough."""
    for _ in range(_SCALINGS):
        ends = rehearsal.run(case, NOMINAL).ended.values()
        factor = duration_s * NS_PER_S / max(end.ended_ns for end in ends)
        steps = (max(3, round(factor * (task.num_steps or 1))) for task in case.tasks)
        tasks = zip(case.tasks, steps, strict=True)
        case = case._replace(tasks=tuple(t._replace(num_steps=count) for t, count in tasks))
    return case


class TimedPlanner(MuxTunePlanner):
    """Remembers how long each plan took to make, during which a real instance waits."""

    def __init__(self, costs: CostBook) -> None:
        super().__init__(costs)
        self.seconds: list[float] = []

    def plan(self, instance: InstanceView, previous: Plan | None) -> Plan | Refusal:
        start_s = time.perf_counter()
        made = super().plan(instance, previous)
        self.seconds.append(time.perf_counter() - start_s)
        return made


class End(NamedTuple):
    """Of one task."""

    state: str
    ended_ns: int
    placed_ns: int | None
    steps: int


class Log(QuietObserver):
    """Decisions, events that tell of work, and how each task ended."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.told: list[str] = []  # what had happened before each line
        self.ended: dict[str, End] = {}
        self.drifts = 0
        self.plans: list[Plan] = []
        self.planning_s: list[float] = []
        self.spans: list[tuple[str, float, float]] = []  # what took time besides steps
        self.rounds: list[tuple[int, float, float]] = []  # epoch, start, duration
        self._news: list[str] = []

    def write(
        self,
        time_ns: int,
        events: Sequence[Event],
        actions: Sequence[Any] = (),
        plans: Sequence[Plan] = (),
        refusals: Sequence[Any] = (),
    ) -> None:
        for event in events:
            if event.kind not in (EventKind.PROGRESS, EventKind.PLAN_APPLIED, EventKind.WAKE):
                self._news.append(f"{event.kind.name} {event.task_id}".strip())
        self.plans += plans
        for decision in (*actions, *plans):
            if text := described(decision):
                self.lines.append(text)
                self.told.append(", ".join(self._news[-3:]))

    def on_batch(self, time_ns: int, events: Sequence[Event]) -> None:
        """Drifts are raised while a batch is decided, behind what is written of it."""
        for event in events:
            if isinstance(event.data, DriftData):
                self.drifts += 1
                self._news.append(f"DRIFT to {event.data.time_percent}%")

    def on_task_end(self, outcome: TaskOutcome) -> None:
        self.ended[outcome.task_id] = End(
            outcome.state.value, outcome.ended_ns, outcome.placed_ns, outcome.steps
        )

    def to_json(self) -> dict[str, Any]:
        ended = {task_id: end._asdict() for task_id, end in self.ended.items()}
        news = self._news[-3:]
        return {
            "lines": self.lines, "told": self.told, "ended": ended, "drifts": self.drifts,
            "news": news, "planning_s": self.planning_s, "spans": self.spans, "rounds": self.rounds,
        }  # fmt: skip

    @classmethod
    def of_json(cls, raw: Mapping[str, Any]) -> Log:
        log = cls()
        log.lines, log.told, log.drifts = raw["lines"], raw["told"], raw["drifts"]
        log.ended = {task_id: End(**end) for task_id, end in raw["ended"].items()}
        log._news = raw["news"]
        return log

    @property
    def order(self) -> list[str]:
        return sorted(self.ended, key=lambda task_id: (self.ended[task_id].ended_ns, task_id))


def described(decision: object) -> str:
    """One line without times; plans by what they fuse."""
    if isinstance(decision, Place):
        return f"place {decision.task_id} on {decision.instance_id}"
    if isinstance(decision, Reject):
        return f"reject {decision.task_id}: {decision.refusal.reason}"
    if isinstance(decision, Drain):
        return f"drain {decision.task_id}"
    if isinstance(decision, Plan):
        htasks = " | ".join(
            ",".join(f"{task_id}x{count}" for task_id, count in sorted(htask.quota.items()))
            for htask in decision.htasks
        )
        return f"plan {decision.instance_id}: {htasks or 'nothing'}"
    return ""


def run_dynamic(case: DynamicCase, profile: Profile, device: torch.device) -> dict[str, Any]:
    """What happened on the device; ``with_prediction`` puts beside it what the simulator says,
    which needs no device and may be done elsewhere, and takes ``planning_s`` as it is: what a plan
    of the simulated run took to make here, in the mean, before the real one."""
    planning_s = planning_here_s(case, profile)
    measured = _train(case, profile, device)
    return {
        "name": case.name,
        "planning_s": planning_s,
        "max_tasks": case.max_tasks,
        "specs": codec.encode(case.tasks),
        "measured": measured.to_json(),
        "error": "",
    }


def with_prediction(
    row: Mapping[str, Any], profile: Profile, predicted: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The row with completion times and decision logs of both backends compared. ``predicted``:
    what was predicted of it before, which is kept in the row under that name."""
    if row.get("error"):
        return dict(row)
    case = DynamicCase(row["name"], codec.decode(row["specs"]), row["max_tasks"])
    if predicted is None:
        predicted = predicted_run(case, profile, row.get("planning_s", 0.0))
    if "log" not in predicted:  # a report of before 2026-11-24, which kept the comparison alone
        return {**row, **predicted, "predicted": predicted}
    simulated, measured = Log.of_json(predicted["log"]), Log.of_json(row["measured"])
    return {
        **row,
        "predicted": predicted,
        "tasks": [
            _ends(task, simulated, measured) | predicted["intervals"][task.task_id]
            for task in case.tasks
        ],
        "same_completion_order": simulated.order == measured.order,
        "first_difference": first_difference(simulated, measured),
        "decisions": {"predicted": simulated.lines, "measured": measured.lines},
        "drifts": {"predicted": simulated.drifts, "measured": measured.drifts},
    }


def predicted_run(case: DynamicCase, profile: Profile, planning_s: float) -> dict[str, Any]:
    """``log`` of the simulated run; ``intervals`` of completion times: all steps as fast, and as
    slow, as the 90% interval of one. As plain JSON."""
    rehearsal = Rehearsal(profile)
    model: Any = rehearsal.book(profile.model_name, profile.device_name)
    error = model.composition.relative_error
    factors = (max(0.1, 1.0 + sign * error) for sign in (0, -1, 1))
    simulated, *edges = (
        rehearsal.run(case, Assumed(factor, factor, planning_s)) for factor in factors
    )
    told = simulated.to_json()
    return {
        "log": {key: told[key] for key in ("lines", "told", "ended", "drifts", "news")},
        "intervals": {task.task_id: _interval(task, (simulated, *edges)) for task in case.tasks},
    }


def _ends(task: TaskSpec, simulated: Log, measured: Log) -> dict[str, Any]:
    row: dict[str, Any] = {"task_id": task.task_id, "arrival_s": task.arrival_ns / NS_PER_S}
    for name, log in (("predicted", simulated), ("measured", measured)):
        end = log.ended[task.task_id]
        row |= {
            f"{name}_s": (end.ended_ns - task.arrival_ns) / NS_PER_S,
            f"{name}_waited_s": ((end.placed_ns or end.ended_ns) - task.arrival_ns) / NS_PER_S,
            f"{name}_state": end.state,
            f"{name}_steps": end.steps,
        }
    return row


def _interval(task: TaskSpec, logs: Sequence[Log]) -> dict[str, float]:
    ends = [(log.ended[task.task_id].ended_ns - task.arrival_ns) / NS_PER_S for log in logs]
    return {"low_s": min(ends), "high_s": max(ends)}


def first_difference(predicted: Log, measured: Log) -> Mapping[str, Any] | None:
    """Where the logs part, and what had happened before in each; None: they are the same."""
    pairs = zip(predicted.lines, measured.lines, strict=False)
    equal = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if equal is None:
        if len(predicted.lines) == len(measured.lines):
            return None
        equal = min(len(predicted.lines), len(measured.lines))
    found: dict[str, Any] = {"decision": equal}
    for name, log in (("predicted", predicted), ("measured", measured)):
        has = equal < len(log.lines)
        found[name] = log.lines[equal] if has else "nothing more"
        found[f"{name}_after"] = log.told[equal] if has else ", ".join(log._news[-3:])
    found["why"] = _why(predicted, measured, found)
    return found


def _why(predicted: Log, measured: Log, found: Mapping[str, Any]) -> str:
    if predicted.order != measured.order:
        return f"tasks ended in another order: {predicted.order} and {measured.order}"
    if predicted.drifts != measured.drifts:
        return (
            f"drift was told {measured.drifts} times in the measured run and {predicted.drifts} in"
            " the predicted one, after which plans are reconsidered with corrected times"
        )
    if found["predicted_after"] != found["measured_after"]:
        return "events came in another order"
    return "the tasks stood at other steps when the plan was made"


def planned(case: DynamicCase, profile: Profile) -> list[Plan]:
    """The plans that the simulated run comes to."""
    return Rehearsal(profile).run(case, NOMINAL).plans


def planning_here_s(case: DynamicCase, profile: Profile) -> float:
    """What a plan takes to make on this host, by those of the simulated run; 0 without one."""
    if find_spec("simpy") is None:
        return 0.0
    seconds = Rehearsal(profile).run(case, NOMINAL).planning_s
    return sum(seconds) / len(seconds)


def _train(case: DynamicCase, profile: Profile, device: torch.device) -> Log:
    shape = profile.model_shape
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    store = BackboneStore({shape.name: random_weights(shape, 0, device, dtype)}, device, dtype)
    store.get(shape.name)  # loading is no part of the run
    with tempfile.TemporaryDirectory() as folder:
        options = TorchOptions(
            Path(folder),
            deterministic=bool(profile.program.get("deterministic", True)),
            evaluate_tokens=0,
            checkpoint_steps=0,
            progress_interval_s=2.0,
            step=profile.style,
        )
        recorder, texts = Recorder(), RandomTexts(shape.vocab)
        book = _book(profile)
        book(shape.name, profile.device_name)  # it is fitted before the executor's clock begins
        with quick_collections():  # as in training, and before the executor's clock begins, too
            executor = TorchExecutor(StepBuilder(), store, texts, options, [recorder])
            try:
                log = _run(case, profile, TimedPlanner(book), executor)
            finally:
                executor.close()
    log.spans = [
        (item.name, item.start_ns / NS_PER_S, item.duration_ns / NS_PER_S)
        for item in recorder.spans
        if item.name != "step"
    ]
    log.rounds = [
        (item.epoch, item.start_ns / NS_PER_S, item.duration_ns / NS_PER_S)
        for item in recorder.rounds
    ]
    return log


def _book(profile: Profile) -> CostBook:
    shape = profile.model_shape
    return CostBook(models={shape.name: shape}, profiles=[profile])


def _run(case: DynamicCase, profile: Profile, planner: TimedPlanner, executor: Any) -> Log:
    log, made_before = Log(), len(planner.seconds)
    limit_bytes = int(PLANNED_SHARE * profile.memory_bytes)
    shape = profile.model_shape
    instance = InstanceSpec(INSTANCE, shape.name, profile.device_name, limit_bytes)
    policy = FifoShared(max_tasks_per_instance=case.max_tasks)
    Engine(policy, planner, executor, case.tasks, [instance], log, (log,)).run()
    log.planning_s = planner.seconds[made_before:]
    return log
