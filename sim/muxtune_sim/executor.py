"""The simulated executor: actors on a SimPy environment whose clock counts nanoseconds.

There is one actor an instance, no process a task and no event a training step. A wake carries the
generation of its actor, so that a wake that was overtaken is recognised and ignored; nothing is
interrupted and nothing queues in SimPy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from simpy import Environment, Timeout
from simpy import Event as SimEvent

from muxtune.deciding import Command
from muxtune.engine import FOREVER_NS
from muxtune.errors import MuxTuneError
from muxtune.hardware import NO_FAILURES
from muxtune.planning.journal import JournalBatch
from muxtune.planning.step_builder import StepBuilder
from muxtune.protocols import CostBook, TaskLibrary
from muxtune.types import (
    NO_EPOCH,
    Cursor,
    Event,
    EventKind,
    FailureData,
    GpuData,
    InstanceSpec,
    Plan,
    ResultData,
    TaskReadyData,
    TaskSpec,
    new_tuple,
)
from muxtune_sim.actor import FIRST_CURSOR, InstanceActor, departure
from muxtune_sim.hardware import Hardware, Unit
from muxtune_sim.options import DEFAULT_SIM_OPTIONS, LAYOUTS, InstanceTotals, SimOptions, to_ns
from muxtune_sim.pacing import Pacer
from muxtune_sim.tokens import TokenTables

# By names of their own, because an enumeration looks its members up in Python.
TASK_READY, TASK_DONE = EventKind.TASK_READY, EventKind.TASK_DONE
event_order = Event.sort_key.fget


class Wake(SimEvent):
    """A timeout that knows whom it wakes: lighter than one with a callback of its own."""

    def __init__(
        self, env: Environment, delay_ns: int, actor: InstanceActor, call: Callable[..., None]
    ) -> None:
        self.env, self.callbacks = env, [call]
        self._ok, self._value = True, None
        self.actor, self.generation = actor, actor.generation
        env.schedule(self, delay=delay_ns)


class SimExecutor:
    """Carries plans out on simulated instances. See ``muxtune.protocols.Executor``.

    Task finish, release, withdrawal and failure are recognised at the end of a round. Every
    command is idempotent, and a repeated one is answered again, which is what resuming needs.
    """

    def __init__(
        self,
        builder: StepBuilder,
        costs: CostBook,
        library: TaskLibrary,
        options: SimOptions = DEFAULT_SIM_OPTIONS,
    ) -> None:
        self.builder, self.library, self.options = builder, library, options
        self.pacer = Pacer(builder, library, options.times == LAYOUTS)
        self.now_ns = 0
        self._costs, self._one_thread = costs, options.one_thread
        self._env = Environment(0)
        self._events: list[Event] = []
        self._actors: dict[str, InstanceActor] = {}
        self._finished: list[InstanceTotals] = []
        self._unsettled: dict[str, InstanceActor] = {}
        self._sharing: dict[str, list[InstanceActor]] = {}  # by GPU
        self._tokens = TokenTables(library)
        self._ready: dict[str, TaskReadyData] = {}
        self._parked: dict[str, Cursor] = {}
        self._host: dict[str, InstanceActor] = {}
        self._ended: dict[str, Event] = {}  # until no plan holds the task any longer
        self._hardware: Hardware | None = None
        if options.nodes and options.failures != NO_FAILURES:
            self._hardware = Hardware(options.nodes, options.failures, self)

    # -- the protocol

    def start(self, instance: InstanceSpec) -> None:
        name = instance.instance_id
        if name in self._actors:
            self.emit(Event(self.now_ns, EventKind.INSTANCE_READY, "", name))
            return
        if self._hardware is not None and not self._hardware.is_up(instance.gpu_ids):
            self._emit_after(0, EventKind.INSTANCE_FAILED, "", name, FailureData("its GPU is down"))
            return
        cost = self._costs(instance.model, instance.device)
        actor = self._actors[name] = InstanceActor(instance, cost, self, self.now_ns)
        for gpu in instance.gpu_ids:
            sharing = self._sharing.setdefault(gpu, [])
            sharing.append(actor)
            actor.neighbours.append(sharing)
        start_s = self.options.start_s
        if self.options.charge_startup:
            start_s += cost.startup_s(instance.replicas[0]).value
        if start_s > 0:
            self._later(to_ns(start_s), lambda: self._tell_ready(actor))
        else:
            self._tell_ready(actor)
        if name in self.options.fail_instance_at_ns:
            delay_ns = self.options.fail_instance_at_ns[name] - self.now_ns
            self._later(delay_ns, lambda: self._fail_instance(name))

    def _tell_ready(self, actor: InstanceActor) -> None:
        """Unless it was stopped or failed on the way."""
        name = actor.name
        if self._actors.get(name) is actor:
            self.emit(Event(self.now_ns, EventKind.INSTANCE_READY, "", name))

    def stop(self, instance_id: str) -> None:
        if self._remove(instance_id) is not None:
            self.emit(Event(self.now_ns, EventKind.INSTANCE_STOPPED, "", instance_id))

    def prepare(self, task: TaskSpec) -> Event | None:
        name, options = task.task_id, self.options
        if name not in self._ready:
            prepare_ns = to_ns(options.prepare_s) if options.prepare_s else 0
            try:
                data = self.library.add(task)
            except MuxTuneError as error:
                failure = FailureData(str(error))
                self._emit_after(prepare_ns, EventKind.TASK_FAILED, name, "", failure)
                return None
            self._ready[name] = data
            self._parked[name] = FIRST_CURSOR
            if name in options.fail_task_at_ns:
                self._fail_task_at(name, options.fail_task_at_ns[name])
            if prepare_ns > 0:
                self._emit_after(prepare_ns, EventKind.TASK_READY, name, "", data)
                return None
        if self._one_thread:  # heard by the next wait, with what was done so far
            self._emit_after(0, EventKind.TASK_READY, name, "", self._ready[name])
            return None
        parts = (self.now_ns, TASK_READY, name, "", NO_EPOCH, self._ready[name])
        return new_tuple(Event, parts)

    def apply(self, plan: Plan) -> None:
        actor = self._actors.get(plan.instance_id)
        if actor is None:
            return
        if not actor.apply(plan, self.now_ns):
            self._answer_again(plan, actor)

    def cancel(self, task_id: str) -> None:
        self._withdraw(task_id, None)

    def wait(self, until_ns: int) -> list[Event]:
        env, events, coming = self._env, self._events, self._env._queue
        while not events:
            if self.now_ns >= until_ns:
                return []
            if self._unsettled:
                self._settle()
                continue
            instant_ns = int(coming[0][0]) if coming else FOREVER_NS
            if instant_ns > until_ns or not coming:
                if until_ns < FOREVER_NS:
                    late_ns = self._late_ns(until_ns) if self._one_thread else 0
                    if late_ns:
                        until_ns += late_ns
                        continue
                    self.now_ns = until_ns
                return []
            self.now_ns = instant_ns
            while coming and coming[0][0] == instant_ns:
                env.step()
        if self._one_thread:
            for actor in self._actors.values():
                actor.tell_progress_so_far(self.now_ns)
        self._events = []
        if len(events) > 1:
            events.sort(key=event_order)  # type: ignore[arg-type]
        return events

    # -- beside the protocol

    def restore(self, history: Iterable[tuple[JournalBatch, Sequence[Command]]]) -> None:
        """Brings a fresh executor to where the commands of a journal lead. One that lived through
        them already stays as it is."""
        if self._actors:
            return
        for record, commands in history:
            self._wait_again(record)
            self._events.clear()
            for event in record.events:
                if event.kind is EventKind.TASK_ARRIVED:
                    self.prepare(event.data)  # type: ignore[arg-type]
            for verb, argument in commands:
                getattr(self, verb)(argument)
            for plan in record.plans:
                self.apply(plan)

    def instance_totals(self) -> list[InstanceTotals]:
        running = [actor.totals(self.now_ns) for actor in self._actors.values()]
        return sorted(self._finished + running)

    def down_ns(self) -> dict[str, int]:
        """For how long each GPU that ever failed was down."""
        return self._hardware.down_ns(self.now_ns) if self._hardware else {}

    # -- for the hardware

    def later(self, delay_ns: int, call: Callable[[], None]) -> None:
        self._later(delay_ns, call)

    def gpus_changed(self, kind: EventKind, unit: Unit, gpu_ids: tuple[str, ...]) -> None:
        if kind is EventKind.GPUS_DOWN:
            lost = {actor.name for gpu in gpu_ids for actor in self._sharing.get(gpu, ())}
            for name in sorted(lost):
                self._fail_instance(name, f"{unit.message} of {unit.name}")
        self.emit(Event(self.now_ns, kind, data=GpuData(gpu_ids, unit.name, unit.message)))

    # -- for actors

    def emit(self, event: Event) -> None:
        self._events.append(event)

    def wake(self, actor: InstanceActor, delay_ns: int) -> None:
        # SimPy's clock stands at its last event, ours may be ahead of it.
        Wake(self._env, delay_ns + self.now_ns - int(self._env._now), actor, self._on_wake)

    def _on_wake(self, wake: Wake) -> None:
        if wake.actor.generation == wake.generation:
            wake.actor.on_wake(self.now_ns)

    def settle_later(self, actor: InstanceActor) -> None:
        self._unsettled[actor.name] = actor

    def settled(self, actor: InstanceActor) -> None:
        self._unsettled.pop(actor.name, None)

    def busy_changed(self, actor: InstanceActor) -> None:
        if actor.is_running == actor.is_busy:
            return
        actor.is_busy = actor.is_running
        for sharing in actor.neighbours:
            if len(sharing) > 1:
                for neighbour in sharing:
                    neighbour.set_share(self._share_of(neighbour), self.now_ns)

    def tokens_at(self, task_id: str, cursor: Cursor) -> int:
        return self._tokens.tokens_at(task_id, cursor)

    def take_cursor(self, task_id: str, host: InstanceActor) -> Cursor | None:
        cursor = self._parked.pop(task_id, None)
        if cursor is not None:
            self._host[task_id] = host
        return cursor

    def park(self, task_id: str, cursor: Cursor) -> None:
        self._parked[task_id] = cursor
        self._host.pop(task_id, None)

    def finish(self, task_id: str, steps: int, tokens: int, host: InstanceActor) -> None:
        assert host.plan is not None
        result, epoch = ResultData(steps, tokens), host.plan.epoch
        parts = (self.now_ns, TASK_DONE, task_id, host.name, epoch, result)
        self.end(new_tuple(Event, parts))

    def tell_end_again(self, task_id: str) -> None:
        if task_id in self._ended:
            self.emit(self._ended[task_id]._replace(time_ns=self.now_ns))

    def end(self, event: Event) -> None:
        task_id = event.task_id
        self._host.pop(task_id, None)
        self._ended[task_id] = event
        self._events.append(event)

    def forget(self, task_id: str) -> None:
        if task_id in self._parked or task_id in self._host:  # it only moved
            return
        self._ended.pop(task_id, None)
        self._ready.pop(task_id, None)
        self.library.discard(task_id)

    # -- inside

    def _answer_again(self, plan: Plan, actor: InstanceActor) -> None:
        """The plan was applied before; whoever asks again may have missed what came of it."""
        actor.tell_applied(self.now_ns)
        for task_id in plan.task_ids:
            self.tell_end_again(task_id)
        for task_id in sorted(plan.drains & self._parked.keys()):
            steps = self._parked[task_id].step
            kind, name = EventKind.TASK_RELEASED, plan.instance_id
            self.emit(Event(self.now_ns, kind, task_id, name, plan.epoch, steps))

    def _late_ns(self, now_ns: int) -> int:
        return max((actor.deaf_ns(now_ns) for actor in self._actors.values()), default=0)

    def _settle(self) -> None:
        unsettled, self._unsettled = self._unsettled, {}
        for actor in unsettled.values():
            actor.settle(self.now_ns)

    def _wait_again(self, record: JournalBatch) -> None:
        """The one wait that led to a recorded batch; what it returns is in the record."""
        own = (EventKind.TASK_ARRIVED, EventKind.TASK_READY, EventKind.WAKE)
        while self.now_ns < record.time_ns:
            self.wait(record.time_ns)
            if self.now_ns == record.time_ns:
                return
        if not self._events and any(event.kind not in own for event in record.events):
            self.wait(record.time_ns + 1)  # something starts at this very instant, and tells

    def _share_of(self, actor: InstanceActor) -> int:
        counts = (sum(other.is_busy for other in self._sharing[gpu]) for gpu in actor.spec.gpu_ids)
        return max(1, max(counts, default=1))

    def _withdraw(self, task_id: str, message: str | None) -> None:
        """A task is cancelled (no message) or fails: at once, unless an instance works on it."""
        host = self._host.get(task_id)
        if host is not None and host.is_running:
            host.withdraw(task_id, message, self.now_ns)
            return
        cursor = host.cursors[task_id] if host is not None else self._parked.pop(task_id, None)
        if cursor is None:
            return
        if host is not None:
            host.silence(task_id)
        name = "" if host is None else host.name
        self.end(departure(self.now_ns, task_id, name, NO_EPOCH, cursor.step, message))
        if host is None and not any(actor.expects(task_id) for actor in self._actors.values()):
            self.forget(task_id)

    def _fail_task_at(self, task_id: str, time_ns: int) -> None:
        self._later(time_ns - self.now_ns, lambda: self._withdraw(task_id, "injected failure"))

    def _fail_instance(self, instance_id: str, message: str = "injected failure") -> None:
        actor = self._actors.get(instance_id)
        if actor is not None:
            data = actor.fail(self.now_ns, message)
            self._remove(instance_id)
            self.emit(Event(self.now_ns, EventKind.INSTANCE_FAILED, "", instance_id, data=data))

    def _remove(self, instance_id: str) -> InstanceActor | None:
        actor = self._actors.pop(instance_id, None)
        if actor is None:
            return None
        actor.stop(self.now_ns)
        self._unsettled.pop(instance_id, None)
        self._finished.append(actor.totals(self.now_ns))
        for gpu in actor.spec.gpu_ids:
            self._sharing[gpu].remove(actor)
        return actor

    def _emit_after(
        self, delay_ns: int, kind: EventKind, task_id: str, instance_id: str, data: object = None
    ) -> None:
        def emit() -> None:
            self.emit(Event(self.now_ns, kind, task_id, instance_id, data=data))

        if delay_ns > 0:
            self._later(delay_ns, emit)
        else:
            emit()

    def _later(self, delay_ns: int, call: Callable[[], None]) -> None:
        # SimPy's clock stands at its last event, ours may be ahead of it.
        delay_ns = max(0, delay_ns) + self.now_ns - int(self._env.now)
        timeout = Timeout(self._env, delay_ns)
        timeout.callbacks.append(lambda _event: call())  # type: ignore[union-attr]
