"""What ``muxtune train`` does, measured from within: its configuration, planner, engine, journal
and executor, whose captured runner is fed fresh host data for every micro-batch."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from muxtune import build
from muxtune.commands.real_runs import Outcomes
from muxtune.commands.resuming import JOURNAL_FILE
from muxtune.config import conf_dir, register_schemas
from muxtune.cost.shapes import ModelShape, model_shape
from muxtune.engine import Engine
from muxtune.fleet import instance_view, task_view
from muxtune.planning.journal import Journal
from muxtune.report.recording import Troubles
from muxtune.runtime import random_models
from muxtune.runtime.backbone import BackboneStore, random_weights
from muxtune.runtime.captured_runner import CapturedRunner
from muxtune.runtime.records import RoundRecord, SpanRecord, StepListener, StepRecord
from muxtune.types import EventKind, Plan, TaskSpec
from muxtune.workload.random_texts import RandomTexts

MIX = ("sst2", "sst2", "sst2", "openbookqa", "openbookqa", "openbookqa", "rte", "rte")
WARM_UP = 5
RESHAPES = (EventKind.MEMORY_PRESSURE, EventKind.DRIFT)  # tasks that stay get another plan
SMALLER_PLAN = "a smaller one follows"  # as the runtime says it
ALWAYS = ("model.random=true", "backend.checkpoint_steps=0", "+backend.evaluate_tokens=0")
# All tasks are there from the start: no plan for the first few of them has run that it would cost
# anything to leave.
PLANNED = ("planner=muxtune", "planner.hysteresis=false")


class Case(NamedTuple):
    """``adapters``: of task i the fields at i modulo their number. ``planner``, ``overrides``: as
    on the command line. ``seconds``: a guess for one H100 whose kernels are compiled."""

    num_tasks: int
    adapters: tuple[Mapping[str, Any], ...]
    seconds: int
    model: str = "llama-2-7b"
    overrides: tuple[str, ...] = ()
    batch_size: int = 8
    planner: tuple[str, ...] = PLANNED

    def task_file(self, steps: int) -> dict[str, Any]:
        """Lengths as the mix says, in its order."""
        common = {
            "model": self.model, "batch_size": self.batch_size, "max_length": 512, "lr": 1e-4,
            "steps": steps,
        }  # fmt: skip
        tasks = [
            {"id": f"t{i:03d}", "histogram": MIX[i % len(MIX)], "seed": i}
            | dict(self.adapters[i % len(self.adapters)])
            for i in range(self.num_tasks)
        ]
        return {"defaults": common, "tasks": tasks}


class Enough(Exception):
    """All rounds that were asked for are measured: the tasks need not end."""


class TimedGraph:
    """A captured graph whose replays are timed where they happen, among copies and other work."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def replay(self) -> None:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        stop.record()
        self.events.append((start, stop))

    def milliseconds(self) -> list[float]:
        return [start.elapsed_time(stop) for start, stop in self.events]


class Stopwatch(StepListener):
    """Counts rounds of plans that hold all tasks; after the warm-up, ``count`` of them. At both
    ends the device is waited for, so that what is in flight is counted once."""

    def __init__(self, num_tasks: int, plans: Mapping[Any, Plan], count: int) -> None:
        self._num_tasks, self._plans, self._count = num_tasks, plans, count
        self.rounds: list[RoundRecord] = []
        self.losses: dict[str, list[float]] = {}
        self.spans: list[SpanRecord] = []
        self.notices: list[str] = []
        self.start_s = self.seconds = 0.0
        self.replays_before: dict[int, dict[int, int]] = {}
        self.executor: Any = None  # whose runners are looked at between rounds
        self.runners: list[Any] = []
        # By hTask and size: of every measured replay.
        self.device_ms: dict[int, dict[int, list[float]]] = {}

    def on_round(self, record: RoundRecord) -> None:
        plan = self._plans[record.instance_id, record.epoch]
        if len(plan.task_ids) < self._num_tasks:
            self.rounds.clear()
            return
        if self.rounds and self.rounds[-1].epoch != record.epoch:
            self.rounds.clear()  # another plan took over: its sizes warm up anew
        self.rounds.append(record)
        if len(self.rounds) == WARM_UP:
            self.runners = list(self.executor._instances[record.instance_id]._runners)
            _synchronise()
            self.replays_before = self._replays()
            for steps in self._captured_steps():
                steps._graphs = {n: TimedGraph(graph) for n, graph in steps._graphs.items()}
            self.start_s = time.perf_counter()
        if len(self.rounds) == WARM_UP + self._count:
            _synchronise()
            self.seconds = time.perf_counter() - self.start_s
            self._read_times()
            raise Enough

    def begin_anew(self) -> None:
        """Another plan comes: what this one's runners hold, adapters and graphs, it needs."""
        self.rounds.clear()
        self.runners = []

    def _captured_steps(self) -> list[Any]:
        return [runner.steps for runner in self.captured.values()]

    def _read_times(self) -> None:
        for index, steps in zip(self.captured, self._captured_steps(), strict=True):
            times = {n: timed.milliseconds() for n, timed in steps._graphs.items()}
            self.device_ms[index] = {n: each for n, each in times.items() if each}
            steps._graphs = {n: timed.graph for n, timed in steps._graphs.items()}

    def _replays(self) -> dict[int, dict[int, int]]:
        return {index: dict(item.steps.replays) for index, item in self.captured.items()}

    @property
    def captured(self) -> dict[int, CapturedRunner]:
        """By hTask; one that runs eagerly has none."""
        return {
            index: runner
            for index, runner in enumerate(self.runners)
            if isinstance(runner, CapturedRunner)
        }

    @property
    def replays(self) -> dict[int, dict[int, int]]:
        """Of each hTask and size, since the warm-up."""
        before = self.replays_before
        return {
            index: {
                rows: count - before.get(index, {}).get(rows, 0)
                for rows, count in counts.items()
                if count > before.get(index, {}).get(rows, 0)
            }
            for index, counts in self._replays().items()
        }

    @property
    def measured(self) -> list[RoundRecord]:
        return self.rounds[WARM_UP:]

    def on_step(self, record: StepRecord) -> None:
        self.losses.setdefault(record.task_id, []).append(record.loss)

    def on_span(self, record: SpanRecord) -> None:
        if record.name == "capture":
            self.spans.append(record)

    def on_notice(self, text: str) -> None:
        print(f"notice: {text}", flush=True)
        self.notices.append(text)
        if SMALLER_PLAN in text:  # no round of all tasks would ever come
            raise RuntimeError(text)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def configured(case: Case, folder: Path, steps: int, device: str) -> Any:
    """The configuration that ``muxtune train`` would have."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    tasks_file = folder / "tasks.yaml"
    tasks_file.write_text(yaml.safe_dump(case.task_file(steps)))
    register_schemas()
    words = [
        *ALWAYS, f"model={case.model}", f"workload.tasks_file={tasks_file}",
        "cluster=h100_x1", f"backend.device={device}", f"output_dir={folder}",
        "+backend.deterministic=false", *case.planner, *case.overrides,
    ]  # fmt: skip
    if device == "cpu":
        words.append("backend.step=captured")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return OmegaConf.to_object(compose("train", overrides=words))


def planned(
    case: Case, folder: Path, rounds: int
) -> tuple[ModelShape, Plan, dict[str, TaskSpec], RandomTexts]:
    """(shape, plan, its tasks, their data) of a case on one GPU, without one."""
    config = configured(case, folder, _steps(rounds), "cuda")
    costs = build.cost_book(config)
    tasks = list(build.tasks(config, costs))
    library = RandomTexts(model_shape(case.model).vocab, config.seed)
    views = [task_view(task, library.add(task)) for task in tasks]
    instance = instance_view(build.instances(config, costs, tasks)[0], views)
    plan = build.planner(config.planner, costs).plan(instance, None)
    if not isinstance(plan, Plan):
        raise RuntimeError(f"no plan for all tasks: {plan.reason}")
    return model_shape(case.model), plan, {task.task_id: task for task in tasks}, library


def _steps(rounds: int) -> int:
    """Tasks take several rounds a step at most, never several steps a round."""
    return WARM_UP + rounds + 20


def store_of(name: str, shape: ModelShape, device: str) -> BackboneStore:
    """Random weights, drawn where they are used and loaded once for all cases of a model."""
    random_models.LARGE_PARAMETERS = 0
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    where = torch.device(device)
    return BackboneStore({name: random_weights(shape, 0, where, dtype)}, where, dtype)


class Run(NamedTuple):
    """A case that has been measured, with what its ledger needs."""

    row: dict[str, Any]
    runners: dict[int, CapturedRunner]  # by hTask, as are the replays
    replays: dict[int, dict[int, int]]
    rounds: int
    device_ms: dict[int, dict[int, list[float]]]  # by hTask and size: of every measured replay


def run(case: Case, store: BackboneStore, device: str, rounds: int) -> Run:
    """Measures ``rounds`` rounds of the plan that holds all tasks. Raises what training raises,
    and RuntimeError when the tasks ended before."""
    with tempfile.TemporaryDirectory(dir=_fast_folder()) as place:
        return _run_in(Path(place), case, store, device, rounds)


def _fast_folder() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _run_in(folder: Path, case: Case, store: BackboneStore, device: str, rounds: int) -> Run:
    config = configured(case, folder, _steps(rounds), device)
    costs = build.cost_book(config)
    tasks = build.tasks(config, costs)
    outcomes, troubles = Outcomes(), Troubles()
    watch = Stopwatch(len(tasks), outcomes.plans, rounds)
    executor = build.torch_executor(
        config.backend, folder, store, build.text_library(config, store), (watch,)
    )
    watch.executor = executor
    began_s = time.perf_counter()
    try:
        with Journal(folder / JOURNAL_FILE) as journal:
            engine = Engine(
                build.cluster_policy(config.cluster_policy),
                build.planner(config.planner, costs),
                executor,
                list(tasks),
                build.instances(config, costs, tasks),
                journal,
                (outcomes, troubles, _NoEnds(watch)),
            )
            engine.run()
            raise RuntimeError(f"the tasks ended too soon: {troubles.error()}")
    except Enough as enough:
        enough.__traceback__ = None  # its frames hold the engine
    row = _row(case, watch, outcomes.plans, executor)
    row["whole_s"] = time.perf_counter() - began_s
    executor.close()
    return Run(row, watch.captured, watch.replays, len(watch.measured), watch.device_ms)


class _NoEnds:
    """Observer: a task that ends before all rounds are measured is an error; a new plan begins the
    measurement anew, and why it came is said."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch

    def on_plan(self, plan: Plan) -> None:
        self._watch.begin_anew()

    def on_task_end(self, outcome: Any) -> None:
        raise RuntimeError(f"task {outcome.task_id} ended: {outcome}")

    def on_batch(self, time_ns: int, events: Sequence[Any]) -> None:
        for event in events:
            if event.kind in RESHAPES:
                self._watch.on_notice(
                    f"{event.kind.name} after {time_ns / 1e9:.0f} s: {event.data}"
                )


def _row(case: Case, watch: Stopwatch, plans: Mapping[Any, Plan], executor: Any) -> dict[str, Any]:
    measured, seconds = watch.measured, watch.seconds
    effective = sum(record.effective_tokens for record in measured)
    replays = watch.replays
    rows = sum(size * count for counts in replays.values() for size, count in counts.items())
    plan = plans[measured[-1].instance_id, measured[-1].epoch]
    predicted_s = plan.predicted.round_time_s.value
    peak, predicted = executor.memory.peak_bytes(), plan.predicted.peak_memory_bytes.value
    losses = watch.losses
    return {
        "num_tasks": case.num_tasks, "rounds": len(measured), "seconds": seconds,
        "round_ms": 1e3 * seconds / len(measured),
        "predicted_round_ms": 1e3 * predicted_s,
        "effective_tokens": effective, "rows": rows,
        "effective_tokens_per_s": effective / seconds,
        "host_ms_per_round": statistics.mean(r.duration_ns for r in measured) / 1e6,
        "htasks": [
            {
                "tasks": len(htask.slot_of),
                "shapes": [shape.padded_tokens for shape in htask.shapes],
                "replays": replays.get(index, {}),
            }
            for index, htask in enumerate(plan.htasks)
        ],
        "captured": all(isinstance(runner, CapturedRunner) for runner in watch.runners),
        "notices": watch.notices,
        "capture_s": sum(span.duration_ns for span in watch.spans) / 1e9,
        "captures": len(watch.spans), "plans": len(plans),
        "peak_memory_bytes": peak, "predicted_peak_bytes": predicted,
        "idle_bytes": executor._idle_bytes(), **_taken(),
        "first_losses": [values[0] for values in losses.values()],
        "last_losses": [values[-1] for values in losses.values()],
    }  # fmt: skip


def _taken() -> dict[str, int]:
    """What the allocator has reserved at most, and what is taken of the GPU now by everybody."""
    if not torch.cuda.is_available():
        return {}
    left, total = torch.cuda.mem_get_info()
    return {"reserved_bytes": torch.cuda.max_memory_reserved(), "taken_bytes": total - left}


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
