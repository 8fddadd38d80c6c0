"""The real executor: carries plans out in torch, on the calling thread.

Time is monotonic, from the executor's construction on. ``wait`` starts no micro-batch at or after
``until_ns``; the one under way at that time is finished, so ``wait`` may come back late by one
micro-batch, with events of the later time. A round stays open over such a return and goes on with
the next ``wait``. Instances on one device take turns, a round each.

An engine journals what ``wait`` returned before it calls anything else here. So at the next call
the checkpoint of a task whose end was told is needed no longer, and is removed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from muxtune.errors import ConfigError, DataError, MuxTuneError, TaskError
from muxtune.planning.journal import JournalBatch
from muxtune.planning.step_builder import StepBuilder
from muxtune.runtime.adapters import adapter_method
from muxtune.runtime.adapters.contract import Place
from muxtune.runtime.adapters.ia3 import reads_input
from muxtune.runtime.backbone import Backbone, BackboneStore
from muxtune.runtime.bank import TaskState, drop
from muxtune.runtime.batch import TextLibrary
from muxtune.runtime.checkpoint import (
    CheckpointWriter,
    checkpointed_steps,
    fingerprint,
    load_checkpoint,
    make_snapshot,
)
from muxtune.runtime.continuing import Past, keep_metrics, read_past
from muxtune.runtime.evaluate import perplexity
from muxtune.runtime.instance import RunningInstance
from muxtune.runtime.memory import MemoryMeter, MemoryMonitor
from muxtune.runtime.optimizer import SCHEDULES
from muxtune.runtime.options import TorchOptions
from muxtune.runtime.peft_io import write_adapter
from muxtune.runtime.records import MetricsWriter, SpanRecord, StepListener
from muxtune.runtime.static_step.model import GROUPS
from muxtune.runtime.tasks import GuardedLengths, Phase, RuntimeTask
from muxtune.types import (
    NO_EPOCH,
    Cursor,
    Event,
    EventKind,
    FailureData,
    InstanceSpec,
    Plan,
    ResultData,
    TaskReadyData,
    TaskSpec,
)

METRICS_NAME = "metrics.jsonl"
_LONGEST_SLEEP_S = 3600.0
_FOREVER_NS = 2**62  # an engine that waits for nothing in particular says at least this
_ENDS = {EventKind.TASK_DONE, EventKind.TASK_FAILED, EventKind.TASK_CANCELLED}


class _Job(NamedTuple):
    """Something for ``wait`` to do: read a task's data, start an instance, or (with the instance's
    name and ``is_plan``) apply a plan that waits for these."""

    work: Callable[[], None]
    task_id: str = ""
    instance_id: str = ""
    is_plan: bool = False


class TorchExecutor:
    """Executor on torch (see ``muxtune.protocols.Executor``).

    ``make_instance(spec, backbone, executor)``: how instances run; by default on one device.
    ``library`` holds the tasks' text (``DatasetLibrary``). Adapters go to
    ``options.output_dir/adapters/TASK``, metrics to ``options.output_dir/metrics.jsonl``.
    Raises OutputError from ``wait`` when results cannot be written.
    """

    def __init__(
        self,
        builder: StepBuilder,
        backbones: BackboneStore,
        library: TextLibrary,
        options: TorchOptions,
        listeners: Sequence[StepListener] = (),
        clock_ns: Callable[[], int] = time.monotonic_ns,
        make_instance: Callable[..., RunningInstance] | None = None,
    ) -> None:
        self._make_instance = make_instance or _on_one_device
        self.builder, self.backbones, self.library = builder, backbones, library
        self.options = options
        self._metrics = MetricsWriter(options.output_dir / METRICS_NAME)
        self.listeners: Sequence[StepListener] = (self._metrics, *listeners)
        self.tasks: dict[str, RuntimeTask] = {}
        self.lengths = GuardedLengths(library, self.tasks)
        self.memory = MemoryMeter(backbones.device)
        self.monitor = MemoryMonitor(self.memory, options.memory_pressure_share)
        self._checkpoints = CheckpointWriter()
        self._past: Past | None = None
        self._told_ends: list[str] = []  # tasks whose end the last ``wait`` returned
        self._clock_ns, self._start_ns = clock_ns, clock_ns()
        self._instances: dict[str, RunningInstance] = {}
        self._jobs: deque[_Job] = deque()
        self._events: list[Event] = []
        self._notices: list[str] = []
        self._stream: torch.cuda.Stream | None = None
        self._turn: str = ""  # the instance that ran last
        self._last_event_ns = 0

    # -- the protocol

    @property
    def now_ns(self) -> int:
        return self._clock_ns() - self._start_ns

    def start(self, instance: InstanceSpec) -> None:
        """The backbone is loaded by ``wait``; later INSTANCE_READY or INSTANCE_FAILED."""
        work = lambda: self._start_instance(instance)  # noqa: E731
        self._jobs.append(_Job(work, instance_id=instance.instance_id))

    def stop(self, instance_id: str) -> None:
        """At once: its tasks keep what they have done and can be placed elsewhere."""
        self._jobs = deque(job for job in self._jobs if job.instance_id != instance_id)
        instance = self._instances.pop(instance_id, None)
        if instance is not None:
            with self._on_stream():
                instance.release_all()
        self.emit(EventKind.INSTANCE_STOPPED, "", instance_id, NO_EPOCH, None)

    def prepare(self, task: TaskSpec) -> None:
        """The data is read by ``wait``; later TASK_READY or TASK_FAILED."""
        self._jobs.append(_Job(lambda: self._prepare_task(task), task.task_id))

    def apply(self, plan: Plan) -> None:
        """Takes over when the running round ends, or the first round of a plan that has had none
        yet, so that plans that come faster than takeovers starve nobody; after a resume, once its
        instance is started and its tasks are prepared. Raises ConfigError for an instance that
        does not run or a task that is not ready, and that nobody has asked for."""
        self._forget_told()
        name = plan.instance_id
        self._jobs = deque(
            job for job in self._jobs if not (job.is_plan and job.instance_id == name)
        )
        starting = {job.instance_id for job in self._jobs}
        preparing = {job.task_id for job in self._jobs}
        if name not in self._instances and name not in starting:
            raise ConfigError("plan.instance_id", f"'{name}' is not running", "Start it first")
        missing = {task_id for task_id in plan.task_ids if task_id not in self.tasks}
        if missing - preparing:
            problem = f"task '{min(missing - preparing)}' is not prepared"
            raise ConfigError("plan.htasks", problem, "Wait for its TASK_READY first")
        if missing or name not in self._instances:
            work = lambda: self._apply_late(plan)  # noqa: E731
            self._jobs.append(_Job(work, instance_id=name, is_plan=True))
        else:
            self._instances[name].next_plan = plan

    def cancel(self, task_id: str) -> None:
        """Between micro-batches, so at once. A task that has ended already stays as it is."""
        waiting = [job for job in self._jobs if job.task_id == task_id]
        for job in waiting:
            self._jobs.remove(job)
        task = self.tasks.get(task_id)
        with self._on_stream():
            for instance in self._instances.values():
                if instance.holds(task_id):
                    instance.settle_all()
        if task is not None and task.phase is Phase.LIVE:
            instance_id, epoch = self._where(task_id)
            self._end(task)
            self.emit(EventKind.TASK_CANCELLED, task_id, instance_id, epoch, task.steps_done)
        elif task is None and waiting:
            steps = 0 if not self._resumes else self._checkpointed_steps(task_id)
            self.emit(EventKind.TASK_CANCELLED, task_id, "", NO_EPOCH, steps)

    def wait(self, until_ns: int) -> list[Event]:
        """See the top of the file. Returns [] early when nothing is left to do until for ever.

        Raises OutputError when results, or the checkpoints before, cannot be written.
        """
        with self._on_stream():
            return self._wait(until_ns)

    def _wait(self, until_ns: int) -> list[Event]:
        self._forget_told()
        self._checkpoints.check()
        while self._jobs or not self._events:
            if self.now_ns >= until_ns:
                break
            if self._jobs:
                # All of them come before any training: tasks that come together are told together,
                # so that one plan is made for them and not one for each.
                self._jobs.popleft().work()
                continue
            instance = self._next_instance()
            if instance is not None:
                instance.advance()
                self._watch_memory(instance)
            elif not self._pass_time(until_ns):
                break
        if not self._events:
            return []
        for instance in self._instances.values():
            instance.tell_progress_so_far()
        return self._take_events()

    def restore(self, history: Sequence[tuple[JournalBatch, Sequence[object]]]) -> None:
        """Called by ``Engine.resume`` before it repeats its commands: tasks will go on from their
        checkpoints, the clock from where the journal and the metrics end, and the metrics lose
        the steps that will be redone. An executor that has lived on changes nothing.

        Raises OutputError when the metrics cannot be written.
        """
        if self._instances or self.tasks:
            return
        past = self._past = read_past(record for record, _ in history)

        def last_step(task_id: str) -> int | None:
            return None if task_id in past.ended else self._checkpointed_steps(task_id)

        self._told_ends.extend(sorted(past.ended))
        self._forget_told()  # a kill may have come between the journal's line and this
        latest_ns = keep_metrics(self._metrics.path, last_step)
        self._last_event_ns = max(past.now_ns, latest_ns)
        self._start_ns = self._clock_ns() - self._last_event_ns

    # -- for reports

    @property
    def instances(self) -> tuple[str, ...]:
        return tuple(self._instances)

    def accounted_peak_bytes(self) -> int:
        """Measured peak memory, plus a copy of the backbone for every further instance of the
        same model: on one device they share one copy, as separate processes would not."""
        extra = 0
        seen: set[int] = set()
        for instance in self._instances.values():
            if id(instance.backbone) in seen:
                extra += instance.backbone.weight_bytes
            seen.add(id(instance.backbone))
        return self.memory.peak_bytes() + extra

    def close(self) -> None:
        """Finish writing checkpoints, and close the metrics file. Raises OutputError."""
        self._metrics.close()
        self._checkpoints.close()

    # -- jobs

    def _start_instance(self, spec: InstanceSpec) -> None:
        if spec.instance_id not in self._instances:
            start_ns = self.now_ns
            try:
                backbone = self.backbones.get(spec.model)
                instance = self._make_instance(spec, backbone, self)
            except (MuxTuneError, OSError, RuntimeError, ValueError) as error:
                data = FailureData(str(error))
                self.emit(EventKind.INSTANCE_FAILED, "", spec.instance_id, NO_EPOCH, data)
                return
            self._instances[spec.instance_id] = instance
            self.monitor.begin(backbone.weight_bytes)
            instance.span("load", start_ns, self.now_ns, ())
        self.emit(EventKind.INSTANCE_READY, "", spec.instance_id, NO_EPOCH, None)

    def _prepare_task(self, spec: TaskSpec) -> None:
        known = self.tasks.get(spec.task_id)
        if known is None or known.spec != spec:
            start_ns = self.now_ns
            try:
                _check_task(spec, self.backbones.get(spec.model))
                _check_captured(spec, self.backbones.get(spec.model), self.options)
                ready = self.library.add(spec)
                self._check_same_data(spec, ready)
            except Exception as error:
                message = str(error) if isinstance(error, MuxTuneError) else repr(error)
                data = FailureData(message)
                self.emit(EventKind.TASK_FAILED, spec.task_id, "", NO_EPOCH, data)
                return
            known = self.tasks[spec.task_id] = RuntimeTask(spec, ready)
            self._tell_span("prepare", start_ns, spec.task_id)
        self.emit(EventKind.TASK_READY, spec.task_id, "", NO_EPOCH, known.ready)

    def _check_same_data(self, spec: TaskSpec, ready: TaskReadyData) -> None:
        """Raises DataError when a resumed task would go on with other data."""
        first = None if self._past is None else self._past.ready.get(spec.task_id)
        now = (ready.num_steps, ready.lengths.content_hash)
        if first is not None and now != (first.num_steps, first.lengths.content_hash):
            raise DataError(
                spec.data.path,
                f"it is not what task '{spec.task_id}' was trained on before the run was resumed",
                "Bring the old content back, or submit the task to a new run",
            )

    def _apply_late(self, plan: Plan) -> None:
        """A plan whose instance or task could not come back is dropped: the failure was told, and
        another plan follows."""
        instance = self._instances.get(plan.instance_id)
        if instance is not None and all(task_id in self.tasks for task_id in plan.task_ids):
            instance.next_plan = plan

    # -- what instances ask for

    def emit(
        self, kind: EventKind, task_id: str, instance_id: str, epoch: int, data: object
    ) -> None:
        """Its time is set when ``wait`` hands the instant's events out."""
        self._events.append(Event(0, kind, task_id, instance_id, epoch, data))

    def join(self, task: RuntimeTask, instance: RunningInstance) -> None:
        """A fresh adapter, or the one of a checkpoint. Raises ConfigError or DataError."""
        state = instance.create_state(task.spec, task.num_steps)
        if self._resumes:
            self._restore(task, state)
        task.state, task.last_step_ns = instance.adopt_state(state), self.now_ns

    def settle(self, task: RuntimeTask, instance: RunningInstance) -> None:
        if task.perplexity_before is None:
            task.perplexity_before = self._perplexity(task, instance)
        task.last_step_ns = self.now_ns

    def finish(self, task: RuntimeTask, instance: RunningInstance) -> None:
        """Score, write the adapter, tell. A task that was finished before is told again."""
        if task.result is None:
            assert task.state is not None
            after = self._perplexity(task, instance)
            folder = write_adapter(
                self.options.adapter_folder(task.spec.task_id),
                task.spec,
                instance.whole_parameters(task),
                instance.backbone,
            )
            task.result = ResultData(
                task.steps_done,
                task.effective_tokens,
                str(folder),
                task.final_loss,
                task.perplexity_before,
                after,
            )
            task.end(Phase.DONE)
        take = (EventKind.TASK_DONE, task.spec.task_id, instance.spec.instance_id)
        self.emit(*take, instance.epoch, task.result)

    def fail(self, task: RuntimeTask, instance: RunningInstance, problem: str) -> None:
        if task.phase is not Phase.LIVE:
            return
        steps = task.steps_done
        self._end(task)
        remedy = "Its adapter is lost; correct the task and submit it again. Other tasks go on"
        message = str(TaskError(task.spec.task_id, problem, remedy))
        place = (instance.spec.instance_id, instance.epoch)
        self.emit(EventKind.TASK_FAILED, task.spec.task_id, *place, FailureData(message, steps))

    def wants_checkpoint(self, task: RuntimeTask, step: int) -> bool:
        every = self.options.checkpoint_steps
        return bool(every) and step % every == 0 and task.state is not None

    def checkpoint(self, task: RuntimeTask, instance: RunningInstance, step: int) -> None:
        """Called at each step boundary of a task."""
        if not self.wants_checkpoint(task, step):
            return
        start_ns = self.now_ns
        extra = {
            "final_loss": task.final_loss,
            "effective_tokens": task.effective_tokens,
            "perplexity_before": task.perplexity_before,
        }
        snapshot = make_snapshot(instance.copy_of(task, step), step, _fingerprint(task), extra)
        self._checkpoints.submit(self.options.checkpoint_folder(task.spec.task_id), snapshot)
        self._tell_span("checkpoint", start_ns, task.spec.task_id)

    def notice(self, text: str) -> None:
        if text not in self._notices:
            self._notices.append(text)
            for listener in self.listeners:
                listener.on_notice(text)

    def _restore(self, task: RuntimeTask, state: TaskState) -> None:
        folder = self.options.checkpoint_folder(task.spec.task_id)
        extra = load_checkpoint(folder, state, _fingerprint(task))
        if extra is None:
            return
        task.cursor = Cursor(state.step, None)
        task.final_loss = extra["final_loss"]
        task.effective_tokens = extra["effective_tokens"]
        task.perplexity_before = extra["perplexity_before"]

    # -- inside

    def _on_stream(self) -> AbstractContextManager[object]:
        """All work on a GPU goes to one stream, and to one that can be captured: then passes,
        copies of checkpoints and moves of adapters keep the order in which they are asked for."""
        if self.backbones.device.type != "cuda":
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.backbones.device, priority=-1)
        return torch.cuda.stream(self._stream)

    @property
    def _resumes(self) -> bool:
        return self.options.resume or self._past is not None

    def _checkpointed_steps(self, task_id: str) -> int:
        return checkpointed_steps(self.options.checkpoint_folder(task_id))

    def _forget_told(self) -> None:
        """See the top of the file."""
        for task_id in self._told_ends:
            if self.options.checkpoint_steps or self._resumes:
                self._checkpoints.remove(self.options.checkpoint_folder(task_id))
        self._told_ends.clear()

    def _watch_memory(self, instance: RunningInstance) -> None:
        """Between rounds, so that the next plan takes over before anything else runs."""
        if instance.is_mid_round or instance.plan is None or not instance.plan.htasks:
            return
        name, epoch = instance.spec.instance_id, instance.epoch
        limit_bytes = sum(item.spec.memory_limit_bytes for item in self._instances.values())
        pressure = self.monitor.check(name, epoch, limit_bytes, self._idle_bytes)
        if pressure is not None:
            instance.press()
            self.emit(EventKind.MEMORY_PRESSURE, "", name, epoch, pressure)

    def _idle_bytes(self) -> int:
        return sum(item.runners.idle_bytes for item in self._instances.values())

    def _end(self, task: RuntimeTask) -> None:
        """Failed or cancelled: its slot is free at once, its memory with it."""
        if task.state is not None:
            drop(task.state)
        task.end(Phase.GONE)

    def _perplexity(self, task: RuntimeTask, instance: RunningInstance) -> float | None:
        if not self.options.evaluate_tokens:
            return None
        start_ns = self.now_ns
        assert task.state is not None
        value = perplexity(
            instance.backbone,
            task.state,
            self.library.validation(task.spec.task_id),
            self.options.evaluate_tokens,
            instance.evaluate,
        )
        instance.span("evaluate", start_ns, self.now_ns, (task.spec.task_id,))
        return value

    def _where(self, task_id: str) -> tuple[str, int]:
        for instance_id, instance in self._instances.items():
            if instance.holds(task_id):
                return instance_id, instance.epoch
        return "", NO_EPOCH

    def _next_instance(self) -> RunningInstance | None:
        """The one in the middle of a round goes on; else the next in turn that has work."""
        current = self._instances.get(self._turn)
        if current is not None and current.is_mid_round:
            return current
        order = sorted(self._instances, key=lambda name: (name <= self._turn, name))
        for name in order:
            if self._instances[name].is_runnable:
                self._turn = name
                return self._instances[name]
        return None

    def _pass_time(self, until_ns: int) -> bool:
        """Nothing can run before ``until_ns``. False when that is for ever."""
        if until_ns >= _FOREVER_NS:
            return False
        missing_ns = until_ns - self.now_ns
        if self.options.skip_idle:
            self._start_ns -= max(missing_ns, 0)
        elif missing_ns > 0:
            time.sleep(min(missing_ns / 1e9, _LONGEST_SLEEP_S))
        return True

    def _take_events(self) -> list[Event]:
        now_ns = self._last_event_ns = max(self.now_ns, self._last_event_ns)
        events, self._events = self._events, []
        self._told_ends.extend(event.task_id for event in events if event.kind in _ENDS)
        return sorted(
            (event._replace(time_ns=now_ns) for event in events), key=lambda e: e.sort_key
        )

    def _tell_span(self, name: str, start_ns: int, task_id: str) -> None:
        record = SpanRecord(name, "", -1, start_ns, self.now_ns - start_ns, (task_id,))
        for listener in self.listeners:
            listener.on_span(record)


def _on_one_device(spec: InstanceSpec, backbone: Backbone, host: TorchExecutor) -> RunningInstance:
    _check_replicas(spec)
    return RunningInstance(spec, backbone, host)


def _check_replicas(spec: InstanceSpec) -> None:
    if len(spec.replicas) != 1 or spec.replicas[0].num_gpus != 1:
        raise ConfigError(
            "cluster.replicas",
            f"instance '{spec.instance_id}' asks for {spec.replicas}, but this executor runs one "
            "replica on one device",
            "Use tp=1 and pp=1",
        )


def _check_task(spec: TaskSpec, backbone: Backbone) -> None:
    """What only the model can tell. Raises ConfigError."""
    backbone.check_task(spec)
    method = adapter_method(spec.adapter.method)
    method.check(spec.adapter)
    backbone.sites_of(method.place, spec.adapter.targets)
    virtual_tokens = 0 if method.place is Place.LINEAR else spec.adapter.rank
    _check_positions(spec, backbone, virtual_tokens)
    if spec.optimizer.schedule not in SCHEDULES:
        raise ConfigError(
            "optimizer.schedule",
            f"'{spec.optimizer.schedule}' does not exist",
            f"Choose one of: {', '.join(SCHEDULES)}",
        )


def _check_captured(spec: TaskSpec, backbone: Backbone, options: TorchOptions) -> None:
    """A captured step fuses linears that read the same input, which one task cannot scale for one
    of them alone: where nothing but a captured step is wanted, raises ConfigError."""
    if spec.adapter.method != "ia3" or options.step != "captured":
        return
    fused = {name for group in GROUPS if len(group) > 1 for name in group}
    for site in backbone.matching_sites(spec.adapter.targets):
        leaf = site.name.rpartition(".")[2]
        if leaf in fused and reads_input(spec.adapter, site.name):
            problem = f"names {leaf}, whose input other linears of a captured step read too"
            remedy = "Leave it out, or set backend.step=eager"
            raise ConfigError("adapter.options.feedforward_modules", problem, remedy)


def _check_positions(spec: TaskSpec, backbone: Backbone, virtual_tokens: int) -> None:
    """A learned position that does not exist cannot be looked up; a rotation can. Windows are not
    computed."""
    positions, longest = backbone.learned_positions, spec.data.max_length_tokens
    if positions is not None and longest + virtual_tokens > positions:
        before = f" after {virtual_tokens} virtual ones" if virtual_tokens else ""
        problem = f"{longest} tokens{before} are more than the {positions} positions of "
        remedy = f"Give at most {positions - virtual_tokens}"
        raise ConfigError("data.max_length_tokens", problem + spec.model, remedy)
    reach = backbone.reach_tokens
    if reach is not None and longest + virtual_tokens > reach:
        problem = f"{longest} tokens are more than the {reach} that {spec.model} sees at once (a "
        problem += "sliding window, or angles that change with the length), which is not supported"
        raise ConfigError(
            "data.max_length_tokens", problem, f"Give at most {reach - virtual_tokens}"
        )


def _fingerprint(task: RuntimeTask) -> str:
    return fingerprint(task.spec, task.ready.lengths.content_hash)


__all__ = ["METRICS_NAME", "TaskReadyData", "TorchExecutor"]
